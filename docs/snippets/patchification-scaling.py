import torch

import attnlib

settings = dict(embed_dim=32, depth=2, img_size=32, num_classes=10)
model = attnlib.create_model("adventurer_base_patch16", patch_size=4, **settings)
print(model(torch.randn(1, 3, 32, 32)).shape)
