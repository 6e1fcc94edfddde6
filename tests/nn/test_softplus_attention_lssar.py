import math

import pytest
import torch

import attnlib
from attnlib import attention, masks
from attnlib.normalizers import Activated

SLUG = "softplus-attention-lssar"


def oracle(q, k, v, power, mask):
    """Equations 9 to 13, row by row, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    d, out = q.shape[-1], torch.zeros_like(v)
    for i in range(q.shape[0]):
        seen = mask[i].nonzero()[:, 0]
        n = len(seen)
        cosine = torch.stack([q[i] @ k[j] / (q[i].norm() * k[j].norm()) for j in seen])
        a = torch.log1p(torch.exp(math.log(d) * math.log(n) * cosine))
        a = a / a.sum()
        if power is not None:
            a = (a * n - (1.0 if n > 3 else 0.0)).clamp(min=0) ** power
            a = a / a.sum()
        out[i] = a @ v[seen]
    return out


@pytest.mark.parametrize("power", [None, 3.0, 15.0])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_oracle(power, causal):
    torch.manual_seed(0)
    m = attnlib.create(SLUG, dim=8, num_heads=1, power=power, causal=causal).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    mask = (masks.causal() if causal else masks.sliding_window(99)).dense(9)
    with torch.no_grad():
        expected = m.proj(oracle(m.q(x)[0], m.k(x)[0], m.v(x)[0], power, mask))
        torch.testing.assert_close(m(x)[0], expected, atol=1e-10, rtol=1e-8)


def test_exponential_without_sharpening_is_softmax():
    m = attnlib.create(SLUG, dim=16, num_heads=2, phi="exp", cosine=False, power=None)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2)
    plain.load_state_dict(m.state_dict())
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)


def test_rows_sum_to_one_and_the_first_copies_its_value():
    m = attnlib.create(SLUG, dim=16, num_heads=2, causal=True)
    weights = m(torch.randn(2, 12, 16), returns=("weights",)).weights.detach()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 12), atol=1e-5, rtol=0)
    assert float(weights.min()) >= 0 and torch.equal(weights[:, :, 0, 0], torch.ones(2, 2))


def test_a_large_power_is_one_hot_and_power_one_without_offset_changes_nothing():
    scores = torch.randn(4, 50, dtype=torch.float64)
    hard = Activated("softplus", True, 2000.0).weights(scores)
    assert torch.equal(hard.argmax(-1), scores.argmax(-1)) and float(hard.max(-1).values.min()) > 0.99
    plain = Activated("softplus").weights(scores)
    torch.testing.assert_close(Activated("softplus", True, 1.0, offset=0.0).weights(scores), plain)


def test_a_uniform_row_stays_and_long_rows_do_not_overflow():
    uniform = Activated("softplus", True, 15.0).weights(torch.zeros(1, 4096))
    torch.testing.assert_close(uniform, torch.full((1, 4096), 1 / 4096))
    spike = torch.zeros(1, 4096)
    spike[0, 7] = 40.0
    weights = Activated("softplus", True, 15.0).weights(spike)
    assert float(weights[0, 7]) > 0.999 and bool(torch.isfinite(weights).all())


def test_the_row_scale_keeps_the_entropy_in_proportion():
    """Entropy over log N moves less from N = 64 to 4096 with the length scale than with that of N = 64."""
    torch.manual_seed(0)

    def relative_entropy(n, scale):
        q, k = (torch.nn.functional.normalize(torch.randn(m, 64), dim=-1) for m in (32, n))
        a = Activated("softplus").weights(q @ k.T * scale)
        return float(-(a * a.clamp(min=1e-30).log()).sum(-1).mean() / math.log(n))

    drift = {
        name: abs(relative_entropy(64, f(64)) - relative_entropy(4096, f(4096)))
        for name, f in (("length", lambda n: math.log(64) * math.log(n)), ("fixed", lambda n: math.log(64) ** 2))
    }
    assert drift["length"] < 0.6 * drift["fixed"]


def test_hidden_keys_do_not_count():
    m = attnlib.create(SLUG, dim=16, num_heads=2)
    x, valid = torch.randn(2, 8, 16), torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    torch.testing.assert_close(m(x, valid=valid)[1, :5], m(x[1:, :5])[0], atol=1e-6, rtol=1e-5)


def test_two_passes_only_with_sharpening():
    assert Activated("softplus").passes == 1 and Activated("softplus", True, 3.0).passes == 2


@pytest.mark.parametrize("phi", ["exp", "softplus", "sigmoid", "relu"])
def test_tiled_equals_eager(phi):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 8, requires_grad=True)
    got = {}
    for backend in ("eager", "tiled"):
        out = attention(q, k, v, mask=masks.causal(), normalizer=Activated(phi, True, 3.0), backend=backend)
        got[backend] = (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(got["eager"], got["tiled"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings, words", [(dict(phi="tanh"), "phi="), (dict(power=-1.0), "power=-1.0")])
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        attnlib.create(SLUG, dim=16, num_heads=2, **settings)
