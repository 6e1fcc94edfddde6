"""Engine D: pools that know validity, agents, and block-causal summaries."""

import math

import pytest
import torch

from attnlib import masks, use_backend
from attnlib.ops import attention
from attnlib.ops.reduced import adaptive_pool_tokens, agent_attention, reduced_attention, strided_tokens


@pytest.mark.parametrize(("grid", "size"), [((7,), 3), ((5, 6), (2, 4)), ((3, 4, 5), 2), ((2, 3), 5)])
def test_pool_is_the_mean_over_tokens_that_exist(grid, size):
    torch.manual_seed(0)
    x = torch.randn(2, *grid, 3).double()
    valid = torch.rand(2, *grid) < 0.6
    valid[0] = False
    pooled, some = adaptive_pool_tokens(x, size, valid)
    plain, nothing = adaptive_pool_tokens(x, size)
    assert nothing is None and not bool(some[0].any()) and bool((pooled[0] == 0).all())
    sizes = (size,) * len(grid) if isinstance(size, int) else size
    for cell in torch.cartesian_prod(*[torch.arange(s) for s in sizes]).view(-1, len(grid)).tolist():
        # cell i of s covers tokens floor(i n / s) up to ceil((i + 1) n / s)
        span = tuple(slice(i * n // s, -(-(i + 1) * n // s)) for i, n, s in zip(cell, grid, sizes, strict=True))
        at = (1, *cell)
        tokens = x[1][span][valid[1][span]]
        assert bool(some[at]) == (len(tokens) > 0)
        torch.testing.assert_close(pooled[at], tokens.mean(0) if len(tokens) else torch.zeros(3).double())
        torch.testing.assert_close(plain[at], x[1][span].reshape(-1, 3).mean(0))


def test_strided_tokens():
    x = torch.arange(24.0).view(1, 4, 6, 1)
    valid = x.squeeze(-1) > 10
    picked, exists = strided_tokens(x, (2, 3), valid)
    assert picked.flatten().tolist() == [0, 3, 12, 15] and exists.flatten().tolist() == [False, False, True, True]
    assert strided_tokens(x, 3, offset=1)[0].flatten().tolist() == [7, 10]


def agents_problem(dtype=torch.float64):
    torch.manual_seed(1)
    q, a, k, v = (torch.randn(2, 4, n, d, dtype=dtype, requires_grad=True) for n, d in ((9, 6), (3, 6), (8, 6), (8, 5)))
    read, write = (torch.randn(4, *s, dtype=dtype, requires_grad=True) for s in ((3, 8), (9, 3)))
    return q, a, k, v, read, write


def test_agents_equal_the_two_explicit_maps():
    q, a, k, v, read, write = agents_problem()
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 5:] = False
    agents_valid = torch.tensor([[True, True, False], [True, True, True]])
    out = agent_attention(q, a, k, v, read_bias=read, write_bias=write, valid=valid, agents_valid=agents_valid)
    first = (a @ k.mT * 6**-0.5 + read).masked_fill(~valid[:, None, None], -1e30).softmax(-1)
    second = (q @ a.mT * 6**-0.5 + write).masked_fill(~agents_valid[:, None, None], -1e30).softmax(-1)
    torch.testing.assert_close(out, second @ first @ v)
    torch.testing.assert_close((second @ first).sum(-1), torch.ones(2, 4, 9).double())


@pytest.mark.parametrize("agents", [1, 3, 31, 32, 40])
def test_both_arrangements_of_the_map_agree_with_the_specification(agents):
    torch.manual_seed(4)
    q, a, k, v = (torch.randn(2, 2, n, 4).double().requires_grad_() for n in (5, agents, 6, 6))
    bias, exists = torch.randn(2, 5, agents).double().requires_grad_(), torch.rand(2, agents) < 0.7
    exists[0] = False
    call = dict(write_bias=bias, agents_valid=exists)
    ours, theirs = agent_attention(q, a, k, v, **call), agent_attention(q, a, k, v, backend="eager", **call)
    torch.testing.assert_close(ours, theirs)
    leaves = (q, a, k, v, bias)
    for x, y in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_agents_by_other_backends(backend):
    leaves = agents_problem()
    q, a, k, v, read, write = leaves
    k, v = k[:, :2], v[:, :1]  # grouped heads
    valid = torch.rand(2, 8) < 0.6
    valid[1] = False
    call = dict(read_bias=read, write_bias=write, valid=valid)
    ours = agent_attention(q, a, k, v, **call)
    theirs = agent_attention(q, a, k, v, backend=backend, **call)
    with use_backend(backend):
        torch.testing.assert_close(agent_attention(q, a, k, v, **call), theirs)
    torch.testing.assert_close(ours, theirs)
    assert bool((ours[1] == 0).all())
    g = torch.randn_like(ours)
    for x, y in zip(
        torch.autograd.grad((ours * g).sum(), leaves), torch.autograd.grad((theirs * g).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_agents_accept_grouped_heads_and_drop_weights():
    q, a, k, v, *_ = agents_problem(torch.float32)
    torch.manual_seed(0)
    dropped = agent_attention(q, a, k, v, dropout_p=0.5)
    assert not torch.allclose(dropped, agent_attention(q, a, k, v))
    # One agent writes with weight one, and values that are the identity show what it read: an output is zero where
    # either weight was dropped, and the weight over (1 - p)^2 otherwise.
    p, n = 0.2, 80
    q, a, k, v = torch.randn(1, 1, n, 4), torch.randn(1, 1, 1, 4), torch.randn(1, 1, n, 4), torch.eye(n)[None, None]
    read, dropped = agent_attention(q, a, k, v), agent_attention(q, a, k, v, dropout_p=p)
    wrote, kept = (dropped != 0).any(-1), (dropped != 0).any(-2)
    expected = read / (1 - p) ** 2 * wrote.unsqueeze(-1) * kept.unsqueeze(-2)
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-7)
    for some in (wrote, kept):
        assert abs(float(some.float().mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)


def test_agents_keep_float32_statistics():
    q, a, k, v, *_ = agents_problem()
    low = agent_attention(*(t.bfloat16() for t in (q, a, k, v)))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), agent_attention(q, a, k, v), atol=0.03, rtol=0.03)


def test_summaries_of_runs():
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 2, n, 4).double() for n in (7, 10, 10))
    valid = torch.rand(2, 10) < 0.7
    valid[0, 4:8] = False
    spans = [slice(0, 4), slice(4, 8), slice(8, 10)]

    def mean(t):
        w = valid[:, None, :, None].double()
        return torch.stack([(t * w)[:, :, s].sum(2) / w[:, :, s].sum(2).clamp(min=1) for s in spans], 2)

    exists = torch.stack([valid[:, s].any(-1) for s in spans], -1)
    expected = attention(q, mean(k), mean(v), valid=exists)
    torch.testing.assert_close(reduced_attention(q, k, v, 4, valid=valid), expected)
    ends = torch.tensor([3, 7, 9])
    last = attention(q, k[:, :, ends], v[:, :, ends], valid=valid[:, ends])
    torch.testing.assert_close(reduced_attention(q, k, v, 4, reduce="last", valid=valid), last)


def test_causal_summaries_leak_nothing_and_early_rows_are_empty():
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 12, 4).double().requires_grad_() for _ in range(3))
    out = reduced_attention(q, k, v, 4, mask=masks.causal())
    assert bool((out[:, :, :3] == 0).all()) and bool((out[:, :, 3:] != 0).any(-1).all())
    (grad,) = torch.autograd.grad(out[:, :, 6].sum(), v)
    assert bool((grad[:, :, 4:] == 0).all()) and bool((grad[:, :, :4] != 0).all())
    near = masks.explicit((torch.arange(12)[:, None] // 4 == torch.arange(12) // 4).tril())
    part = reduced_attention(q, k, v, 4, mask=masks.causal(), partial=True)
    from attnlib.ops import attention_partial

    merged = part.merge(attention_partial(q, k, v, mask=near)).finish()
    assert bool(merged.isfinite().all()) and merged.shape == out.shape


def test_bad_input():
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    with pytest.raises(ValueError, match="cannot be served over summaries of 4 tokens; possible: None or masks.causal"):
        reduced_attention(q, k, v, 4, mask=masks.sliding_window(3))
    with pytest.raises(ValueError, match="block must be an integer of at least 1, got 0"):
        reduced_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="reduce='max' is not possible"):
        reduced_attention(q, k, v, 4, reduce="max")
    with pytest.raises(ValueError, match="x must have shape"):
        adaptive_pool_tokens(torch.randn(4, 3), 2)
    with pytest.raises(ValueError, match="valid must have shape"):
        adaptive_pool_tokens(torch.randn(1, 4, 3), 2, torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="size=.* names 2 axes"):
        adaptive_pool_tokens(torch.randn(1, 4, 3), (2, 2))


@pytest.mark.parametrize("bad", ["junk", torch.ones(9, 9), torch.ones(2, 1).long(), torch.ones(1, 1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["read_bias", "write_bias"])
def test_a_bad_bias_is_called_by_its_name(name, bad):
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        agent_attention(q, q[:, :, :3], k, v, **{name: bad})
