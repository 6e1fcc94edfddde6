"""Fewer visual tokens: a scorer says what each is worth, a selector which stay, a merger what becomes of the rest.

Tokens leave the sequence for real (:mod:`attnlib.hooks.hf.removal`), before the decoder (at the input of its first
block) or inside it. Only image tokens ever leave; which they are is told by ``attach(..., token_types=...)``. A prompt
without images is left alone, bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..checks import check_int, check_real, checked
from ..hooks.blocks import block_of
from ..hooks.choose import ask, pack
from ..hooks.hf.removal import Lengths
from ..hooks.intervention import Intervention, Probe
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, is_text
from ..types import check_choice
from .flops import BlockCost, prefill_flops

# --------------------------------------------------------------------------------------------------------------------
# Selectors


class Selector(Protocol):
    """Which tokens stay."""

    def keep(self, scores: Tensor, there: Tensor, of: Tensor) -> Tensor:
        """Choose.

        Args:
            scores: (B, N) what each token is worth.
            there: (B, N) boolean, tokens to choose among.
            of: (B,) how many there were before anything was removed.

        Returns:
            (B, N) boolean, within ``there``.
        """
        ...

    @property
    def everything(self) -> bool: ...


def best(scores: Tensor, there: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (B,) best of the tokens that are there; of equal ones the first.

    >>> best(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])).tolist()
    [[False, True, True, False]]
    """
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    # Tokens that are not there come last, whatever they score.
    order = order.gather(1, torch.sort((~there).gather(1, order).to(torch.int8), dim=1, stable=True).indices)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (rank < count[:, None]) & there


@checked
@dataclass(frozen=True)
class TopK:
    """Keep the ``k`` best tokens of each sample, or all where there are fewer.

    >>> TopK(1).keep(torch.tensor([[0.1, 0.9]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([2])).tolist()
    [[False, True]]
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 0:
            raise ValueError(f"k must be a non-negative integer: how many visual tokens stay; got {self.k!r}")

    @property
    def everything(self) -> bool:
        return False

    def keep(self, scores: Tensor, there: Tensor, of: Tensor) -> Tensor:
        return best(scores, there, torch.full_like(of, self.k))


@checked
@dataclass(frozen=True)
class Rate:
    """Keep ``round(rate * n)`` tokens, n counted before anything was removed.

    >>> Rate(0.5).keep(torch.tensor([[0.1, 0.9]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([2])).tolist()
    [[False, True]]
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate must lie in [0, 1]: the share of visual tokens that stays; got {self.rate}")

    @property
    def everything(self) -> bool:
        return self.rate == 1.0

    def keep(self, scores: Tensor, there: Tensor, of: Tensor) -> Tensor:
        return best(scores, there, (of.to(torch.float64) * self.rate).round().to(torch.long))


@checked
@dataclass(frozen=True)
class Threshold:
    """Keep the tokens that score more than ``value``, and at least the ``minimum`` best.

    >>> Threshold(0.5).keep(torch.tensor([[0.1, 0.9]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([2])).tolist()
    [[False, True]]
    """

    value: float
    minimum: int = 0

    def __post_init__(self) -> None:
        check_real("value", self.value, finite=False)
        check_int("minimum", self.minimum, least=0)

    @property
    def everything(self) -> bool:
        return self.value == float("-inf")

    def keep(self, scores: Tensor, there: Tensor, of: Tensor) -> Tensor:
        chosen = (scores > self.value) & there
        return chosen | best(scores, there, torch.full_like(of, self.minimum)) if self.minimum else chosen


@checked
@dataclass(frozen=True)
class Grid:
    """Keep every ``stride``-th row and column of images of ``size`` (h, w) tokens, whatever the scores.

    >>> there = torch.ones(1, 4, dtype=torch.bool)
    >>> Grid(2, (2, 2)).keep(torch.zeros(1, 4), there, torch.tensor([4])).tolist()
    [[True, False, False, False]]
    """

    stride: int
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride must be an integer of at least 1, got {self.stride!r}")
        if self.size is not None and (not isinstance(self.size, Sequence) or len(self.size) != 2):
            raise TypeError(f"size must be the two sides (h, w) of an image in tokens, got {self.size!r}")

    @property
    def everything(self) -> bool:
        return self.stride == 1

    def keep(self, scores: Tensor, there: Tensor, of: Tensor) -> Tensor:
        if bool((there.sum(1) != of).any()):
            raise ValueError("a grid can only be laid over whole images; some of their tokens were removed before")
        h, w = grid_size(of, self.size)
        number = (there.to(torch.long).cumsum(1) - 1).clamp(min=0) % (h * w)
        return there & (number // w % self.stride == 0) & (number % w % self.stride == 0)


def grid_size(counts: Tensor, size: tuple[int, int] | None, per_image: int | None = None) -> tuple[int, int]:
    """(h, w) of images in tokens: as given, or the root of ``per_image``, or of what the samples' counts share.

    >>> grid_size(torch.tensor([16, 0, 32]), None)
    (4, 4)
    """
    share = math.gcd(*counts.tolist())
    if size is not None:
        if len(size) != 2 or min(size) < 1 or share % (size[0] * size[1]):
            raise ValueError(f"images of size={size} do not fit the {counts.tolist()} visual tokens of the samples")
        return size
    for count in (per_image, share):
        side = round((count or 0) ** 0.5)
        if count and side * side == count and not share % count:
            return side, side
    if not share:
        return 1, 1
    raise ValueError(f"{share} visual tokens are no square; give the size (h, w) of one image")


def as_selector(keep: int | float | Selector) -> Selector:
    """A number of tokens, a share, or a selector."""
    if isinstance(keep, bool):
        raise TypeError(f"keep must be a number of tokens, a share in [0, 1] or a selector, got {keep!r}")
    if isinstance(keep, int):
        return TopK(keep)
    if isinstance(keep, float):
        return Rate(keep)
    if not hasattr(keep, "keep"):
        raise TypeError(f"keep must be a number of tokens, a share in [0, 1] or a selector, got {keep!r}")
    return keep


# --------------------------------------------------------------------------------------------------------------------
# The intervention


class Reduction(Intervention):
    """Removes image tokens, and reports what that saved.

    ``session.results[name]`` shows, of the last prompt, ``tokens`` (L, B) that existed in each block, ``lengths`` that
    each block ran on with padding, ``slots`` that were left at the end, and ``flops``, ``flops_untouched`` and
    ``saved`` (the share) of reading the prompt in the decoder's blocks. With several reductions in one session they
    show what all of them saved together.

    Attributes:
        compact_positions: tokens that are left count their positions anew.
    """

    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    compact_positions: bool = False
    _costs: Sequence[BlockCost] | None = None
    _lengths: Lengths | None = None

    def reset(self) -> None:
        self._lengths = None

    def on_attach(self, session: Session) -> None:
        self._costs = [BlockCost.of(block_of(session.model, s), s) for s in session.sites if s.kind == "self"]

    def on_removed(self, lengths: Lengths) -> None:
        """Called by the adapter when a prompt was read."""
        if self._owner is None or self._owner.branch is None:
            self._lengths = lengths

    def results(self) -> dict[str, Any]:
        if self._lengths is None or self._costs is None:
            return {}
        lengths, batch = self._lengths, self._lengths.tokens.shape[1]
        spent = prefill_flops(self._costs, lengths.lengths, batch)
        full = prefill_flops(self._costs, [lengths.total] * len(self._costs), batch)
        return {
            "tokens": lengths.tokens,
            "lengths": lengths.lengths,
            "slots": lengths.slots[-1],
            "flops": spent,
            "flops_untouched": full,
            "saved": 1.0 - spent / full,
        }

    # ---- for subclasses

    def images_before(self, site: Site) -> Tensor:
        """(B,) image tokens of each sample before anything was removed."""
        types = self.all_types(site)
        return (types == IMAGE).sum(1)

    def all_types(self, site: Site) -> Tensor:
        """(B, total) types of the whole prompt."""
        tracker = self.session.tracker
        assert tracker is not None and tracker.types is not None and site.q_types is not None
        return tracker.types.to(site.q_types.device)

    @staticmethod
    def go_on(hidden: Tensor, site: Site, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        """What ``on_tokens`` returns when the image tokens ``keep`` (B, N) stay; ``None`` when nothing leaves."""
        assert site.q_types is not None
        image = site.q_types == IMAGE
        if not bool((image & ~keep).any()):
            return None
        index = pack((image & keep) | is_text(site.q_types))
        new = hidden.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return new, index


# --------------------------------------------------------------------------------------------------------------------
# Scorer, selector, merger


class Scorer(ABC):
    """What each visual token is worth."""

    def on_attach(self, session: Session) -> None:  # noqa: B027 - most scorers need to watch nothing
        """Watch what the scores are made of; what is hooked goes through ``session``."""

    def reset(self) -> None:  # noqa: B027
        """Forget."""

    @abstractmethod
    def score(self, site: Site, hidden: Tensor, image: Tensor) -> Tensor:
        """Scores of the current tokens.

        Args:
            site: where, see ``on_tokens``.
            hidden: (B, N, C).
            image: (B, N) boolean.

        Returns:
            (B, N); what stands at other tokens is not looked at.
        """


class Learned(Scorer):
    """Scores from the states by a module (B, N, C) -> (B, N) or (B, N, 1), for example ``nn.Linear(C, 1)``."""

    def __init__(self, module: nn.Module | Callable[[Tensor], Tensor]):
        if not callable(module):
            raise TypeError(f"module must map (B, N, C) to scores (B, N), got {module!r}")
        self.module = module

    def score(self, site: Site, hidden: Tensor, image: Tensor) -> Tensor:
        scores = ask(self.module, hidden)
        scores = scores.squeeze(-1) if scores.dim() == 3 else scores
        if scores.shape != hidden.shape[:2]:
            raise ValueError(f"module must give scores {tuple(hidden.shape[:2])}, got {tuple(scores.shape)}")
        return scores


class Merger(Protocol):
    """What becomes of the tokens that were not chosen."""

    def merge(self, scores: Tensor, keep: Tensor, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens stay after all, and the new states.

        Args:
            scores: (B, N).
            keep: (B, N) boolean, chosen.
            image: (B, N) boolean.
            hidden: (B, N, C).

        Returns:
            ``keep`` (B, N) with the tokens at which merged ones stand, ``hidden`` (B, N, C) with their states.
        """
        ...


class Reduce(Reduction):
    """Reduce visual tokens at the input of blocks: score, select, merge.

    Args:
        scorer: what tokens are worth.
        keep: which stay: a number of tokens per sample, a share of them, or a selector; or ``{layer: one of these}``.
            Without layers tokens leave before the decoder.
        merger: what becomes of the rest; ``None`` drops it.
        positions: ``"original"``, or ``"contiguous"`` to count what is left anew.

    Raises:
        ValueError: shares outside [0, 1], unknown ``positions``.

    >>> Reduce(Learned(nn.Linear(8, 1)), {2: 0.5, 5: 16}).layers
    [2, 5]
    """

    name: ClassVar[str] = "reduce"

    def __init__(
        self,
        scorer: Scorer,
        keep: int | float | Selector | Mapping[int, int | float | Selector],
        merger: Merger | None = None,
        positions: str = "original",
    ):
        if not isinstance(scorer, Scorer):
            raise TypeError(f"scorer must be an attnlib.reduce.Scorer, got {scorer!r}")
        if merger is not None and not hasattr(merger, "merge"):
            raise TypeError(
                f"merger must have merge(scores, keep, image, hidden), such as NearestMerge(); got {merger!r}"
            )
        check_choice("positions", positions, ("original", "contiguous"))
        schedule = keep if isinstance(keep, Mapping) else {0: keep}
        if not schedule:
            raise ValueError("keep names no layer")
        self.scorer, self.merger = scorer, merger
        self.schedule = {layer: as_selector(one) for layer, one in sorted(schedule.items())}
        self.compact_positions = positions == "contiguous"
        self.layers: list[int | str] | None = list(self.schedule)

    @property
    def identity(self) -> bool:
        return self.merger is None and all(s.everything for s in self.schedule.values())

    def reset(self) -> None:
        super().reset()
        self.scorer.reset()

    def on_attach(self, session: Session) -> None:
        super().on_attach(session)
        last = max(s.layer for s in session.sites)
        self._at = {(n if n >= 0 else last + 1 + n): s for n, s in self.schedule.items()}
        self.scorer.on_attach(session)

    def on_tokens(self, site: Site, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        selector = self._at.get(site.layer)
        assert site.q_types is not None
        image = site.q_types == IMAGE
        if selector is None or not bool(image.any()):
            return None
        return self.reduce(site, hidden, image, selector)

    def reduce(self, site: Site, hidden: Tensor, image: Tensor, selector: Selector) -> tuple[Tensor, Tensor] | None:
        scores = self.scorer.score(site, hidden, image)
        keep = selector.keep(scores.detach(), image, self.images_before(site))
        if self.merger is not None and bool((image & ~keep).any()):
            keep, hidden = self.merger.merge(scores, keep, image, hidden)
        return self.go_on(hidden, site, keep)


class ByAttention(Scorer):
    """The attention that visual tokens get from text, in the block before the one where they leave.

    Args:
        rows: whose attention counts: ``"text"`` (text after the image, which is the question: the score depends on
            it) or ``"last"`` (the last token).
        heads: ``"mean"`` or ``"max"`` over heads.
    """

    def __init__(self, rows: str = "text", heads: str = "mean"):
        check_choice("rows", rows, ("text", "last"))
        check_choice("heads", heads, ("mean", "max"))
        self.rows, self.heads = rows, heads
        self.reset()

    def reset(self) -> None:
        self.by_slot: dict[int, Tensor] = {}

    def wanted(self, site: Site) -> Tensor:
        """(B, N) boolean: queries whose attention counts."""
        assert site.q_types is not None
        types = site.q_types
        last = (torch.arange(types.shape[1], device=types.device) == types.shape[1] - 1).expand_as(types)
        if self.rows == "last":
            return last
        after = after_image(types)
        return after | (last & ~after.any(1, keepdim=True))

    def observe(self, site: Site, weights: Tensor, rows: Tensor) -> None:
        """Add the weights (B, H, r, M) of the queries ``rows`` (r,)."""
        asked = self.wanted(site)[:, rows].to(weights.dtype)
        over = weights.mean(1) if self.heads == "mean" else weights.amax(1)
        got = torch.einsum("brm,br->bm", over, asked)
        slots = site.key_slots()[:, 0, 0].expand(got.shape[0], -1)
        count = int(slots.max()) + 1
        there = got.new_zeros(got.shape[0], count + 1)
        there.scatter_add_(1, slots.masked_fill(slots < 0, count), got)
        before = self.by_slot.get(site.layer)
        self.by_slot[site.layer] = there[:, :count] if before is None else before + there[:, :count]

    def score(self, site: Site, hidden: Tensor, image: Tensor) -> Tensor:
        if site.layer - 1 not in self.by_slot:
            raise RuntimeError(f"layer {site.layer}: the attention of the block before was not seen")
        return site.per_query(self.by_slot[site.layer - 1])


def after_image(types: Tensor) -> Tensor:
    """(B, N) boolean: text after the last image token of its sample; all text where there is no image.

    >>> after_image(torch.tensor([[1, 2, 2, 1, 1], [0, 1, 1, 1, 1]])).tolist()[0]
    [False, False, False, True, True]
    """
    place = torch.arange(types.shape[1], device=types.device)
    last = torch.where(types == IMAGE, place, -1).amax(1, keepdim=True)
    return (place > last) & is_text(types)


class ReduceByAttention(Reduce, Probe):
    """Reduce visual tokens inside the decoder by the attention they got in the block before.

    Args:
        keep: ``{layer: number, share or selector}``; no layer before ``first_layer``.
        scorer: see :class:`ByAttention`.
        merger: what becomes of the rest; ``None`` drops it.
        first_layer: attention in the first blocks ranks tokens differently, so nothing leaves before this layer.

    Raises:
        ValueError: a layer before ``first_layer``.

    >>> sorted(ReduceByAttention({2: 0.5}).layers)
    [1, 2]
    """

    name: ClassVar[str] = "reduce-by-attention"
    scorer: ByAttention

    def __init__(
        self,
        keep: Mapping[int, int | float | Selector],
        scorer: ByAttention | None = None,
        merger: Merger | None = None,
        first_layer: int = 1,
    ):
        if not isinstance(keep, Mapping):
            raise TypeError(f"keep must be {{layer: how many stay}}, got {keep!r}")
        scorer = ByAttention() if scorer is None else scorer
        if not isinstance(scorer, ByAttention):
            raise TypeError(f"scorer must be an attnlib.reduce.ByAttention, got {scorer!r}")
        super().__init__(scorer, keep, merger)
        if first_layer < 1:
            raise ValueError(f"first_layer must be at least 1: the first block has none before it; got {first_layer}")
        leaving = {n for n, s in self.schedule.items() if not s.everything or merger is not None}
        early = sorted(n for n in leaving if n < first_layer)
        if early:
            raise ValueError(
                f"tokens cannot leave at layers {early}: negative numbers are not known here, and before layer "
                f"{first_layer} their ranks are not those of later blocks"
            )
        self.schedule = {n: s for n, s in self.schedule.items() if n in leaving}
        # Where tokens leave comes first, so that a layer that does not exist is named as it was given.
        self.layers = list(dict.fromkeys([*sorted(leaving), *sorted(n - 1 for n in leaving)])) or [0]

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        if site.phase != "prefill" or site.layer + 1 not in self.schedule:
            return None
        assert site.q_types is not None
        self.scorer.by_slot.pop(site.layer, None)
        if not bool((site.q_types == IMAGE).any()):
            return None
        return self.scorer.wanted(site).any(0).nonzero().squeeze(1), None

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        self.scorer.observe(site, weights, rows)
