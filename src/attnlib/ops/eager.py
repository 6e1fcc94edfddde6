"""The specification of attention: short, differentiable by autograd, whatever the normalizer, bias or mask.

Every other backend is held to this one, forward and backward. It builds the whole (N, M) map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Partial, exactly, stats_dtype
from ._call import AttentionCall
from ._dispatch import Operator


def register(operator: Operator) -> None:
    """Eager serves everything."""
    operator.register("eager", run)


def scores(call: AttentionCall) -> Tensor:
    """(B, H, N, M) scaled and biased scores in the statistics dtype, ``-inf`` where a pair may not meet."""
    dtype = stats_dtype(call.q.dtype)
    k, _ = call.expanded()
    with exactly(call.q):
        s = (call.q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * call.scale
    if call.bias is not None:
        s = s + call.bias.dense().to(dtype)
    allowed = call.allowed()
    return s if allowed is None else s.masked_fill(~allowed, float("-inf"))


def run(call: AttentionCall) -> Tensor | tuple[Tensor, Tensor] | Partial:
    """Output (B, H, N, Dv); with ``want="weights"`` also the weights; with ``want="partial"`` a :class:`Partial`."""
    s = scores(call)
    _, v = call.expanded()
    v = v.to(s.dtype)
    with exactly(call.q):
        if call.want == "partial":
            top = s.detach().amax(-1) if s.shape[-1] else s.detach().sum(-1) - float("inf")
            reference = torch.where(torch.isinf(top), torch.zeros_like(top), top)
            e = torch.exp(s - reference.unsqueeze(-1))
            return Partial(top, e.sum(-1), e @ v)
        # without a mask or bias no row is empty, and the fused softmax needs no care
        whole = call.plain_softmax and call.mask is None and call.valid is None and call.bias is None
        weights = torch.softmax(s, -1) if whole else call.normalizer.weights(s)
        out = (F.dropout(weights, call.dropout_p) if call.dropout_p else weights) @ v
    out = out.to(call.q.dtype)
    return (out, weights) if call.want == "weights" else out


def outputs(call: AttentionCall) -> tuple[Tensor, ...]:
    """:func:`run` as the tensors that a flash kernel gives: ``(out,)``, or the output and its logarithmic scale."""
    result = run(call)
    if isinstance(result, Partial):
        return result.finish(), result.lse()
    assert isinstance(result, Tensor)
    return (result,)
