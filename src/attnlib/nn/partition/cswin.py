"""Cross-shaped windows of CSWin: half of the heads read vertical stripes of the map, the others horizontal ones.

Dong et al., 2021, "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", arXiv
2107.00652. With stripes of ``s`` columns over the whole height for the first half of the heads, and of ``s`` rows over
the whole width for the second half,

    ``y = W_o [softmax(q_1 k_1^T D^-1/2) v_1 + LePE(v_1), softmax(q_2 k_2^T D^-1/2) v_2 + LePE(v_2)]``

inside every stripe; LePE is a depthwise convolution of the values of a stripe, which sees nothing of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_int
from ...grids import Windows, crop_grid, pad_to_multiple
from ...ops.partition import window_attention
from ...types import Traits, check_choice, check_divides
from ..base import Mechanism
from ..layers import DepthwiseConv, flat_valid, head_dim_of, through, zero_invalid
from ..registry import register
from ..released import Released, Rule


@register("cswin-attention", "cross-shaped-windows")
class CrossShapedAttention(Mechanism):
    """Attention in vertical and horizontal stripes, on images.

    Args:
        dim: width of ``x``.
        num_heads: heads, an even number.
        split_size: width ``s`` of a stripe, in tokens.
        kernel_size: of the depthwise convolution on values, odd; 0 for none.
        qkv_bias: biases of the query, key and value projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        pad: of maps that stripes do not divide: ``"mask"`` adds tokens to the last stripe that nobody attends to,
            ``"refuse"`` raises.

    Reference: Dong et al., 2021, arXiv 2107.00652, section 3.2.

    >>> CrossShapedAttention(dim=16, num_heads=4, split_size=2)(torch.randn(2, 4, 5, 16)).shape
    torch.Size([2, 4, 5, 16])
    """

    zero_is_off = ("kernel_size",)
    # On maps as wide as high, stripes of N^0.5 s tokens; where some do not exist, their score maps are built.
    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 1.5}, memory={"N": 1.5})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        split_size: int = 7,
        kernel_size: int = 3,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("pad", pad, ("mask", "refuse"))
        check_int("split_size", split_size, least=1)
        check_divides("2 (halves)", 2, "num_heads", num_heads)
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is not possible; choose 0 or an odd number")
        self.num_heads, self.head_dim, self.split_size = num_heads, head_dim_of(dim, num_heads), split_size
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop, self.pad = attn_drop, pad
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = nn.ModuleList(DepthwiseConv(dim // 2, kernel_size) for _ in range(2 if kernel_size else 0))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_multiple=1 if self.pad == "mask" else self.split_size)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        height, width = x.shape[1:3]
        parts = self.qkv(x).chunk(3, -1)
        halves = zip(*(part.chunk(2, -1) for part in parts), strict=True)
        out = [
            self._stripes(torch.cat(half, -1), number, stripe, valid)
            for number, (half, stripe) in enumerate(
                zip(halves, ((height, self.split_size), (self.split_size, width)), strict=True)
            )
        ]
        return through(self.proj_drop, self.proj(torch.cat(out, -1)))

    def _stripes(self, qkv: Tensor, number: int, stripe: tuple[int, int], valid: Tensor | None) -> Tensor:
        """(B, H, W, 3 C / 2) -> (B, H, W, C / 2): one half of the heads."""
        grid, heads = tuple(qkv.shape[1:3]), self.num_heads // 2
        if any(n % s for n, s in zip(grid, stripe, strict=True)):
            if self.pad == "refuse":
                raise ValueError(f"split_size={self.split_size} does not divide the grid {grid} of x (pad='refuse')")
            if valid is None:
                valid = torch.ones(qkv.shape[:-1], dtype=torch.bool, device=qkv.device)
            qkv = pad_to_multiple(qkv, stripe)
            valid = pad_to_multiple(valid.unsqueeze(-1), stripe).squeeze(-1)
        windows = Windows(tuple(qkv.shape[1:3]), stripe)
        cut = windows.cut(qkv)  # (B, G, S, 3 C / 2)
        q, k, v = cut.unflatten(-1, (3, heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        out = window_attention(
            q, k, v, windows.grid, stripe, cut=True, valid=flat_valid(valid), scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        out = out.transpose(2, 3).flatten(3)
        if len(self.lepe):
            values = cut[..., -out.shape[-1] :]
            if valid is not None:
                values = zero_invalid(values, windows.cut(valid.unsqueeze(-1)).squeeze(-1))
            lead = values.shape[:2]
            local = self.lepe[number](values.reshape(math.prod(lead), *stripe, out.shape[-1]))
            out = out + local.reshape(*lead, math.prod(stripe), out.shape[-1])
        return crop_grid(windows.join(out), grid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the attention part of the authors' ``CSWinBlock``, whose norms and MLP are left out."""
        theirs = Released(state_dict, "the authors' CSWinBlock")
        theirs.leave(r"(?:norm1|norm2|mlp)\..*", because="parts of the block around the mechanism")
        rules: dict[str, Rule] = {
            r"(qkv|proj)\.(weight|bias)": r"\1.\2",
            r"attns\.(\d+)\.get_v\.(weight|bias)": r"lepe.\1.\2",
        }
        return theirs.close(theirs.renamed(rules))
