"""Attention that does not need a sink (Gu et al., 2024): a virtual key, other similarities, kernels; and the metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...grids import Layout
from ...normalizers import ACTIVATIONS, Activated
from ...ops import attention_partial
from ...ops.feature_maps import feature_map
from ...ops.linear import linear_partial
from ...positions import Bias, RelativeBias, alibi, alibi_slopes
from ...types import Output, Partial, Plan, State, Traits, check_choice, exactly, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes, Stream
from ..layers import flat_valid, merge_heads, split_heads, through
from ..registry import register
from ..released import Released, grouped_rule

SIMILARITIES = ("softmax", *ACTIVATIONS)
KERNELS = ("identity", "elu1", "mlp")


def bucket_numbers(distance: Tensor) -> Tensor:
    """T5's bucket of each distance, 0 to 31: exact below 16, then logarithmic up to 128.

    >>> bucket_numbers(torch.tensor([3, 15, 16, 64, 500])).tolist()
    [3.0, 15.0, 16.0, 26.0, 31.0]
    """
    d = distance.float()
    far = 16 + torch.floor(torch.log(d.clamp(min=1) / 16) / math.log(8) * 16)
    return torch.where(d < 16, d, far.clamp(max=31))


class _KernelMLP(nn.Module):
    """``W2 relu(W1 x)``, the same for queries and keys."""

    def __init__(self, dim: int, bias: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


@register("attention-sink-empirical", "kv-bias-attention")
class SinkFreeAttention(HeadFrame[Notes]):
    """The attentions with which the study moves the sink off the first token, or makes it vanish.

    ``A_ij = phi(s_ij)``, ``s_ij = q_i . k_j / sqrt(D)``, over the keys that row i sees; then ``A_i / sum A_i`` or not::

        k_bias       one more key k*, with value v* (0 without v_bias), which every query sees: the sink moves there,
                     and is dropped from the weights returned. k* = v* = 0 is "softmax off by one"
        v_bias       alone: o_i + v*
        similarity   phi: softmax (exp, always normalised), sigmoid, elu1, ..; the sink needs normalised weights
        kernel       s = phi(q) . phi(k) / sqrt(D) itself is the weight: linear work, a state of constant size

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`.
        k_bias, v_bias: learn ``k*`` and ``v*``; ``k_bias`` needs softmax, and rotary positions leave ``k*`` alone.
        per_head: one ``k*`` and ``v*`` per head, instead of one for all.
        similarity: ``"softmax"`` or one of :data:`attnlib.normalizers.ACTIVATIONS`.
        kernel: ``"identity"``, ``"elu1"`` or ``"mlp"`` (two layers, the same for queries and keys), instead of a
            similarity.
        normalize: divide rows by their sum; with a kernel that may be negative, by ``max(|sum|, 1)``.
        window_size: causal: only the last so many keys, the query's own included.
        prefix_tokens: causal: the first so many tokens are read by all, also by the earlier ones among them. Slots are
            counted, and nothing is kept from call to call.
        relative: ``"bucket"`` adds to a score the number of T5's bucket of the distance, as the study does (it looks up
            no table), so that farther keys get more.
        compat: ``"authors"``: ALiBi is computed in bfloat16.

    The study's other positions are settings of the frame (``rotary``, ``alibi``, neither) or of the model around it.

    What differs from the authors' code: normalised similarities divide by the sum without their ``1e-8``; the virtual
    token has no query row; it comes as a mergeable part, so that any backend, mask and cache goes with it.

    Reference: Gu et al., 2024, arXiv 2410.10781, section 7.

    >>> SinkFreeAttention(dim=16, num_heads=2, k_bias=True, causal=True)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        k_bias: bool = False,
        v_bias: bool = False,
        per_head: bool = True,
        similarity: str = "softmax",
        kernel: str | None = None,
        normalize: bool = True,
        window_size: int | None = None,
        prefix_tokens: int = 0,
        relative: str | None = None,
        compat: str | None = None,
        **settings: Any,
    ):
        check_choice("relative", relative, (None, "bucket"))
        check_choice("compat", compat, (None, "authors"))
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("kernel", kernel, (None, *KERNELS))
        if "normalizer" in settings:
            raise ValueError("normalizer is set through similarity and normalize here")
        if kernel is not None and similarity != "softmax":
            raise ValueError(f"kernel={kernel!r} takes the place of similarity={similarity!r}; give one of them")
        if similarity == "softmax" and kernel is None and not normalize:
            raise ValueError("softmax is normalised always; similarity='exp' with normalize=False is not")
        if k_bias and (similarity != "softmax" or kernel is not None):
            given = f"kernel={kernel!r}" if kernel is not None else f"similarity={similarity!r}"
            raise ValueError(f"k_bias=True needs similarity='softmax', got {given}")
        super().__init__(
            dim, num_heads, normalizer="softmax" if similarity == "softmax" else Activated(similarity, normalize),
            **settings,
        )  # fmt: skip
        for name, used in (("k_bias", k_bias), ("kernel", kernel is not None)):
            if used and self.attn_drop:
                raise ValueError(f"attn_drop={self.attn_drop} is not possible with {name}")
        for name, value in (("window_size", window_size), ("prefix_tokens", prefix_tokens), ("relative", relative)):
            if value and kernel is not None:
                raise ValueError(f"{name}={value!r} is not possible with kernel={kernel!r}, which has no map")
            if value and name != "relative" and not self.causal:
                raise ValueError(f"{name}={value!r} belongs to the causal order; it needs causal=True")
        if kernel is not None and self.alibi:
            raise ValueError(f"alibi=True is not possible with kernel={kernel!r}, which has no scores")
        if relative is not None and self.alibi:
            raise ValueError(f"relative={relative!r} and alibi=True are two biases; give one of them")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        if prefix_tokens < 0 or (prefix_tokens and window_size is not None):
            raise ValueError(f"prefix_tokens={prefix_tokens} must be at least 0, and goes without a window_size")
        self.window_size, self.prefix_tokens, self.relative, self.compat = window_size, prefix_tokens, relative, compat
        self.counts_slots = prefix_tokens > 0
        self.similarity, self.normalize = similarity, normalize
        shape = (num_heads, self.head_dim) if per_head else (self.head_dim,)
        self.k_bias = nn.Parameter(torch.randn(shape) * 0.02) if k_bias else None
        self.v_bias = nn.Parameter(torch.randn(shape) * 0.02) if v_bias else None
        self.kernel_name = kernel
        self.kernel = _KernelMLP(self.head_dim, self.q.bias is not None) if kernel == "mlp" else None

    @property
    def traits(self) -> Traits:
        traits = super().traits
        if self.prefix_tokens:
            ahead = frozenset("non" + p if p == "causal-self" else p for p in traits.patterns)
            return traits.but(patterns=ahead, streaming=False)
        if self.kernel_name is None:
            return traits
        linear = {"N": 1.0}
        return traits.but(mask=False, weights=False, work=linear, memory=linear)

    @property
    def cuts_sequence(self) -> bool:  # type: ignore[override]
        return not self.biased

    # ---- order and positions

    def _in_order(self, mask: masks.Mask | None) -> masks.Mask:
        if self.prefix_tokens:
            order = masks.prefix_lm(self.prefix_tokens)
        else:
            order = masks.causal() if self.window_size is None else masks.recent(self.window_size)
        return order if mask is None else order & mask

    @property
    def biased(self) -> bool:
        return self.alibi or self.relative is not None

    def _slot_bias(self, q_pos: Tensor, k_pos: Tensor, span: tuple[int, int]) -> Bias:
        if self.relative is None and self.compat is None:
            return alibi(self.num_heads, q_pos, k_pos, span=span)
        low, high = span
        apart = torch.arange(low, high + 1, device=q_pos.device)
        if self.relative is None:
            table = alibi_slopes(self.num_heads).to(q_pos.device).bfloat16()[:, None] * -apart.abs().bfloat16()
        else:
            table = bucket_numbers((-apart).clamp(min=0))[None]
        return RelativeBias(table.float(), q_pos[:, None], k_pos[:, None], (-low,), (high - low + 1,))

    # ---- the virtual token

    def _rows(self, bias: Tensor) -> Tensor:
        """(1, H, 1, D)."""
        return bias.expand(self.num_heads, self.head_dim)[None, :, None]

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        if self.k_bias is None:
            return super()._mix_heads(q, k, v, call, notes)
        part = attention_partial(
            q, k, v, scale=self.scale, mask=call.mask, valid=call.valid, q_pos=call.q_pos, bias=call.bias
        )
        dtype = part.num.dtype
        with exactly(q):
            score = (q.to(dtype) * self._rows(self.k_bias).to(dtype)).sum(-1) * self.scale
        value = part.num.new_zeros(()) if self.v_bias is None else self._rows(self.v_bias).to(dtype)
        whole = part.merge(Partial(score, torch.ones_like(score), value.expand_as(part.num)))
        out = whole.finish().to(q.dtype)
        if not call.return_weights:
            return out
        _, weights = super()._mix_heads(q, k, v, call, notes)
        return out, weights * torch.exp(part.lse() - whole.lse()).unsqueeze(-1).to(weights.dtype)

    def _gate(self, out: Tensor, notes: Notes) -> Tensor:
        alone = self.v_bias is not None and self.k_bias is None
        return out + self._rows(self.v_bias).to(out.dtype) if alone else out  # type: ignore[arg-type]

    # ---- kernels

    def _phi(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x)
        assert self.kernel_name is not None
        return feature_map(self.kernel_name)(x)

    def mix(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        layout: Layout | None = None,
        context_valid: Tensor | None = None,
        mask: masks.Mask | None = None,
        plan: Plan | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        if self.kernel_name is None:
            return super().mix(
                x, context, layout=layout, valid=valid, context_valid=context_valid, mask=mask, plan=plan, state=state,
                returns=returns,
            )  # fmt: skip
        source = x if context is None else context
        q = through(self.q_norm, split_heads(self.q(x), self.num_heads))
        k = through(self.k_norm, split_heads(self.k(source), self.num_kv_heads))
        v = split_heads(self.v(source), self.num_kv_heads)
        exists = flat_valid(valid if context is None else context_valid)
        stream = Stream(x.flatten(1, -2), exists if context is None else None, state, "state" in returns)
        if self.rotary is not None:
            angles = self._angles(stream)
            q, k = self._rotate(q, k, angles, angles)
        part, final = linear_partial(
            self._phi(q) * self.scale, self._phi(k), v, causal=self.causal and context is None, valid=exists,
            state=state, return_state=True,
        )  # fmt: skip
        if not self.normalize:
            out = part.num
        elif self.kernel_name == "elu1":
            out = part.num / (part.den + 1e-8).unsqueeze(-1)
        else:
            out = part.num / part.den.abs().clamp(min=1).unsqueeze(-1)
        out = self._gate(out.to(q.dtype), self._notes(None, None, state, returns))
        y = through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:-1])))
        return Output(y, state=stream.next(**final.tensors))

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor], num_heads: int | None = None, num_kv_heads: int | None = None
    ) -> dict[str, Tensor]:
        """From the authors' ``CausalSelfAttention`` classes, whose ``attn`` interleaves the projections of a group."""
        theirs = Released(state_dict, "the authors' CausalSelfAttention classes")
        out = theirs.renamed(
            {
                r"attn\.(weight|bias)": grouped_rule(num_heads, num_kv_heads),
                r"proj\.(weight|bias)": r"proj.\1",
                r"kernel_mlp([12])\.(weight|bias)": r"kernel.fc\1.\2",
                r"([kv]_bias)": r"\1",
            }
        )
        return theirs.close(out)


def sink_metric(weights: Tensor, eps: float = 0.3) -> Tensor:
    """Share of maps in which a token is a sink, for every token.

    ``alpha_k = sum_i A_ik / (T - k)`` is the mean weight that key ``k`` (from 0) gets from the ``T - k`` rows that see
    it; it is a sink where ``alpha_k > eps``. Compare at equal ``T`` only.

    Args:
        weights: (..., T, T) causal attention weights: samples, layers and heads in front.
        eps: threshold.

    Returns:
        (T,) shares in [0, 1]; the first is "the" sink rate.

    Reference: Gu et al., 2024, arXiv 2410.10781, section 3.

    >>> sink_metric(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be causal maps (..., T, T), got {tuple(weights.shape)}")
    seen = torch.arange(weights.shape[-1], 0, -1, device=weights.device)
    alpha = weights.to(stats_dtype(weights.dtype)).sum(-2) / seen
    return (alpha > eps).to(torch.float32).reshape(-1, weights.shape[-1]).mean(0)
