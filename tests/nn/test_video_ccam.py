"""Video-CCAM: causal cross-attention from learned queries to frames."""

import pytest
import torch

import attnlib
from attnlib import masks
from attnlib.nn.multimodal.video_ccam import VideoProjector


def _attend(**settings):
    return attnlib.create("video-ccam", dim=16, num_heads=2, **settings).double()


def _oracle(m, x, video):
    """The equation, query by query."""
    out = torch.zeros_like(x)
    frames = video.shape[1]
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            last = max(i * frames // x.shape[1], (i + 1) * frames // x.shape[1] - 1)
            seen = video[b, : last + 1].reshape(-1, video.shape[-1])
            heads = []
            for h in range(m.num_heads):
                part = slice(h * m.head_dim, (h + 1) * m.head_dim)
                q, k, v = m.q(x[b, i])[part], m.k(seen)[:, part], m.v(seen)[:, part]
                heads.append((k @ q * m.head_dim**-0.5).softmax(0) @ v)
            out[b, i] = m.proj(torch.cat(heads))
    return out


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 7, 13])
def test_equals_the_equation(frames):
    m = _attend(context_dim=6)
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    video = torch.randn(2, frames, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    ours, spec = m(x, video), _oracle(m, x, video)
    torch.testing.assert_close(ours, spec, rtol=0, atol=1e-12)
    g = torch.randn_like(x)
    for a, b in zip(*(torch.autograd.grad(y, (x, video), g) for y in (ours, spec)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries, frames", [(8, 3), (5, 5), (4, 11), (6, 1), (1, 4)])
def test_rows_are_nested_and_never_empty(queries, frames):
    dense = masks.causal_frames(queries, frames, 3).dense(queries, 3 * frames)
    assert bool((dense[:-1] <= dense[1:]).all()) and bool(dense[0, :3].all()) and bool(dense[-1].all())


def test_later_frames_change_nothing_and_an_image_is_read_whole():
    m = _attend()
    x, video = torch.randn(1, 6, 16).double(), torch.randn(1, 3, 4, 16).double()
    y = m(x, video)
    other = video.clone()
    other[:, 1:] += 1
    moved = (m(x, other) - y).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False, False, True, True, True, True]
    image = video[:, :1]
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2).double()
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x, image), plain(x, image.flatten(1, 2)))


def test_order_of_frames_matters_only_through_the_mask():
    m = _attend()
    x, video = torch.randn(1, 6, 16).double(), torch.randn(1, 3, 4, 16).double()
    turned = video.flip(1)
    assert not torch.allclose(m(x, video), m(x, turned))
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2).double()
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(plain(x, video.flatten(1, 2)), plain(x, turned.flatten(1, 2)))


def test_repeated_frames_change_only_queries_that_see_the_newest_once():
    m = _attend()
    queries, frames = 12, 3
    x, video = torch.randn(1, queries, 16).double(), torch.randn(1, frames, 4, 16).double()
    change = (m(x, video.repeat_interleave(2, 1)) - m(x, video)).detach().abs().amax((0, 2))
    late = torch.tensor([(i * frames / queries) % 1 >= 0.5 for i in range(queries)])
    assert float(change[late].max()) < 1e-12
    # In the first group both copies of the only frame weigh the same, so one is as good as two.
    assert float(change[: queries // frames].max()) < 1e-12
    assert bool((change[~late][2:] > 1e-6).all())


def test_frames_that_fill_up_a_batch_change_nothing():
    m = _attend()
    x, video = torch.randn(2, 6, 16).double(), torch.randn(2, 5, 4, 16).double()
    valid = torch.ones(2, 5, 4, dtype=torch.bool)
    valid[0, 3:] = False
    y = m(x, video, context_valid=valid)
    torch.testing.assert_close(y[:1], m(x[:1], video[:1, :3]))
    torch.testing.assert_close(y[1:], m(x[1:], video[1:]))


def test_projector_gives_the_same_number_of_tokens_whatever_the_video():
    p = VideoProjector(16, 24, context_dim=8, num_queries=6, num_layers=2, num_heads=2)
    for frames in (1, 4, 9):
        assert p(torch.randn(2, frames, 3, 2, 8)).shape == (2, 6, 24)
    video = torch.randn(2, 4, 3, 2, 8)
    valid = torch.ones(2, 4, 3, 2, dtype=torch.bool)
    valid[0, 2:] = False
    torch.testing.assert_close(p(video, valid)[:1], p(video[:1, :2]), rtol=1e-5, atol=1e-6)
    p(video, valid).sum().backward()
    assert all(t.grad is not None for t in p.parameters())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: _attend(causal=True), "causal=True is not possible"),
        (lambda: _attend(rotary=1e4), "rotary"),
        (lambda: _attend()(torch.randn(1, 3, 16).double()), "needs a context"),
        (lambda: VideoProjector(16, 8, num_queries=0), "num_queries=0"),
        (lambda: VideoProjector(16, 8, num_queries=2)(torch.randn(1, 0, 4, 16)), "no tokens"),
        (lambda: VideoProjector(16, 8, num_queries=2)(torch.randn(1, 2, 4, 9)), "context_dim"),
        (lambda: VideoProjector(16, 8, num_queries=2)(torch.randn(2, 16)), "video"),
        (lambda: masks.causal_frames(3, torch.tensor([[1]]), 2), "frames"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
