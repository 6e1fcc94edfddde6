"""InLine attention (Han et al., 2024): linear attention that subtracts its mean instead of dividing by its sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, to_tuple
from ...grids import Layout, Windows, crop_grid, flatten_grid, pad_to_multiple
from ...ops.linear import linear_attention
from ...types import Traits, stats_dtype
from ..base import Mechanism
from ..layers import (
    DepthwiseConv,
    depthwise_by_sample,
    flat_valid,
    head_dim_of,
    masked_mean,
    merge_heads,
    split_heads,
    through,
    zero_invalid,
)
from ..registry import register
from ..released import Released, Rule, join

#: Of queries and keys.
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky-relu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}


@register("inline-attention", "inline", "injective-linear-attention")
class InLineAttention(Mechanism):
    """Linear attention whose rows sum to one by subtraction, and a convolution whose kernel the mean token predicts.

    ``y_i = W_o (sum_j w_ij v_j + sum_d Theta_d v_{i+d})`` with

    ``w_ij = a phi(q_i) . phi(k_j) - (a / N) sum_s phi(q_i) . phi(k_s) + 1 / N``, ``a = D^(-1/2) / N``,
    ``Theta = W_2 gelu(W_1 mean_i(x_i))``, grouped by heads: nine numbers for every channel of every sample.

    Rows of ``w`` sum to one and may hold negative weights. Other than with a division by the sum, two queries on one
    ray read differently: with keys that span all directions, different queries have different weights. ``N`` and the
    means are those of the tokens that exist. The hosts of the paper are settings:

    * DeiT: called with a layout; tokens beside the grid are tokens like others, but for the convolution.
    * PVT: the defaults (their classes of keys from a strided map do not run).
    * Swin: ``window_size`` and ``shift_size``; every window has means and a kernel of its own. As published, cyclic
      shifts are not masked.
    * CSwin: ``lepe``, a depthwise convolution of the values with its own weights beside the predicted one; and
      ``pre_norm``, since the mean that predicts the kernel is there that of tokens before the norm. Their stripes that
      are smaller than the map do not run.

    Differs from the authors' code: any grid, also one that is not square, and absent tokens.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        qkv_bias: biases of the query, key and value projections.
        features: ``phi`` of queries and keys: ``"identity"``, as in all released models, ``"relu"``, ``"leaky-relu"``
            or ``"exp"`` (``exp(x / 5)``).
        residual: the convolution with the predicted kernel.
        window_size: ``None`` for the whole map, an int or pair for windows. Maps that it does not divide are padded
            with tokens that do not exist.
        shift_size: cyclic shift before cutting windows.
        lepe: see above.
        pre_norm: a LayerNorm before the projections.
        scale: ``a N``; ``head_dim ** -0.5`` by default.
        proj_drop: dropout after the output projection.

    Reference: Han et al., 2024, arXiv 2412.06590, equations 4 and 5.

    >>> import torch
    >>> InLineAttention(dim=16, num_heads=2)(torch.randn(2, 4, 5, 16)).shape
    torch.Size([2, 4, 5, 16])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), layout=True, work={"N": 1}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        features: str = "identity",
        residual: bool = True,
        window_size: int | Sequence[int] | None = None,
        shift_size: int | Sequence[int] = 0,
        lepe: bool = False,
        pre_norm: bool = False,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim)
        check_choice("features", features, FEATURES)
        self.num_heads, self.features = num_heads, features
        head_dim = head_dim_of(dim, num_heads)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window: tuple[int, int] | None = None
        self.shift: tuple[int, ...] = to_tuple("shift_size", shift_size, 2)
        if window_size is not None:
            rows, columns = to_tuple("window_size", window_size, 2)
            if min(rows, columns) < 1:
                raise ValueError(f"window_size={window_size} must be at least 1 on each axis")
            self.window = (rows, columns)
        elif any(self.shift):
            raise ValueError(f"shift_size={shift_size} needs a window_size")
        self.pre_norm = pre_norm
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.residual: nn.Sequential | None = None
        if residual:
            self.residual = nn.Sequential(
                nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
            )
        self.lepe = DepthwiseConv(dim, 3) if lepe else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(
            layout=self.window is None, permutation_equivariant=self.residual is None and not self._places
        )

    @property
    def _places(self) -> bool:
        """Whether windows or a convolution see where a token stands."""
        return self.window is not None or self.lepe is not None

    def mix(  # type: ignore[override]
        self, x: Tensor, *, layout: Layout | None = None, valid: Tensor | None = None
    ) -> Tensor:
        if layout is not None:
            name = layout.grid_name()
            start, grid = layout.span(name)[0], layout.grid(name)
            if len(grid) != 2:
                raise ValueError(f"layout's grid {name!r} must have two axes, got {grid}")
            out = self._attend(x, self._project(x), grid, start, valid)
        elif self.window is None:
            flat, grid = flatten_grid(x)
            out = self._attend(flat, self._project(flat), grid, 0, flat_valid(valid)).view(x.shape)
        else:
            out = self._windowed(x, valid, self.window)
        return through(self.proj_drop, self.proj(out))

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(through(self.norm, x))

    def _windowed(self, x: Tensor, valid: Tensor | None, window: tuple[int, int]) -> Tensor:
        """Each window as a sample of its own."""
        grid, qkv = x.shape[1:3], self._project(x)
        if any(n % w for n, w in zip(grid, window, strict=True)):
            if valid is None:
                valid = x.new_ones(x.shape[:-1], dtype=torch.bool)
            x, qkv, valid = (pad_to_multiple(t, window) for t in (x, qkv, valid.unsqueeze(-1)))
            valid = valid.squeeze(-1)
        windows = Windows((x.shape[1], x.shape[2]), window, shift=tuple(self.shift))
        there = None if valid is None else windows.cut(valid.unsqueeze(-1)).flatten(0, 1).squeeze(-1)
        shape = (cut := windows.cut(x)).shape
        out = self._attend(cut.flatten(0, 1), windows.cut(qkv).flatten(0, 1), window, 0, there)
        return crop_grid(windows.join(out.view(shape)), grid)

    def _attend(self, x: Tensor, qkv: Tensor, grid: Sequence[int], start: int, valid: Tensor | None) -> Tensor:
        """(B, N, C) before the output projection; the tokens of the grid begin at ``start``."""
        high, n = stats_dtype(x.dtype), math.prod(grid)
        mean = masked_mean(x, valid)
        phi = FEATURES[self.features]
        q, k, v = qkv.chunk(3, -1)
        heads = [split_heads(t, self.num_heads) for t in (phi(q), phi(k), v)]
        if valid is None:
            weights = x.new_full(x.shape[:2], self.scale / x.shape[1], dtype=high)
        else:
            count = valid.sum(1, keepdim=True).clamp(min=1).to(high)
            weights = (self.scale / count).expand(x.shape[:2])
        out = linear_attention(*heads, key_weights=weights, normalizer="subtract", causal=False, valid=valid)
        out = merge_heads(out)
        if self.residual is None and self.lepe is None:
            return out
        inside = slice(start, start + n)
        image = v[:, inside].unflatten(1, tuple(grid))
        if valid is not None:
            image = zero_invalid(image, valid[:, inside].unflatten(1, tuple(grid)))
        local = None if self.residual is None else self._convolved(image, mean)
        if self.lepe is not None:
            local = self.lepe(image) if local is None else local + self.lepe(image)
        assert local is not None
        return out + F.pad(local.flatten(1, 2), (0, 0, start, x.shape[1] - start - n))

    def _convolved(self, image: Tensor, mean: Tensor) -> Tensor:
        """(B, H, W, C) under the kernels that the mean token (B, C) of each sample predicts."""
        assert self.residual is not None
        kernels = self.residual(mean.unsqueeze(-1)).view(*mean.shape, 3, 3).permute(0, 2, 3, 1)
        return depthwise_by_sample(image, kernels)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``InLineAttention`` of DeiT, PVT or Swin, or the attention part of their ``CSWinBlock``,
        whose MLP is left out."""
        theirs = Released(state_dict, "the authors' InLineAttention or CSWinBlock")
        theirs.leave(r"(?:norm2|mlp)\..*", because="parts of the block around the mechanism")
        if any(name.startswith("attns.1.") for name in theirs):
            raise ValueError("state_dict has attns.1: blocks of two kinds of stripes do not run in the authors' code")
        rules: dict[str, Rule] = {
            r"(qkv|proj)\.(weight|bias)": r"\1.\2",
            r"(?:attns\.0\.)?residual\.([02])\.(weight|bias)": r"residual.\1.\2",
            r"attns\.0\.get_v\.(weight|bias)": r"lepe.\1",
            r"(?:attns\.0\.)?norm1\.(weight|bias)": r"norm.\1",
        }
        return theirs.close(join(theirs, "qkv", ("q", "kv")) | theirs.renamed(rules))
