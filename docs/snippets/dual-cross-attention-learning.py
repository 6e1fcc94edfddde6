import torch

import attnlib
from attnlib.convert import DualCrossAttention

vit = attnlib.create_model(
    "vit_tiny_patch16_224", patch_size=4, img_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=5
)
model = DualCrossAttention(vit, top=0.25)
images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
losses = model.train().loss(images, labels)
losses["total"].backward()
print({name: round(float(value.detach()), 2) for name, value in losses.items()})
print(model.eval()(images).shape, model(images, rule="concat").shape)
