"""BiViT: one-bit maps and attention against the authors' classes and against counting bits; thresholds, gradients."""

import json
import math

import pytest
import torch
from parity import Fixture
from torch import nn

import attnlib
from attnlib.nn.binary import BinaryLinear, BinaryMlp, binary_sign
from attnlib.normalizers import Thresholded

FIXTURE = Fixture("bivit")
MLPS, LINEAR = (json.loads(FIXTURE.meta[k]) for k in ("mlp", "linear"))


@pytest.mark.parametrize("case", list(FIXTURE.config))
def test_attention_equals_the_authors(case):
    FIXTURE.holds(case, FIXTURE.build(case), lambda m, given: m(given["x"]))


@pytest.mark.parametrize("case", [*MLPS, *LINEAR])
def test_mlps_and_maps_equal_the_authors(case):
    said = FIXTURE.under(f"{case}/sd")
    if case in MLPS:
        m = BinaryMlp(8, 10, compat="authors", **MLPS[case])
        names = BinaryMlp.convert_state_dict
    else:
        m = BinaryLinear(8, 5, compat="authors", **LINEAR[case])
        names = lambda held: {k.replace("scaling_factor", "scale"): v for k, v in held.items()}  # noqa: E731
    m.load_state_dict(names(said))
    x = FIXTURE.tensors[f"{case}/x/x"].clone().requires_grad_()
    y = m(x)
    torch.testing.assert_close(y, FIXTURE.tensors[f"{case}/y"], atol=1e-5, rtol=1e-5)
    y.backward(FIXTURE.tensors[f"{case}/g"])
    torch.testing.assert_close(x.grad, FIXTURE.tensors[f"{case}/dx/x"], atol=1e-5, rtol=1e-5)
    theirs = names(FIXTURE.under(f"{case}/dw"))
    for name, p in m.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], atol=1e-5, rtol=1e-5)


def test_parameters_and_initial_values():
    m = attnlib.create("bivit", dim=64, num_heads=4)
    assert sum(p.numel() for p in m.parameters()) == 16896
    assert float(m.q.weight.detach().abs().max()) <= 0.015 < 1.01 * float(m.q.weight.detach().abs().max())
    torch.testing.assert_close(m.proj.scale.detach(), m.proj.weight.detach().abs().mean(1, keepdim=True))
    plain = attnlib.create("bivit", dim=64, num_heads=4, weight_scale="mean")
    assert float(plain.q.weight.detach().abs().max()) > 0.1 and plain.q.scale is None


def test_scales_of_a_release_before_its_first_call_are_begun():
    said = FIXTURE.under("sab/sd")
    fresh = {k: torch.zeros_like(v) if "scaling" in k else v for k, v in said.items()}
    held = attnlib.convert_state_dict("bivit", fresh)
    torch.testing.assert_close(held["q.scale"], said["qkv.weight"][:12].abs().mean(1, keepdim=True))
    m = attnlib.create("bivit", dim=12, num_heads=3)
    m.load_state_dict(held)
    m.q.weight.data.mul_(2)
    m.q.reset_scale()
    torch.testing.assert_close(m.q.scale.detach(), 2 * held["q.scale"])


@pytest.mark.parametrize("share", [0.05, 0.25, 0.7, 1.0])
def test_maps_are_of_one_bit_and_every_row_has_its_largest(share):
    s = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    a = Thresholded(share).weights(s)
    assert set(a.unique().tolist()) <= {0.0, 1.0}
    assert bool((a.gather(-1, s.argmax(-1, keepdim=True)) == 1).all())
    assert torch.equal(a, (s >= s.amax(-1, keepdim=True) + math.log(share)).to(a))
    if share == 1:
        assert torch.equal(a.sum(-1), torch.ones(2, 3, 7, dtype=a.dtype))
    assert bool((Thresholded(1e-12).weights(s) == 1).all())


def test_gradients_are_those_of_softmax_attention():
    q, k, v = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64).unbind()
    g = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    found = []
    for normalizer in ("thresholded", "softmax"):
        for backend in ("eager", "tiled"):
            leaves = [t.clone().requires_grad_() for t in (q, k)]
            attnlib.attention(*leaves, v, normalizer=normalizer, backend=backend).backward(g)
            found.append([t.grad for t in leaves])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])


def test_maps_of_one_bit_count_bits():
    """Agreeing signs less disagreeing ones, as whole numbers, times the scale."""
    torch.manual_seed(0)
    m = BinaryLinear(37, 5)
    x = torch.randn(3, 37)
    ones, kept = x >= 0, (m.weight - m.weight.mean(1, keepdim=True)).detach() >= 0
    agree = (ones[:, None] == kept).sum(-1)  # popcount of xnor
    torch.testing.assert_close(m(x), m.scale.T * (2 * agree - 37) + m.bias)
    assert set(binary_sign(torch.tensor([0.0, -0.0, -1e-30, 5.0])).tolist()) == {1.0, -1.0}
    assert binary_sign(torch.zeros(2), "authors").tolist() == [0.0, 0.0]


def test_thresholds_relative_to_rows_err_less_than_those_that_are_the_same_for_all():
    """Long-tailed rows: scores of unlike sharpness."""
    torch.manual_seed(0)
    s = torch.randn(64, 50, dtype=torch.float64) * torch.linspace(0.5, 6, 64, dtype=torch.float64)[:, None]
    p = s.softmax(-1)

    def error(a):
        alpha = (p * a).sum() / a.sum().clamp(min=1)
        return float((p - alpha * a).square().sum())

    aware = error(Thresholded().weights(s))
    assert aware < error((p > p.mean()).double()) and aware < error((s > 0).double())


def test_layers_of_trained_models_are_taken_over():
    linear = nn.Linear(6, 4, bias=False).double()
    made = BinaryLinear.of(linear, binary_input=False)
    assert made.bias is None and made.weight.dtype == torch.float64
    torch.testing.assert_close(made.scale, linear.weight.abs().mean(1, keepdim=True))
    assert "scale=learned" in repr(made)


def test_it_learns():
    torch.manual_seed(0)
    m = nn.Sequential(attnlib.create("bivit", dim=16, num_heads=2), BinaryMlp(16, 32, 1))
    x = torch.randn(32, 6, 16)
    y = x[:, 2, :1]
    optimizer = torch.optim.Adam(m.parameters(), 0.01)
    losses = []
    for _ in range(60):
        loss = (m(x).mean(1) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_bad_input():
    for settings, message in (
        (dict(normalizer="softmax"), "normalizer"), (dict(share=0.0), "share"), (dict(weight_scale="max"), "scale"),
        (dict(compat="paper"), "compat"), (dict(num_heads=5), "num_heads"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            attnlib.create("bivit", **{"dim": 12, "num_heads": 3, **settings})
    with pytest.raises(TypeError, match="x must be"):
        binary_sign([1.0])
    with pytest.raises(TypeError, match="linear"):
        BinaryLinear.of(nn.Conv1d(2, 2, 1))
