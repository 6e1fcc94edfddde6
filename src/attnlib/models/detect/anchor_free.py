"""Detectors without anchors: a head on maps of several strides, who answers for which object, and the losses.

A pixel of a map gives its point ``((column + 1/2) s, (row + 1/2) s)`` in the image, s the stride; how far the four
sides of a box lie from it, each as a distribution over 0 to ``bins - 1`` strides; and a number for every class.

- distributions, and their loss: Li et al., 2020, "Generalized Focal Loss", arXiv 2006.04388;
- a branch each for classes and boxes: Ge et al., 2021, "YOLOX", arXiv 2107.08430;
- :func:`task_aligned`: Feng et al., 2021, "TOOD", arXiv 2108.07755;
- the boxes' loss: :func:`attnlib.models.detect.boxes.complete_overlap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_batch,
    check_flag,
    check_grid,
    check_int,
    check_ints,
    check_real,
    check_tensors,
    check_type,
    check_whole,
    describe,
)
from ...types import stats_dtype
from ..protocol import TaskModel
from .boxes import complete_overlap, suppress_boxes
from .pan import conv
from .plain_detr import Detections

#: Side of the image for which the class branch expects so many objects at the start.
SIDE, EXPECTED = 640, 5


class Predicted(NamedTuple):
    """What a head says of N points.

    Args:
        logits: (B, N, classes).
        bins: (B, N, 4, bins), logits of how far left, top, right and bottom lie, in strides.
        points: (N, 2) x and y in pixels.
        strides: (N,).
        places: (bins,) what the bins stand for, in strides.
    """

    logits: Tensor
    bins: Tensor
    points: Tensor
    strides: Tensor
    places: Tensor

    @property
    def distances(self) -> Tensor:
        """(B, N, 4) in strides: the means of the distributions."""
        bins = self.bins.to(stats_dtype(self.bins.dtype))
        return bins.softmax(-1) @ self.places.to(bins.dtype)

    @property
    def boxes(self) -> Tensor:
        """(B, N, 4) corners in pixels."""
        away = self.distances * self.strides[:, None].to(stats_dtype(self.bins.dtype))
        return torch.cat([self.points - away[..., :2], self.points + away[..., 2:]], -1)


def grid_points(sizes: Sequence[Sequence[int]], strides: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2) points and (N,) strides of maps, row by row, map after map.

    >>> points, strides = grid_points([(1, 2), (1, 1)], [8, 16], torch.zeros(1))
    >>> points.tolist(), strides.tolist()
    ([[4.0, 4.0], [12.0, 4.0], [8.0, 8.0]], [8.0, 8.0, 16.0])
    """
    if len(sizes) != len(strides):
        raise ValueError(f"sizes and strides must be of the same maps, got {len(sizes)} and {len(strides)}")
    dtype = stats_dtype(like.dtype)
    points, steps = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y, x = ((torch.arange(n, device=like.device, dtype=dtype) + 0.5) * stride for n in (height, width))
        points.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1))
        steps.append(x.new_full((height * width,), stride))
    return torch.cat(points), torch.cat(steps)


class DecoupledHead(nn.Module):
    """Maps (B, H, W, C) of several strides -> :class:`Predicted`, by a branch for classes and one for boxes on each.

    A branch is two 3 x 3 convolutions with BatchNorm and SiLU, and a linear map.

    Args:
        dims: channels of the maps, finest first.
        num_classes: of objects.
        strides: of the maps.
        bins: of the distributions.
        norm: ``eps`` and ``momentum`` of the norms.

    >>> head = DecoupledHead((8, 16), 3, (8, 16)).eval()
    >>> made = head([torch.randn(2, 4, 5, 8), torch.randn(2, 2, 3, 16)])
    >>> made.logits.shape, made.boxes.shape
    (torch.Size([2, 26, 3]), torch.Size([2, 26, 4]))
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, strides: Sequence[int] = (8, 16, 32), bins: int = 16, **norm: Any
    ):
        super().__init__()
        self.dims, self.strides = check_ints("dims", dims, least=1), check_ints("strides", strides, least=1)
        self.num_classes, self.bins = check_int("num_classes", num_classes, least=1), check_int("bins", bins, least=2)
        if len(self.dims) != len(self.strides) or not self.dims:
            raise ValueError(f"dims and strides must be of the same maps, got {self.dims} and {self.strides}")
        box_dim, class_dim = max(16, dims[0] // 4, 4 * bins), max(dims[0], min(num_classes, 100))

        def branch(width: int, inner: int, out: int) -> nn.Sequential:
            return nn.Sequential(conv(width, inner, 3, **norm), conv(inner, inner, 3, **norm), nn.Linear(inner, out))

        self.boxes = nn.ModuleList(branch(d, box_dim, 4 * bins) for d in self.dims)
        self.classes = nn.ModuleList(branch(d, class_dim, num_classes) for d in self.dims)
        # Never trained, and a parameter because released detectors of this kind count them.
        self.places = nn.Parameter(torch.arange(bins, dtype=torch.get_default_dtype()), requires_grad=False)
        for box, kind, stride in zip(self.boxes, self.classes, self.strides, strict=True):
            last, first = kind[-1], box[-1]  # type: ignore[index]
            nn.init.ones_(first.bias)
            nn.init.constant_(last.bias, math.log(EXPECTED / num_classes / (SIDE / stride) ** 2))

    def forward(self, maps: Sequence[Tensor]) -> Predicted:
        """What the points of all maps say."""
        maps = check_tensors("maps", maps)
        found = [tuple(x.shape) for x in maps]
        if len(maps) != len(self.dims) or any(
            x.dim() != 4 or x.shape[-1] != d for x, d in zip(maps, self.dims, strict=True)
        ):
            raise ValueError(f"maps must be (B, H, W, C) with C={self.dims}, got {found}")
        check_batch(**{f"maps[{i}]": x for i, x in enumerate(maps)})
        logits = torch.cat([f(x).flatten(1, 2) for f, x in zip(self.classes, maps, strict=True)], 1)
        bins = torch.cat([f(x).flatten(1, 2) for f, x in zip(self.boxes, maps, strict=True)], 1)
        points, strides = grid_points([x.shape[1:3] for x in maps], self.strides, logits)
        return Predicted(logits, bins.unflatten(-1, (4, self.bins)), points, strides, self.places)


class Assigned(NamedTuple):
    """Which points answer for an object.

    Args:
        found: (B, N) boolean, the points that do.
        object: (B, N) for which of the image's objects.
        scores: (B, N, classes) what the class branch is to say, zero elsewhere.
    """

    found: Tensor
    object: Tensor
    scores: Tensor


@torch.no_grad()
def task_aligned(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    labels: Tensor,
    truth: Tensor,
    exists: Tensor,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    eps: float = 1e-9,
) -> Assigned:
    """An object's points are those inside it of the largest ``t = score^alpha overlap^beta > 0``, at most ``topk``.

    A point that several objects want goes to the one it overlaps most. What its class branch is to say is t, scaled so
    that an object's largest is the largest overlap of its points.

    Args:
        scores: (B, N, classes) in [0, 1].
        boxes: (B, N, 4) corners, as predicted.
        points: (N, 2).
        labels: (B, M) of objects; truth: (B, M, 4) their corners; exists: (B, M) boolean, which of them there are.
        topk, alpha, beta: as above.
        eps: of divisions, and how far inside a point must lie.
    """
    count = truth.shape[1]
    if not count:
        nobody = torch.zeros_like(scores[..., 0])
        return Assigned(nobody.bool(), nobody.long(), torch.zeros_like(scores))
    low, high = points - truth[:, :, None, :2], truth[:, :, None, 2:] - points
    inside = (torch.minimum(low, high).amin(-1) > eps) & exists[..., None]  # (B, M, N)
    overlap = torch.where(inside, complete_overlap(truth[:, :, None], boxes[:, None]).clamp(min=0), 0)
    score = scores.mT.gather(1, labels[..., None].expand(-1, -1, scores.shape[1]))
    aligned = torch.where(inside, score**alpha * overlap**beta, 0)
    best = aligned.topk(min(topk, aligned.shape[-1]), -1).indices
    chosen = torch.zeros_like(inside).scatter(-1, best, True) & (aligned > 0)
    several = chosen.sum(1, keepdim=True) > 1
    most = torch.zeros_like(inside).scatter(1, overlap.argmax(1, keepdim=True), True)
    chosen = torch.where(several, most, chosen)
    aligned, overlap = aligned * chosen, overlap * chosen
    weight = (aligned * overlap.amax(-1, keepdim=True) / (aligned.amax(-1, keepdim=True) + eps)).amax(1)
    found, which = chosen.any(1), chosen.int().argmax(1)
    goal = torch.zeros_like(scores).scatter(2, labels.gather(1, which)[..., None], 1.0)
    return Assigned(found, which, goal * (weight * found)[..., None])


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """(...) of distributions (..., bins) and what they are to mean: cross entropy of both whole numbers around it.

    Each counts by how near it is. Targets are cut to ``bins - 1.01``.

    >>> even = torch.zeros(1, 4)
    >>> round(float(distribution_focal_loss(even, torch.tensor([1.25]))), 4)  # log 4
    1.3863
    """
    if logits.shape[-1] < 2 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must be (...) for logits (..., bins) of two bins at least, got {tuple(target.shape)} and "
            f"{tuple(logits.shape)}"
        )
    target = target.clamp(0, logits.shape[-1] - 1.01)
    below = target.long()
    chance = logits.log_softmax(-1)
    near, far = (chance.gather(-1, (below + i)[..., None]).squeeze(-1) for i in (0, 1))
    share = target - below
    return -(near * (1 - share) + far * share)


def check_targets(target: Any, count: int, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """(boxes, labels) of every image.

    Raises:
        TypeError: no sequence of mappings.
        ValueError: another number of images, boxes that are not (n, 4) of finite numbers, reversed ones or such without
            an area, labels that are not (n,) of 0 to ``num_classes - 1``.
    """
    check_type("target", target, Sequence, "one mapping with 'boxes' and 'labels' for each image")
    if len(target) != count:
        raise ValueError(f"target must have one entry for each of {count} images, got {len(target)}")
    out = []
    for i, own in enumerate(target):
        check_type(f"target[{i}]", own, Mapping, "a mapping with 'boxes' and 'labels'")
        if missing := [name for name in ("boxes", "labels") if name not in own]:
            raise ValueError(f"target[{i}] has no {missing[0]!r}, got {sorted(own)}")
        boxes, labels = own["boxes"], own["labels"]
        if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
            raise ValueError(f"target[{i}]['boxes'] must be (n, 4) of floating point, got {describe(boxes)}")
        check_whole(f"target[{i}]['labels']", labels, "an integer tensor")
        if tuple(labels.shape) != (len(boxes),):
            raise ValueError(f"target[{i}]['labels'] must be (n,)={(len(boxes),)}, got {tuple(labels.shape)}")
        if len(boxes):
            wrong = ~(torch.isfinite(boxes).all(-1) & (boxes[:, 2:] > boxes[:, :2]).all(-1))
            if bool(wrong.any()):
                raise ValueError(
                    f"target[{i}]['boxes'] must be x1 < x2 and y1 < y2 in pixels, got {boxes[wrong][0].tolist()}; "
                    "leave objects without an area out"
                )
            if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise ValueError(f"target[{i}]['labels'] must be 0 to {num_classes - 1}, got {labels.tolist()}")
        out.append((boxes, labels))
    return out


def side_by_side(targets: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, M) labels, (B, M, 4) boxes and (B, M) which of them exist, M the most objects of an image."""
    most = max((len(labels) for _, labels in targets), default=0)
    labels = torch.zeros(len(targets), most, dtype=torch.long, device=like.device)
    boxes, exists = like.new_zeros(len(targets), most, 4), torch.zeros_like(labels, dtype=torch.bool)
    for i, (box, label) in enumerate(targets):
        labels[i, : len(label)], boxes[i, : len(label)], exists[i, : len(label)] = label.to(labels), box.to(boxes), True
    return labels, boxes, exists


def check_weights(weights: Any) -> tuple[float, ...]:
    """Weights of the three terms of the loss, 0 or more."""
    if not isinstance(weights, Sequence) or len(weights) != 3:
        raise ValueError(f"weights must be three, of boxes, classes and distributions, got {describe(weights)}")
    return tuple(check_real("weights", w, least=0) for w in weights)


def detection_terms(
    made: Predicted, target: Any, weights: Sequence[float] = (7.5, 0.5, 1.5), **assignment: Any
) -> dict[str, Tensor]:
    """``box``, ``class`` and ``distribution``, weighted; their sum trains.

    One less the complete overlap and the distributions' loss, at points that answer for an object, weighted by what
    their class branch is to say; and the binary cross entropy of all classes at all points. Each over the sum of what
    class branches are to say, at least 1.

    Args:
        made: of a head.
        target: for each image a mapping with ``boxes`` (n, 4), corners in pixels, and ``labels`` (n,); n may be 0.
        weights: of the three.
        assignment: ``topk``, ``alpha``, ``beta`` of :func:`task_aligned`.

    Raises:
        TypeError, ValueError: as :func:`check_targets`.
    """
    check_type("made", made, Predicted)
    weights = check_weights(weights)
    high = stats_dtype(made.logits.dtype)
    targets = check_targets(target, *made.logits.shape[::2])
    boxes, logits = made.boxes, made.logits.to(high)
    labels, truth, exists = side_by_side(targets, boxes)
    assigned = task_aligned(logits.sigmoid(), boxes, made.points.to(high), labels, truth, exists, **assignment)
    total = assigned.scores.sum().clamp(min=1)
    entropy = F.binary_cross_entropy_with_logits(logits, assigned.scores, reduction="sum") / total
    image, point = assigned.found.nonzero(as_tuple=True)
    weight = assigned.scores[image, point].sum(-1)
    stride = made.strides.to(high)[point][:, None]
    own = truth[image, assigned.object[image, point]] / stride if truth.shape[1] else truth.new_zeros(0, 4)
    overlap = complete_overlap(boxes[image, point] / stride, own)
    middle = made.points.to(high)[point] / stride
    away = torch.cat([middle - own[:, :2], own[:, 2:] - middle], -1)
    spread = distribution_focal_loss(made.bins.to(high)[image, point], away).mean(-1)
    return {
        "box": weights[0] * ((1 - overlap) * weight).sum() / total,
        "class": weights[1] * entropy,
        "distribution": weights[2] * (spread * weight).sum() / total,
    }


@torch.no_grad()
def detections(
    made: Predicted,
    size: Sequence[int],
    threshold: float = 0.25,
    overlap: float = 0.7,
    most: int = 300,
    several: bool = False,
    candidates: int = 30000,
) -> list[Detections]:
    """The boxes of every image, best first, doubles of a class suppressed.

    Args:
        made: of a head.
        size: height and width of images; boxes are cut to them.
        threshold: boxes of smaller scores are left out.
        overlap: two boxes of one class that overlap by more are one object.
        most: boxes of an image.
        several: a point may give its box several classes; else the best.
        candidates: how many boxes, the best, are compared with each other.
    """
    check_real("threshold", threshold, least=0, most=1)
    check_flag("several", several)
    check_int("most", most, least=1)
    check_int("candidates", candidates, least=1)
    height, width = check_grid("size", size, (2,))
    boxes = made.boxes
    limit = boxes.new_tensor([width, height, width, height])
    out = []
    for box, score in zip(boxes, made.logits.to(boxes.dtype).sigmoid(), strict=True):
        if several:
            at, label = (score > threshold).nonzero(as_tuple=True)
            best = score[at, label]
        else:
            best, label = score.max(-1)
            at = (best > threshold).nonzero().squeeze(1)
            best, label = best[at], label[at]
        if len(at) > candidates:
            best, index = best.topk(candidates)
            at, label = at[index], label[index]
        held = box[at].clamp(min=0).minimum(limit)
        keep = suppress_boxes(held, best, overlap, label, most)
        out.append(Detections(held[keep], best[keep], label[keep]))
    return out


class AnchorFreeDetector(TaskModel):
    """Images (B, C, H, W) -> :class:`Predicted`; :meth:`predict` gives the boxes.

    Args:
        encoder: images to maps (B, H, W, C), finest first.
        neck: maps to maps.
        head: maps to :class:`Predicted`.
        weights: of boxes, classes and distributions in the loss.
        assignment: ``topk``, ``alpha``, ``beta`` of :func:`task_aligned`.

    >>> from attnlib.models.detect.pan import PAN, CSPBackbone
    >>> dims = (8, 8, 8, 16, 16)
    >>> model = AnchorFreeDetector(CSPBackbone(dims, (1, 1, 1, 1)), PAN(dims[2:]), DecoupledHead(dims[2:], 3))
    >>> target = [{"boxes": torch.tensor([[3.0, 5.0, 30.0, 21.0]]), "labels": torch.tensor([2])}]
    >>> sorted(model.loss(model(torch.rand(1, 3, 50, 64)), target))
    ['box', 'class', 'distribution']
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        neck: nn.Module,
        head: nn.Module,
        weights: Sequence[float] = (7.5, 0.5, 1.5),
        assignment: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if encoder is not None:
            self.encoder = encoder
        self.neck, self.head = neck, head
        self.weights = check_weights(weights)
        self.assignment = dict(assignment or {})
        if unknown := sorted(set(self.assignment) - {"topk", "alpha", "beta"}):
            raise ValueError(f"assignment may have topk, alpha and beta, got {unknown}")
        for name, value in self.assignment.items():
            if name == "topk":
                check_int("assignment['topk']", value, least=1)
            else:
                check_real(f"assignment[{name!r}]", value, least=0)

    def features(self, *images: Tensor) -> Sequence[Tensor]:
        """Maps for the neck."""
        made: Sequence[Tensor] = self.encoder(*images)
        return made

    def forward(self, x: Tensor) -> Predicted:
        """What every point says."""
        made: Predicted = self.head(self.neck(self.features(x)))
        return made

    def loss(self, prediction: Predicted, target: Any) -> dict[str, Tensor]:
        """As :func:`detection_terms`.

        Args:
            prediction: of :meth:`forward`.
            target: for each image a mapping with ``boxes`` (n, 4), corners in pixels, and ``labels`` (n,); n may be 0.
        """
        return detection_terms(prediction, target, self.weights, **self.assignment)

    def predict(self, *images: Tensor, **settings: Any) -> list[Detections]:
        """Boxes of every image; settings of :func:`detections`: ``threshold``, ``overlap``, ``most``, ``several``.

        Images by position or by the names of :meth:`forward`.
        """
        inputs = {name: settings.pop(name) for name in list(settings) if isinstance(settings[name], Tensor)}
        made = self(*images, **inputs)
        return detections(made, (*images, *inputs.values())[0].shape[-2:], **settings)


__all__ = [
    "AnchorFreeDetector", "Assigned", "DecoupledHead", "Predicted", "check_targets", "detection_terms", "detections",
    "distribution_focal_loss", "grid_points", "task_aligned",
]  # fmt: skip
