"""MoA: every head reads the first tokens and a window of its own, whose span grows with the length of the input.

Fu et al., 2024, "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", arXiv 2406.14909.
In blocks of ``b`` tokens, head h of an input of N tokens reads, of what is not later, the first ``s`` blocks and

    n_h = max(1, int(floor(alpha_h / b) + beta_h ceil(N / b)))

blocks that end with the query's own. ``beta = 1, alpha = 0`` is causal attention, ``beta = 0`` a window with sinks.
Rules come from a search (:mod:`attnlib.convert.spans`).

While decoding, a key/value head keeps its sinks and ``b n`` tokens in a ring, ``n`` that of the widest of its query
heads: rings of unequal length lie one behind the other in the state, which does not grow. A key at position p > s b
lies in slot ``s b + (p - s b) mod b n``.

Differs from the authors' code, whose kernels are CUDA's: grouped queries stay grouped, where theirs repeats key heads;
padding (positions count the tokens that exist); a query in decoding reads what it would read in one pass, where theirs
moves the window token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import masks
from ...checks import check_int, check_real
from ...ops import attention
from ...ops.block_sparse import BlockPlan, block_sparse_attention
from ...types import State, Traits
from ..linear.heads import HeadMixer, MixedHeads
from ..registry import register


def span_blocks(alpha: float, beta: float, length: int, block: int) -> int:
    """Blocks that a head reads, its own the last, of an input of ``length`` tokens.

    >>> span_blocks(-1024, 0.5, 8192, 64), span_blocks(-1024, 0.5, 1024, 64)
    (48, 1)
    """
    return max(1, int(alpha // block + beta * -(-length // block)))


def block_layout(spans: Sequence[int], sinks: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """(heads, count, count) boolean: which blocks of keys each block of queries reads."""
    q, k = torch.arange(count, device=device)[:, None], torch.arange(count, device=device)
    width = torch.tensor(list(spans), device=device)[:, None, None]
    return (k <= q) & ((k > q - width) | (k < sinks))


def span_plan(
    spans: Sequence[int], sinks: int, block: int, n: int, device: torch.device | str | None = None
) -> BlockPlan:
    """The plan of :func:`block_layout` for n tokens, made without the map: every row its window, then its sinks.

    >>> span_plan([1, 2], 1, 2, 6).count[0].tolist()
    [[1, 2, 2], [1, 2, 3]]
    """
    count = -(-n // block)
    row = torch.arange(count, device=device)[:, None]
    slot = torch.arange(min(count, max(spans) + sinks), device=device)
    width = torch.tensor(list(spans), device=device)[:, None, None].clamp(max=count)
    near = torch.minimum(width, row + 1)
    index = torch.where(slot < near, row - slot, slot - near).clamp(min=0)
    kept = near + (row + 1 - near).clamp(max=sinks)
    return BlockPlan._made(index[None], block, block, n, n, kept[None].squeeze(-1))


class SpanHeads(HeadMixer):
    """Heads with spans of their own, as a mixer for models that exist.

    Args:
        num_heads, head_dim, num_kv_heads, causal, scale: as of :class:`attnlib.nn.linear.heads.HeadMixer`; always
            causal.
        alphas: tokens, one number for all query heads or one for each.
        betas: shares of the input's length, likewise, from 0 on.
        block: tokens per block; 1 lets windows move token by token.
        sinks: blocks at the start that all read.
        length: tokens that spans are meant for; those of the first call by default, so that a longer generation does
            not widen them. It has to be given where the same sequence may arrive in pieces or padded.

    >>> heads = SpanHeads(4, 8, alphas=0, betas=(0.25, 0.5, 0.5, 1.0), block=2, length=16)
    >>> heads.spans(16), heads.slots(16)
    ([2, 4, 4, 8], [6, 10, 10, 18])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        alphas: float | Sequence[float] = 0.0,
        betas: float | Sequence[float] = 0.5,
        block: int = 64,
        sinks: int = 1,
        length: int | None = None,
    ):
        super().__init__(num_heads, head_dim, num_kv_heads, causal, scale)
        if not causal:
            raise ValueError("causal=False is not possible: spans end with the query")
        self.alphas = _of_heads("alphas", alphas, num_heads)
        self.betas = _of_heads("betas", betas, num_heads, least=0)
        self.block, self.sinks = check_int("block", block, least=1), check_int("sinks", sinks, least=0)
        self.length = None if length is None else check_int("length", length, least=1)

    def trained(self) -> list[Any]:
        return []

    def spans(self, length: int) -> list[int]:
        """Blocks that each query head reads, beside its sinks."""
        return [span_blocks(a, b, length, self.block) for a, b in zip(self.alphas, self.betas, strict=True)]

    def slots(self, length: int) -> list[int]:
        """Tokens that each key/value head keeps."""
        spans, share = self.spans(length), self.num_heads // self.num_kv_heads
        return [(self.sinks + max(spans[h * share : (h + 1) * share])) * self.block for h in range(self.num_kv_heads)]

    def _groups(self, length: int) -> list[tuple[int, list[int]]]:
        """``(slots, key/value heads)``, one for each ring length."""
        found: dict[int, list[int]] = {}
        for head, slots in enumerate(self.slots(length)):
            found.setdefault(slots, []).append(head)
        return sorted(found.items())

    # ---- the call

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: State | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        batch, new = k.shape[0], k.shape[2]
        length = self.length or (new if state is None else int(state["length"].max()))
        past = k.new_zeros(batch, dtype=torch.long) if state is None else state["tokens"]
        if valid is None:
            at = past[:, None] + torch.arange(new, device=k.device)
            tokens = past + new
        else:
            at = (past[:, None] + valid.long().cumsum(1) - 1).masked_fill(~valid, -1)
            tokens = past + valid.sum(1)
        out = self._whole(q, k, v, valid, length) if state is None else self._beside(q, k, v, at, state, length)
        if not keep:
            return out, None
        return out, self._kept(k, v, at, tokens, state, length)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, length: int) -> Tensor:
        """(B, H, N, Dv) of a sequence from its start."""
        order: Tensor | None = None
        if valid is not None:  # blocks are counted over the tokens that exist
            order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)
            q, k, v = (t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in (q, k, v))
            valid = valid.gather(1, order)
        plan = span_plan(self.spans(length), self.sinks, self.block, k.shape[2], q.device)
        out = block_sparse_attention(q, k, v, plan, valid=valid, mask=masks.causal(), scale=self.scale)
        if order is None or valid is None:
            return out
        out = out.masked_fill(~valid[:, None, :, None], 0.0)
        return torch.zeros_like(out).scatter(2, order[:, None, :, None].expand_as(out), out)

    def allowed(self, at: Tensor, keys: Tensor, spans: Sequence[int]) -> Tensor:
        """(B, len(spans), n, M) boolean: which keys at positions (B, M) the queries at (B, n) read; -1 is none."""
        q, k = at[:, None, :, None], keys[:, None, None, :]
        width = torch.tensor(list(spans), device=at.device)[:, None, None]
        near = k.div(self.block, rounding_mode="floor") > q.div(self.block, rounding_mode="floor") - width
        return (k >= 0) & (k <= q) & (near | (k < self.sinks * self.block))

    def weights(self, q: Tensor, k: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """The (B, H, N, M) map; quadratic, for reports."""
        batch, _, n, _ = q.shape
        exists = torch.ones(batch, n, dtype=torch.bool, device=q.device) if valid is None else valid
        at = (exists.long().cumsum(1) - 1).masked_fill(~exists, -1)
        mask = masks.explicit(self.allowed(at, at, self.spans(self.length or n)))
        return attention(q, k, k, mask=mask, scale=self.scale, return_weights=True)[1]

    def _rings(self, state: State, length: int) -> list[tuple[list[int], Tensor, Tensor, Tensor]]:
        """``(heads, keys (B, h, c, D), values, positions (B, c))`` of every ring length."""
        out, at, place = [], 0, 0
        for slots, heads in self._groups(length):
            size = len(heads) * slots
            k, v = (state[name][:, at : at + size].unflatten(1, (len(heads), slots)) for name in ("keys", "values"))
            out.append((heads, k, v, state["places"][:, place : place + slots]))
            at, place = at + size, place + slots
        return out

    def _beside(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, state: State, length: int) -> Tensor:
        """(B, H, n, Dv) of new tokens, which read the rings and one another."""
        share, spans = self.num_heads // self.num_kv_heads, self.spans(length)
        out: list[Tensor | None] = [None] * self.num_heads
        for heads, old_k, old_v, places in self._rings(state, length):
            queries = [h * share + i for h in heads for i in range(share)]
            own = torch.tensor(heads, device=k.device)
            keys, values = (
                torch.cat([old.to(t.dtype), t.index_select(1, own)], 2) for old, t in ((old_k, k), (old_v, v))
            )
            mask = masks.explicit(self.allowed(at, torch.cat([places, at], 1), [spans[h] for h in queries]))
            some = q.index_select(1, torch.tensor(queries, device=q.device))
            made = attention(some, keys, values, mask=mask, scale=self.scale)
            for i, h in enumerate(queries):
                out[h] = made[:, i]
        return torch.stack([t for t in out if t is not None], 1)

    def _kept(self, k: Tensor, v: Tensor, at: Tensor, tokens: Tensor, state: State | None, length: int) -> State:
        """The rings after the new tokens."""
        batch, first = k.shape[0], self.sinks * self.block
        rings = None if state is None else self._rings(state, length)
        kept: dict[str, list[Tensor]] = {"keys": [], "values": [], "places": []}
        for number, (slots, heads) in enumerate(self._groups(length)):
            ring = slots - first
            live = (at >= 0) & ((at < first) | (at >= tokens[:, None] - ring))
            # What is not kept goes to a slot behind, which is cut off.
            to = torch.where(at < first, at, first + (at - first) % ring).masked_fill(~live, slots)
            own = torch.tensor(heads, device=k.device)
            _, *before, places = ([], None, None, None) if rings is None else rings[number]
            for name, t, old in (("keys", k, before[0]), ("values", v, before[1])):
                some = t.index_select(1, own)
                held = some.new_zeros(batch, len(heads), slots, t.shape[3]) if old is None else old
                held = torch.cat([held.to(t.dtype), held.new_zeros(batch, len(heads), 1, t.shape[3], dtype=t.dtype)], 2)
                held = held.scatter(2, to[:, None, :, None].expand_as(some), some)
                kept[name].append(held[:, :, :slots].flatten(1, 2))
            held = at.new_full((batch, slots), -1) if places is None else places
            held = torch.cat([held, held.new_full((batch, 1), -1)], 1).scatter(1, to, at)
            kept["places"].append(held[:, :slots])
        joined = {name: torch.cat(parts, 1) for name, parts in kept.items()}
        return State({**joined, "tokens": tokens, "length": torch.full_like(tokens, length)})


def _of_heads(name: str, given: Any, heads: int, least: float | None = None) -> tuple[float, ...]:
    """One number for each head."""
    many = list(given) if isinstance(given, (list, tuple)) else [given] * heads
    if len(many) != heads:
        raise ValueError(f"{name} must be one number, or one for each of {heads} heads, got {len(many)}")
    return tuple(float(check_real(name, value, least=least)) for value in many)


@register("moa-mixture-of-attention-spans", "moa-spans")
class MixtureOfSpans(MixedHeads):
    """Causal attention in which every head has a window of its own behind sinks.

    Args:
        dim: width of ``x``.
        num_heads: query heads.
        num_kv_heads: key/value heads; must divide ``num_heads``. Defaults to ``num_heads``.
        head_dim: width of a head; ``dim / num_heads`` by default.
        alphas, betas, block, sinks, length: of :class:`SpanHeads`.
        rotary: base of the rotary positions; ``None`` for none.
        qkv_bias, proj_bias: biases of the projections.
        scale: of the scores; ``1 / sqrt(head_dim)`` by default.
        proj_drop: dropout of the output in training.

    Reference: Fu et al., 2024, arXiv 2406.14909.

    >>> import torch
    >>> MixtureOfSpans(16, 2, betas=(0.25, 1.0), block=2)(torch.randn(1, 9, 16)).shape
    torch.Size([1, 9, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}),
        streaming=True,
        work={"N": 2},
        memory={"N": 2},
        permutation_equivariant=False,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        alphas: float | Sequence[float] = 0.0,
        betas: float | Sequence[float] = 0.5,
        block: int = 64,
        sinks: int = 1,
        length: int | None = None,
        rotary: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, qkv_bias=qkv_bias, proj_bias=proj_bias, causal=True, rotary=rotary,
            scale=scale, proj_drop=proj_drop,
        )  # fmt: skip
        self.heads = SpanHeads(
            num_heads, self.head_dim, self.num_kv_heads, True, self.scale, alphas, betas, block, sinks, length
        )
        self.reads_length = length is None

    @property
    def traits(self) -> Traits:
        # Without a length a sequence that arrives in pieces has the spans of the first.
        fixed = self.heads.length is not None or not any(self.heads.betas)
        growth = {"N": 1 if fixed else 2}  # the plan counts blocks of the spans
        return self.class_traits.but(streaming=fixed, work=growth, memory=growth)
