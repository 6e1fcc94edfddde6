"""Engine B: dense attention inside groups of tokens, and the executor that engine A shares with it.

A :class:`attnlib.grids.Partition` says which queries and which keys form a group; groups are folded into the batch and
handed to :func:`attnlib.ops.attention`. Windows of a grid need no index: they are a reshape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    check_choice,
    check_device,
    check_flag,
    check_float,
    check_grid,
    check_int,
    check_ints,
    check_rank,
    check_serves,
    check_type,
    check_valid,
    to_tuple,
)
from ..grids import Partition, Windows, check_windows
from ..masks import Mask, as_mask, documents
from ..normalizers import Normalizer, as_normalizer
from ..types import Partial
from ._call import check_qkv
from ._dispatch import AUTO, Operator
from .attention import ATTENTION, attention, attention_partial

KINDS = ("block", "grid")


def register_inner(operator: Operator, run: Callable[[Any, str], Any]) -> None:
    """Let the backends of ``attention`` but its specification be forced on the pieces of an engine.

    Args:
        run: computes a call with the named backend on every piece.
    """
    for name, one in ATTENTION.backends.items():
        if name != "eager":
            operator.register(
                name,
                functools.partial(_with_inner, run, name),
                prefers=_when_forced,
                first=one.first,
                second=one.second,
                transforms=one.transforms,
            )


def _with_inner(run: Callable[[Any, str], Any], name: str, call: Any) -> Any:
    return run(call, name)


def _when_forced(call: Any) -> str:
    return "each piece gets the backend that serves it best, unless one is forced"


def pair_mask(mask: Mask, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """``mask`` inside each group: (B or 1, G, H or 1, Sq, Sk).

    Args:
        q_pos: (G, Sq), or (B or 1, H or 1, G, Sq), positions of queries.
        k_pos: the same for keys.
    """
    q, k = (p if p.dim() == 4 else p[None, None] for p in (q_pos, k_pos))
    q, k = q.transpose(1, 2).unsqueeze(-1), k.transpose(1, 2).unsqueeze(-2)
    zero = torch.zeros((), dtype=torch.long, device=q.device)
    batch, heads = mask.batch(), mask.heads()
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1, 1) if batch > 1 else zero
    h = torch.arange(heads, device=q.device).view(1, 1, -1, 1, 1) if heads > 1 else zero
    out = mask.pair(b, h, q, k)
    return torch.broadcast_tensors(out, q, k)[0]


def _fold(t: Tensor, batch: int, groups: int) -> Tensor:
    """(B or 1, G or 1, ...) -> (B * G, ...), or (1, ...) when nothing depends on sample or group."""
    if t.shape[0] == t.shape[1] == 1:
        return t[0]
    return t.expand(batch, groups, *t.shape[2:]).flatten(0, 1)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    allowed: Tensor | None = None,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    partial: bool = False,
    **options: Any,
) -> Tensor | Partial:
    """Attention within each group: the executor of engines A and B.

    Args:
        q: (B, G, H, Sq, D) queries.
        k: (B, G, Hk, Sk, D) keys.
        v: (B, G, Hv, Sk, Dv) values.
        allowed: boolean (B or 1, G or 1, H or 1, Sq, Sk), which pairs may meet.
        valid: boolean (B, G, Sk), which keys exist.
        bias: float (B or 1, G or 1, H or 1, Sq, Sk), added to the scaled scores.
        partial: return a :class:`attnlib.types.Partial` instead of the output.
        options: ``scale``, ``normalizer``, ``dropout_p`` and ``backend`` of :func:`attnlib.ops.attention`; no
            normalizer and no dropout beside ``partial``.

    Returns:
        (B, G, H, Sq, Dv), or a Partial of the same leading shape.

    >>> x = torch.randn(2, 3, 4, 5, 8)
    >>> grouped_attention(x, x, x).shape
    torch.Size([2, 3, 4, 5, 8])
    """
    lead = tuple(q.shape[:2])
    call = dict(
        mask=None if allowed is None else _fold(allowed, *lead),
        valid=None if valid is None else valid.expand(*lead, -1).flatten(0, 1),
        bias=None if bias is None else _fold(bias, *lead),
        **options,
    )
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    if partial:
        call.pop("dropout_p", None)
        return Partial(*(t.unflatten(0, lead) for t in attention_partial(*flat, **call)))
    return attention(*flat, **call).unflatten(0, lead)


# --------------------------------------------------------------------------------------------------------------------
# Any partition, by index


def _expand_index(index: Tensor, batch: int, heads: int, tokens: int) -> Tensor:
    """(G, S), (H, G, S) or (B, H, G, S) -> (B or 1, H or 1, G, S), checked."""
    # Looking at the numbers needs data at hand: not under a tracer, and on a GPU it would wait for the device.
    if type(index) is Tensor and index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        if int(index.max()) >= tokens or int(index.min()) < -1:
            raise ValueError(
                f"partition index runs from {int(index.min())} to {int(index.max())}; "
                f"possible: 0 to {tokens - 1}, and -1 for a hole"
            )
    index = index.reshape((1,) * (4 - index.dim()) + tuple(index.shape))
    if index.shape[0] not in (1, batch) or index.shape[1] not in (1, heads):
        raise ValueError(
            f"partition index has {index.shape[0]} samples and {index.shape[1]} heads, "
            f"but q has batch {batch} and {heads} heads"
        )
    return index


def _take(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """(B, H, N, D) at (B or 1, H or 1, G, S) -> (B, G, H, S, D); holes read token 0."""
    index = index.clamp(min=0)
    groups, size = index.shape[2:]
    if index.shape[0] == index.shape[1] == 1:
        taken = x.transpose(1, 2).index_select(1, index.flatten())
        return taken.unflatten(1, (groups, size)).transpose(2, 3)
    if index.shape[1] > 1 and x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    index = index.expand(x.shape[0], x.shape[1], groups, size).flatten(2).unsqueeze(-1)
    taken = x.gather(2, index.expand(-1, -1, -1, x.shape[-1]))
    return taken.unflatten(2, (groups, size)).transpose(1, 2)


def partition_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    valid: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    normalizer: str | Normalizer = "softmax",
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Dense attention inside each group of ``partition``.

    Args:
        q: (B, H, N, D) queries.
        k: (B, Hk, M, D) keys.
        v: (B, Hv, M, Dv) values.
        partition: groups of queries and of the keys they read; per head or per sample if its indices say so. Every
            token stands in one query group; tokens in none give zeros. A key may stand in many groups, once in each.
        valid: (B, M) boolean, which keys exist.
        mask: which pairs may meet besides, on token numbers.
        bias: (..., Sq, Sk) added inside every group, (..., G, Sq, Sk) per group, with heads and samples before:
            (H, Sq, Sk) is per head; for one per group write (1 or B, H or 1, G, Sq, Sk).
        scale: defaults to ``D ** -0.5``.
        normalizer: as of :func:`attnlib.attention`.
        dropout_p: dropout of weights.
        backend: ``"groups"``, also by default; a backend of :func:`attnlib.attention` for what runs inside the groups;
            or ``"eager"``, which builds the whole (N, M) map (the specification).

    Returns:
        (B, H, N, Dv).

    Raises:
        ValueError: shapes that do not fit, or indices beyond the tokens.

    >>> from attnlib.grids import window_partition
    >>> x = torch.randn(1, 2, 16, 8)
    >>> partition_attention(x, x, x, window_partition((4, 4), 2)).shape
    torch.Size([1, 2, 16, 8])
    """
    call = _prepare(
        q, k, v, partition, valid=valid, mask=mask, bias=bias, scale=scale, normalizer=normalizer, dropout_p=dropout_p
    )
    return _PARTITION.run(call, backend)


@dataclass(frozen=True)
class _Groups:
    """A checked problem in groups."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor  # (B or 1, H or 1, G, Sq), -1 for a hole
    k_index: Tensor
    valid: Tensor | None
    mask: Mask | None
    bias: Tensor | None  # (B or 1, H or 1, G or 1, Sq, Sk)
    options: dict[str, Any]

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.bias) if t is not None]


def _checked_mask(
    mask: Mask | Tensor | None, batch: int, heads: int, n: int, m: int, device: torch.device
) -> Mask | None:
    mask = as_mask(mask, n, m)
    if mask is not None:
        mask.check(n, m, batch=batch, heads=heads, device=device)
    return mask


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, partition: Partition, *, valid: Tensor | None = None,
    mask: Mask | Tensor | None = None, bias: Tensor | None = None, scale: float | None = None,
    normalizer: str | Normalizer = "softmax", dropout_p: float = 0.0,
) -> _Groups:  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_rank(name, t, 4, "(B, H, N, D)")
    check_type("partition", partition, Partition)
    check_qkv(q, k, v)
    batch, heads, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    check_valid("valid", valid, (batch, m))
    check_device(q=q, k=k, v=v, valid=valid)
    q_index = _expand_index(partition.q_index.to(q.device), batch, heads, n)
    k_index = q_index if partition.k_index is None else _expand_index(partition.k_index.to(q.device), batch, heads, m)
    mask = _checked_mask(mask, batch, heads, n, m, q.device)
    if bias is not None:
        check_float("bias", bias)
        check_device(q=q, bias=bias)
        if bias.dim() not in (2, 3, 4, 5) or tuple(bias.shape[-2:]) != (q_index.shape[3], k_index.shape[3]):
            raise ValueError(
                f"bias must end in (Sq, Sk) = {(q_index.shape[3], k_index.shape[3])}, got {tuple(bias.shape)}"
            )
        if bias.dim() < 5:  # no group axis: the same in every group
            bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)).unsqueeze(2)
        for what, given, size in zip(
            ("samples", "heads", "groups"), bias.shape, (batch, heads, q_index.shape[2]), strict=False
        ):
            check_serves("bias", given, size, what)
    options = dict(scale=scale, normalizer=as_normalizer(normalizer), dropout_p=dropout_p)
    return _Groups(q, k, v, q_index, k_index, valid, mask, bias, options)


def _in_groups(call: _Groups, inner: str = AUTO) -> Tensor:
    q, k, v, q_index, k_index = call.q, call.k, call.v, call.q_index, call.k_index
    batch, heads, n = q.shape[:3]
    allowed = None
    if call.mask is not None:
        allowed = pair_mask(call.mask, q_index.clamp(min=0), k_index.clamp(min=0))
    here = (k_index >= 0).transpose(1, 2)  # (B or 1, G, H or 1, Sk)
    exists, valid = None, call.valid
    if here.shape[2] == 1:
        exists = here[:, :, 0]
        if valid is not None:
            exists = exists & _take(valid[:, None, :, None], k_index, 1)[:, :, 0, :, 0]
    else:
        if valid is not None:
            here = here & _take(valid[:, None, :, None].expand(-1, heads, -1, -1), k_index, heads)[..., 0]
        here = here.unsqueeze(-2).expand(*here.shape[:3], q_index.shape[3], here.shape[3])
        allowed = here if allowed is None else allowed & here
    out = grouped_attention(
        _take(q, q_index, heads), _take(k, k_index, heads), _take(v, k_index, heads), allowed=allowed, valid=exists,
        bias=None if call.bias is None else call.bias.transpose(1, 2), backend=inner, **call.options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    # Scatter into a buffer with one slot more, where holes land.
    out = out.transpose(1, 2).flatten(2, 3)
    target = torch.where(q_index < 0, n, q_index).flatten(2).unsqueeze(-1).expand(batch, heads, -1, out.shape[-1])
    return out.new_zeros(batch, heads, n + 1, out.shape[-1]).scatter(2, target, out)[:, :, :n]


def _eager(call: _Groups) -> Tensor:
    q_index, k_index = call.q_index, call.k_index
    n, m = call.q.shape[2], call.k.shape[2]
    shape = torch.broadcast_shapes(q_index.shape[:2], k_index.shape[:2])
    groups, sq, sk = q_index.shape[2], q_index.shape[3], k_index.shape[3]
    # One flat slot per pair of tokens, and one where the holes land.
    pair = q_index.unsqueeze(-1) * m + k_index.unsqueeze(-2)
    hole = (q_index < 0).unsqueeze(-1) | (k_index < 0).unsqueeze(-2)
    slot = torch.where(hole, n * m, pair)

    def spread(values: Tensor, fill: Any) -> Tensor:
        lead = torch.broadcast_shapes(values.shape[:2], shape)
        values = values.expand(*lead, groups, sq, sk).flatten(2)
        flat = values.new_full((*lead, n * m + 1), fill)
        return flat.scatter(2, slot.expand(*lead, -1, -1, -1).flatten(2), values)[..., : n * m].unflatten(2, (n, m))

    allowed = spread(torch.ones(1, 1, 1, 1, 1, dtype=torch.bool, device=call.q.device), False)
    if call.mask is not None:
        allowed = allowed & call.mask.dense(n, m, call.q.device)
    bias = None if call.bias is None else spread(call.bias, 0.0)
    return attention(call.q, call.k, call.v, mask=allowed, valid=call.valid, bias=bias, backend="eager", **call.options)


_PARTITION = Operator("partition_attention", _prepare)
_PARTITION.register("groups", _in_groups)
register_inner(_PARTITION, _in_groups)
_PARTITION.register("eager", _eager)


# --------------------------------------------------------------------------------------------------------------------
# Windows of a grid, by reshape


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window_size: int | Sequence[int],
    kind: str = "block",
    *,
    shift: int | Sequence[int] = 0,
    interval: int | Sequence[int] = 1,
    cut: bool = False,
    valid: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    normalizer: str | Normalizer = "softmax",
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """:func:`partition_attention` for block or grid windows of a row-major grid, without any gather.

    Args:
        q: (B, H, N, D) queries of ``grid``.
        k: (B, Hk, N, D) keys.
        v: (B, Hv, N, Dv) values.
        grid: the grid, ``prod(grid) == N``.
        window_size: sides of a window; must divide the grid.
        kind: ``"block"``: windows of consecutive tokens; ``"grid"``: windows of tokens spread evenly over the map.
        shift: how far block windows are moved towards the end of each axis. The windows at both ends are then parts
            of one, which lie in one window and do not meet.
        interval: how far apart the tokens of a block window lie; ``interval`` windows a side then lie between one
            another in a block of ``window_size * interval``, which must divide the grid. Without a shift.
        cut: q, k and v lie in windows already, (B, G, H, S, D), as :meth:`attnlib.grids.Windows.cut` orders them, and
            so does the result: for who projects behind the cut, which moves a third of the numbers.
        valid: (B, N) boolean, which tokens exist.
        mask: which pairs may meet besides, on token numbers.
        bias: (S, S) or (H, S, S), the same in every window of S tokens.
        scale: defaults to ``D ** -0.5``.
        normalizer: as of :func:`attnlib.attention`.
        dropout_p: dropout of weights.
        backend: ``"windows"``, also by default; a backend of :func:`attnlib.attention` for what runs inside the
            windows; or ``"eager"``, which builds the whole (N, N) map (the specification).

    Returns:
        (B, H, N, Dv); with ``cut`` (B, G, H, S, Dv).

    Raises:
        ValueError: a window that does not divide the grid, or a grid that is not N tokens.

    >>> x = torch.randn(1, 2, 16, 8)
    >>> window_attention(x, x, x, (4, 4), 2, "grid").shape
    torch.Size([1, 2, 16, 8])
    """
    call = _prepare_windows(
        q, k, v, grid, window_size, kind, shift=shift, interval=interval, cut=cut, valid=valid, mask=mask, bias=bias,
        scale=scale, normalizer=normalizer, dropout_p=dropout_p,
    )  # fmt: skip
    return _WINDOWS.run(call, backend)


@dataclass(frozen=True)
class _Windows:
    """A checked problem on a grid in windows."""

    q: Tensor  # (B, G, H, S, D) when ``cut``, (B, H, N, D) otherwise; so are k and v
    k: Tensor
    v: Tensor
    windows: Windows
    cut: bool
    valid: Tensor | None
    mask: Mask | None
    bias: Tensor | None
    options: dict[str, Any]

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.bias) if t is not None]

    def split(self, t: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, G, H, S, D)."""
        heads, width = t.shape[1], t.shape[3]
        t = t.transpose(1, 2).reshape(t.shape[0], *self.windows.grid, heads * width)
        return self.windows.cut(t).unflatten(-1, (heads, width)).transpose(2, 3)

    def joined(self, t: Tensor) -> Tensor:
        """(B, G, H, S, D) -> (B, H, N, D)."""
        heads, width = t.shape[2], t.shape[4]
        t = self.windows.join(t.transpose(2, 3).flatten(3))
        return t.reshape(t.shape[0], math.prod(self.windows.grid), heads, width).transpose(1, 2)


def _prepare_windows(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], window_size: int | Sequence[int], kind: str = "block", *,
    shift: int | Sequence[int] = 0, interval: int | Sequence[int] = 1, cut: bool = False, valid: Tensor | None = None,
    mask: Mask | Tensor | None = None, bias: Tensor | None = None, scale: float | None = None,
    normalizer: str | Normalizer = "softmax", dropout_p: float = 0.0,
) -> _Windows:  # fmt: skip
    check_flag("cut", cut)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_rank(name, t, 5 if cut else 4, "(B, G, H, S, D)" if cut else "(B, H, N, D)")
    check_choice("kind", kind, KINDS)
    grid = check_grid("grid", grid)
    window = tuple(check_int("window_size", w, least=1) for w in to_tuple("window_size", window_size, len(grid)))
    check_windows(grid, window)
    moved = check_ints("shift", to_tuple("shift", shift, len(grid)), least=0)
    if any(s >= w for s, w in zip(moved, window, strict=True)) or (any(moved) and kind != "block"):
        raise ValueError(f"shift={moved} must be less than window_size={window}, and 0 with kind={kind!r}")
    apart = check_ints("interval", to_tuple("interval", interval, len(grid)), least=1)
    if any(i > 1 for i in apart):
        if kind != "block" or any(moved):
            raise ValueError(f"interval={apart} is for kind='block' without a shift, got {kind!r} and shift={moved}")
        check_windows(grid, [w * i for w, i in zip(window, apart, strict=True)], "window_size * interval")
    windows = Windows(grid, window, kind, moved, apart)
    size, tokens = math.prod(window), math.prod(grid)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if cut and (t.shape[1], t.shape[3]) != (tokens // size, size):
            held = f"{tokens // size} windows of {size} tokens, but {name} has {t.shape[1]} of {t.shape[3]}"
            raise ValueError(f"grid={grid} has {held}")
        if not cut and t.shape[2] != tokens:
            raise ValueError(f"grid={grid} holds {tokens} tokens, but {name} has {t.shape[2]}")
    check_qkv(*((t[:, 0] for t in (q, k, v)) if cut else (q, k, v)))
    check_valid("valid", valid, (q.shape[0], tokens))
    check_device(q=q, k=k, v=v, valid=valid)
    mask = _checked_mask(mask, q.shape[0], q.shape[-3], tokens, tokens, q.device)
    if bias is not None:
        check_float("bias", bias)
        check_device(q=q, bias=bias)
    if bias is not None and (bias.dim() not in (2, 3, 4, 5) or tuple(bias.shape[-2:]) != (size, size)):
        raise ValueError(f"bias must end in (S, S) = {(size, size)} for windows of S tokens, got {tuple(bias.shape)}")
    options = dict(scale=scale, normalizer=as_normalizer(normalizer), dropout_p=dropout_p)
    return _Windows(q, k, v, windows, cut, valid, mask, bias, options)


def _in_windows(call: _Windows, inner: str = AUTO) -> Tensor:
    qkv = (call.q, call.k, call.v)
    q, k, v = qkv if call.cut else (call.split(t) for t in qkv)
    allowed, bias, exists = None, call.bias, None
    if call.mask is not None:
        index = call.windows.numbers(q.device)
        allowed = pair_mask(call.mask, index, index)
    grid = call.windows.grid
    if (ends := call.windows.ends(q.device)) is not None:
        part = call.windows.cut(ends.reshape(1, *grid, 1))[0, :, :, 0]
        together = (part[:, :, None] == part[:, None])[None, :, None]
        allowed = together if allowed is None else allowed & together
    if call.valid is not None:
        exists = call.windows.cut(call.valid.reshape(-1, *grid, 1))[..., 0]
    if bias is not None:
        bias = bias.reshape((1,) * (5 - bias.dim()) + tuple(bias.shape))
    out = grouped_attention(q, k, v, allowed=allowed, valid=exists, bias=bias, backend=inner, **call.options)
    assert isinstance(out, Tensor)
    return out if call.cut else call.joined(out)


def _windows_eager(call: _Windows) -> Tensor:
    mask = call.mask
    if (ends := call.windows.ends(call.q.device)) is not None:
        together = documents(ends)
        mask = together if mask is None else mask & together
    qkv = (call.q, call.k, call.v)
    q, k, v = (call.joined(t) for t in qkv) if call.cut else qkv
    out = partition_attention(
        q, k, v, Partition(call.windows.numbers(q.device)), valid=call.valid, mask=mask, bias=call.bias,
        backend="eager", **call.options,
    )  # fmt: skip
    return call.split(out) if call.cut else out


_WINDOWS = Operator("window_attention", _prepare_windows)
_WINDOWS.register("windows", _in_windows)
register_inner(_WINDOWS, _in_windows)
_WINDOWS.register("eager", _windows_eager)
