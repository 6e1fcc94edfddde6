"""The study of a conversion's stages on a decoder that is hardly trained."""

import pytest
import torch

from attnlib.bench.converting import our_decoder
from attnlib.bench.data import files
from attnlib.bench.studies import stages

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_the_study_runs_and_leaves_its_model_alone(monkeypatch, tmp_path):
    text = torch.randint(97, 123, (1200,), generator=torch.Generator().manual_seed(0)).byte()
    model = our_decoder(text.long(), 2, dim=16, layers=2, heads=2, length=24, batch=2)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr(stages, "our_decoder", lambda ids, steps: model)
    monkeypatch.setattr(files, "text", lambda: files.Dataset(text[:900], text[900:], "letters", "the end", "0"))
    call = dict(
        keep=tmp_path / "kept.jsonl", pictures=tmp_path, steps=2, adapter_steps=2, length=24, batch=2, held_windows=2,
        rank=2, lr=0.1, seeds=(0, 1),
    )  # fmt: skip
    found = stages.measure(**call)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == set(stages.CONTESTANTS) and (tmp_path / "stages-cpu.svg").exists()
    for name, row in rows.items():
        trains = stages.CONTESTANTS[name][2] is not None
        assert (row["converted"]["mean"] != row["transferred"]["mean"]) == trains
        assert row["adapted"]["mean"] != row["transferred"]["mean"]
        assert row["merged"]["mean"] == pytest.approx(row["adapted"]["mean"], abs=1e-4)
    state = model.state_dict()
    assert state.keys() == kept.keys() and all(torch.equal(t, kept[name]) for name, t in state.items())
    assert stages.measure(**call)["rows"] == found["rows"]  # from the file


def test_the_model_itself_is_left_as_it_is():
    model = our_decoder(torch.randint(97, 123, (300,)), 1, dim=16, layers=1, heads=2, length=24, batch=2)
    ids = torch.randint(97, 123, (2, 40))
    before = model(input_ids=ids, use_cache=False).logits
    to, settings, _ = stages.CONTESTANTS[stages.TEACHER]
    with stages.convert.linearize(model, to, **settings):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, atol=1e-5, rtol=1e-4)
