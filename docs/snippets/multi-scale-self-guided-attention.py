"""DAF over a small backbone: four scales train eight predictions, and four of them answer."""

import torch

from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.dense.daf import DAF

trunk = resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=0, in_chans=1)
model = DAF(num_classes=3, dim=8, encoder=Features(trunk, (1, 2, 3, 4)))
images, labels = torch.randn(2, 1, 48, 40), torch.randint(0, 3, (2, 48, 40))
terms = model.loss(model(images), labels)
print({name: round(float(term.detach()), 2) for name, term in terms.items()}, tuple(model.predict(images).shape))
