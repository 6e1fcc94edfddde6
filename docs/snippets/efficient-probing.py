import torch

import attnlib
from attnlib.bench.probing import probe_head

tokens = torch.randn(4, 196, 192)  # of a frozen encoder, computed once
pool = attnlib.create("efficient-probing", dim=192, num_queries=32)
found = pool(tokens, returns=("weights",))
print(found.y.shape, found.weights.shape)

head = probe_head(pool, classes=10)  # with a BatchNorm without parameters and a linear map
print(head(tokens).shape)
