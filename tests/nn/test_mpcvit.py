"""MPCViT: heads against maps, mixtures, the linear form, selection, gates, whole networks, bad input."""

import pytest
import torch
import torch.nn.functional as F
from parity import HERE
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.models.build import load_pretrained
from attnlib.nn.dense.mpcvit import (
    MPCAttention,
    MPCMlp,
    choose_heads,
    clamp_shares,
    head_operations,
    token_distillation,
)


def make(**settings):
    torch.manual_seed(0)
    m = MPCAttention(**{"dim": 12, "num_heads": 3, **settings})
    for p in (m.qkv.weight, m.proj.weight):
        nn.init.normal_(p, std=0.5)
    return m.double()


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(m, x, shares):
    q, k, v = m.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    s = q @ k.transpose(-2, -1) * m.scale
    a = torch.as_tensor(shares, dtype=x.dtype).view(-1, 1, 1)
    weights = a * s.relu() / (s.relu().sum(-1, keepdim=True) + m.eps) + (1 - a) * s / x.shape[1]
    return m.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shares", [(1, 1, 1), (0, 0, 0), (1, 0, 1), (0.25, 0.5, 1)])
def test_heads_are_mixtures_of_both_maps(shares):
    m, x = make(), data(2, 9, 12)
    with torch.no_grad():
        m.alpha.copy_(torch.tensor(shares))
    torch.testing.assert_close(m(x), oracle(m, x, shares))
    dropped = make(attn_drop=0.5).train()
    dropped.load_state_dict(m.state_dict())
    out = sum(dropped(x) for _ in range(400)) / 400
    assert float((out - m(x)).abs().mean()) < 0.3 * float(m(x).abs().mean())
    deployed = attnlib.deploy(m)
    torch.testing.assert_close(deployed(x), m(x))
    assert (deployed.kinds is not None) == all(s in (0, 1) for s in shares)


@pytest.mark.parametrize("shares", [(1, 0, 1, 1, 0), (0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (0.25, 0.5, 1, 0, 0.9)])
def test_queries_may_have_shares_of_their_own(shares):
    m, x = make(per="row", tokens=5), data(2, 5, 12)
    with torch.no_grad():
        m.alpha.copy_(torch.tensor(shares))
    rows = [oracle(m, x, (a, a, a))[:, i] for i, a in enumerate(shares)]
    torch.testing.assert_close(m(x), torch.stack(rows, 1))
    deployed = attnlib.deploy(m)
    torch.testing.assert_close(deployed(x), m(x))
    assert (deployed.kinds is not None) == all(s in (0, 1) for s in shares)
    assert float(m(x, returns=("losses",)).losses["cost"]) == pytest.approx(3 * sum(shares) / 5)
    theirs = {"qkv.weight": m.qkv.weight, "proj.weight": m.proj.weight, "proj.bias": m.proj.bias}
    held = attnlib.convert_state_dict("mpcvit", theirs | {"alpha": m.alpha.view(1, 1, 5, 1)})
    make(per="row", tokens=5).load_state_dict(held)


def test_exactly_the_wanted_number_of_queries_stays():
    m = make(per="row", tokens=5)
    with torch.no_grad():
        m.alpha.copy_(torch.tensor([0.1, 0.9, 0.4, 0.8, 0.2]))
    assert choose_heads(m, 0.4) == {"": [1, 3]} and m.alpha.tolist() == [0, 1, 0, 1, 0]


def test_shares_are_taken_back_into_their_range():
    m = make()
    with torch.no_grad():
        m.alpha.copy_(torch.tensor([1.4, -0.2, 0.5]))
    clamp_shares(nn.Sequential(m))
    assert m.shares().tolist() == [1.0, 0.0, 0.5]


def test_absent_tokens_are_not_counted():
    m, x = make(), data(1, 8, 12)
    with torch.no_grad():
        m.alpha.copy_(torch.tensor([1.0, 0.0, 0.5]))
    valid = torch.arange(8)[None] < 5
    for form in (m, attnlib.deploy(m)):
        torch.testing.assert_close(form(x, valid=valid)[:, :5], m(x[:, :5]))


def test_scaling_heads_cost_linear_work_once_decided():
    def work(n, alpha):
        m = attnlib.deploy(make(alpha=alpha))
        with FlopCounterMode(display=False) as counter:
            m(data(1, n, 12))
        return counter.get_total_flops() - 2 * n * 12 * 48

    assert work(512, 0.0) == 2 * work(256, 0.0) and work(512, 1.0) == 4 * work(256, 1.0)
    found = head_operations("scaling", 256, 4)
    assert found["exp"] == found["div"] == found["max"] == 0 and 2 * 3 * found["products"] == work(256, 0.0)
    assert head_operations("relu", 256, 4)["exp"] == 0 < head_operations("softmax", 256, 4)["exp"]


def test_a_heavy_cost_drives_shares_to_scaling_and_none_keeps_them():
    def searched(weight):
        torch.manual_seed(0)
        m = MPCAttention(12, 3)
        x, y = torch.randn(16, 6, 12), torch.randn(16, 6, 12)
        optimizer = torch.optim.Adam(m.parameters(), lr=0.02)
        for _ in range(60):
            out = m(x, returns=("losses",))
            loss = (out.y - y).square().mean() + weight * out.losses["cost"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clamp_shares(m)
        return float(m.shares().mean())

    assert searched(1.0) < 0.1 < searched(0.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_exactly_the_wanted_number_of_heads_stays(share):
    torch.manual_seed(0)
    model = attnlib.create_model("mpcvit_7_4_32", embed_dim=8, depth=5, num_heads=2)
    parts = [m for m in model.modules() if isinstance(m, MPCAttention)]
    with torch.no_grad():
        for m in parts:
            m.alpha.uniform_(0, 1)
    before = torch.cat([m.alpha for m in parts])
    kept = choose_heads(model, share)
    after = torch.cat([m.alpha for m in parts])
    count = round(share * 10)
    assert int(after.sum()) == count == sum(map(len, kept.values())) and set(after.tolist()) <= {0.0, 1.0}
    if 0 < count < 10:
        assert before[after == 1].min() >= before[after == 0].max()
    x = torch.randn(1, 3, 32, 32)
    model.eval()
    torch.testing.assert_close(attnlib.deploy(model)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "gates"])
def test_the_network_equals_the_authors(name):
    held = load_file(HERE / f"mpcvit-model-{name}.safetensors")
    model = attnlib.create_model(
        "mpcvit_7_4_32", embed_dim=8, depth=2, num_heads=2, num_classes=5, attn_drop=0.0, gelu_gates=name == "gates"
    )
    load_pretrained(model, {k[3:]: t for k, t in held.items() if k.startswith("sd/")})
    model = model.double().eval()
    x = held["x"].double().requires_grad_()
    y = model(x)

    def near(ours, theirs):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())

    near(y, held["y"])
    near(model.forward_features(x), held["tokens"])
    (y * held["g"]).sum().backward()
    near(x.grad, held["dx"])
    for i in range(2):
        inner = model.stages[i].mixer.inner
        near(inner.qkv.weight.grad, held[f"dw/classifier.blocks.{i}.self_attn.qkv.weight"])
        near(model.stages[i].mlp.fc2.weight.grad, held[f"dw/classifier.blocks.{i}.linear2.weight"])


def test_gates_let_the_gelu_go():
    torch.manual_seed(0)
    m, plain = MPCMlp(6, 8, tokens=4).double(), MPCMlp(6, 8).double()
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if k != "beta"})
    x = data(2, 4, 6)
    torch.testing.assert_close(m(x), plain(x))
    with torch.no_grad():
        m.beta[:, 1:3] = 0
    y = m(x)
    torch.testing.assert_close(y[:, ::3], plain(x)[:, ::3])
    torch.testing.assert_close(y[:, 1:3], m.fc2(m.fc1(x[:, 1:3])).relu())


def test_distillation_is_soft_classes_and_tokens():
    a, b, s, t = data(2, 5), data(2, 5, seed=2), data(2, 4, 3), data(2, 3, 3, seed=3)
    expected = -(b.softmax(-1) * a.log_softmax(-1)).sum(-1).mean() + 0.5 * F.mse_loss(s[:, 1:], t)
    torch.testing.assert_close(token_distillation(a, s, b, t), expected)


def test_bad_input_is_refused():
    for settings, words in (
        (dict(alpha=1.5), "alpha"), (dict(per="column"), "per"), (dict(num_heads=5), "num_heads"),
        (dict(per="row"), "tokens=None with per='row'"), (dict(tokens=4), "tokens=4 with per='head'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make(**settings)
    with pytest.raises(ValueError, match="share"):
        choose_heads(make(), 1.5)
    with pytest.raises(ValueError, match="no heads between"):
        choose_heads(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="one alpha for every head"):
        choose_heads(make(per="layer"), 0.5)
    with pytest.raises(ValueError, match="must hold 5 tokens"):
        make(per="row", tokens=5)(data(1, 4, 12))
    with pytest.raises(ValueError, match="must hold 4 tokens"):
        MPCMlp(6, 8, tokens=4)(torch.zeros(1, 5, 6))
    with pytest.raises(ValueError, match="kind"):
        head_operations("hydra", 4, 4)
