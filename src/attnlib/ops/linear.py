"""Linear attention with decay: one operator, several forms.

``o_t = sum_{j <= t} exp(g_{j+1} + .. + g_t) w_j (q_t . k_j) v_j`` with log-decays ``g <= 0``, optionally divided by the
sum of its own weights. The *parallel* form builds the whole (N, N) map and is the specification; the *chunkwise* form
is the fast one, quadratic only inside a chunk, with a float32 state of shape (D, Dv) between chunks; the *recurrent*
form is one token after the other. Segments that are read from both sides without decay are sums of their own: the
*scattered* form adds them up in blocks of powers of two, so that nothing is padded however their sizes differ. Decays
enter only as ``exp`` of sums that are never positive: nothing is inverted, so a decay that underflows gives zeros and
not infinities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import (
    check_choice,
    check_device,
    check_flag,
    check_float,
    check_int,
    check_ints,
    check_rank,
    check_real,
    check_tensor,
    check_type,
    check_valid,
    check_whole,
)
from ..normalizers import LOG2_E
from ..types import Partial, State, exactly, stats_dtype
from . import _shards
from ._call import check_qkv, expand_heads
from ._dispatch import Operator, transformed, twice, wants_gradient
from ._guard import bad_rows, finite, readable, spoil
from .kernels import fla

#: Backends; ``"parallel"`` is another name of ``"eager"``.
FORMS = ("parallel", "scatter", "fla", "chunkwise", "recurrent", "eager")
NORMALIZERS = ("none", "sum", "subtract")

#: Chunk lengths measured on the CPU: 128 with a decay per head or token, 16 with one per channel (its chunks hold
#: chunk x chunk x D elements).
DEFAULT_CHUNK, DEFAULT_CHANNEL_CHUNK = 128, 16


class LinearOutput(NamedTuple):
    """Output (B, H, N, Dv) and the state after the last token."""

    out: Tensor
    state: State


@dataclass(frozen=True)
class _Call:
    """A checked problem: everything in the statistics dtype, heads repeated, weights and validity folded into ``k``."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H, M, D)
    v: Tensor  # (B, H, M, Dv), with a column of ones appended when the denominator is wanted
    decay: Tensor | None  # (1, H, 1) constant, (B, H, N) per token, (B, H, N, D) per channel
    segment: Tensor | None  # (N,) segment number of each token
    state: Tensor | None  # (B, H, D, Dv)
    causal: bool
    chunk: int
    bounds: Tensor | None = None  # (S + 1,) where segments begin
    side: _Call | None = None  # the denominator of other features, or what the mean of the values needs
    working: torch.dtype = torch.float32  # of the tensors as they were given

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.decay, self.state) if t is not None]

    def replaced(self, inputs: Sequence[Tensor]) -> _Call:
        """The same problem on other tensors in place of :meth:`inputs`."""
        q, k, v, *rest = inputs
        decay, state = (None if t is None else rest.pop(0) for t in (self.decay, self.state))
        return replace(self, q=q, k=k, v=v, decay=decay, state=state)


# --------------------------------------------------------------------------------------------------------------------
# The door


def _check_decay(decay: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, n, d = q.shape
    if tuple(decay.shape) not in ((heads,), (batch, heads, n), (batch, heads, n, d)):
        raise ValueError(
            f"decay must be (H,)={(heads,)}, (B, H, N)={(batch, heads, n)} or (B, H, N, D)={(batch, heads, n, d)}, "
            f"got {tuple(decay.shape)}"
        )
    return decay.to(dtype).view(1, heads, 1) if decay.dim() == 1 else decay.to(dtype)


def _segments(cu_seqlens: Tensor | Sequence[int], n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,) segment numbers from cumulative lengths ``[0, .., N]``, and these."""
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.tensor(check_ints("cu_seqlens", cu_seqlens, least=0), dtype=torch.long, device=device)
    check_whole("cu_seqlens", cu_seqlens, "a 1-D integer tensor [0, .., N]")
    check_rank("cu_seqlens", cu_seqlens, 1, "(S + 1,)")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens lies on {cu_seqlens.device}, the tokens on {device}; they must lie on one device")
    checkable = not torch.compiler.is_compiling() and cu_seqlens.device.type != "meta"
    if checkable and (cu_seqlens.numel() == 0 or cu_seqlens[0] != 0 or cu_seqlens[-1] != n):
        raise ValueError(f"cu_seqlens must run from 0 to N={n}, got {cu_seqlens.tolist()}")
    if checkable and bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
    return torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(n, device=device), right=True), cu_seqlens


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = None, key_weights: Tensor | None = None,
    normalizer: str = "none", causal: bool = True, cu_seqlens: Tensor | Sequence[int] | None = None,
    valid: Tensor | None = None, state: State | None = None, chunk: int | None = None,
    denominator: tuple[Tensor, Tensor] | None = None,
) -> _Call:  # fmt: skip
    check_choice("normalizer", normalizer, NORMALIZERS)
    foreign = _check_denominator(denominator, normalizer, q, k, decay)
    column = normalizer != "none" and foreign is None
    check_qkv(q, k, v)
    check_flag("causal", causal)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_float(name, t)
    check_valid("valid", valid, (q.shape[0], k.shape[2]))
    for name, given in (("decay", decay), ("key_weights", key_weights)):
        if given is not None:
            check_float(name, given, "a floating-point tensor" + " of log-decays" * (name == "decay"))
    check_device(q=q, k=k, v=v, decay=decay, key_weights=key_weights, valid=valid)
    if foreign is not None:
        check_device(q=q, **dict(zip(("denominator queries", "denominator keys"), foreign, strict=True)))
    batch, heads, n, d = q.shape
    m = k.shape[2]
    aligned = causal or decay is not None or cu_seqlens is not None
    if aligned and n != m:
        why = "causal=True" if causal else "decay" if decay is not None else "cu_seqlens"
        raise ValueError(f"{why} needs as many queries as keys, got N={n} and M={m}")
    if not causal and state is not None and (decay is not None or cu_seqlens is not None):
        raise ValueError("state cannot continue a bidirectional call with decay or cu_seqlens; use causal=True")
    if chunk is not None:
        check_int("chunk", chunk, least=1)
    dtype, working = stats_dtype(q.dtype), q.dtype
    q = q.to(dtype)
    k, v = expand_heads(k.to(dtype), heads), expand_heads(v.to(dtype), heads)
    q_other, k_other = (expand_heads(t.to(dtype), heads) for t in foreign) if foreign is not None else (None, None)
    weights = None
    if key_weights is not None:
        if tuple(key_weights.shape) not in ((batch, m), (batch, heads, m)):
            raise ValueError(
                f"key_weights must be (B, M)={(batch, m)} or (B, H, M)={(batch, heads, m)}, "
                f"got {tuple(key_weights.shape)}"
            )
        weights = key_weights.to(dtype)
        weights = (weights if weights.dim() == 3 else weights[:, None]).unsqueeze(-1)
    if decay is not None:
        decay = _check_decay(decay, q, dtype)
    if valid is not None:
        # Every factor, so that what a token holds that does not exist stays there, in gradients too.
        gone = ~valid[:, None, :, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
        q = q.masked_fill(gone, 0.0) if aligned else q  # else queries may be other tokens
        if q_other is not None and k_other is not None:
            k_other = k_other.masked_fill(gone, 0.0)
            q_other = q_other.masked_fill(gone, 0.0) if aligned else q_other
        weights = None if weights is None else weights.masked_fill(gone, 0.0)
        if decay is not None:
            # A token that does not exist takes no step: the state neither reads it nor fades because of it.
            steps = valid[:, None] if decay.dim() == 3 else valid[:, None, :, None]
            decay = torch.where(steps, decay, torch.zeros_like(decay))
    if decay is not None and readable(decay) and decay.numel() and not transformed([decay]):
        low, high = (float(t) for t in torch.aminmax(decay.detach()))
        if high > 0 or low == float("-inf"):
            raise ValueError(f"decay holds finite log-decays of at most 0, got numbers from {low} to {high}")
    if weights is not None:
        k = k * weights
        k_other = None if k_other is None else k_other * weights
    values = v
    if column:
        v = torch.cat([v, v.new_ones(batch, heads, m, 1)], -1)
    segment, bounds = (None, None) if cu_seqlens is None else _segments(cu_seqlens, n, q.device)
    per_channel = decay is not None and decay.dim() == 4
    default = DEFAULT_CHANNEL_CHUNK if per_channel else DEFAULT_CHUNK
    start = None if state is None else _start_of(state, (batch, heads, d), values.shape[-1], column, q)
    call = _Call(q, k, v, decay, segment, start, causal, default if chunk is None else chunk, bounds, working=working)
    if q_other is not None and k_other is not None:
        start = None if state is None else _held(state, "z", (batch, heads, q_other.shape[-1]), "(B, H, D)", q)
        start = None if start is None else start.unsqueeze(-1)
        side = replace(call, q=q_other, k=k_other, v=v.new_ones(batch, heads, m, 1), state=start)
        return replace(call, side=side)
    if normalizer == "subtract":
        own, exists = q.new_ones(batch, heads, n, 1), k.new_ones(batch, heads, m, 1)
        if valid is not None:
            exists = exists.masked_fill(gone, 0.0)
            own = own.masked_fill(gone, 0.0) if aligned else own
        if state is not None:
            total = _held(state, "V", (batch, heads, values.shape[-1]), "(B, H, Dv)", q)
            start = torch.cat([total, _held(state, "n", (batch, heads), "(B, H)", q).unsqueeze(-1)], -1).unsqueeze(2)
        side = replace(call, q=own, k=exists, decay=None, state=start, chunk=DEFAULT_CHUNK if chunk is None else chunk)
        return replace(call, side=side)
    return call


def _check_denominator(
    denominator: Any, normalizer: str, q: Any, k: Any, decay: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The pair of features that the denominator is made of, checked."""
    if denominator is None:
        return None
    if normalizer != "sum":
        raise ValueError(f"denominator needs normalizer='sum', got normalizer={normalizer!r}")
    if not isinstance(denominator, (tuple, list)) or len(denominator) != 2:
        raise TypeError("denominator must be a pair of features (q, k), both (B, H, N, D)")
    if isinstance(decay, Tensor) and decay.dim() == 4:
        raise ValueError("denominator is not possible with a decay per channel, which belongs to other features")
    for name, given, like in (("queries", denominator[0], q), ("keys", denominator[1], k)):
        check_float(f"denominator {name}", given)
        if given.dim() != 4 or given.shape[:3] != like.shape[:3]:
            raise ValueError(
                f"denominator {name} must be (B, H, N, D) with (B, H, N)={tuple(like.shape[:3])}, "
                f"got {tuple(given.shape)}"
            )
    if denominator[0].shape[-1] != denominator[1].shape[-1]:
        raise ValueError(
            f"denominator queries and keys must have equally many features, got {denominator[0].shape[-1]} and "
            f"{denominator[1].shape[-1]}"
        )
    return denominator[0], denominator[1]


def _held(state: State, name: str, shape: tuple[int, ...], says: str, q: Tensor) -> Tensor:
    """One tensor of a state, checked."""
    if name not in state:
        if name == "S":
            raise ValueError(
                f"state must be what return_state gave, with S and with a normalizer z; got {sorted(state)}"
            )
        why = "the denominator needs" if name == "z" else "normalizer='subtract' needs"
        raise ValueError(f"state has no {name}, which {why}; it was made without one")
    held = state[name]
    check_tensor(f"state {name}", held)
    if tuple(held.shape) != shape:
        raise ValueError(f"state {name} must be {says}={shape}, got {tuple(held.shape)}")
    check_device(q=q, **{f"state {name}": held})
    if held.dtype != q.dtype:
        raise TypeError(f"state {name} must be {q.dtype}, as return_state gives it, got {held.dtype}")
    return held


def _start_of(state: State, shape: tuple[int, int, int], width: int, column: bool, q: Tensor) -> Tensor:
    """The state that a call starts from, checked."""
    check_type("state", state, State)
    start = _held(state, "S", (*shape, width), "(B, H, D, Dv)", q)
    if not column:
        return start
    return torch.cat([start, _held(state, "z", shape, "(B, H, D)", q).unsqueeze(-1)], -1)


def _run(call: _Call, form: str | None) -> tuple[Tensor, Tensor]:
    """The operator, on tokens that lie here or with others, too."""
    who = _shards.others()
    return _run_here(call, form) if who is None else who.linear(call, partial(_run_here, form=form))


def _run_here(call: _Call, form: str | None) -> tuple[Tensor, Tensor]:
    """The operator, whatever tokens hold that take no part: later ones, other segments."""
    tensors = [t for t in (call.q, call.k, call.v, call.decay) if t is not None]
    if not readable(*tensors) or transformed(call.inputs()):
        return _OPERATOR.run(call, form)
    if not wants_gradient(tensors):
        out, final = _OPERATOR.run(call, form)
        if finite(out):
            return out, final
    elif finite(*tensors):
        return _OPERATOR.run(call, form)
    decay, bad_q, bad_k = call.decay, bad_rows(call.q), bad_rows(call.k, call.v)
    if decay is not None:
        if decay.shape[:3] == bad_k.shape:  # else it is one number per head
            bad_k = bad_k | ~torch.isfinite(decay.detach()).view(*bad_k.shape, -1).all(-1)
            decay = decay.masked_fill(~torch.isfinite(decay), 0.0)
    q = call.q.masked_fill(bad_q.unsqueeze(-1), 0.0)
    k, v = (t.masked_fill(bad_k.unsqueeze(-1), 0.0) for t in (call.k, call.v))
    out, final = _OPERATOR.run(replace(call, q=q, k=k, v=v, decay=decay), form)
    segment = call.segment if call.segment is not None else bad_k.new_zeros(bad_k.shape[-1], dtype=torch.long)
    count = F.pad(bad_k.long().cumsum(-1), (1, 0))
    first, last = (torch.searchsorted(segment, segment, right=right) for right in (False, True))
    if call.causal:
        seen = count[..., 1:] > count[..., first]
    elif call.segment is not None or call.decay is not None:
        seen = count[..., last] > count[..., first]
    else:
        seen = bad_k.any(-1, keepdim=True)
    ends = (count[..., -1:] > count[..., first[-1:]]).unsqueeze(-1) if segment.numel() else bad_k.new_zeros(())
    return spoil(out, (seen | bad_q).unsqueeze(-1)), spoil(final, ends)


def _unordered(call: _Call) -> bool:
    """Whether all queries read all keys alike."""
    return not call.causal and call.decay is None and call.segment is None


def _both_ways(form: Callable[..., tuple[Tensor, Tensor]], call: _Call) -> tuple[Tensor, Tensor]:
    """Numerator (and denominator, as last column) (B, H, N, Dv) and the state (B, H, D, Dv) after the last token."""
    if _unordered(call):
        return _plain_sums(call)
    if call.causal:
        return form(call, strict=False)
    # Bidirectional: what came before, and strictly what comes after, which is what came before in reverse.
    out, final = form(call, strict=False)
    decay = call.decay
    if decay is not None:
        decay = decay.expand(-1, -1, call.q.shape[2], *decay.shape[3:])
        # |t - j| steps lie between two tokens whichever comes first, so the reversed decays move on by one token.
        decay = F.pad(decay.flip(2), (0, 0, 1, 0) if decay.dim() == 4 else (1, 0))[:, :, : call.q.shape[2]]
    segment = None if call.segment is None else call.segment.flip(0)
    back = _Call(
        call.q.flip(2), call.k.flip(2), call.v.flip(2), decay, segment, None, True, call.chunk
    )  # fmt: skip
    after, _ = form(back, strict=True)
    return out + after.flip(2), final


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    key_weights: Tensor | None = None,
    normalizer: str = "none",
    causal: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    valid: Tensor | None = None,
    state: State | None = None,
    chunk: int | None = None,
    form: str | None = None,
    eps: float = 0.0,
    denominator: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Any:
    """``o_t = sum_j exp(g_{j+1} + .. + g_t) w_j (q_t . k_j) v_j``, over ``j <= t`` when causal.

    Bidirectional calls weigh a pair by the decay between the two tokens, whichever comes first. Without decay and
    without segments they also serve cross-attention (N != M).

    Args:
        q: (B, H, N, D) queries, already mapped to features.
        k: (B, Hk, M, D) keys, already mapped; ``H % Hk == 0``.
        v: (B, Hv, M, Dv) values; ``H % Hv == 0``.
        decay: log-decays ``g``, at most 0: (H,) constant per head, (B, H, N) per token, (B, H, N, D) per channel.
        key_weights: (B, M) or (B, H, M) weights ``w`` of the keys.
        normalizer: ``"none"``; ``"sum"`` to divide by the sum of weights, where a row without weight gives zeros; or
            ``"subtract"``, weights less their mean over the tokens that a row reads, plus one over their number: rows
            sum to one, and weights may be negative. Means are over tokens that exist.
        causal: a token reads itself and earlier ones.
        cu_seqlens: (S + 1,) cumulative lengths ``[0, .., N]`` of independent segments packed into one sequence.
        valid: (B, M) boolean, which tokens exist. Others add nothing and let no time pass: decay counts valid tokens.
        state: what ``return_state`` gave for the tokens before these: ``S`` (B, H, D, Dv) and, with a normalizer,
            ``z`` (B, H, D); to subtract, also the sum ``V`` (B, H, Dv) and the number ``n`` (B, H) of the values.
        chunk: tokens per chunk; changes speed and memory, not the result.
        form: the backend: ``"scatter"`` for segments that are read from both sides without decay, ``"fla"`` on CUDA
            (extra ``fla``), ``"chunkwise"``, ``"recurrent"``, or ``"eager"``, also called ``"parallel"``: the quadratic
            specification. By default the first that serves.
        eps: added to the denominator.
        denominator: with ``"sum"``, features ``(q', k')`` (B, H, N, D') and (B, H, M, D') whose products, with the same
            decays and key weights, are summed for the denominator instead of those of ``q`` and ``k``.
        return_state: also return the state after the last token (of the last segment); always float32 (or float64).

    Returns:
        (B, H, N, Dv), or a :class:`LinearOutput` of it and the state.

    Raises:
        ValueError: shapes that do not fit, or an unknown form or normalizer.
        TypeError: integer inputs.

    Reference: Katharopoulos et al., 2020, arXiv 2006.16236; Qin et al., 2024, arXiv 2401.04658 (tiles, backward);
    Yang et al., 2023, arXiv 2312.06635 (decay per channel, gradient of the decay).

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 10, 4)
    >>> first = linear_attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], return_state=True)
    >>> rest = linear_attention(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], state=first.state)
    >>> torch.allclose(torch.cat([first.out, rest], 2), linear_attention(q, k, v), atol=1e-5)
    True
    """
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_real("eps", eps, least=0)
    check_flag("return_state", return_state)
    check_tensor("q", q)
    alike = causal is False and all(t is None for t in (decay, cu_seqlens, state, denominator, _shards.others()))
    if normalizer == "subtract" and alike and not return_state:
        return _centered(q, k, v, key_weights, valid, chunk, form)
    with exactly(q):
        call = _prepare(
            q, k, v, decay=decay, key_weights=key_weights, normalizer=normalizer, causal=causal, cu_seqlens=cu_seqlens,
            valid=valid, state=state, chunk=chunk, denominator=denominator,
        )  # fmt: skip
        out, final = _run(call, form)
        beside = None if call.side is None else _run(call.side, form)
        held = _pack(final, normalizer != "none" and denominator is None)
        if normalizer == "sum":
            den = out[..., -1] if beside is None else beside[0][..., 0]
            out = _divide(out if beside is not None else out[..., :-1], den + eps if eps else den)
            if beside is not None:
                held = held.replace(z=beside[1].squeeze(-1))
        elif beside is not None:
            mean = _divide(beside[0][..., :-1], beside[0][..., -1])
            out = out[..., :-1] + (1 - out[..., -1:]) * mean
            held = held.replace(V=beside[1][:, :, 0, :-1], n=beside[1][:, :, 0, -1])
    out = out.to(q.dtype)
    return LinearOutput(out, held) if return_state else out


def _centered(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, valid: Tensor | None, chunk: int | None, form: str | None
) -> Tensor:
    """Weights less their mean, plus one over their number, where all queries read all keys: they may as well be left as
    they are and read values less theirs, ``sum_j (w_j - mean w + 1 / n) v_j = sum_j w_j (v_j - mean v) + mean v``."""
    with exactly(q):
        call = _prepare(q, k, v, key_weights=weights, causal=False, valid=valid, chunk=chunk)
        count = call.v.shape[2] if valid is None else valid.sum(1).view(-1, 1, 1, 1)
        mean = call.v.sum(2, keepdim=True) / torch.as_tensor(count, device=q.device).clamp(min=1)
        out, _ = _run(replace(call, v=call.v - mean), form)
        return (out + mean).to(q.dtype)


def _divide(num: Tensor, den: Tensor) -> Tensor:
    """(.., Dv) over (..); zeros where nothing is to divide by."""
    return Partial(torch.zeros_like(den), den, num).finish()


def linear_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    key_weights: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    valid: Tensor | None = None,
    state: State | None = None,
    chunk: int | None = None,
    form: str | None = None,
    return_state: bool = False,
) -> Any:
    """:func:`linear_attention` as a mergeable part ``(0, den, num)``, to share one denominator with a softmax part.

    Arguments as in :func:`linear_attention`.

    Returns:
        A :class:`attnlib.types.Partial` in the statistics dtype, or a pair of it and the state.

    >>> import torch
    >>> q, k, v = torch.rand(3, 1, 2, 10, 4)
    >>> torch.allclose(linear_partial(q, k, v).finish(), linear_attention(q, k, v, normalizer="sum"), atol=1e-6)
    True
    """
    check_flag("return_state", return_state)
    check_tensor("q", q)
    with exactly(q):
        call = _prepare(
            q, k, v, decay=decay, key_weights=key_weights, normalizer="sum", causal=causal, cu_seqlens=cu_seqlens,
            valid=valid, state=state, chunk=chunk,
        )  # fmt: skip
        out, final = _run(call, form)
        part = Partial(torch.zeros_like(out[..., -1]), out[..., -1], out[..., :-1])
    return (part, _pack(final, True)) if return_state else part


def _pack(final: Tensor, denominator: bool) -> State:
    return State({"S": final[..., :-1], "z": final[..., -1]}) if denominator else State({"S": final})


# --------------------------------------------------------------------------------------------------------------------
# Parallel: the specification


def _parallel(call: _Call) -> tuple[Tensor, Tensor]:
    n, m = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    allowed = torch.ones(n, m, dtype=torch.bool, device=device)
    if call.causal:
        allowed = allowed.tril()
    if call.segment is not None:
        allowed = allowed & (call.segment[:, None] == call.segment[None, :])
    q, k, v, state = call.q, call.k, call.v, call.state
    if call.decay is None:
        scores = (q @ k.transpose(-2, -1)).masked_fill(~allowed, 0.0)
        out, final = scores @ v, k
        if state is not None:
            first = torch.ones(n, device=device) if call.segment is None else (call.segment == call.segment[:1])
            out = out + (q * first.to(q.dtype)[:, None]) @ state
    else:
        per_channel = call.decay.dim() == 4
        g = call.decay.expand(q.shape[0], -1, n, *call.decay.shape[3:])
        g = g if per_channel else g.unsqueeze(-1)
        c = g.cumsum(2)
        between = -(c.unsqueeze(3) - c.unsqueeze(2)).abs()
        # exp(0) where a pair may not meet, so that no gradient flows through an exponent that is not used
        between = torch.where(allowed[..., None], between, torch.zeros_like(between)).exp()
        if per_channel:
            scores = torch.einsum("bhnd,bhmd,bhnmd->bhnm", q, k, between)
        else:
            scores = (q @ k.transpose(-2, -1)) * between.squeeze(-1)
        out = scores.masked_fill(~allowed, 0.0) @ v
        last = c[:, :, -1:] if n else c.new_zeros(*c.shape[:2], 1, c.shape[3])
        final = k * (last - c).exp()
        if state is not None:
            reach = c.exp()
            if call.segment is not None:
                reach = reach * (call.segment == call.segment[:1]).to(reach.dtype)[:, None]
            out = out + (q * reach) @ state
            state = state * last.exp().transpose(-2, -1)
    if call.segment is not None and n:
        final = final * (call.segment == call.segment[-1:]).to(final.dtype)[:, None]
        if state is not None:
            state = state * (call.segment[0] == call.segment[-1]).to(state.dtype)
    final = final.transpose(-2, -1) @ v
    return out, final if state is None else final + state


def _plain_sums(call: _Call) -> tuple[Tensor, Tensor]:
    """Bidirectional without decay or segments: two products, also for N != M."""
    final = call.k.transpose(-2, -1) @ call.v
    if call.state is not None:
        final = final + call.state
    return call.q @ final, final


# --------------------------------------------------------------------------------------------------------------------
# Scattered segments

#: Tokens of the largest block that a segment is cut into.
SCATTER_BLOCK = 128


def _segment_blocks(bounds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (nb, size) and segments (nb,) of blocks that cover all segments: one batch for each power of two.

    A segment of 300 tokens is two blocks of 128, one of 32, one of 8 and one of 4.
    """
    first, lengths = bounds[:-1], bounds.diff()
    number = torch.arange(lengths.numel(), device=bounds.device)
    whole = lengths // SCATTER_BLOCK
    size = SCATTER_BLOCK
    if bool((whole > 0).any()):
        which = number.repeat_interleave(whole)
        place = torch.arange(which.numel(), device=bounds.device) - (whole.cumsum(0) - whole)[which]
        yield (first[which] + place * size).unsqueeze(1) + torch.arange(size, device=bounds.device), which
    while size > 1:
        size //= 2
        which = number[(lengths & size) > 0]
        if which.numel():
            begin = first[which] + lengths[which] // (2 * size) * (2 * size)
            yield begin.unsqueeze(1) + torch.arange(size, device=bounds.device), which


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    if tokens.numel() == x.shape[2]:  # all tokens in one batch of blocks lie in their order
        return x.unflatten(2, tokens.shape)
    return x.index_select(2, tokens.flatten()).unflatten(2, tokens.shape)


def _sums(a: Tensor, b: Tensor, bounds: Tensor) -> Tensor:
    """``sum_i a_i b_i^T`` over each segment: (B, H, N, D) and (B, H, N, E) to (B, H, S, D, E)."""
    out = a.new_zeros(*a.shape[:2], bounds.numel() - 1, a.shape[-1], b.shape[-1])
    for tokens, which in _segment_blocks(bounds):
        out.index_add_(2, which, _gathered(a, tokens).transpose(-2, -1) @ _gathered(b, tokens))
    return out


def _reads(a: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """``a_i^T s`` with the matrix of the segment of ``i``: (B, H, N, D) and (B, H, S, D, E) to (B, H, N, E)."""
    out = a.new_empty(*a.shape[:3], sums.shape[-1])
    for tokens, which in _segment_blocks(bounds):
        rows = (_gathered(a, tokens) @ sums.index_select(2, which)).flatten(2, 3)
        if rows.shape[2] == a.shape[2]:
            return rows
        out.index_copy_(2, tokens.flatten(), rows)
    return out


_sums_op = torch.library.custom_op(
    "attnlib::linear_segment_sums", _sums, mutates_args=(), schema="(Tensor a, Tensor b, Tensor bounds) -> Tensor"
)
_reads_op = torch.library.custom_op(
    "attnlib::linear_segment_reads", _reads, mutates_args=(), schema="(Tensor a, Tensor sums, Tensor bounds) -> Tensor"
)


@_sums_op.register_fake
def _(a, b, bounds):  # type: ignore[no-untyped-def]
    return a.new_empty(*a.shape[:2], bounds.shape[0] - 1, a.shape[-1], b.shape[-1])


@_reads_op.register_fake
def _(a, sums, bounds):  # type: ignore[no-untyped-def]
    return a.new_empty(*a.shape[:3], sums.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


# Each of the two is the gradient of the other, so that any derivative is made of them.


def _sums_backward(ctx: Any, grad: Tensor) -> Any:
    a, b, bounds = ctx.saved_tensors
    return _reads_op(b, grad.transpose(-2, -1), bounds), _reads_op(a, grad, bounds), None


def _reads_backward(ctx: Any, grad: Tensor) -> Any:
    a, sums, bounds = ctx.saved_tensors
    return _reads_op(grad, sums.transpose(-2, -1), bounds), _sums_op(a, grad, bounds), None


_sums_op.register_autograd(_sums_backward, setup_context=_keep)
_reads_op.register_autograd(_reads_backward, setup_context=_keep)


@register_flop_formula(torch.ops.attnlib.linear_segment_sums)
def _(a, b, bounds, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return 2 * math.prod(a) * b[-1]


@register_flop_formula(torch.ops.attnlib.linear_segment_reads)
def _(a, sums, bounds, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return 2 * math.prod(a) * sums[-1]


def _scattered(call: _Call) -> tuple[Tensor, Tensor]:
    assert call.bounds is not None and call.segment is not None
    sums = _sums_op(call.k, call.v, call.bounds)
    out = _reads_op(call.q, sums, call.bounds)
    if call.q.shape[2] == 0:
        return out, call.q.new_zeros(*call.q.shape[:2], call.q.shape[3], call.v.shape[3])
    return out, sums.index_select(2, call.segment[-1:]).squeeze(2)


def _needs_segments(call: _Call) -> str | None:
    if call.causal or call.decay is not None or call.segment is None:
        return "it sums whole segments, so it needs cu_seqlens, causal=False and no decay"
    return None


# --------------------------------------------------------------------------------------------------------------------
# Recurrent


def _start(call: _Call) -> Tensor:
    if call.state is not None:
        return call.state
    batch, heads, _, d = call.q.shape
    return call.q.new_zeros(batch, heads, d, call.v.shape[-1])


def _recurrent(call: _Call, strict: bool) -> tuple[Tensor, Tensor]:
    s, outs = _start(call), []
    n = call.q.shape[2]
    for t in range(n):
        if call.segment is not None and t:
            s = torch.where(call.segment[t] == call.segment[t - 1], s, torch.zeros_like(s))
        if call.decay is not None:
            g = call.decay[:, :, t if call.decay.shape[2] > 1 else 0].exp()
            s = s * (g.unsqueeze(-1) if g.dim() == 3 else g[..., None, None])
        before, s = s, s + call.k[:, :, t].unsqueeze(-1) * call.v[:, :, t].unsqueeze(-2)
        outs.append((call.q[:, :, t].unsqueeze(-2) @ (before if strict else s)).squeeze(-2))
    out = torch.stack(outs, 2) if outs else call.v.new_zeros(*call.q.shape[:3], call.v.shape[-1])
    return out, s


# --------------------------------------------------------------------------------------------------------------------
# Chunkwise


def _factors(decay: Tensor | None, segment: Tensor | None, before: Tensor | None, like: Tensor, strict: bool) -> Any:
    """Weights inside one chunk of m tokens.

    Args:
        decay: (.., m) log-decays of the chunk, or ``None``.
        segment: (m,) segment numbers, or ``None``.
        before: () segment number that the incoming state belongs to.
        like: gives dtype and device; its second last axis is m.

    Returns:
        ``inside`` (.., m, m) of token pairs, ``reach`` (.., m, 1) of the incoming state at each query, ``stay``
        (.., m, 1) of each key in the outgoing state, ``keep`` (.., 1, 1) of the incoming in the outgoing state.
    """
    m = like.shape[-2]
    allowed = torch.ones(m, m, dtype=torch.bool, device=like.device).tril(-1 if strict else 0)
    if segment is not None:
        allowed = allowed & (segment[:, None] == segment[None, :])
    if decay is None:
        inside = allowed.to(like.dtype)
        reach = stay = inside.new_ones(m, 1)
        keep = inside.new_ones(1, 1)
    else:
        c = (decay * LOG2_E).cumsum(-1)
        last = c[..., -1:]
        inside = torch.where(allowed, c.unsqueeze(-1) - c.unsqueeze(-2), float("-inf")).exp2()
        reach, stay, keep = c.exp2().unsqueeze(-1), (last - c).exp2().unsqueeze(-1), last.exp2().unsqueeze(-1)
    if segment is not None:
        assert before is not None
        dtype = like.dtype
        reach = reach * (segment == before).to(dtype)[:, None]
        stay = stay * (segment == segment[-1]).to(dtype)[:, None]
        keep = keep * (segment[-1] == before).to(dtype)
    return inside, reach, stay, keep


class _Tiles:
    """Chunk boundaries and the weights inside each chunk, shared by forward and backward."""

    def __init__(self, decay: Tensor | None, segment: Tensor | None, like: Tensor, chunk: int, strict: bool):
        self.decay, self.segment, self.like, self.strict = decay, segment, like, strict
        n = like.shape[2]
        self.spans = [(a, min(a + chunk, n)) for a in range(0, n, chunk)]
        self.shared = segment is None and (decay is None or decay.shape[2] == 1)
        self._known: dict[int, Any] = {}

    def __getitem__(self, span: tuple[int, int]) -> Any:
        a, b = span
        if self.shared and b - a in self._known:
            return self._known[b - a]
        decay = self.decay
        if decay is not None:
            decay = decay.expand(-1, -1, b - a) if decay.shape[2] == 1 else decay[:, :, a:b]
        segment = before = None
        if self.segment is not None:
            segment, before = self.segment[a:b], self.segment[max(a - 1, 0)]
        out = _factors(decay, segment, before, self.like[:, :, a:b], self.strict)
        if self.shared:
            self._known[b - a] = out
        return out


# The decay may be (1, H, 1), the same at every token, or (B, H, N).


def _forward_tiles(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, segment: Tensor | None, start: Tensor, chunk: int,
    strict: bool, keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tile after tile with a running state: output, final state and the state before each tile (T, B, H, D, Dv)."""
    tiles = _Tiles(decay, segment, q, chunk, strict)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    states = start.new_empty(len(tiles.spans) if keep_states else 0, *start.shape)
    s = start.clone()
    for i, (a, b) in enumerate(tiles.spans):
        inside, reach, stay, keep = tiles[a, b]
        qc, kc, vc = q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]
        if keep_states:
            states[i] = s
        scores = (qc @ kc.transpose(-2, -1)).mul_(inside)
        out[:, :, a:b] = (scores @ vc).add_((qc * reach) @ s)
        s = s.mul_(keep).add_((kc * stay).transpose(-2, -1) @ vc)
    return out, s, states


def _backward_tiles(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, segment: Tensor | None, states: Tensor, d_out: Tensor,
    d_final: Tensor, chunk: int, strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values and start state, in one walk from the right.

    Lightning Attention-2 walks left to right for the queries and right to left for keys and values, making the states
    again. The forward kept them here (N D Dv / chunk numbers, no more than the values while a head is no wider than a
    chunk), so that one walk serves all.
    """
    tiles = _Tiles(decay, segment, q, chunk, strict)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    ds = d_final.clone()
    for i in range(len(tiles.spans) - 1, -1, -1):
        a, b = tiles.spans[i]
        inside, reach, stay, keep = tiles[a, b]
        qc, kc, vc, oc = q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], d_out[:, :, a:b]
        scores = (qc @ kc.transpose(-2, -1)).mul_(inside)
        grads = (oc @ vc.transpose(-2, -1)).mul_(inside)
        dq[:, :, a:b] = (grads @ kc).add_((oc @ states[i].transpose(-2, -1)).mul_(reach))
        dk[:, :, a:b] = (grads.transpose(-2, -1) @ qc).add_((vc @ ds.transpose(-2, -1)).mul_(stay))
        dv[:, :, a:b] = (scores.transpose(-2, -1) @ oc).add_((kc * stay) @ ds)
        ds = ds.mul_(keep).add_((qc * reach).transpose(-2, -1) @ oc)
    return dq, dk, dv, ds


def _decay_gradient(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, final: Tensor, d_final: Tensor, decay: Tensor, segment: Tensor | None
) -> Tensor:
    """With C the running sum of log-decays, ``dL/dC_t = q_t . dq_t - k_t . dk_t``: no further product is needed."""
    at = (q * dq).sum(-1) - (k * dk).sum(-1)
    # The final state depends on the running sum at the last token, too.
    grad = at.flip(2).cumsum(2).flip(2) + (final * d_final).sum((-2, -1)).unsqueeze(-1)
    if segment is not None:
        # The decay at the first token of a segment is never used.
        grad = grad.masked_fill(F.pad(segment.diff() != 0, (1, 0)), 0.0)
    return grad.sum_to_size(decay.shape)


class _Chunkwise(torch.autograd.Function):
    """:func:`_forward_tiles` and :func:`_backward_tiles` for eager execution."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, segment: Tensor | None, start: Tensor,
        chunk: int, strict: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, final, states = _forward_tiles(q, k, v, decay, segment, start, chunk, strict, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, decay, segment, final, states)
        ctx.set_materialize_grads(False)
        ctx.chunk, ctx.strict = chunk, strict
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> Any:  # type: ignore[override]
        if d_out is None and d_final is None:
            return (None,) * 8
        q, k, v, decay, segment, final, states = ctx.saved_tensors
        d_out = v.new_zeros(*q.shape[:3], v.shape[3]) if d_out is None else d_out
        d_final = torch.zeros_like(final) if d_final is None else d_final
        dq, dk, dv, ds = _backward_tiles(q, k, v, decay, segment, states, d_out, d_final, ctx.chunk, ctx.strict)
        d_decay = None
        if ctx.needs_input_grad[3]:
            d_decay = _decay_gradient(q, dq, k, dk, final, d_final, decay, segment)
        return dq, dk, dv, d_decay, None, ds, None, None


# The same two functions as custom operators, one node each in a traced graph whatever N is.

_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? segment, Tensor start, int chunk, bool strict, "
_forward_op = torch.library.custom_op(
    "attnlib::linear_chunkwise",
    _forward_tiles,
    mutates_args=(),
    schema=_SCHEMA + "bool keep_states) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "attnlib::linear_chunkwise_backward",
    _backward_tiles,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? segment, Tensor states, Tensor d_out, "
    "Tensor d_final, int chunk, bool strict) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(q, k, v, decay, segment, start, chunk, strict, keep_states):  # type: ignore[no-untyped-def]
    count = (q.shape[2] + chunk - 1) // chunk if keep_states else 0
    return v.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(start), start.new_empty(count, *start.shape)


@_backward_op.register_fake
def _(q, k, v, decay, segment, states, d_out, d_final, chunk, strict):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(d_final)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, decay, segment, _, chunk, strict, _ = inputs
    ctx.save_for_backward(q, k, v, decay, segment, *output[1:])
    ctx.chunk, ctx.strict = chunk, strict


def _backward(ctx: Any, d_out: Tensor, d_final: Tensor, _: Tensor) -> Any:
    q, k, v, decay, segment, final, states = ctx.saved_tensors
    dq, dk, dv, ds = _backward_op(q, k, v, decay, segment, states, d_out, d_final, ctx.chunk, ctx.strict)
    d_decay = None
    if ctx.needs_input_grad[3]:
        d_decay = _decay_gradient(q, dq, k, dk, final, d_final, decay, segment)
    return dq, dk, dv, d_decay, None, ds, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _tile_flops(n: int, d: int, dv: int, chunk: int, inside: int, across: int) -> int:
    """Two operations per multiplication: ``inside`` products of tokens with tokens, ``across`` with the state."""
    chunk = min(chunk, n)
    return 2 * n * (inside * chunk * (d + dv) // 2 + across * d * dv)


@register_flop_formula(torch.ops.attnlib.linear_chunkwise)
def _(q, k, v, decay, segment, start, chunk, strict, keep_states, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return math.prod(q[:2]) * _tile_flops(q[2], q[3], v[3], chunk, 2, 2)


@register_flop_formula(torch.ops.attnlib.linear_chunkwise_backward)
def _(q, k, v, decay, segment, states, d_out, d_final, chunk, strict, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return math.prod(q[:2]) * _tile_flops(q[2], q[3], v[3], chunk, 5, 4)


def _chunkwise(call: _Call, strict: bool) -> tuple[Tensor, Tensor]:
    if call.decay is not None and call.decay.dim() == 4:
        return _chunkwise_channels(call, strict)
    q, k, v, start = call.q, call.k, call.v, _start(call)
    if transformed([*call.inputs(), start]):
        return _plain_tiles(q, k, v, call.decay, call.segment, start, call.chunk, strict)
    if torch.compiler.is_compiling():
        tensors = (q, k, v, call.decay, start)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
        return _forward_op(q, k, v, call.decay, call.segment, start, call.chunk, strict, keep)[:2]
    if not wants_gradient(call.inputs()):
        return _forward_tiles(q, k, v, call.decay, call.segment, start, call.chunk, strict, False)[:2]
    out, final = _Chunkwise.apply(q, k, v, call.decay, call.segment, start, call.chunk, strict)

    def spec(q: Tensor, k: Tensor, v: Tensor, start: Tensor, *decay: Tensor) -> tuple[Tensor, Tensor]:
        return _plain_tiles(q, k, v, decay[0] if decay else None, call.segment, start, call.chunk, strict)

    decay = [] if call.decay is None else [call.decay]
    out, final = twice((out, final), [q, k, v, start, *decay], spec)
    return out, final


def _plain_tiles(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, segment: Tensor | None, start: Tensor, chunk: int,
    strict: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`_forward_tiles` without writing in place: any derivative and any transform goes through it."""
    tiles = _Tiles(decay, segment, q, chunk, strict)
    outs, s = [], start
    for a, b in tiles.spans:
        inside, reach, stay, keep = tiles[a, b]
        qc, kc, vc = q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]
        outs.append(((qc @ kc.transpose(-2, -1)) * inside) @ vc + (qc * reach) @ s)
        s = s * keep + (kc * stay).transpose(-2, -1) @ vc
    return torch.cat(outs, 2) if outs else v.new_zeros(*q.shape[:3], v.shape[-1]), s


def _plain(call: _Call) -> tuple[Tensor, Tensor]:
    """A causal call by operations that any derivative goes through."""
    if call.decay is not None and call.decay.dim() == 4:
        return _chunkwise_channels(call, strict=False)
    return _plain_tiles(call.q, call.k, call.v, call.decay, call.segment, _start(call), call.chunk, strict=False)


def _chunkwise_channels(call: _Call, strict: bool) -> tuple[Tensor, Tensor]:
    """Decays per channel: all chunks at once, differentiated by autograd."""
    q, k, v, s, size = call.q, call.k, call.v, _start(call), call.chunk
    assert call.decay is not None
    batch, heads, n, _ = q.shape
    if n == 0:
        return v.new_zeros(batch, heads, 0, v.shape[-1]), s
    count = -(-n // size)

    def tile(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, count * size - n)).unflatten(2, (count, size))

    qc, kc, vc = tile(q), tile(k), tile(v)
    allowed = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1 if strict else 0)
    segment = None
    if call.segment is not None:
        # Padded tokens belong to the last segment, so that the last chunk hands on that segment's state.
        number = torch.arange(count * size, device=q.device).clamp(max=n - 1)
        segment = call.segment[number].unflatten(0, (count, size))
        allowed = allowed & (segment.unsqueeze(-1) == segment.unsqueeze(-2))
    c = tile(call.decay * LOG2_E).cumsum(3)  # (B, H, T, C, D)
    last = c[:, :, :, -1:]
    inside = torch.where(allowed.unsqueeze(-1), c.unsqueeze(4) - c.unsqueeze(3), float("-inf")).exp2()
    scores = torch.einsum("bhtad,bhtxd,bhtaxd->bhtax", qc, kc, inside)
    reach, stay, keep = c.exp2(), (last - c).exp2(), last.squeeze(3).exp2()
    if segment is not None:
        before = torch.cat([segment[:1, 0], segment[:-1, -1]])
        reach = reach * (segment == before[:, None]).to(q.dtype).unsqueeze(-1)
        stay = stay * (segment == segment[:, -1:]).to(q.dtype).unsqueeze(-1)
        keep = keep * (segment[:, -1] == before).to(q.dtype)[:, None]
    update = (kc * stay).transpose(-2, -1) @ vc  # (B, H, T, D, Dv)
    states = []
    for t in range(count):
        states.append(s)
        s = s * keep[:, :, t].unsqueeze(-1) + update[:, :, t]
    out = scores @ vc + (qc * reach) @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, :n], s


_OPERATOR = Operator(
    "linear_attention",
    _prepare,
    aliases={"parallel": "eager"},
    entries={"linear_partial": {"normalizer": "sum"}},
    argument="form",
    cut=True,
)


def _single(call: _Call) -> bool:
    """Whether there is one token, as while decoding; said of no graph, which serves any number."""
    return not torch.compiler.is_compiling() and call.q.shape[2] == 1 == call.k.shape[2]


_OPERATOR.register(
    "scatter", _scattered, supports=_needs_segments, second="the same sums",
    transforms="its sums over segments are an operator of their own",
)  # fmt: skip
fla.register(_OPERATOR, _plain)
_OPERATOR.register(
    "chunkwise", partial(_both_ways, _chunkwise), second="the same chunks by plain operations",
    prefers=lambda call: "a single token needs no chunks" if _single(call) else None,
)  # fmt: skip
_OPERATOR.register(
    "recurrent", partial(_both_ways, _recurrent),
    prefers=lambda call: None if _single(call) else "one token after the other is slower",
)  # fmt: skip
_OPERATOR.register("eager", _parallel)
