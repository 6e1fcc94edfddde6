import torch

from attnlib.convert.deltas import added, deltas, prune, search_q
from attnlib.optim import AdamR

layer, tuned = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
pre, x = {k: v.clone() for k, v in layer.state_dict().items()}, torch.randn(32, 16)
optimizer = AdamR(tuned.parameters(), reference=list(layer.parameters()), weight_decay=0.1)
change = deltas(pre, tuned.state_dict())


def loss(q):
    thin = added(pre, prune(change, p=0.9, q=q, seed=0))
    return float((torch.func.functional_call(layer, thin, x) - tuned(x)).abs().mean())


print(search_q(loss, p=0.9))
