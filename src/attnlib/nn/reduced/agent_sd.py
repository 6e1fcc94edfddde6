"""Agent attention for Stable Diffusion: agents that were made elsewhere stand between queries and keys, untrained.

Han et al., 2023, "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874, section 4.4:
AgentSD replaces the self-attention of a trained U-Net. Its agents are tokens that token merging left, far fewer than
the tokens that attend; they go through the query projection. The second product is flatter than the first, and values
pass by:

    ``y = W_o (softmax(scale^p Q A^T) softmax(scale A K^T) V + shortcut V)``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...checks import check_device, check_float, check_real
from ...ops import attention
from ...ops.reduced import agent_attention
from ...types import Output, Traits
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released


@register("agent-sd")
class AgentSD(Mechanism):
    """Agent attention with given agents; without them, or with too many, plain attention of the same projections.

    Agents come as ``carry``, (B, n, C): tokens of the width of ``x``. As in the authors' code they serve only where
    ``2 n < N``. The shortcut adds value i to query i: it is made for self-attention, and a ``context`` of another width
    must have as many tokens as ``x`` then; without a shortcut it may have any number.

    Differs from the authors' code: ``context_valid`` and ``valid`` work with agents, too, whose mask is ignored there
    (with a message); merging tokens into agents belongs to the model.

    Args:
        dim: width of ``x`` and of the agents.
        num_heads: heads.
        head_dim: width of a head; ``dim / num_heads`` by default.
        context_dim: width of ``context``; ``dim`` by default.
        qkv_bias: biases of the query, key and value projections; off, as in Stable Diffusion.
        scale: of the first product, and of plain attention; ``head_dim ** -0.5`` by default.
        scale_power: ``p``, so that the second product has ``scale ** p``; the authors' ``k_scale2``.
        shortcut: how much of the values passes by; the authors' ``k_shortcut``.
        proj_drop: dropout of the output in training.

    Reference: Han et al., 2023, arXiv 2312.08874, section 4.4.

    >>> import torch
    >>> x = torch.randn(2, 4, 4, 8)
    >>> AgentSD(dim=8, num_heads=2)(x, carry=x[:, 0]).shape
    torch.Size([2, 4, 4, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        carries=True,
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        scale: float | None = None,
        scale_power: float = 0.3,
        shortcut: float = 0.075,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, context_dim)
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.scale_power = check_real("scale_power", scale_power)
        self.shortcut = check_real("shortcut", shortcut)
        width = num_heads * self.head_dim
        self.q = nn.Linear(dim, width, bias=qkv_bias)
        self.k = nn.Linear(self.context_dim, width, bias=qkv_bias)
        self.v = nn.Linear(self.context_dim, width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        if self.context_dim != self.dim:
            return self.class_traits.but(patterns=frozenset({"noncausal-cross"}))
        return self.class_traits.but(patterns=frozenset({"noncausal-self"})) if self.shortcut else self.class_traits

    def _agents(self, carry: Any, x: Tensor) -> Tensor | None:
        """(B, n, C) agents that are worth their while, if there are any."""
        if carry is None:
            return None
        check_float("carry", carry, "the agents, a floating-point tensor (B, n, C)")
        if carry.dim() != 3 or carry.shape[0] != x.shape[0] or carry.shape[2] != self.dim:
            raise ValueError(
                f"carry must hold the agents, ({x.shape[0]}, n, {self.dim}) for this x, got {tuple(carry.shape)}"
            )
        check_device(x=x, carry=carry)
        return carry if 0 < 2 * carry.shape[1] < x.flatten(1, -2).shape[1] else None

    def mix(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        carry: Any = None,
    ) -> Output:
        source, exists = (x, valid) if context is None else (context, context_valid)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), self.k(source), self.v(source)))
        agents = self._agents(carry, x)
        if agents is None:
            out = attention(q, k, v, valid=flat_valid(exists), scale=self.scale)
        else:
            if self.shortcut and v.shape[2] != q.shape[2]:
                raise ValueError(
                    f"context has {v.shape[2]} tokens and x has {q.shape[2]}; agents with shortcut={self.shortcut} "
                    "need as many of both"
                )
            few = split_heads(self.q(agents), self.num_heads)
            flatter = q * self.scale ** (self.scale_power - 1)
            out = agent_attention(flatter, few, k, v, valid=flat_valid(exists), scale=self.scale)
            if self.shortcut:
                out = out + self.shortcut * v
        return Output(self.proj_drop(self.proj(merge_heads(out, x.shape[1:-1]))), carry=carry)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the ``CrossAttention`` of latent diffusion or diffusers' ``Attention``, which AgentSD patches."""
        theirs = Released(state_dict, "CrossAttention or diffusers' Attention")
        rules = {r"to_([qkv])\.(weight|bias)": r"\1.\2", r"to_out\.0\.(weight|bias)": r"proj.\1"}
        return theirs.close(theirs.renamed(rules))
