"""Blocks of queries and the halo of keys around them."""

import pytest
import torch

from attnlib import ops
from attnlib.ops import halo
from attnlib.ops.halo import BORDERS, halo_attention


def tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(grid, k_grid=None, heads=2, kv_heads=1, width=4):
    n = torch.Size(grid).numel()
    m = n if k_grid is None else torch.Size(k_grid).numel()
    return tokens(2, heads, n, width), tokens(2, kv_heads, m, width, seed=1), tokens(2, heads, m, 3, seed=2)


CASES = [
    ((6,), 3, 1, {}),
    ((4, 6), 2, 1, {}),
    ((4, 6), (2, 3), (1, 2), {}),
    ((4, 6), 2, 0, {}),
    ((2, 4, 4), 2, 1, {}),
    ((8, 4), 4, 1, dict(k_grid=(4, 2), k_block=2)),
    ((2, 4), 1, 2, dict(k_grid=(4, 8), k_block=2)),
]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("grid", "block", "reach", "options"), CASES)
@pytest.mark.parametrize("extra", ["plain", "valid", "bias", "tables", "both"])
def test_blocks_equal_the_specification(grid, block, reach, options, border, extra):
    k_grid = options.get("k_grid", grid)
    q, k, v = problem(grid, k_grid)
    rank = len(grid)
    q_side, h = ((x,) * rank if isinstance(x, int) else x for x in (block, reach))
    k_side = q_side if "k_block" not in options else (options["k_block"],) * rank
    w = [c + 2 * r for c, r in zip(k_side, h, strict=True)]
    if border == "clamp" and any(a > b for a, b in zip(w, k_grid, strict=True)):
        with pytest.raises(ValueError, match="border='clamp' needs windows"):
            halo_attention(q, k, v, grid, block, reach, border=border, **options)
        return
    call = dict(options, border=border)
    if extra == "valid":
        call["valid"] = torch.rand(2, k.shape[2], generator=torch.Generator().manual_seed(5)) < 0.6
    if extra in ("bias", "both"):
        call["bias"] = tokens(2, torch.Size(q_side).numel(), torch.Size(w).numel(), seed=3)
    if extra in ("tables", "both"):
        call["axis_tables"] = [tokens(*q.shape[:3], 2 * a - 1, seed=4 + i) for i, a in enumerate(w)]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    ours, spec = (halo_attention(q, k, v, grid, block, reach, backend=b, **call) for b in (None, "eager"))
    torch.testing.assert_close(ours, spec)
    weight = tokens(*ours.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, spec)), strict=True):
        torch.testing.assert_close(a, b)


def test_limits():
    """No halo: windows. One token a block: a sliding window. A block as large as the map: everything."""
    q, k, v = problem((4, 6))
    torch.testing.assert_close(halo_attention(q, k, v, (4, 6), 2, 0), ops.window_attention(q, k, v, (4, 6), 2))
    torch.testing.assert_close(halo_attention(q, k, v, (4, 6), (4, 6), 0), ops.attention(q, k, v))
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    near = [(p.flatten()[:, None] - p.flatten()).abs() <= 1 for p in (y, x)]
    torch.testing.assert_close(halo_attention(q, k, v, (4, 6), 1, 1), ops.attention(q, k, v, mask=near[0] & near[1]))


def test_a_clamped_halo_is_a_neighborhood_with_a_stride():
    q, k, v = problem((8, 8))
    ours = halo_attention(q, k, v, (8, 8), 2, 1, border="clamp")
    torch.testing.assert_close(ours, ops.neighborhood_attention(q, k, v, (8, 8), 4, stride=2))


def test_keys_of_zeros_take_their_share():
    """A key of zeros has score zero and value zero: it stands in the denominator alone."""
    q, k, v = tokens(1, 1, 2, 4), torch.zeros(1, 1, 2, 4, dtype=torch.float64), torch.ones(1, 1, 2, 1).double()
    ours = halo_attention(q, k, v, (2,), 1, 1, border="zeros")
    torch.testing.assert_close(ours, torch.full_like(ours, 2 / 3))
    torch.testing.assert_close(halo_attention(q, k, v, (2,), 1, 1), torch.ones_like(ours))


def test_tables_are_read_at_key_minus_query():
    q, k, v = (torch.zeros(1, 1, 4, 2, dtype=torch.float64) for _ in range(3))
    v[0, 0, :, 0] = torch.arange(4.0)
    table = torch.full((1, 1, 4, 5), -1e9, dtype=torch.float64)
    table[..., 3] = 0  # one to the right
    out = halo_attention(q, k, v, (4,), 2, 1, axis_tables=[table])
    assert out[0, 0, :3, 0].tolist() == [1.0, 2.0, 3.0]


def test_rounds_change_nothing(monkeypatch):
    q, k, v = problem((8, 6))
    valid = torch.rand(2, 48, generator=torch.Generator().manual_seed(5)) < 0.6
    tables = [tokens(2, 2, 48, 7, seed=4 + i) for i in range(2)]
    for border in ("mask", "zeros"):
        call = dict(border=border, valid=valid, axis_tables=tables)
        monkeypatch.setattr(halo, "ROUND", 1 << 40)
        whole = halo_attention(q, k, v, (8, 6), 2, 1, **call)
        for limit in (1, 1500):
            monkeypatch.setattr(halo, "ROUND", limit)
            torch.testing.assert_close(halo_attention(q, k, v, (8, 6), 2, 1, **call), whole)


@pytest.mark.parametrize("border", ["mask", "zeros"])
@pytest.mark.parametrize("some", [False, True])
def test_parts_change_nothing_of_values_and_derivatives(monkeypatch, border, some):
    q, k, v = (t.requires_grad_() for t in problem((4, 6), kv_heads=2))
    tables = [tokens(2, 2, 24, 7, seed=4 + i).requires_grad_() for i in range(2)]
    valid = torch.rand(2, 24, generator=torch.Generator().manual_seed(5)) < 0.3 if some else None
    leaves = (q, k, v, *tables)

    def run(backend, *given):
        call = dict(border=border, axis_tables=given[3:], backend=backend)
        call["valid"] = None if valid is None else valid[: len(given[0])]
        return halo_attention(*given[:3], (4, 6), 2, 1, **call)

    expected = run("eager", *leaves)
    weight = tokens(*expected.shape, seed=9)
    grads = torch.autograd.grad((expected * weight).sum(), leaves)
    for part in (1, 400, 1 << 20):  # a row of blocks of one head, rows, everything
        monkeypatch.setattr(halo, "PART", part)
        with torch.no_grad():
            torch.testing.assert_close(run("parts", *leaves), expected.detach())
        ours = run("parts", *leaves)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), leaves), grads)
    monkeypatch.setattr(halo, "PART", 400)
    few = [t[:1, :1].detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradgradcheck(lambda *t: run("parts", *t), few, atol=1e-6)
    only = run("parts", *(t.detach() for t in leaves[:4]), leaves[4])
    torch.testing.assert_close(torch.autograd.grad((only * weight).sum(), leaves[4:]), grads[4:])


def test_parts_say_what_they_are_not_for():
    q, k, v = problem((4, 6), kv_heads=2)
    tables = [tokens(2, 2, 24, 7, seed=4 + i) for i in range(2)]
    call = dict(grid=(4, 6), block=2, halo=1, axis_tables=tables, backend="parts")
    for change, message in (
        (dict(axis_tables=None), "axis_tables"),
        (dict(border="clamp"), "displacements of their own"),
        (dict(dropout_p=0.5), "no dropout"),
        (dict(bias=torch.zeros(4, 16).double()), "no bias"),
        (dict(axis_tables=[t.float() for t in tables]), "float32 or float64, one for all"),
    ):
        with pytest.raises(ValueError, match=message):
            halo_attention(q, k, v, **{**call, **change})
    with pytest.raises(ValueError, match="one head of keys"):
        halo_attention(q, k[:, :1], v, **call)
    with pytest.raises(ValueError, match="no forward mode and no vmap"):
        torch.func.vmap(lambda x: halo_attention(x, k, v, **call))(q[None])
    served = torch.func.vmap(lambda x: halo_attention(x, k, v, **{**call, "backend": None}))(q[None])
    torch.testing.assert_close(served[0], halo_attention(q, k, v, **call))


def test_a_query_sees_its_block_and_halo_alone():
    q, k, v = problem((8, 8))
    v.requires_grad_()
    out = halo_attention(q, k, v, (8, 8), 4, 1)
    (seen,) = torch.autograd.grad(out[0, 0, 0].sum(), v)
    seen = seen[0, 0].abs().sum(-1).view(8, 8) > 0
    assert bool(seen[:5, :5].all()) and not bool(seen[5:].any()) and not bool(seen[:, 5:].any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block=3), "does not divide the grid"),
        (dict(block=0), "block"),
        (dict(halo=-1), "halo"),
        (dict(border="wrap"), "border='wrap' is not possible"),
        (dict(grid=(4, 5)), "holds 20 tokens, but q has 24"),
        (dict(k_grid=(4, 6), k_block=1), "does not have as many"),
        (dict(bias=torch.zeros(4, 4)), "bias must be"),
        (dict(bias=torch.zeros(3, 4, 16)), "bias"),
        (dict(axis_tables=[torch.zeros(2, 2, 24, 5)]), "holds 1 tables"),
        (dict(axis_tables=[torch.zeros(2, 2, 24, 4)] * 2), "L odd and at least 5"),
        (dict(valid=torch.ones(2, 23, dtype=torch.bool)), "valid"),
        (dict(backend="windows"), "no such backend"),
    ],
)
def test_bad_calls(change, message):
    q, k, v = problem((4, 6))
    call = {"grid": (4, 6), "block": 2, "halo": 1, **change}
    with pytest.raises(ValueError, match=message):
        halo_attention(q, k, v, **call)
