"""Runs at once: each on a core of its own, refused beyond the cores, on Ray where it is installed."""

import os
import time

import pytest
import torch
from typer.testing import CliRunner

from attnlib import bench, cli, extras
from attnlib.bench import workers as module
from attnlib.bench.compare import Settings, compare
from attnlib.bench.workers import at_once, available_cores, check_workers

two = pytest.mark.skipif(available_cores() < 2, reason="this machine lends one core")


def where(i):
    time.sleep(0.3)
    return i, os.getpid(), sorted(os.sched_getaffinity(0)), torch.get_num_threads()


def fails(i):
    raise ValueError(f"number {i}")


@pytest.mark.slow
@two
def test_every_worker_has_a_core_of_its_own():
    found = dict(at_once(where, [(10 * i,) for i in range(6)], 2))
    assert [found[i][0] for i in range(6)] == [0, 10, 20, 30, 40, 50]
    places = {pid: core for _, pid, core, _ in found.values()}
    assert len(places) == 2 and os.getpid() not in places
    assert all(len(core) == 1 for core in places.values()) and len({c[0] for c in places.values()}) == 2
    assert {threads for *_, threads in found.values()} == {1}
    assert dict(at_once(where, [(1,)], 2))[0][2] in places.values()  # workers that are used again keep theirs
    for number, _ in at_once(where, [(i,) for i in range(100)], 2):
        if number > 1:
            break  # the rest is not waited for
    with pytest.raises(ValueError, match="number 0"):
        list(at_once(fails, [(0,), (0,)], 2))


def test_calls_are_made_when_a_worker_is_free():
    made = []

    def calls():
        for i in range(5):
            made.append(i)
            yield (i,)

    for number, _ in at_once(where, calls(), 1):
        assert len(made) == number + 1


def test_what_fails_and_what_is_left_early():
    with pytest.raises(ValueError, match="number 0"):
        list(at_once(fails, [(0,)], 1))
    before = sorted(os.sched_getaffinity(0))
    assert next(iter(at_once(where, [(i,) for i in range(50)], 1)))[1][2] == before  # alone it stays here, unpinned
    assert sorted(os.sched_getaffinity(0)) == before


def test_bad_numbers_of_workers(monkeypatch):
    for bad in (0, -1):
        with pytest.raises(ValueError, match="workers"):
            check_workers(bad)
    with pytest.raises(TypeError, match="workers"):
        check_workers("two")
    beyond = available_cores() + 1
    words = f"workers={beyond} is beyond the cores here; possible: 1 to {available_cores()}, or a cluster: ray=True"
    for call in (
        lambda: check_workers(beyond),
        lambda: list(at_once(where, [], beyond)),
        lambda: compare(["softmax-attention"], ["digits"], workers=beyond, quiet=True),
        lambda: bench.run_bench([], "recall", workers=beyond, quiet=True),
    ):
        with pytest.raises(ValueError) as told:
            call()
        assert words in str(told.value)
    result = CliRunner().invoke(cli.app, ["compare", "softmax-attention", "--workers", str(beyond)])
    assert words in str(result.exception)
    result = CliRunner().invoke(cli.app, ["bench", "--suite", "recall", "--workers", str(beyond)])
    assert words in str(result.exception)


def test_ray_without_its_extra(monkeypatch):
    real = extras.importlib.import_module

    def absent(name, *more, **named):
        if name == "ray":
            raise ImportError("No module named 'ray'", name="ray")
        return real(name, *more, **named)

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    words = r"ray=True needs 'ray': pip install 'attnlib\[ray\]'"
    with pytest.raises(ImportError, match=words):
        list(at_once(where, [(1,)], 2, ray=True))
    with pytest.raises(ImportError, match=words):
        compare(["softmax-attention"], ["digits"], workers=2, ray=True, quiet=True)
    result = CliRunner().invoke(cli.app, ["bench", "--suite", "recall", "--ray"])
    assert "pip install 'attnlib[ray]'" in str(result.exception)


@two
def test_studies_run_beside_each_other_and_what_is_timed_does_not(monkeypatch, tmp_path):
    asked = []

    def pretend(function, calls, workers, *, threads=1, ray=False):
        asked.append(([c[0] for c in calls], workers, ray))
        for number, call in enumerate(calls):
            yield number, {"name": call[0]}

    monkeypatch.setattr(module, "at_once", pretend)
    monkeypatch.setattr(bench, "_engine", lambda name, out, progress: {"alone": name})
    found = bench.run_bench([], "recall", out=tmp_path, quiet=True, workers=2)
    assert found == {"recall": {"name": "recall"}} and asked == [(["recall"], 2, False)]
    assert bench.run_bench([], "linear", quiet=True, workers=2) == {"linear": {"alone": "linear"}}
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.skipif(not extras.installed("ray"), reason="Ray is not installed: pip install 'attnlib[ray]'")
def test_two_local_workers_of_ray(tmp_path):
    import ray

    try:
        found = dict(at_once(where, [(i,) for i in range(4)], 2, ray=True))
        assert [found[i][0] for i in range(4)] == [0, 1, 2, 3]
        assert len({pid for _, pid, *_ in found.values()} - {os.getpid()}) == 2
        results = compare(
            ["softmax-attention"],
            ["digits"],
            out=tmp_path,
            steps=2,
            seeds=2,
            scale=False,
            control=False,
            settings=Settings(dim=16, depth=1, num_heads=2),
            workers=2,
            ray=True,
            quiet=True,
        ).results
        assert [r["status"] for r in results["runs"]] == ["ok", "ok"] and results["workers"] == 2
    finally:
        ray.shutdown()
