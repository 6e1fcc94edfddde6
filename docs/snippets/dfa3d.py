import torch

import attnlib

read = attnlib.create("dfa3d", dim=8, num_heads=4, num_points=2, depth_bins=4, feature_dim=6)
queries = torch.randn(2, 3, 4, 8)
image = torch.randn(2, 5, 7, 6 + 4)  # features of a pixel, and how likely each depth is
print(read(queries, context=image).shape)
