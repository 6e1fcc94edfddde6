"""S2 attention (Lin et al., 2024): the context is sharded among heads, each of which reads a stripe of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import masks
from ...checks import check_choice, check_divides, check_int, to_tuple
from ...normalizers import Softmax
from ...ops import attention
from ...ops.block_sparse import BlockPlan, block_sparse_attention
from ...types import State, Traits
from ..dense.softmax_attention import SoftmaxAttention
from ..frame import HeadCall, HeadFrame, Notes
from ..registry import register

COVERAGE = ("warn", "error", "ignore")


class ShardedContext(masks.Mask):
    """Causal; every head reads a local window and its own stripe of key blocks.

    With blocks of ``block_size`` tokens, head ``h`` lets query block i read key block j up to the query when
    ``i - j < local`` or ``(j + g step + offset) % stride == 0``, where ``g = h // (num_heads / num_patterns)`` is the
    pattern of the head. The last ``num_dense`` patterns read everything.
    """

    name = "sharded_context"
    fields = ("block_size", "local", "stride", "step", "offset", "num_heads", "num_patterns", "num_dense")

    def __init__(
        self,
        block_size: int,
        local: int,
        stride: int,
        step: int = 1,
        offset: int = 0,
        num_heads: int = 1,
        num_patterns: int | None = None,
        num_dense: int = 0,
    ):
        for name, value in (("block_size", block_size), ("local", local), ("stride", stride), ("num_heads", num_heads)):
            check_int(name, value, least=1)
        check_int("step", step, least=0)
        check_int("offset", offset)
        num_patterns = num_heads if num_patterns is None else num_patterns
        check_divides("num_patterns", num_patterns, "num_heads", num_heads)
        if not 0 <= check_int("num_dense", num_dense) <= num_patterns:
            raise ValueError(f"num_dense={num_dense} must lie between 0 and num_patterns={num_patterns}")
        self.block_size, self.local, self.stride, self.step, self.offset = block_size, local, stride, step, offset
        self.num_heads, self.num_patterns, self.num_dense = num_heads, num_patterns, num_dense

    def heads(self) -> int:
        return self.num_heads if len(self._stripes()) > 1 else 1

    def _stripes(self) -> set[int | None]:
        """The first key block of each pattern's stripe; ``None`` for patterns that read everything."""
        sparse = self.num_patterns - self.num_dense
        stripes: set[int | None] = {-(g * self.step + self.offset) % self.stride for g in range(sparse)}
        return stripes | {None} if self.num_dense else stripes

    def uncovered(self) -> list[int]:
        """Residues of key blocks modulo ``stride`` that no head reads from afar; empty: heads together see all."""
        stripes = self._stripes()
        return [] if None in stripes else sorted(set(range(self.stride)) - stripes)  # type: ignore[arg-type]

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        i, j = q // self.block_size, k // self.block_size
        pattern = h // (self.num_heads // self.num_patterns)
        far = ((j + pattern * self.step + self.offset) % self.stride == 0) | (
            pattern >= self.num_patterns - self.num_dense
        )
        return (q >= k) & ((i - j < self.local) | far)

    def plane(self, b: int, h: int) -> masks.Mask:
        if self.heads() == 1:
            return self
        pattern = h // (self.num_heads // self.num_patterns)
        if pattern >= self.num_patterns - self.num_dense:
            return masks.causal()
        offset = (pattern * self.step + self.offset) % self.stride
        return ShardedContext(self.block_size, self.local, self.stride, 0, offset)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> masks.Classes:
        size, first, last = self.block_size, k_lo // self.block_size, k_hi // self.block_size
        # Of the band that the window and causality leave, a rectangle that meets both meets both at once.
        some = (q_hi >= k_lo) & (q_lo // size - last < self.local)
        every = torch.ones_like(some)
        for stripe in self._stripes():
            if stripe is None:
                some = some | (q_hi >= k_lo)
                continue
            nearest = first + (stripe - first) % self.stride  # first block of the stripe in or after the tile
            key = torch.maximum(k_lo, nearest * size)
            some = some | ((key <= k_hi) & (q_hi >= key))
            every = every & ((nearest == first) & ((first == last) | (self.stride == 1)))
        return some, (q_lo >= k_hi) & (every | (q_hi // size - first < self.local))


def sharded_context(
    block_size: int,
    local: int,
    stride: int,
    step: int = 1,
    offset: int = 0,
    num_heads: int = 1,
    num_patterns: int | None = None,
    num_dense: int = 0,
) -> masks.Mask:
    """Causal local window plus a stripe of key blocks per head; see :class:`ShardedContext`.

    >>> print(sharded_context(1, 1, 3, num_heads=3).plane(0, 1).picture(6))
    #.....
    .#....
    ..#...
    ..##..
    ..#.#.
    ..#..#
    """
    return ShardedContext(block_size, local, stride, step, offset, num_heads, num_patterns, num_dense)


class StridedBlocks(masks.Mask):
    """The patterns beside :class:`ShardedContext`: in both directions, or with stripes that follow the query.

    Query block i reads key block j when ``-right < i - j < left``, or by the stripe: ``"absolute"`` as in
    :class:`ShardedContext`; ``"relative"`` when the distance beyond the window is a multiple of ``stride``, the same in
    all heads but the ``num_dense`` last patterns. With ``causal`` keys after the query are not read.
    """

    name = "strided_blocks"
    fields = (
        "block_size", "left", "right", "stride", "relative", "causal", "step", "offset", "num_heads", "num_patterns",
        "num_dense",
    )  # fmt: skip

    def __init__(
        self,
        block_size: int,
        left: int,
        right: int,
        stride: int,
        relative: bool,
        causal: bool = False,
        step: int = 1,
        offset: int = 0,
        num_heads: int = 1,
        num_patterns: int | None = None,
        num_dense: int = 0,
    ):
        # the other settings, checked where they are checked for the causal pattern
        like = ShardedContext(block_size, max(left, 1), stride, step, offset, num_heads, num_patterns, num_dense)
        check_int("left", left, least=0)
        check_int("right", right, least=0)
        self.block_size, self.left, self.right, self.stride, self.relative = block_size, left, right, stride, relative
        self.causal = causal
        self.step, self.offset, self.num_heads, self.num_dense = step, offset, num_heads, num_dense
        self.num_patterns = like.num_patterns

    def heads(self) -> int:
        alike = self.num_dense in (0, self.num_patterns) and (self.relative or self.step % self.stride == 0)
        return 1 if alike else self.num_heads

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        i, j = q // self.block_size, k // self.block_size
        pattern = h // (self.num_heads // self.num_patterns)
        if self.relative:
            far = ((i - j - self.left + 1).clamp(min=0) + (j - i - self.right + 1).clamp(min=0)) % self.stride == 0
        else:
            near = (i - j < self.left) & (j - i < self.right)
            far = near | ((j + pattern * self.step + self.offset) % self.stride == 0)
        allowed = far | (pattern >= self.num_patterns - self.num_dense)
        return allowed & (q >= k) if self.causal else allowed


@register("s2-attention-dkernel", "s2-attention", "sharded-context")
class S2Attention(HeadFrame[Notes]):
    """Attention in which every head reads a local window and its own stripe of key blocks; causal by default.

    With blocks of b tokens, query block i, key block j and key/value head g::

        B_gij = i >= j and (i - j < local_blocks or (j + g step + offset) % stride == 0)
        step = max(1, floor(stride / H)),  o_h = softmax over the keys of allowed blocks, up to the query itself

    Heads of one key/value group share its pattern. Stripes shift from head to head, so that together the heads read
    every block, when there are enough of them. A block that a head dropped never comes back, so decoding keeps the
    window and the stripe only: about ``1 / stride`` of the cache.

    Args:
        dim, num_heads, num_kv_heads, ...: as in :class:`HeadFrame`.
        block_size: b.
        local_blocks: blocks of the window, the query's own included; without ``causal`` a pair (left, right) or one
            number for both.
        stride: distance between blocks of a stripe; 1 is dense causal attention.
        step: shift of the stripe from one key/value head to the next; 0 gives all heads the same.
        offset: shift of all stripes.
        dense_heads: the last key/value heads that read everything (query heads, with ``pattern_heads="query"``).
        causal: every token reads itself and earlier ones. Otherwise all heads read by distance: see ``stripes``.
        stripes: ``"absolute"`` as above, the default of causal attention; ``"relative"``, the default otherwise: a
            block is read when its distance beyond the window is a multiple of ``stride``. Decoding needs the former.
        pattern_heads: ``"kv"``: one pattern per key/value head; ``"query"``: per query head, as Phi-3 and vLLM have it
            (with ``offset=1``). The cache then keeps what any query head of a group may read.
        coverage: what to do when some far blocks are read by no head: ``"warn"``, ``"error"`` or ``"ignore"``.

    A mask of the caller is combined with the pattern. ALiBi is not offered: the cache does not hold all keys.

    What differs from the authors' code: ``step`` counts query heads there too, while the pattern counts key/value heads
    (the default keeps that); far blocks that no head reads are reported.

    Reference: Lin et al., 2024, arXiv 2407.17678.

    >>> S2Attention(dim=16, num_heads=4, block_size=2, local_blocks=1)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    class_traits = HeadFrame.class_traits.but(
        patterns=frozenset({"causal-self", "noncausal-self"}),
        grid_ranks=frozenset({1}),
        permutation_equivariant=False,
        layout=False,
        memory={"N": 2},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        *,
        block_size: int = 64,
        local_blocks: int | Sequence[int] = 4,
        stride: int = 4,
        step: int | None = None,
        offset: int = 0,
        dense_heads: int = 0,
        coverage: str = "warn",
        causal: bool = True,
        stripes: str | None = None,
        pattern_heads: str = "kv",
        **settings: Any,
    ):
        for name in ("alibi", "context_dim"):
            if settings.get(name):
                raise ValueError(f"{name} is not a setting of s2-attention-dkernel: it is self-attention, no ALiBi")
        check_choice("coverage", coverage, COVERAGE)
        check_choice("stripes", stripes, (None, "absolute", "relative"))
        check_choice("pattern_heads", pattern_heads, ("kv", "query"))
        super().__init__(dim, num_heads, num_kv_heads, causal=causal, **settings)
        if causal and not isinstance(local_blocks, int):
            raise ValueError(f"local_blocks={local_blocks} must be one number with causal=True: the window looks back")
        left, right = (check_int("local_blocks", n, least=1) for n in to_tuple("local_blocks", local_blocks, 2))
        self.block_size, self.local_blocks, self.stride, self.coverage = block_size, left, stride, coverage
        relative = not causal if stripes is None else stripes == "relative"
        per_head = num_heads if pattern_heads == "query" else self.num_kv_heads
        check_int("dense_heads", dense_heads, least=0, most=per_head)
        step = max(1, stride // num_heads) if step is None else step
        shared = dict(step=step, offset=offset, num_heads=num_heads, num_patterns=per_head, num_dense=dense_heads)
        self.pattern: ShardedContext | StridedBlocks
        if not causal or relative:
            self.pattern = StridedBlocks(block_size, left, 1 if causal else right, stride, relative, causal, **shared)
            missing = []
        else:
            self.pattern = ShardedContext(block_size, left, stride, **shared)
            missing = self.pattern.uncovered()
        if missing and coverage != "ignore":
            message = (
                f"no head reads the far key blocks j with j % {stride} in {missing}: {per_head} patterns with "
                f"step={step} cover {stride - len(missing)} of stride={stride} residues"
            )
            if coverage == "error":
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)

    @property
    def traits(self) -> Traits:
        return super().traits.but(
            patterns=frozenset({"causal-self" if self.causal else "noncausal-self"}), grid_ranks=frozenset({1}),
            permutation_equivariant=False, streaming=isinstance(self.pattern, ShardedContext),
        )  # fmt: skip

    # ---- figures

    def density(self, blocks: int) -> Tensor:
        """(patterns,) share of the pairs of blocks, causal or all, that each pattern reads, on ``blocks`` blocks."""
        total = blocks * (blocks + 1) / 2 if self.causal else blocks**2
        starts = torch.arange(blocks) * self.block_size
        read = self.pattern.at(starts + self.block_size - 1, starts).reshape(-1, blocks**2).sum(1)
        return read.expand(self.num_heads)[:: self.num_heads // self.pattern.num_patterns] / total

    def cache_fraction(self, tokens: int) -> float:
        """Share of a full key/value cache that is needed to go on after ``tokens`` tokens; mean over heads."""
        if not self.traits.streaming:
            raise ValueError("cache_fraction is about decoding, which needs causal=True and absolute stripes")
        pos = torch.arange(tokens).expand(1, self.num_kv_heads, -1)
        return float(self._keep(pos, torch.tensor([tokens])).float().mean())

    # ---- decoding with an evicted cache

    def _keep(self, pos: Tensor, following: Tensor) -> Tensor:
        """Which positions ``pos`` (B, G, M) of each key/value head may be read from position ``following`` (B,) on."""
        patterns = self.pattern.num_patterns
        g = torch.arange(patterns, device=pos.device).view(self.num_kv_heads, -1, 1)
        block = (pos // self.block_size).unsqueeze(2)
        stripe = (block + g * self.pattern.step + self.pattern.offset) % self.stride == 0
        dense = g >= patterns - self.pattern.num_dense
        near = (following // self.block_size).view(-1, 1, 1, 1) - block < self.local_blocks
        return (stripe | dense | near).any(2)  # a group keeps what one of its patterns may read

    def _evict(self, k: Tensor, v: Tensor, pos: Tensor, slot: Tensor, following: Tensor) -> dict[str, Tensor]:
        """The part of the cache that is needed from ``following`` (B,) on; heads that need less have empty places.

        Args:
            k, v: (B, G, M, D).
            pos: (B, G, M) positions; -1 where no token is.
            slot: (B, G, M) slots, which masks of the caller count.
        """
        keep = self._keep(pos, following) & (pos >= 0)
        width = int(keep.sum(-1).max()) if keep.numel() else 0
        order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)[..., :width]
        k, v = (t.gather(2, order[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
        return {
            "k": k,
            "v": v,
            "valid": torch.ones(k.shape[0], width, dtype=torch.bool, device=k.device),
            "pos": pos.gather(2, order).masked_fill(~keep.gather(2, order), -1),
            "slot": slot.gather(2, order),
        }

    convert_state_dict = staticmethod(SoftmaxAttention.convert_state_dict)

    # ---- the operator

    def _plan(self, n: int, device: torch.device) -> BlockPlan:
        """The blocks of every head. A pair of blocks meets when its last query may read its first key."""
        starts = torch.arange(0, n, self.block_size, device=device)
        chosen = self.pattern.at(starts + self.block_size - 1, starts)
        return BlockPlan.from_mask(chosen, self.block_size, self.block_size, n)

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        past, keeps = notes.state, "state" in notes.returns
        n, device = q.shape[2], q.device
        # The pattern lies on the tokens that exist, so that padding at the front does not move it.
        now = None if call.valid is None else call.valid[:, -n:] if n else call.valid[:, :0]
        plain = call.mask is None or isinstance(call.mask, masks.Causal)  # which the pattern is by itself
        pos = slot = None
        if now is not None:
            pos = now.long().cumsum(1) - 1 + (0 if past is None else past["tokens"][:, None])
            slot = torch.arange(n, device=device) + (0 if past is None else past["seen"][:, None])
            slot = slot.expand(pos.shape)
        if past is not None:
            assert now is not None and pos is not None and slot is not None
            out = self._go_on(q, k, v, pos, slot, now, plain, call, past, notes)
        elif pos is None or _at_the_front(now):
            if self._blockwise(call):
                plan = self._plan(n, device)
                out = block_sparse_attention(q, k, v, plan, valid=call.valid, mask=call.mask, scale=self.scale)
            else:
                mask = self.pattern if call.mask is None else self.pattern & call.mask
                out = super()._mix_heads(q, k, v, call.but(mask=mask), notes)
        else:
            pos = pos.clamp(min=0)
            if not plain:
                assert call.mask is not None
                pairs = self.pattern.at(pos, pos) & call.mask.dense(n, n, device)
                out = super()._mix_heads(q, k, v, call.but(mask=masks.explicit(pairs)), notes)
            else:
                out = attention(
                    q, k, v, **call.but(mask=self.pattern, q_pos=pos).options(), k_pos=pos, scale=self.scale,
                    normalizer=self.normalizer,
                )  # fmt: skip
        if keeps and past is None:
            assert now is not None and pos is not None and slot is not None
            notes.kept = self._remember(k, v, self._spread(pos, now), self._spread(slot), now, None)
        return out

    def _spread(self, at: Tensor, now: Tensor | None = None) -> Tensor:
        """(B, n) to (B, G, n); -1 for tokens that do not exist."""
        at = at if now is None else at.masked_fill(~now, -1)
        return at[:, None].expand(-1, self.num_kv_heads, -1)

    def _remember(
        self, k: Tensor, v: Tensor, pos: Tensor, slot: Tensor, now: Tensor, past: State | None
    ) -> dict[str, Tensor]:
        """What the frame's state holds beside the number of tokens."""
        count = now.sum(1) if past is None else past["tokens"] + now.sum(1)
        seen = now.shape[1] + (torch.zeros_like(count) if past is None else past["seen"])
        return {**self._evict(k, v, pos, slot, count), "seen": seen}

    def _go_on(
        self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, slot: Tensor, now: Tensor, plain: bool, call: HeadCall,
        past: State, notes: Notes,
    ) -> Any:  # fmt: skip
        """Behind a state: the places of different heads hold different positions, so the pairs are spelled out."""
        k_pos = torch.cat([past["pos"], self._spread(pos, now)], -1)
        k_slot = torch.cat([past["slot"], self._spread(slot)], -1)
        heads = self.num_heads // self.num_kv_heads
        there, at = ((k_pos >= 0).repeat_interleave(heads, 1), k_pos.clamp(min=0).repeat_interleave(heads, 1))
        pairs = self.pattern.at(pos.clamp(min=0), at) & there.unsqueeze(-2)
        if not plain:
            assert call.mask is not None
            pairs = pairs & call.mask.at(slot, k_slot.repeat_interleave(heads, 1))
        call = call.but(mask=masks.explicit(pairs), valid=None, q_pos=None)
        out = super()._mix_heads(q, k, v, call, notes)
        if "state" in notes.returns:
            notes.kept = self._remember(k, v, k_pos, k_slot, now, past)
        return out

    def _blockwise(self, call: HeadCall) -> bool:
        """Whether the executor of block plans, which touches only allowed blocks, can serve the call."""
        plain = isinstance(self.normalizer, Softmax) and not call.dropout_p and not call.return_weights
        return plain and not torch.compiler.is_compiling()


def _at_the_front(now: Tensor | None) -> bool:
    """Whether tokens that exist come first in every sample, so that their slots are their positions."""
    if now is None:
        return True
    return not torch.compiler.is_compiling() and bool((now[:, 1:] <= now[:, :-1]).all())
