import torch
from torch import nn

from attnlib.models.retrieval.filip import FILIP


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 32)

    def forward(self, ids, valid):
        return self.table(ids)


model = FILIP(nn.Linear(48, 32), Words(), image_dim=32, text_dim=32, dim=16, image_skip=0)
patches, ids = torch.randn(4, 49, 48), torch.randint(0, 100, (4, 12))
real = torch.arange(12) < torch.tensor([[12], [5], [7], [9]])  # the rest is padding

scores = model(patches, ids, real)
print(scores.image.shape, model.loss(scores)["contrast"])

kept = model.encode_images(patches)  # once for a collection
print(model.rank(kept, model.encode_texts(ids, real)).argmax(0))
