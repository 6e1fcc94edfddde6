"""Late interaction against its definition, in chunks of any size, with absent tokens and through the gradient."""

import importlib

import pytest
import torch

from attnlib import ops

module = importlib.import_module("attnlib.ops.late_interaction")  # the function has its name


def sides(p=3, n=5, q=4, m=6, d=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(p, n, d, dtype=dtype, generator=g), torch.randn(q, m, d, dtype=dtype, generator=g)
    x_valid, y_valid = torch.rand(p, n, generator=g) > 0.4, torch.rand(q, m, generator=g) > 0.4
    x_valid[:, 0] = y_valid[:, 0] = True
    return x, y, x_valid, y_valid


def slowly(x, y, x_valid, y_valid, reduction="mean"):
    """Pair by pair, on the tokens that exist alone."""
    out = torch.zeros(2, len(x), len(y), dtype=x.dtype)
    for i in range(len(x)):
        for j in range(len(y)):
            products = x[i][x_valid[i]] @ y[j][y_valid[j]].mT
            ours, theirs = products.amax(1), products.amax(0)
            out[0, i, j], out[1, i, j] = getattr(ours, reduction)(), getattr(theirs, reduction)()
    return out


@pytest.fixture(params=[1, 40, 1 << 20], ids=["a pair at a time", "some", "all at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_definition_with_gradients(backend, reduction, chunk):
    x, y, x_valid, y_valid = sides()
    weigh = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (
        lambda a, b: slowly(a, b, x_valid, y_valid, reduction),
        lambda a, b: ops.late_interaction(a, b, x_valid=x_valid, y_valid=y_valid, reduction=reduction, backend=backend),
    ):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = run(a, b)
        found.append((out, *torch.autograd.grad((out * weigh).sum(), (a, b))))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_absent_tokens_change_nothing_whatever_they_hold(backend):
    x, y, x_valid, y_valid = sides()
    want = ops.late_interaction(x, y, x_valid=x_valid, y_valid=y_valid, backend=backend)
    x = x.masked_fill(~x_valid.unsqueeze(-1), float("nan")).requires_grad_()
    y = y.masked_fill(~y_valid.unsqueeze(-1), float("inf")).requires_grad_()
    got = ops.late_interaction(x, y, x_valid=x_valid, y_valid=y_valid, backend=backend)
    assert torch.equal(got, want)
    for grad, valid in zip(torch.autograd.grad(got.sum(), (x, y)), (x_valid, y_valid), strict=True):
        assert bool(grad.isfinite().all()) and not grad[~valid].any()


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_an_item_without_a_token_scores_zero_and_gets_no_gradient(backend):
    x, y, x_valid, y_valid = sides()
    y_valid[1] = x_valid[2] = False
    x, y = x.requires_grad_(), y.requires_grad_()
    got = ops.late_interaction(x, y, x_valid=x_valid, y_valid=y_valid, backend=backend)
    assert not got[:, :, 1].any() and not got[:, 2].any() and bool(got[:, :2, 0].all())
    for grad, empty in zip(torch.autograd.grad(got.square().sum(), (x, y)), (2, 1), strict=True):
        assert bool(grad.isfinite().all()) and not grad[empty].any()


def test_one_token_each_is_a_product_and_order_does_not_matter():
    x, y, *_ = sides(n=1, m=1)
    for one in ops.late_interaction(x, y, backend="chunked"):
        torch.testing.assert_close(one, x[:, 0] @ y[:, 0].mT)
    x, y, *_ = sides()
    want = ops.late_interaction(x, y)
    torch.testing.assert_close(ops.late_interaction(x[:, torch.randperm(5)], y[:, torch.randperm(6)]), want)


def test_only_places_are_kept_between_forward_and_backward():
    """No saved tensor is as large as the products; together they hold far less than a quarter of them."""
    x, y, *_ = sides(p=16, n=49, q=16, m=20, d=4, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.late_interaction(x.requires_grad_(), y.requires_grad_(), backend="chunked")
    held = {t.data_ptr(): t.nbytes for t in saved}
    assert sum(held.values()) < 4 * 16 * 49 * 16 * 20 / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_short_types_are_float32(dtype):
    x, y, *_ = (t.to(dtype) if t.is_floating_point() else t for t in sides())
    eager, chunked = (ops.late_interaction(x, y, backend=b) for b in ("eager", "chunked"))
    assert eager.dtype == chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, eager, rtol=2e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.late_interaction(x.float(), y.float()).dtype == torch.float32


def test_compiles_and_takes_empty_sides():
    x, y, x_valid, y_valid = sides()
    run = torch.compile(ops.late_interaction, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x, y, y_valid=y_valid), ops.late_interaction(x, y, y_valid=y_valid))
    assert ops.late_interaction(x[:0], y).shape == (2, 0, 4) and ops.late_interaction(x, y[:0]).shape == (2, 3, 0)


def test_bad_input():
    x, y, x_valid, y_valid = sides()
    with pytest.raises(ValueError, match="x has width 8, y has 7"):
        ops.late_interaction(x, y[..., :7])
    with pytest.raises(ValueError, match="at least one token"):
        ops.late_interaction(x[:, :0], y)
    with pytest.raises(ValueError, match="y_valid"):
        ops.late_interaction(x, y, y_valid=x_valid)
    with pytest.raises(ValueError, match="reduction"):
        ops.late_interaction(x, y, reduction="max")
    with pytest.raises(TypeError, match="share one floating dtype"):
        ops.late_interaction(x, y.float())
