import torch

import attnlib

model = attnlib.create_model("acmil", in_chans=384, num_classes=3)
bags = torch.randn(2, 500, 384)  # features of the patches of two slides
valid = torch.arange(500) < torch.tensor([[500], [320]])  # the second has fewer

found = model(bags, valid)  # in training, six of the ten highest scores of every branch are hidden
print(found.logits.shape, {name: term.item() for name, term in model.loss(found, torch.tensor([0, 2])).items()})

pool = attnlib.create("acmil", dim=384)  # alone: many tokens to one vector
print(pool(bags, valid=valid).shape)
