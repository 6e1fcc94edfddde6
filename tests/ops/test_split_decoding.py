"""Split decoding: exact for every schedule, and stream-K deals the work evenly."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gradients, naive_softmax_attention, qkv
from safetensors.torch import load_file

from attnlib import attention, attention_partial, explain
from attnlib.ops.split_decoding import (
    fixed_split,
    flash_decoding_splits,
    lean_launch,
    max_splits,
    split_decoding,
    split_partial,
    split_problems,
    stream_k,
)
from attnlib.types import Partial

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lean-attention.safetensors"
GROUPS = [(4, 4, 4), (4, 2, 2), (4, 1, 1), (4, 2, 4)]


def reference(q, k, v, lengths, causal=False):
    """(B, H, N, Dv) by loops over rows."""
    n, m = q.shape[2], k.shape[2]
    allowed = (torch.arange(m) < torch.as_tensor(lengths)[:, None])[:, None, None].expand(-1, q.shape[1], n, -1)
    if causal:
        last = torch.as_tensor(lengths)[:, None] - n + torch.arange(n)
        allowed = allowed & (torch.arange(m) <= last[..., None])[:, None]
    return naive_softmax_attention(q, k, v, allowed)


# ---- results


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 7, 13, 200])
@pytest.mark.parametrize("schedule", ["stream-k", "fixed"])
def test_exact_for_any_number_of_workers_and_ragged_lengths(heads, workers, schedule):
    """One worker, primes, more workers than tiles."""
    q, k, v = qkv(batch=3, heads=heads, n=1, m=29, dv=6)
    lengths = [29, 4, 17]
    for tile in (1, 4, 64):
        mine = split_decoding(q, k, v, lengths=lengths, tile=tile, workers=workers, schedule=schedule)
        torch.testing.assert_close(mine, reference(q, k, v, lengths))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_precision(dtype, tolerance):
    """Parts stay in float32 whatever the input; values are around one, so tolerances are of the output's type."""
    q, k, v = qkv(batch=2, heads=(8, 2, 2), n=1, m=700, d=16, dv=16, dtype=torch.float64, grad=False)
    exact = reference(q.to(dtype).double(), k.to(dtype).double(), v.to(dtype).double(), [700, 333])
    for workers in (1, 5, 17):
        mine = split_decoding(*(t.to(dtype) for t in (q, k, v)), lengths=[700, 333], tile=64, workers=workers)
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, atol=tolerance, rtol=tolerance)
    assert split_partial(*(t.to(dtype) for t in (q, k, v)), tile=64, workers=3).num.dtype == torch.float32


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_tile", [None, 1, 3])
def test_several_queries(heads, causal, q_tile):
    """New tokens of a chunk, or a prompt, in blocks that end at their diagonal."""
    q, k, v = qkv(batch=2, heads=heads, n=7, m=19)
    lengths = [19, 9]
    for workers in (1, 4):
        mine = split_decoding(q, k, v, lengths=lengths, causal=causal, q_tile=q_tile, tile=4, workers=workers)
        torch.testing.assert_close(mine, reference(q, k, v, lengths, causal))


def test_the_fused_kernel_and_the_equations_agree():
    """Without gradients pieces run in a fused kernel, with them by the equations."""
    q, k, v = qkv(batch=2, heads=(4, 2, 2), n=2, m=40)
    with torch.no_grad():
        fused = split_partial(q, k, v, lengths=[40, 11], tile=8, workers=3)
    plain = split_partial(q, k, v, lengths=[40, 11], tile=8, workers=3)
    assert not fused.num.requires_grad and plain.num.requires_grad
    torch.testing.assert_close(fused.finish(), plain.finish())
    torch.testing.assert_close(fused.lse(), plain.lse())


def test_gradients_are_exact():
    q, k, v = qkv(batch=2, heads=(4, 2, 2), n=2, m=21, dv=6)
    lengths = [21, 8]
    mine = gradients(split_decoding(q, k, v, lengths=lengths, tile=4, workers=5), (q, k, v))
    valid = torch.arange(21) < torch.tensor(lengths)[:, None]
    theirs = gradients(attention(q, k, v, valid=valid, backend="eager"), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_samples_without_keys_and_empty_calls():
    q, k, v = qkv(batch=3, n=2, m=9, grad=False)
    out = split_decoding(q, k, v, lengths=torch.tensor([9, 0, 1]), tile=2, workers=4)
    assert (out[1] == 0).all() and torch.equal(out[2], v[2, :, :1].expand(-1, 2, -1))
    # A causal query before the first key reads nothing.
    out = split_decoding(q, k, v, lengths=[9, 0, 1], causal=True, tile=2, workers=4)
    assert (out[2, :, 0] == 0).all() and torch.equal(out[2, :, 1], v[2, :, 0])
    assert split_decoding(q[:0], k[:0], v[:0]).shape == (0, 4, 2, 8)
    assert split_decoding(q[:, :, :0], k, v).shape == (3, 4, 0, 8)
    assert (split_decoding(q, k[:, :, :0], v[:, :, :0]) == 0).all()


def test_merging_is_associative_with_identity_in_any_order():
    q, k, v = qkv(batch=1, heads=(2, 2, 2), n=1, m=12, grad=False)
    q = q * 30  # weights of very different size
    parts = [split_partial(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 2), (2, 3), (3, 9), (9, 12))]
    whole = split_partial(q, k, v, workers=1).finish()
    for order in itertools.permutations(parts):
        torch.testing.assert_close(order[0].merge(*order[1:]).finish(), whole)
        left = order[0].merge(order[1]).merge(order[2]).merge(order[3])
        right = order[0].merge(order[1].merge(order[2].merge(order[3])))
        torch.testing.assert_close(left.finish(), whole)
        torch.testing.assert_close(right.finish(), whole)
    nothing = Partial.identity_like(parts[0])
    for same in (nothing.merge(parts[0]), parts[0].merge(nothing)):
        torch.testing.assert_close(same.finish(), parts[0].finish(), rtol=0, atol=0)
    assert (nothing.merge(nothing).finish() == 0).all()


# ---- schedules


TILES = st.lists(st.integers(0, 40), min_size=0, max_size=12)


def covered(schedule):
    """Every tile exactly once, in one worker."""
    seen = [[0] * n for n in schedule.tiles]
    for pieces in schedule.work:
        for p in pieces:
            assert p.last > p.first
            for t in range(p.first, p.last):
                seen[p.output][t] += 1
    return all(count == 1 for row in seen for count in row)


@given(TILES, st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_stream_k_is_balanced(tiles, workers):
    s = stream_k(tiles, workers)
    assert covered(s)
    assert max(s.loads) - min(s.loads) <= 1
    assert s.makespan == -(-sum(tiles) // workers)
    assert s.loads == tuple(sorted(s.loads, reverse=True))
    assert s.partials <= workers - 1
    # Each worker's part of the line is one piece of it: at most one output it does not host, its first.
    for pieces in s.work:
        assert all(p.first == 0 for p in pieces[1:])
    even = not tiles or sum(tiles) % workers == 0
    if s.makespan:
        for n, splits in zip(s.tiles, s.splits, strict=True):
            assert splits <= (max_splits(n, s.makespan, even) if n else 0)


@given(TILES, st.integers(1, 50), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_fixed_split_covers_and_is_never_faster(tiles, workers, splits):
    f, s = fixed_split(tiles, workers, splits), stream_k(tiles, workers)
    assert covered(f) and max(f.splits, default=0) <= splits
    assert s.makespan <= f.makespan and s.efficiency >= f.efficiency


@pytest.mark.parametrize(
    "outputs, tiles, workers, splits", [(8, 16, 6, 1), (8, 16, 6, 4), (5, 30, 12, 7), (56, 64, 108, 2)]
)
def test_makespan_of_a_fixed_split(outputs, tiles, workers, splits):
    size = -(-tiles // splits)
    pieces = -(-tiles // size)
    assert fixed_split([tiles] * outputs, workers, splits).makespan <= -(-outputs * pieces // workers) * size
    if tiles % splits == 0:
        assert fixed_split([tiles] * outputs, workers, splits).makespan == -(-outputs * splits // workers) * size


def test_quantisation_gain_with_few_heads():
    """Time in units of a tile on 108 processors, 64 tiles per head: whole waves of pieces against an even cut."""
    fixed_over_lean = {}
    for heads in (1, 8, 32, 48, 56, 64, 96, 108):
        tiles = [64] * heads
        fixed, lean, unsplit = fixed_split(tiles, 108), stream_k(tiles, 108), fixed_split(tiles, 108, splits=1)
        assert lean.makespan == -(-64 * heads // 108) and unsplit.makespan == 64
        size = -(-64 // max(fixed.splits))
        if 64 % size == 0:
            assert fixed.makespan == -(-heads * max(fixed.splits) // 108) * size
        fixed_over_lean[heads] = (fixed.makespan, lean.makespan)
    # Without splits one head keeps one processor busy; with fixed splits the last wave is what is lost.
    assert fixed_over_lean == {
        1: (1, 1), 8: (5, 5), 32: (22, 19), 48: (32, 29), 56: (39, 34), 64: (44, 38), 96: (64, 57), 108: (64, 64),
    }  # fmt: skip
    # Lengths that differ within a batch cost fixed splits more: their number is one for all.
    ragged = [64, 8, 8, 8] * 7
    assert (fixed_split(ragged, 108).makespan, stream_k(ragged, 108).makespan) == (12, 6)


def test_splits_as_flash_attention_chooses():
    assert flash_decoding_splits(48, 108, 64) == 2  # 0.89 against 0.67 for 3
    assert flash_decoding_splits(100, 108, 64) == 1
    assert flash_decoding_splits(1, 108, 1) == 1
    assert flash_decoding_splits(4, 108, 11) == 11
    for outputs, tiles in itertools.product((1, 3, 17, 50), (1, 5, 64)):
        splits = flash_decoding_splits(outputs, 108, tiles)
        assert 1 <= splits <= min(tiles, 108)


def test_launch_equals_the_triton_port():
    """AMD's host arithmetic, for decoding and for causal prompts."""
    recorded = load_file(FIXTURE)
    for heads, context, tile, processors, high, most, programs, splits, even in recorded["decode"].tolist():
        mine = lean_launch(heads, -(-context // tile), processors)
        assert mine == (high, most, programs, splits, bool(even)), (heads, context, tile, processors)
        if heads * -(-context // tile) < 4096:
            s = stream_k([-(-context // tile)] * heads, programs)
            assert s.makespan == most and s.loads.count(most) == high and max(s.splits) <= splits
    for n, q_tile, tile, processors, high, most, per_head, programs in recorded["causal"].tolist():
        problems = split_problems(2, 5, n, [(0, n)] * 2, True, q_tile)
        tiles = [-(-(p.stop - p.start) // tile) for p in problems]
        assert sum(tiles) == 5 * per_head
        s = stream_k(tiles, programs)
        assert s.makespan == most and s.loads.count(most) == high, (n, q_tile, tile, processors)


def test_a_schedule_prints_what_it_is():
    assert repr(stream_k([5, 1, 3], 2)) == "Schedule(3 outputs, 9 tiles, 2 workers, makespan 5, 0 partials)"


# ---- as a backend of attention


def ragged(batch=8, m=2048, d=64, heads=(8, 8), low=0.05, left=False):
    torch.manual_seed(0)
    q = torch.randn(batch, heads[0], 1, d)
    k, v = torch.randn(2, batch, heads[1], m, d)
    lengths = torch.linspace(low * m, m, batch).long()
    valid = torch.arange(m) < lengths[:, None]
    return q, k, v, valid.flip(1) if left else valid


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_attention_takes_it_for_samples_of_unlike_length(left):
    q, k, v, valid = ragged(left=left)
    assert explain(q, k, v, valid=valid).startswith("runs: split\npassed over: sdpa: it would read the keys")
    out = attention(q, k, v, valid=valid)
    torch.testing.assert_close(out, attention(q, k, v, valid=valid, backend="sdpa"), atol=1e-5, rtol=1e-5)
    part = attention_partial(q, k, v, valid=valid, backend="split")
    assert torch.equal(part.finish(), out)


def test_attention_passes_over_it_elsewhere():
    q, k, v, valid = ragged()
    assert "split: every sample has all keys" in explain(q, k, v)
    assert "split: too few keys are missing" in explain(q, k, v, valid=ragged(low=0.9)[3])
    assert "split: keys and values have fewer" in explain(q, k[:, :, :128], v[:, :, :128], valid=valid[:, :128])
    many = q.expand(-1, -1, 64, -1)
    assert "split: there are many queries" in explain(many, k, v, valid=valid)
    holes = valid.clone()
    holes[-1, 5] = False
    assert "split: the keys of a sample do not stand together" in explain(q, k, v, valid=holes)
    assert "split: it takes no mask" in explain(q, k, v, valid=valid, mask=torch.ones(1, k.shape[2], dtype=torch.bool))
    assert "split: its normalizer is sigmoid" in explain(q, k, v, valid=valid, normalizer="sigmoid")
    with pytest.raises(ValueError, match="cannot serve this call: parts of the keys do not give"):
        attention(q, k, v, backend="split", return_weights=True)


def test_forced_on_any_size():
    q, k, v = qkv(heads=(4, 2, 4), n=3, m=10)
    valid = torch.zeros(2, 10, dtype=torch.bool)
    valid[1, 3:7] = True
    for which in (None, valid):
        mine = attention(q, k, v, valid=which, backend="split")
        torch.testing.assert_close(mine, attention(q, k, v, valid=which, backend="eager"))


@pytest.mark.parametrize("call", [{}, {"backend": "split"}], ids=["chosen", "forced"])
def test_traced_calls_do_not_read_lengths(call):
    q, k, v, valid = ragged(batch=2, m=64)
    if call:
        with pytest.raises(Exception, match="cannot be traced"):
            torch.compile(lambda *t: attention(*t[:3], valid=t[3], **call), fullgraph=True, backend="eager")(
                q, k, v, valid
            )
    else:
        q, k, v, valid = ragged()
        compiled = torch.compile(lambda *t: attention(*t[:3], valid=t[3]), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q, k, v, valid), attention(q, k, v, valid=valid), atol=1e-5, rtol=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    "call, match",
    [
        (dict(lengths=[9]), "lengths must name 2 numbers"),
        (dict(lengths=[9, 10]), "between 0 and 9"),
        (dict(lengths=torch.tensor([-1, 4])), "between 0 and 9"),
        (dict(tile=0), "tile must be an integer of at least 1"),
        (dict(q_tile=-1), "q_tile must be an integer of at least 1"),
        (dict(workers=0), "workers must be an integer of at least 1"),
        (dict(schedule="waves"), "schedule='waves' is not possible"),
        (dict(schedule="fixed", splits=0), "splits must be an integer of at least 1"),
    ],
)
def test_bad_calls(call, match):
    q, k, v = qkv(n=1, m=9, grad=False)
    with pytest.raises(ValueError, match=match):
        split_decoding(q, k, v, **call)


def test_bad_schedules():
    with pytest.raises(ValueError, match="workers"):
        stream_k([3], 0)
    with pytest.raises(ValueError, match=r"tiles\[1\] must be an integer of at least 0, got -2"):
        stream_k([3, -2], 4)
    with pytest.raises(ValueError, match="processors must be an integer of at least 1"):
        lean_launch(4, 4, 0)
