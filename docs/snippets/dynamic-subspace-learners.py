import torch
from torch import nn

from attnlib.models.retrieval.subspaces import Schedule, SubspaceEmbedding, clusters

model = SubspaceEmbedding(nn.Conv2d(3, 64, 7, stride=4), dim=64, embed_dim=32)
optimizer, schedule = torch.optim.Adam(model.parameters(), 1e-3), Schedule(patience=10)
images, classes = torch.randn(16, 3, 32, 32), torch.arange(16) // 4

learner = clusters(model.predict(images).features, model.num_learners, classes)
for c in range(model.num_learners):  # every learner on its own cluster
    of = learner == c
    loss = model.loss(model(images[of], learner=c), classes[of])["margin"]
    loss.backward()
    optimizer.step()
if schedule.cuts(epoch=12, value=0.4):
    print("one learner more:", model.split(optimizer))
print(model.masks(images).shape)  # what the class is told by
