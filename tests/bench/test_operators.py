import json

import pytest
import torch

from attnlib.bench import clock
from attnlib.bench.speed import operators as O


@pytest.mark.parametrize(
    "suite,sizes",
    [
        ("normalizers", {"n": 128}),
        ("sigmoid", {"n": 128, "counts": (1,)}),
        ("block-sparse", {"n": 256, "block": 32}),
        ("decode", {"m": 64, "batch": 1}),
        ("memory", {"sizes": (64, 128)}),
    ],
)
def test_suites_run_and_merge_into_one_file(suite, sizes, tmp_path):
    path = tmp_path / "results" / "operators.json"
    lines = []
    result = O.bench_operators(suite, path, repeats=1, threads=1, clock="cpu", progress=lines.append, **sizes)
    assert lines and result["rows"] and result["machine"]["threads"] == 1
    other = O.bench_operators("decode", path, repeats=1, threads=1, m=32, batch=1)
    written = json.loads(path.read_text())
    assert written["suites"]["decode"] == json.loads(json.dumps(other))
    assert suite in written["suites"]
    timed = [row for row in result["rows"] if "median_s" in row]
    assert all(row["ratio"] == 1.0 for row in timed if row["candidate"] == row["reference"])


def test_block_sparse_suite_has_the_density_it_says():
    recorder = O._Recorder(1, "cpu", lambda line: None)
    O._suite_block_sparse(recorder, n=512, block=64, density=0.25)
    assert all("density 0.25" in row["case"] for row in recorder.rows)


def test_bench_pair():
    result = O.bench_pair("sum", lambda: sum(range(1000)), lambda: sum(range(20000)), repeats=5)
    assert result["name"] == "sum" and result["speedup"] > 2


@pytest.mark.parametrize(
    "config,keys", [({}, {"forward", "backward"}), ({"causal": True}, {"forward", "backward", "decode"})]
)
def test_bench_mechanism(config, keys):
    result = O.bench_mechanism("sigmoid-attention", (32,), dim=16, num_heads=2, repeats=1, **config)
    assert keys <= set(result) and ("decode" in result) == ("decode" in keys)
    for what in keys:
        assert result[what]["ratio"] > 0 and result[what]["softmax_median_s"] > 0
    assert torch.get_num_threads() >= 1


def test_bench_mechanism_on_a_grid_and_against_itself():
    result = O.bench_mechanism("softmax-attention", (4, 6), dim=16, num_heads=2, repeats=1)
    assert "ratio" not in result["forward"] and result["grid"] == [4, 6]


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "operators.json"
    O.bench_operators("decode", path, repeats=1, m=32, batch=1)
    before = path.read_text()

    def broken(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(O.Path, "replace", broken)
    with pytest.raises(OSError):
        O.bench_operators("decode", path, repeats=1, m=32, batch=1)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: O.bench_operators("speed"), "suite='speed'"),
        (lambda: O.run_suite("everything"), "suite='everything'"),
        (lambda: clock.interleave({}, repeats=0), "repeats"),
        (lambda: clock.interleave({}, clock="sun"), "clock='sun'"),
        (lambda: O.bench_mechanism("softmax-attention", ()), "grid"),
        (lambda: O.bench_mechanism("softmax-atention", (4,)), "did you mean"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
