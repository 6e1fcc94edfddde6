"""Attention between the channels of a group, the channel half of DaViT.

Ding et al., 2022, "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645, eq. 5. Channels are the tokens and the
values over the whole grid are their vectors: with groups of ``d`` channels and ``N`` tokens

    ``A = softmax(scale q^T k)`` of d x d per group,  ``y = W_o (v A^T)``,

so that every output has seen the whole map at a cost linear in N. ``scale`` is ``d^-1/2`` in DaViT, whose logits
therefore grow with the number of tokens and are sums over all of them: they are computed in float32 whatever the type
of ``x``. Florence-2 has ``N^-1/2``, which does not sharpen on larger maps. It is the cross-covariance attention of XCiT
without normalised queries and keys and without a temperature (:func:`attnlib.ops.channel_attention` is both).

Differs from the authors' code: there the roles have other names, ``A = softmax(scale k^T v)`` and ``y = W_o (q A^T)``;
the names are the usual ones here and ``convert_state_dict`` puts the rows of their ``qkv`` in that order. Tokens that
do not exist (``valid``) enter no sum; any grid of rank 1 to 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_choice
from ...ops import channel_attention
from ...types import Traits
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released

SCALES = ("width", "tokens")


@register("davit", "channel-group-attention")
class ChannelGroupAttention(Mechanism):
    """Attention between the channels of each group; shapes x and y (B, *grid, C).

    Args:
        dim: width C.
        num_heads: groups; must divide ``dim``. The authors' models have ``dim / 32``.
        scale: of the logits: ``"width"``: ``d ** -0.5`` with d channels in a group, as DaViT; ``"tokens"``:
            ``N ** -0.5`` with N the tokens that exist, as Florence-2.
        qkv_bias: bias of the query, key and value projections.

    Reference: Ding et al., 2022, arXiv 2204.03645, section 3.2.

    >>> ChannelGroupAttention(dim=16, num_heads=2)(torch.randn(2, 5, 6, 16)).shape
    torch.Size([2, 5, 6, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(self, dim: int, num_heads: int = 8, scale: str = "width", qkv_bias: bool = True):
        super().__init__(dim)
        check_choice("scale", scale, SCALES)
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim_of(dim, num_heads), scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        scale = self.head_dim**-0.5 if self.scale == "width" else None
        return self.proj(merge_heads(channel_attention(q, k, v, scale=scale, valid=flat_valid(valid)), x.shape[1:-1]))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], version: int = 1) -> dict[str, Tensor]:
        """From the authors' and timm's ``ChannelAttention`` and ``ChannelAttentionV2``.

        Args:
            state_dict: ``qkv.*``, ``proj.*``.
            version: 1, whose queries, keys and values have the roles of values, queries and keys; 2 (Florence-2) has
                the usual ones.
        """
        check_choice("version", version, (1, 2))
        theirs = Released(state_dict, "the authors' ChannelAttention")

        def qkv(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
            if value.shape[0] % 3:
                raise ValueError(f"{match[0]} has {value.shape[0]} rows, which do not split into q, k and v")
            v, q, k = value.chunk(3)
            return {match[0]: torch.cat([q, k, v]) if version == 1 else value}

        return theirs.close(theirs.renamed({r"qkv\.(?:weight|bias)": qkv, r"proj\.(weight|bias)": r"proj.\1"}))
