"""DFA3D: deformable attention into a feature map lifted by its depth distribution, without building the volume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...grids import Layout
from ...ops.sampled import deformable_attention_3d
from ...types import Output, Traits, check_choice
from ..layers import flat_valid, merge_heads, split_heads
from ..registry import register
from ..released import Released
from .deformable_attention import DeformableAttention, directions


class DepthCarry(NamedTuple):
    """What :class:`DeformableAttention3D` hands on.

    Args:
        reference: (B, *grid, A, 3) reference points that were used.
        depth_weight: (B, *grid, H) attention weights times the mean depth score of the four corners, summed: how much
            of what the query looked for lies at its depth. It weighs cameras against each other.
    """

    reference: Tensor
    depth_weight: Tensor


@register("dfa3d", "3d-deformable-attention")
class DeformableAttention3D(DeformableAttention):
    """Queries in space read image features at places in the image and at depths.

    The volume ``E[y, x, z] = V[y, x] D[y, x, z]`` lifts features by their depth distribution. For reference points r in
    [0, 1]^3 and offsets linear in the query,

    ``y_n = W_o concat_h sum_l sum_p A_hlp (W_v E_l)_h (r + offset_hlp / (w_l, h_l, Z))``,

    sampled trilinearly with zeros outside, computed as a bilinear sample whose four corners are weighed by their own
    depth scores. Each query may have several reference points (anchors at several heights); its P points are dealt to
    them in turn.

    ``context`` (B, H', W', C' + Z) holds features and, in the last Z channels, the depth distribution, used as it is;
    several levels travel flat with ``context_layout``. Reference points come as ``carry``, (B, *grid, 3) or
    (B, *grid, A, 3), usually from camera geometry, or are the sigmoid of a linear map of the query
    (``reference="learned"``), or the cell centres of a grid of queries of rank 3 (z, y, x)
    (``reference="grid"``). ``returns=("carry",)`` gives a :class:`DepthCarry`.

    Differs from the authors' code: written from the formula (their kernels run on CUDA only); the output projection
    belongs to the module, theirs sits behind the sum over cameras; no residual connection.

    Args:
        dim: width of queries and outputs.
        num_heads: heads.
        num_levels: feature maps.
        num_points: samples per query, head and level; a multiple of ``num_anchors``.
        depth_bins: Z.
        num_anchors: reference points per query, A.
        feature_dim: width C' of the features; ``dim`` by default.
        context_layout: the levels of a flat context.
        reference: ``"learned"`` or ``"grid"``, where none are carried in, or ``"carried"``.
        out_proj: apply ``W_o``; the authors have it behind the sum over cameras.

    Reference: Li et al., 2023, arXiv 2307.12972, eq. 4-7.

    >>> import torch
    >>> m = DeformableAttention3D(dim=8, num_heads=2, depth_bins=4)
    >>> m(torch.randn(2, 7, 8), torch.randn(2, 3, 5, 8 + 4).softmax(-1)).shape
    torch.Size([2, 7, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-cross", "causal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        carries=True,
        work={"N": 1},
        memory={"N": 1},
    )
    axes = 3
    example = {"grid": (3, 4), "context_grid": (4, 3)}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_levels: int = 1,
        num_points: int = 8,
        depth_bins: int = 112,
        num_anchors: int = 1,
        feature_dim: int | None = None,
        context_layout: Layout | None = None,
        reference: str = "learned",
        out_proj: bool = True,
    ):
        if depth_bins < 1:
            raise ValueError(f"depth_bins must be at least 1, got {depth_bins}")
        if num_anchors < 1 or num_points % num_anchors:
            raise ValueError(f"num_points={num_points} must be a multiple of num_anchors={num_anchors}")
        self.depth_bins, self.num_anchors = depth_bins, num_anchors
        self.feature_dim = dim if feature_dim is None else feature_dim
        super().__init__(
            dim, num_heads, num_levels, num_points, self.feature_dim + depth_bins, context_layout, reference,
            num_anchors=num_anchors, out_proj=out_proj,
        )  # fmt: skip
        self.sampling_offsets_depth = nn.Linear(dim, num_heads * num_levels * num_points)
        nn.init.zeros_(self.sampling_offsets_depth.weight)
        with torch.no_grad():
            self.sampling_offsets_depth.bias.copy_(self._spread(directions(num_heads).mean(-1, keepdim=True)))

    def _feature_dim(self) -> int:
        return self.feature_dim

    def _reference_width(self) -> int:
        return 3 * self.num_anchors

    @property
    def traits(self) -> Traits:
        ranks = {3} if self.reference_mode == "grid" else {1, 2, 3}
        return self.class_traits.but(grid_ranks=frozenset(ranks))

    def _anchors(self, x: Tensor, carry: Any) -> Tensor:
        """(B, N, A or 1, 3) reference points."""
        if carry is None:
            points = self._default_reference(x, None)
            return points.unflatten(-1, (points.shape[-1] // 3, 3))
        carry = carry.reference if isinstance(carry, DepthCarry) else carry
        if not isinstance(carry, Tensor):
            raise TypeError(f"carry must be a tensor of reference points or a DepthCarry, got {type(carry).__name__}")
        lead = tuple(x.shape[:-1])
        tail = tuple(carry.shape[len(lead) :])
        if tuple(carry.shape[: len(lead)]) != lead or tail not in ((3,), (1, 3), (self.num_anchors, 3)):
            raise ValueError(
                f"carry must hold reference points {lead} + (3,) or ({self.num_anchors}, 3), got {tuple(carry.shape)}"
            )
        points = carry.flatten(1, len(lead) - 1)
        return points if points.dim() == 4 else points.unsqueeze(2)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        *,
        context_valid: Tensor | None = None,
        carry: Any = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        queries = x.flatten(1, -2)
        source, shapes = self._source(x, context, None)
        features, depth = source.split([self.feature_dim, self.depth_bins], -1)
        anchors = self._anchors(x, carry)
        offsets = torch.cat(
            [
                self._per_point(self.sampling_offsets(queries), 2),
                self._per_point(self.sampling_offsets_depth(queries), 1),
            ],
            -1,
        )
        # (B, 1, N, 1, P, 3): point p belongs to anchor p % A
        base = anchors.repeat(1, 1, self.num_points // anchors.shape[2], 1)[:, None, :, None]
        sizes = torch.stack(
            [torch.stack([base.new_full((), n) for n in (w, h, self.depth_bins)]) for h, w in shapes]
        )  # fmt: skip
        locations = base + offsets / sizes[:, None]
        weights = self._weights(queries)
        out, score = deformable_attention_3d(
            split_heads(self.value_proj(features), self.num_heads), depth.unsqueeze(1), shapes, locations, weights,
            valid=flat_valid(context_valid), return_depth_score=True,
        )  # fmt: skip
        grid = x.shape[1:-1]
        new_carry = None
        if "carry" in returns:
            found = (weights * score.mean(-1)).flatten(3).sum(-1).transpose(1, 2)
            new_carry = DepthCarry(anchors.unflatten(1, grid), found.unflatten(1, grid))
        return Output(self.output_proj(merge_heads(out, grid)), carry=new_carry)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SpatialCrossAttention_DFA3D``, its projection and its ``deformable_attention``.

        The latter alone, ``MSDeformableAttention3D_DFA3D``, fills a layer with ``out_proj=False``.
        """
        theirs = Released(state_dict, "SpatialCrossAttention_DFA3D or MSDeformableAttention3D_DFA3D")
        theirs.leave(r"empty_query\.weight", because="queries of a subclass for points that no camera sees")
        names = r"sampling_offsets|sampling_offsets_depth|attention_weights|value_proj|output_proj"
        return theirs.close(theirs.renamed({rf"(?:deformable_attention\.)?({names})\.(weight|bias)": r"\1.\2"}))


class CameraAttention(nn.Module):
    """Queries in space read several cameras and take the mean over those that see them.

    ``y_n = W_o (sum_v [v sees n] a_v(x_n) / max(number of v that see n, 1))``, where ``a_v`` is deformable attention
    into the maps of camera v, in three dimensions or in two. With ``num_queries``, what lies at no depth of a query is
    filled: ``a_v + mean_h (1 - w_h) e_nh`` with the depth weights ``w`` of :class:`DepthCarry` and learned ``e``.

    Differs from the authors' code: no residual connection and no dropout inside; a query is read in a camera when that
    camera sees it, where theirs asks the first sample of the batch for all (``compat="authors"``).

    Args:
        attention: a :class:`DeformableAttention3D` or :class:`DeformableAttention`, ``out_proj=False``.
        num_queries: queries with learned fillings (the authors' ``use_empty``), which only depth weights call for.
        compat: ``"authors"`` or ``None``.

    Reference: Li et al., 2023, arXiv 2307.12972; Li et al., 2022, arXiv 2203.17270.

    >>> import torch
    >>> read = DeformableAttention3D(8, 2, depth_bins=4, reference="carried", out_proj=False)
    >>> x, maps = torch.randn(2, 5, 8), torch.randn(2, 6, 3, 4, 8 + 4).softmax(-1)
    >>> CameraAttention(read)(x, maps, torch.rand(2, 6, 5, 1, 3), torch.ones(2, 6, 5, 1, dtype=torch.bool)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        attention: DeformableAttention,
        num_queries: int | None = None,
        compat: str | None = None,
    ):
        super().__init__()
        check_choice("compat", compat, (None, "authors"))
        if not isinstance(attention.output_proj, nn.Identity):
            raise ValueError("attention must have out_proj=False: the projection stands behind the sum over cameras")
        if num_queries is not None and not isinstance(attention, DeformableAttention3D):
            raise ValueError(
                f"num_queries={num_queries} needs depth weights: attention must be a DeformableAttention3D"
            )
        self.compat, self.attention = compat, attention
        self.proj = nn.Linear(attention.dim, attention.dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.filling = None
        if num_queries is not None:
            self.filling = nn.Parameter(torch.randn(num_queries * attention.num_heads, attention.dim))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        reference: Tensor,
        seen: Tensor,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        """Mix.

        Args:
            x: (B, N, C) queries.
            context: (B, V, ...) per camera what ``attention`` takes as its context.
            reference: (B, V, N, A, 3), or 2 without depth: the anchors of every query in every camera.
            seen: (B, V, N, A) boolean, which of them lie in the image.
            context_valid: (B, V, ...) boolean, which tokens of the maps exist.

        Returns:
            (B, N, C).
        """
        cameras, few = context.shape[1], (*x.shape[:2], self.attention.num_anchors)
        for name, t, last in (("reference", reference, (self.attention.axes,)), ("seen", seen, ())):
            wanted = (few[0], cameras, *few[1:], *last)
            if t.shape != wanted:
                raise ValueError(f"{name} must have shape {wanted} for this x and context, got {tuple(t.shape)}")
        queries = x.repeat_interleave(cameras, 0)
        there = None if context_valid is None else context_valid.flatten(0, 1)
        returns = () if self.filling is None else ("carry",)
        got = self.attention(
            queries, context.flatten(0, 1), carry=reference.flatten(0, 1), context_valid=there, returns=returns
        )
        if self.filling is not None:
            filling = self.filling.unflatten(0, (-1, self.attention.num_heads))
            if filling.shape[0] != x.shape[1]:
                raise ValueError(f"x has {x.shape[1]} queries, but num_queries={filling.shape[0]}")
            out = cast(Output, got)
            got = out.y + ((1 - out.carry.depth_weight).unsqueeze(-1) * filling).mean(-2)
        some = seen.any(-1)
        read = some[:1] if self.compat == "authors" else some
        total = (cast(Tensor, got).unflatten(0, (-1, cameras)) * read.unsqueeze(-1)).sum(1)
        return self.proj(total / some.sum(1).clamp(min=1).unsqueeze(-1))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SpatialCrossAttention_DFA3D``, or BEVFormer's ``SpatialCrossAttention``."""
        theirs = Released(state_dict, "SpatialCrossAttention_DFA3D or SpatialCrossAttention")
        names = r"sampling_offsets|sampling_offsets_depth|attention_weights|value_proj"
        out = theirs.renamed(
            {
                rf"deformable_attention\.({names})\.(weight|bias)": r"attention.\1.\2",
                r"output_proj\.(weight|bias)": r"proj.\1",
                r"empty_query\.weight": "filling",
            }
        )
        return theirs.close(out)
