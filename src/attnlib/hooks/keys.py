"""Keys beside the model's own: for one call, cached nowhere, each query row with its own choice of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_axes
from .site import Site


def with_keys(
    site: Site, call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor,
    allowed: Tensor, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The rest of an attention call over the model's keys and more of them; for ``around_attention``.

    Keys of a model with rotary positions are to be turned before: ``site.rotation.turn(more_k, at)``.

    Args:
        site: where, with the model's mask.
        call: the rest, as ``around_attention`` got it.
        q, k, v: as ``around_attention`` got them.
        more_k, more_v: (B, Hk, P, D) and (B, Hk, P, Dv).
        allowed: (B or 1, H or 1, N, P) boolean, which rows read which of them.
        rows: (N,) which queries of the layer's call ``q`` holds; by default all. Only where nothing further in, neither
            another intervention nor the layer's kernel, tells queries apart by their number.

    Returns:
        (B, H, N, Dv).
    """
    batch, n = q.shape[0], q.shape[2]
    check_axes("more_k", more_k, B=batch, Hk=k.shape[1], P=None, D=k.shape[3])
    check_axes("more_v", more_v, B=batch, Hk=v.shape[1], P=more_k.shape[2], Dv=v.shape[3])
    check_axes("allowed", allowed, B=None, H=None, N=n, P=more_k.shape[2])
    if allowed.dtype != torch.bool or allowed.shape[0] not in (1, batch) or allowed.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"allowed must be boolean (B or 1, H or 1, N, P) with B={batch}, H={q.shape[1]}, got {allowed.dtype} of "
            f"shape {tuple(allowed.shape)}"
        )
    if site.mask is None:
        raise ValueError(f"layer {site.layer} ({site.name}): its mask is not known, so that no keys can be added")
    own, bias = site.mask.rows(torch.arange(n, device=q.device) if rows is None else rows)
    if own is None:
        own = torch.ones(1, 1, n, k.shape[2], dtype=torch.bool, device=q.device)
    several, heads = max(own.shape[0], allowed.shape[0]), max(own.shape[1], allowed.shape[1])
    mask = torch.cat([t.expand(several, heads, n, -1) for t in (own, allowed)], -1)
    if bias is not None:
        bias = F.pad(bias.expand(*bias.shape[:2], n, k.shape[2]), (0, more_k.shape[2]))
    return call(q, torch.cat([k, more_k.to(k.dtype)], 2), torch.cat([v, more_v.to(v.dtype)], 2), mask=mask, bias=bias)
