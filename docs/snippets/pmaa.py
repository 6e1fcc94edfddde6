"""PMAA on two dates: where each shows clouds, and the image without them; it takes turns with a discriminator."""

import torch

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.restore.adversarial import PatchDiscriminator
from attnlib.models.restore.pmaa import PMAA

model = PMAA(in_chans=4, num_dates=2, dim=8, discriminator=PatchDiscriminator(12, (8, 16)))
dates, clear = torch.rand(2, 2, 4, 32, 40) * 2 - 1, torch.rand(2, 4, 32, 40) * 2 - 1
optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 5e-4))
print({step: sorted(terms) for step, terms in train_batch(model, {"x": dates, "target": clear}, optimizers).items()})
made = model.eval()(dates)
print(tuple(made.image.shape), tuple(made.masks.shape))
