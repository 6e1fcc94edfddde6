"""Choosing tokens per sample: which stay, packed to the right, and what they carry; asking a module about them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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


def ask(module: Any, *tensors: Tensor | None, **named: Tensor | None) -> Any:
    """What a module of a technique makes of tensors of a model, in the type and on the device of its own weights.

    Boolean and integer tensors keep their type. Something that is no module, or has no weights, gets them as they are.

    >>> ask(nn.Linear(2, 1), torch.zeros(1, 2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    weight = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if weight is None:
        return module(*tensors, **named)
    given = [None if t is None else alike(weight, t) for t in tensors]
    return module(*given, **{name: None if t is None else alike(weight, t) for name, t in named.items()})


def alike(weight: Tensor, t: Tensor) -> Tensor:
    """``t`` on the device of a weight, and in its type where it is a floating-point tensor."""
    return t.to(weight) if t.is_floating_point() else t.to(weight.device)
