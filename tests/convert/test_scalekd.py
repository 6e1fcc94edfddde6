"""ScaleKD: projectors and losses held to the authors' classes, gradients through a frozen last stage."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, synthetic
from safetensors import safe_open

import attnlib
from attnlib.convert import FeatureLoss, LogitLoss, ScaleKD, distill
from attnlib.convert.distill import Reading, Wanted, read
from attnlib.convert.scalekd import CrossAttentionProjector, directions, last_stage, without_mean

SMALL = dict(num_classes=5, img_size=64)


def swin(seed=0):
    torch.manual_seed(seed)
    sizes = dict(embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2)
    return attnlib.create_model("swinv2_tiny_window8_256", **SMALL, **sizes)


def resnet(seed=1, **more):
    torch.manual_seed(seed)
    given = dict(embed_dims=(6, 8, 12, 16), stem_dim=6, **SMALL)
    return attnlib.create_model("resnet18", **{**given, **more})


def images(n=2, side=64):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def lesson(**more):
    student, teacher = resnet(), swin()
    return distill(student, teacher, ScaleKD(student, teacher, 64, num_heads=(2, 4), **more), LogitLoss(), task=0.5)


@pytest.mark.parametrize("case", ["own", "given", "windows"])
def test_projectors_and_losses_equal_the_authors(case):
    with safe_open(HERE / "scalekd.safetensors", "pt") as f:
        held = {k.split("/")[1]: f.get_tensor(k).double() for k in f.keys() if k.startswith(case + "/")}  # noqa: SIM118
        weights = synthetic(json.loads(f.metadata()["shapes"])[case])
    made = []
    for number in (0, 1):
        windows = (2, 2) if case == "windows" else (1, 1)
        p = CrossAttentionProjector(6, 8, (4, 4), 2, case != "given", windows=windows, compat="authors")
        own = {
            k.removeprefix(f"projector_{number}."): v for k, v in weights.items() if k.startswith(f"projector_{number}")
        }
        p.load_state_dict(p.convert_state_dict(own, (4, 4)))
        made.append(p.double().train())
    x = held["x"].permute(0, 2, 3, 1).clone().requires_grad_()
    t = held["t"].permute(0, 2, 3, 1)
    query = held["q"].unflatten(1, (4, 4)) if case == "given" else None
    spatial, free = (p(x, query) for p in made)
    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spatial.flatten(1, 2), held["y"], **close)
    a, b = 0.08 * directions(spatial, t), 0.06 * directions(without_mean(free), without_mean(t))
    torch.testing.assert_close(a.reshape(1), held["spatial"], **close)
    torch.testing.assert_close(b.reshape(1), held["free"], **close)
    (a + b).backward()
    torch.testing.assert_close(x.grad.permute(0, 3, 1, 2), held["dx"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[0].of_query.weight.grad, held["dw"].flatten(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[1].k.weight.grad, held["dk"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["v1, other grid", "v1, windows", "convnext", "convnext, other grid"])
def test_the_other_versions_equal_the_authors(case):
    with safe_open(HERE / "scalekd-others.safetensors", "pt") as f:
        held = {k.split("/")[1]: f.get_tensor(k) for k in f.keys() if k.startswith(case + "/")}  # noqa: SIM118
        weights = synthetic(json.loads(f.metadata()["shapes"])[case])
        said = json.loads(f.metadata()["settings"])[case]
    grid, made = said["query_hw"], []
    for number in (0, 1):
        p = CrossAttentionProjector(
            6, 8, grid, 2, said["self_query"], windows=said.get("window_shapes", (1, 1)), compat="authors",
            student_grid=said["pos_hw"], norm=said["norm"],
        )  # fmt: skip
        start = f"projector_{number}."
        own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        p.load_state_dict(p.convert_state_dict(own, grid))
        made.append(p.double().train())
    x = held["x"].permute(0, 2, 3, 1).clone().requires_grad_()
    t = held["t"].permute(0, 2, 3, 1)
    query = held["q"].unflatten(1, grid) if "q" in held else None
    spatial, free = (p(x, query) for p in made)
    close = dict(rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(spatial.flatten(1, 2), held["y"], **close)
    a, b = 0.08 * directions(spatial, t), 0.06 * directions(without_mean(free), without_mean(t))
    torch.testing.assert_close(a.reshape(1), held["spatial"], **close)
    torch.testing.assert_close(b.reshape(1), held["free"], **close)
    (a + b).backward()
    torch.testing.assert_close(x.grad.permute(0, 3, 1, 2), held["dx"], **close)
    torch.testing.assert_close(made[0].of_query.weight.grad, held["dw"].flatten(1), **close)
    torch.testing.assert_close(made[1].k.weight.grad, held["dk"], **close)
    torch.testing.assert_close(made[0].norm.weight.grad, held["dn"], **close)


def test_feature_distillation_of_the_release_is_a_sum_of_cosines():
    with safe_open(HERE / "scalekd-others.safetensors", "pt") as f:
        held = {k.split("/")[1]: f.get_tensor(k) for k in f.keys() if k.startswith("fd/")}  # noqa: SIM118
        weights = synthetic(json.loads(f.metadata()["shapes"])["fd"])
    loss = FeatureLoss((6, 8), loss="cosine", weight=0.03 * 2 * 3 * 5).double()
    loss.project.load_state_dict({"weight": weights["align.weight"].flatten(1), "bias": weights["align.bias"]})
    x, t = (held[k].permute(0, 2, 3, 1).clone().requires_grad_() for k in "xt")
    found = loss(Reading(features={-1: x}), Reading(features={-1: t}), None)["features"]
    torch.testing.assert_close(found.reshape(1), held["loss"], rtol=1e-9, atol=1e-12)
    found.backward()
    torch.testing.assert_close(x.grad.permute(0, 3, 1, 2), held["dx"], rtol=1e-7, atol=1e-10)


def test_a_student_whose_grid_stays_learns_from_a_pyramid():
    """As a DeiT behind a Swin: one grid for both of its stages, which the teacher's queries read whole."""
    torch.manual_seed(0)
    student, teacher = vit(depth=3, patch_size=16, img_size=64), swin()
    with pytest.raises(ValueError, match="unlike_grids"):
        ScaleKD(student, teacher, 64, num_heads=(2, 4))
    made = ScaleKD(student, teacher, 64, num_heads=(2, 4), unlike_grids=True, norm="layer")
    assert made.projectors["spatial 4"].student_grid == (4, 4) != made.projectors["spatial 4"].grid == (2, 2)
    taught = distill(student, teacher, made, task=0.5)
    taught(images())["total"].backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in student.stages[-1].parameters())


def test_windows_lie_where_the_teachers_tokens_do():
    torch.manual_seed(0)
    ours = CrossAttentionProjector(6, 8, (4, 6), 2, windows=(2, 2)).double().eval()
    theirs = copy.deepcopy(ours)
    theirs.compat = "authors"
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    y, z = ours(x), theirs(x)
    # the window of rows 0-1 and columns 3-5 is the second that the release writes down
    torch.testing.assert_close(y[0, 0:2, 3:6].flatten(0, 1), z[0].flatten(0, 1)[6:12])
    moved = x.clone()
    moved[0, 3, 5] += 1  # seen through a 3 x 3 convolution by its own window alone
    changed = (ours(moved) - y).abs().amax(-1)[0] > 1e-12
    assert changed[2:, 3:].all() and not changed[:2].any() and not changed[2:, :3].any()


def test_removing_the_mean_is_a_cosine_transform_without_its_first_coefficient():
    n = 5
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = (math.pi * (i + 0.5) * k / n).cos() * (2 / n) ** 0.5
    basis[0] /= 2**0.5
    x = torch.randn(2, n, n, 3, dtype=torch.float64)
    coefficients = torch.einsum("ai,bj,nijc->nabc", basis, basis, x)
    coefficients[:, 0, 0] = 0
    back = torch.einsum("ai,bj,nabc->nijc", basis, basis, coefficients)
    torch.testing.assert_close(without_mean(x), back, rtol=1e-10, atol=1e-12)


def test_losses_vanish_for_equal_directions_alone():
    y = torch.randn(2, 3, 3, 4)
    assert float(directions(y, y * (0.1 + torch.rand(2, 3, 3, 1)))) < 1e-10  # whatever the scale of a position
    wanted = sum(float((F.normalize(y[b, i, j], dim=0) - F.normalize(-y[b, i, j], dim=0)).square().sum())
                 for b in range(2) for i in range(3) for j in range(3)) / 2  # fmt: skip
    assert math.isclose(float(directions(y, -y)), wanted, rel_tol=1e-5) and math.isclose(wanted, 4 * 9, rel_tol=1e-5)


def test_the_last_stage_is_the_teachers_own():
    for teacher, blocks in (
        (swin().eval(), 2),
        (vit(depth=3), 2),
        (vit(depth=3, class_token=False, global_pool="avg"), 1),
    ):
        before = -2 if blocks == 2 and not hasattr(teacher, "num_prefix_tokens") else -1 - blocks
        wanted = read(teacher, images(), Wanted(features=frozenset({-1}))).features[-1]
        given = teacher.forward_intermediates(images(), [before], output_fmt="NHWC", intermediates_only=True)[0]
        found = last_stage(teacher, blocks)(given)
        assert found.shape == wanted.shape
        if not getattr(teacher, "num_prefix_tokens", 0):  # with a class token patches alone are another sequence
            torch.testing.assert_close(found, wanted)


def vit(seed=3, **more):
    torch.manual_seed(seed)
    given = dict(patch_size=16, embed_dim=8, depth=2, num_heads=2, **SMALL)
    return attnlib.create_model("vit_tiny_patch16_224", **{**given, **more}).eval()


def test_gradients_pass_through_the_frozen_stage_and_none_stays_in_it():
    made = lesson()
    before = {k: v.clone() for k, v in made.teacher.state_dict().items()}
    names = set(made.student.state_dict())
    found = made(images(), torch.tensor([0, 3]))
    assert set(found) == {"task", "logits", "total", *(f"{v} {s}" for v in ("spatial", "mean-free") for s in (3, 4))}
    assert all(v.item() > 0 for v in found.values())
    kept = [p for p in made.student.parameters()]
    grads = torch.autograd.grad(found["spatial 3"], kept, allow_unused=True, retain_graph=True)
    reached = {n for (n, _), g in zip(made.student.named_parameters(), grads, strict=True) if g is not None and g.any()}
    assert any(n.startswith("stages.2") for n in reached) and not any(
        n.startswith(("stages.3", "head")) for n in reached
    )
    found["total"].backward()
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    own = [p for n, p in made.losses[0].named_parameters()]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in own)
    torch.optim.SGD(made.parameters(), 0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in made.teacher.state_dict().items())
    assert set(made.student.state_dict()) == names and not made.teacher.training
    assert not {id(p) for p in made.losses.parameters()} & {id(p) for p in made.teacher.parameters()}


def test_losses_fall():
    made, x, labels = lesson(), images(8), torch.arange(8) % 5
    optimizer = torch.optim.Adam(made.parameters(), 1e-3)
    kept = []
    for _ in range(12):
        optimizer.zero_grad()
        found = made(x, labels)
        found["total"].backward()
        optimizer.step()
        kept.append({k: v.item() for k, v in found.items()})
    assert kept[-1]["total"] < 0.8 * kept[0]["total"]
    # Labels pull the logits away from those of a teacher that knows nothing.
    assert all(kept[-1][k] < kept[0][k] for k in kept[0] if k != "logits")


def test_a_vision_transformer_teaches_too():
    student, teacher = vit(5, embed_dim=12), vit(6, depth=3)
    made = distill(student, teacher, ScaleKD(student, teacher, 64, num_heads=(2, 2)))
    made(images())["total"].backward()
    assert student.stages[0].mixer.inner.q.weight.grad.any()


def test_bad_input_is_refused():
    student, teacher = resnet(), swin()
    with pytest.raises(ValueError, match=r"grid of \(8, 8\), the teacher's stage -2 one of \(4, 4\)"):
        ScaleKD(student, teacher, 64, (2, 4), stages=(-3, -1))
    with pytest.raises(ValueError, match="must divide teacher_dim"):
        ScaleKD(student, teacher, 64, (3, 4))
    with pytest.raises(ValueError, match="must divide the grid"):
        CrossAttentionProjector(6, 8, (3, 4), 2, windows=(2, 2))
    with pytest.raises(ValueError, match="two numbers each"):
        ScaleKD(student, teacher, 64, (2, 4), alpha=(1.0,))
    with pytest.raises(TypeError, match="tail"):
        ScaleKD(student, torch.nn.Linear(2, 2), 64)
    with pytest.raises(ValueError, match="grid of"):
        distill(student, teacher, ScaleKD(student, teacher, 64, (2, 4)))(images(side=96))
    with pytest.raises(ValueError, match="query must be given"):
        CrossAttentionProjector(6, 8, (4, 4), 2, own_query=False)(torch.zeros(1, 4, 4, 6))
