"""PEPSI against its layer list in float64, and what its card asks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.models.build import counted_params, model_entry
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.restore.masks import square_masks, stroke_masks
from attnlib.models.restore.pepsi import PEPSI, ContextAttention, RateAdaptiveConvs, REDDiscriminator, mirrored
from tests.ops.test_patch_attention import oracle as cut_patches

DIMS = (4, 6, 8, 16)


def small(**settings):
    torch.manual_seed(0)
    return PEPSI(**{"dims": DIMS, **settings})


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def holes(count, *size):
    known = torch.ones(count, 1, *size)
    known[..., size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 0
    return known


def by_equations(model, x, mask):
    """The layer list of the release, with weights from a model: masked image and mask, reflect padding, ELU."""

    def conv(y, layer, stride=1, rate=1):
        weight, bias = layer.conv.weight, layer.conv.bias
        pad = rate * (weight.shape[-1] // 2)
        return F.elu(F.conv2d(F.pad(y, (pad,) * 4, mode="reflect"), weight, bias, stride, dilation=rate))

    masked = (x + 1) / 2 * mask * 2 - 1
    y = torch.cat([masked, mask, mask, mask], 1)
    for layer, stride in zip(model.stem, (1, 2, 1, 2, 1, 2), strict=True):
        y = conv(y, layer, stride)
    for layer, rate in zip(model.dilated, (2, 4, 8, 16), strict=True):
        y = conv(y, layer, rate=rate)
    small_mask = F.interpolate(mask, y.shape[2:])
    rows = y.permute(0, 2, 3, 1)
    every = torch.ones(rows.shape[:3], dtype=torch.bool)
    found, _ = cut_patches(rows, rows * small_mask.permute(0, 2, 3, 1), every, 3, "distance", 50.0)
    filled = y * small_mask + found.permute(0, 3, 1, 2) * (1 - small_mask)
    mix = model.attention.mix
    filled = F.elu(F.conv2d(torch.cat([y, filled], 1), mix.weight, mix.bias))

    def decode(z):
        side = x.shape[2]
        for pair, size in zip(model.up, (side // 4, side // 2, side, side), strict=True):
            for layer in pair:
                z = conv(z, layer)
            z = F.interpolate(z, (size, size))
        return F.conv2d(z, model.out.weight, model.out.bias, padding=1).clip(-1, 1)

    made, coarse = decode(filled), decode(y)
    return made * (1 - mask) + x * mask, made, coarse


def test_against_the_equations():
    model = small().double()
    x, mask = images(2, 3, 144, 144, dtype=torch.float64), holes(2, 144, 144).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))
    grads = []
    for made in (model.train()(x, mask), by_equations(model, x, mask)):
        grads.append((made, torch.autograd.grad(sum(t.square().sum() for t in made), list(model.parameters()))))
    for a, b in zip(grads[0][0], grads[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max() + 1))


def test_parameters():
    with torch.device("meta"):
        model, diet = PEPSI(), PEPSI(diet=True)

    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    assert count(model.stem, model.dilated) == 2_937_184 and count(model.up, model.out) == 588_435
    assert count(model.attention) == 131_328 and counted_params(model_entry("pepsi")) == 3_656_947
    assert count(model) - count(diet) == 3 * (256 * 256 * 9 + 256) - 4 * 2 * 256


def test_all_known_stays_and_a_constant_fills_its_hole():
    layer = ContextAttention(4, valid_only=True, similarity="distance", scale=50.0).double()
    x = images(1, 4, 12, 12, dtype=torch.float64)
    assert layer.filled(x, torch.ones(1, 1, 12, 12, dtype=torch.bool)).equal(x)
    flat = torch.full((1, 4, 12, 12), 0.3, dtype=torch.float64)
    known = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    known[..., 4:8, 4:8] = False
    flat = torch.where(known, flat, images(1, 4, 12, 12, dtype=torch.float64))
    torch.testing.assert_close(layer.filled(flat, known), torch.full_like(flat, 0.3))


def test_one_kernel_for_all_rates():
    torch.manual_seed(0)
    shared = RateAdaptiveConvs(4, (2, 3)).double()
    x = images(1, 4, 9, 9, dtype=torch.float64)

    def conv(y, rate, weight):
        return F.elu(F.conv2d(F.pad(y, (rate,) * 4, mode="reflect"), weight, shared.conv.bias, dilation=rate))

    torch.testing.assert_close(shared(x), conv(conv(x, 2, shared.conv.weight), 3, shared.conv.weight))
    with torch.no_grad():
        shared.scale[1] = torch.arange(4.0)
        shared.shift[1] = 0.1
    other = torch.arange(4.0).double()[:, None, None, None] * shared.conv.weight + 0.1
    torch.testing.assert_close(shared(x), conv(conv(x, 2, shared.conv.weight), 3, other))
    model = small(diet=True)
    assert model(images(1, 3, 32, 32), holes(1, 32, 32)).coarse is not None


def test_terms_over_the_training_and_one_decoder():
    model = small().double()
    x, y = images(2, 3, 32, 32, dtype=torch.float64), images(2, 3, 32, 32, seed=1, dtype=torch.float64)
    made = model(x, holes(2, 32, 32))
    for progress in (0.0, 0.25, 1.0):
        model.set_progress(progress)
        terms = model.loss(made, y)
        torch.testing.assert_close(terms["image"], 10 * (made.made - y).abs().mean())
        torch.testing.assert_close(terms["coarse"], 5 * (1 - progress) * (made.coarse - y).abs().mean())
    assert list(model.loss(model.eval()(x, holes(2, 32, 32)), y)) == ["image"]
    torch.testing.assert_close(model(x, holes(2, 32, 32)).made, made.made)
    known = holes(2, 32, 32).bool().expand_as(x)
    assert made.image[known].equal(x[known]) and made.image[~known].equal(made.made[~known])
    for grad in torch.autograd.grad(made.coarse.sum(), list(model.up.parameters()), retain_graph=True):
        assert grad.any()  # the coarse path trains the same decoder


def test_region_ensemble():
    torch.manual_seed(0)
    judge = REDDiscriminator(3, (4, 8), (17, 24)).double().eval()
    x = images(2, 3, 17, 24, dtype=torch.float64)
    y = x
    for layer, pads in zip(judge.layers, ((1, 2, 2, 2), (1, 2, 2, 2)), strict=True):
        for _ in range(300):  # the power iteration of training, to its end
            layer.train()(y)
        layer.eval()
        top = torch.linalg.svdvals(layer.weight.flatten(1))[0]
        want = F.leaky_relu(F.conv2d(F.pad(y, pads), layer.weight / top, layer.bias, 2), 0.2)
        torch.testing.assert_close(F.leaky_relu(layer(y), 0.2), want, rtol=1e-7, atol=1e-8)
        y = F.leaky_relu(layer(y), 0.2)
    with torch.no_grad():
        judge.bias.normal_(generator=torch.Generator().manual_seed(0))
    unit = judge.weight / judge.weight.norm(dim=-1, keepdim=True)
    plain = (y.permute(0, 2, 3, 1) * unit).sum(-1)
    torch.testing.assert_close(judge(x), plain + judge.bias)
    theirs = REDDiscriminator(3, (4, 8), (17, 24), compat="authors").double().eval()
    theirs.load_state_dict(judge.state_dict())
    torch.testing.assert_close(theirs(x), (y.permute(0, 2, 3, 1) * unit + judge.bias[..., None]).sum(-1))
    with torch.device("meta"):
        full = REDDiscriminator()
    assert full.weight.shape == (4, 4, 512)


def test_turns():
    model = small(discriminator=REDDiscriminator(3, (4, 8), (32, 32)))
    x, known = images(2, 3, 32, 32), holes(2, 32, 32)
    sgd = Optimizers(lambda name, params: torch.optim.SGD(params, 0.01))
    twin = copy.deepcopy(model)  # every look at an image moves its power iterations
    scores = [twin.discriminator(t).detach() for t in (twin(x, known).image, x)]
    seen = train_batch(model, {"x": x, "known": known, "target": x}, sgd)
    want = F.relu(1 + scores[0]).mean() + F.relu(1 - scores[1]).mean()
    assert seen["discriminator"]["discriminator"] == pytest.approx(float(want), rel=1e-6)
    assert list(seen["generator"]) == ["image", "coarse", "adversarial"]


@pytest.mark.parametrize("size", [(17, 17), (33, 50), (40, 19)])
def test_any_size(size):
    model = small()
    known = holes(2, *size)
    for made in (model.train()(images(2, 3, *size), known), model.eval()(images(2, 3, *size), known[:, 0].bool())):
        assert made.image.shape == (2, 3, *size) and made.image.isfinite().all()


def test_mirrors():
    x = images(1, 2, 3, 5)
    assert mirrored(x, 2).equal(F.pad(x, (2,) * 4, mode="reflect"))
    assert mirrored(x, 7)[0, 0, 7:10, 7:12].equal(x[0, 0])
    assert mirrored(x, 7)[0, 0, :, 7].tolist() == [
        float(x[0, 0, i, 0]) for i in (1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1)
    ]
    assert mirrored(x[:, :, :1, :1], 3).shape == (1, 2, 7, 7)


def test_masks():
    g = torch.Generator().manual_seed(0)
    square = square_masks(4, (32, 24), 8, g)
    assert square.shape == (4, 1, 32, 24) and (~square).flatten(1).sum(1).tolist() == [64] * 4
    strokes = stroke_masks(3, (64, 48), length=(5, 12), width=(3, 6), generator=g)
    share = (~strokes).flatten(1).float().mean(1)
    assert strokes.dtype == torch.bool and float(share.min()) > 0.02 and float(share.max()) < 0.98
    again = stroke_masks(3, (64, 48), length=(5, 12), width=(3, 6), generator=torch.Generator().manual_seed(1))
    assert again.equal(
        stroke_masks(3, (64, 48), length=(5, 12), width=(3, 6), generator=torch.Generator().manual_seed(1))
    )
    with pytest.raises(ValueError, match="side"):
        square_masks(1, (8, 8), 9)
    for wrong in ((3, 2), (3,)):
        with pytest.raises(ValueError, match="strokes must be fewest and most"):
            stroke_masks(0, (8, 8), strokes=wrong)


def test_it_learns_and_users_things():
    model = attnlib.create_model("pepsi", dims=DIMS)
    x, known = images(2, 3, 24, 24) * 0.3 + 0.5, holes(2, 24, 24)
    adam = Optimizers(lambda name, params: torch.optim.Adam(params, 3e-3))
    batch = {"x": x, "known": known, "target": x}
    losses = [train_batch(model, batch, adam)["generator"]["image"] for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    dirty = torch.where(known.bool(), x, torch.nan)
    model.eval()
    want = model(x, known)
    assert model(dirty, known).made.equal(want.made) and want.coarse is None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(x, known).image.equal(want.image)
    torch.testing.assert_close(model(x[1:], known[1:]).image, want.image[1:])
    assert model(x[:0], known[:0]).image.shape == (0, 3, 24, 24)
    assert copy.deepcopy(model).bfloat16()(x.bfloat16(), known).image.dtype == torch.bfloat16
    assert model.train().predict(x, known).shape == x.shape and model.training
    for settings in (dict(similarity="cosine", sharpness=10.0), dict(valid_only=True), dict(diet=True)):
        assert small(**settings)(x, known).image.isfinite().all()


def test_bad_input():
    model, x = small(), images(2, 3, 24, 24)
    none, every = torch.zeros(2, 1, 24, 24), torch.ones(2, 1, 24, 24)
    mixed = torch.cat([holes(1, 24, 24), none[:1]])
    for known, message in (
        (none, "known: of image 0 nothing is known, everything is missing; 1 is known here"),
        (mixed, "known: of image 1 nothing is known"), (every, "of image 0 everything is known, nothing missing"),
        (holes(2, 24, 24) * 255, "known must hold 1 "), (holes(2, 20, 24), "known must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(x, known)
    with pytest.raises(ValueError, match="x must be images"):
        model(x[:, :1], holes(2, 24, 24))
    with pytest.raises(ValueError, match="17 pixels a side"):
        model(x[..., :9], holes(2, 24, 9))
    for settings in (dict(dims=(4, 8)), dict(similarity="l1"), dict(sharpness=0.0), dict(image=-1.0)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            small(**settings)
    with pytest.raises(ValueError, match="x must be images"):
        REDDiscriminator(3, (4, 8), (32, 32))(x)
