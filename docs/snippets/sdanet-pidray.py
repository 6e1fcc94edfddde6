"""SDANet's neck behind another one, in a small detector; and how much each level counts for one of them."""

import torch
from torch import nn

from attnlib.models.detect.anchor_free import AnchorFreeDetector, DecoupledHead
from attnlib.models.detect.pan import PAN, CSPBackbone
from attnlib.models.detect.sdanet import SelectiveNeck

dims = (8, 8, 16, 16, 16)
neck = nn.Sequential(PAN(dims[2:]), SelectiveNeck(dim=16, levels=3))
model = AnchorFreeDetector(CSPBackbone(dims, (1, 1, 1, 1)), neck, DecoupledHead(dims[2:], num_classes=12)).eval()
images = torch.rand(2, 3, 70, 90)
print(tuple(model(images).boxes.shape))

maps = neck[0](model.encoder(images))
refine = neck[1].refine[0]
channel, place = refine.weights(refine.gathered(maps))
print(tuple(channel.shape), tuple(place.shape))
