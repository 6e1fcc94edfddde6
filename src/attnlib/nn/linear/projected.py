"""Projections of queries, keys and values that start as those of fairseq's attention, for mechanisms that mix heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...types import Output, State, check_flag
from ..base import Mechanism
from ..frame import reading
from ..layers import head_dim_of, merge_heads, split_heads
from ..released import Released, Rule


class Projected(Mechanism):
    """Tokens to heads and back; a subclass says by :meth:`mix_heads` what happens between.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        context_dim: width of ``context``; ``dim`` by default.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        add_bias_kv: one more key and value that are learned, which everybody reads.
        add_zero_attn: one more of zeros, behind it.
    """

    source = "the authors' attention"
    causal = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
    ):
        super().__init__(dim, context_dim)
        self.add_zero_attn = check_flag("add_zero_attn", add_zero_attn)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k, self.v = (nn.Linear(self.context_dim, dim, bias=qkv_bias) for _ in range(2))
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        same = self.context_dim == dim
        for layer in (self.q, self.k, self.v, self.proj):
            nn.init.xavier_uniform_(layer.weight, gain=1 / math.sqrt(2) if same and layer is not self.proj else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.bias_k: nn.Parameter | None = None
        self.bias_v: nn.Parameter | None = None
        if check_flag("add_bias_kv", add_bias_kv):
            self.bias_k, self.bias_v = (nn.Parameter(nn.init.xavier_normal_(torch.empty(1, dim))) for _ in range(2))

    def _patterns(self) -> frozenset[str]:
        """Of those of the class, what this instance serves: causal or not, with or without a context.

        A key that everybody reads has no place in the order of a causal sequence.
        """
        kind = "causal" if self.causal else "noncausal"
        found = {p for p in self.class_traits.patterns if p.partition("-")[0] == kind}
        if self.context_dim != self.dim or (self.causal and (self.bias_k is not None or self.add_zero_attn)):
            found = {p for p in found if p.endswith("cross")}
        return frozenset(found)

    def mix_heads(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, ordered: bool, state: State | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Outputs of heads.

        Args:
            q: (B, H, N, D); k, v: (B, H, M, D).
            valid: (B, M) boolean, which of the latter exist.
            ordered: a token reads itself and earlier ones.
            state: of the tokens before.
            wanted: whether weights are asked for.

        Returns:
            (B, H, N, D), weights (B, H, N, M) where they are asked for, and what the state keeps.
        """
        raise NotImplementedError

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        source = x if context is None else context
        q, k, v = (split_heads(m(t), self.num_heads) for m, t in ((self.q, x), (self.k, source), (self.v, source)))
        read = reading(x, context, valid, context_valid, self.causal, state, "state" in returns)
        exists = read.exists
        if self.bias_k is not None or self.add_zero_attn:
            k, v, more = self._with_more(k, v)
            exists = None if exists is None else F.pad(exists, (0, more), value=True)
        out, weights, kept = self.mix_heads(q, k, v, exists, read.ordered, state, "weights" in returns)
        return Output(self.proj(merge_heads(out, x.shape[1:-1])), state=read.stream.next(**kept), weights=weights)

    def _with_more(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values (B, H, M, D) with those behind them that everybody reads, and how many these are."""
        made = []
        for own, bias in ((k, self.bias_k), (v, self.bias_v)):
            rows = [own.new_zeros(1, self.num_heads, 1, self.head_dim)] if self.add_zero_attn else []
            if bias is not None:
                rows.insert(0, bias.to(own.dtype).view(1, self.num_heads, 1, self.head_dim))
            made.append(torch.cat([own, *(row.expand(own.shape[0], -1, -1, -1) for row in rows)], 2))
        return made[0], made[1], made[0].shape[2] - k.shape[2]

    @classmethod
    def convert_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the class of the Comprehensive Attention Benchmark (Shark-NLP/CAB)."""
        theirs = Released(state_dict, cls.source)
        rules: dict[str, Rule] = {
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"out_proj\.(weight|bias)": r"proj.\1",
            **cls._more_rules(),
        }
        return theirs.close(theirs.renamed(rules))

    @staticmethod
    def _more_keys() -> dict[str, Any]:
        """Rules of the learned key and value, for those that have them."""
        return {r"bias_([kv])": lambda match, value: {match.string: value.flatten(0, 1)}}

    @classmethod
    def _more_rules(cls) -> dict[str, Any]:
        return {}
