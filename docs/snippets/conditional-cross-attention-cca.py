import torch

import attnlib
from attnlib.models.retrieval.conditional import ConditionalCrossAttention, TrunkOfViT, compare

vit = attnlib.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=0)
model = ConditionalCrossAttention(TrunkOfViT(vit), num_conditions=2, dim=192, embed_dim=32, num_heads=3)
images = torch.randn(6, 3, 64, 64)

by_colour, by_shape = model.predict(images, 0), model.predict(images, 1)
print(compare(by_colour, by_colour).shape)
every = model(images)  # all conditions, the trunk once
print(every.vectors.shape, model.loss(every, torch.randint(0, 2, (6, 2))))
