import torch

import attnlib

model = attnlib.create_model("vim_tiny", embed_dim=32, depth=4, img_size=64, num_classes=10).eval()
model.prune(blocks=[1, 2], keep=0.7)  # patches that leave behind blocks 1 and 2
print(model(torch.randn(1, 3, 64, 64)).shape)
