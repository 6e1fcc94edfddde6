"""A small DEYOLO on a pair of images, its loss and its answer; and the fusion alone, on any two maps of one grid."""

import torch

import attnlib
from attnlib.bench.worlds.pairs import make_pair

model = attnlib.create_model("deyolo_n", width=0.125, num_classes=2)
pairs = [make_pair(i) for i in range(2)]
visible, infrared = (torch.stack([getattr(p, name) for p in pairs]) for name in ("visible", "infrared"))
made = model(visible, infrared)
terms = model.loss(made, [{"boxes": p.boxes, "labels": p.labels} for p in pairs])
print({name: round(float(term.detach()), 3) for name, term in terms.items()}, tuple(made.boxes.shape))
print([tuple(found.boxes.shape) for found in model.predict(visible, infrared, threshold=0.01, most=5)])

fusion = attnlib.create("deyolo", dim=32, size=20)
one, other = fusion(torch.randn(1, 21, 25, 32), torch.randn(1, 21, 25, 32))
print(tuple(fusion.merge(one, other).shape))
