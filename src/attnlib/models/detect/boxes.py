"""Boxes: corners and centres, overlaps, deltas, and matching them one to one.

A box is (x1, y1, x2, y2) here, corners, unless a name says centres: (cx, cy, w, h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...checks import check_axes, check_int, check_real, describe
from ...extras import need
from ...nn.dense.plain_detr import check_boxes

#: Deltas of widths and heights beyond the logarithm of this ratio are cut.
RATIO = 16 / 1000


def to_centres(boxes: Tensor) -> Tensor:
    """Corners (..., 4) -> centres and sizes.

    >>> to_centres(torch.tensor([0.0, 0.0, 2.0, 4.0])).tolist()
    [1.0, 2.0, 2.0, 4.0]
    """
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(first + second) / 2, second - first], -1)


def to_corners(boxes: Tensor) -> Tensor:
    """Centres and sizes (..., 4) -> corners."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the generalized one, of every pair: (N, 4), (M, 4) -> twice (N, M).

    Reference: Rezatofighi et al., 2019, arXiv 1902.09630. Boxes without an area overlap nothing.
    """
    check_boxes("a", a)
    check_boxes("b", b)
    return pair_overlaps(a[:, None], b)


def common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much both boxes of pairs hold, one or the other, and their hull: (..., 2 r), (..., 2 r) -> three of (...).

    Args:
        a, b: intervals, boxes or blocks of r axes, which broadcast: first all lower ends, then all upper ones.

    >>> common(torch.tensor([0.0, 2.0]), torch.tensor([[1.0, 3.0], [3.0, 4.0]]))
    (tensor([1., 0.]), tensor([3., 3.]), tensor([3., 4.]))
    """
    r = a.shape[-1] // 2
    sizes = [(x[..., r:] - x[..., :r]).prod(-1) for x in (a, b)]
    inner = (torch.min(a[..., r:], b[..., r:]) - torch.max(a[..., :r], b[..., :r])).clamp(min=0).prod(-1)
    hull = (torch.max(a[..., r:], b[..., r:]) - torch.min(a[..., :r], b[..., :r])).prod(-1)
    return inner, sizes[0] + sizes[1] - inner, hull


def pair_overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the generalized one, of pairs that broadcast, as :func:`common` takes them.

    >>> [x.tolist() for x in pair_overlaps(torch.tensor([0.0, 2.0]), torch.tensor([[0.0, 2.0], [3.0, 4.0]]))]
    [[1.0, 0.0], [1.0, -0.25]]
    """
    inner, union, hull = common(a, b)
    tiny = torch.finfo(a.dtype).tiny
    iou = inner / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def complete_overlap(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """(...) complete intersection over union of pairs (..., 4), that broadcast: it falls with distance and shape, too.

    ``iou - d^2 / c^2 - s v``, d between middles, c across both boxes, ``v = (4 / pi^2) (atan(w_b / h_b) -
    atan(w_a / h_a))^2`` and ``s = v / (1 - iou + v)`` without a gradient. Reference: Zheng et al., 2020, arXiv
    1911.08287.

    Args:
        a, b: corners.
        eps: keeps boxes without an area finite.

    >>> box = torch.tensor([0.0, 0.0, 2.0, 2.0])
    >>> round(float(complete_overlap(box, box)), 4), round(float(complete_overlap(box, box + 1)), 4)
    (1.0, 0.0317)
    """
    width, height = zip(*((x[..., 2] - x[..., 0], x[..., 3] - x[..., 1] + eps) for x in (a, b)), strict=True)
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    iou = shared / (width[0] * height[0] + width[1] * height[1] - shared + eps)
    across = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    apart = (b[..., :2] + b[..., 2:] - a[..., :2] - a[..., 2:]) / 2
    shape = (4 / math.pi**2) * (torch.atan(width[1] / height[1]) - torch.atan(width[0] / height[0])).square()
    with torch.no_grad():
        share = shape / (shape - iou + (1 + eps))
    return iou - apart.square().sum(-1) / (across.square().sum(-1) + eps) - share * shape


def suppress_boxes(
    boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None = None, most: int | None = None
) -> Tensor:
    """(K,) boxes that stay, best first: those that no better one that stays overlaps by more than ``threshold``.

    Args:
        boxes: (N, 4) corners.
        scores: (N,).
        threshold: of intersection over union, 0 to 1.
        labels: (N,); boxes of different labels leave each other alone.
        most: how many may stay.

    >>> boxes = torch.tensor([[0.0, 0, 2, 2], [0.1, 0, 2, 2], [5.0, 0, 7, 2]])
    >>> suppress_boxes(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
    [1, 2]
    """
    check_boxes("boxes", boxes)
    check_real("threshold", threshold, least=0, most=1)
    if most is not None:
        check_int("most", most, least=1)
    for name, x in (("scores", scores), ("labels", labels)):
        if x is not None:
            check_axes(name, x, N=len(boxes))

    def near(first: Tensor, others: Tensor) -> Tensor:
        same = overlaps(boxes[first][None], boxes[others])[0][0] > threshold
        return same if labels is None else same & (labels[others] == labels[first])

    return keep_best(scores, near, most)


def keep_best(scores: Tensor, near: Callable[[Tensor, Tensor], Tensor], most: int | None = None) -> Tensor:
    """(K,) what stays, best first: what no better one that stays is near to.

    Args:
        scores: (N,).
        near: called with one's number and those of others, worse ones; says (n,) which of these are near it.
        most: how many may stay.

    >>> keep_best(torch.tensor([0.5, 0.9, 0.1]), lambda first, others: (others - first).abs() == 1).tolist()
    [1]
    """
    left = scores.sort(descending=True, stable=True).indices
    kept: list[Tensor] = []
    while len(left) and (most is None or len(kept) < most):
        first, left = left[0], left[1:]
        kept.append(first)
        left = left[~near(first, left)]
    return torch.stack(kept) if kept else left


def spans(size: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Width, height, width, height of images: (4,) of one (height, width), (B, 1, 4) of a tensor (B, 2) of them.

    >>> spans((2.0, 3.0), torch.zeros(1)).tolist()
    [3.0, 2.0, 3.0, 2.0]
    """
    if isinstance(size, Tensor):
        return size.to(like).flip(-1).repeat(1, 2).unsqueeze(1)
    return like.new_tensor([size[1], size[0]] * 2)


def apply_deltas(centres: Tensor, deltas: Tensor, size: Sequence[float] | Tensor | None = None) -> Tensor:
    """Boxes (..., 4) as centres and sizes, moved by deltas relative to their size, as corners.

    ``c' = c + wh * d_xy``, ``wh' = wh * exp(d_wh)``, the latter cut at ``|log(16 / 1000)|``, and both corners clipped
    to an image of ``size``: (height, width), or a tensor (B, 2) of one for each image.

    >>> apply_deltas(torch.tensor([5.0, 5.0, 2.0, 4.0]), torch.zeros(4)).tolist()
    [4.0, 3.0, 6.0, 7.0]
    """
    most = abs(math.log(RATIO))
    middle = centres[..., :2] + centres[..., 2:] * deltas[..., :2]
    out = to_corners(torch.cat([middle, centres[..., 2:] * deltas[..., 2:].clamp(-most, most).exp()], -1))
    if size is None:
        return out
    return out.clamp(min=0).clamp(max=spans(size, out))  # not minimum(), which halves the gradient on the border


def deltas_between(centres: Tensor, targets: Tensor, margin: float = 0.1) -> Tensor:
    """The deltas from boxes to targets, both as centres and sizes; sizes are divided by themselves plus ``margin``."""
    check_real("margin", margin, least=0)
    size = centres[..., 2:] + margin
    return torch.cat([(targets[..., :2] - centres[..., :2]) / size, (targets[..., 2:] / size).log()], -1)


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns (k,) of the cheapest one-to-one assignment of a cost (N, M), k the smaller side.

    Raises:
        ImportError: scipy is not installed.
        ValueError: a cost that is not finite.
    """
    if cost.dim() != 2 or not bool(torch.isfinite(cost).all()):
        raise ValueError(f"cost must be (N, M) of finite numbers, got {describe(cost)}")
    rows, columns = need("scipy.optimize", "matching boxes").linear_sum_assignment(cost.detach().cpu().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)
