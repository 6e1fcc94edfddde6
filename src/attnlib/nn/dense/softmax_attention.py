"""Multi-head softmax attention with grouped queries: the baseline that everything is compared to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..frame import HeadFrame, Notes
from ..registry import register
from ..released import PLAIN, Released


@register("softmax-attention", "mha", "gqa", "mqa")
class SoftmaxAttention(HeadFrame[Notes]):
    """Multi-head attention with separate numbers of query and key/value heads.

    ``o_h = softmax(q_h k_g(h)^T / sqrt(D)) v_g(h)``, ``y = [o_1 .. o_H] W_O``, where ``g`` maps neighbouring query
    heads to one key/value head. Settings, cache and shapes are those of its frame.

    Args:
        dim, num_heads, num_kv_heads, head_dim, context_dim, qkv_bias, proj_bias, qk_norm, causal, rotary,
            rotary_interleaved, rotary_dim, rotary_scaling, alibi, scale, attn_drop, proj_drop, normalizer: see
            :class:`attnlib.nn.frame.HeadFrame`.

    Reference: Vaswani et al., 2017, arXiv 1706.03762; Ainslie et al., 2023, arXiv 2305.13245 (grouped queries).

    >>> import torch
    >>> SoftmaxAttention(dim=16, num_heads=4, num_kv_heads=2)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    cross_positions = True

    @property
    def cuts_sequence(self) -> bool:  # type: ignore[override]
        return not self.biased

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``torch.nn.MultiheadAttention``, timm's ``Attention`` (``qkv.*``), or a module of this one's names."""
        theirs = Released(state_dict, "MultiheadAttention or timm's Attention")
        return theirs.close(theirs.renamed(PLAIN))
