"""From a map over an image to points: where a promptable segmenter is to look, and where it is not.

A map is (B, h, w) of scores, high where the thing is. Points are (B, K, 2) of ``x, y`` in pixels of the image, labels
(B, K) what a promptable segmenter reads: 1 on the thing, 0 off it, -1 for "says nothing", :data:`ABSENT` for no point.

Bands (:func:`band_points`), extremes (:func:`extreme_points`) and points that move with their map
(:func:`continuous_points`) are settings of READ (arXiv 2412.17741), GenSAM (arXiv 2312.07374) and MapSAM (arXiv
2411.06971).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_int, check_real, check_size, check_within, shaped

#: Label of a place in a batch that holds no point, as transformers' segmenters have it.
ABSENT = -10


class Points(NamedTuple):
    """Points of a prompt.

    >>> Points(torch.zeros(1, 2, 2), torch.tensor([[1, ABSENT]])).exist.tolist()
    [[True, False]]
    """

    points: Tensor  # (B, K, 2) x, y
    labels: Tensor  # (B, K)

    @property
    def exist(self) -> Tensor:
        """(B, K) which of them are points."""
        return self.labels != ABSENT


def square_grid(count: int, name: str = "scores") -> tuple[int, int]:
    """The sides of a square of ``count`` tokens.

    Raises:
        ValueError: ``count`` is no square number.

    >>> square_grid(576)
    (24, 24)
    """
    side = round(count**0.5)
    if side * side != count or not count:
        raise ValueError(f"{name} has {count} image tokens, which fill no square; give their grid=(rows, columns)")
    return side, side


@shaped(scores="float")
def min_max(scores: Tensor, dim: int | Sequence[int] = -1) -> Tensor:
    """``(s - min) / (max - min)`` along axes; zeros where all are equal, with zero gradient there; NaN stays NaN.

    >>> min_max(torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0]])).tolist()
    [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]
    """
    dim = (dim,) if isinstance(dim, int) else tuple(dim)
    if not all(scores.shape[d] for d in dim):
        return scores
    low, high = scores.amin(dim, keepdim=True), scores.amax(dim, keepdim=True)
    width = high - low
    same = width == 0
    return torch.where(same, 0, (scores - low) / torch.where(same, 1, width))


def _constant(scores: Tensor) -> Tensor:
    """(B,) which maps say nothing."""
    flat = scores.detach().flatten(1)
    return flat.amax(1) == flat.amin(1)


@shaped(cells="whole")
def cell_centres(
    cells: Tensor, grid: Sequence[int], image_size: Sequence[int], compat: str | None = None, dtype: Any = None
) -> Tensor:
    """Pixels in the middle of cells.

    Args:
        cells: (...) numbers of cells, row by row.
        grid: (rows, columns) of the map.
        image_size: (height, width) of the image that it covers.
        compat: ``"authors"`` cuts to whole pixels, as READ and GenSAM do.
        dtype: of the result; ``None`` for the default.

    Returns:
        (..., 2) of ``x = min((column + 0.5) W / w, W - 1)`` and ``y`` alike.

    >>> cell_centres(torch.tensor([0, 5]), (2, 4), (100, 200)).tolist()
    [[25.0, 25.0], [75.0, 75.0]]
    """
    (h, w), (height, width) = check_size("grid", grid), check_size("image_size", image_size)
    check_choice("compat", compat, (None, "authors"))
    check_within("cells", cells, h * w, "cell")
    kind = dtype or torch.get_default_dtype()
    x = ((cells % w).to(kind) + 0.5) * (width / w)
    y = (torch.div(cells, w, rounding_mode="floor").to(kind) + 0.5) * (height / h)
    out = torch.stack([x.clamp(max=width - 1), y.clamp(max=height - 1)], -1)
    return out.trunc() if compat == "authors" else out


def _kind(scores: Tensor) -> torch.dtype:
    """Type of coordinates: eight bits of mantissa do not tell pixels apart."""
    return scores.dtype if scores.dtype == torch.float64 else torch.float32


@shaped(scores="float (B, h, w)", valid="bool (h, w)")
def band_points(
    scores: Tensor,
    image_size: Sequence[int],
    count: int = 30,
    positive: float = 0.8,
    negative: float = 0.2,
    valid: Tensor | None = None,
    compat: str | None = None,
) -> Points:
    """The first ``count`` of: cells from ``positive`` on, highest first; up to ``negative``, lowest first; the others.

    Args:
        scores: (B, h, w) in [0, 1], as of :func:`min_max`.
        image_size: (height, width) of the image.
        count: K; all cells where there are fewer.
        positive: least score of label 1.
        negative: greatest score of label 0; those between have label -1.
        valid: (h, w) cells that may be chosen.
        compat: see :func:`cell_centres`.

    Returns:
        (B, K, 2) and (B, K), without gradient. A map that is the same everywhere has label -1 alone.

    >>> band_points(torch.tensor([[[0.0, 0.5, 1.0]]]), (10, 30), count=2)[1].tolist()
    [[1, 0]]
    """
    b, h, w = scores.shape
    order, labels = _bands(scores.detach().flatten(1), count, positive, negative, valid)
    return Points(cell_centres(order, (h, w), image_size, compat, _kind(scores)), labels)


def _bands(
    flat: Tensor, count: int, positive: float, negative: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers of the chosen cells (B, K) of (B, N), and their labels."""
    check_int("count", count, least=1)
    check_real("positive", positive)
    check_real("negative", negative, below=positive)
    high, low = flat >= positive, flat <= negative
    if flat.numel():
        same = _constant(flat)[:, None]
        high, low = high & ~same, low & ~same
    group = torch.where(high, 0, torch.where(low, 1, 2))
    places = flat.shape[1]
    if valid is not None:
        group = torch.where(valid.flatten(), group, 3)
        places = int(valid.sum())
    # Two stable sorts: by score within a band, then by band; cells between the bands keep their order.
    within = torch.where(high, -flat, torch.where(low, flat, 0)).sort(dim=1, stable=True)[1]
    order = within.gather(1, group.gather(1, within).sort(dim=1, stable=True)[1])[:, : min(count, places)]
    return order, torch.tensor([1, 0, -1, ABSENT], device=flat.device)[group.gather(1, order)]


def _none(scores: Tensor) -> Tensor:
    return scores.new_zeros(len(scores), 0, 2, dtype=_kind(scores))


@shaped(scores="float (B, h, w)")
def extreme_points(
    scores: Tensor,
    image_size: Sequence[int],
    count: int | None = None,
    threshold: float | None = None,
    compat: str | None = None,
) -> Points:
    """The ``n`` highest cells as points on the thing, the ``n`` lowest as points off it.

    Args:
        scores: (B, h, w).
        image_size: (height, width) of the image.
        count: n; at most half of the cells.
        threshold: instead, n is the number of cells from this score on, at most half of them and another for every
            map: shorter prompts are filled with points of label :data:`ABSENT`.
        compat: see :func:`cell_centres`.

    Returns:
        (B, 2 n, 2) and (B, 2 n): first those on it, highest first, then those off it, lowest first. Without gradient.
        A map that is the same everywhere has no points.

    Raises:
        ValueError: neither or both of ``count`` and ``threshold``.

    >>> points, labels = extreme_points(torch.tensor([[[0.0, 0.5], [0.2, 1.0]]]), (20, 20), count=1)
    >>> points.tolist(), labels.tolist()
    ([[[15.0, 15.0], [5.0, 5.0]]], [[1, 0]])
    """
    if (count is None) == (threshold is None):
        raise ValueError(f"either count or threshold must be given, got count={count} and threshold={threshold}")
    b, h, w = scores.shape
    flat = scores.detach().flatten(1)
    if not b or h * w < 2:
        return Points(_none(scores), torch.zeros(b, 0, dtype=torch.long, device=scores.device))
    if count is not None:
        wide = check_int("count", count, least=1, most=h * w // 2)
        held = torch.full((b,), wide, device=scores.device).masked_fill(_constant(scores), 0)
    else:
        least = check_real("threshold", threshold)
        held = (flat >= least).sum(1).clamp(max=h * w // 2).masked_fill(_constant(scores), 0)
        wide = int(held.max())
    cells = torch.cat([flat.topk(wide, 1)[1], flat.topk(wide, 1, largest=False)[1]], 1)
    labels = torch.tensor([1, 0], device=scores.device).repeat_interleave(wide).expand(b, -1)
    exists = torch.arange(wide, device=scores.device).repeat(2) < held[:, None]
    points = cell_centres(cells, (h, w), image_size, compat, _kind(scores))
    return Points(points.masked_fill(~exists[..., None], 0), labels.masked_fill(~exists, ABSENT))


@shaped(scores="float (B, H, W)", points="float (B, K, 2)")
def continuous_points(scores: Tensor, points: Tensor, radius: int = 8) -> Tensor:
    """Points that move with the map: the mean pixel around each, by nearness and score.

    ``p' = sum_g g w_g / sum_g w_g`` over pixels ``g``, ``w_g = exp(-|g - p|^2) softmax(s)_g``. The weight falls so fast
    that pixels farther than ``radius`` are below rounding where the scores span less than ``radius^2 / 2``; so only
    those within are read, at a cost of ``K (2 radius + 1)^2`` instead of ``K H W``.

    Args:
        scores: (B, H, W) with one score per pixel.
        points: (B, K, 2) of ``x, y`` within the image.
        radius: pixels to every side that are read.

    Returns:
        (B, K, 2), with gradient to ``scores``, and to ``points`` if they have one.

    >>> scores = torch.zeros(1, 5, 7)
    >>> scores[0, 2, 4] = 3.0
    >>> [round(c, 1) for c in continuous_points(scores, torch.tensor([[[3.0, 2.0]]]))[0, 0].tolist()]
    [3.7, 2.0]
    """
    r = check_int("radius", radius, least=1)
    b, height, width = scores.shape
    kind = _kind(scores)
    if not points.shape[1] or not b:
        return points.to(kind)
    if not height * width:
        raise ValueError(f"scores must have pixels, got shape {tuple(scores.shape)}")
    points = points.to(kind)
    near = torch.arange(-r, r + 1, device=scores.device)
    middle = points.detach().round().long()
    middle = torch.stack([middle[..., 0].clamp(0, width - 1), middle[..., 1].clamp(0, height - 1)], -1)
    xs, ys = middle[..., :1] + near, middle[..., 1:] + near  # (B, K, 2 r + 1)
    within = ((ys >= 0) & (ys < height))[..., :, None] & ((xs >= 0) & (xs < width))[..., None, :]
    place = ys.clamp(0, height - 1)[..., :, None] * width + xs.clamp(0, width - 1)[..., None, :]
    patch = scores.to(kind).flatten(1).gather(1, place.flatten(1)).view_as(place)
    # Distances in both directions from the point itself, so that no square of a large coordinate is rounded.
    dx, dy = xs - points[..., :1], ys - points[..., 1:]
    score = patch - dx.square()[..., None, :] - dy.square()[..., :, None]
    weights = score.masked_fill(~within, float("-inf")).flatten(2).softmax(-1).view_as(patch)
    moved = torch.stack([(weights.sum(-2) * dx).sum(-1), (weights.sum(-1) * dy).sum(-1)], -1)
    return points + moved


@shaped(scores="float (B, h, w)")
def crop_in_image(scores: Tensor, image_size: Sequence[int], side: int, fill: float = 0.0) -> Tensor:
    """A map of the square in the middle of an image, laid into the whole image.

    Args:
        scores: (B, h, w) of the square that a centre crop leaves.
        image_size: (height, width) of the image.
        side: the square is resized to this many cells first; the longer axis gets as many more as the image is longer.
        fill: score beside the square.

    Returns:
        (B, side', side''), the shorter of both ``side``.

    >>> crop_in_image(torch.ones(1, 2, 2), (10, 20), 2, fill=-1.0)[0].tolist()
    [[-1.0, 1.0, 1.0, -1.0], [-1.0, 1.0, 1.0, -1.0]]
    """
    height, width = check_size("image_size", image_size)
    check_int("side", side, least=1)
    if tuple(scores.shape[1:]) != (side, side):
        scores = F.interpolate(scores[:, None], (side, side), mode="bilinear")[:, 0]
    rows, columns = _margins((height, width), side)
    return F.pad(scores, (columns, columns, rows, rows), value=fill)


def _margins(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Cells above and left of the square in the middle; in whole numbers, where the release may round one away."""
    rows, columns = ((n * side // min(size) - side) // 2 for n in size)
    return rows, columns


@shaped(features="alike (B, P, C)", target="alike (B, C)")
def similarity_points(
    features: Tensor,
    target: Tensor,
    image_size: Sequence[int],
    count: int = 30,
    positive: float = 0.8,
    negative: float = 0.2,
    downsample: int = 2,
    grid: Sequence[int] | None = None,
    side: int = 336,
    continuous: bool = True,
    compat: str | None = None,
) -> Points:
    """Similarity as points (READ): where image tokens look like a token, as a prompt that learns.

    The map ``features . target`` of a centre crop is made coarser, scaled to [0, 1] and laid into the image; its
    bands give points (:func:`band_points`), which then move with the map at full size (:func:`continuous_points`).

    Args:
        features: (B, P, C) states of the image tokens of a square crop, row by row.
        target: (B, C) state of the token that asks.
        image_size: (height, width) of the whole image.
        count, positive, negative: see :func:`band_points`; 60, 0.6 and 0.2 for READ-13B.
        downsample: the map is made coarser by this; 1 for READ-13B and for referring expressions.
        grid: (rows, columns) of the tokens; ``None`` for a square.
        side: pixels of the crop that the image tokens saw.
        continuous: ``False`` leaves the points where their cells are, without gradient.
        compat: ``"authors"`` cuts to whole pixels before they move.

    Returns:
        (B, K, 2) with gradient to both inputs, (B, K). A map that is the same everywhere has label -1 alone.

    Raises:
        ValueError: image tokens that fill no square where ``grid`` is not given, or another number than it has.

    >>> patches = torch.eye(16)[None]
    >>> points, labels = similarity_points(patches, patches[:, 6], (64, 64), count=1, downsample=1, side=64)
    >>> points.round().tolist(), labels.tolist()
    ([[[40.0, 24.0]]], [[1]])
    """
    size = check_size("image_size", image_size)
    check_int("downsample", downsample, least=1)
    h, w = square_grid(features.shape[1], "features") if grid is None else check_size("grid", grid)
    if h * w != features.shape[1]:
        raise ValueError(f"grid={(h, w)} has {h * w} cells, but features has {features.shape[1]} image tokens")
    if h // downsample < 1 or w // downsample < 1:
        raise ValueError(f"downsample must be at most {min(h, w)} on a grid of {(h, w)}, got {downsample}")
    scores = (features.to(_kind(features)) @ target.to(_kind(features))[..., None])[..., 0].unflatten(1, (h, w))
    coarse_side = min(h, w) // downsample
    coarse = scores.detach()
    square = (coarse_side, coarse_side)
    if square != (h, w):
        coarse = F.interpolate(coarse[:, None], square, mode="bilinear")[:, 0]
    if len(coarse):  # resized, a map that is the same everywhere may not be so to the last bit
        coarse = coarse.masked_fill(_constant(scores)[:, None, None], 0)
    # Bands of the square alone: the margins are not to be chosen.
    order, labels = _bands(min_max(coarse, (1, 2)).flatten(1), count, positive, negative)
    rows, columns = _margins(size, coarse_side)
    wide = coarse_side + 2 * columns
    cells = (torch.div(order, coarse_side, rounding_mode="floor") + rows) * wide + order % coarse_side + columns
    frame = (coarse_side + 2 * rows, wide)
    found = Points(cell_centres(cells, frame, size, compat, scores.dtype), labels)
    if not continuous:
        return found
    fine = crop_in_image(min_max(scores, (1, 2)), size, side)
    fine = F.interpolate(fine[:, None], size, mode="bilinear")[:, 0]
    return Points(continuous_points(fine, found.points), found.labels)
