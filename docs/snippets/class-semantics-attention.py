import torch

from attnlib.models.detect.temporal import BoundaryDetector
from attnlib.nn.gates.class_semantics import ClassSemanticsAttention

gate = ClassSemanticsAttention(dim=64, semantic_dim=20)  # on any detector: its features, and what a recogniser says
features, scores = torch.randn(2, 100, 64), torch.randn(2, 100, 20)
print(gate(features, scores).shape, gate.gates(scores).time.shape)

detector = BoundaryDetector(in_dim=20, attention="csa")
print(detector.predict(scores)[0].bounds[:3])
