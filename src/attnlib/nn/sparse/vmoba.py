"""VMoBA: every query of a video chooses blocks of keys by their means; blocks are cut along 1, 2 or 3 axes.

Wu et al., 2025, "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858. With the tokens of
block n averaged,

    g[s, n] = q_s . mean_{j in n} k_j,

a query reads its own block, and of all other (query, block) pairs of a head the largest, until the min-max normalised
scores of what is read make up ``threshold`` of all. Attention is the softmax over the union of the chosen blocks.
Models alternate the cut from layer to layer: consecutive tokens, columns over all frames, cuboids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...grids import block_order, inverse_order
from ...ops.block_policies import SCOPES, block_affinity, own_blocks, threshold_blocks, topk_blocks
from ...ops.block_sparse import BlockPlan, block_sparse_attention
from ...types import Plan, Traits
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, zero_invalid
from ..registry import register

Cut = float | Sequence[int]


def cut_order(grid: Sequence[int], cut: Cut) -> tuple[Tensor | None, int]:
    """How a grid is cut: its tokens block after block (-1: none), and tokens per block.

    Args:
        grid: (T, H, W), or fewer axes.
        cut: a number c: consecutive tokens, as many as c frames have (c entries of the first axis; a fraction is
            rounded down to tokens), the last block may be short, and the order is ``None``; one side fewer than the
            grid has axes: of blocks that span the first axis; as many: of blocks.

    >>> cut_order((2, 2, 2), (1, 2))[0].tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    >>> cut_order((4, 2, 2), 0.5)
    (None, 2)
    """
    grid = tuple(grid)
    if isinstance(cut, (int, float)):
        check_real("cut", cut, above=0)
        return None, max(1, int(cut * math.prod(grid[1:])))
    sides = tuple(check_int("cut", side, least=1) for side in cut)
    if len(sides) == len(grid) - 1:
        sides = (grid[0], *sides)
    if len(sides) != len(grid):
        raise ValueError(
            f"cut={tuple(cut)} must be a number, or have {len(grid) - 1} or {len(grid)} sides for the grid {grid}"
        )
    sides = tuple(min(a, b) for a, b in zip(sides, grid, strict=True))
    return block_order(grid, sides), math.prod(sides)


def moba_plan(
    q: Tensor,
    k: Tensor,
    block: int,
    threshold: float = 0.25,
    topk: int | None = None,
    per: str = "head",
    at_least: int = 1,
    valid: Tensor | None = None,
    forced: Tensor | None = None,
) -> BlockPlan:
    """Which blocks of keys every single query reads, without gradient.

    Args:
        q: (B, H, N, D), k: (B, Hk, N, D), block after block.
        block: tokens per block; the last may be short.
        threshold: of the min-max normalised scores, in (0, 1]; 1 reads everything.
        topk: blocks for every query, the own one among them, instead of a threshold.
        per: scope of the choice: ``"row"`` (a query), ``"block"``, ``"head"``, ``"all"`` (all heads).
        at_least: blocks chosen in every scope beside the own ones even when these meet the threshold.
        valid: (B, N) boolean, which tokens exist.
        forced: boolean, broadcast to (B, H, N, blocks): read in any case, beside what is chosen.
    """
    n = k.shape[2]
    scores = block_affinity(q, k, 1, block, valid=valid)
    own = own_blocks(n, 1, block, k.device)
    allowed = None
    if valid is not None:
        at = torch.arange(n, device=k.device) // block
        held = torch.zeros(valid.shape[0], own.shape[1], dtype=torch.long, device=k.device).index_add(
            1, at, valid.long()
        )
        some = held > 0
        allowed = some[:, None, None] & valid[:, None, :, None]
        scores = scores.masked_fill(~some[:, None, None], 0.0)
    eligible = allowed
    if forced is not None:  # what is read anyway takes nothing of the budget
        eligible = own | ~forced if allowed is None else allowed & (own | ~forced)
    chosen: dict[str, Any] = dict(forced=own, allowed=eligible)
    if topk is not None:
        plan = topk_blocks(scores, topk, 1, block, n, per="row" if per == "block" else per, **chosen)
    else:
        plan = threshold_blocks(scores, threshold, 1, block, n, per=per, at_least=at_least, **chosen)
    if forced is None:
        return plan
    return BlockPlan.from_mask(plan.chosen() | (forced if allowed is None else forced & allowed), 1, block, n)


@register("vmoba", "video-moba")
class VMoBA(Mechanism):
    """Mixture-of-block attention on grids of one to three axes, trainable; no gradient passes through the choice.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        cut: how the grid is cut, see :func:`cut_order`. A layer of the authors' models has one of three by turns:
            a number of frames, ``(h, w)`` over all frames, ``(t, h, w)``.
        threshold: share of the min-max normalised scores that is read, in (0, 1]; the authors' default is 0.25.
        topk: blocks per query, the own one among them, instead of the threshold.
        per: scope of the choice: ``"row"``, ``"block"``, ``"head"`` (the authors' ``head_global``) or ``"all"``.
        at_least: blocks that are chosen in a scope even where own blocks meet the threshold; 1 as released.
        rank: axes of the grid.
        qkv_bias: bias of the query, key and value projections.

    Reference: Wu et al., 2025, arXiv 2506.23858. Blocks that do not divide the grid are padded, and nobody reads the
    padding; the authors' code stops there.

    >>> VMoBA(dim=16, num_heads=2, cut=(2, 2))(torch.randn(1, 3, 4, 4, 16)).shape
    torch.Size([1, 3, 4, 4, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        work={"N": 2},
        memory={"N": 2},
        gradient="stopped",
        needs_plan=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        cut: Cut = 1,
        threshold: float = 0.25,
        topk: int | None = None,
        per: str = "head",
        at_least: int = 1,
        rank: int = 3,
        qkv_bias: bool = True,
    ):
        super().__init__(dim)
        self.head_dim = head_dim_of(dim, num_heads)
        self.num_heads = num_heads
        self.rank = check_int("rank", rank, least=1, most=3)
        self.cut: Cut = cut if isinstance(cut, (int, float)) else tuple(cut)
        cut_order((1,) * rank, self.cut)
        self.threshold = check_real("threshold", threshold, above=0, most=1)
        self.topk = None if topk is None else check_int("topk", topk, least=1)
        check_choice("per", per, SCOPES)
        self.per, self.at_least = per, check_int("at_least", at_least, least=0)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_ranks=frozenset({self.rank}))

    def _cut(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Tokens (B, N', C) block after block, which exist, their order, and tokens per block."""
        order, block = cut_order(tuple(x.shape[1:-1]), self.cut)
        flat, exists = x.flatten(1, -2), flat_valid(valid)
        if order is None:
            return flat, exists, None, block
        padded = bool((order < 0).any()) if not torch.compiler.is_compiling() else True
        order = order.to(x.device)  # looked at before, so that no device is waited for
        flat = flat.index_select(1, order.clamp(min=0))
        if exists is not None or padded:
            here = (order >= 0).expand(x.shape[0], -1)
            exists = here if exists is None else here & exists.index_select(1, order.clamp(min=0))
            flat = zero_invalid(flat, exists)
        return flat, exists, order, block

    def _heads(self, flat: Tensor) -> list[Tensor]:
        return [split_heads(t, self.num_heads) for t in self.qkv(flat).chunk(3, -1)]

    def _choose(self, q: Tensor, k: Tensor, block: int, exists: Tensor | None) -> BlockPlan:
        return moba_plan(q, k, block, self.threshold, self.topk, self.per, self.at_least, exists)

    def make_plan(self, x: Tensor, *, valid: Tensor | None = None) -> Plan:  # type: ignore[override]
        flat, exists, _, block = self._cut(zero_invalid(x, valid), valid)
        q, k, _v = self._heads(flat)
        return self._choose(q, k, block, exists)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, plan: Plan | None = None
    ) -> Tensor:
        grid = tuple(x.shape[1:-1])
        flat, exists, order, block = self._cut(x, valid)
        q, k, v = self._heads(flat)
        if plan is None:
            plan = self._choose(q, k, block, exists)
        if not isinstance(plan, BlockPlan):
            raise TypeError(f"plan must be a BlockPlan made by m.plan(x), got {type(plan).__name__}")
        plan.expect("blocks", N=q.shape[2], M=k.shape[2], q_block=1, k_block=block)
        y = merge_heads(block_sparse_attention(q, k, v, plan, valid=exists))
        if order is not None:
            y = y.index_select(1, inverse_order(order, math.prod(grid)))
        return self.proj(y).unflatten(1, grid)
