"""Focal modulation: context at several reaches is aggregated first, gated per pixel, then multiplied onto the query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.modulation import gated_sum, modulate, pool, pyramid
from ...types import Traits, check_choice
from ..base import Mechanism
from ..layers import DepthwiseConv, through, zero_invalid
from ..registry import register
from ..released import Released, Rule


@register("focalnet", "focal-modulation")
class FocalModulation(Mechanism):
    """Focal modulation: aggregate, then interact.

    ``[q, z_0, g] = W_f x`` of widths C, C and L + 1. The context grows level by level,
    ``z_l = GELU(DW_(k_l) z_(l-1))`` with ``k_l = focal_window + focal_factor (l - 1)`` for l = 1..L, and once more by
    the mean over the grid, ``z_(L+1) = GELU(mean z_L)``. Each pixel weighs the levels by one raw scalar each (no
    activation), ``m = sum_l g_l z_l``, optionally divided by L + 1, and

    ``y = W_o (q * (W_h m))``, with an optional LayerNorm before ``W_o``.

    Shapes: x and y (B, *grid, C), linear in the number of pixels, any grid. Defaults are those of the paper.
    With ``focal_level=0`` only the global mean of ``z_0`` remains, and pixels may be permuted.

    Differs from the authors' code: tokens outside ``valid`` are zero before every convolution and take no part in the
    mean, whereas theirs has no such argument and averages over padding too (identical without ``valid``). Theirs keeps
    the last gates and modulator on the module; here :meth:`modulator` returns them. Even kernels, which break theirs,
    are refused. Grids of rank 1 and 3 follow from the same equations.

    Args:
        dim: width C.
        focal_level: L, number of convolution levels.
        focal_window: k_1, odd.
        focal_factor: growth of the kernel from level to level, even.
        grid_rank: 1, 2 or 3; the rank of the convolutions.
        bias: biases of ``W_f`` and ``W_h``.
        normalize_modulator: divide the sum over levels by L + 1.
        use_postln_in_modulation: LayerNorm before the output projection.
        norm_eps: of that LayerNorm; timm's models have 1e-6.
        proj_drop: dropout of the output.

    Reference: Yang et al., 2022, arXiv 2203.11926, eq. 3-6.

    >>> import torch
    >>> FocalModulation(dim=8)(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(
        self,
        dim: int,
        focal_level: int = 2,
        focal_window: int = 3,
        focal_factor: int = 2,
        grid_rank: int = 2,
        bias: bool = True,
        normalize_modulator: bool = False,
        use_postln_in_modulation: bool = False,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__(dim)
        check_choice("grid_rank", grid_rank, (1, 2, 3))
        if focal_level < 0:
            raise ValueError(f"focal_level must be at least 0, got {focal_level}")
        kernels = [focal_window + focal_factor * level for level in range(focal_level)]
        if any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(
                f"focal_window={focal_window} and focal_factor={focal_factor} give kernels {kernels}; "
                "every kernel must be odd: choose an odd focal_window and an even focal_factor"
            )
        self.focal_level, self.grid_rank, self.normalize_modulator = focal_level, grid_rank, normalize_modulator
        self.kernel_sizes = tuple(kernels)
        self.f = nn.Linear(dim, 2 * dim + focal_level + 1, bias=bias)
        self.h = nn.Linear(dim, dim, bias=bias)
        self.focal_layers = nn.ModuleList(DepthwiseConv(dim, k, rank=grid_rank, bias=False) for k in kernels)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if use_postln_in_modulation else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(
            grid_ranks=frozenset({self.grid_rank}), permutation_equivariant=self.focal_level == 0
        )

    def receptive_fields(self) -> tuple[int, ...]:
        """Reach of each convolution level, ``1 + sum (k_i - 1)``; the level after the last sees everything."""
        return tuple(1 + sum(k - 1 for k in self.kernel_sizes[: i + 1]) for i in range(self.focal_level))

    def _kernels(self) -> list[Tensor]:
        return [cast(Tensor, layer.weight) for layer in self.focal_layers]

    def _parts(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, modulator and gates."""
        query, context, gates = self.f(x).split([self.dim, self.dim, self.focal_level + 1], -1)
        levels = pyramid(context, self._kernels(), activation=F.gelu, valid=valid)
        last = levels[-1] if levels else context
        mixed = gated_sum([*levels, F.gelu(pool(last, valid=valid))], gates)
        if self.normalize_modulator:
            mixed = mixed / (self.focal_level + 1)
        return query, self.h(mixed), gates

    def modulator(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What would act on the query, (B, *grid, C), and the gates, (B, *grid, L + 1), to look at.

        >>> import torch
        >>> [t.shape[-1] for t in FocalModulation(dim=8).modulator(torch.randn(2, 5, 6, 8))]
        [8, 3]
        """
        _, modulator, gates = self._parts(zero_invalid(x, valid), valid)
        return modulator, gates

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        query, modulator, _gates = self._parts(x, valid)
        return through(self.proj_drop, self.proj(self.norm(modulate(query, modulator))))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``FocalModulation``, timm's (1x1 convolutions) or transformers' ``FocalNetModulation``."""
        theirs = Released(state_dict, "the authors', timm's or transformers' FocalModulation")

        def flat(ours: str) -> Rule:
            return lambda match, value: {f"{ours}.weight": value.flatten(1)}

        rules: dict[str, Rule] = {r"focal_layers\.(\d+)\.0\.weight": r"focal_layers.\1.weight"}
        for ours, names in (("f", "f|projection_in"), ("h", "h|projection_context"), ("proj", "proj|projection_out")):
            rules |= {rf"(?:{names})\.weight": flat(ours), rf"(?:{names})\.bias": f"{ours}.bias"}
        return theirs.close(theirs.renamed(rules | {r"(?:ln|norm|layernorm)\.(weight|bias)": r"norm.\1"}))
