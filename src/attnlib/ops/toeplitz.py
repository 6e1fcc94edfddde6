"""Linear attention whose weights also depend on the displacement of key from query: a Toeplitz factor, by FFT.

``o_i = sum_j c_{j-i} (q_i . k_j) v_j / sum_j c_{j-i} (q_i . k_j)``: for each feature r the products ``k_jr v_j`` go
through the same Toeplitz matrix, a correlation along the tokens. The *direct* form builds the (N, M) map and is the
specification; the *fft* form costs O(N log N) per feature and works through the features in slices, so that it never
holds all N m D products at once, forward or backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_device, check_flag, check_float, check_ints, check_tensor, check_valid
from ..positions import toeplitz_spectrum
from ..types import exactly, stats_dtype
from ._call import check_qkv, expand_heads
from ._dispatch import Operator, transformed, twice, wants_gradient
from ._guard import bad_rows, finite, readable, spoil

#: Backends; ``"direct"`` is another name of ``"eager"``.
FORMS = ("fft", "fft64", "direct", "eager")
#: Elements of one slice of products; below it, more features at once only take memory.
SLICE = 1 << 21


def toeplitz_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    grid: Sequence[int] | None = None,
    valid: Tensor | None = None,
    positive: bool = True,
    form: str | None = None,
    return_weights: bool = False,
) -> Any:
    """``o_i = sum_j w_ij v_j / sum_j w_ij`` with ``w_ij = exp(b_{j-i}) (q_i . k_j)``, in O(N log N).

    Args:
        q: (B, H, N, m) queries, already mapped to features.
        k: (B, Hk, M, m) keys, already mapped; ``H % Hk == 0``.
        v: (B, Hv, M, D) values; ``H % Hv == 0``.
        bias: (H or 1, N_1 + M_1 - 1, ..) ``b`` for displacements from ``-(N - 1)`` to ``M - 1`` per axis of the grid;
            ``-inf`` where a pair may not meet. Adding a constant changes nothing.
        grid: sizes per axis of the grid of queries; ``(N,)`` by default. On more than one axis N and M must agree.
        valid: (B, M) boolean, which keys exist.
        positive: the features are; then sums that rounding pushed below zero are lifted.
        form: the backend: ``"fft"``, also by default; ``"fft64"``, which transforms in float64 whatever the inputs; or
            ``"eager"``, also called ``"direct"``: builds the map (the specification).
        return_weights: also return the (B, H, N, M) map, which is quadratic whatever the form.

    Returns:
        (B, H, N, D), or a pair of it and the weights. A row that sees no key gives zeros.

    Raises:
        ValueError: shapes that do not fit, or an unknown form.

    Reference: Luo et al., 2021, arXiv 2106.12566.

    >>> q, k, v = torch.rand(3, 1, 2, 6, 4)
    >>> bias = torch.randn(2, 11)
    >>> fast, direct = (toeplitz_attention(q, k, v, bias, form=form) for form in ("fft", "direct"))
    >>> torch.allclose(fast, direct, atol=1e-5)
    True
    """
    check_tensor("q", q)
    with exactly(q):
        call = _prepare(q, k, v, bias, grid=grid, valid=valid, positive=positive, return_weights=return_weights)
        out, weights = _run(call, form)
    return (out, weights) if return_weights else out


def _run(call: _Call, form: str | None) -> tuple[Tensor, Tensor | None]:
    """The operator, whatever tokens hold that a row may not see: a transform spreads it over all rows."""
    tensors = (call.q, call.k, call.v)
    if not readable(*tensors) or transformed(call.inputs()):
        return _OPERATOR.run(call, form)
    if not wants_gradient(tensors):
        out, weights = _OPERATOR.run(call, form)
        if finite(out):
            return out, weights
    elif finite(*tensors):
        return _OPERATOR.run(call, form)
    bad_q, bad_k = bad_rows(call.q), bad_rows(call.k, call.v)
    q = call.q.masked_fill(bad_q.unsqueeze(-1), 0.0)
    k, v = (t.masked_fill(bad_k.unsqueeze(-1), 0.0) for t in (call.k, call.v))
    out, weights = _OPERATOR.run(call._replace(q=q, k=k, v=v), form)
    meets = torch.isfinite(call.bias.detach()).to(call.q.dtype)
    seen = (_seen(meets, bad_k, call.grid, call.keys, bad_k.shape[0]) | (bad_q & call.seen)).unsqueeze(-1)
    return spoil(out, seen), None if weights is None else spoil(weights, seen & (weights != 0))


class _Call(NamedTuple):
    """A checked problem in the statistics dtype, heads repeated, zeros for keys that do not exist."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    c: Tensor  # exp(bias), up to a factor
    seen: Tensor  # (B, H or 1, N) rows that see a key
    grid: tuple[int, ...]
    keys: tuple[int, ...]
    positive: bool
    return_weights: bool
    dtype: torch.dtype

    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.bias]


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, grid: Sequence[int] | None = None, valid: Tensor | None = None,
    positive: bool = True, return_weights: bool = False,
) -> _Call:  # fmt: skip
    check_qkv(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v), ("bias", bias)):
        check_float(name, t)
    check_flag("positive", positive)
    check_flag("return_weights", return_weights)
    batch, heads, n, _ = q.shape
    m = k.shape[2]
    grid = (n,) if grid is None else check_ints("grid", grid, least=0)
    keys = (m,) if len(grid) == 1 else grid
    if math.prod(grid) != n or math.prod(keys) != m:
        raise ValueError(f"grid={grid} has {math.prod(grid)} tokens, but there are N={n} queries and M={m} keys")
    spans = tuple(a + b - 1 for a, b in zip(grid, keys, strict=True))
    if bias.dim() != 1 + len(spans) or tuple(bias.shape[1:]) != spans or bias.shape[0] not in (1, heads):
        raise ValueError(f"bias must be (H or 1, {', '.join(map(str, spans))}) for H={heads}, got {tuple(bias.shape)}")
    check_valid("valid", valid, (batch, m))
    check_device(q=q, k=k, v=v, bias=bias, valid=valid)
    dtype = stats_dtype(q.dtype)
    fq, fk, fv = q.to(dtype), expand_heads(k.to(dtype), heads), expand_heads(v.to(dtype), heads)
    if valid is not None:
        fk, fv = (t.masked_fill(~valid[:, None, :, None], 0.0) for t in (fk, fv))
    b = bias.to(dtype)
    c = torch.exp(b - b.detach().amax(tuple(range(1, b.dim())), keepdim=True))
    seen = _seen(torch.isfinite(b).to(dtype), valid, grid, keys, batch)
    return _Call(fq, fk, fv, b, c, seen, grid, keys, positive, return_weights, q.dtype)


def _empty(call: _Call) -> str | None:
    if not torch.compiler.is_compiling() and 0 in (call.q.shape[0], call.q.shape[2], call.k.shape[2]):
        return "there is no transform of nothing"
    return None


def _map(call: _Call) -> Tensor:
    """(B, H, N, M): weights before they are divided by their sum."""
    return (call.q @ call.k.transpose(-2, -1)) * _toeplitz(call.c, call.grid, call.keys) * call.seen.unsqueeze(-1)


def _direct(call: _Call) -> tuple[Tensor, Tensor | None]:
    weights = _map(call)
    return _divided(call, torch.cat([weights @ call.v, weights.sum(-1, keepdim=True)], -1), weights)


def _by_fft(call: _Call, double: bool = False) -> tuple[Tensor, Tensor | None]:
    if _empty(call):
        return _direct(call)
    values = torch.cat([call.v, call.v.new_ones(*call.v.shape[:3], 1)], -1)
    factors = [call.q, call.k, values, call.c]
    if double:
        factors = [t.double() for t in factors]
    sums = _products(factors[0], factors[1], factors[2], factors[3], call.grid, call.keys)
    return _divided(call, sums, _map(call) if call.return_weights else None)


def _divided(call: _Call, sums: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    den = sums[..., -1:]
    if call.positive:
        # The sums are positive; what rounding leaves of one that is tiny beside the others may not be.
        floor = den.detach().amax(-2, keepdim=True) * torch.finfo(den.dtype).eps if call.q.shape[2] else den
        den = torch.maximum(den, floor.clamp(min=torch.finfo(den.dtype).tiny))
    empty = ~call.seen.unsqueeze(-1) | (den == 0)
    den = torch.where(empty, torch.ones_like(den), den)
    out = torch.where(empty, torch.zeros_like(sums[..., :-1]), sums[..., :-1] / den).to(call.dtype)
    if weights is None or not call.return_weights:
        return out, None
    return out, (weights / den).masked_fill(empty, 0.0).to(call.dtype)


_OPERATOR = Operator("toeplitz_attention", _prepare, aliases={"direct": "eager"}, argument="form")
_AGAIN = "the same transforms by plain operations"
_OPERATOR.register("fft", _by_fft, second=_AGAIN)
_OPERATOR.register(
    "fft64", partial(_by_fft, double=True), prefers=lambda call: "float64 takes twice the time", second=_AGAIN
)
_OPERATOR.register("eager", _direct)


def _toeplitz(c: Tensor, grid: Sequence[int], keys: Sequence[int]) -> Tensor:
    """(H, N, M) matrix of ``c_{j - i}``."""
    for axis, (n, m) in enumerate(zip(grid, keys, strict=True)):
        at = torch.arange(m, device=c.device) - torch.arange(n, device=c.device)[:, None] + n - 1
        c = c.index_select(1 + 2 * axis, at.reshape(-1)).unflatten(1 + 2 * axis, (n, m))
    rank = len(grid)
    order = [0, *(1 + 2 * a for a in range(rank)), *(2 + 2 * a for a in range(rank))]
    return c.permute(order).reshape(c.shape[0], math.prod(grid), math.prod(keys))


def _seen(meets: Tensor, valid: Tensor | None, grid: Sequence[int], keys: Sequence[int], batch: int) -> Tensor:
    """(B, H or 1, N) boolean: does the row see a key of ``valid`` (B, M) or (B, H, M)?

    Counted, so that rounding of sums cannot decide it.
    """
    if not torch.compiler.is_compiling() and 0 in (batch, *grid, *keys):
        return meets.new_zeros(batch, 1, math.prod(grid), dtype=torch.bool)
    exists = meets.new_ones(1, 1, *keys) if valid is None else valid.to(meets.dtype).reshape(batch, -1, *keys)
    spectrum, sizes = toeplitz_spectrum(meets.detach(), grid)
    return (_back(spectrum.conj() * _transform(exists, sizes), sizes, grid) > 0.5).flatten(2)


# Below, tokens stand last: transforms along the contiguous axis take half the time.


def _transform(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.fft.rfftn(x, s=tuple(sizes), dim=tuple(range(-len(sizes), 0)))


def _back(spectrum: Tensor, sizes: Sequence[int], keep: Sequence[int]) -> Tensor:
    axes = tuple(range(-len(sizes), 0))
    out = torch.fft.irfftn(spectrum, s=tuple(sizes), dim=axes)
    for axis, n in zip(axes, keep, strict=True):
        out = out.narrow(axis, 0, n)
    return out


def _slice(q: Tensor, v: Tensor) -> int:
    """How many features go through the transform at once."""
    if torch.compiler.is_compiling():
        return min(q.shape[2], 8)  # not from N, which may be free
    each = 2 * q.shape[0] * q.shape[1] * max(q.shape[3], v.shape[3]) * v.shape[2]
    return max(1, min(q.shape[2], SLICE // max(each, 1)))


def _outer(a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, H, s, N) and (B, H, F, N) to all products (B, H, s, F, *sizes)."""
    products = a.unsqueeze(3) * b.unsqueeze(2)
    return products.reshape(*products.shape[:-1], *sizes)


def _spectrum(c: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The spectrum of (H, ..), to be multiplied with (B, H, s, F, ..)."""
    spectrum, sizes = toeplitz_spectrum(c, grid)
    return spectrum.unsqueeze(1).unsqueeze(1), sizes


def _forward(q: Tensor, k: Tensor, v: Tensor, c: Tensor, grid: Sequence[int], keys: Sequence[int]) -> Tensor:
    """(B, H, F, N): ``sum_r q_r * T(c) (k_r * v)`` of (B, H, m, N), (B, H, m, M) and (B, H, F, M)."""
    spectrum, sizes = _spectrum(c, grid)
    spectrum = spectrum.conj().resolve_conj()
    step = _slice(q, v)
    out: Tensor | float = 0.0
    for a in range(0, q.shape[2], step):
        part = _transform(_outer(k[:, :, a : a + step], v, keys), sizes)
        moved = _back(part * spectrum, sizes, grid).flatten(4)
        out = out + (q[:, :, a : a + step].unsqueeze(3) * moved).sum(2)
    assert isinstance(out, Tensor)
    return out


class _Products(torch.autograd.Function):
    """:func:`_forward` with a backward that makes the products again, slice by slice."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, c: Tensor, grid: Any, keys: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, c)
        ctx.set_materialize_grads(False)
        ctx.grid, ctx.keys = grid, keys
        return _forward(q, k, v, c, grid, keys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # type: ignore[override]
        if grad is None:
            return (None,) * 6
        q, k, v, c = ctx.saved_tensors
        grid, keys = ctx.grid, ctx.keys
        back, sizes = _spectrum(c, grid)
        forth = back.conj().resolve_conj()
        step = _slice(q, v)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.zeros_like(v)
        dc: Tensor | float = 0.0
        for a in range(0, q.shape[2], step):
            at = slice(a, a + step)
            into = _transform(_outer(k[:, :, at], v, keys), sizes)
            out = _transform(_outer(q[:, :, at], grad, grid), sizes)
            dq[:, :, at] = (_back(into * forth, sizes, grid).flatten(4) * grad.unsqueeze(2)).sum(3)
            d_into = _back(out * back, sizes, keys).flatten(4)
            dk[:, :, at] = (d_into * v.unsqueeze(2)).sum(3)
            dv += (d_into * k[:, :, at].unsqueeze(3)).sum(2)
            if ctx.needs_input_grad[3]:
                # dc_t = sum_i out_i into_{i + t}: the same correlation, of the two sides of the product
                dc = dc + (out.conj() * into).sum((0, 2, 3))
        d_c = None
        if isinstance(dc, Tensor):
            axes = tuple(range(-len(sizes), 0))
            circle = torch.roll(torch.fft.irfftn(dc, s=sizes, dim=axes), [n - 1 for n in grid], axes)
            for axis, n, m in zip(axes, grid, keys, strict=True):
                circle = circle.narrow(axis, 0, n + m - 1)
            d_c = circle.sum_to_size(c.shape)
        return dq, dk, dv, d_c, None, None


def _products(q: Tensor, k: Tensor, v: Tensor, c: Tensor, grid: Sequence[int], keys: Sequence[int]) -> Tensor:
    """(B, H, N, F) of (B, H, N, m), (B, H, M, m) and (B, H, M, F)."""
    q, k, v = (t.mT.contiguous() for t in (q, k, v))
    if torch.compiler.is_compiling() or transformed((q, k, v, c)):
        return _forward(q, k, v, c, grid, keys).mT
    out = _Products.apply(q, k, v, c, tuple(grid), tuple(keys))
    return twice((out,), (q, k, v, c), lambda q, k, v, c: (_forward(q, k, v, c, grid, keys),))[0].mT
