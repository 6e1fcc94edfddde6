"""Hedgehog: recorded runs, maps that learn to be softmax, and what biases and identity starts are."""

import math

import pytest
import torch
from parity import Fixture
from torch import nn

import attnlib
from attnlib.nn.linear.feature_maps import HedgehogFeatures
from attnlib.nn.linear.heads import map_cross_entropy, softmax_map
from attnlib.nn.linear.hedgehog import HedgehogHeads

FIXTURE = Fixture("hedgehog")
LOLCATS = [case for case in FIXTURE.config if f"{case}/transfer/mse" in FIXTURE.tensors]


def make(**config):
    torch.manual_seed(0)
    return attnlib.create("hedgehog", **{"dim": 16, "num_heads": 4, "causal": True, "chunk": 4, **config})


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    FIXTURE.holds(case, FIXTURE.build(case), lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("case", LOLCATS)
def test_attention_transfer_equals_the_authors(case):
    x = FIXTURE.under(f"{case}/x")["x"]
    want = FIXTURE.under(f"{case}/transfer")
    for name in ("mse", "xent"):
        # Their map adds 1e-12 to its sums, whatever the layer adds.
        module = FIXTURE.build(case, attention_transfer=True, eps=1e-12)
        losses = module(x, returns=("losses",)).losses
        torch.testing.assert_close(losses[f"transfer_{name}"], want[name][0], atol=1e-6, rtol=1e-5)
        losses[f"transfer_{name}"].backward()
        grads = FIXTURE._convert(case, f"transfer/d{name}")
        ours = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        assert ours.keys() == grads.keys() and all(n.startswith("heads.phi_") for n in ours)
        for n, grad in grads.items():
            torch.testing.assert_close(ours[n], grad, atol=2e-6, rtol=1e-4)


def plain(q, k, v, phi_q, phi_k, causal, eps):
    """The equation, one query after the other, in float64."""
    f_q, f_k = phi_q(q), phi_k(k)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for i in range(q.shape[2]):
        last = i + 1 if causal else k.shape[2]
        w = torch.einsum("bhf,bhjf->bhj", f_q[:, :, i], f_k[:, :, :last])
        out[:, :, i] = torch.einsum("bhj,bhjd->bhd", w, v[:, :, :last]) / (w.sum(-1, keepdim=True) + eps)
    return out


@pytest.mark.parametrize("kind", ["softmax", "exp", "exp-unstable", "joint-softmax", "elu1", "relu"])
@pytest.mark.parametrize("causal", [True, False])
def test_oracle(kind, causal):
    torch.manual_seed(0)
    heads = HedgehogHeads(2, 4, causal=causal, features=kind, chunk=3, eps=1e-3).double()
    q, k, v = torch.randn(3, 2, 2, 8, 4, dtype=torch.float64)
    want = plain(q, k, v, heads.phi_q, heads.phi_k, causal, 1e-3)
    torch.testing.assert_close(heads(q, k, v)[0], want, atol=1e-12, rtol=1e-10)
    assert bool((heads.phi_q(q) > 0).all() if kind != "relu" else (heads.phi_q(q) >= 0).all())
    mixed = heads.weights(q, k) @ v
    torch.testing.assert_close(mixed, want, atol=1e-12, rtol=1e-10)


def test_identity_without_negated_copy_is_exp():
    phi = HedgehogFeatures(2, 4, kind="exp-unstable", fullspace=False, identity=True)
    x = torch.randn(1, 2, 5, 4)
    torch.testing.assert_close(phi(x), x.exp())
    # It is what layers start from.
    assert torch.equal(make().heads.phi_k.weight, torch.eye(4).expand(4, 4, 4))


@pytest.mark.parametrize("kind, cancels", [("softmax", True), ("exp", True), ("joint-softmax", False), ("elu1", False)])
def test_a_bias_per_head_cancels_where_halves_are_divided_or_shifted(kind, cancels):
    phi = HedgehogFeatures(2, 4, kind=kind, bias=True).double()
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        phi.bias.zero_()
        without = phi(x)
        phi.bias.fill_(0.7)
        assert torch.allclose(phi(x), without, atol=1e-12) == cancels


def teacher(n=24, heads=2, width=8, seed=0):
    """Queries and keys with as spiky maps as trained models have, and values."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 4, heads, n, width, generator=g)
    return 2 * q, 2 * k, v


def distilled(kind, steps=300):
    """A mixer after training on one batch, and its divergence from softmax and entropy on that batch."""
    torch.manual_seed(0)
    q, k, v = teacher()
    heads = HedgehogHeads(2, 8, features=kind)
    exists = torch.ones(4, 24, dtype=torch.bool)
    _, target = softmax_map(q, k, v, heads.scale, True, None)
    optimizer = torch.optim.Adam(heads.trained(), lr=2e-2)
    for _ in range(steps):
        loss = map_cross_entropy(heads.weights(q, k), target, exists)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        weights = heads.weights(q, k)
        entropy, own = map_cross_entropy(target, target, exists), map_cross_entropy(weights, weights, exists)
        return heads, float(map_cross_entropy(weights, target, exists) - entropy), float(own), float(entropy)


def test_distillation_makes_maps_close_low_in_entropy_and_monotone():
    heads, near, entropy, wanted = distilled("softmax")
    for kind in ("elu1", "relu"):
        _, far, other, _ = distilled(kind)
        assert near < 0.7 * far, (near, far)
        if kind == "elu1":
            assert abs(entropy - wanted) < abs(other - wanted)
    # Weights grow with q . k along a query's own direction, as those of softmax do.
    q, _, _ = teacher(seed=0)
    direction = q[:1, :, :1] / q[:1, :, :1].norm(dim=-1, keepdim=True)
    k = direction * torch.linspace(-3, 3, 9)[:, None]
    heads.causal = False
    with torch.no_grad():
        w = heads.weights(q[:1, :, :1], k)[0, :, 0]
    ranks = torch.corrcoef(torch.stack([w.argsort(-1).argsort(-1).float().flatten(), torch.arange(9.0).repeat(2)]))
    assert float(ranks[0, 1]) > 0.8


def test_an_untrained_map_of_1_plus_elu_stays_flat():
    q, k, v = teacher(n=64)
    heads = HedgehogHeads(2, 8, features="elu1", causal=False)
    w = heads.weights(q, k)
    entropy = float(-(w * w.log()).sum(-1).mean().detach())
    _, target = softmax_map(q, k, v, heads.scale, False, None)
    softmax = float(-(target * target.clamp(min=1e-30).log()).sum(-1).mean())
    assert entropy > 0.9 * math.log(64) > softmax + 0.5


def test_transfer_gives_the_teacher_and_trains_the_maps_only():
    m = make(attention_transfer=True, qkv_bias=False, proj_bias=False, rotary=10000.0)
    softmax = attnlib.create(
        "softmax-attention", dim=16, num_heads=4, qkv_bias=False, proj_bias=False, causal=True, rotary=10000.0
    )
    softmax.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("heads.")})
    x = torch.randn(2, 9, 16)
    out = m(x, returns=("losses",))
    torch.testing.assert_close(out.y, softmax(x))
    sum(out.losses.values()).backward()
    got = {n for n, p in m.named_parameters() if p.grad is not None}
    assert got == {"heads.phi_q.weight", "heads.phi_k.weight"}
    assert {id(p) for p in m.feature_parameters()} == {id(p) for n, p in m.named_parameters() if n in got}


def test_padding_does_not_enter_the_losses():
    m = make(attention_transfer=True)
    x = torch.randn(2, 9, 16)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 6:] = False
    short, padded = m(x[:, :6], returns=("losses",)).losses, m(x, valid=valid, returns=("losses",)).losses
    for name in short:
        torch.testing.assert_close(padded[name], short[name])


def test_bad_input():
    with pytest.raises(ValueError, match="features='cosine' is not possible"):
        make(features="cosine")
    with pytest.raises(ValueError, match="feature_options='color'"):
        make(feature_options=dict(color=1))
    with pytest.raises(ValueError, match="alibi.*no scores"):
        make(alibi=True)
    with pytest.raises(ValueError, match="chunk"):
        make(chunk=0)
    with pytest.raises(ValueError, match="output_norm"):
        make(output_norm="layer")
    with pytest.raises(ValueError, match="num_kv_heads"):
        HedgehogHeads(4, 4, 3)
    with pytest.raises(ValueError, match="bias"):
        HedgehogFeatures(2, 4, bias="heads")
    assert isinstance(make(output_norm="rms").norm, nn.RMSNorm)
