"""Attention algorithms as cascades of Einsums: how often they must read their keys, and what they must keep meanwhile.

An algorithm is written as a list of Einsums on named ranks (:class:`Cascade`). From the text alone follow

- **passes** over a rank: a tensor that was reduced over the whole rank, used beside a tensor that still carries the
  rank, forces another walk along it. Softmax with its stabilising maximum takes three, with local maxima two, with a
  running maximum one (:func:`attnlib.theory.softmax_cascade`);
- the **live footprint**: what one query (or one head of a linear mechanism) must keep between iterations and passes;
- the **traffic** to and from memory, fused or not, and the number of operations.

The text also runs: :meth:`Cascade.evaluate` computes it on small tensors, which is how each description of an operator
(:data:`attnlib.theory.cascades.OPERATORS`) is held to the operator.

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

from ..normalizers import ACTIVATIONS
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
