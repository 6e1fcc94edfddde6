"""MoA's heads: windows behind sinks against a map, special cases, rings of unequal length, padding, bad input."""

import pytest
import torch
from parity import HERE
from safetensors.torch import load_file

import attnlib
from attnlib.nn.sparse.moa_spans import SpanHeads, block_layout, span_blocks, span_plan

FIXTURE = load_file(HERE / "moa-spans.safetensors")
SETTINGS = dict(alphas=(0, 2, -4, 6), betas=(0.25, 0.5, 1.0, 0.0), block=2)


def data(n, heads=4, kv=4, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, n, 8, generator=g, dtype=torch.float64) for h in (heads, kv, kv))


def oracle(m, q, k, v, length, at=None):
    """Softmax over the map, head by head and pair by pair."""
    batch, heads, n, _ = q.shape
    share = heads // k.shape[1]
    at = torch.arange(n).expand(batch, n) if at is None else at
    out = torch.zeros(batch, heads, n, v.shape[3], dtype=v.dtype)
    for h in range(heads):
        near = max(1, int(m.alphas[h] // m.block + m.betas[h] * -(-length // m.block)))
        for b in range(batch):
            for i in range(n):
                if at[b, i] < 0:
                    continue
                own = at[b, i] // m.block
                keys = [
                    j for j in range(n)
                    if 0 <= at[b, j] <= at[b, i]
                    and (at[b, j] // m.block > own - near or at[b, j] < m.sinks * m.block)
                ]  # fmt: skip
                w = (k[b, h // share, keys] @ q[b, h, i] * m.scale).softmax(0)
                out[b, h, i] = w @ v[b, h // share, keys]
    return out


def test_layouts_equal_the_authors():
    alphas, betas = FIXTURE["alpha"].tolist(), FIXTURE["beta"].tolist()
    for number, expected in zip(FIXTURE["layout_ids"].tolist(), FIXTURE["layouts"], strict=True):
        span = span_blocks(alphas[number], betas[number], 64, 4)
        assert block_layout([span], 1, 16)[0].equal(expected.bool())
        plan = span_plan([span, 2], 1, 4, 64)
        assert plan.chosen()[0, 0].equal(expected.bool())
        assert plan.chosen()[0].equal(block_layout([span, 2], 1, 16))


@pytest.mark.parametrize(("kv", "sinks", "n"), [(4, 1, 13), (2, 0, 12), (1, 2, 7)])
def test_it_equals_softmax_over_the_map(kv, sinks, n):
    m = SpanHeads(4, 8, kv, **SETTINGS, sinks=sinks)
    q, k, v = data(n, kv=kv)
    expected = oracle(m, q, k, v, n)
    torch.testing.assert_close(m(q, k, v)[0], expected)
    values = v.repeat_interleave(4 // kv, 1)
    torch.testing.assert_close(m.weights(q, k) @ values, expected)


def test_full_spans_are_causal_attention_and_fixed_ones_windows_with_sinks():
    q, k, v = data(12)
    full = SpanHeads(4, 8, alphas=0, betas=1, block=2)
    torch.testing.assert_close(full(q, k, v)[0], attnlib.attention(q, k, v, mask=attnlib.masks.causal()))
    window = SpanHeads(4, 8, alphas=3, betas=0, block=1, sinks=2)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    allowed = (j <= i) & ((i - j < 3) | (j < 2))
    torch.testing.assert_close(window(q, k, v)[0], attnlib.attention(q, k, v, mask=allowed))


@pytest.mark.parametrize("pieces", [(1,) * 17, (9,) + (1,) * 8, (5, 7, 2, 3)])
@pytest.mark.parametrize(("kv", "sinks"), [(4, 1), (2, 1), (2, 0)])
def test_rings_of_unequal_length_decode_as_one_pass(pieces, kv, sinks):
    m = SpanHeads(4, 8, kv, **SETTINGS, sinks=sinks, length=12)
    q, k, v = data(17, kv=kv)
    whole, state, out, at = m(q, k, v)[0], None, [], 0
    for size in pieces:
        part = slice(at, at + size)
        y, state = m(q[:, :, part], k[:, :, part], v[:, :, part], state=state, keep=True)
        out.append(y)
        at += size
        assert state["keys"].shape == (2, sum(m.slots(12)), 8)
    torch.testing.assert_close(torch.cat(out, 2), whole)
    torch.testing.assert_close(whole, oracle(m, q, k, v, 12))


def test_the_state_does_not_grow_and_is_cut_by_the_batch():
    m = SpanHeads(4, 8, 2, **SETTINGS, length=8)
    assert m.spans(8) == [1, 3, 2, 3] and m.slots(8) == [2 * (1 + 3)] * 2
    state, sizes = None, set()
    for step in range(30):
        q, k, v = data(1, kv=2, seed=step)
        _, state = m(q, k, v, state=state, keep=True)
        sizes.add(tuple(t.numel() for t in state.tensors.values()))
    assert len(sizes) == 1 and state["tokens"].tolist() == [30, 30]
    q, k, v = data(1, kv=2, seed=99)
    both, _ = m(q, k, v, state=state)
    turned, _ = m(q.flip(0), k.flip(0), v.flip(0), state=state.select(torch.tensor([1, 0])))
    torch.testing.assert_close(turned.flip(0), both)


def test_absent_tokens_take_no_place():
    m = SpanHeads(4, 8, 2, **SETTINGS, length=10)
    q, k, v = data(14, kv=2)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[0, :5] = valid[1, 3] = False
    at = (valid.long().cumsum(1) - 1).masked_fill(~valid, -1)
    expected = oracle(m, q, k, v, 10, at)
    k, v = (t.masked_fill(~valid[:, None, :, None], float("inf")) for t in (k, v))
    y, _ = m(q, k.nan_to_num(posinf=9e3), v.nan_to_num(posinf=9e3), valid=valid)
    torch.testing.assert_close(y, expected)
    k, v = k.nan_to_num(posinf=7.0), v.nan_to_num(posinf=7.0)
    _, state = m(q[:, :, :8], k[:, :, :8], v[:, :, :8], valid=valid[:, :8], keep=True)
    rest, _ = m(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:], valid=valid[:, 8:], state=state)
    torch.testing.assert_close(rest, expected[:, :, 8:])


def test_gradients_equal_those_of_the_map():
    m = SpanHeads(4, 8, 2, **SETTINGS)
    leaves = [t.requires_grad_() for t in data(9, kv=2)]
    g = data(9, seed=5)[0]
    ours = torch.autograd.grad(m(*leaves)[0], leaves, g)
    q, k, v = leaves
    theirs = torch.autograd.grad(m.weights(q, k) @ v.repeat_interleave(2, 1), leaves, g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_spans_never_shrink_with_the_length():
    for a in (-512, 0, 300):
        for b in (0, 0.125, 1):
            spans = [span_blocks(a, b, n, 64) for n in range(64, 4096, 64)]
            assert spans == sorted(spans) and spans[0] >= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(causal=False), "causal=False"),
        (dict(alphas=(1, 2)), "alphas must be one number, or one for each of 4 heads, got 2"),
        (dict(betas=-0.5), "betas"),
        (dict(block=0), "block"),
        (dict(sinks=-1), "sinks"),
        (dict(length=0), "length"),
        (dict(num_kv_heads=3), "num_kv_heads"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SpanHeads(4, 8, **settings)
