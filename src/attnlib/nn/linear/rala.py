"""Rank-augmented linear attention (Fan et al., 2024): keys weighed by what all queries ask for, outputs gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...ops import attention
from ...ops.feature_maps import elu1
from ...ops.linear import linear_attention
from ...positions import rotate
from ...types import Traits, stats_dtype
from ..base import Mechanism
from ..layers import DepthwiseConv, flat_valid, head_dim_of, merge_heads, split_heads, through, zero_invalid
from ..registry import register
from ..released import Released, Rule, split_rule


def grid_angles(height: int, width: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """(height * width, head_dim / 2) angles: rows turn the first half of the pairs of channels, columns the second.

    Frequencies are ``base^(-linspace(0, 1, head_dim / 4))``: the last one is ``1 / base`` itself.
    """
    steps = torch.linspace(0, 1, head_dim // 4, dtype=torch.float32, device=device)
    rows, columns = (torch.arange(n, device=device).float()[:, None] * base**-steps for n in (height, width))
    shape = (height, width, head_dim // 4)
    return torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], -1).flatten(0, 1)


@register("rala-ravlt", "rala", "rank-augmented-linear-attention")
class RankAugmentedLinearAttention(Mechanism):
    """Linear attention whose keys count as much as the mean query asks for them, behind a gate for every number.

    With ``phi = 1 + elu``, ``R`` the rotation of a token's row and column and ``g_i = W_g x_i``,

    ``alpha_j = softmax_j(D^(-1/2) mean_i(phi(q_i)) . phi(k_j))``,

    ``y_i = W_o [g_i * (sum_j alpha_j R phi(q_i) . R phi(k_j) v_j / (sum_j alpha_j phi(q_i) . phi(k_j) + eps)
    + DWConv(v)_i)]``.

    Weights rotate after the map and the denominator does not rotate, so that rows need not sum to one, nor be positive.
    The weighted keys and the gate raise the rank of what a (D, D) memory can hold and of what comes out of it. With
    ``attention="softmax"`` the same projections, rotation, convolution and gate stand around softmax attention, as in
    the last stages of the released models.

    Differs from the authors' code: absent tokens, which have no part in the means and in ``alpha``.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        attention: ``"linear"`` or ``"softmax"``.
        kernel_size: of the depthwise convolution on values, odd; 0 for none.
        rotary: base of the rotation; ``None`` for none.
        reweight: ``alpha`` as above, or 1 for every key. Softmax attention has none.
        gate: ``g`` as above, or 1.
        eps: added to the denominator.
        proj_drop: dropout after the output projection.

    Reference: Fan et al., 2024, arXiv 2411.07635.

    >>> RankAugmentedLinearAttention(dim=16, num_heads=2)(torch.randn(2, 4, 5, 16)).shape
    torch.Size([2, 4, 5, 16])
    """

    zero_is_off = ("kernel_size",)
    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 2}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attention: str = "linear",
        kernel_size: int = 5,
        rotary: float | None = 10000.0,
        reweight: bool = True,
        gate: bool = True,
        eps: float = 1e-6,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim)
        check_choice("attention", attention, ("linear", "softmax"))
        check_int("kernel_size", kernel_size, least=0)
        check_real("eps", eps, least=0)
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is not possible; choose 0 or an odd number")
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        if rotary is not None and self.head_dim % 4:
            raise ValueError(
                f"rotary positions of rows and columns need heads whose width is a multiple of 4, got dim / num_heads="
                f"{self.head_dim}; pass rotary=None"
            )
        self.attention, self.rotary, self.reweight, self.eps = attention, rotary, reweight, eps
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate = nn.Linear(dim, dim) if gate else None
        self.lepe = DepthwiseConv(dim, kernel_size) if kernel_size else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(
            work={"N": 1} if self.attention == "linear" else {"N": 2},
            permutation_equivariant=self.lepe is None and self.rotary is None,
        )

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        height, width = x.shape[1:3]
        qk, v = self.qkv(x).split([2 * self.dim, self.dim], -1)
        angles = None
        if self.rotary is not None:
            angles = grid_angles(height, width, self.head_dim, self.rotary, x.device)
        mixed = self._linear if self.attention == "linear" else self._softmax
        # Queries and keys are mapped and turned alike: as heads of one.
        heads, vh = split_heads(qk, 2 * self.num_heads), split_heads(v, self.num_heads)
        out = merge_heads(mixed(heads, vh, angles, flat_valid(valid)), (height, width))
        if self.lepe is not None:
            out = out + self.lepe(zero_invalid(v, valid))
        if self.gate is not None:
            out = out * self.gate(x)
        return through(self.proj_drop, self.proj(out))

    def _turned(self, x: Tensor, angles: Tensor | None) -> Tensor:
        return x if angles is None else rotate(x, angles, interleaved=True)

    def _softmax(self, qk: Tensor, v: Tensor, angles: Tensor | None, valid: Tensor | None) -> Tensor:
        q, k = self._turned(qk, angles).chunk(2, 1)
        return attention(q, k, v, valid=valid, scale=self.scale)

    def _linear(self, qk: Tensor, v: Tensor, angles: Tensor | None, valid: Tensor | None) -> Tensor:
        qk = elu1(qk)
        q, k = qk.chunk(2, 1)
        turned_q, turned_k = self._turned(qk, angles).chunk(2, 1)
        return linear_attention(
            turned_q, turned_k, v, causal=False, valid=valid, normalizer="sum", denominator=(q, k),
            eps=self.eps, key_weights=self.key_weights(q, k, valid),
        )  # fmt: skip

    def key_weights(self, q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, N) shares ``alpha`` of the mapped keys, for mapped queries (B, H, N, D)."""
        high = stats_dtype(q.dtype)
        q, k = q.to(high), k.to(high)
        if valid is None:
            mean, count = q.mean(2), q.new_full((1, 1, 1), q.shape[2])
        else:
            count = valid.sum(1).clamp(min=1).to(high)[:, None, None]
            mean = q.masked_fill(~valid[:, None, :, None], 0.0).sum(2) / count
        if not self.reweight:  # every key has the same share
            return (1 / count).expand(q.shape[:3])
        scores = (k @ mean.unsqueeze(-1)).squeeze(-1) * self.scale
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], torch.finfo(high).min)
        return scores.softmax(-1)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``GateLinearAttentionNoSilu`` or ``VanillaSelfAttention`` (1 x 1 convolutions)."""
        theirs = Released(state_dict, "the authors' GateLinearAttentionNoSilu or VanillaSelfAttention")
        fused: Any = split_rule("q", "k", "v", "gate")

        def split(match: Any, value: Tensor) -> dict[str, Tensor]:
            value = value.flatten(1) if match[1] == "weight" else value
            q, k, v, gate = fused(match, value).values()
            return {f"qkv.{match[1]}": torch.cat([q, k, v]), f"gate.{match[1]}": gate}

        rules: dict[str, Rule] = {
            r"qkvo\.(weight|bias)": split,
            r"proj\.weight": lambda match, value: {"proj.weight": value.flatten(1)},
            r"proj\.bias": "proj.bias",
            r"lepe\.(weight|bias)": r"lepe.\1",
        }
        return theirs.close(theirs.renamed(rules))
