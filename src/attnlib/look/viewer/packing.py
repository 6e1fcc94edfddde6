"""Maps as bytes: a byte per weight, compressed, and beyond a number of keys only the largest of every row.

A row with largest absolute value ``s`` (float32) holds ``q = round(255 sqrt(w / s))``, so ``w' = s (q / 255)^2`` is
exact for the largest and off by at most ``sqrt(w s) / 255 + s / 255^2`` elsewhere; signed rows hold
``128 + round(127 sign(w) sqrt(|w| / s))``. Small weights beside a large one stay apart, as they would not on a straight
scale.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import torch
from torch import Tensor

#: Side of the small maps of the overview.
THUMB = 26


def head_numbers(weights: Tensor) -> dict[str, Tensor]:
    """Per head (heads, N, M), over the rows that read anything: as :class:`attnlib.look.Statistics` counts them.

    ``sink`` is the mean weight on the first key by the queries that may read it, here all; ``entropy`` in nats;
    ``distance`` is ``sum_j A_ij |i - j|`` along the sequence.
    """
    weights = weights.double()
    live = weights.sum(-1) > 0
    rows = live.sum(-1).clamp_min(1)
    n, m = weights.shape[1:]
    apart = (torch.arange(n)[:, None] - torch.arange(m)).abs().to(weights)
    entropy = torch.special.entr(weights.clamp_min(0)).sum(-1)
    return {
        "sink": (weights[..., 0] * live).sum(-1) / rows,
        "entropy": (entropy * live).sum(-1) / rows,
        "distance": ((weights * apart).sum(-1) * live).sum(-1) / rows,
    }


def encode(weights: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """``(codes, scale)``, uint8 like ``weights`` and float32 (..., N), of weights (..., N, M).

    >>> codes, scale = encode(torch.tensor([[0.25, 1.0]]), False)
    >>> codes.tolist(), [round(w, 3) for w in decode(codes, scale, False)[0].tolist()]
    ([[128, 255]], [0.252, 1.0])
    """
    scale = weights.abs().amax(-1).float()
    share = weights.float().abs() / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    root = share.sqrt()
    if signed:
        return (128 + (127 * weights.sign().float() * root).round()).to(torch.uint8), scale
    return (255 * root).round().to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Weights as the page reads them."""
    share = (codes.float() - 128) / 127 if signed else codes.float() / 255
    return share * share.abs() * scale.unsqueeze(-1)


def pack(*tensors: Tensor) -> str:
    """Little-endian bytes of tensors one after another, deflated, as text."""
    raw = b"".join(t.contiguous().numpy().astype(t.numpy().dtype.newbyteorder("<")).tobytes() for t in tensors)
    return base64.b64encode(zlib.compress(raw, 6)).decode()


def thumbs(weights: Tensor, signed: bool) -> Tensor:
    """(heads, rows, columns) codes of small maps: the largest weight of each place, on a scale per head."""
    size = [min(s, THUMB) for s in weights.shape[1:]]
    largest = torch.nn.functional.adaptive_max_pool2d(weights.float()[None], size)[0]
    if signed:
        least = -torch.nn.functional.adaptive_max_pool2d(-weights.float()[None], size)[0]
        largest = torch.where(-least > largest, least, largest)
    return encode(largest.flatten(1)[:, None], signed)[0].unflatten(-1, size)[:, 0]


def layer_bytes(weights: Tensor, signed: bool, top: int | None) -> tuple[str, dict[str, Any]]:
    """A layer's maps (heads, N, M) for the page, and how to read them.

    Dense: scales, codes. With ``top``: scales, what is left of each row, low and high bytes of the keys, codes.
    """
    if top is None or top >= weights.shape[-1]:
        codes, scale = encode(weights, signed)
        return pack(scale, codes), {"top": 0}
    if weights.shape[-1] > 1 << 16:
        raise ValueError(f"a page holds at most {1 << 16} keys of a row, got {weights.shape[-1]}")
    keys = weights.abs().topk(top, -1).indices.sort(-1).values
    kept = weights.gather(-1, keys)
    codes, scale = encode(kept, signed)
    rest = (weights.double().sum(-1) - kept.double().sum(-1)).float()
    return pack(scale, rest, (keys % 256).to(torch.uint8), (keys // 256).to(torch.uint8), codes), {"top": top}
