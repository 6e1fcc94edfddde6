"""Length-scaled softplus attention with re-weighting (Gao and Spratling, 2025)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import visible_keys
from ...normalizers import Activated
from ...ops import attention
from ...types import stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..registry import register
from .softmax_attention import SoftmaxAttention


@register("softplus-attention-lssar", "lssar", "lssa")
class SoftplusAttention(HeadFrame[Notes]):
    """Cosine scores, scaled by the length of the row, through softplus and an L1 norm, then sharpened.

    With ``N_i`` keys visible to row i, ``q^ = q / |q|``, ``k^ = k / |k|`` (after rotary)::

        A_ij = softplus(log(D) log(N_i) q^_i . k^_j),  A_i <- A_i / sum A_i            (LSSA)
        A_ij <- relu(A_ij N_i - O_i)^p,                A_i <- A_i / sum A_i            (re-weighting)

    ``A_i N_i`` has mean one, so ``O = 1`` keeps what is above average; rows with at most three keys have ``O = 0``.

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`.
        power: ``p`` of the re-weighting; ``None`` for LSSA alone.
        phi: ``"softplus"``, or another activation of the paper's ablations: ``"exp"``, ``"sigmoid"``, ``"relu"``.
        cosine: scores from unit vectors with the row scale; ``False``: raw scores over ``sqrt(D)``.

    Rows that are exactly uniform have nothing above average and stay as they are. The re-weighting needs the row's sum
    first, so it takes two passes over the scores.

    Reference: Gao and Spratling, 2025, arXiv 2501.13428, equations 9 to 13.

    >>> SoftplusAttention(dim=16, num_heads=2, causal=True)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        power: float | None = 15.0,
        phi: str = "softplus",
        cosine: bool = True,
        **settings: Any,
    ):
        super().__init__(dim, num_heads, normalizer=Activated(phi, True, power), **settings)
        self.cosine = cosine

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        if not self.cosine:
            return super()._mix_heads(q, k, v, call, notes)
        count = visible_keys(call.mask, q.shape[2], k.shape[2], call.valid, call.q_pos, q.device)
        scale = math.log(self.head_dim) * torch.log(count.clamp(min=1).to(stats_dtype(q.dtype)))
        q = F.normalize(q, dim=-1) * scale.to(q.dtype)
        return attention(q, F.normalize(k, dim=-1), v, scale=1.0, normalizer=self.normalizer, **call.options())

    convert_state_dict = staticmethod(SoftmaxAttention.convert_state_dict)
