"""A score without a reference, and one with."""

import torch

import attnlib

small = dict(dim=16, num_heads=2, encoder_settings=dict(depths=(1, 1, 1, 1)))
images, distorted = torch.rand(2, 3, 50, 67), torch.rand(2, 3, 50, 67)

alone = attnlib.create_model("topiq_nr_resnet50", num_classes=5, **small)
print(alone(images).sum(-1), alone.predict(images))  # shares of five grades, and their mean

beside = attnlib.create_model("topiq_fr_resnet50", **small)
terms = beside.loss(beside(distorted, images), torch.tensor([0.3, 0.7]))
print({name: round(float(term.detach()), 2) for name, term in terms.items()})
