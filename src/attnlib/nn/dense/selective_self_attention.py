"""Selective self-attention (Zhang et al., 2024): a temperature per token and position, for queries and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...masks import visible_keys
from ...types import check_choice, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..layers import merge_heads
from ..registry import register
from ..released import Released, grouped_rule, split_rule

POSITION = ("none", "sigmoid", "double_exponential", "linear")


@dataclass
class TemperatureNotes(Notes):
    """(B, 1, N, 1) temperature of each query's token."""

    token: Tensor | None = None


@register("selective-self-attention", "ssa")
class SelectiveAttention(HeadFrame[TemperatureNotes]):
    """Softmax attention in which a token chooses how peaked its row is, and how loud its own value.

    ``q_i <- (tau_tok(x_i) + tau_pos(i)) q_i``, ``v_j <- (1 + tau_tok'(x_j)) v_j``, with ``n_i`` keys visible to row i::

        tau_tok(x) = tanh(w . GELU(W x)),  W the layer's own query (or value) projection, only w is new
        tau_pos(i) = 1 + sigmoid(a) log(n_i)

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`.
        token_queries, token_values: the learned per-token temperatures; they start at zero, so that nothing changes.
        position: ``"sigmoid"`` as above; ``"double_exponential"``: ``1 + exp(-exp(b)) log(n_i)`` and ``"linear"``:
            ``1 + b log(n_i)``, the authors' released forms; ``"none"``.
        per_head: one ``a`` (or ``b``) per head instead of one per layer.
        init: initial value of ``a`` or ``b``; by default -6, 2 or 1e-5.

    What differs from the authors' code: it releases only the position temperature, counts rows from the start of every
    call (so decoding with its cache restarts at 1) and ignores its mask argument; here ``n_i`` is the number of keys
    that row really sees. The token temperatures follow the paper's description.

    Reference: Zhang et al., 2024, arXiv 2411.12892.

    >>> SelectiveAttention(dim=16, num_heads=2, causal=True)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    notes_type = TemperatureNotes

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        token_queries: bool = True,
        token_values: bool = True,
        position: str = "sigmoid",
        per_head: bool = False,
        init: float | None = None,
        **settings: Any,
    ):
        super().__init__(dim, num_heads, **settings)
        check_choice("position", position, POSITION)
        self.position = position
        self.tau_q = nn.Parameter(torch.zeros(self.q.out_features)) if token_queries else None
        self.tau_v = nn.Parameter(torch.zeros(self.v.out_features)) if token_values else None
        start = {"none": 0.0, "sigmoid": -6.0, "double_exponential": 2.0, "linear": 1e-5}[position]
        shape = (num_heads, 1, 1) if per_head else ()
        start = float(start if init is None else init)
        self.beta = nn.Parameter(torch.full(shape, start)) if position != "none" else None

    def _growth(self) -> Tensor:
        """Factor of ``log(n_i)``: a scalar or (H, 1, 1)."""
        assert self.beta is not None
        if self.position == "sigmoid":
            return self.beta.sigmoid()
        return torch.exp(-torch.exp(self.beta)) if self.position == "double_exponential" else self.beta

    def _token(self, heads: Tensor, weight: Tensor) -> Tensor:
        """(B, 1, N, 1): ``tanh(w . GELU(W x))`` from the projected heads (B, H, N, D)."""
        return torch.tanh(F.gelu(merge_heads(heads)) @ weight)[:, None, :, None]

    def _begin(self, x: Tensor, q: Tensor, notes: TemperatureNotes) -> None:
        # from the queries before rotary: W x
        if self.tau_q is not None:
            notes.token = self._token(q, self.tau_q)

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: TemperatureNotes) -> Any:
        temperature: Tensor | float = 1.0
        if self.beta is not None:
            count = visible_keys(call.mask, q.shape[2], k.shape[2], call.valid, call.q_pos, q.device)
            temperature = 1 + self._growth() * torch.log(count.clamp(min=1).to(stats_dtype(q.dtype)))
        if notes.token is not None:
            temperature = temperature + notes.token
        if isinstance(temperature, Tensor):
            q = q * temperature.to(q.dtype)
        if self.tau_v is not None:
            v = v * (1 + self._token(v, self.tau_v)).to(v.dtype)
        return super()._mix_heads(q, k, v, call, notes)

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor], num_heads: int | None = None, num_kv_heads: int | None = None
    ) -> dict[str, Tensor]:
        """From the authors' ``CausalSelfAttention``: lit-gpt's, whose ``attn`` interleaves the projections of every
        group (give ``num_heads``), or GPT-2's, whose ``c_attn`` holds queries, keys and values one after another."""
        theirs = Released(state_dict, "the authors' CausalSelfAttention")
        theirs.leave(r"bias|attn_bias", because="GPT-2's constant causal mask")
        out = theirs.renamed(
            {
                r"attn\.(weight|bias)": grouped_rule(num_heads, num_kv_heads),
                r"c_attn\.(weight|bias)": split_rule("q", "k", "v"),
                r"(?:c_proj|proj)\.(weight|bias)": r"proj.\1",
                r"beta": "beta",
            }
        )
        return theirs.close(out)


def effective_support(weights: Tensor) -> Tensor:
    """``1 / sum a^2`` of rows of weights (..., M): how many keys a row really reads."""
    return 1 / weights.square().sum(-1)
