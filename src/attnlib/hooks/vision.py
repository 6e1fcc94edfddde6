"""What the class token of a vision encoder reads, from the queries and keys of one of its layers."""

from __future__ import annotations

from torch import Tensor

from ..types import stats_dtype


def class_row(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Weights of the patches in the class token's row, which is the first.

    Args:
        q: (B, H, 1 or more, D) queries.
        k: (B, H, 1 + N, D) keys.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        (B, H, N) in the statistics dtype; the class token's own share is left out, so rows sum to less than 1.

    >>> import torch
    >>> class_row(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5, 4)).tolist()
    [[[0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]]]
    """
    dtype = stats_dtype(q.dtype)
    scores = q[:, :, :1].to(dtype) @ k.to(dtype).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1)[:, :, 0, 1:]
