"""The benchmark of techniques on multimodal models: all of it runs, and who must answer the same is held to it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from attnlib.bench import NEEDS_HF, suites  # noqa: E402
from attnlib.bench.speed import multimodal_models_speed as bench  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "multimodal-models-speed-cpu.json"


def test_every_part_runs_small():
    said = []
    found = bench.measure(rounds=1, progress=said.append, small=True)
    assert said == list(bench.PARTS) and found["machine"] and found["settings"]["threads"] == 1
    for r in found["records"]:
        assert r["ours"] > 0 and r["plain"] > 0
        assert r["met"] is (r["times"] <= r["bar"] if r["kind"] == "cost" else r["times"] >= r["bar"])
    assert max(r["apart"] for r in found["records"] if "apart" in r) < 1e-3  # READ's: gradients of coordinates to 30
    assert len(bench.table(found["records"]).splitlines()) == 2 + len(found["records"])
    assert json.dumps(found) and "multimodal-models-speed" in suites() and "multimodal-models-speed" in NEEDS_HF


def test_other_windows_than_the_direct_ones_are_noticed(monkeypatch):
    monkeypatch.setattr(bench, "direct_windows", lambda edges: [(0, 0, 64, 64)])
    with pytest.raises(AssertionError, match="windows of the screen 'blank'"):
        next(bench.crops(1, "cpu", True))


def test_another_answer_of_zoom_eye_is_noticed(monkeypatch):
    model, processor = bench._llava(True)
    monkeypatch.setattr(bench, "_llava", lambda small: (model, processor))

    class Other(bench.ZoomEye):
        def answer(self, image, question):
            found = super().answer(image, question)
            return found if self.speaker.starts.size else type(found).of(f"not {found}", **found.__dict__)

    monkeypatch.setattr(bench, "ZoomEye", Other)
    with pytest.raises(AssertionError, match="ZoomEye answers"):
        next(bench.zoom_eye(1, "cpu", True))


def test_what_was_measured_is_of_full_size():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert not found["settings"]["small"] and found["settings"]["rounds"] >= 5 and found["machine"]["load"] > 0
    assert all(r["met"] is (r["times"] <= r["bar"] if r["kind"] == "cost" else r["times"] >= r["bar"])
               for r in found["records"])  # fmt: skip
