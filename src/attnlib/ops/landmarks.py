"""Landmarks of a sequence: means of its segments; and the inverse of what landmarks see of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_device, check_float, check_int, check_rank, check_valid
from ..types import exactly, stats_dtype


def segment_weights(n: int, count: int, valid: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """How much every token counts in the mean of its segment.

    A sequence of n tokens is cut into ``count`` segments of ``n // count`` tokens, the last ``n % count`` of which have
    one more; with fewer tokens than segments every token is one. Tokens that do not exist are in none, so that segments
    are those of the sequence without them.

    Args:
        n: tokens.
        count: segments.
        valid: (B, N) boolean, which tokens exist.
        like: for device and type.

    Returns:
        (1 or B, m, N) with ``m = min(count, n)``, rows of which sum to 1 where a segment exists; (1 or B, m) boolean.
    """
    check_int("count", count, least=1)
    slots = min(count, n)
    exists = torch.ones(1, n, dtype=torch.bool, device=like.device) if valid is None else valid
    total = exists.sum(1, keepdim=True)
    rank = exists.long().cumsum(1) - 1
    size = total // count
    short = (size + 1) * count - total  # so many segments have ``size`` tokens, and come first
    within = short * size
    own = torch.where(rank < within, rank // size.clamp(min=1), short + (rank - within) // (size + 1))
    own = torch.where(total < count, rank, own)
    hits = (own.unsqueeze(1) == torch.arange(slots, device=like.device).view(1, -1, 1)) & exists.unsqueeze(1)
    sizes = hits.sum(-1, keepdim=True)
    weights = hits.to(like.dtype) / sizes.clamp(min=1).to(like.dtype)
    return weights, sizes.squeeze(-1) > 0


def segment_means(x: Tensor, count: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means of the segments of a sequence, see :func:`segment_weights`.

    Args:
        x: (B, H, N, D).
        count: segments.
        valid: (B, N) boolean, which tokens exist.

    Returns:
        (B, H, m, D) with ``m = min(count, N)``, zero for segments without tokens; (1 or B, m) boolean, which have any.

    >>> segment_means(torch.arange(5.0).view(1, 1, 5, 1), 2)[0].flatten().tolist()
    [0.5, 3.0]
    """
    check_rank("x", x, 4, "(B, H, N, D)")
    check_float("x", x)
    check_valid("valid", valid, (x.shape[0], x.shape[2]))
    check_device(x=x, valid=valid)
    weights, some = segment_weights(x.shape[2], count, valid, x)
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0.0)
    return weights.unsqueeze(1) @ x, some


def cubic_inverse(matrix: Tensor, steps: int = 6, shared: bool = False) -> Tensor:
    """The Moore-Penrose inverse of ``A`` by ``V <- V (13 I - A V (15 I - A V (7 I - A V))) / 4``.

    It starts from ``A^T / c``, ``c`` being the largest sum of a column of a matrix whose rows sum to 1.

    Args:
        matrix: (..., m, m) of numbers that are not negative, rows of which sum to 1.
        steps: how many; what has not converged yet is an approximation.
        shared: one ``c`` for all matrices, the largest, so that they depend on one another.

    Returns:
        The same shape, float32 at least.

    Reference: Xiong et al., 2021, arXiv 2102.03902, section 4.4.

    >>> a = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    >>> (cubic_inverse(a) @ a - torch.eye(2)).abs().max().item() < 1e-4
    True
    """
    check_float("matrix", matrix)
    check_int("steps", steps, least=0)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, (..., m, m), got {tuple(matrix.shape)}")
    with exactly(matrix):
        a = matrix.to(stats_dtype(matrix.dtype))
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        if not a.numel():
            return a
        columns = a.sum(-2)
        most = columns.max() if shared else columns.amax(-1)[..., None, None]
        v = a.mT / most
        for _ in range(steps):
            av = a @ v
            v = 0.25 * v @ (13 * eye - av @ (15 * eye - av @ (7 * eye - av)))
        return v
