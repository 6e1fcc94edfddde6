"""gCOG: questions about coloured letters on a grid, as trees of operators (Ito et al., 2024, arXiv 2401.15030).

An instruction is a tree: a question, or a yes-no question and a switch that says which of two further trees to answer.
Every object that the tree speaks of stands on the grid, also where the answer does not need it, among distractors.
Held out are more distractors, combinations of what was seen (questions with objects, first with last questions), and
deeper trees.

>>> trial = trials("productive", "train", 1, seed=0)[0]
>>> trial.depth, trial.answer == answer(trial.tree, trial.objects, World())
(3, True)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_int

#: Questions, in the order of their numbers from 1; a switch is number 9.
QUESTIONS = ("exist", "go", "getcolor", "getshape", "sumeven", "producteven", "productodd", "sumodd")
SWITCH = len(QUESTIONS) + 1
PARITIES = tuple(q for q in QUESTIONS if q.endswith(("even", "odd")))
#: Questions that a switch can stand behind.
YES_NO = ("exist", *PARITIES)

SPLITS = ("distractor", "systematic", "systematic trees", "productive")
PARTS = ("train", "test")
#: How the objects of the split "systematic" are halved.
HALVES = ("disjoint", "released")

_FIRST = ("exist", "sumeven", "producteven", "getshape")
_SECOND = ("sumodd", "productodd", "go", "getcolor")
_ROOTS = (("exist", "sumeven", "producteven"), ("sumodd", "productodd"))
_LEAVES = (("sumeven", "producteven", "getcolor", "getshape"), ("exist", "sumodd", "productodd", "go"))

Cell = tuple[int, int]
#: Shape and colour, numbers from 0.
Kind = tuple[int, int]


@dataclass(frozen=True)
class World:
    """What can be seen and asked.

    Args:
        side: cells per side of the grid.
        shapes, colors: of which there are, for distractors.
        features: shapes and colours that questions speak of, the first ones.
    """

    side: int = 10
    shapes: int = 26
    colors: int = 10
    features: int = 10

    def __post_init__(self) -> None:
        for name in ("side", "shapes", "colors", "features"):
            check_int(name, getattr(self, name), least=2)
        if self.features > min(self.shapes, self.colors):
            raise ValueError(f"features={self.features} must be at most shapes={self.shapes} and colors={self.colors}")

    @property
    def classes(self) -> int:
        """Answers: yes, no, cells, shapes, colours."""
        return 2 + self.side**2 + self.shapes + self.colors


class Node(NamedTuple):
    """A question about one or two kinds of objects, and what to answer if it holds, and if not."""

    question: str
    about: tuple[Kind, ...]
    then: tuple[Node, Node] | None = None


class Trial(NamedTuple):
    """An instruction, the objects by their cells, and the number of the answer."""

    tree: Node
    objects: dict[Cell, Kind]
    answer: int

    @property
    def depth(self) -> int:
        """Questions and switches on the way to an answer."""
        depth, node = 1, self.tree
        while node.then is not None:
            depth, node = depth + 2, node.then[0]
        return depth


def nodes(tree: Node) -> Iterator[Node]:
    """All questions of a tree."""
    yield tree
    for branch in tree.then or ():
        yield from nodes(branch)


def _holds(question: str, cells: Sequence[Cell]) -> bool:
    if question == "exist":
        return bool(cells)
    total = 1 if question.startswith("product") else 0
    for row, column in cells:
        total = total * row * column if question.startswith("product") else total + row + column
    return (total % 2 == 0) == question.endswith("even")


def answer(tree: Node, objects: Mapping[Cell, Kind], world: World) -> int:
    """The number of the answer: 0 yes, 1 no, then cells by row and column, shapes, colours.

    Raises:
        ValueError: a question that the objects answer in no way or in several.
    """
    where: list[Cell] = []
    for shape, color in tree.about:
        found = [
            cell
            for cell, (s, c) in objects.items()
            if (s == shape or tree.question == "getshape") and (c == color or tree.question == "getcolor")
        ]
        if tree.question != "exist" and len(found) != 1:
            raise ValueError(f"{tree.question!r} about {(shape, color)} has {len(found)} objects to answer with, not 1")
        where += found
    if tree.then is not None:
        return answer(tree.then[0 if _holds(tree.question, where) else 1], objects, world)
    cells = world.side**2
    if tree.question == "go":
        return 2 + where[0][0] * world.side + where[0][1]
    if tree.question == "getshape":
        return 2 + cells + objects[where[0]][0]
    if tree.question == "getcolor":
        return 2 + cells + world.shapes + objects[where[0]][1]
    return 0 if _holds(tree.question, where) else 1


# --------------------------------------------------------------------------------------------------------------------
# One trial


class _Full(Exception):
    """No room for what was drawn."""


def _shaped(depth: int, roots: Sequence[str], leaves: Sequence[str], rng: random.Random) -> Node:
    """A tree of questions about nothing yet."""
    if depth == 1:
        return Node(rng.choice(leaves), ())
    branches = [_shaped(depth - 2, roots, leaves, rng) for _ in range(2)]
    return Node(rng.choice(roots), (), (branches[0], branches[1]))


def _filled(tree: Node, kinds: Sequence[Kind], two: bool, rng: random.Random) -> Node:
    """The same tree about different kinds, such that what asks for a colour is alone in its shape, and conversely."""
    shapes: set[int] = set()
    colors: set[int] = set()
    used: set[Kind] = set()

    def draw(question: str) -> Kind:
        free = [
            k for k in kinds
            if k not in used and k[0] not in shapes and k[1] not in colors
            and not (question == "getcolor" and any(k[0] == s for s, _ in used))
            and not (question == "getshape" and any(k[1] == c for _, c in used))
        ]  # fmt: skip
        if not free:
            raise _Full("kinds of objects")
        kind = rng.choice(free)
        used.add(kind)
        shapes.update([kind[0]] if question == "getcolor" else [])
        colors.update([kind[1]] if question == "getshape" else [])
        return kind

    every = list(nodes(tree))
    about: dict[int, tuple[Kind, ...]] = {}
    for i in sorted(range(len(every)), key=lambda i: not every[i].question.startswith("get")):
        count = 2 if two and every[i].question in PARITIES and rng.random() < 0.5 else 1
        about[i] = tuple(draw(every[i].question) for _ in range(count))
    number = iter(range(len(every)))

    def copy(node: Node) -> Node:
        own = about[next(number)]
        return Node(node.question, own, None if node.then is None else (copy(node.then[0]), copy(node.then[1])))

    return copy(tree)


def _placed(tree: Node, distractors: int, world: World, rng: random.Random) -> dict[Cell, Kind]:
    """Objects such that every yes-no question is as often true as not, then distractors that answer nothing."""
    free = [(row, column) for row in range(world.side) for column in range(world.side)]
    rng.shuffle(free)
    objects: dict[Cell, Kind] = {}
    kept: set[Kind] = set()
    shapes: set[int] = set()
    colors: set[int] = set()
    for node in nodes(tree):
        kept.update(node.about)
        shapes.update(shape for shape, _ in node.about if node.question == "getcolor")
        colors.update(color for _, color in node.about if node.question == "getshape")
    for node in sorted(nodes(tree), key=lambda n: n.question not in PARITIES):
        wanted = rng.random() < 0.5
        if node.question == "exist" and not wanted:
            continue
        if len(free) < len(node.about):
            raise _Full("cells")
        for _ in range(200):
            cells = rng.sample(free, len(node.about))
            if node.question not in PARITIES or _holds(node.question, cells) == wanted:
                break
        else:
            raise _Full("cells")
        objects.update(zip(cells, node.about, strict=True))
        free = [cell for cell in free if cell not in objects]
    others = [
        (shape, color) for shape in range(world.shapes) for color in range(world.colors)
        if (shape, color) not in kept and shape not in shapes and color not in colors
    ]  # fmt: skip
    if distractors and not others:
        raise _Full("kinds of distractors")
    if distractors > len(free):
        raise _Full("cells")
    for cell in free[:distractors]:
        objects[cell] = rng.choice(others)
    return objects


def _check_depth(depth: int) -> int:
    check_int("depth", depth, least=1)
    if depth % 2 == 0:
        raise ValueError(
            f"depth={depth} must be odd: every question but the last is followed by a switch; {depth - 1} and "
            f"{depth + 1} are possible"
        )
    return depth


def halves(world: World, how: str = "disjoint") -> tuple[list[Kind], list[Kind]]:
    """The kinds of objects that questions speak of, in two halves.

    ``"disjoint"``: the first (last) shapes with the first (last) colours, and the rest; every shape and colour is in
    both, no pair is. ``"released"`` is as in the authors' code: the first colours with any shape, and the last shapes
    with any colour, which share a quarter of all pairs.
    """
    check_choice("how", how, HALVES)
    half = round(world.features / 2)
    kinds = [(s, c) for s in range(world.features) for c in range(world.features)]
    if how == "released":
        return [k for k in kinds if k[1] < half], [k for k in kinds if k[0] >= half]
    return [k for k in kinds if (k[0] < half) == (k[1] < half)], [k for k in kinds if (k[0] < half) != (k[1] < half)]


def trials(
    split: str, part: str, count: int, seed: int = 0, world: World | None = None,
    distractors: int | tuple[int, int] | None = None, depth: int | None = None, how: str = "disjoint",
) -> list[Trial]:  # fmt: skip
    """Trials of one side of a split; the same seed gives the same trials.

    Args:
        split: ``"distractor"``: one question, 0 to 5 distractors in training, 10 and more in the test.
            ``"systematic"``: half of the questions about one half of the objects and half about the other, exchanged in
            the test. ``"systematic trees"``: trees of depth 3 that go on from one set of first questions to one of last
            questions, exchanged in the test. ``"productive"``: depth 3 in training, 5 in the test.
        part: ``"train"`` or ``"test"``.
        count: of trials.
        seed: of what is drawn.
        world: ``World()`` by default.
        distractors: how many, or from how many to how many; (0, 5) by default, 10 in the test of "distractor".
        depth: of "productive": 1 or 3 in training, odd and 5 or more in the test.
        how: of :func:`halves`, for "systematic".

    Raises:
        ValueError: a depth that is even or on the other side of the split, more objects than cells.
    """
    check_choice("split", split, SPLITS)
    check_choice("part", part, PARTS)
    check_int("count", count, least=0)
    check_int("seed", seed, least=0)
    world = World() if world is None else world
    test = part == "test"
    few = (10, 10) if split == "distractor" and test else (0, 5)
    low, high = few if distractors is None else (distractors,) * 2 if isinstance(distractors, int) else distractors
    check_int("distractors", low, least=0)
    check_int("distractors", high, least=low)
    if split == "distractor" and (low < 10 if test else high > 5):
        raise ValueError(
            f"distractors={(low, high)} is not on the {part} side of the split: possible are "
            f"{'10 and more' if test else '0 to 5'}"
        )
    if depth is not None and split != "productive":
        raise ValueError(f"depth={depth} can be given for the split 'productive' only; {split!r} has its own")
    deep = 1 if split in ("distractor", "systematic") else 3
    if split == "productive":
        deep = _check_depth(depth) if depth is not None else 5 if test else 3
        if (deep >= 5) != test:
            raise ValueError(
                f"depth={deep} is not on the {part} side of the split: possible are "
                f"{'5, 7, 9, ...' if test else '1 and 3'}"
            )
    least = 1 if deep == 1 else 0
    if high + least > world.side**2:
        raise ValueError(
            f"distractors={high} and what is asked about are more objects than the {world.side**2} cells of side="
            f"{world.side}"
        )
    rng = random.Random(f"{split} {part} {seed}")
    first, second = halves(world, how)
    every = [(s, c) for s in range(world.features) for c in range(world.features)]

    def one() -> Trial:
        kinds = every
        roots: Sequence[str] = YES_NO
        leaves: Sequence[str] = QUESTIONS
        if split == "systematic":
            side = rng.randrange(2)
            leaves = (_FIRST, _SECOND)[side]
            kinds = (first, second)[side != test]
        elif split == "systematic trees":
            side = rng.randrange(2)
            roots, leaves = _ROOTS[side], _LEAVES[side != test]
        tree = _filled(_shaped(deep, roots, leaves, rng), kinds, deep > 1, rng)
        objects = _placed(tree, rng.randint(low, high), world, rng)
        return Trial(tree, objects, answer(tree, objects, world))

    made: list[Trial] = []
    while len(made) < count:
        for _ in range(100):
            try:
                made.append(one())
                break
            except _Full as full:
                lacking = str(full)
        else:
            raise ValueError(
                f"world={world} has too few {lacking} for trees of depth {deep} with {low} to {high} distractors"
            )
    return made


# --------------------------------------------------------------------------------------------------------------------
# As tensors


class Batch(NamedTuple):
    """Instructions (B, R, 8), which of their rows exist (B, R), grids (B, side² + 1, 3), answers (B,)."""

    rule: Tensor
    rule_valid: Tensor
    grid: Tensor
    answer: Tensor


def _rows(tree: Node) -> list[list[int]]:
    """Questions and switches level by level, as a networkx topological sort gives them."""
    rows: list[list[int]] = []
    level: list[Node | tuple[Node, Node]] = [tree]
    while level:
        below: list[Node | tuple[Node, Node]] = []
        for item in level:
            if not isinstance(item, Node):
                rows.append([SWITCH, *(0,) * 7])
                below += item
                continue
            row = [QUESTIONS.index(item.question) + 1]
            for shape, color in item.about:
                # what is asked for is not told; the release writes 1 there
                row += [
                    1 if item.question == "getshape" else shape + 1, 1 if item.question == "getcolor" else color + 1, 1
                ]  # fmt: skip
            rows.append(row + [0] * (8 - len(row)))
            if item.then is not None:
                below.append(item.then)
        level = below
    return [*rows, [0] * 7 + [1]]


def encode(made: Sequence[Trial], world: World | None = None, one_hot: bool = False) -> Batch:
    """Trials as the released models read them.

    A row of an instruction is a question's number, shape, colour and time (always 1) of what it is about, twice, and
    the mark of the end; a row of a grid is colour, shape and that mark. Numbers count from 1, 0 is nothing. The last
    row of both is the end. Instructions of unlike lengths have zeros behind, which do not exist.

    Args:
        made: trials of one world.
        world: ``World()`` by default.
        one_hot: every number but the marks as zeros and a one, so that rows are wider: :func:`widths`.
    """
    world = World() if world is None else world
    rules = [_rows(trial.tree) for trial in made]
    longest = max((len(rows) for rows in rules), default=0)
    rule = torch.tensor([rows + [[0] * 8] * (longest - len(rows)) for rows in rules]).view(len(made), longest, 8)
    valid = torch.tensor([[i < len(rows) for i in range(longest)] for rows in rules]).view(len(made), longest)
    cells = []
    for trial in made:
        grid = [[0, 0, 0] for _ in range(world.side**2)] + [[0, 0, 1]]
        for (row, column), (shape, color) in trial.objects.items():
            grid[row * world.side + column] = [color + 1, shape + 1, 0]
        cells.append(grid)
    seen = torch.tensor(cells).view(len(made), world.side**2 + 1, 3)
    if one_hot:
        rule, seen = _one_hot(rule, _rule_sizes(world)), _one_hot(seen, _grid_sizes(world))
    return Batch(rule.float(), valid, seen.float(), torch.tensor([trial.answer for trial in made]))


def widths(world: World) -> dict[str, int]:
    """``rule_dim`` and ``grid_dim`` of a model that reads one-hot rows."""
    return {"rule_dim": sum(_rule_sizes(world)), "grid_dim": sum(_grid_sizes(world))}


def _rule_sizes(world: World) -> tuple[int, ...]:
    kind = (world.shapes + 1, world.colors + 1, 2)
    return SWITCH + 1, *kind, *kind, 2


def _grid_sizes(world: World) -> tuple[int, ...]:
    return world.colors + 1, world.shapes + 1, 2


def _one_hot(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.cat([F.one_hot(rows[..., i], n) for i, n in enumerate(sizes)], -1)
