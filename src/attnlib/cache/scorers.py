"""What each cached key is worth.

A scorer is one small class with ``score(view) -> (B, Hk, M)``. It need not care about padding, which never stays, nor
about how many keys stay; ``+inf`` marks keys that must. Two scorers multiply: ``ExpectedAttention() * ValueNorm()``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import checked
from ..hooks.call import BLOCK_ELEMENTS, score_rows, weights_of
from ..hooks.hf.names import parameters_of, rotary_of, turn_of
from ..hooks.site import PairMask, Site
from ..types import check_choice, stats_dtype
from .votes import check_window, pooled_votes, snapkv_votes


@dataclass(frozen=True, eq=False)
class CacheView:
    """A cache layer at the moment keys are chosen.

    Args:
        site: where; the call that has just run.
        q: (B, H, n, D) the last ``n`` queries, rotary positions applied: all of them after prefill, as many as the
            scorer's ``queries`` while decoding.
        q_order: (B, n) number of each query's token among those of its sample, from 0; -1 for padding.
        q_slots: (B, n) slots of the queries in the sequence.
        k: (B, Hk, M, D) cached keys.
        v: (B, Hk, M, Dv) cached values.
        valid: (B or 1, Hk or 1, M) boolean, keys that hold a token.
        slots: (M,) or (B, Hk, M), slots of the keys in the sequence, -1 where none is held.
    """

    site: Site
    q: Tensor
    q_order: Tensor
    q_slots: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor
    slots: Tensor

    def order(self) -> Tensor:
        """(B or 1, Hk or 1, M) number of each key among those that hold a token, from 0."""
        return self.valid.cumsum(-1) - 1

    def weights(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own attention weights of some of the queries over the cached keys.

        Args:
            rows: (r,) indices into ``q``.

        Returns:
            (B, H, r, M) weights in the statistics dtype, zeros for queries that may read nothing, and which pairs may
            meet, broadcastable to them.

        Raises:
            ValueError: a bias or sinks that belong to queries of earlier calls and are gone, or a kernel whose weights
                are not known.
        """
        site, heads, n = self.site, self.q.shape[1], self.q.shape[2]
        groups, m = heads // self.k.shape[1], self.k.shape[2]
        valid = self.valid[:, :, None]
        valid = valid.repeat_interleave(groups, 1) if valid.shape[1] > 1 else valid
        if site.mask is not None and n == site.n_queries:
            allowed, bias = site.mask.rows(rows)
            allowed = valid if allowed is None else allowed & valid
        else:  # queries of earlier calls, whose masks are gone: causal
            sinks = site.weighting.sinks
            if (site.mask is not None and site.mask.bias is not None) or (sinks is not None and sinks.dim() > 1):
                raise ValueError(
                    f"layer {site.layer} ({site.name}): the model adds a bias to the scores of each query, and those "
                    "of earlier calls are gone, so their weights cannot be computed; evict after the prompt only "
                    "(every=None)"
                )
            slots = self.slots if self.slots.dim() == 3 else self.slots[None, None]
            allowed = slots[:, :, None] <= self.q_slots[:, None, rows].unsqueeze(-1)
            allowed = allowed.repeat_interleave(groups, 1) if allowed.shape[1] > 1 else allowed
            allowed, bias = allowed & valid, None
        some = self.q.index_select(2, rows)
        here = torch.arange(len(rows), device=rows.device)
        pair = PairMask(len(rows), m, allowed.expand(*allowed.shape[:2], len(rows), m), bias)
        if site.weighting.sinks is not None and site.weighting.sinks.dim() > 1:
            sinks = site.weighting.sinks
            picked = sinks if sinks.shape[2] == 1 else sinks.index_select(2, rows)
            site = site.but(weighting=replace(site.weighting, sinks=picked))
        scores, _ = score_rows(site, some, self.k, here, pair)
        return weights_of(site, scores, here), allowed

    def per_key_head(self, a: Tensor) -> Tensor:
        """(B, H, ...) averaged over the query heads of each key head: (B, Hk, ...)."""
        return a.unflatten(1, (self.k.shape[1], -1)).mean(2)


class Scorer(ABC):
    """What each key is worth.

    Attributes:
        queries: last queries it reads; so many are remembered while decoding. After prefill it has all of them.
        protected: last keys that always stay.
        reads_weights: it reads the attention weights of the model, and is refused where they are not known.
    """

    queries: int = 0
    protected: int = 0
    reads_weights: bool = False

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """(B or 1, Hk or 1, M) scores in a float type, ``+inf`` for keys that must stay."""

    def wants(self, site: Site) -> bool:
        """Whether it can score at this site; raises with the reason where it cannot."""
        return True

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:  # noqa: B027 - most scorers need nothing
        """Called once before anything is attached."""

    def __mul__(self, other: Scorer) -> Scorer:
        return Product((self, other))


@checked
@dataclass
class Product(Scorer):
    """The product of scores; keys that must stay for one of them stay.

    >>> Product((KeyNorm("high"), ValueNorm())).queries
    0
    """

    scorers: tuple[Scorer, ...]

    def __post_init__(self) -> None:
        self.queries = max(s.queries for s in self.scorers)
        self.protected = max(s.protected for s in self.scorers)
        self.reads_weights = any(s.reads_weights for s in self.scorers)

    def wants(self, site: Site) -> bool:
        return all([s.wants(site) for s in self.scorers])

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        for s in self.scorers:
            s.prepare(model, sites)

    def score(self, view: CacheView) -> Tensor:
        parts = torch.broadcast_tensors(*(s.score(view) for s in self.scorers))
        must = torch.stack([p == torch.inf for p in parts]).any(0)
        out = parts[0].masked_fill(must, 0.0)
        for p in parts[1:]:
            out = out * p.masked_fill(must, 0.0)
        return out.masked_fill(must, torch.inf)


@checked
@dataclass
class SnapKVVotes(Scorer):
    """Pooled votes of the last ``window_size`` queries, which stay themselves; see :func:`snapkv_votes`.

    Args:
        window_size: observing queries.
        kernel_size: of the pooling, odd.
        pooling: ``"avg"`` or ``"max"``.
        compat: ``"authors"`` for the authors' rounding, and even kernels; needs as many key heads as query heads.

    Reference: Li et al., 2024, arXiv 2404.14469.

    >>> SnapKVVotes(window_size=32).protected
    32
    """

    reads_weights: ClassVar[bool] = True  # type: ignore[misc]
    window_size: int = 64
    kernel_size: int = 5
    pooling: str = "avg"
    compat: str | None = None

    def __post_init__(self) -> None:
        check_window(self.window_size, self.kernel_size, even=self.compat == "authors")
        check_choice("pooling", self.pooling, ("avg", "max"))
        check_choice("compat", self.compat, (None, "authors"))
        self.queries = self.protected = self.window_size

    def wants(self, site: Site) -> bool:
        if self.compat == "authors" and site.heads != site.kv_heads:
            raise ValueError(
                f"compat='authors' stores one copy of each key per query head, which a model with {site.kv_heads} key "
                f"heads for {site.heads} query heads cannot hold; leave compat out, or use SnapKVByHead"
            )
        return True

    def score(self, view: CacheView) -> Tensor:
        n, m = view.q.shape[2], view.k.shape[2]
        window = min(self.window_size, n, m - 1)
        if self.compat == "authors":
            if not view.site.weighting.plain or (view.site.mask is not None and view.site.mask.bias is not None):
                raise ValueError(
                    f"layer {view.site.layer} ({view.site.name}): compat='authors' knows no caps, sinks or biases of "
                    "scores; leave it out"
                )
            votes = snapkv_votes(
                view.q, view.k, window, self.kernel_size, self.pooling, scale=view.site.scale, valid=view.valid,
                compat=self.compat,
            )  # fmt: skip
        else:
            weights, _ = view.weights(torch.arange(n - window, n, device=view.q.device))
            votes = pooled_votes(weights[..., : m - window], view.k.shape[1], self.kernel_size, self.pooling)
            votes = votes.masked_fill(~view.valid[..., : m - window], float("-inf"))
        return torch.nn.functional.pad(votes, (0, window), value=float("inf"))


@checked
@dataclass
class Recency(Scorer):
    """Streaming: the first keys and the most recent ones.

    Args:
        sinks: first keys that stay.

    Reference: Xiao et al., 2023 (StreamingLLM), arXiv 2309.17453. Positions stay the true ones here; the paper counts
    them within the cache.

    >>> Recency().sinks
    4
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    def score(self, view: CacheView) -> Tensor:
        order = view.order()
        return order.to(torch.float32).masked_fill(order < self.sinks, torch.inf)


@checked
@dataclass
class KeyNorm(Scorer):
    """The norm of the key.

    Args:
        keep: ``"low"``, keys of small norm, which draw much attention (Devoto et al.); ``"high"`` the opposite.

    Reference: Devoto et al., 2024, arXiv 2406.11430.

    >>> KeyNorm().keep
    'low'
    """

    keep: str = "low"

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("low", "high"))

    def score(self, view: CacheView) -> Tensor:
        norm = view.k.to(stats_dtype(view.k.dtype)).norm(dim=-1)
        return norm if self.keep == "high" else -norm


@checked
@dataclass
class ValueNorm(Scorer):
    """The norm of the value; as a factor it turns attention weights into the size of what a key contributes.

    >>> (LastQuery() * ValueNorm()).scorers[1]
    ValueNorm()
    """

    def score(self, view: CacheView) -> Tensor:
        return view.v.to(stats_dtype(view.v.dtype)).norm(dim=-1)


@checked
@dataclass
class RandomScores(Scorer):
    """Chance, the baseline that every other scorer has to beat.

    Args:
        seed: of the numbers; each layer adds its own.

    >>> RandomScores(3).seed
    3
    """

    seed: int = 0

    def score(self, view: CacheView) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + view.site.layer)
        return torch.rand(view.k.shape[:3], generator=generator).to(view.k.device)


@checked
@dataclass
class LastQuery(Scorer):
    """The attention of the last query, averaged over all heads.

    Args:
        per_head: average over the query heads of each key head only.

    Reference: Oren et al., 2024 (TOVA), arXiv 2401.06104.

    >>> LastQuery().queries
    1
    """

    reads_weights: ClassVar[bool] = True  # type: ignore[misc]
    per_head: bool = False
    queries = 1
    protected = 1

    def score(self, view: CacheView) -> Tensor:
        row = torch.tensor([view.q.shape[2] - 1], device=view.q.device)
        weights = view.weights(row)[0][:, :, 0]
        return view.per_key_head(weights) if self.per_head else weights.mean(1, keepdim=True)


@checked
@dataclass
class ObservedAttention(Scorer):
    """The mean attention that a key got from the queries that could read it.

    After prefill all queries of the prompt count, while decoding the last ``queries``. The map is never held as a
    whole.

    Args:
        queries: last queries that count while decoding.

    Reference: Zhang et al., 2023 (H2O), arXiv 2306.14048, with means, as in kvpress, in place of sums.

    >>> ObservedAttention().queries
    256
    """

    reads_weights: ClassVar[bool] = True  # type: ignore[misc]
    queries: int = 256

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")

    def score(self, view: CacheView) -> Tensor:
        batch, heads, n, _ = view.q.shape
        size = max(1, BLOCK_ELEMENTS // (batch * heads * view.k.shape[2]))
        mass = torch.zeros(batch, heads, view.k.shape[2], dtype=stats_dtype(view.q.dtype), device=view.q.device)
        readers = torch.zeros_like(mass)
        for rows in torch.arange(n, device=view.q.device).split(size):
            weights, allowed = view.weights(rows)
            mass, readers = mass + weights.sum(2), readers + allowed.to(mass.dtype).sum(2)
        return view.per_key_head(mass / readers.clamp(min=1.0))


@checked
@dataclass
class ExpectedAttention(Scorer):
    """The attention that future queries are expected to pay.

    Queries, brought to the position of the last one, are taken as normal with mean ``m`` and covariance ``C``; rotary
    positions of the next ``future`` tokens turn them on average by ``R``. A key then gets

        ``softmax_j(k_j R m / sqrt(D) + k_j R C R^T k_j / 2 D)``

    averaged over the query heads of its key head. Multiply with :class:`ValueNorm` for kvpress's default.

    Args:
        future: number of future positions.
        sinks: first keys, which stay; their queries do not count.
        covariance: use ``C``.
        epsilon: added to the score.
        queries: last queries that count while decoding.

    Reference: Devoto et al., 2025, arXiv 2510.00636.

    >>> (ExpectedAttention(future=64) * ValueNorm()).queries
    256
    """

    reads_weights: ClassVar[bool] = True  # type: ignore[misc]
    future: int = 512
    sinks: int = 4
    covariance: bool = True
    epsilon: float = 0.0
    queries: int = 256
    _rotary: dict[int, tuple[nn.Module, Callable[..., Any]]] = field(default_factory=dict, init=False, repr=False)

    needs: ClassVar[str] = "ExpectedAttention turns queries to future positions"

    def __post_init__(self) -> None:
        for name in ("future", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._rotary = {site.layer: self._find(model, site) for site in sites}

    def _find(self, model: nn.Module, site: Site) -> tuple[nn.Module, Callable[..., Any]]:
        apply = turn_of(site.module)
        parts = site.name.split(".")
        for depth in range(len(parts), -1, -1):
            rotary = rotary_of(model.get_submodule(".".join(parts[:depth])))
            if rotary is not None and apply is not None and parameters_of(rotary) == ["x", "position_ids"]:
                return rotary, apply
        raise ValueError(
            f"{self.needs}, but layer {site.layer} ({site.name}) has no rotary positions that can be reached "
            "(a module that makes angles of position_ids, and a function that applies them)"
        )

    def _angles(self, layer: int, offsets: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        rotary, _ = self._rotary[layer]
        # Past its decorators, which would take these positions for a new sequence and change its frequencies.
        cos, sin = inspect.unwrap(type(rotary).forward)(rotary, like.new_zeros(1), offsets)
        size = float(getattr(rotary, "attention_scaling", 1.0))  # queries carry it already
        return cos / size, sin / size

    def statistics(self, view: CacheView) -> tuple[Tensor, Tensor | None]:
        """(B, H, D) mean and (B, H, D, D) covariance of future queries."""
        layer, q = view.site.layer, view.q.to(stats_dtype(view.q.dtype))
        turn = self._rotary[layer][1]
        ago = view.q_slots[:, -1:] - view.q_slots
        q, _ = turn(q, q[:, :1], *self._angles(layer, ago, q))  # it turns keys too, of which there are none to turn
        ahead = torch.arange(1, self.future + 1, device=q.device).unsqueeze(0)
        cos, sin = (t.mean(1, keepdim=True) for t in self._angles(layer, ahead, q))

        def turned(rows: Tensor) -> Tensor:
            return turn(rows, rows[:, :1], cos, sin)[0]

        counted = (view.q_order >= self.sinks)[:, None]
        number = counted.to(q.dtype).sum(-1, keepdim=True).clamp(min=1.0)
        skipped = ~counted.unsqueeze(-1)  # padding may hold anything
        mean = q.masked_fill(skipped, 0.0).sum(2) / number
        if not self.covariance:
            return turned(mean.unsqueeze(2)).squeeze(2), None
        centred = (q - mean.unsqueeze(2)).masked_fill_(skipped, 0.0)
        spread = centred.transpose(-2, -1) @ centred / number.unsqueeze(-1)
        # The mean rotation is linear: instead of every query, their moments are turned.
        spread = turned(turned(spread).transpose(-2, -1))
        return turned(mean.unsqueeze(2)).squeeze(2), spread

    def score(self, view: CacheView) -> Tensor:
        weighting, mask = view.site.weighting, view.site.mask
        sinks = weighting.sinks
        why = weighting.opaque or (
            "the model caps its scores" if weighting.cap is not None
            else "the model adds a bias to its scores" if mask is not None and mask.bias is not None
            else "the model's sinks differ by token" if sinks is not None and sinks.dim() > 1 else None
        )  # fmt: skip
        if why:
            raise ValueError(
                f"ExpectedAttention takes scores to be linear in queries that do not exist yet, but in layer "
                f"{view.site.layer} ({view.site.name}) {why}; choose another scorer"
            )
        sink = view.valid & (view.order() < self.sinks)
        if not bool(((view.valid & ~sink).any(-1) | ~view.valid.any(-1)).all()):
            raise ValueError(
                f"sinks={self.sinks} must be fewer than the keys there are ({view.k.shape[2]} with padding)"
            )
        mean, covariance = self.statistics(view)
        batch, kv_heads, m, dim = view.k.shape
        k = view.k.to(mean.dtype).unsqueeze(2)
        scale = view.site.scale
        logits = (k @ mean.reshape(batch, kv_heads, -1, dim, 1)).squeeze(-1) * scale
        if covariance is not None:
            spread = ((k @ covariance.reshape(batch, kv_heads, -1, dim, dim)) * k).sum(-1)
            logits = logits + spread * (scale * scale / 2)
        logits = logits.masked_fill((sink | ~view.valid).unsqueeze(2), float("-inf"))
        row = torch.zeros(1, dtype=torch.long, device=logits.device)
        weights = weights_of(view.site, logits.flatten(1, 2).unsqueeze(2), row)[:, :, 0]
        weights = view.per_key_head(weights) + self.epsilon
        return weights.masked_fill(sink, torch.inf)
