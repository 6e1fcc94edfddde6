"""Growth of arithmetic and memory, counted operator by operator, never by the clock.

Small calls are counted as they run, large ones on tensors without data, which cost a hundred times as much per operator
and nothing per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from .subject import Evidence, NotClaimed, Subject, claim, require

#: A measured exponent may exceed the claimed one by this much; beyond it the claim is refuted.
SLACK = 0.15
#: A claim that exceeds what was measured by more than this is reported as loose.
LOOSE = 0.3

#: A call of more operators than this loops over tokens, so it is counted on few: each operator takes up to a
#: millisecond on tensors without data.
OPERATORS = 1500
#: No call of more than this is counted at all.
MOST = 20000
#: A call that would write more elements than this, or compute more, is not run but counted on tensors without data.
ELEMENTS, ARITHMETIC = 2e7, 5e8

aten = torch.ops.aten
# These read or write the elements they name, not the whole of what they point into.
_PICKS = {aten.index, aten.index_select, aten.gather, aten.embedding, aten.slice_scatter, aten.select_scatter}
_PUTS = {
    aten.index_put_, aten.scatter_, aten.scatter_add_, aten.index_add_, aten.index_copy_, aten.scatter_reduce_,
    aten._index_put_impl_, aten.index_reduce_,
}  # fmt: skip
_FREE = {aten._unsafe_view, aten.lift_fresh, aten.detach, aten.detach_}


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> int:
    """As much again for each of input and weight; torch's formula counts a grouped weight as if it were dense."""
    transposed, wanted = args[4], args[7]
    return 2 * (x if transposed else grad).numel() * math.prod(weight.shape[1:]) * (wanted[0] + wanted[1])


class TooLong(Exception):
    """A call has too many operators to be counted in reasonable time."""


class Counter(TorchDispatchMode):
    """Counts arithmetic and written elements of everything below it.

    ``work``: the FLOP formula of an operator where torch or the library registers one, otherwise the larger of the
    elements read and written. ``written``: elements of every tensor that is not a view of an input.
    """

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.work = 0.0
        self.written = 0.0
        self.calls = 0
        self.most = most
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls += 1
        if self.calls > self.most:
            raise TooLong(f"more than {self.most} operators")
        if self.paused or func.namespace == "prim":
            return out
        packet, schema = func._overloadpacket, func._schema
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if packet in _FREE:
            return out
        if packet in _PUTS:
            written = inputs[-1].numel()
        elif schema.is_mutable:
            named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            changed = [
                named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
            ]
            written = sum(t.numel() for t in tree_leaves(changed) if isinstance(t, Tensor))
        else:
            fresh = out if isinstance(out, (tuple, list)) else (out,)
            views = [r.alias_info is not None for r in schema.returns]
            views += views[-1:] * (len(fresh) - len(views))
            written = sum(
                sum(t.numel() for t in tree_leaves(o) if isinstance(t, Tensor))
                for o, view in zip(fresh, views, strict=False)
                if not view
            )
        self.written += written
        if packet is aten.convolution_backward:
            self.work += _convolution_backward(*args)
        elif packet in flop_registry:
            self.work += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            self.work += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif written:
            read = 0 if packet in _PICKS or packet in _PUTS else max((t.numel() for t in inputs), default=0)
            self.work += max(read, written)
        return out


class _Projections(TorchFunctionMode):
    """Leaves products by a parameter out of the count: every mechanism has them and they grow like N."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        projects = False
        if func is F.linear or func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.einsum):
            projects = any(
                isinstance(a, nn.Parameter) or isinstance(getattr(a, "_base", None), nn.Parameter)
                for a in tree_leaves((args, kwargs))
            )
        if not projects:
            return func(*args, **kwargs)
        before, self.counter.paused = self.counter.paused, True
        try:
            return func(*args, **kwargs)
        finally:
            self.counter.paused = before


@dataclass(frozen=True)
class Count:
    """What one call costs.

    Args:
        work: arithmetic, projections left out.
        written: elements written.
        fake: counted on tensors without data.
        calls: operators.
    """

    work: float
    written: float
    fake: bool
    calls: int


def count(f: Callable[..., Any], *inputs: Tensor) -> tuple[float, float, bool]:
    """``(work, written elements, without data)`` of ``f(*inputs)``.

    Tensors carry no data, so that large sizes cost nothing; a mechanism that looks at values is counted on real ones.
    """
    found = _count(f, inputs)
    return found.work, found.written, found.fake


def _count(
    f: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    most: float = math.inf,
    trained: Sequence[Tensor] | None = None,
    run: bool = False,
) -> Count:
    """The cost of ``f(*inputs)``, and of its backward pass to inputs and ``trained`` when these are given.

    ``run``: on real tensors at once.
    """
    grad = trained is not None
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator for a whole layer cannot be counted
    try:
        for fake in (False,) if run else (True, False):
            counter = Counter(most)
            try:
                with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext() as mode:
                    given = [t.detach() if mode is None else mode.from_tensor(t) for t in inputs]
                    with counter, _Projections(counter), torch.set_grad_enabled(grad):
                        if grad:
                            given = [t.requires_grad_() for t in given]
                        y = f(*given)
                        if trained is not None and y.requires_grad:
                            torch.autograd.grad(y.sum(), [*given, *trained], allow_unused=True)
                return Count(counter.work, counter.written, fake, counter.calls)
            except TooLong:
                raise
            except Exception:
                if not fake:
                    raise
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    raise AssertionError


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of log(count) over log(size) between the two largest sizes, where the leading term speaks."""
    (n0, c0), (n1, c1) = points[-2:]
    return math.log(max(c1, 1.0) / max(c0, 1.0)) / math.log(n1 / n0)


def _at(
    s: Subject,
    grid: tuple[int, ...],
    overrides: Mapping[str, Any],
    grad: bool = False,
    most: float = math.inf,
    run: bool = False,
) -> Count:
    m = s.fresh(torch.float32, **overrides)
    scene = s.scene

    inputs = [torch.randn(1, *grid, s.width)]
    if scene.cross:
        fixed = s.case.context_grid
        other = grid if fixed is None or len(fixed) == len(grid) else fixed
        inputs.append(torch.randn(1, *other, s.context_width))
    trained = [p for p in m.parameters() if p.requires_grad] if grad else None
    return _count(lambda x, context=None: s.y(m, x, context, scene), tuple(inputs), most, trained, run)


def _doubled(s: Subject, least: int, most: int) -> list[tuple[int, ...]]:
    """The grid of the case, doubled: sizes from ``least`` tokens to the first of ``most`` or more, two at least."""
    grid = s.grid
    out: list[tuple[int, ...]] = []
    while len(out) < 2 or math.prod(out[-1]) < most:
        if math.prod(grid) >= least:
            out.append(grid)
        grid = tuple(2 * g for g in grid)
    return out


def _below(side: int, step: int) -> int:
    """The largest multiple of ``step`` below ``side`` that no power of two explains: a prime number of steps."""
    for steps in range(side // step - 1, 2, -1):
        if all(steps % d for d in range(2, math.isqrt(steps) + 1)):
            return steps * step
    return side


#: What is counted: work and written elements by what was asked, each a list of (number of tokens, count).
Points = list[tuple[float, float]]


def _over_n(s: Subject) -> dict[str, tuple[Points, Points]]:
    """Counts over the number of tokens: at sizes that double, and, at odd ones, forward and backward."""
    claimed = s.claims.work or s.claims.memory
    if claimed and not s.claims.resolution_free and s.case.grid_setting is None:
        raise NotClaimed("the size is fixed, and the case names no grid_setting to build another one")

    def at(grid: tuple[int, ...], grad: bool = False, most: float = MOST, run: bool = False) -> Count:
        overrides: dict[str, Any] = {}
        if not s.claims.resolution_free and s.case.grid_setting is not None:
            overrides = {s.case.grid_setting: grid if len(grid) > 1 else grid[0]}
        return _at(s, grid, overrides, grad, most, run)

    def cheap(found: Count, n: int, more: int) -> bool:
        """Whether a call on ``more`` tokens may run, if it grows as is claimed, or as their square if nothing is."""
        written, work = (
            c * (more / n) ** power.get("N", 2)
            for c, power in ((found.written, s.claims.memory), (found.work, s.claims.work))
        )
        return written <= ELEMENTS and work <= ARITHMETIC

    if s.case.growth is not None:
        n = [math.prod(grid) for grid in s.case.growth]
        try:
            least = at(s.case.growth[0], run=True)
            rest = [at(grid, run=cheap(least, n[0], k)) for k, grid in zip(n[1:], s.case.growth[1:], strict=True)]
        except TooLong as error:
            raise NotClaimed(f"{error} for {n[-1]} tokens, too many to be counted") from error
        return {"": _points(list(zip(n, [least, *rest], strict=True)))}
    first, *_ = _doubled(s, 256, 256)
    run = False
    try:
        found = at(first, most=OPERATORS, run=True)
        pair = _doubled(s, 256, 4096)[-2:]
        run = cheap(found, math.prod(first), math.prod(pair[1]))
        if not run and not at(first, most=OPERATORS).fake:
            # Values that are looked at are counted on real tensors, of moderate size.
            pair, run = _doubled(s, 256, 1024)[-2:], True
    except TooLong:
        pair, run = _doubled(s, 24, 48)[:2], True
    try:
        counts = [(math.prod(grid), at(grid, run=run)) for grid in pair]
    except TooLong as error:
        raise NotClaimed(f"{error} for {math.prod(pair[1])} tokens, too many to be counted") from error
    out = {"": _points(counts)}
    step = s.claims.grid_multiple
    odd = [tuple(_below(side, step) for side in grid) for grid in pair]
    n = [math.prod(grid) for grid in odd]
    if not n[0] < counts[0][0] < n[1]:
        return out  # a side of a few steps has nothing like it below
    # Both of a pair are odd: another path may cost a constant factor more.
    for name, grad in ((" at odd sizes", False), (" forward and backward, at odd sizes", True)):
        try:
            out[name] = _points([(k, at(grid, grad, run=run)) for k, grid in zip(n, odd, strict=True)])
        except TooLong:
            continue
    return out


def _points(counts: Sequence[tuple[float, Count]]) -> tuple[Points, Points]:
    return [(n, c.work) for n, c in counts], [(n, c.written) for n, c in counts]


def _growth(s: Subject, kind: str) -> Evidence:
    claimed: Mapping[str, float] = getattr(s.claims, kind)
    if isinstance(s._growth, NotClaimed):
        raise s._growth
    if s._growth is None:
        try:
            s._growth = {"N": _over_n(s)} if "N" in claimed or not claimed else {}
        except NotClaimed as reason:
            s._growth = reason
            raise
        for symbol, settings in s.case.symbols.items():
            s._growth[symbol] = {"": _points([(value, _at(s, s.grid, overrides)) for value, overrides in settings])}
    said, loose, worst = [], False, None
    for symbol, power in (claimed or {"N": math.nan}).items():
        if symbol not in s._growth:
            said.append(f"{symbol}: not counted, the case names no settings for it")
            continue
        for where, both in s._growth[symbol].items():
            points = both[0 if kind == "work" else 1]
            measured = exponent(points)
            sizes = f"{points[-2][0]:g} to {points[-1][0]:g}"
            why = (
                f"{kind}{where} grows like {symbol}^{measured:.2f} from {symbol} = {sizes}, "
                f"claimed is {symbol}^{power:g}"
            )
            require(not measured > power + SLACK, why, measured, power + SLACK)
            if where:
                continue
            worst = measured if symbol == "N" or worst is None else worst
            said.append(
                f"{symbol}^{measured:.2f} from {sizes}" + (f", claimed {symbol}^{power:g}" if power == power else "")
            )
            loose = loose or measured < power - LOOSE
    return Evidence("; ".join(said), worst, loose=loose)


@claim("work", unless=lambda s: None if s.claims.work else "no growth of work is claimed", probe=True)
def work(s: Subject) -> Evidence:
    """Arithmetic grows no faster than claimed, at odd sizes and with gradients too."""
    return _growth(s, "work")


@claim("memory", unless=lambda s: None if s.claims.memory else "no growth of memory is claimed", probe=True)
def memory(s: Subject) -> Evidence:
    """Written elements grow no faster than claimed, at odd sizes and with gradients too."""
    return _growth(s, "memory")
