import torch

import attnlib
from attnlib.nn.dense.crossvit import ClassTokenExchange

model = attnlib.create_model("crossvit_9_224", embed_dims=(16, 32), depths=((1, 2), (1, 2)), num_classes=10)
print(model(torch.randn(1, 3, 224, 224)).shape)

exchange = ClassTokenExchange(dims=(16, 32), num_heads=(2, 2))
fine, coarse = exchange(torch.randn(1, 401, 16), torch.randn(1, 197, 32))
print(fine.shape, coarse.shape)
