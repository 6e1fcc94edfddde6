import torch

import attnlib
from attnlib.convert.prompts import PromptCam

vit = attnlib.create_model(
    "vit_tiny_patch16_224", patch_size=4, img_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=0
)
model = PromptCam(vit, num_classes=5)  # vit is frozen
images = torch.randn(2, 3, 16, 16)
print(model(images).shape)
print(model.maps(images).shape)  # heads, classes, patches
print(model.rank_heads(images[:1], target=3))
print(sum(p.numel() for p in model.trained_state().values()))
