"""Single pairs of queries and keys: the executor of plans whose blocks are single tokens."""

import pytest
import torch

from attnlib import masks
from attnlib.ops import attention
from attnlib.ops import block_sparse as engine
from attnlib.ops._elements import Scatter, products, sums
from attnlib.ops.block_sparse import BlockPlan, block_recall, block_sparse_attention, block_sparse_partial


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_sums_and_their_transpose(dtype):
    torch.manual_seed(0)
    q, k, p = torch.randn(5, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    at = torch.randint(7, (5, 4))  # in any order, some more than once
    torch.testing.assert_close(products(q, k, at, 0.5), 0.5 * torch.einsum("rd,rwd->rw", q, k[at]))
    torch.testing.assert_close(sums(p, k, at), torch.einsum("rw,rwd->rd", p, k[at]))
    to, expected = torch.ones(7, 3, dtype=dtype), torch.ones(7, 3, dtype=dtype)
    Scatter(at, 7).add(to, p, q, 2.0)
    expected.index_add_(0, at.reshape(-1), 2 * (p[..., None] * q[:, None]).reshape(-1, 3))
    torch.testing.assert_close(to, expected)


def plan_of(batch, heads, n, m, width):
    return BlockPlan(torch.rand(batch, heads, n, m).topk(width, -1).indices, 1, 1, n, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_the_dense_mask_in_every_type(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 30, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    plan = plan_of(2, 3, 30, 30, 7)
    ours = block_sparse_attention(q, k, v, plan)
    theirs = attention(q, k, v, mask=plan.mask(), backend="eager")
    close = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(ours, theirs, **close)
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **{name: 4 * value for name, value in close.items()})


def test_pairs_in_many_pieces(monkeypatch):
    """Pieces end anywhere, also between heads and samples, and rows may read as many keys as they like."""
    torch.manual_seed(0)
    make = engine._Work.__init__

    def small(self, *args):
        make(self, *args)
        self.budget = 40

    monkeypatch.setattr(engine._Work, "__init__", small)
    q, k, v = (torch.randn(2, 2, 11, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    for plan in (plan_of(2, 2, 11, 11, 5), BlockPlan.from_mask(torch.rand(2, 2, 11, 11) < 0.4, 1, 1, 11)):
        ours = block_sparse_attention(q, k, v, plan, order="queries")
        theirs = attention(q, k, v, mask=plan.mask(), backend="eager")
        torch.testing.assert_close(ours, theirs)
        g = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs)]
        torch.testing.assert_close(g[0], g[1])


def test_recall_and_parts_of_pairs():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.double)
    plan = plan_of(1, 2, 9, 9, 9)
    torch.testing.assert_close(block_recall(q, k, plan), torch.ones(1, 2, 9, dtype=torch.double))
    half = plan_of(1, 2, 9, 9, 4)
    rest = BlockPlan.from_mask(~half.chosen(), 1, 1, 9)
    parts = [block_sparse_partial(q, k, v, p) for p in (half, rest)]
    torch.testing.assert_close(parts[0].merge(*parts[1:]).finish(), attention(q, k, v))
    weights = attention(q, k, v, return_weights=True)[1]
    torch.testing.assert_close(block_recall(q, k, half), (weights * half.chosen()).sum(-1))
    causal = block_sparse_attention(q, k, v, half, mask=masks.causal())
    torch.testing.assert_close(causal, attention(q, k, v, mask=half.mask() & masks.causal()))
