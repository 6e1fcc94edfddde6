import torch

import attnlib
from attnlib.models.backbones.resnet_rs import Recipe, scale

recipe = Recipe(epochs=10, warmup_epochs=1)
model = attnlib.create_model(**scale(50, 160), embed_dims=(8, 8, 16, 16), num_classes=10, **recipe.settings())
optimizer, loss = recipe.optimizer(model), recipe.loss()
schedule = recipe.schedule(optimizer, steps=100)
loss(model(torch.randn(2, 3, 64, 64)), torch.tensor([3, 7])).backward()
optimizer.step()
schedule.step()
print(model.eval()(torch.randn(1, 3, 64, 64)).shape)
