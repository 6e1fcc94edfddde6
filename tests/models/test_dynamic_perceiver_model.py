"""Dynamic Perceiver: its exchange, its exits against the authors', and leaving early."""

import math

import pytest
import torch
from torch import nn

import attnlib
from attnlib.check import check
from attnlib.models.backbones.dynamic_perceiver import ExitHeads, with_latents
from attnlib.models.backbones.resnet import resnet
from attnlib.models.build import load_pretrained, model_entry
from attnlib.models.exits import (
    choose_exits,
    confidence,
    exit_costs,
    exit_fractions,
    exit_losses,
    find_thresholds,
)
from attnlib.nn.dense.dynamic_perceiver import LatentExchange
from tests.parity import HERE, Models

REG = "reg800m_perceiver_t128"
TINY = dict(
    initial=16, slope=10.0, factor=1.6, depth=5, group=8, stem_dim=8, num_classes=5, num_latents=16, mlp_ratio=2.0,
    latent_depths=(1, 1, 2, 1),
)  # fmt: skip


def tiny(name=REG, **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AllExits(Models):
    """Recordings of the logits of all exits beside one another."""

    folder = HERE

    @classmethod
    def all(cls):
        return list(cls("dynamic-perceiver-exits").config)

    def build_model(self, case, weights=None):
        model = super().build_model(case, weights)
        model.forward = lambda x: model.exits(x)
        return model


@pytest.mark.parametrize("case", AllExits.all())
def test_all_exits_are_those_of_the_authors(case):
    AllExits("dynamic-perceiver-exits").model_holds(case)


# ---- the exchange


def exchange(**settings):
    torch.manual_seed(0)
    made = LatentExchange((16, 8), grid=3, **settings).double()
    for p in made.parameters():
        nn.init.normal_(p, 0.1, 0.4)
    return made


def streams(height=7, width=5):
    return images(2, height, width, 16).double(), images(2, 4, 8, seed=2).double()


def oracle(m, x, z):
    """Written out, cell by cell."""

    def norm(t, layer):
        t = t - t.mean(-1, keepdim=True)
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def read(layer, a, b, places):
        q, c = norm(a, layer.norm) @ layer.attn.q.weight.T, norm(b, layer.context_norm)
        k, v = c @ layer.attn.k.weight.T + places, c @ layer.attn.v.weight.T
        a = a + (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v @ layer.attn.proj.weight.T + layer.attn.proj.bias
        h = norm(a, layer.mlp_norm) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias
        return a + (h * 0.5 * (1 + torch.erf(h / 2**0.5))) @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias

    height, width = x.shape[1:3]
    x = read(m.to_features, x.flatten(1, 2), z, 0.0).unflatten(1, (height, width))
    c = nn.functional.pad(x.permute(0, 3, 1, 2), (3, 3, 3, 3))
    kernel, near = m.depthwise.weight[:, 0], torch.zeros_like(x)
    for i in range(7):
        for j in range(7):
            near += c[:, :, i : i + height, j : j + width].permute(0, 2, 3, 1) * kernel[:, i, j]
    c = x + near + m.depthwise.bias
    cells = []
    for i in range(3):
        for j in range(3):
            rows = slice(i * height // 3, -(-(i + 1) * height // 3))
            cells.append(c[:, rows, j * width // 3 : -(-(j + 1) * width // 3)].mean((1, 2)))
    return x, read(m.to_latents, z, torch.stack(cells, 1), m.to_latents.attn.pos_embed)


def test_the_exchange_is_what_its_equations_say():
    m, (x, z) = exchange(), streams()
    for ours, theirs in zip(m(x, z), oracle(m, x, z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    one_way = exchange(features_read=False)
    assert torch.equal(one_way(x, z)[0], x)
    told = exchange(latents_read=False)
    assert torch.equal(told(x, z)[1], z)


def test_claims_of_the_exchange():
    report = check(LatentExchange, dims=(16, 8), grid=3)
    assert report.ok, str(report)


def test_what_does_not_exist_is_not_read():
    m, (x, z) = exchange(), streams()
    valid = torch.zeros(2, 7, 5, dtype=torch.bool)
    valid[0, :2, :3] = valid[1] = True
    known = torch.tensor([[True] * 4, [True, False, True, True]])
    bad_x, bad_z = x.masked_fill(~valid[..., None], math.nan), z.masked_fill(~known[..., None], math.inf)
    for a, b in zip(m(bad_x, bad_z, valid=(valid, known)), m(x, z, valid=(valid, known)), strict=True):
        torch.testing.assert_close(a, b)
    alone = m(x[1:], z[1:, [0, 2, 3]])
    torch.testing.assert_close(m(x, z, valid=(valid, known))[0][1:], alone[0])
    torch.testing.assert_close(m(x, z, valid=(valid, known))[1][1:, [0, 2, 3]], alone[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dims=(8,)), "dims"), (dict(dims=(8, 8), kernel_size=4), "kernel_size=4 must be odd"),
        (dict(dims=(8, 8), features_read=False, latents_read=False), "nobody"), (dict(dims=(8, 8), grid=0), "grid"),
    ],
)  # fmt: skip
def test_bad_exchanges(settings, message):
    with pytest.raises(ValueError, match=message):
        LatentExchange(**settings)


def test_bad_streams():
    x, z = streams()
    for bad in ((x, z[:1]), (z, x), (x,), (x[..., :8], z)):
        with pytest.raises(ValueError, match="streams must be features"):
            exchange()(*bad)


# ---- the model


def test_sizes_of_the_card():
    assert round(model_entry(REG).params / 1e6, 3) == 21.798
    assert len(attnlib.list_models(family="dynamic-perceiver")) == 56
    depths = {name: model_entry(f"{name}_perceiver_t128").settings["latent_depths"][3] for name in (
        "reg800m", "resnet50_0375", "mobilenetV3_0x75")}  # fmt: skip
    assert depths == {"reg800m": 6, "resnet50_0375": 3, "mobilenetV3_0x75": 9}  # of the three released checkpoints


def test_cost_of_each_exit():
    """The authors' counter writes 0.459, 1.065, 1.228 and 1.298; it takes latents as they were before being halved."""
    with torch.device("meta"):
        costs = exit_costs(attnlib.create_model(REG).eval(), torch.empty(1, 3, 224, 224))
    assert [round(cost / 1e9, 3) for cost in costs] == [0.458, 1.063, 1.228, 1.298]
    small = exit_costs(tiny(), images(1, 3, 32, 32))
    assert exit_costs(tiny(), images(2, 3, 32, 32)) == tuple(2 * cost for cost in small)
    assert all(a < b for a, b in zip(small[:-1], small[1:], strict=True))


def test_latents_become_fewer_and_wider():
    m, seen = tiny(), []
    for stage in m.stages:
        stage.latents[0].register_forward_hook(lambda _, args, y: seen.append(tuple(args[0].shape)))
    m(images(2, 3, 33, 40))
    assert seen == [(2, 16, 8), (2, 8, 16), (2, 4, 24), (2, 2, 40)]


def test_starts():
    few = dict(num_classes=7, latent_depths=(1, 1, 1, 1), mlp_ratio=1.0)
    m = attnlib.create_model(REG, **few)
    assert abs(m.latents.std().item() - 0.02) < 2e-3
    assert all(stage.exchange.to_latents.attn.pos_embed.eq(0).all() for stage in m.stages)
    conv = m.stages[3].blocks[0].conv2.conv  # 784 channels in 49 groups, which do not count
    assert conv.groups == 49 and abs(conv.weight.std().item() * (9 * 784 / 2) ** 0.5 - 1) < 0.02
    assert bool((m.stages[0].blocks[0].conv3.norm.weight == 1).all())
    assert abs(m.head.fc[2].weight.std().item() - 0.01) < 1e-3 and bool((m.head.fc[2].bias == 0).all())
    m = attnlib.create_model("resnet50_0375_perceiver_t64", **few)
    assert bool((m.stages[1].blocks[1].conv3.norm.weight == 0).all())
    m = attnlib.create_model("mobilenetV3_0x5_perceiver_t128", **few)
    conv = m.stages[3].blocks[1].depthwise.conv
    assert abs(conv.weight.std().item() * (25 * 480 / 2) ** 0.5 - 1) < 0.03
    assert bool((m.stages[0].blocks[1].squeeze.fc1.bias == 0).all())


@pytest.mark.parametrize("size", [(1, 1), (33, 70)])
@pytest.mark.parametrize("name", [REG, "resnet18_perceiver_t128", "mobilenetV3_perceiver_t128"])
def test_any_size(name, size):
    small = dict(num_classes=5, num_latents=8, latent_depths=(1, 1, 1, 1), mlp_ratio=1.0)
    own = {"resnet18_perceiver_t128": dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), stem_dim=8)}
    cnn = own.get(name, dict(width=0.25)) if name != REG else {k: v for k, v in TINY.items() if k not in small}
    torch.manual_seed(0)
    m = attnlib.create_model(name, **{**cnn, **small}).eval()
    x = images(2, 3, *size)
    maps = m.forward_intermediates(x, intermediates_only=True)
    for info, t in zip(m.feature_info, maps, strict=True):
        assert tuple(t.shape[1:]) == (info["num_chs"], *(-(-side // info["reduction"]) for side in size))
    assert [tuple(y.shape) for y in m.exits(x)] == [(2, 5)] * 4
    torch.testing.assert_close(m(x), m.exits(x)[3])


def test_pixels_that_do_not_exist_change_nothing():
    x, valid = images(2, 3, 64, 48), torch.zeros(2, 64, 48, dtype=torch.bool)
    valid[0, :40, :24] = valid[1] = True
    m = tiny()
    for a, b in zip(m.exits(x.masked_fill(~valid[:, None], math.nan), valid), m.exits(x, valid), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(m(x, valid)[0], m(x)[0])


def test_early_exits_do_not_train_what_lies_behind():
    m, x = tiny().train(), images(4, 3, 40, 40)
    first, second, cnn, last = m.exits(x)
    (first.sum() + second.sum()).backward(retain_graph=True)
    assert all(p.grad is None for part in (m.stages[3].blocks, m.last) for p in part.parameters())
    assert all(p.grad is None for p in m.head.fc[2].parameters())
    cnn.sum().backward(retain_graph=True)
    assert all(p.grad is not None for p in m.stages[3].blocks.parameters())
    last.sum().backward()
    assert all(p.grad is not None for p in m.parameters())


def test_the_constructor_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny()(images(1, 3, 32, 32))
    assert not list(tmp_path.iterdir())


def test_features_heads_and_what_is_returned():
    m, x = tiny(), images(2, 3, 48, 40)
    features, z, earlier = m.forward_features(x)
    assert features.shape == (2, 2, 2, 64) and z.shape == (2, 2, 40)
    torch.testing.assert_close(earlier, m.exits(x)[1])
    torch.testing.assert_close(m.forward_head((features, z, earlier)), m(x))
    assert m.forward_head((features, z, earlier), pre_logits=True).shape == (2, 64 + 2 * 40)
    out = m(x, returns=("exits", "losses"))
    torch.testing.assert_close(torch.stack(out.exits), torch.stack(m.exits(x)))
    assert out.losses == {} and m(x, returns=("losses",)).exits is None
    with pytest.raises(ValueError, match="returns"):
        m(x, returns=("weights",))
    m.reset_classifier(3, "avg")
    assert [tuple(y.shape) for y in m.exits(x)] == [(2, 3)] * 4
    m.reset_classifier(0)
    assert [y.shape[1] for y in m.exits(x)] == [24, 80, 64, 144]
    with pytest.raises(ValueError, match="global_pool"):
        m.reset_classifier(3, "max")


def test_a_head_of_other_classes_and_other_channels():
    m = tiny()
    done = load_pretrained(tiny(num_classes=7), m.state_dict())
    assert {name.split(".")[1] for name in done.dropped} == {"fc", "reuse"}
    grey = tiny(in_chans=1)
    assert load_pretrained(grey, m.state_dict()).adapted == ["stem.0.conv.weight"]


def test_another_mechanism_and_another_cnn():
    m = tiny(mechanism="sigmoid-attention", num_heads=(1, 1, 1, 1))
    assert m(images(1, 3, 32, 32)).shape == (1, 5) and m.stages[1].latents[0].mixer.inner.slug == "sigmoid-attention"
    cnn = resnet((8, 8, 8, 8), (1, 2, 1, 1), basic=True, stem_dim=8, num_classes=0)
    own = with_latents(cnn, num_latents=8, num_classes=3, latent_depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), grid=4)
    assert own.eval()(images(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="cuts=.*four stages"):
        with_latents(resnet((8, 8, 8, 8), (1, 1, 1, 1), True, stem_dim=8), cuts=(0, 1, 1, 1, 2))
    with pytest.raises(ValueError, match="cuts=.*four stages"):
        with_latents(resnet((8, 8), (1, 1), True, stem_dim=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_latents=4), "num_latents"), (dict(latent_depths=(1, 1)), "latent_depths"),
        (dict(num_heads=(1, 3, 4, 8)), "num_heads"), (dict(global_pool="max"), "global_pool"),
        (dict(mlp_ratio=0), "mlp_ratio"), (dict(drop_rate=1.5), "drop_rate"), (dict(grid=0), "grid"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
    with pytest.raises(TypeError, match="num_latent"):
        tiny(num_latent=3)


def test_one_image_has_no_statistics():
    with pytest.raises(ValueError, match="one image"):
        tiny().train()(images(1, 3, 64, 64))


# ---- leaving early


def sharp():
    """A model whose confidences differ from sample to sample."""
    m = tiny().double()
    for layer in m.head.fc:
        nn.init.normal_(layer.weight, std=2.0)
    return m


def test_who_leaves_gets_the_answer_of_the_whole_run_and_costs_nothing_more():
    m, x = sharp(), images(12, 3, 40, 40).double() * torch.linspace(0.2, 3, 12).double()[:, None, None, None]
    full = torch.stack(m.exits(x))
    sure = confidence(full)
    thresholds = find_thresholds(sure, (0.25, 0.25, 0.25, 0.25))
    thresholds = tuple(t - 1e-9 for t in thresholds)  # of other sizes of batches by rounding only
    batches = []
    for stage in m.stages:
        stage.blocks[0].register_forward_hook(lambda _, args, y: batches.append(len(args[0])))
    y, exit = m.predict(x, thresholds)
    assert exit.bincount(minlength=4).tolist() == [3, 3, 3, 3]
    torch.testing.assert_close(exit, choose_exits(sure, thresholds))
    torch.testing.assert_close(y, full[exit, torch.arange(12)], rtol=1e-9, atol=1e-9)
    assert batches == [12, 12, 9, 6]


def test_limits_of_thresholds():
    m, x = sharp(), images(5, 3, 32, 32).double()
    full = m.exits(x)
    y, exit = m.predict(x, (-math.inf, 0.5, 0.5))
    assert exit.tolist() == [0] * 5
    torch.testing.assert_close(y, full[0])
    y, exit = m.predict(x, (math.inf,) * 3)
    assert exit.tolist() == [3] * 5
    torch.testing.assert_close(y, full[3])
    y, exit = m.predict(x[:0], (0.5,) * 3)
    assert y.shape == (0, 5) and exit.shape == (0,)
    valid = torch.ones(5, 32, 32, dtype=torch.bool)
    torch.testing.assert_close(m.predict(x, (0.6,) * 3, valid).y, m.predict(x, (0.6,) * 3).y)


def test_nothing_is_run_behind_an_exit():
    m, x = tiny(), images(1, 3, 32, 32)
    m.stages[2].blocks, m.stages[3], m.last = nn.ModuleList([nn.Linear(1, 1)]), nn.Identity(), nn.Identity()
    assert next(m.iterate(x)).shape == (1, 5)
    assert m.predict(x, (-math.inf, 0, 0)).exit.tolist() == [0]


def test_thresholds_let_as_many_leave_as_they_should():
    sure = torch.rand(4, 101, generator=torch.Generator().manual_seed(0))
    for ratio in (0.2, 1.0, 3.0):
        fractions = exit_fractions(ratio, 4)
        counts = choose_exits(sure, find_thresholds(sure, fractions)).bincount(minlength=4)
        assert counts[:3].tolist() == [math.floor(101 * p) for p in fractions[:3]]
    thirds = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    assert choose_exits(thirds, find_thresholds(thirds, (1 / 3,) * 3)).bincount().tolist() == [1, 1, 1]
    assert find_thresholds(sure, torch.tensor([0.0, 0.0, 1.0, 0.0]))[:2] == (math.inf, math.inf)
    assert find_thresholds(torch.ones(2, 4), (0.5, 0.5)) == (1.0,)  # equal confidences leave together
    some = torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.9, 0.8, 0.7, 0.6], [0.2] * 4])
    assert choose_exits(some, find_thresholds(some, (0.5, 0.5, 0.0))).tolist() == [0, 0, 0, 1]


def test_fractions_are_those_of_the_authors():
    """The powers of p, then 0.85, 1 and 0.5 of the first three, as in their ``generate_distribution``."""
    for p in (0.2, 0.75, 1.0, 4.0):
        probs = torch.exp(math.log(p) * torch.arange(1, 5).double())
        probs /= probs.sum()
        for j, k in enumerate((0.85, 1.0, 0.5)):
            probs[j] *= k
            probs[j + 1 :] = (1 - probs[: j + 1].sum()) * probs[j + 1 :] / probs[j + 1 :].sum()
        ours = torch.tensor(exit_fractions(p, 4, (0.85, 1.0, 0.5))).double()
        torch.testing.assert_close(ours, probs, rtol=1e-6, atol=1e-6)
        assert sum(exit_fractions(p, 4, (0.85, 1.0, 0.5))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_thresholds(torch.rand(3, 8), (0.5, 0.5, 0.5)), "sum to one, got .* with sum 1.5"),
        (lambda: find_thresholds(torch.rand(3, 8), (1.5, -0.5, 0.0)), "negative"),
        (lambda: find_thresholds(torch.rand(3, 8), (0.5, 0.5)), "each of 3 exits"),
        (lambda: find_thresholds(torch.rand(3, 0), (0.5, 0.5, 0.0)), "at least one sample"),
        (lambda: find_thresholds(torch.full((2, 3), math.nan), (0.5, 0.5)), "numbers"),
        (lambda: find_thresholds(torch.rand(8), (0.5, 0.5)), "confidences"),
        (lambda: choose_exits(torch.rand(3, 8), (0.5,)), "thresholds"),
        (lambda: tiny().predict(images(1, 3, 8, 8), (0.5, 0.5)), "each of 4 exits but the last"),
        (lambda: tiny().predict(images(1, 3, 8, 8), (0.5, math.nan, 0.5)), "thresholds"),
        (lambda: tiny().train().predict(images(2, 3, 8, 8), (0.5,) * 3), "in evaluation"),
        (lambda: exit_fractions(0, 4), "ratio"),
        (lambda: exit_fractions(0.5, 4, (1, 1)), "weights"),
        (lambda: exit_fractions(0.5, 4, (3, 1, 1)), "more samples leave"),
        (lambda: exit_losses([torch.rand(2, 3)] * 4, torch.tensor([0, 1]), (1, 1)), "weights"),
        (lambda: exit_losses([torch.rand(2, 3)] * 2, torch.tensor([0, 1]), (1, 1), temperature=0), "temperature"),
        (lambda: exit_losses([torch.rand(2, 3), torch.rand(2, 4)], torch.tensor([0, 1]), (1, 1)), "exits"),
    ],
)
def test_bad_exits(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_losses():
    g = torch.Generator().manual_seed(0)
    ys = [torch.randn(6, 5, generator=g).double().requires_grad_() for _ in range(4)]
    target, T = torch.randint(5, (6,), generator=g), 2.0
    losses = tiny().loss(ys, target, 0.5, T)
    rows = torch.arange(6)
    ce = [-(y.log_softmax(-1)[rows, target]).mean() for y in ys]
    torch.testing.assert_close(losses["cross_entropy"], 0.5 * (ce[0] + ce[1]) + ce[2] + ce[3])
    p = (ys[3] / T).softmax(-1)
    kl = sum((p * (p.log() - (y / T).log_softmax(-1))).sum() / 6 for y in ys[:3])
    torch.testing.assert_close(losses["distillation"], 0.5 * T**2 * kl)
    assert torch.autograd.grad(losses["distillation"], ys[3], allow_unused=True, retain_graph=True)[0] is None
    assert set(tiny().loss(ys, target, 0.0)) == {"cross_entropy"}
    soft = nn.functional.one_hot(target, 5).double()
    torch.testing.assert_close(tiny().loss(ys, soft)["cross_entropy"], losses["cross_entropy"])


def test_heads_alone():
    heads = ExitHeads((4, 6, 8), 3, reuse=False, hidden=5).eval()
    assert heads(1, torch.randn(2, 6)).shape == (2, 3) and heads(3, torch.randn(2, 14)).shape == (2, 3)
