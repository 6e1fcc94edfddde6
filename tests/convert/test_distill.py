"""Distillation: frozen teachers, maps held to the authors' UNIP, features, logits, and what is refused."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, synthetic
from safetensors import safe_open
from torch import nn

from attnlib.convert import FeatureLoss, LogitLoss, MapLoss, distill
from attnlib.convert.distill import Wanted, map_divergence, read
from attnlib.convert.folders import FolderMix
from attnlib.look import hybrid_layer, information_by_layer, mutual_information
from attnlib.models.build import create_model, load_pretrained
from attnlib.models.dense.heads import SegFormerHead, Segmenter
from attnlib.models.dense.pyramid import LastLayerPyramid


def vit(seed=0, **settings):
    given = dict(patch_size=4, img_size=16, embed_dim=12, depth=2, num_heads=2, num_classes=5)
    torch.manual_seed(seed)
    return create_model("vit_tiny_patch16_224", **{**given, **settings})


def images(n=2, side=16, seed=1):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


# ---- UNIP


@pytest.fixture(scope="module")
def recorded():
    with safe_open(HERE / "unip.safetensors", "pt") as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    shapes = json.loads(meta["shapes"])
    teacher = vit(embed_dim=24, depth=3, num_heads=4, num_classes=0)
    student = vit(num_heads=3, last_heads=4, num_classes=0)
    for model, name in ((teacher, "teacher"), (student, "student")):
        load_pretrained(model, synthetic(shapes[name]))
        model.pos_embed.requires_grad_(False)
        model.prefix_pos_embed.requires_grad_(False)
        model.double()
    return student, teacher, tensors, json.loads(meta["without_gradient"])


def test_maps_are_taught_as_the_authors_teach_them(recorded):
    student, teacher, tensors, silent = recorded
    lesson = distill(student, teacher, MapLoss(teacher=1))
    x = tensors["x"].double()
    scores = read(teacher, x, Wanted(scores=frozenset({1}))).scores[1]
    torch.testing.assert_close(scores[:1, :2].float(), tensors["teacher_scores"], rtol=1e-5, atol=1e-6)
    found = lesson(x)
    torch.testing.assert_close(found["total"].float().reshape(1), tensors["loss"], rtol=1e-5, atol=1e-7)
    found["total"].backward()
    block = student.stages[1].mixer.inner
    qkv = torch.cat([block.q.weight.grad, block.k.weight.grad, torch.zeros_like(block.v.weight)])
    ours = {
        "dw/blocks.1.attn.qkv.weight": qkv,
        "dw/blocks.0.mlp.fc1.weight": student.stages[0].mlp.inner.fc1.weight.grad,
        "dw/patch_embed.proj.weight": student.stem.proj.weight.grad,
        "dw/cls_token": student.cls_token.grad,
    }
    for name, grad in ours.items():
        theirs = tensors[name].reshape(grad.shape)
        torch.testing.assert_close(grad.float(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()), msg=name)
    without = [n for n, p in student.named_parameters() if p.grad is None and p.requires_grad]
    assert len(without) == len(silent) + 2  # our values have a map of their own, theirs a part of qkv
    behind = ("stages.1.mixer.inner.v", "stages.1.mixer.inner.proj", "stages.1.mlp", "norm")
    assert all(n.startswith(behind) for n in without)
    assert all(p.grad is None for p in teacher.parameters())


def test_map_divergence_is_zero_for_equal_maps_alone_and_over_keys():
    t, s = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    p, q = t.softmax(-1), s.softmax(-1)
    wanted = sum(
        float(p[b, h, i, k] * (p[b, h, i, k] / q[b, h, i, k]).log())
        for b in range(2) for h in range(3) for i in range(5) for k in range(7)
    ) / (2 * 3 * 5)  # fmt: skip
    assert math.isclose(float(map_divergence(s, t)), wanted, rel_tol=1e-12)
    assert float(map_divergence(t + 3.0, t)) < 1e-15  # a constant per row is no difference of maps
    hidden = t.masked_fill(torch.arange(7) > 3, float("-inf")).requires_grad_()
    loss = map_divergence(hidden, hidden.detach())
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(hidden.grad).all()


def test_nothing_behind_the_last_wanted_map_runs():
    model, ran = vit(depth=3), []
    for number, block in enumerate(model.stages):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    got = read(model, images(), Wanted(scores=frozenset({1})))
    assert ran == [0] and set(got.scores) == {1} and got.logits is None
    x = images()
    torch.testing.assert_close(model(x), model(x))  # nothing stays on the model
    assert len(ran) == 1 + 6


def test_student_maps_converge_to_the_teachers():
    teacher, student = vit(1, num_heads=2), vit(2, embed_dim=24, num_heads=3, last_heads=2)
    with torch.no_grad():
        for block in teacher.stages:
            block.mixer.inner.q.weight.mul_(10)
            block.mixer.inner.k.weight.mul_(10)
    lesson = distill(student, teacher, MapLoss())
    optimizer = torch.optim.Adam(lesson.parameters(), 5e-3)
    first = lesson(images(8))["total"].item()
    for step in range(80):
        optimizer.zero_grad()
        lesson(images(16, seed=step))["total"].backward()
        optimizer.step()
    last = lesson(images(8, seed=999))["total"].item()
    assert first > 0.05 and last < 1e-2, (first, last)


# ---- information of maps


def oracle(a):
    n, m = a.shape
    joint = a.double() / n
    q, k = joint.sum(1), joint.sum(0)
    told = sum(
        float(joint[i, j] * (joint[i, j] / (q[i] * k[j])).log()) for i in range(n) for j in range(m) if joint[i, j] > 0
    )
    entropies = [-sum(float(p * p.log()) for p in part if p > 0) for part in (q, k)]
    return told / math.sqrt(entropies[0] * entropies[1]) if min(entropies) > 1e-12 else 0.0


def test_mutual_information_is_its_definition():
    maps = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    found = mutual_information(maps)
    for b in range(3):
        for h in range(2):
            assert abs(float(found[b, h]) - oracle(maps[b, h])) < 1e-6
    assert ((found >= 0) & (found <= 1)).all()
    shuffled = maps[..., torch.randperm(6, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(mutual_information(shuffled), found)
    torch.testing.assert_close(mutual_information(torch.eye(5)), torch.tensor(1.0))
    one = torch.zeros(4, 4)
    one[:, 2] = 1
    assert float(mutual_information(one)) == 0 and float(mutual_information(torch.ones(1, 1))) == 0


def test_information_of_layers_streams_and_equals_that_of_the_maps():
    model = vit(depth=3).eval()
    batches = [images(2), images(3, seed=5)]
    found = information_by_layer(model, batches)
    wanted = Wanted(scores=frozenset({0, 1, 2}))
    for layer in range(3):
        maps = torch.cat([read(model, x, wanted).scores[layer].softmax(-1) for x in batches])
        assert abs(found[layer] - mutual_information(maps).mean().item()) < 1e-5
    assert hybrid_layer(found, found[1]) == 1
    with pytest.raises(ValueError, match="batches holds none"):
        information_by_layer(model, [])
    with pytest.raises(ValueError, match="target"):
        hybrid_layer(found, 2.0)


# ---- features, logits, and the frame


def test_features_and_logits():
    teacher, student = vit(1, embed_dim=24), vit(2)
    lesson = distill(student, teacher, FeatureLoss((12, 24), student=0, teacher=1), LogitLoss(2.0, 0.5), task=0.5)
    x, labels = images(), torch.tensor([1, 3])
    found = lesson(x, labels)
    assert set(found) == {"task", "features", "logits", "total"}
    maps = student.forward_intermediates(x, [0], norm=True, intermediates_only=True, output_fmt="NHWC")[0]
    target = teacher.forward_intermediates(x, [1], norm=True, intermediates_only=True, output_fmt="NHWC")[0]
    torch.testing.assert_close(found["features"], F.mse_loss(lesson.losses[0].project(maps), target))
    p, q = (m(x).div(2).log_softmax(-1) for m in (teacher, student))
    torch.testing.assert_close(found["logits"], 0.5 * 4 * F.kl_div(q, p, log_target=True, reduction="batchmean"))
    torch.testing.assert_close(found["task"], 0.5 * F.cross_entropy(student(x), labels))
    torch.testing.assert_close(found["total"], found["task"] + found["features"] + found["logits"])
    same = distill(copy.deepcopy(teacher), teacher, FeatureLoss((24, 24), project=False, loss="cosine"), LogitLoss())(x)
    assert abs(float(same["total"])) < 1e-6


def test_the_teacher_is_frozen_and_no_part_of_what_is_trained_or_saved():
    teacher, student = vit(1).train(), vit(2)
    names, before = set(student.state_dict()), copy.deepcopy(teacher.state_dict())
    lesson = distill(student, teacher, MapLoss(), FeatureLoss((12, 12))).train()
    assert not teacher.training and student.training
    owned = {n.split(".")[0] for n in lesson.state_dict()}
    assert owned == {"student", "losses"}
    lesson(images(), torch.tensor([0, 1]))["total"].backward()
    torch.optim.SGD(lesson.parameters(), 0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert set(student.state_dict()) == names  # projectors are no part of the student
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert next(lesson.double().teacher.parameters()).dtype == torch.float64


class Plain(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_bad_input_is_refused():
    teacher, student = vit(1), vit(2)
    with pytest.raises(ValueError, match="losses is empty"):
        distill(student, teacher)
    with pytest.raises(TypeError, match="student must be a model"):
        distill(None, teacher, MapLoss())
    with pytest.raises(TypeError, match="distillation losses"):
        distill(student, teacher, nn.MSELoss())
    with pytest.raises(ValueError, match="share 'cls_token'"):
        distill(teacher, teacher, MapLoss())
    shared = vit(3)
    shared.stages[1].mlp = teacher.stages[0].mlp
    with pytest.raises(ValueError, match="share 'stages.1.mlp.*stages.0.mlp"):
        distill(shared, teacher, MapLoss())
    with pytest.raises(ValueError, match="has 3 heads, the teacher's layer -1 has 2.*last_heads"):
        distill(vit(3, num_heads=3), teacher, MapLoss())(images())
    with pytest.raises(ValueError, match="17 queries.*65"):
        distill(student, vit(1, patch_size=2), MapLoss())(images())
    with pytest.raises(ValueError, match=r"grid of \(4, 4\).*\(8, 8\)"):
        distill(student, vit(1, patch_size=2), FeatureLoss((12, 12)))(images())
    with pytest.raises(ValueError, match="logits of"):
        distill(Plain(3), vit(1), LogitLoss())(images())
    with pytest.raises(TypeError, match="forward_intermediates"):
        distill(Plain(3), vit(1), FeatureLoss((12, 12)))(images())
    with pytest.raises(ValueError, match="stage 7 is not there"):
        distill(vit(3), vit(1), FeatureLoss((12, 12), student=7))(images())
    with pytest.raises(ValueError, match="dims"):
        FeatureLoss((12, 24), project=False)
    with pytest.raises(ValueError, match="divide"):
        vit(last_heads=5)


# ---- LL-FPN and InfMix


def test_a_pyramid_of_the_last_map_has_four_strides_from_one_tensor():
    model = vit(patch_size=16, img_size=64)
    pyramid = LastLayerPyramid(model).eval()
    x = images(side=64)
    y = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0]
    maps = pyramid(x)
    a, norm, _, b = pyramid.levels[0]
    fine = F.conv_transpose2d(F.gelu(norm(F.conv_transpose2d(y, a.weight, a.bias, 2))), b.weight, b.bias, 2)
    torch.testing.assert_close(maps[0], fine)
    torch.testing.assert_close(maps[2], y)
    torch.testing.assert_close(maps[3], y.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax((3, 5)))
    assert [m.shape[-1] for m in maps] == [64 // s for s in pyramid.feature_info.reduction()] == [16, 8, 4, 2]
    segmenter = Segmenter(pyramid, SegFormerHead(pyramid.feature_info.channels(), 8, 3)).eval()
    assert segmenter(images(side=80)).shape == (2, 3, 80, 80)  # five patches a side: the coarsest map is 3 wide
    assert [m.shape[-1] for m in LastLayerPyramid(vit(patch_size=8, img_size=64)).eval()(x)] == [16, 8, 4, 2]
    with pytest.raises(ValueError, match="pixels per token"):
        LastLayerPyramid(vit())


def test_the_released_segmentation_backbone_loads():
    with safe_open(HERE / "unip.safetensors", "pt") as f:
        shapes = json.loads(f.metadata()["shapes"])["student"]
    pyramid = LastLayerPyramid(vit(patch_size=16, img_size=64, num_classes=0))
    fpn = {f"fpn1.{k}" if k[0] != "U" else "fpn2.0" + k[1:]: list(v.shape) for k, v in (
        *pyramid.levels[0].state_dict().items(), *(("U" + k[1:], v) for k, v in pyramid.levels[1].state_dict().items())
    )}  # fmt: skip
    theirs = synthetic({**shapes, "patch_embed.proj.weight": [12, 3, 16, 16], **fpn})
    pyramid.load_state_dict(pyramid.convert_state_dict(theirs))
    torch.testing.assert_close(pyramid.levels[1][0].weight, theirs["fpn2.0.weight"])
    torch.testing.assert_close(pyramid.model.stages[1].mlp.inner.fc1.weight, theirs["blocks.1.mlp.fc1.weight"])


def test_a_mix_of_folders_takes_so_many_of_each(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for folder, count in (("infrared", 3), ("classes/a", 4), ("classes/b", 1)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            image.new("RGB", (4, 4), (40 * i, 0, 200)).save(tmp_path / folder / f"{i}.png")
    mix = FolderMix({tmp_path / "infrared": None, tmp_path / "classes": 2}, transform=lambda p: p.getpixel((0, 0)))
    assert [str(p.relative_to(tmp_path)) for p in mix.paths] == [
        "infrared/0.png", "infrared/1.png", "infrared/2.png", "classes/a/0.png", "classes/a/1.png", "classes/b/0.png",
    ]  # fmt: skip
    assert len(set(mix[1])) == 1 and len(set(FolderMix([tmp_path / "infrared"], grey=False)[1].getpixel((0, 0)))) == 3
    assert len(FolderMix([tmp_path / "infrared"], share=0.5)) == 2
    for bad, kind, match in (([], ValueError, "at least one"), ([tmp_path / "no"], FileNotFoundError, "no folder")):
        with pytest.raises(kind, match=match):
            FolderMix(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        FolderMix([tmp_path / "empty"])
    with pytest.raises(ValueError, match="share"):
        FolderMix([tmp_path / "infrared"], share=0.0)


def test_a_model_of_transformers_teaches_maps_and_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = transformers.ViTForImageClassification(config)
    student, x = vit(), images()
    found = distill(student, teacher, MapLoss(teacher=0), LogitLoss())(x)
    with torch.no_grad():
        maps = transformers.ViTForImageClassification._from_config(config, attn_implementation="eager").eval()
        maps.load_state_dict(teacher.state_dict())
        weights = maps(x, output_attentions=True).attentions[0]
        scores = read(student, x, Wanted(scores=frozenset({-1}))).scores[-1]
        wanted = F.kl_div(scores.log_softmax(-1), weights, reduction="sum") / (2 * 2 * 17)
    torch.testing.assert_close(found["maps"].detach(), wanted, rtol=1e-3, atol=1e-7)
    found["total"].backward()
    assert student.stages[1].mixer.inner.q.weight.grad.any() and all(p.grad is None for p in teacher.parameters())
