"""Uni4Eye: one encoder for pictures and volumes, held to its successor's; edges, positions, steps, refusals."""

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open

from attnlib.models.pretrain.masks import random_mask
from attnlib.models.pretrain.patches import fixed_positions, from_patches, to_patches
from attnlib.models.pretrain.uni4eye import EyeClassifier, Uni4Eye, convert, fixed_table, patch_entropy, sobel
from attnlib.models.protocol import Optimizers, train_batch
from tests.parity import HERE, synthetic
from tests.whole import Whole, drawn, renamer

with safe_open(HERE / "pretraining" / "uni4eye.safetensors", "pt") as f:
    RECORDED = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    CONFIG = json.loads(f.metadata()["config"])

SMALL = dict(img_size=16, patch_size=4, in_chans=1, dim=12, depth=1, num_heads=2)
SMALL |= dict(decoder_dim=12, decoder_depth=1, decoder_heads=2)
SHAPES = {"picture": (2, 1, 16, 16), "volume": (2, 1, 16, 16, 8)}


def built(**settings):
    torch.manual_seed(0)
    return Uni4Eye(**{**SMALL, **settings}).double()


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the successor's


@pytest.mark.parametrize("case", CONFIG)
def test_stems_encoder_and_decoder_of_the_successor(case):
    near = dict(rtol=1e-9, atol=1e-11)
    config = CONFIG[case]
    held = {k.removeprefix(f"{case}/"): v for k, v in RECORDED.items() if k.startswith(f"{case}/")}
    model = Uni4Eye(**config["settings"]).double()
    weights = synthetic(config["shapes"])
    fits = config["settings"]["in_chans"] * config["settings"]["patch_size"] == 3
    if not fits:  # three slices per token, where ours predicts the cube
        for name in ("weight", "bias"):
            weights[f"decoder_pred3.{name}"] = torch.zeros_like(model.get_parameter(f"decoder.head3.{name}"))
    model.load_state_dict(convert(weights))
    x = held["x"].double().requires_grad_()
    assert model.hidden_of(x) == int(held["mask"].sum(1)[0])
    found = model(x, held["mask"])
    torch.testing.assert_close(found.patches, held["y"], **near)
    if "loss" in held:
        torch.testing.assert_close(model.loss(found, x)["pixels"], held["loss"], **near)
    (found.patches * held["g"]).sum().backward()
    torch.testing.assert_close(x.grad, held["dx"], **near)
    full = {k: torch.full(s, math.nan, dtype=torch.float64) for k, s in config["shapes"].items()}
    wanted = convert({**full, **{k.removeprefix("dw/"): v for k, v in held.items() if k.startswith("dw/")}})
    compared = [n for n, t in wanted.items() if not t.isnan().any()]
    assert len(compared) == 6
    for name in compared:
        torch.testing.assert_close(model.get_parameter(name).grad, wanted[name], **near)
    with pytest.raises(ValueError, match="mine"):
        convert({**weights, "mine": torch.ones(1)})


TASKS = dict(img_size=28, patch_size=2, dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)


@pytest.mark.parametrize("case", ["partial23D", "partial", "imgen"])
def test_the_successors_head_for_tasks(case):
    """Their whole classes: what is predicted, and the loss of what the task makes of it; the third judges the former.

    Whose masks hide what has most entropy times noise.
    """
    whole = Whole("uni4eye-tasks")
    model = Uni4Eye(**TASKS, gradient=None, tasks=7, compat="authors").double()
    noise = (drawn("noise", (2, 196)) + 2) / 4
    if case == "imgen":
        noise = noise * (drawn("entropy", (2, 196)) + 2) / 4
    mask = noise.argsort(1).argsort(1) >= 49

    def rule(state):
        state = {**state}
        if case == "partial23D":  # their token of a volume is three slices; ours a cube of 8 x 3 numbers
            for name in ("weight", "bias"):
                state[f"decoder_pred3.{name}"] = torch.zeros_like(model.get_parameter(f"decoder.head3.{name}"))
        return convert(state, model)

    def call(model, inputs):
        found = model(inputs["x"], mask, None if case == "imgen" else torch.tensor([3, 0]))
        return {"patches": found.patches, "loss": model.loss(found, inputs["x"])["pixels"]}

    used = {k: v for k, v in whole.state(case).items() if not k.startswith(("decoder_pred3.", "mlp."))}
    fixed = {"encoder.stem3.weight", "encoder.stem3.bias", "decoder.head3.weight", "decoder.head3.bias"}
    at = renamer(lambda state: {k: v for k, v in rule(state).items() if k not in fixed}, used)

    def rename(theirs):
        return at(theirs) if theirs in used else None

    whole.holds(case, model, rule, call, rename)


def test_heads_for_tasks_mix_places():
    model = Uni4Eye(**TASKS, tasks=3).double()
    assert 0 < float(model.decoder.controller.bias.detach().abs().max()) < (1 + 196 + 3) ** -0.5
    x, task = draw(2, 3, 28, 28), torch.tensor([0, 2])
    plain = model(x)
    found = model(x, plain.mask, task)
    torch.testing.assert_close(found.patches, plain.patches)
    assert plain.mixed is None and found.mixed.shape == plain.patches.shape
    other = model(x, plain.mask, torch.tensor([0, 1])).mixed
    torch.testing.assert_close(other[0], found.mixed[0])
    assert not torch.allclose(other[1], found.mixed[1])
    for bad, match in (
        (dict(x=draw(2, 3, 30, 28), task=task), "does not fit tasks"),
        (dict(x=x, task=task[:1]), r"task must be \(2,\)"),
        (dict(x=x, task=task + 1), "task"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**bad)
    with pytest.raises(ValueError, match="without tasks"):
        built()(draw(2, 1, 16, 16), task=task)
    with pytest.raises(ValueError, match="pictures only"):
        convert({"patch_embed.proj.weight": torch.zeros(1)})


def test_entropy_of_patches_and_masks_that_follow_it():
    """Numbers of their image_entropy_rgb and image_entropy_3d, of values some of which lie outside."""
    x = (drawn("pixels", (1, 3, 8, 8)) + 2) * 80 - 10
    theirs = [3.6810937575622114, 3.8073549220576033, 3.7332241149454535, 3.610665261052398]
    torch.testing.assert_close(patch_entropy(x, 4, (0, 256))[0], torch.tensor(theirs, dtype=torch.float64))
    cells = (drawn("cells", (1, 1, 8, 8, 4)) + 2) * 80 - 10
    theirs = [5.436731930947543, 5.609120057986432, 5.463769511166971, 5.40101764523326]
    torch.testing.assert_close(patch_entropy(cells, 4, (0, 256))[0], torch.tensor(theirs, dtype=torch.float64))
    assert not patch_entropy(torch.full((1, 2, 4, 4), 7.0), 2).any()
    with pytest.raises(ValueError, match="span must go"):
        patch_entropy(x, 4, (1, 1))
    model = built(masking="entropy")
    half = draw(2, 1, 16, 16)
    half[..., :8] = 0.0  # eight patches of sixteen hold nothing
    mask = model.draw_mask(half, torch.Generator().manual_seed(0)).view(2, 4, 4)
    assert bool(mask[..., 2:].all()) and mask.flatten(1).sum(1).tolist() == [12, 12]
    flat = model.draw_mask(torch.zeros(3, 1, 16, 16), torch.Generator().manual_seed(0))
    assert flat.sum(1).tolist() == [12] * 3 and not flat[0].equal(flat[1])
    assert model(half).mask.sum(1).tolist() == [12, 12]


# ---- what the card asks


def test_one_encoder_and_its_numbers_of_tokens():
    with torch.device("meta"):
        m = Uni4Eye(dim=12, depth=1, num_heads=2, decoder_dim=12, decoder_depth=1, decoder_heads=2)
        assert math.prod(m.encoder.grids[2]) == 196 and math.prod(m.encoder.grids[3]) == 1372
        large = Uni4Eye(dim=1024, depth=1, num_heads=16)
    assert sum(p.numel() for p in large.encoder.stem3.parameters()) == 3 * 16**3 * 1024 + 1024
    m = built()
    for kind, shape in SHAPES.items():
        x = draw(*shape)
        assert m.encoder(x).tokens.shape == (2, 1 + math.prod(m.grid_of(x)), 12)
        found = m(x)
        total = 16 if kind == "picture" else 32
        assert bool((found.mask.sum(1) == total - total // 4).all()) and found.gradients.shape == found.patches.shape


def test_a_stem_that_is_inflated_sees_a_slice_in_every_depth():
    m, picture = built(), draw(2, 1, 16, 16)
    m.encoder.inflate()
    cells = m.encoder.stem3(picture.unsqueeze(-1).expand(-1, -1, -1, -1, 8))
    torch.testing.assert_close(cells, m.encoder.stem2(picture).unsqueeze(-1).expand_as(cells))


@pytest.mark.parametrize("kind", SHAPES)
def test_only_hidden_patches_are_learned_and_none_is_seen(kind):
    m, x = built(), draw(*SHAPES[kind])
    found = m(x)
    size, shape = 4, x.shape[2:]
    wide = found.mask.double().unsqueeze(-1).expand(-1, -1, found.patches.shape[-1])
    hidden = from_patches(wide, shape, size).bool()
    torch.testing.assert_close(m(torch.where(hidden, x + 3, x), found.mask).patches, found.patches)
    changed = torch.where(hidden, x, x + 3)
    torch.testing.assert_close(m.loss(found, changed)["pixels"], m.loss(found, x)["pixels"])
    full = m.predict(x, found.mask)
    assert full[~hidden].equal(x[~hidden])
    rows = (found.patches - to_patches(x, 4)).square().mean(-1)
    torch.testing.assert_close(m.loss(found, x)["pixels"], rows[found.mask].mean())
    rows = (found.gradients - to_patches(sobel(x), 4)).square().mean(-1)
    torch.testing.assert_close(m.loss(found, x)["gradients"], rows[found.mask].mean())


def test_gradients_of_pictures_and_volumes():
    x = draw(2, 3, 7, 6)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).double()
    p = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(1)
    gx, gy = (torch.nn.functional.conv2d(p, k[None, None]) for k in (kernel, kernel.T))
    torch.testing.assert_close(sobel(x), (gx**2 + gy**2).sqrt().view_as(x))
    for shape in ((1, 1, 5, 5), (1, 2, 5, 4, 3)):
        assert not sobel(torch.full(shape, 7.0)).any()
    v = draw(1, 2, 5, 6, 4)
    flat = torch.stack([sobel(v[..., i]) for i in range(4)], -1)
    torch.testing.assert_close(sobel(v, slices=True), flat)
    pad = torch.nn.functional.pad(v, (1,) * 6, mode="replicate").transpose(0, 1)
    smooth, slope = torch.tensor([1.0, 2, 1]).double(), torch.tensor([-1.0, 0, 1]).double()
    total = 0
    for axis in range(3):
        parts = [slope if axis == i else smooth for i in range(3)]
        k = torch.einsum("i,j,k->ijk", *parts)[None, None]
        total = total + torch.nn.functional.conv3d(pad, k).square()
    torch.testing.assert_close(sobel(v), total.sqrt().transpose(0, 1))
    ramp = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 6)
    assert bool((sobel(ramp)[..., 1:-1, :] == 8).all())
    y = torch.zeros(1, 1, 4, 4, requires_grad=True)
    sobel(y).sum().backward()
    assert y.grad.isfinite().all()
    hole = torch.zeros(1, 1, 6, 6)
    hole[..., 0, 0] = torch.nan
    assert int(sobel(hole).isnan().sum()) == 4  # what is not a number is not called flat


def test_volumes_have_positions():
    table = fixed_positions((3, 3, 2), 12)
    assert len(table.unique(dim=0)) == 18 and table.abs().max() <= 1
    assert not fixed_positions((2, 2, 2), 14)[:, 12:].any()  # what does not divide stays zero
    assert fixed_table(built().encoder, 3).any() and not fixed_table(built(compat="authors").encoder, 3).any()
    same = torch.ones(1, 1, 16, 16, 8).double()  # one cube everywhere: positions alone tell them apart
    assert len(built().encoder(same).tokens[0, 1:].round(decimals=9).unique(dim=0)) == 32
    assert len(built(compat="authors").encoder(same).tokens[0, 1:].round(decimals=9).unique(dim=0)) == 1


def test_pictures_and_volumes_in_turns():
    m = built().float()
    o = Optimizers(lambda name, p: torch.optim.AdamW(p, 1e-3))
    batch = {"pictures": torch.randn(2, 1, 16, 16), "volumes": torch.randn(2, 1, 16, 16, 8)}
    steps = list(m.steps(batch))
    assert [s.name for s in steps] == ["all", "all"]
    assert set(steps[0].terms()) == {"pixels of pictures", "gradients of pictures"}
    before = copy.deepcopy(m.state_dict())
    train_batch(m, batch, o)
    after = m.state_dict()
    for name in ("encoder.stem2.weight", "encoder.stem3.weight", "decoder.head2.weight", "edges.head3.weight"):
        assert not after[name].equal(before[name])
    train_batch(m, {"x": batch["volumes"], "target": batch["volumes"]}, o)
    train_batch(m, {"volumes": batch["volumes"]}, o)


def test_a_fine_tuned_encoder_tells_pictures_and_volumes():
    def world(count, g, *grid):
        x, y = torch.randn(count, 1, *grid, generator=g), torch.arange(count) % 2
        x[:, :, :8] += 1.5 * y.view(-1, *(1,) * (x.dim() - 1))
        return {"x": x, "target": y}

    torch.manual_seed(0)
    m = EyeClassifier(Uni4Eye(**SMALL), 2, pool="avg")
    o, g = Optimizers(lambda _, p: torch.optim.AdamW(p, 5e-3)), torch.Generator().manual_seed(0)
    for _ in range(30):
        for grid in ((16, 16), (16, 16, 8)):
            train_batch(m, world(16, g, *grid), o)
    for grid in ((16, 16), (16, 16, 8)):
        test = world(64, g, *grid)
        assert (m(test["x"]).argmax(-1) == test["target"]).float().mean() > 0.9


# ---- sizes and the world outside


@pytest.mark.parametrize("shape", [(16, 24), (13, 18), (12, 16, 8), (13, 9, 6)])
def test_any_size(shape):
    m, x = built(mask_ratio=0.5), draw(2, 1, *shape)
    found = m(x)
    terms = m.loss(found, x)
    assert all(t.isfinite() for t in terms.values()) and m.predict(x).shape == x.shape
    sum(terms.values()).backward()
    assert m.encoder.cls_token.grad.isfinite().all()


@pytest.mark.parametrize("kind", SHAPES)
def test_the_world_outside(kind):
    m, x = built().eval(), draw(*SHAPES[kind])
    mask = random_mask(2, 16 if kind == "picture" else 32, m.hidden_of(x))
    want = m(x, mask)
    torch.testing.assert_close(copy.deepcopy(m)(x, mask).patches, want.patches)
    if kind == "picture":
        made = torch.compile(m, backend="eager")(x, mask)
    else:
        made = torch.export.export(m, (x, mask), strict=False).module()(x, mask)
    torch.testing.assert_close(made.gradients, want.gradients)
    again = Uni4Eye(**SMALL).double()
    again.load_state_dict(m.state_dict())
    torch.testing.assert_close(again(x, mask.view(2, *m.grid_of(x))).patches, want.patches)
    half = copy.deepcopy(m).bfloat16()
    assert all(t.isfinite() for t in half.loss(half(x.bfloat16(), mask), x.bfloat16()).values())
    assert m(x[:0]).patches.shape[0] == 0
    flat = torch.ones_like(x)
    assert sum(m.loss(m(flat, mask), flat).values()).isfinite()


def test_what_is_refused():
    m, x = built(), draw(2, 1, 16, 16)
    every = torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="hides everything"):
        m(x, every)
    with pytest.raises(ValueError, match="hides nothing"):
        m(x, ~every)
    with pytest.raises(ValueError, match=r"x must be \(B, 1, H, W\) or \(B, 1, H, W, D\)"):
        m(x[:, 0])
    with pytest.raises(ValueError, match="x must be"):
        m(draw(2, 3, 16, 16))
    with pytest.raises(ValueError, match="mask hides nothing"):
        m.loss(m(x[:0]), x[:0])
    with pytest.raises(ValueError, match="prediction must be"):
        m.loss(m(x), draw(2, 1, 20, 16))
    with pytest.raises(ValueError, match="pictures of the batch must have 4 axes"):
        list(m.steps({"pictures": draw(2, 1, 8, 8, 8)}))
    with pytest.raises(ValueError, match="batch must hold pictures"):
        list(m.steps({"images": x}))
    for settings, said in (
        (dict(gradient="canny"), "gradient"), (dict(mask_ratio=0.0), "mask_ratio"), (dict(num_heads=5), "num_heads"),
        (dict(volume_size=(16, 16)), "volume_size"), (dict(compat="theirs"), "compat"), (dict(dim=4), "dim=4"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            built(**settings)
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) or \(B, C, H, W, D\)"):
        sobel(draw(2, 1, 5))
    with pytest.raises(TypeError, match="a Uni4Eye"):
        EyeClassifier(torch.nn.Linear(1, 1), 2)
    c = EyeClassifier(m, 2)
    with pytest.raises(ValueError, match="target points at class 2"):
        c.loss(c(x), torch.tensor([0, 2]))
