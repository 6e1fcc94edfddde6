"""Multi-scale deformable attention: every query predicts where to look, and how much each look counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...grids import Layout
from ...ops.sampled import deformable_attention
from ...types import Output, Traits, check_choice, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released

Shapes = list[tuple[int, int]]


def image_levels(layout: Layout, name: str) -> Shapes:
    """(height, width) of every segment of a layout that holds nothing but images."""
    sizes = [size for _, size in layout.segments]
    if not all(isinstance(size, tuple) and len(size) == 2 for size in sizes):
        raise ValueError(f"{name} must hold feature maps (height, width) only, got {dict(layout.segments)}")
    return [(size[0], size[1]) for size in sizes if isinstance(size, tuple)]


def centres(grid: tuple[int, ...], like: Tensor) -> Tensor:
    """(N, r): cell centres of a row-major grid in [0, 1], the last axis of the grid first, as (x, y) or (x, y, z)."""
    axes = [(torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in grid]
    return torch.stack([a.reshape(-1) for a in torch.meshgrid(*axes, indexing="ij")][::-1], -1)


def directions(num_heads: int) -> Tensor:
    """(H, 2): unit-circle directions (cos, sin), one per head."""
    angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    return torch.stack([angles.cos(), angles.sin()], -1)


@register("deformable-attention", "msda")
class DeformableAttention(Mechanism):
    """Deformable attention over one or several feature maps.

    For query x_n with reference point r_n, head h, level l and point p,

    ``y_n = W_o concat_h sum_l sum_p A_hlp(x_n) (W_v V_l)_h (r_n + offset_hlp(x_n) / (w_l, h_l))``

    with A a softmax over the L * P points and bilinear samples, zero beyond the border. Offsets and weights are linear
    in the query, so the work is N * L * P, whatever the size of the maps.

    Maps to read: ``context`` (B, H', W', C') is one level; several levels travel flat, (B, M, C'), with
    ``context_layout``; without a context the tokens of ``x`` are read, as one image or as the levels of ``layout``.
    Reference points: with ``reference="grid"`` the pixel centre of every query on its own level; with
    ``reference="learned"`` the sigmoid of a linear map of the query; with ``reference="carried"`` none but those handed
    over as ``carry``, which every mode takes: (B, *grid, 2), (B, *grid, L, 2) or boxes (x, y, width, height)
    (B, *grid, L, 4), with which offsets count in halves of the box divided by P. With A anchors the carry is
    (B, *grid, A, 2), several points of a query on every level, to which its P points are dealt in turn.
    ``returns=("carry",)`` hands them on.

    Differs from the code of MMCV: no residual connection and no dropout inside; ``context_valid`` plays the part of
    ``key_padding_mask``. Positional encodings are added to ``x`` outside, with ``context`` without them.

    Args:
        dim: width of queries and outputs.
        num_heads: heads.
        num_levels: feature maps.
        num_points: samples per query, head and level.
        context_dim: width of the maps; ``dim`` by default.
        context_layout: the levels of a flat context.
        reference: ``"grid"`` for queries that are pixels, ``"learned"`` for object queries that read a context,
            ``"carried"`` for queries that come with their points.
        value_ratio: width of the values over ``dim``.
        num_anchors: reference points of a query, A; must divide ``num_points``.
        out_proj: apply ``W_o``; BEVFormer's has it behind the sum over cameras.

    Reference: Zhu et al., 2021, arXiv 2010.04159, eq. 2-3.

    >>> import torch
    >>> DeformableAttention(dim=8, num_heads=2)(torch.randn(2, 5, 6, 8), torch.randn(2, 3, 3, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross", "causal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        layout=True,
        carries=True,
        work={"N": 1},
        memory={"N": 1},
    )
    axes = 2

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_levels: int = 1,
        num_points: int = 4,
        context_dim: int | None = None,
        context_layout: Layout | None = None,
        reference: str = "grid",
        value_ratio: float = 1.0,
        num_anchors: int = 1,
        out_proj: bool = True,
    ):
        super().__init__(dim, context_dim)
        check_choice("reference", reference, ("grid", "learned", "carried"))
        if num_anchors < 1 or num_points % num_anchors:
            raise ValueError(f"num_points={num_points} must be a multiple of num_anchors={num_anchors}")
        self.num_anchors = num_anchors
        if num_levels < 1 or num_points < 1:
            raise ValueError(f"num_levels and num_points must be at least 1, got {num_levels} and {num_points}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.reference_mode = reference
        self.context_layout = context_layout
        self.levels = None if context_layout is None else image_levels(context_layout, "context_layout")
        if self.levels is not None and len(self.levels) != num_levels:
            raise ValueError(f"context_layout has {len(self.levels)} levels, but num_levels={num_levels}")
        width = int(dim * value_ratio)
        if not width:
            raise ValueError(f"value_ratio={value_ratio} leaves no channel of dim={dim}")
        head_dim_of(width, num_heads)
        per_level = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, per_level * 2)
        self.attention_weights = nn.Linear(dim, per_level)
        self.value_proj = nn.Linear(self._feature_dim(), width)
        if not out_proj and width != dim:
            raise ValueError(
                f"value_ratio={value_ratio} gives outputs of width {width}; out_proj=False needs dim={dim}"
            )
        self.output_proj = nn.Linear(width, dim) if out_proj else nn.Identity()
        self.reference = nn.Linear(dim, self._reference_width()) if reference == "learned" else None
        self.reset_parameters()

    def _feature_dim(self) -> int:
        return self.context_dim

    def _reference_width(self) -> int:
        return 2 * self.num_anchors

    def _spread(self, direction: Tensor) -> Tensor:
        """Offset biases: point p of a head starts p + 1 pixels out in the head's direction; (H * L * P * n,)."""
        steps = torch.arange(1, self.num_points + 1, dtype=direction.dtype)
        spread = direction[:, None, None, :] * steps[None, None, :, None]
        return spread.expand(-1, self.num_levels, -1, -1).reshape(-1)

    def reset_parameters(self) -> None:
        """Offsets start as rays around the reference point, weights as uniform, whatever the query."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        rays = directions(self.num_heads)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(self._spread(rays / rays.abs().amax(-1, keepdim=True)))
        for projection in (self.value_proj, self.output_proj):
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    @property
    def traits(self) -> Traits:
        if self.reference_mode != "grid":  # queries stand anywhere, so that they are no map to read
            patterns = frozenset({"noncausal-cross", "causal-cross"})
            return self.class_traits.but(patterns=patterns, layout=False)
        patterns = frozenset({"noncausal-cross"})
        if self.context_dim == self.dim and self.context_layout is None:
            patterns |= {"noncausal-self"}
        return self.class_traits.but(patterns=patterns, grid_ranks=frozenset({2}))

    # ---- what to read, and where

    def _source(self, x: Tensor, context: Tensor | None, layout: Layout | None) -> tuple[Tensor, Shapes]:
        """(B, M, C') tokens of all levels, and their shapes."""
        if context is None:
            context = x
            levels = [tuple(x.shape[1:3])] if layout is None else image_levels(layout, "layout")
        elif self.levels is not None:
            if context.dim() != 3:
                raise ValueError(f"context must be flat (B, M, C') with a context_layout, got {tuple(context.shape)}")
            assert self.context_layout is not None
            self.context_layout.check(context.shape[1], "context")
            levels = self.levels
        else:
            if context.dim() != 4:
                raise ValueError(
                    f"context must have shape (B, H', W', C') unless the module has a context_layout, "
                    f"got {tuple(context.shape)}"
                )
            levels = [tuple(context.shape[1:3])]
        if len(levels) != self.num_levels:
            raise ValueError(f"there are {len(levels)} feature maps to read, but num_levels={self.num_levels}")
        return context.flatten(1, -2), [(h, w) for h, w in levels]

    def _default_reference(self, x: Tensor, layout: Layout | None) -> Tensor:
        """(B, N, r) reference points when none were carried in."""
        if self.reference_mode == "carried":
            raise ValueError(
                f"reference='carried' needs reference points of the queries as carry, (B, *grid, {self.axes})"
            )
        if self.reference is not None:
            points = self.reference(x.flatten(1, -2))
            return points.to(stats_dtype(points.dtype)).sigmoid()  # half precision would miss a pixel by a fraction
        grids = [tuple(x.shape[1:-1])] if layout is None else [layout.grid(n) for n in layout.names]
        if any(len(g) != self.axes for g in grids):
            raise ValueError(f"reference='grid' needs queries on grids of rank {self.axes}, got {grids}")
        return torch.cat([centres(g, x) for g in grids]).expand(x.shape[0], -1, -1)

    def _carried(self, carry: Any, x: Tensor) -> Tensor:
        """(B, N, L or 1 or A, 2 or 4) from what was carried in."""
        if not isinstance(carry, Tensor):
            raise TypeError(f"carry must be a tensor of reference points, got {type(carry).__name__}")
        lead = tuple(x.shape[:-1])
        tail = tuple(carry.shape[len(lead) :])
        several, count = self.num_anchors > 1, self.num_anchors
        possible = [(2,), (count if several else 1, 2)]
        if not several:
            possible += [(4,), (1, 4), (self.num_levels, 2), (self.num_levels, 4)]
        if tuple(carry.shape[: len(lead)]) != lead or tail not in possible:
            what = f"{lead} + (2,) or ({count}, 2)"
            if not several:
                what = f"{lead} + (2,) or (4,), or one per level ({self.num_levels}) of them"
            raise ValueError(f"carry must hold reference points {what}, got {tuple(carry.shape)}")
        points = carry.flatten(1, len(lead) - 1)
        return points if points.dim() == 4 else points.unsqueeze(2)

    def _per_point(self, values: Tensor, *tail: int) -> Tensor:
        """(B, N, H * L * P * n) -> (B, H, N, L, P, n)."""
        return values.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, *tail)).transpose(1, 2)

    def _weights(self, queries: Tensor) -> Tensor:
        """(B, H, N, L, P), a softmax over all points of a head."""
        logits = self._per_point(self.attention_weights(queries))
        return logits.flatten(-2).softmax(-1).view(logits.shape)

    def mix(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        carry: Any = None,
    ) -> Output:
        queries = x.flatten(1, -2)
        source, shapes = self._source(x, context, layout)
        exists = flat_valid(valid if context is None else context_valid)
        reference = self._default_reference(x, layout) if carry is None else carry
        if carry is None:  # (B, N, A r) from a linear map, or (B, N, 2)
            points = reference.unflatten(-1, (-1, 2))
        else:
            points = self._carried(carry, x)
        offsets = self._per_point(self.sampling_offsets(queries), 2)
        base = points[..., :2].unsqueeze(1).unsqueeze(-2)  # (B, 1, N, L or 1, 1, 2)
        if self.num_anchors > 1 and points.shape[2] > 1:  # point p belongs to anchor p % A: (B, 1, N, 1, P, 2)
            base = points.repeat(1, 1, self.num_points // self.num_anchors, 1)[:, None, :, None]
        if points.shape[-1] == 4:
            box = points[..., 2:].unsqueeze(1).unsqueeze(-2)
            locations = base + offsets / self.num_points * box * 0.5
        else:
            sizes = torch.stack([torch.stack([base.new_full((), w), base.new_full((), h)]) for h, w in shapes])
            locations = base + offsets / sizes[:, None]
        value = split_heads(self.value_proj(source), self.num_heads)
        out = deformable_attention(value, shapes, locations, self._weights(queries), valid=exists)
        y = self.output_proj(merge_heads(out, x.shape[1:-1]))
        if carry is None:
            handed = points if self.num_anchors > 1 and points.shape[2] > 1 else reference
            return Output(y, carry=handed.unflatten(1, x.shape[1:-1]))
        return Output(y, carry=carry)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From MMCV's ``MultiScaleDeformableAttention``, Deformable DETR's ``MSDeformAttn`` or BEVFormer's
        ``MSDeformableAttention3D`` (without output projection); the names agree.
        """
        theirs = Released(state_dict, "MultiScaleDeformableAttention, MSDeformAttn or MSDeformableAttention3D")
        names = r"(sampling_offsets|attention_weights|value_proj|output_proj)\.(weight|bias)"
        return theirs.close(theirs.renamed({names: r"\1.\2"}))
