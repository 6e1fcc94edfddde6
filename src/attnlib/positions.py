"""Position information: biases in three forms, rotary embedding, fixed encodings.

Every bias lowers to one of three forms, with gradients: a dense tensor, a relative table with an index rule, or
per-query factors along each axis of the key grid. All three answer :meth:`Bias.block` for a block of rows and columns,
so an engine never needs the whole (N, M) map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    REAL,
    check_axes,
    check_choice,
    check_dense,
    check_device,
    check_divides,
    check_flag,
    check_float,
    check_int,
    check_ints,
    check_rank,
    check_real,
    check_tensor,
    check_tensors,
    check_type,
    check_whole,
    describe,
    extremes,
    fixed,
    raised,
    readable,
    repeated,
)
from .grids import coordinates
from .types import register_pytree, stats_dtype

_KINDS: dict[str, type[Bias]] = {}


class Bias:
    """Base of the three forms. ``tensors()`` are the differentiable and index tensors; ``settings()`` plain numbers."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[cls.name] = cls
        register_pytree(cls, lambda v: (v.tensors(), v.settings()), lambda t, s: cls.rebuild(list(t), s))

    def block(self, rows: slice, cols: slice | Tensor) -> Tensor:
        """(B or 1, H or 1, n, m): the bias of query rows ``rows`` and key columns ``cols`` (slice or indices)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """(B or 1, H or 1, N, M)."""
        return self.block(slice(None), slice(None))

    def shape(self) -> tuple[int, int]:
        """(N, M)."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        raise NotImplementedError

    def settings(self) -> list[Any]:
        return []

    @classmethod
    def rebuild(cls, tensors: list[Tensor], settings: list[Any]) -> Bias:
        """Inverse of ``(tensors(), settings())``, without checks, so that it works on fake tensors too."""
        raise NotImplementedError

    def part(self, batch: slice, heads: slice) -> Bias:
        """The bias of some samples and heads, on views of the same tensors; an axis of size 1 serves all."""
        raise NotImplementedError

    def add_grad(self, grads: Sequence[Tensor | None], rows: slice, cols: slice | Tensor, grad: Tensor) -> None:
        """Add what ``grad`` (B, H, n, m) with respect to :meth:`block` means for ``tensors()``.

        Args:
            grads: one accumulator per tensor of ``tensors()``, ``None`` where no gradient is wanted.
        """
        raise NotImplementedError

    def lower(self) -> tuple[str, list[Tensor]]:
        """``(spec, tensors)``, from which :func:`raise_bias` rebuilds the bias."""
        # Written out by hand because torch.compile traces this and cannot trace the json package.
        return f'["{self.name}",{_text(self.settings())}]', self.tensors()


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join([_text(v) for v in value])}]"
    return repr(fixed(value))


def _some(x: Tensor, batch: slice, heads: slice) -> Tensor:
    """Samples and heads of (B or 1, H or 1, ...)."""
    return x[batch if x.shape[0] > 1 else slice(None), heads if x.shape[1] > 1 else slice(None)]


def raise_bias(spec: str, tensors: Sequence[Tensor]) -> Bias:
    """The bias that :meth:`Bias.lower` described; ``ValueError`` for anything else."""
    given = check_tensors("tensors", tensors, least=1)

    def build(value: Any) -> Bias:
        name, settings = value
        return _KINDS[name].rebuild(given, settings)

    return raised("spec", spec, build, "Bias.lower")


def _check_dense(name: str, bias: Any) -> None:
    if isinstance(bias, Tensor) and bias.dtype in REAL:
        check_dense(name, bias)
    if not isinstance(bias, Tensor) or bias.dtype not in REAL or bias.dim() not in (2, 3, 4):
        raise ValueError(f"{name} must be a float tensor (N, M), (H, N, M) or (B, H, N, M), got {describe(bias)}")


class DenseBias(Bias):
    """A tensor (N, M), (H, N, M) or (B or 1, H or 1, N, M), added to the scaled scores."""

    name = "dense"

    def __init__(self, bias: Tensor):
        _check_dense("bias", bias)
        self.bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))

    def block(self, rows: slice, cols: slice | Tensor) -> Tensor:
        return self.bias[:, :, rows][..., cols]

    def shape(self) -> tuple[int, int]:
        return self.bias.shape[-2], self.bias.shape[-1]

    def tensors(self) -> list[Tensor]:
        return [self.bias]

    def part(self, batch: slice, heads: slice) -> Bias:
        return DenseBias.rebuild([_some(self.bias, batch, heads)], [])

    def add_grad(self, grads: Sequence[Tensor | None], rows: slice, cols: slice | Tensor, grad: Tensor) -> None:
        into = grads[0]
        if into is None:
            return
        grad = grad.sum_to_size(*into.shape[:2], *grad.shape[2:])
        if isinstance(cols, Tensor):
            into[:, :, rows].index_add_(-1, cols, grad)
        else:
            into[:, :, rows, cols] += grad

    @classmethod
    def rebuild(cls, tensors: list[Tensor], settings: list[Any]) -> Bias:
        out = object.__new__(cls)
        out.bias = tensors[0]
        return out


class RelativeBias(Bias):
    """A table looked up at ``sum_axis clamp(k - q + offset) * stride``: one entry per relative displacement.

    Args:
        table: (H, T) with ``T = prod(extent)``.
        q_coords: (N, r) integer coordinates of queries.
        k_coords: (M, r) of keys; may belong to a grid of another size.
        offset: per axis, what is added to ``k - q`` to start at 0; usually ``extent // 2``.
        extent: per axis, number of displacements.

    >>> b = RelativeBias(torch.zeros(2, 9), coordinates((2, 2)), coordinates((2, 2)), (1, 1), (3, 3))
    >>> b.dense().shape
    torch.Size([1, 2, 4, 4])
    """

    name = "relative"

    def __init__(self, table: Tensor, q_coords: Tensor, k_coords: Tensor, offset: Sequence[int], extent: Sequence[int]):
        check_float("table", table)
        check_rank("table", table, 2, "(H, prod(extent))")
        offset, extent = check_ints("offset", offset), check_ints("extent", extent, least=1)
        for name, coords, axis in (("q_coords", q_coords, "N"), ("k_coords", k_coords, "M")):
            check_whole(name, coords)
            check_axes(name, coords, **{axis: None, "r": len(extent)})
        if len(offset) != len(extent):
            raise ValueError(
                f"offset={offset} names {len(offset)} axes, extent={extent} {len(extent)}; they must agree"
            )
        if table.shape[1] != math.prod(extent):
            raise ValueError(f"table must be (H, {math.prod(extent)}) for extent={extent}, got {tuple(table.shape)}")
        check_device(table=table, q_coords=q_coords, k_coords=k_coords)
        # The offset moves into the coordinates and the first extent is implied by the table, so that what depends on
        # the number of tokens is a tensor or a shape, never a number in the text form.
        self.table, self.q_coords = table, q_coords
        self.k_coords = torch.stack([k_coords[:, axis] + off for axis, off in enumerate(offset)], 1)
        self.inner = tuple(extent[1:])

    def entry(self, q: Tensor, k: Tensor) -> Tensor:
        """Position in the table of query tokens ``q`` and key tokens ``k`` (integer numbers, broadcast)."""
        return self._look(self.q_coords[q], self.k_coords[k])

    def index(self, rows: slice, cols: slice | Tensor) -> Tensor:
        """(n, m) int64 positions in the table."""
        return self._look(self.q_coords[rows][:, None], self.k_coords[cols][None])

    def _look(self, q: Tensor, k: Tensor) -> Tensor:
        total: Tensor | int = 0
        for axis, ext in enumerate((self.table.shape[1] // math.prod(self.inner), *self.inner)):
            total = total * ext + (k[..., axis] - q[..., axis]).clamp(0, ext - 1)
        assert isinstance(total, Tensor)
        return total

    def block(self, rows: slice, cols: slice | Tensor) -> Tensor:
        index = self.index(rows, cols)
        return self.table.index_select(1, index.reshape(-1)).reshape(1, self.table.shape[0], *index.shape)

    def shape(self) -> tuple[int, int]:
        return self.q_coords.shape[0], self.k_coords.shape[0]

    def tensors(self) -> list[Tensor]:
        return [self.table, self.q_coords, self.k_coords]

    def part(self, batch: slice, heads: slice) -> Bias:
        table = self.table[heads] if self.table.shape[0] > 1 else self.table
        return RelativeBias.rebuild([table, self.q_coords, self.k_coords], self.settings())

    def add_grad(self, grads: Sequence[Tensor | None], rows: slice, cols: slice | Tensor, grad: Tensor) -> None:
        into = grads[0]
        if into is not None:
            grad = grad.sum_to_size(1, into.shape[0], *grad.shape[2:])
            into.index_add_(1, self.index(rows, cols).reshape(-1), grad.reshape(into.shape[0], -1))

    def settings(self) -> list[Any]:
        return list(self.inner)

    @classmethod
    def rebuild(cls, tensors: list[Tensor], settings: list[Any]) -> Bias:
        out = object.__new__(cls)
        out.table, out.q_coords, out.k_coords = tensors
        out.inner = tuple(settings)
        return out


class AxisBias(Bias):
    """Per-query factors along each axis of the key grid: ``bias[q, k] = sum_axis factor_axis[q, coordinate_axis(k)]``.

    Serves ``q . R_h + q . R_w`` and box-to-pixel bias alike.

    Args:
        factors: one (B or 1, H or 1, N, K_axis) per axis of the key grid.
        k_coords: (M, r) int64 coordinates of keys; by default the row-major grid of the factors' sizes.

    >>> AxisBias([torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 4)]).dense().shape
    torch.Size([1, 2, 5, 12])
    """

    name = "axis"

    def __init__(self, factors: Sequence[Tensor], k_coords: Tensor | None = None):
        if isinstance(factors, Tensor) or not isinstance(factors, Sequence):
            raise TypeError(f"factors must be a sequence of tensors (B, H, N, K), got {describe(factors)}")
        if not factors:
            raise ValueError("factors must be tensors (B, H, N, K), one per axis of the key grid, got none")
        first = factors[0]
        for i, f in enumerate(factors):
            check_float(f"factors[{i}]", f)
            check_rank(f"factors[{i}]", f, 4, "(B or 1, H or 1, N, K)")
            alike = f.shape[2] == first.shape[2] and all(
                a == b or 1 in (a, b) for a, b in zip(f.shape[:2], first.shape[:2], strict=True)
            )
            if not alike:
                raise ValueError(f"factors must share B, H and N, got {[tuple(f.shape) for f in factors]}")
            check_device(**{"factors[0]": first, f"factors[{i}]": f})
        self.full = k_coords is None  # the keys are the whole grid in order: nothing has to be looked up
        if k_coords is None:
            k_coords = coordinates([f.shape[-1] for f in factors], first.device)
        check_whole("k_coords", k_coords)
        check_device(**{"factors[0]": first, "k_coords": k_coords})
        check_rank("k_coords", k_coords, 2, "(M, r)")
        if k_coords.shape[1] != len(factors):
            raise ValueError(f"k_coords has {k_coords.shape[1]} axes, but there are {len(factors)} factors")
        for axis, f in enumerate(factors):
            low, high = extremes(k_coords[:, axis], (0, -1))
            if low < 0 or high >= f.shape[-1]:
                possible = f"0 to {f.shape[-1] - 1}" if f.shape[-1] else f"none, factors[{axis}] has no coordinate"
                raise ValueError(f"k_coords holds {low if low < 0 else high} on axis {axis}; possible: {possible}")
        self.factors, self.k_coords = list(factors), k_coords

    def block(self, rows: slice, cols: slice | Tensor) -> Tensor:
        if self.full and isinstance(cols, slice) and cols == slice(None):
            whole = self.factors[0][:, :, rows]
            for factor in self.factors[1:]:
                whole = (whole.unsqueeze(-1) + factor[:, :, rows].unsqueeze(-2)).flatten(-2)
            return whole
        k = self.k_coords[cols]
        total: Tensor | None = None
        for axis, factor in enumerate(self.factors):
            part = factor[:, :, rows].index_select(-1, k[:, axis])
            total = part if total is None else total + part
        assert total is not None
        return total

    def shape(self) -> tuple[int, int]:
        return self.factors[0].shape[2], self.k_coords.shape[0]

    def tensors(self) -> list[Tensor]:
        return [*self.factors, self.k_coords]

    def part(self, batch: slice, heads: slice) -> Bias:
        return AxisBias.rebuild([*(_some(f, batch, heads) for f in self.factors), self.k_coords], [])

    def add_grad(self, grads: Sequence[Tensor | None], rows: slice, cols: slice | Tensor, grad: Tensor) -> None:
        k = self.k_coords[cols]
        for axis, into in enumerate(grads[:-1]):
            if into is not None:
                into[:, :, rows].index_add_(-1, k[:, axis], grad.sum_to_size(*into.shape[:2], *grad.shape[2:]))

    @classmethod
    def rebuild(cls, tensors: list[Tensor], settings: list[Any]) -> Bias:
        out = object.__new__(cls)
        out.factors, out.k_coords, out.full = list(tensors[:-1]), tensors[-1], False
        return out


def gaussian_prior(sigma: Tensor, grid: Sequence[int], q_coords: Tensor | None = None) -> AxisBias:
    """How much each place of a grid counts for a query that sees an anisotropic Gaussian: its logarithm.

    ``T_ij ~ exp(-sum_a (x_ia - x_ja)^2 / (2 sigma_ia^2))`` with rows that sum to 1. On a whole grid that is a product
    of one softmax per axis: nothing over- or underflows however small a sigma is, and no (N, M) map is built.

    Args:
        sigma: (B or 1, H or 1, N, r) widths above 0, per query and axis of the grid; 1e-6 at least counts.
        grid: sizes of the grid of keys, r of them.
        q_coords: (N, r) places of the queries, also between those of the grid; the grid's own by default.

    Returns:
        A bias whose ``dense().exp()`` is T, float32 at least; differentiable in sigma.

    Raises:
        ValueError: another number of axes or of queries, widths that are not above 0.

    >>> prior = gaussian_prior(torch.ones(1, 2, 6, 2), (2, 3)).dense().exp()
    >>> prior.shape, bool((prior.argmax(-1) == torch.arange(6)).all())
    (torch.Size([1, 2, 6, 6]), True)
    """
    check_float("sigma", sigma)
    check_rank("sigma", sigma, 4, "(B or 1, H or 1, N, r)")
    sides = check_ints("grid", grid, least=1)
    if sigma.shape[-1] != len(sides):
        raise ValueError(f"sigma has {sigma.shape[-1]} widths per query, but grid {sides} has {len(sides)} axes")
    at = coordinates(sides, sigma.device) if q_coords is None else q_coords
    check_rank("q_coords", at, 2, "(N, r)")
    if tuple(at.shape) != tuple(sigma.shape[2:]):
        given = f"grid {sides} has {len(at)} places" if q_coords is None else f"q_coords is {tuple(at.shape)}"
        raise ValueError(f"sigma is for {sigma.shape[2]} queries and {sigma.shape[3]} axes, but {given}")
    if sigma.numel() and readable(sigma) and not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be above 0, got {float(sigma.detach().min())}")
    if q_coords is not None and at.is_floating_point() and readable(at) and not bool(at.isfinite().all()):
        raise ValueError("q_coords must be finite places, got some that are NaN or infinite")
    widths = sigma.to(stats_dtype(sigma.dtype)).clamp(min=1e-6)  # less is a point on any grid, and has no square
    factors = []
    for axis, size in enumerate(sides):
        keys = torch.arange(size, device=sigma.device, dtype=widths.dtype)
        apart = at[:, axis, None].to(widths.dtype) - keys
        factors.append((-0.5 * (apart / widths[..., axis, None]).square()).log_softmax(-1))
    return AxisBias(factors)


def as_bias(bias: Bias | Tensor | None, name: str = "bias", n: int | None = None, m: int | None = None) -> Bias | None:
    """Accept a float tensor where a bias is meant; ``name`` is what the caller knows it by.

    For a call of ``n`` queries and ``m`` keys sides of 1 serve all.
    """
    if bias is None or isinstance(bias, Bias):
        return bias
    check_type(name, bias, Tensor, "a float tensor or a Bias")
    _check_dense(name, bias)
    return DenseBias(bias if n is None or m is None else repeated(bias, n, m))


# --------------------------------------------------------------------------------------------------------------------
# Ready-made biases


def window_bias(table: Tensor, window: Sequence[int]) -> RelativeBias:
    """Relative bias inside one window, indexed ``key - query + window - 1`` per axis.

    Args:
        table: (H, prod(2 * window - 1)).
        window: sides of the window.
    """
    check_float("table", table)
    window = check_ints("window", window, least=1)
    coords = coordinates(window, table.device)
    return RelativeBias(table, coords, coords, [w - 1 for w in window], [2 * w - 1 for w in window])


def dense_window_bias(table: Tensor, window: Sequence[int], key_window: Sequence[int] | None = None) -> Tensor:
    """:func:`window_bias` laid out, in few operations: (H, *(2 window - 1)) -> (H, S, S) for windows of S tokens.

    Args:
        table: (H, *(window + key_window - 1)) by displacement key minus query, both counted from their window's start.
        window: sides of a window of queries.
        key_window: sides of its window of keys; ``window`` by default.

    >>> dense_window_bias(torch.arange(3.0)[None], (2,)).tolist()
    [[[1.0, 2.0], [0.0, 1.0]]]
    """
    at = torch.zeros(1, 1, dtype=torch.long, device=table.device)
    for w, m in zip(window, window if key_window is None else key_window, strict=True):
        step = torch.arange(m, device=table.device) - torch.arange(w, device=table.device)[:, None] + (w - 1)
        at = (at[:, None, :, None] * (w + m - 1) + step[:, None]).flatten(2).flatten(0, 1)
    return table.flatten(1).index_select(1, at.flatten()).unflatten(1, (at.shape[0], at.shape[1]))


def euclidean_buckets(
    window: Sequence[int], alpha: float, beta: float, gamma: float, device: torch.device | str | None = None
) -> Tensor:
    """Buckets of the distances between tokens of a window, by displacement: what iRPE calls Euclidean and piecewise.

    A distance is rounded; above ``alpha`` it is ``alpha + (beta - alpha) log(d / alpha) / log(gamma / alpha)``, rounded
    and at most ``beta``. Wu et al., 2021, arXiv 2107.14222, eq. 18.

    Args:
        window: sides of the window.
        alpha, beta, gamma: up to where distances are exact, the last bucket, and the distance that reaches it.
        device: of the buckets.

    Returns:
        Whole numbers from 0 to ``beta``, (*(2 window - 1)), displacements as in :func:`window_bias`.

    Raises:
        ValueError: unless ``0 < alpha < beta`` and ``alpha < gamma``.

    >>> euclidean_buckets((1, 6), 2, 4, 16).tolist()
    [[3, 3, 2, 2, 1, 0, 1, 2, 2, 3, 3]]
    """
    window = check_ints("window", window, least=1)
    for name, value, above in (("alpha", alpha, 0.0), ("beta", beta, alpha), ("gamma", gamma, alpha)):
        check_real(name, value, above=above)
    sides = [torch.arange(1 - w, w, device=device) for w in window]
    at = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
    distance = at.square().sum(-1).float().sqrt().round()
    far = alpha + torch.log(distance.clamp(min=alpha) / alpha) / math.log(gamma / alpha) * (beta - alpha)
    return torch.where(distance <= alpha, distance, far.round().clamp(max=beta)).long()


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """(H,) slopes ``2 ** (-8 (h + 1) / H)``, with the authors' interpolation when H is no power of two.

    They are float32, or float64 where that is the default type.

    Reference: Press, Smith, Lewis, 2022, arXiv 2108.12409.
    """

    check_int("num_heads", num_heads, least=1)

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = power_of_two(closest)
    if closest < num_heads:
        slopes += power_of_two(2 * closest)[0::2][: num_heads - closest]
    return torch.tensor(slopes, device=device, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))


def alibi(
    num_heads: int, q_pos: Tensor, k_pos: Tensor, slopes: Tensor | None = None, span: tuple[int, int] | None = None
) -> RelativeBias:
    """``-slope_h |q - k|`` as a relative table. ``q_pos`` (N,) and ``k_pos`` (M,) are integer positions.

    ``span`` holds the least and the greatest ``k - q``, or more; give it where it is known, so that nothing is read
    back from an accelerator.

    >>> alibi(2, torch.arange(3), torch.arange(3)).dense()[0, 0, 2].tolist()
    [-0.125, -0.0625, -0.0]
    """
    check_int("num_heads", num_heads, least=1)
    for name, pos, size in (("q_pos", q_pos, "N"), ("k_pos", k_pos, "M")):
        check_whole(name, pos)
        check_axes(name, pos, **{size: None})
    check_device(q_pos=q_pos, k_pos=k_pos, slopes=slopes)
    if slopes is None:
        slopes = alibi_slopes(num_heads, q_pos.device)
    check_float("slopes", slopes)
    check_axes("slopes", slopes, H=num_heads)
    if span is not None:
        span = _checked_span(span, q_pos, k_pos)
    elif not (q_pos.numel() and k_pos.numel()):
        span = (0, 0)
    low, high = span or (int(k_pos.min() - q_pos.max()), int(k_pos.max() - q_pos.min()))
    reach = torch.arange(low, high + 1, device=q_pos.device).abs()
    return RelativeBias(-slopes[:, None] * reach, q_pos[:, None], k_pos[:, None], (-low,), (high - low + 1,))


def _checked_span(span: Any, q_pos: Tensor, k_pos: Tensor) -> tuple[int, int]:
    bounds = check_ints("span", span)
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ValueError(f"span must be the least and the greatest k - q, got {span}")
    if q_pos.numel() and k_pos.numel() and q_pos.device.type == "cpu" and readable(q_pos) and readable(k_pos):
        (q_low, q_high), (k_low, k_high) = extremes(q_pos, (0, 0)), extremes(k_pos, (0, 0))
        if k_low - q_high < bounds[0] or k_high - q_low > bounds[1]:
            raise ValueError(f"span={span} does not hold k - q, which goes from {k_low - q_high} to {k_high - q_low}")
    return bounds[0], bounds[1]


# --------------------------------------------------------------------------------------------------------------------
# Toeplitz products


def relative_offsets(table: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Entries of a table over displacements ``-(P - 1) .. P - 1`` per axis; what lies further gets the last entry.

    Args:
        table: (H, 2 P_1 - 1, .., 2 P_r - 1).
        starts: per axis, the first displacement wanted.
        sizes: per axis, how many.

    Returns:
        (H, *sizes).

    >>> relative_offsets(torch.tensor([[1, 2, 3]]), (-2,), (4,)).tolist()
    [[1, 1, 2, 3]]
    """
    check_tensor("table", table)
    starts, sizes = check_ints("starts", starts), check_ints("sizes", sizes, least=0)
    if len(starts) != table.dim() - 1 or len(sizes) != table.dim() - 1:
        raise ValueError(
            f"starts and sizes must hold one number per axis of the table, {table.dim() - 1} of {tuple(table.shape)}; "
            f"got {len(starts)} and {len(sizes)}"
        )
    if any(size % 2 == 0 for size in table.shape[1:]):
        raise ValueError(f"table must be (H, 2 P_1 - 1, ..), odd on every axis, got {tuple(table.shape)}")
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True), 1):
        reach = table.shape[axis] // 2
        index = torch.arange(size, device=table.device) + start
        table = table.index_select(axis, index.clamp(-reach, reach) + reach)
    return table


def _transform_size(n: int) -> int:
    """The next length without prime factors above 5, which transforms are fast for."""
    if torch.compiler.is_compiling():
        return n  # a search cannot be traced with a free size
    best = 1 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(0, (-(-n // three) - 1).bit_length())
            best = min(best, two)
            three *= 3
        five *= 5
    return best


def toeplitz_spectrum(c: Tensor, queries: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Spectrum of ``T_ij = c_{j - i}`` embedded in a circulant, and the size of the transform per axis.

    Args:
        c: (..., N_1 + M_1 - 1, .., N_r + M_r - 1) entries for displacements ``j - i`` from ``-(N - 1)`` to ``M - 1``.
        queries: ``(N_1, .., N_r)``.
    """
    check_float("c", c)
    queries = check_ints("queries", queries, least=1)
    if not 1 <= len(queries) <= c.dim() or any(n > size for n, size in zip(queries[::-1], c.shape[::-1], strict=False)):
        raise ValueError(f"queries={queries} must name axes of c, and no more than its entries, got {tuple(c.shape)}")
    axes = tuple(range(-len(queries), 0))
    sizes = tuple(_transform_size(c.shape[axis]) for axis in axes)
    pad = [p for axis, size in zip(reversed(axes), reversed(sizes), strict=True) for p in (0, size - c.shape[axis])]
    c = c.to(stats_dtype(c.dtype))
    circle = torch.nn.functional.pad(c, pad)
    if not circle.numel():
        like = torch.complex(circle, circle)
        return like.new_zeros(*c.shape[: -len(axes)], *sizes[:-1], sizes[-1] // 2 + 1), sizes
    return torch.fft.rfftn(torch.roll(circle, [1 - n for n in queries], axes), dim=axes), sizes


def toeplitz_matmul(c: Tensor, x: Tensor, queries: Sequence[int] | None = None) -> Tensor:
    """``out_i = sum_j c_{j - i} x_j`` on a grid of any rank, by FFT: O(N log N) instead of O(N^2).

    Runs in float32 or float64. Rounding is relative to the largest products, not to those of the row, and it reaches
    every row: where all entries of a row are far below the largest, few of their digits are left.

    Args:
        c: (..., N_1 + M_1 - 1, .., N_r + M_r - 1) entries for displacements from ``-(N - 1)`` to ``M - 1`` per axis.
        x: (..., M_1, .., M_r, F); leading axes broadcast with those of ``c``.
        queries: ``(N_1, .., N_r)``; one axis with as many queries as ``c`` leaves by default.

    Returns:
        (..., N_1, .., N_r, F).

    Raises:
        ValueError: sizes that do not belong together.

    >>> toeplitz_matmul(torch.tensor([1.0, 2, 3]), torch.tensor([[1.0], [10]])).flatten().tolist()
    [32.0, 21.0]
    """
    check_float("c", c)
    check_float("x", x)
    if c.dim() < 1 or x.dim() < 2:
        raise ValueError(f"c must be (..., N + M - 1) and x (..., M, F), got {tuple(c.shape)} and {tuple(x.shape)}")
    check_device(c=c, x=x)
    queries = (c.shape[-1] - x.shape[-2] + 1,) if queries is None else check_ints("queries", queries)
    if not 1 <= len(queries) < x.dim() or len(queries) > c.dim():
        raise ValueError(f"queries={queries} names {len(queries)} axes; c has {tuple(c.shape)}, x has {tuple(x.shape)}")
    rank = len(queries)
    keys = tuple(x.shape[-1 - rank : -1])
    if len(keys) != rank or any(
        n < 1 or m < 1 or length != n + m - 1 for length, n, m in zip(c.shape[-rank:], queries, keys, strict=True)
    ):
        raise ValueError(
            f"c has entries {tuple(c.shape[-rank:])}; for queries {tuple(queries)} and keys {keys} it must have "
            f"{tuple(n + m - 1 for n, m in zip(queries, keys, strict=False))}"
        )
    before, besides = c.shape[:-rank], x.shape[: -1 - rank]
    for one, two in zip(reversed(before), reversed(besides), strict=False):
        if one != two and 1 not in (one, two):
            raise ValueError(f"c and x must agree before their grids, got {tuple(before)} and {tuple(besides)}")
    dtype = stats_dtype(torch.promote_types(c.dtype, x.dtype))
    if not c.numel() or not x.numel():
        lead = torch.broadcast_shapes(before, besides)
        return torch.zeros(*lead, *queries, x.shape[-1], dtype=dtype, device=x.device)
    spectrum, sizes = toeplitz_spectrum(c.to(dtype), queries)
    axes = tuple(range(-1 - rank, -1))
    # A correlation: T x = irfft(conj(C) X).
    out = torch.fft.irfftn(
        spectrum.conj().unsqueeze(-1) * torch.fft.rfftn(x.to(dtype), s=sizes, dim=axes), s=sizes, dim=axes
    )
    for axis, n in zip(axes, queries, strict=True):
        out = out.narrow(axis, 0, n)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Rotary


#: Rules by which rotary positions stretch beyond the lengths of training, and the numbers that each needs.
ROTARY_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_rotary_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``scaling`` as a plain dictionary; raise unless it names a rule of :data:`ROTARY_SCALINGS` and its numbers."""
    if scaling is None:
        return None
    check_type("rotary_scaling", scaling, Mapping, "a mapping such as {'rope_type': 'linear', 'factor': 2.0}")
    check_choice("rotary_scaling's rope_type", scaling.get("rope_type"), ROTARY_SCALINGS)
    needed = ROTARY_SCALINGS[scaling["rope_type"]]
    if set(scaling) != {"rope_type", *needed}:
        raise ValueError(
            f"rotary_scaling must hold rope_type, {', '.join(needed)} for {scaling['rope_type']!r}, got {list(scaling)}"
        )
    for name in needed:
        check_real(f"rotary_scaling's {name}", scaling[name], above=0)
    if scaling["rope_type"] == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            f"rotary_scaling's low_freq_factor={scaling['low_freq_factor']} must be below "
            f"high_freq_factor={scaling['high_freq_factor']}"
        )
    return dict(scaling)


def rotary_frequencies(
    head_dim: int,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    length: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Frequencies of rotary positions, one per pair of channels.

    Args:
        head_dim: width of a head.
        base: wavelength base.
        scaling: as configurations of transformers have it, ``{"rope_type": .., ..}``; see :data:`ROTARY_SCALINGS`.
            ``"linear"`` divides positions by ``factor``; ``"dynamic"`` enlarges the base for sequences longer than
            ``original_max_position_embeddings``; ``"llama3"`` slows down long wavelengths only.
        length: (B,) tokens per sample, which ``"dynamic"`` needs.

    Returns:
        (D / 2,) float32, or (B, 1, D / 2) when it depends on ``length``.

    Reference: Peng et al., 2023, arXiv 2309.00071 (rules of thumb before it); Llama 3.1's model card.

    >>> rotary_frequencies(4, 100.0, {"rope_type": "linear", "factor": 2.0}).tolist()
    [0.5, 0.05000000074505806]
    """
    half = head_dim // 2
    at = torch.arange(half, device=device, dtype=torch.float32) / half
    rule = None if scaling is None else scaling["rope_type"]
    if scaling is None or rule is None:
        return base**-at
    factor = scaling["factor"]
    if rule == "linear":
        return base**-at / factor
    most = scaling["original_max_position_embeddings"]
    if rule == "dynamic":
        if length is None:
            raise ValueError("length is needed: the frequencies of dynamic scaling depend on it")
        if head_dim <= 2:
            raise ValueError(f"head_dim={head_dim} must be above 2 for dynamic scaling")
        stretch = factor * length.to(torch.float32) / most - (factor - 1)
        wide = base * stretch.clamp(min=1.0) ** (head_dim / (head_dim - 2))
        return wide[:, None, None] ** -at
    frequency = base**-at
    wavelength = 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((most / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotary_angles(
    pos: Tensor,
    head_dim: int,
    base: float = 10000.0,
    grid: Sequence[int] | None = None,
    scaling: Mapping[str, Any] | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """Angles of rotary embedding in one, two or three dimensions.

    Args:
        pos: (..., N) integer positions, or (..., N, r) coordinates when ``grid`` rotary is wanted.
        head_dim: width of a head; ``head_dim / 2`` angles are split evenly over the axes.
        base: wavelength base.
        grid: pass any r-tuple to read ``pos`` as coordinates.
        scaling, length: see :func:`rotary_frequencies`; not with a grid.

    Returns:
        (..., N, head_dim / 2) float32 angles.

    Reference: Su et al., 2021, arXiv 2104.09864.
    """
    check_tensor("pos", pos)
    if pos.dtype == torch.bool or pos.is_complex():
        raise TypeError(f"pos must hold positions, got {describe(pos)}")
    axes = 1 if grid is None else len(check_ints("grid", grid))
    if not axes:
        raise ValueError(f"grid must have at least one axis, got {grid}")
    check_int("head_dim", head_dim, least=1)
    check_real("base", base, above=0)
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim={head_dim} must be a multiple of {2 * axes} for rotary positions on {axes} axes")
    if grid is not None and (pos.dim() < 2 or pos.shape[-1] != axes):
        raise ValueError(f"pos must be (..., N, {axes}) for a grid of {axes} axes, got {tuple(pos.shape)}")
    if not pos.dim():
        raise ValueError("pos must be (..., N), got ()")
    if grid is None:
        return pos.to(torch.float32).unsqueeze(-1) * rotary_frequencies(head_dim, base, scaling, length, pos.device)
    if scaling is not None:
        raise ValueError(f"scaling={dict(scaling)} is not possible with a grid")
    frequency = rotary_frequencies(head_dim // axes, base, device=pos.device)
    return (pos.to(torch.float32).unsqueeze(-1) * frequency).flatten(-2)


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Turn pairs of channels of ``x`` (B, H, N, D) by ``angles`` (N, D/2), (B, N, D/2) or (B, H, N, D/2).

    Pairs are ``(i, i + D/2)`` as in Llama, or neighbours when ``interleaved``. Computed in float32 at least.
    """
    check_float("x", x)
    check_rank("x", x, 4, "(B, H, N, D)")
    check_flag("interleaved", interleaved)
    check_device(x=x, angles=angles)
    check_float("angles", angles)
    check_rank("angles", angles, (2, 3, 4), "(N, D/2), (B, N, D/2) or (B, H, N, D/2)")
    if angles.dim() == 3:
        angles = angles[:, None]
    if x.shape[-1] % 2 or angles.shape[-1] * 2 != x.shape[-1] or angles.shape[-2] not in (1, x.shape[-2]):
        raise ValueError(
            f"angles must be (..., {x.shape[-2]}, {x.shape[-1] // 2}) for x of N={x.shape[-2]} and an even "
            f"D={x.shape[-1]}, got {tuple(angles.shape)}"
        )
    for axis, size in enumerate(angles.shape[:-2]):
        if size not in (1, x.shape[axis]):
            raise ValueError(f"angles {tuple(angles.shape)} do not belong to x {tuple(x.shape)}")
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = angles.cos().to(work.dtype), angles.sin().to(work.dtype)
    if interleaved and x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        # One complex product instead of six real ones; compilers do not take complex numbers.
        pairs = work.unflatten(-1, (-1, 2))
        if pairs.stride(-1) != 1 or pairs.storage_offset() % 2 or any(s % 2 for s in pairs.stride()[:-1]):
            pairs = pairs.contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    if interleaved:
        a, b = work[..., 0::2], work[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
    a, b = work.chunk(2, -1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1).to(x.dtype)


def rotate_grid(x: Tensor, coords: Tensor, base: float) -> Tensor:
    """Rotary positions on a grid: every axis turns an equal part of the channels of x (B, H, N, D).

    Args:
        x: (B, H, N, D).
        coords: (N, r) or (B, N, r).
        base: of wavelengths.
    """
    axes = coords.shape[-1]
    frequency = rotary_frequencies(x.shape[-1] // axes, base, device=x.device)
    angles = (coords.unsqueeze(-1).to(torch.float32) * frequency).to(torch.promote_types(x.dtype, torch.float32))
    parts = zip(x.chunk(axes, -1), angles.unbind(-2), strict=True)
    return torch.cat([rotate(part, turn) for part, turn in parts], -1)


# --------------------------------------------------------------------------------------------------------------------
# Fixed encodings


def sincos(coords: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Fixed sine-cosine encoding of coordinates on any number of axes.

    Args:
        coords: (N, r) coordinates.
        dim: width; must be a multiple of ``2 r``.

    Returns:
        (N, dim) float32, float64 for such coordinates: per axis ``sin`` of all frequencies, then ``cos``.
    """
    check_rank("coords", coords, 2, "(N, r)")
    if coords.is_complex():
        raise TypeError(f"coords must hold coordinates, got {describe(coords)}")
    check_int("dim", dim, least=1)
    check_real("base", base, above=0)
    axes = coords.shape[1]
    if not axes:
        raise ValueError(f"coords must have at least one axis, got {tuple(coords.shape)}")
    if dim % (2 * axes):
        raise ValueError(f"dim={dim} must be a multiple of {2 * axes} for a sine-cosine encoding on {axes} axes")
    half = dim // (2 * axes)
    work = torch.float64 if coords.dtype == torch.float64 else torch.float32
    frequency = base ** (-torch.arange(half, device=coords.device, dtype=work) / half)
    parts = []
    for axis in range(axes):
        angle = coords[:, axis, None].to(work) * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, -1)


def sines(values: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """(..., dim) of angles (...): sine and cosine in turn, at falling frequencies.

    >>> sines(torch.zeros(1), 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    check_divides("2", 2, "dim", dim)
    step = torch.arange(dim // 2, device=values.device, dtype=values.dtype)
    angles = values.unsqueeze(-1) / temperature ** (2 * step / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def resized(table: Tensor, sides: Sequence[int], mode: str = "bicubic", antialias: bool = False) -> Tensor:
    """A table (..., *places) interpolated to other numbers of places, in float32 at least; as it is where they agree.

    Args:
        table: its last ``len(sides)`` axes, one or two, are places.
        sides: new numbers of places.
        mode: ``"bicubic"`` or ``"bilinear"`` (linear on one axis), corners not aligned.
        antialias: low-pass filter before a table is made smaller.
    """
    check_choice("mode", mode, ("bicubic", "bilinear"))
    axes = len(sides)
    if tuple(table.shape[-axes:]) == tuple(sides):
        return table
    flat = table.to(stats_dtype(table.dtype)).reshape(-1, 1, *([1] if axes == 1 else []), *table.shape[-axes:])
    size = [*([1] if axes == 1 else []), *sides]
    made = F.interpolate(flat, size=size, mode=mode, align_corners=False, antialias=antialias)
    return made.reshape(*table.shape[:-axes], *sides).to(table.dtype)
