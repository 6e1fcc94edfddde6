"""Layouts of tokens, windows and permutations of grids.

A tensor is channels-last, ``x: (B, *grid, C)``, and its rank tells the grid. Tokens that lie beside the grid (class,
register, text) travel flat, ``(B, N, C)``, with a :class:`Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import check_rank, to_tuple


@dataclass(frozen=True)
class Layout:
    """Named runs of tokens inside one flat sequence, in order.

    Args:
        segments: ``(name, size)`` pairs, where size is a count, or a tuple for a grid in row-major order.

    Raises:
        ValueError: on repeated names or sizes below zero.

    >>> layout = Layout((("text", 77), ("image", (14, 14)), ("cls", 1)))
    >>> len(layout), layout.span("image"), layout.grid("image")
    (274, (77, 273), (14, 14))
    """

    segments: tuple[tuple[str, int | tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        clean = []
        for name, size in self.segments:
            size = tuple(int(s) for s in size) if isinstance(size, Sequence) else int(size)
            if min(size if isinstance(size, tuple) else (size,)) < 0:
                raise ValueError(f"layout segment {name!r} has size {size}; sizes must not be negative")
            clean.append((str(name), size))
        object.__setattr__(self, "segments", tuple(clean))
        names = [name for name, _ in clean]
        if len(set(names)) != len(names):
            raise ValueError(f"layout repeats a segment name: {names}")

    @classmethod
    def image(cls, height: int, width: int, /, **extra: int) -> Layout:
        """Extra tokens first, then an image: ``Layout.image(14, 14, cls=1)``."""
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
        self.check(x.shape[dim])
        return dict(zip(self.names, x.split([self.size(n) for n in self.names], dim), strict=True))

    def join(self, parts: dict[str, Tensor], dim: int = 1) -> Tensor:
        """Inverse of :meth:`split`."""
        return torch.cat([parts[name] for name in self.names], dim)

    def types(self, device: torch.device | str | None = None) -> Tensor:
        """(N,) int64: the segment number of each token."""
        sizes = torch.tensor([self.size(n) for n in self.names], device=device)
        return torch.repeat_interleave(torch.arange(len(self.names), device=device), sizes, output_size=len(self))


# --------------------------------------------------------------------------------------------------------------------
# Flattening


def flatten_grid(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(B, *grid, C) -> (B, N, C) and the grid."""
    grid = tuple(x.shape[1:-1])
    return x.reshape(x.shape[0], math.prod(grid), x.shape[-1]), grid


def unflatten_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, N, C) -> (B, *grid, C)."""
    return x.reshape(x.shape[0], *grid, x.shape[-1])


def coordinates(grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """(N, r) int64 coordinates of a row-major grid.

    >>> coordinates((2, 2)).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    axes = torch.meshgrid(*[torch.arange(s, device=device) for s in grid], indexing="ij")
    return torch.stack([a.reshape(-1) for a in axes], dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# Windows. Block windows hold consecutive tokens, grid windows hold tokens spread over the whole map.


def check_windows(grid: Sequence[int], window: Sequence[int], name: str = "window_size") -> None:
    """Raise ``ValueError`` unless ``window`` fits into and divides ``grid`` on every axis."""
    for axis, (size, w) in enumerate(zip(grid, window, strict=True)):
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
    grid = tuple(x.shape[1:-1])
    window = to_tuple("window_size", window, len(grid))
    check_windows(grid, window)
    r = len(grid)
    split = [d for size, w in zip(grid, window, strict=True) for d in (size // w, w)]
    order = [0, *range(1, 2 * r + 1, 2), *range(2, 2 * r + 1, 2), 2 * r + 1]
    return x.reshape(x.shape[0], *split, x.shape[-1]).permute(order)


def unblock_windows(x: Tensor) -> Tensor:
    """Inverse of :func:`block_windows`."""
    r = (x.dim() - 2) // 2
    order = [0, *(d for i in range(r) for d in (1 + i, 1 + r + i)), 2 * r + 1]
    grid = [x.shape[1 + i] * x.shape[1 + r + i] for i in range(r)]
    return x.permute(order).reshape(x.shape[0], *grid, x.shape[-1])


def grid_windows(x: Tensor, window: int | Sequence[int]) -> Tensor:
    """(B, *grid, C) -> (B, *windows, *window, C): window ``a`` holds the tokens ``i * grid/window + a``.

    >>> grid_windows(torch.arange(4.0).reshape(1, 4, 1), 2)[0, :, :, 0].tolist()
    [[0.0, 2.0], [1.0, 3.0]]
    """
    grid = tuple(x.shape[1:-1])
    window = to_tuple("window_size", window, len(grid))
    check_windows(grid, window)
    r = len(grid)
    split = [d for size, w in zip(grid, window, strict=True) for d in (w, size // w)]
    order = [0, *range(2, 2 * r + 1, 2), *range(1, 2 * r + 1, 2), 2 * r + 1]
    return x.reshape(x.shape[0], *split, x.shape[-1]).permute(order)


def ungrid_windows(x: Tensor) -> Tensor:
    """Inverse of :func:`grid_windows`."""
    r = (x.dim() - 2) // 2
    order = [0, *(d for i in range(r) for d in (1 + r + i, 1 + i)), 2 * r + 1]
    grid = [x.shape[1 + i] * x.shape[1 + r + i] for i in range(r)]
    return x.permute(order).reshape(x.shape[0], *grid, x.shape[-1])


def pad_to_multiple(x: Tensor, multiple: int | Sequence[int], value: float = 0.0) -> Tensor:
    """Pad (B, *grid, C) at the far end of every axis to a multiple."""
    grid = tuple(x.shape[1:-1])
    multiple = to_tuple("multiple", multiple, len(grid))
    extra = [(-size) % m for size, m in zip(grid, multiple, strict=True)]
    if not any(extra):
        return x
    pads = [0, 0]
    for e in reversed(extra):
        pads += [0, e]
    return F.pad(x, pads, value=value)


def crop_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """The first ``grid`` tokens of every axis of (B, *grid', C)."""
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
        check_rank("q_index", self.q_index, (2, 3, 4), "(G, S), (H, G, S) or (B, H, G, S)")
        if self.k_index is not None:
            check_rank("k_index", self.k_index, (2, 3, 4), "(G, S), (H, G, S) or (B, H, G, S)")
            if self.k_index.shape[-2] != self.q_index.shape[-2]:
                raise ValueError(
                    f"k_index has {self.k_index.shape[-2]} groups, q_index has {self.q_index.shape[-2]}; "
                    "they must agree"
                )


def window_partition(grid: Sequence[int], window: int | Sequence[int], kind: str = "block") -> Partition:
    """The :class:`Partition` of a grid into ``"block"`` or ``"grid"`` windows.

    >>> window_partition((4,), 2, "grid").q_index.tolist()
    [[0, 2], [1, 3]]
    """
    numbers = torch.arange(math.prod(grid)).reshape(1, *grid, 1)
    split = {"block": block_windows, "grid": grid_windows}
    if kind not in split:
        raise ValueError(f"kind={kind!r} is not possible; choose one of {list(split)}")
    windows = split[kind](numbers, window)
    r = len(grid)
    return Partition(windows.reshape(math.prod(windows.shape[1 : 1 + r]), math.prod(windows.shape[1 + r : -1])))


def inverse_permutation(permutation: Tensor) -> Tensor:
    """(..., N) -> (..., N) such that ``x[perm][inverse] == x``."""
    inverse = torch.empty_like(permutation)
    numbers = torch.arange(permutation.shape[-1], device=permutation.device).expand_as(permutation)
    return inverse.scatter_(-1, permutation, numbers)
