"""Weights on a lattice: eight at a time to the nearest of 65,536 points of E8 (E8P; Tseng et al., 2024, QuIP#).

A point is ``s * a + t``: ``t`` is a quarter or minus a quarter in all places, ``a`` one of 256 rows of halves of odd
numbers, and signs ``s`` make the sum of ``s * a`` even, so that seven of them are free: 1 + 8 + 7 bits for eight
weights. All 227 rows of a squared length up to 10 are there, and 29 of the 56 of length 12, which QuIP# names. A scale
serves a whole weight. :func:`ldlq` rounds block after block, the last first, and moves the error of each to those
that are still free, as GPTQ does column by column; then it goes round again, each block against all others.

>>> x = torch.tensor([[0.7, -0.2, 0.3, 0.9, -1.1, 0.1, 0.4, -0.6]])
>>> E8P().nearest(x).tolist()
[[0.75, -0.25, -0.25, 0.75, -1.25, -0.25, 0.75, -0.25]]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..checks import check_float, check_int, check_rank, check_real, check_type, describe
from .quantize import damped, to_round

#: Where the three halves stand among five three-halves, in the 29 rows of length 12 (QuIP#'s choice).
_TWELVE = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
    "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)
#: Rows that are compared at a time.
_CLOSE = 2**11


@functools.cache
def lengths() -> Tensor:
    """(256, 8) sizes of the points' entries, before a quarter is added or taken."""
    rows = [r for r in product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in r) <= 10]
    rows += [tuple(0.5 if str(i) in held else 1.5 for i in range(8)) for held in _TWELVE.split()]
    return torch.tensor(rows)


@functools.cache
def _candidates() -> tuple[Tensor, Tensor]:
    """What sizes of a vector may be near, where an even or an odd number of its entries is negative.

    Signs are the vector's own, but where the sum would be odd: then one of the halves has the other sign. A larger
    entry never has: the same with a half in its place is nearer, and its sum is even too.
    """
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row in lengths():
        odd = int(row.sum()) % 2
        parts[odd].append(row)
        for i in torch.nonzero(row == 0.5).flatten().tolist():
            flipped = row.clone()
            flipped[i] = -0.5
            parts[1 - odd].append(flipped)
    return torch.stack(parts[0]), torch.stack(parts[1])


@dataclass(frozen=True)
class E8P:
    """The points that eight weights may take, 2 bits each.

    Args:
        scale: root of the mean square of what is rounded, over the weight's; the release of RSQ has 0.9, QuIP# 1.03.
        rounds: how often :func:`ldlq` goes round again.
    """

    scale: float = 0.9
    rounds: int = 10

    #: Of a weight.
    bits = 2

    def __post_init__(self) -> None:
        check_real("scale", self.scale, above=0)
        check_int("rounds", self.rounds, least=0)

    def check(self, weight: Tensor, name: str = "weight") -> None:
        """Refuse a weight whose columns are no eights."""
        check_float(name, weight)
        check_rank(name, weight, 2, "(rows, columns)")
        if weight.shape[1] % 8:
            raise ValueError(f"{name} has {weight.shape[1]} columns; E8P rounds eight at a time")

    def step(self, weight: Tensor) -> Tensor:
        """What points are multiplied by for a weight."""
        return (weight.square().mean().sqrt() / self.scale).clamp(min=torch.finfo(weight.dtype).tiny)

    def nearest(self, x: Tensor) -> Tensor:
        """(..., 8) -> the nearest points."""
        check_float("x", x)
        if not x.dim() or x.shape[-1] != 8:
            raise ValueError(f"x must be of shape (..., entries=8), got {describe(x)}")
        flat = x.reshape(-1, 8)
        return torch.cat([self._nearest(part) for part in flat.split(_CLOSE)] or [flat]).reshape(x.shape)

    def _nearest(self, x: Tensor) -> Tensor:
        found = []
        for shift in (-0.25, 0.25):
            y = x - shift
            negative = y < 0
            uneven = negative.sum(-1) % 2
            sizes, out = y.abs(), torch.empty_like(y)
            # Sums are even where signs are the vector's own: a row of odd negatives and the sum of its sizes agree.
            for odd, table in enumerate(_candidates()):
                rows = uneven == odd
                if bool(rows.any()):
                    table = table.to(y)
                    near = torch.addmm(-0.5 * table.square().sum(-1), sizes[rows], table.mT).argmax(-1)
                    out[rows] = table[near]
            found.append(torch.where(negative, -out, out) + shift)
        low, high = found
        nearer = (x - low).square().sum(-1, keepdim=True) < (x - high).square().sum(-1, keepdim=True)
        return torch.where(nearer, low, high)

    def __call__(self, weight: Tensor) -> Tensor:
        """Round to nearest."""
        self.check(weight)
        step = self.step(weight)
        return step * self.nearest((weight / step).unflatten(1, (-1, 8))).flatten(1)


@torch.no_grad()
def ldlq(weight: Tensor, moments: Tensor, grid: E8P, *, damp: float = 0.01, retries: int = 48) -> Tensor:
    """The weight on lattice points, blocks of eight columns making up for each other.

    Args:
        weight: (rows, columns).
        moments: (columns, columns), :attr:`attnlib.convert.quantize.Moments.value`.
        grid: the points.
        damp, retries: as of :func:`attnlib.convert.quantize.gptq`.

    Raises:
        ValueError: columns that are no eights, moments that are not positive.
    """
    check_type("grid", grid, E8P)
    grid.check(weight)
    w, h, dead = to_round(weight, moments)
    check_real("damp", damp, least=0)
    columns = weight.shape[1]
    step = grid.step(w)
    w[:, dead] = 0
    w /= step
    h, root = next(damped(h, damp, check_int("retries", retries, least=0)))
    blocks = [slice(i, i + 8) for i in range(0, columns, 8)]
    out = torch.zeros_like(w)
    for at in reversed(blocks):
        rest = slice(at.stop, columns)
        share = torch.linalg.solve_triangular(root[at, at], root[rest, at], upper=False, left=False)
        out[:, at] = grid.nearest(w[:, at] + (w[:, rest] - out[:, rest]) @ share)
    back = [torch.linalg.inv(h[at, at]) for at in blocks]
    for _ in range(grid.rounds):
        for at, inverse in zip(reversed(blocks), reversed(back), strict=True):
            out[:, at] = grid.nearest(out[:, at] + (w - out) @ h[:, at] @ inverse)
    return (step * out).to(weight.dtype)


__all__ = ["E8P", "ldlq", "lengths"]
