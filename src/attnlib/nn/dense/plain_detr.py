"""Cross attention of object queries to every pixel, biased by where a query's box lies (BoxRPB).

Lin et al., 2023, "DETR Doesn't Need Multi-Scale or Locality Design", arXiv 2308.01904, section 4. A query with the box
(x1, y1, x2, y2), in pixels, reads the pixel of row r and column c with

    score = q . k / sqrt(D) + MLP_x(x1 - p_c, x2 - p_c) + MLP_y(y1 - p_r, y2 - p_r),    p_i = (i + 1/2) stride,

so that the bias needs one small MLP per axis and is never made for pairs of pixels and corners.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, check_valid, describe
from ...ops.attention import attention
from ...positions import AxisBias
from ..layers import computes_in, flat_valid, head_dim_of, merge_heads, split_heads
from ..released import Released

#: How displacements in pixels enter the MLPs: as they are, or ``sign(t) log2(|t| + 1) / 3``.
SCALES = ("linear", "log")

#: What the authors add to scores of padding.
PADDING = -100.0


class BoxAttention(nn.Module):
    """``y = W_o softmax(scores) v`` with the scores above.

    Args:
        dim: width of queries and of the map.
        num_heads: heads; must divide ``dim``.
        hidden: width of the MLPs of the bias; 0 for no bias.
        distance: ``"linear"`` or ``"log"`` (the authors' ``abs_log8``).
        stride: pixels per token of the map.
        qkv_bias: bias of the query, key and value projections.
        attn_drop: dropout of attention weights in training.
        compat: ``"authors"`` adds -100 to scores of padding, which keeps a tiny weight, instead of leaving it out.

    >>> boxes = torch.tensor([[[0.0, 0.0, 8.0, 16.0], [4.0, 4.0, 9.0, 9.0]]])
    >>> BoxAttention(dim=16, num_heads=2, stride=8)(torch.randn(1, 2, 16), boxes, torch.randn(1, 4, 5, 16)).shape
    torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        hidden: int = 512,
        distance: str = "linear",
        stride: int = 16,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__()
        check_int("dim", dim, least=1)
        self.head_dim = head_dim_of(dim, num_heads)
        self.num_heads = num_heads
        check_choice("distance", distance, SCALES)
        check_choice("compat", compat, (None, "authors"))
        self.distance, self.compat = distance, compat
        self.stride = check_int("stride", stride, least=1)
        self.attn_drop = check_real("attn_drop", attn_drop, least=0, below=1)
        self.bias_x: nn.Sequential | None = None
        self.bias_y: nn.Sequential | None = None
        if check_int("hidden", hidden, least=0):
            self.bias_x, self.bias_y = (
                nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False))
                for _ in range(2)
            )
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def axis_bias(self, boxes: Tensor, grid: tuple[int, int]) -> AxisBias | None:
        """The bias of boxes (B, Q, 4) on a map of so many rows and columns, by axis; ``None`` without one."""
        if self.bias_x is None or self.bias_y is None:
            return None
        factors = []
        for first, size, mlp in ((1, grid[0], self.bias_y), (0, grid[1], self.bias_x)):
            places = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) * self.stride
            gap = boxes[..., first::2].unsqueeze(2) - places.view(1, 1, -1, 1)  # (B, Q, size, 2)
            if self.distance == "log":
                gap = gap.sign() * (gap.abs() + 1).log2() / math.log2(8)
            factors.append(mlp(gap.to(computes_in(self.q))).permute(0, 3, 1, 2))
        return AxisBias(factors)

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        context: Tensor,
        positions: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, C), their position added -> (B, Q, C).

        Args:
            x: queries.
            boxes: (B, Q, 4): x1, y1, x2, y2 in pixels; no gradient is stopped here.
            context: (B, h, w, C), the map.
            positions: (B or 1, h, w, C), added to what keys are made of, not to values.
            context_valid: (B, h, w) boolean, which of its tokens exist.

        Raises:
            ValueError: shapes that do not fit; a box whose second corner lies before its first.
        """
        if context.dim() != 4 or x.dim() != 3:
            raise ValueError(f"x must be (B, Q, C) and context (B, h, w, C), got {describe(x)} and {describe(context)}")
        if tuple(boxes.shape) != (*x.shape[:2], 4):
            raise ValueError(f"boxes must be {(*x.shape[:2], 4)}: four numbers for every query, got {describe(boxes)}")
        check_boxes("boxes", boxes)
        grid = (context.shape[1], context.shape[2])
        check_valid("context_valid", context_valid, (context.shape[0], *grid))
        flat = context.flatten(1, 2)
        keys = flat if positions is None else (context + positions).flatten(1, 2)
        q, k, v = (split_heads(m(t), self.num_heads) for m, t in ((self.q, x), (self.k, keys), (self.v, flat)))
        bias = self.axis_bias(boxes, grid)
        valid = flat_valid(context_valid)
        drop = self.attn_drop if self.training else 0.0
        if self.compat == "authors" and valid is not None:
            padding = PADDING * (~valid)[:, None, None].to(q.dtype)
            out = attention(q, k, v, bias=padding if bias is None else bias.dense() + padding, dropout_p=drop)
        else:
            out = attention(q, k, v, bias=bias, valid=valid, dropout_p=drop)
        return self.proj(merge_heads(out))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``GlobalCrossAttention``, with the bias or, of their ``global_ape`` decoder, without."""
        theirs = Released(state_dict, "Plain-DETR's GlobalCrossAttention")
        return theirs.close(
            theirs.renamed(
                {
                    r"cpb_mlp1\.([02]\.(?:weight|bias))": r"bias_x.\1",
                    r"cpb_mlp2\.([02]\.(?:weight|bias))": r"bias_y.\1",
                    r"(q|k|v|proj)\.(weight|bias)": r"\1.\2",
                }
            )
        )


def check_boxes(name: str, boxes: Tensor) -> Tensor:
    """(..., 4) corners x1, y1, x2, y2 as they are.

    Raises:
        ValueError: not four numbers, or a box that is turned over.
    """
    if boxes.dim() < 1 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"{name} must be (..., 4) floating point: x1, y1, x2, y2, got {describe(boxes)}")
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling() and boxes.numel():
        wrong = (boxes[..., 2:] < boxes[..., :2]).any(-1)
        if bool(wrong.any()):
            raise ValueError(
                f"{name} holds {boxes[wrong][0].tolist()}, whose second corner lies before its first; give x1, y1, "
                "x2, y2"
            )
    return boxes
