"""Long-short attention: one softmax over window and landmarks, in the loop that says so; the edges; absent tokens."""

import pytest
import torch

from attnlib.nn.local.long_short import LongShort


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
