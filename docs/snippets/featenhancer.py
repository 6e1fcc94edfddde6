"""An enhancer before a small detector, on pictures in the dark: the detector's loss trains both."""

import torch

import attnlib
from attnlib.bench.worlds.pairs import make_pair
from attnlib.models.detect.anchor_free import AnchorFreeDetector, DecoupledHead
from attnlib.models.detect.featenhancer import Enhanced
from attnlib.models.detect.pan import PAN, CSPBackbone

dims = (8, 8, 8, 16, 16)
detector = AnchorFreeDetector(CSPBackbone(dims, (1, 1, 1, 1)), PAN(dims[2:]), DecoupledHead(dims[2:], 2))
model = Enhanced(detector, attnlib.create_model("featenhancer"))
scenes = [make_pair(i, seen="visible") for i in range(2)]
dark = torch.stack([0.1 * scene.visible for scene in scenes])
terms = model.loss(model(dark), [{"boxes": scene.boxes, "labels": scene.labels} for scene in scenes])
sum(terms.values()).backward()
print({name: round(float(term.detach()), 3) for name, term in terms.items()})
print(float((model.enhancer(dark).detach() - dark).abs().max()) < 8, len(model.predict(dark)))
