"""How well masks agree: overlap, and how far apart their surfaces are.

>>> one = torch.zeros(4, 4, dtype=torch.bool)
>>> one[1, 1] = True
>>> mask_dice(one, one), surface_distance(one, one.roll(1, 0))
(1.0, 1.0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_real, describe
from ..extras import need


def mask_dice(found: Tensor, truth: Tensor) -> float:
    """``2 |A and B| / (|A| + |B|)`` of boolean masks of one shape; 1 where both are empty."""
    _check(found, truth)
    below = int(found.sum() + truth.sum())
    return 2 * int((found & truth).sum()) / below if below else 1.0


def surface_distance(
    found: Tensor, truth: Tensor, percentile: float = 95.0, spacing: Sequence[float] | float = 1.0
) -> float:
    """HD95: the larger of the two percentiles of distances from the surface of one mask to that of the other.

    The surface is what a mask loses to erosion by direct neighbours. NaN where exactly one of them is empty would hide
    in a mean: the answer is infinity there, and 0 where both are.

    Args:
        found, truth: boolean, of one shape.
        percentile: 100 for the Hausdorff distance.
        spacing: size of a voxel along every axis.
    """
    _check(found, truth)
    check_real("percentile", percentile, least=0, most=100)
    if not found.any() or not truth.any():
        return 0.0 if not (found.any() or truth.any()) else math.inf
    ndimage = need("scipy.ndimage", "surface_distance")
    several = isinstance(spacing, Sequence) and not isinstance(spacing, str)
    steps = list(spacing) if several else [spacing] * found.dim()  # type: ignore[arg-type]
    steps = [float(check_real("spacing", s, above=0)) for s in steps]
    if len(steps) != found.dim():
        raise ValueError(f"spacing must be one number for each of the {found.dim()} axes, got {list(steps)}")
    a, b = (m.cpu().numpy() for m in (found, truth))
    edge_a, edge_b = (m & ~ndimage.binary_erosion(m) for m in (a, b))
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=steps)[edge_a]
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=steps)[edge_b]
    both = [torch.from_numpy(d).quantile(percentile / 100) for d in (to_a, to_b)]
    return float(max(both))


def _check(found: Tensor, truth: Tensor) -> None:
    for name, mask in (("found", found), ("truth", truth)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not mask.dim():
            raise ValueError(f"{name} must be a boolean mask, got {describe(mask)}")
    if found.shape != truth.shape:
        raise ValueError(f"found and truth must have one shape, got {tuple(found.shape)} and {tuple(truth.shape)}")
