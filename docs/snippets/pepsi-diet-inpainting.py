"""Patch attention fills a hole in a pattern; PEPSI trains with a region ensemble and fills holes of a free form."""

import torch

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.restore.masks import stroke_masks
from attnlib.models.restore.pepsi import PEPSI, REDDiscriminator
from attnlib.ops import patch_attention

stripes = torch.sin(torch.arange(24.0))[None, None, :, None].expand(1, 24, 24, 1).contiguous()
hole = torch.ones(1, 24, 24, dtype=torch.bool)
hole[:, 10, 10] = False
filled = patch_attention(stripes * hole[..., None], stripes, known=hole, scale=200.0, valid_only=True)
print("off by", round(float((filled - stripes)[0, 10, 10].abs()), 3))

model = PEPSI(dims=(4, 8, 8, 16), discriminator=REDDiscriminator(3, (8, 8), (32, 32)))
images, known = torch.rand(2, 3, 32, 32) * 2 - 1, stroke_masks(2, (32, 32), length=(4, 8), width=(1, 3))
optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 1e-4, betas=(0.5, 0.9)))
seen = train_batch(model, {"x": images, "known": known, "target": images}, optimizers)
print({step: sorted(terms) for step, terms in seen.items()}, tuple(model.predict(images, known).shape))
