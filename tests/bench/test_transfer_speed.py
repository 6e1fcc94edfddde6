"""The two ways to compute a step of attention transfer compute the same."""

import torch

from attnlib.bench.speed.transfer import CONTENDERS, measure
from attnlib.nn.linear.lolcats import LoLCATsHeads


def test_with_and_without_maps_are_one_loss():
    torch.manual_seed(0)
    heads = LoLCATsHeads(2, 4, window_size=3, chunk=4).double()
    q, k, v = torch.randn(3, 1, 2, 17, 4, dtype=torch.float64)
    losses = {name: run(heads, q, k, v) for name, run in CONTENDERS.items()}
    torch.testing.assert_close(losses["chunks"], losses["maps"])
    grads = [torch.autograd.grad(loss, heads.trained()) for loss in losses.values()]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_records_hold_what_the_results_say():
    found = measure(sizes=(8, 16), heads=1, head_dim=4, window_size=4, rounds=1)
    assert [r["contender"] for r in found["records"]] == ["maps", "chunks"]
    assert found["records"][0]["times_as_fast"] == [1.0, 1.0]
