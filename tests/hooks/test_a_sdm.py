"""A-SDM-style: removal, inherited convolutions, two-route attention, alignment, inherited features, in small U-Nets."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import FeatureInheritance, StepCache  # noqa: E402
from attnlib.cache.steps import every  # noqa: E402
from attnlib.convert import a_sdm  # noqa: E402
from attnlib.convert.a_sdm import GlobalRegionalAttention, InheritedConv, InheritedResidual  # noqa: E402
from hooks import pipes  # noqa: E402


@pytest.fixture(scope="module")
def unet():
    return pipes.unet(size=8, layers_per_block=2)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([900, 100]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }  # fmt: skip


def predict(model, batch):
    with torch.no_grad():
        return model(**batch).sample


# ---- removal


def test_redundancy_is_the_change_without_a_module(unet, batch):
    found = a_sdm.redundancy(unet, [batch])
    assert set(found) == set(a_sdm.removable(unet)) and list(found.values()) == sorted(found.values())
    full = predict(unet, batch)
    for name in (
        "down_blocks.0.resnets.1",
        "up_blocks.0.resnets.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.2",
    ):
        other = copy.deepcopy(unet)
        module = other.get_submodule(name)
        if "resnets" in name:  # x + f(x), with f nothing
            module.conv2.weight.data.zero_()
            module.conv2.bias.data.zero_()
        else:
            module.proj_out.weight.data.zero_()
            module.proj_out.bias.data.zero_()
        want = (predict(other, batch) - full).square().mean() / full.square().mean()
        assert found[name] == pytest.approx(float(want), rel=1e-4)
        assert torch.allclose(predict(a_sdm.remove(unet, [name]).model, batch), predict(other, batch), atol=1e-5)
    assert torch.equal(predict(unet, batch), full)


def test_a_report_of_what_was_cut(unet, batch):
    names = ["mid_block.attentions.0", "up_blocks.0.resnets.1"]
    light = a_sdm.remove(unet, names, batch)
    assert light.params[1] < light.params[0] == sum(p.numel() for p in unet.parameters())
    assert light.params[1] == sum(p.numel() for p in light.model.parameters())
    assert 0 < light.multiply_adds[1] < light.multiply_adds[0]
    # A transformer of one block, counted by hand: its maps, and attention over 16 places and 5 words, for two images.
    counts = [a_sdm.remove(unet, names[:1], batch).multiply_adds, light.multiply_adds]
    block = unet.mid_block.attentions[0]
    maps = sum(m.weight.numel() * (5 if m.in_features == 16 else 16) for m in block.modules() if type(m) is nn.Linear)
    maps += sum(m.weight.numel() * 16 for m in block.modules() if type(m) is nn.Conv2d)
    assert counts[0][0] - counts[0][1] == 2 * (maps + 2 * 16 * (16 + 5) * 32)
    assert str(light).splitlines()[2:] == [f"removed {name}" for name in names]
    assert light.model.up_blocks[0].resnets[1].shortcut is not None  # channels still fit
    again = copy.deepcopy(light.model)
    assert torch.equal(predict(again, batch), predict(light.model, batch))


def test_rounds_of_removal_and_training(unet, batch):
    trained = []

    def train(student, teacher, number):
        assert teacher is unet
        at = ("up_blocks.*.resnets.0",)
        losses = [float(sum(step(student, teacher, at).values())) for _ in range(3)]
        trained.append(losses)

    def step(student, teacher, at):
        rates = torch.optim.SGD(student.parameters(), lr=0.02)
        terms = a_sdm.alignment_losses(student, teacher, batch, torch.ones(2, 4, 8, 8), at, align=0.1)
        sum(terms.values()).backward()
        rates.step()
        return {name: term.detach() for name, term in terms.items()}

    light = a_sdm.incubate(unet, [batch], rounds=2, each=2, train=train)
    assert len(light.removed) == 4 and light.removed[:2] == list(light.history[0])[:2]
    assert set(light.history[1]) == set(light.history[0]) - set(light.removed[:2])
    assert all(losses[-1] < losses[0] for losses in trained) and len(trained) == 2
    assert light.multiply_adds[1] < light.multiply_adds[0]


def test_a_lighter_unet_samples(tmp_path, batch):
    pipe = pipes.stable_diffusion(str(tmp_path))
    pipe.unet = a_sdm.remove(pipe.unet, ["mid_block.attentions.0", "down_blocks.0.resnets.0"]).model
    assert pipes.sample(pipe, steps=2, num_images_per_prompt=2).isfinite().all()
    with attnlib.attach(pipe, StepCache(every(2))):
        assert pipes.sample(pipe, steps=2).isfinite().all()


# ---- conditional convolutions


def test_conditional_convolution():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, 2, 1).double() for _ in range(3)]
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for gate in ("sigmoid", "softmax"):
        mixed = InheritedConv(convs, gate)
        start = sum(conv(x) for conv in convs) / 3
        assert torch.allclose(mixed(x), start, rtol=0, atol=1e-9)  # equal shares
        with torch.no_grad():
            mixed.fc.weight.normal_()
        logits = x.mean((2, 3)) @ mixed.fc.weight.T + mixed.fc.bias
        shares = 1 / (1 + torch.exp(-logits)) if gate == "sigmoid" else logits.exp() / logits.exp().sum(1, keepdim=True)
        for b in range(2):
            kernel = sum(a * conv.weight for a, conv in zip(shares[b], convs, strict=True))
            bias = sum(a * conv.bias for a, conv in zip(shares[b], convs, strict=True))
            want = F.conv2d(x[b : b + 1], kernel, bias, 2, 1)
            assert torch.allclose(mixed(x)[b : b + 1], want, atol=1e-9)
    one = InheritedConv(convs[:1], "softmax")
    assert torch.allclose(one(x), convs[0](x), atol=1e-9)
    for other in (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, 2, 1, padding_mode="circular").double()):
        with pytest.raises(ValueError, match="must be alike, padded by zeros and without groups"):
            InheritedConv([convs[0], other])
    with pytest.raises(ValueError, match=r"x must have shape \(B, C=3, H, W\)|x.*C=3"):
        one(x[:, :2])
    with pytest.raises(ValueError, match="at least one torch.nn.Conv2d"):
        InheritedConv([])


def test_a_resnet_is_replaced_by_an_inherited_convolution(unet, batch):
    name = "down_blocks.1.resnets.1"
    around = a_sdm.neighbours(unet, name)
    assert len(around) == 2 and all(conv.weight.shape == (32, 32, 3, 3) for conv in around)
    light = copy.deepcopy(unet)
    resnet = light.get_submodule(name)
    light.set_submodule(name, InheritedResidual(resnet, a_sdm.neighbours(light, name)))
    out = light(**batch).sample
    out.sum().backward()
    experts = light.get_submodule(name).conv
    assert out.shape == (2, 4, 8, 8) and experts.weight.shape == (3, 32, 32, 3, 3)
    assert experts.weight.grad.abs().sum() > 0 and experts.fc.weight.grad.abs().sum() > 0
    x = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        one = InheritedResidual(resnet, gate="softmax")
        assert torch.allclose(one(x), x + resnet.conv1(F.silu(resnet.norm1(x))), atol=1e-5)


# ---- attention of two routes


def by_hand(q, k, v, grid, window, pool):
    """(regional, global), query by query."""
    h, w = grid
    regional, everywhere = torch.empty_like(v), torch.empty_like(v)
    cells = {}
    for i in range(h):
        for j in range(w):
            cells.setdefault((i // pool, j // pool), []).append(i * w + j)
    pooled = [(k[cell].mean(0), v[cell].mean(0)) for cell in cells.values()]
    for n in range(h * w):
        y, x = divmod(n, w)
        mine = [m for m in range(h * w) if (m // w) // window == y // window and (m % w) // window == x // window]
        for out, keys, values in (
            (regional, k[mine], v[mine]),
            (everywhere, torch.stack([p[0] for p in pooled]), torch.stack([p[1] for p in pooled])),
        ):
            out[n] = ((q[n] @ keys.T) * q.shape[-1] ** -0.5).softmax(-1) @ values
    return regional, everywhere


@pytest.mark.parametrize("grid", [(4, 4), (5, 3)])
def test_both_routes_are_the_equations(grid):
    torch.manual_seed(0)
    h, w = grid
    q, k, v = torch.randn(3, 2, 3, h * w, 8, dtype=torch.float64)
    it = GlobalRegionalAttention(2, 2)
    regional, everywhere = it._regional(q, k, v, grid, None), it._global(q, k, v, grid, None)
    for b in range(2):
        for head in range(3):
            want = by_hand(q[b, head], k[b, head], v[b, head], grid, 2, 2)
            assert torch.allclose(regional[b, head], want[0], atol=1e-9)
            assert torch.allclose(everywhere[b, head], want[1], atol=1e-9)


def test_attention_of_two_routes_in_a_pipeline(tmp_path):
    pipe = pipes.stable_diffusion(str(tmp_path))
    pipe.unet.double(), pipe.vae.double(), pipe.text_encoder.double()
    plain = pipes.sample(pipe, steps=2)
    # One window and cells of one place: each route is plain attention, and so is their mean.
    for settings in ({}, {"routes": ["regional"]}, {"routes": ["global"]}, {"combine": "alternate"}):
        with attnlib.attach(pipe, GlobalRegionalAttention(16, 1, **settings)):
            assert torch.allclose(pipes.sample(pipe, steps=2), plain, rtol=0, atol=1e-9)
    with attnlib.attach(pipe, GlobalRegionalAttention(4, 4, layers=["down_blocks.0*"])):
        cheap = pipes.sample(pipe, steps=2, num_images_per_prompt=2)
    assert cheap.isfinite().all() and not torch.allclose(cheap[:1], plain, atol=1e-3)
    assert torch.equal(pipes.sample(pipe, steps=2), plain)
    assert GlobalRegionalAttention(4, 4).pairs(16, 16) == (4096, 4096) and 4096 * 2 < 256**2
    pipe.unet.to(torch.bfloat16), pipe.vae.to(torch.bfloat16), pipe.text_encoder.to(torch.bfloat16)
    with attnlib.attach(pipe, GlobalRegionalAttention(3, 3)):
        assert pipes.sample(pipe, steps=2).isfinite().all()


# ---- alignment


def test_alignment_is_nothing_for_equal_networks(unet, batch):
    noise = torch.randn(2, 4, 8, 8)
    terms = a_sdm.alignment_losses(unet, unet, batch, noise)
    assert terms["align"] == 0 and terms["distill"] == 0
    assert terms["noise"].item() == pytest.approx(float((predict(unet, batch) - noise).square().mean()), rel=1e-5)
    other = a_sdm.remove(unet, ["mid_block.attentions.0"]).model
    terms = a_sdm.alignment_losses(other, unet, batch, noise, ("down_blocks.0", "up_blocks.1"), align=2.0)
    assert terms["align"] > 0 and terms["distill"] > 0
    terms["align"].backward()
    assert any(p.grad is not None and p.grad.any() for p in other.up_blocks[1].parameters())
    assert all(p.grad is None for p in unet.parameters())
    a, b = torch.rand(2, 3, 3, dtype=torch.float64), torch.rand(2, 3, 3, dtype=torch.float64)
    want = sum(((x / x.norm() - y / y.norm()) ** 2).sum() for x, y in zip(a, b, strict=True)) / 2
    assert torch.allclose(a_sdm.semantic_alignment([a], [b]), want)


# ---- inherited features


def test_levels_of_inheritance(tmp_path):
    pipe = pipes.stable_diffusion(str(tmp_path))
    plain = pipes.sample(pipe)
    wanted = {
        "block": ["down_blocks.1", "up_blocks.0", "mid_block"],
        "layer": [n for n, _ in pipe.unet.named_modules() if n.split(".")[-2:-1] in (["resnets"], ["attentions"])],
        "unit": [n for n, _ in pipe.unet.named_modules() if n.rpartition(".")[2] in ("attn1", "attn2", "ff")],
    }
    for level, columns in wanted.items():
        with attnlib.attach(pipe, FeatureInheritance(level)) as session:
            got = pipes.sample(pipe)
            assert session.interventions[0].columns == columns
            executed = session.results["feature-inheritance"]["executed"]
        assert executed[::2].eq(1).all() and executed[1::2].eq(0).all() and not torch.equal(got, plain)
    with attnlib.attach(pipe, FeatureInheritance("unit", every(1))):
        assert torch.equal(pipes.sample(pipe), plain)
    dit = pipes.dit()
    for level, keep, count in (("block", 0, 2), ("layer", 1, 2), ("unit", 1, 4)):
        with attnlib.attach(dit, FeatureInheritance(level, keep=keep)) as session:
            dit([3], num_inference_steps=2, output_type="np")
            assert len(session.interventions[0].columns) == count


def test_bad_input(unet, batch, tmp_path):
    for call, message in (
        (
            lambda: a_sdm.remove(unet, ["conv_in"]),
            r"names must be resnets and transformers of this U-Net, got \['conv_in'\]",
        ),
        (lambda: a_sdm.remove(unet, []), "names must be resnets"),
        (lambda: a_sdm.remove(unet, "mid_block.resnets.0"), r"a sequence of names.*write \['mid_block"),
        (lambda: a_sdm.remove(unet, ["mid_block.attentions.0"] * 2), "names must hold each module once"),
        (lambda: a_sdm.redundancy(unet, []), "batches must be a sequence of at least one"),
        (lambda: a_sdm.redundancy(unet, batch), "batches must be a sequence of at least one"),
        (lambda: a_sdm.neighbours(unet, "mid_block.attentions.0"), "name must be a resnet of this U-Net"),
        (lambda: InheritedResidual(nn.Linear(2, 2)), "resnet must be a ResnetBlock2D of diffusers, got Linear"),
        (lambda: a_sdm.incubate(unet, [batch], 99), "are more modules than the"),
        (lambda: GlobalRegionalAttention(routes=["local"]), "routes must be some of"),
        (lambda: GlobalRegionalAttention(routes=["global", "global"]), "each once"),
        (lambda: GlobalRegionalAttention(routes=["global"], combine="alternate"), "needs both routes"),
        (lambda: FeatureInheritance("pixel"), "level"),
        (
            lambda: attnlib.attach(unet, FeatureInheritance("block", keep=3)),
            "keep=3 outer resolutions of 2 leave nothing",
        ),
        (
            lambda: attnlib.attach(pipes.dit(), FeatureInheritance("block")),
            "keep=1 blocks at either end of 2 leave nothing",
        ),
        (lambda: a_sdm.semantic_alignment([], []), "maps of the student are 0"),
        (lambda: a_sdm.semantic_alignment([torch.ones(1, 2, 2)], [torch.ones(1, 3, 3)]), "do not fit"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
