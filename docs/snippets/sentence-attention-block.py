"""A question chooses the channels of a pyramid: two questions of one image, from one run of the trunk."""

import torch

from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.dense.grounding import SentenceSegmenter

trunk = Features(resnet((8, 8, 16, 16), (1, 1, 1, 1), stem_dim=8, num_classes=0))
model = SentenceSegmenter(trunk, num_classes=2, text_dim=384, gate="softmax*C").eval()
maps = model.maps(torch.rand(1, 3, 65, 50))
for question in torch.randn(2, 1, 384):  # embeddings, as of all-MiniLM-L6-v2
    print(tuple(model.decode(maps, question, (65, 50)).shape))
