"""Attention between patches: a place is filled with what stands where its surroundings look alike.

Yu et al., 2018, "Generative Image Inpainting with Contextual Attention", arXiv 1801.07892 (cosine); Shin et al., 2019,
"PEPSI++", arXiv 1905.09010 (distance). Queries are the ``k x k`` patches around all places of a map, zeros beyond its
borders; keys and values are the patches of a context that lie wholly in it. What patches carry is laid over each other
and divided by ``k^2``.

No patch is ever cut out: the product of two patches is the sum of products of pixels along a diagonal of shifts, and so
is what patches of equal weights lay over each other. Both take ``1 / k^2`` of the multiplications of cut patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_axes,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_int,
    check_real,
    check_valid,
)
from ..types import stats_dtype

SIMILARITIES = ("distance", "cosine")


class PatchOutput(NamedTuple):
    """``y`` (B, H, W, C), and ``weights`` (B, H * W, M) of the M patches that lie in the context, row by row."""

    y: Tensor
    weights: Tensor


def patch_attention(
    x: Tensor,
    context: Tensor,
    *,
    known: Tensor | None = None,
    kernel: int = 3,
    similarity: str = "distance",
    scale: float | None = None,
    valid_only: bool = False,
    fuse: bool = False,
    return_weights: bool = False,
) -> Tensor | PatchOutput:
    """``y = 1/k^2 sum over shifts of (A patches)`` with ``A = softmax(scale * s)`` over patches of the context.

    ``"distance"``: ``s_ij = -tanh((d_ij - mean_j d_i) / std_j d_i)``, d the squared distance of patches; 0 where all
    are equally far but for rounding. ``"cosine"``: ``s_ij = q_i . k_j / (|q_i| |k_j|)``.

    Args:
        x: (B, H, W, C).
        context: (B, h, w, C); both sides at least ``kernel``.
        known: (B, h, w) boolean, which pixels of the context exist; the others are zeros, whatever they hold.
        kernel: k, odd.
        similarity: ``"distance"`` or ``"cosine"``.
        scale: 50 by default for distances, 10 for cosines.
        valid_only: only patches all of whose pixels are known are keys; by default zeros of unknown ones are part of
            patches, as released.
        fuse: add the similarities of neighbours to each, along rows and along columns, as the cosine form is released:
            neighbours are those in the flat order, so that the last pixel of a row is the neighbour of the first of the
            next.
        return_weights: a :class:`PatchOutput` instead of y.

    Returns:
        (B, H, W, C); zeros where there is no key.

    Raises:
        ValueError: no place in x, a context smaller than a patch, channels that differ, an even kernel.

    >>> x = torch.rand(1, 6, 7, 4)
    >>> patch_attention(x, x, known=torch.rand(1, 6, 7) > 0.2).shape
    torch.Size([1, 6, 7, 4])
    """
    check_axes("x", x, B=None, H=None, W=None, C=None)
    check_float("x", x)
    if not x.shape[1] or not x.shape[2]:
        raise ValueError(f"x must hold at least one place, got shape {tuple(x.shape)}")
    check_axes("context", context, B=x.shape[0], h=None, w=None, C=x.shape[3])
    check_dtype(x=x, context=context)
    check_device(x=x, context=context, known=known)
    check_valid("known", known, context.shape[:3])
    k = check_int("kernel", kernel, least=1)
    if k % 2 == 0:
        raise ValueError(f"kernel must be odd, got {k}")
    if min(context.shape[1:3]) < k:
        raise ValueError(f"context is {context.shape[1]} x {context.shape[2]}: no patch of {k} x {k} lies in it")
    check_choice("similarity", similarity, SIMILARITIES)
    check_flag("valid_only", valid_only)
    check_flag("fuse", fuse)
    given = check_real("scale", (50.0 if similarity == "distance" else 10.0) if scale is None else scale)
    high = stats_dtype(x.dtype)
    q, c = x.to(high), context.to(high)
    if known is not None:
        c = c.masked_fill(~known[..., None], 0.0)
    batch, height, width, _ = x.shape
    rows, cols = c.shape[1] - k + 1, c.shape[2] - k + 1
    grid = (batch, height, width, rows, cols)
    products = _along(torch.einsum("byxc,bvuc->byxvu", q, c), k)
    qq = _boxes(q.square().sum(-1), k, k // 2)[..., None, None]
    cc = _boxes(c.square().sum(-1), k, 0)[:, None, None]
    keys = None
    if valid_only and known is not None:
        keys = (_boxes(known.to(high), k, 0) > k * k - 0.5)[:, None, None]
    if similarity == "distance":
        largest = (qq + cc.amax((-2, -1), keepdim=True)).detach()
        s = _standard(torch.add(qq + cc, products, alpha=-2).clamp(min=0), keys, largest)
    else:
        s = products * ((qq + 1e-16).rsqrt() * (cc + 1e-16).rsqrt())
    if fuse:
        s = _diagonal(s.reshape(batch, height * width, -1)).view(grid)
        s = s.permute(0, 2, 1, 4, 3).reshape(batch, height * width, -1)
        s = _diagonal(s).view(batch, width, height, cols, rows).permute(0, 2, 1, 4, 3)
    s = (given * s).flatten(3)
    if keys is not None:
        keys = keys.flatten(3)
        some = keys.any(-1, keepdim=True)
        a = s.masked_fill(~(keys | ~some), -torch.inf).softmax(-1) * some
    else:
        a = s.softmax(-1)
    spread = _spread(a.view(grid), k)
    y = (torch.einsum("byxvu,bvuc->byxc", spread, c) / (k * k)).to(x.dtype)
    return PatchOutput(y, a.flatten(1, 2)) if return_weights else y


def _along(s: Tensor, k: int) -> Tensor:
    """(B, H, W, h, w) of pixels to (B, H, W, h - k + 1, w - k + 1) of patches: sums along both diagonals."""
    _, height, width, tall, wide = s.shape
    half = k // 2
    if k == 1:
        return s
    s = F.pad(s, (0, 0, 0, 0, 0, 0, half, half))
    parts = [s[:, i : i + height, :, i : i + tall - k + 1] for i in range(k)]
    s = sum(parts[1:], parts[0])
    s = F.pad(s, (0, 0, 0, 0, half, half))
    parts = [s[:, :, i : i + width, :, i : i + wide - k + 1] for i in range(k)]
    return sum(parts[1:], parts[0])


def _spread(a: Tensor, k: int) -> Tensor:
    """(B, H, W, h - k + 1, w - k + 1) of patches to (B, H, W, h, w) of pixels: the transpose of :func:`_along`."""
    _, height, width, _, _ = a.shape
    half = k // 2
    if k == 1:
        return a
    # Row r of the output reads the patch at r + half - i, its row i; columns likewise.
    high, wide = (n + k - 1 for n in a.shape[3:])
    a = F.pad(a, (0, 0, k - 1, k - 1, 0, 0, half, half))
    at = range(k - 1, -1, -1)
    parts = [a[:, i : i + height, :, i : i + high] for i in at]
    a = F.pad(sum(parts[1:], parts[0]), (k - 1, k - 1, 0, 0, half, half))
    parts = [a[:, :, i : i + width, :, i : i + wide] for i in at]
    return sum(parts[1:], parts[0])


def _boxes(x: Tensor, k: int, pad: int) -> Tensor:
    """Sums over k x k of (B, H, W), zeros beyond ``pad`` on each side."""
    return F.avg_pool2d(F.pad(x, (pad,) * 4)[:, None], k, 1)[:, 0] * (k * k)


def _standard(d: Tensor, keys: Tensor | None, size: Tensor) -> Tensor:
    """``-tanh`` of distances with mean 0 and variance 1 over keys; 0 where their spread is rounding of ``size``."""
    if keys is None:
        var, mean = torch.var_mean(d, (-2, -1), correction=0, keepdim=True)
    else:
        count = keys.sum((-2, -1), keepdim=True).clamp(min=1)
        mean = (d * keys).sum((-2, -1), keepdim=True) / count
        var = ((d - mean).square() * keys).sum((-2, -1), keepdim=True) / count
    least = (8 * torch.finfo(d.dtype).eps * size.amax((-2, -1), keepdim=True)).square()
    flat = var <= least
    slope = torch.where(flat, torch.ones_like(var), var).rsqrt()
    return torch.tanh((mean - d) * torch.where(flat, torch.zeros_like(slope), slope))


def _diagonal(s: Tensor) -> Tensor:
    """(B, N, M) with both neighbours along the diagonal added."""
    wide = F.pad(s, (1, 1, 1, 1))
    return wide[:, :-2, :-2] + s + wide[:, 2:, 2:]
