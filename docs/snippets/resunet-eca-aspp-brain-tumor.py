"""ResUNet with gates over channels and dilated convolutions, over a small backbone; masks compared by surface."""

import torch

from attnlib.bench.masks import mask_dice, surface_distance
from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.dense.resunet import ResUNet

trunk = resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=0, in_chans=4)
model = ResUNet(num_classes=4, dims=(4,) * 5, attention="eca", encoder=Features(trunk))
found, truth = model.predict(torch.randn(1, 4, 48, 40))[0] > 0, torch.zeros(48, 40, dtype=torch.bool)
truth[10:20, 10:20] = True
print(tuple(found.shape), mask_dice(truth, truth), surface_distance(truth.roll(1, 0), truth))
