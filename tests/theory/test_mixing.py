"""Every mechanism as a matrix times its values, or the reason why it is none; and the table made of it."""

import json

import pytest
import torch
import torch.nn.functional as F
from table import rows
from torch import nn
from typer.testing import CliRunner

import attnlib
from attnlib import masks
from attnlib.cli import app
from attnlib.nn.registry import find
from attnlib.theory.cascades import OPERATORS
from attnlib.theory.mixing import (
    FORMS,
    NOT_LINEAR,
    SITES,
    matrix_facts,
    mixing,
    mixing_matrix,
    operators_of,
    passes_table,
    state_growth,
    unified_view,
)

DOUBLE = torch.double


def alive(case):
    """A mechanism in float64 in which nothing is zero, and inputs for it."""
    m = attnlib.create(case.name, **case.config).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.numel() and not p.any():
                nn.init.normal_(p, std=0.3)
    x = torch.randn(1, *case.grid, m.dim, dtype=DOUBLE)
    context = None
    if not any(p.endswith("self") for p in m.traits.patterns):
        context = torch.randn(1, *(case.context_grid or case.grid), m.context_dim, dtype=DOUBLE)
    return m, x, context, dict(case.extras(x)) if case.extras else {}


#: Rows whose settings make a linear mechanism another function of its values.
BENT = {
    "selective-self-attention", "selective-self-attention-causal", "lightning-attention-2-tnl", "biformer-soft",
    "lightning-attention-tnl-example",
    "sigmoid-attention-post-norm", "hedgehog-fla",
}  # fmt: skip


#: Mechanisms that add something behind the output projection.
BESIDE = {"bam-soft-moa-upcycling", "window-attention-upsample"}

#: Mechanisms whose returned weights are the whole matrix: nothing gates or convolves what they mix.
WEIGHTS = {
    "softmax-attention", "sigmoid-attention", "softplus-attention-lssar", "key-driven-gqa", "diffqkv-sigma",
    "nprf-rpe-fft-attention", "fused-neighborhood-attention", "dinat", "s2-attention-dkernel", "pointer-networks",
    "dependency-vit",
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(row, id=row.id) for row in rows() if ":" not in row.name])
def test_matrix_times_values_is_the_fast_path(case):
    """For every registered mechanism and every configuration of the conformance table."""
    m, x, context, call = alive(case)
    if case.name in NOT_LINEAR or case.id in BENT:
        with pytest.raises(ValueError, match=f"{case.name} has no mixing matrix: .+"):
            mixing(m, x, context, **call)
        return
    found = mixing(m, x, context, **call)
    assert found.matrix.abs().max() > 0
    torch.testing.assert_close(found.apply(), found.mixed, atol=1e-10, rtol=1e-9)
    y = m(x, **call) if context is None else m(x, context, **call)
    if isinstance(getattr(m, "proj", None), nn.Linear) and case.name not in (*SITES, *BESIDE):
        torch.testing.assert_close(m.proj(found.mixed).view_as(y), y, atol=1e-10, rtol=1e-9)
    if case.name in WEIGHTS:
        out = m(x, returns=("weights",), **call) if context is None else m(x, context, returns=("weights",), **call)
        torch.testing.assert_close(found.matrix.expand_as(out.weights), out.weights, atol=1e-9, rtol=1e-7)


def test_those_named_as_no_matrix_exist_and_are_not():
    """The reasons are not a way around the test: what mixes tokens does not scale with what it would call values."""
    assert set(NOT_LINEAR) <= set(attnlib.list_mechanisms())
    m = attnlib.create("focalnet", dim=8).double().eval()
    x = torch.randn(1, 6, 6, 8, dtype=DOUBLE)
    rows = slice(8, 16)  # the part of its first map that becomes the context

    def mixed(scale):
        with torch.no_grad():
            m.f.weight[rows] *= scale
            m.f.bias[rows] *= scale
            y = m(x)
            m.f.weight[rows] /= scale
            m.f.bias[rows] /= scale
        return y

    with torch.no_grad():
        m.f.bias[rows] = torch.randn(8)
    zero, one, two = mixed(1e-30), mixed(1.0), mixed(2.0)
    assert (two - zero - 2 * (one - zero)).abs().max() > 1e-4


class Plain(nn.Module):
    """Values, something on them, an output map."""

    slug = "plain"

    def __init__(self, apply, dim=4):
        super().__init__()
        self.v, self.proj, self.mix = nn.Linear(dim, dim), nn.Linear(dim, dim), apply

    def forward(self, x):
        return self.proj(self.mix(self.v(x)))


def test_a_convolution_is_one_toeplitz_matrix_per_channel():
    kernel = torch.randn(4, 1, 3, dtype=DOUBLE)
    m = Plain(lambda v: F.conv1d(v.mT, kernel, padding=1, groups=4).mT).double()
    found = mixing(m, torch.randn(2, 7, 4, dtype=DOUBLE))
    assert found.matrix.shape == (2, 4, 7, 7)
    for c in range(4):
        for i in range(7):
            for j in range(7):
                expected = kernel[c, 0, j - i + 1] if abs(j - i) <= 1 else torch.zeros((), dtype=DOUBLE)
                torch.testing.assert_close(found.matrix[0, c, i, j], expected)
    assert mixing_matrix(m, torch.randn(2, 7, 4, dtype=DOUBLE)).equal(found.matrix), "fixed, whatever the data"


def test_what_mixes_channels_or_bends_values_is_refused():
    """FNet's real part of a transform along both axes is no token matrix per channel; nor is a ReLU."""
    x = torch.randn(1, 6, 4, dtype=DOUBLE)
    for apply in (lambda v: torch.fft.fft2(v).real, torch.relu, lambda v: v * v.softmax(1), lambda v: v.cumsum(-1)):
        with pytest.raises(ValueError, match="not a linear function, channel by channel"):
            mixing(Plain(apply).double(), x)
    found = mixing(Plain(lambda v: v.flip(-1).cumsum(1) + 3.0).double(), x)  # channels permuted, an offset
    assert found.source.tolist() == [3, 2, 1, 0] and found.matrix.shape == (1, 1, 6, 6)
    assert torch.equal(found.matrix[0, 0], torch.ones(6, 6, dtype=DOUBLE).tril())
    torch.testing.assert_close(found.offset, torch.full((1, 6, 4), 3.0, dtype=DOUBLE))


def test_where_nothing_is_known_it_says_so():
    with pytest.raises(ValueError, match="where its values are made and mixed is not known"):
        mixing(nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 3, 4))
    twice = Plain(lambda v: v)
    twice.forward = lambda x: twice.proj(twice.v(x)) + twice.proj(x)
    with pytest.raises(ValueError, match="reads 2 things"):
        mixing(twice, torch.randn(1, 3, 4))
    bypass = Plain(lambda v: v)
    bypass.forward = lambda x: x
    with pytest.raises(ValueError, match="did not make its values"):
        mixing(bypass, torch.randn(1, 3, 4))


def test_probing_leaves_the_module_as_it_was():
    m = attnlib.create("softmax-attention", dim=8, num_heads=2).train()
    x = torch.randn(1, 5, 8)
    y = m(x)
    mixing(m, x)
    assert m.training and not m.proj._forward_pre_hooks and torch.equal(m(x), y)


def test_linear_attention_is_the_masked_product_of_features():
    m = attnlib.create("lightning-attention-2", dim=8, num_heads=2).double().eval()
    x = torch.randn(1, 9, 8, dtype=DOUBLE)
    q, k = (F.silu(f(x)).view(1, 9, 2, 4).transpose(1, 2) for f in (m.q, m.k))
    age = torch.arange(9)[:, None] - torch.arange(9)
    decay = torch.exp(-m.slopes.double()[:, None, None] * age).tril()
    torch.testing.assert_close(mixing_matrix(m, x), (q @ k.mT) * decay, atol=1e-9, rtol=1e-7)


def test_facts_tell_mechanisms_apart():
    def facts(name, **config):
        return matrix_facts(attnlib.create(name, **{"dim": 16, "num_heads": 2, **config}).eval())

    soft, causal = facts("softmax-attention"), facts("softmax-attention", causal=True)
    assert soft["rows_sum_to_one"] and soft["nonnegative"] and soft["data_dependent"] and not soft["causal"]
    assert causal["causal"] and causal["rows_sum_to_one"] and not causal["toeplitz"]
    assert not facts("sigmoid-attention")["rows_sum_to_one"]
    performer = facts("nprf-rpe-fft-attention", num_features=3, relative=False)
    assert performer["rank"] <= 3 < soft["rank"] and performer["rows_sum_to_one"]
    assert not facts("lightning-attention-2")["nonnegative"]
    assert facts("rcmha")["offset"]
    assert not matrix_facts(attnlib.create("focalnet", dim=8).eval())["linear"]


@pytest.mark.parametrize(
    "name, config, grows",
    [
        ("softmax-attention", dict(causal=True), True),
        ("nprf-rpe-fft-attention", dict(causal=True), True),
        ("lightning-attention-2", {}, False),
        ("lolcats", {}, False),
    ],
)
def test_state_is_measured(name, config, grows):
    m = attnlib.create(name, dim=16, num_heads=2, **config).eval()
    fixed, per_token = state_growth(m)
    assert (per_token > 0) == grows
    if grows:
        assert per_token == 2 * 16 + 1  # keys, values and which tokens exist
    state = m(torch.zeros(1, 50 + 64, 16), returns=("state",)).state
    assert sum(t.numel() for t in state.tensors.values()) == fixed + 114 * per_token


def test_every_mechanism_has_a_view():
    for name in attnlib.list_mechanisms():
        used = operators_of(find(name))
        assert set(used) <= set(FORMS)
        if used:
            assert passes_table(find(name)), f"{name} uses {used}, of which none is described"


def test_every_form_belongs_to_a_described_operator():
    described = {f for d in OPERATORS.values() for f in d.functions}
    assert set(FORMS) <= described


def test_view_of_a_class_and_of_an_instance():
    view = unified_view(find("lightning-attention-2"))
    assert list(view) == ["formed by", "matrix", "work", "memory", "state"]
    assert "per head" in view["matrix"] and "causal" in view["matrix"] and view["state"] == "129 elements"
    assert view["work"] == "N"
    assert "no mixing matrix" in unified_view(find("focalnet"))["matrix"]
    view = unified_view(attnlib.create("softmax-attention", dim=8, num_heads=2))
    assert view["state"].startswith("none") and view["work"] == "N^2" and view["formed by"].startswith("attention:")


def test_passes_follow_the_instances_normalizer():
    (row,) = passes_table(attnlib.create("quantizable-transformers", dim=8, num_heads=2, gamma=-0.03))
    assert row["passes"] == 2 and row["keeps"].startswith("M")
    (row,) = passes_table(attnlib.create("sigmoid-attention", dim=8, num_heads=2))
    assert row["passes"] == 1 and row["keeps"] == "E + F"


def test_info_shows_both_tables():
    run = CliRunner()
    data = json.loads(run.invoke(app, ["info", "lightning-attention-2", "--json"]).stdout)
    assert data["view"]["state"] == "129 elements" and data["passes"][0]["passes"] == 1
    shown = run.invoke(app, ["info", "mha", "--set", "dim=8", "--set", "num_heads=2"]).stdout
    assert "Y = M(X) V" in shown and "E + F + 2" in shown


# ---- sequences split over devices, simulated


@pytest.mark.parametrize("cuts", [[12], [6, 6], [3, 4, 5], [1, 5, 2, 4]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_of_each_rank_against_all_blocks_in_turn(cuts, causal):
    """Blocks of any length, with running maximum, sum and values; blocks that a rank may not read change nothing."""
    q, k, v = torch.randn(3, 1, 2, 12, 4, dtype=DOUBLE)
    mask = masks.causal() if causal else None
    at = torch.arange(12).split(cuts)
    out = []
    for mine in at:
        total = None
        for other in at:
            part = attnlib.attention_partial(
                q[:, :, mine], k[:, :, other], v[:, :, other], mask=mask, q_pos=mine, k_pos=other, scale=0.5
            )
            total = part if total is None else total.merge(part)
        out.append(total.finish())
    expected = attnlib.attention(q, k, v, mask=mask, scale=0.5)
    torch.testing.assert_close(torch.cat(out, 2), expected, atol=1e-12, rtol=1e-10)
