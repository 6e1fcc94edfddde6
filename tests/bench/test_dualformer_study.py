"""The study of fast, slow and auto, as small as it goes."""

from attnlib.bench.data.mazes import random_maze, score
from attnlib.bench.studies import dualformer


def test_the_study_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(dualformer, "longest", lambda side: 12)
    found = dualformer.measure(
        pictures=tmp_path, keep=tmp_path / "kept", steps=1, batch=2, dim=8, depth=1, count=4, tested=3, seeds=(0, 1)
    )
    assert [r["name"] for r in found["rows"]] == list(dualformer.NAMES)
    assert (tmp_path / "dualformer-cpu.svg").exists()
    assert 0 <= found["solved without looking at walls"] <= 100
    assert {"slow, solved", "auto, words of trace"} < set(found["rows"][1]) and found["rows"][1]["against"]["n"] == 2


def test_responses_are_thinned_anew():
    maze = random_maze(6, 6, 0)
    assert dualformer.response(maze, 0, 4)[1] == "plan"
    lengths = {len(dualformer.response(maze, seed, None)) for seed in range(20)}
    assert len(lengths) > 4 and max(lengths) <= dualformer.longest(6) + 1


def test_a_plan_that_looks_at_no_wall():
    mazes = [random_maze(4, 4, seed) for seed in range(60)]
    for maze in mazes:
        (x, y), (gx, gy) = maze.start, maze.goal
        at, plan = [x, y], ["plan", str(x), str(y)]
        for axis, aim in ((0, gx), (1, gy)):
            while at[axis] != aim:
                at[axis] += 1 if aim > at[axis] else -1
                plan += ["plan", str(at[0]), str(at[1])]
        assert dualformer.blind(maze) == score(maze, [*plan, "eos"])["solved"]
    assert 0 < sum(map(dualformer.blind, mazes)) < 60
