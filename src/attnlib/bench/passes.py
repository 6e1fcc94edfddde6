"""Attention algorithms as cascades of Einsums: how often they must read their keys, and what they must keep meanwhile.

An algorithm is written as a list of Einsums on named ranks (:class:`Cascade`). From the text alone follow

- **passes** over a rank: a tensor that was reduced over the whole rank, used beside a tensor that still carries the
  rank, forces another walk along it. Softmax with its stabilising maximum takes three, with local maxima two, with a
  running maximum one (:func:`softmax_cascade`);
- the **live footprint**: what one query (or one head of a linear mechanism) must keep between iterations and passes;
- the **traffic** to and from memory, fused or not, and the number of operations.

The text also runs: :meth:`Cascade.evaluate` computes it on small tensors, which is how each description of an operator
(:data:`OPERATORS`) is held to the operator.

Syntax, one Einsum per line; ``b,h`` are written ``~``::

    QK[~p,m] += Q[~p,e] * K[~m,e]        sum over ranks that are missing on the left (e)
    GM[~p] max= QK[~p,m]                 maximum over them
    SN[~p,m] = expsub(QK[~p,m], GM[~p])  no reduction
    RM[~p,m1+1] = max(RM[~p,m1], LM[~p,m1])   iteration: the next generation from this one
    RM[~p,0] = -inf                      the first generation
    AV[~p,f] = RNV[~p,f,-1] / RD[~p,-1]  the last generation
    X[~t+k-1,c], K[~IDX[p,w],e]          shifted and gathered ranks; outside a tensor it reads zero

Reference: Nayak et al., 2024, arXiv 2406.10491 (FuseMax).
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..normalizers import ACTIVATIONS, Activated, Normalizer, as_normalizer
from ..types import check_choice

#: What a function of the language computes, and which operations it counts as.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, int]]] = {
    "exp": (torch.exp, {"exp": 1}),
    # exp(a - b), zero where nothing was seen (a = -inf), whatever b is
    "expsub": (lambda a, b: torch.where(torch.isneginf(a), 0.0, torch.exp(a - b)), {"exp": 1, "add": 1}),
    "max": (torch.maximum, {"max": 1}),
    "relu": (torch.relu, {"max": 1}),
    "clip": (lambda a: a.clamp(0, 1), {"max": 2}),
    "sigmoid": (torch.sigmoid, {"exp": 1, "add": 1, "divide": 1}),
    "softplus": (F.softplus, {"exp": 1, "add": 1, "log": 1}),
    "elu1": (ACTIVATIONS["elu1"][0], {"exp": 1, "add": 1, "max": 1}),
    "finite": (lambda a: torch.isfinite(a).to(a.dtype), {"max": 1}),
    "positive": (lambda a: (a > 0).to(a.dtype), {"max": 1}),
    "less": (lambda a, b: (a <= b).to(a.dtype), {"max": 1}),
    "pow": (lambda a, b: a**b, {"exp": 1, "log": 1}),
}
_OPERATIONS: dict[type, tuple[Callable[[Any, Any], Any], str]] = {
    ast.Add: (lambda a, b: a + b, "add"),
    ast.Sub: (lambda a, b: a - b, "add"),
    ast.Mult: (lambda a, b: a * b, "mac"),
    # a row that saw nothing divides zero by zero and gives zero
    ast.Div: (lambda a, b: torch.where(b == 0, torch.zeros_like(a * b), a / torch.where(b == 0, 1.0, b)), "divide"),
}
_REDUCTIONS = {"+=": "sum", "max=": "max", "=": None}

#: A size as a polynomial: ranks of each monomial (sorted, with repeats) -> coefficient.
Poly = Counter


# --------------------------------------------------------------------------------------------------------------------
# One Einsum


def _ranks(node: ast.AST) -> Iterator[str]:
    """Rank variables in an index or expression: the names that stand inside brackets."""
    if isinstance(node, ast.Subscript):
        for index in _indices(node):
            yield from (n for n in _names(index))
    else:
        for child in ast.iter_child_nodes(node):
            yield from _ranks(child)


def _names(index: ast.AST) -> Iterator[str]:
    """Rank variables of one index; the name of a gathering tensor is none."""
    if isinstance(index, ast.Subscript):
        for inner in _indices(index):
            yield from _names(inner)
    elif isinstance(index, ast.Name):
        yield index.id
    else:
        for child in ast.iter_child_nodes(index):
            yield from _names(child)


def _indices(node: ast.Subscript) -> list[ast.expr]:
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _refs(node: ast.AST) -> Iterator[ast.Subscript]:
    """Tensors read in an expression, gathering tensors included."""
    for child in ast.walk(node):
        if isinstance(child, ast.Subscript):
            yield child


def _name(node: ast.Subscript) -> str:
    assert isinstance(node.value, ast.Name)
    return node.value.id


def _constant(index: ast.expr) -> int | None:
    """An index that is a number: 0 for the first generation, -1 for the last."""
    if isinstance(index, ast.Constant) and isinstance(index.value, int):
        return index.value
    if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.USub) and isinstance(index.operand, ast.Constant):
        return -int(index.operand.value)  # type: ignore[arg-type]
    return None


def _next_of(index: ast.expr) -> str | None:
    """``r`` of an index ``r+1``."""
    if (
        isinstance(index, ast.BinOp)
        and isinstance(index.op, ast.Add)
        and isinstance(index.left, ast.Name)
        and _constant(index.right) == 1
    ):
        return index.left.id
    return None


@dataclass(frozen=True)
class Einsum:
    """One line of a cascade."""

    text: str
    out: str
    indices: tuple[ast.expr, ...] = field(repr=False)
    reduction: str | None
    body: ast.expr = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Einsum:
        """From a line of the language; ``ValueError`` says what is wrong with it."""
        for sign in ("max=", "+=", "="):
            left, found, right = text.partition(sign)
            if found:
                break
        else:
            raise ValueError(f"{text!r} must read OUT[ranks] = expression, with =, += or max=")
        try:
            target = ast.parse(left.strip().replace("~", "b,h,"), mode="eval").body
            body = ast.parse(right.strip().replace("~", "b,h,").replace("inf", "1e999"), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"{text!r}: {error.msg}") from None
        if not isinstance(target, ast.Subscript) or not isinstance(target.value, ast.Name):
            raise ValueError(f"{text!r}: the left side must be a tensor with its ranks, for example S[p,m]")
        for node in ast.walk(body):
            if isinstance(node, ast.Call):
                check_choice("function", getattr(node.func, "id", ast.dump(node.func)), FUNCTIONS)
        made = cls(text.strip(), target.value.id, tuple(_indices(target)), _REDUCTIONS[found], body)
        if made.reduction is None and made.reduced:
            raise ValueError(f"{text!r} reduces over {made.reduced}; write += or max=")
        return made

    @cached_property
    def out_ranks(self) -> list[str]:
        """Rank variables on the left, in order."""
        return [n for index in self.indices for n in _names(index)]

    @cached_property
    def reduced(self) -> list[str]:
        """Ranks that are summed (or maximised) away."""
        return [r for r in dict.fromkeys(_ranks(self.body)) if r not in self.out_ranks]

    @cached_property
    def ranks(self) -> list[str]:
        """All rank variables: the points at which the Einsum computes."""
        return self.out_ranks + self.reduced

    @cached_property
    def generation(self) -> str | None:
        """The rank along which this line iterates (``r`` when the left side says ``r+1``)."""
        return next((r for r in map(_next_of, self.indices) if r is not None), None)

    @property
    def initial(self) -> bool:
        """Sets a first generation."""
        return any(_constant(index) is not None for index in self.indices)

    @cached_property
    def reads(self) -> list[tuple[str, frozenset[str], bool]]:
        """(tensor, rank variables, reads a last generation) of everything on the right."""
        return [
            (_name(r), frozenset(_ranks(r)), any(_constant(i) == -1 for i in _indices(r))) for r in _refs(self.body)
        ]

    @cached_property
    def operations(self) -> Counter[str]:
        """Operations per point: a product that is summed is one ``mac``."""
        found: Counter[str] = Counter()
        for node in _arithmetic(self.body):
            if isinstance(node, ast.BinOp):
                found[_OPERATIONS[type(node.op)][1]] += 1
            elif isinstance(node, ast.Call):
                found.update(FUNCTIONS[node.func.id][1])  # type: ignore[attr-defined]
        if self.reduction == "max":
            found["max"] += 1
        elif self.reduction == "sum" and not isinstance(self.body, ast.BinOp):
            found["add"] += 1
        elif self.reduction == "sum" and not isinstance(self.body.op, ast.Mult):  # type: ignore[attr-defined]
            found["add"] += 1
        return found


def _arithmetic(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that compute on elements; arithmetic of indices is not counted."""
    yield node
    if not isinstance(node, ast.Subscript):
        for child in ast.iter_child_nodes(node):
            yield from _arithmetic(child)


# --------------------------------------------------------------------------------------------------------------------
# The cascade


class Cascade:
    """A list of Einsums, its inputs and outputs, and the rank whose passes are asked for.

    Args:
        text: the Einsums, one per line.
        inputs: name -> ranks, e.g. ``{"Q": "b h p e"}``. A name without ranks is a number.
        outputs: names of the results.
        over: the rank walked along, outermost part first: ``("m",)``, or ``("m1", "m0")`` when it is cut into blocks.
        per: ranks of the independent problems; footprints are told for one of them.
        name: for messages.
        letters: what ranks that stand together are called in :meth:`footprint_text`, by default the first letter of
            ``over`` for all of it.

    Raises:
        ValueError: a line that cannot be read, or a tensor that is read before anything made it.

    >>> c = Cascade("S[p] += X[m,p]", {"X": "m p"}, ["S"], over=("m",), per=("p",))
    >>> c.passes(), c.footprint_text()
    (1, '1')
    """

    def __init__(
        self,
        text: str,
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        over: Sequence[str],
        per: Sequence[str] = ("b", "h", "p"),
        name: str = "cascade",
        letters: Mapping[tuple[str, ...], str] | None = None,
    ):
        self.name, self.outputs, self.over, self.per = name, list(outputs), tuple(over), tuple(per)
        self.letters = {self.over: self.over[0].rstrip("0123456789").upper(), **(letters or {})}
        self.inputs = {n: tuple(r.split()) for n, r in inputs.items()}
        self.einsums = [Einsum.parse(line) for line in text.strip().splitlines() if line.strip()]
        made = set(self.inputs) | {e.out for e in self.einsums}
        for e in self.einsums:
            for ref, _, _ in e.reads:
                if ref not in made:
                    raise ValueError(f"{name}: {e.text!r} reads {ref}, which is neither an input nor made")
        for out in self.outputs:
            if out not in made:
                raise ValueError(f"{name}: the output {out} is not made")

    def __str__(self) -> str:
        return "\n".join(e.text for e in self.einsums)

    # ---- passes

    @cached_property
    def _levels(self) -> tuple[dict[str, float], dict[int, float]]:
        """When each tensor is there, and when each Einsum runs.

        ``k``: element by element during pass k; ``k + 0.5``: only after pass k has ended.
        """
        top, whole = self.over[0], set(self.over)
        at: dict[str, float] = {}
        runs: dict[int, float] = {}
        for _ in range(2 * len(self.einsums) + 2):  # iterations read what stands below them: until nothing changes
            before = dict(at)
            for number, e in enumerate(self.einsums):
                level = 0.0
                for ref, ranks, _ in e.reads:
                    if ref in self.inputs:
                        level = max(level, 1.0 if ranks & whole else 0.0)
                        continue
                    known = at.get(ref, 0.0)
                    # read as a whole: its walk has to end first
                    ended = known and not ranks & whole
                    level = max(level, math.floor(known) + 0.5 if ended else known)
                here = set(e.ranks)
                if whole <= here:
                    level = max(1.0, math.ceil(level))
                runs[number] = level
                if here & whole and not set(e.out_ranks) & whole:
                    out = math.floor(level) + 0.5  # reduced: known at the end
                else:
                    out = level
                at[e.out] = max(at.get(e.out, 0.0), out)
            if at == before:
                break
        else:
            raise ValueError(f"{self.name}: an iteration over {top} reads its own future")
        return at, runs

    def passes(self) -> int:
        """How often this cascade must walk along :attr:`over`, whatever the schedule."""
        _, runs = self._levels
        return int(max((v for n, v in runs.items() if set(self.over) <= set(self.einsums[n].ranks)), default=0))

    def _ranks_of(self, tensor: str) -> list[str]:
        """Rank variables of a tensor where it is made; generations are kept one at a time."""
        if tensor in self.inputs:
            return list(self.inputs[tensor])
        e = next(e for e in self.einsums if e.out == tensor and not e.initial)
        return [r for r in e.out_ranks if r != e.generation]

    def _last_use(self) -> dict[str, float]:
        _, runs = self._levels
        last: dict[str, float] = {}
        for number, e in enumerate(self.einsums):
            for ref, _, _ in e.reads:
                last[ref] = max(last.get(ref, 0.0), runs[number])
        return last

    def crossing(self) -> list[tuple[str, float, float]]:
        """Tensors along :attr:`over` that must outlive the pass that makes them: (name, made at, last used at)."""
        at, _ = self._levels
        last, whole = self._last_use(), set(self.over)
        made = dict.fromkeys(e.out for e in self.einsums)
        return [(t, at[t], last[t]) for t in made if whole & set(self._ranks_of(t)) and last.get(t, 0.0) > at[t]]

    def footprint(self) -> Poly:
        """What one problem of :attr:`per` keeps, at its largest over the passes, as a polynomial in the ranks.

        Counted are its own inputs (a query), running values, results of reductions, and tensors along the rank that
        must outlive their pass; inputs along the rank are read again and not kept.
        """
        at, runs = self._levels
        last, whole = self._last_use(), set(self.over)
        times = sorted({v for v in runs.values() if v})
        best: Poly = Poly()
        made = dict.fromkeys(e.out for e in self.einsums)
        for time in times:
            live: Poly = Poly()
            here = [e for n, e in enumerate(self.einsums) if runs[n] == time]
            own = {(ref, ranks) for e in here for ref, ranks, _ in e.reads if ref in self.inputs}
            for _, read in own:
                # numbers and tables shared by all problems are not a problem's own
                if not whole & read and set(self.per) <= read and read > set(self.per):
                    live[self._monomial(sorted(read))] += 1
            for t in made:
                ranks = tuple(self._ranks_of(t))
                running = any(e.generation is not None and e.out == t for e in self.einsums)
                if whole & set(ranks):
                    kept = at[t] < time <= last.get(t, 0.0) or (time % 1 and at[t] == time)
                elif running:
                    kept = any(e.out == t for e in here)
                else:
                    # an accumulator of this pass, or what an earlier one left for this one
                    kept = (time % 1 == 0 and at[t] == time + 0.5 and t in {e.out for e in here}) or (
                        0 < at[t] < time <= last.get(t, 0.0)  # what needs no walk can be made when it is needed
                    )
                if kept:
                    live[self._monomial(ranks)] += 1
            if self._order(live) > self._order(best):
                best = live
        return best

    def _monomial(self, ranks: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted(r for r in ranks if r not in self.per))

    def _order(self, poly: Poly) -> tuple[int, float]:
        """Which of two footprints is larger for long ranks: those along the rank first, then the number of elements."""
        return (
            sum(c for mono, c in poly.items() if set(self.over) <= set(mono)),
            sum(c * 64.0 ** len(mono) for mono, c in poly.items()),
        )

    def footprint_text(self) -> str:
        """:meth:`footprint` as text, e.g. ``"E + F + 2"``; the whole rank is called by its letter."""
        return _poly_text(self.footprint(), self.letters)

    # ---- counting

    def _size(self, ranks: Sequence[str], sizes: Mapping[str, int]) -> int:
        missing = [r for r in ranks if r not in sizes]
        if missing:
            raise ValueError(f"{self.name}: sizes lack {missing}; given are {sorted(sizes)}")
        return math.prod(sizes[r] for r in ranks)

    def state(self, sizes: Mapping[str, int]) -> int:
        """:meth:`footprint` in elements."""
        return sum(c * self._size(mono, sizes) for mono, c in self.footprint().items())

    def operations(self, sizes: Mapping[str, int], exp: Mapping[str, int] | None = None) -> Counter[str]:
        """Operations of all Einsums: ``mac``, ``add``, ``max``, ``exp``, ``divide``.

        Args:
            sizes: size of every rank.
            exp: what an exponential is made of; FuseMax builds it from ``{"mac": 6}``.
        """
        total: Counter[str] = Counter()
        for e in self.einsums:
            if e.initial:
                continue
            for name, count in e.operations.items():
                for part, times in (exp if name == "exp" and exp is not None else {name: 1}).items():
                    total[part] += times * count * self._size(e.ranks, sizes)
        return total

    def traffic(
        self,
        sizes: Mapping[str, int],
        tile: Mapping[str, int] | None = None,
        crossing: str = "keep",
        groups: Sequence[Sequence[str]] | None = None,
    ) -> int:
        """Elements moved between memory and a buffer.

        Args:
            sizes: size of every rank.
            tile: how much of a rank of :attr:`per` is worked on at once, e.g. ``{"p": 256}``; inputs without that rank
                are read again for every tile. By default everything at once.
            crossing: what happens to tensors that outlive their pass: ``"keep"`` them in the buffer, ``"spill"`` them
                to memory, or ``"recompute"`` them, reading the inputs they stem from in every later pass.
            groups: instead of one fused walk, names of Einsums that run together; each group reads what it does not
                make and writes what others (or the caller) need.

        Returns:
            The number of elements, a lower bound for this cascade and this way to run it.
        """
        check_choice("crossing", crossing, ("keep", "spill", "recompute"))
        if groups is not None:
            return self._unfused(sizes, groups)
        _, runs = self._levels
        tile = dict(tile or {})
        total = sum(self._size(self._ranks_of(o), sizes) for o in self.outputs)
        readers: dict[str, set[float]] = {}
        for number, e in enumerate(self.einsums):
            for ref, _, _ in e.reads:
                if ref in self.inputs:
                    readers.setdefault(ref, set()).add(runs[number])
        for name, made, _ in self.crossing():
            later = {v for n, v in runs.items() if v > made and name in {r for r, _, _ in self.einsums[n].reads}}
            if crossing == "spill":
                total += (1 + len(later)) * self._size(self._ranks_of(name), sizes)
            elif crossing == "recompute":
                for source in self._sources(name):
                    readers[source] |= later
        for name, when in readers.items():
            ranks = self.inputs[name]
            times = len({math.ceil(w) for w in when}) if set(ranks) & set(self.over) else 1
            again = math.prod(-(-sizes[r] // n) for r, n in tile.items() if r not in ranks)
            total += times * again * self._size(ranks, sizes)
        return total

    def traffic_text(self) -> str:
        """The least traffic of one sample and head as text: everything at once, what outlives a pass kept."""
        total: Poly = Poly()
        _, runs = self._levels
        for o in self.outputs:
            total[tuple(sorted(r for r in self._ranks_of(o) if r not in ("b", "h")))] += 1
        for name, ranks in self.inputs.items():
            when = {math.ceil(runs[n]) for n, e in enumerate(self.einsums) for ref, _, _ in e.reads if ref == name}
            if ranks:
                times = len(when) if set(ranks) & set(self.over) else 1
                total[tuple(sorted(r for r in ranks if r not in ("b", "h")))] += times
        return _poly_text(total, self.letters)

    def _sources(self, tensor: str) -> set[str]:
        """Inputs that a tensor stems from along the rank, up to what was reduced over it."""
        found: set[str] = set()
        for e in self.einsums:
            if e.out == tensor:
                for ref, ranks, _ in e.reads:
                    if ref in self.inputs:
                        found.add(ref)
                    elif ref != tensor and ranks & set(self.over):
                        found |= self._sources(ref)
        return found

    def _unfused(self, sizes: Mapping[str, int], groups: Sequence[Sequence[str]]) -> int:
        known = {e.out for e in self.einsums}
        named = [n for g in groups for n in g]
        if sorted(named) != sorted(known):
            raise ValueError(f"groups must name every tensor once; made are {sorted(known)}, named {sorted(named)}")
        total = 0
        for group in groups:
            inside = set(group)
            reads = {r for e in self.einsums if e.out in inside for r, _, _ in e.reads} - inside
            needed = {r for e in self.einsums if e.out not in inside for r, _, _ in e.reads} | set(self.outputs)
            total += sum(self._size(self._ranks_of(t), sizes) for t in reads | (inside & needed))
        return total

    # ---- running

    def sizes(self, tensors: Mapping[str, Tensor | float]) -> dict[str, int]:
        """Sizes of all ranks, from the inputs."""
        found: dict[str, int] = {}
        for name, ranks in self.inputs.items():
            if name not in tensors:
                raise ValueError(f"{self.name} needs the input {name}; given are {sorted(tensors)}")
            value = torch.as_tensor(tensors[name])
            if value.dim() != len(ranks):
                raise ValueError(f"{self.name}: {name} must have ranks {ranks}, got shape {tuple(value.shape)}")
            for rank, size in zip(ranks, value.shape, strict=True):
                if found.setdefault(rank, size) != size:
                    raise ValueError(f"{self.name}: rank {rank} is {found[rank]} and, in {name}, {size}")
        return found

    def evaluate(self, tensors: Mapping[str, Tensor | float], **sizes: int) -> dict[str, Tensor]:
        """Run the cascade as it stands.

        Args:
            tensors: every input, in the order of its ranks.
            sizes: of ranks that no input has by that name (gathered or shifted ones).

        Returns:
            Every tensor that was made.

        Raises:
            ValueError: a missing input, or ranks that disagree.
        """
        size = {**self.sizes(tensors), **sizes}
        floats = [t for t in tensors.values() if isinstance(t, Tensor) and t.is_floating_point()]
        dtype = floats[0].dtype if floats else torch.get_default_dtype()
        given = {n: tensors[n] for n in self.inputs}
        values = {n: t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=dtype) for n, t in given.items()}
        machine = _Machine(self, values, size, dtype)
        for e in self.einsums:
            if e.initial:
                machine.run(e, {})
        number = 0
        while number < len(self.einsums):
            rank, end = self._loops.get(number, ("", number + 1))
            for g in range(size[rank]) if rank else (None,):
                for e in self.einsums[number:end]:
                    if not e.initial:
                        machine.run(e, {} if g is None else {rank: g})
            number = end
        return {e.out: machine.values[e.out] for e in self.einsums}

    def _made_by(self, rank: str) -> set[str]:
        """Tensors that iterate over a rank."""
        return {e.out for e in self.einsums if e.generation == rank}

    @cached_property
    def _loops(self) -> dict[int, tuple[str, int]]:
        """First line -> (iterated rank, line after the last), from what makes a generation to what reads one."""
        found: dict[int, tuple[str, int]] = {}
        for rank in dict.fromkeys(e.generation for e in self.einsums if e.generation is not None):
            groups: list[list[int]] = []
            for n, e in enumerate(self.einsums):
                if e.generation != rank and not any(t in self._made_by(rank) and rank in r for t, r, _ in e.reads):
                    continue
                between = self.einsums[groups[-1][-1] : n] if groups else []
                if groups and all(rank in x.out_ranks or x.initial for x in between):
                    groups[-1].append(n)
                else:
                    groups.append([n])
            for tensor in self._made_by(rank):
                uses = {
                    number
                    for number, group in enumerate(groups)
                    for n in group
                    if self.einsums[n].out == tensor
                    or any(t == tensor and rank in r for t, r, _ in self.einsums[n].reads)
                }
                if len(uses) > 1:
                    raise ValueError(
                        f"{self.name}: lines that do not carry {rank} stand between those that iterate {tensor} over it"
                    )
            for group in groups:
                found[group[0]] = (rank, group[-1] + 1)
        return found


class _Machine:
    """Values while a cascade runs."""

    def __init__(self, cascade: Cascade, values: dict[str, Tensor], size: dict[str, int], dtype: torch.dtype):
        self.cascade, self.values, self.size, self.dtype = cascade, values, size, dtype

    def run(self, e: Einsum, fixed: Mapping[str, int]) -> None:
        """One line, at fixed values of some ranks."""
        ranks = [r for r in e.ranks if r not in fixed]
        out = [r for r in e.out_ranks if r not in fixed]
        shape = [self.size[r] for r in ranks]
        result = self._einsum(e, ranks, out, fixed)
        if result is None:
            result = self._value(e.body, ranks, fixed).to(self.dtype)
            result = result.expand(torch.broadcast_shapes(result.shape, tuple(shape)))
            reduce = tuple(range(len(out), len(ranks)))
            if reduce and e.reduction == "sum":
                result = result.sum(reduce)
            elif reduce:
                result = result.amax(reduce)
        self._store(e, result, fixed)

    def _store(self, e: Einsum, result: Tensor, fixed: Mapping[str, int]) -> None:
        generational = any(x.out == e.out and x.generation for x in self.cascade.einsums)
        if e.out not in self.values or (not fixed and not generational):
            full = []
            rank = next((x.generation for x in self.cascade.einsums if x.out == e.out and x.generation), None)
            for index in e.indices:
                moving = _next_of(index) or (rank if _constant(index) is not None else None)
                full.append(self.size[moving] + 1 if moving else self.size[next(_names(index))])
            self.values[e.out] = torch.full(full, float("nan"), dtype=self.dtype)
        at: list[Any] = []
        for index in e.indices:
            constant, after = _constant(index), _next_of(index)
            if constant is not None:
                at.append(constant)
            elif after is not None:
                at.append(fixed[after] + 1)
            else:
                name = next(_names(index))
                at.append(fixed.get(name, slice(None)))
        self.values[e.out][tuple(at)] = result

    def _einsum(self, e: Einsum, ranks: list[str], out: list[str], fixed: Mapping[str, int]) -> Tensor | None:
        """Sums of products of plain tensors are ``torch.einsum``'s; ``None`` for anything else."""
        if e.reduction != "sum":
            return None
        factors: list[ast.expr] = []

        def split(node: ast.expr) -> bool:
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                return split(node.left) and split(node.right)
            factors.append(node)
            return isinstance(node, ast.Subscript)

        if not split(e.body):
            return None
        letters = {r: chr(ord("a") + i) for i, r in enumerate(ranks)}
        terms, operands = [], []
        for factor in factors:
            assert isinstance(factor, ast.Subscript)
            value, term = self.values[_name(factor)], ""
            at: list[Any] = []
            for index in _indices(factor):
                constant, after = _constant(index), _next_of(index)
                if isinstance(index, ast.Name) and index.id in letters:
                    term += letters[index.id]
                    at.append(slice(None))
                elif isinstance(index, ast.Name):
                    at.append(fixed[index.id])
                elif constant is not None:
                    at.append(constant)
                elif after is not None and after in fixed:
                    at.append(fixed[after] + 1)
                else:
                    return None  # shifted or gathered
            operands.append(value[tuple(at)].to(self.dtype))
            terms.append(term)
        return torch.einsum(f"{','.join(terms)}->{''.join(letters[r] for r in out)}", *operands)

    def _value(self, node: ast.AST, ranks: list[str], fixed: Mapping[str, int]) -> Tensor:
        """An expression at all points of ``ranks``, broadcast."""
        if isinstance(node, ast.Constant):
            return torch.tensor(float(node.value), dtype=self.dtype)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp):
            return -self._value(node.operand, ranks, fixed)
        if isinstance(node, ast.BinOp):
            apply = _OPERATIONS[type(node.op)][0]
            return apply(self._value(node.left, ranks, fixed), self._value(node.right, ranks, fixed))
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            return FUNCTIONS[node.func.id][0](*(self._value(a, ranks, fixed) for a in node.args))
        if isinstance(node, ast.Name):
            return self.values[node.id]
        assert isinstance(node, ast.Subscript), ast.dump(node)
        value = self.values[_name(node)]
        at, inside = [], torch.ones((), dtype=torch.bool)
        for index, size in zip(_indices(node), value.shape, strict=True):
            constant = _constant(index)
            if constant is not None:
                at.append(torch.tensor(constant % size))
                continue
            where = self._index(index, ranks, fixed)
            inside = inside & (where >= 0) & (where < size)
            at.append(where.clamp(0, max(size - 1, 0)))
        found = value[tuple(at)]
        return torch.where(inside, found, torch.zeros_like(found))

    def _index(self, index: ast.AST, ranks: list[str], fixed: Mapping[str, int]) -> Tensor:
        if isinstance(index, ast.Name):
            if index.id in fixed:
                return torch.tensor(fixed[index.id])
            shape = [1] * len(ranks)
            shape[ranks.index(index.id)] = self.size[index.id]
            return torch.arange(self.size[index.id]).view(shape)
        if isinstance(index, ast.Constant):
            return torch.tensor(int(index.value))  # type: ignore[arg-type]
        if isinstance(index, ast.BinOp):
            apply = _OPERATIONS[type(index.op)][0]
            return apply(self._index(index.left, ranks, fixed), self._index(index.right, ranks, fixed))
        assert isinstance(index, ast.Subscript)
        return self._value(index, ranks, fixed).long()


def _poly_text(poly: Poly, letters: Mapping[tuple[str, ...], str]) -> str:
    whole = next(iter(letters.values()))

    def monomial(mono: tuple[str, ...]) -> str:
        names, called = list(mono), []
        for ranks, letter in letters.items():
            if set(ranks) <= set(names):
                names = [n for n in names if n not in ranks]
                called.append(letter)
        return " ".join([*called, *(n.upper() for n in names)])

    parts = sorted(
        ((monomial(m), c) for m, c in poly.items() if m),
        key=lambda part: (whole not in part[0].split(), -len(part[0].split()), part[0]),
    )
    said = [f"{c} {text}" if c > 1 else text for text, c in parts]
    number = sum(c for m, c in poly.items() if not m)
    return " + ".join([*said, *([str(number)] if number or not said else [])])


# --------------------------------------------------------------------------------------------------------------------
# Softmax and its relatives

_SCORES = """
QK[~p,{k}] += Q[~p,e] * K[~{k},e]
S[~p,{k}] = QK[~p,{k}] * SCALE{bias}
"""


def _online(scores: str, value: str, outer: str, inner: str = "", q: str = "p", tag: str = "", out: str = "AV") -> str:
    """Running maximum, sum and weighted values over a rank, in blocks when ``inner`` is given.

    ``scores`` and ``value`` are written with their ranks; without ``value`` only maximum and sum are kept.
    """
    g, t = outer, tag
    lines = [f"RM{t}[~{q},0] = -inf", f"RD{t}[~{q},0] = 0"]
    local = scores
    if inner:
        lines.append(f"LM{t}[~{q},{g}] max= {scores}")
        local = f"LM{t}[~{q},{g}]"
    lines += [
        f"RM{t}[~{q},{g}+1] = max(RM{t}[~{q},{g}], {local})",
        f"PRM{t}[~{q},{g}] = expsub(RM{t}[~{q},{g}], RM{t}[~{q},{g}+1])",
        f"SLN{t}[~{q},{g}{',' + inner if inner else ''}] = expsub({scores}, RM{t}[~{q},{g}+1])",
    ]
    weight = f"SLN{t}[~{q},{g}{',' + inner if inner else ''}]"
    summed = weight
    if inner:
        lines.append(f"SLD{t}[~{q},{g}] += {weight}")
        summed = f"SLD{t}[~{q},{g}]"
    lines += [
        f"SPD{t}[~{q},{g}] = RD{t}[~{q},{g}] * PRM{t}[~{q},{g}]",
        f"RD{t}[~{q},{g}+1] = {summed} + SPD{t}[~{q},{g}]",
    ]
    if value:
        lines.insert(0, f"RNV{t}[~{q},f,0] = 0")
        lines += [
            f"SLNV{t}[~{q},f,{g}] {'+=' if inner else '='} {weight} * {value}",
            f"SPNV{t}[~{q},f,{g}] = RNV{t}[~{q},f,{g}] * PRM{t}[~{q},{g}]",
            f"RNV{t}[~{q},f,{g}+1] = SLNV{t}[~{q},f,{g}] + SPNV{t}[~{q},f,{g}]",
            f"{out}[~{q},f] = RNV{t}[~{q},f,-1] / RD{t}[~{q},-1]",
        ]
    return "\n".join(lines)


_QKV = {"Q": "b h p e", "K": "b h m e", "V": "b h m f"}
_BLOCKED = {"Q": "b h p e", "K": "b h m1 m0 e", "V": "b h m1 m0 f"}


def softmax_cascade(passes: int = 1, deferred: bool = False) -> Cascade:
    """Softmax attention as the paper writes it, in so many passes over the keys.

    Args:
        passes: 3, the maximum, the sum and the weights one after the other; 2, local maxima of blocks, corrected by the
            global one; 1, a running maximum (FlashAttention, FuseMax).
        deferred: divide after the values are mixed, which saves a pass of the first two and most divisions. The
            one-pass cascade always does.

    >>> [softmax_cascade(n).passes() for n in (3, 2, 1)]
    [3, 2, 1]
    >>> softmax_cascade(1).footprint_text(), softmax_cascade(3).footprint_text()
    ('E + F + 2', 'M + F + 1')
    """
    check_choice("passes", passes, (1, 2, 3))
    if passes == 3:
        text = """
        QK[~p,m] += Q[~p,e] * K[~m,e]
        GM[~p] max= QK[~p,m]
        SN[~p,m] = expsub(QK[~p,m], GM[~p])
        SD[~p] += SN[~p,m]
        """
        if deferred:
            text += "SNV[~p,f] += SN[~p,m] * V[~m,f]\nAV[~p,f] = SNV[~p,f] / SD[~p]"
        else:
            text += "A[~p,m] = SN[~p,m] / SD[~p]\nAV[~p,f] += A[~p,m] * V[~m,f]"
        return Cascade(_dedent(text), _QKV, ["AV"], ("m",), name="three-pass softmax")
    if passes == 2:
        text = """
        QK[~p,m1,m0] += Q[~p,e] * K[~m1,m0,e]
        LM[~p,m1] max= QK[~p,m1,m0]
        SLN[~p,m1,m0] = expsub(QK[~p,m1,m0], LM[~p,m1])
        SLD[~p,m1] += SLN[~p,m1,m0]
        """
        if deferred:
            text += "SLNV[~p,f,m1] += SLN[~p,m1,m0] * V[~m1,m0,f]\n"
        text += """
        GM[~p] max= LM[~p,m1]
        PLM[~p,m1] = expsub(LM[~p,m1], GM[~p])
        SD[~p] += SLD[~p,m1] * PLM[~p,m1]
        """
        if deferred:
            text += "SNV[~p,f] += SLNV[~p,f,m1] * PLM[~p,m1]\nAV[~p,f] = SNV[~p,f] / SD[~p]"
        else:
            text += "A[~p,m1,m0] = SLN[~p,m1,m0] * PLM[~p,m1] / SD[~p]\nAV[~p,f] += A[~p,m1,m0] * V[~m1,m0,f]"
        return Cascade(_dedent(text), _BLOCKED, ["AV"], ("m1", "m0"), name="two-pass softmax")
    text = "QK[~p,m1,m0] += Q[~p,e] * K[~m1,m0,e]\n" + _online("QK[~p,m1,m0]", "V[~m1,m0,f]", "m1", "m0")
    return Cascade(text, _BLOCKED, ["AV"], ("m1", "m0"), name="one-pass softmax")


def unstable_cascade(deferred: bool = False) -> Cascade:
    """Softmax without the maximum, which overflows: two passes, or one when the division is deferred.

    >>> unstable_cascade().passes(), unstable_cascade(deferred=True).passes()
    (2, 1)
    """
    text = "QK[~p,m] += Q[~p,e] * K[~m,e]\nSN[~p,m] = exp(QK[~p,m])\nSD[~p] += SN[~p,m]\n"
    if deferred:
        text += "SNV[~p,f] += SN[~p,m] * V[~m,f]\nAV[~p,f] = SNV[~p,f] / SD[~p]"
    else:
        text += "A[~p,m] = SN[~p,m] / SD[~p]\nAV[~p,f] += A[~p,m] * V[~m,f]"
    return Cascade(text, _QKV, ["AV"], ("m",), name="unstable softmax")


def _dedent(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def attention_cascade(normalizer: str | Normalizer = "softmax", bias: bool = True) -> Cascade:
    """:func:`attnlib.attention` with a normalizer, as the streaming engines run it.

    Args:
        normalizer: one of :mod:`attnlib.normalizers`.
        bias: scores have a bias ``W`` (b h p m), ``-inf`` where a pair may not meet.

    Passes are those of the algorithm as written: a mixture with uniform rows, for one, takes two where weights are made
    and then mixed, and would take one if the two results were mixed instead.

    Returns:
        A cascade with inputs ``Q, K, V, SCALE`` (and ``W``) and the output ``AV``.

    Raises:
        ValueError: a normalizer that is not described.

    >>> [attention_cascade(n).passes() for n in ("softmax", "sigmoid", "clipped_softmax")]
    [1, 1, 2]
    """
    norm = as_normalizer(normalizer)
    inputs = {**_BLOCKED, "SCALE": "", **({"W": "b h p m1 m0"} if bias else {})}
    k = "m1,m0"
    text = _dedent(_SCORES.format(k=k, bias=f" + W[~p,{k}]" if bias else ""))
    s, a, v = f"S[~p,{k}]", f"A[~p,{k}]", f"V[~{k},f]"
    mixed = f"AV[~p,f] += {a} * {v}"
    # Maximum and sum of a first walk, the weights of a second.
    statistics = _online(s, "", "m1", "m0") + "\nGM[~p] = RM[~p,-1]\nGD[~p] = RD[~p,-1]\n"
    soft = f"expsub({s}, GM[~p]) / GD[~p]"
    values = vars(norm)
    if norm.name == "softmax" or (isinstance(norm, Activated) and norm.phi == "exp" and norm.l1 and not norm.power):
        text += _online(s, v, "m1", "m0")
    elif norm.name == "sigmoid":
        text += f"{a} = sigmoid({s} + {values['bias']!r})\n{mixed}"
    elif norm.name == "relu":
        text += f"{a} = relu({s}) / {values['divisor']!r}\n{mixed}"
    elif norm.name == "clipped_softmax":
        gamma, zeta = values["gamma"], values["zeta"]
        # a pair that may not meet stays 0, whatever the stretch would make of it
        text += statistics + f"{a} = clip({soft} * {zeta - gamma!r} + {gamma!r}) * finite({s})\n{mixed}"
    elif norm.name == "uniform":
        u = values["u"]
        text += f"CNT[~p] += finite({s})\n" + statistics
        text += f"{a} = {soft} * {1 - u!r} + {u!r} * finite({s}) / CNT[~p]\n{mixed}"
    elif norm.name == "softplus_l1" or isinstance(norm, Activated):
        text += _activated(norm if isinstance(norm, Activated) else Activated("softplus"), s, k, v, statistics, soft)
    else:
        raise ValueError(f"normalizer {norm.name!r} is not described as a cascade")
    return Cascade(text, inputs, ["AV"], ("m1", "m0"), name=f"attention, {norm.name}")


def _activated(norm: Activated, s: str, k: str, v: str, statistics: str, soft: str) -> str:
    phi = f"{norm.phi}({s})"
    if norm.power is None:
        if not norm.l1:
            return f"A[~p,{k}] = {phi}\nAV[~p,f] += A[~p,{k}] * {v}"
        return f"SN[~p,{k}] = {phi}\nSD[~p] += SN[~p,{k}]\nSNV[~p,f] += SN[~p,{k}] * {v}\nAV[~p,f] = SNV[~p,f] / SD[~p]"
    first = statistics if norm.phi == "exp" else f"SN[~p,{k}] = {phi}\nGD[~p] += SN[~p,{k}]\n"
    base = soft if norm.phi == "exp" else f"SN[~p,{k}] / GD[~p]"
    # The largest excess is a running value: weights of the power rescale like those of an exponential.
    return f"""CNT[~p] += finite({s})
{first}OFF[~p] = {norm.offset!r} - {norm.offset!r} * less(CNT[~p], {norm.spare!r})
A[~p,{k}] = {base}
EX[~p,{k}] = relu(A[~p,{k}] * CNT[~p] - OFF[~p])
RT[~p,0] = 0
RB[~p,0] = 0
RX[~p,f,0] = 0
RV[~p,f,0] = 0
LT[~p,m1] max= EX[~p,{k}]
RT[~p,m1+1] = max(RT[~p,m1], LT[~p,m1])
PRT[~p,m1] = pow(RT[~p,m1] / RT[~p,m1+1], {norm.power!r})
SH[~p,{k}] = pow(EX[~p,{k}] / RT[~p,m1+1], {norm.power!r})
LB[~p,m1] += SH[~p,{k}]
LX[~p,f,m1] += SH[~p,{k}] * {v}
LV[~p,f,m1] += A[~p,{k}] * {v}
RB[~p,m1+1] = RB[~p,m1] * PRT[~p,m1] + LB[~p,m1]
RX[~p,f,m1+1] = RX[~p,f,m1] * PRT[~p,m1] + LX[~p,f,m1]
RV[~p,f,m1+1] = RV[~p,f,m1] + LV[~p,f,m1]
ANY[~p] = positive(RB[~p,-1])
AV[~p,f] = RX[~p,f,-1] / RB[~p,-1] * ANY[~p] + RV[~p,f,-1] * (1 - ANY[~p])"""


# --------------------------------------------------------------------------------------------------------------------
# The operators of the library


@dataclass(frozen=True)
class Described:
    """An operator of :mod:`attnlib.ops` as a cascade.

    Args:
        functions: names of the functions it describes.
        cascade: makes the cascade.
        along: what the passes are counted over, in words.
    """

    functions: tuple[str, ...]
    cascade: Callable[[], Cascade]
    along: str


def _partial() -> Cascade:
    text = _dedent(_SCORES.format(k="m1,m0", bias=" + W[~p,m1,m0]")) + _online("S[~p,m1,m0]", "V[~m1,m0,f]", "m1", "m0")
    text += "\nTOP[~p] = RM[~p,-1]\nDEN[~p] = RD[~p,-1]\nNUM[~p,f] = RNV[~p,f,-1]"
    inputs = {**_BLOCKED, "SCALE": "", "W": "b h p m1 m0"}
    return Cascade(text, inputs, ["TOP", "DEN", "NUM"], ("m1", "m0"), name="partial attention")


def _merge() -> Cascade:
    text = """
    RM[~p,0] = -inf
    RD[~p,0] = 0
    RNV[~p,f,0] = 0
    RM[~p,s+1] = max(RM[~p,s], TOP[~p,s])
    PRM[~p,s] = expsub(RM[~p,s], RM[~p,s+1])
    PTM[~p,s] = expsub(TOP[~p,s], RM[~p,s+1])
    RD[~p,s+1] = RD[~p,s] * PRM[~p,s] + DEN[~p,s] * PTM[~p,s]
    RNV[~p,f,s+1] = RNV[~p,f,s] * PRM[~p,s] + NUM[~p,f,s] * PTM[~p,s]
    AV[~p,f] = RNV[~p,f,-1] / RD[~p,-1]
    """
    inputs = {"TOP": "b h p s", "DEN": "b h p s", "NUM": "b h p f s"}
    return Cascade(_dedent(text), inputs, ["AV"], ("s",), name="merge of parts")


def _split() -> Cascade:
    text = """
    QK[~p,s,m] += Q[~p,e] * K[~s,m,e]
    S[~p,s,m] = QK[~p,s,m] * SCALE
    LM[~p,s] max= S[~p,s,m]
    SLN[~p,s,m] = expsub(S[~p,s,m], LM[~p,s])
    SLD[~p,s] += SLN[~p,s,m]
    SLNV[~p,f,s] += SLN[~p,s,m] * V[~s,m,f]
    GM[~p] max= LM[~p,s]
    PLM[~p,s] = expsub(LM[~p,s], GM[~p])
    SD[~p] += SLD[~p,s] * PLM[~p,s]
    SNV[~p,f] += SLNV[~p,f,s] * PLM[~p,s]
    AV[~p,f] = SNV[~p,f] / SD[~p]
    """
    inputs = {"Q": "b h p e", "K": "b h s m e", "V": "b h s m f", "SCALE": ""}
    return Cascade(_dedent(text), inputs, ["AV"], ("s", "m"), name="split decoding", letters={("s", "m"): "M"})


def _block_sparse() -> Cascade:
    text = """
    QK[~t,i,c,k] += Q[~t,i,e] * K[~IDX[~t,c],k,e]
    S[~t,i,c,k] = QK[~t,i,c,k] * SCALE + W[~t,i,c,k]
    """
    text = _dedent(text) + _online("S[~t,i,c,k]", "V[~IDX[~t,c],k,f]", "c", "k", q="t,i")
    inputs = {"Q": "b h t i e", "K": "b h n k e", "V": "b h n k f", "IDX": "b h t c", "W": "b h t i c k", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("c", "k"), per=("b", "h", "t", "i"), name="block-sparse attention",
                   letters={("c", "k"): "M", ("t", "i"): "P", ("k", "n"): "N"})  # fmt: skip


def _neighborhood() -> Cascade:
    text = """
    QK[~p,w] += Q[~p,e] * K[~START[p]+w*STEP[p],e]
    S[~p,w] = QK[~p,w] * SCALE + W[p,w]
    """
    text = _dedent(text) + _online("S[~p,w]", "V[~START[p]+w*STEP[p],f]", "w")
    inputs = {"Q": "b h p e", "K": "b h n e", "V": "b h n f", "START": "p", "STEP": "p", "W": "p w", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("w",), name="neighborhood attention")


def _partition() -> Cascade:
    text = """
    QK[~g,i,j] += Q[~QI[g,i],e] * K[~KI[g,j],e]
    S[~g,i,j] = QK[~g,i,j] * SCALE
    """
    text = _dedent(text) + _online("S[~g,i,j]", "V[~KI[g,j],f]", "j", q="g,i", out="OG")
    text += "\nAV[~p,f] = OG[~GROUP[p],SLOT[p],f]"
    inputs = {"Q": "b h p e", "K": "b h n e", "V": "b h n f", "QI": "g i", "KI": "g j", "GROUP": "p", "SLOT": "p",
              "SCALE": ""}  # fmt: skip
    return Cascade(text, inputs, ["AV"], ("j",), per=("b", "h", "g", "i"), name="partition attention",
                   letters={("j",): "M", ("g", "i"): "P", ("g", "j"): "N"})  # fmt: skip


def _reduced() -> Cascade:
    text = """
    KR[~r,e] += K[~r,j,e] * SHARE[j]
    VR[~r,f] += V[~r,j,f] * SHARE[j]
    QK[~p,r] += Q[~p,e] * KR[~r,e]
    S[~p,r] = QK[~p,r] * SCALE
    """
    text = _dedent(text) + _online("S[~p,r]", "VR[~r,f]", "r")
    inputs = {"Q": "b h p e", "K": "b h r j e", "V": "b h r j f", "SHARE": "j", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("r", "j"), name="reduced attention", letters={("r", "j"): "M"})


def _agent() -> Cascade:
    text = """
    AK[~a,m1,m0] += A[~a,e] * K[~m1,m0,e]
    SA[~a,m1,m0] = AK[~a,m1,m0] * SCALE
    """
    text = _dedent(text) + _online("SA[~a,m1,m0]", "V[~m1,m0,f]", "m1", "m0", q="a", tag="A", out="SUM")
    text += "\nQA[~p,a] += Q[~p,e] * A[~a,e]\nSQ[~p,a] = QA[~p,a] * SCALE\n" + _online("SQ[~p,a]", "SUM[~a,f]", "a")
    inputs = {"Q": "b h p e", "A": "b h a e", "K": "b h m1 m0 e", "V": "b h m1 m0 f", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("m1", "m0"), per=("b", "h"), name="agent attention")


def _recurrent() -> Cascade:
    text = """
    ST[~d,f,0] = 0
    Z[~d,0] = 0
    ST[~d,f,t+1] = ST[~d,f,t] * G[~t] + K[~t,d] * V[~t,f]
    Z[~d,t+1] = Z[~d,t] * G[~t] + K[~t,d]
    NUM[~t,f] += Q[~t,d] * ST[~d,f,t+1]
    DEN[~t] += Q[~t,d] * Z[~d,t+1]
    AV[~t,f] = NUM[~t,f] / DEN[~t]
    """
    inputs = {"Q": "b h t d", "K": "b h t d", "V": "b h t f", "G": "b h t"}
    return Cascade(
        _dedent(text), inputs, ["AV"], ("t",), per=("b", "h"), name="linear attention, recurrent"
    )  # fmt: skip


def _chunkwise() -> Cascade:
    text = """
    ST[~d,f,0] = 0
    QK[~c,i,j] += Q[~c,i,d] * K[~c,j,d]
    A[~c,i,j] = QK[~c,i,j] * INSIDE[h,i,j]
    NEAR[~c,i,f] += A[~c,i,j] * V[~c,j,f]
    FAR[~c,i,f] += Q[~c,i,d] * REACH[h,i] * ST[~d,f,c]
    AV[~c,i,f] = NEAR[~c,i,f] + FAR[~c,i,f]
    NEW[~d,f,c] += K[~c,i,d] * STAY[h,i] * V[~c,i,f]
    ST[~d,f,c+1] = ST[~d,f,c] * KEEP[h] + NEW[~d,f,c]
    """
    inputs = {"Q": "b h c i d", "K": "b h c i d", "V": "b h c i f", "INSIDE": "h i j", "REACH": "h i", "STAY": "h i",
              "KEEP": "h"}  # fmt: skip
    return Cascade(_dedent(text), inputs, ["AV"], ("c", "i"), per=("b", "h"), name="linear attention, chunkwise",
                   letters={("c", "i"): "T"})  # fmt: skip


def _parallel() -> Cascade:
    text = """
    QK[~p,m] += Q[~p,d] * K[~m,d]
    A[~p,m] = QK[~p,m] * DECAY[h,p,m]
    NUM[~p,f] += A[~p,m] * V[~m,f]
    DEN[~p] += A[~p,m]
    AV[~p,f] = NUM[~p,f] / DEN[~p]
    """
    inputs = {"Q": "b h p d", "K": "b h m d", "V": "b h m f", "DECAY": "h p m"}
    return Cascade(_dedent(text), inputs, ["AV"], ("m",), name="linear attention, parallel")


def _sums() -> Cascade:
    text = """
    ST[~d,f] += K[~m,d] * V[~m,f]
    Z[~d] += K[~m,d]
    NUM[~p,f] += Q[~p,d] * ST[~d,f]
    DEN[~p] += Q[~p,d] * Z[~d]
    AV[~p,f] = NUM[~p,f] / DEN[~p]
    """
    inputs = {"Q": "b h p d", "K": "b h m d", "V": "b h m f"}
    return Cascade(
        _dedent(text), inputs, ["AV"], ("m",), per=("b", "h"), name="linear attention, bidirectional"
    )  # fmt: skip


def _toeplitz() -> Cascade:
    text = """
    QK[~p,m] += Q[~p,d] * K[~m,d]
    A[~p,m] = QK[~p,m] * C[h,m-p+LAST[p]]
    NUM[~p,f] += A[~p,m] * V[~m,f]
    DEN[~p] += A[~p,m]
    AV[~p,f] = NUM[~p,f] / DEN[~p]
    """
    inputs = {"Q": "b h p d", "K": "b h m d", "V": "b h m f", "C": "h o", "LAST": "p"}
    return Cascade(_dedent(text), inputs, ["AV"], ("m",), name="linear attention with a Toeplitz factor, direct")


def _sampled() -> Cascade:
    inputs = {"V": "b h n f", "IDX": "b h p s", "W": "b h p s"}
    return Cascade("AV[~p,f] += W[~p,s] * V[~IDX[~p,s],f]", inputs, ["AV"], ("s",), name="deformable attention")


def _sampled_3d() -> Cascade:
    text = """
    D[~p,s] += R[~p,s,z] * DEPTH[~IDX[~p,s],z]
    WD[~p,s] = W[~p,s] * D[~p,s]
    AV[~p,f] += WD[~p,s] * V[~IDX[~p,s],f]
    """
    inputs = {"V": "b h n f", "DEPTH": "b h n z", "IDX": "b h p s", "W": "b h p s", "R": "b h p s z"}
    return Cascade(_dedent(text), inputs, ["AV"], ("s",), name="deformable attention in depth")


def _modulation() -> Cascade:
    text = """
    Z1[b,t,c] += X[b,t+k-1,c] * W1[c,k]
    Z2[b,t,c] += Z1[b,t+k-1,c] * W2[c,k]
    POOL[b,c] += Z2[b,t,c] * SHARE[t]
    CTX[b,t,c] = Z1[b,t,c] * G1[b,t] + Z2[b,t,c] * G2[b,t] + POOL[b,c] * G3[b,t]
    Y[b,t,c] = Q[b,t,c] * CTX[b,t,c]
    """
    inputs = {"X": "b t c", "Q": "b t c", "W1": "c k", "W2": "c k", "SHARE": "t", "G1": "b t", "G2": "b t",
              "G3": "b t"}  # fmt: skip
    return Cascade(_dedent(text), inputs, ["Y"], ("t",), per=("b",), name="modulation with a global pool")


def _channels() -> Cascade:
    text = """
    KQ[~c,d] += Q[~n,c] * K[~n,d]
    GM[~c] max= KQ[~c,d]
    SN[~c,d] = expsub(KQ[~c,d] * SCALE, GM[~c] * SCALE)
    SD[~c] += SN[~c,d]
    A[~c,d] = SN[~c,d] / SD[~c]
    Y[~n,c] += A[~c,d] * V[~n,d]
    """
    inputs = {"Q": "b h n c", "K": "b h n d", "V": "b h n d", "SCALE": ""}
    return Cascade(_dedent(text), inputs, ["Y"], ("n",), per=("b", "h"), name="channel attention")


#: Every operator of floor 1.
OPERATORS: dict[str, Described] = {
    "attention": Described(("attention", "window_attention"), lambda: attention_cascade("softmax", bias=False), "keys"),
    "attention_partial": Described(("attention_partial",), _partial, "keys"),
    "merge": Described(("attention_partial",), _merge, "parts of the keys"),
    "split": Described(("split_decoding", "split_partial"), _split, "keys"),
    "block_sparse": Described(
        ("block_sparse_attention", "block_sparse_partial"), _block_sparse, "chosen blocks of keys"
    ),
    "neighborhood": Described(
        ("neighborhood_attention", "neighborhood_partial"), _neighborhood, "keys of the window"
    ),
    "partition": Described(("partition_attention", "grouped_attention"), _partition, "keys of the group"),
    "reduced": Described(("reduced_attention",), _reduced, "keys"),
    "agent": Described(("agent_attention",), _agent, "keys"),
    "linear_recurrent": Described(("linear_attention", "linear_partial"), _recurrent, "tokens"),
    "linear_chunkwise": Described(("linear_attention", "linear_partial"), _chunkwise, "tokens"),
    "linear_parallel": Described(("linear_attention", "linear_partial"), _parallel, "keys"),
    "linear_bidirectional": Described(("linear_attention", "linear_partial"), _sums, "keys"),
    "toeplitz": Described(("toeplitz_attention",), _toeplitz, "keys"),
    "deformable": Described(("deformable_attention",), _sampled, "samples"),
    "deformable_3d": Described(("deformable_attention_3d",), _sampled_3d, "samples"),
    "modulation": Described(("depthwise", "pyramid", "pool", "gated_sum", "modulate"), _modulation, "tokens"),
    "channel_attention": Described(("channel_attention",), _channels, "tokens"),
}  # fmt: skip
