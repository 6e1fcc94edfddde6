"""Remember what is normal, train on it, and ask what is wrong with an image of another size."""

import torch

from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.dense.fod import FOD
from attnlib.models.protocol import Optimizers, train_batch

trunk = Features(resnet((4, 4), (1, 1), stem_dim=4, num_classes=0), (0, 1))
normal = torch.sin(torch.arange(32) * torch.pi / 2).expand(4, 3, 32, 32) + 0.1 * torch.randn(4, 3, 32, 32)

model = FOD(trunk, img_size=32, dims=(8, 8), num_heads=2, depth=1).remember(normal)
optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 1e-3))
terms = train_batch(model, {"x": normal}, optimizers)["all"]  # both sides of the minimax in one step
print({name: round(value, 3) for name, value in terms.items()})

pixels, images = model.predict(torch.randn(2, 3, 40, 27))
print(tuple(pixels.shape), tuple(images.shape))
