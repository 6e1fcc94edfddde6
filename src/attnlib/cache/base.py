"""KV-cache compression after prefill: a scorer, a budget and a selector.

A technique is one small class with ``score(site, q, k, v) -> (B, Hk, N)``: how much each cached key is worth, ``+inf``
for keys that must stay. How many stay is a :class:`Budget`, which ones a selector; positions, masks and batching are
the adapter's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..hooks.core import Intervention, Site


class Budget(Protocol):
    """How many of ``count`` keys stay."""

    def keep(self, count: int) -> int: ...

    @property
    def everything(self) -> bool: ...


@dataclass(frozen=True)
class Ratio:
    """Evict the share ``ratio`` of the keys: ``int(count * (1 - ratio))`` stay.

    >>> Ratio(0.25).keep(10)
    7
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio must lie in [0, 1): the share of keys that is evicted; got {self.ratio}")

    def keep(self, count: int) -> int:
        return int(count * (1 - self.ratio))

    @property
    def everything(self) -> bool:
        return self.ratio == 0.0


@dataclass(frozen=True)
class Cap:
    """Keep at most ``cap`` keys.

    >>> Cap(8).keep(10), Cap(8).keep(5)
    (8, 5)
    """

    cap: int

    def __post_init__(self) -> None:
        if not isinstance(self.cap, int) or self.cap < 1:
            raise ValueError(f"cap must be an integer of at least 1: the number of keys that stay; got {self.cap!r}")

    def keep(self, count: int) -> int:
        return min(count, self.cap)

    @property
    def everything(self) -> bool:
        return False


def top_per_head(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best keys of every head: (B, Hk, N) -> (B, Hk, count), ascending."""
    return scores.topk(count, dim=-1).indices.sort(-1).values


def existing(site: Site, device: torch.device) -> Tensor:
    """(B or 1, N) boolean: keys that the last query may read; the rest of a causal prompt is padding.

    Raises:
        ValueError: the last query may not read itself: padding on the right, after which nothing can be decoded.
    """
    assert site.mask is not None
    allowed, _ = site.mask.rows(torch.tensor([site.n_queries - 1], device=device))
    if allowed is None:
        return torch.ones(1, site.n_keys, dtype=torch.bool, device=device)
    last = allowed[:, 0, 0]
    if not bool(last[:, -1].all()):
        raise ValueError(
            "the prompt is padded on the right; evicting keys needs padding on the left (padding_side='left')"
        )
    return last


class KVCompression(Intervention, ABC):
    """Evict keys and values once, after prefill; decoding goes on with what is left, at the true positions.

    The prompt is what the model reads while its cache is empty, in one call: of a prompt read in chunks only the first
    chunk is compressed.

    Args:
        budget: how many keys stay.
        layers: layers to compress; ``None`` for all.
        selector: ``(scores (B, Hk, N), count) -> (B, Hk, count)`` ascending indices.
    """

    kinds: ClassVar[tuple[str, ...]] = ("self",)
    protected: int = 0

    def __init__(
        self,
        budget: Budget,
        layers: Sequence[int | str] | None = None,
        selector: Callable[[Tensor, int], Tensor] = top_per_head,
    ):
        self.budget, self.selector = budget, selector
        self.layers = None if layers is None else list(layers)
        self.reset()

    @property
    def identity(self) -> bool:
        return self.budget.everything

    def reset(self) -> None:
        self._kept: dict[int, tuple[int, Tensor]] = {}

    @abstractmethod
    def score(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each key is worth.

        Args:
            site: where; ``site.mask`` is the prompt's.
            q: (B, H, N, D) queries of the prompt, rotary positions applied.
            k: (B, Hk, N, D).
            v: (B, Hk, N, Dv).

        Returns:
            (B, Hk, N) scores in a float type, ``+inf`` for keys that must stay, ``-inf`` for keys that may never stay.
        """

    def on_cache(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        count = max(self.budget.keep(k.shape[2]), min(self.protected, k.shape[2]))
        if count >= k.shape[2]:
            return None
        with torch.no_grad():
            kept = self.selector(self.score(site, q, k, v), count)
        self._kept[site.layer] = (k.shape[2], kept)
        return kept

    def results(self) -> dict[int, dict[str, Any]]:
        """``{layer: {"kept": (B, Hk, K) slots, "of": N}}`` of the last prompt, without layers that kept everything."""
        return {layer: {"kept": kept, "of": count} for layer, (count, kept) in sorted(self._kept.items())}
