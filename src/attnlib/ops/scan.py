"""Selective scan: a diagonal state space whose step, input and output depend on the token (S6 of Mamba).

``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`` and ``y_t = C_t . h_t + D u_t``, for every channel with ``S`` numbers
of state. The *eager* form is one token after the other and the specification. The *chunked* form makes decays and
entries of a chunk at once, in memory that every chunk uses again, and reads all outputs at once; between them a token
is one operation in place, ``enters_t += decay_t h_{t-1}``. (Rows of tokens side by side, with the states at their
starts found first, are fewer operations and were slower: they read the chunk twice.) Decays enter as ``exp`` of steps
and never as a quotient, so one that underflows gives zeros. Its backward is written by hand and makes the states again,
chunk by chunk, from those that the forward kept at the starts of chunks: memory is that of the inputs plus one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import (
    check_device,
    check_flag,
    check_float,
    check_int,
    check_rank,
    check_tensor,
    check_type,
    check_valid,
    check_whole,
)
from ..normalizers import LOG2_E
from ..types import State, exactly, stats_dtype
from . import _shards
from ._dispatch import Operator, transformed, twice, wants_gradient
from ._guard import finite, readable, spoil
from .linear import _segments

#: Numbers of state that a chunk holds in one sample, measured on the CPU; and the bounds of its length.
CHUNK_NUMBERS, SHORTEST, LONGEST = 2**16, 16, 256
#: Those of all samples that the forward makes at once.
TILE_NUMBERS = 2**17


class ScanOutput(NamedTuple):
    """Output (B, N, channels) and the state after the last token."""

    out: Tensor
    state: State


@dataclass(frozen=True)
class _Call:
    """A checked problem in the statistics dtype; absent tokens are zeros."""

    u: Tensor  # (B, N, E)
    delta: Tensor  # (B, L, E), raw
    A: Tensor  # (E, S)
    B: Tensor  # (B, N, G, S)
    C: Tensor  # (B, N, G, S)
    D: Tensor | None  # (E,)
    z: Tensor | None  # (B, N, E)
    delta_bias: Tensor | None  # (E,)
    softplus: bool
    valid: Tensor | None  # (B, N)
    segment: Tensor | None  # (N,)
    positions: Tensor | None  # (B, N)
    state: Tensor | None  # (B, E, S)
    chunk: int

    def inputs(self) -> list[Tensor]:
        tensors = (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.state)
        return [t for t in tensors if t is not None]


class _Terms(NamedTuple):
    """``h_t = exp(a_t A) h_{t-1} + x_t b_t``, ``y_t = c_t . h_t``, for G groups of E channels."""

    a: Tensor  # (B, N, G, E)
    x: Tensor  # (B, N, G, E)
    A: Tensor  # (G, S, E)
    b: Tensor  # (B, N, G, S)
    c: Tensor  # (B, N, G, S)
    start: Tensor  # (B, G, S, E)


# --------------------------------------------------------------------------------------------------------------------
# The door


def _prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *, state: State | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None, valid: Tensor | None = None, positions: Tensor | None = None,
    chunk: int | None = None,
) -> _Call:  # fmt: skip
    check_rank("u", u, 3, "(B, N, channels)")
    check_rank("delta", delta, 3, "(B, N, channels)")
    check_rank("A", A, 2, "(channels, S)")
    check_flag("delta_softplus", delta_softplus)
    batch, n, channels = u.shape
    size = A.shape[1]
    for name, t in dict(B=B, C=C).items():
        check_rank(name, t, (3, 4), "(B, N, S) or (B, N, groups, S)")
        if t.shape[:2] != u.shape[:2] or t.shape[-1] != size:
            raise ValueError(
                f"{name} must be (B, N, S)={(batch, n, size)} or (B, N, groups, S), got {tuple(t.shape)}"
            )  # fmt: skip
        if t.dim() == 4 and (t.shape[2] < 1 or channels % t.shape[2]):
            raise ValueError(f"{name} has {t.shape[2]} groups, which do not divide the {channels} channels of u")
    if A.shape[0] != channels:
        raise ValueError(f"A must be (channels, S)={(channels, 'S')}, got {tuple(A.shape)}")
    if delta.shape[0] != batch or delta.shape[2] != channels:
        raise ValueError(f"delta must be (B, N, channels)={(batch, n, channels)}, got {tuple(delta.shape)}")
    if z is not None:
        check_rank("z", z, 3, "(B, N, channels)")
        if z.shape != u.shape:
            raise ValueError(f"z must be (B, N, channels)={tuple(u.shape)}, got {tuple(z.shape)}")
    for name, one in dict(D=D, delta_bias=delta_bias).items():
        if one is not None:
            check_rank(name, one, 1, "(channels,)")
            if tuple(one.shape) != (channels,):
                raise ValueError(f"{name} must be (channels,)={(channels,)}, got {tuple(one.shape)}")
    operands = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    for name, given in operands.items():
        if given is not None:
            check_float(name, given)
    check_valid("valid", valid, (batch, n))
    check_device(**operands, valid=valid, positions=positions)
    if chunk is None:
        chunk = max(SHORTEST, min(LONGEST, CHUNK_NUMBERS // max(channels * size, 1)))
    check_int("chunk", chunk, least=1)
    if positions is None:
        if delta.shape[1] != n:
            raise ValueError(f"delta has {delta.shape[1]} tokens and u has {n}; without positions they must agree")
    else:
        if cu_seqlens is not None:
            raise ValueError("positions cannot be combined with cu_seqlens; scan the segments one by one")
        _check_positions(positions, valid, (batch, n), delta.shape[1])
    start = None if state is None else _start_of(state, (batch, channels, size), u)
    dtype = stats_dtype(u.dtype)
    grouped = [t.to(dtype) if t.dim() == 4 else t.to(dtype).unsqueeze(2) for t in (B, C)]
    groups = math.lcm(*(t.shape[2] for t in grouped))
    b, c = (t if t.shape[2] == groups else t.repeat_interleave(groups // t.shape[2], 2) for t in grouped)
    u, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    D, z, delta_bias = (None if t is None else t.to(dtype) for t in (D, z, delta_bias))
    if valid is not None:
        # Every factor, so that what a token holds that does not exist stays there, in gradients too.
        gone = ~valid.unsqueeze(-1)
        u, b, c = u.masked_fill(gone, 0.0), b.masked_fill(gone.unsqueeze(-1), 0.0), c.masked_fill(gone[..., None], 0.0)
        z = None if z is None else z.masked_fill(gone, 0.0)
        delta = delta.masked_fill(gone, 0.0) if delta.shape[1] == n else delta
    segment = None if cu_seqlens is None else _segments(cu_seqlens, n, u.device)[0]
    return _Call(u, delta, A, b, c, D, z, delta_bias, delta_softplus, valid, segment, positions, start, chunk)


def _check_positions(positions: Tensor, valid: Tensor | None, shape: tuple[int, int], length: int) -> None:
    check_whole("positions", positions, "an integer tensor (B, N)")
    if tuple(positions.shape) != shape:
        raise ValueError(f"positions must be (B, N)={shape}, got {tuple(positions.shape)}")
    if length < shape[1]:
        raise ValueError(f"delta has {length} tokens, of which u keeps {shape[1]}; it needs at least as many")
    if torch.compiler.is_compiling() or positions.device.type == "meta" or positions.numel() == 0:
        return
    at = _reached(positions, valid)
    steps = at.diff(dim=1, prepend=at.new_full((shape[0], 1), -1))
    bad = steps <= 0 if valid is None else ((steps <= 0) & valid) | (steps < 0)
    if valid is None and bool((positions[:, 0] < 0).any()):
        raise ValueError(f"positions must not be negative, got {int(positions.min())}")
    if bool(bad.any()):
        raise ValueError(f"positions must ascend along the tokens of each sample, got {positions.tolist()}")
    if length > shape[1] and int(at.max()) >= length:
        raise ValueError(f"positions must lie below the {length} tokens of delta, got {int(at.max())}")


def _reached(positions: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N) the last position up to each token; -1 before the first. Tokens that do not exist stand still."""
    positions = positions.long()
    return positions if valid is None else torch.where(valid, positions, -1).cummax(1).values


def _start_of(state: State, shape: tuple[int, int, int], u: Tensor) -> Tensor:
    check_type("state", state, State)
    if "h" not in state:
        raise ValueError(f"state must be what return_state gave, with h; got {sorted(state)}")
    start = state["h"]
    check_tensor("state h", start)
    if tuple(start.shape) != shape:
        raise ValueError(f"state h must be (B, channels, S)={shape}, got {tuple(start.shape)}")
    check_device(u=u, h=start)
    if start.dtype != stats_dtype(u.dtype):
        raise TypeError(f"state h must be {stats_dtype(u.dtype)}, as return_state gives it, got {start.dtype}")
    return start


def _steps(delta: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps by which the state decays before each token, steps of the tokens, and the step after the last (B, E)."""
    valid, positions = call.valid, call.positions
    gone = None if valid is None else ~valid.unsqueeze(-1)
    if positions is None:
        step = delta if gone is None else delta.masked_fill(gone, 0.0)
        return step, step, None
    at = _reached(positions, valid)
    if delta.shape[1] == call.u.shape[1]:
        before = F.pad(at, (1, 0), value=-1)[:, :-1]
        step = delta if gone is None else delta.masked_fill(gone, 0.0)
        return (at - before).unsqueeze(-1) * step, step, None
    batch, length, channels = delta.shape
    # Every token's step goes to the first one kept at its place or behind; the last slot is for those behind all.
    each = torch.arange(length, device=delta.device).expand(batch, -1).contiguous()
    slot = torch.searchsorted(at.contiguous(), each).unsqueeze(-1).expand(-1, -1, channels)
    sums = delta.new_zeros(batch, at.shape[1] + 1, channels).scatter_add(1, slot, delta)
    own = delta.gather(1, at.clamp(min=0).unsqueeze(-1).expand(-1, -1, channels))
    own = own if gone is None else own.masked_fill(gone, 0.0)
    return sums[:, :-1], own, sums[:, -1]


def _around(core: Callable[[_Terms, Tensor | None, int], tuple[Tensor, Tensor]], call: _Call) -> tuple[Tensor, Tensor]:
    """Steps, the recurrence by ``core``, skip and gate: output (B, N, E) and state (B, E, S)."""
    delta = call.delta if call.delta_bias is None else call.delta + call.delta_bias
    delta = F.softplus(delta) if call.softplus else delta
    a, own, tail = _steps(delta, call)
    batch, n, channels = call.u.shape
    groups, size = call.B.shape[2:]
    parts = (groups, channels // groups)
    x = (own * call.u).unflatten(2, parts)
    A = call.A.unflatten(0, parts).transpose(1, 2)
    if call.state is None:
        start = x.new_zeros(batch, groups, size, parts[1])
    else:
        start = call.state.unflatten(1, parts).transpose(2, 3)
    reset = None
    if call.segment is not None:
        reset = F.pad(call.segment.diff() != 0, (1, 0)) if n else call.segment.bool()
    out, final = core(_Terms(a.unflatten(2, parts), x, A, call.B, call.C, start), reset, call.chunk)
    out, final = out.flatten(2), final.transpose(2, 3).flatten(1, 2)
    if tail is not None:
        final = final * (tail.unsqueeze(-1) * call.A).exp()
    if call.D is not None:
        out = out + call.D * call.u
    return (out if call.z is None else out * F.silu(call.z)), final


def _run(call: _Call, backend: str | None) -> tuple[Tensor, Tensor]:
    """The operator, on tokens that lie here or with others, too."""
    who = _shards.others()
    return _run_here(call, backend) if who is None else who.scan(call, partial(_run_here, backend=backend))


def _run_here(call: _Call, backend: str | None) -> tuple[Tensor, Tensor]:
    """The operator, whatever tokens hold that take no part: later ones, other segments."""
    tokens = [t for t in (call.u, call.delta, call.B, call.C, call.z) if t is not None]
    if not readable(*tokens) or transformed(call.inputs()):
        return _OPERATOR.run(call, backend)
    if not wants_gradient(call.inputs()):
        out, final = _OPERATOR.run(call, backend)
        if finite(out):
            return out, final
    elif finite(*tokens):
        return _OPERATOR.run(call, backend)
    bad_u, bad_d, bad_z = (None if t is None else ~torch.isfinite(t.detach()) for t in (call.u, call.delta, call.z))
    bad_b, bad_c = (~torch.isfinite(t.detach()).all(-1) for t in (call.B, call.C))
    assert bad_u is not None and bad_d is not None
    per = call.u.shape[2] // call.B.shape[2]
    late = _steps(bad_d.to(call.u.dtype), call)
    enters = bad_u | (late[0] > 0) | bad_b.repeat_interleave(per, 2)
    leaves = bad_u | bad_c.repeat_interleave(per, 2) | (bad_u if bad_z is None else bad_z)
    clean = replace(
        call, u=call.u.masked_fill(bad_u, 0.0), delta=call.delta.masked_fill(bad_d, 0.0),
        B=call.B.masked_fill(bad_b.unsqueeze(-1), 0.0), C=call.C.masked_fill(bad_c.unsqueeze(-1), 0.0),
        z=None if call.z is None or bad_z is None else call.z.masked_fill(bad_z, 0.0),
    )  # fmt: skip
    out, final = _OPERATOR.run(clean, backend)
    count = F.pad(enters.long().cumsum(1), (0, 0, 1, 0))
    n = call.u.shape[1]
    if call.segment is None:
        seen, ends = count[:, 1:] > 0, count[:, -1] > 0
    else:
        first = torch.searchsorted(call.segment, call.segment)
        seen = count[:, 1:] > count[:, first]
        ends = count[:, -1] > count[:, first[-1]] if n else count[:, -1] > 0
    if late[2] is not None:
        ends = ends | (late[2] > 0)
    return spoil(out, seen | leaves), spoil(final, ends.unsqueeze(-1))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    state: State | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
    return_state: bool = False,
) -> Any:
    """``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = (C_t . h_t + D u_t) silu(z_t)``.

    Args:
        u: (B, N, channels) inputs.
        delta: (B, N, channels) steps, before ``delta_bias`` and softplus; with ``positions`` perhaps of more tokens.
        A: (channels, S) decays per step, negative for a state that fades.
        B: (B, N, S), or (B, N, groups, S) where neighbouring channels form groups: how tokens enter the state.
        C: the same: how they read it.
        D: (channels,) skip.
        z: (B, N, channels) gate.
        delta_bias: (channels,), added to the steps.
        delta_softplus: steps are the softplus of what is given.
        state: what ``return_state`` gave for the tokens before these: ``h`` (B, channels, S).
        cu_seqlens: (segments + 1,) cumulative lengths ``[0, .., N]`` of independent segments in one sequence.
        valid: (B, N) boolean, which tokens exist. Others add nothing, let no time pass and give zeros.
        positions: (B, N) ascending places of the tokens in a longer sequence from which others were removed. The state
            decays over what was removed: by its own steps when ``delta`` is that of the whole sequence (then the
            result is that of a dense scan whose removed inputs are zero), else by the step of the next token that is
            left, once per place.
        chunk: tokens per chunk; changes speed and memory, not the result.
        backend: ``"chunked"``, also by default, or ``"eager"``, one token after the other.
        return_state: also return the state after the last token; always float32 (or float64).

    Returns:
        (B, N, channels), or a :class:`ScanOutput` of it and the state. One token and ``state`` are a decoding step.

    Raises:
        ValueError: shapes that do not fit, positions that do not ascend, a state of another shape.
        TypeError: integer inputs.

    Reference: Gu and Dao, 2023, arXiv 2312.00752; Zhan et al., 2024, arXiv 2409.18962 (positions).

    >>> import torch
    >>> u, delta, b, c = torch.randn(1, 10, 4), torch.rand(1, 10, 4), torch.randn(1, 10, 3), torch.randn(1, 10, 3)
    >>> A = -torch.rand(4, 3)
    >>> first = selective_scan(u[:, :6], delta[:, :6], A, b[:, :6], c[:, :6], return_state=True)
    >>> rest = selective_scan(u[:, 6:], delta[:, 6:], A, b[:, 6:], c[:, 6:], state=first.state)
    >>> torch.allclose(torch.cat([first.out, rest], 1), selective_scan(u, delta, A, b, c), atol=1e-5)
    True
    """
    check_flag("return_state", return_state)
    check_tensor("u", u)
    with exactly(u):
        call = _prepare(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, state=state, cu_seqlens=cu_seqlens, valid=valid,
            positions=positions, chunk=chunk,
        )  # fmt: skip
        out, final = _run(call, backend)
    out = out.to(u.dtype)
    return ScanOutput(out, State({"h": final})) if return_state else out


# --------------------------------------------------------------------------------------------------------------------
# Eager: the specification


def _recurrent(terms: _Terms, reset: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    a, x, A, b, c, h = terms
    outs = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[t], torch.zeros_like(h), h)
        h = (a[:, t].unsqueeze(-2) * A).exp() * h + x[:, t].unsqueeze(-2) * b[:, t].unsqueeze(-1)
        outs.append((c[:, t].unsqueeze(-1) * h).sum(-2))
    return torch.stack(outs, 1) if outs else torch.zeros_like(x), h


# --------------------------------------------------------------------------------------------------------------------
# Chunked


def _tile(numbers: int, chunk: int) -> int:
    """Tokens of ``numbers`` numbers each that are walked along at once: as many as a processor holds close by."""
    most = max(1, min(chunk, TILE_NUMBERS // max(numbers, 1)))
    return -(-chunk // -(-chunk // most))


def _decays(a: Tensor, A: Tensor, reset: Tensor | None, out: Tensor) -> Tensor:
    """``2^(a_t A)`` (B, T, G, S, E), written to ``out``."""
    torch.mul(a.unsqueeze(-2), A, out=out).exp2_()
    return out if reset is None else out.masked_fill_(reset[None, :, None, None, None], 0.0)


def _forward_tiles(
    a: Tensor, x: Tensor, A: Tensor, b: Tensor, c: Tensor, start: Tensor, reset: Tensor | None, chunk: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, N, G, E), final state and the state before each chunk (chunks, B, G, S, E)."""
    n = x.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = start.clone(memory_format=torch.contiguous_format)
    states = s.new_empty(-(-n // chunk) if keep_states else 0, *s.shape)
    tile = _tile(s.numel(), min(chunk, max(n, 1)))
    # What is written to was made before: nothing that leaves is of this mode, in which a token costs a third less.
    with torch.inference_mode():
        decays, h = (s.new_empty(s.shape[0], tile, *s.shape[1:]) for _ in range(2))
        A, each, token = (A * LOG2_E).contiguous(), decays.unbind(1), h.unbind(1)
        for first in range(0, n, chunk):
            if keep_states:
                states[first // chunk] = s
            end = min(first + chunk, n)
            for begin in range(first, end, tile):
                at = slice(begin, min(begin + tile, end))
                count = at.stop - begin
                _decays(a[:, at], A, None if reset is None else reset[at], decays[:, :count])
                torch.mul(x[:, at].unsqueeze(-2), b[:, at].unsqueeze(-1), out=h[:, :count])
                last = s
                for i in range(count):
                    last = token[i].addcmul_(each[i], last)
                s.copy_(last)
                read = torch.bmm(c[:, at].flatten(0, 2).unsqueeze(1), h[:, :count].flatten(0, 2))
                out[:, at] = read.view(out[:, at].shape)
    return out, s, states


def _backward_tiles(
    a: Tensor, x: Tensor, A: Tensor, b: Tensor, c: Tensor, states: Tensor, reset: Tensor | None, d_out: Tensor,
    d_final: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of steps, inputs, decays, entries, readers and start state, in one walk from the right."""
    n = x.shape[1]
    da, dx, db, dc = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, x, b, c))
    d_A = torch.zeros_like(A, memory_format=torch.contiguous_format)
    ds = d_final.clone(memory_format=torch.contiguous_format)
    shape = (ds.shape[0], min(chunk, n), *ds.shape[1:])
    with torch.inference_mode():  # as in the forward
        buffers = [ds.new_empty(shape) for _ in range(3)]
        each, entered, asked = (t.unbind(1) for t in buffers)
        A = A.contiguous()
        A_2 = A * LOG2_E
        for first in reversed(range(0, n, chunk)):
            at = slice(first, min(first + chunk, n))
            decays, h, g = (t[:, : at.stop - first] for t in buffers)
            ar, xr, yr = (t[:, at].unsqueeze(-2) for t in (a, x, d_out))
            br, cr = (t[:, at].unsqueeze(-1) for t in (b, c))
            _decays(a[:, at], A_2, None if reset is None else reset[at], decays)
            torch.mul(xr, br, out=h)
            torch.mul(yr, cr, out=g)
            last = before = states[first // chunk]
            for i in range(at.stop - first):
                last = entered[i].addcmul_(each[i], last)
            last = asked[at.stop - first - 1].add_(ds)
            for i in range(at.stop - first - 2, -1, -1):
                last = asked[i].addcmul_(each[i + 1], last)
            torch.mul(each[0], last, out=ds)
            dx[:, at] = (br.mT @ g).squeeze(-2)
            db[:, at] = (g @ xr.mT).squeeze(-1)
            dc[:, at] = (h @ yr.mT).squeeze(-1)
            # What is left of the state when a token comes, times what it is asked for: the decays are not needed any
            # more.
            decays[:, 0].mul_(before)
            decays[:, 1:].mul_(h[:, :-1])
            moved = decays.mul_(g)
            da[:, at] = torch.mul(moved, A, out=h).sum(-2)
            d_A += torch.mul(moved, ar, out=g).sum((0, 1))
    return da, dx, d_A, db, dc, ds


class _Chunked(torch.autograd.Function):
    """:func:`_forward_tiles` and :func:`_backward_tiles` for eager execution."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, x: Tensor, A: Tensor, b: Tensor, c: Tensor, start: Tensor, reset: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        out, final, states = _forward_tiles(a, x, A, b, c, start, reset, chunk, any(ctx.needs_input_grad))
        ctx.save_for_backward(a, x, A, b, c, reset, states)
        ctx.set_materialize_grads(False)
        ctx.chunk = chunk
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> Any:  # type: ignore[override]
        if d_out is None and d_final is None:
            return (None,) * 8
        a, x, A, b, c, reset, states = ctx.saved_tensors
        d_out = torch.zeros_like(x) if d_out is None else d_out
        d_final = x.new_zeros(x.shape[0], *A.shape) if d_final is None else d_final
        return *_backward_tiles(a, x, A, b, c, states, reset, d_out, d_final, ctx.chunk), None, None


# The same two functions as custom operators, one node each in a traced graph whatever N is.

_forward_op = torch.library.custom_op(
    "attnlib::selective_scan",
    _forward_tiles,
    mutates_args=(),
    schema="(Tensor a, Tensor x, Tensor A, Tensor b, Tensor c, Tensor start, Tensor? reset, int chunk, "
    "bool keep_states) -> (Tensor, Tensor, Tensor)",
)


def _backward_exact(*args: Any) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in _backward_tiles(*args))


_backward_op = torch.library.custom_op(
    "attnlib::selective_scan_backward",
    _backward_exact,
    mutates_args=(),
    schema="(Tensor a, Tensor x, Tensor A, Tensor b, Tensor c, Tensor states, Tensor? reset, Tensor d_out, "
    "Tensor d_final, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(a, x, A, b, c, start, reset, chunk, keep_states):  # type: ignore[no-untyped-def]
    count = -(-x.shape[1] // chunk) if keep_states else 0
    return x.new_empty(x.shape), start.new_empty(start.shape), start.new_empty(count, *start.shape)


@_backward_op.register_fake
def _(a, x, A, b, c, states, reset, d_out, d_final, chunk):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (a, x, A, b, c, d_final))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, x, A, b, c, _, reset, chunk, _ = inputs
    ctx.save_for_backward(a, x, A, b, c, reset, output[2])
    ctx.chunk = chunk


def _backward(ctx: Any, d_out: Tensor, d_final: Tensor, _: Tensor) -> Any:
    a, x, A, b, c, reset, states = ctx.saved_tensors
    return *_backward_op(a, x, A, b, c, states, reset, d_out, d_final, ctx.chunk), None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# A token and a number of state: step times decay, exp, two multiplications and additions in, one out; the backward
# makes the states again and has as much for gradients, and one each for what every factor gets.


@register_flop_formula(torch.ops.attnlib.selective_scan)
def _(a, x, A, b, c, start, reset, chunk, keep_states, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return 8 * math.prod(x) * A[1]


@register_flop_formula(torch.ops.attnlib.selective_scan_backward)
def _(a, x, A, b, c, states, reset, d_out, d_final, chunk, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return 22 * math.prod(x) * A[1]


def _rows(t: Tensor, row: int) -> Tensor:
    """(row, B, T, G, ..) of (B, N, G, ..), so that one step of all rows lies together; zeros until rows are full."""
    t = F.pad(t, (0, 0, 0, 0, 0, -t.shape[1] % row))
    return t.unflatten(1, (-1, row)).movedim(2, 0)


def _plain_rows(terms: _Terms, reset: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """All rows of the sequence at once, without writing in place: any derivative and any transform goes through it."""
    n = terms.x.shape[1]
    if n == 0:
        return torch.zeros_like(terms.x), terms.start
    row = math.ceil(n**0.5)
    ar, xr = (_rows(t, row).unsqueeze(-2) for t in (terms.a, terms.x))
    br, cr = (_rows(t, row).unsqueeze(-1) for t in (terms.b, terms.c))
    each, whole = (ar * terms.A).exp(), (ar.sum(0) * terms.A).exp()
    if reset is not None:
        where = F.pad(reset, (0, -n % row)).unflatten(0, (-1, row)).t()
        each = each.masked_fill(where[:, None, :, None, None, None], 0.0)
        whole = whole.masked_fill(where.any(0)[None, :, None, None, None], 0.0)
    h = xr[0] * br[0]
    for i in range(1, row):
        h = h * each[i] + xr[i] * br[i]
    s, starts = terms.start, []
    for i in range(h.shape[1]):
        starts.append(s)
        s = s * whole[:, i] + h[:, i]
    h, outs = torch.stack(starts, 1), []
    for i in range(row):
        h = h * each[i] + xr[i] * br[i]
        outs.append((cr[i] * h).sum(-2))
    return torch.stack(outs).movedim(0, 2).flatten(1, 2)[:, :n], s


def _chunked(terms: _Terms, reset: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    if transformed(terms):
        return _plain_rows(terms, reset, chunk)
    if torch.compiler.is_compiling():
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in terms)
        return _forward_op(*terms, reset, chunk, keep)[:2]
    if not wants_gradient(terms):
        return _forward_tiles(*terms, reset, chunk, False)[:2]
    out, final = _Chunked.apply(*terms, reset, chunk)

    def spec(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return _plain_rows(_Terms(*tensors), reset, chunk)

    out, final = twice((out, final), list(terms), spec)
    return out, final


_OPERATOR = Operator("selective_scan", _prepare, cut=True)


def _single(call: _Call) -> bool:
    """Whether there is one token, as while decoding; said of no graph, which serves any number."""
    return not torch.compiler.is_compiling() and call.u.shape[1] == 1


_OPERATOR.register(
    "chunked", partial(_around, _chunked), second="the same rows by plain operations",
    prefers=lambda call: "a single token needs no chunks" if _single(call) else None,
)  # fmt: skip
_OPERATOR.register("eager", partial(_around, _recurrent))
