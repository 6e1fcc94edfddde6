"""SegMiF against the authors' classes in float64, and what its card promises."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnlib
from attnlib.models.dense.segmif import (
    DilatedDenseBlock,
    DynamicWeight,
    FusionNet,
    SegMiF,
    SegMiFPrediction,
    convert,
    edges,
    from_luminance,
    segmif,
    to_luminance,
)
from attnlib.models.perception.foveation import similarity
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.nn.linear import hierarchical_interaction
from attnlib.nn.linear.hierarchical_interaction import HierarchicalInteraction
from attnlib.ops import channel_attention, context_attention
from tests.parity import by_name
from tests.whole import Whole, renamer

PATH = Path(__file__).parents[1] / "fixtures" / "models" / "segmif.safetensors"
with safe_open(PATH, "pt") as held:
    META = json.loads(held.metadata()["shapes"])
    WANT = {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118
SMALL = dict(embed_dims=(8, 16, 20, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 5, 8))


def weights(tag):
    return {k: by_name(k, s) for k, s in META[tag].items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def tiny(**settings):
    torch.manual_seed(0)
    given = dict(num_classes=3, head_dim=12, dim=8, growth=4, num_heads=2, drop_path_rate=0.0)
    return segmif(encoder=SMALL, **{**given, **settings})


def pair(size=(37, 45), batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *size, generator=g), torch.rand(batch, 1, *size, generator=g)


# ---- the attention


@pytest.mark.parametrize("branches", ["both", "soam", "moam"])
def test_attention_is_the_authors(branches):
    layer = HierarchicalInteraction(8, 2, branches=branches).double()
    theirs = weights(branches)
    layer.load_state_dict(layer.convert_state_dict(theirs, branches), strict=True)
    g = torch.Generator().manual_seed(2)
    xs = [torch.randn(2, 8, 3, 4, generator=g, dtype=torch.float64).requires_grad_(True) for _ in range(3)]
    a, b = (
        y.permute(0, 3, 1, 2)
        for y in layer(*(x.permute(0, 2, 3, 1) for x in xs[:2]), semantic=xs[2].permute(0, 2, 3, 1))
    )
    close(a, WANT[f"{branches}.a"])
    close(b, WANT[f"{branches}.b"])
    (a.sin().sum() + (b * b).sum()).backward()
    for i, x in enumerate(xs):
        close(x.grad, WANT[f"{branches}.gx{i}"])
    grads = {n: p.grad for n, p in layer.named_parameters()}
    assert all(g is not None for g in grads.values())
    names = META[f"{branches}.names"]
    theirs = {n: torch.full(tuple(META[branches][n]), float(i)) for i, n in enumerate(names)}
    ours = layer.convert_state_dict(theirs, branches)
    for i in range(len(names)):  # every one of theirs is one of ours
        (name,) = [n for n, t in ours.items() if t.flatten()[0] == i]
        assert grads[name].norm().item() == pytest.approx(WANT[f"{branches}.norms"][i].item(), rel=1e-9)


@pytest.mark.parametrize("case", ["network3", "soam", "moam", "concatenate", "add", "gate", "none"])
def test_other_networks_of_the_release(case):
    """Half as wide with two last convolutions, one branch of the attention, what it is compared with, and nothing."""
    whole = Whole("segmif-forms")
    note = whole.cases[case]["note"]
    model = FusionNet(**note)
    branches = note.get("branches", "both")

    def rule(state):
        return FusionNet.convert_state_dict(state, branches)

    def call(model, inputs):
        maps = [] if case == "none" else [inputs["first"], inputs["second"]]
        return {"y": model(inputs["infrared"], inputs["visible"], maps)}

    def start(name, t):  # of the projections of a branch alone the half that feeds it is here: MoAM's is the second
        return t.numel() if branches == "moam" and ".proj." in name else 0

    whole.holds(case, model, rule, call, renamer(rule, whole.state(case)), start=start)


def test_joins_are_refused_where_they_do_not_fit():
    x = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match="join='mean'"):
        FusionNet(8, join="mean")
    with pytest.raises(ValueError, match="head_dims must end in 1"):
        FusionNet(8, head_dims=(8, 2))
    with pytest.raises(ValueError, match=r"maps must have \[\] channels"):
        FusionNet(8, 4, join="none")(x, x, [torch.rand(1, 64, 8, 8), torch.rand(1, 128, 8, 8)])
    with pytest.raises(ValueError, match=r"maps must have \[64, 128\] channels"):
        FusionNet(8, 4, 2)(x, x)
    y = FusionNet(8, 4, join="gate")(x, x, [torch.rand(1, 64, 4, 4), torch.rand(1, 128, 2, 2)])  # resized
    assert y.shape == x.shape and y.isfinite().all()


def test_attention_at_64_channels():
    layer = HierarchicalInteraction(64)
    assert sum(p.numel() for p in layer.parameters()) == 66_304
    assert layer.proj[0].weight.std() < 0.025 and not layer.proj[0].bias.any()


def test_context_is_a_softmax_over_the_features_of_keys():
    q, k, v = torch.randn(3, 2, 4, 9, 6, dtype=torch.float64)
    ctx = (k.mT @ v * 6**-0.5).softmax(-2)
    torch.testing.assert_close(ctx.sum(-2), torch.ones(2, 4, 6, dtype=torch.float64))
    close(context_attention(q, k, v), q @ ctx)
    close(context_attention(2 * q, k, v), 2 * (q @ ctx))  # linear in q
    order = torch.randperm(9)
    close(context_attention(q, k[:, :, order], v[:, :, order]), q @ ctx)
    close(context_attention(q, k, v), channel_attention(v, k, q, scale=6**-0.5))
    eye = torch.eye(6, dtype=torch.float64).expand(2, 4, 6, 6)
    assert context_attention(eye, eye, eye).sum(-2).allclose(torch.ones((), dtype=torch.float64))
    valid = torch.rand(2, 9) > 0.3
    some = context_attention(q, k, v, valid=valid)
    m = valid[:, None, :, None]
    close(some, (q * m) @ ((k * m).mT @ v * 6**-0.5).softmax(-2))
    with pytest.raises(ValueError, match="share"):
        context_attention(q, k[:, :, :4], v)


@pytest.mark.parametrize("branches", ["both", "soam", "moam"])
def test_heads_in_one_product_are_the_heads_one_by_one(branches, monkeypatch):
    layer = HierarchicalInteraction(12, 3, qkv_bias=True, branches=branches).double()
    for p in layer.parameters():
        p.data.normal_()
    xs = torch.randn(3, 2, 5, 4, 12, dtype=torch.float64)
    for valid in (None, torch.rand(2, 5, 4) > 0.3):
        made = []
        for width in (12, 11):  # up to the first, and from above the second
            monkeypatch.setattr(hierarchical_interaction, "ONE_PRODUCT", width)
            made.append(layer(*xs[:2], semantic=xs[2], valid=valid))
        for a, b in zip(*made, strict=True):
            close(a, b)


def test_cost_is_linear_in_places():
    from torch.utils.flop_counter import FlopCounterMode

    def cost(n):
        layer = HierarchicalInteraction(16, 2).to("meta")
        x = torch.empty(1, n, 16, device="meta")
        with FlopCounterMode(display=False) as counter:
            layer(x, x, semantic=x)
        return counter.get_total_flops()

    assert cost(4000) <= 2.01 * cost(2000)


def test_absent_places_are_no_part_of_the_maps():
    layer = HierarchicalInteraction(8, 2).double()
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    holes = x.masked_fill(~valid[None, ..., None], float("nan"))
    a, b = layer(holes[0], holes[1], semantic=holes[2], valid=valid)
    short = layer(x[0, :1, :3], x[1, :1, :3], semantic=x[2, :1, :3])
    close(a[:1, :3], short[0])
    close(b[:1, :3], short[1])
    assert not a[0, 3:].any() and a.isfinite().all()


def test_bad_streams():
    layer, x = HierarchicalInteraction(8, 2), torch.zeros(1, 4, 5, 8)
    with pytest.raises(ValueError, match="one batch and grid.*resize"):
        layer(x, x, semantic=torch.zeros(1, 4, 4, 8))
    with pytest.raises(ValueError, match="one batch and grid"):
        layer(x, x[:, :3], semantic=x)
    with pytest.raises(ValueError, match="stream 0 must be"):
        layer(x[..., :4], x, semantic=x)
    with pytest.raises(ValueError, match="one batch and grid"):
        layer(x, semantic=x)
    with pytest.raises(ValueError, match="branches"):
        HierarchicalInteraction(8, 2, branches="all")
    with pytest.raises(ValueError, match="num_heads"):
        HierarchicalInteraction(8, 3)


# ---- the networks


def authors_model():
    """The recording's networks: their fusion network at its full width over a small segmenter."""
    small = segmif(num_classes=3, head_dim=12, encoder=SMALL, compat="authors")
    return small.double()


def test_segmenter_is_the_authors():
    model = authors_model()
    theirs = {**weights("net"), **weights("seg")}
    # theirs reads maps of 64 and 128 channels, which this small segmenter does not have
    theirs["conv3.weight"], theirs["conv4.weight"] = (torch.zeros(64, c, 1, 1, dtype=torch.float64) for c in (8, 16))
    assert sum(v.numel() for k, v in theirs.items() if k.startswith("ffm2")) == 66_304
    model.load_state_dict(convert(theirs, model), strict=True)
    model.eval()
    g = torch.Generator().manual_seed(3)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    rand(2, 3, 37, 45), rand(2, 1, 37, 45)
    mask = rand(2, 1, 37, 45)
    close(model.known(mask)[0][:, ::2, ::3, ::3], WANT["features0"])
    torch.randint(0, 3, (2, 37, 45), generator=g)
    torch.randn(2, 64, 12, 13, generator=g, dtype=torch.float64)
    torch.randn(2, 128, 6, 7, generator=g, dtype=torch.float64)
    image = rand(1, 3, 40, 50)
    head = model.segmenter.head(model.segmenter.encoder(model.normalised(image)))
    close(head, WANT["logits"])


def test_fusion_and_losses_are_the_authors():
    model = authors_model()
    model.load_state_dict(
        {
            **model.state_dict(),
            **{f"segmenter.{k}": v for k, v in _segmenter(model).items()},
        }
    )
    net = FusionNet().double()
    net.load_state_dict(net.convert_state_dict(weights("net")), strict=True)
    assert sum(p.numel() for p in net.parameters()) == 1_034_370 - 66_304
    g = torch.Generator().manual_seed(3)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    vis, ir, mask = rand(2, 3, 37, 45), rand(2, 1, 37, 45), rand(2, 1, 37, 45)
    label = torch.randint(0, 3, (2, 37, 45), generator=g)
    label[0, :3] = 255
    maps = [torch.randn(2, c, h, w, generator=g, dtype=torch.float64).requires_grad_(True)
            for c, h, w in ((64, 12, 13), (128, 6, 7))]  # fmt: skip
    ycc = to_luminance(vis)
    close(ycc[:, :, ::6, ::6], WANT["ycc"])
    fused = net(ir, ycc[:, :1], maps)
    close(fused[:, :, ::4, ::4], WANT["fused"])
    image = from_luminance(torch.cat([fused, ycc[:, 1:]], 1))
    close(image[:, :, ::6, ::6], WANT["rgb"])
    model.eval()
    made = SegMiFPrediction(fused, image, model._segmented(image), mask)
    first = sum(model.loss(made, label).values())
    close(first, WANT["first"])
    model.round.fill_(2)
    later = model.loss(made, label)
    close((later["intensity"] + later["similarity"]) / 0.2, WANT["similar"])
    close(later["segment"] / 0.8, WANT["segment"])
    (sum(later.values()) + first).backward()
    for i, m in enumerate(maps):
        close(m.grad[:, ::16, ::3, ::3], WANT[f"net.gs{i}"])
    grads = {n: p.grad for n, p in net.named_parameters()}
    names = META["net.names"]
    marks = {n: torch.full(tuple(s), -1.0) for n, s in META["net"].items()}
    marks |= {n: torch.full(tuple(META["net"][n]), float(i)) for i, n in enumerate(names)}
    ours = net.convert_state_dict(marks)
    assert sorted(int(t.flatten()[0]) for t in ours.values()) == list(range(len(names)))
    for name, mark in ours.items():
        i = int(mark.flatten()[0])
        wave = torch.cos(torch.arange(mark.numel(), dtype=torch.float64)).view_as(mark)
        torch.testing.assert_close(grads[name].norm(), WANT["net.norms"][i], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close((grads[name] * wave).sum(), WANT["net.sums"][i], rtol=1e-8, atol=1e-8)


def _segmenter(model):
    theirs = {**weights("net"), **weights("seg")}
    theirs["conv3.weight"], theirs["conv4.weight"] = (torch.zeros(64, c, 1, 1) for c in (8, 16))
    out = convert(theirs, model)
    return {k.removeprefix("segmenter."): v for k, v in out.items() if k.startswith("segmenter.")}


def test_named_model():
    assert attnlib.list_models(family="segmif-him") == [f"segmif_mit_b{n}" for n in range(1, 6)]
    with torch.device("meta"):
        model = attnlib.create_model("segmif_mit_b3", num_classes=15)
    assert model.num_classes == 15
    with pytest.raises(ValueError, match="in_chans=4"):
        attnlib.create_model("segmif_mit_b3", in_chans=4)


def test_counts_of_all_sizes():
    for name in attnlib.list_models(family="segmif-him"):
        with torch.device("meta"):
            count = sum(p.numel() for p in attnlib.create_model(name).parameters())
        assert count == attnlib.models.build.model_entry(name).params, name


def test_shared_attention_and_colours():
    one, two = tiny(), tiny(share_hia=False)
    assert len(one.fusion.hia) == 1 and len(two.fusion.hia) == 2
    x = torch.rand(2, 3, 5, 6)
    assert (from_luminance(to_luminance(x)) - x).abs().max() < 5e-3
    flat = torch.full((1, 1, 12, 12), 0.3)
    assert not edges(flat)[..., 1:-1, 1:-1].any()
    assert similarity(flat, flat, pad=True).item() == pytest.approx(1)
    assert DilatedDenseBlock()(torch.zeros(0, 64, 4, 4)).shape == (0, 64, 4, 4)


# ---- weights and rounds


def test_dynamic_weight():
    weight = DynamicWeight()
    for losses in ([1.9, 2.2], [2.0, 2.2], [1.7, 2.3]):
        torch.testing.assert_close(weight(torch.tensor(losses)).sum(), torch.tensor(2.0))
    got = weight(torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(got.double(), WANT["lambda"], rtol=0, atol=1e-7)  # the authors'
    assert (got - 1).abs().max() < 1e-3  # at 1000 it is next to nothing
    before = copy.deepcopy(weight.state_dict())
    weight.eval()(torch.tensor([9.0, 1.0]))
    assert all(v.equal(before[k]) for k, v in weight.state_dict().items())
    assert DynamicWeight(2, 0.1)(torch.tensor([1.0, 1.0])).tolist() == [1, 1]
    with pytest.raises(ValueError, match="losses"):
        weight(torch.zeros(3))


def test_rounds():
    model = tiny(alternate="round")
    visible, infrared = pair((32, 32))
    batch = {"visible": visible, "infrared": infrared, "target": torch.randint(0, 3, (2, 32, 32))}
    seen = []
    for p in (0.0, 0.1, 0.15, 0.3, 1.0):
        model.set_progress(p)
        seen.append((int(model.round), [s.name for s in model.steps(batch)]))
    assert seen == [(1, ["fusion"]), (1, ["segment"]), (2, ["fusion"]), (3, ["fusion"]), (7, ["segment"])]
    both = tiny()
    optimizers = Optimizers(lambda name, params: torch.optim.SGD(params, 0.1))
    before = {k: v.clone() for k, v in both.state_dict().items()}
    terms = train_batch(both, batch, optimizers)
    assert sorted(terms) == ["fusion", "segment"] and sorted(terms["fusion"]) == ["edges", "intensity"]
    moved = {k.split(".")[0] for k, p in both.named_parameters() if not p.detach().equal(before[k])}
    assert moved == {"fusion", "segmenter"}
    both.set_progress(0.5)
    assert sorted(train_batch(both, batch, optimizers)["fusion"]) == ["intensity", "segment", "similarity"]
    with pytest.raises(ValueError, match="progress"):
        both.set_progress(2)


def test_semantic_maps_have_no_gradient_and_the_segmenter_judges():
    model = tiny().train()
    model.set_progress(0.5)
    visible, infrared = pair((32, 32))
    target = torch.randint(0, 3, (2, 32, 32))
    (step, *_) = model.steps({"visible": visible, "infrared": infrared, "target": target})
    from attnlib.models.protocol import updating

    with updating(model, step.params):
        step.terms()["segment"].backward()
    assert all(p.grad is None for p in model.segmenter.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.fusion.parameters()) > 0


# ---- for users


def test_sizes_copies_and_answers():
    model = tiny().eval()
    for size in ((37, 45), (8, 70), (1, 1)):
        visible, infrared = pair(size)
        held = visible.clone()
        answer = model.predict(visible, infrared)
        assert answer.classes.shape == (2, *size) and answer.image.shape == (2, 3, *size)
        assert 0 <= answer.image.min() and answer.image.max() <= 1 and visible.equal(held)
    visible, infrared = pair()
    one = model(visible[:1], infrared[:1])  # no image depends on its neighbours
    torch.testing.assert_close(model(visible, infrared).fused[:1], one.fused, rtol=1e-4, atol=1e-5)
    assert model(visible[:0], infrared[:0]).logits.shape == (0, 3, 37, 45)
    bright = torch.maximum(to_luminance(visible)[:, :1], infrared)
    assert model(visible, infrared).fused.equal(model(visible, infrared, bright).fused)
    theirs = tiny(compat="authors").eval()
    theirs.load_state_dict(model.state_dict())
    assert not theirs(visible, infrared).fused.allclose(model(visible, infrared).fused)
    visible, infrared = pair((12, 9), 1)
    half = copy.deepcopy(model).bfloat16()
    assert half(visible.bfloat16(), infrared.bfloat16()).image.isfinite().all()
    made = torch.compile(model, backend="eager")(visible, infrared)
    torch.testing.assert_close(made.image, model(visible, infrared).image)


def test_bad_input():
    model = tiny().eval()
    visible, infrared = pair()
    with pytest.raises(ValueError, match="infrared must be .* grid of visible"):
        model(visible, infrared[..., :-1])
    for change, name in ((to_luminance, "rgb"), (from_luminance, "ycc")):
        with pytest.raises(ValueError, match=f"{name} must be a tensor of shape"):
            change(infrared)
    with pytest.raises(ValueError, match="guide must be"):
        model(visible, infrared, visible)
    with pytest.raises(ValueError, match="visible must be"):
        model(infrared, infrared)
    with pytest.raises(ValueError, match="target holds the class 3"):
        model.round.fill_(2)
        model.loss(model(visible, infrared), torch.full((2, 37, 45), 3))
    with pytest.raises(ValueError, match="one grid"):
        model.fusion(infrared, infrared[..., :-1], [])
    with pytest.raises(ValueError, match="maps must have"):
        model.fusion(infrared, infrared, [infrared, infrared])
    with pytest.raises(ValueError, match="segmenter.encoder must have a feature_info"):
        SegMiF(torch.nn.Identity())
    with pytest.raises(ValueError, match="does not have"):
        convert({"strange": torch.zeros(1)}, model)
