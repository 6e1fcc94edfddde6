"""FOD against the authors' class, their two losses and their score; both stop-gradients; grids of any shape."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.ndimage import gaussian_filter
from torch import nn

import attnlib
from attnlib.models.backbones.stages import FeatureInfo
from attnlib.models.dense.fod import (
    FOD,
    Correlation,
    FODLayer,
    FODLevel,
    LevelPrediction,
    PriorAttention,
    convert,
    convert_levels,
    discrepancy,
    smoothed,
)
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.positions import AxisBias, gaussian_prior
from tests.parity import synthetic

PATH = Path(__file__).parents[1] / "fixtures" / "models" / "fod-i2correlation.safetensors"
with safe_open(PATH, "pt") as held:
    CASES = json.loads(held.metadata()["cases"])
    WANT = {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118


class Trunk(nn.Module):
    """Two maps without a norm that looks at other images."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        for conv in (self.a, self.b):
            conv.weight.data = torch.randn(conv.weight.shape, generator=g) * 0.3
            conv.bias.data.zero_()
        info = [{"num_chs": c, "reduction": r} for c, r in ((8, 2), (12, 4))]
        self.feature_info = FeatureInfo(info)

    def forward(self, x):
        x = self.a(x).relu()
        return [x, self.b(x).relu()]


def small(size=16, **settings):
    torch.manual_seed(0)
    return FOD(Trunk(), size, dims=(8, 8), **{"num_heads": 2, "depth": 2, **settings})


def ready(size=16, **settings):
    side = (size, size) if isinstance(size, int) else size
    g = torch.Generator().manual_seed(1)
    return small(size, **settings).remember(torch.randn(4, 3, *side, generator=g))


def around(level, **settings):
    """A model around one level, for its loss and score."""
    model = small(intra=settings["intra"], inter=settings["inter"], compat="authors")
    model.levels = nn.ModuleList([level])
    return model


def test_a_checkpoint_of_their_training_holds_all_levels():
    config = CASES["both"] if "both" in CASES else next(c for c in CASES.values() if c["intra"] and c["inter"])
    model = small(compat="authors")
    model.levels = nn.ModuleList(FODLevel(6, 8, 2, 2, compat="authors") for _ in range(2))
    first = synthetic(config["shapes"])
    second = {k: v + 1 for k, v in first.items()}
    model.load_state_dict(convert_levels([first, {f"module.{k}": v for k, v in second.items()}], model), strict=True)
    for level, state in zip(model.levels, (first, second), strict=True):
        assert level.embed.bias.equal(state["embedding.project_embedding.project.bias"])
    for wrong in ([first], first):
        with pytest.raises(ValueError, match="states must be a list of 2"):
            convert_levels(wrong, model)


@pytest.mark.parametrize("case", CASES)
def test_as_released(case):
    config = CASES[case]
    parts = {k: config[k] for k in ("intra", "inter")}
    level = FODLevel(6, 8, 2, 2, compat="authors", **parts)
    level.load_state_dict(convert(synthetic(config["shapes"]), level), strict=True)
    level.double()
    x, reference = WANT["x"].double(), WANT["reference"].double()
    made = level(x, reference if config["inter"] else None)
    torch.testing.assert_close(made.rebuilt.flatten(1, 2), WANT[f"{case}/rebuilt"], rtol=0, atol=1e-9)
    model = around(level, **parts)
    terms = model.loss([made])
    torch.testing.assert_close(sum(terms.values()), WANT[f"{case}/l1"] + WANT[f"{case}/l2"], rtol=0, atol=1e-9)
    torch.testing.assert_close(model.scores(made).flatten(1), WANT[f"{case}/score"], rtol=0, atol=1e-9)
    if made.intra:
        torch.testing.assert_close(made.intra[1].prior[0, 1, :2], WANT[f"{case}/intra"], rtol=0, atol=1e-9)
    sum(terms.values()).backward()
    shapes, names = config["shapes"], config["names"]
    numbered = {n: torch.full(s, float(names.index(n)) if n in names else -1.0) for n, s in shapes.items()}
    ours, own = convert(numbered, level), dict(level.named_parameters())
    assert set(ours) == set(own)
    for name, of in ours.items():
        i, grad = int(of.flatten()[0]), own[name].grad
        assert i >= 0  # everything that is left trains
        grad = grad.unsqueeze(-1) if len(shapes[names[i]]) == 3 else grad
        torch.testing.assert_close(grad.norm(), WANT[f"{case}/norms"][i], rtol=1e-8, atol=1e-10)
        wave = torch.cos(torch.arange(grad.numel(), dtype=torch.float64)).view_as(grad)
        torch.testing.assert_close((grad * wave).sum(), WANT[f"{case}/sums"][i], rtol=1e-8, atol=1e-9)


def test_the_output_projection_counts_unless_it_is_thrown_away():
    state = synthetic(CASES["both"]["shapes"])
    ours = FODLevel(6, 8, 2, 2)
    ours.load_state_dict(convert(state, ours), strict=True)
    theirs = FODLevel(6, 8, 2, 2, compat="authors")
    theirs.load_state_dict(convert(state, theirs), strict=True)
    x, reference = WANT["x"], WANT["reference"]
    assert not torch.allclose(ours(x, reference).rebuilt, theirs(x, reference).rebuilt)
    for layer in ours.layers:
        for part in (layer.intra, layer.inter):
            nn.init.eye_(part.proj.weight), nn.init.zeros_(part.proj.bias)
    torch.testing.assert_close(ours(x, reference).rebuilt, theirs(x, reference).rebuilt)
    with pytest.raises(ValueError, match="one_of_mine"):
        convert({**state, "one_of_mine": x}, ours)


def test_parameters():
    counts = {}
    for compat in (None, "authors"):
        with torch.device("meta"):
            model = attnlib.create_model("fod_wide_resnet50_2", compat=compat)
        counts[compat] = sum(p.numel() for p in model.levels.parameters())
    # The released class builds output projections and throws their result away.
    assert counts == {None: 17_812_416, "authors": 17_812_416 - 1_970_688}


# ---- the prior


def naive(sigma, grid, at=None):
    """(B, H, N, M) by the equation."""
    places = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in grid]).view(-1, len(grid))
    at = places if at is None else at
    apart = (at[:, None] - places[None]).square()
    t = torch.exp(-(apart / (2 * sigma[..., None, :] ** 2)).sum(-1)) / (2 * torch.pi * sigma.prod(-1)[..., None])
    return t / t.sum(-1, keepdim=True)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6,), (2, 3, 2), (1, 7)])
def test_gaussian_prior_is_the_equation(grid):
    n = int(np.prod(grid))
    sigma = (0.3 + 2 * torch.rand(2, 3, n, len(grid), dtype=torch.float64)).requires_grad_()
    prior = gaussian_prior(sigma, grid)
    assert isinstance(prior, AxisBias) and prior.shape() == (n, n)
    made, want = prior.dense().exp(), naive(sigma, grid)
    torch.testing.assert_close(made, want)
    torch.testing.assert_close(made.sum(-1), torch.ones(2, 3, n, dtype=torch.float64))
    assert (made.argmax(-1) == torch.arange(n)).all()
    g = torch.randn_like(made)
    for a, b in zip(
        torch.autograd.grad(made, sigma, g), torch.autograd.grad(want, sigma, g), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_gaussian_prior_where_sigma_is_tiny_or_huge_and_between_places():
    for size in (1e-20, 1e-5, 1e5):
        sigma = torch.full((1, 1, 6, 2), size, requires_grad=True)
        made = gaussian_prior(sigma, (2, 3)).dense().exp()
        made.square().sum().backward()
        want = torch.eye(6) if size < 1 else torch.full((6, 6), 1 / 6)
        torch.testing.assert_close(made[0, 0], want)
        assert sigma.grad.isfinite().all()
    at = torch.tensor([[0.5, 1.5], [5.0, -1.0]], dtype=torch.float64)
    sigma = torch.full((1, 1, 2, 2), 1.3, dtype=torch.float64)
    torch.testing.assert_close(gaussian_prior(sigma, (2, 3), at).dense().exp(), naive(sigma, (2, 3), at))
    half = gaussian_prior(torch.ones(1, 1, 4, 2, dtype=torch.bfloat16), (2, 2)).dense()
    assert half.dtype == torch.float32
    assert gaussian_prior(torch.ones(0, 1, 4, 2), (2, 2)).dense().shape == (0, 1, 4, 4)


def test_gaussian_prior_refuses():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="q_coords must be finite places"):
            gaussian_prior(torch.ones(1, 1, 2, 2), (2, 2), torch.tensor([[0.0, 1.0], [bad, 0.0]]))
    with pytest.raises(ValueError, match="sigma must be above 0, got nan"):
        gaussian_prior(torch.full((1, 1, 4, 2), float("nan")), (2, 2))
    with pytest.raises(ValueError, match="3 widths per query, but grid"):
        gaussian_prior(torch.ones(1, 1, 4, 3), (2, 2))
    with pytest.raises(ValueError, match="for 5 queries"):
        gaussian_prior(torch.ones(1, 1, 5, 2), (2, 2))
    with pytest.raises(ValueError, match="above 0"):
        gaussian_prior(torch.zeros(1, 1, 4, 2), (2, 2))
    with pytest.raises(ValueError, match="above 0"):
        gaussian_prior(torch.full((1, 1, 4, 2), torch.nan), (2, 2))
    with pytest.raises((ValueError, TypeError), match="sigma"):
        gaussian_prior(torch.ones(1, 4, 2), (2, 2))


def test_widths_lie_between_nothing_and_two():
    part = PriorAttention(8, 2)
    x = 100 * torch.randn(2, 9, 8)
    s = part.widths(x)
    assert s.shape == (2, 2, 9, 2) and (s > 0).all() and (s <= 2.0001).all()
    _, (p, t) = part(x, x, (3, 3))
    torch.testing.assert_close(t.sum(-1), torch.ones(2, 2, 9))
    assert (t.argmax(-1) == torch.arange(9)).all() and t.isfinite().all()
    # Rows of the grid are the first width.
    nn.init.zeros_(part.sigma.weight)
    part.sigma.bias.data = torch.tensor([9.0, -9, 9, -9])
    _, (p, t) = part(x, x, (3, 3))
    assert t[0, 0, 4, 1] > 0.2 and t[0, 0, 4, 3] < 1e-6


# ---- the layer and its losses


def test_without_correlations_it_is_a_plain_layer():
    torch.manual_seed(0)
    ours = FODLayer(8, 2, 4.0, 0.0, False, False, True)
    plain = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True)
    state = {
        f"self_attn.in_proj_{k}": torch.cat([getattr(getattr(ours.intra, n), k) for n in "qkv"])
        for k in ("weight", "bias")
    }
    for theirs, mine in (("self_attn.out_proj", ours.intra.proj), ("linear1", ours.mlp.fc1), ("linear2", ours.mlp.fc2),
                         ("norm1", ours.norm1), ("norm2", ours.norm2)):  # fmt: skip
        state |= {f"{theirs}.{k}": v for k, v in mine.state_dict().items()}
    plain.load_state_dict(state)
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(ours(x, None, (2, 3))[0], plain(x))


def test_the_branches_cancel_where_the_reference_is_the_image():
    layer = FODLayer(8, 2, 4.0, 0.0, True, True, True)
    layer.inter.load_state_dict(layer.intra.state_dict())
    seen = []
    layer.norm1.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    x = torch.randn(2, 6, 8, requires_grad=True)
    layer(x, x, (2, 3))[0].square().sum().backward()
    assert not seen[0].any() and x.grad.isfinite().all()


def test_both_stop_gradients():
    """What moves priors does not touch queries and keys, what moves maps does not touch widths."""
    model = ready(depth=1)
    x = torch.randn(2, 3, 16, 16)
    for kind in ("prior", "map", "entropy"):
        terms = model.loss(model(x))
        model.zero_grad()
        sum(v for k, v in terms.items() if k.endswith(kind)).backward()
        for layer in (m.layers[0] for m in model.levels):
            for part in (layer.intra, layer.inter):
                moved = part.sigma.weight.grad is not None and bool(part.sigma.weight.grad.any())
                asked = [p.weight.grad is not None and bool(p.weight.grad.any()) for p in (part.q, part.k)]
                assert moved == (kind == "prior") and asked == [kind != "prior"] * 2
    deep = ready(depth=3)
    terms = deep.loss(deep(x))
    (terms["inter_map"] + terms["intra_map"] + terms["intra_entropy"]).backward()
    assert all(p.grad is None for n, p in deep.named_parameters() if ".sigma." in n)


def test_inter_maps_come_to_their_priors_and_intra_maps_leave_them():
    """One step per batch; only queries and keys train: what maps and priors do to each other has no direction."""
    model = ready(depth=1)
    for name, p in model.named_parameters():
        p.requires_grad_(".q." in name or ".k." in name)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    before = model.loss(model(x))
    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 3e-3))
    for _ in range(15):
        seen = train_batch(model, {"x": x}, optimizers)
    assert list(seen) == ["all"]
    after = model.loss(model(x))
    assert after["inter_map"] < before["inter_map"]
    assert after["intra_entropy"] < before["intra_entropy"]  # a negative: the entropy grows
    for name in ("inter", "intra"):
        assert sum(after[f"{name}_{t}"] - before[f"{name}_{t}"] for t in ("map", "entropy")) < 0


# ---- the model


def test_memory_is_the_mean_of_what_it_was_shown():
    model = small((12, 20))
    images = torch.randn(5, 3, 12, 20)
    model.remember(images[:2]).remember(images[2:]).remember(images[:0])
    for i, m in enumerate(model.features(images)):
        torch.testing.assert_close(getattr(model, f"reference{i}"), m.mean(0))
    assert int(model.seen) == 5
    again = small((12, 20))
    again.load_state_dict(model.state_dict())
    assert again.eval()(images)[0].rebuilt.equal(model.eval()(images)[0].rebuilt)
    with pytest.raises(ValueError, match="no image was remembered"):
        model.forget()(images)
    with pytest.raises(ValueError, match="images of img_size"):
        model.remember(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="inter=False"):
        small(inter=False).remember(images)


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("size", [(16, 16), (13, 22), (4, 4), (1, 9)])
def test_any_size(parts, size):
    model = small(intra=parts[0], inter=parts[1])
    if parts[1]:
        model.remember(torch.randn(2, 3, 16, 16))
    x = torch.randn(3, 3, *size)
    pixels, images = model.train().predict(x)
    assert pixels.shape == (3, *size) and images.shape == (3,) and pixels.isfinite().all() and (pixels >= 0).all()
    assert model.training and not model.encoder.training
    one = model.predict(x[:1])
    torch.testing.assert_close(one.pixels, pixels[:1], rtol=1e-4, atol=1e-6)  # other images do not matter
    sum(model.loss(model(x)).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.levels.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())


def test_no_images_and_half_precision():
    model = ready()
    empty = model(torch.zeros(0, 3, 16, 16))
    assert all(v == 0 for v in model.loss(empty).values())
    assert model.predict(torch.zeros(0, 3, 16, 16), smooth=0).pixels.shape == (0, 16, 16)
    x = torch.randn(2, 3, 16, 16)
    half = copy.deepcopy(model).bfloat16()
    a, b = model.predict(x).pixels, half.predict(x.bfloat16()).pixels
    assert float((a - b).abs().max()) < 0.1 * float(a.abs().max())
    assert sum(half.loss(half(x.bfloat16())).values()).isfinite()


def test_constant_features():
    """Without variance: finite, and equal everywhere inside."""
    model = ready()
    for value in (0.0, 1.0):
        x = torch.full((2, 3, 16, 16), value)
        model.zero_grad()
        sum(model.loss(model(x)).values()).backward()
        assert all(p.grad.isfinite().all() for p in model.levels.parameters())
        assert model.predict(x).pixels.isfinite().all()


def test_score_is_error_times_how_far_inter_maps_are_from_the_prior():
    model = ready()
    p, t = torch.rand(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(3)).softmax(-1).unbind(0)
    p[:, :, 2] = t[:, :, 2]  # a patch that reads as it expects to
    x = torch.randn(1, 2, 2, 8)
    made = LevelPrediction(x, x + 1, (), (Correlation(p, t),))
    score, wrong = model.scores(made), (torch.ones(1) + 1 - torch.cosine_similarity(x, x + 1, dim=-1))
    w = (-discrepancy(p, t)).softmax(-1)
    torch.testing.assert_close(score.flatten(1), wrong.flatten(1) * (w.max() - w))
    assert score.flatten()[2] == 0


def test_smoothing_is_scipys():
    x = torch.rand(2, 9, 40, dtype=torch.float64)
    for sigma in (0.7, 4.0):
        want = np.stack([gaussian_filter(i, sigma=sigma) for i in x.numpy()])
        torch.testing.assert_close(smoothed(x, sigma), torch.from_numpy(want))
    assert smoothed(x, 0).equal(x)
    model = ready()
    made = model.predict(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(made.images, smoothed(made.pixels, 4.0).amax((1, 2)))


def test_a_blob_in_a_texture_stands_out():
    g = torch.Generator().manual_seed(0)
    wave = torch.sin(torch.arange(24) * torch.pi / 2)

    def texture(count):
        x = (wave[:, None] * wave[None]).expand(count, 3, 24, 24)
        return x + 0.1 * torch.randn(count, 3, 24, 24, generator=g)

    model = small(24, depth=1).remember(texture(16))
    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 3e-3))
    for _ in range(30):
        train_batch(model, {"x": texture(4)}, optimizers)
    x = texture(4)
    clean = model.predict(x)
    x[:, :, 12:20, 8:16] = torch.randn(4, 3, 1, 1, generator=g)
    found = model.predict(x)
    hole = torch.zeros(24, 24, dtype=torch.bool)
    hole[12:20, 8:16] = True
    assert (found.pixels[:, hole].mean(1) > 1.3 * found.pixels[:, ~hole].mean(1)).all()
    assert (found.images > clean.images).all()


def test_copies_compile_and_export():
    model = ready(depth=1).eval()
    x = torch.randn(2, 3, 16, 16)
    want = model(x)
    assert pickle.loads(pickle.dumps(model))(x)[0].rebuilt.equal(want[0].rebuilt)
    made = torch.export.export(model, (x,), strict=False).module()(x)
    torch.testing.assert_close(made[1].rebuilt, want[1].rebuilt)
    compiled = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(compiled[0].inter[0].prior, want[0].inter[0].prior)


def test_bad_input():
    with pytest.raises(ValueError, match="sigma must be"):
        smoothed(torch.zeros(1, 4, 4), -1.0)
    with pytest.raises(ValueError, match="x must be a tensor of shape"):
        smoothed(torch.zeros(4, 4), 1.0)
    model = ready()
    for wrong in (torch.zeros(1, 2, 16, 16), torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16).long()):
        with pytest.raises(ValueError, match="x must be images"):
            model(wrong)
    with pytest.raises(ValueError, match="x must be finite"):
        model(torch.full((1, 3, 16, 16), torch.nan))
    with pytest.raises(ValueError, match="dims has 1 levels, the encoder gives 2"):
        FOD(Trunk(), 16, dims=(8,))
    with pytest.raises(ValueError, match="multiple of 4"):
        FOD(Trunk(), 16, dims=(8, 6), num_heads=2)
    with pytest.raises(ValueError, match="num_heads"):
        FOD(Trunk(), 16, dims=(8, 8), num_heads=3)
    with pytest.raises(ValueError, match="pool must be odd"):
        small(pool=2)
    with pytest.raises(ValueError, match="compat"):
        small(compat="theirs")
    with pytest.raises(ValueError, match="batch has no 'x'"):
        next(model.steps({"target": 1}))
    with pytest.raises(ValueError, match="does not take"):
        next(model.steps({"x": 1, "y": 2}))
    with pytest.raises(TypeError, match="prediction"):
        model.loss([torch.zeros(1)])
    with pytest.raises(ValueError, match="reference must be features"):
        model.levels[0](torch.zeros(1, 2, 2, 8))
    with pytest.raises(ValueError, match="smooth"):
        model.predict(torch.zeros(1, 3, 16, 16), smooth=-1)
