"""SnapKV: the last queries of the prompt vote for the keys to keep.

After prefill the queries of an observation window of ``w`` tokens vote for the keys before it, per head,

    ``A = softmax(Q[-w:] K^T / sqrt(D) + causal)``,  ``vote_j = sum_i A_ij``  for ``j < N - w``,

votes are smoothed by one-dimensional pooling so that whole clusters stay, and the ``cap - w`` best keys are kept
together with the window. Positions go on from the true length.

What differs from the authors' code: votes are averaged over the query heads of a key head, so that grouped queries
store no copies (the authors store one copy of each key per query head); statistics stay in float32 (they sum votes in
the query's type); kept keys stand in order of position (they: in order of vote, which changes nothing); padding on the
left gets ``-inf`` votes, so that batches give what single prompts give (they: batches without padding only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hooks.core import Site
from ..types import check_choice, stats_dtype
from .base import Budget, Cap, KVCompression, Ratio, existing


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
        kernel_size: of the pooling, odd.
        pooling: ``"avg"`` (zeros beyond the ends count, as the authors' do) or ``"max"``.
        scale: of the scores; ``D ** -0.5`` by default.
        valid: (B or 1, N) boolean, keys that exist; the others get ``-inf``.
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
    _check_window(window_size, kernel_size)
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
        # A padding query of the window has no key at all; it votes for nothing.
        scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    if compat == "authors":
        weights = weights.to(q.dtype)
    votes = weights[..., : m - window_size]
    votes = votes.sum(-2) if reduce == "sum" else votes.mean(-2)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    votes = pool(votes, kernel_size, stride=1, padding=kernel_size // 2)
    votes = votes.reshape(batch, kv_heads, heads // kv_heads, -1).mean(2)
    return votes if valid is None else votes.masked_fill(~valid[:, None, : m - window_size], float("-inf"))


def _check_window(window_size: int, kernel_size: int) -> None:
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that every key keeps its vote; got {kernel_size}")


class SnapKV(KVCompression):
    """Keep the keys that the last queries of the prompt attend to, with their neighbours.

    Args:
        ratio: share of the prompt's keys to evict; give this or ``cap``.
        cap: number of keys to keep in each layer, the window included.
        window_size: observing queries; they always stay, so at least so many keys are kept.
        kernel_size: of the pooling of votes, odd.
        pooling: ``"avg"`` or ``"max"``.
        layers: layers to compress; ``None`` for all.
        compat: ``"authors"`` for the authors' rounding of votes; needs as many key heads as query heads.

    Raises:
        ValueError: both or neither of ``ratio`` and ``cap``, a ratio outside [0, 1), a cap within the window.

    Reference: Li et al., 2024, arXiv 2404.14469.

    >>> SnapKV(ratio=0.5).window_size, SnapKV(cap=2048, window_size=32).budget
    (64, Cap(cap=2048))
    """

    name: ClassVar[str] = "snapkv"

    def __init__(
        self,
        ratio: float | None = None,
        cap: int | None = None,
        window_size: int = 64,
        kernel_size: int = 5,
        pooling: str = "avg",
        layers: Sequence[int | str] | None = None,
        compat: str | None = None,
    ):
        if (ratio is None) == (cap is None):
            raise ValueError(f"give either ratio or cap, got ratio={ratio}, cap={cap}")
        _check_window(window_size, kernel_size)
        check_choice("pooling", pooling, ("avg", "max"))
        check_choice("compat", compat, (None, "authors"))
        budget: Budget = Ratio(ratio) if ratio is not None else Cap(cap)  # type: ignore[arg-type]
        if isinstance(budget, Cap) and budget.cap <= window_size:
            raise ValueError(f"cap={cap} must be larger than window_size={window_size}, which always stays")
        super().__init__(budget, layers)
        self.window_size, self.kernel_size, self.pooling, self.compat = window_size, kernel_size, pooling, compat
        self.protected = window_size

    def wants(self, site: Site) -> bool:
        if self.compat == "authors" and site.heads != site.kv_heads:
            raise ValueError(
                f"compat='authors' stores one copy of each key per query head, which a model with {site.kv_heads} key "
                f"heads for {site.heads} query heads cannot hold; leave compat out"
            )
        return True

    def score(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        votes = snapkv_votes(
            q, k, self.window_size, self.kernel_size, self.pooling, scale=site.scale, valid=existing(site, q.device),
            compat=self.compat,
        )  # fmt: skip
        return F.pad(votes, (0, self.window_size), value=float("inf"))
