"""Scores that lie far apart: weights that are nothing become zero, results stay, nothing is calculated below normal."""

import math

import pytest
import torch

import attnlib
from attnlib.masks import causal
from attnlib.normalizers import drop_negligible_, peaked
from attnlib.ops import attention, tiled
from attnlib.positions import DenseBias


def far_apart(spread, n=40, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, generator=gen, dtype=dtype) for _ in range(3))
    return q * math.sqrt(spread), k * math.sqrt(spread), v


@pytest.mark.parametrize("mask", [None, causal()])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_results_and_gradients_are_those_of_eager(spread, mask):
    inputs = far_apart(spread, dtype=torch.float64)
    valid = torch.rand(2, 40) > 0.3
    valid[1] = False
    results = []
    for backend, dtype in (("eager", torch.float64), ("tiled", torch.float64), ("tiled", torch.float32)):
        own = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        with attnlib.use_backend(backend):
            y = attention(*own, mask=mask, valid=valid)
        y.square().sum().backward()
        results.append([y.detach(), *(x.grad for x in own)])
    scales = [float(t.abs().max()) for t in results[0]]
    for exact, high, low, scale in zip(*results, scales, strict=True):
        torch.testing.assert_close(high, exact, atol=1e-12 * scale, rtol=1e-9)
        assert float((low - exact).abs().max()) < 2e-4 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_weight_is_below_the_normal_numbers(dtype):
    scores = torch.linspace(0, -2000, 4001, dtype=dtype).repeat(3, 1)
    scores[1, :100] = -torch.inf
    scores[2] = -torch.inf
    kept = torch.softmax(scores[:2], -1)
    dropped = drop_negligible_(scores.clone())
    weights = torch.softmax(dropped[:2], -1)
    assert bool((kept[0] > 0).sum() > (weights[0] > 0).sum()) and not weights[1, :100].any()
    assert bool(((weights == 0) | (weights > torch.finfo(dtype).tiny)).all())
    torch.testing.assert_close(weights, kept, atol=1e-29, rtol=1e-6)
    assert bool((dropped[2] == -torch.inf).all())


def test_only_scores_that_may_be_far_apart_are_looked_at(monkeypatch):
    calls = []
    monkeypatch.setattr(tiled, "drop_negligible_", lambda s: calls.append(s.shape) or drop_negligible_(s))

    def run(spread, **call):
        calls.clear()
        with attnlib.use_backend("tiled"):
            attention(*far_apart(spread), **call)
        return len(calls)

    assert run(1.0) == 0 and run(300.0) > 0
    assert run(1.0, bias=DenseBias(torch.full((1, 1, 40, 40), 50.0))) > 0
    assert run(1.0, bias=DenseBias(torch.full((1, 1, 40, 40), 1.0))) == 0
    assert run(300.0, normalizer="sigmoid") == 0
    assert peaked(math.nan) and not peaked(30.0)
