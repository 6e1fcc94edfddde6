"""LASP-2 and LASP-2H (Sun et al., 2025): attention over a sequence of which every process holds a chunk.

Linear attention sends one thing: the state of each chunk. With ``M_t = sum_j exp(C_t - c_j) k_j v_j^T`` of chunk ``t``
(``c`` the running sum of its log-decays, ``C_t`` the last of them) and one gather of all ``(M_t, C_t)``, each process
has the state before its own chunk, ``P_t = sum_{u < t} exp(C_{u+1} + .. + C_{t-1}) M_u``, and

    causal:         O_t = local(Q_t, K_t, V_t) + (Q_t exp(c)) P_t
    bidirectional:  O_t = Q_t sum_u M_u, and with decay local + what came before + what comes after.

Backwards it is one gather again, of the gradients ``dP_t = (Q_t exp(c))^T dO_t``:
``dM_t = sum_{u > t} exp(C_{t+1} + .. + C_{u-1}) dP_u`` and ``dC_t = sum(exp(C_t) P_t dM_t)``. Neither grows with the
length. Both gathers are under way while the chunk itself is computed.

Attention with softmax gathers keys and values instead (LASP-2H), in one collective; the chunk's own part is computed
meanwhile and merged with the others' as partials. Their gradients go back by one reduce-scatter.

Reference: Sun et al., 2025, arXiv 2502.07563, algorithms 1 to 4 and section 3.4. Decays are an extension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_int, check_tensor
from ..masks import And, Causal, Mask
from ..normalizers import Normalizer
from ..ops import _shards
from ..ops import attention as _attention
from ..ops import linear_attention as _linear_attention
from ..ops.linear import LinearOutput
from ..types import Partial, State, exactly
from .group import Group, Pending, pack

__all__ = ["Shards", "attention", "lasp2_as_released", "linear_attention"]


# --------------------------------------------------------------------------------------------------------------------
# Linear attention: states


class _Flight:
    """What leaves this process and what arrives, forwards and backwards, of one call."""

    def __init__(self, group: Group, mode: str):
        self.group, self.mode, self.layer = group, mode, group.layer
        self.there: Pending | None = None
        self.back: Pending | None = None
        self.unpack: Callable[[Tensor], list[Tensor]] = lambda flat: [flat]
        self.unpack_back: Callable[[Tensor], list[Tensor]] = lambda flat: [flat]
        self.totals: Tensor | None = None
        self.mine: list[Tensor] = []


def _grown(state: Tensor, total: Tensor | None) -> Tensor:
    """``exp(C) state``; ``total`` (.., H, 1, 1 or D) lies along the keys of the state."""
    return state if total is None else state * total.transpose(-2, -1).exp()


def _walk(states: Tensor | Sequence[Tensor], totals: Tensor | None, order: Sequence[int], until: int | None) -> Tensor:
    """The state after the chunks of ``order``, up to and without ``until``."""
    at = torch.zeros_like(states[0])
    for u in order:
        if u == until:
            break
        at = _grown(at, None if totals is None else totals[u]) + states[u]
    return at


class _Leave(torch.autograd.Function):
    """Sends this chunk's states; its gradients are what :class:`_Arrive` asked the others for."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, total: Tensor | None, *states: Tensor) -> Tensor:
        ctx.flight, ctx.shape = flight, None if total is None else total.shape
        flat, flight.unpack = pack(*states, *([] if total is None else [total]))
        flight.there = flight.group.all_gather(flat, "states")
        return flat.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        flight: _Flight = ctx.flight
        assert flight.back is not None
        grads = flight.unpack_back(flight.back.wait())
        if flight.mode == "sum":
            return None, None, grads[0].sum(0)
        rank, size, totals = flight.group.rank, flight.group.size, flight.totals
        orders = [range(size - 1, -1, -1), range(size)]
        found = [_walk(g, totals, order, rank) for g, order in zip(grads, orders, strict=False)]
        d_total = None
        if totals is not None:
            parts = [_grown(p, totals[rank]) * d for p, d in zip(flight.mine, found, strict=True)]
            d_total = sum(p.sum(-1, keepdim=True).transpose(-2, -1) for p in parts)  # (B, H, 1, D)
            assert isinstance(d_total, Tensor)
            d_total = d_total.sum_to_size(ctx.shape)
        return None, d_total, *found


class _Arrive(torch.autograd.Function):
    """The states before this chunk (and after it), and the state after the sequence."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, token: Tensor) -> Any:
        ctx.flight = flight
        assert flight.there is not None
        states = flight.unpack(flight.there.wait())
        flight.there = None
        ctx.set_materialize_grads(False)
        ctx.token = token
        rank, size = flight.group.rank, flight.group.size
        if flight.mode == "sum":
            whole = states[0].sum(0)
            ctx.shapes = [whole.shape]
            return (whole,)
        ways = 2 if flight.mode == "both" else 1
        flight.totals = states[ways] if len(states) > ways else None
        orders = [range(size), range(size - 1, -1, -1)]
        flight.mine = [_walk(s, flight.totals, o, rank) for s, o in zip(states[:ways], orders, strict=False)]
        end = _walk(states[0], flight.totals, range(size), None)
        ctx.mark_non_differentiable(end)
        ctx.shapes = [s.shape for s in flight.mine]
        return (*(s.clone() for s in flight.mine), end)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        flight: _Flight = ctx.flight
        token = ctx.token
        full = [token.new_zeros(s) if g is None else g for g, s in zip(grads, ctx.shapes, strict=False)]
        flat, flight.unpack_back = pack(*full)
        flight.back = flight.group.all_gather(flat, "states", "backward", flight.layer)
        return None, torch.zeros_like(token)


def _running(call: Any) -> Tensor | None:
    """(1 or B, H, N, 1 or D) running sums of the log-decays of this chunk; ``None`` without decay."""
    if call.decay is None:
        return None
    g = call.decay if call.decay.dim() == 4 else call.decay.unsqueeze(-1)
    return g.expand(-1, -1, call.q.shape[2], -1).cumsum(2)


def _linear(group: Group, call: Any, run: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The operator on the chunk here, and the state after the whole sequence, without gradient."""
    if call.segment is not None:
        raise ValueError(
            "cu_seqlens is not possible while the sequence is cut over processes: segments would have to end where "
            "chunks end; give every process whole segments instead, without cutting"
        )
    q, k, v = call.q, call.k, call.v
    if not call.causal and call.decay is None:
        whole = k.transpose(-2, -1) @ v
        if call.state is not None and group.rank == 0:
            whole = whole + call.state
        flight = _Flight(group, "sum")
        (whole,) = _Arrive.apply(flight, _Leave.apply(flight, None, whole))
        return q @ whole, whole.detach()
    start = call.state if group.rank == 0 else None
    c = _running(call)
    total = left = None
    if c is not None:
        total = c[:, :, -1:] if c.shape[2] else c.sum(2, keepdim=True)
        left = (total - c).exp()  # what is left of every token at the end of the chunk
    ahead = (k if left is None else k * left).transpose(-2, -1) @ v
    if start is not None:
        ahead = ahead + _grown(start, total)
    states = [ahead]
    if not call.causal:
        assert c is not None
        states.append((k * c.exp()).transpose(-2, -1) @ v)
    flight = _Flight(group, "causal" if call.causal else "both")
    token = _Leave.apply(flight, total, *states)
    out, _ = run(replace(call, state=start))
    before, *after, end = _Arrive.apply(flight, token)
    out = out + (q if c is None else q * c.exp()) @ before
    if after:
        assert left is not None
        out = out + (q * left) @ after[0]
    return out, end


def _scan(group: Group, call: Any, run: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A selective scan: its states of (channels, S) numbers, which fade by ``exp(A sum of steps)`` in a chunk.

    The state at the end of the chunk comes out of a scan of its own, so that the others need not wait for outputs.
    """
    for name, given in (("cu_seqlens", call.segment), ("positions", call.positions)):
        if given is not None:
            raise ValueError(f"{name} is not possible while the sequence is cut over processes")
    start = call.state if group.rank == 0 else None
    delta = call.delta if call.delta_bias is None else call.delta + call.delta_bias
    delta = F.softplus(delta) if call.softplus else delta
    if call.valid is not None:
        delta = delta.masked_fill(~call.valid.unsqueeze(-1), 0.0)
    total = delta.sum(1).unsqueeze(-1) * call.A  # (B, channels, S)
    _, ahead = run(replace(call, state=start, D=None, z=None))
    flight = _Flight(group, "causal")
    token = _Leave.apply(flight, total.unsqueeze(2), ahead.unsqueeze(-1))
    before, end = _Arrive.apply(flight, token)
    before = before.squeeze(-1) if start is None else start + 0 * before.squeeze(-1)
    out, _ = run(replace(call, state=before))
    return out, end.squeeze(-1)


# --------------------------------------------------------------------------------------------------------------------
# Softmax attention: keys and values


class _LeaveKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, *tensors: Tensor) -> Tensor:
        ctx.flight = flight
        flat, flight.unpack = pack(*tensors)
        flight.there = flight.group.all_gather(flat, "keys")
        return flat.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        back = ctx.flight.back
        return None, *ctx.flight.unpack(back.wait())


class _ArriveKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, token: Tensor) -> Tensor:
        assert flight.there is not None
        ctx.flight, ctx.token = flight, token
        out, flight.there = flight.there.wait(), None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        flight = ctx.flight
        flight.back = flight.group.reduce_scatter(grad, "keys", "backward", flight.layer)
        return None, torch.zeros_like(ctx.token)


class _Tie(torch.autograd.Function):
    """``out``, so that ``gathered`` gets a gradient (of zeros) where nothing of it was read: the others wait for it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gathered: Tensor) -> Tensor:
        ctx.like = gathered
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, torch.zeros_like(ctx.like)


def _backward_only(mask: Mask | None) -> bool:
    """Whether a mask is known to hide every later key."""
    if isinstance(mask, And):
        return any(_backward_only(part) for part in (mask.left, mask.right))
    return isinstance(mask, Causal)


def _laid_out(parts: Tensor) -> Tensor:
    """(size, B, H, n, D) to (B, H, size n, D)."""
    return parts.movedim(0, 2).flatten(2, 3)


def _softmax(group: Group, call: Any, run: Callable[[Any], Any]) -> Any:
    for name, given in (("bias", call.bias), ("q_pos", call.q_pos), ("k_pos", call.k_pos)):
        if given is not None:
            raise ValueError(
                f"{name} is not possible while the sequence is cut over processes: it is laid out for the keys of one "
                "chunk; masks see the positions in the whole sequence"
            )
    rank, n, m = group.rank, call.q.shape[2], call.k.shape[2]
    device = call.q.device
    sent = [call.k, call.v]
    if call.valid is not None:
        sent.append(call.valid.to(call.k.dtype))
    flight = _Flight(group, "keys")
    token = _LeaveKeys.apply(flight, *sent)
    begin, end = rank * m, (rank + 1) * m
    q_pos = torch.arange(rank * n, rank * n + n, device=device)

    def arrive() -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        flat = _ArriveKeys.apply(flight, token)
        k, v, *valid = flight.unpack(flat)
        exists = valid[0].detach().movedim(0, 1).flatten(1) > 0.5 if valid else None
        return flat, _laid_out(k), _laid_out(v), exists

    merged = call.plain_softmax and call.want != "weights" and not call.dropout_p
    if not merged:
        _, k, v, valid = arrive()
        k_pos = torch.arange(k.shape[2], device=device)
        where = {} if call.mask is None else dict(q_pos=q_pos, k_pos=k_pos)
        return run(replace(call, k=k, v=v, valid=valid, **where))
    part = replace(call, want="partial")
    # Where only the distance counts, kernels that know the causal order by name keep it.
    apart = call.mask is not None and not (isinstance(call.mask, Causal) and n == m)
    here = dict(q_pos=q_pos, k_pos=torch.arange(begin, end, device=device)) if apart else {}
    own: Partial = run(replace(part, **here))
    flat, k, v, valid = arrive()
    spans = [slice(0, begin)] if _backward_only(call.mask) and n == m else [slice(0, begin), slice(end, k.shape[2])]
    k_pos = torch.cat([torch.arange(s.start, s.stop, device=device) for s in spans])
    if not len(k_pos):
        whole = own._replace(num=_Tie.apply(own.num, flat))
    else:
        k, v = (torch.cat([t[:, :, s] for s in spans], 2) for t in (k, v))
        valid = None if valid is None else torch.cat([valid[:, s] for s in spans], 1)
        hidden = isinstance(call.mask, Causal) and n == m  # all of what is left lies before every query
        rest = dict(mask=None) if hidden or call.mask is None else dict(q_pos=q_pos, k_pos=k_pos)
        whole = own.merge(run(replace(part, k=k, v=v, valid=valid, **rest)))
    return whole if call.want == "partial" else whole.finish().to(call.q.dtype)


# --------------------------------------------------------------------------------------------------------------------
# The others, for operators and mechanisms


class _Halo(torch.autograd.Function):
    """The ``width`` tokens (width, ..) before this chunk (n, ..), and their gradients back to whom they belong."""

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, width: int) -> Tensor:
        n, rank = x.shape[0], group.rank
        kept = min(width, n)
        ctx.group, ctx.layer, ctx.shape, ctx.width = group, group.layer, x.shape, width
        tails = group.all_gather(x[n - kept :].reshape(-1), "halo").wait().view(group.size, kept, *x.shape[1:])
        before = tails[max(rank - -(-width // kept), 0) : rank].flatten(0, 1)[-width:]
        return torch.cat([x.new_zeros(width - before.shape[0], *x.shape[1:]), before])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        group, n, width = ctx.group, ctx.shape[0], ctx.width
        grads = group.all_gather(grad.reshape(-1), "halo", "backward", ctx.layer).wait()
        grads = grads.view(group.size, width, *ctx.shape[1:])
        own = grad.new_zeros(ctx.shape)
        begin = group.rank * n
        for later in range(group.rank + 1, group.size):
            first = later * n - width  # where the tokens before that chunk begin
            low, high = max(first, begin), begin + n
            if low < high:
                own[low - begin :] += grads[later, low - first : high - first]
        return None, own, None


class Shards:
    """The processes of a group as :mod:`attnlib.ops` asks for them.

    Args:
        group: of the processes.
        length: tokens of the whole sequence; every call must bring ``length / size`` of them.
        context_length: the same of a context, where there is one of another length.
    """

    def __init__(self, group: Group, length: int | None = None, context_length: int | None = None):
        self.group = group
        names = (("length", length), ("context_length", context_length))
        self.chunks = [group.chunk_of(name, n) for name, n in names if n is not None]
        self.length, self.lengths = length, [n for _, n in names if n is not None]

    def check(self, n: int, keys: bool = False) -> None:
        """``ValueError`` unless a chunk has its share of the tokens."""
        if self.chunks and n not in (self.chunks if keys else self.chunks[:1]):
            raise ValueError(
                f"this process holds {n} tokens, but {' or '.join(map(str, self.lengths))} over {self.group.size} "
                f"processes are {' or '.join(map(str, self.chunks))} each; shard() cuts a whole sequence"
            )

    def linear(self, call: Any, run: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        self.check(call.q.shape[2])
        self.check(call.k.shape[2], keys=True)
        return _linear(self.group, call, run)

    def scan(self, call: Any, run: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        self.check(call.u.shape[1])
        return _scan(self.group, call, run)

    def attention(self, call: Any, run: Callable[[Any], Any]) -> Any:
        self.check(call.q.shape[2])
        self.check(call.k.shape[2], keys=True)
        return _softmax(self.group, call, run)

    def before(self, valid: Tensor | None, batch: int, n: int, device: torch.device) -> Tensor:
        group = self.group
        if valid is None:
            self.check(n, keys=True)
            return torch.full((batch,), group.rank * n, device=device)
        counts = group.all_gather(valid.sum(1), "counts").wait()
        return counts[: group.rank].sum(0)

    def halo(self, x: Tensor, width: int, axis: int) -> Tensor:
        if width == 0 or x.shape[axis] == 0:
            return x
        self.check(x.shape[axis])
        moved = x.movedim(axis, 0)
        return torch.cat([_Halo.apply(self.group, moved, width), moved]).movedim(0, axis)


# --------------------------------------------------------------------------------------------------------------------
# Functions


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    decay: Tensor | None = None,
    key_weights: Tensor | None = None,
    normalizer: str = "none",
    causal: bool = True,
    valid: Tensor | None = None,
    state: State | None = None,
    chunk: int | None = None,
    form: str | None = None,
    eps: float = 0.0,
    denominator: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Any:
    """LASP-2: :func:`attnlib.ops.linear_attention` of a sequence of which this process holds a chunk.

    One collective forwards, of ``size B H D Dv`` numbers (with a denominator ``D (Dv + 1)``; with decays, the sums of
    each chunk too), one of as many states backwards, whatever the length. Chunks may be of unequal length.

    Args:
        q, k, v: (B, H, n, D), (B, Hk, n, D), (B, Hv, n, Dv) of the tokens here, already mapped to features.
        group: the processes, as :class:`attnlib.parallel.Group` takes them.
        decay, key_weights, valid: of the tokens here; see :func:`attnlib.ops.linear_attention`.
        normalizer, causal, chunk, form, eps: as there; the same in every process. ``"subtract"`` sends the sum of the
            values in a collective of its own.
        denominator: features of the tokens here; a second, smaller state.
        state: what lies before the whole sequence, the same in every process (gradients go to that of the first one).
        return_state: also return the state after the whole sequence, in every process, without gradient.

    Returns:
        (B, H, n, Dv), or a :class:`attnlib.ops.LinearOutput` of it and the state.

    Reference: Sun et al., 2025, arXiv 2502.07563, algorithms 1 to 4.
    """
    with _shards.cut_over(Shards(Group(group))):
        out = _linear_attention(
            q, k, v, decay=decay, key_weights=key_weights, normalizer=normalizer, causal=causal, valid=valid,
            state=state, chunk=chunk, form=form, eps=eps, denominator=denominator, return_state=return_state,
        )  # fmt: skip
    return LinearOutput(out.out, out.state.detach()) if return_state else out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: int,
    context_length: int | None = None,
    group: Any = None,
    mask: Mask | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    normalizer: str | Normalizer = "softmax",
    dropout_p: float = 0.0,
    backend: str | None = None,
    return_weights: bool = False,
) -> Any:
    """LASP-2H: :func:`attnlib.ops.attention` of a sequence of which this process holds a chunk.

    Keys and values are gathered in one collective, forwards; their gradients are reduced and scattered in one,
    backwards. The mask sees positions in the whole sequence.

    Args:
        q, k, v: (B, Hq, n, D), (B, Hk, m, D), (B, Hv, m, Dv) of the tokens here.
        length: tokens of all queries together; divides into equal chunks.
        context_length: tokens of all keys together, if not as many.
        group: the processes, as :class:`attnlib.parallel.Group` takes them.
        mask: an :class:`attnlib.masks.Mask`, of the whole sequence.
        valid: (B, m) boolean, which of the keys here exist.
        scale, normalizer, dropout_p, backend, return_weights: see :func:`attnlib.ops.attention`; weights are
            (B, Hq, n, all keys).

    Reference: Sun et al., 2025, arXiv 2502.07563, section 3.4 and algorithm 7.
    """
    shards = Shards(Group(group), check_int("length", length, least=1), context_length)
    with _shards.cut_over(shards):
        return _attention(
            q, k, v, mask=mask, valid=valid, scale=scale, normalizer=normalizer, dropout_p=dropout_p, backend=backend,
            return_weights=return_weights,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What the authors' operators compute


def lasp2_as_released(q: Tensor, k: Tensor, v: Tensor, group: Any = None, masked: bool = False) -> Tensor:
    """What the operators of the authors' release compute, for models that were trained with them; neither is causal.

    Chunks are cut into blocks of 256 tokens (one block when there are no more than 128). A query reads all *blocks*
    before its own, of this chunk and of earlier ones, and nothing of its own block; with ``masked``, of its own block
    also all sub-blocks of 64 up to and *with* its own, later tokens included.

    Args:
        q, k, v: (B, H, n, D), (B, H, n, D), (B, H, n, Dv); ``n`` at most 128, or a multiple of 256.
        group: the processes, as :class:`attnlib.parallel.Group` takes them.
        masked: ``lasp2_with_mask_triton_op`` instead of ``lasp2_without_mask_triton_op``, which their layer uses.
    """
    group = Group(group)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t)
    check_choice("masked", masked, (False, True))
    n = q.shape[2]
    block, small = (256, 64) if n > 128 else (n, min(n, 64))
    if n == 0 or n % block or block % small:
        raise ValueError(f"q holds {n} tokens; the released operators serve 1 to 64, 128 and multiples of 256 tokens")
    dtype = q.dtype
    with exactly(q):
        qb, kb, vb = (t.float().unflatten(2, (n // block, block)) for t in (q, k, v))
        states = kb.transpose(-2, -1) @ vb  # (B, H, blocks, D, Dv)
        flight = _Flight(group, "causal")
        before, _ = _Arrive.apply(flight, _Leave.apply(flight, None, states.sum(2)))
        earlier = states.cumsum(2) - states + before.unsqueeze(2)
        out = qb @ earlier
        if masked:
            at = torch.arange(block, device=q.device) // small
            out = out + ((qb @ kb.transpose(-2, -1)) * (at[:, None] >= at)) @ vb
    return out.flatten(2, 3).to(dtype)
