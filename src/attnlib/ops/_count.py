"""Counting operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ._dispatch import use_backend


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Operations of convolutions and products in the block; a multiplication and its addition are two.

    Attention is not fused in it, neither ours nor torch's: of fused attention nothing would be counted on a CPU.

    >>> import torch
    >>> with counted() as counter:
    ...     y = torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 8))
    >>> counter.get_total_flops() == 2 * 2 * 4 * 4 * 8
    True
    """
    with FlopCounterMode(display=False) as counter, use_backend("eager"), sdpa_kernel(SDPBackend.MATH):
        yield counter
