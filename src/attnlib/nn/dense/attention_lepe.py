"""Attention with locally enhanced positions: the dense attention in the last stage of BiFormer.

Zhu et al., 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810. Their models route
in the first stages and attend densely in the last (``topk = -2``), with a depthwise convolution beside the map:

    ``y = W_o (softmax(scale Q K^T) V + DWConv(V))``

Differs from the authors' channels-last code: its convolution reads ``x`` instead of ``V``, which ``lepe="input"`` does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...masks import Mask
from ...ops import attention
from ...types import Traits, check_choice
from ..base import Mechanism
from ..layers import DepthwiseConv, flat_valid, head_dim_of, merge_heads, split_heads, zero_invalid
from ..registry import register
from ..released import Released, Rule, join


@register("attention-lepe", "lepe-attention")
class AttentionLePE(Mechanism):
    """Dense attention and a depthwise convolution, on images.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        side_dwconv: kernel of the convolution, odd; 0 for none.
        lepe: what it reads: ``"value"``, as in the authors' ``nchwAttentionLePE``, or ``"input"``, as in their
            ``AttentionLePE``, with which BiFormer was trained.
        qkv_bias: biases of the query, key and value projection.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.

    Reference: Zhu et al., 2023, arXiv 2303.08810, section 4.3.

    >>> import torch
    >>> AttentionLePE(dim=16, num_heads=2)(torch.randn(2, 4, 5, 16)).shape
    torch.Size([2, 4, 5, 16])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), mask=True, work={"N": 2}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        side_dwconv: int = 5,
        lepe: str = "value",
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim)
        check_choice("lepe", lepe, ("value", "input"))
        if side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
            raise ValueError(f"side_dwconv={side_dwconv} is not possible; choose 0 or an odd kernel size")
        self.num_heads, self.reads, self.attn_drop = num_heads, lepe, attn_drop
        self.scale = head_dim_of(dim, num_heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        alone = self.lepe is None  # tokens then meet in the dense map only, which does not see where they stand
        return self.class_traits.but(mask=alone, permutation_equivariant=alone)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, mask: Mask | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        heads = (split_heads(t, self.num_heads) for t in (q, k, v))
        drop = self.attn_drop if self.training else 0.0
        out = attention(*heads, mask=mask, valid=flat_valid(valid), scale=self.scale, dropout_p=drop)
        y = merge_heads(out, x.shape[1:-1])
        if self.lepe is not None:
            y = y + self.lepe(zero_invalid(v, valid) if self.reads == "value" else x)
        return self.proj_drop(self.proj(y))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``AttentionLePE``, ``nchwAttentionLePE`` (1x1 convolutions) or plain ``Attention``; from
        the ``Attention`` of SMT with ``ca_attention=0``, which is this with a kernel of 3.
        """
        theirs = Released(state_dict, "the authors' AttentionLePE or nchwAttentionLePE")
        out = join(theirs, "qkv", ("q", "kv"))
        rules: dict[str, Rule] = {
            r"(qkv|proj)\.weight": lambda match, value: {match[0]: value.flatten(1)},
            r"(qkv|proj)\.bias": r"\1.bias",
            r"(?:lepe|local_conv)\.(weight|bias)": r"lepe.\1",
        }
        return theirs.close(out | theirs.renamed(rules))
