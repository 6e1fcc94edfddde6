"""Modulation: aggregate a context, gate it, multiply it onto the query; and attention whose tokens are features.

``y = q * h(sum_l gate_l * context_l)``. The contexts are what a mechanism wants them to be: a pyramid of depthwise
convolutions, parallel convolutions of several sizes, a pool over the grid or over strips of it. All operators take
channels-last tensors (B, *grid, C) with a grid of rank 1 to 3 and a ``valid`` (B, *grid) of the tokens that exist:
tokens that do not exist are zero before every convolution, exactly as tokens beyond the border are, and take no part
in a pool. Everything costs a constant number of operations per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_axes,
    check_batch,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_int,
    check_rank,
    check_real,
    check_tensors,
    check_valid,
    describe,
    to_list,
)
from ..normalizers import Normalizer
from ..positions import resized
from ..types import stats_dtype
from ._call import AttentionCall, prepare
from ._dispatch import Operator
from .attention import ATTENTION

Activation = Callable[[Tensor], Tensor]


def _check_grid(x: Tensor, valid: Tensor | None, name: str = "x") -> int:
    check_rank(name, x, (3, 4, 5), "(B, *grid, C) with a grid of rank 1, 2 or 3")
    if valid is not None:
        check_valid("valid", valid, x.shape[:-1])
        check_device(**{name: x, "valid": valid})
    return x.dim() - 2


def _check_activation(activation: Any) -> None:
    if activation is not None and not callable(activation):
        raise TypeError(f"activation must be a function such as torch.sigmoid, or None, got {describe(activation)}")


def _zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)


# --------------------------------------------------------------------------------------------------------------------
# Aggregation


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1, valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Depthwise convolution that keeps the size of the grid.

    Args:
        x: (B, *grid, C).
        weight: (C, 1, *kernel), odd kernel sizes.
        bias: (C,).
        dilation: distance between taps.
        valid: (B, *grid) boolean; the others are zero, as if they lay beyond the border.
        backend: ``"phases"`` by default on the CPU with a dilation: the tokens of every residue class apart, each an
            undilated convolution; ``"convolution"``; ``"eager"``, a sum of shifted grids (the specification).

    Returns:
        (B, *grid, C).

    Raises:
        ValueError: a weight of another rank or width, or an even kernel, which would not keep the size.

    >>> depthwise(torch.ones(1, 4, 4, 2), torch.ones(2, 1, 3, 3))[0, 1, 1].tolist()
    [9.0, 9.0]
    """
    return _DEPTHWISE.run(_prepare_depthwise(x, weight, bias, dilation=dilation, valid=valid), backend)


class _Depthwise(NamedTuple):
    """A checked convolution; tokens that do not exist are zero."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dilation: int

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias) if t is not None]


def _convolution(call: _Depthwise) -> Tensor:
    x, weight, kernel, rank = call.x, call.weight, tuple(call.weight.shape[2:]), call.x.dim() - 2
    if not x.numel():
        return x * 1  # no token, no sample: nothing to convolve, which convolutions refuse
    if rank == 1:  # there is no channels-last 1-D convolution; a 2-D one of height 1 is
        x, weight, kernel = x.unsqueeze(1), weight.unsqueeze(2), (1, *kernel)
    conv: Callable[..., Tensor] = F.conv3d if rank == 3 else F.conv2d
    padding = tuple(call.dilation * (k // 2) for k in kernel)
    # The view below has channels-last strides, which convolutions keep and run fastest on.
    out = conv(
        x.contiguous().movedim(-1, 1), weight, call.bias, padding=padding, dilation=call.dilation,
        groups=weight.shape[0],
    ).movedim(1, -1)  # fmt: skip
    return out.squeeze(1) if rank == 1 else out


def _phases(call: _Depthwise) -> Tensor:
    """Dilated by d, d^rank grids that do not meet: an undilated convolution of all of them as a batch.

    Dilated depthwise convolutions have no fast kernel on the CPU, in no order of memory.
    """
    if not call.x.numel():
        return _convolution(call)
    x, d = call.x, call.dilation
    grid, rank = x.shape[1:-1], x.dim() - 2
    x = F.pad(x, (0, 0, *(width for n in reversed(grid) for width in (0, -n % d))))
    for axis in range(rank):  # (B, n1, d, n2, d, C)
        x = x.unflatten(1 + 2 * axis, (-1, d))
    inner, outer = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    out = _convolution(call._replace(x=x.permute(0, *outer, *inner, 2 * rank + 1).flatten(0, rank), dilation=1))
    out = out.unflatten(0, (call.x.shape[0], *[d] * rank))
    back = [a for i in range(rank) for a in (1 + rank + i, 1 + i)]
    out = out.permute(0, *back, 2 * rank + 1)
    for axis in range(rank):
        out = out.flatten(1 + axis, 2 + axis).narrow(1 + axis, 0, grid[axis])
    return out


def _undilated(call: _Depthwise) -> str | None:
    if not call.x.is_cpu:
        return "it is for the CPU, where dilated convolutions have no fast kernel"
    return "there is one phase" if call.dilation == 1 else None


def _shifts(call: _Depthwise) -> Tensor:
    """A sum of the grid moved by every tap."""
    grid, kernel, d = call.x.shape[1:-1], call.weight.shape[2:], call.dilation
    padded = F.pad(call.x, (0, 0, *(d * (k // 2) for k in reversed(kernel) for _ in range(2))))
    weight = call.weight[:, 0]
    out = torch.zeros_like(call.x) if call.bias is None else call.bias.expand(call.x.shape)
    for tap in itertools.product(*(range(k) for k in kernel)):
        moved, here = padded, weight
        for axis, (t, n) in enumerate(zip(tap, grid, strict=True), 1):
            moved, here = moved.narrow(axis, d * t, n), here[:, t]
        out = out + moved * here
    return out


def _prepare_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1, valid: Tensor | None = None
) -> _Depthwise:
    rank = _check_grid(x, valid)
    check_int("dilation", dilation, least=1)
    check_float("weight", weight)
    if bias is not None:
        check_float("bias", bias)
    kernel = tuple(weight.shape[2:])
    if weight.dim() != rank + 2 or weight.shape[0] != x.shape[-1] or weight.shape[1] != 1:
        raise ValueError(
            f"weight must have shape (C, 1, *kernel) with C={x.shape[-1]} and {rank} kernel axes, "
            f"got {tuple(weight.shape)}"
        )
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"weight has kernel {kernel}; only odd sizes keep the grid as it is")
    if bias is not None:
        check_axes("bias", bias, C=x.shape[-1])
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        check_dtype(x=x, weight=weight, bias=bias)
    check_device(x=x, weight=weight, bias=bias)
    return _Depthwise(_zero_invalid(x, valid), weight, bias, dilation)


_DEPTHWISE = Operator("depthwise", _prepare_depthwise)
_DEPTHWISE.register("phases", _phases, prefers=_undilated)
_DEPTHWISE.register("convolution", _convolution)
_DEPTHWISE.register("eager", _shifts)


def pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] | None = None,
    dilations: Sequence[int] | None = None,
    activation: Activation | None = None,
    valid: Tensor | None = None,
) -> list[Tensor]:
    """Chained depthwise convolutions, each reading the one before: contexts of growing reach.

    ``z_0 = x``, ``z_l = activation(depthwise(z_(l-1), weights[l]))``; level l reaches ``1 + sum d_i (k_i - 1)``.

    Args:
        x: (B, *grid, C).
        weights: one (C, 1, *kernel) per level.
        biases: one (C,) or ``None`` per level.
        dilations: one per level, 1 by default.
        activation: applied after every level.
        valid: (B, *grid) boolean.

    Returns:
        The levels ``[z_1, ..., z_L]``, each (B, *grid, C).

    Raises:
        ValueError: when biases or dilations are not one per level.

    >>> [z.shape[-1] for z in pyramid(torch.ones(1, 4, 2), [torch.ones(2, 1, 3), torch.ones(2, 1, 5)])]
    [2, 2]
    """
    weights = check_tensors("weights", weights)
    _check_activation(activation)
    biases, dilations = to_list("biases", biases, "[None, bias]"), to_list("dilations", dilations)
    for name, given in (("biases", biases), ("dilations", dilations)):
        if given is not None and len(given) != len(weights):
            raise ValueError(f"{name} must have one entry per level ({len(weights)}), got {len(given)}")
    levels = []
    for i, weight in enumerate(weights):
        x = depthwise(
            x, weight, None if biases is None else biases[i], dilation=1 if dilations is None else dilations[i],
            valid=valid,
        )  # fmt: skip
        if activation is not None:
            x = activation(x)
        levels.append(x)
    return levels


def mixed_depthwise(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Side by side depthwise convolutions: equal runs of channels, each with its own kernel size.

    Args:
        x: (B, *grid, C).
        weights: G weights (C / G, 1, *kernel_g).
        biases: G biases (C / G,) or ``None``.
        valid: (B, *grid) boolean.

    Returns:
        (B, *grid, C), runs in the same order.

    Raises:
        ValueError: when the runs do not add up to C.

    >>> mixed_depthwise(torch.ones(1, 5, 4), [torch.ones(2, 1, 1), torch.ones(2, 1, 3)])[0, 2].tolist()
    [1.0, 1.0, 3.0, 3.0]
    """
    _check_grid(x, valid)
    weights, biases = check_tensors("weights", weights, least=1), to_list("biases", biases, "[None, bias]")
    widths = [w.shape[0] if w.dim() else 0 for w in weights]
    if sum(widths) != x.shape[-1]:
        raise ValueError(f"weights cover {widths} channels, but x has {x.shape[-1]}")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases must have one entry per weight ({len(weights)}), got {len(biases)}")
    parts = _zero_invalid(x, valid).split(widths, -1)
    offsets = [None] * len(weights) if biases is None else biases
    return torch.cat([depthwise(p, w, b) for p, w, b in zip(parts, weights, offsets, strict=True)], -1)


def pool(
    x: Tensor, *, keep: int | None = None, stat: str = "mean", correction: int = 1, valid: Tensor | None = None
) -> Tensor:
    """Mean or standard deviation over the tokens that exist: of the whole grid, or of every strip across one axis.

    Args:
        x: (B, *grid, C).
        keep: the grid axis to keep (0 is the first after the batch): pools all others. ``None``: the whole grid.
        stat: ``"mean"``, or ``"std"``, the standard deviation.
        correction: what ``"std"`` takes off the number of tokens it divides by; where nothing is left (one token and
            ``correction=1``) it is zero, and so is its gradient.
        valid: (B, *grid) boolean; a strip where nothing exists gives zeros.

    Returns:
        (B, *ones, C), the kept axis at its size, so that it broadcasts against ``x``.

    Raises:
        ValueError: when the axis does not exist, or another ``stat``.

    >>> pool(torch.arange(6.0).reshape(1, 2, 3, 1), keep=0).flatten().tolist()
    [1.0, 4.0]
    >>> pool(torch.arange(6.0).reshape(1, 2, 3, 1), keep=0, stat="std").flatten().tolist()
    [1.0, 1.0]
    """
    rank = _check_grid(x, valid)
    check_float("x", x)
    check_choice("stat", stat, ("mean", "std"))
    check_int("correction", correction, least=0)
    if keep is not None:
        check_int("keep", keep, least=0, most=rank - 1, also=f"or None, for a grid of rank {rank}")
    axes = tuple(a + 1 for a in range(rank) if a != keep)
    if not axes and stat == "mean":
        return _zero_invalid(x, valid)
    high = stats_dtype(x.dtype)
    count: Tensor | int = math.prod([x.shape[a] for a in axes])
    if valid is not None:
        count = (valid.sum(axes, keepdim=True) if axes else valid.to(torch.int64)).unsqueeze(-1)
    mean = _summed(_zero_invalid(x, valid), axes, high) / _at_least_one(count)
    if stat == "mean":
        return mean.to(x.dtype)
    over = count - correction
    spread = _summed(_zero_invalid(x - mean, valid).square(), axes, high) / _at_least_one(over)
    seen = (spread > 0) & (over > 0)
    # The root of zero has no derivative; what has no spread gives none back.
    return torch.where(seen, torch.where(seen, spread, 1.0).sqrt(), 0.0).to(x.dtype)


def _summed(x: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return x.sum(axes, keepdim=True, dtype=dtype) if axes else x.to(dtype)


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def grid_softmax(scores: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Softmax over the whole grid, of every channel by itself.

    Args:
        scores: (B, *grid, H).
        valid: (B, *grid) boolean; the others weigh nothing.

    Returns:
        (B, *grid, H) in the type of statistics (float32, or float64 for such scores); each channel sums to one over the
        tokens that exist, or is zero where none does.

    >>> grid_softmax(torch.zeros(1, 2, 2, 1)).flatten().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    _check_grid(scores, valid, "scores")
    check_float("scores", scores)
    flat = scores.flatten(1, -2).to(stats_dtype(scores.dtype))
    if valid is None:
        return flat.softmax(1).view(scores.shape)
    absent = ~valid.flatten(1).unsqueeze(-1)
    empty = absent.all(1, keepdim=True)  # such a row would be 0 / 0
    weights = flat.masked_fill(absent & ~empty, float("-inf")).softmax(1)
    return weights.masked_fill(absent, 0.0).view(scores.shape)


def weighted_pool(x: Tensor, scores: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Means of tokens, each with its own weights over the grid: ``out_h = sum_n softmax_n(scores_h)_n x_n``.

    A linear map of the pooled tokens is the pool of the mapped ones; mapping afterwards costs N times less.

    Args:
        x: (B, *grid, C).
        scores: (B, *grid, H).
        valid: (B, *grid) boolean; the others weigh nothing, and a sample without any gives zeros.

    Returns:
        (B, H, C).

    Raises:
        ValueError: scores of another grid than x.

    >>> weighted_pool(torch.arange(4.0).view(1, 4, 1), torch.zeros(1, 4, 2)).flatten().tolist()
    [1.5, 1.5]
    """
    _check_grid(x, valid)
    check_float("x", x)
    check_float("scores", scores)
    if scores.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"scores must be (B, *grid, H) of x, {tuple(x.shape[:-1])} and H, got {tuple(scores.shape)}")
    check_device(x=x, scores=scores)
    weights = grid_softmax(scores, valid=valid).flatten(1, -2).transpose(1, 2)
    return weights.to(x.dtype) @ _zero_invalid(x, valid).flatten(1, -2)


# --------------------------------------------------------------------------------------------------------------------
# Gate and multiply


def spectral_gate(x: Tensor, weight: Tensor, *, resample: bool = False, valid: Tensor | None = None) -> Tensor:
    """A gate per frequency and channel: ``ifft(weight * fft(x))``, a circular depthwise kernel as large as the grid.

    Transforms are orthonormal and run in float32 (float64 for such an input), whatever the type of ``x``. Frequencies
    of the last axis are those of a real signal, n // 2 + 1; imaginary parts of the constant one, and of the highest of
    an even side, have no say.

    Args:
        x: (B, *grid, C).
        weight: (2, C, *frequencies), real and imaginary parts, for a grid (n_1, .., n_r): (n_1, .., n_r // 2 + 1)
            frequencies. All ones and zeros change nothing.
        resample: interpolate real and imaginary parts (bilinear) where they are for another grid, of rank 1 or 2.
        valid: (B, *grid) boolean; the others are zeros.

    Returns:
        (B, *grid, C).

    Raises:
        ValueError: a weight of other channels or of another grid.

    >>> one = torch.stack([torch.ones(3, 2), torch.zeros(3, 2)])
    >>> spectral_gate(torch.arange(1.0, 10).view(1, 3, 3), one).round().flatten().tolist()
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    """
    rank = _check_grid(x, valid)
    check_float("weight", weight)
    check_flag("resample", resample)
    grid = tuple(x.shape[1:-1])
    if weight.dim() != rank + 2 or tuple(weight.shape[:2]) != (2, x.shape[-1]):
        raise ValueError(
            f"weight must have shape (2, C, *frequencies) with C={x.shape[-1]} and {rank} axes of frequencies, got "
            f"{tuple(weight.shape)}"
        )
    check_device(x=x, weight=weight)
    wanted = (*grid[:-1], grid[-1] // 2 + 1)
    if tuple(weight.shape[2:]) != wanted:
        if not resample or rank > 2:
            raise ValueError(
                f"weight has {tuple(weight.shape[2:])} frequencies, but a grid {grid} has {wanted}; "
                + ("a grid of rank 3 must fit" if resample else "resample=True interpolates them")
            )
        weight = resized(weight, wanted, "bilinear")
    if not x.numel():
        return x * 1
    dtype, axes = stats_dtype(x.dtype), tuple(range(1, rank + 1))
    spectrum = torch.fft.rfftn(_zero_invalid(x, valid).to(dtype), dim=axes, norm="ortho")
    both = weight.to(dtype).movedim(1, -1)  # (2, *frequencies, C)
    return torch.fft.irfftn(spectrum * torch.complex(both[0], both[1]), s=grid, dim=axes, norm="ortho").to(x.dtype)


def _check_broadcast(name: str, x: Tensor, shape: Sequence[int], what: str) -> None:
    if x.dim() != len(shape) or any([f != n and f != 1 for f, n in zip(x.shape, shape, strict=True)]):
        raise ValueError(f"{name} of shape {tuple(x.shape)} does not broadcast to {what}, {tuple(shape)}")


def gated_sum(contexts: Sequence[Tensor], gates: Tensor) -> Tensor:
    """``sum_l gate_l * context_l``, one scalar gate per token and context.

    Args:
        contexts: L tensors, each (B, *grid, C) or broadcastable to it (a pool).
        gates: (B, *grid, L), any real numbers.

    Returns:
        (B, *grid, C).

    Raises:
        ValueError: when gates and contexts differ in number.

    >>> gated_sum([torch.ones(1, 3, 2), torch.ones(1, 1, 2)], torch.tensor([[[1.0, 2.0]] * 3]))[0, 0].tolist()
    [3.0, 3.0]
    """
    contexts = check_tensors("contexts", contexts, least=1)
    check_float("gates", gates)
    if not gates.dim() or gates.shape[-1] != len(contexts):
        raise ValueError(f"gates must have one channel per context ({len(contexts)}), got {tuple(gates.shape)}")
    shape = (*gates.shape[:-1], max(c.shape[-1] if c.dim() else 0 for c in contexts))
    for i, context in enumerate(contexts):
        name = f"contexts[{i}]"
        check_float(name, context)
        _check_broadcast(name, context, shape, "(B, *grid, C) of the gates and the widest context")
        if context.device != gates.device:
            check_device(gates=gates, **{name: context})
    parts = gates.split(1, -1)
    out = contexts[0] * parts[0]
    for context, gate in zip(contexts[1:], parts[1:], strict=True):
        out = torch.addcmul(out, context, gate) if context.dtype == gate.dtype == out.dtype else out + context * gate
    return out


def modulate(query: Tensor, *factors: Tensor, activation: Activation | None = None) -> Tensor:
    """``query * activation(factor_1) * activation(factor_2) ...``, each factor broadcast to the query.

    Args:
        query: (B, *grid, C).
        factors: (B, *grid or ones, C or 1) modulators.
        activation: applied to every factor, for example ``torch.sigmoid``; none by default, so that factors are
            unbounded.

    Returns:
        (B, *grid, C).

    Raises:
        ValueError: a factor that does not broadcast to the query.

    >>> modulate(torch.ones(1, 2, 3), torch.full((1, 1, 3), 2.0), torch.full((1, 2, 1), 3.0))[0, 0].tolist()
    [6.0, 6.0, 6.0]
    """
    check_float("query", query)
    _check_activation(activation)
    for factor in factors:
        check_float("factor", factor)
        _check_broadcast("factor", factor, query.shape, "the query")
        if factor.device != query.device:
            check_device(query=query, factor=factor)
        query = query * (factor if activation is None else activation(factor))
    return query


# --------------------------------------------------------------------------------------------------------------------
# Tokens are features


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    l2: bool = False,
    valid: Tensor | None = None,
    normalizer: str | Normalizer = "softmax",
    return_weights: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention between features: every feature is a token whose vector are its values over the grid.

    ``A = normalizer(scale * q^T k)`` of shape D x D, ``out = v A^T``: linear in the number of tokens.

    Args:
        q: (B, H, N, D) queries.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        scale: a number, or a tensor that broadcasts to (B, H, 1, 1), such as a learned temperature per head. Defaults
            to ``N ** -0.5`` with N the tokens that exist (the length of the vectors compared), and to 1 with ``l2``.
            Below 0, features attend to those unlike them.
        l2: bring every feature of q and k to unit length over the tokens first.
        valid: (B, N) boolean; other tokens take no part in the comparison and come out as zeros.
        normalizer: how scores become weights.
        return_weights: also return A (B, H, D, D).
        backend: of :func:`attnlib.attention`, with features for tokens; ``"eager"`` by default, since the map is D x D.

    Returns:
        (B, H, N, D), or a pair of it and the weights.

    Raises:
        ValueError: shapes that do not fit.

    Reference: El-Nouby et al., 2021, arXiv 2106.09681, eq. 2; Ding et al., 2022, arXiv 2204.03645, eq. 5.

    >>> channel_attention(*torch.randn(3, 2, 4, 9, 6)).shape
    torch.Size([2, 4, 9, 6])
    """
    result = _CHANNELS.run(
        _prepare_channels(
            q, k, v, scale=scale, l2=l2, valid=valid, normalizer=normalizer, return_weights=return_weights
        ),
        backend,
    )
    if return_weights:
        return result[0].transpose(-2, -1), result[1]
    return result.transpose(-2, -1)


def _prepare_channels(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | Tensor | None = None, l2: bool = False,
    valid: Tensor | None = None, normalizer: str | Normalizer = "softmax", return_weights: bool = False,
) -> AttentionCall:  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rank(name, tensor, 4, "(B, H, N, D)")
    if not (q.shape[2] == k.shape[2] == v.shape[2]):
        raise ValueError(f"q, k and v must share their tokens, got N={q.shape[2]}, {k.shape[2]} and {v.shape[2]}")
    if k.shape[3] != v.shape[3]:
        raise ValueError(f"k and v must share their features, got D={k.shape[3]} and {v.shape[3]}")
    check_batch(q=q, k=k, v=v)
    check_valid("valid", valid, (q.shape[0], q.shape[2]))
    check_device(q=q, k=k, v=v, valid=valid)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor)
    check_flag("l2", l2)
    check_flag("return_weights", return_weights)
    if isinstance(scale, Tensor):
        check_float("scale", scale)
        check_device(q=q, scale=scale)
        lead = tuple(scale.shape)
        if scale.dim() > 4 or any(
            given not in (1, size) for given, size in zip(reversed(lead), (1, 1, q.shape[1], q.shape[0]), strict=False)
        ):
            raise ValueError(f"scale must broadcast to (B, H, 1, 1) = {(*q.shape[:2], 1, 1)}, got {lead}")
    elif scale is not None and check_real("scale", scale) < 0:  # features attend to those unlike them
        q, scale = -q, -scale
    if valid is not None:
        dead = ~valid[:, None, :, None]
        q, k, v = (t.masked_fill(dead, 0.0) for t in (q, k, v))
    if l2:
        q, k = (F.normalize(t, dim=2, eps=1e-12) for t in (q, k))
    if scale is None and l2:
        scale = 1.0
    elif scale is None:
        scale = max(q.shape[2], 1) ** -0.5
        if valid is not None:
            scale = valid.sum(1).clamp(min=1).to(stats_dtype(q.dtype)).rsqrt()[:, None, None, None]
    if isinstance(scale, Tensor):
        q, scale = (q * scale).to(q.dtype), 1.0
    return prepare(
        q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1), scale=scale, normalizer=normalizer,
        want="weights" if return_weights else "out",
    )  # fmt: skip


# The map is D x D, so that eager is the right backend at any N and comes first.
_CHANNELS = Operator("channel_attention", _prepare_channels)
_CHANNELS.backends = {name: ATTENTION.backends[name] for name in ("eager", *ATTENTION.backends)}


def context_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Queries read one small map of all tokens: ``q softmax(scale k^T v)``, each column over the features of the keys.

    It is :func:`channel_attention` in other roles: features of the values ask, those of the keys are compared, those of
    the queries are mixed. Linear in the number of tokens, linear in the queries, and blind to the order of ``k, v``.

    Args:
        q: (B, H, N, D) queries.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        scale: ``D ** -0.5`` by default.
        valid: (B, N) boolean; other tokens are no part of the map and come out as zeros.
        backend: as of :func:`channel_attention`.

    Returns:
        (B, H, N, D).

    Raises:
        ValueError: shapes that do not fit.

    Reference: Zhang et al., 2023, "CMX", arXiv 2203.04838.

    >>> context_attention(*torch.randn(3, 2, 4, 9, 6)).shape
    torch.Size([2, 4, 9, 6])
    """
    check_rank("q", q, 4, "(B, H, N, D)")
    return channel_attention(
        v, k, q, scale=q.shape[-1] ** -0.5 if scale is None else scale, valid=valid, backend=backend
    )
