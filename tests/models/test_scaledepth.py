"""ScaleDepth: bins, one scale, masked attention, text that the user gives; depth that is not known."""

import copy

import pytest
import torch
from torch import nn

from attnlib.models.backbones.stages import FeatureInfo
from attnlib.models.dense.scaledepth import QueryLayer, ScaleDepth, bins, scale_between
from attnlib.models.losses import silog_loss

NAMES = ("room", "street")


class Trunk(nn.Module):
    """Two maps at two strides."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.feature_info = FeatureInfo({"num_chs": c, "reduction": r} for c, r in ((8, 2), (12, 4)))

    def forward(self, x):
        x = self.a(x).relu()
        return [x, self.b(x).relu()]


def text_encoder(sentences):
    """Vectors by the letters of a sentence."""
    return torch.stack([torch.sin(torch.arange(1, 7) * float(sum(map(ord, s)))) for s in sentences])


def small(**settings):
    torch.manual_seed(0)
    given = dict(dim=16, num_heads=2, num_bins=8, num_scales=2, depth=2, scale_depth=1, text_dim=6)
    return ScaleDepth(Trunk(), **{**given, **settings})


def test_bins():
    widths, centres = bins(3 * torch.randn(2, 9, dtype=torch.float64))
    assert (widths > 0).all() and (centres.diff(dim=-1) > 0).all() and (centres > 0).all() and (centres < 1).all()
    torch.testing.assert_close(widths.sum(-1), torch.ones(2, dtype=torch.float64))
    edges = torch.cat([torch.zeros(2, 1), widths.cumsum(-1)], -1)
    torch.testing.assert_close(centres, (edges[:, 1:] + edges[:, :-1]) / 2)


def test_depth_is_scale_times_relative_depth():
    model = small().eval()
    x = torch.randn(2, 3, 18, 21)
    made = model(x)
    assert (made.relative > 0).all() and (made.relative < 1).all() and (made.scale > 0).all()
    torch.testing.assert_close(made.depth, made.scale[:, None, None] * made.relative)
    model.to_scale.bias.data += torch.tensor(2.0).log()
    twice = model(x)
    torch.testing.assert_close(twice.depth, 2 * made.depth)
    assert twice.relative.equal(made.relative)
    torch.testing.assert_close(made.image.norm(dim=-1), torch.ones(2))
    model.to_scale.bias.data.fill_(1e6)
    assert model(x).depth.isfinite().all()  # a scale that no scene has is still a number


def test_relative_depth_is_the_mean_of_centres():
    """By the equation, from what the model's parts give."""
    model = small(depth=0, interact=0).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    made = model(x)
    maps = model._maps(x)
    q = model.bin_norm(model.bin_queries)
    logits = torch.einsum("nc,chw->nhw", model.to_map(q), model.pixels(maps[0])[0]) / 4
    relative = (logits.softmax(0) * made.centres[0][:, None, None]).sum(0)
    relative = nn.functional.interpolate(relative[None, None], (8, 8), mode="bilinear")[0]
    torch.testing.assert_close(made.relative, relative)
    torch.testing.assert_close(made.widths[0], model.to_width(q)[:, 0].softmax(0))


def test_silog_forgives_a_common_factor_when_focus_is_one():
    a, b = torch.rand(2, 1, 5, 6) + 0.5
    torch.testing.assert_close(silog_loss(3 * a, b, focus=1.0), silog_loss(a, b, focus=1.0))
    model = small(focus=1.0)
    made = model(torch.randn(1, 3, 5, 6))
    other = made._replace(depth=7 * made.depth)
    torch.testing.assert_close(model.loss(made, b)["silog"], model.loss(other, b)["silog"])


def test_true_relative_depth_gives_the_scale_back():
    relative = torch.rand(3, 5, 6, dtype=torch.float64) + 0.01
    scale = torch.tensor([10.0, 80.0, 0.3], dtype=torch.float64)
    depth = scale[:, None, None] * relative
    depth[0, 0, 0], depth[1, 1] = 0, torch.nan
    torch.testing.assert_close(scale_between(depth, relative), scale)
    half = torch.zeros(3, 5, 6, dtype=torch.bool)
    half[:, 3:] = True
    torch.testing.assert_close(scale_between(depth, relative, half), scale)
    with pytest.raises(TypeError, match="relative must be"):
        scale_between(depth, "relative")
    with pytest.raises(ValueError, match="image 1 has no place"):
        scale_between(torch.stack([depth[0], 0 * depth[0]]), relative[:2])


# ---- masked attention


def test_queries_read_where_their_map_says_so():
    layer = QueryLayer(8, 2).double()
    q, tokens, places = (torch.randn(s, 8, dtype=torch.float64) for s in (3, 5, 5))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    y = layer(q[None], tokens[None], places, mask[None])[0]
    # The cross-attention by loops, then the rest of the layer.
    part, rows = layer.cross, []
    for i in range(3):
        t, p = tokens[mask[i]], places[mask[i]]
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            one = part["q"](layer.norms[0](q[i]))[h] @ part["k"](t + p)[:, h].mT / 2
            heads.append(one.softmax(-1) @ part["v"](t)[:, h])
        rows.append(q[i] + part["proj"](torch.cat(heads)))
    z = torch.stack(rows)[None]
    n = layer.norms[1](z)
    z = z + layer._read(layer.own, n, n, n)
    torch.testing.assert_close(y, (z + layer.mlp(layer.norms[2](z)))[0])


def test_masks_of_nothing_allow_everything():
    logits = torch.full((1, 2, 4, 4), -1.0)
    logits[:, 1, :2] = 1
    allowed = ScaleDepth._allowed(logits, (2, 2))
    assert allowed[0].tolist() == [[True] * 4, [True, True, False, False]]
    x = torch.randn(1, 3, 16, 16)
    a, b = small().eval(), small(masked=False).eval()
    assert not torch.allclose(a(x).relative, b(x).relative)


# ---- text


def test_text_that_the_user_gives():
    model = small()
    x, depth, scene = torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8) + 1, torch.tensor([0, 1])
    with pytest.raises(ValueError, match="no text encoder is bound: call bind"):
        model.loss(model(x), {"depth": depth, "scene": scene})
    assert list(model.loss(model(x), depth)) == ["silog"]
    heard = []
    model.bind(lambda s: heard.extend(s) or text_encoder(s), NAMES)
    assert heard == ["a photo of a room", "a photo of a street"] and model.scenes == NAMES
    made = model(x)
    terms = model.loss(made, {"depth": depth, "scene": scene})
    texts = nn.functional.normalize(text_encoder(heard), dim=-1)
    want = nn.functional.cross_entropy(made.image @ texts.mT / 0.07, scene)
    torch.testing.assert_close(terms["text"], 0.1 * want)
    sum(terms.values()).backward()
    assert model.to_text.weight.grad.any() and model.to_scale.weight.grad.any()
    assert "texts" not in model.state_dict()  # it is the user's; copies have it
    assert copy.deepcopy(model).likeness(made.image).equal(model.likeness(made.image))
    small().load_state_dict(model.state_dict())
    for wrong, match in (
        (lambda s: torch.ones(2, 5), "must give"), (lambda s: torch.zeros(2, 6), "not zero"),
        (lambda s: torch.full((2, 6), torch.nan), "finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            model.bind(wrong, NAMES)
    with pytest.raises(TypeError, match="text_encoder must be a function"):
        model.bind(None, NAMES)
    with pytest.raises(ValueError, match="scenes must be names"):
        model.bind(text_encoder, [])
    with pytest.raises(ValueError, match="template"):
        model.bind(text_encoder, NAMES, "a photo")
    with pytest.raises(ValueError, match="scene must be 0 to 1"):
        model.loss(made, {"depth": depth, "scene": scene + 1})


# ---- depth that is not known, and other input


def test_unknown_depth_counts_nowhere():
    model = small()
    made = model(torch.randn(1, 3, 8, 8))
    depth = torch.rand(1, 8, 8) + 1
    holes = depth.clone()
    holes[:, :2], holes[:, 2], holes[:, 3] = 0, torch.nan, torch.inf
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[:, 4:] = True
    a, b = model.loss(made, holes)["silog"], model.loss(made, {"depth": depth, "valid": valid})["silog"]
    torch.testing.assert_close(a, b)
    a.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match=r"target holds the depth -1\.0"):
        model.loss(made, depth.index_fill(1, torch.tensor([0]), -1.0))
    with pytest.raises(ValueError, match="valid holds no place"):
        model.loss(made, 0 * depth)


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (1, 5)])
def test_any_size(size):
    model = small().eval()
    x = torch.randn(3, 3, *size)
    made = model(x)
    assert made.depth.shape == (3, *size) and made.scale.shape == (3,) and made.centres.shape == (3, 8)
    torch.testing.assert_close(model(x[:1]).depth, made.depth[:1], rtol=1e-3, atol=1e-4)
    assert model(x[:0]).depth.shape == (0, *size)
    assert model.train().predict(x).shape == (3, *size) and model.training
    half = copy.deepcopy(model).eval().bfloat16()(x.bfloat16())
    assert half.depth.isfinite().all() and half.widths.dtype == torch.float32


def test_constant_images():
    model = small()
    sum(model.loss(model(torch.zeros(2, 3, 8, 8)), torch.ones(2, 8, 8)).values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rooms_and_streets_without_a_range():
    """Ten metres and eighty, told apart by colour; one model for both."""
    g = torch.Generator().manual_seed(0)

    def batch(count):
        far = torch.arange(count) % 2
        slope = torch.linspace(0.2, 1, 16).pow(0.5 + torch.rand(count, 1, generator=g))
        relative = slope[:, :, None].expand(count, 16, 16)
        x = torch.stack([relative, far[:, None, None].expand_as(relative), torch.rand(count, 16, 16, generator=g)], 1)
        return x, relative * torch.where(far > 0, 80.0, 10.0)[:, None, None], far

    model = small(interact=0, depth=1, num_bins=16, range_weight=1.0, start=28.0).bind(text_encoder, NAMES)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 120)
    for _ in range(120):
        x, depth, far = batch(8)
        loss = sum(model.loss(model(x), {"depth": depth, "scene": far}).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, depth, far = batch(16)
    made = model.eval()(x)
    error = ((made.depth - depth).abs() / depth).mean((1, 2))
    assert error[far == 0].mean() < 0.2 and error[far == 1].mean() < 0.2
    assert 7 < made.scale[far == 0].mean() < 14 and 56 < made.scale[far == 1].mean() < 112
    assert (model.likeness(made.image).argmax(1) == far).all()


def test_range_ties_the_scale_to_known_depth():
    model = small(range_weight=1.0, quantile=0.5)
    made = model(torch.randn(2, 3, 4, 5))
    depth = torch.zeros(2, 4, 5)
    depth[0, 0] = torch.tensor([1.0, 2, 3, 4, 5])  # the other image has none
    term = model.loss(made, depth)["range"]
    torch.testing.assert_close(term, (made.scale[0].log() - torch.tensor(3.0).log()).abs())
    term.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert "range" not in small().loss(made, depth)


def test_export():
    model = small().eval()
    x = torch.randn(2, 3, 16, 12)
    made = torch.export.export(model, (x,), strict=False).module()(x)
    torch.testing.assert_close(made.depth, model(x).depth)


def test_bad_input():
    model = small()
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8).long(), torch.zeros(1, 3, 0, 8)):
        with pytest.raises(ValueError, match="x must"):
            model(wrong)
    made = model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="target must be depth"):
        model.loss(made, torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match=r"target has \['mask'\]"):
        model.loss(made, {"depth": torch.ones(1, 8, 8), "mask": 1})
    with pytest.raises(ValueError, match="no 'depth'"):
        model.loss(made, {})
    with pytest.raises(TypeError, match="prediction"):
        model.loss(made.depth, torch.ones(1, 8, 8))
    for settings, match in (
        (dict(dim=10), "multiple of 4"), (dict(num_heads=3), "num_heads"), (dict(num_bins=0), "num_bins"),
        (dict(temperature=0.0), "temperature"), (dict(start=0.0), "start"), (dict(focus=2.0), "focus"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            small(**settings)
    with pytest.raises(ValueError, match="feature_info"):
        ScaleDepth(nn.Identity())
