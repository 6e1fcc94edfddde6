"""Engine B: attention inside groups, against a dense masked map and an independent loop."""

import random

import pytest
import torch

import attnlib
from attnlib import masks
from attnlib.grids import Partition, Windows, window_partition
from attnlib.ops import attention
from attnlib.ops.partition import grouped_attention, partition_attention, window_attention


def loop(q, k, v, q_index, k_index, allowed=None):
    """One group, one head, one sample at a time; indices (B, H, G, S)."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for rows, cols in zip(q_index[b, h], k_index[b, h], strict=True):
                rows, cols = rows[rows >= 0], cols[cols >= 0]
                for row in rows.tolist():
                    seen = cols if allowed is None else cols[allowed[b, row, cols]]
                    if len(seen):
                        weights = (k[b, h, seen] @ q[b, h, row] * q.shape[-1] ** -0.5).softmax(0)
                        out[b, h, row] = weights @ v[b, h, seen]
    return out


def ragged(per, groups=3, n=10, m=12):
    """Random groups of queries with holes, and keys drawn for each group, per head or sample if ``per`` says so."""
    batch, heads = (2 if "B" in per else 1), (2 if "H" in per else 1)
    q_rows, k_rows = [], []
    for _ in range(batch * heads):
        tokens = torch.randperm(n)
        q_rows.append(torch.full((groups, 4), -1).flatten().scatter(0, torch.randperm(12)[:n], tokens).view(groups, 4))
        keys = torch.stack([torch.randperm(m)[:5] for _ in range(groups)])
        keys[0, 2] = -1
        k_rows.append(keys)
    shape = {"": (), "H": (2,), "B": (2, 1), "BH": (2, 2)}[per]
    return tuple(torch.stack(rows).reshape(*shape, groups, -1) for rows in (q_rows, k_rows))


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("per", ["", "H", "B", "BH"])
def test_ragged_groups_equal_the_loop(per, backend):
    """Query and key groups of different sizes, with holes, for all, per head, per sample, and per both."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 10, 3), torch.randn(2, 2, 12, 3), torch.randn(2, 2, 12, 5)
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    valid = torch.rand(2, 12) < 0.7
    q_index, k_index = ragged(per)
    full = [i.reshape((1,) * (4 - i.dim()) + tuple(i.shape)).expand(2, 2, -1, -1) for i in (q_index, k_index)]
    expected = loop(q, k, v, *full, allowed=valid[:, None].expand(2, 10, 12))
    out = partition_attention(q, k, v, Partition(q_index, k_index), valid=valid, backend=backend)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_groups_equal_the_specification_whatever_the_options():
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        per = rng.choice(["", "H", "B", "BH"])
        q_index, k_index = ragged(per)
        heads = rng.choice([1, 2])
        q = torch.randn(2, 2, 10, 3, dtype=torch.float64, requires_grad=True)
        k, v = (torch.randn(2, heads, 12, d, dtype=torch.float64, requires_grad=True) for d in (3, 4))
        leaves, options = [q, k, v], {}
        if rng.random() < 0.5:
            options["valid"] = torch.rand(2, 12) < 0.7
        if rng.random() < 0.5:
            shape = rng.choice([(4, 5), (2, 4, 5), (1, 2, 4, 5), (2, 2, 3, 4, 5), (1, 1, 3, 4, 5)])
            options["bias"] = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            leaves.append(options["bias"])
        if rng.random() < 0.5:
            options["mask"] = rng.choice([
                masks.causal(), masks.strided(2), masks.explicit(torch.rand(2, 2, 10, 12) < 0.6),
                masks.documents((torch.arange(12) // 4).expand(2, -1)),
            ])  # fmt: skip
        partition = Partition(q_index, k_index)
        fast = partition_attention(q, k, v, partition, **options)
        spec = partition_attention(q, k, v, partition, backend="eager", **options)
        torch.testing.assert_close(fast, spec, atol=1e-12, rtol=0, msg=f"{per} {options}")
        g = torch.randn_like(spec)
        for a, b in zip(torch.autograd.grad(fast, leaves, g), torch.autograd.grad(spec, leaves, g), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0, msg=f"{per} {options}")


@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize(("grid", "window"), [((12,), 3), ((4, 6), (2, 3)), ((2, 4, 6), (1, 2, 3))])
def test_windows_by_reshape_equal_windows_by_index(grid, window, kind):
    torch.manual_seed(0)
    n = torch.Size(grid).numel()
    size = torch.Size(attnlib.types.to_tuple("window", window, len(grid))).numel()
    q = torch.randn(2, 4, n, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, n, 3, dtype=torch.float64)
    bias, valid = torch.randn(4, size, size, dtype=torch.float64), torch.rand(2, n) < 0.7
    options = dict(bias=bias, valid=valid, mask=masks.strided(2, local=3))
    by_index = partition_attention(q, k, v, window_partition(grid, window, kind), **options)
    by_reshape = window_attention(q, k, v, grid, window, kind, **options)
    eager = window_attention(q, k, v, grid, window, kind, backend="eager", **options)
    torch.testing.assert_close(by_reshape, by_index, atol=1e-12, rtol=0)
    torch.testing.assert_close(by_reshape, eager, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "window", "shift"), [((12,), 4, 2), ((4, 6), (2, 3), (1, 2)), ((4, 6), 2, (0, 1))])
def test_shifted_windows_are_windows_with_borders_of_their_own(grid, window, shift):
    """Windows moved by a shift cut the map elsewhere; what is left of one at both ends does not meet."""
    torch.manual_seed(0)
    n, rank = torch.Size(grid).numel(), len(grid)
    sides, moved = (attnlib.types.to_tuple("s", s, rank) for s in (window, shift))
    q = torch.randn(2, 4, n, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, n, 3, dtype=torch.float64)
    at = torch.cartesian_prod(*(torch.arange(g) for g in grid)).view(n, rank)
    cell = torch.div(at - torch.tensor(moved), torch.tensor(sides), rounding_mode="floor")
    near = (cell[:, None] == cell).all(-1)
    options = dict(valid=torch.rand(2, n) < 0.7, mask=masks.strided(2, local=3))
    spec = attention(q, k, v, mask=masks.as_mask(near) & options["mask"], valid=options["valid"])
    for backend in (None, "eager", "tiled"):
        ours = window_attention(q, k, v, grid, window, shift=shift, backend=backend, **options)
        torch.testing.assert_close(ours, spec, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="must be less than window_size"):
        window_attention(q, k, v, grid, window, shift=max(sides))
    with pytest.raises(ValueError, match="0 with kind='grid'"):
        window_attention(q, k, v, grid, window, "grid", shift=shift)


@pytest.mark.parametrize(
    ("grid", "window", "kind", "shift"),
    [
        ((12,), 4, "block", 2),
        ((4, 6), (2, 3), "block", (1, 2)),
        ((4, 6), (2, 3), "grid", 0),
        ((4, 6), (4, 6), "grid", 0),
    ],
)
def test_what_lies_in_windows_already_stays_there(grid, window, kind, shift):
    torch.manual_seed(0)
    n, rank = torch.Size(grid).numel(), len(grid)
    windows = Windows(grid, *(attnlib.types.to_tuple("s", s, rank) for s in (window,)), kind,
                      attnlib.types.to_tuple("s", shift, rank))  # fmt: skip
    q = torch.randn(2, 4, n, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, n, 3, dtype=torch.float64)
    size = torch.Size(windows.size).numel()
    options = dict(
        valid=torch.rand(2, n) < 0.7, mask=masks.strided(2, local=3), bias=torch.randn(4, size, size).double()
    )

    def cut(t):
        t = windows.cut(t.transpose(1, 2).reshape(2, *grid, -1))
        return t.unflatten(-1, (-1, 3)).transpose(2, 3)

    expected = cut(window_attention(q, k, v, grid, window, kind, shift=shift, **options))
    for backend in (None, "windows", "eager", "tiled"):
        ours = window_attention(
            cut(q), cut(k), cut(v), grid, window, kind, shift=shift, cut=True, backend=backend, **options
        )
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    x = torch.randn(2, *grid, 5)
    assert windows.join(windows.cut(x)).equal(x)
    assert windows.numbers().flatten().sort().values.equal(torch.arange(n))
    with pytest.raises(ValueError, match="q must have shape"):
        window_attention(q, k, v, grid, window, cut=True)
    with pytest.raises(ValueError, match=r"windows of \d+ tokens, but k has"):
        window_attention(cut(q), cut(k)[:, :, :, :-1], cut(v), grid, window, cut=True)


@pytest.mark.parametrize(
    ("grid", "window", "interval"), [((12,), 3, 2), ((4, 12), (2, 3), (2, 1)), ((4, 6), (2, 1), 2)]
)
def test_windows_at_an_interval_hold_what_is_congruent_in_a_block(grid, window, interval):
    torch.manual_seed(0)
    n, rank = torch.Size(grid).numel(), len(grid)
    sides, apart = (torch.tensor(attnlib.types.to_tuple("s", s, rank)) for s in (window, interval))
    q = torch.randn(2, 4, n, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, n, 3, dtype=torch.float64)
    at = torch.cartesian_prod(*(torch.arange(g) for g in grid)).view(n, rank)
    cell = torch.cat([torch.div(at, sides * apart, rounding_mode="floor"), at % apart], -1)
    together = (cell[:, None] == cell).all(-1)
    options = dict(valid=torch.rand(2, n) < 0.7, mask=masks.strided(2, local=3))
    spec = attention(q, k, v, mask=masks.as_mask(together) & options["mask"], valid=options["valid"])
    for backend in (None, "eager", "tiled"):
        ours = window_attention(q, k, v, grid, window, interval=interval, backend=backend, **options)
        torch.testing.assert_close(ours, spec, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="is for kind='block' without a shift"):
        window_attention(q, k, v, grid, 1, "grid", interval=interval)
    with pytest.raises(ValueError, match=r"window_size \* interval"):
        window_attention(q, k, v, grid, window, interval=7)


def test_one_group_of_everything_is_dense_attention():
    q, k, v = torch.randn(3, 2, 2, 9, 4)
    everything = Partition(torch.arange(9)[None])
    torch.testing.assert_close(partition_attention(q, k, v, everything), attention(q, k, v))
    torch.testing.assert_close(window_attention(q, k, v, (3, 3), 3), attention(q, k, v))


def test_tokens_in_no_group_give_zeros():
    x = torch.randn(1, 1, 6, 2)
    out = partition_attention(x, x, x, Partition(torch.tensor([[0, 2, -1]])))
    assert out[0, 0, [1, 3, 4, 5]].abs().sum() == 0 and out[0, 0, [0, 2]].abs().sum() > 0


def test_a_group_of_holes_gives_zero_gradients():
    x = torch.randn(1, 1, 4, 2, requires_grad=True)
    partition = Partition(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [-1, -1]]))
    for backend in (None, "eager"):
        out = partition_attention(x, x, x, partition, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert out[0, 0, 2:].abs().sum() == 0 and grad.isfinite().all() and grad[0, 0, 2:].abs().sum() == 0


def test_partial_inside_groups_merges():
    q, k, v = torch.randn(3, 2, 3, 2, 5, 4, dtype=torch.float64)
    halves = [grouped_attention(q, k[..., s, :], v[..., s, :], partial=True) for s in (slice(0, 2), slice(2, 5))]
    merged = halves[0].merge(halves[1]).finish()
    torch.testing.assert_close(merged, grouped_attention(q, k, v), atol=1e-12, rtol=0)


X = torch.zeros(1, 2, 12, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_attention(X, X, X, (3, 4), 2), "does not divide the grid"),
        (lambda: window_attention(X, X, X, (3, 5), 1), "holds 15 tokens, but q has 12"),
        (lambda: window_attention(X, X, X, (3, 4), 6), "does not fit the grid"),
        (lambda: window_attention(X, X, X, (3, 4), 1, "tree"), "kind='tree' is not possible"),
        (lambda: partition_attention(X[0], X, X, Partition(torch.arange(12)[None])), "q must have shape"),
        (lambda: partition_attention(X, X, X, Partition(torch.zeros(3, 1, 12).long())), "3 heads"),
        (lambda: partition_attention(X, X, X, Partition(torch.arange(12)[None]), bias=torch.zeros(3, 3)), "Sq, Sk"),
        (
            lambda: partition_attention(X, X, X, Partition(torch.arange(12)[None]), valid=torch.ones(1, 11).bool()),
            r"valid must have shape \(1, 12\)",
        ),
        (lambda: partition_attention(X, X, X, Partition(torch.tensor([[0, 12]]))), "from 0 to 12; possible: 0 to 11"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
