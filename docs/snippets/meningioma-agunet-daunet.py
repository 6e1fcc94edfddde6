"""A U-Net for volumes with attention at the bottom: any size goes in, a class for every voxel comes out."""

import torch

import attnlib

model = attnlib.create_model("daunet3d", dims=(4, 8, 8), num_classes=2)
volume, labels = torch.randn(2, 1, 24, 20, 9), torch.randint(0, 2, (2, 24, 20, 9))
terms = model.loss(model(volume), labels)  # a term for each level that predicts
sum(terms.values()).backward()
print(sorted(terms), tuple(model.predict(volume, tile=16, overlap=4).shape))
