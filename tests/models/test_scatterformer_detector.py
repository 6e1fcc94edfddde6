"""ScatterFormer's detector: its parts held to the authors', turned boxes, and the whole from points to boxes."""

import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open

from attnlib.models.detect.center import CenterHead, EncoderDecoder, MapCascade, Objects
from attnlib.models.detect.points import PointFeatures, VoxelGrid
from attnlib.models.detect.scatterformer_detector import WAYMO, ScatterFormerDetector
from attnlib.models.detect.turned import overlap_above, overlap_in_space, shared_area, suppress

GRID = VoxelGrid((-4.0, -4.0, -1.0), (0.5, 0.5, 0.25), (16, 12, 8))


@pytest.fixture(scope="module")
def recorded():
    with safe_open(HERE / "scatterformer_detector.safetensors", "pt") as f:
        held = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        return held, json.loads(f.metadata()["shapes"]), json.loads(f.metadata()["losses"])


def close(ours, theirs, least=0.0, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= tolerance * max(float(theirs.abs().max()), least)


def loaded(module, shapes):
    module.load_state_dict(module.convert_state_dict(synthetic(shapes)))
    return module.double()


def held_to(held, case, module, shapes):
    """Gradients of the weights equal the recorded ones."""
    theirs = {k.removeprefix(f"{case}/dw/"): v for k, v in held.items() if k.startswith(f"{case}/dw/")}
    unknown = {k: torch.full(s, torch.nan) for k, s in shapes.items() if k not in theirs}
    largest = max(float(v.abs().max()) for v in theirs.values())
    compared = 0
    grads = module.convert_state_dict({**unknown, **theirs})
    for name, p in module.named_parameters():
        if not grads[name].isnan().any():
            compared += 1
            close(p.grad, grads[name], 3e-2 * largest)
    assert compared == len(theirs)


@pytest.mark.parametrize("case", ["points", "points-train", "points-plain"])
def test_features_of_points_equal_the_authors(recorded, case):
    held, shapes, _ = recorded
    plain = case == "points-plain"
    model = PointFeatures(2, GRID, (8, 6), norm=not plain, absolute=not plain, distance=plain)
    model = loaded(model, shapes[case]).train(case == "points-train")
    points = held[f"{case}/x/points"].double().requires_grad_()
    y, coords = model(points, held[f"{case}/x/sample"])
    order = [{tuple(c): i for i, c in enumerate(coords.tolist())}[tuple(c)] for c in held[f"{case}/coords"].tolist()]
    assert sorted(order) == list(range(len(coords)))
    close(y[order], held[f"{case}/y"])
    (y[order] * held[f"{case}/g"]).sum().backward()
    close(points.grad, held[f"{case}/dx"])
    held_to(held, case, model, shapes[case])


@pytest.mark.parametrize("case", ["map", "map-train"])
def test_the_cascade_equals_the_authors(recorded, case):
    held, shapes, _ = recorded
    model = loaded(MapCascade(8, 8, 2) if case == "map" else MapCascade(6, 8, 1), shapes[case])
    model.train(case == "map-train")
    x = held[f"{case}/x"].double().permute(0, 2, 3, 1).requires_grad_()
    y = model(x)
    close(y.permute(0, 3, 1, 2), held[f"{case}/y"])
    (y * held[f"{case}/g"].permute(0, 2, 3, 1)).sum().backward()
    close(x.grad.permute(0, 3, 1, 2), held[f"{case}/dx"])
    held_to(held, case, model, shapes[case])


def head(**settings):
    released = dict(rectify=(0.68, 0.71, 0.65), thresholds=(0.3, 0.2, 0.1), most=40)
    return CenterHead(8, GRID, 3, 2, hidden=8, **{**released, **settings})


THEIRS = dict(center="center", height="center_z", size="dim", heading="rot", iou="iou", heatmap="hm")


def test_maps_targets_and_losses_equal_the_authors(recorded):
    held, shapes, losses = recorded
    model = loaded(head(), shapes["head"]).train()
    x = held["head/x"].double().permute(0, 2, 3, 1).requires_grad_()
    maps = model(x)
    for name, theirs in THEIRS.items():
        close(maps[name].permute(0, 3, 1, 2), held[f"head/y/{theirs}"])
    truth = held["head/gt"].double()
    scenes = [Objects(t[t[:, 3] > 0, :7], t[t[:, 3] > 0, 7].long() - 1) for t in truth]
    heat = torch.stack([model.targets(s, (6, 8))[0] for s in scenes])
    close(heat.permute(0, 3, 1, 2), held["head/heat"].double(), tolerance=1e-6)
    ours = model.losses(maps, scenes)
    names = dict(
        heatmap="hm_loss_head_0", boxes="loc_loss_head_0", overlap="iou_reg_loss_head_0", iou="iou_loss_head_0"
    )
    for name, theirs in names.items():
        assert float(ours[name].detach()) == pytest.approx(losses[theirs], rel=1e-5)
    sum(ours.values()).backward()
    close(x.grad.permute(0, 3, 1, 2), held["head/dx"])
    held_to(held, "head", model, shapes["head"])


def test_boxes_found_equal_the_authors(recorded):
    held, shapes, _ = recorded
    model = loaded(head(limits=((-3.5, -3.5, -10), (3.5, 3.0, 10))), shapes["head"]).eval()
    found = model.objects(model(3 * held["head/x"].double().permute(0, 2, 3, 1)))
    for i, scene in enumerate(found):
        assert scene.labels.tolist() == held[f"found/{i}/labels"].tolist() and len(scene.labels) > 5
        close(scene.boxes, held[f"found/{i}/boxes"])
        close(scene.scores, held[f"found/{i}/scores"])


def test_sizes_of_the_parts():
    with torch.device("meta"):
        model = ScatterFormerDetector()
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert {k: count[k] for k in ("points", "cascade", "head")} == {"points": 4640, "cascade": 7751680, "head": 302732}
    assert model.backbone.shape == (33, 480, 480) and model.points.grid == WAYMO


def test_shared_area_counts_what_lies_in_both():
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.rand(40, 7, generator=gen, dtype=torch.float64) * 2 + 0.3 for _ in range(2))
    side = torch.linspace(-2, 5, 300, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)

    def inside(box):
        x, y = (points - box[:2]).unbind(-1)
        cos, sin = box[6].cos(), box[6].sin()
        return ((x * cos + y * sin).abs() <= box[3] / 2) & ((y * cos - x * sin).abs() <= box[4] / 2)

    counted = torch.stack([(inside(p) & inside(q)).sum() for p, q in zip(a, b, strict=True)]) * (7 / 299) ** 2
    torch.testing.assert_close(shared_area(a, b), counted.double(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(shared_area(a, b), shared_area(b, a))
    torch.testing.assert_close(overlap_above(a, a), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(overlap_in_space(a.float(), a.float()), torch.ones(40))
    far = a + torch.tensor([50.0, 0, 0, 0, 0, 0, 0])
    assert not shared_area(a, far).any()
    within = torch.cat([a[:, :3], a[:, 3:5] / 3, a[:, 5:]], 1)
    torch.testing.assert_close(shared_area(a, within), a[:, 3] * a[:, 4] / 9)


def test_suppression_keeps_what_no_better_one_overlaps():
    gen = torch.Generator().manual_seed(1)
    boxes = torch.rand(30, 7, generator=gen) * torch.tensor([6, 6, 1, 2, 2, 1, 3.0]) + 0.3
    scores = torch.rand(30, generator=gen)
    kept, loop = suppress(boxes, scores, 0.2), []
    for i in scores.argsort(descending=True).tolist():
        if all(float(overlap_above(boxes[i : i + 1], boxes[j : j + 1])) <= 0.2 for j in loop):
            loop.append(i)
    assert kept.tolist() == loop and 5 < len(loop) < 30
    assert suppress(boxes, scores, 0.2, most=3).tolist() == loop[:3]
    assert suppress(boxes[:0], scores[:0], 0.2).shape == (0,)


def small(**settings):
    torch.manual_seed(0)
    grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (9, 8, 8))
    backbone = dict(depth=1, num_heads=2, window_size=4, pool_heads=2, stem_blocks=1)
    return ScatterFormerDetector(
        grid, 0, dim=16, point_dims=(8, 8), backbone=backbone, cascade=dict(depth=1), head=dict(hidden=8), **settings
    )


def test_from_points_to_boxes_scenes_apart_and_trained():
    model = small().eval()
    gen = torch.Generator().manual_seed(2)
    points, sample = torch.rand(80, 3, generator=gen) * 8, torch.arange(80) % 2
    maps = model(points, sample, batch=3)
    assert {k: tuple(v.shape) for k, v in maps.items()}["heatmap"] == (3, 4, 5, 3)
    alone = model(points[sample == 1], torch.zeros(40, dtype=torch.long), batch=1)
    for name in maps:
        torch.testing.assert_close(maps[name][1:2], alone[name], atol=1e-5, rtol=1e-4)
    order = torch.randperm(80, generator=gen)
    shuffled = model(points[order], sample[order], batch=3)
    torch.testing.assert_close(maps["size"], shuffled["size"], atol=1e-5, rtol=1e-4)
    box = torch.tensor([[3.2, 4.1, 1.0, 2.0, 1.0, 1.5, 0.4]])
    scenes = [Objects(box, torch.tensor([1])), Objects(box[:0], torch.tensor([], dtype=torch.long))]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):  # after 25 the overlap lies at 0 to 0.7, by rounding alone
        loss = sum(model.losses(points, sample, scenes).values())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
    found = model.objects(points, sample, 2)[0]  # in training still: running statistics lag behind
    best = int(found.scores.argmax())
    assert int(found.labels[best]) == 1 and float(overlap_above(found.boxes[best : best + 1], box)) > 0.5


def test_a_map_without_objects_and_a_release_with_wrappers():
    model = small()
    losses = model.losses(
        torch.rand(9, 3) * 8, torch.zeros(9, dtype=torch.long), [Objects(torch.zeros(0, 7), torch.zeros(0).long())]
    )
    assert float(losses["heatmap"]) > 0 and not any(float(losses[k]) for k in ("boxes", "overlap", "iou"))
    with pytest.raises(ValueError, match="nuscenes"):
        ScatterFormerDetector.convert_state_dict({"nuscenes": torch.zeros(1), "global_step": torch.zeros(1)})


def test_odd_sides_of_the_map():
    assert EncoderDecoder(4, 4).eval()(torch.randn(1, 7, 9, 4)).shape == (1, 7, 9, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PointFeatures(1, GRID, (7, 8)), "dims must be widths"),
        (lambda: PointFeatures(1, ((0, 0, 0), (1, 0, 1), (2, 2, 2))), "must be positive"),
        (lambda: PointFeatures(1, ((0, 0), (1, 1), (2, 2))), "grid must be low, size and cells"),
        (lambda: PointFeatures(1, GRID)(torch.zeros(3, 3), torch.zeros(3, dtype=torch.long)), "points must be"),
        (lambda: head(iou=False), "rectify needs iou"),
        (lambda: head(thresholds=(0.1,)), "thresholds must be"),
        (lambda: head().targets(Objects(torch.ones(1, 7), torch.tensor([3])), (6, 8)), "labels must be"),
        (lambda: head().targets(Objects(torch.zeros(1, 7), torch.tensor([0])), (6, 8)), "sides above 0"),
        (lambda: head().losses(head()(torch.zeros(2, 6, 8, 8)), []), "scenes must be one"),
        (lambda: EncoderDecoder(4, 4, (1,), (1, 2)), "blocks and strides"),
        (lambda: small()(torch.zeros(1, 3), torch.tensor([2]), batch=2), "batch=2"),
        (lambda: suppress(torch.zeros(2, 6), torch.zeros(2), 0.1), "boxes must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
