"""Votes of the last queries for the keys before them, as SnapKV counts them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_divides, check_width, shaped
from ..types import check_choice, stats_dtype


@shaped(q="float (B, H, N, D)", k="float (B, Hk, M, D)", valid="bool (B or 1, M) | (B or 1, Hk or 1, M)")
def snapkv_votes(
    q: Tensor,
    k: Tensor,
    window_size: int = 64,
    kernel_size: int = 5,
    pooling: str = "avg",
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
    reduce: str = "sum",
    compat: str | None = None,
) -> Tensor:
    """Pooled votes of the observation window for the keys before it.

    Args:
        q: (B, H, N, D) or, enough, its last ``window_size`` queries.
        k: (B, Hk, N, D) keys; votes are averaged over the ``H / Hk`` query heads of each.
        window_size: w, observing queries.
        kernel_size: of the pooling, odd; with ``compat="authors"`` also even, a key then pooling one more before it
            than behind it.
        pooling: ``"avg"`` (zeros beyond the ends count, as the authors' do) or ``"max"``.
        scale: of the scores; ``D ** -0.5`` by default.
        valid: (B or 1, N) or (B or 1, Hk or 1, N) boolean, keys that exist; the others get ``-inf``.
        reduce: ``"sum"`` over the window (the paper) or ``"mean"`` (kvpress).
        compat: ``"authors"`` casts the weights to the type of ``q`` before they are summed and pooled.

    Returns:
        (B, Hk, N - w) votes.

    Raises:
        ValueError: an even kernel, a window as long as the prompt.

    Reference: Li et al., 2024, arXiv 2404.14469, section 4.

    >>> snapkv_votes(torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), window_size=3, kernel_size=3).shape
    torch.Size([1, 2, 6])
    """
    check_choice("pooling", pooling, ("avg", "max"))
    check_choice("reduce", reduce, ("sum", "mean"))
    check_choice("compat", compat, (None, "authors"))
    check_window(window_size, kernel_size, even=compat == "authors")
    if not q.shape[1]:
        raise ValueError(f"q must have at least one head, got {tuple(q.shape)}")
    check_divides("heads of k", k.shape[1], "heads of q", q.shape[1])
    check_width("k", k, q.shape[3], "the width of q")
    batch, heads, n, kv_heads, m = q.shape[0], q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if m <= window_size or n < window_size:
        raise ValueError(f"window_size={window_size} must be smaller than the prompt ({m} keys, {n} queries given)")
    dtype = stats_dtype(q.dtype)
    window = q[:, :, -window_size:]
    if compat == "authors":
        scores = window @ k.repeat_interleave(heads // kv_heads, 1).transpose(-2, -1)
        scores = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).to(dtype)
    else:
        grouped = window.to(dtype).reshape(batch, kv_heads, -1, q.shape[-1])
        scores = (grouped @ k.to(dtype).transpose(-2, -1)).reshape(batch, heads, window_size, m)
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    ahead = torch.arange(m, device=q.device) > torch.arange(m - window_size, m, device=q.device).unsqueeze(-1)
    scores = scores.masked_fill(ahead, float("-inf"))
    if valid is not None:
        valid = valid[:, None] if valid.dim() == 2 else valid
        per_head = valid.repeat_interleave(heads // kv_heads, 1) if valid.shape[1] > 1 else valid
        # A padding query of the window has no key at all; it votes for nothing.
        scores = scores.masked_fill(~per_head[:, :, None], float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    if compat == "authors":
        weights = weights.to(q.dtype)
    votes = pooled_votes(weights[..., : m - window_size], kv_heads, kernel_size, pooling, reduce)
    return votes if valid is None else votes.masked_fill(~valid[..., : m - window_size], float("-inf"))


def pooled_votes(
    weights: Tensor, kv_heads: int, kernel_size: int = 5, pooling: str = "avg", reduce: str = "sum"
) -> Tensor:
    """Votes from weights (B, H, w, M) of the observing queries, smoothed, averaged per key head: (B, Hk, M)."""
    votes = weights.sum(-2) if reduce == "sum" else weights.mean(-2)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    # An even kernel gives one vote too many, for a key that is not there.
    votes = pool(votes, kernel_size, stride=1, padding=kernel_size // 2)[..., : weights.shape[-1]]
    return votes.unflatten(1, (kv_heads, -1)).mean(2)


def check_window(window_size: int, kernel_size: int, even: bool = False) -> None:
    for name, value in (("window_size", window_size), ("kernel_size", kernel_size)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    if kernel_size < 1 or (kernel_size % 2 == 0 and not even):
        raise ValueError(f"kernel_size must be odd, so that every key keeps its vote; got {kernel_size}")
