"""What absent tokens hold stays with them: NaN and infinity behind a mask or ``valid`` reach no value and no gradient.

A weight of zero does not silence them, since ``0 * nan`` is NaN; copying keys and values with zeros in those places
would, at a price that every call would pay. So calls run as they are, and only where something is not finite they run
on tensors that are, after which rows that *do* see it become NaN. Without gradients one look at the output tells, with
gradients one look at the inputs. Where numbers cannot be looked at (under a tracer, under transforms) or looking
would wait for a device, ``valid`` is written into keys and values instead, and pairs of a mask are left to the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..types import Partial, stats_dtype
from . import _tiles
from ._call import AttentionCall, expand_heads
from ._dispatch import transformed, wants_gradient, watched

#: Rows of pairs that are looked at together.
ROWS = 256


def guarded(
    run: Callable[[AttentionCall], Any], call: AttentionCall, problem: Callable[[], AttentionCall] | None = None
) -> Any:
    """``run(call)``, whatever tokens hold that take no part.

    Args:
        problem: gives the call whose mask and ``valid`` say which pairs meet, where ``call`` itself does not.
    """
    if call.mask is None and call.valid is None and problem is None:
        return run(call)
    inputs = call.inputs()
    if not readable(*inputs) or (watched() and transformed([*inputs, *call.deciding()])):
        return run(existing(call))
    if not wants_gradient(inputs):
        out = run(call)
        if finite(out) if isinstance(out, Tensor) else finite(*_fields(out)):
            return out
    elif finite(call.q, call.k, call.v) and not _any_nan(inputs[3:]):
        return run(call)
    return _apart(run, call, call if problem is None else problem())


def readable(*tensors: Tensor) -> bool:
    """Whether the numbers of tensors can be looked at, and at once."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.device.type != "cpu":
            return False
    return True


def finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite. By their sum, so that it may say no because that overflows."""
    for t in tensors:
        if t.requires_grad:
            t = t.detach()
        if not math.isfinite(t.sum(dtype=stats_dtype(t.dtype)).item()):
            return False
    return True


def existing(call: AttentionCall) -> AttentionCall:
    """The call with zeros in place of keys and values that do not exist."""
    if call.valid is None:
        return call
    gone = ~call.valid[:, None, :, None]
    return replace(call, k=call.k.masked_fill(gone, 0.0), v=call.v.masked_fill(gone, 0.0))


def bad_rows(*tensors: Tensor) -> Tensor:
    """(...,): which rows (..., D) hold something that is not finite in any of the tensors."""
    bad = [~torch.isfinite(t.detach()).all(-1) for t in tensors]
    return torch.stack(torch.broadcast_tensors(*bad)).any(0)


def _any_nan(tensors: list[Tensor]) -> bool:
    """Infinity is welcome in a bias."""
    return any(math.isnan(t.detach().sum().item()) and bool(torch.isnan(t).any()) for t in tensors)


def _fields(out: Partial | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out.den, out.num) if isinstance(out, Partial) else out


def _apart(run: Callable[[AttentionCall], Any], call: AttentionCall, problem: AttentionCall) -> Any:
    """``run`` on finite tensors; rows that see what is not finite become NaN."""
    q, k, v, *biases = call.inputs()
    bad_q, bad_k, bad_v = bad_rows(q), bad_rows(k), bad_rows(v)
    clean = [t.masked_fill(bad.unsqueeze(-1), 0.0) for t, bad in ((q, bad_q), (k, bad_k), (v, bad_v))]
    out = run(call.replaced([*clean, *(t.masked_fill(torch.isnan(t), 0.0) for t in biases)]))
    bad_keys = expand_heads(bad_k, call.heads) | expand_heads(bad_v, call.heads)
    seen = torch.zeros_like(bad_q)
    for start in range(0, q.shape[2], ROWS):
        rows = (start, min(start + ROWS, q.shape[2]))
        span = slice(*rows)
        bad = bad_q[:, :, span, None] | bad_keys[:, :, None]
        if call.bias is not None:
            bad = bad | torch.isnan(call.bias.block(span, slice(None)))
        seen[:, :, span] = (bad & _allowed(problem, rows)).any(-1)
    if isinstance(out, Partial):
        # Dividing NaN by NaN makes NaN of a gradient of zero, so that here none is passed on.
        return Partial(out.log_scale, spoil(out.den, seen, False), spoil(out.num, seen.unsqueeze(-1), False))
    if isinstance(out, tuple):
        weights = torch.where(seen.unsqueeze(-1) & _allowed(problem, (0, q.shape[2])), float("nan"), out[1])
        return spoil(out[0], seen.unsqueeze(-1)), weights
    return spoil(out, seen.unsqueeze(-1))


def _allowed(problem: AttentionCall, rows: tuple[int, int]) -> Tensor:
    n, m = problem.q.shape[2], problem.k.shape[2]
    if problem.mask is None and problem.valid is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    q_pos, k_pos = _tiles.lift(problem.q_pos), _tiles.lift(problem.k_pos)
    return _tiles.Pairs(n, m, problem.q.device, problem.mask, problem.valid, q_pos, k_pos).allowed(rows, (0, m))


class _Spoil(torch.autograd.Function):
    """NaN in some places. What asks for their gradient gets NaN, what does not (zero) gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, tell: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.tell = tell
        return x.masked_fill(places, float("nan"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        spoilt = torch.where(grad != 0, float("nan"), grad) if ctx.tell else torch.zeros_like(grad)
        return torch.where(places, spoilt, grad), None, None


def spoil(x: Tensor, places: Tensor, tell: bool = True) -> Tensor:
    """``x`` with NaN where ``places`` says so (broadcast).

    Args:
        tell: a gradient that is asked for there is NaN, too, so that it is noticed; otherwise it is zero.
    """
    return _Spoil.apply(x, places, tell) if bool(places.any()) else x
