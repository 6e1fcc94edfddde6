"""SnapKV: the last queries of the prompt vote for the keys to keep.

After prefill the queries of an observation window of ``w`` tokens vote for the keys before it, per head,

    ``A = softmax(Q[-w:] K^T / sqrt(D) + causal)``,  ``vote_j = sum_i A_ij``  for ``j < N - w``,

votes are smoothed by one-dimensional pooling so that whole clusters stay, and the ``cap - w`` best keys are kept
together with the window. Positions go on from the true length.

What differs from the authors' code: votes are averaged over the query heads of a key head, so that grouped queries
store no copies (the authors store one copy of each key per query head, and each keeps its own: what is read then is
:class:`SnapKVByHead`); statistics stay in float32 (they sum votes in
the query's type); kept keys stand in order of position (they: in order of vote, which changes nothing); padding on the
left gets ``-inf`` votes, so that batches give what single prompts give (they: batches without padding only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import checked
from ..hooks.choose import pack
from ..hooks.site import Site
from .base import KVCompression
from .budgets import Budget, Cap, Ratio
from .scorers import CacheView, SnapKVVotes
from .selectors import TopK


@checked
@dataclass(frozen=True)
class _AmongVotes(TopK):
    """The best keys before the window, chosen as the authors choose them, which decides between equal votes (maximum
    pooling makes many)."""

    window: int = 64

    def pick(self, scores: Tensor, counts: Tensor) -> Tensor:
        before, most = scores.shape[-1] - self.window, int(counts.max())
        if most <= self.window or int(counts.min()) < most or not bool((scores[..., before:] == torch.inf).all()):
            return super().pick(scores, counts)
        best = scores[..., :before].topk(most - self.window, dim=-1).indices.sort(-1).values
        last = torch.arange(before, scores.shape[-1], device=scores.device)
        return torch.cat([best, last.expand(*best.shape[:2], -1)], -1)


class SnapKV(KVCompression):
    """Keep the keys that the last queries of the prompt attend to, with their neighbours.

    Args:
        ratio: share of the prompt's keys to evict; give this or ``cap``.
        cap: number of keys to keep in each layer, the window included.
        window_size: observing queries; they always stay, so at least so many keys are kept.
        kernel_size: of the pooling of votes, odd; a key that is voted for brings ``kernel_size // 2`` neighbours on
            each side. The default is the authors'. Take it about as long as what has to stay whole: of six-digit facts
            in 1,024 tokens, a dozen tokens each, SmolLM2-135M found 8 of 15 with 13 and 3 of 15 with 5 at 90 % evicted,
            at 1.2 ± 0.4 bits less per digit (docs/real-models.md).
        pooling: ``"avg"`` or ``"max"``; they differed by 0.1 bits per digit at most there.
        layers: layers to compress; ``None`` for all.
        compat: ``"authors"`` for the authors' rounding of votes, choice among equal ones, and even kernels; needs as
            many key heads as query heads.
        every: while decoding, evict again after so many new tokens; ``None`` for only once, after the prompt.

    Raises:
        ValueError: both or neither of ``ratio`` and ``cap``, a ratio outside [0, 1), a cap within the window.

    Reference: Li et al., 2024, arXiv 2404.14469.

    >>> SnapKV(ratio=0.5).scorer.window_size, SnapKV(cap=2048, window_size=32).budget
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
        every: int | None = None,
    ):
        if (ratio is None) == (cap is None):
            raise ValueError(f"give either ratio or cap, got ratio={ratio}, cap={cap}")
        scorer = SnapKVVotes(window_size, kernel_size, pooling, compat)
        budget: Budget = Ratio(ratio) if ratio is not None else Cap(cap)  # type: ignore[arg-type]
        if isinstance(budget, Cap) and budget.cap <= window_size:
            raise ValueError(f"cap={cap} must be larger than window_size={window_size}, which always stays")
        selector = None if compat is None else _AmongVotes(window=window_size)
        super().__init__(scorer, budget, selector, layers=layers, every=every)


class SnapKVByHead(SnapKV):
    """The same where query heads share keys: each query head keeps ``cap`` keys of its own choice, and reads no others.

    As the authors' code does for Mistral and Mixtral, which repeats keys for all query heads before it votes. Here a
    cache layer holds what any head of a group keeps, once, and a mask tells the heads apart, so that it is up to as
    many times longer as there are heads in a group.

    Args:
        ratio, cap, window_size, kernel_size, pooling, layers: as in :class:`SnapKV`.
        compat: ``"authors"`` for the authors' rounding of votes, choice among equal ones, and even kernels.

    Reference: Li et al., 2024, arXiv 2404.14469.

    >>> SnapKVByHead(cap=2048, window_size=32).budget
    Cap(cap=2048)
    """

    name: ClassVar[str] = "snapkv-by-head"
    replaces_mask: ClassVar[bool] = True

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
        super().__init__(ratio, cap, window_size, kernel_size, pooling, layers, compat)

    def wants(self, site: Site) -> bool:
        return True

    def _choose(self, view: CacheView, real: Tensor, seen: int) -> Tensor | dict[int, Tensor] | None:
        heads, kv_heads = view.q.shape[1], view.k.shape[1]

        def wide(t: Tensor) -> Tensor:
            return t.repeat_interleave(heads // kv_heads, 1)

        # One row for all heads stays one.
        valid = view.valid if view.valid.shape[1] == 1 else wide(view.valid)
        slots = view.slots if view.slots.dim() == 1 else wide(view.slots)
        each = replace(
            view, site=view.site.but(kv_heads=heads), k=wide(view.k), v=wide(view.v), valid=valid, slots=slots
        )
        kept = super()._choose(each, real, seen)
        if heads == kv_heads or not isinstance(kept, Tensor):
            return kept
        batch, count = view.k.shape[0], view.k.shape[2]
        chosen = torch.zeros(batch, heads, count + 1, dtype=torch.bool, device=kept.device)
        chosen = chosen.scatter(-1, kept.masked_fill(kept < 0, count), True)[..., :count]
        slots = slots.expand(batch, heads, count)
        table = torch.zeros(batch, heads, seen + 1, dtype=torch.bool, device=kept.device)
        table = table.scatter(-1, slots.masked_fill(slots < 0, seen), chosen)[..., :seen]
        assert view.site.memory is not None
        # Two axes: a third would be one of tokens that come and go.
        view.site.memory["read by head"] = table.flatten(1)
        return pack(chosen.unflatten(1, (kv_heads, -1)).any(2).flatten(0, 1)).unflatten(0, (batch, kv_heads))

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        table = None if site.memory is None else site.memory.get("read by head")
        if table is None or site.phase != "decode":
            return call(q, k, v)
        assert site.mask is not None
        table, slots = table.unflatten(1, (site.heads, -1)), site.key_slots()[:, :, 0]
        length = table.shape[-1]
        stays = table.gather(-1, slots.clamp(0, length - 1).expand(table.shape[0], -1, -1)) | (slots >= length)
        return call(q, k, v, mask=stays[:, :, None] & site.mask.dense(q.device))
