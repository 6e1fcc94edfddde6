"""From a map over an image to a prompt of a segmenter: points, boxes and connected components.

The arithmetic is that of :mod:`attnlib.ops.points`; here it is put together, components are found by scipy, and the
result is spelled as transformers' segmenters read it.

>>> from attnlib.look.prompts import from_map
>>> scores = torch.zeros(8, 8)
>>> scores[2:4, 5:7] = 1.0
>>> prompt = from_map(scores, (80, 120), rule="component")
>>> prompt.points.tolist(), prompt.labels.tolist(), prompt.boxes.tolist()
([[[82.5, 25.0], [7.5, 5.0]]], [[1, 0]], [[[75.0, 20.0, 105.0, 40.0]]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_flag, check_int, check_real, check_size, check_type, shaped
from ..extras import need
from ..ops.points import (
    ABSENT,
    Points,
    _constant,
    band_points,
    cell_centres,
    continuous_points,
    extreme_points,
    min_max,
    square_grid,
)

RULES = ("extremes", "bands", "component")
BY = ("size", "sum", "peak")


@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch of maps, in pixels of the image.

    Attributes:
        points: (B, K, 2) x, y.
        labels: (B, K) 1, 0, -1, or :data:`attnlib.ops.points.ABSENT`.
        boxes: (B, M, 4) x1, y1, x2, y2 of the components, the most important first; zeros where there is none.
        components: (B, h, w) which component a cell belongs to: 0 none, 1 the first, and so on.
        image_size: (height, width).
    """

    points: Tensor
    labels: Tensor
    boxes: Tensor
    components: Tensor
    image_size: tuple[int, int]

    @property
    def empty(self) -> Tensor:
        """(B,) maps that give no prompt: no points, no box."""
        return ~((self.labels != ABSENT).any(1) | self.has_box.any(1))

    @property
    def has_box(self) -> Tensor:
        """(B, M) which boxes there are."""
        return self.boxes[..., 2] > self.boxes[..., 0]

    def inputs(self, target: int = 1024, box: bool = False) -> dict[str, Tensor]:
        """What transformers' ``SamModel`` reads besides pixels: one prompt per image.

        Args:
            target: pixels of the longer side of what the model reads.
            box: give the first box too.

        Returns:
            ``input_points`` (B, 1, K, 2), ``input_labels`` (B, 1, K) and, asked for, ``input_boxes`` (B, 1, 4).

        Raises:
            ValueError: a map without a prompt, or without a box where boxes are asked for.
        """
        check_int("target", target, least=1)
        check_flag("box", box)
        if bool(self.empty.any()):
            raise ValueError(f"maps {self.empty.nonzero()[:, 0].tolist()} give no prompt: they are the same everywhere")
        scale = target / max(self.image_size)
        found = {"input_points": self.points[:, None] * scale, "input_labels": self.labels[:, None]}
        if not self.points.shape[1]:
            found = {}
        if box:
            missing = ~self.has_box.any(1)
            if bool(missing.any()):
                raise ValueError(f"maps {missing.nonzero()[:, 0].tolist()} have no component, so no box")
            found["input_boxes"] = self.boxes[:, :1] * scale
        return found


@shaped(mask="bool (B, h, w)", scores="float (B, h, w)")
def components(mask: Tensor, scores: Tensor | None = None, by: str = "size", connectivity: int = 2) -> Tensor:
    """Connected parts of masks.

    Args:
        mask: (B, h, w).
        scores: (B, h, w), for ``by="sum"`` and ``"peak"``.
        by: order of the parts: number of cells, sum or greatest of scores.
        connectivity: 1 for cells that share a side, 2 for corners too.

    Returns:
        (B, h, w) integers: 0 outside, 1 in the first part, 2 in the second.

    Raises:
        ImportError: scipy is not installed.

    >>> components(torch.tensor([[[True, False, True], [False, False, True]]]), connectivity=1).tolist()
    [[[2, 0, 1], [0, 0, 1]]]
    """
    check_choice("by", by, BY)
    check_int("connectivity", connectivity, least=1, most=2)
    if by != "size" and scores is None:
        raise ValueError(f"by={by!r} orders parts by scores, which are not given")
    ndimage = need("scipy.ndimage", "connected components")
    kernel = ndimage.generate_binary_structure(2, connectivity)
    out = np.zeros(tuple(mask.shape), dtype=np.int64)
    for number, cells in enumerate(mask.cpu().numpy()):
        labels, count = ndimage.label(cells, kernel)
        if not count:
            continue
        index = np.arange(1, count + 1)
        if by == "size":
            weight = np.bincount(labels.ravel(), minlength=count + 1)[1:].astype(float)
        else:
            assert scores is not None
            values = scores[number].detach().double().cpu().numpy()
            weight = np.asarray((ndimage.sum if by == "sum" else ndimage.maximum)(values, labels, index))
        rank = np.empty(count + 1, dtype=np.int64)
        rank[0] = 0
        rank[1 + np.argsort(-weight, kind="stable")] = index
        out[number] = rank[labels]
    return torch.from_numpy(out).to(mask.device)


@shaped(parts="whole (B, h, w)")
def component_boxes(parts: Tensor, image_size: Sequence[int], count: int | None = None) -> Tensor:
    """Boxes around the parts of :func:`components`.

    Args:
        parts: (B, h, w).
        image_size: (height, width) of the image that the map covers.
        count: M, the first ones; by default as many as the most that a map has.

    Returns:
        (B, M, 4) x1, y1, x2, y2 in pixels, the borders of the outermost cells; zeros where there is no such part.

    >>> component_boxes(torch.tensor([[[0, 1], [0, 0]]]), (10, 10)).tolist()
    [[[5.0, 0.0, 10.0, 5.0]]]
    """
    height, width = check_size("image_size", image_size)
    b, h, w = parts.shape
    most = int(parts.max()) if parts.numel() else 0
    count = most if count is None else check_int("count", count, least=0)
    boxes = torch.zeros(b, count, 4, device=parts.device)
    for number in range(min(count, most)):
        mine = parts == number + 1
        for axis, (along, cells, pixels) in enumerate(((mine.any(1), w, width), (mine.any(2), h, height))):
            at = torch.arange(cells, device=parts.device)
            low = torch.where(along, at, cells).amin(1)
            high = torch.where(along, at + 1, 0).amax(1)
            here = along.any(1)
            boxes[:, number, axis] = torch.where(here, low, 0) * (pixels / cells)
            boxes[:, number, axis + 2] = torch.where(here, high, 0) * (pixels / cells)
    return boxes


def _component_points(scores: Tensor, parts: Tensor, size: tuple[int, int]) -> Points:
    """The highest cell of the first part, and the lowest outside of it."""
    flat, inside = scores.detach().flatten(1), parts.flatten(1) == 1
    b, count = flat.shape
    if not b or not count:
        return Points(scores.new_zeros(b, 0, 2), torch.zeros(b, 0, dtype=torch.long, device=scores.device))
    best = flat.masked_fill(~inside, float("-inf")).argmax(1)
    worst = flat.masked_fill(inside, float("inf")).argmin(1)
    labels = torch.stack(
        [torch.where(inside.any(1), 1, ABSENT), torch.where(inside.any(1) & ~inside.all(1), 0, ABSENT)], 1
    )
    kind = torch.float64 if scores.dtype == torch.float64 else torch.float32
    points = cell_centres(torch.stack([best, worst], 1), parts.shape[1:], size, dtype=kind)
    return Points(points.masked_fill((labels == ABSENT)[..., None], 0), labels)


def from_map(
    map: Tensor,
    image_size: Sequence[int],
    rule: str = "extremes",
    threshold: float | None = None,
    count: int | None = None,
    positive: float = 0.8,
    negative: float = 0.2,
    part: float = 0.5,
    by: str = "size",
    connectivity: int = 2,
    upsample: float = 1,
    grid: Sequence[int] | None = None,
    continuous: bool = False,
) -> Prompts:
    """A prompt from a map that is high where the thing is.

    Args:
        map: (B, h, w) or (h, w) scores of any scale; (P,) of image tokens that fill a square; with ``grid``, (B, P).
        image_size: (height, width) of the image that the map covers.
        rule: which points. ``"extremes"``: the highest and as many lowest cells (GenSAM), those from ``threshold``
            (0.9) on, or ``count`` of them. ``"bands"``: the first ``count`` (30) of cells from ``positive`` on, up to
            ``negative``, and between (READ). ``"component"``: the highest cell of the first connected part, and the
            lowest outside of it (VL-SAM).
        threshold, count, positive, negative: see ``rule``; scores are scaled to [0, 1] first.
        part: cells from this score on make up the parts.
        by, connectivity: see :func:`components`.
        upsample: the map is resized by this before points are taken (GenSAM: 2).
        grid: (rows, columns) of image tokens.
        continuous: let points move with the map at full size, with gradient
            (:func:`attnlib.ops.points.continuous_points`).

    Returns:
        :class:`Prompts`. A map that is the same everywhere gives no prompt: no point, no box.

    Raises:
        ValueError: an empty map; scores that are not finite; image tokens that fill no square.
    """
    size = check_size("image_size", image_size)
    check_choice("rule", rule, RULES)
    check_flag("continuous", continuous)
    check_type("map", map, Tensor, "a tensor (B, h, w), (h, w) or (B, P)")
    check_real("part", part, least=0, most=1)
    check_real("upsample", upsample, above=0)
    if not map.is_floating_point():
        raise TypeError(f"map must hold floating-point scores, got {map.dtype}")
    scores = _laid_out(map, grid)
    if not scores.shape[1] * scores.shape[2]:
        raise ValueError(f"map is empty: it has shape {tuple(map.shape)}")
    if not bool(scores.detach().isfinite().all()):
        raise ValueError("map must be finite, but it holds NaN or infinity")
    scores = scores if scores.dtype == torch.float64 else scores.float()
    says = ~_constant(scores) if len(scores) else torch.ones(0, dtype=torch.bool, device=scores.device)
    scaled = min_max(scores, (1, 2))
    cells = scaled
    if upsample != 1:
        wider = (max(1, int(scores.shape[1] * upsample)), max(1, int(scores.shape[2] * upsample)))
        cells = min_max(F.interpolate(scaled[:, None], wider, mode="bilinear")[:, 0], (1, 2))
    mask = (cells >= part) & says[:, None, None]
    parts = components(mask, cells, by, connectivity)
    if rule == "extremes":
        least = None if count is not None else 0.9 if threshold is None else threshold
        found = extreme_points(cells, size, count, least)
    elif rule == "bands":
        found = band_points(cells, size, 30 if count is None else count, positive, negative)
    else:
        found = _component_points(cells, parts, size)
    labels = found.labels.masked_fill(~says[:, None], ABSENT)
    keep = (labels != ABSENT).any(0)
    points, labels = found.points[:, keep], labels[:, keep]
    if continuous:
        fine = F.interpolate(scaled[:, None], size, mode="bilinear")[:, 0]
        moved = continuous_points(fine, points)
        points = torch.where((labels == ABSENT)[..., None], 0, moved)
    return Prompts(points, labels, component_boxes(parts, size), parts, size)


def _laid_out(map: Tensor, grid: Any) -> Tensor:
    """(B, h, w)."""
    if map.dim() == 3 and grid is None:
        return map
    if map.dim() == 2 and grid is None:
        return map[None]
    if map.dim() not in (1, 2):
        raise ValueError(f"map must be (B, h, w), (h, w) or, with grid, (B, P), got {tuple(map.shape)}")
    h, w = check_size("grid", grid) if grid is not None else square_grid(map.shape[-1], "map")
    if h * w != map.shape[-1]:
        raise ValueError(f"grid={(h, w)} has {h * w} cells, but map has {map.shape[-1]} image tokens")
    return map.reshape(-1, h, w)
