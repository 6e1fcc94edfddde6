"""What detectors without anchors share, against loops: who answers for an object, the losses, suppression, the neck."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlib.models.detect.anchor_free import (
    AnchorFreeDetector,
    DecoupledHead,
    Predicted,
    detection_terms,
    detections,
    distribution_focal_loss,
    grid_points,
    task_aligned,
)  # fmt: skip
from attnlib.models.detect.boxes import complete_overlap, overlaps, suppress_boxes
from attnlib.models.detect.pan import PAN, CSPBackbone, CSPBlock, PoolPyramid


def some_boxes(count, seed=0, side=60.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=g, dtype=dtype) * side / 2
    return torch.cat([low, low + 2 + torch.rand(count, 2, generator=g, dtype=dtype) * side / 2], -1)


def complete_overlap_by_hand(a, b):
    x = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    y = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    (wa, ha), (wb, hb) = ((c[2] - c[0], c[3] - c[1]) for c in (a, b))
    iou = x * y / (wa * ha + wb * hb - x * y)
    middles = [((c[0] + c[2]) / 2, (c[1] + c[3]) / 2) for c in (a, b)]
    across = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    v = 4 / math.pi**2 * (math.atan(wb / hb) - math.atan(wa / ha)) ** 2
    share = v / (1 - iou + v) if v else 0.0
    return iou - math.dist(*middles) ** 2 / across - share * v


def test_complete_overlap():
    a, b = some_boxes(20), some_boxes(20, 1)
    want = torch.tensor([complete_overlap_by_hand(p, q) for p, q in zip(a.tolist(), b.tolist(), strict=True)])
    torch.testing.assert_close(complete_overlap(a, b), want.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(complete_overlap(a[:, None], b[None]).diagonal(), complete_overlap(a, b))
    flat = torch.zeros(1, 4, requires_grad=True)
    complete_overlap(flat, flat + 1).sum().backward()
    assert flat.grad.isfinite().all()


def test_suppression():
    boxes, g = some_boxes(60), torch.Generator().manual_seed(3)
    scores, labels = torch.rand(60, generator=g), torch.randint(0, 3, (60,), generator=g)
    iou = overlaps(boxes, boxes)[0]
    for own, most in ((None, None), (labels, None), (labels, 7)):
        kept = []
        for i in scores.argsort(descending=True).tolist():
            if all(iou[i, j] <= 0.4 or (own is not None and own[i] != own[j]) for j in kept):
                kept.append(i)
        assert suppress_boxes(boxes, scores, 0.4, own, most).tolist() == kept[:most]
    assert suppress_boxes(boxes[:0], scores[:0], 0.4).shape == (0,)
    with pytest.raises(ValueError, match=r"labels must be a tensor of shape \(N=60\)"):
        suppress_boxes(boxes, scores, 0.4, labels[:4])
    with pytest.raises(ValueError, match="second corner"):
        suppress_boxes(boxes.flip(-1), scores, 0.4)


def assigned_by_hand(scores, boxes, points, labels, truth, exists, topk, alpha, beta):
    """One image, one object, one point after the other."""
    goal = torch.zeros_like(scores)
    found, which = torch.zeros(scores.shape[:2], dtype=torch.bool), torch.zeros(scores.shape[:2], dtype=torch.long)
    for b in range(len(scores)):
        t, o, wanted = {}, {}, {}
        objects = [m for m in range(truth.shape[1]) if exists[b, m]]
        for m in objects:
            for n, (x, y) in enumerate(points.tolist()):
                x1, y1, x2, y2 = truth[b, m].tolist()
                if x1 < x < x2 and y1 < y < y2:
                    o[m, n] = max(0.0, complete_overlap_by_hand(truth[b, m].tolist(), boxes[b, n].tolist()))
                    t[m, n] = float(scores[b, n, labels[b, m]]) ** alpha * o[m, n] ** beta
            own = sorted((n for mm, n in t if mm == m and t[mm, n] > 0), key=lambda n: -t[m, n])[:topk]  # noqa: B023
            for n in own:
                wanted.setdefault(n, []).append(m)
        chosen = {}
        for n, who in wanted.items():
            chosen[n] = who[0] if len(who) == 1 else max(objects, key=lambda m: o.get((m, n), 0.0))  # noqa: B023
        for m in objects:
            own = [n for n, mm in chosen.items() if mm == m]
            if not own:
                continue
            largest, best = max(t[m, n] for n in own), max(o[m, n] for n in own)
            for n in own:
                found[b, n], which[b, n] = True, m
                goal[b, n, labels[b, m]] = t[m, n] * best / (largest + 1e-9)
    return found, which, goal


@pytest.mark.parametrize(("topk", "alpha", "beta"), [(10, 0.5, 6.0), (3, 1.0, 2.0), (500, 0.5, 1.0)])
def test_task_aligned(topk, alpha, beta):
    g = torch.Generator().manual_seed(0)
    points, strides = grid_points([(8, 8), (4, 4)], [8, 16], torch.zeros(1, dtype=torch.float64))
    away = torch.rand(2, 80, 4, generator=g, dtype=torch.float64) * 3 * strides[:, None]
    boxes = torch.cat([points - away[..., :2], points + away[..., 2:]], -1)
    scores = torch.rand(2, 80, 3, generator=g, dtype=torch.float64)
    truth = torch.stack([some_boxes(4, 5), some_boxes(4, 6)])
    labels, exists = torch.randint(0, 3, (2, 4), generator=g), torch.tensor([[True] * 4, [True, True, False, False]])
    made = task_aligned(scores, boxes, points, labels, truth, exists, topk, alpha, beta)
    found, which, goal = assigned_by_hand(scores, boxes, points, labels, truth, exists, topk, alpha, beta)
    assert made.found.equal(found) and found.any(1).all()
    assert made.object[found].equal(which[found])
    torch.testing.assert_close(made.scores, goal, rtol=1e-5, atol=1e-7)
    nobody = task_aligned(scores, boxes, points, labels[:, :0], truth[:, :0], exists[:, :0])
    assert not nobody.found.any() and not nobody.scores.any()


def test_distribution_focal_loss():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 8, generator=g), torch.tensor([0.0, 0.3, 2.5, 6.99, 7.0, -3.0])
    made = distribution_focal_loss(logits, target)
    for i, t in enumerate(target.clamp(0, 6.99).tolist()):
        low = int(t)
        want = sum(
            F.cross_entropy(logits[i : i + 1], torch.tensor([low + j])) * w for j, w in ((0, low + 1 - t), (1, t - low))
        )
        torch.testing.assert_close(made[i], want)


def test_points_lie_in_the_middle_of_their_pixels():
    points, strides = grid_points([(3, 4), (2, 2)], [8, 16], torch.zeros(1))
    assert points[5].tolist() == [12.0, 12.0] and points[12].tolist() == [8.0, 8.0]
    assert strides.tolist() == [8.0] * 12 + [16.0] * 4


def detector(classes=3, dims=(8, 8, 8, 16, 16)):
    torch.manual_seed(0)
    head = DecoupledHead(dims[2:], classes)
    return AnchorFreeDetector(CSPBackbone(dims, (1, 1, 1, 1)), PAN(dims[2:]), head)


def one(boxes, labels):
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels, dtype=torch.long)}


def test_terms_by_hand():
    model = detector().double()
    made = model(torch.rand(2, 3, 48, 64).double())
    target = [one([[4.0, 4, 40, 30], [20.0, 10, 60, 44]], [0, 2]), one([], [])]
    terms = detection_terms(made, target, (2.0, 3.0, 5.0))
    truth = torch.zeros(2, 2, 4, dtype=torch.float64)
    truth[0] = target[0]["boxes"]
    exists = torch.tensor([[True, True], [False, False]])
    found, which, goal = assigned_by_hand(
        made.logits.detach().sigmoid(), made.boxes.detach(), made.points, torch.tensor([[0, 2], [0, 0]]), truth, exists,
        10, 0.5, 6.0,
    )  # fmt: skip
    total = max(1.0, float(goal.sum()))
    entropy = F.binary_cross_entropy_with_logits(made.logits, goal, reduction="sum") / total
    torch.testing.assert_close(terms["class"], 3 * entropy, rtol=1e-6, atol=1e-8)
    box = distribution = 0.0
    for b, n in found.nonzero().tolist():
        weight, own, s = goal[b, n].sum(), truth[b, which[b, n]], made.strides[n]
        box = box + weight * (1 - complete_overlap_by_hand((made.boxes[b, n] / s).tolist(), (own / s).tolist()))
        sides = torch.cat([made.points[n] - own[:2], own[2:] - made.points[n]]) / s
        distribution = distribution + weight * distribution_focal_loss(made.bins[b, n], sides).mean()
    torch.testing.assert_close(terms["box"], 2 * box / total, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(terms["distribution"], 5 * distribution / total, rtol=1e-5, atol=1e-8)


def test_images_without_objects_train_only_classes():
    model = detector()
    made = model(torch.rand(2, 3, 40, 40))
    terms = model.loss(made, [one([], []), one([], [])])
    assert terms["box"] == 0 and terms["distribution"] == 0 and terms["class"] > 0
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    tiny = [one([[1.0, 1, 2, 2]], [0]), one([[0.0, 0, 40, 40]], [1])]  # no point lies in the first
    assert all(t.isfinite() for t in model.loss(made, tiny).values())


def test_bad_targets():
    model = detector()
    with pytest.raises(ValueError, match="leaves one pixel at stride 32"):
        model(torch.rand(1, 3, 32, 32))
    made, good = model.eval()(torch.rand(1, 3, 32, 32)), one([[1.0, 2, 20, 30]], [0])
    for wrong, said in (
        ([], "one entry for each of 1 images, got 0"),
        ([{"boxes": good["boxes"]}], r"target\[0\] has no 'labels'"),
        ([one([[20.0, 2, 1, 30]], [0])], r"x1 < x2 and y1 < y2 in pixels, got \[20.0, 2.0, 1.0, 30.0\]"),
        ([one([[1.0, 2, 1, 30]], [0])], "without an area"),
        ([one([[1.0, 2, math.nan, 30]], [0])], "x1 < x2"),
        ([one([[1.0, 2, 20, 30]], [3])], r"labels'\] must be 0 to 2, got \[3\]"),
        ([one([[1.0, 2, 20, 30]], [-1])], "must be 0 to 2"),
        ([one([[1.0, 2, 20, 30]], [0, 1])], r"labels'\] must be \(n,\)=\(1,\)"),
        ([{"boxes": torch.zeros(4), "labels": torch.zeros(1).long()}], r"boxes'\] must be \(n, 4\)"),
    ):
        with pytest.raises(ValueError, match=said):
            model.loss(made, wrong)
    with pytest.raises(TypeError, match="target must be one mapping"):
        model.loss(made, 3)
    with pytest.raises(TypeError, match="labels'] must be an integer tensor".replace("]", r"\]")):
        model.loss(made, [{"boxes": good["boxes"], "labels": torch.zeros(1)}])
    with pytest.raises(ValueError, match="topk, alpha and beta"):
        AnchorFreeDetector(None, nn.Identity(), nn.Identity(), assignment={"top": 3})
    for call, said in (
        (lambda: AnchorFreeDetector(None, nn.Identity(), nn.Identity(), assignment={"topk": 0}), "topk"),
        (lambda: detection_terms(made, [good], (1.0, 2.0)), "weights must be three"),
        (lambda: detections(made, (32, 32), candidates=0), "candidates must be"),
        (lambda: detections(made, (32,)), "size must have 2 axes"),
        (lambda: distribution_focal_loss(torch.zeros(3, 4), torch.zeros(2)), "target must be"),
        (lambda: distribution_focal_loss(torch.zeros(3, 1), torch.zeros(3)), "two bins at least"),
        (lambda: grid_points([(1, 2)], [8, 16], torch.zeros(1)), "of the same maps, got 1 and 2"),
        (lambda: model.head([torch.zeros(b, 2, 2, c) for b, c in ((2, 8), (1, 16), (2, 16))]), "share the batch"),
        (lambda: PAN((8, 8)), "dims must be of three maps"),
        (lambda: PoolPyramid(1, 8), "dim must be"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="made must be"):
        model.loss(3, [])


def test_detections():
    logits = torch.full((1, 4, 2), -9.0)
    logits[0, 0, 0], logits[0, 1, 0], logits[0, 2, 1], logits[0, 3, :] = 3.0, 2.0, 1.0, torch.tensor([0.5, 0.4])
    bins = torch.full((1, 4, 4, 3), -50.0)
    bins[..., 1] = 50.0  # a stride on every side
    points = torch.tensor([[8.0, 8.0], [8.5, 8.0], [8.0, 8.0], [30.0, 30.0]])
    made = Predicted(logits, bins, points, torch.full((4,), 8.0), torch.arange(3.0))
    torch.testing.assert_close(made.boxes[0, 0], torch.tensor([0.0, 0, 16, 16]))
    (found,) = detections(made, (32, 34))
    assert found.labels.tolist() == [0, 1, 0] and found.boxes[2].tolist() == [22.0, 22.0, 34.0, 32.0]
    (found,) = detections(made, (32, 34), several=True)
    assert found.labels.tolist() == [0, 1, 0, 1]
    (found,) = detections(made, (32, 34), most=1, threshold=0.9)
    assert found.scores.tolist() == pytest.approx([torch.tensor(3.0).sigmoid().item()])
    (found,) = detections(made, (32, 34), threshold=1.0)
    assert found.boxes.shape == (0, 4)


def test_blocks_by_hand():
    torch.manual_seed(0)
    block, x = CSPBlock(6, 8, 2, True).eval(), torch.randn(1, 4, 5, 6)
    a, b = block.split(x).chunk(2, -1)
    first = b + block.blocks[0].convs(b)
    second = first + block.blocks[1].convs(first)
    torch.testing.assert_close(block(x), block.join(torch.cat([a, b, first, second], -1)))
    pool = PoolPyramid(6, 7).eval()
    y = pool.reduce(x).permute(0, 3, 1, 2)
    each = [y, *(F.max_pool2d(y, s, 1, s // 2) for s in (5, 9, 13))]
    torch.testing.assert_close(pool(x), pool.join(torch.cat(each, 1).permute(0, 2, 3, 1)))
    with pytest.raises(ValueError, match="half the side of the one before"):
        PAN((4, 4, 4))([torch.zeros(1, 8, 8, 4), torch.zeros(1, 8, 8, 4), torch.zeros(1, 2, 2, 4)])
    with pytest.raises(ValueError, match="dims must be 5 numbers"):
        CSPBackbone((4, 4), (1,))


def test_a_detector_finds_squares():
    """From nothing to most squares found in a few seconds."""
    torch.manual_seed(0)
    model = detector(1, (8, 16, 16, 16, 16)).train()
    model.assignment["beta"] = 1.0  # few steps: boxes need not be good to be answered for
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def batch(count):
        x, target = 0.2 * torch.rand(count, 3, 32, 32, generator=g), []
        for i in range(count):
            a, b = (int(v) for v in torch.randint(0, 17, (2,), generator=g))
            x[i, :, b : b + 16, a : a + 16] += 0.8
            target.append(one([[a, b, a + 16.0, b + 16.0]], [0]))
        return x, target

    for _ in range(40):
        x, target = batch(8)
        optimizer.zero_grad()
        sum(model.loss(model(x), target).values()).backward()
        optimizer.step()
    x, target = batch(16)
    best = []
    for found, want in zip(model.predict(x, threshold=0.05), target, strict=True):
        best.append(float(overlaps(found.boxes[:1], want["boxes"])[0].max()) if len(found.boxes) else 0.0)
    assert sum(b > 0.5 for b in best) >= 10
