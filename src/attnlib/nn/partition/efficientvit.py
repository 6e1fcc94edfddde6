"""Cascaded group attention: every head has its own channels, and the output of the head before it.

Liu et al., 2023, "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", arXiv 2305.07027.
In windows of 7 x 7 tokens; queries pass a depthwise convolution, and a bias is learned for every distance.

Differs from the authors' code: any grid, where theirs is built for one; zeros that fill up windows are not attended and
enter no statistic, unless ``compat="authors"``; the bias is read at every call, where theirs keeps a copy in evaluation
that goes stale when weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_int, check_ints, fixed
from ...grids import pad_to_multiple
from ...ops import attention
from ...types import Traits
from ..base import Mechanism
from ..layers import ConvNorm, zero_invalid
from ..registry import register
from ..released import Released, Rule


@register("efficientvit-cascaded-group-attention", "cga", "cascaded-group-attention")
class CascadedGroupAttention(Mechanism):
    """``f_i = x_i + o_(i-1)``, ``[q, k, v] = BN(W_i f_i)``, ``o_i = softmax(dw_i(q) k^T d^-1/2 + b_i) v``, in windows.

    ``x_i`` is the i-th of H runs of channels and ``o_i`` as wide; ``y = BN(W_o relu([o_1, ..., o_H]))``, whose norm
    starts at gain 0. ``b_i`` is a number for every ``(|dy|, |dx|)`` of a window. A map that fits into a window is one;
    others are filled up with zeros at the bottom and on the right.

    Args:
        dim: width.
        num_heads: H; must divide ``dim``.
        key_dim: d.
        window_size: tokens per axis.
        kernel_sizes: of the depthwise convolution of every head's queries, odd; further ones are left out.
        compat: ``"authors"``: zeros that fill up windows are attended to and enter statistics.

    Reference: Liu et al., 2023, arXiv 2305.07027, section 3.2.

    >>> CascadedGroupAttention(dim=16, num_heads=2, key_dim=4)(torch.randn(2, 5, 9, 16)).shape
    torch.Size([2, 5, 9, 16])
    """

    #: Parameters that are tables of places, by how many of their last axes are places.
    tables = {"attention_bias": 2}

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1}
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        key_dim: int = 16,
        window_size: int = 7,
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        check_divides("num_heads", num_heads, "dim", dim)
        kernels = check_ints("kernel_sizes", tuple(kernel_sizes), least=1)
        if len(kernels) < num_heads or any(k % 2 == 0 for k in kernels):
            raise ValueError(f"kernel_sizes={kernels} must have an odd side for each of num_heads={num_heads}")
        self.num_heads, self.compat, part = num_heads, compat, dim // num_heads
        self.key_dim = check_int("key_dim", key_dim, least=1)
        self.window_size = check_int("window_size", window_size, least=1)
        self.widths = [key_dim, key_dim, part]
        self.qkv = nn.ModuleList(ConvNorm(part, sum(self.widths)) for _ in range(num_heads))
        self.local = nn.ModuleList(ConvNorm(key_dim, key_dim, k, groups=key_dim) for k in kernels[:num_heads])
        self.attention_bias = nn.Parameter(torch.zeros(num_heads, window_size, window_size))
        self.proj = ConvNorm(dim, dim, gain=0.0)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=not self.training)

    def bias(self, height: int, width: int) -> Tensor:
        """(H, N, N) for a window of ``height`` x ``width`` tokens."""
        rows, columns = (torch.arange(n, device=self.attention_bias.device) for n in (height, width))
        dy, dx = ((at[:, None] - at).abs() for at in (rows, columns))
        table = self.attention_bias[:, dy[:, None, :, None], dx[None, :, None, :]]
        return table.flatten(3).flatten(1, 2)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        grid, side = tuple(fixed(n) for n in x.shape[1:3]), self.window_size
        if max(grid) <= side:
            return self._window(x, valid)
        filled = pad_to_multiple(x, side)
        sides = filled.shape[1:3]
        exists = valid
        if tuple(sides) != grid and not (self.compat == "authors" and valid is None):
            exists = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
            exists = F.pad(exists, (0, sides[1] - grid[1], 0, sides[0] - grid[0]))
        down, across = sides[0] // side, sides[1] // side

        def cut(t: Tensor) -> Tensor:
            return t.unflatten(1, (down, side)).unflatten(3, (across, side)).transpose(2, 3).flatten(0, 2)

        y = self._window(cut(filled), None if exists is None else cut(exists))
        y = y.unflatten(0, (x.shape[0], down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return y[:, : grid[0], : grid[1]]

    def _window(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, h, w, dim) -> the same; all tokens of a sample meet."""
        height, width = (fixed(n) for n in x.shape[1:3])
        bias, exists = self.bias(height, width).to(x.dtype), None if valid is None else valid.flatten(1)
        outs: list[Tensor] = []
        for i, part in enumerate(x.chunk(self.num_heads, -1)):
            part = part + outs[-1] if outs else part
            q, k, v = self.qkv[i](part, valid).split(self.widths, -1)
            q = self.local[i](q, valid)
            q, k, v = (t.flatten(1, 2).unsqueeze(1) for t in (q, k, v))
            out = attention(q, k, v, bias=bias[i : i + 1], valid=exists, scale=self.key_dim**-0.5)
            outs.append(zero_invalid(out.squeeze(1).unflatten(1, (height, width)), valid))
        return self.proj(torch.cat(outs, -1).relu(), valid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``CascadedGroupAttention``, also inside its ``LocalWindowAttention`` (``attn.``)."""
        theirs = Released(state_dict, "CascadedGroupAttention")
        theirs.leave(r"(?:attn\.)?(?:attention_bias_idxs|ab)", because="constants and a copy")
        norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
        rules: dict[str, Rule] = {r"(?:attn\.)?attention_biases": _table}
        for name, ours in ((r"qkvs\.(\d+)", r"qkv.\1"), (r"dws\.(\d+)", r"local.\1"), (r"proj\.(1)", "proj")):
            rules[rf"(?:attn\.)?{name}\.c\.weight"] = f"{ours}.conv.weight"
            rules[rf"(?:attn\.)?{name}\.bn\.{norm}"] = rf"{ours}.norm.\2"
        return theirs.close(theirs.renamed(rules))


def _table(match: object, value: Tensor) -> dict[str, Tensor]:
    """Their distances are in row-major order of a square."""
    side = round(value.shape[-1] ** 0.5)
    return {"attention_bias": value.unflatten(-1, (side, side))}
