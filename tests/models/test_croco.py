"""CroCo: held to the authors' network, loss and downstream forms; exact masks, any size, refusals."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import attnlib
from attnlib.models.build import load_pretrained
from attnlib.models.losses import laplacian_loss
from attnlib.models.pretrain.croco import Completed, CroCo, CroCoBinocular, CroCoMonocular, convert
from attnlib.models.pretrain.masks import random_mask
from attnlib.models.pretrain.patches import (
    fixed_positions,
    from_patches,
    patch_error,
    standardized,
    to_patches,
)
from attnlib.models.protocol import Optimizers, train_batch
from tests.parity import HERE, synthetic
from tests.whole import Recorded, drawn

with safe_open(HERE / "pretraining" / "croco.safetensors", "pt") as f:
    RECORDED = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    CONFIG = json.loads(f.metadata()["config"])

SMALL = dict(img_size=32, patch_size=8, dim=16, depth=2, num_heads=2, decoder_dim=8, decoder_depth=2, decoder_heads=2)
NEAR = dict(rtol=1e-9, atol=1e-11)


def given(case):
    return {k.removeprefix(f"{case}/"): v for k, v in RECORDED.items() if k.startswith(f"{case}/")}


def built(**settings):
    torch.manual_seed(0)
    return CroCo(**{**SMALL, **settings}).double()


def images(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same_gradients(case, model, names):
    theirs = {k.removeprefix("dw/"): v for k, v in given(case).items() if k.startswith("dw/")}
    shapes = CONFIG[case]["shapes"]
    full = {k: torch.full(s, torch.nan, dtype=torch.float64) for k, s in shapes.items()}
    wanted = convert({**full, **theirs}, model)
    held, compared = {n: p.grad for n, p in model.named_parameters()}, 0
    for name, grad in wanted.items():
        known = ~grad.isnan()
        if known.any():
            compared += 1
            torch.testing.assert_close(held[name][known], grad[known], **NEAR)
    assert compared >= names


@pytest.mark.parametrize("case", ["cosine", "cosine_normed", "rotary", "plain_memory"])
def test_the_authors_network_loss_and_gradients(case):
    config, held = CONFIG[case], given(case)
    model = attnlib.create_model("croco_base", **config["settings"]).double()
    load_pretrained(model, synthetic(config["shapes"]))
    mask = random_mask(2, 16, ratio=0.75, noise=held["noise"])
    assert mask.equal(held["mask"])
    a, b = (RECORDED[f"views/{k}"].double().requires_grad_() for k in ("image1", "image2"))
    found = model(a, b, mask)
    torch.testing.assert_close(found.patches[:, :, ::7], held["y"], **NEAR)
    (loss,) = model.loss(found, a.detach()).values()
    torch.testing.assert_close(loss, held["loss"], **NEAR)
    loss.backward()
    for x, name in ((a, "dx1"), (b, "dx2")):
        torch.testing.assert_close(x.grad.flatten(1)[:, ::11], held[name], **NEAR)
    same_gradients(case, model, 6)


@pytest.mark.parametrize(("case", "form"), [("monocular", CroCoMonocular), ("binocular", CroCoBinocular)])
def test_the_authors_downstream_forms(case, form):
    config, held = CONFIG[case], given(case)
    model = form(CroCo(**config["settings"]), 2, "dpt", layer_dims=(4, 4, 6, 6), feature_dim=8, last_dim=4).double()
    assert list(model.head.levels) == config["hooks"]
    model.load_state_dict(convert(synthetic(config["shapes"]), model))
    xs = [held[f"x{i}"].double().requires_grad_() for i in range(1 if case == "monocular" else 2)]
    y = model(*xs)
    torch.testing.assert_close(y[:, :, ::3, ::2], held["y"], **NEAR)
    (y * held["g"]).sum().backward()
    for i, x in enumerate(xs):
        torch.testing.assert_close(x.grad.flatten(1)[:, ::11], held[f"dx{i}"], **NEAR)
    same_gradients(case, model, 4)


STEREO = Recorded("croco-stereoflow").tensors


@pytest.mark.parametrize("case", ["log", "log_most", "bounded", "bounded-log", "bounded-log_most"])
def test_the_authors_laplacian_losses(case):
    kind, most = case.removesuffix("_most"), {"log_most": 3.0, "bounded-log_most": 4.0, "bounded": 1e4}.get(case)
    p, c, target = drawn("p", (2, 2, 5, 6)), 2 * drawn("c", (2, 1, 5, 6)), 3 * drawn("t", (2, 2, 5, 6))
    target[0, :, 1, 2] = torch.inf
    p.requires_grad_(), c.requires_grad_()
    loss = laplacian_loss(p, c, target, kind, most)
    torch.testing.assert_close(loss, STEREO[f"{case}/loss"][0], **NEAR)
    for ours, name in zip(torch.autograd.grad(loss, [p, c]), ("dp", "dc"), strict=True):
        torch.testing.assert_close(ours, STEREO[f"{case}/{name}"], **NEAR)
    for wrong, match in ((target[:1], "target must be"), (torch.full_like(target, torch.nan), "no finite place")):
        with pytest.raises(ValueError, match=match):
            laplacian_loss(p, c, wrong, kind, most)
    with pytest.raises(ValueError, match="spread must be"):
        laplacian_loss(p, c[:, 0], target, kind, most)


@pytest.mark.parametrize(
    ("case", "tile", "overlap", "trust"), [("stereo", (8, 10), 0.5, (15, 3)), ("flow", 9, 0.3, (10, 5))]
)
def test_tiles_are_weighed_as_the_authors_do(case, tile, overlap, trust, monkeypatch):
    """A convolution stands in for the network, here and in the recording."""
    w = drawn("w", (3, 3, 3, 3))
    model = CroCoBinocular(built(img_size=16, positions="rotary"), 2, spread="bounded").double()
    monkeypatch.setattr(model, "forward", lambda a, b: F.conv2d(a - 2 * b, w, padding=1))
    a, b = drawn("a", (2, 3, 21, 26)), drawn("b", (2, 3, 21, 26))
    torch.testing.assert_close(model.predict(a, b, tile, overlap, trust), STEREO[f"tiles/{case}"], **NEAR)
    assert model.predict(a, b).equal(model(a, b)[:, :2])
    torch.testing.assert_close(model.predict(a, b, 99), model(a, b)[:, :2])  # no larger than the pictures
    for wrong in (dict(overlap=1.0), dict(tile=0), dict(trust=(-1.0, 3.0))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.predict(a, b, **{"tile": 9, **wrong})


def test_a_spread_is_one_more_channel_and_is_learned():
    torch.manual_seed(0)
    model = CroCoBinocular(built(img_size=16, positions="rotary").float(), spread="log", most=50.0)
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    y = model(a, b)
    assert y.shape == (2, 2, 16, 16) and model.predict(a, b, 8).shape == (2, 1, 16, 16) and model.training
    target = torch.zeros(2, 1, 16, 16)
    target[..., :8] = torch.randn(2, 1, 16, 8) * 10  # what cannot be known
    a[..., :8] = 0  # and where
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        adam.zero_grad()
        (loss,) = model.loss(model(a, b), target).values()
        loss.backward()
        adam.step()
    spread = model(a, b)[:, 1].detach()
    assert float(spread[..., :8].mean()) > float(spread[..., 8:].mean()) + 1
    assert set(CroCoBinocular(built()).loss(y[:, :1], target)) == {"l1"}
    with pytest.raises(ValueError, match="spread"):
        CroCoBinocular(built(), spread="wide")


def test_all_patches_may_be_compared():
    x, y = drawn("x", (2, 4, 12)), drawn("y", (2, 4, 12))
    model = CroCo(4, 2, dim=8, depth=1, num_heads=1, decoder_dim=8, decoder_depth=1, decoder_heads=1, masked=False)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.bool)
    image = from_patches(y, (4, 4), 2)
    (loss,) = model.double().loss(Completed(x, mask), image).values()
    torch.testing.assert_close(loss, STEREO["all"][0], **NEAR)


def test_every_entry_is_accounted_for():
    weights = synthetic(CONFIG["cosine"]["shapes"])
    model = attnlib.create_model("croco_base", **CONFIG["cosine"]["settings"])
    with pytest.raises(ValueError, match="mine"):
        load_pretrained(model, {**weights, "mine": torch.ones(1)})
    weights.pop("enc_norm.bias")
    with pytest.raises(ValueError, match="missing"):
        load_pretrained(model, weights)


def test_initial_values():
    m = CroCo(**SMALL)
    for name, p in m.named_parameters():
        if "norm" in name:
            assert bool((p == (1 if name.endswith("weight") else 0)).all())
        elif name.endswith("bias") and "stem" not in name:
            assert not p.any()
        elif name.endswith(".kv.weight"):
            assert (6 / 24) ** 0.5 < p.abs().max() <= (6 / 16) ** 0.5  # square, not twice as high
    assert 0.005 < m.decoder.mask_token.std() < 0.05


# ---- what the card asks


def test_exactly_176_of_196_are_hidden_and_only_they_are_learned():
    mask = random_mask(64, 196)
    assert bool((mask.sum(1) == 176).all()) and len(mask.unique(dim=0)) == 64
    assert (random_mask(4000, 10, 5).float().mean(0) - 0.5).abs().max() < 0.05
    m, a, b = built(mask_ratio=0.75), images(2, 3, 32, 32), images(2, 3, 32, 32, seed=2)
    found = m(a, b)
    assert bool((found.mask.sum(1) == 12).all())
    seen = from_patches((~found.mask).double().unsqueeze(-1).expand(-1, -1, 192), (32, 32), 8).bool()
    changed = torch.where(seen, a + 5, a)
    torch.testing.assert_close(m.loss(found, changed)["pixels"], m.loss(found, a)["pixels"])
    # what is hidden does not reach the prediction either
    torch.testing.assert_close(m(torch.where(seen, a, a - 3), b, found.mask).patches, found.patches)


def test_it_reads_the_second_view_in_any_order():
    m, a, b = built(positions="rotary"), images(2, 3, 32, 32), images(2, 3, 32, 32, seed=2).requires_grad_()
    mask = random_mask(2, 16, 12)
    m(a, b, mask).patches.square().sum().backward()
    assert b.grad.abs().max() > 0
    first, second = m.encoder(a, mask, 12), m.encoder(b.detach())
    x, memory = m.decoder.placed(first.levels[-1], mask), m.decoder.embed(second.levels[-1])
    coords = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    plain = m.decoder(x, coords, memory, coords)[-1]
    torch.testing.assert_close(m.decoder(x, coords, memory[:, order], coords[order])[-1], plain)
    torch.testing.assert_close(m.head(plain), m(a, b, mask).patches)


def test_without_cross_attention_it_is_a_masked_autoencoder():
    m, a, b = built(), images(2, 3, 32, 32), images(2, 3, 32, 32, seed=2)
    for block in m.decoder.blocks:
        nn.init.zeros_(block.cross.proj.weight)
    mask = random_mask(2, 16, 12)
    torch.testing.assert_close(m(a, b, mask).patches, m(a, b + 1, mask).patches)
    x = to_patches(a, 8) @ m.encoder.stem.weight.permute(2, 3, 1, 0).flatten(0, 2) + m.encoder.stem.bias
    x = x + fixed_positions((4, 4), 16).double()
    rows = []
    for i in range(2):
        seen = m.encoder.body(x[i : i + 1, ~mask[i]])[-1]
        full = m.decoder.mask_token.expand(1, 16, -1).clone()
        full[:, ~mask[i]] = m.decoder.embed(seen)
        z = full + fixed_positions((4, 4), 8).double()
        for block in m.decoder.blocks:
            z = z + block.attn(block.norm1(z), None)
            z = z + block.mlp(block.norm3(z))
        rows.append(m.head(m.decoder.norm(z)))
    torch.testing.assert_close(m(a, b, mask).patches, torch.cat(rows), **NEAR)


def test_counts_of_the_card():
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    with torch.device("meta"):
        assert count(attnlib.create_model("croco_base")) == 120_076_288
        assert count(attnlib.create_model("croco_v2_large")) == 417_918_720


def test_a_view_of_the_scene_helps_and_another_does_not():
    """Pictures of random squares; the second view is the picture moved by a square, or another picture."""

    def world(count, g, related):
        a = torch.randint(0, 2, (count, 1, 4, 4), generator=g).float()
        a = a.repeat_interleave(2, 2).repeat_interleave(2, 3)
        b = (a if related else a.roll(1, 0)).roll(2, -1)
        return {"image1": a, "image2": b, "target": a}

    loss = {}
    for related in (True, False):
        torch.manual_seed(0)
        settings = dict(mlp_ratio=2.0, mask_ratio=0.75, positions="rotary", rotary_base=10.0)
        m = CroCo(8, 2, 1, 16, 1, 2, 16, 1, 2, **settings)
        o = Optimizers(lambda _, p: torch.optim.AdamW(p, 1e-2))
        g = torch.Generator().manual_seed(1)
        for _ in range(60):
            train_batch(m, world(32, g, related), o, clip=1.0)
        test = world(64, torch.Generator().manual_seed(9), related)
        mask = m.draw_mask(test["image1"], torch.Generator().manual_seed(2))
        with torch.no_grad():
            loss[related] = float(m.loss(m(test["image1"], test["image2"], mask), test["target"])["pixels"])
    assert loss[True] < 0.5 * loss[False], loss


# ---- sizes, patches, the world outside


@pytest.mark.parametrize("positions", ["cosine", "rotary"])
@pytest.mark.parametrize("size", [(40, 24), (33, 27), (8, 16)])
def test_any_size(positions, size):
    m, a, b = built(positions=positions, mask_ratio=0.5), images(2, 3, *size), images(2, 3, 17, 41, seed=2)
    found = m(a, b)
    loss = m.loss(found, a)["pixels"]
    assert loss.isfinite() and m.predict(a, b).shape == a.shape
    hidden = from_patches(found.mask.double().unsqueeze(-1).expand(-1, -1, 192), size, 8).bool()
    rebuilt = from_patches(found.patches, size, 8)
    per_patch = (rebuilt - a).square() * hidden
    known = to_patches(torch.ones_like(a[:1]), 8).sum(-1)
    error = (to_patches(per_patch, 8).sum(-1) / known)[found.mask]
    torch.testing.assert_close(loss, error.mean())
    for form, xs in ((CroCoMonocular, (a,)), (CroCoBinocular, (a, b))):
        answer = form(m, 2)
        assert answer(*xs).shape == (2, 2, *size)
        answer.loss(answer(*xs), torch.zeros(2, 2, *size).double())["l1"].backward()
        assert all(p.grad is not None for p in answer.parameters())


def test_patches_go_there_and_back_in_any_rank():
    for shape, size in (((7,), 3), ((8, 5), (2, 3)), ((5, 4, 7), (2, 4, 3))):
        x = images(2, 3, *shape)
        rows = to_patches(x, size)
        assert from_patches(rows, shape, size).equal(x)
    x = images(2, 3, 8, 8)
    assert to_patches(x, 4)[0, 1, 5].equal(x[0, 2, 0, 5])  # pixels first, then channels
    rows = to_patches(x, 4)
    torch.testing.assert_close(standardized(rows)[0], standardized(rows, torch.ones_like(rows))[0])
    flat = torch.ones(1, 3, 8, 8)
    assert not standardized(to_patches(flat, 4))[0].any()
    assert patch_error(torch.zeros(1, 4, 48), flat, None, 4, normalize=True) == 0


def test_positions_are_stretched_to_another_grid_as_the_release_does():
    m = built()
    tokens = m.encoder(images(1, 3, 48, 32)).levels[-1]
    table = fixed_positions(m.encoder.grid, 16).to(next(m.parameters())).T.view(1, 16, 4, 4)
    wide = nn.functional.interpolate(table.float(), size=(6, 4), mode="bicubic", align_corners=False).double()
    x = m.encoder.stem(images(1, 3, 48, 32)).flatten(2).mT + wide.flatten(2).mT
    torch.testing.assert_close(tokens, m.encoder.body(x)[-1], rtol=1e-6, atol=1e-6)


def test_a_completed_picture_keeps_what_was_seen():
    for normed in (False, True):
        m, a = built(norm_targets=normed), images(2, 3, 32, 32)
        mask = m.draw_mask(a, torch.Generator().manual_seed(1))
        full = m.predict(a, a, mask)
        hidden = from_patches(mask.double().unsqueeze(-1).expand(-1, -1, 192), (32, 32), 8).bool()
        assert full[~hidden].equal(a[~hidden]) and not torch.allclose(full[hidden], a[hidden])


def test_the_world_outside():
    m, a, b = built(mask_ratio=0.75).eval(), images(2, 3, 32, 32), images(2, 3, 32, 32, seed=2)
    mask = random_mask(2, 16, 12)
    want = m(a, b, mask).patches
    torch.testing.assert_close(copy.deepcopy(m)(a, b, mask.view(2, 4, 4)).patches, want)
    made = torch.export.export(m, (a, b, mask), strict=False).module()
    torch.testing.assert_close(made(a, b, mask).patches, want)
    torch.testing.assert_close(torch.compile(m, backend="eager")(a, b, mask).patches, want)
    torch.testing.assert_close(m(a.to(memory_format=torch.channels_last), b, mask).patches, want)
    again = CroCo(**{**SMALL, "mask_ratio": 0.75}).double()
    again.load_state_dict(m.state_dict())
    torch.testing.assert_close(again(a, b, mask).patches, want)
    half = copy.deepcopy(m).bfloat16()
    assert half.loss(half(a.bfloat16(), b.bfloat16()), a.bfloat16())["pixels"].isfinite()
    assert m(a[:0], b[:0]).patches.shape == (0, 16, 192)
    state = torch.get_rng_state()
    m(a, b, mask)
    m.draw_mask(a, torch.Generator().manual_seed(0))
    assert state.equal(torch.get_rng_state())


def test_what_is_refused():
    m, a = built(), images(2, 3, 32, 32)
    none, every = torch.zeros(2, 16, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)
    uneven = none.clone()
    uneven[0, :3] = uneven[1, :4] = True
    for mask, said in (
        (none, r"hides nothing.*\(True is hidden\)"), (every, "hides everything"), (uneven, "equally many.* 3 to 4"),
        (every[:, :4], "mask must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            m(a, a, mask)
    with pytest.raises(TypeError, match="mask must be boolean"):
        m(a, a, every.double())
    with pytest.raises(ValueError, match="image1 must be a tensor of shape"):
        m(a[:, :1], a)
    with pytest.raises(ValueError, match="equally many"):
        m(a, a[:1])
    with pytest.raises(ValueError, match="nothing to predict"):
        m(images(1, 3, 8, 8), a[:1])  # one patch: 90 % of it is none
    for settings, said in (
        (dict(mask_ratio=1.0), "mask_ratio"), (dict(positions="learned"), "positions"),
        (dict(num_heads=3), "num_heads"), (dict(decoder_heads=3), "decoder_heads"),
        (dict(positions="rotary", num_heads=8), "num_heads=8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            built(**settings)
    with pytest.raises(ValueError, match="patch_size=8"):
        CroCoMonocular(m, head="dpt")
    with pytest.raises(TypeError, match="model must be a CroCo"):
        CroCoMonocular(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="prediction must be"):
        m.loss(m(a, a), images(2, 3, 40, 40))
    with pytest.raises(ValueError, match="mask hides nothing"):
        m.loss(m(a[:0], a[:0]), a[:0])
    for mask in (every[:, :4], every.double()):
        with pytest.raises(ValueError, match=r"mask must be boolean \(2, 16\)"):
            patch_error(torch.zeros(2, 16, 192), a, mask, 8)
    with pytest.raises(ValueError, match=r"x must be \(B, C, \*grid\)"):
        to_patches(torch.zeros(2, 3), 2)
    with pytest.raises(ValueError, match=r"rows must be \(B, 4, 8\) for 2 channels"):
        from_patches(torch.zeros(2, 4, 12), (4, 4), 2, 2)
    answer = CroCoMonocular(m)
    with pytest.raises(ValueError, match="no finite place"):
        answer.loss(answer(a), torch.full((2, 1, 32, 32), torch.nan))
    for ratio, said in ((0.0, "nothing to predict"), (1.0, "nothing to see")):
        with pytest.raises(ValueError, match=said):
            random_mask(1, 16, ratio=ratio)
