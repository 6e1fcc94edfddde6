import math

import pytest
import torch
from parity import Fixture

import attnlib
from attnlib import attention, masks
from attnlib.nn.dense.selective_self_attention import effective_support

SLUG = "selective-self-attention"
FIXTURE = Fixture(SLUG, num_heads=lambda c: c["num_heads"], num_kv_heads=lambda c: c.get("num_kv_heads"))


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


def test_starts_as_plain_attention():
    m = attnlib.create(SLUG, dim=16, num_heads=2, init=-1e4)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2)
    plain.load_state_dict(m.state_dict(), strict=False)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(m(x), plain(x))


def test_position_temperature_keeps_the_largest_logit_alive():
    """One logit of gap 1 among n - 1 equal ones: attention dilutes without the temperature, not with it."""
    for n in (16, 256, 4096):
        logits = torch.zeros(n)
        logits[0] = 1.0
        plain = logits.softmax(-1)[0]
        scaled = (logits * math.log(n)).softmax(-1)[0]
        assert float(scaled) >= 0.5 and float(plain) < 1.1 * math.e / n
        assert float(effective_support(torch.full((n,), 1 / n))) == pytest.approx(n, rel=1e-4)


def test_rows_count_the_keys_they_see():
    m = attnlib.create(SLUG, dim=16, num_heads=2, init=2.0)
    torch.nn.init.normal_(m.tau_q, std=0.5)
    torch.nn.init.normal_(m.tau_v, std=0.5)
    x, valid = torch.randn(2, 6, 16), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    torch.testing.assert_close(m(x, valid=valid)[1, :4], m(x[1:, :4])[0], atol=1e-6, rtol=1e-5)
    window = masks.sliding_window(3)
    torch.testing.assert_close(m(x, mask=window), m(x, mask=window.dense(6)), atol=1e-6, rtol=1e-5)


def test_a_silenced_value_matters_only_as_a_key():
    m = attnlib.create(SLUG, dim=16, num_heads=2, token_queries=False, position="none")
    x = torch.randn(1, 4, 16)
    q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (m.q, m.k, m.v))
    m._token = lambda heads, weight: torch.tensor([0.0, -1.0, 0.0, 0.0])[None, None, :, None]
    silent = v.clone()
    silent[:, :, 1] = 0
    expected = m.proj(attention(q, k, silent).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x), expected, atol=1e-6, rtol=1e-5)


def test_scaling_queries_is_scaling_logits():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    tau = torch.rand(1, 1, 5, 1) + 0.5
    logits = (q @ k.transpose(-2, -1)) * 8**-0.5 * tau
    torch.testing.assert_close(attention(q * tau, k, v), logits.softmax(-1) @ v, atol=1e-6, rtol=1e-5)


def test_parameter_overhead_of_gpt2():
    """Under half a percent of a 124M-parameter model, twelve layers of it."""
    m, plain = (attnlib.create(n, dim=768, num_heads=12) for n in (SLUG, "softmax-attention"))
    extra = sum(p.numel() for p in m.parameters()) - sum(p.numel() for p in plain.parameters())
    assert 12 * extra < 0.005 * 124e6


def test_bad_settings():
    with pytest.raises(ValueError, match="position="):
        attnlib.create(SLUG, dim=16, num_heads=2, position="log")
    with pytest.raises(ValueError, match="state_dict is empty"):
        attnlib.convert_state_dict(SLUG, {})
