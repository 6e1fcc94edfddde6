"""The values that travel between floors: what a mechanism returns, keeps, plans and claims.

Everything here is a plain frozen value, registered as a pytree so that it passes through ``torch.compile``,
``torch.export`` and ``torch.utils.checkpoint``. Nothing here has parameters or knows a device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .checks import (  # noqa: F401
    check_choice,
    check_device,
    check_divides,
    check_dtype,
    check_flag,
    check_float,
    check_index,
    check_int,
    check_name,
    check_rank,
    check_real,
    check_type,
    check_valid,
    check_width,
    describe,
    to_list,
    to_tuple,
)

F = TypeVar("F", bound=Callable[..., Any])

PATTERNS = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")


def register_pytree(cls: type, flatten: Callable, unflatten: Callable) -> None:
    """Register ``cls`` as a pytree node that ``torch.export`` can name."""
    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the device of ``x``, where that device has it: statistics and states keep their precision."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    # Where it is off already the switch would cost more than a small product; a traced graph may run where it is on.
    if not torch.is_autocast_enabled(device) and not torch.compiler.is_compiling():
        return nullcontext()
    return torch.autocast(device, enabled=False)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of softmax statistics and recurrent states: float32, except that float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def traced_as_constant(fn: F) -> F:
    """Mark a function of plain Python values whose result the compiler may take as it is.

    What ``torch.compiler.assume_constant_result`` does, without importing the compiler, which takes a second.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# --------------------------------------------------------------------------------------------------------------------
# Partial: attention over part of the keys


class Partial(NamedTuple):
    """Attention over part of the keys, mergeable with the other parts.

    It stands for the sums ``exp(log_scale) * den`` (of the weights) and ``exp(log_scale) * num`` (of weighted values).
    A flash kernel gives ``(lse, 1, out)``; an unnormalised or linear part gives ``(0, den, num)``; the identity is
    ``(-inf, 0, 0)``. ``merge`` is associative and commutative, and gradients flow through all three fields: the
    reference scale inside ``merge`` is a constant because the value represented does not depend on it.

    Args:
        log_scale: (B, H, N) logarithm of the common scale, ``-inf`` for "nothing seen".
        den: (B, H, N) sum of weights, in units of ``exp(log_scale)``.
        num: (B, H, N, Dv) weighted sum of values, in the same units.

    >>> import torch
    >>> a = Partial(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 2, 3))
    >>> a.merge(Partial.identity_like(a)).finish().shape
    torch.Size([1, 1, 2, 3])
    """

    log_scale: Tensor
    den: Tensor
    num: Tensor

    @classmethod
    def identity_like(cls, other: Partial) -> Partial:
        """The part that has seen no key."""
        check_type("other", other, Partial)
        other._check()
        return cls(
            torch.full_like(other.log_scale, float("-inf")), torch.zeros_like(other.den), torch.zeros_like(other.num)
        )

    def _check(self) -> None:
        """Raise unless the three sums belong together."""
        scale, den, num = self
        if (
            isinstance(scale, Tensor) and isinstance(den, Tensor) and isinstance(num, Tensor)
            and scale.is_floating_point() and den.is_floating_point() and num.is_floating_point()
            and scale.shape == den.shape == num.shape[:-1] and num.dim() == scale.dim() + 1
            and scale.device == den.device == num.device
        ):  # fmt: skip
            return
        for name, value in zip(self._fields, self, strict=True):
            check_float(f"partial's {name}", value)
        shape = self.log_scale.shape
        if self.den.shape != shape or self.num.shape[:-1] != shape or self.num.dim() != len(shape) + 1:
            raise ValueError(
                f"partial must hold log_scale (B, H, N), den (B, H, N) and num (B, H, N, Dv), got {tuple(shape)}, "
                f"{tuple(self.den.shape)} and {tuple(self.num.shape)}"
            )
        check_device(**{f"partial's {name}": value for name, value in zip(self._fields, self, strict=True)})

    def merge(self, *others: Partial) -> Partial:
        """The attention over the union of disjoint sets of keys."""
        self._check()
        for other in others:
            check_type("others", other, Partial)
            for name, mine, theirs in zip(self._fields, self, other, strict=True):
                check_float(name, mine)
                check_float(name, theirs)
                if mine.shape != theirs.shape:
                    raise ValueError(
                        f"partials must have equal shapes to be merged, got {name} of {tuple(mine.shape)} and "
                        f"{tuple(theirs.shape)}"
                    )
                check_dtype(**{f"{name} of one": mine, f"{name} of the other": theirs})
                check_device(**{f"{name} of one": mine, f"{name} of the other": theirs})
        parts = (self, *others)
        # A part without weight must not set the scale: an empty linear part says (0, 0, 0), whatever the others' scale.
        tops = [torch.where(p.den == 0, float("-inf"), p.log_scale).detach() for p in parts]
        top = functools.reduce(torch.maximum, tops)
        reference = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        most = 700.0 if top.dtype == torch.float64 else 80.0  # only parts without weight reach it; exp stays finite
        den: Tensor | float = 0.0
        num: Tensor | float = 0.0
        for part in parts:
            weight = torch.exp((part.log_scale - reference).clamp(max=most))
            den = den + weight * part.den
            num = num + weight.unsqueeze(-1) * part.num
        assert isinstance(den, Tensor) and isinstance(num, Tensor)
        return Partial(top, den, num)

    def shift(self, log_weight: Tensor | float) -> Partial:
        """Multiply every weight by ``exp(log_weight)``, a number or a tensor that broadcasts to (B, H, N)."""
        self._check()
        if isinstance(log_weight, Tensor):
            check_float("log_weight", log_weight)
            given, most = log_weight.shape, self.log_scale.shape
            if len(given) > len(most) or any(a not in (1, b) for a, b in zip(given[::-1], most[::-1], strict=False)):
                raise ValueError(
                    f"log_weight must broadcast to (B, H, N) = {tuple(self.log_scale.shape)}, "
                    f"got {tuple(log_weight.shape)}"
                )
            check_device(log_weight=log_weight, log_scale=self.log_scale)
        else:
            check_real("log_weight", log_weight, below=float("inf"), finite=False)
        return Partial(self.log_scale + log_weight, self.den, self.num)

    def finish(self) -> Tensor:
        """(B, H, N, Dv): the normalised output; rows that saw nothing give zeros with zero gradients."""
        self._check()
        # By infinity where nothing was seen: zeros and zero gradients in one pass over the numerators.
        return self.num / self.den.masked_fill(self.den == 0, float("inf")).unsqueeze(-1)

    def lse(self) -> Tensor:
        """(B, H, N): logarithm of the sum of weights, ``-inf`` where nothing was seen."""
        self._check()
        empty = (self.den <= 0) | torch.isinf(self.log_scale)
        den = torch.where(empty, torch.ones_like(self.den), self.den)
        scale = torch.where(empty, torch.zeros_like(self.log_scale), self.log_scale)
        return torch.where(empty, torch.full_like(self.den, float("-inf")), scale + torch.log(den))


# --------------------------------------------------------------------------------------------------------------------
# Plan and State


class _TensorDict:
    """Shared shape of Plan and State: named tensors (or nested values of the same kind)."""

    tensors: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"{type(self).__name__.lower()} holds {sorted(self.tensors)}, not {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.tensors.items():
            if isinstance(value, _TensorDict):
                yield from value._named()
            elif isinstance(value, Tensor):
                yield name, value

    def get(self, name: str, default: Any = None) -> Any:
        return self.tensors.get(name, default)


@dataclass(frozen=True, eq=False)
class Plan(_TensorDict):
    """Discrete, data-dependent choices of a mechanism: which regions, buckets, heads or tokens.

    Args:
        kind: what the plan is for, for example ``"region-topk"``.
        tensors: integer or boolean tensors without gradient.
        shape: the shape of problem it was made for, as ``(name, size)`` pairs; ``expect`` checks it.

    >>> import torch
    >>> Plan("topk", {"index": torch.zeros(2, 3, dtype=torch.long)}, (("N", 3),)).expect("topk", N=3)["index"].shape
    torch.Size([2, 3])
    """

    kind: str
    tensors: dict[str, Any]
    shape: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_type("kind", self.kind, str)
        check_type("tensors", self.tensors, dict, "a dictionary of tensors by name")
        pairs = isinstance(self.shape, (tuple, list)) and all(isinstance(p, (tuple, list)) for p in self.shape)
        if not pairs or not all(len(p) == 2 and isinstance(p[0], str) for p in self.shape):
            raise TypeError(f"shape must hold (name, size) pairs such as (('N', 3),), got {describe(self.shape)}")

    def expect(self, kind: str, **shape: Any) -> Plan:
        """This plan, or ``ValueError`` when it was made for something else."""
        if self.kind != kind:
            raise ValueError(f"plan is of kind {self.kind!r}, this mechanism executes plans of kind {kind!r}")
        made = dict(self.shape)
        for name, size in shape.items():
            if made.get(name, size) != size:
                raise ValueError(
                    f"plan was made for {name}={made[name]}, but the input has {name}={size}; "
                    "make a new one with m.plan(x, ...)"
                )
        return self

    def choices(self, name: str, shape: Sequence[int | None], count: int, what: str) -> Tensor:
        """The choices ``name``: integers of ``shape`` (``None``: any size), each one of ``count`` of ``what``.

        A mechanism reads its plan by this and by nothing else: a plan may come from elsewhere, and an index beyond what
        it points at reads another sample's memory. Whatever else it holds raises ``TypeError`` or ``ValueError``; the
        numbers are looked at as :func:`~attnlib.checks.check_within` says.
        """
        index = self[name]
        given = tuple(index.shape) if isinstance(index, Tensor) else ()
        given += (0,) * (len(shape) - len(given))
        wanted = [g if size is None else size for g, size in zip(given, shape, strict=False)]
        check_index(f"plan's {name}", index, wanted, count, what)
        return index


class Wanted(Plan):
    """Asks a call to leave its choice here, instead of telling it what to choose: how ``make_plan`` runs the call."""


@dataclass(frozen=True, eq=False)
class State(_TensorDict):
    """What a mechanism keeps from call to call; every tensor has the batch as its first axis.

    Args:
        tensors: by name; a value may be a state of its own.
        kind: name of the mechanism it belongs to; :meth:`expect` checks it. Empty: not known.
        types: names of the types of ``x`` and of every floating-point tensor, as its owner made it. Empty: not known.

    >>> import torch
    >>> State({"S": torch.zeros(2, 4)}).repeat(3)["S"].shape
    torch.Size([6, 4])
    """

    tensors: dict[str, Any]
    kind: str = ""
    types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_type("tensors", self.tensors, dict, "a dictionary of tensors by name")
        check_type("kind", self.kind, str)

    def owned(self, kind: str, dtype: torch.dtype) -> State:
        """The same as ``kind`` made it beside ``x`` of ``dtype``."""
        return State(self.tensors, kind, (str(dtype), *[str(t.dtype) for t in self._floats()]))

    def _floats(self) -> list[Tensor]:
        return [t for _, t in self._named() if t.is_floating_point()]

    def expect(
        self, kind: str, batch: int | None = None, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """This state, or an error when it belongs to another mechanism, batch, device or type of ``x``."""
        if self.kind and self.kind != kind:
            raise ValueError(f"state belongs to {self.kind!r}, not to {kind!r}; state=None starts a sequence")
        if not self.tensors and not self.kind:
            raise ValueError(f"state holds nothing that {kind!r} could continue; state=None starts a sequence")
        for name, t in self._named():
            if batch is not None and (t.dim() == 0 or t.shape[0] != batch):
                given = t.shape[0] if t.dim() else "no"
                raise ValueError(
                    f"state holds {name!r} of {given} samples, but x has {batch}; see state.select and state.repeat"
                )
            if device is not None and t.device != device:
                raise ValueError(f"state holds {name!r} on {t.device}, but x lies on {device}")
        if dtype is not None and self.types:
            self._expect_types(kind, dtype)
        return self

    def _expect_types(self, kind: str, dtype: torch.dtype) -> None:
        floats = [(name, t) for name, t in self._named() if t.is_floating_point()]
        beside, *made = self.types
        if len(made) != len(floats):
            return  # somebody put other tensors into it
        for (name, t), was in zip(floats, made, strict=True):
            possible = [was] if beside == str(dtype) else [str(d) for d in _beside(dtype, t.device)]
            if str(t.dtype) not in possible:
                raise TypeError(
                    f"state holds {name!r} in {t.dtype}, but beside x of {dtype} {kind!r} needs "
                    f"{' or '.join(possible)}; see state.map"
                )

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """Apply ``fn`` to every tensor; ``TypeError`` where it makes numbers of counts, or counts of numbers."""
        out: dict[str, Any] = {}
        for name, value in self.tensors.items():
            check_type(f"state's {name}", value, (Tensor, State), "a tensor, or a state of its own")
            made = out[name] = value.map(fn) if isinstance(value, State) else fn(value)
            if isinstance(value, Tensor) and isinstance(made, Tensor) and _sort(value) != _sort(made):
                raise TypeError(
                    f"fn turned {name!r} of the state from {value.dtype} into {made.dtype}; change the type of "
                    "floating-point tensors only: t.half() if t.is_floating_point() else t"
                )
        return State(out, self.kind, self.types)

    def select(self, index: Tensor) -> State:
        """Keep the samples ``index`` (B',), in that order; ``ValueError`` for one that it does not hold."""
        check_rank("index", index, 1, "(B',)")
        first = next(self._named(), None)
        check_device(**{"the state": first[1] if first else None, "index": index})
        check_index("index", index, None, first[1].shape[0] if first else 0, "sample")
        return self.map(lambda t: t.index_select(0, index))

    reorder = select

    def repeat(self, times: int) -> State:
        """Repeat every sample ``times`` times, copies adjacent (as beam search needs)."""
        check_int("times", times, least=1)
        return self.map(lambda t: t.repeat_interleave(times, dim=0))

    def detach(self) -> State:
        """The same state cut from the graph."""
        return self.map(Tensor.detach)

    def replace(self, **tensors: Any) -> State:
        """A copy with some tensors exchanged."""
        return State({**self.tensors, **tensors}, self.kind, self.types)

    def numel(self) -> int:
        """Number of elements held, for memory accounts."""
        return sum(v.numel() for v in self.tensors.values())


def _sort(t: Tensor) -> str:
    return "bool" if t.dtype == torch.bool else "float" if t.is_floating_point() else "int"


def _beside(dtype: torch.dtype, device: torch.device) -> list[torch.dtype]:
    """The types that a state beside ``x`` of ``dtype`` may have: its own, that of statistics, that of autocast."""
    found = [dtype, stats_dtype(dtype)]
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        found.append(torch.get_autocast_dtype(device.type))
    return list(dict.fromkeys(found))


def _flatten_named(value: Plan | State) -> tuple[list[Any], Any]:
    keys = tuple(value.tensors)
    extra = (value.kind, value.shape) if isinstance(value, Plan) else (value.kind, value.types)
    return [value.tensors[k] for k in keys], (keys, extra)


register_pytree(
    Plan, _flatten_named, lambda leaves, ctx: Plan(ctx[1][0], dict(zip(ctx[0], leaves, strict=True)), ctx[1][1])
)
register_pytree(State, _flatten_named, lambda leaves, ctx: State(dict(zip(ctx[0], leaves, strict=True)), *ctx[1]))


class Output(NamedTuple):
    """What a mechanism returns when extras were asked for with ``returns=(...)``.

    Args:
        y: (B, *grid, C) the tokens.
        state: what to hand to the next call, for streaming.
        carry: what to hand to the next block of the same forward.
        weights: (B, H, N, M) attention weights.
        losses: named scalar losses, already averaged, not weighted.
    """

    y: Tensor
    state: State | None = None
    carry: Any = None
    weights: Tensor | None = None
    losses: dict[str, Tensor] | None = None


EXTRAS = ("state", "carry", "weights", "losses")


# --------------------------------------------------------------------------------------------------------------------
# Traits

#: Claims that are true or false.
_FLAGS = (
    "mask", "valid", "layout", "streaming", "batch_independent", "permutation_equivariant", "resolution_free",
    "needs_plan", "carries", "weights", "traceable",
)  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """What a mechanism claims; ``attnlib.check`` tests every field.

    Args:
        patterns: of :data:`PATTERNS`. Causal cross means: the output at t reads queries up to t and the whole context.
        grid_ranks: ranks of ``x`` between batch and channels: 1 sequence, 2 image, 3 video.
        mask: takes a pairwise ``mask``.
        valid: takes ``valid`` (which tokens exist). Every finished mechanism does.
        layout: takes tokens beside the grid through ``layout``.
        streaming: ``step`` equals ``forward``.
        work: growth exponents of arithmetic per symbol, projections subtracted, e.g. ``{"N": 2}``.
        memory: growth exponents of written elements beyond inputs and outputs, per symbol.
        gradient: ``"exact"``, ``"surrogate"`` (not the derivative of the forward) or ``"stopped"`` (choices detached).
        batch_independent: a sample's output does not depend on the others.
        permutation_equivariant: permuting tokens permutes outputs.
        resolution_free: one instance takes inputs of any size.
        needs_plan: makes discrete choices, so it has ``plan``.
        carries: passes a ``carry`` from block to block.
        losses: names of the losses it can return.
        weights: can return attention weights.
        traceable: ``torch.compile(fullgraph=True)`` and ``torch.export`` succeed.
        grid_multiple: every grid side must be a multiple of this (1: any size).
    """

    patterns: frozenset[str] = frozenset({"noncausal-self"})
    grid_ranks: frozenset[int] = frozenset({1})
    mask: bool = False
    valid: bool = True
    layout: bool = False
    streaming: bool = False
    work: Mapping[str, float] = field(default_factory=lambda: {"N": 2})
    memory: Mapping[str, float] = field(default_factory=lambda: {"N": 2})
    gradient: str = "exact"
    batch_independent: bool = True
    permutation_equivariant: bool = False
    resolution_free: bool = True
    needs_plan: bool = False
    carries: bool = False
    losses: tuple[str, ...] = ()
    weights: bool = False
    traceable: bool = True
    grid_multiple: int = 1

    def __post_init__(self) -> None:
        for name, example in (("patterns", '{"causal-self"}'), ("grid_ranks", "{1, 2}")):
            held = getattr(self, name)
            if isinstance(held, (str, Tensor, Mapping)) or not isinstance(held, Iterable):
                raise TypeError(f"{name} must be a set such as {example}, got {describe(held)}")
            object.__setattr__(self, name, frozenset(held))
        for pattern in self.patterns:
            check_choice("patterns", pattern, PATTERNS)
        for rank in self.grid_ranks:
            check_choice("grid_ranks", rank, (1, 2, 3))
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        for name in ("work", "memory"):
            exponents = getattr(self, name)
            check_type(name, exponents, Mapping, "a dictionary of exponents by symbol")
            for symbol, exponent in exponents.items():
                check_type(f"a symbol of {name}", symbol, str)
                check_real(f"{name}[{symbol!r}]", exponent)
        check_type("losses", self.losses, (tuple, list), "a tuple of names")
        for loss in self.losses:
            check_name("a name in losses", loss)
        check_choice("gradient", self.gradient, ("exact", "surrogate", "stopped"))
        check_int("grid_multiple", self.grid_multiple, least=1)

    def but(self, **changes: Any) -> Traits:
        """A copy with some claims changed."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        # A mechanism says its traits at every call, mostly the same ones: each variant is made and checked once.
        made: dict[Any, Traits] = self.__dict__.setdefault("_made", {})
        growth = [tuple(v.items()) if type(v) is dict else v for v in changes.values()]
        said = (*changes, *growth, *map(type, growth))
        try:
            found = made.get(said)
        except TypeError:  # a value that has no hash
            return replace(self, **changes)
        if found is None:
            if len(made) >= 64:
                made.clear()
            found = made[said] = replace(self, **changes)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    def within(self, bound: Traits) -> list[str]:
        """Claims of this instance that exceed the class's upper ``bound``; empty when it keeps its word."""
        excess = []
        for f in fields(self):
            mine, most = getattr(self, f.name), getattr(bound, f.name)
            if isinstance(mine, frozenset) and not mine <= most:
                excess.append(f.name)
            elif f.name in ("mask", "valid", "layout", "streaming", "weights", "traceable") and mine and not most:
                excess.append(f.name)
        return excess

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, frozenset):
                value = sorted(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            out[f.name] = list(value) if isinstance(value, tuple) else value
        return out
