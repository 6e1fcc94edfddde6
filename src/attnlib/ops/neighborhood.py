"""Engine A, grid-local attention: a window around every query of a grid, in one to three dimensions.

Along one axis a window is described by its kernel, dilation, stride and causality (:class:`AxisRule`). The fast path
cuts every axis into tiles of queries; the windows of a tile lie in one box of keys. Tiles whose windows look alike
relative to the tile form a class (along an undilated axis of a large grid: the first, the inner ones and the last), so
that one small mask and one small bias serve every tile of a class, and the class is a batch of dense attentions.
Work and memory are O(N). The specification (``backend="eager"``) is dense attention under a mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from ..checks import (
    check_choice,
    check_device,
    check_float,
    check_grid,
    check_int,
    check_ints,
    check_rank,
    check_tensor,
    check_valid,
    fixed,
    to_tuple,
)
from ..grids import coordinates
from ..masks import Mask, as_mask
from ..types import Partial, traced_as_constant
from ._dispatch import AUTO, Operator
from .attention import attention, attention_partial
from .kernels import natten
from .partition import grouped_attention, pair_mask, register_inner

BORDERS = ("clamp", "mask", "zero")

# Cost of the tiled path in units of one (query, key) pair: fetching one key, and starting one class of tiles.
_ROW_COST, _CLASS_COST = 40, 15000


class AxisRule(NamedTuple):
    """How windows lie along one axis of ``length`` tokens. Tokens meet only within their residue modulo ``dilation``.

    In units of ``dilation``: queries ``stride`` by ``stride`` share the window of their leader, which is ``kernel``
    wide (with even ``kernel`` the extra key is on the left). ``border`` says what happens where a window leaves the
    grid: ``"clamp"`` shifts it back inside, so that every query sees ``kernel`` keys; ``"mask"`` cuts it off;
    ``"zero"`` keeps it, with zero keys and values outside. Causal windows end at the query and are never shifted.
    """

    length: int
    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False
    border: str = "clamp"

    def group_length(self, group: int) -> int:
        """Tokens in residue class ``group``."""
        return self.length // self.dilation + (group < self.length % self.dilation)

    def window(self, i: int, length: int) -> tuple[int, int]:
        """First and last key (inclusive) of query ``i`` in a residue class of ``length`` tokens."""
        w, s, clamp = self.kernel, self.stride, self.border == "clamp"
        if self.causal:
            leader = min(i // s * s + s - 1, length - 1) if clamp else i // s * s + s - 1
            first = leader - w + 1
            return (first if self.border == "zero" else max(first, 0)), i
        left, right = w // 2, (w - 1) // 2
        leader = i // s * s + s // 2
        if clamp:
            centre = min(max(min(leader, length - 1), left), length - 1 - right)
            return centre - left, centre + right
        if self.border == "mask":
            return max(leader - left, 0), min(leader + right, length - 1)
        return leader - left, leader + right


class TileClass(NamedTuple):
    """Tiles of one axis whose windows look alike. Positions are token numbers; steps are ``dilation``."""

    q_starts: tuple[int, ...]
    q_size: int
    k_starts: tuple[int, ...]
    k_size: int
    first: tuple[int, ...]  # of each query: first key of its window, counted from the box
    last: tuple[int, ...]
    shift: int  # start of the box minus start of the tile, in dilated units


@lru_cache(maxsize=1024)
def _tile_classes(rule: AxisRule, tile: int) -> tuple[TileClass, ...]:
    found: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}
    d = rule.dilation
    for group in range(d):
        length = rule.group_length(group)
        for start in range(0, length, tile):
            windows = [rule.window(i, length) for i in range(start, min(start + tile, length))]
            low, high = min(w[0] for w in windows), max(w[1] for w in windows)
            look = (tuple(w[0] - low for w in windows), tuple(w[1] - low for w in windows), high - low + 1, low - start)
            q_starts, k_starts = found.setdefault(look, ([], []))
            q_starts.append(group + start * d)
            k_starts.append(group + low * d)
    return tuple(
        TileClass(tuple(q), len(first), tuple(k), size, first, last, shift)
        for (first, last, size, shift), (q, k) in found.items()
    )


def _axis_costs(rule: AxisRule) -> list[tuple[int, int, int, int]]:
    """``(tile, pairs, keys fetched, classes)`` for each tile size worth trying."""
    longest = rule.group_length(0)
    tiles = set()
    for wish in (4, 8, 16, 32, 64, 128, 256, 512, longest):
        count = -(-longest // min(wish, longest))
        even = -(-longest // count)
        tiles.add(min(longest, -(-even // rule.stride) * rule.stride))
    out = []
    for tile in sorted(tiles):
        count = -(-longest // tile) * rule.dilation
        reach = tile - 1 if rule.causal else (-(-tile // rule.stride) - 1) * rule.stride
        box = reach + rule.kernel if rule.border == "zero" else min(longest, reach + rule.kernel)
        out.append((tile, count * tile * box, count * box, min(3, -(-longest // tile))))
    return out


@lru_cache(maxsize=1024)
def _choose_tile(rules: tuple[AxisRule, ...]) -> tuple[int, ...]:
    def cost(choice: tuple[tuple[int, int, int, int], ...]) -> int:
        pairs, keys, classes = (math.prod(c[i] for c in choice) for i in (1, 2, 3))
        return pairs + _ROW_COST * keys + _CLASS_COST * classes

    best = min(itertools.product(*(_axis_costs(rule) for rule in rules)), key=cost)
    return tuple(c[0] for c in best)


@traced_as_constant
def _plan(settings: tuple[tuple[Any, ...], ...], tile: tuple[int, ...] | None) -> tuple[tuple[TileClass, ...], ...]:
    rules = tuple(AxisRule(*s) for s in settings)
    return tuple(_tile_classes(rule, t) for rule, t in zip(rules, tile or _choose_tile(rules), strict=True))


# --------------------------------------------------------------------------------------------------------------------
# The fast path


def _numbers(starts: tuple[int, ...], size: int, step: int, device: torch.device) -> Tensor:
    """(tiles, size) token numbers."""
    return torch.tensor(starts, device=device)[:, None] + step * torch.arange(size, device=device)


def _outer(parts: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine one (n_i, m_i) tensor per axis into (prod n_i, prod m_i)."""
    total = parts[0]
    for part in parts[1:]:
        total = combine(total[:, None, :, None], part[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return total


class _Axis(NamedTuple):
    """A class of tiles of one axis as tensors."""

    q_place: Tensor  # (tiles, q_size) token numbers times the weight of the axis in the flat number
    k_place: Tensor  # (tiles, k_size) the same of keys, clamped into the grid
    outside: Tensor  # (tiles, k_size) which keys lie beyond the border
    inside: Tensor  # (q_size, k_size) which pairs meet
    step: Tensor  # (q_size, k_size) key - query + kernel - 1 in dilated units
    full: bool  # whether all pairs meet


def _lower_axis(rule: AxisRule, c: TileClass, weight: int, device: torch.device) -> _Axis:
    place = _numbers(c.k_starts, c.k_size, rule.dilation, device)
    j, i = torch.arange(c.k_size, device=device), torch.arange(c.q_size, device=device)[:, None]
    first, last = (torch.tensor(t, device=device)[:, None] for t in (c.first, c.last))
    return _Axis(
        q_place=_numbers(c.q_starts, c.q_size, rule.dilation, device) * weight,
        k_place=place.clamp(0, rule.length - 1) * weight,
        outside=(place < 0) | (place >= rule.length),
        inside=(j >= first) & (j <= last),
        step=(j - i + c.shift + rule.kernel - 1).clamp(0, 2 * rule.kernel - 2),
        full=max(c.first) == 0 and min(c.last) == c.k_size - 1,
    )


def _table_bias(table: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """(1, 1, H, Sq, Sk): the relative table read at ``key - query + kernel - 1``."""
    r, shape = len(axes), [table.shape[0]]
    for axis, a in enumerate(axes):
        table = table.index_select(1 + axis, a.step.flatten())
        shape += a.step.shape
    order = [0, *range(1, 2 * r + 1, 2), *range(2, 2 * r + 2, 2)]
    area = [math.prod([a.step.shape[i] for a in axes]) for i in range(2)]
    return table.reshape(shape).permute(order).reshape(1, 1, table.shape[0], *area)


def _axis_bias(factors: Sequence[Tensor], axes: Sequence[_Axis]) -> Tensor:
    """(B, G, H, Sq, Sk): per-query factors (B, G, H, Sq, 2 * kernel - 1) of each axis, read at ``key - query``."""
    total: Tensor | None = None
    sizes = [a.step.shape[0] for a in axes]
    for axis, (a, factor) in enumerate(zip(axes, factors, strict=True)):
        keys = a.step.shape[1]
        shape = [1] * len(axes)
        shape[axis] = sizes[axis]
        index = a.step.reshape(*shape, keys).expand(*sizes, keys).flatten(0, -2)
        part = factor.gather(-1, index.expand(*factor.shape[:-1], keys))
        shape = [1] * len(axes)
        shape[axis] = keys
        part = part.unflatten(-1, shape)
        total = part if total is None else total + part
    assert total is not None
    return total.flatten(-len(axes))


def _tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[AxisRule, ...],
    tile: tuple[int, ...] | None,
    valid: Tensor | None,
    axis_bias: Sequence[Tensor] | None,
    *,
    table: Tensor | None,
    extra: tuple[Tensor, Tensor, Tensor | None] | None,
    extra_pos: Tensor | None,
    mask: Mask | None,
    offset: int,
    partial: bool,
    options: dict[str, Any],
) -> list[Tensor]:
    """Fields (B, H, N, C) of the output. One gather puts the tokens of all classes behind one another; each class is
    then a slice, and one permutation puts the outputs in order."""
    # Tiles are laid for one size: tracers that hold it symbolic make a graph for each.
    rules = tuple([AxisRule(fixed(r.length), *r[1:]) for r in rules])
    device, batch, tokens = q.device, q.shape[0], math.prod([r.length for r in rules])
    weights = [math.prod([r.length for r in rules[a + 1 :]]) for a in range(len(rules))]
    zero_keyed = rules[0].border == "zero"
    lowered = [
        [_lower_axis(rule, c, weight, device) for c in classes]
        for rule, classes, weight in zip(rules, _plan(tuple([tuple(r) for r in rules]), tile), weights, strict=True)
    ]
    chosen = list(itertools.product(*lowered))
    q_index = [_outer([a.q_place for a in axes], torch.add) for axes in chosen]
    k_index = [_outer([a.k_place for a in axes], torch.add) for axes in chosen]
    outside = [_outer([a.outside for a in axes], torch.logical_or) for axes in chosen] if zero_keyed else None

    # Tokens before heads, as projections leave them: a row of the gather is then one stretch of memory.
    queries = [t.flatten(2, -2).transpose(1, 2) for t in (q, *(axis_bias or ()))]
    keys = [t.flatten(2, -2).transpose(1, 2) for t in (k, v)]
    if valid is not None:
        keys.append(valid.flatten(1))
    q_order, k_order = (torch.cat([i.flatten() for i in index]) for index in (q_index, k_index))
    if outside is not None:
        # One zero token behind the last; it exists, which keeps it under the softmax.
        keys = [torch.cat([t, torch.full_like(t[:, :1], t.dtype == torch.bool)], 1) for t in keys]
        k_order = torch.where(torch.cat([o.flatten() for o in outside]), tokens, k_order)

    def cut(t: Tensor, order: Tensor, index: list[Tensor]) -> list[Tensor]:
        """(B, N, ...) -> of each class (B, G, S, ...)."""
        parts = t.index_select(1, order).split([i.numel() for i in index], 1)
        return [part.unflatten(1, i.shape) for part, i in zip(parts, index, strict=True)]

    q_parts = list(zip(*(cut(t, q_order, q_index) for t in queries), strict=True))
    k_parts = list(zip(*(cut(t, k_order, k_index) for t in keys), strict=True))
    fields: list[list[Tensor]] = []
    for number, axes in enumerate(chosen):
        q_part, *factors = (t.transpose(2, 3) for t in q_parts[number])
        k_part, v_part, *flags = k_parts[number]
        exists = flags[0] if flags else None
        allowed = bias = None
        if not all(a.full for a in axes):
            allowed = _outer([a.inside for a in axes], torch.logical_and)[None, None, None]
        if mask is not None:
            pairs = pair_mask(mask, q_index[number] + offset, k_index[number] + offset)
            if outside is not None:
                pairs = pairs | outside[number][None, :, None, None, :]
            allowed = pairs if allowed is None else allowed & pairs
        if table is not None:
            bias = _table_bias(table, axes)
        if factors:
            per_query = _axis_bias(factors, axes)
            bias = per_query if bias is None else bias + per_query
        if extra is not None:
            groups, size, more = k_part.shape[1], k_part.shape[2], extra[0].shape[2]
            k_part, v_part = (
                torch.cat([t, e.to(t.dtype).transpose(1, 2)[:, None].expand(-1, groups, -1, -1, -1)], 2)
                for t, e in zip((k_part, v_part), extra[:2], strict=True)
            )
            if mask is not None:
                assert allowed is not None and extra_pos is not None
                pairs = pair_mask(mask, q_index[number] + offset, extra_pos.expand(groups, -1))
                lead = torch.broadcast_shapes(allowed.shape[:-1], pairs.shape[:-1])
                allowed = torch.cat([allowed.expand(*lead, size), pairs.expand(*lead, more)], -1)
            elif allowed is not None:
                allowed = F.pad(allowed, (0, more), value=True)
            if bias is not None:
                bias = F.pad(bias, (0, more))
            if exists is not None or extra[2] is not None:
                if exists is None:
                    exists = torch.ones(batch, groups, size, dtype=torch.bool, device=device)
                more_exist = torch.ones(batch, more, dtype=torch.bool, device=device) if extra[2] is None else extra[2]
                exists = torch.cat([exists, more_exist[:, None].expand(-1, groups, -1)], 2)
        out = grouped_attention(
            q_part, k_part.transpose(2, 3), v_part.transpose(2, 3), allowed=allowed, valid=exists, bias=bias,
            partial=partial, **options,
        )  # fmt: skip
        found = [out.log_scale.unsqueeze(-1), out.den.unsqueeze(-1), out.num] if isinstance(out, Partial) else [out]
        fields.append([t.transpose(2, 3).flatten(1, 2) for t in found])
    back = torch.empty_like(q_order).scatter(0, q_order, torch.arange(tokens, device=device))
    return [torch.cat(field, 1).index_select(1, back).transpose(1, 2) for field in zip(*fields, strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# The specification


def _spec_keys(
    k: Tensor, v: Tensor, rules: tuple[AxisRule, ...], valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[int, ...]]:
    """Flat keys and values of the specification (with a halo of zeros if need be), validity, coordinates, grid."""
    grid = tuple(r.length for r in rules)
    if rules[0].border != "zero":
        return k.flatten(2, -2), v.flatten(2, -2), valid, coordinates(grid, k.device), grid
    halo = [(r.kernel + r.stride) * r.dilation for r in rules]
    widths = [w for h in reversed(halo) for w in (h, h)]
    k, v = F.pad(k, (0, 0, *widths)), F.pad(v, (0, 0, *widths))
    if valid is not None:
        valid = F.pad(valid.unflatten(1, grid), widths, value=True).flatten(1)
    place = coordinates(k.shape[2:-1], k.device) - torch.tensor(halo, device=k.device)
    return k.flatten(2, -2), v.flatten(2, -2), valid, place, grid


def _spec_allowed(rules: tuple[AxisRule, ...], places: Tensor, device: torch.device) -> Tensor:
    """(N, K): the rule for every pair; ``places`` (K, r) are coordinates of keys, which may lie outside the grid."""
    grid = tuple(r.length for r in rules)
    if rules[0].border == "clamp":
        columns = [[getattr(r, name) for r in rules] for name in ("kernel", "dilation", "stride", "causal")]
        return masks.neighborhood(grid, *columns).dense(math.prod(grid), device=device)
    here = coordinates(grid, device)
    allowed = torch.ones(here.shape[0], places.shape[0], dtype=torch.bool, device=device)
    for axis, r in enumerate(rules):
        x, y = here[:, axis, None], places[None, :, axis]
        i, j = x // r.dilation, y // r.dilation
        if r.causal:
            first, last = i // r.stride * r.stride + r.stride - r.kernel, i
        else:
            first = i // r.stride * r.stride + r.stride // 2 - r.kernel // 2
            last = first + r.kernel - 1
        allowed &= (x % r.dilation == y % r.dilation) & (j >= first) & (j <= last)
    return allowed


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[AxisRule, ...],
    valid: Tensor | None,
    axis_bias: Sequence[Tensor] | None,
    *,
    table: Tensor | None,
    extra: tuple[Tensor, Tensor, Tensor | None] | None,
    extra_pos: Tensor | None,
    mask: Mask | None,
    offset: int,
    partial: bool,
    options: dict[str, Any],
) -> list[Tensor]:
    device = q.device
    k, v, valid, places, grid = _spec_keys(k, v, rules, None if valid is None else valid.flatten(1))
    allowed = _spec_allowed(rules, places, device)
    here = coordinates(grid, device)
    if mask is not None:
        size = torch.tensor(grid, device=device)
        inside = ((places >= 0) & (places < size)).all(-1)
        weight = torch.tensor([math.prod(grid[a + 1 :]) for a in range(len(grid))], device=device)
        number = (torch.minimum(places.clamp(min=0), size - 1) * weight).sum(-1)
        allowed = allowed & (mask.at(torch.arange(here.shape[0], device=device) + offset, number + offset) | ~inside)
    bias: Tensor | None = None
    steps = []
    for axis, r in enumerate(rules):
        step = places[None, :, axis] // r.dilation - here[:, None, axis] // r.dilation + r.kernel - 1
        steps.append(step.clamp(0, 2 * r.kernel - 2))
    if table is not None:
        extents = [2 * r.kernel - 1 for r in rules]
        index = torch.zeros_like(steps[0])
        for step, extent in zip(steps, extents, strict=True):
            index = index * extent + step
        bias = table.flatten(1)[:, index][None]
    for step, factor in zip(steps, axis_bias or (), strict=False):
        flat = factor.flatten(2, -2)
        part = flat.gather(-1, step.expand(*flat.shape[:3], -1))
        bias = part if bias is None else bias + part
    if extra is not None:
        extra_k, extra_v, extra_valid = extra
        more = extra_k.shape[2]
        seen = torch.ones(*allowed.shape[:-1], more, dtype=torch.bool, device=device)
        if mask is not None:
            assert extra_pos is not None
            seen = seen & mask.at(torch.arange(here.shape[0], device=device) + offset, extra_pos)
        allowed = torch.cat([allowed.expand(*seen.shape[:-1], -1), seen], -1)
        if valid is not None or extra_valid is not None:
            ones = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=device)
            others = torch.ones(k.shape[0], more, dtype=torch.bool, device=device)
            valid = torch.cat([ones if valid is None else valid, others if extra_valid is None else extra_valid], 1)
        k, v = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2)
        bias = None if bias is None else F.pad(bias, (0, more))
    call: dict[str, Any] = dict(mask=allowed, valid=valid, bias=bias, scale=options["scale"], backend="eager")
    if partial:
        seen_part = attention_partial(q.flatten(2, -2), k, v, **call)
        fields = [seen_part.log_scale.unsqueeze(-1), seen_part.den.unsqueeze(-1), seen_part.num]
    else:
        fields = [attention(q.flatten(2, -2), k, v, dropout_p=options["dropout_p"], **call)]
    return fields


# --------------------------------------------------------------------------------------------------------------------
# The operator


def axis_rules(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    border: str = "clamp",
) -> tuple[AxisRule, ...]:
    """One checked :class:`AxisRule` per axis of ``grid``.

    Raises:
        ValueError: kernels below 2 (1 unless clamped), windows that do not fit a clamped grid, a stride beyond the
            kernel, settings for another number of axes.

    >>> axis_rules((8, 8), 3, dilation=(1, 2))[1].window(0, 4)
    (0, 2)
    """
    grid = check_ints("grid", grid, least=0)
    check_choice("border", border, BORDERS)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid must have 1 to 3 axes, got {grid}")
    kernel = to_tuple("kernel_size", kernel_size, len(grid))
    steps = to_tuple("dilation", dilation, len(grid))
    strides = to_tuple("stride", stride, len(grid))
    flags = to_tuple("causal", causal, len(grid))
    for name, values in (("kernel_size", kernel), ("dilation", steps), ("stride", strides)):
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in values):
            raise ValueError(f"{name} must be an integer or one per axis, got {values}")
    if min(steps) < 1:
        raise ValueError(f"dilation must be at least 1, got {steps}")
    if border == "clamp":
        masks.check_neighborhood(grid, kernel, steps, strides, flags)
    for axis, (w, s) in enumerate(zip(kernel, strides, strict=True)):
        if w < 1 or not 1 <= s <= w:
            raise ValueError(f"on axis {axis}: kernel_size={w} must be at least 1, stride={s} from 1 to {w}")
    return tuple(
        AxisRule(x, w, d, s, bool(c), border) for x, w, d, s, c in zip(grid, kernel, steps, strides, flags, strict=True)
    )


def _check_extra(
    extra_k: Tensor | None, extra_v: Tensor | None, extra_valid: Tensor | None, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    if extra_k is None and extra_v is None:
        if extra_valid is not None:
            raise ValueError("extra_valid was given without extra_k and extra_v")
        return None
    if extra_k is None or extra_v is None:
        raise ValueError("extra_k and extra_v belong together; one of them is None")
    for name, t, like in (("extra_k", extra_k, k), ("extra_v", extra_v, v)):
        check_rank(name, t, 4, "(B, H, M, D)")
        if t.shape[:2] != like.shape[:2] or t.shape[3] != like.shape[-1]:
            raise ValueError(
                f"{name} must be {(*like.shape[:2], 'M', like.shape[-1])} like {name[-1]}, got {tuple(t.shape)}"
            )
    if extra_k.shape[2] != extra_v.shape[2]:
        raise ValueError(f"extra_k has {extra_k.shape[2]} tokens, extra_v has {extra_v.shape[2]}; they must agree")
    check_valid("extra_valid", extra_valid, (k.shape[0], extra_k.shape[2]))
    return extra_k, extra_v, extra_valid


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int] | None = None, kernel_size: int | Sequence[int] = 7,
    dilation: int | Sequence[int] = 1, stride: int | Sequence[int] = 1, causal: bool | Sequence[bool] = False, *,
    border: str = "clamp", bias_table: Tensor | None = None, axis_bias: Sequence[Tensor] | None = None,
    extra_k: Tensor | None = None, extra_v: Tensor | None = None, extra_valid: Tensor | None = None,
    valid: Tensor | None = None, mask: Mask | Tensor | None = None, offset: int = 0, extra_pos: Tensor | None = None,
    scale: float | None = None, dropout_p: float = 0.0, tile: int | Sequence[int] | None = None, partial: bool = False,
) -> _Call:  # fmt: skip
    shapes = "(B, H, *grid, D) with 1 to 3 axes, or (B, H, N, D) with grid"
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_rank(name, t, (4, 5, 6), shapes)
    if grid is None:
        grid = tuple(q.shape[2:-1])
    else:
        grid = check_grid("grid", grid)
    flat = q.dim() == 4 and len(grid) > 1
    for name, t in (("q", q), ("k", k), ("v", v)):
        if tuple(t.shape[2:-1]) not in (grid, (math.prod(grid),)):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, which does not lie on the grid {grid}; {shapes}")
    rules = axis_rules(grid, kernel_size, dilation, stride, causal, border)
    check_int("offset", offset)
    check_device(q=q, k=k, v=v, bias_table=bias_table, extra_k=extra_k, extra_v=extra_v, extra_pos=extra_pos)
    q, k, v = (t.reshape(*t.shape[:2], *grid, t.shape[-1]) for t in (q, k, v))
    if valid is not None:
        check_tensor("valid", valid, "a boolean tensor (True: the token exists)")
        check_device(q=q, valid=valid)
        shape = (q.shape[0], math.prod(grid)) if valid.dim() == 2 and len(grid) > 1 else (q.shape[0], *grid)
        check_valid("valid", valid, shape)
        valid = valid.reshape(q.shape[0], *grid)
    extents = [2 * r.kernel - 1 for r in rules]
    if bias_table is not None:
        check_float("bias_table", bias_table)
        if bias_table.dim() == 2 and len(grid) > 1 and bias_table.shape[1] == math.prod(extents):
            bias_table = bias_table.unflatten(1, extents)
        if tuple(bias_table.shape) != (q.shape[1], *extents):
            raise ValueError(
                f"bias_table must be {(q.shape[1], *extents)} for {q.shape[1]} heads and kernel_size="
                f"{tuple(r.kernel for r in rules)}, got {tuple(bias_table.shape)}"
            )
    if axis_bias is not None:
        want = [(*q.shape[:2], *grid, e) for e in extents]
        for axis, factor in enumerate(axis_bias):
            check_float(f"axis_bias[{axis}]", factor)
            check_device(q=q, axis_bias=factor)
        if [tuple(f.shape) for f in axis_bias] != want:
            raise ValueError(f"axis_bias must be tensors of shapes {want}, got {[tuple(f.shape) for f in axis_bias]}")
    more = _check_extra(extra_k, extra_v, extra_valid, k, v)
    tokens = math.prod(grid)
    mask = as_mask(mask, tokens, tokens) if more is None and not offset else as_mask(mask)
    if mask is not None and more is not None and (extra_pos is None or extra_pos.shape != (more[0].shape[2],)):
        raise ValueError("with a mask and extra keys, extra_pos must give the (M,) positions of the extra keys")
    chosen = None if tile is None else to_tuple("tile", tile, len(grid))
    if chosen is not None and any(not isinstance(t, int) or t < 1 for t in chosen):
        raise ValueError(f"tile={chosen} must hold integers of at least 1")
    rest: dict[str, Any] = dict(
        table=bias_table, extra=more, extra_pos=extra_pos, mask=mask, offset=offset, partial=partial,
        options=dict(scale=scale, dropout_p=dropout_p),
    )  # fmt: skip
    return _Call(q, k, v, rules, chosen, valid, axis_bias, rest, flat or partial)


class _Call(NamedTuple):
    """A checked problem."""

    q: Tensor  # (B, H, *grid, D)
    k: Tensor
    v: Tensor
    rules: tuple[AxisRule, ...]
    tile: tuple[int, ...] | None
    valid: Tensor | None
    axis_bias: Sequence[Tensor] | None
    rest: dict[str, Any]
    flat: bool  # whether the output stays flat

    def inputs(self) -> list[Tensor]:
        more = [self.rest["table"], *(self.axis_bias or ()), *(self.rest["extra"] or ())[:2]]
        return [self.q, self.k, self.v, *(t for t in more if t is not None)]

    def replaced(self, inputs: Sequence[Tensor]) -> _Call:
        """The same problem on other tensors in place of :meth:`inputs`, of a call without biases."""
        q, k, v, *more = inputs
        extra = (*more, self.rest["extra"][2]) if more else None
        return self._replace(q=q, k=k, v=v, rest={**self.rest, "extra": extra})

    def finish(self, fields: list[Tensor]) -> list[Tensor]:
        grid = tuple(r.length for r in self.rules)
        return fields if self.flat else [t.unflatten(2, grid) for t in fields]


def _run_tiles(call: _Call, inner: str = AUTO) -> list[Tensor]:
    rest = {**call.rest, "options": {**call.rest["options"], "backend": inner}}
    return call.finish(_tiles(call.q, call.k, call.v, call.rules, call.tile, call.valid, call.axis_bias, **rest))


def _run_eager(call: _Call) -> list[Tensor]:
    return call.finish(_eager(call.q, call.k, call.v, call.rules, call.valid, call.axis_bias, **call.rest))


_OPERATOR = Operator("neighborhood_attention", _prepare, entries={"neighborhood_partial": {"partial": True}})
natten.register(_OPERATOR, _run_eager)
_OPERATOR.register("tiles", _run_tiles)
register_inner(_OPERATOR, _run_tiles)
_OPERATOR.register("eager", _run_eager)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int] | None = None,
    kernel_size: int | Sequence[int] = 7,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    border: str = "clamp",
    bias_table: Tensor | None = None,
    axis_bias: Sequence[Tensor] | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_valid: Tensor | None = None,
    valid: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    offset: int = 0,
    extra_pos: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    tile: int | Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every query of a grid attends to the ``kernel_size`` keys around it, in one to three dimensions.

    Args:
        q: (B, H, *grid, D) queries, or (B, H, N, D) with ``grid``.
        k: (B, Hk, *grid, D) keys, ``H % Hk == 0``.
        v: (B, Hv, *grid, Dv) values.
        grid: the grid, when the tensors are flat.
        kernel_size: keys per axis; on clamped axes at least 2.
        dilation: tokens between neighbouring keys of a window, per axis.
        stride: this many queries in a row share the window of their leader, per axis.
        causal: the window ends at the query, per axis.
        border: where a window leaves the grid: ``"clamp"`` shifts it inside, so that every query of a bidirectional
            axis sees exactly ``kernel_size`` keys; ``"mask"`` cuts it off; ``"zero"`` keeps zero keys and values.
        bias_table: (H, *(2 * kernel - 1)) added at ``key - query + kernel - 1``, in units of dilation.
        axis_bias: per axis (B, H, *grid, 2 * kernel - 1), the same read per query: query-dependent relative positions.
        extra_k: (B, Hk, M, D) keys that every query attends to besides, such as class or text tokens.
        extra_v: (B, Hv, M, Dv) their values.
        extra_valid: (B, M) boolean, which of them exist.
        valid: (B, *grid) or (B, N) boolean, which keys exist.
        mask: which pairs may meet besides, on row-major token numbers plus ``offset``.
        offset: position of the first token of the grid, as ``mask`` sees it.
        extra_pos: (M,) positions of the extra keys, as ``mask`` sees them.
        scale: defaults to ``D ** -0.5``.
        dropout_p: dropout of weights.
        tile: queries per tile and axis; chosen from the shape by default.
        backend: ``"tiles"``, O(N), also by default; ``"natten"`` on CUDA (extra ``natten``); a backend of
            :func:`attnlib.attention` for what runs on the tiles; or ``"eager"``, the specification: dense attention
            under a mask.

    Returns:
        (B, H, *grid, Dv), or (B, H, N, Dv) for flat tensors.

    Raises:
        ValueError: shapes that do not fit; clamped windows larger than the grid; a stride beyond the kernel.

    Reference: Hassani et al., 2024, arXiv 2403.04690; Hassani et al., 2025, arXiv 2504.16922 (stride).

    >>> x = torch.randn(1, 2, 8, 8, 4)
    >>> whole = attention(*[x.flatten(2, 3)] * 3).unflatten(2, (8, 8))
    >>> torch.allclose(neighborhood_attention(x, x, x, kernel_size=8), whole, atol=1e-6)
    True
    """
    call = _prepare(
        q, k, v, grid, kernel_size, dilation, stride, causal, border=border, bias_table=bias_table, axis_bias=axis_bias,
        extra_k=extra_k, extra_v=extra_v, extra_valid=extra_valid, valid=valid, mask=mask, offset=offset,
        extra_pos=extra_pos, scale=scale, dropout_p=dropout_p, tile=tile,
    )  # fmt: skip
    return _OPERATOR.run(call, backend)[0]


def neighborhood_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int] | None = None,
    kernel_size: int | Sequence[int] = 7,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    border: str = "clamp",
    bias_table: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Partial:
    """:func:`neighborhood_attention` as a mergeable :class:`attnlib.types.Partial` over (B, H, N).

    Arguments as in :func:`neighborhood_attention`.

    >>> x = torch.randn(1, 2, 8, 4)
    >>> neighborhood_partial(x, x, x, kernel_size=3).finish().shape
    torch.Size([1, 2, 8, 4])
    """
    call = _prepare(
        q, k, v, grid, kernel_size, dilation, stride, causal, border=border, bias_table=bias_table, valid=valid,
        scale=scale, partial=True,
    )  # fmt: skip
    scale_, den, num = _OPERATOR.run(call, backend)
    return Partial(scale_[..., 0], den[..., 0], num)
