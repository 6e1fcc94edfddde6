"""Sigmoid self-attention (Ramapuram et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...masks import visible_keys
from ...normalizers import Sigmoid
from ...ops import attention
from ...positions import Bias, RelativeBias, alibi, alibi_slopes
from ...types import Traits, check_choice, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..layers import head_norm, merge_heads
from ..registry import register
from ..released import Released, Rule, split_rule


class _SpreadRMSNorm(nn.Module):
    """The authors' RMSNorm: the norm of a head is divided by a root of the size of the whole tensor, not of the head.

    Hence outputs depend on batch and length; ``eps`` is added to the root.
    """

    def __init__(self, dim: int, eps: float = 1e-8):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        rms = x.norm(2, dim=-1, keepdim=True) * x.numel() ** (-1.0 / x.dim())
        return self.weight * x / (rms + self.eps)


@register("sigmoid-attention", "flash-sigmoid")
class SigmoidAttention(HeadFrame[Notes]):
    """``A = sigmoid(q k^T e^t / sqrt(D) + b)``, ``o = A v``: no row depends on another score.

    With ``b = -log(n)`` for ``n`` visible keys the weights start near ``1 / n``, so outputs start at softmax's norm.
    ``b`` belongs to the length seen in training: fix it with ``context_length`` (or ``attn_bias``), or let every row
    count its own visible keys, which is the paper's ``-log(i)`` in causal attention and the default here.

    Args:
        dim, num_heads, num_kv_heads, head_dim, context_dim, causal, rotary, alibi, attn_drop: as in
            :class:`~attnlib.nn.frame.HeadFrame`.
        qkv_bias, proj_bias: biases of projections, off as in the authors' code.
        qk_norm: LayerNorm of every head of queries and keys; on, as the authors advise. ``"rms"`` for RMSNorm.
        v_norm: the same for every head of values (their cross-attention has it).
        linear_norm: a LayerNorm with every projection, ``"pre"`` before it or ``"post"`` behind it, as the authors'
            PreNormLinear and PostNormLinear; queries, keys and values share one, with ``v_norm`` (their
            cross-attention) keys and values share one.
        activation: ``"sigmoid"``, or ``"softmax"`` to compare with: no ``b`` changes it.
        attn_bias: a fixed ``b``.
        context_length: sets ``b = -log(context_length)``.
        temperature: ``t``; scores are multiplied by ``e^t``.
        compat: ``"authors"``: ALiBi adds ``slope (j - i)``, which rewards later keys, instead of penalising the
            distance (under a causal mask that is the same); RMSNorm counts the entries of the whole tensor.
        row_norm: also divide row ``i`` (from 1) by ``"sqrt"``: ``sqrt(i)``, or ``"length"``: ``i``; their ablations.

    What differs from the authors' code: pairs that may not meet have weight exactly zero, where they set the most
    negative finite logit (equal in float32); ``attn_bias`` and ``temperature`` are settings, where they keep constant
    buffers. ALiBi counts as a score, as in theirs: the temperature scales it.

    Reference: Ramapuram et al., 2024, arXiv 2409.04431.

    >>> SigmoidAttention(dim=16, num_heads=4, context_length=64)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        qk_norm: bool | str = True,
        v_norm: bool | str = False,
        linear_norm: str = "none",
        activation: str = "sigmoid",
        attn_bias: float | None = None,
        context_length: int | None = None,
        temperature: float = 0.0,
        row_norm: str = "none",
        compat: str | None = None,
        **settings: Any,
    ):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, qk_norm=qk_norm, **settings)
        check_choice("activation", activation, ("sigmoid", "softmax"))
        check_choice("linear_norm", linear_norm, ("none", "pre", "post"))
        check_choice("row_norm", row_norm, ("none", "sqrt", "length"))
        if activation == "softmax" and row_norm != "none":
            raise ValueError(f"row_norm={row_norm!r} is a norm of sigmoids; it needs activation='sigmoid'")
        check_choice("compat", compat, (None, "authors"))
        if attn_bias is not None and context_length is not None:
            raise ValueError(f"give attn_bias={attn_bias} or context_length={context_length}, not both")
        if context_length is not None and context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        self.attn_bias = -math.log(context_length) if context_length is not None else attn_bias
        self.activation, self.row_norm, self.compat = activation, row_norm, compat
        self.heat = math.exp(temperature)
        self.scale *= self.heat
        self.v_norm = head_norm(v_norm, self.head_dim, "v_norm")
        self.linear_norm = linear_norm
        if linear_norm != "none":
            inner, keys = num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
            first = dim if linear_norm == "pre" else inner if v_norm else inner + keys
            self.in_norm = nn.LayerNorm(first)
            if v_norm:
                self.context_norm = nn.LayerNorm(self.context_dim if linear_norm == "pre" else keys)
            self.out_norm = nn.LayerNorm(inner if linear_norm == "pre" else dim)
        self.spread = compat == "authors" and "rms" in (qk_norm, v_norm)
        for name in ("q_norm", "k_norm", "v_norm"):
            if self.spread and isinstance(getattr(self, name), nn.RMSNorm):
                setattr(self, name, _SpreadRMSNorm(self.head_dim))

    cross_positions = True

    @property
    def traits(self) -> Traits:
        traits = super().traits
        if self.linear_norm != "none":
            alike = "cross" if hasattr(self, "context_norm") else "self"
            traits = traits.but(patterns=frozenset(p for p in traits.patterns if p.endswith(alike)))
            traits = traits.but(streaming=traits.streaming and alike == "self")
        if self.row_norm != "none":
            traits = traits.but(permutation_equivariant=False)
        if self.spread:
            traits = traits.but(valid=False, streaming=False, batch_independent=False, layout=False)
        return traits

    def _slot_bias(self, q_pos: Tensor, k_pos: Tensor, span: tuple[int, int]) -> Bias:
        slopes = alibi_slopes(self.num_heads, q_pos.device) * self.heat
        if self.compat != "authors":
            return alibi(self.num_heads, q_pos, k_pos, slopes, span)
        low, high = span
        table = slopes[:, None] * torch.arange(low, high + 1, device=q_pos.device)
        return RelativeBias(table, q_pos[:, None], k_pos[:, None], (-low,), (high - low + 1,))

    def _parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.linear_norm == "none":
            return super()._parts(x, source)
        apart = hasattr(self, "context_norm")
        if self.linear_norm == "pre":
            return super()._parts(self.in_norm(x), (self.context_norm if apart else self.in_norm)(source))
        q, k, v = super()._parts(x, source)
        if not apart:
            return self.in_norm(torch.cat([q, k, v], -1)).split([t.shape[-1] for t in (q, k, v)], -1)
        k, v = self.context_norm(torch.cat([k, v], -1)).chunk(2, -1)
        return self.in_norm(q), k, v

    def _project(self, out: Tensor, notes: Notes, grid: torch.Size) -> Tensor:
        if self.linear_norm == "pre":
            return self.proj(self.out_norm(merge_heads(out, grid)))
        y = super()._project(out, notes, grid)
        return self.out_norm(y) if self.linear_norm == "post" else y

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        v = self.v_norm(v)
        if self.activation == "softmax":
            return attention(q, k, v, scale=self.scale, **call.options())
        bias, scale = self.attn_bias or 0.0, self.scale
        if self.attn_bias is None:
            # Two more channels carry the row's bias, coarse and rest (so that half precision keeps its digits), against
            # ones in the keys: no (N, M) map appears.
            count = visible_keys(call.mask, q.shape[2], k.shape[2], call.valid, call.q_pos, q.device)
            rows = -torch.log(count.clamp(min=1).to(stats_dtype(q.dtype)))
            coarse = rows.to(q.dtype)
            rows = torch.cat([coarse, (rows - coarse).to(q.dtype)], -1)
            q = torch.cat([q * scale, rows.expand(*q.shape[:3], 2)], -1)
            k, scale = torch.cat([k, k.new_ones(*k.shape[:3], 2)], -1), 1.0
        result = attention(q, k, v, scale=scale, normalizer=Sigmoid(bias), **call.options())
        if self.row_norm == "none":
            return result
        out, *rest = result if isinstance(result, tuple) else (result,)
        at = torch.arange(q.shape[2], device=q.device) if call.q_pos is None else call.q_pos
        factor = (at + 1).to(stats_dtype(q.dtype)) ** (-0.5 if self.row_norm == "sqrt" else -1.0)
        out = out * factor.to(out.dtype)[:, None]
        return (out, rest[0] * factor[:, None]) if rest else out

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention`` and ``CrossAttention``; their constant buffers become settings here."""
        theirs = Released(state_dict, "the authors' Attention or CrossAttention")
        theirs.leave(r"attn_bias|attn_temp", because="constants, which are settings here")
        rules: dict[str, Rule] = {
            r"qkv\.(?:linear\.)?(weight|bias)": split_rule("q", "k", "v"),
            r"kv_proj\.(?:linear\.)?(weight|bias)": split_rule("k", "v"),
            r"q_proj\.(?:linear\.)?(weight|bias)": r"q.\1",
            r"proj\.(?:linear\.)?(weight|bias)": r"proj.\1",
            r"(?:qkv|q_proj)\.norm\.(weight|bias)": r"in_norm.\1",
            r"kv_proj\.norm\.(weight|bias)": r"context_norm.\1",
            r"proj\.norm\.(weight|bias)": r"out_norm.\1",
            r"([qkv]_norm)\.(weight|bias)": r"\1.\2",
        }
        return theirs.close(theirs.renamed(rules))
