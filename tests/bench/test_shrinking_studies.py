"""Studies of what is done to trained weights: few bits, zeros, one bit; as small as they go."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from attnlib.bench import suites  # noqa: E402
from attnlib.bench.studies import rounding  # noqa: E402
from attnlib.convert.quantize import Grid  # noqa: E402


def test_a_small_run_of_rounding(tmp_path, monkeypatch):
    some = {name: rounding.CONTESTANTS[name] for name in ("rounding", rounding.BASELINE)}
    monkeypatch.setattr(rounding, "CONTESTANTS", some)
    keep = tmp_path / "kept.jsonl"
    given = dict(steps=2, bits=(3,), samples=2, length=16, held=8, seeds=(0,))
    found = rounding.measure(keep=keep, pictures=tmp_path, **given)
    rows = {row["name"]: row for row in found["weights"]["3"]["rows"]}
    assert rows.keys() == some.keys() and (tmp_path / "rounding-cpu.svg").exists()
    assert rows[rounding.BASELINE]["error"]["mean"] < rows["rounding"]["error"]["mean"]
    assert rows[rounding.BASELINE]["against"]["mean"] == 0
    for row in rows.values():
        assert row["lost"]["mean"] == pytest.approx(row["bits"]["mean"] - row["before"]["mean"])
    lines = keep.read_text()
    again = rounding.measure(keep=keep, **given)
    assert keep.read_text() == lines and again["weights"] == found["weights"]
    json.dumps(found)
    assert "rounding" in suites()


def test_grids_of_many_rows_are_those_of_few():
    """Rows are compared in parts, which changes nothing."""
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    for grid in (Grid(3, clip=True), Grid(3, clip=True, symmetric=False)):
        whole, parts = grid.fit(weight), [grid.fit(w) for w in weight.split(100)]
        assert torch.equal(whole.step, torch.cat([p.step for p in parts]))
        assert torch.equal(whole.zero, torch.cat([p.zero for p in parts]))
