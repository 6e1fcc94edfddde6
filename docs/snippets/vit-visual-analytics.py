import torch

import attnlib
from attnlib.look import CollectMaps, DistanceProfile, atlas, head_importance

model = attnlib.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10).eval()
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))

lost = head_importance(model, [(images, labels)], how="mean")  # or "zero", "uniform"
print(lost.ranked("divergence")[0], lost.accuracy.shape)

reach, maps = DistanceProfile(grid=(4, 4), prefix=1), CollectMaps(grid=(4, 4), prefix=1)
with torch.no_grad(), attnlib.attach(model, reach, maps):
    model(images)
print(reach.results()[0]["strength"].sum(-1))  # ones
found = atlas(maps.results(), clusters=3, epochs=2)
print(found.prototypes.shape, found.shares().shape)
