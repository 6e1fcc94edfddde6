import torch
from torch import nn

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.retrieval.scale_invariant import Known, MemoryBank, ScaleInvariantSearch, falling

bank = MemoryBank(count=3, dim=32, image=[0, 0, 1])  # two boxes lie in one image: two persons
model = ScaleInvariantSearch(nn.Conv2d(3, 16, 7, stride=4, padding=3), dim=16, bank=bank, embed_dim=32)
images = torch.randn(2, 3, 96, 96)
boxes = torch.tensor([[0.0, 4, 4, 36, 68], [0, 50, 10, 70, 50], [1, 20, 8, 60, 88]])

optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 1e-3))
batch = {"images": images, "boxes": boxes, "target": Known(torch.arange(3), falling(0.95, 0.6, 0.1))}
print(train_batch(model, batch, optimizers))
print(model.predict(images, boxes) @ bank.values.T)
