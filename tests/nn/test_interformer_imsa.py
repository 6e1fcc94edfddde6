"""Pooling attention of InterFormer."""

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.nn.reduced.interformer_imsa import PoolingAttention, cells_of


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(**settings):
    torch.manual_seed(0)
    return PoolingAttention(**{"dim": 8, "num_heads": 2, "pool_ratios": (1, 2, 3), **settings}).double().eval()


def oracle(m, x, read, cells):
    """Maxima over the cells that adaptive pooling lays, token by token."""
    height, width = read.shape[1:3]
    levels = []
    for (rows, columns), local in zip(cells, m.local, strict=True):
        ends = [
            [(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]
            for side, n in ((height, rows), (width, columns))
        ]
        pooled = torch.stack(
            [torch.stack([read[:, a:b, c:d].amax((1, 2)) for c, d in ends[1]], 1) for a, b in ends[0]], 1
        )
        around = F.conv2d(pooled.movedim(-1, 1), local.conv.weight, local.conv.bias, padding=1, groups=8).movedim(1, -1)
        levels.append((pooled + around).flatten(1, 2))
    k, v = m.kv(m.norm(torch.cat(levels, 1))).chunk(2, -1)
    q = m.q(x).flatten(1, 2)
    heads = [(a @ b.mT * 4**-0.5).softmax(-1) @ c for a, b, c in zip(*(t.chunk(2, -1) for t in (q, k, v)), strict=True)]
    return m.proj(torch.cat(heads, -1)).view(x.shape)


@pytest.mark.parametrize(
    ("grid", "other", "target", "cells"),
    [
        ((6, 9), None, None, [(6, 9), (3, 4), (2, 3)]),
        ((4, 5), (12, 7), None, [(12, 7), (6, 4), (4, 2)]),
        ((3, 3), (16, 8), (8, 8), [(16, 8), (4, 4), (3, 3)]),
    ],
)
def test_the_equation(grid, other, target, cells):
    m, x = make(target_size=target), data(2, *grid, 8).requires_grad_()
    read = x if other is None else data(2, *other, 8, seed=2).requires_grad_()
    assert m.cells(read.shape[1:3]) == cells
    y = m(x) if other is None else m(x, read)
    expected = oracle(m, x, read, cells)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    leaves = [x, read, m.local[1].conv.weight]
    g = data(*y.shape, seed=3)
    for a, b in zip(*(torch.autograd.grad(t, leaves, g) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_authors_rule_for_cells():
    """Of every side from 1 to 200; where theirs leaves no cell there is one."""
    for side in range(1, 201):
        for target in (16, 100, 128):
            for ratio in (2, 3, 12, 24):
                wanted = min(target / ratio, side)
                parts = round(side / wanted)
                theirs = round(side / parts) if parts else 1
                assert cells_of(side, target, ratio) == max(1, theirs)
    assert cells_of(7, 100, 1) == 7


def test_one_level_of_single_tokens_is_attention_to_the_map_and_its_surroundings():
    m, x = make(pool_ratios=(1,)), data(1, 4, 5, 8)
    tokens = m.norm(m.local[0](x)).flatten(1, 2)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (m.q(x).flatten(1, 2), *m.kv(tokens).chunk(2, -1)))
    plain = attnlib.attention(q, k, v, backend="eager").transpose(1, 2).reshape(1, 4, 5, 8)
    torch.testing.assert_close(m(x), m.proj(plain))


def test_a_target_bounds_the_keys():
    m = make(pool_ratios=(2, 4), target_size=16)
    counts = [sum(a * b for a, b in m.cells((side, side))) for side in (16, 64, 512)]
    assert counts == [80, 80, 80] and m.traits.work["N"] == 1


def test_absent_tokens_of_the_map_that_is_read():
    m, x, read = make(), data(1, 3, 4, 8), data(1, 9, 8, 8, seed=2)
    valid = torch.ones(1, 9, 8, dtype=torch.bool)
    valid[:, 5:] = False
    other = read.masked_fill(~valid.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(m(x, other, context_valid=valid), m(x, read, context_valid=valid))
    assert not torch.allclose(m(x, read, context_valid=valid), m(x, read))
    assert (m(x, read, context_valid=torch.zeros_like(valid)) == m.proj.bias).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pool_ratios=()), "pool_ratios"),
        (dict(pool_ratios=(0, 1)), "pool_ratios"),
        (dict(target_size=(0, 4)), "target_size"),
        (dict(num_heads=3), "num_heads"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_input():
    with pytest.raises(ValueError, match=r"context must be a map \(B, H, W, C\)"):
        make()(data(1, 3, 4, 8), data(1, 12, 8))
