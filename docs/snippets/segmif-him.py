"""SegMiF: a visible and an infrared image become one picture, and the classes of its pixels."""

import torch

from attnlib.models.dense.segmif import segmif

small = dict(embed_dims=(8, 16, 20, 32), depths=(1, 1, 1, 1))
model = segmif(num_classes=3, head_dim=16, encoder=small, dim=16, growth=8, num_heads=2).eval()
visible, infrared = torch.rand(1, 3, 40, 50), torch.rand(1, 1, 40, 50)
answer = model.predict(visible, infrared)
print(tuple(answer.classes.shape), tuple(answer.image.shape))
