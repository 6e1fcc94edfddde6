import torch
import torch.nn.functional as F

import attnlib
from attnlib.convert.prompts import TokenPrompts

vit = attnlib.create_model(
    "vit_tiny_patch16_224", patch_size=4, img_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=5
)
model = TokenPrompts(vit, pool_size=(4, 4), num_tokens=(1, 1), topk=(2, 2), fourier=True)
logits, distance = model(torch.randn(2, 3, 16, 16), random=True)  # the first epochs choose at random
loss = F.cross_entropy(logits, torch.tensor([0, 3])) + 10 * distance
loss.backward()
print(sorted(model.trained_state()))
