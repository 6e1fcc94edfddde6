"""Depth without a range, and kinds of scenes by the text encoder at hand."""

import torch

from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.dense.scaledepth import ScaleDepth


def text_encoder(sentences):  # CLIP's in earnest
    return torch.stack([torch.sin(torch.arange(1, 7) * float(sum(map(ord, s)))) for s in sentences])


trunk = Features(resnet((4, 8), (1, 1), stem_dim=4, num_classes=0))
model = ScaleDepth(trunk, dim=16, num_heads=2, num_bins=8, depth=2, text_dim=6)
model.bind(text_encoder, ["kitchen", "street"])

images, depth = torch.randn(2, 3, 40, 27), 10 * torch.rand(2, 40, 27)
made = model(images)
terms = model.loss(made, {"depth": depth, "scene": torch.tensor([0, 1])})
print({name: round(float(term.detach()), 2) for name, term in terms.items()})
print(made.scale.tolist(), made.relative.amax((1, 2)).tolist(), tuple(model.predict(images).shape))
