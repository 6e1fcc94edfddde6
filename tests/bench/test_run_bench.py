import json
from pathlib import Path

import pytest

from attnlib import bench
from attnlib.bench import models, run_bench, suites
from attnlib.bench.worlds.models import PARTS, missing_parts


def test_mechanisms_against_softmax(tmp_path):
    results = run_bench(
        ["lightning-attention-2"], grid=(32,), settings={"dim": 16, "num_heads": 2}, out=tmp_path, quiet=True
    )
    row = results["lightning-attention-2"]
    assert row["forward"]["ratio"] > 0 and row["decode"]["median_s"] > 0
    assert json.loads((tmp_path / "mechanisms.json").read_text()) == results


def test_unknown_names():
    with pytest.raises(ValueError, match="window"):
        run_bench([], suite="windows", quiet=True)
    with pytest.raises(ValueError, match="did you mean"):
        run_bench(["softmax-atention"], quiet=True)
    assert {"normalizers", "linear", "local", "sparse"} <= set(suites())


def test_lines_on_real_models_are_suites_and_an_absent_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNLIB_MODELS", str(tmp_path))
    assert "real" in suites() and set(bench.REAL) <= set(suites())
    for name in bench.REAL:
        line = bench._module(name)
        assert line.QUESTION and all(m in models.MODELS for m in line.MODELS)
    for suite in ("conversion", "real", *bench.REAL):
        if bench.REAL or suite != "real":
            with pytest.raises(FileNotFoundError, match=f"the suite {suite} needs the models .*: make models"):
                run_bench([], suite=suite, quiet=True)


def test_lines_on_trained_generators_are_suites(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNLIB_DIFFUSION_WEIGHTS", str(tmp_path))
    assert "diffusion" in suites() and set(bench.DIFFUSION) <= set(suites())
    for name in bench.DIFFUSION:
        line = bench._module(name)
        assert line.QUESTION and missing_parts(line.PARTS) == list(line.PARTS)
        assert set(line.PARTS) <= {*PARTS, "judge"}


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_families_hold_their_lines(family):
    """A file for each line in the family's package, and nothing else."""
    folder = Path(bench.__file__).parent / "studies" / family.replace("-", "_")
    files = sorted(p.stem for p in folder.glob("[!_]*.py"))
    assert list(bench.FAMILIES[family]) == [f"{family}-{name.replace('_', '-')}" for name in files] and files
    assert all(bench._module(name).QUESTION for name in bench.FAMILIES[family])
    assert family in suites() and set(bench.FAMILIES[family]) <= set(suites())
