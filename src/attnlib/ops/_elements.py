"""Single pairs of queries and keys: products and sums over a list of keys for every row, without copying keys out.

What a block executor does with a gather and a batched product costs a row of memory traffic for every pair. On a CPU,
torch has both halves without it: products at the places of a sparse matrix, and weighted bags of rows.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _said_once() -> None:
    """Torch says once that its sparse matrices are in beta; what is used here stays inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing = torch.zeros(1, dtype=torch.long, device="cpu")
        torch.sparse_csr_tensor(nothing, nothing[:0], nothing[:0].float(), (0, 1), check_invariants=False)


def serves(x: Tensor) -> bool:
    """Whether these kernels run on such a tensor."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def products(q: Tensor, k: Tensor, at: Tensor, scale: float) -> Tensor:
    """``scale * q[r] . k[at[r, j]]``.

    Args:
        q: (R, D).
        k: (M, D), contiguous.
        at: (R, W) int64 rows of ``k``, in any order, also more than once.
        scale: a factor.

    Returns:
        (R, W).

    >>> products(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1], [0]]), 1.0).tolist()
    [[3.0], [2.0]]
    """
    _said_once()
    rows, width = at.shape
    ends = torch.arange(0, rows * width + 1, max(width, 1), device=q.device)
    zeros = q.new_zeros(rows * width)
    pattern = torch.sparse_csr_tensor(ends, at.reshape(-1), zeros, (rows, k.shape[0]), check_invariants=False)
    torch.sparse.sampled_addmm(pattern, q, k.t(), alpha=scale, beta=0.0, out=pattern)
    return pattern.values().view(rows, width)


def sums(p: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """(R, Dv): ``sum_j p[r, j] v[at[r, j]]``; ``p`` and ``at`` (R, W), ``v`` (M, Dv)."""
    return F.embedding_bag(at, v, mode="sum", per_sample_weights=p)


class Scatter:
    """Pairs sorted by their keys, to add up over queries what :func:`sums` adds up over keys.

    Args:
        at: (R, W) rows of the table that is added to.
        rows: of that table.
    """

    def __init__(self, at: Tensor, rows: int):
        flat = at.reshape(-1)
        flat = flat.int() if rows < 1 << 31 else flat  # sorting goes by digits
        found, self.order = flat.sort(stable=True)
        self.keys, counts = torch.unique_consecutive(found, return_counts=True)
        self.starts = F.pad(counts.cumsum(0), (1, 0))
        self.source = torch.arange(at.shape[0], device=at.device)[:, None].expand(at.shape).reshape(-1)[self.order]

    def add(self, to: Tensor, p: Tensor, x: Tensor, scale: float = 1.0) -> None:
        """``to[at[r, j]] += scale * p[r, j] x[r]``, in place; ``to`` (M, D), ``p`` (R, W), ``x`` (R, D)."""
        weights = p.reshape(-1)[self.order]
        made = F.embedding_bag(
            self.source, x, self.starts, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        to.index_add_(0, self.keys, made, alpha=scale)
