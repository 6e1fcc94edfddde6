"""Boxes with a heading, seen from above and in space: overlaps, distances, and the suppression of doubles.

A box is (x, y, z, length, width, height, heading): its middle, its sides along its own axes, and the angle by which it
is turned about the vertical, in radians.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_int, check_real
from .boxes import keep_best

#: Corners of a square of side one, counterclockwise.
_SQUARE = ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))


def check_turned(name: str, boxes: Tensor) -> None:
    """Refuse what is not (N, 7) of numbers."""
    if boxes.dim() != 2 or boxes.shape[1] != 7 or not boxes.is_floating_point():
        raise ValueError(f"{name} must be (N, 7) of x, y, z, three sides and a heading, got {tuple(boxes.shape)}")


def footprint(boxes: Tensor) -> Tensor:
    """(N, 4, 2) corners from above, counterclockwise.

    >>> footprint(torch.tensor([[0.0, 0.0, 0.0, 2.0, 4.0, 1.0, 0.0]]))[0].tolist()
    [[1.0, 2.0], [-1.0, 2.0], [-1.0, -2.0], [1.0, -2.0]]
    """
    x, y = (boxes[:, None, 3:5] * boxes.new_tensor(_SQUARE)).unbind(-1)
    cos, sin = boxes[:, 6:].cos(), boxes[:, 6:].sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1) + boxes[:, None, :2]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(N, P) which of the points (N, P, 2) lie in the footprint of their box, border included."""
    x, y = (points - boxes[:, None, :2]).unbind(-1)
    cos, sin = boxes[:, 6:].cos(), boxes[:, 6:].sin()
    own = torch.stack([x * cos + y * sin, y * cos - x * sin], -1).abs()
    half = boxes[:, None, 3:5] / 2
    return (own <= half * (1 + 16 * torch.finfo(boxes.dtype).eps)).all(-1)


def shared_area(a: Tensor, b: Tensor) -> Tensor:
    """(N,) area that the footprints of a pair (N, 7), (N, 7) share, without gradients.

    The corners of either that lie in the other, and the points where sides cross, in the order of their angles about
    their middle: a convex polygon.

    >>> box = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 1.0, 0.0]])
    >>> turned = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 1.0, torch.pi / 4]])
    >>> round(float(shared_area(box, turned)), 4)
    3.3137
    """
    check_turned("a", a)
    check_turned("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must be pairs, got {len(a)} and {len(b)} boxes")
    with torch.no_grad():
        middle = (a[:, :2] + b[:, :2]) / 2
        a, b = (torch.cat([t[:, :2] - middle, t[:, 2:]], 1) for t in (a, b))
        p, q = footprint(a), footprint(b)
        along, across = p.roll(-1, 1) - p, q.roll(-1, 1) - q
        between = q[:, None] - p[:, :, None]
        turn = _cross(along[:, :, None], across[:, None])
        parallel = turn == 0
        turn = torch.where(parallel, 1, turn)
        t, s = _cross(between, across[:, None]) / turn, _cross(between, along[:, :, None]) / turn
        meet = ~parallel & (t >= 0) & (t <= 1) & (s >= 0) & (s <= 1)
        crossings = p[:, :, None] + t.unsqueeze(-1) * along[:, :, None]
        points = torch.cat([p, q, crossings.flatten(1, 2)], 1)
        there = torch.cat([_inside(p, b), _inside(q, a), meet.flatten(1)], 1)
        points = points.masked_fill(~there.unsqueeze(-1), 0)
        centre = points.sum(1, keepdim=True) / there.sum(1).clamp(min=1)[:, None, None]
        apart = points - centre
        angle = torch.atan2(apart[..., 1], apart[..., 0]).masked_fill(~there, torch.inf)
        order = angle.argsort(1)
        apart = apart.gather(1, order.unsqueeze(-1).expand_as(apart))
        last = there.sum(1).clamp(min=1)[:, None] - 1  # those that are not there repeat the last
        index = torch.arange(points.shape[1], device=a.device).expand(len(a), -1).minimum(last)
        ring = apart.gather(1, index.unsqueeze(-1).expand_as(apart))
        area = _cross(ring, ring.roll(-1, 1)).sum(1) / 2
        return torch.where(there.any(1), area.clamp(min=0), 0)


def overlap_above(a: Tensor, b: Tensor) -> Tensor:
    """(N,) intersection over union of the footprints of pairs."""
    shared = shared_area(a, b)
    union = a[:, 3:5].prod(1) + b[:, 3:5].prod(1) - shared
    return shared / union.clamp(min=torch.finfo(a.dtype).tiny)


def overlap_in_space(a: Tensor, b: Tensor) -> Tensor:
    """(N,) intersection over union of the volumes of pairs, without gradients."""
    with torch.no_grad():
        high = torch.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
        low = torch.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
        shared = shared_area(a, b) * (high - low).clamp(min=0)
        union = a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared
        return shared / union.clamp(min=1e-6)


def distance_overlap(a: Tensor, b: Tensor) -> Tensor:
    """(N,) overlap of pairs as if not turned, less the squared distance of their middles by that across both.

    Reference: Zheng et al., 2020, arXiv 1911.08287, in three dimensions.
    """
    low_a, high_a, low_b, high_b = (t[:, :3] + side * t[:, 3:6] / 2 for t in (a, b) for side in (-1, 1))
    shared = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(1)
    union = a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared
    across = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0).square().sum(1)
    return (shared / union - (a[:, :3] - b[:, :3]).square().sum(1) / across).clamp(-1, 1)


def suppress(boxes: Tensor, scores: Tensor, threshold: float, most: int | None = None) -> Tensor:
    """(K,) boxes that stay, best first: those that no better one that stays overlaps by more than ``threshold``.

    Args:
        boxes: (N, 7).
        scores: (N,).
        threshold: of the overlap from above, 0 to 1.
        most: how many may stay.

    >>> boxes = torch.tensor([[0.0, 0, 0, 2, 2, 1, 0], [0.1, 0, 0, 2, 2, 1, 0], [5.0, 0, 0, 2, 2, 1, 0]])
    >>> suppress(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
    [1, 2]
    """
    check_turned("boxes", boxes)
    check_real("threshold", threshold, least=0, most=1)
    if most is not None:
        check_int("most", most, least=1)
    if tuple(scores.shape) != (len(boxes),):
        raise ValueError(f"scores must be (N,)={(len(boxes),)}, got {tuple(scores.shape)}")
    reach = boxes[:, 3:5].norm(dim=1) / 2

    def near(first: Tensor, others: Tensor) -> Tensor:
        gone = (boxes[others, :2] - boxes[first, :2]).norm(dim=1) < reach[others] + reach[first]
        others = others[gone]
        gone[gone.clone()] = overlap_above(boxes[first].expand(len(others), -1), boxes[others]) > threshold
        return gone

    return keep_best(scores, near, most)


__all__ = [
    "check_turned", "distance_overlap", "footprint", "overlap_above", "overlap_in_space", "shared_area", "suppress"
]  # fmt: skip
