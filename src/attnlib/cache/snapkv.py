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

from .base import KVCompression
from .budgets import Budget, Cap, Ratio
from .scorers import SnapKVVotes


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
        super().__init__(scorer, budget, layers=layers, every=every)
