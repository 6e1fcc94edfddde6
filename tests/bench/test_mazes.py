"""Mazes, A* traces and plans against the authors' code; thinned traces; what is refused."""

import random

import pytest
import torch
from parity import Fixture

from attnlib.bench.data.mazes import (
    LEVELS,
    Maze,
    draw_level,
    padded,
    plan_of,
    random_maze,
    score,
    score_samples,
    search,
    thinned,
    words,
)

RECORDED = Fixture("dualformer").config["mazes"]


def maze_of(held):
    width, height, start, goal, *walls = held["seq"]
    cells = [(i % width, i // width) for i in (start, goal, *walls)]
    return Maze(width, height, cells[0], cells[1], frozenset(cells[2:]))


@pytest.mark.parametrize("held", RECORDED, ids=range(len(RECORDED)))
def test_prompts_traces_plans_and_numbers_are_the_authors(held):
    maze = maze_of(held)
    trace, plan = search(maze)
    assert maze.prompt == held["prompt"] and trace == held["reasoning"] and plan == held["plan"]
    vocabulary = words(maze.width, maze.height)
    assert len(vocabulary) == held["size"]
    assert vocabulary.encode(["bos", *trace, *plan, "eos"]) == held["numbers"]


@pytest.mark.parametrize("held", RECORDED, ids=range(len(RECORDED)))
def test_scores_are_the_authors(held):
    for response, correct, before in held["scores"]:
        found = score(maze_of(held), response)
        assert found["solved"] == correct
        if "plan" in response:
            assert found["trace"] == before


def test_plans_are_as_short_as_breadth_first_ones_and_the_trace_replays():
    for seed in range(1000):
        maze = random_maze(6, 6, seed)
        trace, plan = search(maze, seed=seed if seed % 2 else None)
        assert len(plan) == 3 * maze.shortest() >= 18
        assert score(maze, [*trace, *plan, "eos"]) == {"solved": 1, "optimal": 1, "swc": 1, "trace": len(trace)}
        created, closed = {}, set()
        for i in range(0, len(trace), 5):
            action, x, y, g, h = trace[i : i + 5]
            cell, cost = (int(x), int(y)), int(g[1:])
            assert int(h[1:]) == maze.distance(cell)
            if action == "create":
                beside = any(c in closed and created[c] + 1 == cost for c in maze.neighbours(cell))
                assert (cell == maze.start and cost == 0) or beside
                created[cell] = cost
            else:
                assert created[cell] == cost
                closed.add(cell)
        assert maze.goal in closed


def test_seeds_vary_traces_and_repeat():
    maze = random_maze(6, 6, 1)
    traces = {tuple(search(maze, seed=s)[0]) for s in range(10)}
    assert len(traces) > 1 and search(maze, seed=3) == search(maze, seed=3)


def test_levels_nest():
    for seed in range(50):
        trace, _ = search(random_maze(6, 6, seed), seed=seed)
        before = list(trace)
        levels = [thinned(trace, level, random.Random(seed)) for level in range(5)]
        assert trace == before and levels[0] == trace and levels[4] == []
        for more, less in zip(levels, levels[1:], strict=False):
            rest = iter(more)
            assert all(word in rest for word in less)  # in the same order
        assert "close" not in levels[1] and set(levels[1][::5]) == {"create"}
        assert all(not word.startswith("c") or word == "create" for word in levels[2])


def test_two_kinds_of_level_three():
    trace, _ = search(random_maze(10, 10, 0))
    count = trace.count("create")
    rng = random.Random(0)
    paper = [len(thinned(trace, 3, rng)) / 3 / count for _ in range(400)]
    code = [len(thinned(trace, 3, rng, l3="code")) / 5 for _ in range(400)]
    assert abs(sum(paper) / 400 - 0.7) < 0.02
    assert {count - count * p // 100 for p in range(10, 41)} == set(code)
    assert any(word.startswith("c") and word != "create" for word in thinned(trace, 3, rng, l3="code"))


def test_levels_come_as_often_as_they_should():
    for chances in LEVELS.values():
        rng = random.Random(0)
        counts = [0] * 5
        for _ in range(4000):
            counts[draw_level(rng, chances)] += 1
        chi = sum((c - 4000 * p) ** 2 / (4000 * p) for c, p in zip(counts, chances, strict=True))
        assert chi < 14.86  # the 99.5th percentile with 4 degrees of freedom


def test_scores_of_plans_that_are_longer_and_of_several():
    maze = Maze(3, 3, (0, 0), (2, 0), frozenset({(1, 1)}))
    direct, around = "plan 0 0 plan 1 0 plan 2 0 eos".split(), "plan 0 0 plan 0 0 plan 1 0 plan 2 0 eos".split()
    back = "plan 0 0 plan 1 0 plan 0 0 plan 1 0 plan 2 0".split()
    assert score(maze, direct)["swc"] == 1 and score(maze, around)["solved"] == 0
    assert score(maze, back) == {"solved": 1.0, "optimal": 0.0, "swc": 3 / 5, "trace": 0.0}
    several = score_samples(maze, [direct, back, direct, around], k=2)
    assert several == {"k optimal": 1.0, "k solved": 1.0, "swc": pytest.approx(2.6 / 4), "diversity": 2.0}
    assert score_samples(maze, [back, around], k=1)["k optimal"] == 0
    for broken in ("plan 0 plan 1 0", "plan x 0", "create 0 0", "plan 0 0 close 1 0"):
        assert plan_of(broken.split()) is None and score(maze, broken.split())["solved"] == 0


def test_padded():
    rows, valid = padded([[1, 2, 3], [4]])
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0]] and valid.sum(1).tolist() == [3, 1]
    assert torch.equal(padded([])[0], torch.zeros(0, 0, dtype=torch.long).view(0, 0))


def test_bad_input():
    closed = Maze(3, 3, (0, 0), (2, 2), frozenset({(1, 0), (1, 1), (1, 2)}))
    assert closed.shortest() is None
    with pytest.raises(ValueError, match=r"no way leads from start=\(0, 0\) to goal=\(2, 2\)"):
        search(closed)
    with pytest.raises(ValueError, match="no maze of 4 x 4.*least=40"):
        random_maze(4, 4, least=40)
    with pytest.raises(ValueError, match="goal=.* must be a free cell"):
        Maze(3, 3, (0, 0), (5, 5), frozenset())
    with pytest.raises(ValueError, match="must differ"):
        Maze(3, 3, (0, 0), (0, 0), frozenset())
    with pytest.raises(ValueError, match="level"):
        thinned([], 5)
    with pytest.raises(ValueError, match="clauses of 5 words"):
        thinned(["create", "0", "0"], 1)
    with pytest.raises(ValueError, match="l3='papers'"):
        thinned([], 3, l3="papers")
    with pytest.raises(ValueError, match="sum to 1"):
        draw_level(random.Random(0), (0.5, 0.5, 0.5, 0, 0))
    with pytest.raises(ValueError, match="k=3"):
        score_samples(closed, [[]], k=3)
