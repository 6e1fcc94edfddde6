import json

import pytest
import torch

from attnlib.bench.speed import operators as O


def test_interleaved_runs_take_turns():
    order = []
    timings = O.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert "".join(order) == "ab" * 4
    assert all(len(t.seconds) == 3 and t.minimum <= t.median for t in timings.values())


def test_ratio_is_taken_round_by_round():
    ours, theirs = O.Timing((1.0, 20.0, 3.0)), O.Timing((2.0, 40.0, 2.0))
    assert O.ratio(ours, theirs) == {"ratio": 0.5, "ratio_of_minima": 0.5}


def test_peak_counts_what_lives_at_once():
    def chain():
        x = torch.zeros(250_000)
        for _ in range(5):
            x = x + 1
        return x

    peak = O.peak_bytes(chain)
    assert 2_000_000 <= peak < 3_000_000


@pytest.mark.parametrize(
    "suite,sizes",
    [
        ("normalizers", {"n": 128}),
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


def test_results_name_no_host_user_or_path():
    text = json.dumps(O.machine())
    import getpass
    import platform

    assert "/" not in O.machine()["cpu"] and platform.node() not in text and f'"{getpass.getuser()}"' not in text


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
        (lambda: O.interleave({}, repeats=0), "repeats"),
        (lambda: O.interleave({}, clock="sun"), "clock='sun'"),
        (lambda: O.bench_mechanism("softmax-attention", ()), "grid"),
        (lambda: O.bench_mechanism("softmax-atention", (4,)), "did you mean"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
