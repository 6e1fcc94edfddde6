import pytest
import torch
from parity import Fixture
from torch import nn

import attnlib
from attnlib import masks

SLUG = "moh-mixture-of-heads"
FIXTURE = Fixture(SLUG)


def make(**settings):
    return attnlib.create(SLUG, **{**dict(dim=32, num_heads=8, shared_heads=2, active_heads=3), **settings})


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    # their LLaMA was recorded in evaluation: in training the choice lets gradients through
    FIXTURE.holds(case, module.train(case != "llama"), lambda m, xs: m(xs["x"]))
    if f"{case}/loss" in FIXTURE.tensors:
        loss = module(FIXTURE.tensors[f"{case}/x/x"], returns=("losses",)).losses["balance"]
        torch.testing.assert_close(loss, FIXTURE.tensors[f"{case}/loss"])


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_zero_routers_with_all_heads_active_are_plain_attention(shared):
    m = make(shared_heads=shared, active_heads=8 - shared)
    for p in (m.wg, m.wg_0, m.wg_1):
        if p is not None:
            nn.init.zeros_(p.weight)
    plain = attnlib.create("softmax-attention", dim=32, num_heads=8)
    plain.load_state_dict(m.state_dict(), strict=False)
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)


def test_number_and_sum_of_gates():
    m, x = make(), torch.randn(2, 6, 32)
    p = m._scores(x, x)
    chosen = torch.zeros_like(p).scatter(-1, m.plan(x)["index"], 1.0)
    gates = m._gates(x, p, chosen)
    assert bool(((gates != 0).sum(-1) == 5).all())
    alpha = 2 * m.wg_0(x).softmax(-1)
    torch.testing.assert_close(gates.sum(-1), 2 * alpha[..., 0] + 3 * alpha[..., 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alpha.sum(-1), torch.full((2, 6), 2.0))


def test_loss_of_a_uniform_router_is_the_number_of_active_heads():
    m = make()
    nn.init.zeros_(m.wg.weight)
    loss = m(torch.randn(2, 6, 32), returns=("losses",)).losses["balance"]
    torch.testing.assert_close(loss, torch.tensor(3.0))


@pytest.mark.parametrize(
    "settings", [{}, dict(causal=True), dict(num_kv_heads=4), dict(router="norm"), dict(shared_heads=1)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_skipping_heads_equals_masking_them(settings, masked):
    torch.manual_seed(0)
    m, x = make(**settings), torch.randn(2, 9, 32)
    call = (
        dict(mask=masks.sliding_window(5), valid=torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]]))
        if masked
        else {}
    )
    torch.testing.assert_close(m.eval()(x, **call), m.train()(x, **call), atol=1e-6, rtol=1e-5)


def test_skipped_heads_cost_no_attention():
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for k in (1, 6):
        m, x = make(active_heads=k).eval(), torch.randn(1, 64, 32)
        with FlopCounterMode(display=False) as counter, attnlib.use_backend("eager"), torch.no_grad():
            m(x)
        counts[k] = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert counts[1] < 0.75 * counts[6]


def test_norm_router_gates_are_binary_and_has_no_parameters():
    m, x = make(router="norm").eval(), torch.randn(2, 6, 32)
    plain = attnlib.create("softmax-attention", dim=32, num_heads=8)
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in plain.parameters())
    q = m.q(x).unflatten(-1, (8, 4)).transpose(1, 2)
    largest = q[:, 2:].norm(dim=-1).transpose(1, 2).topk(3, -1).indices.sort(-1).values
    assert torch.equal(m.plan(x)["index"].sort(-1).values, largest)


def test_router_parameters_per_layer():
    m = make()
    plain = attnlib.create("softmax-attention", dim=32, num_heads=8)
    extra = sum(p.numel() for p in m.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 32 * (8 + 2)  # C (H + 2)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(active_heads=7), "active_heads=7"),
        (dict(active_heads=0), "active_heads=0"),
        (dict(shared_heads=9), "shared_heads=9"),
        (dict(router="top"), "router"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_a_plan_for_another_length_is_refused():
    m = make()
    with pytest.raises(ValueError, match="N=6"):
        m(torch.randn(1, 5, 32), plan=m.plan(torch.randn(1, 6, 32)))


@pytest.mark.parametrize("training", [False, True])
def test_routed_heads_may_be_off_for_good(training):
    m = make(router="norm", shared_heads=2, active_heads=0).train(training)
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        before = m(x)
        m.v.weight[8:].normal_()
        torch.testing.assert_close(m(x), before)
    with pytest.raises(ValueError, match="active_heads=0"):
        make(active_heads=0)


def test_gates_without_gradient():
    m, x = make(router="norm", straight_through=False), torch.randn(2, 6, 32)
    assert m.traits.gradient == "stopped"
    grads = []
    for train in (True, False):
        y = m.train(train)(x)
        grads.append(torch.autograd.grad(y.square().sum(), m.q.weight)[0])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_scaled_rotary_positions_stream():
    m = make(causal=True, rotary=100.0, rotary_scaling={"rope_type": "linear", "factor": 3.0}, router="norm")
    x = torch.randn(2, 6, 32)
    start = m(x[:, :4], returns=("state",))
    torch.testing.assert_close(m.step(x[:, 4:], start.state)[0], m(x)[:, 4:], atol=1e-5, rtol=1e-4)
    plain = make(causal=True, rotary=100.0, router="norm")
    plain.load_state_dict(m.state_dict())
    assert not torch.allclose(plain(x), m(x), atol=1e-3)
