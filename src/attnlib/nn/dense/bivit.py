"""BiViT: attention of one bit, whose maps are binarized relative to the largest weight of each row.

He et al., 2022, "BiViT: Extremely Compressed Binary Vision Transformer", arXiv 2211.07091. With signs ``b``:

    q, k, v = b(W^_q x), b(W^_k x), b(W^_v x),      p = softmax(q k^T / sqrt(D)),
    A_ij = 1 if p_ij >= lambda max_j p_ij else 0,   y = W^_o A v,

where the maps W^ are of one bit too (:class:`attnlib.nn.binary.BinaryLinear`) and read signs. Rows of softmax have long
tails, which a threshold that is the same for all rows would lose or keep whole. Gradients pass as if A were softmax.
``normalizer="step"`` is the released baseline: 1 where a score is positive, with gradients where ``|s| < 1``.

Differs from the authors' code: the sign of 0 is 1, so that the output map reads one bit, which ``A v`` is not
(``compat="authors"`` leaves its zeros); scales are multiplied to sums of signs, which are exact, and start at
``mean |W|`` without a first call; biases can be left out, which their argument does not do; dropout acts on the binary
map, where theirs drops scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...checks import check_choice
from ...normalizers import Normalizer, Step, Thresholded
from ...types import Traits
from ..binary import SCALES, BinaryLinear, started
from ..frame import HeadFrame, Notes
from ..registry import register
from ..released import Released, Rule, split_rule


@register("bivit", "softmax-aware-binarization")
class BinaryAttention(HeadFrame[Notes]):
    """Attention of one bit.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        share: lambda, the share of its row's largest weight that a weight needs to be 1.
        normalizer: ``"thresholded"``, or ``"step"``, the baseline, which has no ``share``.
        weight_scale: of the maps, ``"learned"`` or ``"mean"``; the released baseline has ``"mean"``.
        compat: ``"authors"``: the sign of 0 is 0.
        settings: others of :class:`attnlib.nn.frame.HeadFrame`, such as ``causal`` or ``num_kv_heads``.

    Shapes: x and y (B, *grid, C). Cost: O(N^2 C).

    Reference: He et al., 2022, arXiv 2211.07091, section 3.

    >>> import torch
    >>> BinaryAttention(dim=16, num_heads=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    class_traits = HeadFrame.class_traits.but(gradient="surrogate")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        share: float = 0.25,
        normalizer: str = "thresholded",
        weight_scale: str = "learned",
        compat: str | None = None,
        **settings: Any,
    ):
        check_choice("normalizer", normalizer, ("thresholded", "step"))
        check_choice("weight_scale", weight_scale, SCALES)
        made: Normalizer = Thresholded(share) if normalizer == "thresholded" else Step()
        super().__init__(dim, num_heads, normalizer=made, **settings)
        self.compat = compat
        for name in ("q", "k", "v", "proj"):
            plain = getattr(self, name)
            layer = BinaryLinear(
                plain.in_features, plain.out_features, plain.bias is not None, weight_scale, compat=compat,
                binary_output=name != "proj",
            )  # fmt: skip
            setattr(self, name, layer)

    @property
    def traits(self) -> Traits:
        return super().traits.but(gradient="surrogate")

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``BiAttention_SAB`` or ``BiAttention_baseline``."""
        theirs = Released(state_dict, "BiViT's BiAttention")
        rules: dict[str, Rule] = {
            r"qkv\.(weight|bias|scaling_factor)": split_rule("q", "k", "v"),
            r"(proj\.(?:weight|bias|scaling_factor))": r"\1",
        }
        ours = theirs.close(theirs.renamed(rules))
        return started({name.replace("scaling_factor", "scale"): value for name, value in ours.items()})
