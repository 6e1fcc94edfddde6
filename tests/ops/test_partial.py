import pytest
import torch

from attnlib.ops import attention, attention_partial
from attnlib.types import Partial

F64 = torch.float64
INF = float("inf")


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _part(seed: int, empty: str = "") -> Partial:
    """A part of random sums; row 1 has seen nothing, written as a softmax part or as a linear part would."""
    g = _g(seed)
    log_scale = torch.randn(2, 2, 3, dtype=F64, generator=g)
    den = torch.rand(2, 2, 3, dtype=F64, generator=g) + 0.5
    num = torch.randn(2, 2, 3, 4, dtype=F64, generator=g)
    if empty:
        log_scale[:, :, 1] = -INF if empty == "softmax" else 0.0
        den[:, :, 1] = 0.0
        num[:, :, 1] = 0.0
    return Partial(log_scale, den, num)


def _close(a: Partial, b: Partial) -> None:
    torch.testing.assert_close(a.finish(), b.finish(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.lse(), b.lse(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empties", [("", ""), ("softmax", ""), ("linear", ""), ("softmax", "linear")])
def test_gradcheck_of_finish_of_merge(empties):
    """Gradients through all three fields of both parts, with rows that only one part, or none, has seen."""
    parts = [_part(seed, empty) for seed, empty in enumerate(empties)]
    hidden = [torch.isinf(p.log_scale) for p in parts]
    both_empty = all(empties)

    def fn(*flat: torch.Tensor) -> torch.Tensor:
        built = [
            # -inf cannot be perturbed, so it is put in behind the variable.
            Partial(flat[3 * i].masked_fill(hidden[i], -INF), flat[3 * i + 1], flat[3 * i + 2])
            for i in range(2)
        ]
        out = built[0].merge(built[1]).finish()
        # Where nothing was seen the output jumps as soon as a denominator leaves zero: not a point to differentiate.
        return out[:, :, [0, 2]] if both_empty else out

    flat = [torch.where(torch.isinf(t), torch.zeros_like(t), t).requires_grad_() for part in parts for t in part]
    assert torch.autograd.gradcheck(fn, flat)


@pytest.mark.parametrize("field", ["lse", "den", "num"])
def test_gradcheck_of_merged_statistics(field):
    a, b = _part(0), _part(1)

    def fn(*flat: torch.Tensor) -> torch.Tensor:
        merged = Partial(*flat[:3]).merge(Partial(*flat[3:]))
        if field == "lse":
            return merged.lse()
        scale = torch.exp(merged.log_scale)
        return scale * merged.den if field == "den" else scale.unsqueeze(-1) * merged.num

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for part in (a, b) for t in part])


@pytest.mark.parametrize("empty", ["softmax", "linear"])
def test_rows_that_saw_nothing_give_zeros_and_zero_gradients(empty):
    fields = [t.requires_grad_() for t in _part(0, empty)]
    out = Partial(*fields).merge(_part(1, empty)).finish()
    assert not bool(out[:, :, 1].any()) and bool(out[:, :, 0].any())
    for grad in torch.autograd.grad(out.square().sum(), fields):
        assert bool(torch.isfinite(grad).all()) and not bool(grad[:, :, 1].any())


def test_merge_is_associative_and_commutative():
    a, b, c = _part(0), _part(1, "softmax"), _part(2, "linear")
    expected = a.merge(b, c)
    _close(a.merge(b).merge(c), expected)
    _close(a.merge(b.merge(c)), expected)
    _close(c.merge(a, b), expected)


def test_identity():
    a = _part(0)
    _close(a.merge(Partial.identity_like(a)), a)
    _close(Partial.identity_like(a).merge(a), a)
    nothing = Partial.identity_like(a).merge(Partial.identity_like(a))
    assert not bool(nothing.finish().any()) and bool((nothing.lse() == -INF).all())


def test_shift_multiplies_the_weight():
    a, b = _part(0), _part(1)
    weight = torch.tensor(3.0, dtype=F64)
    shifted = a.shift(weight.log()).merge(b)
    heavy = Partial(a.log_scale, a.den * 3, a.num * 3).merge(b)
    _close(shifted, heavy)
    torch.testing.assert_close(a.shift(0.7).finish(), a.finish())
    torch.testing.assert_close(a.shift(0.7).lse(), a.lse() + 0.7)


def test_common_scale_does_not_matter():
    a, b = _part(0), _part(1)
    again = Partial(a.log_scale - 2, a.den * torch.e**2, a.num * torch.e**2)
    _close(again.merge(b), a.merge(b))


def test_extreme_scales_stay_finite():
    a, b = _part(0), _part(1)
    low, high = a.shift(-2000.0), b.shift(1500.0)
    merged = low.merge(high)
    torch.testing.assert_close(merged.finish(), b.finish())
    torch.testing.assert_close(low.merge(a.shift(-2000.0)).finish(), a.finish())


def test_an_empty_linear_part_does_not_drown_a_small_softmax_part():
    """A linear memory that holds nothing yet says (0, 0, 0); a window with scores near -200 must survive it."""
    window = Partial(torch.full((1, 1, 2), -200.0), torch.ones(1, 1, 2), torch.randn(1, 1, 2, 3, generator=_g()))
    memory = Partial(*(torch.zeros_like(t) for t in window))
    assert torch.equal(window.merge(memory).finish(), window.num)
    fields = [t.clone().requires_grad_() for t in window]
    for grad in torch.autograd.grad(memory.merge(Partial(*fields)).finish().sum(), fields):
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_parts_of_the_keys_merge_to_attention(backend):
    q, k, v = (torch.randn(2, 2, n, 8, dtype=F64, generator=_g(i)).requires_grad_() for i, n in enumerate((5, 9, 9)))
    grad = torch.randn(2, 2, 5, 8, dtype=F64, generator=_g(7))
    valid = torch.tensor([[True] * 9, [False] * 3 + [True] * 6])
    whole = attention(q, k, v, valid=valid, backend="eager")
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    cuts = [slice(0, 3), slice(3, 3), slice(3, 9)]
    parts = [attention_partial(q, k[:, :, s], v[:, :, s], valid=valid[:, s], backend=backend) for s in cuts]
    out = parts[0].merge(*parts[1:]).finish()
    torch.testing.assert_close(out, whole, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_partial_statistics_have_gradients(backend):
    q, k = (torch.randn(1, 2, 6, 4, dtype=F64, generator=_g(i)).requires_grad_() for i in range(2))
    v = torch.randn(1, 2, 6, 3, dtype=F64, generator=_g(2)).requires_grad_()
    expected = torch.logsumexp(q @ k.transpose(-2, -1) * 0.5, -1)
    part = attention_partial(q, k, v, backend=backend)
    torch.testing.assert_close(part.lse(), expected)
    weight = torch.randn(expected.shape, dtype=F64, generator=_g(3))
    ours = torch.autograd.grad(part.lse(), (q, k), weight)
    theirs = torch.autograd.grad(expected, (q, k), weight)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_sink_and_zero_key_as_parts(backend):
    """A learned sink is one more key with a logit of its own and a value of zero."""
    q, k, v = (torch.randn(1, 1, 4, 4, dtype=F64, generator=_g(i)) for i in range(3))
    sink = torch.tensor(0.3, dtype=F64)
    part = attention_partial(q, k, v, backend=backend)
    one = torch.ones(1, 1, 4, dtype=F64)
    out = part.merge(Partial(sink * one, one, torch.zeros(1, 1, 4, 4, dtype=F64))).finish()
    scores = q @ k.transpose(-2, -1) * 0.5
    weights = torch.softmax(torch.cat([scores, sink.expand(1, 1, 4, 1)], -1), -1)[..., :4]
    torch.testing.assert_close(out, weights @ v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_partial_is_kept_in_float32(backend, dtype):
    q, k, v = (torch.randn(1, 2, 6, 4, generator=_g(i)).to(dtype) for i in range(3))
    assert {t.dtype for t in attention_partial(q, k, v, backend=backend)} == {torch.float32}
