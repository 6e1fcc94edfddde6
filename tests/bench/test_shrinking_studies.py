"""Studies of what is done to trained weights: few bits, zeros, one bit; as small as they go."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from attnlib.bench import suites  # noqa: E402
from attnlib.bench.studies import onebit, rounding, sparsity  # noqa: E402
from attnlib.convert.quantize import Grid  # noqa: E402
from attnlib.normalizers import Step, Thresholded  # noqa: E402


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


def test_a_small_run_of_sparsity(tmp_path):
    found = sparsity.measure(pictures=tmp_path, steps=1, batch=2, levels=(0.5, 0.9), seeds=(0, 1))
    assert found["models"].keys() == sparsity.MODELS.keys()
    assert {p.name for p in tmp_path.iterdir()} == {"sparsity-cpu.svg", "sparsity-swin-cpu.svg"}
    for held in found["models"].values():
        assert list(held["levels"]) == ["50 %", "90 %"]
        for rows in held["levels"].values():
            assert [row["name"] for row in rows["rows"]] == list(sparsity.CONTESTANTS)
    json.dumps(found)


def test_all_contestants_zero_as_many_weights_of_the_same_layers():
    model = sparsity.MODELS["vision transformer"](0)
    for name in sparsity.CONTESTANTS:
        made, share = sparsity.pruned(model, name, 0.75, 0)
        assert share == pytest.approx(0.75, abs=1e-3)
        zeros = {n: float((m.weight == 0).float().mean()) for n, m in made.named_modules() if hasattr(m, "weight_mask")}
        assert len(zeros) == 18 and not any("head" in n or "stem" in n for n in zeros)
        if name in ("random", "magnitude, every layer"):
            assert all(z == pytest.approx(0.75, abs=1e-3) for z in zeros.values())


def test_binary_models_have_the_weights_of_the_model_and_the_maps_of_their_threshold():
    model = onebit.build(0)
    made = onebit.binary(model, onebit.AboveMean())
    inner, old = made.stages[0].mixer.inner, model.stages[0].mixer.inner
    assert torch.equal(inner.q.weight, old.q.weight) and torch.equal(inner.q.scale, inner.q.mean_size())
    scores = torch.tensor([[2.0, 0.5, -1.0, 0.4]], requires_grad=True)
    soft = scores.softmax(-1)
    maps = onebit.AboveMean().weights(scores)
    assert torch.equal(maps.detach(), (soft >= 0.25).float().detach())
    v = torch.arange(4.0)
    assert torch.equal(*(torch.autograd.grad((w * v).sum(), scores, retain_graph=True)[0] for w in (maps, soft)))
    assert not torch.equal(Step().weights(scores), maps) and not torch.equal(Thresholded(0.1).weights(scores), maps)


def test_a_small_run_of_one_bit(tmp_path):
    found = onebit.measure(pictures=tmp_path, steps=1, more=1, batch=2, seeds=(0,))
    assert [row["name"] for row in found["rows"]] == list(onebit.CONTESTANTS) and found["baseline"] == onebit.BASELINE
    assert (tmp_path / "onebit-cpu.svg").exists()
    json.dumps(found)
