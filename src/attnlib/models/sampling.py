"""Tokens drawn from the least set that holds so much of their probability.

Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_axes, check_real


def in_nucleus(shares: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (..., K) from the largest, where they stand, and which lie in the least set that exceeds ``top_p``.

    The largest always does.

    >>> [x.tolist() for x in in_nucleus(torch.tensor([0.25, 0.5, 0.25]), 0.5)]
    [[0.5, 0.25, 0.25], [1, 0, 2], [True, True, False]]
    """
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before <= top_p).index_fill(-1, torch.zeros(1, dtype=torch.long, device=shares.device), True)
    return ordered, order, kept


def nucleus(logits: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Numbers (B,) drawn from the smallest sets of (B, K) whose probability exceeds ``top_p``; 0: the likeliest.

    >>> nucleus(torch.tensor([[0.0, 2.0, 1.0]]), 0.0).tolist()
    [1]
    """
    check_axes("logits", logits, B=None, K=None)
    check_real("top_p", top_p, least=0, most=1)
    if not top_p or not logits.numel():
        return logits.argmax(-1)
    ordered, order, kept = in_nucleus(logits.softmax(-1), top_p)
    drawn = torch.multinomial((ordered * kept).float(), 1, generator=generator)
    return order.gather(1, drawn)[:, 0]
