import torch

from attnlib.ops import split_decoding

q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
print(split_decoding(q, k, v, lengths=[50, 7], tile=4, workers=3).shape)
