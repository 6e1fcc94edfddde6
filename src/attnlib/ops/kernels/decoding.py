"""Attention of few queries over many keys in Triton: keys in splits, each a part, and the parts merged.

A program has the queries that share a key head and one split of its sample's keys, and writes their part
``(m, l, o)``; a second kernel merges the parts of a head. Splits are even for every sample, whatever its length, so
that all programs of a sample end together. It serves decoding: no gradients.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...extras import need
from ...types import Partial
from .._call import expand_heads
from .._dispatch import Operator, device_kind, wants_gradient
from . import absent

#: Queries of a key head that one tile holds, and the widest heads.
MOST, WIDEST = 64, 256
#: Programs that keep a processor of the device busy, and keys below which a split does not pay.
WAVES, SHORTEST = 2, 256
#: Processors that are taken for granted where the device does not say.
PROCESSORS = 108


def register(operator: Operator) -> None:
    operator.register("triton", run, supports=supports, transforms="it reads how many keys each sample has")


def supports(problem: Any) -> str | None:
    """Why the kernels cannot serve the call; ``None`` when they can."""
    call = problem.call
    if why := absent("triton", call.q, "its kernels break graphs"):
        return why
    if wants_gradient(call.inputs()):
        return "it has no backward, call it under torch.no_grad()"
    if call.q.dtype == torch.float64:
        return "it has no float64 kernel"
    rows = call.q.shape[2] * _group(call.q, call.k, call.v)
    if rows > MOST:
        return f"it takes up to {MOST} queries per key head, got {rows}"
    if max(call.q.shape[3], call.v.shape[3]) > WIDEST:
        return f"it takes heads up to {WIDEST} wide, got D={call.q.shape[3]} and Dv={call.v.shape[3]}"
    if any(0 in t.shape for t in (call.q, call.k, call.v)):
        return "it takes no empty tensors"
    return None


def _group(q: Tensor, k: Tensor, v: Tensor) -> int:
    return q.shape[1] // k.shape[1] if k.shape[1] == v.shape[1] else 1


@functools.cache
def kernels() -> ModuleType:
    """The kernels; Triton is imported with them and no earlier."""
    need("triton", "the backend 'triton'")
    from . import _decoding

    return _decoding


def splits_of(longest: int, planes: int, processors: int) -> int:
    """Splits per sample and key head: enough to fill the device, none shorter than :data:`SHORTEST` keys.

    >>> splits_of(longest=8192, planes=8, processors=108), splits_of(100, 8, 108), splits_of(8192, 1000, 108)
    (27, 1, 1)
    """
    return max(1, min(WAVES * processors // max(planes, 1), longest // SHORTEST))


def run(problem: Any) -> Tensor | Partial:
    """(B, H, N, Dv), or a part (B, H, N). A sample without keys gives zeros."""
    call = problem.call
    q, k, v = call.q, call.k, call.v
    if k.shape[1] != v.shape[1]:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    batch, planes = q.shape[0], q.shape[0] * k.shape[1]
    splits = problem.settings[-1]
    if splits is None:
        processors = PROCESSORS
        if q.device.type == "cuda" and device_kind(q) == "cuda":
            processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        splits = splits_of(max(problem.lengths), planes, processors)
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=q.device)
    group = q.shape[1] // k.shape[1]
    rows = q.reshape(batch, k.shape[1], group * q.shape[2], q.shape[3]).contiguous()
    fields = kernels().decode(
        rows, k.contiguous(), v.contiguous(), lengths, q.shape[2], call.scale, problem.causal, splits
    )
    top, den, num = (t.unflatten(2, (group, q.shape[2])).flatten(1, 2) for t in fields)
    part = Partial(top, den, num)
    return part if call.want == "partial" else part.finish().to(q.dtype)
