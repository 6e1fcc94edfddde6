"""A small RestoreFormer++: the dictionary's stage, then the restorer that starts from it, on degraded pictures."""

import torch

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.restore.degrade import Degradation
from attnlib.models.restore.restoreformer import RestoreFormer

sizes = dict(dim=8, mults=(1, 2), depth=1, num_codes=16, code_dim=4, num_heads=2, groups=4)
clean = torch.rand(2, 3, 32, 32)
worse, right = (torch.stack(t) * 2 - 1 for t in zip(*[Degradation(size=128)(x) for x in clean], strict=True))
dictionary, model = RestoreFormer(**sizes, cross=False), RestoreFormer(**sizes, extra_scales=1)
for net, x in ((dictionary, right), (model, worse)):
    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 1e-3))
    print(sorted(train_batch(net, {"x": x, "target": right}, optimizers)["generator"]))
    if net is dictionary:
        print(len(model.start_from(dictionary)), "weights of attention are new")
print(tuple(model.predict(worse).shape))
