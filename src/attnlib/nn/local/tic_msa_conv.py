"""MSA-Conv of TiC: self-attention that goes over the map as a convolution does, then a convolution of what it gives.

Zhang et al., 2023, "TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134. Every token attends to the
``k x k`` tokens around it, ``r`` apart, in a map with zeros around it:

    ``o = softmax_p(q . k(p) C^-1/2) v(p)``,  ``y = ReLU(conv_k(o + x))``

Keys beyond the border are zeros, with a score of 0 and a value of 0: they take their share, and ``o`` moves with the
image as a convolution does, without an encoding of places. The second convolution is the MLP; the dilation is that of
attention alone.

With ``shift``, a quarter of the heads reads the map as it is, the others read it rolled around along its rows, along
its columns, and along both, so that a small kernel links distant tokens (the paper's multi-directional cyclic shifts,
of which the release has no code: directions and distance are our reading).

Differs from the authors' code, a CUDA extension: any device, by the library's neighborhood attention; several heads,
where theirs has one; ``border="mask"`` leaves out what lies beyond the border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_int, check_ints, check_real, to_tuple
from ...ops.neighborhood import neighborhood_attention
from ...types import Traits
from ..base import Mechanism
from ..layers import conv_any_size, head_dim_of, merge_heads, split_heads, strided_valid, zero_invalid
from ..registry import register
from ..released import Released, Rule

BORDERS = ("zeros", "mask")

#: How many times the shift the heads of each group read away from themselves, down and to the right.
DIRECTIONS = ((0, 0), (0, 1), (1, 0), (1, 1))


@register("tic-msa-conv", "msa-conv", "tic")
class MSAConv(Mechanism):
    """Attention to the tokens under a kernel, and a convolution behind it, on images.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``. The authors' class has one.
        kernel_size: sides of the kernel, odd, of attention and of the convolution.
        dilation: how far apart the tokens under the kernel of attention lie.
        conv: ``ReLU(conv(o + x))`` behind attention; without it ``o`` alone.
        border: what lies beyond the border: ``"zeros"`` that take part, as theirs, or ``"mask"``, nothing.
        qkv_bias: bias of the query, key and value projections.
        conv_bias: bias of the convolution.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training; the authors' default is 0.1.
        shift: how far the map is rolled for three quarters of the heads: a number of tokens, or a float below 1, a
            share of the sides of the map; 0 for none. Heads are a multiple of 4 then.
        out_dim: width of the output; ``dim`` by default, and any other for use inside another module only.

    Reference: Zhang et al., 2023, arXiv 2310.04134.

    >>> import torch
    >>> MSAConv(dim=8, num_heads=2, kernel_size=3, dilation=2)(torch.randn(2, 6, 5, 8)).shape
    torch.Size([2, 6, 5, 8])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        conv: bool = True,
        border: str = "zeros",
        qkv_bias: bool = True,
        conv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        shift: float = 0,
        out_dim: int | None = None,
    ):
        super().__init__(dim)
        check_choice("border", border, BORDERS)
        self.kernel_size = check_ints("kernel_size", to_tuple("kernel_size", kernel_size, 2), least=1)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size={kernel_size} is not possible; choose odd numbers")
        self.dilation = check_ints("dilation", to_tuple("dilation", dilation, 2), least=1)
        self.border, self.num_heads, self.attn_drop = border, num_heads, attn_drop
        self.shift = check_real("shift", shift, least=0, below=1) if isinstance(shift, float) else shift
        if not isinstance(shift, float):
            check_int("shift", shift, least=0)
        if shift:
            check_divides("directions of the shift", len(DIRECTIONS), "num_heads", num_heads)
        self.reads_length = bool(shift)
        self.scale = head_dim_of(dim, num_heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        width = dim if out_dim is None else out_dim
        if not check_flag("conv", conv) and width != dim:
            raise ValueError(f"out_dim={out_dim} needs conv=True; attention alone gives dim={dim}")
        h, w = self.kernel_size
        self.conv = nn.Conv2d(dim, width, (h, w), padding=(h // 2, w // 2), bias=conv_bias) if conv else None

    def attend(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> the same: attention alone."""
        grid = (x.shape[1], x.shape[2])
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.border == "zeros":  # what does not exist is as what lies beyond the border
            k, v = zero_invalid(k, valid), zero_invalid(v, valid)
        masked = valid if self.border == "mask" else None
        if not self.shift:
            return self._read(q, k, v, masked)
        steps = [(-down * self._step(grid[0]), -right * self._step(grid[1])) for down, right in DIRECTIONS]
        parts = list(zip(*(t.chunk(len(steps), -1) for t in (q, k, v)), strict=True))
        if masked is not None:  # which tokens exist differs from group to group
            return torch.cat(
                [
                    self._read(own, *(t.roll(by, (1, 2)) for t in (key, value, masked)))
                    for (own, key, value), by in zip(parts, steps, strict=True)
                ],
                -1,
            )
        k, v = (
            torch.cat([part[at].roll(by, (1, 2)) for part, by in zip(parts, steps, strict=True)], -1) for at in (1, 2)
        )
        return self._read(q, k, v, None)

    def _step(self, side: int) -> int:
        """Tokens that the map is rolled by along an axis."""
        return int(side * self.shift) if isinstance(self.shift, float) else self.shift

    def _read(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, W, heads * D) from maps of queries, keys and values of some heads."""
        grid = (q.shape[1], q.shape[2])
        heads = q.shape[-1] * self.num_heads // self.dim
        q, k, v = (split_heads(t, heads) for t in (q, k, v))
        out = neighborhood_attention(
            q, k, v, grid, self.kernel_size, self.dilation,
            border="zero" if self.border == "zeros" else "mask", scale=self.scale,
            valid=None if valid is None else valid.flatten(1),
            dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        return merge_heads(out, grid)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y = self.attend(x, valid)
        if self.conv is None:
            return y
        return F.relu(conv_any_size(self.conv, zero_invalid(y + x, valid), self.conv.weight, self.conv.bias))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``MSA_Conv_2d``: ``qkv_conv.*`` (a 1x1 convolution), ``mlp.*``."""
        theirs = Released(state_dict, "MSA_Conv_2d")
        rules: dict[str, Rule] = {
            r"qkv_conv\.(weight|bias)": lambda match, value: {
                f"qkv.{match[1]}": value.flatten(1) if value.dim() > 1 else value
            },
            r"mlp\.(weight|bias)": r"conv.\1",
        }
        return theirs.close(theirs.renamed(rules))


class MSAConvDownsampling(nn.Module):
    """:class:`MSAConv` whose convolution has a stride and gives another width, as between stages.

    Args:
        dim: width of ``x``.
        out_dim: width of the output.
        stride: of the convolution.
        options: of :class:`MSAConv`, but for ``conv`` and ``out_dim``.

    >>> import torch
    >>> MSAConvDownsampling(8, 16)(torch.randn(1, 5, 4, 8))[0].shape
    torch.Size([1, 3, 2, 16])
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 2, **options: object):
        super().__init__()
        self.stride = check_ints("stride", (stride,), least=1)[0]
        self.inner = MSAConv(dim, out_dim=out_dim, **options)  # type: ignore[arg-type]
        assert self.inner.conv is not None
        self.inner.conv.stride = (self.stride, self.stride)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim), and which of these exist."""
        conv = self.inner.conv
        assert conv is not None
        x = zero_invalid(x, valid)
        y = zero_invalid(self.inner.attend(x, valid) + x, valid)
        return F.relu(conv_any_size(conv, y, conv.weight, conv.bias)), strided_valid(valid, self.stride)
