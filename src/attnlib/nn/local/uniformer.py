"""Local relation aggregation: attention whose map is learned per channel and distance, and does not read the tokens.

Li et al., 2022, "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning", arXiv
2201.04676, the local form of its MHRA. It is what UniFormer's first stages have in the place of attention; the global
form is :class:`attnlib.nn.dense.softmax_attention.SoftmaxAttention`.

Differs from the authors' code: one class for images, clips and sequences; tokens outside ``valid`` are zero before the
convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...checks import check_choice, check_int, check_ints, to_tuple
from ...types import Traits
from ..base import Mechanism
from ..layers import DepthwiseConv, zero_invalid
from ..registry import register
from ..released import Released, Rule


@register("uniformer", "local-mhra")
class LocalRelation(Mechanism):
    """``y_i = U sum_j a(j - i) * (V x_j)`` over the tokens ``j`` of a window around ``i``, every channel a head.

    ``a`` is learned for each channel and each of ``kernel_size`` offsets per axis: a depthwise convolution between two
    linear maps, with no activation among them. Linear in the tokens.

    Args:
        dim: width.
        kernel_size: tokens of the window, odd: one number, or one per axis; (3, 1, 1) looks along time alone.
        grid_rank: axes of the grid.
        hidden: channels of the convolution; ``dim`` by default.

    Raises:
        ValueError: an even kernel.

    Reference: Li et al., 2022, arXiv 2201.04676, section 3.3.

    >>> import torch
    >>> LocalRelation(dim=6, grid_rank=3)(torch.randn(2, 3, 5, 4, 6)).shape
    torch.Size([2, 3, 5, 4, 6])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({1, 2, 3}), work={"N": 1}, memory={"N": 1}
    )

    def __init__(self, dim: int, kernel_size: int | Sequence[int] = 5, grid_rank: int = 2, hidden: int | None = None):
        super().__init__(dim)
        check_choice("grid_rank", grid_rank, (1, 2, 3))
        sides = check_ints("kernel_size", to_tuple("kernel_size", kernel_size, grid_rank), least=1)
        if not all(side % 2 for side in sides):
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.grid_rank = grid_rank
        hidden = dim if hidden is None else check_int("hidden", hidden, least=1)
        self.value, self.proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = DepthwiseConv(hidden, sides, grid_rank)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_ranks=frozenset({self.grid_rank}))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.proj(self.conv(zero_invalid(self.value(x), valid)))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the ``conv1``, ``attn`` and ``conv2`` of the authors' ``CBlock``."""
        theirs = Released(state_dict, "the convolutions of UniFormer's CBlock")
        rules: dict[str, Rule] = {r"attn\.(weight|bias)": r"conv.\1"}
        for name, ours in (("conv1", "value"), ("conv2", "proj")):
            rules[rf"{name}\.(weight|bias)"] = lambda m, t, ours=ours: {  # type: ignore[misc]
                f"{ours}.{m[1]}": t.flatten(1) if t.dim() > 2 else t
            }
        return theirs.close(theirs.renamed(rules))
