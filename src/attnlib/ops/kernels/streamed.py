"""Attention without a softmax, streamed in Triton: ``phi(scale * q k^T) v`` for sigmoid, softplus and ReLU.

Such rows need no maximum, so that a tile of scores is turned into weights as it comes and nothing is corrected later;
rows that are divided by their sum (softplus with L1) are divided once, at the end. The forward keeps the output and
that sum; the backward makes the scores again, once along the rows for the queries and once along the columns for keys
and values, which are summed over the query heads that share them outside.

Masks enter as a *band*, first and last of ``key - query``, by which whole tiles are skipped, beside which keys exist.

The kernels are held to the specification through Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...extras import need
from ...masks import And, Causal, Mask, Recent, SlidingWindow
from ...normalizers import Activated, Normalizer, Relu, Sigmoid, SoftplusL1
from .. import eager
from .._call import AttentionCall
from .._dispatch import Operator, twice
from . import absent

#: Widest heads: queries, keys, values and sums of a tile stay on the chip.
WIDEST = 128
#: Beyond any difference of positions.
FAR = 1 << 30


def register(operator: Operator) -> None:
    operator.register(
        "triton", run, supports=supports, prefers=prefers, second="the specification",
        transforms="its backward is written by hand",
    )  # fmt: skip


def activation(normalizer: Normalizer) -> tuple[str, float, float, bool] | None:
    """Activation, what is added to scores, what weights are divided by, and whether rows are divided by their sum."""
    if isinstance(normalizer, Sigmoid):
        return "sigmoid", normalizer.bias, 1.0, False
    if isinstance(normalizer, Relu):
        return "relu", 0.0, normalizer.divisor, False
    if isinstance(normalizer, SoftplusL1):
        return "softplus", 0.0, 1.0, True
    if isinstance(normalizer, Activated) and normalizer.phi in ("sigmoid", "relu", "softplus"):
        if normalizer.power is None:
            return normalizer.phi, 0.0, 1.0, normalizer.l1
    return None


def band(mask: Mask | None) -> tuple[int, int] | None:
    """First and last ``key - query`` that a mask admits; ``None`` when it is no band.

    >>> from attnlib import masks
    >>> band(masks.causal() & masks.sliding_window(4)), band(masks.recent(3)), band(~masks.causal())
    ((-2, 0), (-2, 0), None)
    """
    if mask is None:
        return -FAR, FAR
    if isinstance(mask, Causal):
        return -FAR, 0
    if isinstance(mask, Recent):
        return 1 - mask.window, 0
    if isinstance(mask, SlidingWindow):
        return -(mask.window // 2), (mask.window - 1) // 2
    if isinstance(mask, And):
        left, right = band(mask.left), band(mask.right)
        return None if left is None or right is None else (max(left[0], right[0]), min(left[1], right[1]))
    return None


def supports(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve the call; ``None`` when they can."""
    if call.plain_softmax:
        return "its rows need a maximum; it streams what needs none"
    if activation(call.normalizer) is None:
        return f"it streams sigmoid, softplus and relu, not {call.normalizer}"
    if why := absent("triton", call.q, "its kernels break graphs"):
        return why
    if call.want != "out":
        return "it never holds the whole map of weights" if call.want == "weights" else "parts need softmax"
    if call.dropout_p:
        return "it has no dropout"
    if call.bias is not None:
        return "it takes no bias"
    if not call.standard_positions:
        return "it takes no positions"
    if band(call.mask) is None:
        return f"it takes masks that are a band of key - query, not {call.mask!r}"
    if call.q.dtype == torch.float64:
        return "it has no float64 kernel"
    if max(call.q.shape[3], call.v.shape[3]) > WIDEST:
        return f"it takes heads up to {WIDEST} wide, got D={call.q.shape[3]} and Dv={call.v.shape[3]}"
    if any(0 in t.shape for t in (call.q, call.k, call.v)):
        return "it takes no empty tensors"
    return None


def prefers(call: AttentionCall) -> str | None:
    """Why the automatic choice passes over the kernels: small maps are faster without."""
    return call.smaller_than(1 << 16)


@functools.cache
def kernels() -> ModuleType:
    """The kernels; Triton is imported with them and no earlier."""
    need("triton", "the backend 'triton'")
    from . import _streamed

    return _streamed


def run(call: AttentionCall) -> Tensor:
    """(B, H, N, Dv). Rows that may attend to nothing give zeros."""
    out = _Streamed.apply(call.q, call.k, call.v, call)
    return twice((out,), call.inputs(), lambda *inputs: eager.outputs(call.replaced(inputs)))[0]


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        given = activation(call.normalizer)
        limits = band(call.mask)
        assert given is not None and limits is not None
        settings = (call.scale, *given, *limits)
        valid = None if call.valid is None else call.valid.to(torch.uint8).contiguous()
        q, k, v = (t.contiguous() for t in (q, k, v))
        out, total = kernels().forward(q, k, v, valid, *settings)
        ctx.save_for_backward(q, k, v, valid, out, total)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, valid, out, total = ctx.saved_tensors
        dq, dk, dv = kernels().backward(grad.contiguous(), q, k, v, valid, out, total, *ctx.settings)
        return dq, dk, dv, None
