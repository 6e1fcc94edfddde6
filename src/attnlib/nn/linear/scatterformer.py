"""Scattered linear attention of ScatterFormer (He et al., 2024): windows of any number of voxels, without padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_float, check_int, check_rank, check_real
from ...grids import Windows, crop_grid, pad_to_multiple
from ...ops.linear import linear_attention
from ...types import Traits
from ..base import Mechanism
from ..layers import head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released, Rule


@register("scatterformer", "scattered-linear-attention")
class ScatteredLinearAttention(Mechanism):
    """Linear attention with ReLU features inside windows, whatever their numbers of tokens.

    ``y_i = W_o [relu(q_i)^T S_w / (relu(q_i) . n_w + eps)]`` with ``S_w = sum_{j in w} relu(k_j) v_j^T`` and
    ``n_w = sum_{j in w} relu(k_j)`` of the window ``w`` of ``i``; no scale and no positions.

    :meth:`packed` takes the tokens of all windows as one sequence of segments, as voxels come
    (:func:`attnlib.ops.voxels.window_segments`), and adds the sums up without padding. Called on a map (B, H, W, C) or
    volume (B, Z, H, W, C), windows are of the last two axes; what no window divides is padded with tokens that do not
    exist. A query without positive features gives zeros before the output projection.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        window_size: sides of the windows.
        qkv_bias: bias of the query, key and value projection.
        eps: added to the denominator.

    Reference: He et al., 2024, arXiv 2401.00912, section 3.2.

    >>> m = ScatteredLinearAttention(dim=16, num_heads=2, window_size=4)
    >>> m(torch.randn(2, 6, 5, 16)).shape, m.packed(torch.randn(7, 16), torch.tensor([0, 1, 7])).shape
    (torch.Size([2, 6, 5, 16]), torch.Size([7, 16]))
    """

    class_traits = Traits(grid_ranks=frozenset({2, 3}), work={"N": 1}, memory={"N": 1})

    def __init__(self, dim: int, num_heads: int = 4, window_size: int = 12, qkv_bias: bool = False, eps: float = 1e-6):
        super().__init__(dim)
        check_int("window_size", window_size, least=1)
        check_real("eps", eps, least=0)
        head_dim_of(dim, num_heads)
        self.num_heads, self.window_size, self.eps = num_heads, window_size, eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _attend(self, qkv: Tensor, valid: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, N, 3 C) to (B, N, C), before the output projection."""
        q, k, v = (split_heads(t, self.num_heads) for t in qkv.chunk(3, -1))
        return merge_heads(
            linear_attention(
                q.relu(), k.relu(), v, causal=False, normalizer="sum", eps=self.eps, valid=valid, cu_seqlens=cu_seqlens
            )
        )

    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(N, C) tokens of all windows, one window after another, each on its own.

        Args:
            x: (N, C) tokens.
            cu_seqlens: (W + 1,) where windows begin, ``[0, .., N]``.
        """
        check_float("x", x)
        check_rank("x", x, 2, "(N, C)")
        if x.shape[1] != self.dim:
            raise ValueError(f"x must be (N, {self.dim}), got {tuple(x.shape)}")
        return self.proj(self._attend(self.qkv(x)[None], cu_seqlens=cu_seqlens)[0])

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        grid = tuple(x.shape[1:-1])
        window = (*grid[:-2], self.window_size, self.window_size)
        qkv = self.qkv(x)
        if any(n % w for n, w in zip(grid, window, strict=True)):
            if valid is None:
                valid = x.new_ones(x.shape[:-1], dtype=torch.bool)
            qkv, valid = pad_to_multiple(qkv, window), pad_to_multiple(valid.unsqueeze(-1), window).squeeze(-1)
        windows = Windows(tuple(qkv.shape[1:-1]), window)
        cut = windows.cut(qkv)
        there = None if valid is None else windows.cut(valid.unsqueeze(-1)).squeeze(-1).flatten(0, 1)
        out = self._attend(cut.flatten(0, 1), there)
        return self.proj(crop_grid(windows.join(out.unflatten(0, cut.shape[:2])), grid))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SLALayer``."""
        theirs = Released(state_dict, "the authors' SLALayer")
        rules: dict[str, Rule] = {r"(qkv|proj)\.(weight|bias)": r"\1.\2"}
        return theirs.close(theirs.renamed(rules))
