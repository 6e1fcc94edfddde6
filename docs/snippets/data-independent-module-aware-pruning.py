import torch

from attnlib.convert.prune import finish, prune

model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
print(prune(model, sparsity=0.5, scope="module"))  # train on; masks hold what was dropped at zero
finish(model)
