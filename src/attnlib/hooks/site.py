"""Where in a model, and in which call of it, something acts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..grids import Layout

KINDS = ("self", "cross", "joint")


#: What a model adds to a score to say "no", however it writes it: the lowest number of its type, -1e9, -10000 (in
#: bfloat16 -9984). A softmax gives nothing to what lies so far below the rest.
FORBIDDEN = -9e3


def read_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(allowed, bias)`` of a boolean mask or of one that is added to scores; the bias is ``None`` where it is zero.

    >>> read_mask(torch.tensor([0.0, -1e9, 2.0]))
    (tensor([ True, False,  True]), tensor([0., 0., 2.]))
    """
    if mask.dtype == torch.bool:
        return mask, None
    allowed = mask > FORBIDDEN
    finite = mask.masked_fill(~allowed, 0.0)
    return allowed, finite if bool((finite != 0).any()) else None


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

    @property
    def free(self) -> bool:
        """Every query may read every key, and nothing is added to scores."""
        return self.allowed is None and self.bias is None and not self.causal and self.opaque is None

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
class Weighting:
    """What a kernel does between scaled products and weights, beside its mask and bias.

    Args:
        cap: scores become ``cap * tanh(scores / cap)`` before mask and bias (Gemma 2).
        sinks: (H,), or (B or 1, H, N or 1): score of a key without a value, which takes its share of every row, so that
            rows sum to less than one (GPT-OSS).
        opaque: why weights cannot be computed beside the kernel, when they cannot; asking for them then raises.
    """

    cap: float | None = None
    sinks: Tensor | None = None
    opaque: str | None = None

    @property
    def plain(self) -> bool:
        """A softmax over scaled products with mask and bias, and nothing else."""
        return self.cap is None and self.sinks is None and self.opaque is None

    def of_heads(self, index: Tensor) -> Weighting:
        """That of some of the heads."""
        if self.sinks is None:
            return self
        return replace(self, sinks=self.sinks[index] if self.sinks.dim() == 1 else self.sinks[:, index])

    def sink_rows(self, rows: Tensor) -> Tensor | None:
        """Scores of the sinks for the query rows ``rows`` (r,), broadcastable to (B, H, r, 1)."""
        if self.sinks is None:
            return None
        if self.sinks.dim() == 1:
            return self.sinks[None, :, None, None]
        per_row = self.sinks if self.sinks.shape[2] == 1 else self.sinks.index_select(2, rows)
        return per_row.unsqueeze(-1)


_PLAIN = Weighting()


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary positions of the tokens of one call, as the model applies them.

    Angles are those that the model made: scaled, of several axes, or of tokens whose positions do not count their slots
    are all the same to who turns a key by them.

    Args:
        cos, sin: (B or 1, N, R) of the tokens of this call.
        slots: (N,) or (B, N) slots of these tokens in the sequence, -1 for padding.
        apply: from (B, H, P, D) and ``cos`` and ``sin`` (B or 1, P, R) to the same, turned.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    apply: Callable[[Tensor, Tensor, Tensor], Tensor]

    def angles(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin`` (B or 1, P, R) of the slots ``at``, (P,) or (B, P); they may be kept for later calls.

        Raises:
            ValueError: a slot that this call does not read.
        """
        if at.dim() not in (1, 2) or at.dtype != torch.long:
            raise ValueError(f"at must be whole slots, (P,) or (B, P), got {at.dtype} of shape {tuple(at.shape)}")
        if self.slots.dim() == 1:  # neighbours, one after another
            index = at - self.slots[:1]
            missing = (index < 0) | (index >= len(self.slots))
        else:
            hit = self.slots[:, None] == at[..., None]
            index, missing = hit.to(torch.int8).argmax(-1), ~hit.any(-1)
        if bool(missing.any()):
            wrong = int(at.expand_as(missing)[missing][0])
            raise ValueError(f"slot {wrong} is none of the {self.slots.shape[-1]} tokens that this call reads")
        rows = max(len(self.cos), index.shape[0] if index.dim() == 2 else 1)
        index = index.expand(rows, -1)[..., None]
        cos, sin = (t.expand(rows, -1, -1).gather(1, index.expand(-1, -1, t.shape[-1])) for t in (self.cos, self.sin))
        return cos, sin

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """Keys (or queries) (B, H, P, D) without positions, turned to stand at the slots ``at``, (P,) or (B, P)."""
        return self.apply(x, *self.angles(at))


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
        mask: which pairs may meet, and the bias on their scores.
        weighting: what else the model's kernel does between scores and weights.
        q_pos: (N,) slots of the queries in the sequence, or (B, N) where tokens of the prompt were removed; -1 for the
            padding of samples that kept fewer.
        k_pos: (M,), or (B, kv_heads, M) in an evicted cache or after a removal, slots of the keys; -1 where a
            head holds no key or a sample is padded.
        q_types: (B, N) token types, see :mod:`attnlib.hooks.tokens`.
        k_types: (B, M), or (B, kv_heads, M) in an evicted cache.
        q_layout: what the queries are.
        k_layout: what the keys are.
        rows: name of each row of the batch ("cond", "uncond", "source", ...), as the user gave them or the attached
            pipeline says.
        pass_name: name of this forward pass of the model, as the user or the pipeline gave it.
        branch: name of the decoding branch, as the user gave it.
        phase: ``"prefill"`` when no token was cached before this call, ``"decode"`` afterwards, ``None`` without a
            cache protocol.
        step: denoising step, as the user or the pipeline gave it.
        steps: how many denoising steps the pipeline takes.
        timestep: as the denoiser was given it: a number, or a tensor of one, or of one per row.
        prompts: number of the prompt that each row of the batch belongs to, as the pipeline says.
        offset: tokens of the sequence before the first query, counted by the cache.
        rotary: whether q and k carry rotary positions already; ``None`` when the model has none or it is not known.
        rotation: the rotary positions of the tokens of this call, to turn further keys by; ``None`` where it is not
            known how the model applies them.
        training: the model is in training mode.
        memory: in ``on_cache``, named tensors with the batch first that the cache layer carries along: they are
            reordered, repeated and selected with it, and cropped along a third axis, of tokens. Kept only in a layer
            that lost keys or is evicted while decoding, where later calls find it, to be read.
        evicted_at: tokens seen when keys of this cache layer were last chosen; ``None`` when they never were.
        reference: ``(adapter, image)`` of the image prompt that the keys of this call come from (IP-Adapter), image
            ``None`` for all of an adapter side by side; ``None`` for the model's own attention.
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
    weighting: Weighting = _PLAIN
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
    steps: int | None = None
    timestep: Tensor | float | None = None
    prompts: tuple[int, ...] | None = None
    offset: int = 0
    rotary: bool | None = None
    rotation: Rotation | None = None
    training: bool = False
    memory: dict[str, Tensor] | None = None
    evicted_at: int | None = None
    reference: tuple[int, int | None] | None = None

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

    def existing_queries(self) -> Tensor | None:
        """(B or 1, N) boolean: queries that stand for a token; ``None`` where all do, as far as the mask tells.

        Padding is what no query may read, not even itself. Padding on the right still reads what came before it, and
        must not be counted among those who do.
        """
        mask, n = self.mask, self.n_queries
        known = mask is not None and mask.allowed is not None and mask.opaque is None
        if self.kind != "self" or not known or self.q_pos is None or self.k_pos is None or self.n_keys < n:
            return None
        assert mask is not None and mask.allowed is not None
        read = mask.allowed.expand(-1, -1, n, self.n_keys).any(2).any(1)
        if self.q_pos.dim() == 2:  # behind a removal queries and keys are the same tokens
            return read[:, :n] & (self.q_pos >= 0).to(read.device)
        if self.k_pos.dim() == 1:
            return read.index_select(1, (self.q_pos - self.k_pos[:1]).to(read.device))
        return read[:, self.n_keys - n :]

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


@functools.lru_cache(maxsize=16)
def slots(start: int, count: int, device: torch.device) -> Tensor:
    """``start``, ``start + 1``, ...: all layers of a step ask for the same ones. Never written to."""
    with torch.inference_mode(False):
        return torch.arange(start, start + count, device=device)
