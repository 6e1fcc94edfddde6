"""RestoreFormer and ++ against the authors' classes, what their card asks, and the degradations of faces."""

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.models.build import counted_params, model_entry
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.restore.adversarial import (
    LPIPS,
    ActNorm2d,
    PartDiscriminator,
    PatchDiscriminator,
    PerceptualLoss,
    VGGMaps,
    discriminator_loss,
    generator_loss,
)
from attnlib.models.restore.degrade import Degradation, blurred, gaussian_kernel, jpeg
from attnlib.models.restore.restoreformer import PriorAttention, RestoreFormer, convert, face_parts
from tests.whole import Recorded, Whole, drawn, renamer, told, weights

TINY = dict(dim=8, mults=(1, 2), depth=1, num_codes=6, code_dim=4, num_heads=2, groups=4)


def tiny(**settings):
    torch.manual_seed(0)
    return RestoreFormer(**{**TINY, **settings})


def faces(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def everything(model, inputs):
    made = model(inputs["x"])
    return {"image": made.image, "loss": made.loss, "perplexity": made.perplexity}


@pytest.mark.parametrize("case", ["restoreformer", "plusplus", "lost_scale", "dictionary"])
def test_as_released(case):
    whole = Whole("restoreformer")
    settings = whole.cases[case]["note"]
    model = RestoreFormer(
        dim=32,
        depth=1,
        num_codes=12,
        code_dim=8,
        frozen=(),
        compat="authors",
        **{**settings, "mults": (*settings["mults"],)},
    )

    def rule(state):
        return convert(state, model)

    whole.holds(case, model, rule, everything, renamer(rule, whole.state(case)))
    inside = {f"vqvae.{k}": v for k, v in whole.state(case).items()} | {"loss.discriminator.x": torch.zeros(1)}
    assert rule(inside).keys() == model.state_dict().keys()


@pytest.mark.parametrize("case", ["levels", "no_middle", "dictionary"])
def test_other_levels_and_no_middle(case):
    whole = Whole("restoreformer-more")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in whole.cases[case]["note"].items()}
    sizes = dict(dim=32, depth=1, num_codes=12, code_dim=8, num_heads=2, frozen=(), compat="authors")
    model = RestoreFormer(**sizes, **settings)

    def rule(state):
        return convert(state, model)

    whole.holds(case, model, rule, everything, renamer(rule, whole.state(case)))


def test_a_judge_of_parts():
    whole = Whole("restoreformer-more")
    rule = PartDiscriminator.convert_state_dict

    def call(model, inputs):
        return dict(zip(("middle", "coarse", "score"), model.maps(inputs["x"]), strict=True))

    whole.holds("part", PartDiscriminator(), rule, call, renamer(rule, whole.state("part")))
    shapes = whole.cases["part"]["shapes"]
    assert sum(p.numel() for p in PartDiscriminator().parameters()) == sum(math.prod(s) for s in shapes.values())
    with pytest.raises(ValueError, match="three widths"):
        PartDiscriminator(3, (4, 8))
    with pytest.raises(ValueError, match="x must be crops"):
        PartDiscriminator(3)(torch.zeros(1, 1, 8, 8))


def test_terms_of_parts():
    """Crops, terms and their gradient against the release's loss, whose judges have waves by name as weights."""
    held = Recorded("restoreformer-parts")
    boxes = torch.tensor(json.loads(held.meta["boxes"]), dtype=torch.float64)
    model = tiny(parts=True, parts_weight=1.5, parts_style=2000.0).double()
    for name, judge in model.parts.items():
        shapes = {f"{name}.{k}": list(v.shape) for k, v in theirs_of(judge).items()}
        judge.load_state_dict(judge.convert_state_dict({k[len(name) + 1 :]: v for k, v in weights(shapes).items()}))
    fake, real = (drawn(name, (2, 3, 64, 64)) for name in ("fake", "real"))
    fake.requires_grad_()
    crops = [face_parts(t, boxes, "authors") for t in (fake, real)]
    for name, theirs in (("left_eye", "left_eyes"), ("right_eye", "right_eyes"), ("mouth", "mouths")):
        torch.testing.assert_close(told(crops[0][name]), held.tensors[f"crop/{theirs}"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(told(crops[1][name]), held.tensors[f"crop/{theirs}_gt"], rtol=1e-9, atol=1e-10)
        loss = discriminator_loss(model.parts[name](crops[1][name]), model.parts[name](crops[0][name]), "logistic")
        wanted = held.tensors[f"judge/{name.split('_')[0]}"][0]
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    terms = model.part_terms(*crops)
    torch.testing.assert_close(terms["parts"], held.tensors["parts"][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms["parts_style"], held.tensors["style"][0], rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(sum(terms.values()), fake)
    torch.testing.assert_close(told(grad), held.tensors["dx"], rtol=1e-7, atol=1e-9)
    plain = face_parts(real, boxes)
    torch.testing.assert_close(plain["mouth"] * 64 / 512, crops[1]["mouth"])
    for wrong, match in ((boxes[:1], "boxes must be"), (boxes.flip(-1), "right > left")):
        with pytest.raises(ValueError, match=match):
            face_parts(real, wrong)


def theirs_of(judge):
    """Entries of their class by name: the bias of an activation lies behind its convolution."""
    ours = dict(judge.state_dict())
    at = {
        "first": "conv1.0",
        "middle.0": "conv2.1",
        "middle.1": "conv3.0",
        "coarse.0": "conv4.1",
        "coarse.1": "conv5.0",
    }
    out = {f"final_conv.0.{k}": ours[f"last.{k}"] for k in ("weight", "bias")}
    for name, theirs in at.items():
        part, number = theirs.split(".")
        out |= {f"{theirs}.weight": ours[f"{name}.weight"], f"{part}.{int(number) + 1}.bias": ours[f"{name}.bias"]}
    return out


def test_parts_take_turns_and_come_out_of_checkpoints():
    model = tiny(parts=True, parts_style=1.0, gan_start=0.5, discriminator=PatchDiscriminator(3, (4, 8), (2, 1)))
    x, y = faces(2, 3, 16, 16), faces(2, 3, 16, 16, seed=1)
    boxes = torch.tensor([[[1, 2, 6, 7], [9, 2, 14, 7], [4, 9, 12, 14]]]).expand(2, 3, 4)
    batch = {"x": x, "target": (y, boxes)}
    sgd = Optimizers(lambda name, params: torch.optim.SGD(params, 0.01))
    assert list(train_batch(model, batch, sgd)) == ["generator"]
    model.set_progress(0.5)
    before = {n: p.clone() for n, p in model.named_parameters()}
    big = {"x": faces(1, 3, 64, 64), "target": (faces(1, 3, 64, 64, seed=1), 4 * boxes[:1])}
    seen = train_batch(model, big, sgd)
    assert list(seen) == ["discriminator", "left_eye", "right_eye", "mouth", "generator"]
    assert set(seen["generator"]) == {"l1", "codes", "adversarial", "parts", "parts_style"}
    moved = {n for n, p in model.named_parameters() if not p.equal(before[n])}
    assert all(any(n.startswith(f"parts.{part}.") for n in moved) for part in model.parts)
    judges = {id(p) for p in [*model.parts.parameters(), *model.discriminator.parameters()]}
    assert not judges & {id(p) for p in model.generator_params()}
    with pytest.raises(ValueError, match=r"target must be \(image, boxes"):
        train_batch(model, {"x": x, "target": y}, sgd)
    whole = Whole("restoreformer")
    theirs = whole.state("plusplus")
    judge = {f"loss.net_d_mouth.{k}": v + 1 for k, v in theirs_of(model.parts["mouth"]).items()}
    rest = {f"loss.discriminator.main.{k}": v + 1 for k, v in model.discriminator.layers.state_dict().items()}
    note = whole.cases["plusplus"]["note"]
    large = RestoreFormer(
        dim=32, depth=1, num_codes=12, code_dim=8, parts=True, discriminator=PatchDiscriminator(3, (4, 8), (2, 1)),
        **{**note, "mults": tuple(note["mults"])},
    )  # fmt: skip
    given = {f"vqvae.{k}": v for k, v in theirs.items()} | judge | rest | {"loss.identity.bn.weight": torch.zeros(1)}
    large.load_state_dict(convert(given, large), strict=True)
    assert large.parts["mouth"].last.bias.equal(judge["loss.net_d_mouth.final_conv.0.bias"])
    assert large.discriminator.layers[0].weight.equal(rest["loss.discriminator.main.0.weight"])
    for wrong in (dict(strides=(3,)), dict(strides=()), dict(middle=False)):
        with pytest.raises(ValueError, match="strides"):
            tiny(**wrong)


def test_the_discriminator():
    model = PatchDiscriminator(3, (64, 128, 256, 512), (2, 2, 2, 1))

    def rule(state):
        return {k.replace("main.", "layers."): v for k, v in state.items()}

    Whole("restoreformer").holds(
        "discriminator", model, rule, lambda m, i: {"y": m(i["x"])}, lambda n: n.replace("main.", "layers.")
    )


@pytest.mark.parametrize("case", ["actnorm", "actnorm_training", "features"])
def test_norms_set_by_the_first_batch_and_judges_that_show_their_maps(case):
    """Their NLayerDiscriminator with ``use_actnorm``, and their NLayerDiscriminator_v1."""
    norm = "actnorm" if "actnorm" in case else True
    model = PatchDiscriminator(3, (8, 16, 32), (2, 2, 1), norm=norm)

    def rule(state):
        fresh = {k: torch.zeros_like(v) if k.endswith("initialized") else v for k, v in state.items()}
        return model.convert_state_dict(fresh)

    whole = Whole("restoreformer-losses")
    given = whole.state(case)
    whole.holds(case, model, rule, lambda m, i: {"y": m(i["x"])}, renamer(model.convert_state_dict, given))
    flags = [m.initialized for m in model.modules() if isinstance(m, ActNorm2d)]
    assert len(flags) == (2 if norm == "actnorm" else 0) and all(bool(f) == (case == "actnorm_training") for f in flags)
    if case == "actnorm_training":  # it is set once
        before = copy.deepcopy(model.state_dict())
        model(drawn("x", (2, 3, 24, 29)) + 5)
        assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_norms_need_more_than_one_place():
    with pytest.raises(ValueError, match="one place per channel"):
        ActNorm2d(3)(torch.ones(1, 3, 1, 1))
    assert ActNorm2d(3).eval()(torch.ones(1, 3, 1, 1)).equal(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match="norm"):
        PatchDiscriminator(norm="layer")


def test_learned_perceptual_distance_and_style():
    whole = Whole("restoreformer-losses")
    dims = (4, 8, 8, 12, 12)
    loss = LPIPS(VGGMaps(dims), dims, style=1000.0).double()
    given = whole.state("lpips")
    loss.load_state_dict(loss.convert_state_dict(given), strict=True)
    x, target = (drawn(name, (2, 3, 32, 40)).requires_grad_() for name in ("x", "target"))
    found = loss.terms(x, target)
    for name, term in found.items():
        torch.testing.assert_close(term.detach(), whole.tensors[f"lpips/y/{name}"][2], rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad((found["distance"] + found["style"]), x)
    torch.testing.assert_close(told(grad), whole.tensors["lpips/dx/x"], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(loss(x, target), found["distance"] + found["style"])
    # The file that is released holds the weights of channels alone.
    alone = LPIPS(VGGMaps(dims), dims)
    state = alone.convert_state_dict({k: v for k, v in given.items() if k.startswith("lin")})
    alone.load_state_dict(state, strict=True)
    assert alone.channels3.equal(loss.channels3.float()) and "style" not in alone.terms(x.float(), target.float())
    net = VGGMaps((4, 8), (1, 2))
    flat = {"features.0": net.groups[0][0], "features.3": net.groups[1][0], "features.5": net.groups[1][1]}
    theirs = {f"{at}.{k}": v + 1 for at, conv in flat.items() for k, v in conv.state_dict().items()}
    net.load_state_dict(net.convert_state_dict({**theirs, "classifier.0.bias": torch.zeros(1)}), strict=True)
    assert net.groups[1][1].bias.equal(theirs["features.5.bias"])
    with pytest.raises(
        ValueError, match=r"dims=\(5, 8, 8, 12, 12\) must be the channels of what features gives, \[4, 8"
    ):
        LPIPS(VGGMaps(dims), (5, 8, 8, 12, 12))(x.float(), target.float())
    with pytest.raises(ValueError, match="16 pixels a side"):
        loss(x[..., :8], target[..., :8])
    with pytest.raises(ValueError, match="depths must hold one"):
        VGGMaps((4, 8), (1,))
    with pytest.raises(ValueError, match=r"dims=\(4, 8\) must be the channels"):
        LPIPS(VGGMaps((4,), (1,)), (4, 8))(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


def test_style_has_its_own_weight_and_judges_their_kinds():
    judge = PatchDiscriminator(3, (4, 8), (2, 1))
    model = tiny(
        discriminator=judge, perceptual=LPIPS(VGGMaps((4, 8), (1, 1)), (4, 8), style=3.0), perceptual_weight=0.5,
        judge_kind="logistic", parts=True, parts_kind="least-squares",
    )  # fmt: skip
    x, y = faces(1, 3, 64, 64), faces(1, 3, 64, 64, seed=1)
    made = model(x)
    terms, found = model.loss(made, y), model.perceptual.terms(made.image, y)
    torch.testing.assert_close(terms["perceptual"], 0.5 * found["distance"])
    torch.testing.assert_close(terms["style"], found["style"])
    boxes = torch.tensor([[[4, 8, 24, 28], [36, 8, 56, 28], [16, 36, 48, 56]]])
    turns = {}
    for step in model.steps({"x": x, "target": (y, boxes)}):
        turns[step.name] = step.terms()
    fake, real = face_parts(made.image, boxes), face_parts(y, boxes)
    for name, first, second, part, kind, weight in (
        ("discriminator", made.image, y, judge, "logistic", 0.5),
        ("mouth", fake["mouth"], real["mouth"], model.parts["mouth"], "least-squares", 1.0),
    ):
        wanted = weight * discriminator_loss(part(second), part(first.detach()), kind)
        torch.testing.assert_close(turns[name][name], wanted)
    scores = [generator_loss(part(fake[name]), "least-squares") for name, part in model.parts.items()]
    torch.testing.assert_close(turns["generator"]["parts"], sum(scores))
    with pytest.raises(ValueError, match="judge_kind"):
        tiny(judge_kind="least-squares")


def test_parameters():
    """Those of the released classes, without norms of queries that self-attention never reads."""
    norm = 2 * 512
    released = {"restoreformer": (72_680_003, 3), "restoreformer_plusplus": (73_472_579, 3),
                "restoreformer_dictionary": (72_680_003, 7)}  # fmt: skip
    for name, (count, dead) in released.items():
        assert counted_params(model_entry(name)) == count - dead * norm == model_entry(name).params


def test_where_it_reads():
    def reads(**settings):
        with torch.device("meta"):
            model = RestoreFormer(**settings)
        return [len(level.attention) for level in model.decoder.levels]

    assert reads(extra_scales=0) == [0, 0, 0, 0, 0, 3] and reads() == [0, 0, 0, 0, 3, 3]
    assert reads(extra_scales=2) == [0, 0, 0, 3, 3, 3] and reads(extra_scales=3) == [0, 0, 3, 3, 3, 3]
    assert reads(extra_scales=2, compat="authors") == [0, 0, 0, 3, 0, 3]


def test_a_map_that_reads_itself():
    torch.manual_seed(0)
    layer = PriorAttention(8, 2, groups=4).double()
    x, y = faces(2, 8, 3, 5, dtype=torch.float64), faces(2, 8, 3, 5, seed=1, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x, x))  # both norms start alike
    plain = PriorAttention(8, 2, cross=False, groups=4).double()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("norm2")})
    torch.testing.assert_close(plain(x), layer(x))
    h, other = layer.norm1(x), layer.norm2(y)
    q, k, v = (f(t).view(2, 2, 4, 15) for f, t in ((layer.q, other), (layer.k, h), (layer.v, h)))
    weights = (torch.einsum("bhdn,bhdm->bhnm", q, k) / 2).softmax(-1)
    read = torch.einsum("bhnm,bhdm->bhdn", weights, v).reshape(2, 8, 3, 5)
    torch.testing.assert_close(layer(x, y), x + layer.proj(read))
    with torch.no_grad():
        layer.proj.weight.zero_()
        layer.proj.bias.zero_()
    assert layer(x, y).equal(x)


def test_order_of_the_degraded_moves_queries_only():
    layer = PriorAttention(8, 2, groups=4).double()
    x, y = faces(1, 8, 3, 5, dtype=torch.float64), faces(1, 8, 3, 5, seed=1, dtype=torch.float64)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    moved = y.flatten(2)[..., order].view_as(y)
    read, again = (layer(x, t) - x for t in (y, moved))
    torch.testing.assert_close(again.flatten(2), read.flatten(2)[..., order])


def test_codes():
    model = tiny().double()
    x = faces(2, 3, 16, 16, dtype=torch.float64)
    made = model(x)
    assert 1 <= float(made.perplexity) <= 6 and made.codes.shape == (2, 8, 8)
    z = model.quant_in(model.encoder(x)[0]).movedim(1, -1).detach().requires_grad_()
    found = model.quantizer(z)
    rows = model.quantizer.codebook
    torch.testing.assert_close(found.y.detach(), rows[found.indices].detach())
    weight = torch.randn_like(found.y)
    (grad,) = torch.autograd.grad((found.y * weight).sum(), z)
    assert grad.equal(weight)
    assert not rows.requires_grad and tiny(cross=False).quantizer.codebook.requires_grad
    e = rows[found.indices]
    square = (e - z).square().mean()
    torch.testing.assert_close(found.loss, 1.25 * square)
    theirs = tiny(compat="authors", frozen=()).double()
    theirs.load_state_dict(model.state_dict())
    (ours,) = torch.autograd.grad(found.loss, z, retain_graph=True)
    (other,) = torch.autograd.grad(theirs.quantizer(z).loss, z)
    torch.testing.assert_close(other, 4 * ours)  # which of both terms is weighed by a quarter


def test_the_second_stage_starts_from_the_first():
    first, second = tiny(cross=False), tiny(extra_scales=1)
    new = second.start_from(first)
    assert new and all(".norm2." in k or ".levels.0.attention." in k for k in new)
    assert second.quantizer.codebook.equal(first.quantizer.codebook) and not second.quantizer.codebook.requires_grad
    same = tiny(extra_scales=0)
    same.start_from(first)
    assert same.decoder.conv_in.weight.equal(first.decoder.conv_in.weight)
    with pytest.raises(ValueError, match="first stage"):
        second.start_from(same)
    with pytest.raises(ValueError, match="other sizes"):
        second.start_from(tiny(cross=False, num_codes=7))


def test_terms_and_turns():
    torch.manual_seed(0)
    identity = nn.Sequential(nn.Flatten(), nn.Linear(128 * 128, 3))
    model = tiny(discriminator=PatchDiscriminator(3, (4, 8), (2, 1)), perceptual=PerceptualLoss(nn.Conv2d(3, 4, 3)),
                 identity=identity, gan_start=0.5)  # fmt: skip
    kept = [p.clone() for p in [*model.perceptual.parameters(), model.quantizer.codebook]]
    x, y = faces(2, 3, 16, 16), faces(2, 3, 16, 16, seed=1)
    sgd = Optimizers(lambda name, params: torch.optim.SGD(params, 0.01))
    seen = train_batch(model, {"x": x, "target": y}, sgd)
    assert list(seen) == ["generator"] and set(seen["generator"]) == {"l1", "codes", "perceptual", "identity"}
    model.set_progress(0.5)
    seen = train_batch(model, {"x": x, "target": y}, sgd)
    assert list(seen) == ["discriminator", "generator"] and "adversarial" in seen["generator"]
    for p, before in zip([*model.perceptual.parameters(), model.quantizer.codebook], kept, strict=True):
        assert p.equal(before)
    made = model(x)
    terms, score = model.loss(made, y), -model.discriminator(made.image).mean()
    last = model.decoder.conv_out.weight
    pulls = [
        torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (terms["l1"] + terms["perceptual"], score)
    ]
    torch.testing.assert_close(model.pull(terms, score), 0.8 * pulls[0] / (pulls[1] + 1e-4))


@pytest.mark.parametrize("size", [(1, 1), (9, 22), (5, 3)])
def test_any_size(size):
    made = tiny(mults=(1, 1, 2)).eval()(faces(2, 3, *size))
    assert made.image.shape == (2, 3, *size) and made.image.isfinite().all()


def test_it_learns_and_users_things():
    model = attnlib.create_model("restoreformer_plusplus", **TINY)
    x = faces(4, 3, 8, 8)
    adam = Optimizers(lambda name, params: torch.optim.AdamW(params, 3e-3))
    losses = [train_batch(model, {"x": x, "target": x}, adam)["generator"]["l1"] for _ in range(25)]
    assert losses[-1] < 0.75 * losses[0]
    model.eval()
    before, want = x.clone(), model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(x).image.equal(want.image)
    assert x.equal(before)
    assert model(x[:0]).image.shape == (0, 3, 8, 8)
    torch.testing.assert_close(model(x[1:2]).image, want.image[1:2])
    assert copy.deepcopy(model).bfloat16()(x.bfloat16()).image.dtype == torch.bfloat16
    assert model.train().predict(x).abs().max() <= 1 and model.training
    flat = torch.zeros(1, 3, 8, 8, requires_grad=True)
    model(flat).image.sum().backward()
    assert flat.grad.isfinite().all()


def test_degraded_faces():
    x = torch.rand(3, 64, 48, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(x[None], scale_factor=2, mode="bilinear")[0]
    made, right = Degradation()(x, torch.Generator().manual_seed(1))
    again, _ = Degradation()(x, torch.Generator().manual_seed(1))
    assert made.equal(again) and made.shape == x.shape and not made.equal(right)
    assert (
        float((made * 255 - (made * 255).round()).abs().max()) < 1e-4
        and 0 <= float(made.min()) <= float(made.max()) <= 1
    )
    none = dict(uneven=0.0, haze=0.0, shift=0.0, grey=0.0)
    mild = Degradation(blur=(1e-3, 1e-3), down=(1.0, 1.0), noise=(0.0, 0.0), quality=None, **none)
    made, right = mild(x, torch.Generator().manual_seed(0))
    assert right.equal(x) and float((made - x).abs().max()) <= 0.5 / 255 + 1e-6
    hazy = Degradation(blur=(1e-3, 1e-3), down=(1.0, 1.0), noise=(0.0, 0.0), quality=None, haze_alpha=(0.8, 0.8),
                       **{**none, "haze": 1.0})  # fmt: skip
    torch.testing.assert_close(hazy(x)[0], 0.8 * x + 0.2, rtol=0, atol=0.5 / 255 + 1e-6)
    moved = Degradation(**{**none, "shift": 1.0, "grey": 1.0})
    made, right = moved(x, torch.Generator().manual_seed(3))
    assert right[0].equal(right[1]) and made[0].equal(made[2])
    state = torch.random.get_rng_state()
    Degradation(uneven=1.0)(x, torch.Generator().manual_seed(2))
    assert torch.random.get_rng_state().equal(state)
    assert Degradation(uneven=1.0)(torch.rand(1, 1, 1))[0].isfinite().all()


def test_parts_of_degradation():
    k = gaussian_kernel(9, (2.0, 2.0))
    line = torch.exp(-((torch.arange(9) - 4.0) ** 2) / 8)
    torch.testing.assert_close(k, torch.outer(line, line) / line.sum() ** 2)
    long = gaussian_kernel(9, (3.0, 1.0))
    assert float(long[4, 8]) > 10 * float(long[8, 4])  # the first width lies along x
    torch.testing.assert_close(gaussian_kernel(9, (3.0, 1.0), torch.pi / 2), long.T.contiguous(), rtol=1e-4, atol=1e-7)
    flat = torch.full((3, 5, 4), 0.3)
    torch.testing.assert_close(blurred(flat, gaussian_kernel(15, (4.0, 4.0))), flat)
    x = F.interpolate(torch.rand(1, 3, 4, 4), (32, 32), mode="bilinear")[0]
    errors = [float((jpeg(x, q) - x).square().mean()) for q in (5, 50, 95)]
    assert errors[0] > errors[1] > errors[2] and jpeg(x[:1], 90).shape == (1, 32, 32)


def test_bad_input():
    model = tiny()
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, H, W\)"):
        model(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="at least one pixel"):
        model(torch.zeros(1, 3, 0, 8))
    with pytest.raises(ValueError, match="target must be images"):
        model.loss(model(torch.zeros(1, 3, 8, 8)), torch.zeros(1, 3, 4, 4))
    for settings in (dict(extra_scales=2), dict(groups=3), dict(num_heads=3), dict(frozen=("codes",)), dict(mults=()),
                     dict(compat="theirs")):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            tiny(**settings)
    with pytest.raises(ValueError, match="shape of x"):
        PriorAttention(8, 2, groups=4)(torch.zeros(1, 8, 3, 3), torch.zeros(1, 8, 2, 3))
    for settings in (dict(blur=(2.0, 1.0)), dict(haze=2.0), dict(down=(0.0, 2.0)), dict(noise=3.0)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Degradation(**settings)
    for settings in (dict(quality=(60, 101)), dict(quality=(60.5, 70)), dict(blur_size=(1.5, 3)), dict(square=None),
                     dict(haze_alpha=(0.5, 1.5))):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
            Degradation(**settings)
    for f in (Degradation(), lambda x: jpeg(x, 50)):
        with pytest.raises(ValueError, match=r"x must be an image \(1 or 3, H, W\)"):
            f(torch.zeros(2, 8, 8))
        with pytest.raises(ValueError, match="x must be finite"):
            f(torch.full((3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="sigma must be two widths"):
        gaussian_kernel(5, (1.0,))
    with pytest.raises(ValueError, match="kernel must be .* odd"):
        blurred(torch.zeros(3, 8, 8), gaussian_kernel(4, (1.0, 1.0)))
    with pytest.raises(ValueError, match="mean being for 3"):
        PerceptualLoss(nn.Conv2d(2, 2, 1), mean=(0.0, 0.0, 0.0))(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="mine"):
        convert({"mine": torch.zeros(1)}, model)
