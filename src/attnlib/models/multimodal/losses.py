"""Losses of boxes and masks that a language model puts out; all finite, whatever boxes and masks are given.

Boxes are corners ``x1, y1, x2, y2``; predicted ones may be turned over, targets may not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_real, describe
from ...types import stats_dtype
from ..detect.boxes import common
from ..losses import dice_scores

#: What boxes may be measured in: shares of the image, or its pixels.
UNITS = ("share", "pixel")


def check_target_boxes(name: str, boxes: Tensor, units: str | None = None) -> Tensor:
    """Boxes (..., 4) that exist.

    Args:
        units: ``"share"``: all numbers lie in [0, 1].

    Raises:
        ValueError: no four numbers, corners that are turned over or fall together, numbers that are no shares.
    """
    if not isinstance(boxes, Tensor) or boxes.dim() < 1 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"{name} must be (..., 4) floating point: x1, y1, x2, y2, got {describe(boxes)}")
    if units is not None:
        check_choice("units", units, UNITS)
    if torch.compiler.is_compiling() or not boxes.numel():
        return boxes
    wrong = ~(boxes[..., 2:] > boxes[..., :2]).all(-1)  # NaN too
    if bool(wrong.any()):
        raise ValueError(f"{name} holds {boxes[wrong][0].tolist()}, a box with x2 <= x1 or y2 <= y1")
    if units == "share" and bool(((boxes < 0) | (boxes > 1)).any()):
        at = boxes[((boxes < 0) | (boxes > 1)).any(-1)][0]
        raise ValueError(
            f"{name} holds {at.tolist()}, which are no shares of an image in [0, 1]; divide pixels by its width and "
            "height"
        )
    return boxes


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """(...) of boxes (..., 4), each with its partner: overlap over union, minus the share of their hull that is empty.

    ``IoU - (|hull| - |union|) / |hull|``, in (-1, 1]; Rezatofighi et al., 2019, arXiv 1902.09630. Boxes without an
    area overlap nothing; two of them at one point give 1.

    >>> generalized_iou(torch.tensor([0.0, 0, 1, 1]), torch.tensor([[0.0, 0, 1, 1], [1.0, 0, 2, 1]])).tolist()
    [1.0, 0.0]
    """
    for name, boxes in (("a", a), ("b", b)):
        if not isinstance(boxes, Tensor) or not boxes.dim() or boxes.shape[-1] != 4:
            raise ValueError(f"{name} must be (..., 4): x1, y1, x2, y2, got {describe(boxes)}")
    kind = stats_dtype(torch.promote_types(a.dtype, b.dtype))
    a, b = a.to(kind), b.to(kind)
    inner, union, hull = common(a, b)
    share = torch.where(union > 0, inner / torch.where(union > 0, union, 1), (hull == 0).to(kind))
    empty = torch.where(hull > 0, (hull - union) / torch.where(hull > 0, hull, 1), 0)
    return share - empty


def box_loss(
    prediction: Tensor, target: Tensor, l1: float = 2.0, giou: float = 0.2, compat: str | None = None
) -> dict[str, Tensor]:
    """``l1 * mean |p - t|`` and ``giou * mean (1 - GIoU)``, the second over predictions that are no turned over boxes.

    Args:
        prediction: (K, 4) corners in the units of the targets.
        target: (K, 4).
        l1, giou: weights.
        compat: ``"authors"``: where no prediction is a box, the second term is the constant ``2 * giou``, as TPO's.

    Returns:
        ``{"box_l1": ..., "box_giou": ...}``; zeros of no boxes.

    >>> box = torch.tensor([[0.1, 0.1, 0.5, 0.6]])
    >>> {name: float(term) for name, term in box_loss(box, box).items()}
    {'box_l1': 0.0, 'box_giou': 0.0}
    """
    check_choice("compat", compat, (None, "authors"))
    check_real("l1", l1, least=0)
    check_real("giou", giou, least=0)
    check_target_boxes("target", target)
    if not isinstance(prediction, Tensor) or prediction.shape != target.shape or prediction.dim() != 2:
        raise ValueError(
            f"prediction must be (K, 4) with as many boxes as target, got {describe(prediction)} for {describe(target)}"
        )
    kind = stats_dtype(prediction.dtype)
    p, t = prediction.to(kind), target.to(kind)
    count = max(1, p.numel())
    terms = {"box_l1": l1 * (p - t).abs().sum() / count}
    boxes = (p[:, 2:] >= p[:, :2]).all(-1)
    some = int(boxes.sum())
    # A product with zero keeps the graph of predictions without a single box.
    apart = (1 - generalized_iou(p[boxes], t[boxes])).mean() if some else 0 * p.sum()
    if not some and compat == "authors":
        apart = apart + 2
    terms["box_giou"] = giou * apart
    return terms


def mask_loss(
    prediction: Tensor, target: Tensor, bce: float = 2.0, dice: float = 0.5, eps: float = 1e-6, scale: float = 1000.0
) -> dict[str, Tensor]:
    """Binary cross-entropy and overlap of masks, means over masks.

    ``bce * mean_k mean_pixels BCE`` and ``dice * mean_k (1 - (2 sum p t / s + eps) / (sum p / s + sum t / s + eps))``,
    as LISA and READ have them.

    Args:
        prediction: (K, H, W) logits.
        target: (K, H, W) of 0 and 1.
        bce, dice: weights.
        eps, scale: the small number of the overlap, and by what its sums are divided.

    Returns:
        ``{"mask_bce": ..., "mask_dice": ...}``; zeros of no masks.
    """
    check_real("bce", bce, least=0)
    check_real("dice", dice, least=0)
    check_real("eps", eps, above=0)
    check_real("scale", scale, above=0)
    if not isinstance(prediction, Tensor) or prediction.dim() != 3 or target.shape != prediction.shape:
        raise ValueError(
            f"prediction and target must be (K, H, W) alike, got {describe(prediction)} and {describe(target)}"
        )
    kind = stats_dtype(prediction.dtype)
    logits, truth = prediction.to(kind).flatten(1), target.to(kind).flatten(1)
    count = max(1, len(logits))
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum() / count
    overlap = (1 - dice_scores(logits.sigmoid(), truth, smooth=eps * scale, squared=False)).sum() / count
    return {"mask_bce": bce * entropy, "mask_dice": dice * overlap}
