import math

import pytest
import torch

from attnlib import normalizers as Z

KINDS = [
    Z.Softmax(),
    Z.Sigmoid(),
    Z.Sigmoid(-2.0),
    Z.ClippedSoftmax(),
    Z.ClippedSoftmax(-0.2, 1.3),
    Z.ClippedSoftmax(0.0, 1.0),
    Z.Relu(),
    Z.Relu(7.0),
    Z.Step(),
    Z.Thresholded(),
    Z.Thresholded(1.0),
    Z.SoftplusL1(),
    Z.Uniform(),
    Z.Uniform(0.3),
    Z.Activated(),
    Z.Activated("exp"),
    Z.Activated("relu", l1=False),
    Z.Activated("elu1"),
    Z.Activated("softplus", power=3.0, offset=0.5),
]


@pytest.fixture(params=KINDS, ids=repr)
def normalizer(request: pytest.FixtureRequest) -> Z.Normalizer:
    return request.param


def _scores(seed: int = 0, empty: bool = True) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 7, 9, dtype=torch.float64, generator=g) * 2
    scores[torch.rand(scores.shape, generator=g) < 0.3] = -torch.inf
    scores[..., 0] = torch.where(scores.isinf().all(-1), 0.5, scores[..., 0])
    if empty:
        scores[0, 1, 2] = -torch.inf
        scores[1, 2] = -torch.inf
    return scores


def test_backward_is_the_derivative_of_weights(normalizer):
    scores = _scores().requires_grad_()
    grad = torch.randn(scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = normalizer.weights(scores)
    (expected,) = torch.autograd.grad(weights, scores, grad)
    with torch.no_grad():
        ours = normalizer.backward(scores, weights, grad)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 9, 64, 1000])
def test_in_place_forms_agree(normalizer, dtype, width):
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 5, width, dtype=dtype, generator=g) * 2
    scores[:, 1:, 1:][torch.rand(2, 4, width - 1, generator=g) < 0.4] = -torch.inf
    grad = torch.randn(scores.shape, dtype=dtype, generator=g)
    weights = normalizer.weights(scores)
    expected = normalizer.backward(scores, weights, grad)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(normalizer.weights_(scores.clone()), weights, rtol=tolerance, atol=tolerance)
    ours, ds = normalizer.adjoint_(scores.clone(), grad.clone())
    torch.testing.assert_close(ours, weights, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ds, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("phi", list(Z.ACTIVATIONS))
def test_deferred_forms_are_the_weights_before_the_sum(phi):
    normalizer = Z.SoftplusL1() if phi == "softplus" else Z.Activated(phi)
    assert normalizer.deferred == (phi != "exp"), "a softmax needs the largest score of the row first"
    assert not Z.Activated(phi, power=2.0).deferred and not Z.Activated(phi, l1=False).deferred
    if not normalizer.deferred:
        return
    scores, g = _scores(), torch.Generator().manual_seed(3)
    grad = torch.randn(scores.shape, dtype=torch.float64, generator=g)
    weights = normalizer.weights(scores)
    raw = normalizer.raw_(scores.clone())
    total = raw.sum(-1, keepdim=True)
    total[total == 0] = 1
    torch.testing.assert_close(raw / total, weights, rtol=1e-12, atol=1e-12)
    met = (weights * grad).sum(-1, keepdim=True)
    again, ds = normalizer.raw_adjoint_(scores.clone(), grad.clone(), met, torch.empty_like(scores))
    torch.testing.assert_close(again, raw, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ds / total, normalizer.backward(scores, weights, grad), rtol=1e-12, atol=1e-12)


def test_forbidden_pairs_and_empty_rows_weigh_nothing(normalizer):
    scores = _scores().requires_grad_()
    weights = normalizer.weights(scores)
    assert torch.equal(weights[scores.isinf()], torch.zeros(int(scores.isinf().sum()), dtype=torch.float64))
    (grad,) = torch.autograd.grad(weights.square().sum(), scores)
    assert bool(torch.isfinite(grad).all()) and not bool(grad[scores.isinf()].any())


def test_no_keys_at_all(normalizer):
    scores = torch.zeros(2, 3, 0, dtype=torch.float64)
    assert normalizer.weights(scores).shape == (2, 3, 0)


def test_lower_and_raise_round_trip(normalizer):
    assert Z.raise_normalizer(normalizer.lower()) == normalizer


def test_formulas():
    s = _scores(empty=False)
    soft = torch.softmax(s, -1)
    seen = ~s.isinf()
    for normalizer, expected in [
        (Z.Softmax(), soft),
        (Z.Sigmoid(-1.5), 1 / (1 + torch.exp(1.5 - s))),
        (Z.ClippedSoftmax(-0.1, 1.2), (1.3 * soft - 0.1).clamp(0, 1)),
        (Z.Relu(4.0), s.clamp(min=0) / 4),
        (Z.Step(), (s > 0).to(s.dtype)),
        (Z.Thresholded(0.3), (s >= s.amax(-1, keepdim=True) + math.log(0.3)).to(s.dtype)),
        (Z.SoftplusL1(), torch.log1p(s.exp()) / torch.log1p(s.exp()).sum(-1, keepdim=True)),
        (Z.Uniform(0.25), 0.75 * soft + 0.25 * seen.to(s.dtype) / seen.sum(-1, keepdim=True)),
    ]:
        torch.testing.assert_close(normalizer.weights(s), expected, rtol=1e-12, atol=1e-12)


def test_clipped_softmax_without_clipping_is_softmax_and_clips_gradients():
    s = _scores(empty=False)
    torch.testing.assert_close(Z.ClippedSoftmax(0.0, 1.0).weights(s), Z.Softmax().weights(s))
    two = torch.tensor([[0.0, -9.0]], dtype=torch.float64, requires_grad=True)
    weights = Z.ClippedSoftmax(-0.03, 1.0).weights(two)
    assert weights[0, 1] == 0
    (grad,) = torch.autograd.grad(weights[0, 1], two)
    assert not bool(grad.any())


def test_passes_and_statistics_are_declared():
    assert Z.Softmax().passes == Z.Sigmoid().passes == 1
    assert Z.ClippedSoftmax().passes == Z.Uniform().passes == 2
    assert Z.Sigmoid.stats == Z.Relu.stats == ()


def test_names():
    assert set(Z.normalizer_names()) >= {"softmax", "sigmoid", "clipped_softmax", "relu", "softplus_l1", "uniform"}
    assert Z.sigmoid_bias(8) == pytest.approx(-2.0794415)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Z.as_normalizer("sofmax"), "normalizer='sofmax'"),
        (lambda: Z.Thresholded(0.0), "share"),
        (lambda: Z.Thresholded(1.5), "share"),
        (lambda: Z.ClippedSoftmax(0.1), "gamma"),
        (lambda: Z.ClippedSoftmax(zeta=0.5), "zeta"),
        (lambda: Z.Uniform(1.5), "u must"),
        (lambda: Z.sigmoid_bias(0), "n must"),
        (lambda: Z.sigmoid_bias(2.5), "n must.*2.5"),
        (lambda: Z.as_normalizer(None), "normalizer=None"),
        (lambda: Z.as_normalizer(Z.Softmax), "normalizer="),
        (lambda: Z.ClippedSoftmax(float("nan")), "gamma.*nan"),
        (lambda: Z.ClippedSoftmax(zeta=float("inf")), "zeta.*inf"),
        (lambda: Z.Uniform(True), "u must.*True"),
        (lambda: Z.Sigmoid(float("inf")), "bias.*inf"),
        (lambda: Z.Sigmoid("0"), "bias.*'0'"),
        (lambda: Z.Sigmoid(torch.zeros(())), "bias"),
        (lambda: Z.Relu(0.0), "divisor.*0.0"),
        (lambda: Z.Relu(-2.0), "divisor.*-2.0"),
        (lambda: Z.Activated(phi="tanh"), "phi='tanh'"),
        (lambda: Z.Activated(power=0.0), "power=0.0"),
        (lambda: Z.Activated(power=2.0, l1=False), "l1"),
        (lambda: Z.Activated(l1=1), "l1.*1"),
        (lambda: Z.Activated(spare=-1), "spare.*-1"),
        (lambda: Z.Activated(offset=float("nan")), "offset.*nan"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
