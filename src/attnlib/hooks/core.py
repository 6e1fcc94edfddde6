"""One protocol for acting on attention inside models that exist.

An :class:`Intervention` says *what* to do at a :class:`Site`; an adapter says *where* sites are in one family of models
and hands over ``(q, k, v)``. Neither knows the other, so N techniques and M families cost N + M pieces of code.

A layer at which no intervention does anything is not touched at all. At the others the model's own kernel keeps
running: score and weight edits are computed beside it, a block of query rows at a time, and only rows that an edit
really changed replace the kernel's. An edit that changes nothing therefore gives the untouched output, bit for bit.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..grids import Layout
from ..masks import Mask
from ..normalizers import softmax_rows
from ..ops import attention
from ..types import check_choice, stats_dtype
from .tokens import TypeTracker

KINDS = ("self", "cross", "joint")

#: Every stage of the protocol. An adapter says which of them it serves; ``attach`` refuses the rest by name.
STAGES = (
    "on_block_input",
    "on_tokens",
    "around_sublayer",
    "on_context",
    "on_qkv",
    "on_kv_read",
    "around_attention",
    "on_scores",
    "on_weights",
    "on_output",
    "on_cache",
    "on_logits",
    "on_step",
)

#: Stages of the whole model; they belong to no layer, and a layer is not touched for them.
MODEL_STAGES = ("on_logits", "on_step")

#: Stages inside one attention call. A layer without them keeps its own attention function.
ATTENTION_STAGES = (
    "on_qkv",
    "on_kv_read",
    "around_attention",
    "on_scores",
    "on_weights",
    "on_output",
    "on_cache",
)

#: Elements of the weight map that score edits, weight edits and probes hold at a time.
BLOCK_ELEMENTS = 1 << 22


# --------------------------------------------------------------------------------------------------------------------
# Where


@dataclass(frozen=True, eq=False)
class PairMask:
    """Which query may read which key at a site, as the model said it; realised only for the rows asked.

    Args:
        n_queries: N.
        n_keys: M.
        allowed: (B or 1, H or 1, N, M) boolean, ``None`` when every pair may meet (up to ``causal``).
        bias: (B or 1, H or 1, N, M) what the model adds to the scaled scores.
        causal: key ``j`` is visible to query ``i`` only if ``j <= i``, counted from the first query and the first key.
        opaque: why the pairs cannot be known, when they cannot; asking for rows then raises.

    >>> PairMask(2, 3, causal=True).dense()[0, 0].tolist()
    [[True, False, False], [True, True, False]]
    """

    n_queries: int
    n_keys: int
    allowed: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False
    opaque: str | None = None

    def rows(self, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``(allowed, bias)`` of the query rows ``index`` (r,), each ``None`` or broadcastable to (B, H, r, M)."""
        if self.opaque:
            raise ValueError(self.opaque)
        allowed = None if self.allowed is None else self.allowed[:, :, index]
        if self.causal:
            keys = torch.arange(self.n_keys, device=index.device)
            below = (keys <= index.unsqueeze(-1))[None, None]
            allowed = below if allowed is None else allowed & below
        return allowed, None if self.bias is None else self.bias[:, :, index]

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """(B or 1, H or 1, N, M) boolean: all rows."""
        allowed, _ = self.rows(torch.arange(self.n_queries, device=device))
        if allowed is None:
            return torch.ones(1, 1, self.n_queries, self.n_keys, dtype=torch.bool, device=device)
        return allowed

    def first_keys(self, count: int) -> PairMask:
        """The mask without the keys from ``count`` on."""
        return replace(
            self,
            n_keys=count,
            allowed=None if self.allowed is None else self.allowed[..., :count],
            bias=None if self.bias is None else self.bias[..., :count],
        )


@dataclass(frozen=True, eq=False)
class Site:
    """Where in a model, and in which call of it, an intervention acts.

    Nothing here is guessed from a batch size or from how often something was called: what the model or the user did not
    say is ``None``.

    Args:
        layer: number of the layer, as the model counts.
        name: dotted path of the attention module.
        module: the attention module.
        kind: ``"self"``, ``"cross"`` or ``"joint"`` (two streams concatenated).
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        scale: what scores are multiplied by.
        n_queries: N of this call.
        n_keys: M of this call.
        mask: which pairs may meet.
        q_pos: (N,) slots of the queries in the sequence, or (B, N) where tokens of the prompt were removed; -1 for the
            padding of samples that kept fewer.
        k_pos: (M,), or (B, kv_heads, M) in an evicted cache or after a removal, slots of the keys; -1 where a
            head holds no key or a sample is padded.
        q_types: (B, N) token types, see :mod:`attnlib.hooks.tokens`.
        k_types: (B, M), or (B, kv_heads, M) in an evicted cache.
        q_layout: what the queries are.
        k_layout: what the keys are.
        rows: name of each row of the batch ("cond", "uncond", "source", ...), as the user gave them.
        pass_name: name of this forward pass of the model, as the user or the pipeline gave it.
        branch: name of the decoding branch, as the user gave it.
        phase: ``"prefill"`` when no token was cached before this call, ``"decode"`` afterwards, ``None`` without a
            cache protocol.
        step: denoising step, as the user or the pipeline gave it.
        offset: tokens of the sequence before the first query, counted by the cache.
        rotary: whether q and k carry rotary positions already; ``None`` when the model has none or it is not known.
        training: the model is in training mode.
        memory: in ``on_cache``, named tensors with the batch first that the cache layer carries along: they are
            reordered, repeated and selected with it, and cropped along a third axis, of tokens. Kept only in a layer
            that lost keys or is evicted while decoding.
        evicted_at: tokens seen when keys of this cache layer were last chosen; ``None`` when they never were.
    """

    layer: int
    name: str
    module: nn.Module
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float = 1.0
    n_queries: int = 0
    n_keys: int = 0
    mask: PairMask | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    q_types: Tensor | None = None
    k_types: Tensor | None = None
    q_layout: Layout | None = None
    k_layout: Layout | None = None
    rows: tuple[str, ...] | None = None
    pass_name: str | None = None
    branch: str | None = None
    phase: str | None = None
    step: int | None = None
    offset: int = 0
    rotary: bool | None = None
    training: bool = False
    memory: dict[str, Tensor] | None = None
    evicted_at: int | None = None

    def but(self, **changes: Any) -> Site:
        """A copy with some fields changed."""
        if not changes.keys() <= _FIELDS:
            unknown = sorted(changes.keys() - self.__dataclass_fields__.keys())
            raise TypeError(f"a site has no {unknown[0]!r}; its fields are {list(self.__dataclass_fields__)}")
        new = object.__new__(Site)
        object.__setattr__(new, "__dict__", {**self.__dict__, **changes})
        return new

    def rows_named(self, names: Sequence[str], device: torch.device | str | None = None) -> Tensor:
        """(B,) boolean: rows of the batch that carry one of ``names``."""
        if self.rows is None:
            raise ValueError(
                f"layer {self.layer} ({self.name}): rows of the batch have no names, but {list(names)} were asked for; "
                'say what they are: attach(..., rows=("uncond", "cond"))'
            )
        return torch.tensor([row in names for row in self.rows], device=device)

    def per_key(self, values: Tensor) -> Tensor:
        """Values by slot of the sequence (B, L) as values by key: (B, 1, M), or (B, heads, M) in an evicted cache.

        Where there is no key (slot -1) the value is 0.
        """
        if self.k_pos is None:
            raise ValueError(f"layer {self.layer} ({self.name}): positions of the keys are not known")
        if self.k_pos.dim() == 1:
            return values.index_select(-1, self.k_pos)[:, None]
        index = self.k_pos.clamp(min=0)
        picked = values[:, None].expand(index.shape[0], index.shape[1], -1).gather(-1, index)
        picked = picked.masked_fill(self.k_pos < 0, 0)
        return picked.repeat_interleave(self.heads // self.kv_heads, 1)

    def per_query(self, values: Tensor) -> Tensor:
        """Values by slot of the sequence (B, L) as values by query: (B, N)."""
        if self.q_pos is None:
            raise ValueError(f"layer {self.layer} ({self.name}): positions of the queries are not known")
        if self.q_pos.dim() == 1:
            return values.index_select(-1, self.q_pos)
        return values.expand(self.q_pos.shape[0], -1).gather(-1, self.q_pos.clamp(min=0))

    def by_slot(self, values: Tensor) -> Tensor:
        """Values by query (B, N) as values by slot of the sequence (B, L), L up to the last query; 0 elsewhere."""
        if self.q_pos is None:
            raise ValueError(f"layer {self.layer} ({self.name}): positions of the queries are not known")
        slots = self.q_pos.expand(values.shape[0], -1)
        length = int(slots.max()) + 1 if slots.numel() else 0
        # Padding writes into a column of its own, which is cut off.
        out = values.new_zeros(values.shape[0], length + 1)
        return out.scatter(1, slots.masked_fill(slots < 0, length), values)[:, :length]

    def query_slots(self) -> Tensor:
        """Slots of the queries as (B or 1, 1, N, 1), to be compared with :meth:`key_slots`."""
        if self.q_pos is None:
            raise ValueError(f"layer {self.layer} ({self.name}): positions of the queries are not known")
        return (self.q_pos if self.q_pos.dim() == 2 else self.q_pos[None])[:, None, :, None]

    def key_slots(self) -> Tensor:
        """Slots of the keys as (B or 1, heads or 1, 1, M)."""
        if self.k_pos is None:
            raise ValueError(f"layer {self.layer} ({self.name}): positions of the keys are not known")
        if self.k_pos.dim() == 1:
            return self.k_pos[None, None, None]
        return self.k_pos.repeat_interleave(self.heads // self.kv_heads, 1)[:, :, None]

    def key_types(self) -> Tensor:
        """Types of the keys, (B, 1, M) or (B, heads, M)."""
        if self.k_types is None:
            raise ValueError(f"layer {self.layer} ({self.name}): no token types; give attach(..., token_types=...)")
        if self.k_types.dim() == 2:
            return self.k_types[:, None]
        return self.k_types.repeat_interleave(self.heads // self.kv_heads, 1)

    def __repr__(self) -> str:
        return f"Site(layer={self.layer}, {self.kind}, {self.name!r}, heads={self.heads}/{self.kv_heads})"


_FIELDS = frozenset(Site.__dataclass_fields__)


# --------------------------------------------------------------------------------------------------------------------
# What


class Intervention:
    """Something that acts on attention. A subclass overrides the stages it needs; the others cost nothing.

    ``around_attention(site, q, k, v, call)``
        returns (B, H, N, Dv); ``call(q, k, v, mask=None)`` is the rest, to be called zero, one or several times, with
        ``mask`` (an :class:`attnlib.masks.Mask` on ``site.q_pos``/``site.k_pos``, or a boolean tensor) replacing the
        model's. The first intervention of ``attach`` is the outermost.
    ``on_qkv(site, q, k, v)``
        new tokens before they are cached, (B, H, N, D) and twice (B, Hk, N, D); ``site.rotary`` says whether rotary
        positions are applied. Returns the three.
    ``on_kv_read(site, k, v)``
        all keys and values as read, same length out.
    ``on_context(site, k_source, v_source)``
        what keys and values are projected from, (B, M, C) each.
    ``on_scores(site, scores, rows)``, ``on_weights(site, weights, rows)``
        (B, H, r, M) scores (scaled, ``-inf`` where a pair may not meet) or weights of the query rows ``rows`` (r,), in
        the statistics dtype. Return a new tensor or the same one, untouched. ``edit_rows(site)`` may name the rows
        worth looking at; ``whole_map = True`` asks for all rows at once.
    ``on_output(site, out)``
        (B, H, N, Dv) before the output projection.
    ``on_cache(site, q, k, v)``
        after prefill: (B, Hk, K) ascending indices of the keys to keep, or ``None`` for all; -1 on the left of heads
        that keep fewer. ``{layer: indices}`` answers for this layer and for earlier ones of the same call. With
        ``while_decoding`` it is asked after every later call too: ``k`` and ``v`` are then all that is cached, ``q``
        the new queries.
    ``around_sublayer(site, hidden, call)``
        ``hidden`` (B, N, C) is what the attention module reads, after the norm; ``call(hidden)`` runs the module, zero,
        one or several times, and gives its output (B, N, C) before the residual is added. Returns (B, N, C). The cache
        keeps the keys of the first call; later calls read the tokens before them, and theirs are forgotten. Without
        any call the module still runs where it has a cache, so that its keys are there for later tokens.
    ``on_block_input(site, hidden)``
        (B, N, C) residual stream entering the block of this attention; return ``None`` to leave it.
    ``on_tokens(site, hidden)``
        at the input of the block of this attention, in prefill only: which tokens go on from here. Returns ``None``
        for all of them, or ``(hidden (B, K, C), index (B, K))`` with ``index`` the ascending indices, among the
        *current* tokens, that each token that goes on stands at; -1, on the left of the row, pads samples that keep
        fewer. All blocks from here on, their positions, masks and cache layers follow: the cache layers hold the
        true slots of what is left, and decoding goes on at the true positions. ``site.q_pos`` is (B, N) from then on.
    ``on_logits(ids, logits)``
        every step of ``generate()``, before processors and sampling: ``ids`` (B, L) so far, ``logits`` (B, V) float32
        of the next token; also ``session.logits(ids, logits)``. Returns (B, V). Under beam search a constant per row
        is missing (log-probabilities come in), and what is returned is normalised again if it was changed. The model
        may be run from here, inside ``with self.session.at(branch="...")`` and with a cache of the branch's own.
    ``on_step(step)``
        before every decoding step: 0 is the prompt, then the number of tokens after it, counted by the cache; in
        denoisers when ``session.at(step=...)`` or the pipeline says another step than before. Not for branches.

    State that a technique keeps from one call to the next belongs to a branch: key it by ``(site.branch, site.layer)``,
    or keep it in ``session.notes``, which is one dictionary per branch.

    Attributes:
        name: key of ``session.results``.
        kinds: kinds of attention it acts on.
        layers: numbers (negative from the end) or name patterns of layers, ``None`` for all of ``kinds``.
        whole_map: score and weight edits need all query rows at once.
        needs_types: it reads ``site.k_types``.
        replaces_mask: it calls the rest with a mask of its own; two of them cannot act on one layer.
        splits_softmax: it calls the rest several times on parts of the keys, so that nobody inside sees one map.
        while_decoding: ``on_cache`` is asked after every call of the model, not only after prefill.

    >>> class Silence(Intervention):
    ...     def on_output(self, site, out):
    ...         return out * 0
    """

    name: ClassVar[str] = "intervention"
    kinds: ClassVar[tuple[str, ...]] = KINDS
    whole_map: ClassVar[bool] = False
    needs_types: ClassVar[bool] = False
    replaces_mask: ClassVar[bool] = False
    splits_softmax: ClassVar[bool] = False
    while_decoding: bool = False
    layers: Sequence[int | str] | None = None
    _owner: Session | None = None

    @property
    def identity(self) -> bool:
        """Configured so that it can do nothing; no layer is touched for it then."""
        return False

    def wants(self, site: Site) -> bool:
        """Whether to act at this site at all, decided once, when attached; the site knows layer, kind and heads."""
        return True

    def conflicts(self, other: Intervention) -> str | None:
        """Why this cannot act at the same layer as ``other``; ``None`` when they compose."""
        return None

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Called once before anything is attached, with the sites this intervention will act on."""

    def on_attach(self, session: Session) -> None:
        """Called once when everything is attached, to watch more of the model than attention: what is changed or
        hooked goes through ``session.undo``, ``session.set_attribute`` or ``session.hook``."""

    def edit_rows(self, site: Site) -> Tensor | None:
        """(r,) query rows that ``on_scores`` and ``on_weights`` may change; ``None`` for all."""
        return None

    def reset(self) -> None:
        """Forget what earlier calls left behind."""

    def results(self) -> Any:
        """What ``session.results[name]`` shows."""
        return None

    @property
    def session(self) -> Session:
        """The session this is attached in."""
        if self._owner is None:
            raise RuntimeError(f"this {type(self).__name__} is not attached to a model")
        return self._owner

    # ---- stages

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        return call(q, k, v)

    def around_sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Any]) -> Any:
        return call(hidden)

    def on_qkv(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def on_kv_read(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def on_context(self, site: Site, k_source: Tensor, v_source: Tensor) -> tuple[Tensor, Tensor]:
        return k_source, v_source

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        return scores

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        return weights

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        return out

    def on_cache(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor | dict[int, Tensor] | None:
        return None

    def on_block_input(self, site: Site, hidden: Tensor) -> Tensor | None:
        return None

    def on_tokens(self, site: Site, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        return None

    def on_logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        return logits

    def on_step(self, step: int) -> None:
        return None


class Probe(Intervention):
    """Looks without changing anything: a few rows are computed beside the fast kernel, which stays.

    It sees the weights as edited by interventions listed before it.
    """

    name = "probe"

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        """``(query rows (r,), heads or None for all)`` to look at in this call; ``None`` to skip it."""
        raise NotImplementedError

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        """Take a block: weights (B, h, r, M) of the query rows ``rows`` and which pairs may meet."""
        raise NotImplementedError


def implements(intervention: Intervention, stage: str) -> bool:
    """Whether the class of ``intervention`` overrides ``stage``."""
    return getattr(type(intervention), stage) is not getattr(Intervention, stage)


class Stages:
    """The interventions of one layer, sorted by stage."""

    def __init__(self, interventions: Sequence[Intervention]):
        self.all = tuple(interventions)
        self._by_stage = {stage: [i for i in self.all if implements(i, stage)] for stage in STAGES}
        self.probes = [i for i in self.all if isinstance(i, Probe)]
        self.edits = [i for i in self.all if implements(i, "on_scores") or implements(i, "on_weights")]

    def __getitem__(self, stage: str) -> list[Intervention]:
        return self._by_stage[stage]

    @property
    def used(self) -> list[str]:
        """Stages that somebody implements."""
        return [stage for stage in STAGES if self._by_stage[stage]]

    @property
    def in_attention(self) -> bool:
        """Somebody acts or looks inside the attention call."""
        return bool(self.probes) or any(self._by_stage[stage] for stage in ATTENTION_STAGES)

    @property
    def reads_map(self) -> bool:
        """Somebody needs scores or weights."""
        return bool(self.edits or self.probes)


# --------------------------------------------------------------------------------------------------------------------
# How: one attention call through the stages


def _grouped(a: Tensor, heads: int) -> Tensor:
    """(B, H, r, D) -> (B, heads, H / heads * r, D), so that grouped queries need no copies of keys."""
    return a.reshape(a.shape[0], heads, -1, a.shape[-1])


def score_rows(site: Site, q: Tensor, k: Tensor, rows: Tensor, pair: PairMask) -> tuple[Tensor, Tensor | None]:
    """(B, H, r, M) scores of some query rows, ``-inf`` where a pair may not meet, and which pairs may."""
    dtype = stats_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        some = _grouped(q.index_select(2, rows).to(dtype), k.shape[1])
        scores = (some @ k.to(dtype).transpose(-2, -1)).reshape(q.shape[0], q.shape[1], len(rows), k.shape[2])
    scores = scores * site.scale
    allowed, bias = pair.rows(rows)
    if bias is not None:
        scores = scores + bias.to(dtype)
    return (scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))), allowed


def mix_rows(weights: Tensor, v: Tensor) -> Tensor:
    """(B, H, r, Dv): weights (B, H, r, M) times values (B, Hv, M, Dv)."""
    with torch.autocast(v.device.type, enabled=False):
        out = _grouped(weights, v.shape[1]) @ v.to(weights.dtype)
    return out.reshape(*weights.shape[:-1], v.shape[-1])


def row_blocks(rows: Tensor, per_row: int, whole: bool = False) -> Iterator[Tensor]:
    """Split query rows so that a block's map stays within :data:`BLOCK_ELEMENTS`."""
    yield from rows.split(max(1, len(rows) if whole else BLOCK_ELEMENTS // max(1, per_row)))


def _edited(edit: Intervention, stage: str, site: Site, before: Tensor, rows: Tensor) -> Tensor:
    version = before._version
    after = getattr(edit, stage)(site, before, rows)
    if before._version != version:
        raise ValueError(f"{type(edit).__name__}.{stage} wrote into its input; return a new tensor instead")
    if after.shape != before.shape:
        raise ValueError(
            f"{type(edit).__name__}.{stage} returned shape {tuple(after.shape)}, it was given {tuple(before.shape)}"
        )
    return after


def weight_rows(
    site: Site, q: Tensor, k: Tensor, rows: Tensor, pair: PairMask, edits: Sequence[Intervention]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights of some query rows after ``edits``: ``(weights (B, H, r, M), changed (B, H, r) or None, allowed)``."""
    plain, allowed = score_rows(site, q, k, rows, pair)
    scores = plain
    for edit in edits:
        if implements(edit, "on_scores"):
            scores = _edited(edit, "on_scores", site, scores, rows)
    changed = None if scores is plain else (scores != plain).any(-1)
    before = weights = softmax_rows(scores)
    for edit in edits:
        if implements(edit, "on_weights"):
            weights = _edited(edit, "on_weights", site, weights, rows)
    if weights is not before:
        differ = (weights != before).any(-1)
        changed = differ if changed is None else changed | differ
    return weights, changed, allowed


def _apply_edits(
    site: Site, q: Tensor, k: Tensor, v: Tensor, pair: PairMask, out: Tensor, edits: Sequence[Intervention]
) -> Tensor:
    n = q.shape[2]
    wanted = [edit.edit_rows(site) for edit in edits]
    if any(rows is None for rows in wanted):
        rows = torch.arange(n, device=q.device)
    else:
        rows = torch.cat([r for r in wanted if r is not None]).unique()
    if not len(rows):
        return out
    pieces: list[tuple[Tensor, Tensor]] = []
    whole = any(edit.whole_map for edit in edits)
    for block in row_blocks(rows, q.shape[0] * q.shape[1] * k.shape[2], whole):
        weights, changed, _ = weight_rows(site, q, k, block, pair, edits)
        if changed is not None and bool(changed.any()):
            new = mix_rows(weights, v).to(out.dtype)
            pieces.append((block, torch.where(changed.unsqueeze(-1), new, out.index_select(2, block))))
    if not pieces:
        return out
    return out.index_copy(2, torch.cat([b for b, _ in pieces]), torch.cat([p for _, p in pieces], 2))


def _run_probes(site: Site, q: Tensor, k: Tensor, pair: PairMask, stages: Stages) -> None:
    with torch.no_grad():
        for i, probe in enumerate(stages.all):
            if not isinstance(probe, Probe):
                continue
            wanted = probe.probe(site)
            if wanted is None:
                continue
            rows, heads = wanted
            edits = [e for e in stages.all[:i] if e in stages.edits]
            some_q, some_k, mask = q, k, pair
            if heads is not None and not edits:
                # Without edits only the chosen heads need to be computed.
                index = torch.as_tensor(list(heads), device=q.device)
                some_q = q.index_select(1, index)
                some_k = k.index_select(1, index // (q.shape[1] // k.shape[1]))
                pick = [None if t is None else t if t.shape[1] == 1 else t[:, index] for t in (pair.allowed, pair.bias)]
                mask = replace(pair, allowed=pick[0], bias=pick[1])
            for block in row_blocks(rows, some_q.shape[0] * some_q.shape[1] * k.shape[2]):
                weights, _, allowed = weight_rows(site, some_q, some_k, block, mask, edits)
                if heads is not None and edits:
                    weights = weights[:, list(heads)]
                    allowed = allowed if allowed is None or allowed.shape[1] == 1 else allowed[:, list(heads)]
                probe.observe(site, weights, block, allowed)


def realise_mask(site: Site, mask: Mask | Tensor) -> Tensor:
    """A replacing mask as a boolean tensor broadcastable to (B, H, N, M)."""
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True: may attend), got {mask.dtype}")
        return mask if mask.dim() == 4 else mask[None, None] if mask.dim() == 2 else mask[:, None]
    if site.q_pos is None or site.k_pos is None:
        raise ValueError(f"layer {site.layer} ({site.name}): positions are not known; give the mask as a tensor")
    k_pos = site.k_pos
    if k_pos.dim() == 3:
        k_pos = k_pos.repeat_interleave(site.heads // site.kv_heads, 1)
    allowed = mask.at(site.q_pos.to(k_pos.device), k_pos)
    allowed = allowed if allowed.dim() == 4 else allowed[None, None]
    return allowed if k_pos.dim() == 1 else allowed & (k_pos >= 0)[:, :, None]


def _full(allowed: Tensor, n: int, m: int) -> Tensor:
    """A mask with all its rows and columns, whatever it left to broadcasting."""
    return allowed.expand(*torch.broadcast_shapes(allowed.shape, (1, 1, n, m)))


def run_attention(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stages: Stages,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    masked: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """One attention call through the stages of a layer.

    Args:
        site: where, with this call's mask.
        q: (B, H, N, D).
        k: (B, Hk, M, D), as read.
        v: (B, Hk, M, Dv).
        stages: the interventions of this layer.
        kernel: the model's own attention under its own mask, (q, k, v) -> (B, H, N, Dv).
        masked: the model's own attention under a boolean mask (B or 1, H or 1, N, M) that is given; softmax attention
            by default.

    Returns:
        (B, H, N, Dv) before the output projection.
    """
    assert site.mask is not None
    given = site.mask
    for i in stages["on_kv_read"]:
        k, v = i.on_kv_read(site, k, v)

    def innermost(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        if k.shape[2] != v.shape[2] or (mask is None and k.shape[2] != given.n_keys):
            raise ValueError(
                f"layer {site.layer} ({site.name}): keys and values have lengths {k.shape[2]} and {v.shape[2]}, the "
                f"model's mask is for {given.n_keys}; give call(q, k, v, mask=...) when you change their number"
            )
        if mask is None:
            pair = given
            out = kernel(q, k, v)
        else:
            full = _full(realise_mask(site, mask), q.shape[2], k.shape[2])
            pair = PairMask(q.shape[2], k.shape[2], full)
            out = attention(q, k, v, mask=full, scale=site.scale) if masked is None else masked(q, k, v, full)
        if stages.edits:
            out = _apply_edits(site, q, k, v, pair, out, stages.edits)
        if stages.probes:
            _run_probes(site, q, k, pair, stages)
        return out

    call: Callable[..., Tensor] = innermost
    for i in reversed(stages["around_attention"]):
        call = _wrap(i, site, call)
    out = call(q, k, v)
    for i in stages["on_output"]:
        out = i.on_output(site, out)
    return out


def _wrap(intervention: Intervention, site: Site, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        if mask is None:
            return intervention.around_attention(site, q, k, v, inner)

        def masked(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor = mask) -> Tensor:
            return inner(q, k, v, mask=mask)

        # The mask that was put in its place is the model's for those further in.
        here = site
        if q.shape[2] == site.n_queries and k.shape[2] == site.n_keys:
            n, m = site.n_queries, site.n_keys
            here = site.but(mask=PairMask(n, m, _full(realise_mask(site, mask), n, m)))
        return intervention.around_attention(here, q, k, v, masked)

    return wrapped


# --------------------------------------------------------------------------------------------------------------------
# Attaching


class Adapter:
    """Call interception and site description for one family of models."""

    name: ClassVar[str]
    stages: ClassVar[frozenset[str]] = frozenset()

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        """Every attention of ``model`` (or of its ``part``) that can be acted on; raises when there is none."""
        raise NotImplementedError

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        """Intercept the sites of ``plan``; every change goes through ``session.undo`` at once."""
        raise NotImplementedError


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()

_MISSING: Any = object()


class Session:
    """Interventions attached to a model. A context manager: leaving it restores the model, also after an exception.

    Args of :meth:`at` describe calls of the model; what is not said there or in ``attach`` stays ``None`` in the site.
    """

    def __init__(
        self,
        model: nn.Module,
        interventions: Sequence[Intervention],
        rows: Sequence[str] | None = None,
        tracker: TypeTracker | None = None,
    ):
        self.model = model
        self.interventions = tuple(interventions)
        self._trackers: dict[str | None, TypeTracker] = {} if tracker is None else {None: tracker}
        self._notes: dict[str | None, dict[str, Any]] = {}
        self._announced: int | None = None
        self._in_logits = False
        self.counts_steps = False
        self.rows = _row_names(rows)
        self.pass_name: str | None = None
        self.branch: str | None = None
        self.step: int | None = None
        self.active = False
        self.sites: list[Site] = []
        self.attached: list[Site] = []
        self._undo: list[Callable[[], None]] = []

    # ---- one state per branch

    @property
    def tracker(self) -> TypeTracker | None:
        """Token types of the current branch; each branch counts its own tokens."""
        if self.branch not in self._trackers:
            if None not in self._trackers:
                return None
            self._trackers[self.branch] = TypeTracker(self._trackers[None].source)
        return self._trackers[self.branch]

    @property
    def notes(self) -> dict[str, Any]:
        """What adapters and interventions remember of the current branch between calls; emptied by a new prompt."""
        return self._notes.setdefault(self.branch, {})

    @property
    def prompt(self) -> dict[str, Any]:
        """The named arguments with which the model read the prompt of the current branch, without its cache."""
        try:
            return self.notes["prompt"]
        except KeyError:
            raise RuntimeError(
                "no prompt yet: the model was not called in this session, or nothing attached asks for it (only "
                "interventions with on_logits or on_step do)"
            ) from None

    def new_prompt(self, given: dict[str, Any]) -> None:
        """For adapters: the current branch starts to read a prompt."""
        keep = {k: v for k, v in self.notes.items() if k in ("beams", "prompt_length")}
        self.notes.clear()
        self.notes.update(keep, prompt={k: v for k, v in given.items() if k != "past_key_values"})
        if self.branch is None:
            self._announced = None

    # ---- stages of the whole model

    def acting(self, stage: str) -> list[Intervention]:
        """The interventions that implement a stage and can do something, in order."""
        return [i for i in self.interventions if implements(i, stage) and not i.identity]

    def logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores of the next token after all ``on_logits``; ``generate`` asks for them by itself.

        Args:
            ids: (B, L) tokens so far.
            logits: (B, V) the model's scores of the next token.

        Returns:
            (B, V).
        """
        acting = self.acting("on_logits")
        if self._in_logits or not acting:
            return logits
        if ids.dim() != 2 or logits.dim() != 2 or len(ids) != len(logits):
            raise ValueError(
                f"ids must be (B, L) and logits (B, V) of the same batch, got {tuple(ids.shape)} and "
                f"{tuple(logits.shape)}"
            )
        notes = self.notes
        notes["last_ids"], notes["ids"] = notes.get("ids"), ids
        self._in_logits = True
        try:
            for i in acting:
                after = i.on_logits(ids, logits)
                if not isinstance(after, Tensor) or after.shape != logits.shape:
                    got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
                    raise ValueError(
                        f"{type(i).__name__}.on_logits must return (B, V)={tuple(logits.shape)}, got {got}"
                    )
                logits = after
        finally:
            self._in_logits = False
        return logits

    def parents(self) -> Tensor | None:
        """(B,) row of the step before that each row of the batch continues; ``None`` at the first step of a prompt.

        Beams change places from step to step, and whatever a branch keeps by row (a cache, above all) has to move with
        them. Rows are compared by their tokens, within the beams of one sample only.
        """
        last, ids = self.notes.get("last_ids"), self.notes.get("ids")
        if last is None or ids is None or last.shape != (len(ids), ids.shape[1] - 1):
            return None
        beams = self.notes.get("beams", 1)
        rows = torch.arange(len(ids), device=ids.device)
        if beams == 1:
            return rows
        same = (ids[:, None, :-1] == last[None]).all(-1) & (rows[:, None] // beams == rows // beams)
        return torch.where(same.diagonal(), rows, same.to(torch.int8).argmax(1))

    def announce(self, step: int) -> None:
        """Call ``on_step`` of every intervention, once per step; nothing happens inside a branch."""
        if self.branch is not None or step == self._announced:
            return
        self._announced = step
        for i in self.acting("on_step"):
            i.on_step(step)

    # ---- bookkeeping for adapters

    def undo(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the session is detached; the last one given runs first."""
        self._undo.append(action)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember to put back exactly what was there, or nothing."""
        before = owner.__dict__.get(name, _MISSING)
        owner.__dict__[name] = value

        def restore() -> None:
            if before is _MISSING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

        self.undo(restore)

    def hook(self, handle: Any) -> None:
        """Remember a hook handle to remove."""
        self.undo(handle.remove)

    def described(self, site: Site, batch: int, **fields: Any) -> Site:
        """A template site with what the user said about this call."""
        return self.made(site.but(**fields).__dict__, batch, fields)

    def made(self, fields: dict[str, Any], batch: int, given: dict[str, Any] | None = None) -> Site:
        """A site of these fields, all of them, with what the user said about this call; ``fields`` become its own."""
        if self.rows is not None and len(self.rows) != batch:
            raise ValueError(
                f"rows names {len(self.rows)} rows of the batch ({list(self.rows)}), but layer {fields['layer']} "
                f"({fields['name']}) got a batch of {batch}; give one name per row"
            )
        fields["rows"], fields["pass_name"], fields["branch"] = self.rows, self.pass_name, self.branch
        if given is None or "step" not in given:
            fields["step"] = self.step
        if given is None or "training" not in given:
            fields["training"] = fields["module"].training
        new = object.__new__(Site)
        # Sites are made in every layer of every decoding step; setting thirty fields one by one is what would cost.
        object.__setattr__(new, "__dict__", fields)
        return new

    # ---- for the user

    @contextmanager
    def at(
        self,
        *,
        step: int | None = None,
        pass_name: str | None = None,
        branch: str | None = None,
        rows: Sequence[str] | None = None,
        token_types: Tensor | Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Session]:
        """Say which step, pass, branch or rows the calls of the model inside this block are.

        Each branch has token types, notes and a count of tokens of its own, so calls of several branches may be mixed
        in any order, also from within ``on_logits`` while ``generate`` runs, as long as each has its own cache.
        ``token_types`` are those of the branch, where its prompt is another one than the main branch's.
        """
        before = self.step, self.pass_name, self.branch, self.rows
        if token_types is not None:
            name = self.branch if branch is None else branch
            if name is None:
                raise ValueError("token_types of at() are those of a branch; name it: at(branch=..., token_types=...)")
            if name not in self._trackers or self._trackers[name].source is not token_types:
                self._trackers[name] = TypeTracker(token_types)
        self.step = self.step if step is None else step
        self.pass_name = self.pass_name if pass_name is None else pass_name
        self.branch = self.branch if branch is None else branch
        self.rows = self.rows if rows is None else _row_names(rows)
        try:
            if step is not None and not self.counts_steps:
                self.announce(step)
            yield self
        finally:
            self.step, self.pass_name, self.branch, self.rows = before

    @property
    def results(self) -> dict[str, Any]:
        """What each intervention has to show, by its name; a second one of the same name gets ``-2`` and so on."""
        shown: dict[str, Any] = {}
        for i in self.interventions:
            name, count = i.name, 1
            while name in shown:
                count += 1
                name = f"{i.name}-{count}"
            shown[name] = i.results()
        return shown

    def detach(self) -> None:
        """Restore the model; calling it again does nothing."""
        if not self.active:
            return
        self.active = False
        errors = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # noqa: BLE001 - every other change must still be undone
                errors.append(error)
        _sessions.pop(self.model, None)
        for i in self.interventions:
            i._owner = None
        if errors:
            raise errors[0]

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        layers = sorted({s.layer for s in self.attached})
        state = "attached" if self.active else "detached"
        return f"Session({state}, layers {layers}, {', '.join(type(i).__name__ for i in self.interventions)})"


def _row_names(rows: Sequence[str] | None) -> tuple[str, ...] | None:
    if rows is None:
        return None
    if isinstance(rows, str) or not all(isinstance(r, str) for r in rows):
        raise TypeError(
            f'rows must be a sequence of names, one per row of the batch, e.g. ("uncond", "cond"); got {rows!r}'
        )
    return tuple(rows)


def _adapter(model: Any) -> Adapter:
    families = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if not isinstance(model, nn.Module):
        hint = "; attach to the denoiser itself, pipe.unet or pipe.transformer" if "diffusers" in families else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    from .torch_adapter import ModuleAdapter, attention_modules

    if "transformers" in families:
        from .transformers_adapter import TransformersAdapter, reachable

        # A transformers model may be built of our own mechanisms.
        ours = not any(reachable(m) for m in model.modules()) and bool(attention_modules(model))
        return ModuleAdapter() if ours else TransformersAdapter()
    if "diffusers" in families:
        from .diffusers_adapter import DiffusersAdapter

        return DiffusersAdapter()
    if attention_modules(model):
        return ModuleAdapter()
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{type(model).__name__} is a compiled model; attach to the model that it was made of, model._orig_mod, "
            "and run that one"
        )
    raise TypeError(
        f"{type(model).__name__} is neither a transformers nor a diffusers model, and none of its modules is a "
        "mechanism of attnlib, a torch.nn.MultiheadAttention or an attention of timm; its attention cannot be reached: "
        "an adapter that describes its sites is missing"
    )


def _matches(chosen: Sequence[int | str], site: Site, last: int) -> bool:
    for layer in chosen:
        if isinstance(layer, str):
            if fnmatch.fnmatchcase(site.name, layer):
                return True
        elif site.layer == (layer if layer >= 0 else last + 1 + layer):
            return True
    return False


def check_layers(intervention: Intervention, sites: Sequence[Site]) -> list[Site]:
    """The sites an intervention acts on; raises when a layer it names does not exist or nothing is left."""
    name = type(intervention).__name__
    fitting = [s for s in sites if s.kind in intervention.kinds]
    if intervention.layers is not None:
        if isinstance(intervention.layers, (int, str)):
            raise TypeError(f"{name}: layers must be a sequence, got {intervention.layers!r}")
        if not intervention.layers:
            raise ValueError(f"{name}: layers is empty; name at least one, or leave it out for all")
        last = max((s.layer for s in sites), default=-1)
        numbers = sorted({s.layer for s in fitting})
        for layer in intervention.layers:
            if not any(_matches([layer], s, last) for s in fitting):
                what = numbers if isinstance(layer, int) else [s.name for s in fitting]
                raise ValueError(
                    f"{name}: layer {layer!r} does not exist among {'/'.join(intervention.kinds)} attention; "
                    f"possible: {what}"
                )
        fitting = [s for s in fitting if _matches(intervention.layers, s, last)]
    chosen = [s for s in fitting if intervention.wants(s)]
    if not chosen:
        kinds = sorted({s.kind for s in sites})
        raise ValueError(
            f"{name} acts on {'/'.join(intervention.kinds)} attention, but nothing of this model fits; "
            f"its {len(sites)} attention layers are of kind {kinds}"
        )
    return chosen


def check_heads(intervention: Intervention, heads: Sequence[int], site: Site) -> None:
    """Raise ``ValueError`` unless every head exists at the site."""
    for head in heads:
        if not 0 <= head < site.heads:
            raise ValueError(
                f"{type(intervention).__name__}: head {head} does not exist in layer {site.layer} ({site.name}); "
                f"possible: 0 to {site.heads - 1}"
            )


def _only_model_stages(intervention: Intervention) -> bool:
    """Whether all it does belongs to the model as a whole, so that no layer is touched for it."""
    used = [stage for stage in STAGES if implements(intervention, stage)]
    return bool(used) and not isinstance(intervention, Probe) and all(stage in MODEL_STAGES for stage in used)


def _check_pair(site: Site | None, a: Intervention, b: Intervention) -> None:
    reason = a.conflicts(b) or b.conflicts(a)
    if reason is None and implements(a, "on_cache") and implements(b, "on_cache"):
        reason = "both evict from the same cache; combine their scores in one"
    if reason is None and a.replaces_mask and b.replaces_mask:
        reason = "both say which query reads which key; combine their masks in one"
    if reason:
        where = "this model" if site is None else f"layer {site.layer} ({site.name})"
        raise ValueError(f"{type(a).__name__} and {type(b).__name__} cannot both act on {where}: {reason}")


def attach(
    model: nn.Module,
    *interventions: Intervention,
    rows: Sequence[str] | None = None,
    token_types: Tensor | Callable[[Tensor], Tensor] | None = None,
    part: str | None = None,
) -> Session:
    """Attach interventions to a model that exists; leaving the session restores it bit for bit.

    ::

        with attnlib.attach(model, SnapKV(ratio=0.5), Record(layers=[3])) as session:
            model.generate(**inputs)
        session.results["record"][3]["weights"]

    Args:
        model: a transformers or diffusers model, or any module with mechanisms of attnlib,
            ``torch.nn.MultiheadAttention`` or timm's attention in it.
        interventions: what to do, in order: inputs pass through the first one first.
        rows: name of each row of the batch, for example ``("uncond", "cond")``.
        token_types: (B, N) integer types of the prompt's tokens, or a rule from token ids to types such as
            :class:`attnlib.hooks.TokenTypes`; extended while decoding.
        part: dotted path of the submodule to act on; by default the text decoder of a transformers model.

    Returns:
        The :class:`Session`, active at once.

    Raises:
        TypeError: a model whose family is not known, or something that is no intervention.
        ValueError: attaching twice, unknown layers or heads, interventions that do not compose, a stage that this
            family does not serve.
        ImportError: the extra of that family is not installed.
    """
    if not interventions:
        raise ValueError("attach needs at least one intervention")
    for i in interventions:
        if not isinstance(i, Intervention):
            hint = f"; make one: {i.__name__}(...)" if isinstance(i, type) and issubclass(i, Intervention) else ""
            hint = "; give several as attach(model, a, b)" if isinstance(i, (list, tuple)) else hint
            raise TypeError(f"{i!r} is not an intervention{hint}")
        if i._owner is not None:
            raise ValueError(f"this {type(i).__name__} is attached already, to {type(i._owner.model).__name__}")
    if len({id(i) for i in interventions}) != len(interventions):
        raise ValueError("the same intervention object is given twice")
    adapter = _adapter(model)
    mine = set(model.modules())
    for other, session in list(_sessions.items()):
        if other in mine or model in set(other.modules()):
            raise ValueError(
                f"{type(model).__name__} has a session already ({session}); detach it first, or give all "
                "interventions to one attach"
            )
    sites = adapter.sites(model, part)
    plan: dict[int, list[Intervention]] = {}
    for i in interventions:
        for kind in i.kinds:
            check_choice("kinds", kind, KINDS)
        served = [stage for stage in STAGES if implements(i, stage) and stage not in adapter.stages]
        if served:
            raise ValueError(
                f"{type(i).__name__} needs the stage {served[0]}, which is missing for {adapter.name} models; "
                f"they serve {sorted(adapter.stages)}"
            )
        chosen = check_layers(i, sites)
        if i.identity:
            continue
        if i.needs_types and token_types is None:
            raise ValueError(
                f"{type(i).__name__} has to know which tokens are image tokens: give attach(..., token_types=...), "
                "a (B, N) tensor or attnlib.hooks.TokenTypes(image=IMAGE_TOKEN_ID)"
            )
        if _only_model_stages(i):
            continue
        for site in chosen:
            plan.setdefault(sites.index(site), []).append(i)
    for index, members in plan.items():
        for a in range(len(members)):
            for b in range(a + 1, len(members)):
                _check_pair(sites[index], members[a], members[b])
    planned = [(n, sites[n]) for n in plan]
    able = [i for i in interventions if not i.identity]
    for number, a_ in enumerate(able):
        for b_ in able[number + 1 :]:
            if _only_model_stages(a_) or _only_model_stages(b_):
                _check_pair(None, a_, b_)
    for i in interventions:
        i.reset()
        if not i.identity:
            everywhere = _only_model_stages(i)
            i.prepare(model, check_layers(i, sites) if everywhere else [s for n, s in planned if i in plan[n]])
    tracker = None if token_types is None else TypeTracker(token_types)
    session = Session(model, interventions, rows, tracker)
    session.sites = sites
    session.active = True
    try:
        if able:
            session.attached = [sites[n] for n in sorted(plan)]
            adapter.install(session, [(sites[n], Stages(plan[n])) for n in sorted(plan)])
    except BaseException:
        session.detach()
        raise
    _sessions[model] = session
    for i in interventions:
        i._owner = session
    try:
        for i in interventions:
            if not i.identity:
                i.on_attach(session)
    except BaseException:
        session.detach()
        raise
    return session
