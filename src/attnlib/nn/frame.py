"""What mechanisms of queries, keys and values share: projections, head layout, positions, causal state, validity, mask.

:class:`HeadFrame` is the whole path from tokens to tokens; a mechanism on it says only how heads attend.
:class:`Stream` is the causal part of it alone, for mechanisms with projections or states of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..grids import Layout
from ..masks import Mask, causal
from ..normalizers import Normalizer, as_normalizer
from ..ops import _shards, attention
from ..positions import Bias, alibi, check_rotary_scaling, rotary_angles, rotate
from ..types import Output, Plan, State, Traits, Wanted, check_divides
from .base import Mechanism
from .layers import flat_valid, head_dim_of, head_norm, merge_heads, split_heads, through


class Stream:
    """The new tokens of a causal sequence: behind those that a state remembers, some of them perhaps absent.

    Args:
        x: (B, n, ...) new tokens, for their number and device.
        valid: (B, n) boolean, which of them exist.
        state: what the last call left; it holds ``tokens`` (B,), the number of tokens that exist so far, or ``valid``
            (B, M), which remembered slots hold one.
        keep: whether the next state is asked for.

    >>> stream = Stream(torch.zeros(2, 3, 8), None, State({"tokens": torch.tensor([0, 4])}), keep=True)
    >>> stream.positions.tolist(), stream.tokens.tolist()
    ([[0, 1, 2], [4, 5, 6]], [3, 7])
    """

    def __init__(self, x: Tensor, valid: Tensor | None, state: State | None, keep: bool):
        self.batch, self.new, self.device = x.shape[0], x.shape[1], x.device
        self.valid, self.state, self.keep = valid, state, keep
        self._others = _shards.others() if _shards.entered else None
        self._before: Tensor | None = None
        if self._others is not None and (keep or state is not None):
            raise ValueError(
                "state is not possible while the sequence is cut over processes: each holds a chunk, none the end; "
                "decode on one process"
            )
        self._now: Tensor | None = valid
        self._slots: Tensor | None = None

    @property
    def now(self) -> Tensor:
        """(B, n) boolean, which of the new tokens exist."""
        if self._now is None:
            self._now = torch.ones(self.batch, self.new, dtype=torch.bool, device=self.device)
        return self._now

    @property
    def past(self) -> Tensor:
        """(B,) tokens that exist before the new ones."""
        if self._others is not None:
            if self._before is None:
                self._before = self._others.before(self.valid, self.batch, self.new, self.device)
            return self._before
        if self.state is None:
            return torch.zeros(self.batch, dtype=torch.long, device=self.device)
        return self.state["tokens"] if "tokens" in self.state else self.state["valid"].sum(1)

    @property
    def tokens(self) -> Tensor:
        """(B,) tokens that exist, the new ones included."""
        return self.past + self.now.sum(1)

    @property
    def positions(self) -> Tensor:
        """(B, n), or (1, n) where all samples agree: positions of the new tokens, counting those that exist."""
        if self.valid is None and self.state is None and self._others is None:
            return torch.arange(self.new, device=self.device)[None]
        return self.past[:, None] + self.now.long().cumsum(1) - 1

    @property
    def start(self) -> int:
        """Slots of keys before the new ones."""
        return 0 if self.state is None else self.state["k"].shape[2]

    @property
    def q_pos(self) -> Tensor | None:
        """(n,) slots of the new tokens; ``None`` at the start, where they are the first."""
        start = self.start
        return torch.arange(start, start + self.new, device=self.device) if start else None

    @property
    def slots(self) -> Tensor:
        """(B, M) boolean, which keys exist, remembered ones included."""
        if self._slots is None:
            self._slots = self.now if self.state is None else torch.cat([self.state["valid"], self.now], 1)
        return self._slots

    @property
    def exists(self) -> Tensor | None:
        """The same; ``None`` when all do, for sure."""
        return self.valid if self.state is None and not self.keep else self.slots

    def join(self, **new: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, H, n, D), by the names they have in the state, behind the remembered ones."""
        if self.state is None:
            return tuple(new.values())
        for name, tensor in new.items():
            old = self.state[name]
            if (*old.shape[:2], *old.shape[3:]) != (*tensor.shape[:2], *tensor.shape[3:]) or old.dim() != tensor.dim():
                shape = (*tensor.shape[:2], "M", *tensor.shape[3:])
                raise ValueError(
                    f"state holds {name} of shape {tuple(old.shape)}, this call needs ({', '.join(map(str, shape))}); "
                    "it was made by another mechanism or for another batch"
                )
        return tuple(torch.cat([self.state[name], tensor], 2) for name, tensor in new.items())

    def next(self, **tensors: Tensor) -> State | None:
        """The state after the new tokens, ``tokens`` included, if it is asked for."""
        return State({**tensors, "tokens": self.tokens}) if self.keep else None

    @staticmethod
    def mask(mask: Mask | None) -> Mask:
        """``mask``, and nothing later than the query."""
        return causal() if mask is None else causal() & mask


class Reading(NamedTuple):
    """Who reads whom in a call, grids flattened.

    Args:
        tokens: (B, N, C) of ``x``.
        own: (B, N) boolean, which of them exist.
        keys: (B, M, C) what is read: a context, or the tokens themselves.
        exists: (B, M) boolean, which of these exist.
        ordered: whether a token reads itself and earlier ones only.
        stream: of the keys; without memory where nothing is ordered.
    """

    tokens: Tensor
    own: Tensor | None
    keys: Tensor
    exists: Tensor | None
    ordered: bool
    stream: Stream

    @property
    def queries(self) -> Stream:
        """Of the tokens of ``x``: the same where these are read."""
        return self.stream if self.keys is self.tokens else Stream(self.tokens, self.own, None, False)


def reading(
    x: Tensor,
    context: Tensor | None,
    valid: Tensor | None,
    context_valid: Tensor | None,
    causal: bool,
    state: State | None,
    keep: bool,
) -> Reading:
    """A call (B, *grid, C) as a :class:`Reading`; ``causal`` and what it remembers are of calls without a context."""
    tokens, own = x.flatten(1, -2), None if valid is None else flat_valid(valid)
    if context is None:
        stream = Stream(tokens, own, state if causal else None, causal and keep)
        return Reading(tokens, own, tokens, own, causal, stream)
    keys, exists = context.flatten(1, -2), flat_valid(context_valid)
    return Reading(tokens, own, keys, exists, False, Stream(keys, exists, None, False))


@dataclass(frozen=True)
class HeadCall:
    """What the operator on heads gets beside queries, keys and values.

    Args:
        mask: which pairs may meet, the causal order included.
        valid: (B, M) boolean, which keys exist.
        q_pos: (n,) slots of the queries among the keys; ``None`` when they are the first.
        bias: added to the scores.
        dropout_p: dropout of the weights.
        return_weights: return ``(out, weights)`` instead of ``out``.
    """

    mask: Mask | None = None
    valid: Tensor | None = None
    q_pos: Tensor | None = None
    bias: Bias | None = None
    dropout_p: float = 0.0
    return_weights: bool = False

    def but(self, **changes: Any) -> HeadCall:
        """The same with some fields changed."""
        return replace(self, **changes)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`attnlib.ops.attention`."""
        return dict(
            mask=self.mask, valid=self.valid, q_pos=self.q_pos, bias=self.bias, dropout_p=self.dropout_p,
            return_weights=self.return_weights,
        )  # fmt: skip


@dataclass
class Notes:
    """What the hooks of one call of a :class:`HeadFrame` tell each other; a mechanism adds fields in a subclass.

    Args:
        valid: (B, N) boolean, which tokens of ``x`` exist.
        plan, state, returns: of the call.
        losses: set by a hook; returned.
        kept: set by a hook; tensors that join the state, or take the place of the frame's own there.
    """

    valid: Tensor | None
    plan: Plan | None
    state: State | None
    returns: tuple[str, ...]
    losses: dict[str, Tensor] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)


N = TypeVar("N", bound=Notes)


class HeadFrame(Mechanism, Generic[N]):
    """Tokens to heads, one operator, and back: what softmax attention and its relatives have in common.

    Works on sequences, images and videos (all tokens of the grid are flattened; with a layout, tokens beside the grid
    are tokens like others), as self- and cross-attention, causal or not, with any mask, and decodes with a key/value
    cache that keeps the validity of each token, so that left-padded batches decode right.

    A mechanism overrides the hooks it differs in: :meth:`_begin`, :meth:`_rotate`, :meth:`_mix_heads` (the operator;
    softmax attention, or another ``normalizer``, unless it says otherwise), :meth:`_gate`, :meth:`_project`. They share
    one :class:`Notes`, of the class ``notes_type``.

    Args:
        dim: width of ``x``.
        num_heads: query heads.
        num_kv_heads: key/value heads; must divide ``num_heads``. Defaults to ``num_heads``.
        head_dim: width of a head; ``dim / num_heads`` by default.
        context_dim: width of ``context``; ``dim`` by default.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        qk_norm: LayerNorm of every head of the queries and of the keys; ``"rms"`` for RMSNorm.
        causal: every token reads itself and earlier ones. With a context: reads all of it.
        rotary: rotary positions with this base; ``None`` for none. Positions count valid tokens only.
        rotary_interleaved: rotate neighbouring channels instead of the two halves.
        rotary_dim: rotate only so many channels of a head, the first ones; all of them by default.
        rotary_scaling: how rotary positions stretch beyond the lengths of training, as transformers' configurations say
            it: see :func:`attnlib.positions.rotary_frequencies`. ``"dynamic"`` turns all by the length of the call, so
            that nothing can be kept from call to call.
        alibi: linear distance penalties, one slope per head.
        scale: of the scores; ``1 / sqrt(head_dim)`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        normalizer: how scores become weights; see :mod:`attnlib.normalizers`.
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        layout=True,
        streaming=True,
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
        weights=True,
    )
    notes_type: ClassVar[type[Notes]] = Notes
    #: Whether rotary positions and ALiBi also serve cross-attention, where queries and keys both count from zero.
    cross_positions: ClassVar[bool] = False
    #: Whether every key head serves equally many query heads; a mechanism that deals them out itself says no.
    even_groups: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool | str = False,
        causal: bool = False,
        rotary: float | None = None,
        rotary_interleaved: bool = False,
        rotary_dim: int | None = None,
        rotary_scaling: Mapping[str, Any] | None = None,
        alibi: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        normalizer: str | Normalizer = "softmax",
    ):
        super().__init__(dim, context_dim)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        if self.even_groups:
            check_divides("num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        self.num_v_heads = self.num_kv_heads
        self.causal, self.rotary, self.rotary_interleaved = causal, rotary, rotary_interleaved
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        if not 0 < self.rotary_dim <= self.head_dim or (rotary_dim is not None and rotary_dim % 2):
            raise ValueError(f"rotary_dim={rotary_dim} must be even and lie between 2 and head_dim={self.head_dim}")
        self.rotary_scaling = check_rotary_scaling(rotary_scaling)
        if rotary_scaling is not None and rotary is None:
            raise ValueError(f"rotary_scaling={dict(rotary_scaling)} needs a rotary base, such as rotary=10000.0")
        self.reads_length = self._dynamic
        self.alibi, self.attn_drop = alibi, attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.normalizer = as_normalizer(normalizer)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(self.context_dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(self.context_dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.q_norm = head_norm(qk_norm, self.head_dim)
        self.k_norm = head_norm(qk_norm, self.head_dim)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)

    @property
    def traits(self) -> Traits:
        patterns = {"causal-self", "causal-cross"} if self.causal else {"noncausal-self", "noncausal-cross"}
        positional = self.rotary is not None or self.biased
        if positional and not self.cross_positions:
            patterns = {p for p in patterns if p.endswith("self")}
        if self.context_dim != self.dim:
            patterns = {p for p in patterns if p.endswith("cross")}
        return self.class_traits.but(
            patterns=frozenset(patterns),
            grid_ranks=frozenset({1}) if self.causal else self.class_traits.grid_ranks,
            streaming=self.causal and "causal-self" in patterns and not self._dynamic,
            permutation_equivariant=not self.causal and not positional,
        )

    # ---- what a mechanism changes

    def _parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x``, keys and values of ``source``, (B, *grid, heads * D) each."""
        return self.q(x), self.k(source), self.v(source)

    def _begin(self, x: Tensor, q: Tensor, notes: N) -> None:
        """Gates, routes and whatever else the hooks below share; ``x`` (B, N, C), ``q`` (B, H, N, D) not rotated."""

    def _rotate(self, q: Tensor, k: Tensor, angles: Tensor, k_angles: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary positions of the new tokens; the keys go to the cache afterwards."""
        return self._turn(q, angles), self._turn(k, k_angles)

    def _turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """The first ``rotary_dim`` channels of every head (B, H, N, D) turned, the others as they are."""
        if self.rotary_dim == x.shape[-1]:
            return rotate(x, angles, self.rotary_interleaved)
        turned, rest = x.split([self.rotary_dim, x.shape[-1] - self.rotary_dim], -1)
        return torch.cat([rotate(turned, angles, self.rotary_interleaved), rest], -1)

    def _angles(self, stream: Stream) -> Tensor:
        """(.., n, rotary_dim / 2) rotary angles of the new tokens."""
        assert self.rotary is not None
        length = stream.tokens if self._dynamic else None
        scaling = self.rotary_scaling
        return rotary_angles(stream.positions, self.rotary_dim, self.rotary, scaling=scaling, length=length)

    @property
    def _dynamic(self) -> bool:
        """Whether rotary positions depend on the length of the call."""
        return self.rotary_scaling is not None and self.rotary_scaling["rope_type"] == "dynamic"

    @property
    def biased(self) -> bool:
        """Whether :meth:`_slot_bias` is added to the scores."""
        return self.alibi

    def _slot_bias(self, q_pos: Tensor, k_pos: Tensor, span: tuple[int, int]) -> Bias:
        """ALiBi between slots (n,) and (M,); ``span`` is the least and the greatest ``k - q``."""
        return alibi(self.num_heads, q_pos, k_pos, span=span)

    def _in_order(self, mask: Mask | None) -> Mask:
        """``mask``, and what the causal order hides."""
        return Stream.mask(mask)

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: N) -> Any:
        """The operator: (B, H, N, Dv), or with ``call.return_weights`` that and (B, H, N, M)."""
        return attention(q, k, v, scale=self.scale, normalizer=self.normalizer, **call.options())

    def _gate(self, out: Tensor, notes: N) -> Tensor:
        """(B, H, N, D) head outputs, before the output projection."""
        return out

    def _project(self, out: Tensor, notes: N, grid: torch.Size) -> Tensor:
        """The output projection: (B, H, N, D) to (B, *grid, C)."""
        return self.proj(merge_heads(out, grid))

    # ---- the path

    def _notes(self, valid: Tensor | None, plan: Plan | None, state: State | None, returns: tuple[str, ...]) -> N:
        return self.notes_type(valid, plan, state, returns)  # type: ignore[return-value]

    def _choice(self, kind: str, x: Tensor, context: Tensor | None, **call: Any) -> dict[str, Tensor]:
        """What the operator chooses in a call, for ``make_plan``: it sees that it is :class:`Wanted`, and leaves it."""
        made: dict[str, Tensor] = {}
        self.mix(x, context, plan=Wanted(kind, made), **call)
        return made

    def _read(
        self, x: Tensor, context: Tensor | None, valid: Tensor | None, context_valid: Tensor | None, plan: Plan | None,
        state: State | None, returns: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, N, Reading]:  # fmt: skip
        """Queries, keys and values of the new tokens (B, H, N, D), normed and rotated, and notes."""
        q, k, v = self._parts(x, x if context is None else context)
        q, k = split_heads(q, self.num_heads), split_heads(k, self.num_kv_heads)
        v = split_heads(v, self.num_v_heads)
        q, k = through(self.q_norm, q), through(self.k_norm, k)
        read = reading(x, context, valid, context_valid, self.causal, state, "state" in returns)
        notes = self._notes(read.own, plan, state, returns)
        self._begin(read.tokens, q, notes)
        if self.rotary is not None:
            angles = self._angles(read.stream)
            own = angles if context is None else self._angles(read.queries)
            q, k = self._rotate(q, k, own, angles)
        return q, k, v, notes, read

    def mix(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: Mask | None = None,
        plan: Plan | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        grid = x.shape[1:-1]
        q, k, v, notes, read = self._read(x, context, valid, context_valid, plan, state, returns)
        stream = read.stream
        k, v = stream.join(k=k, v=v)
        exists = stream.exists
        bias: Bias | None = None
        if self.biased:
            start, n, m = stream.start, q.shape[2], k.shape[2]
            q_at, k_at = torch.arange(start, start + n, device=x.device), torch.arange(m, device=x.device)
            bias = self._slot_bias(q_at, k_at, (1 - start - n, m - 1 - start))
        call = HeadCall(
            self._in_order(mask) if read.ordered else mask, exists, stream.q_pos, bias,
            self.attn_drop if self.training else 0.0, "weights" in returns,
        )  # fmt: skip
        out, weights = self._mix_heads(q, k, v, call, notes), None
        if call.return_weights:
            out, weights = out
        new = stream.next(**{"k": k, "v": v, "valid": stream.slots, **notes.kept}) if stream.keep else None
        y = through(self.proj_drop, self._project(self._gate(out, notes), notes, grid))
        return Output(y, state=new, weights=weights, losses=notes.losses)
