"""Long-short attention: one softmax over window and landmarks, in the loop that says so; the edges; absent tokens."""

import pytest
import torch

from attnlib.nn.local.long_short import CausalLongShort, LongShort


def loop(m, x):
    """Query by query, in float64."""
    n, w, e = x.shape[1], m.window_size, max(m.window_size // 2, 1)
    q = m.q(x)
    k, v = m.norm_short(m.k(x)), m.norm_short(m.v(x))
    rows = []
    heads = [slice(h * q.shape[-1] // m.num_heads, (h + 1) * q.shape[-1] // m.num_heads) for h in range(m.num_heads)]
    far_k = far_v = None
    if m.landmarks is not None:
        shares = m.landmarks(x).softmax(1).unflatten(2, (m.num_heads, -1))
        far_k, far_v = (
            m.norm_long(torch.cat([shares[:, :, h].mT @ t[..., s] for h, s in enumerate(heads)], -1)) for t in (k, v)
        )
    for i in range(n):
        begin = i // w * w
        near = slice(max(begin - e, 0), min(begin + w + e, n))
        keys = k[:, near] if far_k is None else torch.cat([k[:, near], far_k], 1)
        values = v[:, near] if far_v is None else torch.cat([v[:, near], far_v], 1)
        out = [
            torch.einsum(
                "bm,bmd->bd",
                (torch.einsum("bd,bmd->bm", q[:, i, s], keys[..., s]) * m.scale).softmax(-1),
                values[..., s],
            )
            for s in heads
        ]
        rows.append(torch.cat(out, -1))
    return m.proj(torch.stack(rows, 1))


@pytest.mark.parametrize(("landmarks", "window", "n"), [(3, 4, 12), (3, 4, 9), (0, 5, 11), (2, 1, 5), (4, 20, 6)])
def test_equals_the_loop(landmarks, window, n):
    m = LongShort(8, 2, num_landmarks=landmarks, window_size=window).double()
    for p in (*m.norm_short.parameters(), *m.norm_long.parameters()):
        torch.nn.init.normal_(p)
    x = torch.randn(2, n, 8, dtype=torch.double)
    torch.testing.assert_close(m(x), loop(m, x))


def test_absent_tokens_take_no_place():
    m = LongShort(8, 2, num_landmarks=3, window_size=4).double()
    x, there = torch.randn(1, 11, 8, dtype=torch.double), torch.ones(1, 11, dtype=torch.bool)
    there[0, [0, 4, 5]] = False
    torch.testing.assert_close(m(x, valid=there)[there], m(x[:, there[0]])[0])


def test_landmarks_see_everything_and_the_window_does_not():
    m = LongShort(8, 2, num_landmarks=3, window_size=4).double()
    x = torch.randn(1, 20, 8, dtype=torch.double)
    other = x.clone()
    other[0, 19] += 1.0
    assert not torch.allclose(m(x)[0, 0], m(other)[0, 0])
    alone = LongShort(8, 2, num_landmarks=0, window_size=4).double()
    assert torch.equal(alone(x)[0, :16], alone(other)[0, :16])  # blocks of 4 and 2 tokens beyond


def test_bad_input():
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        LongShort(8, 2, window_size=0)
    with pytest.raises(ValueError, match="num_landmarks"):
        LongShort(8, 2, num_landmarks=-1)
    with pytest.raises(ValueError, match="takes no context"):
        LongShort(8, 2)(torch.randn(1, 3, 8), torch.randn(1, 3, 8))


# ---- causal


def causal_loop(m, x):
    """Token by token, in float64: the window, and the landmarks of earlier chunks, of a memory of zeros perhaps."""
    n, size, rank, width = x.shape[1], m.chunk_size, m.chunk_rank, m.window_size
    heads = m.num_heads

    def split(t):
        return t.unflatten(-1, (heads, -1))

    def angles(distance):
        rates = 10000.0 ** (-torch.arange(0, m.dim, 2, dtype=x.dtype) / m.dim)
        return torch.cat([(distance * rates).sin(), (distance * rates).cos()])

    memory = x.new_zeros(x.shape[0], m.mem_len, m.dim)
    q, far = split(m.q(x) * m.scale), []
    whole = torch.cat([memory, x], 1)
    for c in range(whole.shape[1] // size):
        part = whole[:, c * size : (c + 1) * size]
        shares = split(m.landmarks(part)).softmax(1)  # (B, size, H, rank)
        sums = [torch.einsum("bshr,bshd->brhd", shares, split(t(part))).flatten(2) for t in (m.k, m.v)]
        if c < m.mem_len // size:  # theirs projects what the memory's landmarks hold, which is zero
            sums = [t(x.new_zeros(x.shape[0], rank, m.dim)) for t in (m.k, m.v)]
        far.append([split(m.norm_long(t)) for t in sums])
    near_k, near_v = split(m.norm_short(m.k(whole))), split(m.norm_short(m.v(whole)))
    rows = []
    for i in range(n):
        chunk, at = (m.mem_len + i) // size, m.mem_len + i
        scores, values = [], []
        for b in range(chunk):
            for r in range(rank):
                apart = (chunk - b) * rank - 1 - r
                key = far[b][0][:, r] + split(m.chunk_positions(angles(apart)))
                scores.append((q[:, i] * key).sum(-1))
                values.append(far[b][1][:, r])
        for j in range(max(at - width + 1, 0), at + 1):
            place = split(m.window_positions(angles(at - j)))
            score = (q[:, i] + m.content_bias) * near_k[:, j] + (q[:, i] + m.position_bias) * place
            scores.append(score.sum(-1))
            values.append(near_v[:, j])
        weights = torch.stack(scores, -1).softmax(-1)
        rows.append(torch.einsum("bhm,mbhd->bhd", weights, torch.stack(values)).flatten(1))
    return m.proj(torch.stack(rows, 1))


@pytest.mark.parametrize(("settings", "n"), [
    (dict(chunk_size=4, window_size=3), 14), (dict(chunk_size=3, window_size=5, chunk_rank=2, qkv_bias=True), 11),
    (dict(chunk_size=8, window_size=20), 9), (dict(chunk_size=4, window_size=4, mem_len=8, compat="authors"), 10),
    (dict(chunk_size=2, window_size=1), 5),
])  # fmt: skip
def test_causal_equals_the_loop(settings, n):
    m = CausalLongShort(8, 2, **settings).double()
    for p in (*m.norm_short.parameters(), *m.norm_long.parameters(), m.content_bias, m.position_bias):
        torch.nn.init.normal_(p)
    x = torch.randn(2, n, 8, dtype=torch.double)
    torch.testing.assert_close(m(x), causal_loop(m, x))


def test_a_prefix_is_what_it_is_alone_whatever_its_length():
    m = CausalLongShort(8, 2, chunk_size=4, window_size=3).double()
    x = torch.randn(1, 15, 8, dtype=torch.double)
    for n in (1, 3, 4, 6, 9):
        torch.testing.assert_close(m(x[:, :n]), m(x)[:, :n])


def test_causal_absent_tokens_take_no_place():
    m = CausalLongShort(8, 2, chunk_size=4, window_size=3).double()
    x, there = torch.randn(1, 11, 8, dtype=torch.double), torch.ones(1, 11, dtype=torch.bool)
    there[0, [0, 4, 5]] = False
    torch.testing.assert_close(m(x, valid=there)[there], m(x[:, there[0]])[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(window_size=0), "window_size must be at least 1"),
        (dict(chunk_rank=0), "chunk_rank must be at least 1"),
        (dict(causal=False), "use long-short"),
        (dict(compat="authors", mem_len=40), "mem_len=40 must be a multiple of chunk_size=32"),
        (dict(compat="authors", mem_len=64), "at least window_size=256"),
    ],
)
def test_causal_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLongShort(8, 2, **settings)
