"""Mazes with traces of A* search, traces thinned out, and responses told right from wrong (Dualformer, 2410.09918).

A problem is a prompt (start, goal, walls); the response is the trace of a search, ``create x y c<g> c<h>`` for a cell
that is put on the list and ``close x y c<g> c<h>`` for one that is taken off, and the plan, ``plan x y`` from start to
goal. :func:`thinned` drops parts of the trace, level by level.

>>> maze = random_maze(6, 6, seed=0)
>>> trace, plan = search(maze)
>>> score(maze, [*trace, *plan, "eos"])["optimal"], thinned(trace, 4)
(1.0, [])
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real
from ...models.dualformer import Words

Cell = tuple[int, int]

#: How level 3 thins out: ``"paper"`` drops three in ten of the bare ``create`` clauses; ``"code"``, as the release does
#: for mazes, drops 10 to 40 per cent of those with their costs.
L3 = ("paper", "code")

#: Probabilities of the levels 0 to 4 (from memory of the paper, unsure; the code takes them as arguments).
LEVELS = {"maze": (0.45, 1 / 6, 1 / 6, 1 / 6, 0.05), "sokoban": (0.8, 0.05, 0.05, 0.05, 0.05)}

#: Steps to neighbours, in the order in which the search looks at them.
STEPS = ((0, 1), (0, -1), (-1, 0), (1, 0))


@dataclass(frozen=True)
class Maze:
    """A grid with walls, a start and a goal; cells are (x, y) from (0, 0)."""

    width: int
    height: int
    start: Cell
    goal: Cell
    walls: frozenset[Cell]

    def __post_init__(self) -> None:
        check_int("width", self.width, least=2)
        check_int("height", self.height, least=2)
        for name, cell in (("start", self.start), ("goal", self.goal)):
            if cell in self.walls or not self.holds(cell):
                raise ValueError(f"{name}={cell} must be a free cell of a maze of {self.width} x {self.height}")
        if self.start == self.goal:
            raise ValueError(f"start and goal must differ, both are {self.start}")

    def holds(self, cell: Cell) -> bool:
        """Whether a cell lies in the grid."""
        return 0 <= cell[0] < self.width and 0 <= cell[1] < self.height

    def neighbours(self, cell: Cell) -> list[Cell]:
        """Free cells beside a cell."""
        beside = [(cell[0] + dx, cell[1] + dy) for dx, dy in STEPS]
        return [c for c in beside if self.holds(c) and c not in self.walls]

    def distance(self, cell: Cell) -> int:
        """Steps to the goal without walls."""
        return abs(cell[0] - self.goal[0]) + abs(cell[1] - self.goal[1])

    def shortest(self) -> int | None:
        """Cells of the shortest plan, by breadth-first search; ``None`` where there is no way."""
        seen, left = {self.start: 1}, deque([self.start])
        while left:
            cell = left.popleft()
            if cell == self.goal:
                return seen[cell]
            for beside in self.neighbours(cell):
                if beside not in seen:
                    seen[beside] = seen[cell] + 1
                    left.append(beside)
        return None

    @property
    def prompt(self) -> list[str]:
        """The problem in words."""
        marks = [("start", self.start), ("goal", self.goal), *(("wall", w) for w in sorted(self.walls, key=_by_row))]
        return [word for mark, (x, y) in marks for word in (mark, str(x), str(y))]


def _by_row(cell: Cell) -> tuple[int, int]:
    return cell[1], cell[0]


def words(width: int, height: int) -> Words:
    """The vocabulary of mazes of this size, as the release numbers it."""
    numbers = [str(i) for i in range(max(width, height))] + [f"c{i}" for i in range(width * height)]
    return Words([*numbers, "start", "goal", "wall", "create", "close", "plan"])


def random_maze(
    width: int, height: int, seed: int = 0, walls: tuple[float, float] = (0.3, 0.5), least: int | None = None
) -> Maze:
    """A maze that can be solved.

    Args:
        width, height: cells.
        seed: of the draw.
        walls: from which to which share of the cells are walls.
        least: cells of the shortest plan, at least; the longer side by default.

    Raises:
        ValueError: no such maze was found.
    """
    check_int("width", width, least=2)
    check_int("height", height, least=2)
    low, high = (check_real("walls", w, least=0, below=1) for w in walls)
    least = max(width, height) if least is None else check_int("least", least, least=2)
    rng = random.Random(seed)
    cells = [(x, y) for y in range(height) for x in range(width)]
    for _ in range(200):
        rng.shuffle(cells)
        count = rng.randint(int(low * len(cells)), int(high * len(cells)))
        solid, free = frozenset(cells[:count]), cells[count:]
        if len(free) < 2:
            continue
        for _ in range(20):
            start, goal = rng.sample(free, 2)
            maze = Maze(width, height, start, goal, solid)
            length = maze.shortest()
            if length is not None and length >= least:
                return maze
    raise ValueError(
        f"no maze of {width} x {height} with walls={walls} and a plan of at least least={least} cells was found"
    )


def search(maze: Maze, seed: int | None = None) -> tuple[list[str], list[str]]:
    """The trace and the plan of A*, in words.

    Args:
        maze: with a way.
        seed: of the order of neighbours and of cells of equal cost; ``None`` takes them by row and column.

    Raises:
        ValueError: a maze that cannot be solved.
    """
    rng = None if seed is None else random.Random(seed)
    cost, parent = {maze.start: 0}, {}
    closed: set[Cell] = set()
    trace: list[str] = []

    def say(action: str, cell: Cell) -> None:
        trace.extend([action, str(cell[0]), str(cell[1]), f"c{cost[cell]}", f"c{maze.distance(cell)}"])

    def entry(cell: Cell) -> tuple[int, float, int, Cell]:
        tie = cell[0] + maze.width * cell[1] if rng is None else rng.random()
        return cost[cell] + maze.distance(cell), tie, cost[cell], cell

    left = [entry(maze.start)]
    say("create", maze.start)
    while left:
        _, _, steps, cell = heapq.heappop(left)
        if cell in closed or steps > cost[cell]:
            continue  # a cheaper way was found since
        closed.add(cell)
        say("close", cell)
        if cell == maze.goal:
            break
        beside = maze.neighbours(cell)
        if rng is not None:
            rng.shuffle(beside)
        for other in beside:
            if other not in cost or steps + 1 < cost[other]:
                cost[other], parent[other] = steps + 1, cell
                heapq.heappush(left, entry(other))
                say("create", other)
    if maze.goal not in closed:
        raise ValueError(f"maze cannot be solved: no way leads from start={maze.start} to goal={maze.goal}")
    path = [maze.goal]
    while path[-1] != maze.start:
        path.append(parent[path[-1]])
    return trace, [word for x, y in reversed(path) for word in ("plan", str(x), str(y))]


def thinned(trace: Sequence[str], level: int, rng: random.Random | None = None, l3: str = "paper") -> list[str]:
    """A new trace with parts left out: each level's words are among those of the one before (with ``l3="paper"``).

    0 keeps all; 1 drops ``close`` clauses; 2 also costs; 3 also some ``create`` clauses; 4 all.

    Args:
        trace: in words, of :func:`search`; stays as it is.
        level: 0 to 4.
        rng: of level 3.
        l3: see :data:`L3`.
    """
    check_int("level", level, least=0, most=4)
    check_choice("l3", l3, L3)
    if len(trace) % 5 or any(action not in ("create", "close") for action in trace[::5]):
        raise ValueError("trace must be clauses of 5 words, 'create x y c<g> c<h>' or 'close x y c<g> c<h>'")
    if level == 0:
        return list(trace)
    clauses = [list(trace[i : i + 5]) for i in range(0, len(trace), 5) if trace[i] == "create"]
    rng = random.Random() if rng is None else rng
    if level == 3 and l3 == "code":
        out = set(rng.sample(range(len(clauses)), len(clauses) * rng.randint(10, 40) // 100))
        clauses = [c for i, c in enumerate(clauses) if i not in out]
    elif level >= 2:
        clauses = [c[:3] for c in clauses]
    if level == 3 and l3 == "paper":
        clauses = [c for c in clauses if rng.random() >= 0.3]
    return [] if level == 4 else [word for clause in clauses for word in clause]


def draw_level(rng: random.Random, chances: Sequence[float] = LEVELS["maze"]) -> int:
    """A level by its probability."""
    if len(chances) != 5 or min(chances) < 0 or abs(sum(chances) - 1) > 1e-6:
        raise ValueError(f"chances must be 5 probabilities that sum to 1, got {tuple(chances)}")
    return rng.choices(range(5), chances)[0]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of unlike lengths as one tensor, zeros behind, and which of its entries exist."""
    longest = max(map(len, rows), default=0)
    held = torch.tensor([[*row, *(0,) * (longest - len(row))] for row in rows]).view(len(rows), longest)
    return held, torch.tensor([[i < len(row) for i in range(longest)] for row in rows]).view(len(rows), longest)


# --------------------------------------------------------------------------------------------------------------------
# Scores


def plan_of(response: Sequence[str]) -> list[Cell] | None:
    """The cells of a response's plan, up to ``eos``; ``None`` where there is none that can be read."""
    held = list(response)
    held = held[: held.index("eos")] if "eos" in held else held
    if "plan" not in held:
        return None
    held = held[held.index("plan") :]
    if len(held) % 3 or any(word != "plan" for word in held[::3]):
        return None
    if not all(word.isdigit() for i, word in enumerate(held) if i % 3):
        return None
    return [(int(held[i + 1]), int(held[i + 2])) for i in range(0, len(held), 3)]


def score(maze: Maze, response: Sequence[str]) -> dict[str, float]:
    """What a response is worth.

    ``solved``: 1 where the plan leads from start to goal by steps to free neighbours; ``optimal``: 1 where it is
    shortest, too; ``swc``: success weighted by cost, the shortest plan's cells over those of this one; ``trace``: words
    before the plan.
    """
    plan = plan_of(response)
    held = list(response)
    before = held.index("plan") if "plan" in held else len(held)
    solved = (
        plan is not None and plan[0] == maze.start and plan[-1] == maze.goal
        and all(b in maze.neighbours(a) for a, b in zip(plan, plan[1:], strict=False))
    )  # fmt: skip
    if not solved or plan is None:
        return {"solved": 0.0, "optimal": 0.0, "swc": 0.0, "trace": float(before)}
    best = maze.shortest()
    assert best is not None
    return {"solved": 1.0, "optimal": float(len(plan) == best), "swc": best / len(plan), "trace": float(before)}


def score_samples(maze: Maze, responses: Sequence[Sequence[str]], k: int = 1) -> dict[str, float]:
    """Of several responses to a maze: ``k`` or more optimal, ``k`` or more solved, mean SWC, different right plans."""
    check_int("k", k, least=1)
    if len(responses) < k:
        raise ValueError(f"k={k} needs at least as many responses, got {len(responses)}")
    each = [score(maze, r) for r in responses]
    right = {tuple(plan_of(r) or ()) for r, s in zip(responses, each, strict=True) if s["solved"]}
    return {
        "k optimal": float(sum(s["optimal"] for s in each) >= k),
        "k solved": float(sum(s["solved"] for s in each) >= k),
        "swc": sum(s["swc"] for s in each) / len(each),
        "diversity": float(len(right)),
    }
