"""MEDUSA: one body looks at the whole image, a head for every scale of a backbone gates its features."""

import torch

import attnlib
from attnlib.models.medusa import SharedAttention

net = attnlib.create_model("resnet18", num_classes=2).eval()
model = SharedAttention(net, global_dim=8, body_size=64).eval()
x = torch.rand(1, 3, 96, 80)
print(model(x).equal(net(x)), {name: tuple(gate.shape) for name, gate in model.gates(x).items()})
