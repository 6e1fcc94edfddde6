"""How many keys stay: per layer, shared between the heads of a layer, or shared between all layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import checked
from ..types import check_choice


class Budget(ABC):
    """How many of ``count`` keys a head keeps."""

    #: Among whom keys compete: the keys of one ``"head"``, of all ``"heads"`` of a layer, or of all ``"layers"``.
    scope: ClassVar[str] = "head"

    #: Where keys compete beyond their head, the share of its even part that every head keeps in any case.
    minimum: float = 1.0

    @abstractmethod
    def keep(self, count: int, layer: int = 0, layers: int = 1) -> int:
        """Keys per head that stay of ``count``, in the ``layer``-th of ``layers`` compressed layers."""

    @property
    def everything(self) -> bool:
        """All keys stay, whatever their number."""
        return False

    def counts(
        self, scores: Sequence[Tensor], real: Sequence[Tensor], places: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Keys that each head keeps.

        Args:
            scores: (B, Hk, M) of each layer in question; ``+inf`` keys stay, ``-inf`` keys do not.
            real: (B,) tokens seen so far, without padding, of each layer.
            places: (place of the layer among the compressed ones, their number) of each.

        Returns:
            (B, Hk) of each layer.
        """
        even = []
        for s, tokens, place in zip(scores, real, places, strict=True):
            numbers = [self.keep(count, *place) for count in tokens.tolist()]
            wanted = torch.tensor(numbers, device=s.device).unsqueeze(-1).expand(s.shape[:2])
            even.append(torch.maximum(wanted, (s == torch.inf).sum(-1)))
        if self.scope == "head":
            shares = even
        elif self.scope == "heads":
            shares = [_compete(s, e, self.minimum) for s, e in zip(scores, even, strict=True)]
        else:
            longest = max(s.shape[-1] for s in scores)
            pool = torch.cat([F.pad(s, (longest - s.shape[-1], 0), value=-torch.inf) for s in scores], 1)
            shares = list(_compete(pool, torch.cat(even, 1), self.minimum).split([s.shape[1] for s in scores], 1))
        return [torch.minimum(c, (s > -torch.inf).sum(-1)).clamp(min=1) for s, c in zip(scores, shares, strict=True)]


def _compete(scores: Tensor, even: Tensor, minimum: float) -> Tensor:
    """(B, G) numbers of keys that the heads keep when their keys (B, G, M) compete for the sum of ``even`` (B, G)."""
    batch, heads, length = scores.shape
    safe = (even.double() * minimum).long().clamp(max=length)
    total = even.sum(-1).clamp(max=heads * length)
    top = scores.topk(int(safe.max()), dim=-1).indices
    certain = torch.zeros_like(scores, dtype=torch.bool)
    certain.scatter_(-1, top, torch.arange(top.shape[-1], device=scores.device) < safe.unsqueeze(-1))
    pool = scores.masked_fill(certain & (scores > -torch.inf), torch.inf).flatten(1)
    best = pool.topk(int(total.max()), dim=-1)
    wins = (torch.arange(best.indices.shape[-1], device=scores.device) < total.unsqueeze(-1)) & (
        best.values > -torch.inf
    )
    return torch.zeros_like(even).scatter_add(-1, best.indices // length, wins.long())


@checked
@dataclass(frozen=True)
class Ratio(Budget):
    """Evict the share ``ratio`` of the keys: ``int(count * (1 - ratio))`` stay.

    >>> Ratio(0.25).keep(10)
    7
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio must lie in [0, 1): the share of keys that is evicted; got {self.ratio}")

    def keep(self, count: int, layer: int = 0, layers: int = 1) -> int:
        return int(count * (1 - self.ratio))

    @property
    def everything(self) -> bool:
        return self.ratio == 0.0


@checked
@dataclass(frozen=True)
class Cap(Budget):
    """Keep at most ``cap`` keys.

    >>> Cap(8).keep(10), Cap(8).keep(5)
    (8, 5)
    """

    cap: int

    def __post_init__(self) -> None:
        if not isinstance(self.cap, int) or self.cap < 1:
            raise ValueError(f"cap must be an integer of at least 1: the number of keys that stay; got {self.cap!r}")

    def keep(self, count: int, layer: int = 0, layers: int = 1) -> int:
        return min(count, self.cap)


@checked
@dataclass(frozen=True)
class Pyramid(Budget):
    """Lower layers keep more than higher ones, in equal steps, as many in all as ``budget`` gives to each layer alike.

    With ``K`` keys per layer on average, the last layer keeps about ``K / beta`` and the first ``2 K - K / beta``. When
    that is more than there is before the window, the first keeps all of it and the last ``2 K`` less that. Where the
    last layer would keep less than ``window_size``, all layers keep ``K``.

    Args:
        budget: the average, a :class:`Ratio` or a :class:`Cap`.
        beta: steepness, at least 1, where all layers keep the same.
        window_size: what even the last layer has to keep; SnapKV's observation window.

    Reference: Cai et al., 2024 (PyramidKV), arXiv 2406.02069, section 3.3; numbers as in kvpress.

    >>> [Pyramid(Ratio(0.75), beta=4, window_size=2).keep(40, layer, 3) for layer in range(3)]
    [18, 10, 2]
    """

    budget: Budget
    beta: float = 20.0
    window_size: int = 64

    def __post_init__(self) -> None:
        _check_simple("Pyramid", self.budget)
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, got {self.beta}")
        if self.window_size < 0:
            raise ValueError(f"window_size must not be negative, got {self.window_size}")

    def keep(self, count: int, layer: int = 0, layers: int = 1) -> int:
        average = count * (1 - self.budget.ratio) if isinstance(self.budget, Ratio) else self.budget.keep(count)
        average = (self.window_size + average) - self.window_size  # rounded where kvpress rounds
        low = average / self.beta
        high = average * 2 - low
        if high >= count - self.window_size:
            high = count - self.window_size
            low = average * 2 - high
        if layers == 1 or not count >= high >= low >= self.window_size:
            return round(average)
        return round(high - layer * ((high - low) / (layers - 1)))

    @property
    def everything(self) -> bool:
        return self.budget.everything


@checked
@dataclass(frozen=True)
class PerLayer(Budget):
    """A budget for each layer.

    Args:
        budgets: one per compressed layer, in order, or ``{place among the compressed layers: budget}``, where a place
            that is left out keeps everything.

    >>> PerLayer([Ratio(0.0), Cap(4)]).keep(10, 1, 2)
    4
    """

    budgets: Sequence[Budget] | Mapping[int, Budget]

    def __post_init__(self) -> None:
        if isinstance(self.budgets, Budget) or not isinstance(self.budgets, Iterable):
            raise TypeError(f"budgets must be a sequence or {{place: budget}}, got {self.budgets!r}")
        given = self.budgets if isinstance(self.budgets, Mapping) else dict(enumerate(self.budgets))
        if not given:
            raise ValueError("budgets must name at least one layer")
        for budget in given.values():
            _check_simple("PerLayer", budget)

    def keep(self, count: int, layer: int = 0, layers: int = 1) -> int:
        if isinstance(self.budgets, Mapping):
            wrong = [place for place in self.budgets if not 0 <= place < layers]
            if wrong:
                raise ValueError(f"budgets names layer {wrong[0]}, but {layers} layers are compressed")
            return self.budgets[layer].keep(count, layer, layers) if layer in self.budgets else count
        if len(self.budgets) != layers:
            raise ValueError(f"budgets names {len(self.budgets)} layers, but {layers} are compressed")
        return self.budgets[layer].keep(count, layer, layers)

    @property
    def everything(self) -> bool:
        given = self.budgets.values() if isinstance(self.budgets, Mapping) else self.budgets
        return all(budget.everything for budget in given)


@checked
@dataclass(frozen=True)
class AcrossHeads(Budget):
    """The heads of a layer compete for the keys that ``budget`` gives to all of them together.

    Args:
        budget: keys per head on average.
        minimum: share of that which every head keeps in any case.

    Reference: Feng et al., 2024 (Ada-KV), arXiv 2407.11550, algorithm 1.

    >>> scores = torch.tensor([[[9.0, 8.0, 7.0, 6.0], [5.0, 1.0, 1.0, 1.0]]])
    >>> AcrossHeads(Cap(2), minimum=0.5).counts([scores], [torch.tensor([4])], [(0, 1)])
    [tensor([[3, 1]])]
    """

    budget: Budget
    minimum: float = 0.2

    scope: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise TypeError(f"budget must be a Budget such as Ratio(0.5) or Cap(512), got {self.budget!r}")
        check_choice("budget.scope", self.budget.scope, ("head",))
        _check_minimum(self.minimum)

    def keep(self, count: int, layer: int = 0, layers: int = 1) -> int:
        return self.budget.keep(count, layer, layers)

    @property
    def everything(self) -> bool:
        return self.budget.everything


@checked
@dataclass(frozen=True)
class AcrossLayers(AcrossHeads):
    """All heads of all layers compete for the keys that ``budget`` gives to them together.

    Scores must mean the same in every layer, as attention weights do and norms do not. The layers lose their keys
    together, after the last of them has run.

    Args:
        budget: keys per head on average.
        minimum: share of that which every head keeps in any case.
    """

    scope: ClassVar[str] = "layers"


def _check_simple(who: str, budget: Budget) -> None:
    if not isinstance(budget, Budget) or (who == "Pyramid" and not isinstance(budget, (Ratio, Cap))):
        raise TypeError(f"{who} takes {'Ratio or Cap' if who == 'Pyramid' else 'budgets'}, got {budget!r}")
    if budget.scope != "head":
        raise ValueError(
            f"{who} cannot hold {type(budget).__name__}; put it around: {type(budget).__name__}({who}(...))"
        )


def _check_minimum(minimum: float) -> None:
    if not 0.0 <= minimum <= 1.0:
        raise ValueError(f"minimum must lie in [0, 1], got {minimum}")
