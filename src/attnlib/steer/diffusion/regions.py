"""Regions of a picture: which branch acts where, and attention that is computed only there.

A region is a map over the picture, a mask or weights, and is wanted at the grid of each layer. What reads by regions is
gathered: queries of a region, with the keys that they read, make one attention of their own, so that no map of all
queries and all keys is held, and nothing that a region may not read can change a bit of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_grid,
    check_ints,
    check_real,
    check_within,
    checked,
    shaped,
)
from ...hooks.site import Site
from ...ops import attention
from ...types import stats_dtype
from .tiles import InParts

#: How a map gets to another grid. ``"any"`` marks a cell that holds some of a region, so that small ones stay.
RESIZERS = ("bilinear", "bicubic", "area", "any")

#: Which region has a place that several want. ``"largest"`` and ``"smallest"`` go by their numbers of cells.
PRIORITIES = ("first", "last", "smallest", "largest")

Box = Sequence[float]


def check_box(name: str, box: Any) -> tuple[float, float, float, float]:
    """``(left, top, right, bottom)`` as shares of the sides."""
    if isinstance(box, str) or not isinstance(box, Sequence) or len(box) != 4:
        raise TypeError(f"{name} must be (left, top, right, bottom) as shares of the sides, got {box!r:.80}")
    left, top, right, bottom = (check_real(name, side) for side in box)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"{name} must be (left, top, right, bottom) within 0 and 1, left before right and top before bottom, got "
            f"{tuple(box)}"
        )
    return left, top, right, bottom


@checked
def box_masks(boxes: Sequence[Box], grid: Sequence[int]) -> Tensor:
    """(R, h, w) boolean: the cells of a grid whose centre lies in a box; the nearest cell for a box without any.

    Args:
        boxes: R of ``(left, top, right, bottom)``, as shares of the sides.
        grid: (h, w).

    >>> box_masks([(0, 0, 0.5, 1)], (2, 4)).long().tolist()
    [[[1, 1, 0, 0], [1, 1, 0, 0]]]
    """
    height, width = check_grid("grid", grid, (2,))
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, box in zip(masks, boxes, strict=True):
        left, top, right, bottom = check_box("boxes", box)
        spans = []
        for low, high, side in ((top, bottom, height), (left, right, width)):
            first, stop = math.ceil(low * side - 0.5 - 1e-9), math.ceil(high * side - 0.5 - 1e-9)
            if stop <= first:
                first = min(int((low + high) / 2 * side), side - 1)
                stop = first + 1
            spans.append((first, stop))
        (a, b), (c, d) = spans
        mask[a:b, c:d] = True
    return masks


@shaped(maps="tensor (..., H, W)")
def resized(maps: Tensor, grid: Sequence[int], how: str = "bilinear") -> Tensor:
    """Maps (..., H, W) at another grid (..., h, w), as floats.

    Args:
        how: ``"bilinear"`` or ``"bicubic"`` (no smoothing before), ``"area"`` (the mean over a cell), or ``"any"``.

    >>> resized(torch.eye(4), (2, 2), "any").tolist(), resized(torch.eye(4), (2, 2), "area").tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.0], [0.0, 0.5]])
    """
    check_choice("how", how, RESIZERS)
    size = check_grid("grid", grid, (2,))
    floats = maps if maps.is_floating_point() else maps.float()
    if tuple(maps.shape[-2:]) == size:
        return floats
    flat = floats.reshape(-1, 1, *maps.shape[-2:]).to(stats_dtype(floats.dtype))
    if how in ("bilinear", "bicubic"):
        flat = F.interpolate(flat, size, mode=how, align_corners=False)
    else:
        height, width = size
        flat = (F.adaptive_avg_pool2d if how == "area" else F.adaptive_max_pool2d)(flat, (height, width))
    return flat.reshape(*maps.shape[:-2], *size).to(floats.dtype)


@shaped(weights="float (..., R, h, w)")
def shares(weights: Tensor, rest: bool = False) -> Tensor:
    """Weights of R regions that sum to one at every place where any is positive.

    Args:
        weights: (..., R, h, w), at least 0.
        rest: a further region, put first, has what is left to one where they sum to less.

    >>> shares(torch.tensor([[[1.0, 0.5]], [[1.0, 0.0]]]), rest=True).tolist()
    [[[0.0, 0.5]], [[0.5, 0.5]], [[0.5, 0.0]]]
    """
    if weights.numel() and float(weights.detach().amin()) < 0:
        raise ValueError(f"weights must be at least 0, got {float(weights.detach().amin()):.3g}")
    total = weights.sum(-3, keepdim=True)
    if not check_flag("rest", rest):
        return weights / torch.where(total > 0, total, 1)
    return torch.cat([(1 - total).clamp(min=0), weights / total.clamp(min=1)], -3)


@shaped(masks="tensor (..., R, h, w)")
def label_map(masks: Tensor, priority: str | Sequence[int] = "smallest") -> Tensor:
    """(..., h, w) integer: 0 where no region is, and r + 1 for region r, which keeps a place that several want.

    Args:
        masks: (..., R, h, w); a place belongs where it is not zero.
        priority: ``"first"`` or ``"last"`` of the list, the ``"smallest"`` or the ``"largest"``, or the numbers of
            the regions in the order in which they are served.

    >>> label_map(torch.tensor([[[1, 1, 1, 0]], [[0, 0, 1, 1]]])).tolist()
    [[1, 1, 2, 2]]
    """
    inside = masks != 0
    count = masks.shape[-3]
    if isinstance(priority, str):
        check_choice("priority", priority, PRIORITIES)
        ranks = torch.arange(count, device=masks.device).expand(masks.shape[:-2])
        if priority in ("smallest", "largest"):
            cells = inside.flatten(-2).sum(-1)
            order = cells.sort(dim=-1, descending=priority == "largest", stable=True).indices
            ranks = order.argsort(-1)
        elif priority == "last":
            ranks = count - 1 - ranks
    else:
        if sorted(priority) != list(range(count)):
            raise ValueError(f"priority must name each of the regions 0 to {count - 1} once, got {list(priority)}")
        ranks = torch.as_tensor(list(priority), device=masks.device).argsort().expand(masks.shape[:-2])
    ranked = torch.where(inside, ranks[..., None, None], count)
    best, who = ranked.min(-3)
    return torch.where(best < count, who + 1, 0)


def against_tiles(other: Any) -> str | None:
    """Why something that knows places of the whole picture cannot meet another; ``None`` when it can."""
    if isinstance(other, InParts):
        return f"places are those of the whole picture, and {type(other).__name__} runs parts of it by themselves"
    return None


def images_of(rows: Sequence[str]) -> list[int]:
    """The image of each row of a batch: the m-th row of every name is of image m.

    >>> images_of(["uncond", "uncond", "cond", "cond"])
    [0, 1, 0, 1]
    """
    count: dict[str, int] = {}
    found = []
    for name in rows:
        found.append(count.get(name, 0))
        count[name] = found[-1] + 1
    return found


def image_grid(site: Site) -> tuple[int, int]:
    """(h, w) of the image tokens that a layer's queries are.

    Raises:
        ValueError: they are none, or it is not known where height and width are.
    """
    layout = site.q_layout
    grid = None if layout is None or "image" not in layout.names else layout.grid("image")
    if grid is None or len(grid) != 2:
        raise ValueError(
            f"layer {site.layer} ({site.name}): it is not known where height and width of its {site.n_queries} image "
            "tokens are; call the denoiser with latents as a map (B, C, H, W)"
        )
    return grid


@shaped(
    q="float (B, H, N, D)", k="float (B, K, M, D)", v="float (B, K, M, V)", q_labels="whole (B, N)",
    k_labels="whole (B, M)", reads="bool (G, L)", own="whole (N)",
)  # fmt: skip
def attention_by_label(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_labels: Tensor,
    k_labels: Tensor,
    reads: Tensor,
    own: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention in which queries of label g read keys of the labels l with ``reads[g, l]``, and nothing else.

    Each label of queries is one attention over gathered keys: ``sum_g n_g m_g`` products, and no mask of N x M. Samples
    with the same labels are computed together.

    Args:
        q, k, v: (B, H, N, D), (B, Hk, M, D), (B, Hk, M, Dv).
        q_labels: (B, N), 0 to G - 1.
        k_labels: (B, M), 0 to L - 1.
        reads: (G, L).
        own: (N,) the key that each query is. Queries whose label finds no key give its value; zeros without it.
        scale: ``D ** -0.5`` by default.

    Returns:
        (B, H, N, Dv).

    >>> x = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1)
    >>> labels = torch.tensor([[0, 1, 1]])
    >>> attention_by_label(x * 0, x, x, labels, labels, torch.eye(2, dtype=torch.bool)).flatten().tolist()
    [1.0, 3.0, 3.0]
    """
    batch, heads, n = q.shape[:3]
    for name, labels, side, axis in (("q_labels", q_labels, 0, "G"), ("k_labels", k_labels, 1, "L")):
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < reads.shape[side]:
            raise ValueError(
                f"{name} must lie in 0 to {axis} - 1 = {reads.shape[side] - 1}, as reads of shape "
                f"{tuple(reads.shape)} says, got {int(labels.min())} to {int(labels.max())}"
            )
    if own is not None:
        check_within("own", own, k.shape[2], "key")
    out = q.new_zeros(batch, heads, n, v.shape[-1])
    both = torch.cat([q_labels, k_labels], 1)
    kinds, which = both.unique(dim=0, return_inverse=True)
    for number, kind in enumerate(kinds):
        rows = (which == number).nonzero().flatten()
        everyone = len(rows) == batch
        some = [t if everyone else t.index_select(0, rows) for t in (q, k, v)]
        mine = out if everyone else out.index_select(0, rows)
        for label in kind[:n].unique().tolist():
            asking = (kind[:n] == label).nonzero().flatten()
            read = reads[label].index_select(0, kind[n:]).nonzero().flatten()
            if len(read):
                new = attention(
                    *(_picked(t, at) for t, at in zip(some, (asking, read, read), strict=True)), scale=scale
                )
            elif own is not None:
                new = some[2].index_select(2, own[asking]).repeat_interleave(heads // v.shape[1], 1)
            else:
                continue
            mine = new if len(asking) == n else mine.index_copy(2, asking, new)
        out = mine if everyone else out.index_copy(0, rows, mine)
    return out


def _picked(t: Tensor, at: Tensor) -> Tensor:
    return t if len(at) == t.shape[2] else t.index_select(2, at)


@shaped(q="float (B, H, N, D)", weights="float (B, R, N)")
def mixed_branches(
    q: Tensor, branches: Sequence[Callable[[Tensor], Tensor] | None], weights: Tensor, width: int | None = None
) -> Tensor:
    """``sum_r w_r(p) branch_r(q)(p)``: the outputs of branches that read by rows, each computed where it counts.

    Args:
        q: (B, H, N, D) queries, the same for all branches.
        branches: R functions from queries (B, H, n, D), each by itself, to outputs (B, H, n, Dv); ``None`` for one that
            gives nothing. One whose weight is zero everywhere is not called.
        weights: (B, R, N).
        width: Dv, where it is not D.

    >>> q = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    >>> w = torch.tensor([[[1.0, 0.0], [0.5, 1.0]]])
    >>> mixed_branches(q, [lambda q: q, lambda q: 10 * q], w).flatten().tolist()
    [6.0, 20.0]
    """
    check_axes("weights", weights, B=len(q), R=len(branches), N=q.shape[2])
    batch, heads, n = q.shape[:3]
    total: Tensor | None = None
    for number, branch in enumerate(branches):
        w = weights[:, number]
        counts = (w != 0).sum(1)
        most = int(counts.max()) if batch else 0
        if branch is None or most == 0:
            continue
        if int(counts.min()) == n:
            term = branch(q) * w[:, None, :, None].to(q.dtype)
            total = term if total is None else total + term
            continue
        # Places that count come first, in order; samples with fewer of them are filled up with a place behind the last.
        order = torch.where(w != 0, torch.arange(n, device=q.device), n).sort(1).values[:, :most]
        at = order.clamp(max=n - 1)
        some = branch(q.gather(2, at[:, None, :, None].expand(-1, heads, -1, q.shape[-1])))
        some = some * w.gather(1, at)[:, None, :, None].to(some.dtype)
        if total is None:
            total = some.new_zeros(batch, heads, n, some.shape[-1])
        spare = torch.cat([total, total[:, :, :1]], 2)
        index = order[:, None, :, None].expand(-1, heads, -1, some.shape[-1])
        total = spare.scatter_add(2, index, some)[:, :, :n]
    return q.new_zeros(batch, heads, n, width or q.shape[-1]) if total is None else total


@shaped(mask="tensor (h, w)")
def mask_box(mask: Tensor) -> tuple[int, int, int, int] | None:
    """``(top, left, bottom, right)`` of what is not zero in (h, w), the ends excluded; ``None`` where nothing is.

    >>> mask_box(torch.tensor([[0, 0, 0], [0, 1, 1]]))
    (1, 1, 2, 3)
    """
    rows, columns = (mask != 0).any(1).nonzero().flatten(), (mask != 0).any(0).nonzero().flatten()
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


@shaped(maps="float (..., h, w)")
def moved(maps: Tensor, box: Sequence[int], to: Sequence[int], inside: bool = False) -> Tensor:
    """What is in one box of maps (..., h, w), at the cells of another: (..., bottom - top, right - left) of ``to``.

    Args:
        maps: (..., h, w).
        box: ``(top, left, bottom, right)``, the ends excluded, where it is.
        to: the same, where its size comes from: bilinear between cells. A box of the same size gives its cells.
        inside: cells beside the box are never looked at.

    >>> moved(torch.arange(8.0).view(2, 4), (0, 2, 2, 4), (0, 0, 2, 2)).tolist()
    [[2.0, 3.0], [6.0, 7.0]]
    """
    height, width = maps.shape[-2:]
    for name, sides in (("box", box), ("to", to)):
        sides = check_ints(name, sides, least=0)
        if len(sides) != 4 or not (sides[0] < sides[2] and sides[1] < sides[3]):
            raise ValueError(f"{name} must be (top, left, bottom, right) with a cell in it, got {sides}")
    if box[2] > height or box[3] > width:
        raise ValueError(f"box must lie within maps of {height} x {width}, got {tuple(box)}")
    axes = []
    for low, high, start, stop, side in (
        (box[0], box[2], to[0], to[2], height), (box[1], box[3], to[1], to[3], width)
    ):  # fmt: skip
        count = stop - start
        at = (torch.arange(count, device=maps.device, dtype=torch.float64) + 0.5) / count * (high - low) + low - 0.5
        last = (high if inside else side) - 1
        axes.append((at.clamp(low if inside else 0, last), last))
    out = maps
    for (at, last), axis in zip(axes, (-2, -1), strict=True):
        below = at.floor().long()
        part = (at - below).to(maps.dtype)
        above = (below + 1).clamp(max=last)
        part = part.view(-1, 1) if axis == -2 else part
        out = torch.lerp(out.index_select(axis, below), out.index_select(axis, above), part)
    return out
