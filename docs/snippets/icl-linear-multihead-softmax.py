import torch

from attnlib.theory import icl

task = icl.linear_task(1000, generator=torch.Generator().manual_seed(0))
x, y, x_q = task.regression()
pair, mu = torch.tensor([0.05, -0.05]), icl.best_mu(torch.tensor([0.05, -0.05]), 0.01, 40, 5)
for estimate in (icl.softmax_heads(x, y, x_q, pair, mu), icl.gradient_step(x, y, x_q), icl.ridge(x, y, x_q, 0.01)):
    print(float((estimate - task.y[:, 0, 0]).square().mean()))
