"""Weights on a grid of few values: rounding, and GPTQ, which lets later columns make up for what earlier ones lost.

A row of a weight is ``s (n - z)`` with whole numbers n of ``bits`` bits (:class:`Grid`). GPTQ (Frantar et al., 2022)
rounds column after column and moves the error of each to the columns that are still free, so that
``sum_j w_j |(W - Q) x_j|^2`` stays small over inputs x_j (:class:`Moments`, :func:`gptq`).

>>> w = torch.tensor([[0.9, -0.2, 0.4, -1.0]])
>>> Grid(bits=2)(w).tolist()
[[1.0, 0.0, 0.0, -1.0]]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_axes, check_choice, check_flag, check_float, check_int, check_rank, check_real, check_type
from ..types import stats_dtype

#: Weights that are compared at a time.
_CLOSE = 2**15


@dataclass(frozen=True)
class Scale:
    """Where a grid lies: (rows, 1) step ``s`` and the number ``z`` of zero."""

    step: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Grid:
    """The values that a row of weights may take.

    Args:
        bits: of a number, at least 2: ``-2^(b-1) .. 2^(b-1) - 1`` if symmetric, else ``0 .. 2^b - 1``.
        symmetric: zero is the middle. Otherwise a row has a zero of its own.
        values: ``"even"``, or ``"normal"``: at quantiles of a normal distribution, denser around zero (NF4); symmetric.
        clip: look for the smaller range whose error is least, in 80 steps of a hundredth.
        norm: power of the error that is compared then.
        per_row: every row has a step; otherwise all rows share one.
    """

    bits: int = 3
    symmetric: bool = True
    clip: bool = False
    norm: float = 2.4
    per_row: bool = True
    values: str = "even"

    def __post_init__(self) -> None:
        check_int("bits", self.bits, least=2, most=16)
        check_real("norm", self.norm, above=0)
        for name in ("symmetric", "clip", "per_row"):
            check_flag(name, getattr(self, name))
        check_choice("values", self.values, ("even", "normal"))
        if self.values == "normal" and not self.symmetric:
            raise ValueError("values='normal' needs symmetric=True")

    @functools.cached_property
    def table(self) -> Tensor:
        """(2 ** bits,) values of ``"normal"``, before they are scaled, float32."""
        half, far = 2 ** (self.bits - 1), 0.9677083  # the quantile that NF4 ends at
        normal = torch.distributions.Normal(0.0, 1.0)
        sigma = 1 / float(normal.icdf(torch.tensor(far, dtype=torch.float64)))
        at = torch.cat([torch.linspace(1 - far, 0.5, half)[:-1], torch.linspace(0.5, far, half + 1)])
        return sigma * normal.icdf(at)

    @property
    def most(self) -> float:
        """Largest number."""
        if self.values == "normal":
            return float(self.table.abs().max())
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def fit(self, weight: Tensor) -> Scale:
        """The grid for (rows, n) weights."""
        rows = weight if self.per_row else weight.flatten().unsqueeze(0)
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high).clamp(min=1e-5)
            ends = (torch.zeros_like(high), high)
        else:
            none = (low == 0) & (high == 0)
            ends = (torch.where(none, -1.0, low), torch.where(none, 1.0, high))
        found = self._scale(*ends, first=True)
        if self.clip:  # rows by themselves: so many at a time as stay close to the processor
            many = max(1, _CLOSE // max(1, rows.shape[1]))
            held = (rows, *ends, found.step, found.zero)
            steps, zeros = zip(
                *(self._clipped(*part) for part in zip(*(t.split(many) for t in held), strict=True)), strict=True
            )
            found = Scale(torch.cat(steps), torch.cat(zeros))
        if self.per_row:
            return found
        return Scale(found.step.expand(len(weight), 1), found.zero.expand(len(weight), 1))

    def _clipped(self, rows: Tensor, low: Tensor, high: Tensor, step: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero of the share of a range whose error is least."""
        best = torch.full_like(high, math.inf)
        for i in range(80):
            share = 1 - i / 100
            tried = self._scale(share * low, share * high)
            error = (self.round(rows, tried) - rows).abs().pow(self.norm).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            step, zero = (torch.where(better[:, None], t, f) for t, f in ((tried.step, step), (tried.zero, zero)))
        return step, zero

    def _scale(self, low: Tensor, high: Tensor, first: bool = False) -> Scale:
        step = (high - low) / self.most
        if not self.symmetric and first:
            step = (high - low).clamp(min=1e-5) / self.most
        zero = torch.zeros_like(step) if self.symmetric else (-low / step).round()
        return Scale(step.unsqueeze(1), zero.unsqueeze(1))

    def numbers(self, weight: Tensor, scale: Scale) -> Tensor:
        """The whole numbers of (rows, n) weights, in the weight's type; of ``"normal"``, places in the table."""
        if self.values == "normal":
            table = self.table.to(weight)
            return torch.bucketize(weight / scale.step, (table[1:] + table[:-1]) / 2).to(weight.dtype)
        least = -self.most - 1 if self.symmetric else 0
        return ((weight / scale.step).round() + scale.zero).clamp(least, self.most)

    def round(self, weight: Tensor, scale: Scale) -> Tensor:
        """(rows, n) weights moved to the nearest value."""
        if self.values == "normal":
            return scale.step * self.table.to(weight)[self.numbers(weight, scale).long()]
        return scale.step * (self.numbers(weight, scale) - scale.zero)

    def __call__(self, weight: Tensor) -> Tensor:
        """Round to nearest."""
        check_float("weight", weight)
        check_rank("weight", weight, 2, "(rows, columns)")
        return self.round(weight, self.fit(weight))


class Moments:
    """Second moments of a layer's inputs, ``H = 2 / n sum_samples sum_j w_j x_j x_j^T``.

    Args:
        dim: width of the inputs.
        power: of a token's weight on its input. ``0.5`` as the release of RSQ has it, so that weights stand in H as
            they are; its paper writes 1.

    >>> m = Moments(2)
    >>> m.add(torch.eye(2)[None])
    >>> m.value.round(decimals=3).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """

    def __init__(self, dim: int, power: float = 0.5):
        self.dim, self.power = check_int("dim", dim, least=1), check_real("power", power, least=0)
        self.samples = 0
        self.value = torch.zeros(dim, dim)

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """(B, N, dim) inputs of B samples, with (N,) or (B, N) weights of their tokens; those of a sample have mean 1
        after it."""
        check_rank("x", x, 3, "(B, N, dim)")
        check_axes("x", x, B=None, N=None, dim=self.dim)
        x = x.to(stats_dtype(x.dtype))
        self.value = self.value.to(x)
        count = x.shape[0]
        if weights is not None:
            weights = weights.to(x).expand(x.shape[:2])
            total = weights.sum(1, keepdim=True)
            if bool((weights < 0).any()) or not bool((total > 0).all()):
                raise ValueError("weights must be at least 0, and above 0 for a token of every sample")
            x = x * (weights * (x.shape[1] / total)).pow(self.power).unsqueeze(-1)
        self.value *= self.samples / (self.samples + count)
        self.samples += count
        flat = x.flatten(0, 1) * math.sqrt(2 / self.samples)
        self.value += flat.mT @ flat


def damped(moments: Tensor, damp: float, retries: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Moments with a share of their mean diagonal added, once and more often, and their lower Cholesky factor."""
    h = moments.clone()
    more = damp * h.diagonal().mean()
    for _ in range(1 + retries):
        h.diagonal().add_(more)
        root, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            yield h, root
    raise ValueError(
        f"moments are not positive definite with damp={damp} added {1 + retries} times; a larger damp, more retries or "
        "more calibration tokens help"
    )


def _factor(moments: Tensor, damp: float, retries: int) -> Tensor:
    """Upper Cholesky factor of the inverse of damped moments."""
    tried = damped(moments, damp, retries)
    while True:
        inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(next(tried)[1]), upper=True)
        if not failed:
            return inverse


def to_round(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of a weight and of its moments that are at least float32, and columns that nothing reached: moment 1."""
    check_float("weight", weight)
    check_rank("weight", weight, 2, "(rows, columns)")
    check_axes("moments", moments, columns=weight.shape[1], rows=weight.shape[1])
    high = stats_dtype(weight.dtype)
    w, h = weight.to(high).clone(), moments.to(device=weight.device, dtype=high).clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    return w, h, dead


@torch.no_grad()
def gptq(
    weight: Tensor, moments: Tensor, grid: Grid, *, damp: float = 0.01, block: int = 128, group: int | None = None,
    order: str = "given", static: bool = False, retries: int = 48,
) -> Tensor:  # fmt: skip
    """The weight on a grid, columns making up for each other.

    Args:
        weight: (rows, columns).
        moments: (columns, columns), :attr:`Moments.value`.
        grid: of its values, fitted to the rows of the weight.
        damp: share of the mean of the moments' diagonal that is added to it.
        block: columns after which the later ones are moved; of speed only, but for ``group``.
        group: columns that have a grid of their own; ``None`` for one per row.
        order: ``"given"``, or ``"activity"``: columns of large moments first.
        static: with ``group``, grids are fitted before anything moves.
        retries: how often the damping is added again where a factor does not exist.

    Raises:
        ValueError: shapes that do not fit, moments that are not positive.
    """
    check_type("grid", grid, Grid)
    w, h, dead = to_round(weight, moments)
    check_real("damp", damp, least=0)
    check_int("block", block, least=1)
    check_choice("order", order, ("given", "activity"))
    if static and group is None:
        raise ValueError("static=True needs a group")
    columns = weight.shape[1]
    if group is not None:
        check_int("group", group, least=1, most=columns)
    scale = grid.fit(w)
    w[:, dead] = 0
    fixed = [grid.fit(w[:, i : i + group]) for i in range(0, columns, group)] if static and group else []
    where = torch.arange(columns)
    if order == "activity":
        where = h.diagonal().argsort(descending=True).cpu()
        w, h = w[:, where], h[where][:, where]
    factor = _factor(h, damp, check_int("retries", retries, least=0))
    out = torch.zeros_like(w)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, errors = w[:, start:end].clone(), torch.zeros_like(w[:, start:end])
        inner = factor[start:end, start:end]
        for i in range(end - start):
            if group is not None:
                if static:
                    scale = fixed[int(where[start + i]) // group]
                elif (start + i) % group == 0:
                    scale = grid.fit(w[:, start + i : start + i + group])
            column = part[:, i : i + 1]
            rounded = grid.round(column, scale)
            out[:, start + i] = rounded[:, 0]
            error = (column - rounded) / inner[i, i]
            part[:, i:] -= error * inner[i, i:]
            errors[:, i] = error[:, 0]
        w[:, end:] -= errors @ factor[start:end, end:]
    back = torch.empty_like(where)
    back[where] = torch.arange(columns)
    return out[:, back].to(weight.dtype)


__all__ = ["Grid", "Moments", "Scale", "gptq"]
