import math

import pytest
import torch
from parity import Fixture

import attnlib
from attnlib import attention
from attnlib.hooks.probes import sink_rate
from attnlib.nn.dense.attention_sink_empirical import bucket_numbers, sink_metric
from attnlib.nn.layers import merge_heads, split_heads
from attnlib.normalizers import Activated, Sigmoid

SLUG = "attention-sink-empirical"
FIXTURE = Fixture(SLUG, num_heads=lambda c: c["num_heads"], num_kv_heads=lambda c: c["num_kv_heads"])
LOWER = torch.ones(5, 5, dtype=torch.bool).tril()


def build(**settings):
    torch.manual_seed(0)
    return attnlib.create(SLUG, **{**dict(dim=16, num_heads=2, causal=True), **settings})


def heads(m, x):
    return (split_heads(p(x), 2) for p in (m.q, m.k, m.v))


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


def test_metric_equals_the_authors():
    ours = sink_metric(FIXTURE.tensors["metric/weights"]) * 100
    torch.testing.assert_close(ours, FIXTURE.tensors["metric/percent"])
    assert 0 < float(ours[0]) < 100


def test_metric_of_known_maps():
    eye, first = torch.eye(8), torch.zeros(8, 8)
    first[:, 0] = 1
    # 1 / (T - k) > 0.3 for the last three columns
    assert sink_metric(eye).tolist() == [0.0] * 5 + [1.0] * 3
    assert sink_metric(first).tolist() == [1.0] + [0.0] * 7
    uniform = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    alpha = sum(1 / i for i in range(1, 65)) / 64
    assert sink_metric(uniform, alpha - 1e-4)[0] == 1 and sink_metric(uniform, alpha + 1e-4)[0] == 0
    assert alpha == pytest.approx((math.log(64) + 0.5772156649 + 1 / 128) / 64, rel=1e-4)  # the harmonic number


def test_metric_agrees_with_the_recorder():
    w = FIXTURE.tensors["metric/weights"].flatten(0, 1)
    received, seen = w.sum(-2), torch.ones(7, 7).tril().sum(0).expand(4, 2, 7)
    torch.testing.assert_close(sink_rate(received, seen, 0.3, sinks=7), sink_metric(w))


def test_zero_biases_are_softmax_off_by_one():
    m, x = build(k_bias=True), torch.randn(2, 5, 16)
    m.k_bias.data.zero_()
    q, k, v = heads(m, x)
    e = torch.exp(q @ k.transpose(-2, -1) * 8**-0.5) * LOWER
    expected = m.proj(merge_heads(e @ v / (1 + e.sum(-1, keepdim=True))))
    torch.testing.assert_close(m(x), expected, atol=1e-6, rtol=1e-5)


def test_zero_value_adds_one_term_to_the_denominator():
    m, x = build(k_bias=True, per_head=False).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    m.k_bias.data.normal_()
    q, k, v = heads(m, x)
    e = torch.exp(q @ k.transpose(-2, -1) * 8**-0.5) * LOWER
    extra = torch.exp(q @ m.k_bias * 8**-0.5)[..., None]
    out = m(x, returns=("weights",))
    weights = e / (extra + e.sum(-1, keepdim=True))
    torch.testing.assert_close(out.weights, weights)
    torch.testing.assert_close(out.y, m.proj(merge_heads(weights @ v)))


def test_a_key_far_off_changes_nothing():
    m, x = build(k_bias=True, v_bias=True), torch.randn(2, 5, 16)
    m.q.weight.data.zero_()
    m.q.bias.data.fill_(1.0)
    m.k_bias.data.fill_(-1000.0)
    q, k, v = heads(m, x)
    expected = m.proj(merge_heads(attention(q, k, v, mask=attnlib.masks.causal())))
    torch.testing.assert_close(m(x), expected, atol=1e-6, rtol=1e-5)


def test_a_virtual_key_takes_the_sink():
    """All queries share a direction; the first key has it, and so the sink, until a virtual key has more of it."""
    m, plain = build(k_bias=True), build()
    for module in (m, plain):
        module.q.weight.data.zero_()
        module.q.bias.data.fill_(1.0)
        module.k.weight.data.copy_(torch.eye(16))
        module.k.bias.data.zero_()
    m.k_bias.data.fill_(2.0)
    x = 0.1 * torch.randn(3, 16, 16)
    x[:, 0] = 1.0
    assert sink_metric(plain(x, returns=("weights",)).weights)[0] == 1
    assert sink_metric(m(x, returns=("weights",)).weights)[0] == 0


def test_normalised_exp_is_softmax():
    m, x = build(similarity="exp"), torch.randn(2, 5, 16)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2, causal=True)
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)


def test_unnormalised_sigmoid_is_sigmoid_attention_without_bias():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    a = attention(q, k, v, normalizer=Activated("sigmoid", False))
    torch.testing.assert_close(a, attention(q, k, v, normalizer=Sigmoid()), atol=1e-6, rtol=1e-5)
    m, x = build(similarity="sigmoid", normalize=False), torch.randn(2, 5, 16)
    apple = attnlib.create(
        "sigmoid-attention", dim=16, num_heads=2, causal=True, attn_bias=0.0, qk_norm=False, qkv_bias=True,
        proj_bias=True,
    )  # fmt: skip
    apple.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), apple(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kernel", ["identity", "elu1", "mlp"])
def test_kernels_equal_the_quadratic_form(kernel, normalize):
    m, x = build(kernel=kernel, normalize=normalize).double(), 3 * torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = heads(m, x)
    a = (m._phi(q) @ m._phi(k).transpose(-2, -1)) * 8**-0.5 * LOWER
    total = a.sum(-1, keepdim=True)
    if normalize:
        a = a / (total + 1e-8 if kernel == "elu1" else total.abs().clamp(min=1))
    torch.testing.assert_close(m(x), m.proj(merge_heads(a @ v)))


def test_row_sums_near_zero_stay_finite():
    m, x = build(kernel="identity"), torch.randn(2, 5, 16)
    m.q.weight.data.zero_()
    m.q.bias.data.zero_()
    assert m(x).isfinite().all()


def test_masks_and_padding_see_the_virtual_key():
    m, x = build(k_bias=True, v_bias=True, causal=False), torch.randn(2, 5, 16)
    m.v_bias.data.normal_()
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    only = m.proj(m.v_bias.flatten()).expand(2, 5, 16)
    torch.testing.assert_close(m(x, mask=nothing), only, atol=1e-6, rtol=1e-5)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    torch.testing.assert_close(m(x, valid=valid)[1, :3], m(x[1:, :3])[0], atol=1e-6, rtol=1e-5)


def test_windows_and_prefixes_are_masks():
    x = torch.randn(2, 9, 16)
    plain = build()
    m = build(window_size=3)
    torch.testing.assert_close(m(x), plain(x, mask=attnlib.masks.recent(3)), atol=1e-6, rtol=1e-5)
    first = m(x[:, :5], returns=("state",))
    torch.testing.assert_close(m.step(x[:, 5:], first.state)[0], m(x)[:, 5:], atol=1e-6, rtol=1e-5)
    open_, ahead = build(causal=False), build(prefix_tokens=4)
    torch.testing.assert_close(ahead(x), open_(x, mask=attnlib.masks.prefix_lm(4)), atol=1e-6, rtol=1e-5)
    assert ahead.traits.patterns == {"noncausal-self", "causal-cross"} and not ahead.traits.streaming
    hidden = attnlib.masks.sliding_window(5)
    both = attnlib.masks.prefix_lm(4) & hidden
    torch.testing.assert_close(ahead(x, mask=hidden), open_(x, mask=both), atol=1e-6, rtol=1e-5)


def test_numbers_of_buckets():
    """T5's own: bidirectional off, 32 buckets, up to 128."""
    expected = [
        float(d) if d < 16 else min(31.0, 16 + math.floor(math.log(d / 16) / math.log(8) * 16 + 1e-9))
        for d in range(300)
    ]
    assert bucket_numbers(torch.arange(300)).tolist() == expected
    m, x = build(relative="bucket"), torch.randn(1, 20, 16)
    q, k, v = heads(m, x)
    at = torch.arange(20)
    s = q @ k.mT * 8**-0.5 + bucket_numbers((at[:, None] - at).clamp(min=0))
    s = s.masked_fill(at > at[:, None], -math.inf)
    torch.testing.assert_close(m(x), m.proj(merge_heads(s.softmax(-1) @ v)), atol=1e-6, rtol=1e-5)


def test_bad_settings():
    for settings, message in (
        (dict(similarity="tanh"), "similarity="),
        (dict(kernel="rbf"), "kernel="),
        (dict(k_bias=True, similarity="sigmoid"), "k_bias=True needs similarity='softmax'"),
        (dict(k_bias=True, kernel="elu1"), "got kernel='elu1'"),
        (dict(kernel="elu1", similarity="sigmoid"), "takes the place of"),
        (dict(normalize=False), "softmax is normalised always"),
        (dict(normalizer="sigmoid"), "through similarity"),
        (dict(k_bias=True, attn_drop=0.1), "attn_drop=0.1 is not possible with k_bias"),
        (dict(kernel="mlp", attn_drop=0.1), "attn_drop=0.1 is not possible with kernel"),
        (dict(kernel="mlp", alibi=True), "alibi=True is not possible"),
        (dict(kernel="mlp", window_size=3), "window_size=3 is not possible with kernel"),
        (dict(causal=False, prefix_tokens=3), "needs causal=True"),
        (dict(window_size=0), "window_size must be at least 1"),
        (dict(window_size=3, prefix_tokens=2), "goes without a window_size"),
        (dict(relative="t5"), "relative="),
        (dict(relative="bucket", alibi=True), "two biases"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings)
    with pytest.raises(ValueError, match=r"causal maps \(\.\.\., T, T\)"):
        sink_metric(torch.ones(2, 3))
    with pytest.raises(ValueError, match="state_dict is empty"):
        attnlib.convert_state_dict(SLUG, {})
