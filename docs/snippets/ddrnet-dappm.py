import torch

import attnlib
from attnlib.models.dense.ddrnet import DAPPM

model = attnlib.create_model("ddrnet_23_slim_segmenter", num_classes=4, dim=8, branch_dim=16, auxiliary=True)
x, target = torch.randn(2, 3, 64, 128), torch.randint(0, 4, (2, 64, 128))
sum(model.loss(model(x), target).values()).backward()  # training gives the logits of two classifiers
print(model.eval().predict(x).shape)

context = DAPPM(dim=32, branch_dim=16, out_dim=8).eval()
print(context(torch.randn(1, 4, 8, 32)).shape)
