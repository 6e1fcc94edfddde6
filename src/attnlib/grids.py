"""Layouts of tokens, windows and permutations of grids.

A tensor is channels-last, ``x: (B, *grid, C)``, and its rank tells the grid. Tokens that lie beside the grid (class,
register, text) travel flat, ``(B, N, C)``, with a :class:`Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_choice,
    check_device,
    check_grid,
    check_index,
    check_int,
    check_ints,
    check_name,
    check_place,
    check_rank,
    check_real,
    check_tensor,
    check_type,
    check_whole,
    describe,
    extremes,
    readable,
    to_tuple,
)


@dataclass(frozen=True)
class Layout:
    """Named runs of tokens inside one flat sequence, in order.

    Args:
        segments: ``(name, size)`` pairs, where size is a count, or a tuple for a grid in row-major order.

    Raises:
        ValueError: on repeated names, sizes below zero or grids of more than three axes.
        TypeError: on names that are no strings or sizes that are no integers.

    >>> layout = Layout((("text", 77), ("image", (14, 14)), ("cls", 1)))
    >>> len(layout), layout.span("image"), layout.grid("image")
    (274, (77, 273), (14, 14))
    """

    segments: tuple[tuple[str, int | tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        clean: list[tuple[str, int | tuple[int, ...]]] = []
        if isinstance(self.segments, str) or not isinstance(self.segments, Sequence):
            raise TypeError(f"segments must be (name, size) pairs such as (('cls', 1),), got {describe(self.segments)}")
        if not self.segments:
            raise ValueError("segments must name at least one run of tokens, got none")
        for segment in self.segments:
            if not isinstance(segment, (tuple, list)) or len(segment) != 2:
                raise TypeError(f"segments must be (name, size) pairs, got {describe(segment)}")
            name, size = segment
            check_name("name of a segment", name)
            where = f"size of the layout segment {name!r}"
            if isinstance(size, (tuple, list)):
                size = check_ints(where, size)
                if not 1 <= len(size) <= 3:
                    raise ValueError(f"{where} must have 1 to 3 axes, got {size}")
            else:
                size = check_int(where, size, also="or a tuple for a grid")
            if min(size if isinstance(size, tuple) else (size,)) < 0:
                raise ValueError(f"layout segment {name!r} has size {size}; sizes must not be negative")
            clean.append((name, size))
        object.__setattr__(self, "segments", tuple(clean))
        names = [name for name, _ in clean]
        if len(set(names)) != len(names):
            raise ValueError(f"layout repeats a segment name: {names}")

    @classmethod
    def image(cls, height: int, width: int, /, **extra: int) -> Layout:
        """Extra tokens first, then an image: ``Layout.image(14, 14, cls=1)``."""
        check_int("height", height, least=0)
        check_int("width", width, least=0)
        return cls((*extra.items(), ("image", (height, width))))

    def __len__(self) -> int:
        return sum(self.size(name) for name, _ in self.segments)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.segments)

    def _find(self, name: str) -> int | tuple[int, ...]:
        for candidate, size in self.segments:
            if candidate == name:
                return size
        raise ValueError(f"layout has no segment {name!r}; it has {list(self.names)}")

    def size(self, name: str) -> int:
        """Number of tokens of a segment."""
        size = self._find(name)
        return math.prod(size) if isinstance(size, tuple) else size

    def grid(self, name: str | None = None) -> tuple[int, ...]:
        """Grid of a segment; without a name, of the only segment that is a grid."""
        if name is None:
            name = self.grid_name()
        size = self._find(name)
        return size if isinstance(size, tuple) else (size,)

    def grid_name(self) -> str:
        """Name of the only grid segment; ``ValueError`` when there is none or more than one."""
        grids = [name for name, size in self.segments if isinstance(size, tuple)]
        if len(grids) != 1:
            raise ValueError(f"layout {self} has {len(grids)} grid segments; exactly one is needed here")
        return grids[0]

    def span(self, name: str) -> tuple[int, int]:
        """``(start, stop)`` of a segment in the flat sequence."""
        start = 0
        for candidate, _ in self.segments:
            if candidate == name:
                return start, start + self.size(name)
            start += self.size(candidate)
        self._find(name)
        raise AssertionError

    def check(self, tokens: int, name: str = "x") -> Layout:
        """This layout, or ``ValueError`` when it does not add up to ``tokens``."""
        if len(self) != tokens:
            parts = " + ".join(f"{n}={s}" for n, s in self.segments)
            raise ValueError(f"layout adds up to {len(self)} tokens ({parts}), but {name} has {tokens}")
        return self

    def split(self, x: Tensor, dim: int = 1) -> dict[str, Tensor]:
        """Views of each segment along ``dim``, flat."""
        _check_axis(x, dim)
        self.check(x.shape[dim])
        return dict(zip(self.names, x.split([self.size(n) for n in self.names], dim), strict=True))

    def join(self, parts: dict[str, Tensor], dim: int = 1) -> Tensor:
        """Inverse of :meth:`split`."""
        check_type("parts", parts, dict, "a dictionary of tensors by segment")
        if set(parts) != set(self.names):
            raise ValueError(f"parts has {sorted(map(str, parts))}, but the layout has {list(self.names)}")
        for name, part in parts.items():
            _check_axis(part, dim, f"parts[{name!r}]")
            if part.shape[dim] != self.size(name):
                raise ValueError(f"parts[{name!r}] has {part.shape[dim]} tokens, the layout says {self.size(name)}")
        return torch.cat([parts[name] for name in self.names], dim)

    def types(self, device: torch.device | str | None = None) -> Tensor:
        """(N,) int64: the segment number of each token."""
        device = check_place("device", device)
        sizes = torch.tensor([self.size(n) for n in self.names], device=device, dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(self.names), device=device), sizes, output_size=len(self))


def _check_axis(x: Tensor, dim: int, name: str = "x") -> None:
    check_tensor(name, x)
    check_int("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is no axis of {name}, which has shape {tuple(x.shape)}")


# --------------------------------------------------------------------------------------------------------------------
# Flattening


GRID_RANKS, GRID_SHAPES = (3, 4, 5), "(B, N, C), (B, H, W, C) or (B, T, H, W, C)"


def flatten_grid(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(B, *grid, C) -> (B, N, C) and the grid."""
    check_rank("x", x, GRID_RANKS, GRID_SHAPES)
    grid = tuple(x.shape[1:-1])
    return x.reshape(x.shape[0], math.prod(grid), x.shape[-1]), grid


def unflatten_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, N, C) -> (B, *grid, C)."""
    check_rank("x", x, 3, "(B, N, C)")
    grid = check_ints("grid", grid, least=0)
    if math.prod(grid) != x.shape[1]:
        raise ValueError(f"grid={tuple(grid)} has {math.prod(grid)} tokens, but x has {x.shape[1]}")
    return x.reshape(x.shape[0], *grid, x.shape[-1])


def coordinates(grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """(N, r) int64 coordinates of a row-major grid.

    >>> coordinates((2, 2)).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    grid = check_ints("grid", grid, least=0)
    if not grid:
        raise ValueError("grid must have at least one axis, got ()")
    device = check_place("device", device)
    axes = torch.meshgrid(*[torch.arange(s, device=device) for s in grid], indexing="ij")
    return torch.stack([a.reshape(-1) for a in axes], dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# Windows. Block windows hold consecutive tokens, grid windows hold tokens spread over the whole map.


def check_windows(grid: Sequence[int], window: Sequence[int], name: str = "window_size") -> None:
    """Raise ``ValueError`` unless ``window`` fits into and divides ``grid`` on every axis."""
    for axis, (size, w) in enumerate(zip(grid, check_ints(name, window), strict=True)):
        if w < 1 or w > size:
            raise ValueError(f"{name}={tuple(window)} does not fit the grid {tuple(grid)} on axis {axis}")
        if size % w:
            raise ValueError(
                f"{name}={tuple(window)} does not divide the grid {tuple(grid)} on axis {axis}; pad it first"
            )


def block_windows(x: Tensor, window: int | Sequence[int]) -> Tensor:
    """(B, *grid, C) -> (B, *windows, *window, C): windows of consecutive tokens.

    >>> block_windows(torch.zeros(2, 8, 8, 3), 4).shape
    torch.Size([2, 2, 2, 4, 4, 3])
    """
    check_rank("x", x, GRID_RANKS, GRID_SHAPES)
    grid = tuple(x.shape[1:-1])
    window = to_tuple("window_size", window, len(grid))
    check_windows(grid, window)
    r = len(grid)
    split = [d for size, w in zip(grid, window, strict=True) for d in (size // w, w)]
    order = [0, *range(1, 2 * r + 1, 2), *range(2, 2 * r + 1, 2), 2 * r + 1]
    return x.reshape(x.shape[0], *split, x.shape[-1]).permute(order)


def unblock_windows(x: Tensor) -> Tensor:
    """Inverse of :func:`block_windows`."""
    check_rank("x", x, (4, 6, 8), "(B, *windows, *window, C)")
    r = (x.dim() - 2) // 2
    order = [0, *(d for i in range(r) for d in (1 + i, 1 + r + i)), 2 * r + 1]
    grid = [x.shape[1 + i] * x.shape[1 + r + i] for i in range(r)]
    return x.permute(order).reshape(x.shape[0], *grid, x.shape[-1])


def grid_windows(x: Tensor, window: int | Sequence[int]) -> Tensor:
    """(B, *grid, C) -> (B, *windows, *window, C): window ``a`` holds the tokens ``i * grid/window + a``.

    >>> grid_windows(torch.arange(4.0).reshape(1, 4, 1), 2)[0, :, :, 0].tolist()
    [[0.0, 2.0], [1.0, 3.0]]
    """
    check_rank("x", x, GRID_RANKS, GRID_SHAPES)
    grid = tuple(x.shape[1:-1])
    window = to_tuple("window_size", window, len(grid))
    check_windows(grid, window)
    r = len(grid)
    split = [d for size, w in zip(grid, window, strict=True) for d in (w, size // w)]
    order = [0, *range(2, 2 * r + 1, 2), *range(1, 2 * r + 1, 2), 2 * r + 1]
    return x.reshape(x.shape[0], *split, x.shape[-1]).permute(order)


def ungrid_windows(x: Tensor) -> Tensor:
    """Inverse of :func:`grid_windows`."""
    check_rank("x", x, (4, 6, 8), "(B, *windows, *window, C)")
    r = (x.dim() - 2) // 2
    order = [0, *(d for i in range(r) for d in (1 + r + i, 1 + i)), 2 * r + 1]
    grid = [x.shape[1 + i] * x.shape[1 + r + i] for i in range(r)]
    return x.permute(order).reshape(x.shape[0], *grid, x.shape[-1])


@dataclass(frozen=True)
class Windows:
    """Equal windows of a grid that they divide: cuts maps into them and joins them again.

    Args:
        grid: sides of the map.
        size: sides of a window.
        kind: ``"block"``: windows of consecutive tokens; ``"grid"``: of tokens spread over the map.
        shift: how far block windows are moved towards the end of each axis; those at both ends are then parts of one.
        interval: how far apart the tokens of a block window lie along each axis; ``size * interval`` divides the map.

    >>> w = Windows((4, 6), (2, 3))
    >>> w.cut(torch.zeros(1, 4, 6, 8)).shape, w.join(torch.zeros(1, 4, 6, 8)).shape
    (torch.Size([1, 4, 6, 8]), torch.Size([1, 4, 6, 8]))
    """

    grid: tuple[int, ...]
    size: tuple[int, ...]
    kind: str = "block"
    shift: tuple[int, ...] = ()
    interval: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows per axis."""
        return tuple(n // w for n, w in zip(self.grid, self.size, strict=True))

    def _apart(self) -> list[tuple[int, int, int]]:
        """Per axis: blocks, tokens of a window, windows that lie between one another in a block."""
        return [(n // (w * i), w, i) for n, w, i in zip(self.grid, self.size, self.interval, strict=True)]

    def _rolled(self, x: Tensor, sign: int) -> Tensor:
        if not any(self.shift):
            return x
        return x.roll([sign * s for s in self.shift], tuple(range(1, 1 + len(self.grid))))

    def cut(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, G, S, C): G windows of S tokens."""
        if self.size == self.grid and not any(self.shift):  # one window
            return x.reshape(x.shape[0], 1, math.prod(self.grid), x.shape[-1])
        if any(i > 1 for i in self.interval):
            r, sides = len(self.grid), self._apart()
            x = x.reshape(x.shape[0], *(side for axis in sides for side in axis), x.shape[-1])
            x = x.permute(0, *(1 + 3 * a + part for part in (0, 2, 1) for a in range(r)), 1 + 3 * r)
            return x.reshape(x.shape[0], math.prod(self.counts), math.prod(self.size), x.shape[-1])
        split = block_windows if self.kind == "block" else grid_windows
        x = split(self._rolled(x, -1), self.size)
        return x.reshape(x.shape[0], math.prod(self.counts), math.prod(self.size), x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """(B, G, S, C) -> (B, *grid, C)."""
        if self.size == self.grid and not any(self.shift):
            return x.reshape(x.shape[0], *self.grid, x.shape[-1])
        if any(i > 1 for i in self.interval):
            r, sides = len(self.grid), self._apart()
            x = x.reshape(x.shape[0], *(axis[part] for part in (0, 2, 1) for axis in sides), x.shape[-1])
            x = x.permute(0, *(1 + a + r * part for a in range(r) for part in (0, 2, 1)), 1 + 3 * r)
            return x.reshape(x.shape[0], *self.grid, x.shape[-1])
        back = unblock_windows if self.kind == "block" else ungrid_windows
        return self._rolled(back(x.reshape(x.shape[0], *self.counts, *self.size, x.shape[-1])), 1)

    def numbers(self, device: torch.device | None = None) -> Tensor:
        """(G, S) numbers of the tokens in each."""
        at = torch.arange(math.prod(self.grid), device=device).reshape(1, *self.grid, 1)
        return self.cut(at)[0, :, :, 0]

    def ends(self, device: torch.device | None = None) -> Tensor | None:
        """(1, N): numbers that differ between tokens of the two ends of a shifted map; ``None`` without a shift."""
        if not any(self.shift):
            return None
        at = coordinates(self.grid, device) < torch.tensor(self.shift, device=device)
        return (at * 2 ** torch.arange(len(self.grid), device=device)).sum(-1)[None]


def pad_to_multiple(x: Tensor, multiple: int | Sequence[int], value: float = 0.0) -> Tensor:
    """Pad (B, *grid, C) at the far end of every axis to a multiple."""
    check_rank("x", x, GRID_RANKS, GRID_SHAPES)
    grid = tuple(x.shape[1:-1])
    multiple = check_ints("multiple", to_tuple("multiple", multiple, len(grid)), least=1)
    check_real("value", value, finite=False)
    extra = [(-size) % m for size, m in zip(grid, multiple, strict=True)]
    if not any(extra):
        return x
    pads = [0, 0]
    for e in reversed(extra):
        pads += [0, e]
    return F.pad(x, pads, value=value)


def crop_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """The first ``grid`` tokens of every axis of (B, *grid', C)."""
    check_rank("x", x, GRID_RANKS, GRID_SHAPES)
    grid = check_ints("grid", grid, least=0)
    if len(grid) != x.dim() - 2 or any(s > size for s, size in zip(grid, x.shape[1:-1], strict=True)):
        raise ValueError(f"grid={grid} is not part of the grid {tuple(x.shape[1:-1])} of x")
    return x[(slice(None), *(slice(0, s) for s in grid))]


# --------------------------------------------------------------------------------------------------------------------
# Permutations


@dataclass(frozen=True, eq=False)
class Partition:
    """Groups of queries and the groups of keys they read: engine B's description.

    Args:
        q_index: (G, Sq), (H, G, Sq) or (B, H, G, Sq) int64 token numbers; -1 marks a hole.
        k_index: the same for keys, with its own group size; ``None`` means the same as ``q_index``.

    Every token stands in exactly one query group; a key may stand in many.
    """

    q_index: Tensor
    k_index: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = "(G, S), (H, G, S) or (B, H, G, S)"
        for name, index in (("q_index", self.q_index), ("k_index", self.k_index)):
            if index is None and name == "k_index":
                continue
            check_rank(name, index, (2, 3, 4), shapes)
            check_whole(name, index)  # type: ignore[arg-type]
            low, _ = extremes(index, (0, 0))  # type: ignore[arg-type]
            if low < -1:
                raise ValueError(f"{name} holds {low}; possible: numbers of tokens, and -1 for a hole")
        if self.k_index is not None:
            if self.k_index.shape[-2] != self.q_index.shape[-2]:
                raise ValueError(
                    f"k_index has {self.k_index.shape[-2]} groups, q_index has {self.q_index.shape[-2]}; "
                    "they must agree"
                )
            check_device(q_index=self.q_index, k_index=self.k_index)


def window_partition(grid: Sequence[int], window: int | Sequence[int], kind: str = "block") -> Partition:
    """The :class:`Partition` of a grid into ``"block"`` or ``"grid"`` windows.

    >>> window_partition((4,), 2, "grid").q_index.tolist()
    [[0, 2], [1, 3]]
    """
    grid = check_grid("grid", grid)
    numbers = torch.arange(math.prod(grid)).reshape(1, *grid, 1)
    split = {"block": block_windows, "grid": grid_windows}
    check_choice("kind", kind, split)
    windows = split[kind](numbers, window)
    r = len(grid)
    return Partition(windows.reshape(math.prod(windows.shape[1 : 1 + r]), math.prod(windows.shape[1 + r : -1])))


def block_order(grid: Sequence[int], block: Sequence[int]) -> Tensor:
    """Numbers of a grid's tokens, block after block, each block in row-major order.

    Args:
        grid: sides.
        block: sides of a block; those that do not divide the grid's leave places without a token at its end, -1.

    Returns:
        (prod of the padded grid,) int64.

    >>> block_order((2, 4), (2, 2)).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    >>> block_order((3,), (2,)).tolist()
    [0, 1, 2, -1]
    """
    grid = check_grid("grid", grid)
    block = check_ints("block", block, least=1)
    if len(block) != len(grid):
        raise ValueError(f"block={block} must have one side for each of the {len(grid)} axes of the grid {grid}")
    numbers = torch.arange(math.prod(grid), device="cpu").reshape(1, *grid, 1) + 1
    return block_windows(pad_to_multiple(numbers, block), block).flatten() - 1


def axis_order(grid: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Numbers of a grid's tokens in the row-major order of the grid with its axes permuted; the last is the fastest.

    >>> axis_order((2, 3), (1, 0)).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    grid = check_grid("grid", grid)
    axes = check_ints("axes", axes)
    if sorted(axes) != list(range(len(grid))):
        raise ValueError(f"axes={axes} is no permutation of the {len(grid)} axes of the grid {grid}")
    return torch.arange(math.prod(grid), device="cpu").reshape(grid).permute(axes).flatten()


#: Ways through a map, of :func:`route`.
ROUTES = ("rows", "snake", "diagonal", "zigzag", "spiral")
#: What :func:`route` does to them.
TURNS = ("transposed", "mirrored", "flipped", "reversed")


def check_route(name: str, value: str) -> tuple[str, frozenset[str]]:
    """The way of a route and its turns; ``ValueError`` with what is possible where ``value`` is no route."""
    check_type(name, value, str, "the name of a route")
    way, *turns = ("rows-transposed" + value[7:] if value.split("-")[0] == "columns" else value).split("-")
    if way not in ROUTES or set(turns) - set(TURNS) or len(set(turns)) < len(turns):
        raise ValueError(
            f"{name}={value!r} is no route; possible: 'columns' or one of {ROUTES}, each with any of "
            f"{TURNS} behind it, such as 'snake-transposed-reversed'"
        )
    return way, frozenset(turns)


def route(name: str, grid: Sequence[int]) -> Tensor:
    """In which order a route visits the tokens of a map.

    Ways: ``"rows"`` one after another from left to right; ``"snake"``, every second row backwards; ``"diagonal"``, the
    diagonals i + j = 0, 1, ... one after another downwards; ``"zigzag"``, every second diagonal upwards, as JPEG has
    it; ``"spiral"``, clockwise from the corner inwards. Turns, in any number: ``-transposed`` swaps the axes of the way
    (``"columns"`` is ``"rows-transposed"``), ``-mirrored`` swaps left and right, ``-flipped`` top and bottom, and
    ``-reversed`` walks from the end. Of a sequence or a volume the rows alone are known.

    Args:
        name: a way and its turns.
        grid: sides, any.

    Returns:
        (N,) int64: token number by step; :func:`inverse_permutation` gives the step by token number.

    Raises:
        ValueError: no such route, or one that a grid of this rank does not have.

    >>> route("snake", (2, 3)).tolist(), route("columns-reversed", (2, 3)).tolist()
    ([0, 1, 2, 5, 4, 3], [5, 2, 4, 1, 3, 0])
    >>> route("spiral", (3, 3)).tolist(), route("zigzag", (3, 3)).tolist()
    ([0, 1, 2, 5, 8, 7, 6, 3, 4], [0, 1, 3, 6, 4, 2, 5, 7, 8])
    """
    way, turns = check_route("name", name)
    grid = check_grid("grid", grid)
    if len(grid) != 2 and (way != "rows" or turns - {"reversed"}):
        raise ValueError(f"route {name!r} needs a grid of two axes, got grid={grid}")
    if way == "rows" and not turns - {"reversed"}:
        order = torch.arange(math.prod(grid), device="cpu")
    else:
        sides = grid[::-1] if "transposed" in turns else grid
        at = coordinates(sides, "cpu")[_step_order(way, sides)]
        at = at.flip(1) if "transposed" in turns else at
        down = grid[0] - 1 - at[:, 0] if "flipped" in turns else at[:, 0]
        along = grid[1] - 1 - at[:, 1] if "mirrored" in turns else at[:, 1]
        order = down * grid[1] + along
    return order.flip(0) if "reversed" in turns else order


def _step_order(way: str, grid: Sequence[int]) -> Tensor:
    """Token numbers of a map of two axes by steps of a way."""
    height, width = grid
    i, j = coordinates(grid, "cpu").unbind(1)
    if way == "rows":
        return i * width + j
    if way == "snake":
        return i * width + torch.where(i % 2 == 1, width - 1 - j, j)
    if way == "spiral":  # ring by ring; the step of a token is a sum
        ring = torch.minimum(torch.minimum(i, height - 1 - i), torch.minimum(j, width - 1 - j))
        high, wide = height - 2 * ring, width - 2 * ring
        down, along = i - ring, j - ring
        last = 2 * (wide - 1) + high - 1
        step = torch.where(down == high - 1, wide + high - 2 + wide - 1 - along, last + high - 1 - down)
        step = torch.where(along == wide - 1, wide - 1 + down, step)
        step = torch.where(down == 0, along, step)
        return inverse_permutation(height * width - high * wide + step)
    up = (i + j) % 2 == 0 if way == "zigzag" else torch.zeros_like(i, dtype=torch.bool)
    return ((i + j) * height + torch.where(up, height - 1 - i, i)).argsort()


def inverse_order(order: Tensor, count: int) -> Tensor:
    """Where an order of :func:`block_order` puts every token: (P,) with -1 where there is none -> (count,).

    >>> inverse_order(torch.tensor([1, 0, 2, -1]), 3).tolist()
    [1, 0, 2]
    """
    check_whole("order", order)
    if order.shape == (count,):
        return inverse_permutation(order)
    real = order >= 0
    out = torch.empty(count, dtype=torch.long, device=order.device)
    out[order[real]] = torch.arange(order.shape[0], device=order.device)[real]
    return out


def inverse_permutation(permutation: Tensor) -> Tensor:
    """(..., N) -> (..., N) such that ``x[perm][inverse] == x``; ``ValueError`` for what is no permutation."""
    check_whole("permutation", permutation)
    if not permutation.dim():
        raise ValueError("permutation must have shape (..., N), got ()")
    count = permutation.shape[-1]
    check_index("permutation", permutation, None, count, "token")
    numbers = torch.arange(count, device=permutation.device, dtype=permutation.dtype).expand_as(permutation)
    inverse = torch.full_like(permutation, -1).scatter_(-1, permutation.long(), numbers)
    if readable(inverse) and inverse.device.type == "cpu" and bool((inverse < 0).any()):
        missing = int((inverse < 0).nonzero()[0, -1])
        raise ValueError(f"permutation must name every token once, but it leaves out token {missing}")
    return inverse


# --------------------------------------------------------------------------------------------------------------------
# Windows around a point, as an eye has them: their width grows with the distance from where it looks.


class LogPolarWindows(NamedTuple):
    """Smooth windows around a fixation, of :func:`log_polar_windows`; their weights sum to one in every cell.

    Args:
        weights: (K, H, W), the first being the fovea.
        area: (K,) cells of the whole grid in which a window weighs more than half.
        ring: (K,) int64, 0 for the fovea, then outwards.
    """

    weights: Tensor
    area: Tensor
    ring: Tensor


def _bump(distance: Tensor, overlap: float) -> Tensor:
    """One window by the distance from its centre in spacings: 1, then half a period of cos^2; neighbours sum to one."""
    fall = ((distance.abs() - (1 - overlap) / 2) / overlap).clamp(0, 1)
    return (fall * (math.pi / 2)).cos().square()


def log_polar_windows(
    grid: Sequence[int],
    scale: float,
    fixation: Sequence[float] | None = None,
    fovea: float | None = None,
    aspect: float = 2.0,
    overlap: float = 0.5,
    reduce: int = 1,
) -> LogPolarWindows:
    """Windows on a lattice of polar angle and the logarithm of eccentricity, those of Freeman and Simoncelli (2011).

    Along the radius they are ``2 asinh(scale / 2)`` apart in log eccentricity, so that their width is ``scale`` times
    the eccentricity; ``round(2 pi aspect / scale)`` stand on a ring. The fovea is what lies within the first ring, the
    last ring reaches to the corners. A window of which the border leaves less than a quarter joins the one inside it.

    Args:
        grid: (H, W), any.
        scale: width of a window over its eccentricity.
        fixation: row and column that the eye looks at, in cells from 0, fractions allowed; the middle by default.
        fovea: radius of the fovea in cells. By default whole rings fill the radius of the circle inside the grid,
            inwards as long as windows are wider than 0.043 of it: so NeuroFovea's numbers of windows come out.
        aspect: width along the radius over width along the ring.
        overlap: share of the spacing over which neighbours pass into each other, above 0 and at most 1.
        reduce: cells a side that are averaged into one, for windows on the grid of features of an image; it divides
            the grid.

    Returns:
        Windows; those that lie outside are left out.

    Raises:
        ValueError: a fixation outside the grid, a setting out of range, or windows of fewer than two cells.

    >>> windows = log_polar_windows((128, 128), 0.5)
    >>> len(windows.weights), bool((windows.weights.sum(0) - 1).abs().max() < 1e-6)
    (126, True)
    """
    height, width = grid = check_grid("grid", grid, ranks=(2,))
    check_real("scale", scale, above=0, most=2)
    check_real("aspect", aspect, above=0)
    check_real("overlap", overlap, above=0, most=1)
    check_int("reduce", reduce, least=1)
    if height % reduce or width % reduce:
        raise ValueError(f"reduce={reduce} does not divide the grid {grid}")
    row, column = ((height - 1) / 2, (width - 1) / 2) if fixation is None else to_tuple("fixation", fixation, 2)
    check_real("row of the fixation", row)
    check_real("column of the fixation", column)
    if not (-0.5 <= row <= height - 0.5 and -0.5 <= column <= width - 0.5):
        raise ValueError(f"fixation={(row, column)} lies outside the grid {grid}")
    apart = 2 * math.asinh(scale / 2)
    around = round(2 * math.pi * aspect / scale)
    if around < 3:
        raise ValueError(f"scale={scale} and aspect={aspect} leave {around} windows to a ring; at least 3 are needed")
    radius = min(grid) / 2
    if fovea is None:
        fovea = radius * math.exp(-apart * max(1, math.ceil(math.log(scale / 0.043) / apart)))
    check_real("fovea", fovea, above=0)
    reach = max(row + 0.5, height - 0.5 - row, column + 0.5, width - 0.5 - column)
    rings = max(1, math.ceil(math.log(max(reach / fovea, 1.0)) / apart - 1e-6))

    at = coordinates(grid, "cpu")
    y, x = (at.double() - torch.tensor([row, column], dtype=torch.float64)).unbind(1)
    out = torch.hypot(y, x).clamp_min(1e-9).div(fovea).log() / apart  # in rings from the fovea's border
    angle = torch.atan2(y, x) * (around / (2 * math.pi))
    bands = torch.stack([_bump(out - ring - 0.5, overlap) for ring in range(rings)])
    bands[-1] = torch.where(out > rings - 0.5, 1.0, bands[-1])
    inner = (1 - bands.sum(0)).clamp_min(0)
    edges = fovea * torch.arange(rings + 1).mul(apart).exp()
    whole = (edges[1:].square() - edges[:-1].square()) * (math.pi / around)
    small = (height // reduce, width // reduce)
    cell = (at[:, 0] // reduce) * small[1] + at[:, 1] // reduce
    weights, areas, numbers = [], [], [torch.zeros(1, dtype=torch.long)]
    for wedge in range(around):
        turn = angle - wedge
        turn -= around * (turn / around).round()
        here = (turn.abs() < (1 + overlap) / 2).nonzero()[:, 0]
        band = bands[:, here] * _bump(turn[here], overlap)
        keep = band.sum(1) >= whole / 4
        parts = band.new_zeros(int(keep.sum()) + 1, len(here)).index_add_(0, keep.cumsum(0), band)
        inner[here] += parts[0]
        numbers.append(keep.nonzero()[:, 0] + 1)
        areas.append((parts[1:] > 0.5).sum(1))
        empty = band.new_zeros(len(parts) - 1, math.prod(small))
        weights.append(empty.index_add_(1, cell[here], parts[1:]))
    areas.insert(0, (inner > 0.5).sum()[None])
    weights.insert(0, inner.new_zeros(1, math.prod(small)).index_add_(1, cell, inner[None]))
    total = torch.cat(weights) / reduce**2
    least = (total > 1e-3).sum(1)
    if int(least.min()) < 2:
        raise ValueError(
            f"{int((least < 2).sum())} of {len(total)} windows have fewer than two of the {small} cells for "
            f"scale={scale} and fovea={round(fovea, 2)}; take a larger scale, fovea or grid"
        )
    total = (total / total.sum(0)).float().unflatten(1, small)
    return LogPolarWindows(total, torch.cat(areas).float(), torch.cat(numbers))


def mirrored_places(first: int, stop: int, size: int, device: torch.device | None = None) -> Tensor:
    """(stop - first,) places on an axis of ``size`` tokens that is mirrored at both last ones, again and again.

    >>> mirrored_places(-1, 7, 3).tolist(), mirrored_places(0, 3, 1).tolist()
    ([1, 0, 1, 2, 1, 0, 1, 2], [0, 0, 0])
    """
    period = max(2 * size - 2, 1)
    at = torch.arange(first, stop, device=device) % period
    return torch.minimum(at, (2 * size - 2 - at).abs())
