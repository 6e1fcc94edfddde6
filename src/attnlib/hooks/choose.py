"""Choosing tokens per sample: which stay, packed to the right, and what they carry."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(keep: Tensor) -> Tensor:
    """Indices of the tokens that go on, ready to be returned by ``on_tokens``.

    Args:
        keep: (B, N) boolean.

    Returns:
        (B, K) ascending, K the largest number that a sample keeps; -1 on the left of samples that keep fewer.

    >>> pack(torch.tensor([[True, False, True], [False, False, True]])).tolist()
    [[0, 2], [-1, 2]]
    """
    n = keep.shape[1]
    index = torch.arange(n, device=keep.device).expand_as(keep).masked_fill(~keep, -1)
    return index.sort(1).values[:, n - int(keep.sum(1).max()) :]


def take(values: Tensor, slots: Tensor, dim: int) -> Tensor:
    """Values along ``dim`` at the slots (B, K), for every sample its own; padding reads slot 0.

    ``values`` has the batch (or 1) as the axis before ``dim``, whatever stands around them.
    """
    batch, count = slots.shape
    lead = dim - 1
    index = slots.clamp(min=0).reshape(*([1] * lead), batch, count, *([1] * (values.dim() - dim - 1)))
    shape = [*values.shape]
    shape[lead] = batch
    values = values.expand(shape)
    shape[dim] = count
    return values.gather(dim, index.expand(shape))
