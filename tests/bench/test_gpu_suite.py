"""The harness of the suite ``gpu``, tried on the CPU; what needs a GPU stands in ``tests/gpu``."""

import sys

import pytest
import torch
from table import rows

from attnlib import bench, ops
from attnlib.bench import run_bench
from attnlib.bench.speed import gpu
from attnlib.check.kit import subject_makers

OPERATORS = [(name, b) for name, p in gpu.problems(21).items() for b in ops.derivatives(p.op) if b != "flex"]


@pytest.mark.parametrize(("name", "backend"), OPERATORS, ids=str)
def test_operators_in_small(name, backend):
    """That every problem runs on everything here that serves it, in the three types."""
    for dtype in gpu.DTYPES:
        row = gpu.check_operator(gpu.problems(21)[name], backend, "cpu", dtype)
        assert row["status"] in ("ok", "refused"), row
        if row["status"] == "refused":
            assert backend != "eager" and row["why"]


@pytest.mark.parametrize("case", [pytest.param(row, id=row.id) for row in rows()[::60]])
def test_rows_of_the_table_in_small(case):
    for make in subject_makers(case, None, None, None, None, {}):
        assert gpu.check_mechanism(make(None), "cpu", torch.bfloat16)["status"] in ("ok", "refused")


def test_the_harness_in_small():
    names = ["softmax-attention", "lightning-attention-2", "biformer", "depthwise", "causal", "scan"]
    said = []
    found = gpu.measure(said.append, "cpu", small=True, names=names, repeats=1)
    checked = {c["name"] for c in found["checks"]}
    assert {"softmax-attention", "lightning-attention-2", "biformer"} <= checked
    assert not found["failed"] and found["ok"] >= 12 and not found["left_out"] and said
    causal = [r for r in found["rows"] if r["case"] == "causal"]
    assert {r["candidate"] for r in causal} == {"sdpa", "attnlib by itself", "attnlib tiled"}
    assert {r["what"] for r in causal} == {"forward", "both"} and all(r["median_s"] > 0 for r in causal)


def test_what_is_wrong_is_found(monkeypatch):
    real = ops.attention

    def off(q, k, v, **settings):
        return real(q, k, v, **settings) + (0.01 if q.dtype != torch.float64 else 0.0) * q

    problem = gpu.problems(21)["attention"]._replace(call=off)
    row = gpu.check_operator(problem, "sdpa", "cpu", torch.float32)
    assert row["status"] == "failed" and row["output"] > row["limit"]

    class Wrong(torch.nn.Linear):
        dim = 8

        def __init__(self):
            super().__init__(8, 8)

        def forward(self, x):
            return super().forward(x) + (0.0 if x.dtype == torch.float64 else 0.1)

    (make,) = subject_makers(Wrong, None, "mechanism", 5, None, {})
    row = gpu.check_mechanism(make(None), "cpu", torch.float32)
    assert row["status"] == "failed" and "bounds" in row["why"]


def test_what_there_is_no_time_for_is_listed():
    found = gpu.measure(None, "cpu", small=True, names=["softmax-attention", "causal"], seconds=0.0, repeats=1)
    assert found["ok"] == 0 and not found["rows"]
    assert "softmax-attention, float32" in found["left_out"] and "causal, both" in found["left_out"]


@pytest.mark.skipif(gpu.why_not() is None, reason="there is a GPU here")
def test_without_a_gpu_the_suite_says_so(tmp_path, capsys):
    assert "gpu" in bench.suites()
    found = run_bench([], "gpu", out=tmp_path)
    assert found == {"gpu": {"skipped": "it needs a CUDA device, and PyTorch sees none here"}}
    assert "gpu: skipped, it needs a CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="tries the harness"):
        gpu.measure()


def test_nothing_of_it_imports_an_extra():
    before = {name: name in sys.modules for name in ("fla", "natten", "triton")}
    gpu.races(True, "cpu", torch.float32)
    assert {name: name in sys.modules for name in before} == before
