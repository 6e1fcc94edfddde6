"""Plain softmax through ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import readable
from ..masks import holds_dense
from ..positions import DenseBias
from ..types import stats_dtype
from . import eager, split_decoding
from ._call import AttentionCall, expand_heads
from ._dispatch import Operator, device_kind, twice


def register(operator: Operator) -> None:
    operator.register(
        "sdpa", run, supports=supports, prefers=prefers, second="the specification",
        transforms="the backward of its kernels is written by hand",
    )  # fmt: skip


def supports(call: AttentionCall) -> str | None:
    """Why SDPA cannot serve the call; ``None`` when it can."""
    if not call.plain_softmax:
        return f"its normalizer is {call.normalizer.name}, SDPA only knows softmax"
    if call.want == "weights":
        return "SDPA does not return weights"
    if call.want == "partial":
        return "SDPA does not return the row statistics with gradients"
    if call.bias is not None and (device := device_kind(call.q)) != "cpu":
        for t in call.bias.tensors():
            if t.is_floating_point() and t.dtype.itemsize > call.q.dtype.itemsize:
                return f"on {device} it would round the {t.dtype} bias to {call.q.dtype}"
    return None


def prefers(call: AttentionCall) -> str | None:
    """Why the automatic choice passes over SDPA; ``None`` when it is the right one.

    SDPA reads masks and biases as dense tensors and computes every pair. From 512 x 512 on it leaves structured masks
    to backends that skip what a mask forbids; from 1024 x 1024 on also biases that need not be dense, whose map alone
    would make memory quadratic. Heads whose values are not as wide as their keys (``Dv != D``) send it down a path that
    builds the whole map, too, so that it leaves them from 256 x 256 on. Causal masks it knows by itself, and of the two
    only it has dropout. Few queries over samples of unlike length go to the split schedule.
    """
    if call.dropout_p:
        return None
    if call.valid is not None and split_decoding.prefers(call) is None and split_decoding.supports(call) is None:
        return "it would read the keys that do not exist too"
    if call.mask is not None and not call.is_causal and not holds_dense(call.mask):
        if call.smaller_than(1 << 18) is None:
            return f"it would compute every pair that {call.mask!r} forbids"
    width, v_width = call.q.shape[3], call.v.shape[3]
    if width != v_width and call.smaller_than(1 << 16) is None:
        return f"with heads of D={width} and Dv={v_width} it builds the whole map; its kernels need one width"
    if call.bias is not None and not isinstance(call.bias, DenseBias) and call.smaller_than(1 << 20) is None:
        return "it would hold the bias as a dense map"
    if isinstance(call.bias, DenseBias) and call.smaller_than(1 << 18) is None and _differentiates(call):
        if _far_rows(call.bias.dense()):
            return "rows of the bias lie, or may lie, far from zero, where only its path with the whole map is right"
    return None


#: Height of a row of the bias from which on rounding of its log-sum-exp shows in the gradient.
FAR = 100.0


def _differentiates(call: AttentionCall) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in call.inputs())


def _far_rows(bias: Tensor | None) -> bool:
    """Whether the largest entry of some row lies far from zero; assumed where the numbers cannot be looked at."""
    if bias is None or bias.dtype == torch.bool or not bias.numel():
        return False
    if not readable(bias):
        return True
    top = bias.detach().amax(-1).abs()
    return bool(((top > FAR) & top.isfinite()).any())


def run(call: AttentionCall) -> Tensor:
    """(B, H, N, Dv). Rows that may attend to nothing give zeros."""
    out = _run(call)
    if not torch.is_grad_enabled():
        return out
    return twice((out,), call.inputs(), lambda *inputs: eager.outputs(_undropped(call).replaced(inputs)))[0]


def _undropped(call: AttentionCall) -> AttentionCall:
    if call.dropout_p:
        raise NotImplementedError(
            "backend='sdpa' has no second derivative with dropout; possible: ['eager'] or dropout_p=0"
        )
    return call


def _run(call: AttentionCall) -> Tensor:
    q, k, v = call.q, call.k, call.v
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:  # or it builds the map
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grouped = bool(k.shape[1] == v.shape[1] != q.shape[1])  # also under jit.trace, where sizes are tensors
    if not grouped:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    if call.is_causal and call.bias is None:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=call.dropout_p, is_causal=True, scale=call.scale, enable_gqa=grouped
        )
    allowed = call.allowed()
    empty = None
    bias: Tensor | None = None if call.bias is None else call.bias.dense()
    if bias is not None and bias.dtype != q.dtype:
        bias = bias.to(stats_dtype(q.dtype))  # beside half precision it may stay in float32
    if allowed is not None:
        empty = ~allowed.any(-1, keepdim=True)
        # An empty row attends everywhere and is zeroed below: no NaN enters, and its gradient is exactly zero.
        allowed = allowed | empty
        bias = allowed if bias is None else bias.masked_fill(~allowed, float("-inf"))
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], k.shape[2])
    # From the sum of a row that lies far from zero the hand-written backward cannot tell its scores apart.
    far = call.bias is not None and _differentiates(call) and _far_rows(bias)
    with sdpa_kernel(SDPBackend.MATH) if far else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=call.dropout_p, scale=call.scale, enable_gqa=grouped
        )
    return out if empty is None else out.masked_fill(empty, 0.0)
