"""Masked pretraining: the authors' masks, losses and gradients; any backbone, any frozen teacher; refusals."""

import json

import pytest
import torch
from safetensors import safe_open

import attnlib
from attnlib.models.backbones.eva import eva_pretraining
from attnlib.models.build import load_pretrained
from attnlib.models.pretrain import MaskedPretraining, block_mask, cosine_loss
from tests.parity import HERE, synthetic

with safe_open(HERE / "pretraining" / "eva.safetensors", "pt") as f:
    RECORDED = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    CONFIG = json.loads(f.metadata()["config"])

TINY = dict(embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, num_classes=0, img_size=16, patch_size=4)
DINAT = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3, dilations=[[1], [1]], num_classes=0)


def student(name="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**(TINY if "vit" in name else DINAT), **settings})


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(width, size=4):
    """A teacher that is no model: the mean colour of patches, turned."""
    turn = images(3, width, seed=9)
    return lambda x: torch.nn.functional.avg_pool2d(x, size).permute(0, 2, 3, 1) @ turn


# ---- the authors'


@pytest.mark.parametrize("case", ["plain", "tenth", "tables"])
def test_a_step_is_the_authors(case):
    given = {k.removeprefix(f"{case}/"): v for k, v in RECORDED.items() if k.startswith(f"{case}/")}
    config = CONFIG[case]
    weights = synthetic(config["shapes"])
    model = attnlib.create_model("eva_giant_patch14_224", **config["settings"])
    load_pretrained(model, weights)
    step = MaskedPretraining(model, lambda x: given["target"], 10)
    assert isinstance(step.norm, torch.nn.Identity)
    own = {"mask_token": weights["mask_token"].flatten()}
    own |= {f"predict.{k}": weights[f"lm_head.{k}"] for k in ("weight", "bias")}
    step.load_state_dict(own, strict=False)
    x = given["images"].clone().requires_grad_()
    out = step(x, given["mask"])
    torch.testing.assert_close(out.loss, given["loss"], atol=1e-6, rtol=0)
    assert (out.prediction - given["prediction"]).abs().max() < 1e-5 * given["prediction"].abs().max()
    out.loss.backward()
    assert (x.grad - given["dx"]).abs().max() < 1e-5 * given["dx"].abs().max()
    ours = {n: p.grad for n, p in step.named_parameters()}
    pairs = {
        "mask_token": "mask_token", "lm_head.weight": "predict.weight", "lm_head.bias": "predict.bias",
        "patch_embed.proj.weight": "student.stem.proj.weight", "cls_token": "student.cls_token",
        "blocks.0.attn.q_bias": "student.stages.0.mixer.inner.q.bias", "norm.weight": "student.norm.weight",
        "blocks.1.mlp.fc2.weight": "student.stages.1.mlp.inner.fc2.weight",
    }  # fmt: skip
    for theirs, name in pairs.items():
        expected = given[f"dw/{theirs}"]
        assert (ours[name].view_as(expected) - expected).abs().max() < 1e-5 * expected.abs().max(), theirs


@pytest.mark.parametrize("case", [k for k in CONFIG if k.startswith("masks/")])
def test_masks_are_the_authors(case):
    config = dict(CONFIG[case])
    generator = torch.Generator().manual_seed(config.pop("seed"))
    assert block_mask(batch=6, generator=generator, **config).equal(RECORDED[case])


def test_initial_weights_are_cut_off_at_one_deviation():
    torch.manual_seed(0)
    model = attnlib.create_model(
        "eva_giant_patch14_224", embed_dim=128, depth=2, num_heads=2, mlp_ratio=2.0, img_size=28, num_classes=0,
        global_pool="token",
    )  # fmt: skip
    step = eva_pretraining(model, features(6, 14), 6)
    inner = model.stages[1].mixer.inner
    for weight in (inner.q.weight, model.stem.proj.weight, model.pos_embed, step.mask_token):
        assert 0.0145 < weight.abs().max() <= 0.015 and 0.0072 < weight.std() < 0.0092
    assert inner.proj.weight.abs().max() <= 0.0075 and not step.predict.bias.any()


# ---- masks


def test_masks_hide_nearly_as_many_as_asked():
    masks = block_mask((14, 14), count=105, batch=50, generator=torch.Generator().manual_seed(0))
    hidden = masks.flatten(1).sum(1)
    assert hidden.max() == 105 and hidden.min() > 95 and masks.shape == (50, 14, 14)
    assert block_mask((16, 16), ratio=0.25, generator=torch.Generator().manual_seed(0)).sum() <= 64
    assert block_mask((2, 2), count=1).sum() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ratio=0.05), "ratio=0.05 of 16 patches leaves nothing to predict"),
        (dict(count=0), "count=0 leaves nothing to predict"),
        (dict(count=17), "more than the 16 patches"),
        (dict(ratio=1.5), "ratio"),
        (dict(min_aspect=0), "min_aspect"),
        (dict(least=0), "least"),
        (dict(grid=(4,)), "grid"),
    ],
)
def test_masks_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        block_mask(**{"grid": (4, 4), **settings})


# ---- the loss


def test_the_loss_lies_between_minus_one_and_one():
    t = images(9, 5)
    torch.testing.assert_close(cosine_loss(3.0 * t, t), torch.tensor(-1.0))
    torch.testing.assert_close(cosine_loss(-t, t), torch.tensor(1.0))
    assert cosine_loss(t.bfloat16(), t.bfloat16()).dtype == torch.float32


def test_patches_that_are_seen_get_no_gradient_from_the_head():
    step = MaskedPretraining(student(), features(6), 6)
    mask = block_mask((4, 4), count=5, least=2)
    held = []
    handle = step.student.norm.register_forward_hook(lambda m, a, y: (y.retain_grad(), held.append(y))[1])
    step(images(1, 3, 16, 16), mask).loss.backward()
    handle.remove()
    touched = held[0].grad[0, 1:].abs().sum(-1).view(4, 4) > 0
    assert touched.equal(mask[0])
    assert step.mask_token.grad.any()


def test_hidden_pixels_are_hidden():
    step = MaskedPretraining(student(), features(6), 6).eval()
    x, mask = images(1, 3, 16, 16), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    other = x.clone()
    other[:, :, 4:8, 8:12] = 7.0
    torch.testing.assert_close(step.features(other, mask), step.features(x, mask))
    assert not torch.allclose(step.features(other), step.features(x))


def test_without_a_mask_it_is_the_backbone():
    model = student()
    step = MaskedPretraining(model, features(6), 6)
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(step.features(x).flatten(1, 2), model.forward_features(x)[:, 1:])


# ---- any backbone, any teacher


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "dinat_mini"])
def test_a_frozen_random_teacher_is_learned(name):
    torch.manual_seed(1)
    teacher = student("vit_tiny_patch16_224", patch_size=8 if "dinat" in name else 4, embed_dim=12)
    step = MaskedPretraining(student(name), teacher, 12)
    assert not any(n.startswith("teacher") for n in step.state_dict())
    g = torch.Generator().manual_seed(0)
    opt = torch.optim.AdamW(step.parameters(), lr=5e-3)
    losses = []
    pictures = images(64, 3, 1, 1, seed=4).expand(-1, -1, 16, 16) + 0.1 * images(64, 3, 16, 16)
    grid = (2, 2) if "dinat" in name else (4, 4)
    for _ in range(100):
        x = pictures[torch.randint(64, (16,), generator=g)]
        out = step(x, block_mask(grid, ratio=0.4, batch=16, least=1, generator=g))
        opt.zero_grad()
        out.loss.backward()
        opt.step()
        losses.append(float(out.loss.detach()))
    assert all(p.grad is None for p in teacher.parameters()) and teacher.training
    assert sum(losses[-10:]) / 10 < -0.5 and losses[0] > -0.2


def test_a_teacher_may_see_the_crop_at_another_size():
    step = MaskedPretraining(student(), features(6, 8), 6)
    x, mask = images(1, 3, 16, 16), torch.ones(1, 16, dtype=torch.bool)
    out = step(x, mask, torch.nn.functional.interpolate(x, (32, 32)))
    assert out.prediction.shape == out.target.shape == (16, 6) and -1 <= out.loss <= 1
    assert MaskedPretraining(student(), features(6), 6, loss="mse")(x, mask).loss > 0


@pytest.mark.parametrize(
    ("teacher", "mask", "message"),
    [
        (features(6, 8), (1, 4, 4), "teacher is on another patch grid"),
        (features(5), (1, 4, 4), "features of width 5, but target_dim=6"),
        (lambda x: x.mean((1, 2, 3)), (1, 4, 4), "teacher must give"),
        (features(6), (1, 2, 2), "the last map has patches"),
        (features(6), (2, 4, 4), "one per image"),
    ],
)
def test_bad_teachers_and_masks(teacher, mask, message):
    step = MaskedPretraining(student(), teacher, 6)
    with pytest.raises(ValueError, match=message):
        step(images(1, 3, 16, 16), torch.ones(mask, dtype=torch.bool))


def test_bad_settings():
    with pytest.raises(ValueError, match="nothing to predict"):
        MaskedPretraining(student(), features(6), 6)(images(1, 3, 16, 16), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="loss="):
        MaskedPretraining(student(), features(6), 6, loss="l1")
    with pytest.raises(TypeError, match="student"):
        MaskedPretraining(torch.nn.Linear(2, 2), features(6), 6)
    with pytest.raises(TypeError, match="teacher"):
        MaskedPretraining(student(), None, 6)
