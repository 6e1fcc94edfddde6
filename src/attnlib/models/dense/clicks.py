"""Interactive segmentation by clicks: what is known of every pixel, who clicks next, how many clicks it takes.

A reference label holds one of five numbers per pixel: background for certain (0), perhaps background (1), unknown (2),
perhaps foreground (3), foreground for certain (4). Clicks make pixels around them certain, predictions make others
likely; a prediction that opposes what is likely makes it unknown again, and never touches what is certain.

The simulated user clicks where the largest error is deepest: at the pixel of the prediction's error that lies furthest
from its border. NoC, the number of clicks, is the number of the first click behind which the intersection over union
reaches a threshold.

Reference: Huang et al., 2023, "InterFormer", arXiv 2304.02942; the protocol is that of Sofiiuk et al., 2021, "Reviving
Iterative Training with Mask Guidance for Interactive Segmentation", arXiv 2102.06583.

>>> target = torch.zeros(12, 12, dtype=torch.bool)
>>> target[3:8, 4:9] = True
>>> click = next_click(torch.zeros_like(target), target)
>>> click
Click(y=5, x=6, positive=True)
>>> int((clicked(unknown((12, 12)), [click], radius=1) == FOREGROUND).sum())
5
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_int, check_ints, check_real, describe

BACKGROUND, MAYBE_BACKGROUND, UNKNOWN, MAYBE_FOREGROUND, FOREGROUND = range(5)


class Click(NamedTuple):
    """A click of a user.

    Args:
        y, x: row and column of a pixel, from 0.
        positive: it says that the pixel is foreground; background otherwise.
    """

    y: int
    x: int
    positive: bool


def unknown(size: Sequence[int]) -> Tensor:
    """A reference label (H, W) of which nothing is known."""
    height, width = check_ints("size", size, least=1)
    return torch.full((height, width), UNKNOWN, dtype=torch.long)


def check_click(click: Click | Sequence[int], size: Sequence[int]) -> Click:
    """A click inside an image of these sides.

    Raises:
        ValueError: it is outside, or no click.
    """
    try:
        y, x, positive = click
    except (TypeError, ValueError):
        raise ValueError(f"a click must be (y, x, positive), got {click!r}") from None
    y, x = check_int("y of a click", y), check_int("x of a click", x)
    if not (0 <= y < size[0] and 0 <= x < size[1]):
        raise ValueError(f"click at y={y}, x={x} lies outside the image of {size[0]} x {size[1]} pixels")
    if not isinstance(positive, bool):
        raise ValueError(f"positive of a click must be True or False, got {positive!r}")
    return Click(y, x, positive)


def _check_label(label: Tensor) -> None:
    if not isinstance(label, Tensor) or label.dim() != 2 or label.is_floating_point():
        raise ValueError(f"label must be a reference label (H, W) of whole numbers, got {describe(label)}")
    if label.numel() and not (BACKGROUND <= int(label.min()) and int(label.max()) <= FOREGROUND):
        raise ValueError(f"label holds {int(label.min())} to {int(label.max())}; possible: 0 to 4")


def _disk(size: Sequence[int], clicks: Sequence[Click], radius: float, device: torch.device) -> Tensor:
    """(H, W): pixels no further than ``radius`` from any of the clicks."""
    rows = torch.arange(size[0], device=device)[:, None]
    columns = torch.arange(size[1], device=device)
    out = torch.zeros(tuple(size), dtype=torch.bool, device=device)
    for click in clicks:
        out |= (rows - click.y) ** 2 + (columns - click.x) ** 2 <= radius**2
    return out


def clicked(label: Tensor, clicks: Iterable[Click | Sequence[int]], radius: float = 5, outer: float = 0) -> Tensor:
    """What is known behind some clicks that are made at once.

    Args:
        label: (H, W) what was known.
        clicks: of which kind and where.
        radius: pixels within it are certain, and what was certain before is overwritten.
        outer: pixels beyond it up to this much further are likely; those that both kinds of clicks claim are not.

    Returns:
        (H, W), another tensor.

    Raises:
        ValueError: a click outside the image, or no reference label.
    """
    _check_label(label)
    check_real("radius", radius, least=0)
    check_real("outer", outer, least=0)
    size = tuple(label.shape)
    made = [check_click(c, size) for c in clicks]
    new = torch.full_like(label, UNKNOWN)
    kinds = list(dict.fromkeys(c.positive for c in made))  # in the order of their first clicks
    wide = {}
    for positive in kinds:
        wide[positive] = _disk(size, [c for c in made if c.positive == positive], radius + outer, label.device)
        new[wide[positive]] = MAYBE_FOREGROUND if positive else MAYBE_BACKGROUND
    if len(kinds) == 2:
        new[wide[True] & wide[False]] = UNKNOWN
    for positive in kinds:
        near = _disk(size, [c for c in made if c.positive == positive], radius, label.device)
        new[near] = FOREGROUND if positive else BACKGROUND
    out = label
    for mode in range(5):
        out = _updated(out, new == mode, mode)
    return out


def predicted(label: Tensor, prediction: Tensor) -> Tensor:
    """What is known behind a prediction: unknown pixels become likely, likely ones that it opposes unknown.

    Args:
        label: (H, W) what was known.
        prediction: (H, W) boolean, or classes 0 and 1: what is foreground.
    """
    _check_label(label)
    if not isinstance(prediction, Tensor) or prediction.shape != label.shape:
        raise ValueError(f"prediction must be a mask {tuple(label.shape)}, got {describe(prediction)}")
    found = prediction == 1
    return _updated(_updated(label, found, MAYBE_FOREGROUND), ~found, MAYBE_BACKGROUND)


def _updated(label: Tensor, mask: Tensor, mode: int) -> Tensor:
    """A label in which pixels of ``mask`` are told ``mode``."""
    if mode == UNKNOWN:
        return label
    out = label.clone()
    if mode in (BACKGROUND, FOREGROUND):
        out[mask] = mode
        return out
    opposite = MAYBE_BACKGROUND if mode == MAYBE_FOREGROUND else MAYBE_FOREGROUND
    out[mask & (label == UNKNOWN)] = mode
    out[mask & (label == opposite)] = UNKNOWN
    return out


def squared_depth(mask: Tensor) -> Tensor:
    """(H, W): of every pixel of a mask the squared distance to the nearest pixel outside, beyond the border, too.

    Exact, in whole numbers; 0 outside. The work grows with the largest distance.

    >>> squared_depth(torch.ones(3, 5, dtype=torch.bool))[1].tolist()
    [1, 4, 4, 4, 1]
    """
    if not bool(mask.any()):
        return torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    rows_in, columns_in = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    whole = mask
    box = slice(int(rows_in[0]), int(rows_in[-1]) + 1), slice(int(columns_in[0]), int(columns_in[-1]) + 1)
    mask = mask[box]  # around it there is nothing of the mask
    height, width = mask.shape
    padded = torch.zeros(height + 2, width + 2, dtype=torch.bool, device=mask.device)
    padded[1:-1, 1:-1] = mask
    far = height + width + 4
    # Down and up every column: how far the last pixel outside is.
    at = torch.arange(height + 2, device=mask.device, dtype=torch.int32)[:, None].expand(height + 2, width + 2)
    above = at - torch.where(padded, -far, at).cummax(0).values
    below = torch.where(padded, far + height + 2, at).flip(0).cummin(0).values.flip(0) - at
    rows = torch.minimum(above, below)
    best = rows**2
    for step in range(1, width + 2):
        if step**2 >= int(best.max()):
            break
        best[:, step:] = torch.minimum(best[:, step:], rows[:, :-step] ** 2 + step**2)
        best[:, :-step] = torch.minimum(best[:, :-step], rows[:, step:] ** 2 + step**2)
    out = torch.zeros(whole.shape, dtype=best.dtype, device=mask.device)
    out[box] = best[1:-1, 1:-1]
    return out


def next_click(
    prediction: Tensor,
    target: Tensor,
    clicks: Sequence[Click] = (),
    shrink: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> Click | None:
    """Where a user who knows the truth clicks next.

    Args:
        prediction, target: (H, W) boolean, or classes 0 and 1: what is foreground.
        clicks: those made already; nobody clicks at the same pixel twice.
        shrink: 1 clicks where the larger error is deepest; more, anywhere that is deeper than ``1 / shrink`` of that,
            as in training; ``None``: anywhere in the larger error.
        generator: draws among pixels that are equally good; without one the first, in reading order, is taken for
            ``shrink=1``, and another generator draws otherwise.

    Returns:
        The click, or ``None`` when nothing is wrong that was not clicked at.

    Raises:
        ValueError: masks of different sizes, or ``shrink`` below 1.
    """
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor) or prediction.dim() != 2:
        raise ValueError(f"prediction must be a mask (H, W), got {describe(prediction)}")
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    if shrink is not None:
        check_real("shrink", shrink, least=1)
    found, true = (t == 1 for t in (prediction, target))
    free = torch.ones_like(true)
    for click in clicks:
        y, x, _ = check_click(click, true.shape)
        free[y, x] = False
    missed, wrong = squared_depth(true & ~found & free), squared_depth(found & ~true & free)
    deepest = int(missed.max()), int(wrong.max())
    if max(deepest) == 0:
        return None
    positive = deepest[0] > deepest[1]
    depth, most = (missed, deepest[0]) if positive else (wrong, deepest[1])
    if shrink is None:
        good = depth > 0
    elif shrink == 1:
        good = depth == most
    else:
        good = depth.double().sqrt() > most**0.5 / shrink
    places = good.nonzero()
    pick = 0
    if generator is not None or shrink != 1:
        pick = int(torch.randint(len(places), (1,), generator=generator))
    y, x = places[pick].tolist()
    return Click(y, x, positive)


def overlap(prediction: Tensor, target: Tensor) -> float:
    """Intersection over union of the foreground.

    Raises:
        ValueError: neither holds any foreground.
    """
    found, true = (t == 1 for t in (prediction, target))
    union = int((found | true).sum())
    if not union:
        raise ValueError("target and prediction hold no foreground, so that there is no intersection over union")
    return int((found & true).sum()) / union


class Interaction(NamedTuple):
    """What came of a simulated user.

    Args:
        overlaps: intersection over union behind every click.
        clicks: the clicks; fewer, where nothing was left to click at.
    """

    overlaps: list[float]
    clicks: list[Click]

    def number_of_clicks(self, threshold: float = 0.9, most: int | None = None) -> int:
        """NoC; see :func:`number_of_clicks`."""
        return number_of_clicks(self.overlaps, threshold, most)


def number_of_clicks(overlaps: Sequence[float], threshold: float = 0.9, most: int | None = None) -> int:
    """The first click behind which the overlap reaches the threshold, counted from 1; ``most`` where none does.

    Args:
        overlaps: behind every click.
        threshold: the wanted overlap.
        most: as many as there are overlaps by default.

    >>> number_of_clicks([0.5, 0.86, 0.91], 0.85), number_of_clicks([0.5, 0.86], 0.9, most=20)
    (2, 20)
    """
    check_real("threshold", threshold, least=0, most=1)
    most = len(overlaps) if most is None else check_int("most", most, least=1)
    return next((i for i, v in enumerate(overlaps[:most], 1) if v >= threshold), most)


def interact(
    predict: Callable[[Tensor], Tensor],
    target: Tensor,
    most: int = 20,
    radius: float = 5,
    outer: float = 0,
    stop_at: float | None = None,
    generator: torch.Generator | None = None,
) -> Interaction:
    """A simulated user clicks, a model predicts, by turns.

    Args:
        predict: from a reference label (H, W) to a mask (H, W) of the foreground; it holds the image.
        target: (H, W) the truth, boolean or classes 0 and 1.
        most: clicks.
        radius, outer: of clicks, as of :func:`clicked`.
        stop_at: an overlap at which the user is content; ``None``: never.
        generator: draws among equally good places to click.

    Raises:
        ValueError: a truth without foreground.
    """
    check_int("most", most, least=1)
    if not isinstance(target, Tensor) or target.dim() != 2 or not bool((target == 1).any()):
        raise ValueError(f"target must be a mask (H, W) with some foreground, got {describe(target)}")
    label, prediction = unknown(target.shape).to(target.device), torch.zeros_like(target)
    done = Interaction([], [])
    for _ in range(most):
        click = next_click(prediction, target, done.clicks, generator=generator)
        if click is not None:
            done.clicks.append(click)
            label = clicked(label, [click], radius, outer)
        prediction = predict(label)
        done.overlaps.append(overlap(prediction, target))
        label = predicted(label, prediction)
        if stop_at is not None and done.overlaps[-1] >= stop_at:
            break
    return done


def region_around(
    prediction: Tensor, label: Tensor, expand: float = 1.4, step: int = 32, least: int = 0
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) around what is predicted or certain, for a second look at it.

    Args:
        prediction: (H, W) what is foreground.
        label: (H, W) what is known.
        expand: the box is this many times as large as the tightest one, with the same middle.
        step: its ends are multiples of this, beyond the image at the most by less than it.
        least: shortest side.
    """
    _check_label(label)
    found = (prediction == 1) | (label == FOREGROUND) | (label == BACKGROUND)
    ends: list[tuple[int, int]] = []
    for axis, side in ((0, found.shape[1]), (1, found.shape[0])):
        at = found.any(axis).nonzero().flatten()
        low, high = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, side)
        middle = (low + high) / 2
        first, last = round(middle - expand * (middle - low)), round(middle - expand * (middle - high))
        first, last = max(0, first), min(side, last)
        if least:
            first, last = min(first, max(0, round(middle - least / 2))), max(last, min(side, round(middle + least / 2)))
        ends.append((first // step * step, -(-last // step) * step))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom
