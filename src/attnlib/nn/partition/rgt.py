"""Local attention of RGT in rectangular windows: lying ones for half of the heads, standing ones for the other half.

Chen et al., 2023, "Recursive Generalization Transformer for Image Super-Resolution", arXiv 2303.06373, after Chen et
al., 2022, "Cross Aggregation Transformer for Image Restoration", arXiv 2211.13654. With sides ``a`` and ``b`` of a
window, the first half of the heads reads windows of ``a x b`` tokens, the second half windows of ``b x a``:

    ``y = W_o (concat_half softmax(q k^T D^-1/2 + B_half[h, query - key]) v + DWConv_3x3(v))``

``B`` is a dynamic position bias as in CrossFormer, one per half. Every second layer moves both kinds of windows by half
their sides; what the two ends of the map have in one window do not meet.

Differs from the authors' code: tokens that fill the map up to whole windows are nobody's keys; with
``compat="authors"`` they are keys and values of zeros that take part, as in theirs. Sides of a window need not divide
one another: the map is filled up to their common multiple.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_ints
from ...grids import crop_grid
from ...ops.partition import window_attention
from ...positions import dense_window_bias
from ...types import Traits
from ..base import Mechanism
from ..layers import DepthwiseConv, flat_valid, head_dim_of, merge_heads, split_heads, through, zero_invalid
from ..released import Released
from .crossformer import DynamicPositionBias


class RectangularAttention(Mechanism):
    """Attention inside windows of ``a x b`` tokens for half of the heads, of ``b x a`` for the others.

    Args:
        dim: width of ``x``.
        num_heads: heads, an even number that divides ``dim``.
        split_size: the two sides of a window.
        shift: windows are moved by half their sides.
        qkv_bias: bias of the query, key and value projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        compat: ``"authors"``: what fills the map up are keys and values of zeros that take part.

    Shapes: x and y (B, H, W, C).

    Reference: Chen et al., 2023, arXiv 2303.06373, section 3.1.

    >>> RectangularAttention(dim=96, num_heads=6, split_size=(2, 4))(torch.randn(1, 8, 5, 96)).shape
    torch.Size([1, 8, 5, 96])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1})

    table: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        split_size: Sequence[int] = (8, 32),
        shift: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        self.head_dim = head_dim_of(dim, num_heads)
        check_divides("2 (halves)", 2, "num_heads", num_heads)
        self.split_size = check_ints("split_size", split_size, least=1)
        if len(self.split_size) != 2:
            raise ValueError(f"split_size={tuple(split_size)} must be the two sides of a window")
        self.shift = check_flag("shift", shift)
        self.num_heads, self.compat, self.attn_drop = num_heads, compat, attn_drop
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rel_bias: nn.ModuleList | None = nn.ModuleList(
            DynamicPositionBias(num_heads // 2, max(1, dim // 32)) for _ in range(2)
        )
        self.register_buffer("table", None)
        self.local = DepthwiseConv(dim, 3)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _sizes(self) -> list[tuple[int, int]]:
        a, b = self.split_size
        return [(a, b), (b, a)]

    def _bias(self, half: int) -> Tensor:
        """(heads / 2, S, S) inside a window of one half."""
        if self.table is not None:
            return self.table[half]
        assert self.rel_bias is not None
        size = self._sizes()[half]
        return dense_window_bias(self.rel_bias[half](size), size)

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """The same with the values of its biases laid out once."""
        out = copy.deepcopy(self).eval()
        if out.rel_bias is not None:
            out.table = torch.stack([out._bias(0), out._bias(1)])
            out.rel_bias = None
        return out

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        grid = tuple(x.shape[1:-1])
        qkv = self.qkv(x)
        local = self.local(zero_invalid(qkv[..., 2 * self.dim :], valid))
        step = math.lcm(*self.split_size)
        more = [-n % step for n in grid]
        full = tuple(n + m for n, m in zip(grid, more, strict=True))
        if any(more):
            pads = [0, more[1], 0, more[0]]
            if valid is None and self.compat is None:
                valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            qkv = F.pad(qkv, [0, 0, *pads])
            valid = None if valid is None else F.pad(valid, pads, value=self.compat is not None)
        q, k, v = (split_heads(t, self.num_heads) for t in qkv.chunk(3, -1))
        outs = []
        for half, size in enumerate(self._sizes()):
            heads = slice(half * self.num_heads // 2, (half + 1) * self.num_heads // 2)
            out = window_attention(
                q[:, heads], k[:, heads], v[:, heads], full, size, shift=[n // 2 for n in size] if self.shift else 0,
                valid=flat_valid(valid), bias=self._bias(half), scale=self.scale,
                dropout_p=self.attn_drop if self.training else 0.0,
            )  # fmt: skip
            outs.append(merge_heads(out, full))
        y = crop_grid(torch.cat(outs, -1), grid)
        return through(self.proj_drop, self.proj(y + local))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``L_SA``."""
        theirs = Released(state_dict, "the authors' L_SA")
        theirs.leave(r"attn_mask_[01]|attns\.[01]\.(rpe_biases|relative_position_index)", because="constants")
        return theirs.close(
            theirs.renamed(
                {
                    r"(qkv|proj)\.(weight|bias)": r"\1.\2",
                    r"get_v\.(weight|bias)": r"local.\1",
                    r"attns\.([01])\.pos\.pos_proj\.(weight|bias)": r"rel_bias.\1.fc0.\2",
                    r"attns\.([01])\.pos\.pos([123])\.0\.(weight|bias)": r"rel_bias.\1.norm\2.\3",
                    r"attns\.([01])\.pos\.pos([123])\.2\.(weight|bias)": r"rel_bias.\1.fc\2.\3",
                }
            )
        )
