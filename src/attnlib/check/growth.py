"""Growth of arithmetic and memory, counted on tensors without data, never by the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
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

aten = torch.ops.aten
# These read or write the elements they name, not the whole of what they point into.
_PICKS = {aten.index, aten.index_select, aten.gather, aten.embedding, aten.slice_scatter, aten.select_scatter}
_PUTS = {
    aten.index_put_, aten.scatter_, aten.scatter_add_, aten.index_add_, aten.index_copy_, aten.scatter_reduce_,
    aten._index_put_impl_, aten.index_reduce_,
}  # fmt: skip
_FREE = {aten._unsafe_view, aten.lift_fresh, aten.detach, aten.detach_}


class Counter(TorchDispatchMode):
    """Counts arithmetic and written elements of everything below it.

    ``work``: the FLOP formula of an operator where torch or the library registers one, otherwise the larger of the
    elements read and written. ``written``: elements of every tensor that is not a view of an input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0
        self.written = 0.0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
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
        if packet in flop_registry:
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


def count(f: Callable[..., Any], *inputs: Tensor) -> tuple[float, float, bool]:
    """``(work, written elements, without data)`` of ``f(*inputs)``.

    Tensors carry no data, so that large sizes cost nothing; a mechanism that looks at values is counted on real ones.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator for a whole layer cannot be counted
    try:
        return _count(f, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _count(f: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[float, float, bool]:
    for fake in (True, False):
        counter = Counter()
        try:
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext() as mode:
                given = inputs if mode is None else [mode.from_tensor(t) for t in inputs]
                with counter, _Projections(counter):
                    f(*given)
            return counter.work, counter.written, fake
        except Exception:
            if not fake:
                raise
    raise AssertionError


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of log(count) over log(size) between the two largest sizes, where the leading term speaks."""
    (n0, c0), (n1, c1) = points[-2:]
    return math.log(max(c1, 1.0) / max(c0, 1.0)) / math.log(n1 / n0)


def _at(s: Subject, grid: tuple[int, ...], overrides: Mapping[str, Any]) -> tuple[float, float, bool]:
    m = s.fresh(torch.float32, **overrides)
    scene = s.scene

    inputs = [torch.randn(1, *grid, s.width)]
    if scene.cross:
        fixed = s.case.context_grid
        other = grid if fixed is None or len(fixed) == len(grid) else fixed
        inputs.append(torch.randn(1, *other, s.context_width))
    return count(lambda x, context=None: s.y(m, x, context, scene), *inputs)


def _grids(s: Subject) -> list[tuple[int, ...]]:
    if s.case.growth is not None:
        return list(s.case.growth)
    grid = s.grid
    out: list[tuple[int, ...]] = []
    while len(out) < 2 or math.prod(out[-1]) < 4096:
        if math.prod(grid) >= 256:
            out.append(grid)
        grid = tuple(2 * g for g in grid)
    return out


def _over_n(s: Subject) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    claimed = s.claims.work or s.claims.memory
    if claimed and not s.claims.resolution_free and s.case.grid_setting is None:
        raise NotClaimed("the size is fixed, and the case names no grid_setting to build another one")
    work: list[tuple[float, float]] = []
    written: list[tuple[float, float]] = []
    for grid in _grids(s):
        overrides = {}
        if not s.claims.resolution_free and s.case.grid_setting is not None:
            overrides = {s.case.grid_setting: grid if len(grid) > 1 else grid[0]}
        w, e, fake = _at(s, grid, overrides)
        work.append((math.prod(grid), w))
        written.append((math.prod(grid), e))
        if not fake and s.case.growth is None and len(work) >= 2 and math.prod(grid) >= 1024:
            break  # real tensors cost real time
    return work, written


def _growth(s: Subject, kind: str) -> Evidence:
    claimed: Mapping[str, float] = getattr(s.claims, kind)
    if s._growth is None:
        s._growth = {"N": _over_n(s)} if "N" in claimed or not claimed else {}
        for symbol, settings in s.case.symbols.items():
            counts = [(value, *_at(s, s.grid, overrides)) for value, overrides in settings]
            s._growth[symbol] = ([(v, w) for v, w, _, _ in counts], [(v, e) for v, _, e, _ in counts])
    said, loose, worst = [], False, None
    for symbol, power in (claimed or {"N": math.nan}).items():
        if symbol not in s._growth:
            said.append(f"{symbol}: not counted, the case names no settings for it")
            continue
        points = s._growth[symbol][0 if kind == "work" else 1]
        measured = exponent(points)
        sizes = f"{points[-2][0]:g} to {points[-1][0]:g}"
        require(
            not measured > power + SLACK,
            f"{kind} grows like {symbol}^{measured:.2f} from {symbol} = {sizes}, claimed is {symbol}^{power:g}",
            measured,
            power + SLACK,
        )
        worst = measured if symbol == "N" or worst is None else worst
        said.append(
            f"{symbol}^{measured:.2f} from {sizes}" + (f", claimed {symbol}^{power:g}" if power == power else "")
        )
        loose = loose or measured < power - LOOSE
    return Evidence("; ".join(said), worst, loose=loose)


@claim("work", unless=lambda s: None if s.claims.work else "no growth of work is claimed", probe=True)
def work(s: Subject) -> Evidence:
    """Arithmetic grows no faster than claimed."""
    return _growth(s, "work")


@claim("memory", unless=lambda s: None if s.claims.memory else "no growth of memory is claimed", probe=True)
def memory(s: Subject) -> Evidence:
    """Written elements grow no faster than claimed."""
    return _growth(s, "memory")
