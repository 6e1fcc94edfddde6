"""Context-aware saliency of any map: places whose surroundings are unlike all others, near what is unlike.

For patches ``p_i`` around every place, with values and positions between 0 and 1::

    d(p_i, p_j) = |p_i - p_j| / (1 + c |i - j|)
    S_i = 1 - exp(-mean of d over the K patches most like p_i)

as a mean over scales; with foci ``F = {i: S_i > threshold}`` then ``S_i (1 - distance to the nearest focus)``. Run on a
relevance map in place of a photo it joins scattered pixels to areas, the *salient relevance map* (:func:`sr_map`).

Goferman et al. shrink the image and keep the patch; the paper on relevance speaks of scales only. Both are here; which
of them, and whether the constants were kept, is unsure. Distances of patches are divided by their largest possible
value, those of places by the longer side, and ``S`` is put between 0 and 1 before the threshold: our reading.

Reference: Goferman, Zelnik-Manor and Tal, 2012, "Context-aware saliency detection"; Li, Tian, Mueller and Chen, 2019
(https://arxiv.org/abs/1712.08268).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, checked, describe, to_list
from ...grids import coordinates
from ...types import stats_dtype
from .maps import unit_range
from .relevance import relevance


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    smaller = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=smaller)


def _unlike(image: Tensor, side: int, nearest: int, c: float, rows: int) -> Tensor:
    """(h, w) S of one image (C, h, w)."""
    h, w = image.shape[1:]
    edge = side // 2
    patches = F.unfold(F.pad(image[None], [edge] * 4, mode="replicate"), side)[0].T / (side * side * len(image)) ** 0.5
    places = coordinates((h, w)).to(patches) / max(h, w)
    k = min(nearest, h * w - 1)
    if k < 1:
        return image.new_zeros(h, w)
    found = []
    for start in range(0, h * w, rows):
        d = torch.cdist(patches[start : start + rows], patches, compute_mode="donot_use_mm_for_euclid_dist")
        d = d / (1 + c * torch.cdist(places[start : start + rows], places))
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf  # itself
        found.append(d.topk(k, largest=False).values.mean(1))
    return (1 - torch.exp(-torch.cat(found))).view(h, w)


def _towards_foci(s: Tensor, threshold: float) -> Tensor:
    h, w = s.shape
    foci = (s > threshold).nonzero().to(s.dtype)
    if not len(foci):
        return s
    distance = torch.cdist(coordinates((h, w)).to(s), foci).amin(1).view(h, w) / max(h, w)
    return s * (1 - distance.clamp(max=1))


@checked
@torch.no_grad()
def context_aware_saliency(
    maps: Tensor,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    patch: int = 7,
    nearest: int = 64,
    c: float = 3.0,
    threshold: float = 0.8,
    scaled: str = "image",
    most: int = 64,
    rows: int = 512,
) -> Tensor:
    """Context-aware saliency of maps.

    Args:
        maps: (B, H, W), or (B, C, H, W) compared by all channels: relevance, attention, a photo.
        scales: shares of the image's sides, or of the patch's.
        patch: side of the patches, odd.
        nearest: patches that each is compared with, K; all others where there are fewer.
        c: how much distance excuses.
        threshold: of foci; 1 for none.
        scaled: ``"image"`` or ``"patch"``: what the scales shrink.
        most: longest side that is compared; larger maps are made smaller, and the result larger again.
        rows: places at a time, which bounds memory.

    Returns:
        (B, H, W) between 0 and 1; zeros for a map that is the same everywhere.

    >>> context_aware_saliency(torch.ones(1, 8, 8)).any().item()
    False
    """
    check_choice("scaled", scaled, ("image", "patch"))
    check_int("patch", patch, least=1)
    check_int("nearest", nearest, least=1)
    check_int("rows", rows, least=1)
    check_int("most", most, least=2)
    check_real("c", c, least=0.0)
    check_real("threshold", threshold)
    if patch % 2 == 0:
        raise ValueError(f"patch must be odd, got {patch}")
    scales = to_list("scales", scales, "[1.0, 0.5]") or []
    if not scales:
        raise ValueError("scales is empty; give at least one, such as (1.0,)")
    for i, s in enumerate(scales):
        check_real(f"scales[{i}]", s, above=0.0, most=1.0)
    if maps.dim() not in (3, 4) or not maps.is_floating_point():
        raise ValueError(f"maps must be (B, H, W) or (B, C, H, W), floating-point, got {describe(maps)}")
    dtype, maps = maps.dtype, maps.to(stats_dtype(maps.dtype))
    images = unit_range(maps if maps.dim() == 4 else maps[:, None], "maps", "zeros")
    height, width = images.shape[-2:]
    shrink = min(1.0, most / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    out = []
    for image in images:
        if not image.any():
            out.append(image.new_zeros(height, width))
            continue
        small = _resized(image[None], size)
        parts = []
        for s in scales:
            if scaled == "image":
                at = max(2, round(size[0] * s)), max(2, round(size[1] * s))
                found = _unlike(_resized(small, at)[0], patch, nearest, c, rows)
            else:
                side = int(patch * s) // 2 * 2 + 1  # the odd one nearest
                found = _unlike(small[0], side, nearest, c, rows)
            parts.append(_resized(found[None, None], size)[0, 0])
        whole = unit_range(torch.stack(parts).mean(0)[None], "saliency", "zeros")[0]
        out.append(_resized(_towards_foci(whole, threshold)[None, None], (height, width))[0, 0])
    return (torch.stack(out) if out else images.new_zeros(0, height, width)).to(dtype)


def sr_map(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    rules: Any = None,
    default: Any = "epsilon",
    compat: bool = False,
    by: str = "abs",
    **context: Any,
) -> Tensor:
    """The salient relevance map, (B, H, W): :func:`relevance`, then :func:`context_aware_saliency` of it.

    Args:
        model, x, target, rules, default, compat: see :func:`relevance`; x is (B, C, H, W).
        by: ``"abs"``, absolute values, each colour a channel, as the released code draws them; or ``"sum"``, the signed
            sum over colours.
        context: of :func:`context_aware_saliency`.
    """
    check_choice("by", by, ("abs", "sum"))
    if x.dim() != 4:
        raise ValueError(f"x must be images (B, C, H, W), got {tuple(x.shape)}")
    r = relevance(model, x, target, rules, default, compat)
    return context_aware_saliency(r.abs() if by == "abs" else r.sum(1), **context)
