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


@pytest.mark.parametrize("sparse", [0.8, 3.0])
def test_sparse_rows_read_their_largest_scores(sparse):
    """Against a loop over rows; a plan freezes the choice, and steps choose as the whole does."""
    m = attnlib.create(SLUG, dim=8, num_heads=2, causal=True, position="none", sparse=sparse).double()
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
    out = torch.zeros_like(q)
    for i in range(24):
        s = (q[:, :, i : i + 1] @ k[:, :, : i + 1].mT).squeeze(2) / 2
        least = s.topk(min(i + 1, max(10, int((i + 1) ** 0.8)) if sparse < 1.5 else 3)).values[..., -1:]
        out[:, :, i] = (s.masked_fill(s < least, -math.inf).softmax(-1)[..., None] * v[:, :, : i + 1]).sum(2)
    y = m.proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x), y)
    weights = m(x, returns=("weights",)).weights
    assert int((weights[:, :, -1] > 0).sum(-1).max()) == (12 if sparse < 1.5 else 3)
    torch.testing.assert_close(m(x, plan=m.plan(x)), y)
    state, steps = None, []
    for t in range(24):
        y_t, state = m.step(x[:, t : t + 1], state)
        steps.append(y_t)
    torch.testing.assert_close(torch.cat(steps, 1), y)
    with pytest.raises(ValueError, match="plan was made for N=24"):
        m(x[:, :5], plan=m.plan(x))


def test_sparse_rows_are_an_ablation_of_plain_attention():
    for settings, words in (
        (dict(sparse=0.5), "position='none'"),
        (dict(sparse=0.5, position="none", attn_drop=0.1), "attn_drop=0.1"),
        (dict(sparse=0.0, position="none"), "sparse"),
        (dict(compat="paper"), "compat="),
    ):
        with pytest.raises(ValueError, match=words):
            attnlib.create(SLUG, dim=8, num_heads=2, **settings)
    with pytest.raises(ValueError, match="no plan"):
        attnlib.create(SLUG, dim=8, num_heads=2).plan(torch.randn(1, 3, 8))


def test_what_the_statistics_class_keeps_is_left_by_name():
    theirs = FIXTURE.under("plain/sd")
    kept = {"alpha": torch.ones(()), "beta": torch.ones(()), "mask_cache": torch.ones(4, 4).bool()}
    kept["sorted_att_buffer"] = torch.zeros(4, 4)
    ours = attnlib.convert_state_dict(SLUG, {**theirs, **kept}, num_heads=3, num_kv_heads=3)
    assert ours.keys() == attnlib.convert_state_dict(SLUG, theirs, num_heads=3, num_kv_heads=3).keys()


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
