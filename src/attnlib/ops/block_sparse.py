"""Engine C: attention over chosen blocks of keys.

A policy (:mod:`attnlib.ops.block_policies`) decides which key blocks each block of queries reads and writes it down as
a :class:`BlockPlan`; :func:`block_sparse_attention` executes the plan, forward and backward, without ever holding more
than a cache-sized piece of the score map. The oracle is dense attention under ``attnlib.masks.blocks``.

Two orders of execution give the same numbers. *By queries*: gather the keys of some query blocks, one batched matmul,
a softmax over whole rows. *By keys*: for one key block, gather all queries that chose it and merge with a running
softmax; this is what makes ``q_block=1`` (each query chooses for itself) affordable, because a key block is then read
once and not once per query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import masks
from ..checks import (
    check_choice,
    check_device,
    check_int,
    check_rank,
    check_serves,
    check_tensor,
    check_whole,
    check_within,
    readable,
)
from ..normalizers import exp_
from ..positions import AxisBias, Bias, DenseBias, RelativeBias
from ..types import Partial, Plan, exactly, register_pytree, stats_dtype
from . import _elements, eager
from ._call import AttentionCall, check_qkv, prepare
from ._dispatch import Operator, twice, wants_gradient
from ._guard import guarded
from .attention import lend
from .lowered import SCHEMA, Lowered, lower

ORDERS = ("queries", "keys")

#: Query blocks that are taller run in parts.
TALL = 256


class BlockPlan(Plan):
    """Which key blocks each query block reads.

    Args:
        index: (nq, kmax), (B, nq, kmax) or (B, H, nq, kmax) int64 numbers of key blocks; a missing axis, or size 1,
            means "the same for all samples (heads)". The chosen blocks of a row stand first and are distinct.
        q_block: queries per block; 1 is legal.
        k_block: keys per block.
        n: number of queries; the last block may be short.
        m: number of keys; ``n`` by default.
        count: (..., nq) how many entries of each row of ``index`` count; all of them by default.

    Raises:
        ValueError: when the index does not fit the sizes.

    >>> index, count = torch.tensor([[0, 1], [1, 0], [2, 1]]), torch.tensor([1, 2, 1])
    >>> plan = BlockPlan(index, q_block=2, k_block=2, n=6, count=count)
    >>> print(plan.mask().picture(6))
    ##....
    ##....
    ####..
    ####..
    ....##
    ....##
    """

    index: Tensor
    count: Tensor | None
    q_block: int
    k_block: int
    n: int
    m: int
    _checked: bool

    def __init__(
        self, index: Tensor, q_block: int, k_block: int, n: int, m: int | None = None, count: Tensor | None = None
    ):
        n, m = check_int("n", n, least=0), check_int("m", n if m is None else m, least=0)
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            given = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be an int64 tensor of key block numbers, got {given}")
        if index.dim() not in (2, 3, 4):
            raise ValueError(f"index must be (nq, kmax), (B, nq, kmax) or (B, H, nq, kmax), got {tuple(index.shape)}")
        for name, block in (("q_block", q_block), ("k_block", k_block)):
            check_int(name, block, least=1)
        index = _lift(index.long(), 4)
        rows = -(-n // q_block)
        if index.shape[2] != rows:
            raise ValueError(
                f"index has {index.shape[2]} query blocks, but n={n} queries in blocks of q_block={q_block} are {rows}"
            )
        if count is not None:
            check_whole("count", count)
            if count.dim() not in (1, 2, 3) or count.shape[-1] != rows:
                raise ValueError(
                    f"count must be an integer tensor (..., {rows}), got {count.dtype} {tuple(count.shape)}"
                )
            count = _lift(count.long(), 3)
        self._set(index, count, q_block, k_block, n, m)
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Raise unless every slot that counts names a block that there is, and no row names one twice.

        A number beyond the blocks would read those of another head. Done once: what was taken apart and put together
        again as a tree is looked at when it is first executed.
        """
        if self._checked or torch.compiler.is_compiling():
            return
        check_whole("plan's index", self.index)
        blocks, width = self.k_blocks, self.index.shape[3]
        if self.count is None:
            check_within("plan's index", self.index, blocks, "key block")
            apart = self.index
        else:
            check_device(index=self.index, count=self.count)
            for axis, what in ((0, "samples"), (1, "heads")):
                if self.index.shape[axis] != 1:
                    check_serves("plan's count", self.count.shape[axis], self.index.shape[axis], what)
            check_whole("plan's count", self.count)
            check_within("plan's count", self.count, width + 1 if blocks else 1, "slot")
            counts = self.slots()
            index = self.index.expand(counts.shape)
            check_within("plan's index", index.masked_fill(~counts, 0), max(blocks, 1), "key block")
            apart = torch.where(counts, index, blocks + torch.arange(width, device=index.device))
        if width > 1 and readable(apart):
            twice = (apart.sort(-1).values.diff(dim=-1) == 0).any()
            if apart.device.type != "cpu":
                torch._assert_async(~twice, "plan's index names a key block twice in one row")
            elif twice:
                raise ValueError("plan's index names a key block twice in one row; a row may name each once")
        object.__setattr__(self, "_checked", True)

    def expect(self, kind: str, **shape: Any) -> BlockPlan:
        super().expect(kind, **shape)
        self._check_numbers()
        return self

    @classmethod
    def _made(cls, index: Tensor, q_block: int, k_block: int, n: int, m: int, count: Tensor | None) -> BlockPlan:
        """A plan whose numbers are right because of how they were made."""
        plan = object.__new__(cls)
        plan._set(_lift(index, 4), None if count is None else _lift(count, 3), q_block, k_block, n, m, True)
        return plan

    def _set(
        self, index: Tensor, count: Tensor | None, q_block: int, k_block: int, n: int, m: int, checked: bool = False
    ) -> None:
        for name, value in (
            ("kind", "blocks"),
            ("tensors", {"index": index, "count": count}),
            ("shape", (("q_block", q_block), ("k_block", k_block), ("N", n), ("M", m))),
            ("index", index),
            ("count", count),
            ("q_block", q_block),
            ("k_block", k_block),
            ("n", n),
            ("m", m),
            ("_checked", checked),
        ):
            object.__setattr__(self, name, value)

    # ---- other forms

    @classmethod
    def from_mask(
        cls, chosen: Tensor, q_block: int, k_block: int, n: int, m: int | None = None, kmax: int | None = None
    ) -> BlockPlan:
        """From a boolean (nq, nk), (B, nq, nk) or (B, H, nq, nk).

        Args:
            kmax: width of the index; the longest row by default, which reads the tensor's values (give it, e.g. as nk,
                where that is not wanted, as under ``torch.compile``).
        """
        n, m = check_int("n", n, least=0), check_int("m", n if m is None else m, least=0)
        for name, block in (("q_block", q_block), ("k_block", k_block)):
            check_int(name, block, least=1)
        check_rank("chosen", chosen, (2, 3, 4), "(nq, nk), (B, nq, nk) or (B, H, nq, nk)")
        if chosen.is_meta and kmax is None:
            raise ValueError("chosen must hold values that can be counted, or kmax be given; got a tensor on meta")
        rows, blocks = -(-n // q_block), -(-m // k_block)
        if chosen.dtype != torch.bool or chosen.shape[-2:] != (rows, blocks):
            raise ValueError(
                f"chosen must be boolean (..., nq={rows}, nk={blocks}), got {chosen.dtype} {tuple(chosen.shape)}"
            )
        count = chosen.sum(-1)
        if kmax is not None and check_int("kmax", kmax, least=0) < blocks:
            check_within("chosen, at most kmax in a row,", count, kmax + 1, "slot")
        if kmax is None:
            kmax = int(count.max()) if count.numel() else 0
        slot = (chosen.long().cumsum(-1) - 1).masked_fill(~chosen, kmax)
        numbers = torch.arange(blocks, device=chosen.device).expand(chosen.shape)
        index = torch.zeros(*chosen.shape[:-1], kmax + 1, dtype=torch.long, device=chosen.device)
        index = index.scatter(-1, slot.clamp(max=kmax), numbers)[..., :kmax]
        return cls._made(index, q_block, k_block, n, m, count)

    @classmethod
    def from_csr(
        cls, row_ptr: Tensor, cols: Tensor, q_block: int, k_block: int, n: int, m: int | None = None, heads: int = 1
    ) -> BlockPlan:
        """From compressed rows: row ``r = (b * heads + h) * nq + i`` reads ``cols[row_ptr[r] : row_ptr[r + 1]]``."""
        n = check_int("n", n, least=0)
        for name, value in (("q_block", q_block), ("k_block", k_block), ("heads", heads)):
            check_int(name, value, least=1)
        for name, numbers in (("row_ptr", row_ptr), ("cols", cols)):
            check_whole(name, numbers)
            check_rank(name, numbers, 1, "a row of numbers")
        check_device(row_ptr=row_ptr, cols=cols)
        check_within("cols", cols, -(-check_int("m", n if m is None else m, least=0) // k_block), "key block")
        if row_ptr.is_meta:
            raise ValueError("row_ptr must hold values that can be read, got a tensor on meta")
        rows = -(-n // q_block)
        count = row_ptr.diff()
        many = not row_ptr.numel() or (count.numel() % (heads * rows) if rows else count.numel())
        if many or int(row_ptr[0]) or int(row_ptr[-1]) != cols.numel() or bool((count < 0).any()):
            ends = [int(row_ptr[0]), int(row_ptr[-1])] if row_ptr.numel() else []
            raise ValueError(
                f"row_ptr must have batch * heads * {rows} + 1 entries that rise from 0 to {cols.numel()}, "
                f"got {row_ptr.numel()} entries with ends {ends}"
            )
        kmax = int(count.max()) if count.numel() else 0
        slots = torch.arange(kmax, device=cols.device)
        at = (row_ptr[:-1, None] + slots).clamp(max=max(cols.numel() - 1, 0))
        index = torch.where(slots < count[:, None], cols[at] if cols.numel() else at, 0)
        batch = count.numel() // max(heads * rows, 1)
        shape = (batch, heads, rows)
        return cls(index.reshape(*shape, kmax), q_block, k_block, n, m, count.reshape(shape))

    def csr(self) -> tuple[Tensor, Tensor]:
        """``(row_ptr, cols)`` over all rows of ``index``, sample by sample, head by head."""
        keep = self.slots()
        row_ptr = F.pad(keep.sum(-1).flatten().cumsum(0), (1, 0))
        return row_ptr, self.index[keep]

    @classmethod
    def full(cls, n: int, m: int | None = None, q_block: int = 64, k_block: int = 64) -> BlockPlan:
        """Every query block reads every key block."""
        n, m = check_int("n", n, least=0), check_int("m", n if m is None else m, least=0)
        for name, block in (("q_block", q_block), ("k_block", k_block)):
            check_int(name, block, least=1)
        return cls(torch.arange(-(-m // k_block)).expand(-(-n // q_block), -1), q_block, k_block, n, m)

    def slots(self) -> Tensor:
        """(B or 1, H or 1, nq, kmax) boolean: which entries of ``index`` count."""
        if self.count is None:
            return torch.ones_like(self.index, dtype=torch.bool)
        keep = torch.arange(self.index.shape[-1], device=self.index.device) < self.count.unsqueeze(-1)
        return keep.expand(torch.broadcast_shapes(keep.shape, self.index.shape))

    def chosen(self) -> Tensor:
        """(B or 1, H or 1, nq, nk) boolean: which pairs of blocks meet."""
        keep, blocks = self.slots(), self.k_blocks
        index = self.index.expand(keep.shape)
        out = torch.zeros(*keep.shape[:-1], blocks + 1, dtype=torch.bool, device=keep.device)
        return out.scatter(-1, index.masked_fill(~keep, blocks), True)[..., :blocks]

    def mask(self) -> masks.Mask:
        """The same as a mask, for the oracle."""
        return masks.blocks(self.chosen(), self.q_block, self.k_block)

    @property
    def q_blocks(self) -> int:
        return self.index.shape[2]

    @property
    def k_blocks(self) -> int:
        return -(-self.m // self.k_block)

    @property
    def density(self) -> Tensor:
        """Scalar: the share of all (query, key) pairs that meet."""
        chosen = self.chosen().to(torch.float64)
        device = chosen.device
        q_size = torch.full((self.q_blocks,), self.q_block, device=device)
        k_size = torch.full((self.k_blocks,), self.k_block, device=device)
        if self.n:
            q_size[-1] = self.n - (self.q_blocks - 1) * self.q_block
        if self.m:
            k_size[-1] = self.m - (self.k_blocks - 1) * self.k_block
        pairs = torch.einsum("bhij,i,j->bh", chosen, q_size.double(), k_size.double())
        return (pairs.mean() / max(self.n * self.m, 1)).float()

    def __repr__(self) -> str:
        b, h, rows, kmax = self.index.shape
        return (
            f"BlockPlan(batch={b}, heads={h}, up to {kmax} of {self.k_blocks} key blocks of {self.k_block} for each of "
            f"{rows} query blocks of {self.q_block})"
        )


def _lift(x: Tensor, rank: int) -> Tensor:
    """A missing batch axis in front, a missing head axis behind the batch."""
    if x.dim() == rank:
        return x
    return x[None, None] if x.dim() == rank - 2 else x[:, None]


def _unflatten_plan(leaves: Any, context: Any) -> BlockPlan:
    plan = object.__new__(BlockPlan)
    plan._set(leaves[0], leaves[1], *context)  # leaves may be anything while a tree is taken apart
    return plan


register_pytree(
    BlockPlan, lambda p: ([p.index, p.count], (p.q_block, p.k_block, p.n, p.m)), lambda x, c: _unflatten_plan(x, c)
)


# --------------------------------------------------------------------------------------------------------------------
# Biases, looked up pair by pair. Each of the three forms is a sum of gathers from a few tensors.


def _bias_gathers(bias: Bias, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> list[tuple[int, Tensor]]:
    """``(number of the tensor, flat positions in it)``; the bias of the pairs is the sum of what stands there."""

    def flat(tensor: Tensor, *axes: Tensor) -> Tensor:
        total: Tensor | int = 0
        for size, axis in zip(tensor.shape, axes, strict=True):
            total = total * size + (axis if size > 1 else 0)
        return torch.as_tensor(total, device=tensor.device)

    if isinstance(bias, DenseBias):
        return [(0, flat(bias.bias, b, h, q, k))]
    if isinstance(bias, RelativeBias):
        return [(0, flat(bias.table, h, bias.entry(q, k)))]
    if isinstance(bias, AxisBias):
        return [(i, flat(f, b, h, q, bias.k_coords[k, i])) for i, f in enumerate(bias.factors)]
    raise TypeError(
        f"bias of type {type(bias).__name__} is none of the three forms (dense, relative table, axis factors)"
    )


# --------------------------------------------------------------------------------------------------------------------
# The executor. Everything below runs on real tensors only, behind the custom operator.


class _Work:
    """One problem in block form: rows are (sample, head, query block)."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        count: Tensor | None,
        low: Lowered,
        q_block: int,
        k_block: int,
    ):
        high = stats_dtype(q.dtype)
        self.batch, self.heads, self.n, self.d = q.shape
        self.m, self.dv = v.shape[2], v.shape[3]
        self.q_block, self.k_block, self.scale = q_block, k_block, low.scale
        self.device, self.dtype = q.device, high
        self.nq, self.nk = index.shape[2], -(-self.m // k_block)
        self.rows = self.batch * self.heads * self.nq
        self.k_heads, self.v_heads = k.shape[1], v.shape[1]
        self.q = self.blocks(q, q_block, self.nq).view(self.rows, q_block, self.d)
        self.k = self.blocks(k, k_block, self.nk).view(self.batch * self.k_heads * self.nk, k_block * self.d)
        self.v = self.blocks(v, k_block, self.nk).view(self.batch * self.v_heads * self.nk, k_block * self.dv)
        shape = (self.batch, self.heads, self.nq)
        self.index = index.expand(*shape, index.shape[-1]).reshape(self.rows, index.shape[-1])
        self.count = None if count is None else count.expand(shape).reshape(self.rows)
        self.row = torch.arange(self.rows, device=self.device)
        self.k_base = self.base(self.k_heads)
        self.v_base = self.k_base if self.k_heads == self.v_heads else self.base(self.v_heads)
        self.zero = self.q.new_zeros(())
        self.valid, self.q_pos, self.k_pos = low.valid, low.q_pos, low.k_pos
        self.mask, self.bias, self.bias_tensors = low.raise_mask(), low.raise_bias(), low.bias_tensors
        self.masked = self.mask is not None or low.valid is not None or self.m % k_block != 0
        # Pieces of the score map stay in the cache of a CPU core; elsewhere large launches matter more.
        self.least = torch.get_num_threads() if self.device.type == "cpu" else 1
        self.budget = self.least << 17 if self.device.type == "cpu" else 1 << 27
        self.buffers: dict[str, Tensor] = {}
        self.pairs = q_block == k_block == 1 and _elements.serves(self.q)
        if self.pairs:
            self.budget <<= 2  # no keys are held beside the scores

    def blocks(self, x: Tensor, block: int, number: int) -> Tensor:
        """(B, H, N, D) -> (B, H, number, block, D), zeros behind the end, contiguous."""
        x = x.to(self.dtype)
        missing = number * block - x.shape[2]
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.reshape(x.shape[0], x.shape[1], number, block, x.shape[3]).contiguous()

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Scratch memory, allocated once for the largest piece."""
        size = math.prod(shape)
        held = self.buffers.get(name)
        if held is None or held.numel() < size:
            held = self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(shape)

    # ---- by queries

    def pieces(self) -> Iterator[tuple[slice | Tensor, int, bool]]:
        """Rows that run together, how many blocks they read, and whether some read fewer; none that read nothing."""
        width = self.index.shape[1]
        order: Tensor | None = None
        widths: list[int] = []
        if self.count is not None and width:
            counts = self.count.tolist()
            if min(counts, default=0) < width:
                order = torch.argsort(self.count, descending=True, stable=True)
                widths = sorted(counts, reverse=True)
        at = 0
        while at < self.rows and width:
            here = width if order is None else widths[at]
            if here == 0:
                return
            step = max(self.least, self.budget // (min(self.q_block, TALL) * here * self.k_block))
            stop = min(at + step, self.rows)
            if order is None:
                yield slice(at, stop), here, False
            elif stop == at + 1:
                yield slice(row := int(order[at]), row + 1), here, False
            else:
                yield order[at:stop], here, widths[stop - 1] < here
            at = stop

    def select(self, rows: slice | Tensor, width: int, ragged: bool) -> tuple[Tensor, Tensor | None]:
        """(r, width) key block numbers of the rows and which of them count (``None``: all)."""
        index, keep = self.index[rows, :width], None
        if ragged:
            assert self.count is not None
            keep = torch.arange(width, device=self.device) < self.count[rows, None]
            index = index.masked_fill(~keep, 0)
        return index, keep

    def base(self, heads: int) -> Tensor:
        """(rows,) number of the first block that each row may read, in ``self.k`` or ``self.v`` of so many heads."""
        head_row = self.row // self.nq
        b, h = head_row // self.heads, head_row % self.heads
        return (b * heads + h // (self.heads // heads)) * self.nk

    def places(self, rows: slice | Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Where the chosen blocks stand in ``self.k`` and ``self.v``."""
        at_k = (self.k_base[rows].unsqueeze(-1) + index).view(-1)
        return at_k, at_k if self.v_base is self.k_base else (self.v_base[rows].unsqueeze(-1) + index).view(-1)

    def gather(self, name: str, source: Tensor, flat: Tensor) -> Tensor:
        """The chosen blocks as (r * width, k_block * D)."""
        return torch.index_select(source, 0, flat, out=self.buffer(name, flat.numel(), source.shape[1]))

    def parts(self) -> list[slice]:
        """Query blocks in parts that are not too tall for the cache."""
        number = max(1, -(-self.q_block // TALL))
        size = -(-self.q_block // number)
        return [slice(at, min(at + size, self.q_block)) for at in range(0, self.q_block, size)]

    def where(self, rows: slice | Tensor, part: slice, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample (r,1,1), head (r,1,1), query (r,Q,1) and key (r,1,K) numbers of the pairs of a piece."""
        row = self.row[rows].view(-1, 1, 1)
        inner = torch.arange(part.start, part.stop, device=self.device)
        token = row % self.nq * self.q_block + inner.view(1, -1, 1)
        key = index.unsqueeze(-1) * self.k_block + torch.arange(self.k_block, device=self.device)
        head_row = row // self.nq
        return head_row // self.heads, head_row % self.heads, token, key.view(key.shape[0], 1, -1)

    # ---- scores

    def finish_scores(
        self, s: Tensor, b: Tensor, h: Tensor, token: Tensor, key: Tensor, keep: Tensor | None
    ) -> list[tuple[int, Tensor]]:
        """Add the bias to ``s`` (r, Q, K) and set forbidden pairs to ``-inf``, in place; returns the bias's gathers."""
        inside = key < self.m
        token, key = token.clamp(max=self.n - 1), key.clamp(max=self.m - 1)
        gathers = [] if self.bias is None else _bias_gathers(self.bias, b, h, token, key)
        for which, at in gathers:
            s.add_(self.bias_tensors[which].reshape(-1)[at].to(s.dtype))
        allowed = inside if keep is None else inside & keep.repeat_interleave(self.k_block, -1).unsqueeze(1)
        if self.valid is not None:
            allowed = allowed & self.valid[b, key]
        if self.mask is not None:
            allowed = allowed & self.mask.pair(
                b, h, self.place(self.q_pos, b, h, token), self.place(self.k_pos, b, h, key)
            )
        s.masked_fill_(~allowed, float("-inf"))
        return gathers

    @staticmethod
    def place(pos: Tensor | None, b: Tensor, h: Tensor, token: Tensor) -> Tensor:
        """Position of a token."""
        if pos is None:
            return token
        if pos.dim() == 1:
            return pos[token]
        if pos.dim() == 2:
            return pos[b if pos.shape[0] > 1 else torch.zeros_like(b), token]
        zero = torch.zeros_like(b)
        return pos[b if pos.shape[0] > 1 else zero, h if pos.shape[1] > 1 else zero, token]

    def plain(self, keep: Tensor | None) -> bool:
        """No pair of a piece is forbidden or biased."""
        return not self.masked and keep is None and self.bias is None

    def scores(
        self, q: Tensor, k: Tensor, rows: slice | Tensor, part: slice, index: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Scores (r, Q, K) of queries (r, Q, D) and keys (r, K, D), and the bias's gathers."""
        s = self.buffer("s", q.shape[0], q.shape[1], k.shape[1])
        torch.baddbmm(self.zero.expand_as(s), q, k.transpose(1, 2), beta=0, alpha=self.scale, out=s)
        gathers = [] if self.plain(keep) else self.finish_scores(s, *self.where(rows, part, index), keep)
        return s, gathers

    def pair_scores(
        self, rows: slice | Tensor, index: Tensor, keep: Tensor | None, at_k: Tensor
    ) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Scores (r, 1, K) of single pairs, and the bias's gathers."""
        s = _elements.products(self.q[rows, 0], self.k, at_k.view(index.shape), self.scale).unsqueeze(1)
        gathers = [] if self.plain(keep) else self.finish_scores(s, *self.where(rows, slice(0, 1), index), keep)
        return s, gathers

    def forward_by_queries(self, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        out = self.q.new_zeros(self.rows, self.q_block, self.dv)
        lse = self.q.new_full((self.rows, self.q_block), float("-inf")) if need_lse else None
        parts = self.parts()
        for rows, width, ragged in self.pieces():
            index, keep = self.select(rows, width, ragged)
            masked = self.masked or keep is not None
            r, span = index.shape[0], width * self.k_block
            at_k, at_v = self.places(rows, index)
            if not self.pairs:
                k = self.gather("k", self.k, at_k).view(r, span, self.d)
                v = self.gather("v", self.v, at_v).view(r, span, self.dv)
            for part in parts:
                if self.pairs:
                    s, _ = self.pair_scores(rows, index, keep, at_k)
                else:
                    s, _ = self.scores(self.q[rows, part], k, rows, part, index, keep)
                top = s.amax(-1, keepdim=True) if need_lse or masked else None
                p = self.buffer("p", *s.shape)
                torch.softmax(s, -1, out=p)
                if masked:
                    assert top is not None
                    p.masked_fill_(top == float("-inf"), 0.0)
                if self.pairs:
                    out[rows, 0] = _elements.sums(p.view(index.shape), self.v, at_v.view(index.shape))
                elif isinstance(rows, slice) and len(parts) == 1:
                    torch.bmm(p, v, out=out[rows])
                else:
                    out[rows, part] = torch.bmm(p, v)
                if lse is not None:
                    assert top is not None
                    # p at the largest score is exp(top - lse), which never underflows.
                    total = top - p.amax(-1, keepdim=True).log()
                    lse[rows, part] = total.masked_fill_(top == float("-inf"), float("-inf")).squeeze(-1)
        return out, lse

    def backward_by_queries(
        self, grad: Tensor, delta: Tensor, lse: Tensor, grad_bias: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        if self.pairs:
            self.backward_by_pairs(grad, delta, lse, grad_bias, grad_q, grad_k, grad_v)
            return grad_q, grad_k, grad_v
        parts = self.parts()
        for rows, width, ragged in self.pieces():
            index, keep = self.select(rows, width, ragged)
            r, span = index.shape[0], width * self.k_block
            at_k, at_v = self.places(rows, index)
            k = self.gather("k", self.k, at_k).view(r, span, self.d)
            v = self.gather("v", self.v, at_v).view(r, span, self.dv)
            for part in parts:
                q, g = self.q[rows, part], grad[rows, part]
                s, gathers = self.scores(q, k, rows, part, index, keep)
                p = exp_(s.sub_(lse[rows, part].unsqueeze(-1)))
                back = torch.bmm(p.transpose(1, 2), g, out=self.buffer("back", r, span, self.dv))
                grad_v.index_add_(0, at_v, back.view(at_v.numel(), self.k_block * self.dv))
                ds = torch.bmm(g, v.transpose(1, 2), out=self.buffer("p", *s.shape))
                ds.sub_(delta[rows, part].unsqueeze(-1)).mul_(p)
                _add_bias_grad(grad_bias, gathers, ds)
                grad_q[rows, part] = torch.bmm(ds, k).mul_(self.scale)
                back = torch.bmm(ds.transpose(1, 2), q, out=self.buffer("back", r, span, self.d)).mul_(self.scale)
                grad_k.index_add_(0, at_k, back.view(at_k.numel(), self.k_block * self.d))
        return grad_q, grad_k, grad_v

    def backward_by_pairs(
        self, grad: Tensor, delta: Tensor, lse: Tensor, grad_bias: list[Tensor], grad_q: Tensor, grad_k: Tensor,
        grad_v: Tensor,
    ) -> None:  # fmt: skip
        """Adds to ``grad_q`` (rows, 1, D), ``grad_k`` and ``grad_v``, in place."""
        for rows, width, ragged in self.pieces():
            index, keep = self.select(rows, width, ragged)
            at_k, at_v = (at.view(index.shape) for at in self.places(rows, index))
            s, gathers = self.pair_scores(rows, index, keep, at_k)
            q, g = self.q[rows, 0], grad[rows, 0]
            p = exp_(s.sub_(lse[rows].unsqueeze(-1))).view(index.shape)
            ds = _elements.products(g, self.v, at_v, 1.0).sub_(delta[rows]).mul_(p)
            _add_bias_grad(grad_bias, gathers, ds.unsqueeze(1))
            grad_q[rows, 0] = _elements.sums(ds, self.k, at_k).mul_(self.scale)
            of_keys = _elements.Scatter(at_k, self.k.shape[0])
            of_keys.add(grad_k, ds, q, self.scale)
            shared = self.v_base is self.k_base
            (of_keys if shared else _elements.Scatter(at_v, self.v.shape[0])).add(grad_v, p, g)

    # ---- by keys

    def visits(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """``(sample, head, key block, rows that chose it)`` in pieces."""
        width = self.index.shape[1]
        if not width or not self.rows:
            return
        keep = None if self.count is None else torch.arange(width, device=self.device) < self.count[:, None]
        pair = (self.row // self.nq * self.nk)[:, None] + self.index
        row = self.row[:, None].expand_as(pair)
        pair, row = (pair.reshape(-1), row.reshape(-1)) if keep is None else (pair[keep], row[keep])
        order = torch.argsort(pair, stable=True)
        row = row[order]
        sizes = torch.bincount(pair, minlength=self.batch * self.heads * self.nk).tolist()
        step = max(1, self.budget // (self.q_block * self.k_block))
        start = 0
        for number, size in enumerate(sizes):
            head_row, block = divmod(number, self.nk)
            b, h = divmod(head_row, self.heads)
            for at in range(start, start + size, step):
                yield b, h, block, row[at : min(at + step, start + size)]
            start += size

    def visit_scores(
        self, b: int, h: int, block: int, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int, int, list[tuple[int, Tensor]]]:
        """Queries (Q, D), keys (K, D), scores (Q, K), the places of keys and values, the bias's gathers."""
        q = self.q.index_select(0, rows).view(rows.numel() * self.q_block, self.d)
        at_k = (b * self.k_heads + h // (self.heads // self.k_heads)) * self.nk + block
        at_v = (b * self.v_heads + h // (self.heads // self.v_heads)) * self.nk + block
        k = self.k[at_k].view(self.k_block, self.d)
        s = self.buffer("s", q.shape[0], self.k_block)
        torch.addmm(self.zero.expand_as(s), q, k.t(), beta=0, alpha=self.scale, out=s)
        gathers: list[tuple[int, Tensor]] = []
        if self.masked or self.bias is not None:
            inner = torch.arange(self.q_block, device=self.device)
            token = ((rows % self.nq * self.q_block)[:, None] + inner).view(1, -1, 1)
            key = block * self.k_block + torch.arange(self.k_block, device=self.device)
            sample, head = (torch.full((1, 1, 1), i, dtype=torch.long, device=self.device) for i in (b, h))
            gathers = self.finish_scores(s.unsqueeze(0), sample, head, token, key.view(1, 1, -1), None)
        return q, k, s, at_k, at_v, gathers

    def forward_by_keys(self) -> tuple[Tensor, Tensor]:
        out = self.q.new_zeros(self.rows, self.q_block, self.dv)
        top = self.q.new_full((self.rows, self.q_block), float("-inf"))
        total = torch.zeros_like(top)
        for b, h, block, rows in self.visits():
            _, _, s, _, at_v, _ = self.visit_scores(b, h, block, rows)
            shape = (rows.numel(), self.q_block)
            before = top.index_select(0, rows)
            now = torch.maximum(before, s.amax(-1).view(shape))
            reference = now.masked_fill(now == float("-inf"), 0.0) if self.masked else now
            p = exp_(s.sub_(reference.view(-1, 1)))
            fade = (before - reference).exp_()
            top.index_copy_(0, rows, now)
            total.index_copy_(0, rows, torch.addcmul(p.sum(-1).view(shape), total.index_select(0, rows), fade))
            part = torch.mm(p, self.v[at_v].view(self.k_block, self.dv)).view(*shape, self.dv)
            out.index_copy_(0, rows, part.addcmul_(out.index_select(0, rows), fade.unsqueeze(-1)))
        empty = total == 0
        total.masked_fill_(empty, 1.0)
        out.div_(total.unsqueeze(-1))
        return out, (top + total.log()).masked_fill_(empty, float("-inf"))

    def backward_by_keys(
        self, grad: Tensor, delta: Tensor, lse: Tensor, grad_bias: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for b, h, block, rows in self.visits():
            q, k, s, at_k, at_v, gathers = self.visit_scores(b, h, block, rows)
            p = exp_(s.sub_(lse.index_select(0, rows).view(-1, 1)))
            g = grad.index_select(0, rows).view(rows.numel() * self.q_block, self.dv)
            v = self.v[at_v].view(self.k_block, self.dv)
            grad_v[at_v].view(self.k_block, self.dv).addmm_(p.t(), g)
            ds = torch.mm(g, v.t(), out=self.buffer("p", *s.shape))
            ds.sub_(delta.index_select(0, rows).view(-1, 1)).mul_(p)
            _add_bias_grad(grad_bias, gathers, ds.unsqueeze(0))
            grad_k[at_k].view(self.k_block, self.d).addmm_(ds.t(), q, alpha=self.scale)
            grad_q.index_add_(0, rows, torch.mm(ds, k).view(rows.numel(), self.q_block, self.d), alpha=self.scale)
        return grad_q, grad_k, grad_v


def _add_bias_grad(grads: list[Tensor], gathers: list[tuple[int, Tensor]], ds: Tensor) -> None:
    for which, at in gathers:
        grads[which].view(-1).index_add_(0, at.expand(ds.shape).reshape(-1), ds.reshape(-1))


# --------------------------------------------------------------------------------------------------------------------
# The operator: only tensors, numbers and strings cross it, so it can be compiled and exported.


_ARGUMENTS = (
    f"Tensor q, Tensor k, Tensor v, Tensor index, Tensor? count, {SCHEMA}, int q_block, int k_block, bool by_keys"
)


def _unpack(arguments: Sequence[Any]) -> tuple[Lowered, int, int, bool]:
    """What stands behind ``q, k, v, index, count`` in the operators: the lowered problem, block sizes, the order."""
    *fields, q_block, k_block, by_keys = arguments
    return Lowered(*fields), q_block, k_block, by_keys


def _forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    low, q_block, k_block, by_keys = _unpack(arguments[:-1])
    need_lse = arguments[-1]
    work = _Work(q, k, v, index, count, low, q_block, k_block)
    with exactly(q):  # q, k and v were cast already; the sums keep their precision
        out, lse = work.forward_by_keys() if by_keys else work.forward_by_queries(need_lse)
    batch, heads, n, _ = q.shape
    padded = work.nq * q_block
    out = out.view(batch, heads, padded, v.shape[3])[:, :, :n].to(q.dtype)
    if lse is None or not need_lse:
        return out.contiguous(), out.new_empty(0, dtype=stats_dtype(q.dtype))
    return out.contiguous(), lse.view(batch, heads, padded)[:, :, :n].contiguous()


def _backward(grad: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    q, k, v, index, count, *rest = arguments
    low, q_block, k_block, by_keys = _unpack(rest)
    work = _Work(q, k, v, index, count, low, q_block, k_block)
    high = work.dtype
    delta = (grad.to(high) * out.to(high)).sum(-1) - grad_lse
    # Rows that saw nothing: exp(-inf - inf) makes their weights zero.
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))

    def rows(x: Tensor, fill: float = 0.0) -> Tensor:
        missing = work.nq * q_block - x.shape[2]
        pad = (0, missing) if x.dim() == 3 else (0, 0, 0, missing)
        return F.pad(x.to(high), pad, value=fill).reshape(work.rows, q_block, *x.shape[3:])

    grad_bias = [
        torch.zeros_like(t, dtype=high).contiguous() if t.is_floating_point() else torch.zeros_like(t)
        for t in low.bias_tensors
    ]
    run = work.backward_by_keys if by_keys else work.backward_by_queries
    with exactly(q):
        grad_q, grad_k, grad_v = run(rows(grad), rows(delta), rows(lse, float("inf")), grad_bias)

    def tokens(g: Tensor, like: Tensor, padded: int) -> Tensor:
        g = g.view(*like.shape[:2], padded, like.shape[3])[:, :, : like.shape[2]]
        return g.to(like.dtype).contiguous()

    return [
        tokens(grad_q, q, work.nq * q_block),
        tokens(grad_k, k, work.nk * k_block),
        tokens(grad_v, v, work.nk * k_block),
        *(g.to(t.dtype) for g, t in zip(grad_bias, low.bias_tensors, strict=True)),
    ]


_op = torch.library.custom_op(
    "attnlib::block_sparse", _forward, mutates_args=(), schema=f"({_ARGUMENTS}, bool need_lse) -> (Tensor, Tensor)"
)
_op_backward = torch.library.custom_op(
    "attnlib::block_sparse_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor[]",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3] if rest[-1] else (0,), dtype=stats_dtype(q.dtype))


@_op_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    q, k, v, _, _, *rest = arguments
    low = _unpack(rest)[0]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, *low.bias_tensors)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, count, *rest = inputs
    low, *ctx.numbers = _unpack(rest[:-1])
    ctx.low = low.bare()
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, index, count, *low.saved)


def _autograd(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, q, k, v, index, count, *saved = ctx.saved_tensors
    low = ctx.low.restored(saved)
    of_bias: list[Tensor | None] = [None] * len(low.bias_tensors)
    grads: list[Tensor | None] = [None] * 3
    if grad is not None or grad_lse is not None:
        grad = torch.zeros_like(out) if grad is None else grad
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        (*grads,) = _op_backward(grad, grad_lse, out, lse, q, k, v, index, count, *low, *ctx.numbers)
        of_bias = [g if t.is_floating_point() else None for g, t in zip(grads[3:], low.bias_tensors, strict=True)]
    masks_ = [None] * len(low.mask_tensors)
    return (*grads[:3], None, None, None, None, None, masks_, of_bias, *(None,) * 8)


_op.register_autograd(_autograd, setup_context=_setup)


def _pair_flops(q: Any, v: Any, index: Any, q_block: int, k_block: int) -> int:
    return 2 * q[0] * q[1] * index[2] * index[3] * q_block * k_block * (q[3] + v[3])


@register_flop_formula(torch.ops.attnlib.block_sparse)
def _flops(q: Any, k: Any, v: Any, index: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two multiplications and additions per chosen pair and channel; a short row counts as a full one."""
    return _pair_flops(q, v, index, *args[10:12])


@register_flop_formula(torch.ops.attnlib.block_sparse_backward)
def _flops_backward(
    grad: Any, grad_lse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, index: Any, *args: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    recomputed = 2 * q[0] * q[1] * index[2] * index[3] * args[10] * args[11] * q[3]
    return 2 * _pair_flops(q, v, index, *args[10:12]) + recomputed


# --------------------------------------------------------------------------------------------------------------------
# What is called


def _check_plan(plan: BlockPlan, call: AttentionCall) -> None:
    if not isinstance(plan, BlockPlan):
        raise TypeError(f"plan must be a BlockPlan, got {type(plan).__name__}")
    plan.expect("blocks", N=call.q.shape[2], M=call.k.shape[2])
    check_device(q=call.q, plan=plan.index)
    samples, heads = plan.index.shape[:2]
    for what, made, size in (("samples", samples, call.q.shape[0]), ("heads", heads, call.heads)):
        if made not in (1, size):
            raise ValueError(f"plan was made for {made} {what}, but q has {size}")


def _by_keys(plan: BlockPlan, call: AttentionCall) -> bool:
    """Whether key order moves fewer bytes: a visit costs about as much as half a megabyte of gathered keys.

    A visit holds the scores of at least one query block and one key block, so that large ones keep to query order.
    """
    rows, kmax = call.q.shape[0] * call.heads * plan.q_blocks, plan.index.shape[-1]
    width = call.q.shape[3] + call.v.shape[3]
    by_queries = rows * kmax * plan.k_block * width
    by_keys = rows * kmax * plan.q_block * (width + call.v.shape[3])
    visits = call.q.shape[0] * call.heads * plan.k_blocks
    return bool(plan.q_block * plan.k_block <= 1 << 20 and by_keys + visits * (1 << 17) < by_queries)


@dataclass(frozen=True)
class _Blocks:
    """A checked problem with its plan."""

    call: AttentionCall
    plan: BlockPlan
    order: str | None

    def inputs(self) -> list[Tensor]:
        return self.call.inputs()

    @property
    def dense(self) -> AttentionCall:
        """The same problem under the plan as a mask."""
        mask = dense_mask(self.plan, self.call.mask, self.call.q_pos, self.call.k_pos)
        return replace(self.call, mask=mask, q_pos=None, k_pos=None)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, valid: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None, bias: Bias | Tensor | None = None, scale: float | None = None,
    q_pos: Tensor | None = None, k_pos: Tensor | None = None, order: str | None = None, partial: bool = False,
) -> _Blocks:  # fmt: skip
    call = prepare(
        q, k, v, mask=mask, valid=valid, bias=bias, scale=scale, q_pos=q_pos, k_pos=k_pos,
        want="partial" if partial else "out",
    )  # fmt: skip
    _check_plan(plan, call)
    if order is not None:
        check_choice("order", order, ORDERS)
    return _Blocks(call, plan, order)


def _run(blocks: _Blocks) -> Tensor | Partial:
    return guarded(lambda call: _execute(replace(blocks, call=call)), blocks.call, lambda: blocks.dense)


def _execute(blocks: _Blocks) -> Tensor | Partial:
    call, plan = blocks.call, blocks.plan
    partial = call.want == "partial"
    by_keys = _by_keys(plan, call) if blocks.order is None else blocks.order == "keys"
    need_lse = partial or wants_gradient(call.inputs())
    found = _op(
        call.q, call.k, call.v, plan.index, plan.count, *lower(call), plan.q_block, plan.k_block, by_keys, need_lse
    )

    def spec(*inputs: Tensor) -> tuple[Tensor, ...]:
        return eager.outputs(blocks.dense.replaced(inputs))

    if not partial:
        return twice((found[0],), call.inputs(), spec)[0]
    out, lse = twice((found[0], found[1]), call.inputs(), spec)
    return Partial(lse, (lse != float("-inf")).to(lse.dtype), out.to(lse.dtype))


_OPERATOR = Operator("block_sparse_attention", _prepare, entries={"block_sparse_partial": {"partial": True}})
_OPERATOR.register("blocks", _run, second="the specification", transforms="its backward is written by hand")
lend(_OPERATOR, lambda blocks: blocks.dense)


def dense_mask(
    plan: BlockPlan, mask: masks.Mask | None, q_pos: Tensor | None = None, k_pos: Tensor | None = None
) -> masks.Mask:
    """The plan, and ``mask`` at the positions given, as one mask on token numbers ``0..N-1`` and ``0..M-1``."""
    if mask is None or (q_pos is None and k_pos is None):
        return plan.mask() if mask is None else plan.mask() & mask
    device = plan.index.device
    q_pos = torch.arange(plan.n, device=device) if q_pos is None else q_pos
    k_pos = torch.arange(plan.m, device=device) if k_pos is None else k_pos
    return plan.mask() & masks.explicit(mask.at(q_pos, k_pos))


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    valid: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    order: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention in which every query block reads the key blocks that ``plan`` names.

    Args:
        q: (B, Hq, N, D) queries.
        k: (B, Hk, M, D) keys, ``Hq % Hk == 0``.
        v: (B, Hv, M, Dv) values, ``Hq % Hv == 0``.
        plan: which blocks meet; made by a policy or by hand.
        valid: (B, M) boolean, which keys exist.
        mask: which pairs of the chosen blocks may meet.
        bias: added to the scaled scores, in any of the three forms, with gradients.
        scale: defaults to ``D ** -0.5``.
        q_pos: (N,), (B, N) or (B, H, N) positions that ``mask`` sees, for tokens that were reordered.
        k_pos: the same for keys.
        order: ``"queries"`` or ``"keys"``: which side is walked along; ``None`` for the one that moves fewer bytes.
        backend: ``"blocks"``, the block executor, also by default; or a backend of :func:`attnlib.attention`, which
            then runs on the dense mask (``"eager"`` is the specification).

    Returns:
        (B, Hq, N, Dv). Rows that read nothing give zeros, with zero gradients. Memory beyond the output is O(N).

    Raises:
        ValueError: shapes that do not fit, or a plan made for other shapes.

    >>> q, k, v = torch.randn(3, 1, 2, 8, 4)
    >>> plan = BlockPlan(torch.tensor([[0], [1]]), q_block=4, k_block=4, n=8)
    >>> torch.allclose(block_sparse_attention(q, k, v, plan)[:, :, :4], block_sparse_attention(
    ...     q[:, :, :4], k[:, :, :4], v[:, :, :4], BlockPlan.full(4, q_block=4, k_block=4)), atol=1e-6)
    True
    """
    return _OPERATOR.run(
        _prepare(q, k, v, plan, order=order, mask=mask, valid=valid, bias=bias, scale=scale, q_pos=q_pos, k_pos=k_pos),
        backend,
    )


def block_sparse_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    valid: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    order: str | None = None,
    backend: str | None = None,
) -> Partial:
    """:func:`block_sparse_attention` as a mergeable :class:`attnlib.types.Partial`; arguments as there."""
    call = _prepare(
        q, k, v, plan, order=order, partial=True, mask=mask, valid=valid, bias=bias, scale=scale, q_pos=q_pos,
        k_pos=k_pos,
    )  # fmt: skip
    return _OPERATOR.run(call, backend)


def block_recall(
    q: Tensor,
    k: Tensor,
    plan: BlockPlan,
    *,
    valid: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """(B, H, N): the share of each row's dense attention weight that lies on the chosen blocks, without gradient.

    Rows that may attend to nothing at all count as 1.
    """
    check_qkv(q, k, k)
    if not isinstance(plan, BlockPlan):
        raise TypeError(f"plan must be a BlockPlan, got {type(plan).__name__}")
    with torch.no_grad():
        nothing = k.new_zeros(*k.shape[:3], 1)
        everything = BlockPlan.full(plan.n, plan.m, plan.q_block, plan.k_block)
        everything = BlockPlan(everything.index.to(k.device), plan.q_block, plan.k_block, plan.n, plan.m)
        args: dict[str, Any] = dict(valid=valid, mask=mask, bias=bias, scale=scale, order="queries")
        some = block_sparse_partial(q, k, nothing, plan, **args).log_scale
        every = block_sparse_partial(q, k, nothing, everything, **args).log_scale
        return torch.where(every == float("-inf"), torch.ones_like(every), (some - every).exp())


def gather_blocks(x: Tensor, plan: BlockPlan) -> Tensor:
    """The chosen blocks of each row, copied out: for mechanisms that change keys or values per choice.

    Args:
        x: (B, H, M, D) keys or values.
        plan: its slots beyond ``count`` hold block 0; see :meth:`BlockPlan.slots`.

    Returns:
        (B, H, nq, kmax, k_block, D), differentiable in ``x``.
    """
    check_tensor("x", x)
    if not isinstance(plan, BlockPlan):
        raise TypeError(f"plan must be a BlockPlan, got {type(plan).__name__}")
    check_rank("x", x, 4, "(B, H, M, D)")
    check_device(x=x, plan=plan.index)
    batch, heads, m, d = x.shape
    if m != plan.m:
        raise ValueError(f"x holds {m} tokens, but the plan was made for M={plan.m}")
    for what, made, size in (("samples", plan.index.shape[0], batch), ("heads", plan.index.shape[1], heads)):
        check_serves("plan", made, size, what)
    missing = plan.k_blocks * plan.k_block - m
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    x = x.reshape(batch * heads * plan.k_blocks, plan.k_block * d)
    plan._check_numbers()
    index = plan.index.masked_fill(~plan.slots(), 0)
    index = index.expand(batch, heads, plan.q_blocks, index.shape[-1])
    base = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1) * plan.k_blocks
    out = x.index_select(0, (index + base).reshape(-1))
    return out.view(batch, heads, plan.q_blocks, index.shape[-1], plan.k_block, d)
