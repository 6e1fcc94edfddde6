import torch
from torch import nn

from attnlib.look.attribution import Rule, context_aware_saliency, relevance

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9 * 9, 5)).eval()
images = torch.rand(2, 3, 20, 20)
rules = {"0": Rule("zB", low=0.0, high=1.0), nn.Linear: "epsilon"}
r = relevance(model, images, target=[3, 1], rules=rules)
print(r.sum(1).shape, context_aware_saliency(r.abs(), most=20).shape)  # pixels, and the areas that they make
