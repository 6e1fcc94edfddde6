import torch

import attnlib
from attnlib.models.multiscale import MultiScale

vit = attnlib.create_model(
    "vit_tiny_patch16_224", patch_size=4, img_size=16, embed_dim=24, depth=1, num_heads=2, features_only=True
)
wide = MultiScale(lambda x: vit(x)[-1], scales=(1, 2, 3), layout="channels_first", split_forward=True, multiple=4)
print(wide(torch.randn(2, 3, 16, 16)).shape)
