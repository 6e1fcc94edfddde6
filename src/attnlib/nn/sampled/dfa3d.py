"""DFA3D: deformable attention into a feature map lifted by its depth distribution, without building the volume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...grids import Layout
from ...ops.sampled import deformable_attention_3d
from ...types import Output, Traits
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
        reference: ``"learned"`` or ``"grid"``, where none are carried in.

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
    ):
        if depth_bins < 1:
            raise ValueError(f"depth_bins must be at least 1, got {depth_bins}")
        if num_anchors < 1 or num_points % num_anchors:
            raise ValueError(f"num_points={num_points} must be a multiple of num_anchors={num_anchors}")
        self.depth_bins, self.num_anchors = depth_bins, num_anchors
        self.feature_dim = dim if feature_dim is None else feature_dim
        super().__init__(
            dim, num_heads, num_levels, num_points, self.feature_dim + depth_bins, context_layout, reference
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
        """From the authors' ``SpatialCrossAttention_DFA3D``: its projection and its ``deformable_attention``."""
        theirs = Released(state_dict, "SpatialCrossAttention_DFA3D")
        theirs.leave(r"empty_query\.weight", because="queries of a subclass for points that no camera sees")
        names = r"sampling_offsets|sampling_offsets_depth|attention_weights|value_proj|output_proj"
        return theirs.close(theirs.renamed({rf"(?:deformable_attention\.)?({names})\.(weight|bias)": r"\1.\2"}))
