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

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_valid, describe
from ...ops import context_attention
from ...types import check_divides, stats_dtype
from ..base import Fusion
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, zero_invalid
from ..released import Released, Rule

BRANCHES = ("both", "soam", "moam")
#: Width up to which the maps of all heads are made and read in one product.
ONE_PRODUCT = 128


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

    def _context(self, source: Tensor, kv: nn.Module, valid: Tensor | None) -> Tensor:
        """The maps of all heads, as blocks of one (B, inner, inner) with zeros around them."""
        k, v = kv(source).chunk(2, -1)
        if valid is not None:
            k = zero_invalid(k, valid)
        dim = self.inner // self.num_heads
        scores = (k.mT @ v).to(stats_dtype(v.dtype)) * dim**-0.5
        head = torch.arange(self.inner, device=v.device) // dim
        return scores.masked_fill(head[:, None] != head, float("-inf")).softmax(1).to(v.dtype)

    def _reader(self, source: Tensor, kv: nn.Module, valid: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What queries (B, N, inner) read of one source.

        Narrow heads are one product of all of them, which is faster than many small ones up to some width.
        """
        if self.inner <= ONE_PRODUCT:
            context = self._context(source, kv, valid)
            return lambda q: q @ context
        k, v = (split_heads(t, self.num_heads) for t in kv(source).chunk(2, -1))
        return lambda q: merge_heads(context_attention(split_heads(q, self.num_heads), k, v, valid=valid))

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
        grid, exists = semantic.shape[1:-1], flat_valid(valid)
        given = [zero_invalid(t, valid).flatten(1, -2).contiguous() for t in (*streams, semantic)]
        made = [f(t).relu() for f, t in zip(self.proj, given, strict=True)]
        # First halves are for semantics that ask, second ones for modalities that do; with one branch all is its.
        asked, asking = zip(*((t.chunk(2, -1) if self.branches == "both" else (t, t)) for t in made), strict=True)
        parts: list[list[Tensor]] = [[], []]
        for part, own, kv in zip(parts, asked, self.modal_kv, strict=False):
            part.append(self._reader(own, kv, exists)(asked[2]))
        if self.semantic_kv is not None:
            reads = self._reader(asking[2], self.semantic_kv, exists)
            for part, own in zip(parts, asking, strict=False):
                part.append(reads(own))
        out = []
        for x, part, proj, norm in zip(given[:2], parts, self.out, self.norm, strict=True):
            y = norm(proj(torch.cat(part, -1)) + x).unflatten(1, grid)
            out.append(zero_invalid(y, valid))
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
