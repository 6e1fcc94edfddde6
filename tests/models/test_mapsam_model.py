"""MapSAM: held to the authors' model, its counts, its masks and points, and batches."""

import copy
import json
from pathlib import Path

import pytest
import torch
from parity import HERE, by_name
from safetensors import safe_open

from attnlib.models.multimodal.mapsam import DoRAQKV, MapSAM, convert_state_dict, resized
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.ops.points import extreme_points

transformers = pytest.importorskip("transformers")
F64 = torch.float64

with safe_open(Path(__file__).parents[1] / "fixtures" / "models" / "mapsam.safetensors", "pt") as f:
    GIVEN = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    CONFIG = json.loads(f.metadata()["config"])


def sam_model(seed=0, masks=3, **changes):
    torch.manual_seed(seed)
    parts = {name: {**CONFIG[name], **changes.get(name, {})} for name in ("vision", "prompt", "decoder")}
    config = transformers.SamConfig(
        vision_config=parts["vision"], prompt_encoder_config=parts["prompt"],
        mask_decoder_config=dict(num_multimask_outputs=masks, layer_norm_eps=1e-5, **parts["decoder"]),
    )  # fmt: skip
    model = transformers.SamModel(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def small(**settings):
    changes = {name: {"image_size": 64, "patch_size": 16} for name in ("vision", "prompt")}
    changes["vision"]["num_hidden_layers"] = 5
    changes["vision"]["global_attn_indexes"] = [4]
    return MapSAM(sam_model(**changes), **{"hidden": (8, 4), **settings})


def released(k):
    theirs = {n.split("/sd/")[1]: t.double() for n, t in GIVEN.items() if n.startswith("k1/sd/")}
    theirs |= {n.split("/sd/")[1]: t.double() for n, t in GIVEN.items() if n.startswith(f"k{k}/sd/")}
    model = MapSAM(sam_model(), num_classes=k, hidden=(12, 8), compat="authors").double()
    ours = convert_state_dict(theirs)
    assert len(ours) == len(theirs) + 1  # the random matrix of places stands twice in transformers' model
    model.load_state_dict(ours)  # strict
    return model


def grads_of(model, case):
    out = model(GIVEN[f"{case}/x"].double().permute(0, 2, 3, 1))
    coarse = torch.nn.functional.interpolate(out.coarse[:, None], (16, 16), mode="bilinear")
    loss = (out.low * GIVEN[f"{case}/w"]).sum() + (coarse * GIVEN[f"{case}/wc"]).sum() + out.iou.sum()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return out, coarse, {n: g for (n, _), g in zip(named, grads, strict=True)}


@pytest.mark.parametrize("k", [1, 2])
def test_the_released_model(k):
    out, coarse, grads = grads_of(released(k), f"k{k}")
    for ours, name in ((out.low, "low"), (out.iou, "iou"), (coarse, "coarse4")):
        theirs = GIVEN[f"k{k}/{name}"]
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), name
    told = {n.split("/grad/")[1]: t for n, t in GIVEN.items() if n.startswith(f"k{k}/grad/")}
    for name, theirs in told.items():
        (mine,) = [n for n in convert_state_dict({name: theirs}) if "shared_image" not in n]
        assert (grads[mine] - theirs).abs().max() <= 1e-7 * theirs.abs().max() + 1e-12, name
    assert k != 1 or len(told) > 20


def test_the_released_losses():
    model = released(1)
    out = model(GIVEN["k1/x"].double().permute(0, 2, 3, 1))
    terms = model.loss(out, GIVEN["k1/target"])
    focal, dice = GIVEN["k1/losses"]
    torch.testing.assert_close(terms["focal"], 0.2 * focal, rtol=1e-9, atol=0)
    torch.testing.assert_close(terms["dice"], 0.8 * dice, rtol=1e-9, atol=0)
    assert set(terms) == {"focal", "dice", "coarse_focal", "coarse_dice"}


def test_nothing_changes_at_first_and_a_merged_weight_is_the_forward():
    torch.manual_seed(0)
    plain = torch.nn.Linear(12, 36)
    tuned, x = DoRAQKV(plain, 4), torch.randn(3, 5, 12)
    torch.testing.assert_close(tuned(x), plain(x), atol=1e-5, rtol=1e-5)
    for p in (tuned.b_q, tuned.b_v):
        torch.nn.init.normal_(p)
    torch.testing.assert_close(tuned.deployed()(x), tuned(x))
    assert not torch.allclose(tuned(x), plain(x))
    with torch.no_grad():
        tuned.m_q.mul_(-2)
    norms = tuned.merged()[:12].norm(dim=0)
    torch.testing.assert_close(norms, tuned.m_q[0].abs())  # one per input column
    assert tuned.merged()[12:24].equal(plain.weight[12:24])  # keys stay
    with torch.no_grad():
        plain.weight[:, 3] = 0
    assert DoRAQKV(plain, 2)(x).isfinite().all()
    with pytest.raises(ValueError, match="qkv must map C to 3 C"):
        DoRAQKV(torch.nn.Linear(4, 8))


def test_counts_of_vit_b():
    with torch.device("meta"):
        sam = transformers.SamModel(transformers.SamConfig())
        model = MapSAM(sam)
    dora = [p for m in model.modules() if isinstance(m, DoRAQKV) for p in m.parameters() if p.requires_grad]
    assert sum(p.numel() for p in dora) == 165_888
    assert model.stored == [0, 4, 8] and len(model.heads) == 4
    assert all(not p.requires_grad for n, p in model.named_parameters() if model._own(n) is False)


def test_no_mask_and_no_target_are_sams_own_decoder():
    model = small(num_classes=4, rank=0).double()
    sam, features = model.sam, torch.randn(2, 16, 4, 4, dtype=F64)
    sparse, dense = sam.prompt_encoder(torch.rand(2, 1, 3, 2, dtype=F64) * 60, torch.ones(2, 1, 3).long(), None, None)
    open_ = torch.zeros(2, 16, dtype=torch.bool)
    nothing = torch.zeros(2, 1, 1, 16, dtype=F64)
    model._hide = lambda hidden, dtype: torch.zeros_like(hidden, dtype=dtype)[:, None, None]
    low, iou = model._decode(features, sparse, dense, model._hide(open_, F64), nothing)
    place = sam.get_image_wide_positional_embeddings().expand(2, -1, -1, -1)
    theirs, quality = sam.mask_decoder(features, place, sparse, dense, True)
    torch.testing.assert_close(low[:, 1:], theirs[:, 0])
    torch.testing.assert_close(iou[:, 1:], quality[:, 0])


def test_hidden_places_get_nothing_and_all_hidden_is_all_seen():
    model = small().double()
    attend = model.sam.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    q, kv = torch.randn(2, 1, 3, 16, dtype=F64), torch.randn(2, 1, 16, 16, dtype=F64)
    hidden = torch.ones(2, 16, dtype=torch.bool)
    hidden[0, :5] = False
    mask = model._hide(hidden, F64)
    out = model._cross(attend, q, kv, kv, mask)
    torch.testing.assert_close(out[:1], model._cross(attend, q[:1], kv[:1, :, :5], kv[:1, :, :5], mask[:1, ..., :5]))
    torch.testing.assert_close(out[1:], attend(query=q[1:], key=kv[1:], value=kv[1:])[0])  # none is left: all are seen
    theirs = small(compat="authors").double()
    flat = theirs._cross(attend, q[:1], kv[:1], kv[:1], theirs._hide(hidden[:1], F64))
    mean = attend.out_proj(attend.v_proj(kv[:1, :, :5]).mean(2, keepdim=True))
    assert (flat - mean).abs().max() < 0.5 * (out[:1] - mean).abs().max()  # two softmaxes are nearly uniform


@pytest.mark.parametrize("shape", [(9, 13), (16, 5)])
def test_points_are_the_planted_extremes(shape):
    scores = torch.zeros(1, *shape)
    scores[0, 3, 4], scores[0, 7, 1] = 2.0, 1.5
    scores[0, 1, 2], scores[0, 8, 3] = -2.0, -1.5
    points, labels = extreme_points(scores, shape, count=2, compat="authors")
    assert points[0].tolist() == [[4, 3], [1, 7], [2, 1], [3, 8]] and labels.tolist() == [[1, 1, 0, 0]]


def test_a_batch_is_its_images():
    model = small(num_classes=2).double().eval()
    x = torch.randn(3, 64, 64, 3, dtype=F64)
    before = x.clone()
    whole = model(x)
    for n in range(3):
        for together, alone in zip(whole, model(x[n : n + 1]), strict=True):
            torch.testing.assert_close(together[n : n + 1], alone)
    assert x.equal(before) and model(x[:0]).masks.shape == (0, 2, 64, 64)
    assert model.predict(torch.rand(2, 50, 90, 3, dtype=F64)).shape == (2, 2, 50, 90)


def test_masks_that_are_empty_or_full_train_without_nan():
    for value in (-50.0, 50.0):
        model = small()
        for head in model.heads:
            torch.nn.init.zeros_(head[-1].weight)
            torch.nn.init.constant_(head[-1].bias, value)
        out = model(torch.randn(1, 64, 64, 3))  # the coarse mask is the same everywhere, too
        loss = sum(model.loss(out, torch.zeros(1, 16, 16)).values())
        assert loss.isfinite()
        for g in torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True):
            assert g is None or g.isfinite().all()


def test_it_trains_and_its_adapter_travels():
    torch.manual_seed(0)
    sam = sam_model(vision={"image_size": 64, "patch_size": 16, "num_hidden_layers": 2, "global_attn_indexes": [1]},
                    prompt={"image_size": 64, "patch_size": 16})  # fmt: skip
    model = MapSAM(sam, hidden=(8, 4))
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not model._own(n)}
    x, target = torch.randn(2, 64, 64, 3), torch.zeros(2, 64, 64)
    target[:, 16:40, 8:40] = 1
    x = x + 2 * target[..., None]
    optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 5e-3))
    losses = []
    for _ in range(12):
        losses.append(sum(model.loss(model(x), target).values()).item())
        train_batch(model, {"x": x, "target": target}, optimizers)
    assert losses[-1] < losses[0]
    assert all(model.state_dict()[n].equal(t) for n, t in frozen.items())
    other = MapSAM(sam, hidden=(8, 4))
    tensors = model.adapter()
    other.load_adapter(tensors)
    assert other(x).low.equal(model(x).low)
    assert sum(t.numel() for t in tensors.values()) < sum(t.numel() for t in model.state_dict().values())
    with pytest.raises(ValueError, match=r"tensors must be those of adapter\(\)"):
        other.load_adapter(dict(list(tensors.items())[1:]))
    assert copy.deepcopy(model)(x).low.equal(model(x).low)


def test_another_image_size():
    sam = sam_model()
    half = resized(sam, 32)
    assert half.vision_encoder.pos_embed.shape == (1, 4, 4, 16)
    assert half.vision_encoder.layers[2].attn.rel_pos_h.shape == (7, 8)
    assert half.vision_encoder.layers[0].attn.rel_pos_h.equal(sam.vision_encoder.layers[0].attn.rel_pos_h)
    assert MapSAM(half, hidden=(8, 4))(torch.randn(1, 32, 32, 3)).masks.shape == (1, 1, 32, 32)
    same = resized(sam, 64)
    assert all(t.equal(sam.state_dict()[n]) for n, t in same.state_dict().items())
    with pytest.raises(ValueError, match="image_size must be a multiple of the patch size 8"):
        resized(sam, 30)


def test_bad_input_is_refused_by_name():
    model = small()
    with pytest.raises(ValueError, match="x"):
        model(torch.randn(1, 32, 64, 3))
    with pytest.raises(ValueError, match="x"):
        model(torch.randn(1, 3, 64, 64))
    with pytest.raises(TypeError, match="x must be"):
        model(torch.zeros(1, 64, 64, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="sam must be transformers' SamModel"):
        MapSAM(torch.nn.Identity())
    with pytest.raises(ValueError, match="rank must be"):
        small(rank=-1)
    with pytest.raises(ValueError, match="num_classes must be"):
        small(num_classes=0)
    out = model(torch.randn(1, 64, 64, 3))
    with pytest.raises(ValueError, match=r"target must be \(1, H, W\)"):
        model.loss(out, torch.zeros(2, 16, 16))


def test_compiled_exported_and_in_bfloat16():
    model = small(num_classes=2).eval()
    x = torch.randn(2, 64, 64, 3)
    want = model(x)
    compiled = torch.compile(model, backend="eager")(x)
    for a, b in zip(compiled, want, strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(model, (x,)).module()(x)
    for a, b in zip(exported, want, strict=True):
        torch.testing.assert_close(a, b)
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16()).masks.isfinite().all()


def test_a_deep_encoder_with_few_changed_blocks_equals_the_authors():
    """Eighteen blocks, of which two are changed (``dora_layer``) and the first three stored ones have a head."""
    with safe_open(HERE / "mapsam-deep.safetensors", "pt") as f:
        held = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        shapes = json.loads(f.metadata()["shapes"])
    changes = {"vision": {"num_hidden_layers": 18, "global_attn_indexes": [5, 17]}}
    model = MapSAM(
        sam_model(**changes), rank=3, hidden=(12, 8), tuned=(3, 17), most=3, compat="authors"
    ).double()  # fmt: skip
    assert model.stored == [0, 4, 8] and len(model.heads) == 4
    # Coarse masks that are part of the image: with these biases.
    state = {k: by_name(k, v) + 0.35 * k.endswith("hint.6.bias") for k, v in shapes.items()}
    model.load_state_dict(convert_state_dict(state))
    out = model(by_name("image", [2, 3, 64, 64]).permute(0, 2, 3, 1))
    coarse = torch.nn.functional.interpolate(out.coarse[:, None], (16, 16), mode="bilinear")
    ((out.low * held["w"]).sum() + (coarse * held["wc"]).sum() + out.iou.sum()).backward()
    assert 0.1 < (out.coarse > 0).double().mean() < 0.9
    for ours, name in ((out.low, "low"), (out.iou, "iou"), (coarse, "coarse4")):
        assert (ours - held[name]).abs().max() <= 1e-9 * held[name].abs().max(), name
    grads = {n: p.grad for n, p in model.named_parameters()}
    told = {n.removeprefix("grad/"): t for n, t in held.items() if n.startswith("grad/")}
    assert len(told) == 5
    for name, theirs in told.items():
        (mine,) = convert_state_dict({name: theirs})
        assert theirs.any() and (grads[mine] - theirs).abs().max() <= 1e-7 * theirs.abs().max(), name
    changed = {n.split(".")[3] for n, p in model.named_parameters() if "vision_encoder" in n and p.requires_grad}
    assert changed == {"3", "17"}
    for bad in (dict(tuned=(12,)), dict(most=-1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MapSAM(sam_model(), **bad)
