"""Engine C against dense attention with the chosen blocks as a mask: forward, backward, plans, policies, bad input."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

from attnlib import masks, positions, use_backend
from attnlib.ops import attention
from attnlib.ops import block_sparse as engine
from attnlib.ops.block_policies import block_affinity, own_blocks, pool_blocks, threshold_blocks, topk_blocks
from attnlib.ops.block_sparse import (
    BlockPlan,
    block_recall,
    block_sparse_attention,
    block_sparse_partial,
    gather_blocks,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"


def tensors(batch, q_heads, k_heads, v_heads, n, m, d=5, dv=7, dtype=torch.float64, grad=True):
    shapes = (batch, q_heads, n, d), (batch, k_heads, m, d), (batch, v_heads, m, dv)
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


def random_plan(batch, heads, n, m, q_block, k_block, density=0.4):
    chosen = torch.rand(batch, heads, -(-n // q_block), -(-m // k_block)) < density
    return BlockPlan.from_mask(chosen, q_block, k_block, n, m)


def agree(inputs, plan, order, leaves=(), atol=1e-9, **call):
    """Output and all gradients of the executor against dense attention under the plan's mask."""
    q, k, v = inputs
    ours = block_sparse_attention(q, k, v, plan, order=order, **call)
    mask = plan.mask() if call.get("mask") is None else plan.mask() & call["mask"]
    theirs = attention(q, k, v, backend="eager", **{**call, "mask": mask})
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
    g = torch.randn_like(ours)
    leaves = [*inputs, *leaves]
    for a, b in zip(
        torch.autograd.grad((ours * g).sum(), leaves), torch.autograd.grad((theirs * g).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("order", ["queries", "keys", None])
@pytest.mark.parametrize(
    ("heads", "n", "m", "q_block", "k_block"),
    [
        ((4, 2, 4), 24, 20, 4, 4),
        ((4, 2, 1), 23, 18, 4, 5),
        ((2, 2, 2), 17, 19, 1, 5),
        ((2, 2, 2), 10, 7, 16, 8),
        ((4, 2, 1), 9, 11, 1, 1),
    ],
)
def test_equals_dense_attention_under_the_mask(order, heads, n, m, q_block, k_block):
    torch.manual_seed(0)
    for shared_batch, shared_heads in itertools.product((False, True), repeat=2):
        plan = random_plan(1 if shared_batch else 2, 1 if shared_heads else heads[0], n, m, q_block, k_block)
        agree(tensors(2, *heads, n, m), plan, order)


@pytest.mark.parametrize("order", ["queries", "keys"])
@pytest.mark.parametrize(("q_block", "k_block"), [(1, 5), (3, 5), (1, 1)])
def test_valid_mask_and_every_form_of_bias(order, q_block, k_block):
    torch.manual_seed(1)
    n, m, heads = 23, 20, 2
    plan = random_plan(2, heads, n, m, q_block, k_block, 0.6)
    inputs = tensors(2, heads, heads, heads, n, m)
    valid = torch.rand(2, m) < 0.7
    agree(inputs, plan, order, valid=valid, mask=masks.causal())
    dense = torch.randn(heads, n, m, dtype=torch.float64, requires_grad=True)
    agree(inputs, plan, order, [dense], bias=dense, valid=valid)
    table = torch.randn(heads, n + m, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.arange(n)[:, None], torch.arange(m)[:, None]
    relative = positions.RelativeBias(table, rows, columns, (n,), (n + m,))
    agree(inputs, plan, order, [table], bias=relative)
    factors = [torch.randn(b, heads, n, s, dtype=torch.float64, requires_grad=True) for b, s in ((2, 4), (1, 5))]
    agree(inputs, plan, order, factors, bias=positions.AxisBias(factors))


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_rows_without_keys_give_zeros_and_zero_gradients(order):
    torch.manual_seed(2)
    q, k, v = tensors(2, 2, 2, 2, 12, 12)
    chosen = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    chosen[0, :, 1] = False
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1] = False
    out = block_sparse_attention(q, k, v, BlockPlan.from_mask(chosen, 4, 4, 12), valid=valid, order=order)
    assert bool((out[0, :, 4:8] == 0).all()) and bool((out[1] == 0).all()) and bool((out[0, :, :4] != 0).all())
    (out**2).sum().backward()
    assert bool((q.grad[0, :, 4:8] == 0).all()) and bool((q.grad[1] == 0).all())
    for t in (q, k, v):
        assert bool(t.grad.isfinite().all())
    assert bool((k.grad[1] == 0).all()) and bool((v.grad[1] == 0).all())


def test_nothing_chosen_and_empty_batch():
    q, k, v = tensors(2, 2, 2, 2, 8, 8)
    nothing = BlockPlan.from_mask(torch.zeros(2, 2, dtype=torch.bool), 4, 4, 8)
    for order in engine.ORDERS:
        assert bool((block_sparse_attention(q, k, v, nothing, order=order) == 0).all())
        empty = tensors(0, 2, 2, 2, 8, 8)
        out = block_sparse_attention(*empty, BlockPlan.full(8, 8, 4, 4), order=order)
        out.sum().backward()
        assert out.shape == (0, 2, 8, 7)


def test_order_of_the_chosen_blocks_is_irrelevant():
    q, k, v = tensors(1, 2, 2, 2, 16, 16)
    there = BlockPlan(torch.tensor([[0, 2, 3], [1, 3, 2], [0, 1, 2], [3, 0, 1]]), 4, 4, 16)
    back = BlockPlan(there.index.flip(-1), 4, 4, 16)
    torch.testing.assert_close(block_sparse_attention(q, k, v, there), block_sparse_attention(q, k, v, back))


def test_large_scores_neither_overflow_nor_underflow():
    torch.manual_seed(3)
    q, k, v = (t.detach() * 60 for t in tensors(1, 1, 1, 1, 16, 32, dtype=torch.float32))
    plan = random_plan(1, 1, 16, 32, 4, 4, 0.7)
    exact = attention(q.double(), k.double(), v.double(), mask=plan.mask(), backend="eager").float()
    for order in engine.ORDERS:
        torch.testing.assert_close(block_sparse_attention(q, k, v, plan, order=order), exact, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_low_precision_inputs_keep_float32_statistics(order):
    torch.manual_seed(4)
    q, k, v = (t.detach().bfloat16() for t in tensors(1, 2, 2, 2, 32, 32, dtype=torch.float32))
    plan = random_plan(1, 2, 32, 32, 4, 4, 0.6)
    out = block_sparse_attention(q, k, v, plan, order=order)
    exact = attention(q.double(), k.double(), v.double(), mask=plan.mask(), backend="eager")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_autocast_rounds_the_inputs_and_nothing_inside(order):
    torch.manual_seed(17)
    inputs = tensors(1, 2, 2, 2, 32, 32, dtype=torch.float32)
    plan = random_plan(1, 2, 32, 32, 4, 4, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(*inputs, plan, order=order)
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
    low = [t.detach().bfloat16().requires_grad_() for t in inputs]
    expected = block_sparse_attention(*low, plan, order=order)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    for a, b in zip(grads, torch.autograd.grad(expected.float().square().sum(), low), strict=True):
        torch.testing.assert_close(a, b.float(), atol=0, rtol=0)


def test_tall_query_blocks_run_in_parts():
    torch.manual_seed(5)
    agree(tensors(1, 2, 2, 2, 700, 40), random_plan(1, 2, 700, 40, 384, 8, 0.5), None)
    agree(tensors(1, 1, 1, 1, 530, 16), random_plan(1, 1, 530, 16, 521, 4, 0.6), "queries", mask=masks.causal())


def test_pieces_are_independent_of_the_budget(monkeypatch):
    torch.manual_seed(6)
    q, k, v = tensors(2, 2, 2, 2, 40, 40, grad=False)
    plan = random_plan(2, 2, 40, 40, 4, 4)
    expected = {order: block_sparse_attention(q, k, v, plan, order=order) for order in engine.ORDERS}
    make = engine._Work.__init__

    def small(self, *args):
        make(self, *args)
        self.budget, self.least = 64, 1

    monkeypatch.setattr(engine._Work, "__init__", small)
    for order in engine.ORDERS:
        torch.testing.assert_close(block_sparse_attention(q, k, v, plan, order=order), expected[order])


def test_positions_let_a_mask_see_reordered_tokens():
    torch.manual_seed(7)
    q, k, v = tensors(2, 2, 2, 2, 16, 16, grad=False)
    orders = torch.stack([torch.randperm(16) for _ in range(2)])
    plan = random_plan(2, 2, 16, 16, 4, 4, 0.7)
    gathered = [t.gather(2, orders[:, None, :, None].expand(t.shape)) for t in (q, k, v)]
    inverse = orders.argsort(-1)
    for order in (*engine.ORDERS, None):
        out = block_sparse_attention(*gathered, plan, mask=masks.causal(), q_pos=orders, k_pos=orders, order=order)
        back = out.gather(2, inverse[:, None, :, None].expand(out.shape))
        rows = torch.arange(16)
        chosen = plan.mask().at(rows, rows)
        chosen = torch.stack([c[:, i][:, :, i] for c, i in zip(chosen, inverse, strict=True)])
        torch.testing.assert_close(back, attention(q, k, v, mask=masks.explicit(chosen) & masks.causal()))
    eager = block_sparse_attention(*gathered, plan, mask=masks.causal(), q_pos=orders, k_pos=orders, backend="eager")
    torch.testing.assert_close(eager, out)


def test_partials_merge_to_the_union():
    torch.manual_seed(8)
    inputs = tensors(1, 2, 2, 2, 12, 12)
    chosen = torch.rand(1, 2, 3, 3) < 0.6
    left, right = chosen & (torch.arange(3) < 1), chosen & (torch.arange(3) >= 1)
    parts = [block_sparse_partial(*inputs, BlockPlan.from_mask(c, 4, 4, 12)) for c in (left, right)]
    merged = parts[0].merge(parts[1]).finish()
    whole = block_sparse_attention(*inputs, BlockPlan.from_mask(chosen, 4, 4, 12), backend="eager")
    torch.testing.assert_close(merged, whole)
    g = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad((merged * g).sum(), inputs), torch.autograd.grad((whole * g).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_gradients_against_finite_differences(order):
    torch.manual_seed(9)
    inputs = tensors(1, 2, 1, 1, 7, 6, d=3, dv=2)
    bias = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    plan = random_plan(1, 2, 7, 6, 2, 2, 0.6)

    def parts(q, k, v, bias):
        part = block_sparse_partial(q, k, v, plan, bias=bias, order=order)
        seen = part.den > 0
        return part.num, part.log_scale.masked_fill(~seen, 0.0)

    assert torch.autograd.gradcheck(parts, (*inputs, bias))


# ---- the operator as torch sees it


def test_operator_is_well_formed():
    q, k, v = tensors(1, 2, 2, 2, 8, 8, dtype=torch.float32)
    plan = random_plan(1, 2, 8, 8, 4, 4)
    args = (q, k, v, plan.index, plan.count, None, None, None, [], [], "", "", '{"name":"softmax"}', 0.5, 4, 4)
    for by_keys in (False, True):
        torch.library.opcheck(torch.ops.attnlib.block_sparse.default, (*args, by_keys, True))


def test_compiles_to_one_graph_and_exports_with_dynamic_length():
    q, k, v = tensors(1, 2, 2, 2, 16, 16, dtype=torch.float32)
    plan = topk_blocks(torch.rand(1, 2, 4, 4), 2, 4, 4, 16)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, plan)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, plan))
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), q), torch.autograd.grad(block_sparse_attention(q, k, v, plan).sum(), q)
    )

    class Routed(torch.nn.Module):
        def forward(self, q, index):
            return block_sparse_attention(q, q, q, BlockPlan(index, 4, 4, q.shape[2]))

    blocks = torch.export.Dim("blocks", min=2, max=64)
    program = torch.export.export(
        Routed(), (q.detach(), plan.index), dynamic_shapes={"q": {2: 4 * blocks}, "index": {2: blocks}}
    ).module()
    longer, index = torch.randn(1, 2, 32, 5), torch.zeros(1, 2, 8, 2, dtype=torch.long) + torch.arange(2)
    torch.testing.assert_close(program(longer, index), Routed()(longer, index))


def test_counted_arithmetic_follows_the_density():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(blocks):
        with torch.device("meta"):
            q = torch.empty(1, 2, 256, 8)
            index = torch.zeros(16, blocks, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            block_sparse_attention(q, q, q, BlockPlan(index, 16, 16, 256))
        return counter.get_total_flops()

    assert flops(16) == 2 * 2 * 256 * 256 * 16 and flops(4) * 4 == flops(16)


def test_forced_backend_is_respected():
    q, k, v = tensors(1, 1, 1, 1, 8, 8, grad=False)
    plan = random_plan(1, 1, 8, 8, 2, 2, 0.6)
    for name in ("eager", "sdpa"):
        with use_backend(name):
            out = block_sparse_attention(q, k, v, plan)
        torch.testing.assert_close(out, block_sparse_attention(q, k, v, plan))
    with pytest.raises(ValueError, match="backend='nope'"):
        block_sparse_attention(q, k, v, plan, backend="nope")


# ---- plans


def test_plan_changes_form_without_loss():
    torch.manual_seed(10)
    chosen = torch.rand(2, 3, 5, 4) < 0.5
    plan = BlockPlan.from_mask(chosen, 4, 3, 18, 11)
    assert torch.equal(plan.chosen(), chosen)
    row_ptr, cols = plan.csr()
    assert cols.numel() == chosen.sum() and row_ptr.numel() == 2 * 3 * 5 + 1
    again = BlockPlan.from_csr(row_ptr, cols, 4, 3, 18, 11, heads=3)
    assert torch.equal(again.chosen(), chosen)
    dense = plan.mask().dense(18, 11)
    torch.testing.assert_close(plan.density, dense.float().mean())
    leaves, spec = pytree.tree_flatten(plan)
    assert len(leaves) == 2 and torch.equal(pytree.tree_unflatten(leaves, spec).chosen(), chosen)
    assert torch.equal(copy.deepcopy(plan).chosen(), chosen)
    assert BlockPlan.full(18, 11, 4, 3).density == 1


def test_recall_is_the_dense_weight_on_the_chosen_blocks():
    torch.manual_seed(11)
    q, k, v = tensors(1, 2, 2, 2, 12, 12, grad=False)
    plan = random_plan(1, 2, 12, 12, 3, 4, 0.5)
    valid = torch.rand(1, 12) < 0.8
    _, weights = attention(q, k, v, valid=valid, return_weights=True, backend="eager")
    expected = (weights * plan.mask().dense(12)).sum(-1)
    torch.testing.assert_close(block_recall(q, k, plan, valid=valid), expected)
    torch.testing.assert_close(block_recall(q, k, BlockPlan.full(12, 12, 3, 4)), torch.ones(1, 2, 12).double())


def test_gathered_blocks():
    x = torch.arange(10.0).view(1, 1, 10, 1).requires_grad_()
    plan = BlockPlan(torch.tensor([[2, 0], [1, 0]]), 5, 4, 10, 10, torch.tensor([2, 1]))
    out = gather_blocks(x, plan)
    assert out.shape == (1, 1, 2, 2, 4, 1)
    assert out[0, 0, 0, :, :, 0].tolist() == [[8, 9, 0, 0], [0, 1, 2, 3]]
    out.sum().backward()
    assert x.grad.flatten().tolist() == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockPlan(torch.zeros(2, 2), 4, 4, 8), "index must be an int64 tensor"),
        (lambda: BlockPlan(torch.zeros(2, dtype=torch.long), 4, 4, 8), "index must be .nq, kmax."),
        (lambda: BlockPlan(torch.zeros(3, 2, dtype=torch.long), 4, 4, 8), "3 query blocks, but n=8 .* are 2"),
        (lambda: BlockPlan(torch.zeros(2, 2, dtype=torch.long), 4, 0, 8), "k_block must be an integer of at least 1"),
        (lambda: BlockPlan(torch.zeros(2, 2, dtype=torch.long), 4, 4, 8, count=torch.ones(3).long()), "count must be"),
        (lambda: BlockPlan(torch.ones(2, 2, dtype=torch.long), 4, 4, 8), "names a key block twice"),
        (lambda: BlockPlan(torch.tensor([[0, 2], [0, 1]]), 4, 4, 8), "points at key block 2; possible: 0 to 1"),
        (lambda: BlockPlan(torch.tensor([[0], [-1]]), 4, 4, 8), "points at key block -1"),
        (lambda: BlockPlan(torch.tensor([[0], [1]]), 4, 4, 8, count=torch.tensor([1, 2])), "count points at slot 2"),
        (lambda: BlockPlan(torch.tensor([[0], [1]]), 4, 4, 8, count=torch.tensor([1, -1])), "count points at slot -1"),
        (lambda: BlockPlan.from_mask(torch.ones(2, 3, dtype=torch.bool), 4, 4, 8), "chosen must be boolean"),
        (lambda: BlockPlan.from_mask(torch.ones(3, 2, dtype=torch.bool), 4, 4, 8), "chosen must be boolean"),
        (lambda: BlockPlan.from_mask(torch.ones(2, 2, dtype=torch.bool), 4, 4, 8, kmax=1), "at most kmax in a row"),
        (lambda: BlockPlan.from_csr(torch.tensor([0, 1]), torch.tensor([0]), 4, 4, 8), "row_ptr must have"),
    ],
)
def test_bad_plans_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("order", engine.ORDERS)
@pytest.mark.parametrize(("d", "dv"), [(4, 0), (0, 3), (0, 0)])
def test_heads_without_channels(d, dv, order):
    q, k, v = tensors(2, 4, 1, 2, 6, 8, d=d, dv=dv)
    plan = BlockPlan.from_mask(torch.rand(2, 4, 3, 4) < 0.6, 2, 2, 6, 8)
    out = block_sparse_attention(q, k, v, plan, order=order)
    want = attention(q, k, v, mask=engine.dense_mask(plan, None), backend="eager")
    torch.testing.assert_close(out, want)
    for a, b in zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (out, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_slots_beyond_the_count_may_hold_anything():
    q, k, v = tensors(1, 1, 1, 1, 8, 8, grad=False)
    index, count = torch.tensor([[0, 99], [1, 1]]), torch.tensor([1, 1])
    out = block_sparse_attention(q, k, v, BlockPlan(index, 4, 4, 8, count=count))
    want = block_sparse_attention(q, k, v, BlockPlan(index[:, :1], 4, 4, 8))
    torch.testing.assert_close(out, want)


def test_a_plan_put_together_as_a_tree_is_checked_when_it_is_executed():
    q, k, v = tensors(1, 1, 1, 1, 8, 8, grad=False)
    plan = pytree.tree_map_only(torch.Tensor, lambda t: t + 5, BlockPlan(torch.tensor([[0], [1]]), 4, 4, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match="plan's index points at key block 6"):
            block_sparse_attention(q, k, v, plan)
    with pytest.raises(ValueError, match="plan's index points at key block 6"):
        gather_blocks(k, plan)


def test_bad_calls_are_refused():
    q, k, v = tensors(2, 2, 2, 2, 8, 8, grad=False)
    plan = BlockPlan.full(8, 8, 4, 4)
    with pytest.raises(ValueError, match="plan was made for N=12, but the input has N=8"):
        block_sparse_attention(q, k, v, BlockPlan.full(12, 8, 4, 4))
    with pytest.raises(ValueError, match="plan was made for M=4"):
        block_sparse_attention(q, k, v, BlockPlan.full(8, 4, 4, 4))
    with pytest.raises(ValueError, match="plan was made for 3 samples, but q has 2"):
        block_sparse_attention(q, k, v, random_plan(3, 1, 8, 8, 4, 4))
    with pytest.raises(ValueError, match="plan was made for 3 heads, but q has 2"):
        block_sparse_attention(q, k, v, random_plan(1, 3, 8, 8, 4, 4))
    with pytest.raises(TypeError, match="plan must be a BlockPlan, got Tensor"):
        block_sparse_attention(q, k, v, plan.index)
    with pytest.raises(ValueError, match="order='rows' is not possible"):
        block_sparse_attention(q, k, v, plan, order="rows")
    with pytest.raises(TypeError, match="valid must be a boolean tensor"):
        block_sparse_attention(q, k, v, plan, valid=torch.ones(2, 8))
    with pytest.raises(ValueError, match="mask must be"):
        block_sparse_attention(q, k, v, plan, mask=torch.ones(8, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="k has 3 heads"):
        block_sparse_attention(q, torch.randn(2, 3, 8, 5).double(), v, plan)


# ---- policies


def test_pooled_affinity_knows_short_blocks_and_validity():
    torch.manual_seed(12)
    q, k, _ = tensors(2, 4, 2, 2, 10, 11, grad=True)
    valid = torch.rand(2, 11) < 0.5
    valid[0, 4:8] = False
    mean, exists = pool_blocks(k, 4, valid)
    for b, h, j in itertools.product(range(2), range(2), range(3)):
        rows = k[b, h, 4 * j : 4 * j + 4][valid[b, 4 * j : 4 * j + 4]]
        assert bool(exists[b, j]) == (len(rows) > 0)
        torch.testing.assert_close(mean[b, h, j], rows.mean(0) if len(rows) else torch.zeros(5).double())
    scores = block_affinity(q, k, 4, 4, valid=valid, scale=0.5)
    assert not scores.requires_grad and scores.shape == (2, 4, 3, 3)
    assert bool((scores[0, :, :, 1] == float("-inf")).all())
    torch.testing.assert_close(scores[1, 3, 2, 0], 0.5 * q[1, 3, 8:].mean(0) @ mean[1, 1, 0])


def test_topk_per_row_head_and_sample():
    torch.manual_seed(13)
    scores = torch.randn(2, 3, 6, 8)
    sizes = dict(q_block=2, k_block=2, n=12, m=16)
    row = topk_blocks(scores, 3, **sizes).chosen()
    assert bool((row.sum(-1) == 3).all())
    threshold = scores.sort(-1, descending=True).values[..., 2:3]
    assert torch.equal(row, scores >= threshold)
    head = topk_blocks(scores, 3, per="head", **sizes).chosen()
    assert bool((head.sum((-1, -2)) == 18).all()) and not bool((head.sum(-1) == 3).all())
    assert bool((scores[head].view(6, 18).amin(-1) > scores.masked_fill(head, -9).view(6, -1).amax(-1)).all())
    every = topk_blocks(scores, 3, per="all", **sizes).chosen()
    assert every.sum((1, 2, 3)).tolist() == [54, 54]
    assert topk_blocks(scores, 99, **sizes).density == 1


def test_forced_blocks_spend_the_budget_and_disallowed_ones_are_never_chosen():
    torch.manual_seed(14)
    scores = torch.randn(1, 2, 6, 6)
    forced, allowed = torch.eye(6, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool).tril()
    for per in ("row", "head", "all"):
        chosen = topk_blocks(scores, 2, 2, 2, 12, forced=forced, allowed=allowed, per=per).chosen()
        assert bool(chosen[..., forced].all()) and not bool(chosen[..., ~allowed].any())
    chosen = topk_blocks(scores, 2, 2, 2, 12, forced=forced, allowed=allowed).chosen()
    assert chosen.sum(-1)[0, 0].tolist() == [1, 2, 2, 2, 2, 2]
    for per in ("row", "block", "head", "all"):
        chosen = threshold_blocks(scores, 0.3, 2, 2, 12, forced=forced, allowed=allowed, per=per).chosen()
        assert bool(chosen[..., forced].all()) and not bool(chosen[..., ~allowed].any())


@pytest.mark.parametrize("weigh", ["minmax", "softmax"])
@pytest.mark.parametrize("per", ["row", "block", "head", "all"])
def test_threshold_takes_the_fewest_blocks_that_meet_it(per, weigh):
    torch.manual_seed(15)
    scores = torch.randn(2, 3, 4, 5).double()
    own = torch.zeros(4, 5, dtype=torch.bool)
    own[range(4), range(4)] = True
    plan = threshold_blocks(scores, 0.4, 2, 2, 8, 10, forced=own, per=per, weigh=weigh)
    chosen = plan.chosen()
    groups = {
        "row": [(b, h, i) for b in range(2) for h in range(3) for i in range(4)],
        "block": [(b, slice(None), slice(None), j) for b in range(2) for j in range(5)],
        "head": [(b, h) for b in range(2) for h in range(3)],
        "all": [(b,) for b in range(2)],
    }[per]
    for at in groups:
        s, got, must = scores[at].flatten(), chosen[at].flatten(), own.expand(2, 3, 4, 5)[at].flatten()
        weight = (s - s.min()) / (s.max() - s.min()) if weigh == "minmax" else s.softmax(0)
        weight = weight / weight.sum()
        assert bool(got[must].all())
        extra = got & ~must
        if extra.any():
            assert weight[got].sum() >= 0.4 - 1e-5
            assert weight[got].sum() - weight[extra].min() < 0.4
            assert weight[extra].min() >= weight[~got].max()
        else:
            assert weight[must].sum() >= 0.4 - 1e-5


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("per", ["row", "block", "head", "all"])
def test_threshold_selection_equals_the_authors_of_vmoba(per, threshold):
    recorded = load_file(FIXTURES / "vmoba-selection.safetensors")
    scores = recorded["gate"].permute(1, 2, 0)[None]  # theirs is (blocks, heads, queries)
    own = own_blocks(24, 1, 4)
    plan = threshold_blocks(scores, threshold, 1, 4, 24, forced=own, per=per, at_least=1)
    assert torch.equal(plan.chosen()[0].permute(2, 0, 1), recorded[f"{per}/{threshold}"])


def test_threshold_is_monotone_and_1_is_dense():
    torch.manual_seed(16)
    scores = torch.randn(1, 2, 8, 8)
    densities = [float(threshold_blocks(scores, t, 2, 2, 16).density) for t in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)]
    assert densities == sorted(densities) and densities[-1] == 1 and densities[0] < 0.2
    assert threshold_blocks(torch.zeros(1, 1, 4, 4), 0.1, 2, 2, 8).density == 1  # equal scores weigh nothing
    one = threshold_blocks(
        scores, 0.01, 2, 2, 16, forced=torch.ones(8, 8, dtype=torch.bool).tril(), per="row", at_least=1
    )
    assert bool((one.chosen().sum(-1)[0, 0, :-1] == torch.arange(2, 9)).all())


def test_own_blocks_of_unequal_sizes():
    own = own_blocks(10, 4, 3)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    for token in range(10):
        expected[token // 4, token // 3] = True
    assert torch.equal(own, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: topk_blocks(s, 0, 2, 2, 8), "topk must be an integer of at least 1"),
        (lambda s: topk_blocks(s, 1, 2, 2, 8, per="block"), "per='block' is not possible"),
        (lambda s: topk_blocks(s[0], 1, 2, 2, 8), "scores must be .B, H, nq=4, nk=4."),
        (lambda s: threshold_blocks(s, 0.0, 2, 2, 8), r"threshold must be a finite number above 0 and at most 1"),
        (lambda s: threshold_blocks(s, 0.5, 2, 2, 8, weigh="sum"), "weigh='sum' is not possible"),
        (lambda s: block_affinity(s[0], s, 2, 2), "q must have shape"),
    ],
)
def test_bad_policies_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 1, 4, 4))
