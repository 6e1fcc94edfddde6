"""Classes, edges and depth out of one pass, and which experts were asked."""

import torch

from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.dense.taskexpert import DenseTask, TaskExpert

tasks = {"classes": DenseTask("classes", 3), "edges": DenseTask("edges", weight=50.0), "depth": DenseTask("depth")}
trunk = Features(resnet((4, 8), (1, 1), stem_dim=4, num_classes=0))
model = TaskExpert(tasks, trunk, num_experts=3, expert_dim=16)

images = torch.randn(2, 3, 40, 27)
terms = model.loss(model(images), {"classes": torch.randint(0, 3, (2, 40, 27)), "depth": torch.rand(2, 1, 40, 27)})
print({name: round(float(term.detach()), 2) for name, term in terms.items()})
print([tuple(gate.shape) for gate in model.gates(images)])  # three experts and the memory, for three tasks
