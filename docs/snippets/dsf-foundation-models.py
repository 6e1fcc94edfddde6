import torch

from attnlib.theory.dynamical import from_linear_attention, taylor_features

q, k, v = 0.5 * torch.randn(3, 16, 4)
for order in (1, 2, 4):
    system = from_linear_attention(taylor_features(q, order), taylor_features(k, order))
    print(order, system.phi(4).shape, torch.dist(system.recurrent(v), system.parallel(v)))
