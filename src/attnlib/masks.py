"""Mask algebra: which pairs of positions may meet.

A mask is a small frozen value defined by one method, :meth:`Mask.pair`, on integer positions. Decoding offsets,
permutations, eviction and packing are therefore all the same call: hand :meth:`Mask.at` the positions. Masks compose
with ``&``, ``|`` and ``~``; they are realised as dense tensors, as FlexAttention ``mask_mod``s or as tile lists.
``True`` always means "may attend".

>>> print(causal() & sliding_window(3))
causal & sliding_window(3)
>>> (causal() & sliding_window(3)).count(4).tolist()
[1, 2, 2, 2]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import (
    check_device,
    check_flag,
    check_grid,
    check_int,
    check_ints,
    check_place,
    check_rank,
    check_real,
    check_serves,
    check_tensors,
    check_type,
    check_valid,
    check_whole,
    check_within,
    describe,
    extremes,
    fixed,
    raised,
    repeated,
    to_tuple,
)
from .grids import Layout
from .types import register_pytree

Classes = tuple[Tensor, Tensor]  # (may some pair of the tile meet, do all pairs of the tile meet)
_KINDS: dict[str, type[Mask]] = {}


class Mask:
    """Base of all masks. A subclass gives ``fields`` (names of its arguments) and :meth:`pair`.

    Arguments are plain values, other masks, or integer/boolean tensors, which may carry the batch as their first axis.
    A constructor assigns each of them once, after which nothing changes: a mask keeps a copy of its own of every
    tensor, under the name with an underscore, and what it shows under the plain name is another copy. Two masks are
    equal when they are of one kind with equal arguments, tensors compared by value.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _KINDS[cls.name] = cls
            register_pytree(cls, _flatten, _unflatten)

    # ---- what a subclass defines

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Boolean tensor: may query position ``q`` of sample ``b``, head ``h`` meet key position ``k``? Broadcasts.

        The signature is that of a FlexAttention ``mask_mod``.
        """
        raise NotImplementedError

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        """For tiles of positions ``q_lo..q_hi`` by ``k_lo..k_hi`` (inclusive): ``(maybe some, certainly all)``.

        May be cautious: ``(True, False)`` is always right.
        """
        shape = torch.broadcast_shapes(q_lo.shape, k_lo.shape)
        some = torch.ones(shape, dtype=torch.bool, device=q_lo.device)
        return some, torch.zeros_like(some)

    def q_tile(self) -> int | None:
        """The number of query rows that this mask treats alike, where it has such a grain."""
        return next((g for a in self._args() if isinstance(a, Mask) and (g := a.q_tile()) is not None), None)

    def extent(self) -> tuple[int | None, int | None]:
        """How many positions of queries and of keys this mask knows, counted from 0; ``None``: any integer."""
        parts = [a.extent() for a in self._args() if isinstance(a, Mask)]
        rows = [n for n, _ in parts if n is not None]
        cols = [m for _, m in parts if m is not None]
        return min(rows) if rows else None, min(cols) if cols else None

    # ---- frozen values

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.fields or name in self.__dict__ or f"_{name}" in self.__dict__:
            raise AttributeError(f"{self.name} is frozen, {name} cannot be set; make a new mask")
        _put(self, name, value.detach().clone() if isinstance(value, Tensor) else value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{self.name} is frozen, {name} cannot be deleted; make a new mask")

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields and f"_{name}" in self.__dict__:
            return self.__dict__[f"_{name}"].clone()
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; it has {list(type(self).fields)}")

    def _args(self) -> list[Any]:
        held = self.__dict__
        return [held[f"_{f}"] if f"_{f}" in held else held[f] for f in self.fields]

    # ---- shape of the mask

    def heads(self) -> int:
        """Number of heads this mask distinguishes (1: the same for all)."""
        return _joint([a.heads() for a in self._args() if isinstance(a, Mask)])

    def batch(self) -> int:
        """Number of samples this mask distinguishes (1: the same for all)."""
        return _joint([a.batch() for a in self._args() if isinstance(a, Mask)])

    def device(self) -> torch.device | None:
        """Where the tensors of this mask lie; ``None`` when it has none."""
        for a in self._args():
            here = a.device if isinstance(a, Tensor) else a.device() if isinstance(a, Mask) else None
            if here is not None:
                return here
        return None

    def to(self, device: torch.device | str) -> Mask:
        """This mask with its tensors on ``device``."""
        check_type("device", device, (torch.device, str), "a torch.device or its name")
        check_place("device", device)
        return _build(type(self), [a.to(device) if isinstance(a, (Tensor, Mask)) else a for a in self._args()])

    def plane(self, b: int, h: int) -> Mask:
        """The mask of sample ``b`` and head ``h`` alone; where it is the same for all, of any of them."""
        for name, number, size in (("b", b, self.batch()), ("h", h, self.heads())):
            check_int(name, number, least=0, most=None if size == 1 else size - 1)
        return self if self.batch() == 1 and self.heads() == 1 else self._plane(b, h)

    def _plane(self, b: int, h: int) -> Mask:
        return _build(type(self), [a.plane(b, h) if isinstance(a, Mask) else a for a in self._args()])

    # ---- at the door

    def anywhere(self) -> bool:
        """Whether it serves any positions, samples, heads and devices, so that nothing needs to be checked."""
        return False

    def check(
        self,
        n: int,
        m: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | None = None,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        name: str = "mask",
    ) -> None:
        """Raise ``ValueError`` unless this mask serves ``n`` queries and ``m`` keys.

        Args:
            batch, heads: of the call; ``None`` to leave them open.
            device: of the call.
            q_pos, k_pos: positions, where they are not ``0..n-1`` and ``0..m-1``. Read on the CPU; on an accelerator
                they are asserted there, without waiting.
        """
        if type(n) is not int or type(m) is not int or n < 0 or m < 0:
            check_int("n", n, least=0)
            check_int("m", m, least=0)
        if batch is not None and type(batch) is not int:
            check_int("batch", batch, least=0)
        if heads is not None and type(heads) is not int:
            check_int("heads", heads, least=0)
        if self.anywhere():
            return
        if batch is not None:
            check_serves(name, self.batch(), batch)
        if heads is not None:
            check_serves(name, self.heads(), heads, "heads")
        self._check_device(device, name)
        if q_pos is None and k_pos is None:
            _check_dense(self, n, m, name)
        rows, cols = self.extent()
        for what, known, size, pos in (("queries", rows, n, q_pos), ("keys", cols, m, k_pos)):
            if known is None:
                continue
            if pos is not None:
                _check_positions(name, self, what, pos, known)
            elif size > known:
                raise ValueError(f"{name}={self!r} knows {what} 0 to {known - 1}, but there are {size}")

    def _check_device(self, device: torch.device | None, name: str = "mask") -> None:
        own = None if device is None else self.device()
        if own is not None and device is not None and own != device and (own.type, device.index) != (device.type, None):
            raise ValueError(
                f"{name}={self!r} lies on {own}, what it is asked for on {device}; move it: mask.to({str(device)!r})"
            )

    # ---- realisations

    def at(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Boolean mask between positions.

        Args:
            q_pos: (N,), (B, N) or (B, H, N) integer positions of the queries.
            k_pos: (M,), (B, M) or (B, H, M) of the keys.

        Returns:
            (N, M) when neither positions nor mask know samples or heads, otherwise (B or 1, H or 1, N, M).

        Raises:
            ValueError: positions that the mask does not know, or of another batch or device.
        """
        for name, pos, axis in (("q_pos", q_pos, "N"), ("k_pos", k_pos, "M")):
            check_whole(name, pos)
            check_rank(name, pos, (1, 2, 3), f"({axis},), (B, {axis}) or (B, H, {axis})")
        check_device(q_pos=q_pos, k_pos=k_pos)
        self._check_device(q_pos.device)
        rows, cols = self.extent()
        for name, pos, known in (("queries", q_pos, rows), ("keys", k_pos, cols)):
            if known is not None:
                _check_positions("mask", self, name, pos, known)
        return self._at(q_pos, k_pos)

    def _at(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        def lift(p: Tensor) -> Tensor:
            return p if p.dim() == 1 else p[:, None] if p.dim() == 2 else p

        q, k = lift(q_pos).unsqueeze(-1), lift(k_pos).unsqueeze(-2)
        batch, heads = self.batch(), self.heads()
        for name, p in (("q_pos", q), ("k_pos", k)):
            if p.dim() == 4 and batch != 1 and p.shape[0] not in (1, batch):
                raise ValueError(f"{name} is for {p.shape[0]} samples, but mask={self!r} is for {batch}")
            if p.dim() == 4 and heads != 1 and p.shape[1] not in (1, heads):
                raise ValueError(f"{name} is for {p.shape[1]} heads, but mask={self!r} is for {heads}")
        if q.dim() == k.dim() == 4:
            for axis, what in ((0, "samples"), (1, "heads")):
                if q.shape[axis] != 1:
                    check_serves("k_pos", k.shape[axis], q.shape[axis], what)
        b = torch.zeros((), dtype=torch.long, device=q.device)
        h = b
        if batch != 1:
            b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
        if heads != 1:
            h = torch.arange(heads, device=q.device).view(1, -1, 1, 1)
        out = self.pair(b, h, q, k)
        if out.dim() == q.dim() == k.dim() == 2 and out.shape == (q.shape[0], k.shape[1]):
            return out
        return torch.broadcast_tensors(out, q, k)[0]  # what works out shapes alone costs a decoding step more

    def dense(self, n: int, m: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """:meth:`at` for queries ``0..n-1`` and keys ``0..m-1``."""
        return self.block((0, n), (0, n if m is None else m), device)

    def block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """:meth:`at` for the queries ``rows[0]..rows[1]-1`` and the keys ``cols[0]..cols[1]-1``."""
        return self._block(rows, cols, self._check_block(rows, cols, device))

    def _block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | None) -> Tensor:
        """:meth:`block` of what :meth:`check` let pass."""
        return self._at(torch.arange(*rows, device=device), torch.arange(*cols, device=device))

    def _check_block(
        self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | str | None
    ) -> torch.device | None:
        known = self.extent()
        for name, span, size in (("queries", rows, known[0]), ("keys", cols, known[1])):
            if not isinstance(span, (tuple, list)) or len(span) != 2:
                argument = "rows" if name == "queries" else "cols"
                raise TypeError(f"{argument} must be (start, stop) of the {name}, got {describe(span)}")
            start, stop = check_int(f"{name}' start", span[0]), check_int(f"{name}' stop", span[1])
            if stop < start:
                raise ValueError(f"{name} {start}..{stop - 1} of a mask: the start must not lie behind the stop")
            if size is not None and (start < 0 or stop > size):
                raise ValueError(f"mask={self!r} knows {name} 0 to {size - 1}, but was asked for {start} to {stop - 1}")
        if device is None:
            return self.device()
        device = check_place("device", device)
        self._check_device(device)
        return device

    def count(self, n: int, m: int | None = None, chunk: int = 1024) -> Tensor:
        """Visible keys of each row: (n,) or (B or 1, H or 1, n). Never assume it is ``m``."""
        keys = (0, n if m is None else m)
        check_int("n", n, least=0)
        check_int("chunk", chunk, least=1)
        rows = [self.block((i, min(i + chunk, n)), keys).sum(-1) for i in range(0, n, chunk)]
        return torch.cat(rows, -1) if rows else self.block((0, 0), keys).sum(-1)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """For ``torch.nn.attention.flex_attention.create_block_mask``."""
        return lambda b, h, q, k: self.pair(b, h, q, k)  # a plain function: bound methods are refused there

    # ---- text form: a string and the tensors it refers to, so that a mask can enter a custom operator

    def lower(self) -> tuple[str, list[Tensor]]:
        """``(spec, tensors)``, from which :func:`raise_mask` rebuilds the mask."""
        tensors: list[Tensor] = []
        return _encode(self, tensors), tensors

    # ---- algebra

    def __and__(self, other: Mask | Tensor) -> Mask:
        return And(self, _part("&", other))

    def __rand__(self, other: Tensor) -> Mask:
        return And(_part("&", other), self)

    def __or__(self, other: Mask | Tensor) -> Mask:
        return Or(self, _part("|", other))

    def __ror__(self, other: Tensor) -> Mask:
        return Or(_part("|", other), self)

    def __invert__(self) -> Mask:
        return self.inner if isinstance(self, Not) else Not(self)

    # ---- value semantics

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Mask) or type(self) is not type(other):
            return False
        return all(_same(a, b) for a, b in zip(self._args(), other._args(), strict=True))

    def __hash__(self) -> int:
        # Tensors by shape alone: equal masks must hash alike, and their values stay unread.
        return hash((type(self), *((a.dtype, a.shape) if isinstance(a, Tensor) else a for a in self._args())))

    def __repr__(self) -> str:
        if torch.compiler.is_compiling():
            return self.name  # a tracer knows no text of sizes that it keeps free

        def show(a: Any) -> str:
            return f"tensor{tuple(a.shape)}" if isinstance(a, Tensor) else repr(a)

        return f"{self.name}({', '.join(show(a) for a in self._args())})"

    def picture(self, n: int = 16, m: int | None = None, width: int = 32) -> str:
        """A character picture: ``#`` all pairs of the cell may meet, ``+`` some, ``.`` none."""
        check_int("width", width, least=1)
        grid = self.dense(n, m)
        while grid.dim() > 2:
            grid = grid[0]
        cell = max(1, math.ceil(max(grid.shape) / width))
        lines = []
        for i in range(0, grid.shape[0], cell):
            row = ""
            for j in range(0, grid.shape[1], cell):
                block = grid[i : i + cell, j : j + cell]
                row += "#" if bool(block.all()) else "+" if bool(block.any()) else "."
            lines.append(row)
        return "\n".join(lines)


def _flatten(mask: Mask) -> tuple[list[Any], Any]:
    args = mask._args()
    leaf = [isinstance(a, (Tensor, Mask)) for a in args]
    context = (
        type(mask).name,
        tuple(None if is_leaf else a for a, is_leaf in zip(args, leaf, strict=True)),
        tuple(leaf),
    )
    return [a for a, is_leaf in zip(args, leaf, strict=True) if is_leaf], context


def _build(cls: type[Mask], args: Sequence[Any]) -> Any:
    """A mask from its arguments, without the checks of its constructor."""
    mask = object.__new__(cls)
    for f, a in zip(cls.fields, args, strict=True):
        _put(mask, f, a)
    return mask


def _put(mask: Mask, name: str, value: Any) -> None:
    object.__setattr__(mask, f"_{name}" if isinstance(value, Tensor) else name, value)


def _same(a: Any, b: Any) -> bool:
    """Equal arguments of two masks of one kind."""
    if a is b:
        return True
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device) or a.is_meta:
        return False
    return torch.equal(a, b)


def _joint(sizes: list[int]) -> int:
    """What parts of 1 and of one other size are for together."""
    return next((size for size in sizes if size != 1), 1)


def _part(sign: str, other: Any) -> Mask:
    if not isinstance(other, (Mask, Tensor)):
        raise TypeError(f"a mask can be combined by {sign} with a mask or a boolean tensor, got {describe(other)}")
    return other if isinstance(other, Mask) else Explicit(other)


def _check_dense(mask: Mask, n: int, m: int, name: str) -> None:
    """Raise ``ValueError`` when a dense mask, alone or inside a composition, is not for ``n`` queries, ``m`` keys."""
    if isinstance(mask, Explicit):
        shape = tuple(mask._allowed.shape)
        if shape[-2:] != (n, m):
            hint = "; which keys of a sample exist is valid, (B, M)" if len(shape) == 2 and shape[1] == m else ""
            raise ValueError(f"{name} must be (..., {n}, {m}) for N={n} queries and M={m} keys, got {shape}{hint}")
    elif isinstance(mask, Transposed):
        _check_dense(mask.inner, m, n, name)
    elif not isinstance(mask, (Within, Padded)):
        for part in mask._args():
            if isinstance(part, Mask):
                _check_dense(part, n, m, name)


def _check_positions(name: str, mask: Mask, what: str, pos: Tensor, known: int) -> None:
    """Raise ``ValueError`` unless all of ``pos`` lie in ``0..known-1``."""
    if pos.device.type != "cpu":
        check_within(f"{name}: a position of {what}", pos, known, "position")
        return
    low, high = extremes(pos, (0, known - 1))
    if low < 0 or high >= known:
        bad = low if low < 0 else high
        raise ValueError(f"{name}={mask!r} knows {what} 0 to {known - 1}, but was asked for position {bad}")


def _unflatten(leaves: Any, context: Any) -> Mask:
    name, args, leaf = context
    rest = iter(leaves)
    return _build(_KINDS[name], [next(rest) if is_leaf else a for a, is_leaf in zip(args, leaf, strict=True)])


def _encode(value: Any, tensors: list[Tensor]) -> str:
    # Written out by hand because torch.compile traces this and cannot trace the json package. ``index`` also makes a
    # size that tracers hold symbolic concrete: the grid of a mask is static.
    if isinstance(value, Mask):
        args = ",".join([_encode(a, tensors) for a in value._args()])
        return f'{{"mask":"{value.name}","args":[{args}]}}'
    if isinstance(value, Tensor):
        tensors.append(value)
        return f'{{"tensor":{len(tensors) - 1}}}'
    if isinstance(value, (tuple, list)):
        return f'{{"tuple":[{",".join([_encode(v, tensors) for v in value])}]}}'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, torch.SymInt)):
        return str(fixed(value))
    if isinstance(value, (float, torch.SymFloat)):
        return repr(fixed(value))
    raise TypeError(f"a mask can be lowered when it holds masks, tensors and numbers, not {type(value).__name__}")


def _decode(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(v, tensors) for v in value["tuple"])
    return _build(_KINDS[value["mask"]], [_decode(a, tensors) for a in value["args"]])


def raise_mask(spec: str, tensors: Sequence[Tensor] = ()) -> Mask:
    """The mask that :meth:`Mask.lower` described; ``ValueError`` for anything else."""
    given = check_tensors("tensors", tensors)
    mask = raised("spec", spec, lambda value: _decode(value, given), "Mask.lower")
    check_type("spec", mask, Mask, "that of a mask")
    if (wanted := spec.count('{"tensor":')) != len(given):
        raise ValueError(f"tensors must be the {wanted} that belong to spec, got {len(given)}")
    return mask


# --------------------------------------------------------------------------------------------------------------------
# Algebra


def _pair_up(left: Mask, right: Mask) -> tuple[Mask, Mask]:
    check_type("left", left, Mask, "an attnlib mask")
    check_type("right", right, Mask, "an attnlib mask")
    for what, one, two in (("samples", left.batch(), right.batch()), ("heads", left.heads(), right.heads())):
        if one != two and 1 not in (one, two):
            raise ValueError(f"{left!r} is for {one} {what}, {right!r} for {two}; they must agree, or one of them be 1")
    here, there = left.device(), right.device()
    if here is not None and there is not None and here != there:
        raise ValueError(f"{left!r} lies on {here}, {right!r} on {there}; move one: mask.to({str(here)!r})")
    return left, right


class And(Mask):
    name, fields = "and", ("left", "right")

    def __init__(self, left: Mask, right: Mask):
        self.left, self.right = _pair_up(left, right)

    def anywhere(self) -> bool:
        return self.left.anywhere() and self.right.anywhere()

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.pair(b, h, q, k) & self.right.pair(b, h, q, k)

    def _block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | None) -> Tensor:
        return self.left._block(rows, cols, device) & self.right._block(rows, cols, device)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        (some, all_), (some2, all2) = self.left.tile(q_lo, q_hi, k_lo, k_hi), self.right.tile(q_lo, q_hi, k_lo, k_hi)
        return some & some2, all_ & all2

    def __repr__(self) -> str:
        return f"{self.left!r} & {self.right!r}"


class Or(Mask):
    name, fields = "or", ("left", "right")

    def __init__(self, left: Mask, right: Mask):
        self.left, self.right = _pair_up(left, right)

    def anywhere(self) -> bool:
        return self.left.anywhere() and self.right.anywhere()

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.pair(b, h, q, k) | self.right.pair(b, h, q, k)

    def _block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | None) -> Tensor:
        return self.left._block(rows, cols, device) | self.right._block(rows, cols, device)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        (some, all_), (some2, all2) = self.left.tile(q_lo, q_hi, k_lo, k_hi), self.right.tile(q_lo, q_hi, k_lo, k_hi)
        return some | some2, all_ | all2

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


class Not(Mask):
    name, fields = "not", ("inner",)

    def __init__(self, inner: Mask):
        check_type("inner", inner, Mask, "an attnlib mask")
        self.inner = inner

    def anywhere(self) -> bool:
        return self.inner.anywhere()

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner.pair(b, h, q, k)

    def _block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | None) -> Tensor:
        return ~self.inner._block(rows, cols, device)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        some, all_ = self.inner.tile(q_lo, q_hi, k_lo, k_hi)
        return ~all_, ~some

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


def holds_dense(mask: Mask) -> bool:
    """Whether any part of a mask is a table of pairs.

    >>> holds_dense(causal() & explicit(torch.ones(2, 2, dtype=torch.bool)))
    True
    """
    return isinstance(mask, Explicit) or any(isinstance(a, Mask) and holds_dense(a) for a in mask._args())


# --------------------------------------------------------------------------------------------------------------------
# Sequences


class Causal(Mask):
    """Keys up to the query's own position."""

    name = "causal"

    def anywhere(self) -> bool:
        return True

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        return q_hi >= k_lo, q_lo >= k_hi

    def __repr__(self) -> str:
        return "causal"


class SlidingWindow(Mask):
    """``window`` consecutive keys around the query; with even ``window`` the extra one is on the left."""

    name, fields = "sliding_window", ("window",)

    def __init__(self, window: int):
        self.window = check_int("window", window, least=1)

    def anywhere(self) -> bool:
        return True

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        left, right = self.window // 2, (self.window - 1) // 2
        return (k >= q - left) & (k <= q + right)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        left, right = self.window // 2, (self.window - 1) // 2
        some = (k_hi >= q_lo - left) & (k_lo <= q_hi + right)
        return some, (k_lo >= q_hi - left) & (k_hi <= q_lo + right)


class Recent(Mask):
    """The query itself and the ``window - 1`` keys before it."""

    name, fields = "recent", ("window",)

    def __init__(self, window: int):
        self.window = check_int("window", window, least=1)

    def anywhere(self) -> bool:
        return True

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - self.window)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        return (k_lo <= q_hi) & (k_hi > q_lo - self.window), (k_hi <= q_lo) & (k_lo > q_hi - self.window)


class Terraced(Mask):
    """Blocks of ``window``: the own block and ``previous`` whole blocks before it, up to the query."""

    name, fields = "terraced", ("window", "previous")

    def __init__(self, window: int, previous: int = 1):
        self.window, self.previous = check_int("window", window, least=1), check_int("previous", previous, least=0)

    def anywhere(self) -> bool:
        return True

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q // self.window - k // self.window <= self.previous)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        w = self.window
        some = (k_lo <= q_hi) & (q_lo // w - k_hi // w <= self.previous)
        return some, (k_hi <= q_lo) & (q_hi // w - k_lo // w <= self.previous)


class PrefixLM(Mask):
    """Causal, except that the first ``prefix`` keys are visible to all. ``prefix`` is an int or a (B,) tensor."""

    name, fields = "prefix_lm", ("prefix",)

    def __init__(self, prefix: int | Tensor):
        self.prefix = _per_sample("prefix", prefix, 0)

    def batch(self) -> int:
        prefix = self._args()[0]
        return prefix.shape[0] if isinstance(prefix, Tensor) else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | (k < _of_sample(self._args()[0], b))

    def _plane(self, b: int, h: int) -> Mask:
        return _build(PrefixLM, [self._args()[0][b : b + 1]]) if self.batch() > 1 else self

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        low, high = _span(self._args()[0])
        return (q_hi >= k_lo) | (k_lo < high), (q_lo >= k_hi) | (k_hi < low)


def _per_sample(name: str, value: Any, least: int) -> Any:
    """An integer of at least ``least``, or a tensor (B,) of them."""
    if not isinstance(value, Tensor):
        return check_int(name, value, least=least, also="or a tensor (B,) of such")
    check_whole(name, value, "an integer or an integer tensor (B,)")
    check_rank(name, value, 1, "(B,)")
    low, _ = extremes(value, (least, least))
    if low < least:
        raise ValueError(f"{name} must hold integers of at least {least}, got {low}")
    return value


def _span(values: int | Tensor) -> tuple[int, int]:
    """The least and the greatest of an integer per sample."""
    return (int(values.min()), int(values.max())) if isinstance(values, Tensor) else (values, values)


def _of_sample(values: Any, b: Tensor) -> Any:
    """``values`` (B,) of sample ``b``; a single one, or a plain number, serves every sample."""
    if not isinstance(values, Tensor):
        return values
    return values[b] if values.shape[0] != 1 else values[0]


def _of_token(values: Tensor, b: Tensor, pos: Tensor) -> Tensor:
    """``values`` (N,) or (B, N) at position ``pos`` of sample ``b``."""
    if values.dim() == 2 and values.shape[0] != 1:
        return values[b, pos]
    return values.reshape(-1)[pos]


def _extremes(values: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of ``values`` (B, N) over the positions ``lo..hi``, each (B, *lo.shape)."""
    low, high = [values], [values]  # level j holds the extremes of 2**j neighbours
    while 2 ** len(low) <= values.shape[1]:
        step = 2 ** (len(low) - 1)
        low.append(torch.minimum(low[-1][:, :-step], low[-1][:, step:]))
        high.append(torch.maximum(high[-1][:, :-step], high[-1][:, step:]))
    level = torch.zeros_like(lo)
    for j in range(1, len(low)):
        level = torch.where(hi - lo + 1 >= 2**j, torch.full_like(level, j), level)
    least, most = None, None
    for j, (a, z) in enumerate(zip(low, high, strict=True)):
        start, end = lo.clamp(max=a.shape[1] - 1), (hi - 2**j + 1).clamp(0, a.shape[1] - 1)
        here_least, here_most = torch.minimum(a[:, start], a[:, end]), torch.maximum(z[:, start], z[:, end])
        least = here_least if least is None else torch.where(level == j, here_least, least)
        most = here_most if most is None else torch.where(level == j, here_most, most)
    assert least is not None and most is not None
    return least, most


class Document(Mask):
    """Packed documents: a pair meets when both tokens carry the same number. ``ids`` is (N,) or (B, N)."""

    name, fields = "document", ("ids",)

    def __init__(self, ids: Tensor):
        check_whole("ids", ids, "an integer tensor (N,) or (B, N)")
        check_rank("ids", ids, (1, 2), "(N,) or (B, N)")
        self.ids = ids

    def extent(self) -> tuple[int | None, int | None]:
        return self._ids.shape[-1], self._ids.shape[-1]

    def batch(self) -> int:
        return self._ids.shape[0] if self._ids.dim() == 2 else 1

    def _plane(self, b: int, h: int) -> Mask:
        return _build(Document, [self._ids[b]]) if self.batch() > 1 else self

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _of_token(self._ids, b, q) == _of_token(self._ids, b, k)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        ids = self._ids.reshape(-1, self._ids.shape[-1])
        (q_min, q_max), (k_min, k_max) = _extremes(ids, q_lo, q_hi), _extremes(ids, k_lo, k_hi)
        some = (q_min <= k_max) & (k_min <= q_max)
        every = (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
        return some.any(0), every.all(0)


class Strided(Mask):
    """Keys whose position has the query head's residue, plus a local band.

    Head ``h`` sees key ``k`` when ``k % stride == (offset + h * per_head) % stride`` or ``|q - k| < local``.
    """

    name, fields = "strided", ("stride", "offset", "local", "per_head", "num_heads")

    def __init__(self, stride: int, offset: int = 0, local: int = 1, per_head: int = 0, num_heads: int = 1):
        self.stride, self.local = check_int("stride", stride, least=1), check_int("local", local, least=0)
        self.offset, self.per_head = check_int("offset", offset), check_int("per_head", per_head)
        self.num_heads = check_int("num_heads", num_heads, least=1)

    def heads(self) -> int:
        return self.num_heads if self.per_head else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on_stride = k % self.stride == (self.offset + h * self.per_head) % self.stride
        return on_stride | ((q - k).abs() < self.local)

    def _plane(self, b: int, h: int) -> Mask:
        offset = (self.offset + h * self.per_head) % self.stride
        return Strided(self.stride, offset, self.local) if self.heads() > 1 else self

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        gap = torch.maximum(k_lo - q_hi, q_lo - k_hi).clamp(min=0)
        reach = torch.maximum(k_hi - q_lo, q_hi - k_lo)
        some, every = gap < self.local, (reach < self.local) | (self.stride == 1)
        if self.heads() > 1:
            return torch.ones_like(some), every
        return some | ((self.offset - k_lo) % self.stride <= k_hi - k_lo), every


class Padded(Mask):
    """A mask of the tokens of ``grid``, on the numbers they have in ``full``: the grid with more tokens at its ends.

    Tokens that were added meet nothing.
    """

    name = "padded"
    fields = ("inner", "grid", "full")

    def __init__(self, inner: Mask, grid: Sequence[int], full: Sequence[int]):
        self.inner, self.grid, self.full = inner, check_ints("grid", grid, least=1), check_ints("full", full, least=1)

    def extent(self) -> tuple[int | None, int | None]:
        return (math.prod(self.full),) * 2

    def _in_grid(self, at: Tensor) -> tuple[Tensor, Tensor]:
        number, inside, step = torch.zeros_like(at), torch.ones_like(at, dtype=torch.bool), 1
        for side, full in zip(reversed(self.grid), reversed(self.full), strict=True):
            place = at % full
            inside = inside & (place < side)
            number = number + place.clamp(max=side - 1) * step
            at, step = at // full, step * side
        return number, inside

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        (q, q_inside), (k, k_inside) = self._in_grid(q), self._in_grid(k)
        return self.inner.pair(b, h, q, k) & q_inside & k_inside


class Transposed(Mask):
    """A mask with its two sides exchanged: ``q`` meets ``k`` where the other mask lets query ``k`` meet key ``q``."""

    name, fields = "transposed", ("inner",)

    def __init__(self, inner: Mask):
        self.inner = inner

    def anywhere(self) -> bool:
        return self.inner.anywhere()

    def extent(self) -> tuple[int | None, int | None]:
        return self.inner.extent()[::-1]

    def q_tile(self) -> int | None:
        return None

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.pair(b, h, k, q)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        return self.inner.tile(k_lo, k_hi, q_lo, q_hi)

    def _block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | None) -> Tensor:
        return self.inner._block(cols, rows, device).mT


class Everything(Mask):
    """Every pair may meet."""

    name = "everything"

    def anywhere(self) -> bool:
        return True

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= 0) | (q < 0) | (k >= 0)  # true, in the shape of the pairs

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        shape = torch.broadcast_shapes(q_lo.shape, k_lo.shape)
        every = torch.ones(shape, dtype=torch.bool, device=q_lo.device)
        return every, every


class Explicit(Mask):
    """A dense boolean tensor (N, M), (B, N, M) or (B, H, N, M), looked up by position."""

    name, fields = "explicit", ("allowed",)

    def __init__(self, allowed: Tensor):
        self.allowed = _grid_of("mask tensor", allowed)

    def extent(self) -> tuple[int | None, int | None]:
        return self._allowed.shape[-2], self._allowed.shape[-1]

    def batch(self) -> int:
        return self._allowed.shape[0] if self._allowed.dim() == 4 else 1

    def heads(self) -> int:
        return self._allowed.shape[1] if self._allowed.dim() == 4 else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _cell(self._allowed, b, h, q, k)

    def _block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | None) -> Tensor:
        return self._allowed[..., slice(*rows), slice(*cols)]

    def _plane(self, b: int, h: int) -> Mask:
        return _build(Explicit, [_plane_of(self._allowed, b, h)])


def _grid_of(name: str, value: Any, rows: str = "N", cols: str = "M") -> Tensor:
    """A boolean tensor (N, M), (B, N, M) or (B, H, N, M), the second brought to the third's form."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean (True: may attend), got {describe(value)}")
    check_rank(name, value, (2, 3, 4), f"({rows}, {cols}), (B, {rows}, {cols}) or (B, H, {rows}, {cols})")
    if value.dim() > 2 and all(size == 1 for size in value.shape[:-2]):
        return value.reshape(value.shape[-2:])  # the same for all
    return value[:, None] if value.dim() == 3 else value


def _cell(grid: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if grid.dim() == 2:
        return grid[q, k]
    b = b if grid.shape[0] != 1 else torch.zeros_like(b)
    h = h if grid.shape[1] != 1 else torch.zeros_like(h)
    return grid[b, h, q, k]


def _plane_of(grid: Tensor, b: int, h: int) -> Tensor:
    """(N, M) of sample ``b`` and head ``h`` in a tensor (N, M) or (B or 1, H or 1, N, M)."""
    if grid.dim() == 2:
        return grid
    return grid[b if grid.shape[0] > 1 else 0, h if grid.shape[1] > 1 else 0]


class Blocks(Mask):
    """Chosen (query block, key block) pairs: ``chosen`` is boolean (nq, nk), (B, nq, nk) or (B, H, nq, nk)."""

    name, fields = "blocks", ("chosen", "q_block", "k_block")

    def __init__(self, chosen: Tensor, q_block: int, k_block: int):
        self.chosen = _grid_of("chosen", chosen, "nq", "nk")
        self.q_block, self.k_block = check_int("q_block", q_block, least=1), check_int("k_block", k_block, least=1)

    def extent(self) -> tuple[int | None, int | None]:
        return self._chosen.shape[-2] * self.q_block, self._chosen.shape[-1] * self.k_block

    def batch(self) -> int:
        return self._chosen.shape[0] if self._chosen.dim() == 4 else 1

    def heads(self) -> int:
        return self._chosen.shape[1] if self._chosen.dim() == 4 else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _cell(self._chosen, b, h, q // self.q_block, k // self.k_block)

    def _plane(self, b: int, h: int) -> Mask:
        return _build(Blocks, [_plane_of(self._chosen, b, h), self.q_block, self.k_block])

    def q_tile(self) -> int | None:
        return self.q_block

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        chosen = self._chosen if self._chosen.dim() == 2 else self._chosen.flatten(0, 1)
        some, every = (chosen, chosen) if chosen.dim() == 2 else (chosen.any(0), chosen.all(0))

        # Number of chosen blocks inside a rectangle, from an integral image.
        def inside(grid: Tensor) -> Tensor:
            table = torch.nn.functional.pad(grid.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
            q0, q1 = q_lo // self.q_block, (q_hi // self.q_block + 1).clamp(max=grid.shape[0])
            k0, k1 = k_lo // self.k_block, (k_hi // self.k_block + 1).clamp(max=grid.shape[1])
            return table[q1, k1] - table[q0, k1] - table[q1, k0] + table[q0, k0]

        area = (q_hi // self.q_block - q_lo // self.q_block + 1) * (k_hi // self.k_block - k_lo // self.k_block + 1)
        return inside(some) > 0, inside(every) == area


# --------------------------------------------------------------------------------------------------------------------
# Grids


def _unravel(pos: Tensor, grid: Sequence[int]) -> list[Tensor]:
    out = []
    for size in reversed(grid):
        out.append(pos % size)
        pos = pos // size
    return out[::-1]


def _ranges(lo: Tensor, hi: Tensor, grid: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Per axis, bounds of the coordinates of the flat positions ``lo..hi``; whole where the run wraps around."""
    out = []
    outer_same = torch.ones_like(lo, dtype=torch.bool)
    inner = math.prod(grid)
    for size in grid:
        inner //= size
        low, high = lo // inner % size, hi // inner % size
        out.append((torch.where(outer_same, low, 0), torch.where(outer_same, high, size - 1)))
        outer_same = outer_same & (lo // inner == hi // inner)
    return out


def check_neighborhood(
    grid: Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    causal: bool | Sequence[bool],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Settings of a neighborhood whose windows are clamped at the borders, one of each per axis, checked."""
    grid = check_grid("grid", grid)
    kernels = check_ints("kernel_size", to_tuple("kernel_size", kernel, len(grid)))
    dilations = check_ints("dilation", to_tuple("dilation", dilation, len(grid)))
    strides = check_ints("stride", to_tuple("stride", stride, len(grid)))
    flags = tuple([check_flag("causal", c) for c in to_tuple("causal", causal, len(grid))])
    for axis, (x, w, d, s) in enumerate(zip(grid, kernels, dilations, strides, strict=True)):
        if w < 2:
            raise ValueError(f"kernel_size={w} on axis {axis} is too small; at least 2 is needed")
        if d < 1 or w * d > x:
            raise ValueError(
                f"kernel_size={w} with dilation={d} spans {w * d} tokens, but axis {axis} of the grid {grid} "
                f"has {x}; possible: dilation from 1 to {x // w}"
                if w <= x
                else f"kernel_size={w} is larger than the grid {grid} on axis {axis}"
            )
        if not 1 <= s <= w:
            raise ValueError(f"stride={s} on axis {axis} must be between 1 and kernel_size={w}")
    return grid, kernels, dilations, strides, flags


class Neighborhood(Mask):
    """Neighborhood attention on a row-major grid, 1-3 D: kernel, dilation, stride and causality per axis.

    Bidirectional axes always see ``kernel`` keys: the window is clamped at the borders. Causal axes see up to
    ``kernel`` keys ending at the query. With ``stride`` > 1 queries share the window of their group's leader. Dilation
    comes first: tokens meet only within their residue class.
    """

    name, fields = "neighborhood", ("grid", "kernel", "dilation", "stride", "causal")

    def __init__(
        self,
        grid: Sequence[int],
        kernel: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ):
        checked = check_neighborhood(grid, kernel, dilation, stride, causal)
        self.grid, self.kernel, self.dilation, self.stride, self.causal = checked

    def extent(self) -> tuple[int | None, int | None]:
        return math.prod(self.grid), math.prod(self.grid)

    def window(self, axis: int, i: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        """First and last key (inclusive) of query ``i`` in a residue class of ``length`` tokens."""
        w, s = self.kernel[axis], self.stride[axis]
        last = torch.as_tensor(length) - 1
        if self.causal[axis]:
            leader = torch.minimum(i // s * s + s - 1, last)
            return (leader - w + 1).clamp(min=0), i
        left, right = w // 2, w // 2 + w % 2 - 1
        leader = torch.minimum(i // s * s + s // 2, last)
        centre = torch.minimum(leader.clamp(min=left), last - right)
        return centre - left, centre + right

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        out = None
        for axis, (qx, kx) in enumerate(zip(_unravel(q, self.grid), _unravel(k, self.grid), strict=True)):
            d, size = self.dilation[axis], self.grid[axis]
            group = qx % d
            length = size // d + (group < size % d).long()
            first, last = self.window(axis, qx // d, length)
            j = kx // d
            here = (kx % d == group) & (j >= first) & (j <= last)
            out = here if out is None else out & here
        assert out is not None
        return out

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        # A window always holds its query, so that no key is further than the window is wide.
        some = torch.ones(torch.broadcast_shapes(q_lo.shape, k_lo.shape), dtype=torch.bool, device=q_lo.device)
        axes = zip(_ranges(q_lo, q_hi, self.grid), _ranges(k_lo, k_hi, self.grid), strict=True)
        for axis, ((q0, q1), (k0, k1)) in enumerate(axes):
            reach = (self.kernel[axis] - 1) * self.dilation[axis]
            some = some & (k1 >= q0 - reach) & (k0 <= (q1 if self.causal[axis] else q1 + reach))
        return some, torch.zeros_like(some)


class CausalFrames(Mask):
    """Query ``i`` of ``queries`` reads frames up to ``max(floor(i T / N), floor((i + 1) T / N) - 1)`` of ``size`` keys.

    N queries, T frames (an int, or (B,) for samples of unlike length). The first query reads the first frame and the
    last one all of them; with one frame everybody reads everything; where there are more frames than queries they come
    several at a time.
    """

    name, fields = "causal_frames", ("queries", "frames", "size")

    def __init__(self, queries: int, frames: int | Tensor, size: int):
        self.queries, self.size = check_int("queries", queries, least=1), check_int("size", size, least=1)
        self.frames = _per_sample("frames", frames, 1)

    def extent(self) -> tuple[int | None, int | None]:
        # Samples of unlike length: keys behind the last frame of a sample are those of a longer one, never read.
        frames = self._args()[1]
        return self.queries, None if isinstance(frames, Tensor) else frames * self.size

    def batch(self) -> int:
        frames = self._args()[1]
        return frames.shape[0] if isinstance(frames, Tensor) else 1

    def _plane(self, b: int, h: int) -> Mask:
        if self.batch() == 1:
            return self
        return _build(CausalFrames, [self.queries, self._args()[1][b : b + 1], self.size])

    def _last(self, q: Tensor, frames: int | Tensor) -> Tensor:
        # The second term is larger only where there are more frames than queries.
        return torch.maximum(q * frames // self.queries, (q + 1) * frames // self.queries - 1)

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k // self.size <= self._last(q, _of_sample(self._args()[1], b))

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        low, high = _span(self._args()[1])
        return k_lo // self.size <= self._last(q_hi, high), k_hi // self.size <= self._last(q_lo, low)


class CircularWindow(Mask):
    """Keys inside a circle: squared distance on the grid strictly below ``radius ** 2``."""

    name, fields = "circular_window", ("grid", "radius")

    def __init__(self, grid: Sequence[int], radius: float):
        self.grid, self.radius = check_grid("grid", grid), check_real("radius", radius, above=0)

    def extent(self) -> tuple[int | None, int | None]:
        return math.prod(self.grid), math.prod(self.grid)

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        total = None
        for qx, kx in zip(_unravel(q, self.grid), _unravel(k, self.grid), strict=True):
            here = (qx - kx) ** 2
            total = here if total is None else total + here
        assert total is not None
        return total < self.radius**2

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        near: Tensor | int = 0
        far: Tensor | int = 0
        axes = zip(_ranges(q_lo, q_hi, self.grid), _ranges(k_lo, k_hi, self.grid), strict=True)
        for (q0, q1), (k0, k1) in axes:
            near = near + torch.maximum(k0 - q1, q0 - k1).clamp(min=0) ** 2
            far = far + torch.maximum(k1 - q0, q1 - k0) ** 2
        assert isinstance(near, Tensor) and isinstance(far, Tensor)
        return near < self.radius**2, far < self.radius**2


# --------------------------------------------------------------------------------------------------------------------
# Types of tokens


class Modality(Mask):
    """``rule[type of query][type of key]``; ``types`` is (N,) or (B, N) int64 by position."""

    name, fields = "modality", ("types", "rule")

    def __init__(self, types: Tensor, rule: Sequence[Sequence[bool]]):
        check_whole("types", types, "an integer tensor (N,) or (B, N)")
        check_rank("types", types, (1, 2), "(N,) or (B, N)")
        self.rule = _square_rule(rule)
        low, high = extremes(types, (0, 0))
        if low < 0 or high >= len(self.rule):
            raise ValueError(f"types holds {low if low < 0 else high}, but rule knows types 0 to {len(self.rule) - 1}")
        self.types = types

    def extent(self) -> tuple[int | None, int | None]:
        return self._types.shape[-1], self._types.shape[-1]

    def batch(self) -> int:
        return self._types.shape[0] if self._types.dim() == 2 else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = torch.tensor(self.rule, device=self._types.device)
        return table[_of_token(self._types, b, q), _of_token(self._types, b, k)]

    def _plane(self, b: int, h: int) -> Mask:
        return _build(Modality, [self._types[b], self.rule]) if self.batch() > 1 else self

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        types = self._types.reshape(-1, self._types.shape[-1])
        some = torch.zeros(torch.broadcast_shapes(q_lo.shape, k_lo.shape), dtype=torch.bool, device=types.device)
        every = ~some
        for i, row in enumerate(self.rule):
            q_has = _extremes((types == i).long(), q_lo, q_hi)[1] > 0
            for j, allowed in enumerate(row):
                meet = (q_has & (_extremes((types == j).long(), k_lo, k_hi)[1] > 0)).any(0)
                some, every = (some | meet, every) if allowed else (some, every & ~meet)
        return some, every


def _square_rule(rule: Any) -> tuple[tuple[bool, ...], ...]:
    rows = rule.tolist() if isinstance(rule, Tensor) and rule.dim() == 2 else rule
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(r, (list, tuple)) for r in rows):
        raise TypeError(f"rule must be rows of True and False, rule[type of query][type of key], got {describe(rule)}")
    if {len(row) for row in rows} != {len(rows)}:
        raise ValueError(f"rule must be square, got rows of lengths {[len(r) for r in rows]}")
    return tuple(tuple([check_flag(f"rule[{i}][{j}]", v) for j, v in enumerate(row)]) for i, row in enumerate(rows))


class Within(Mask):
    """``inner`` between tokens ``start..stop-1`` (with positions counted from ``start``); all other pairs may meet."""

    name, fields = "within", ("inner", "start", "stop")

    def __init__(self, inner: Mask, start: int, stop: int):
        check_type("inner", inner, Mask, "an attnlib mask")
        check_int("start", start, least=0)
        check_int("stop", stop, least=start)
        for known in inner.extent():
            if known is not None and known < stop - start:
                raise ValueError(f"inner={inner!r} knows {known} positions, but {start}..{stop - 1} are {stop - start}")
        self.inner, self.start, self.stop = inner, start, stop

    def extent(self) -> tuple[int | None, int | None]:
        return None, None

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.stop == self.start:
            return Everything().pair(b, h, q, k)
        top = self.stop - self.start - 1
        q_in, k_in = (q >= self.start) & (q < self.stop), (k >= self.start) & (k < self.stop)
        inner = self.inner.pair(b, h, (q - self.start).clamp(0, top), (k - self.start).clamp(0, top))
        return ~q_in | ~k_in | inner

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        if self.stop == self.start:
            return Everything().tile(q_lo, q_hi, k_lo, k_hi)
        last = self.stop - 1
        q_out, k_out = (q_hi < self.start) | (q_lo > last), (k_hi < self.start) | (k_lo > last)
        sticks_out = (q_lo < self.start) | (q_hi > last) | (k_lo < self.start) | (k_hi > last)
        inside = [(p.clamp(self.start, max(self.start, last)) - self.start) for p in (q_lo, q_hi, k_lo, k_hi)]
        some, every = self.inner.tile(*inside)
        return some | sticks_out, every | q_out | k_out


# --------------------------------------------------------------------------------------------------------------------
# The names people call


def causal() -> Mask:
    """Keys up to the query's own position."""
    return Causal()


def sliding_window(window: int) -> Mask:
    """``window`` consecutive keys centred on the query (one more on the left when even)."""
    return SlidingWindow(window)


def recent(window: int) -> Mask:
    """Causal sliding window: the query and the ``window - 1`` keys before it."""
    return Recent(window)


def terraced(window: int, previous: int = 1) -> Mask:
    """Causal within blocks of ``window``, plus ``previous`` whole blocks before."""
    return Terraced(window, previous)


def prefix_lm(prefix: int | Tensor) -> Mask:
    """Causal with a bidirectional prefix of ``prefix`` tokens, an int or (B,)."""
    return PrefixLM(prefix)


def document(cu_seqlens: Tensor | Sequence[int]) -> Mask:
    """Packed sequences with cumulative lengths ``[0, n1, n1 + n2, ...]``.

    >>> print(document([0, 2, 3]).picture(3))
    ##.
    ##.
    ..#
    """
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.tensor(check_ints("cu_seqlens", cu_seqlens), dtype=torch.long)
    check_whole("cu_seqlens", cu_seqlens)
    check_rank("cu_seqlens", cu_seqlens, 1, "(documents + 1,)")
    ends = cu_seqlens
    if ends.is_meta:
        raise ValueError("cu_seqlens must hold numbers that can be read, got a tensor on meta")
    if len(ends) < 2 or int(ends[0]) != 0 or bool((ends.long().diff() < 0).any()):
        raise ValueError(f"cu_seqlens must be non-decreasing and start at 0, got {describe(ends.tolist())}")
    lengths = ends.diff()
    return Document(torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths))


def documents(ids: Tensor) -> Mask:
    """Packed sequences given by a number per token, (N,) or (B, N)."""
    return Document(ids)


def neighborhood(
    grid: Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Mask:
    """Neighborhood attention's pattern; see :class:`Neighborhood`."""
    return Neighborhood(grid, kernel, dilation, stride, causal)


def strided(stride: int, offset: int = 0, local: int = 1, per_head: int = 0, num_heads: int = 1) -> Mask:
    """Every ``stride``-th key plus a local band; see :class:`Strided`."""
    return Strided(stride, offset, local, per_head, num_heads)


def modality(types: Tensor, rule: Sequence[Sequence[bool]]) -> Mask:
    """Which type of token reads which; see :class:`Modality`."""
    return Modality(types, rule)


def circular_window(grid: Sequence[int], radius: float) -> Mask:
    """Circle of ``radius`` on a grid, boundary excluded."""
    return CircularWindow(grid, radius)


def causal_frames(queries: int, frames: int | Tensor, size: int) -> Mask:
    """Cross-attention from learned queries to the frames of a video: later queries read more frames.

    Args:
        queries: N.
        frames: T, or (B,) for samples of unlike length.
        size: tokens of a frame; keys are ordered frame by frame.

    Returns:
        A mask on query positions 0 to N-1 and key positions 0 to T * size - 1, each row containing the one before.

    Reference: Fei et al., 2024, arXiv 2408.14023, section 3.2 (causal cross-attention masks).

    >>> print(causal_frames(4, 2, 2).picture(4, 4))
    ##..
    ##..
    ####
    ####
    """
    return CausalFrames(queries, frames, size)


def explicit(allowed: Tensor) -> Mask:
    """A boolean tensor as a mask."""
    return Explicit(allowed)


def blocks(chosen: Tensor, q_block: int, k_block: int) -> Mask:
    """Chosen pairs of blocks as a mask."""
    return Blocks(chosen, q_block, k_block)


def on_segment(layout: Layout, name: str, inner: Mask) -> Mask:
    """``inner`` inside one segment of a layout; tokens outside it attend and are attended globally."""
    check_type("layout", layout, Layout)
    return Within(inner, *layout.span(name))


def visible_keys(
    mask: Mask | Tensor | None,
    n: int,
    m: int,
    valid: Tensor | None = None,
    q_pos: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """How many keys each query sees: (B or 1, H or 1, N, 1), for ``n`` queries and ``m`` keys of which ``valid`` exist.

    >>> visible_keys(causal(), 3, 3).flatten().tolist()
    [1, 2, 3]
    """
    check_int("n", n, least=0)
    check_int("m", m, least=0)
    device = check_place("device", device)
    if valid is not None:
        check_valid("valid", valid, (valid.shape[0] if isinstance(valid, Tensor) and valid.dim() else 1, m))
    if q_pos is not None:
        check_whole("q_pos", q_pos)
        if q_pos.dim() not in (1, 2, 3) or q_pos.shape[-1] != n:
            raise ValueError(f"q_pos must be (N,), (B, N) or (B, H, N) with N={n}, got {tuple(q_pos.shape)}")
    given = {"valid": valid, "q_pos": q_pos}
    check_device(**given)
    device = next((t.device for t in given.values() if t is not None), device)
    mask = as_mask(mask) if q_pos is not None else as_mask(mask, n, m)
    if mask is None:
        count = torch.full((1, 1), m, device=device) if valid is None else valid.sum(1, keepdim=True)
        return count[:, None, None].expand(-1, -1, n, -1)
    at = torch.arange(n, device=device) if q_pos is None else q_pos
    if isinstance(mask, Causal) and at.dim() == 1:
        if valid is None:
            return (at + 1).clamp(0, m)[None, None, :, None]
        return valid.cumsum(1)[:, at.clamp(max=m - 1)][:, None, :, None]
    mask.check(n, m, batch=None if valid is None else valid.shape[0], device=at.device, q_pos=q_pos)
    seen = mask.at(at, torch.arange(m, device=device))
    seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
    return (seen if valid is None else seen & valid[:, None, None]).sum(-1, keepdim=True)


def as_mask(mask: Mask | Tensor | None, n: int | None = None, m: int | None = None) -> Mask | None:
    """Accept a boolean tensor where a mask is meant; for a call of ``n`` queries and ``m`` keys sides of 1 serve all.

    >>> as_mask(torch.ones(2, 1, 1, 5, dtype=torch.bool), 3, 5).extent()
    (3, 5)
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        grid = _grid_of("mask", mask)
        if n is not None and m is not None:
            grid = repeated(grid, n, m)
        return _build(Explicit, [grid])  # for one call: not copied
    raise TypeError(f"mask must be an attnlib mask or a boolean tensor, got {describe(mask)}")
