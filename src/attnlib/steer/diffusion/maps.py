"""Arithmetic of attention maps as pictures, (..., h, w), all of it differentiable.

:class:`attnlib.hooks.Maps` gives (B, T, h, w), weights that pictures give to text tokens, and (B, h w, h, w), weights
between places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_int, check_real, shaped

HOW = ("sum", "max", "range")


@shaped(maps="float (..., h, w)")
def normalize(maps: Tensor, how: str = "sum", eps: float = 1e-12) -> Tensor:
    """Each picture divided by its sum or its maximum, or stretched over [0, 1] (``"range"``).

    >>> normalize(torch.tensor([[1.0, 3.0]]), "max").tolist()
    [[0.3333333432674408, 1.0]]
    """
    check_choice("how", how, HOW)
    if how == "sum":
        return maps / maps.sum((-2, -1), keepdim=True).clamp(min=eps)
    high = maps.amax((-2, -1), keepdim=True)
    if how == "max":
        return maps / high.clamp(min=eps)
    low = maps.amin((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=eps)


@shaped(maps="float (..., T, h, w)")
def over_words(maps: Tensor, sharpness: float = 100.0, first: int = 1, last: int = -1) -> Tensor:
    """A softmax over the tokens ``first`` to ``last`` at each place, of weights times ``sharpness``.

    The token that begins a text takes most of the weight everywhere; without it the others compete. Tokens that are
    left out get zero, so that numbers of tokens stay as they were.

    >>> over_words(torch.tensor([0.9, 0.0, 0.0, 0.1]).view(4, 1, 1)).flatten().tolist()
    [0.0, 0.5, 0.5, 0.0]
    """
    tokens = maps.shape[-3]
    stop = tokens + last if last < 0 else last
    if not 0 <= first < stop <= tokens:
        raise ValueError(f"first={first} and last={last} leave nothing of {tokens} tokens")
    some = (maps[..., first:stop, :, :] * sharpness).softmax(-3)
    return F.pad(some, (0, 0, 0, 0, first, tokens - stop))


@shaped(maps="float (..., T, h, w)")
def of_spans(maps: Tensor, spans: Sequence[Sequence[int]]) -> Tensor:
    """The mean map of the tokens of each span: (..., len(spans), h, w).

    >>> of_spans(torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1), [[0], [1, 2]]).flatten().tolist()
    [1.0, 3.0]
    """
    for span in spans:
        if not span or min(span) < 0 or max(span) >= maps.shape[-3]:
            raise ValueError(f"spans holds {list(span)}, but the maps are of tokens 0 to {maps.shape[-3] - 1}")
    return torch.stack([maps[..., list(span), :, :].mean(-3) for span in spans], -3)


@shaped(maps="float (K, h, w)")
def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(K, H, W) maps at another size, bicubic; themselves where it is theirs."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], tuple(size), mode="bicubic", align_corners=False)[0]


@shaped(maps="float (..., h, w)")
def smooth(maps: Tensor, sigma: float = 0.5, kernel: int = 3) -> Tensor:
    """A Gaussian blur of standard deviation ``sigma`` pixels over ``kernel`` by ``kernel`` of them, reflected at edges.

    >>> round(smooth(torch.ones(2, 3, 3)).sum().item(), 3)
    18.0
    """
    check_int("kernel", kernel, least=1)
    check_real("sigma", sigma, above=0)
    half = kernel // 2
    if kernel % 2 == 0 or half >= min(maps.shape[-2:]):
        raise ValueError(f"kernel must be odd and reach less far than the maps {tuple(maps.shape[-2:])}, got {kernel}")
    at = torch.arange(kernel, dtype=maps.dtype, device=maps.device) - half
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    flat = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (half,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1)).view_as(maps)


@shaped(maps="float (..., T, h, w)", between="float (..., M, h, w)")
def refine(maps: Tensor, between: Tensor, power: int = 1) -> Tensor:
    """Maps spread over places that belong together: ``A^power m`` with the attention between places.

    Args:
        maps: (..., T, h, w).
        between: (..., h w, h, w), of key, then query place, as ``Maps(of="image")`` gives it.
        power: how often.
    """
    check_int("power", power, least=0)
    h, w = maps.shape[-2:]
    if between.shape[-3] != h * w:
        raise ValueError(f"between must hold {h * w} places for maps of {h} x {w}, got {tuple(between.shape)}")
    rows = between.flatten(-2).transpose(-2, -1)  # query place, key place
    flat = maps.flatten(-2).transpose(-2, -1)
    for _ in range(power):
        flat = rows @ flat
    return flat.transpose(-2, -1).unflatten(-1, (h, w))


@shaped(maps="float (..., h, w)")
def soft_threshold(maps: Tensor, threshold: float = 0.5, sharpness: float = 10.0) -> Tensor:
    """A mask with slopes: ``sigmoid(sharpness (m - threshold))`` of maps stretched over [0, 1], stretched again.

    >>> soft_threshold(torch.tensor([[0.0, 1.0]])).tolist()
    [[0.0, 1.0]]
    """
    return normalize(torch.sigmoid(sharpness * (normalize(maps, "range") - threshold)), "range")


@shaped(a="float (..., h, w)", b="float (..., h, w)")
def overlap(a: Tensor, b: Tensor, eps: float = 1e-12) -> Tensor:
    """``sum min(a, b) / sum (a + b)`` over places: 0 for disjoint maps, 1/2 for equal ones; (...).

    >>> overlap(torch.eye(2), torch.eye(2)).item(), overlap(torch.eye(2), torch.eye(2).flip(0)).item()
    (0.5, 0.0)
    """
    return torch.minimum(a, b).sum((-2, -1)) / (a + b).sum((-2, -1)).clamp(min=eps)


@shaped(a="float (..., h, w)", b="float (..., h, w)")
def iou(a: Tensor, b: Tensor, eps: float = 1e-12) -> Tensor:
    """``sum min(a, b) / sum max(a, b)`` over places, the intersection over union of soft masks; (...).

    >>> iou(torch.ones(1, 2), torch.tensor([[1.0, 0.0]])).item()
    0.5
    """
    return torch.minimum(a, b).sum((-2, -1)) / torch.maximum(a, b).sum((-2, -1)).clamp(min=eps)


@shaped(a="float (..., h, w)", b="float (..., h, w)")
def js(a: Tensor, b: Tensor, eps: float = 1e-12) -> Tensor:
    """Jensen-Shannon divergence of two maps as distributions over places, in nats: 0 to ln 2; (...).

    >>> round(js(torch.eye(2), torch.eye(2).flip(0)).item(), 6)
    0.693147
    """
    p, q = normalize(a), normalize(b)
    m = (p + q) / 2
    terms = [torch.where(x > eps, x * ((x + eps) / (m + eps)).log(), 0) for x in (p, q)]
    return (terms[0] + terms[1]).sum((-2, -1)) / 2


@shaped(a="float (..., h, w)", b="float (..., h, w)")
def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between two maps; (...).

    >>> round(cosine(torch.eye(2), torch.ones(2, 2)).item(), 6)
    0.707107
    """
    return F.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)
