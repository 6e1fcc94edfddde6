"""Swin V2's attention: cosines of queries and keys in shifted windows, and positions from a function of displacements.

Liu et al., 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution", arXiv 2111.09883. With a learned scale per
head, of at most 100, and displacements ``d`` of a window of w tokens a side,

    ``s_ij = min(exp(t), 100) cos(q_i, k_j) + 16 sigmoid(MLP(f(d_ij)))``,  ``f(d) = sign(d) log8(|8 d / (w - 1)| + 1)``,

so that the function serves windows of other sizes: ``w`` is then that of pretraining (``pretrained_window``). Queries
and values have a bias, keys have none.

Differs from the authors' code and timm's: tokens that do not exist are never attended to; windows that do not divide a
map are filled up with such, where theirs has zeros that take part (``pad="zeros"``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_ints, check_real
from ...grids import Windows, check_windows
from ...masks import Mask
from ...ops.partition import window_attention
from ...positions import dense_window_bias
from ...types import Traits, stats_dtype, to_tuple
from ..layers import flat_valid, through
from ..released import Released
from .maxvit import PartitionAttention

#: The largest scale of a cosine, and of the bias.
MOST, BIAS = 100.0, 16.0


class CosineWindowAttention(PartitionAttention):
    """Attention by cosines in windows, shifted or not, with a bias from a function of displacements, on images.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        window_size: sides of a window.
        shift: how far windows are moved.
        pretrained_window: sides that displacements are measured by; 0 for those of the window.
        whole: one window, the whole map, whatever its size.
        qkv_bias: biases of queries and values.
        rel_hidden: hidden width of the function.
        attn_drop, proj_drop, pad: as of :class:`attnlib.nn.partition.maxvit.PartitionAttention`.
        eps: added to the lengths of queries and keys; 0 for a least length of 1e-12 instead.
        keep_shift: as of :class:`attnlib.nn.partition.maxvit.PartitionAttention`.

    >>> CosineWindowAttention(dim=16, num_heads=2, window_size=4)(torch.randn(2, 8, 12, 16)).shape
    torch.Size([2, 8, 12, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | Sequence[int] = 8,
        shift: int | Sequence[int] = 0,
        pretrained_window: int | Sequence[int] = 0,
        whole: bool = False,
        qkv_bias: bool = True,
        rel_hidden: int = 512,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
        eps: float = 0.0,
        keep_shift: bool = False,
    ):
        super().__init__(
            dim, num_heads, window_size, rank=2, rel_bias=False, qkv_bias=False, attn_drop=attn_drop,
            proj_drop=proj_drop, pad=pad, shift=shift, keep_shift=keep_shift,
        )  # fmt: skip
        self.pretrained_window = check_ints(
            "pretrained_window", to_tuple("pretrained_window", pretrained_window, 2), least=0
        )
        self.whole, self.eps = check_flag("whole", whole), check_real("eps", eps, least=0)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.position = nn.Sequential(nn.Linear(2, rel_hidden), nn.ReLU(), nn.Linear(rel_hidden, num_heads, bias=False))
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    @property
    def traits(self) -> Traits:
        if self.whole:
            return self.class_traits.but(grid_ranks=frozenset({2}), work={"N": 2}, memory={"N": 2})
        # as of PartitionAttention, whose property compilers do not follow here
        return self.class_traits.but(grid_ranks=frozenset({len(self.window_size)}), grid_multiple=self._grid_multiple)

    @property
    def grid_step(self) -> tuple[int, ...]:
        return (1, 1) if self.whole else self.window_size

    @property
    def tables(self) -> dict[str, int]:
        return {}

    def _bias_of(self, size: Sequence[int]) -> Tensor:
        """(heads, S, S) inside a window of ``size``."""
        if self.bias is not None and not self.whole:
            return self.bias
        weight: Any = self.position[0].weight
        axes = []
        for n, before in zip(size, self.pretrained_window, strict=True):
            at = torch.arange(1 - n, n, device=weight.device, dtype=torch.float32)
            at = at / max((before or n) - 1, 1) * 8
            axes.append(at.sign() * (at.abs() + 1).log2() / math.log2(8))
        # The function takes query minus key; tables are laid out by key minus query.
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flip(0, 1)
        made = self.position(places.to(weight.dtype)).permute(2, 0, 1)
        return BIAS * dense_window_bias(made, size).sigmoid()

    def _bias(self) -> Tensor | None:
        return self._bias_of(self.window_size)

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """The same with its bias laid out once."""
        out = copy.deepcopy(self).eval()
        if not self.whole:
            out.bias = out._bias()
        return out

    def _direction(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + self.eps) if self.eps else F.normalize(x, dim=-1)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, mask: Mask | None = None
    ) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        size = grid if self.whole else self.window_size
        check_windows(grid, size)
        shift = (0, 0) if self.whole else self._shift_on(grid)
        windows = Windows(grid, size, "block", shift)
        q, k, v = self.qkv(windows.cut(x)).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        if self.q_bias is not None and self.v_bias is not None:
            bias = (t.view(1, 1, self.num_heads, 1, self.head_dim) for t in (self.q_bias, self.v_bias))
            of_q, of_v = bias
            q, v = q + of_q, v + of_v
        high = stats_dtype(q.dtype)
        scale = self.logit_scale.to(high).exp().clamp(max=MOST)
        q, k = (self._direction(q.to(high)) * scale).to(v.dtype), self._direction(k.to(high)).to(v.dtype)
        out = window_attention(
            q, k, v, windows.grid, windows.size, windows.kind, shift=windows.shift or 0, cut=True,
            valid=flat_valid(valid), mask=mask, bias=self._bias_of(size), scale=1.0,
            normalizer=self.normalizer, dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        return windows.join(through(self.proj_drop, self.proj(out.transpose(2, 3).flatten(3))))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """From timm's or the authors' ``WindowAttention`` (and their ``GlobalAttention``)."""
        theirs = Released(state_dict, "Swin V2's WindowAttention")
        theirs.leave(r"relative_coords_table|relative_position_index|k_bias", because="constants")
        return theirs.close(
            theirs.renamed(
                {
                    r"(?:cpb|rpe)_mlp\.([02])\.(weight|bias)": r"position.\1.\2",
                    r"(q_bias|v_bias|logit_scale)": r"\1",
                    r"(qkv|proj)\.(weight|bias)": r"\1.\2",
                }
            )
        )
