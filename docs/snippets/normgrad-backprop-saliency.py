import torch
from torch import nn

from attnlib.look.attribution import combine, meta_saliency, saliency

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
images = torch.randn(2, 3, 20, 20)
maps = saliency(model.eval(), images, modules=["1", "2"], target=[3, 5])  # NormGrad at two layers
print(combine(maps, size=(20, 20)).shape)
after_a_step = meta_saliency(saliency, model, images, target=[3, 5], modules=["2"])["2"]
