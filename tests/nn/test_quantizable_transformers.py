import pytest
import torch
from parity import Fixture
from torch import nn

import attnlib
from attnlib.nn.dense.quantizable_transformers import outlier_metrics
from attnlib.normalizers import ClippedSoftmax

SLUG = "quantizable-transformers"
FIXTURE = Fixture(SLUG)


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    valid = FIXTURE.tensors.get(f"{case}/valid")
    module.forward = module.mix  # their padded queries still produce an output
    FIXTURE.holds(case, module, lambda m, xs: m.mix(xs["x"], valid=valid).y)


def test_without_stretch_it_is_softmax():
    m, plain = (attnlib.create(n, dim=16, num_heads=2) for n in (SLUG, "softmax-attention"))
    plain.load_state_dict(m.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(m(x), plain(x))
    torch.testing.assert_close(ClippedSoftmax(0.0, 1.0).weights(x), x.softmax(-1))


def test_entries_below_the_threshold_are_exactly_zero_and_have_no_gradient():
    gamma, zeta = -0.1, 1.0
    threshold = -gamma / (zeta - gamma)
    gap = torch.linspace(0, 6, 40, dtype=torch.float64)
    scores = torch.stack([torch.zeros_like(gap), gap], -1).requires_grad_()
    weights = ClippedSoftmax(gamma, zeta).weights(scores)
    below = scores.softmax(-1)[:, 0] < threshold
    assert bool(below.any()) and not bool(below.all())
    assert torch.equal(weights[:, 0] == 0, below)
    grad = torch.autograd.grad(weights[:, 0].sum(), scores)[0]
    assert float(grad[below].abs().max()) == 0.0 and float(grad[~below].abs().min()) > 0.0
    assert float(weights.sum(-1).max()) <= 1 + 1e-12


def test_an_open_gate_changes_nothing_and_a_closed_half_halves():
    x = torch.randn(2, 5, 16)
    m = attnlib.create(SLUG, dim=16, num_heads=2, proj_bias=False, gate="conditional_per_token")
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2, proj_bias=False)
    plain.load_state_dict(m.state_dict(), strict=False)
    nn.init.constant_(m.gate.b2, 30.0)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)
    half = attnlib.create(SLUG, dim=16, num_heads=2, proj_bias=False, gate="unconditional_per_head")
    half.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(half(x), plain(x) / 2, atol=1e-6, rtol=1e-5)


def test_fine_tuning_starts_as_the_ungated_layer():
    m = attnlib.create(SLUG, dim=16, num_heads=2, gate="conditional_per_token", gate_init=0.3, fine_tuning=True)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2)
    plain.load_state_dict(m.state_dict(), strict=False)
    nn.init.zeros_(m.gate.w2)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("hidden, expected", [(None, 12 * 65), (16, 12 * (64 * 16 + 16 + 16 + 1))])
def test_gate_parameters_of_bert_base(hidden, expected):
    m = attnlib.create(SLUG, dim=768, num_heads=12, gate="conditional_per_token", gate_hidden=hidden)
    assert sum(p.numel() for p in m.gate.parameters()) == expected


def test_gamma_follows_the_longest_length_not_the_current_one():
    m = attnlib.create(SLUG, dim=16, num_heads=2, alpha=4.0, max_length=32)
    assert m.normalizer == ClippedSoftmax(-0.125, 1.0)
    x, valid = torch.randn(1, 6, 16), torch.tensor([[True] * 4 + [False] * 2])
    torch.testing.assert_close(m(x, valid=valid)[:, :4], m(x[:, :4]), atol=1e-6, rtol=1e-5)


def test_doing_nothing_needs_growing_scores_only_in_softmax():
    """A head whose best output is zero, with one empty value to look at: where do its scores go in training?"""
    torch.manual_seed(0)
    values = torch.randn(16, 8)
    values[0] = 0
    reach = {}
    for kind, normalizer in (("softmax", ClippedSoftmax(0, 1)), ("clipped", ClippedSoftmax(-0.03, 1)), ("gated", None)):
        scores, gate = torch.zeros(16, requires_grad=True), torch.zeros((), requires_grad=True)
        optimizer = torch.optim.Adam([scores, gate], 0.05)
        for _ in range(600):
            optimizer.zero_grad()
            weights = scores.softmax(-1) if normalizer is None else normalizer.weights(scores)
            out = weights @ values * (gate.sigmoid() if kind == "gated" else 1.0)
            out.square().sum().backward()
            optimizer.step()
        reach[kind] = float(scores.detach().max() - scores.detach().min())
        assert float(out.detach().norm()) < 0.02
    assert reach["clipped"] < 0.8 * reach["softmax"] and reach["gated"] < 0.8 * reach["softmax"], reach


def test_head_masks_and_skipped_attention():
    x = torch.randn(2, 5, 16)
    m = attnlib.create(SLUG, dim=16, num_heads=2, gamma=-0.03, head_mask=[0.0, 0.5])
    plain = attnlib.create(SLUG, dim=16, num_heads=2, gamma=-0.03)
    plain.load_state_dict(m.state_dict())
    plain.proj.weight.data[:, :8] *= 0
    plain.proj.weight.data[:, 8:] *= 0.5
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)
    weights = m(x, returns=("weights",)).weights
    assert float(weights[:, 0].abs().max()) == 0.0 and float(weights[:, 1].sum(-1).max()) <= 0.5 + 1e-6
    skip = attnlib.create(SLUG, dim=16, num_heads=2, skip_attn=True)
    assert torch.equal(skip(x), skip.proj.bias.expand(2, 5, 16))
    bare = attnlib.create(SLUG, dim=16, num_heads=2, skip_attn=True, out_proj=False)
    y = bare(x.requires_grad_())
    y.sum().backward()
    assert float(y.abs().max()) == 0.0 and float(x.grad.abs().max()) == 0.0
    with pytest.raises(ValueError, match="head_mask must hold num_heads=2 numbers, got 3"):
        attnlib.create(SLUG, dim=16, num_heads=2, head_mask=[1.0, 1.0, 1.0])


def test_a_pooled_gate_under_a_mask_says_that_it_looks_ahead():
    settings = dict(dim=8, num_heads=2, gate="conditional_per_head", causal=True)
    with pytest.raises(ValueError, match="traits patterns"):
        attnlib.create(SLUG, **settings)(torch.randn(1, 3, 8))
    m, x = attnlib.create(SLUG, compat="authors", **settings), torch.randn(1, 4, 8)
    assert m.traits.patterns == {"noncausal-self", "noncausal-cross"} and not m.traits.streaming
    later = x.clone()
    later[:, 3] += 1.0
    assert not torch.allclose(m(x)[:, 0], m(later)[:, 0], atol=1e-5)
    m.gate.w2.data.zero_()
    m.gate.b2.data.fill_(0.7)  # a gate that reads nothing leaves the causal order
    free = attnlib.create(SLUG, **{**settings, "gate": "none"})
    free.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("gate")})
    gated = free.proj.bias + (free(x) - free.proj.bias) * torch.tensor(0.7).sigmoid()
    torch.testing.assert_close(m(x), gated, atol=1e-6, rtol=1e-5)


def test_outlier_metrics_of_a_normal_sample():
    torch.manual_seed(0)
    metrics = outlier_metrics(torch.randn(4, 100, 100))
    assert abs(metrics["kurtosis"] - 3) < 0.1 and 3.5 < metrics["inf_norm"] < 7


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(gamma=0.1), "gamma <= 0"),
        (dict(alpha=2.0), "come together"),
        (dict(alpha=2.0, max_length=8, gamma=-0.1), "not both"),
        (dict(gate="per_token"), "gate="),
        (dict(gate="conditional_per_token", head_dim=5), "head_dim=5"),
        (dict(gate="conditional_per_token", gate_init=1.0), "gate_init"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        attnlib.create(SLUG, dim=16, num_heads=2, **settings)


@pytest.mark.parametrize("relative", ["key", "key_query"])
def test_a_cache_and_its_border_with_relative_positions(relative):
    m = attnlib.create(SLUG, dim=16, num_heads=4, num_kv_heads=2, relative=relative, max_distance=6, causal=True).eval()
    x = torch.randn(2, 6, 16)
    out = m(x[:, :4], returns=("state",))
    rest, state = m.step(x[:, 4:], out.state)
    torch.testing.assert_close(torch.cat([out.y, rest], 1), m(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="max_distance=6 bounds a sequence.*has 7"):
        m.step(x[:, :1], state)
