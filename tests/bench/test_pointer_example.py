"""The training script of pointer networks runs from end to end, small."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "examples" / "pointer" / "train.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("pointer_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for settings in module.SETTINGS.values():
        monkeypatch.setitem(settings, "made", 20)
        monkeypatch.setitem(settings, "test", settings["test"][-2:])
    monkeypatch.setattr(module, "TESTED", 5)
    return module


def test_it_runs_and_leaves_results_and_a_picture(script, tmp_path):
    out, picture = tmp_path / "new" / "pointer.json", tmp_path / "pointer.png"
    script.main(["--times", "0.001", "--out", str(out), "--picture", str(picture)])
    records = json.loads(out.read_text())["records"]
    assert [r["task"] for r in records] == ["hull", "delaunay", "tsp"]
    assert all(r["steps"] >= 1 and r["loss"] > 0 and len(r["test"]) == 2 for r in records)
    assert picture.stat().st_size > 1000


def test_one_task_alone_goes_on_from_what_was_kept(script, tmp_path, monkeypatch):
    out = tmp_path / "tsp.json"
    arguments = ["--task", "tsp", "--times", "0.001", "--out", str(out), "--keep", str(tmp_path / "nets")]
    script.main(arguments)
    first = json.loads(out.read_text())["records"]
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("it trains again"))
    script.main(arguments)
    assert json.loads(out.read_text())["records"] == first
    (record,) = first
    assert all(row["ratio"] >= 1 - 1e-5 and row["nearest_neighbour_ratio"] > 1 for row in record["test"])
