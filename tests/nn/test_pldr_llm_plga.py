import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib
from attnlib import State
from attnlib.nn.dense.pldr_llm_plga import PowerLawGraphAttention, dag_loss, operator_invariance
from attnlib.nn.layers import merge_heads, split_heads

SLUG = "pldr-llm-plga"
FIXTURE = Fixture(SLUG)
SMALL = dict(dim=16, num_heads=2, metric_hidden=6, residual_units=2)
# The recorded weights keep A_LM above 2e-3: near its floor of 1e-9 the slope of A_LM^p has no digits left in float32.
CACHE = {"A_LM", "G"}


def build(**changes) -> PowerLawGraphAttention:
    torch.manual_seed(0)
    return attnlib.create(SLUG, **{**SMALL, **changes})


def test_equals_the_authors():
    module = FIXTURE.build("learned")
    FIXTURE.holds("learned", module, lambda m, xs: m(xs["x"]))


def test_equals_the_authors_with_their_g_cache():
    module = FIXTURE.build("cached")
    cache = FIXTURE.under("cached/cache")
    module.freeze_metric(metric=(cache["A_LM"], cache["G"]))
    FIXTURE.holds("cached", module, lambda m, xs: m(xs["x"]))


def test_deductive_outputs_and_losses_equal_the_authors():
    module = FIXTURE.build("learned")
    x = FIXTURE.tensors["learned/x/x"]
    made = module.deductive_outputs(x)
    for name, theirs in FIXTURE.under("learned/deduced").items():
        torch.testing.assert_close(getattr(made, name), theirs, atol=1e-5, rtol=1e-5)
    losses = module(x, returns=("losses",)).losses
    theirs = FIXTURE.under("learned/dag")
    assert set(losses) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(losses[name], theirs[name], atol=1e-5, rtol=1e-5)


def test_decoding_equals_the_authors():
    """A prompt of four tokens, then one with the prompt's keys, values and metric."""
    module = FIXTURE.build("learned")
    x = FIXTURE.tensors["learned/x/x"]
    first, state = module.prefill(x[:, :4])
    last, _ = module.step(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, last], 1), FIXTURE.tensors["learned/decode"], atol=1e-5, rtol=1e-5)


def test_identity_metric_is_plain_attention():
    m, x = build(metric="cached", causal=False, rotary=None), torch.randn(2, 7, 16)
    q, k, v = (split_heads(p(x), 2) for p in (m.q, m.k, m.v))
    expected = m.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
    torch.testing.assert_close(m(x), expected, atol=1e-6, rtol=1e-5)


def test_its_own_cache_changes_nothing():
    m, x = build().double(), torch.randn(1, 7, 16, dtype=torch.float64)
    y = m(x)
    torch.testing.assert_close(m.freeze_metric(x)(x), y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(m.thaw_metric()(x), y, atol=0, rtol=0)


def test_decoding_equals_a_full_pass_with_the_metric_of_the_prompt():
    m, x = build().double(), torch.randn(3, 9, 16, dtype=torch.float64)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, :2] = False
    y, state = m.prefill(x[:, :5], valid[:, :5])
    out = [y]
    for sizes in ((5, 6), (6, 9)):
        y, state = m.step(x[:, slice(*sizes)], state, valid=valid[:, slice(*sizes)])
        out.append(y)
    got = torch.cat(out, 1)
    for i in range(3):
        twin = build().double().freeze_metric(x[i : i + 1, :5], valid=valid[i : i + 1, :5])
        expected = twin(x[i : i + 1], valid=valid[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_frozen_metric_is_causal(frozen):
    m, x = build(), torch.randn(1, 6, 16)
    if frozen:
        m.freeze_metric(torch.randn(1, 6, 16))
    assert ("causal-self" in m.traits.patterns) is frozen
    leaf = x.clone().requires_grad_()
    # row 0 reads one key only, whatever the metric; row 1 is the first that a metric can change
    m(leaf)[:, 1].square().sum().backward()
    later = leaf.grad[:, 2:].abs().max()
    assert later == 0 if frozen else later > 1e-8


def test_parameter_count_of_the_paper():
    """PLDR_Model(5, 896, 14, 2389, 32000, 170, 8, 2) has 109,689,362 parameters."""
    with torch.device("meta"):
        m = attnlib.create(SLUG, dim=896, num_heads=14, metric_hidden=170, residual_units=8, unit_depth=2)
    dim, dff, vocab = 896, 2389, 32000
    feed_forward = 2 * (dim * dff + dff) + dff * dim + dim
    norm = 2 * dim
    layer = sum(p.numel() for p in m.parameters()) + feed_forward + 2 * norm
    assert 5 * layer + vocab * dim + norm + dim * vocab + vocab == 109_689_362


def test_padding_stays_out_of_the_metric():
    m, x = build().double(), torch.randn(1, 4, 16, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, 3, 16, dtype=torch.float64), x], 1)
    valid = torch.tensor([[False] * 3 + [True] * 4])
    torch.testing.assert_close(m.deductive_outputs(padded, valid).G, m.deductive_outputs(x).G, atol=1e-5, rtol=1e-5)


def test_metric_keeps_float32_in_half_precision():
    m, x = build().to(torch.bfloat16), torch.randn(2, 6, 16, dtype=torch.bfloat16)
    made = m.deductive_outputs(x)
    assert made.A_LM.dtype == made.A_P.dtype == made.G.dtype == torch.float32
    assert made.G.isfinite().all() and m(x).dtype == torch.bfloat16


def test_dag_loss():
    cycle = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert float(dag_loss(cycle.triu())) == pytest.approx(0, abs=1e-6)
    # exp of the swap has cosh(1) twice on its diagonal
    assert float(dag_loss(cycle)) == pytest.approx(float(torch.log(torch.cosh(torch.tensor(1.0)))), rel=1e-5)


def test_operator_invariance():
    prompts = [torch.randn(1, n, 16) for n in (3, 9, 20)]
    m = build(residual_units=0)
    moving = operator_invariance(torch.stack([m.deductive_outputs(x).G for x in prompts]))
    assert moving > 0.05
    with torch.no_grad():
        m.learner.a.zero_()
        m.learner.b_a.normal_()
    still = operator_invariance(torch.stack([m.deductive_outputs(x).G for x in prompts]))
    assert still < 1e-6


def test_deployed_without_the_learner():
    m, x = build(), torch.randn(1, 6, 16)
    assert attnlib.deploy(m).learner is not None
    m.freeze_metric(x)
    light = attnlib.deploy(m)
    assert light.learner is None and m.learner is not None
    torch.testing.assert_close(light(x), m(x))
    for call in (light.thaw_metric, lambda: light.deductive_outputs(x)):
        with pytest.raises(ValueError, match="no learner"):
            call()


def test_bad_input():
    m, x = build(), torch.randn(1, 4, 16)
    other = attnlib.create(SLUG, dim=32, num_heads=2, metric_hidden=6, residual_units=1)
    with pytest.raises(ValueError, match="num_heads=3 does not divide dim=16"):
        attnlib.create(SLUG, dim=16, num_heads=3)
    with pytest.raises(ValueError, match="metric="):
        build(metric="frozen")
    with pytest.raises(ValueError, match=r"A_LM of the cache must be \(H, D, D\)=\(2, 8, 8\), got \(2, 16, 16\)"):
        m.freeze_metric(metric=(other.A_LM, other.G))
    with pytest.raises(ValueError, match="one of the two"):
        m.freeze_metric()
    with pytest.raises(ValueError, match="freeze_metric first"):
        m.step(x)
    with pytest.raises(ValueError, match="trait mask is False"):
        m(x, mask=torch.ones(4, 4, dtype=torch.bool))
    _, state = m.prefill(x)
    wrong = State({**state.tensors, "G": torch.zeros(1, 2, 16, 16)})
    with pytest.raises(ValueError, match="the state's G must be"):
        m.step(x, wrong)
    with pytest.raises(ValueError, match="prefill needs causal=True"):
        build(causal=False).prefill(x)
    with pytest.raises(ValueError, match="two prompts"):
        operator_invariance(torch.ones(1, 3))
    with pytest.raises(ValueError, match="plgMultiHeadAttention does not have: embedding.weight"):
        attnlib.convert_state_dict(SLUG, {"embedding.weight": torch.ones(1)})


def test_a_fixed_metric_needs_no_learner():
    """The ablation without metric learner: the metric of a trained layer, and nothing that could deduce another."""
    torch.manual_seed(0)
    m = attnlib.create(SLUG, dim=16, num_heads=2, metric="fixed")
    assert m.learner is None and m.traits.streaming and "causal-self" in m.traits.patterns
    x, metric = torch.randn(2, 5, 16), torch.randn(2, 8, 8)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2, causal=True, rotary=1e4, rotary_interleaved=True)
    plain.load_state_dict(m.state_dict(), strict=False)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)  # the identity
    m.freeze_metric(metric=(metric, metric, metric))
    assert m.metric == "fixed" and torch.equal(m.G, metric)
    learned = attnlib.create(SLUG, dim=16, num_heads=2, metric_hidden=4, residual_units=1)
    learned.load_state_dict(m.state_dict(), strict=False)
    torch.testing.assert_close(m(x), learned.freeze_metric(metric=(metric, metric))(x))
    with pytest.raises(ValueError, match="no learner"):
        m.thaw_metric()
    with pytest.raises(ValueError, match="activation="):
        attnlib.create(SLUG, dim=16, num_heads=2, activation="mish")


def test_value_projections_start_as_the_authors_do():
    ours, theirs = (attnlib.create(SLUG, dim=64, num_heads=2, metric="fixed", compat=c) for c in (None, "authors"))
    assert float(ours.v.bias.abs().max()) == 0.0 and float(ours.v.weight.abs().max()) > 0.2
    assert 0.0 < float(theirs.v.bias.abs().max()) <= 0.125 and float(theirs.v.weight.abs().max()) <= 0.125
    assert float(theirs.q.bias.abs().max()) == 0.0
