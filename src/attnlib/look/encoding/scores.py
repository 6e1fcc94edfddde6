"""How well responses are predicted, and how well they could be."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import shaped


@shaped(predicted="float (..., N, T)", measured="float (..., N, T)")
def pearson(predicted: Tensor, measured: Tensor) -> Tensor:
    """Pearson's r over events, one per response: (..., N, T) twice -> (..., T). NaN where one of them is constant.

    >>> pearson(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0], [5.0]]))
    tensor([1.])
    """
    a, b = _centred(predicted), _centred(measured)
    r = (a * b).sum(-2) / (a.square().sum(-2) * b.square().sum(-2)).sqrt()
    return r.clamp(-1, 1).to(torch.promote_types(predicted.dtype, torch.float32))


def _centred(x: Tensor) -> Tensor:
    """Without the mean and with a greatest entry of 1; NaN where rounding is all that is left."""
    x = x.double()
    apart = x - x.mean(-2, keepdim=True)
    size = apart.abs().amax(-2, keepdim=True)
    flat = size <= 1e-7 * x.abs().amax(-2, keepdim=True)
    return torch.where(flat, torch.nan, apart / torch.where(size == 0, 1, size))


@shaped(repeats="float (R, N, T)")
def noise_ceiling(repeats: Tensor) -> Tensor:
    """The r that a perfect model would have with the mean over repeats, from how repeats of one event differ.

    ``sqrt(s / (s + n / R))`` with ``n`` the variance over repeats of an event and ``s`` what the variance over events
    has beyond it, both without bias; 0 where nothing is left beyond noise, NaN where a response never changes.

    Args:
        repeats: (R, N, T), every event R times, R at least 2.

    Returns:
        (T,).

    Reference: Allen et al., 2022, "A massive 7T fMRI dataset" (its noise ceiling, as a correlation).

    >>> noise_ceiling(torch.arange(4.0).view(1, 4, 1).expand(2, 4, 1))
    tensor([1.])
    """
    count, events, _ = repeats.shape
    if count < 2:
        raise ValueError(f"repeats must hold every event at least twice, got {count}: one says nothing of its noise")
    if events < 2:
        raise ValueError(f"repeats must hold at least two events, got {events}")
    wide = repeats.double()
    noise = wide.var(0).mean(0) / count
    whole = wide.mean(0).var(0)
    ceiling = ((whole - noise).clamp(min=0) / torch.where(whole == 0, torch.nan, whole)).sqrt()
    return ceiling.to(repeats.dtype if repeats.dtype == torch.float64 else torch.float32)
