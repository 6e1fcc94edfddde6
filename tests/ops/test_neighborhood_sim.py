"""The simulator of generalized neighborhood attention: visited tiles and the bounds they give."""

import itertools
import math

import pytest

from attnlib import masks
from attnlib.ops.neighborhood_sim import visited_tiles


def brute(grid, kernel, stride, dilation, causal, q_tile, kv_tile):
    """Visits counted on the dense mask, tile by tile. Undilated grids; boxes of the grid."""
    dense = masks.neighborhood(grid, kernel, dilation, stride, causal).dense(math.prod(grid)).reshape(*grid, *grid)
    counts = []
    for q0 in itertools.product(*(range(0, x, t) for x, t in zip(grid, q_tile, strict=True))):
        q_box = dense[tuple(slice(a, a + t) for a, t in zip(q0, q_tile, strict=True))]
        seen = 0
        for k0 in itertools.product(*(range(0, x, t) for x, t in zip(grid, kv_tile, strict=True))):
            box = (Ellipsis, *(slice(a, a + t) for a, t in zip(k0, kv_tile, strict=True)))
            seen += bool(q_box[box].any())
        counts.append(seen)
    return counts


@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "causal", "q_tile", "kv_tile"),
    [
        ((37,), (8,), (1,), (False,), (5,), (4,)),
        ((37,), (8,), (3,), (True,), (5,), (4,)),
        ((12, 10), (5, 4), (1, 2), (False, False), (4, 2), (3, 5)),
        ((12, 10), (5, 4), (5, 1), (False, True), (4, 2), (3, 5)),
        ((5, 6, 6), (3, 2, 4), (1, 2, 1), (False, False, False), (2, 2, 3), (2, 3, 2)),
    ],
)
def test_static_tiles_equal_the_count_on_the_dense_mask(grid, kernel, stride, causal, q_tile, kv_tile):
    count = visited_tiles(grid, kernel, stride, 1, causal, q_tile, kv_tile)
    expected = brute(grid, kernel, stride, (1,) * len(grid), causal, q_tile, kv_tile)
    assert (count.q_tiles, count.visited, count.most) == (len(expected), sum(expected), max(expected))


def test_flat_tiles_equal_the_count_on_the_dense_mask():
    grid, kernel, q_tile, kv_tile = (8, 9), (3, 4), 10, 7
    dense = masks.neighborhood(grid, kernel).dense(72)
    expected = [
        sum(bool(dense[a : a + q_tile, b : b + kv_tile].any()) for b in range(0, 72, kv_tile))
        for a in range(0, 72, q_tile)
    ]
    count = visited_tiles(grid, kernel, q_tile=q_tile, kv_tile=kv_tile, tiling="flat")
    assert (count.visited, count.most, count.kv_tiles) == (sum(expected), max(expected), 11)


def test_dilation_makes_separate_problems():
    whole = visited_tiles((64,), 8, dilation=4, q_tile=8, kv_tile=4)
    one = visited_tiles((16,), 8, q_tile=8, kv_tile=4)
    assert whole.visited == 4 * one.visited and whole.q_tiles == 4 * one.q_tiles


def test_speedup_is_bounded_by_arithmetic_and_reached_when_perfectly_block_sparse():
    for w, s in itertools.product((64, 128, 192, 256), (1, 16, 32, 64)):
        count = visited_tiles((1024,), w, s, q_tile=64, kv_tile=32)
        assert count.speedup <= count.flop_speedup
        assert count.worst_speedup <= count.speedup
    perfect = visited_tiles((4096,), 1024, 256, q_tile=256, kv_tile=128)
    assert perfect.block_sparse and perfect.speedup == perfect.flop_speedup == 4.0
    ragged = visited_tiles((4096,), 1024, 1, q_tile=256, kv_tile=128)
    assert not ragged.block_sparse and ragged.speedup < 4.0


def test_perfect_block_sparsity_in_three_dimensions():
    count = visited_tiles((16, 32, 32), (8, 16, 16), (4, 8, 8), q_tile=(4, 8, 8), kv_tile=(2, 4, 4))
    assert count.block_sparse and count.speedup == count.flop_speedup == 8.0


def test_stride_only_helps_and_flat_tiles_waste_on_wide_grids():
    speedups = [visited_tiles((256,), 64, s, q_tile=32, kv_tile=16).speedup for s in (1, 8, 16, 32)]
    assert speedups == sorted(speedups)
    boxes = visited_tiles((16, 192), 8, q_tile=(8, 8), kv_tile=(8, 8))
    runs = visited_tiles((16, 192), 8, q_tile=64, kv_tile=64, tiling="flat")
    assert runs.visited > boxes.visited


def test_dynamic_tiles_never_visit_more():
    for s in (1, 4, 7):
        static = visited_tiles((60, 44), (12, 9), (s, s), q_tile=(6, 4), kv_tile=(4, 4))
        dynamic = visited_tiles((60, 44), (12, 9), (s, s), q_tile=(6, 4), kv_tile=(4, 4), kv_tiling="dynamic")
        assert dynamic.visited <= static.visited


def test_distinct_windows_fall_with_the_stride():
    """At most ceil(L / s) windows along an axis."""
    before = math.inf
    for s in (1, 2, 4, 8):
        rows = {tuple(r.tolist()) for r in masks.neighborhood((32,), 8, 1, s).dense(32)}
        assert len(rows) <= -(-32 // s) and len(rows) < before
        before = len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kernel_size=65), "larger than the grid"),
        (dict(stride=9), "stride=9"),
        (dict(q_tile=0), "at least 1"),
        (dict(tiling="tree"), "tiling='tree' is not possible"),
        (dict(kv_tiling="lazy"), "kv_tiling='lazy' is not possible"),
        (dict(tiling="flat", kv_tiling="dynamic"), "choose 'static'"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        visited_tiles((64,), **{"kernel_size": 8, **change})
