"""Hierarchical interactive attention: two modalities and what a segmenter knows read each other, at a linear cost.

Liu et al., 2023, "Multi-interactive Feature Learning and a Full-time Multi-modality Benchmark for Image Fusion and
Segmentation", arXiv 2308.02097. For the modalities ``x_1, x_2`` and semantic features ``s``, tokens of one grid:

    ``(y_i, u_i) = relu(P_i x_i)``, ``(y_s, u_s) = relu(P_s s)``,
    ``z_i = y_s ctx(y_i)``,         ``v_i = u_i ctx(u_s)``,
    ``x_i <- LN(x_i + E_i [z_i, v_i])``,

where ``ctx(t)`` is the map of :func:`attnlib.ops.context_attention` of keys and values ``K t`` and ``V t``; queries are
not projected. ``z`` asks with semantics (SoAM), ``v`` with the modality (MoAM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_valid, describe
from ...ops import context_attention
from ...types import check_divides
from ..base import Fusion
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, zero_invalid
from ..released import Released, Rule

BRANCHES = ("both", "soam", "moam")


class HierarchicalInteraction(Fusion):
    """Two streams on one grid, and semantic features of that grid, to two streams.

    Args:
        dim: width of all three.
        num_heads: heads of the small maps.
        reduction: ``dim / reduction`` is the width inside.
        qkv_bias: bias of keys and values.
        branches: ``"both"``, or one of them: ``"soam"`` (semantics ask) and ``"moam"`` (modalities ask).

    Shapes: (B, *grid, dim) each -> a pair of (B, *grid, dim). Absent tokens are no part of any map and come out as
    zeros.

    Raises:
        ValueError: streams or semantics of other widths or grids.

    Differs from the authors' ``FeatureFusionModule``: with one branch, the half of the projections that feeds the other
    is not there; the converter leaves it out. 66,304 parameters at 64 channels, as theirs.

    >>> layer = HierarchicalInteraction(16, num_heads=4)
    >>> [y.shape for y in layer(*torch.randn(2, 2, 5, 6, 16), semantic=torch.randn(2, 5, 6, 16))]
    [torch.Size([2, 5, 6, 16]), torch.Size([2, 5, 6, 16])]
    """

    slug = "segmif-him"

    def __init__(
        self, dim: int, num_heads: int = 8, reduction: int = 1, qkv_bias: bool = False, branches: str = "both"
    ):
        super().__init__()
        check_int("dim", dim, least=1)
        check_int("reduction", reduction, least=1)
        check_divides("reduction", reduction, "dim", dim)
        check_choice("branches", branches, BRANCHES)
        check_flag("qkv_bias", qkv_bias)
        self.dim, self.inner, self.num_heads, self.branches = dim, dim // reduction, num_heads, branches
        head_dim_of(self.inner, num_heads)
        width, both = self.inner, branches == "both"
        self.proj = nn.ModuleList(nn.Linear(dim, width * (1 + both)) for _ in range(3))
        self.modal_kv = nn.ModuleList(
            nn.Linear(width, 2 * width, bias=qkv_bias) for _ in range(2 * (branches != "moam"))
        )
        self.semantic_kv = nn.Linear(width, 2 * width, bias=qkv_bias) if branches != "soam" else None
        self.out = nn.ModuleList(nn.Linear(width * (1 + both), dim) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _read(self, q: Tensor, source: Tensor, kv: nn.Module, valid: Tensor | None) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in (q, *kv(source).chunk(2, -1)))
        return merge_heads(context_attention(q, k, v, valid=flat_valid(valid)))

    def forward(  # type: ignore[override]
        self, *streams: Tensor, semantic: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Both streams.

        Args:
            streams: two of (B, *grid, dim).
            semantic: (B, *grid, dim).
            valid: (B, *grid) boolean, which tokens exist, of all three.
        """
        self._check(streams, semantic)
        check_valid("valid", valid, semantic.shape[:-1])
        given = [zero_invalid(t, valid) for t in (*streams, semantic)]
        grid = semantic.shape[1:-1]
        made = [f(t).relu().flatten(1, -2) for f, t in zip(self.proj, given, strict=True)]
        own, known = made[:2], made[2]
        parts: list[list[Tensor]] = [[], []]
        for i, kv in enumerate(self.modal_kv):
            parts[i].append(self._read(known[..., : self.inner], own[i][..., : self.inner], kv, valid))
        if self.semantic_kv is not None:
            for i in range(2):
                asks, told = own[i][..., -self.inner :], known[..., -self.inner :]
                parts[i].append(self._read(asks, told, self.semantic_kv, valid))
        out = []
        for x, part, proj, norm in zip(given[:2], parts, self.out, self.norm, strict=True):
            y = proj(torch.cat(part, -1)).unflatten(1, grid)
            out.append(zero_invalid(norm(x + y), valid))
        return tuple(out)

    def _check(self, streams: Sequence[Tensor], semantic: Tensor) -> None:
        named = {f"stream {i}": t for i, t in enumerate(streams)} | {"semantic": semantic}
        for name, t in named.items():
            if not isinstance(t, Tensor) or t.dim() < 3 or t.shape[-1] != self.dim or not t.is_floating_point():
                raise ValueError(f"{name} must be (B, *grid, {self.dim}) of floating point, got {describe(t)}")
        shapes = {name: tuple(t.shape[:-1]) for name, t in named.items()}
        if len(streams) != 2 or len(set(shapes.values())) != 1:
            raise ValueError(f"two streams and semantic must have one batch and grid, got {shapes}; resize them first")

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], branches: str = "both") -> dict[str, Tensor]:
        """From the authors' ``FeatureFusionModule``, ``_SoAM`` or ``_MoAM``."""
        check_choice("branches", branches, BRANCHES)
        theirs = Released(state_dict, "the authors' FeatureFusionModule")

        def half(match: object, value: Tensor) -> dict[str, Tensor]:
            name = f"proj.{int(match[1]) - 1}.{match[2]}"  # type: ignore[index]
            first, second = value.chunk(2, 0)
            return {name: {"both": value, "soam": first, "moam": second}[branches]}

        def number(into: str) -> Rule:
            return lambda m, value: {into.format(int(m[1]) - 1, m[2]): value}

        return theirs.close(
            theirs.renamed(
                {
                    r"cross\.channel_proj(\d)\.(weight|bias)": half,
                    r"cross\.cross_attn2\.kv(\d)\.(weight|bias)": number("modal_kv.{}.{}"),
                    r"cross\.cross_attn\.kv3\.(weight|bias)": r"semantic_kv.\1",
                    r"cross\.end_proj(\d)\.(weight|bias)": number("out.{}.{}"),
                    r"cross\.norm(\d)\.(weight|bias)": number("norm.{}.{}"),
                }
            )
        )
