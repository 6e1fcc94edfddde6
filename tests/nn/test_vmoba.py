"""VMoBA: what its card asks, against dense attention under the mask of the chosen blocks."""

import pytest
import torch

import attnlib
from attnlib.nn.sparse.vmoba import VMoBA, cut_order
from attnlib.ops.block_sparse import BlockPlan

GRID = (4, 4, 6)
CUTS = [1.5, (2, 3), (2, 2, 3), (3, 4)]


def made(**settings):
    torch.manual_seed(0)
    return VMoBA(dim=16, num_heads=2, **settings).double()


def video(*grid, seed=1):
    return torch.randn(2, *(grid or GRID), 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(m, x, plan=None):
    """Softmax attention of the module's maps, under a plan's mask over tokens in their order of blocks."""
    order, _ = cut_order(x.shape[1:-1], m.cut)
    n = x.shape[1] * x.shape[2] * x.shape[3]
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in m.qkv(x.flatten(1, 3)).chunk(3, -1))
    scores = q @ k.transpose(-2, -1) * 8**-0.5
    if plan is not None:
        grown = plan.chosen().repeat_interleave(plan.k_block, -1)[..., : plan.n]
        places = torch.arange(n) if order is None else torch.zeros(n, dtype=torch.long)
        if order is not None:
            places[order[order >= 0]] = torch.arange(len(order))[order >= 0]
        scores = scores.masked_fill(~grown[..., places, :][..., places].expand_as(scores), float("-inf"))
    return m.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).view_as(x)


@pytest.mark.parametrize("cut", CUTS)
def test_threshold_1_and_all_blocks_are_full_attention(cut):
    x = video()
    for settings in (dict(threshold=1.0), dict(topk=999, per="row")):
        m = made(cut=cut, **settings)
        assert torch.allclose(m(x), dense(m, x))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("per", ["row", "block", "head", "all"])
def test_equals_dense_attention_under_the_mask_of_its_blocks(cut, per):
    m, x = made(cut=cut, threshold=0.35, per=per), video().requires_grad_()
    plan = m.plan(x)
    assert float(plan.density) < 0.9
    y, expected = m(x), dense(m, x, plan)
    assert torch.allclose(y, expected)
    g = video(seed=5)
    ours = torch.autograd.grad((y * g).sum(), [x, *m.parameters()])
    theirs = torch.autograd.grad((expected * g).sum(), [x, *m.parameters()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


def test_one_block_is_the_own_one():
    m, x = made(cut=(2, 3), topk=1, per="row"), video()
    plan = m.plan(x)
    own = torch.arange(96) // 24
    assert (plan.index[..., 0] == own).all() and plan.index.shape[-1] == 1
    one = x.clone()
    one[:, :, :2, :3] = 0  # another block changes, this one stays
    assert torch.allclose(m(x)[:, :, 2:, 3:], m(one)[:, :, 2:, 3:])


def test_orders_come_back_and_blocks_are_blocks():
    for grid, cut in (((2, 4, 6), (2, 3)), ((4, 4, 6), (2, 2, 3)), ((3, 5, 4), (2, 2, 3))):
        order, size = cut_order(grid, cut)
        real = order[order >= 0]
        assert real.sort().values.tolist() == list(range(grid[0] * grid[1] * grid[2])) and len(order) % size == 0
        sides = (grid[0], *cut) if len(cut) == 2 else cut
        for block in order.view(-1, size):
            at = torch.stack(torch.unravel_index(block[block >= 0], grid), -1)
            assert ((at.amax(0) - at.amin(0)) < torch.tensor(sides)).all()
    assert cut_order((4, 3, 2), 1) == (None, 6) and cut_order((4, 3, 2), 0.5) == (None, 3)


def test_density_rises_with_the_threshold_and_differs_by_query():
    x = video()
    plans = [made(cut=(2, 2, 2), threshold=t).plan(x) for t in (0.1, 0.25, 0.5, 0.75, 1.0)]
    densities = [float(p.density) for p in plans]
    assert densities == sorted(densities) and densities[-1] == 1.0
    assert plans[1].count.unique().numel() > 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(cut=(1, 2, 3, 4)), "cut="),
        (dict(cut=0.0), "cut"),
        (dict(cut=(0, 2)), "cut"),
        (dict(threshold=0.0), "threshold"),
        (dict(threshold=1.5), "threshold"),
        (dict(topk=0), "topk"),
        (dict(per="query"), "per"),
        (dict(num_heads=3), "num_heads"),
        (dict(rank=4), "rank"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises((TypeError, ValueError), match=says):
        VMoBA(**{**dict(dim=16, num_heads=2), **settings})


def test_a_plan_of_another_grid_or_cut_is_refused():
    m, x = made(cut=(2, 3)), video()
    with pytest.raises(ValueError, match="plan"):
        m(x, plan=m.plan(video(2, 4, 6)))
    with pytest.raises(ValueError, match="plan"):
        m(x, plan=made(cut=(2, 2)).plan(x))
    with pytest.raises(TypeError, match="plan"):
        m(x, plan=3)
    assert isinstance(m.plan(x), BlockPlan)
    with pytest.raises(ValueError, match=r"\(B, T, H, W, C\)"):
        attnlib.create("vmoba", dim=16, num_heads=2)(torch.zeros(1, 4, 4, 16))
