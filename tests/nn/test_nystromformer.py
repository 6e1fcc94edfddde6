"""Nystromformer: landmarks of any length, what its parts are, cost, bad input."""

import pytest
import torch

import attnlib
from attnlib.nn.reduced.nystromformer import NystromAttention
from attnlib.ops.landmarks import cubic_inverse, segment_means, segment_weights


def made(**settings):
    torch.manual_seed(0)
    return NystromAttention(**{**dict(dim=16, num_heads=2, num_landmarks=4), **settings}).double()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(m, x):
    return [part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (m.q, m.k, m.v)]


@pytest.mark.parametrize("n", [8, 10, 11, 13])
def test_it_is_the_equation(n):
    m, x = made(conv_size=3, steps=8), noise(2, n, 16)
    q, k, v = heads(m, x)
    short = 4 * (n // 4 + 1) - n
    bounds = [0]
    for i in range(4):
        bounds.append(bounds[-1] + n // 4 + (i >= short))
    assert bounds[-1] == n
    cells = list(zip(bounds[:-1], bounds[1:], strict=True))
    q_land, k_land = (torch.stack([t[:, :, a:b].mean(2) for a, b in cells], 2) for t in (q, k))
    first, between, last = (
        torch.softmax(a @ b.mT / 8**0.5, -1) for a, b in ((q, k_land), (q_land, k_land), (q_land, k))
    )
    inverse = between.mT / between.sum(-2).amax(-1)[..., None, None]
    eye = torch.eye(4, dtype=torch.float64)
    for _ in range(8):
        p = between @ inverse
        inverse = inverse @ (13 * eye - p @ (15 * eye - p @ (7 * eye - p))) / 4
    local = torch.zeros_like(v)
    for i in range(n):
        for step in (-1, 0, 1):
            if 0 <= i + step < n:
                local[:, :, i] += m.conv.weight[:, 0, step + 1].view(1, 2, 1) * v[:, :, i + step]
    out = first @ inverse @ (last @ v) + local
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)))


def test_as_many_landmarks_as_tokens_are_softmax_attention():
    m, x = made(num_landmarks=9), noise(2, 9, 16)
    q, k, v = heads(m, x)
    out = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("landmarks", [4, 12])
@pytest.mark.parametrize("conv_size", [0, 3])
def test_padding_changes_nothing(landmarks, conv_size):
    m, x = made(num_landmarks=landmarks, conv_size=conv_size), noise(2, 11, 16)
    padded = torch.cat([noise(2, 3, 16, seed=2), x, noise(2, 2, 16, seed=3)], 1)
    valid = torch.zeros(2, 16, dtype=torch.bool)
    valid[:, 3:14] = True
    torch.testing.assert_close(m(padded, valid=valid)[:, 3:14], m(x))


@pytest.mark.parametrize("landmarks", [4, 12])
def test_weights_give_the_output(landmarks):
    m, x = made(num_landmarks=landmarks), noise(2, 14, 16)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[0, 10:] = False
    y, weights = m(x, valid=valid, returns=("weights",)).y, m(x, valid=valid, returns=("weights",)).weights
    assert weights.shape == (2, 2, 14, 14) and not weights[0, ..., 10:].any()
    out = m.proj((weights @ heads(m, x)[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y[0, :10], out[0, :10])


def test_segments_of_tokens_that_exist():
    x = torch.arange(6.0).view(1, 1, 6, 1).expand(2, 1, 6, 1)
    valid = torch.tensor([[True] * 6, [False, True, False, True, True, False]])
    means, some = segment_means(x, 2, valid)
    assert means[..., 0].tolist() == [[[1.0, 4.0]], [[1.0, 3.5]]] and some.all()
    means, some = segment_means(x, 4, valid)
    assert means[1, 0, :, 0].tolist() == [1.0, 3.0, 4.0, 0.0] and some.tolist()[1] == [True] * 3 + [False]
    weights, _ = segment_weights(3, 5, None, x)
    assert torch.equal(weights[0], torch.eye(3))


def test_the_inverse():
    a = torch.softmax(noise(3, 5, 5) * 2, -1)
    torch.testing.assert_close(cubic_inverse(a, 30) @ a, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    one, all_of_them = cubic_inverse(a, 2), cubic_inverse(a, 2, shared=True)
    assert not torch.allclose(one, all_of_them)
    torch.testing.assert_close(cubic_inverse(a[:1], 2), one[:1])
    with pytest.raises(ValueError, match="square"):
        cubic_inverse(noise(2, 3))


def test_how_it_starts():
    m = attnlib.create("nystromformer", dim=64, num_heads=4)
    bound = (6 / 128) ** 0.5
    assert m.proj.weight.abs().max() <= bound and m.proj.weight.abs().max() > 0.95 * bound
    assert m.q.weight.abs().max() <= bound / 2**0.5 and not m.q.bias.any() and not m.proj.bias.any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: made(conv_size=4), "conv_size must be odd"),
        (lambda: made(num_landmarks=0), "num_landmarks"),
        (lambda: made(scale=0.0), "scale"),
        (lambda: made(compat="theirs"), "compat"),
        (lambda: made()(noise(1, 5, 16), noise(1, 4, 16)), "context"),
        (lambda: NystromAttention.convert_state_dict({"wrong": torch.zeros(1)}), "wrong"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()
