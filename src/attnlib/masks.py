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

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .grids import Layout
from .types import check_divides, register_pytree, to_tuple

Classes = tuple[Tensor, Tensor]  # (may some pair of the tile meet, do all pairs of the tile meet)
_KINDS: dict[str, type[Mask]] = {}


class Mask:
    """Base of all masks. A subclass gives ``fields`` (names of its arguments) and :meth:`pair`.

    Arguments are plain values, other masks, or integer/boolean tensors; a tensor may carry the batch as its first axis
    when the subclass says so in ``batched``.
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

    # ---- shape of the mask

    def heads(self) -> int:
        """Number of heads this mask distinguishes (1: the same for all)."""
        return max([1, *(a.heads() for a in self._args() if isinstance(a, Mask))])

    def batch(self) -> int:
        """Number of samples this mask distinguishes (1: the same for all)."""
        return max([1, *(a.batch() for a in self._args() if isinstance(a, Mask))])

    def _args(self) -> list[Any]:
        return [getattr(self, f) for f in self.fields]

    def plane(self, b: int, h: int) -> Mask:
        """The mask of sample ``b`` and head ``h`` alone."""
        if self.batch() == 1 and self.heads() == 1:
            return self
        return _build(type(self), [a.plane(b, h) if isinstance(a, Mask) else a for a in self._args()])

    # ---- realisations

    def at(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Boolean mask between positions.

        Args:
            q_pos: (N,), (B, N) or (B, H, N) integer positions of the queries.
            k_pos: (M,), (B, M) or (B, H, M) of the keys.

        Returns:
            (N, M) when neither positions nor mask know samples or heads, otherwise (B or 1, H or 1, N, M).
        """

        def lift(p: Tensor) -> Tensor:
            return p if p.dim() == 1 else p[:, None] if p.dim() == 2 else p

        q, k = lift(q_pos).unsqueeze(-1), lift(k_pos).unsqueeze(-2)
        batch, heads = self.batch(), self.heads()
        b = torch.zeros((), dtype=torch.long, device=q.device)
        h = b
        if batch > 1:
            b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
        if heads > 1:
            h = torch.arange(heads, device=q.device).view(1, -1, 1, 1)
        out = self.pair(b, h, q, k)
        shape = torch.broadcast_shapes(out.shape, q.shape, k.shape)
        return out.expand(shape)

    def dense(self, n: int, m: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """:meth:`at` for queries ``0..n-1`` and keys ``0..m-1``."""
        return self.block((0, n), (0, n if m is None else m), device)

    def block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """:meth:`at` for the queries ``rows[0]..rows[1]-1`` and the keys ``cols[0]..cols[1]-1``."""
        return self.at(torch.arange(*rows, device=device), torch.arange(*cols, device=device))

    def count(self, n: int, m: int | None = None, chunk: int = 1024) -> Tensor:
        """Visible keys of each row: (n,) or (B or 1, H or 1, n). Never assume it is ``m``."""
        keys = (0, n if m is None else m)
        rows = [self.block((i, min(i + chunk, n)), keys).sum(-1) for i in range(0, n, chunk)]
        return torch.cat(rows, -1) if rows else torch.zeros(0, dtype=torch.long)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """For ``torch.nn.attention.flex_attention.create_block_mask``."""
        return lambda b, h, q, k: self.pair(b, h, q, k)  # a plain function: bound methods are refused there

    # ---- text form: a string and the tensors it refers to, so that a mask can enter a custom operator

    def lower(self) -> tuple[str, list[Tensor]]:
        """``(spec, tensors)``, from which :func:`raise_mask` rebuilds the mask."""
        tensors: list[Tensor] = []
        return _encode(self, tensors), tensors

    # ---- algebra

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return self.inner if isinstance(self, Not) else Not(self)

    # ---- value semantics

    def _key(self) -> tuple[Any, ...]:
        return (type(self), *(id(a) if isinstance(a, Tensor) else a for a in self._args()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        def show(a: Any) -> str:
            return f"tensor{tuple(a.shape)}" if isinstance(a, Tensor) else repr(a)

        return f"{self.name}({', '.join(show(a) for a in self._args())})"

    def picture(self, n: int = 16, m: int | None = None, width: int = 32) -> str:
        """A character picture: ``#`` all pairs of the cell may meet, ``+`` some, ``.`` none."""
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
        setattr(mask, f, a)
    return mask


def _unflatten(leaves: Any, context: Any) -> Mask:
    name, args, leaf = context
    rest = iter(leaves)
    return _build(_KINDS[name], [next(rest) if is_leaf else a for a, is_leaf in zip(args, leaf, strict=True)])


def _encode(value: Any, tensors: list[Tensor]) -> str:
    # Written out by hand because torch.compile traces this and cannot trace the json package. ``int`` also makes a
    # size that export holds symbolic concrete: the grid of a mask is static.
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
        return str(int(value))
    if isinstance(value, float):
        return repr(value)
    raise TypeError(f"a mask can be lowered when it holds masks, tensors and numbers, not {type(value).__name__}")


def _decode(value: Any, tensors: Sequence[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(v, tensors) for v in value["tuple"])
    return _build(_KINDS[value["mask"]], [_decode(a, tensors) for a in value["args"]])


def raise_mask(spec: str, tensors: Sequence[Tensor] = ()) -> Mask:
    """The mask that :meth:`Mask.lower` described."""
    return _decode(json.loads(spec), tensors)


# --------------------------------------------------------------------------------------------------------------------
# Algebra


class And(Mask):
    name, fields = "and", ("left", "right")

    def __init__(self, left: Mask, right: Mask):
        self.left, self.right = left, right

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.pair(b, h, q, k) & self.right.pair(b, h, q, k)

    def block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        return self.left.block(rows, cols, device) & self.right.block(rows, cols, device)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        (some, all_), (some2, all2) = self.left.tile(q_lo, q_hi, k_lo, k_hi), self.right.tile(q_lo, q_hi, k_lo, k_hi)
        return some & some2, all_ & all2

    def __repr__(self) -> str:
        return f"{self.left!r} & {self.right!r}"


class Or(Mask):
    name, fields = "or", ("left", "right")

    def __init__(self, left: Mask, right: Mask):
        self.left, self.right = left, right

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.pair(b, h, q, k) | self.right.pair(b, h, q, k)

    def block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        return self.left.block(rows, cols, device) | self.right.block(rows, cols, device)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        (some, all_), (some2, all2) = self.left.tile(q_lo, q_hi, k_lo, k_hi), self.right.tile(q_lo, q_hi, k_lo, k_hi)
        return some | some2, all_ | all2

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


class Not(Mask):
    name, fields = "not", ("inner",)

    def __init__(self, inner: Mask):
        self.inner = inner

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner.pair(b, h, q, k)

    def block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        return ~self.inner.block(rows, cols, device)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        some, all_ = self.inner.tile(q_lo, q_hi, k_lo, k_hi)
        return ~all_, ~some

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


# --------------------------------------------------------------------------------------------------------------------
# Sequences


class Causal(Mask):
    """Keys up to the query's own position."""

    name = "causal"

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
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an integer of at least 1, got {window!r}")
        self.window = window

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
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an integer of at least 1, got {window!r}")
        self.window = window

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - self.window)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        return (k_lo <= q_hi) & (k_hi > q_lo - self.window), (k_hi <= q_lo) & (k_lo > q_hi - self.window)


class Terraced(Mask):
    """Blocks of ``window``: the own block and ``previous`` whole blocks before it, up to the query."""

    name, fields = "terraced", ("window", "previous")

    def __init__(self, window: int, previous: int = 1):
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window, self.previous = window, previous

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
        if isinstance(prefix, Tensor) and prefix.dim() != 1:
            raise ValueError(f"prefix must be an int or a (B,) tensor, got shape {tuple(prefix.shape)}")
        self.prefix = prefix

    def batch(self) -> int:
        return self.prefix.shape[0] if isinstance(self.prefix, Tensor) else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        prefix = _of_sample(self.prefix, b) if isinstance(self.prefix, Tensor) else self.prefix
        return (q >= k) | (k < prefix)

    def plane(self, b: int, h: int) -> Mask:
        return PrefixLM(self.prefix[b : b + 1]) if self.batch() > 1 else self  # type: ignore[index]

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        if isinstance(self.prefix, Tensor):
            low, high = int(self.prefix.min()), int(self.prefix.max())
        else:
            low = high = self.prefix
        return (q_hi >= k_lo) | (k_lo < high), (q_lo >= k_hi) | (k_hi < low)


def _of_sample(values: Tensor, b: Tensor) -> Tensor:
    """``values`` (B,) of sample ``b``; a single one serves every sample."""
    return values[b] if values.shape[0] > 1 else values[0]


def _of_token(values: Tensor, b: Tensor, pos: Tensor) -> Tensor:
    """``values`` (N,) or (B, N) at position ``pos`` of sample ``b``."""
    if values.dim() == 2 and values.shape[0] > 1:
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
        if ids.dim() not in (1, 2) or ids.is_floating_point():
            raise ValueError(f"ids must be an integer tensor (N,) or (B, N), got {ids.dtype} {tuple(ids.shape)}")
        self.ids = ids

    def batch(self) -> int:
        return self.ids.shape[0] if self.ids.dim() == 2 else 1

    def plane(self, b: int, h: int) -> Mask:
        return Document(self.ids[b]) if self.batch() > 1 else self

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _of_token(self.ids, b, q) == _of_token(self.ids, b, k)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        ids = self.ids.reshape(-1, self.ids.shape[-1])
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
        if stride < 1 or local < 0:
            raise ValueError(f"stride must be at least 1 and local at least 0, got stride={stride}, local={local}")
        self.stride, self.offset, self.local, self.per_head, self.num_heads = stride, offset, local, per_head, num_heads

    def heads(self) -> int:
        return self.num_heads if self.per_head else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on_stride = k % self.stride == (self.offset + h * self.per_head) % self.stride
        return on_stride | ((q - k).abs() < self.local)

    def plane(self, b: int, h: int) -> Mask:
        offset = (self.offset + h * self.per_head) % self.stride
        return Strided(self.stride, offset, self.local) if self.heads() > 1 else self

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        gap = torch.maximum(k_lo - q_hi, q_lo - k_hi).clamp(min=0)
        reach = torch.maximum(k_hi - q_lo, q_hi - k_lo)
        some, every = gap < self.local, (reach < self.local) | (self.stride == 1)
        if self.heads() > 1:
            return torch.ones_like(some), every
        return some | ((self.offset - k_lo) % self.stride <= k_hi - k_lo), every


class ShardedContext(Mask):
    """Causal; every head reads a local window and its own stripe of key blocks.

    With blocks of ``block_size`` tokens, head ``h`` lets query block i read key block j up to the query when
    ``i - j < local`` or ``(j + g step + offset) % stride == 0``, where ``g = h // (num_heads / num_patterns)`` is the
    pattern of the head. The last ``num_dense`` patterns read everything.
    """

    name = "sharded_context"
    fields = ("block_size", "local", "stride", "step", "offset", "num_heads", "num_patterns", "num_dense")

    def __init__(
        self,
        block_size: int,
        local: int,
        stride: int,
        step: int = 1,
        offset: int = 0,
        num_heads: int = 1,
        num_patterns: int | None = None,
        num_dense: int = 0,
    ):
        if min(block_size, local, stride, num_heads) < 1 or step < 0:
            raise ValueError(
                "block_size, local, stride and num_heads must be at least 1 and step at least 0, got "
                f"block_size={block_size}, local={local}, stride={stride}, num_heads={num_heads}, step={step}"
            )
        num_patterns = num_heads if num_patterns is None else num_patterns
        check_divides("num_patterns", num_patterns, "num_heads", num_heads)
        if not 0 <= num_dense <= num_patterns:
            raise ValueError(f"num_dense={num_dense} must lie between 0 and num_patterns={num_patterns}")
        self.block_size, self.local, self.stride, self.step, self.offset = block_size, local, stride, step, offset
        self.num_heads, self.num_patterns, self.num_dense = num_heads, num_patterns, num_dense

    def heads(self) -> int:
        return self.num_heads if len(self._stripes()) > 1 else 1

    def _stripes(self) -> set[int | None]:
        """The first key block of each pattern's stripe; ``None`` for patterns that read everything."""
        sparse = self.num_patterns - self.num_dense
        stripes: set[int | None] = {-(g * self.step + self.offset) % self.stride for g in range(sparse)}
        return stripes | {None} if self.num_dense else stripes

    def uncovered(self) -> list[int]:
        """Residues of key blocks modulo ``stride`` that no head reads from afar; empty: heads together see all."""
        stripes = self._stripes()
        return [] if None in stripes else sorted(set(range(self.stride)) - stripes)  # type: ignore[arg-type]

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        i, j = q // self.block_size, k // self.block_size
        pattern = h // (self.num_heads // self.num_patterns)
        far = ((j + pattern * self.step + self.offset) % self.stride == 0) | (
            pattern >= self.num_patterns - self.num_dense
        )
        return (q >= k) & ((i - j < self.local) | far)

    def plane(self, b: int, h: int) -> Mask:
        if self.heads() == 1:
            return self
        pattern = h // (self.num_heads // self.num_patterns)
        if pattern >= self.num_patterns - self.num_dense:
            return Causal()
        offset = (pattern * self.step + self.offset) % self.stride
        return ShardedContext(self.block_size, self.local, self.stride, 0, offset)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        size, first, last = self.block_size, k_lo // self.block_size, k_hi // self.block_size
        # Of the band that the window and causality leave, a rectangle that meets both meets both at once.
        some = (q_hi >= k_lo) & (q_lo // size - last < self.local)
        every = torch.ones_like(some)
        for stripe in self._stripes():
            if stripe is None:
                some = some | (q_hi >= k_lo)
                continue
            nearest = first + (stripe - first) % self.stride  # first block of the stripe in or after the tile
            key = torch.maximum(k_lo, nearest * size)
            some = some | ((key <= k_hi) & (q_hi >= key))
            every = every & ((nearest == first) & ((first == last) | (self.stride == 1)))
        return some, (q_lo >= k_hi) & (every | (q_hi // size - first < self.local))


class Everything(Mask):
    """Every pair may meet."""

    name = "everything"

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= 0) | (k >= 0)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        shape = torch.broadcast_shapes(q_lo.shape, k_lo.shape)
        every = torch.ones(shape, dtype=torch.bool, device=q_lo.device)
        return every, every


class Explicit(Mask):
    """A dense boolean tensor (N, M), (B, N, M) or (B, H, N, M), looked up by position."""

    name, fields = "explicit", ("allowed",)

    def __init__(self, allowed: Tensor):
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise TypeError(
                f"mask tensor must be boolean (True: may attend), got {getattr(allowed, 'dtype', type(allowed))}"
            )
        if allowed.dim() not in (2, 3, 4):
            raise ValueError(f"mask tensor must be (N, M), (B, N, M) or (B, H, N, M), got {tuple(allowed.shape)}")
        self.allowed = allowed[:, None] if allowed.dim() == 3 else allowed

    def batch(self) -> int:
        return self.allowed.shape[0] if self.allowed.dim() == 4 else 1

    def heads(self) -> int:
        return self.allowed.shape[1] if self.allowed.dim() == 4 else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.allowed.dim() == 2:
            return self.allowed[q, k]
        b = b if self.allowed.shape[0] > 1 else torch.zeros_like(b)
        h = h if self.allowed.shape[1] > 1 else torch.zeros_like(h)
        return self.allowed[b, h, q, k]

    def block(self, rows: tuple[int, int], cols: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        n, m = self.allowed.shape[-2:]
        if rows[1] > n or cols[1] > m:
            raise ValueError(f"mask tensor {tuple(self.allowed.shape)} has no rows {rows} and columns {cols}")
        return self.allowed[..., slice(*rows), slice(*cols)]

    def plane(self, b: int, h: int) -> Mask:
        return Explicit(_plane_of(self.allowed, b, h))


def _plane_of(grid: Tensor, b: int, h: int) -> Tensor:
    """(N, M) of sample ``b`` and head ``h`` in a tensor (N, M) or (B or 1, H or 1, N, M)."""
    if grid.dim() == 2:
        return grid
    return grid[b if grid.shape[0] > 1 else 0, h if grid.shape[1] > 1 else 0]


class Blocks(Mask):
    """Chosen (query block, key block) pairs: ``chosen`` is boolean (nq, nk), (B, nq, nk) or (B, H, nq, nk)."""

    name, fields = "blocks", ("chosen", "q_block", "k_block")

    def __init__(self, chosen: Tensor, q_block: int, k_block: int):
        self.chosen = Explicit(chosen).allowed
        self.q_block, self.k_block = q_block, k_block

    def batch(self) -> int:
        return self.chosen.shape[0] if self.chosen.dim() == 4 else 1

    def heads(self) -> int:
        return self.chosen.shape[1] if self.chosen.dim() == 4 else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = q // self.q_block, k // self.k_block
        if self.chosen.dim() == 2:
            return self.chosen[q, k]
        b = b if self.chosen.shape[0] > 1 else torch.zeros_like(b)
        h = h if self.chosen.shape[1] > 1 else torch.zeros_like(h)
        return self.chosen[b, h, q, k]

    def plane(self, b: int, h: int) -> Mask:
        return Blocks(_plane_of(self.chosen, b, h), self.q_block, self.k_block)

    def q_tile(self) -> int | None:
        return self.q_block

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        chosen = self.chosen if self.chosen.dim() == 2 else self.chosen.flatten(0, 1)
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
        grid = tuple(int(s) for s in grid)
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"grid must have 1 to 3 axes, got {grid}")
        self.grid = grid
        self.kernel = to_tuple("kernel_size", kernel, len(grid))
        self.dilation = to_tuple("dilation", dilation, len(grid))
        self.stride = to_tuple("stride", stride, len(grid))
        self.causal = to_tuple("causal", causal, len(grid))
        for axis, (x, w, d, s) in enumerate(zip(grid, self.kernel, self.dilation, self.stride, strict=True)):
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
        whole = {"queries": queries, "size": size} | ({} if isinstance(frames, Tensor) else {"frames": frames})
        for name, value in whole.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if isinstance(frames, Tensor) and (frames.dim() != 1 or frames.is_floating_point()):
            raise ValueError(f"frames must be an integer or integers (B,), got {frames.dtype} {tuple(frames.shape)}")
        self.queries, self.frames, self.size = queries, frames, size

    def batch(self) -> int:
        return self.frames.shape[0] if isinstance(self.frames, Tensor) else 1

    def plane(self, b: int, h: int) -> Mask:
        if self.batch() == 1:
            return self
        return CausalFrames(self.queries, self.frames[b : b + 1], self.size)  # type: ignore[index]

    def _last(self, q: Tensor, frames: int | Tensor) -> Tensor:
        # The second term is larger only where there are more frames than queries.
        return torch.maximum(q * frames // self.queries, (q + 1) * frames // self.queries - 1)

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        frames = _of_sample(self.frames, b) if isinstance(self.frames, Tensor) else self.frames
        return k // self.size <= self._last(q, frames)

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        low = high = self.frames
        if isinstance(self.frames, Tensor):
            low, high = int(self.frames.min()), int(self.frames.max())
        return k_lo // self.size <= self._last(q_hi, high), k_hi // self.size <= self._last(q_lo, low)


class CircularWindow(Mask):
    """Keys inside a circle: squared distance on the grid strictly below ``radius ** 2``."""

    name, fields = "circular_window", ("grid", "radius")

    def __init__(self, grid: Sequence[int], radius: float):
        if radius <= 0:
            raise ValueError(f"radius must be positive, got {radius}")
        self.grid, self.radius = tuple(int(s) for s in grid), radius

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
        if types.dim() not in (1, 2):
            raise ValueError(f"types must be (N,) or (B, N), got {tuple(types.shape)}")
        self.types = types
        self.rule = tuple(tuple(bool(v) for v in row) for row in rule)
        if len({len(row) for row in self.rule}) != 1 or len(self.rule) != len(self.rule[0]):
            raise ValueError(f"rule must be square, got rows of lengths {[len(r) for r in self.rule]}")

    def batch(self) -> int:
        return self.types.shape[0] if self.types.dim() == 2 else 1

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = torch.tensor(self.rule, device=self.types.device)
        return table[_of_token(self.types, b, q), _of_token(self.types, b, k)]

    def plane(self, b: int, h: int) -> Mask:
        return _build(Modality, [self.types[b], self.rule]) if self.batch() > 1 else self

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
        types = self.types.reshape(-1, self.types.shape[-1])
        some = torch.zeros(torch.broadcast_shapes(q_lo.shape, k_lo.shape), dtype=torch.bool, device=types.device)
        every = ~some
        for i, row in enumerate(self.rule):
            q_has = _extremes((types == i).long(), q_lo, q_hi)[1] > 0
            for j, allowed in enumerate(row):
                meet = (q_has & (_extremes((types == j).long(), k_lo, k_hi)[1] > 0)).any(0)
                some, every = (some | meet, every) if allowed else (some, every & ~meet)
        return some, every


class Within(Mask):
    """``inner`` between tokens ``start..stop-1`` (with positions counted from ``start``); all other pairs may meet."""

    name, fields = "within", ("inner", "start", "stop")

    def __init__(self, inner: Mask, start: int, stop: int):
        self.inner, self.start, self.stop = inner, start, stop

    def pair(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        top = self.stop - self.start - 1
        q_in, k_in = (q >= self.start) & (q < self.stop), (k >= self.start) & (k < self.stop)
        inner = self.inner.pair(b, h, (q - self.start).clamp(0, top), (k - self.start).clamp(0, top))
        return ~q_in | ~k_in | inner

    def tile(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Classes:
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
    ends = torch.as_tensor(cu_seqlens)
    if ends.dim() != 1 or len(ends) < 2 or int(ends[0]) != 0 or bool((ends.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must be non-decreasing and start at 0, got {ends.tolist()}")
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


def sharded_context(
    block_size: int,
    local: int,
    stride: int,
    step: int = 1,
    offset: int = 0,
    num_heads: int = 1,
    num_patterns: int | None = None,
    num_dense: int = 0,
) -> Mask:
    """Causal local window plus a stripe of key blocks per head; see :class:`ShardedContext`.

    >>> print(sharded_context(1, 1, 3, num_heads=3).plane(0, 1).picture(6))
    #.....
    .#....
    ..#...
    ..##..
    ..#.#.
    ..#..#
    """
    return ShardedContext(block_size, local, stride, step, offset, num_heads, num_patterns, num_dense)


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
    return Within(inner, *layout.span(name))


def visible_keys(
    mask: Mask | None,
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
    if mask is None:
        count = torch.full((1, 1), m, device=device) if valid is None else valid.sum(1, keepdim=True)
        return count[:, None, None].expand(-1, -1, n, -1)
    at = torch.arange(n, device=device) if q_pos is None else q_pos
    if isinstance(mask, Causal) and at.dim() == 1:
        if valid is None:
            return (at + 1).clamp(0, m)[None, None, :, None]
        return valid.cumsum(1)[:, at.clamp(max=m - 1)][:, None, :, None]
    seen = mask.at(at, torch.arange(m, device=device))
    seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
    return (seen if valid is None else seen & valid[:, None, None]).sum(-1, keepdim=True)


def as_mask(mask: Mask | Tensor | None) -> Mask | None:
    """Accept a boolean tensor where a mask is meant."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return Explicit(mask)
    raise TypeError(f"mask must be an attnlib mask or a boolean tensor, got {type(mask).__name__}")
