"""The study of sparse fine-tuning on a model of a few numbers."""

import pytest
import torch

from attnlib.bench.converting import our_decoder
from attnlib.bench.data import files
from attnlib.bench.studies import finetuning

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_the_study_runs_and_leaves_its_model_alone(monkeypatch, tmp_path):
    ids = torch.randint(32, 127, (400,), generator=torch.Generator().manual_seed(0))
    model = our_decoder(ids, 2, dim=16, layers=2, heads=2, length=24, batch=2)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr(finetuning, "our_decoder", lambda ids, steps: model)
    texts = [f"document {i}: " + "many words about little. " * 12 for i in range(4)]
    monkeypatch.setattr(files, "documents", lambda packages: files.Dataset(texts[:3], texts[3:], "words", "some", "0"))
    call = dict(
        keep=tmp_path / "kept.jsonl", pictures=tmp_path, steps=2, marks=(0, 2), code_steps=1, length=24, batch=2,
        held_windows=1, rank=2, blocks=4, counted=(16, 64), lr=0.1, seeds=(0, 1),
    )  # fmt: skip
    found = finetuning.measure(**call)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {finetuning.BEFORE, *finetuning.CONTESTANTS} and (tmp_path / "finetuning-cpu.svg").exists()
    lora = rows[finetuning.LORA]
    # Adapters start from nothing, so the first number is the model's own but for rounding.
    assert lora["bits after 0"]["mean"] == pytest.approx(rows[finetuning.BEFORE]["bits"]["mean"], rel=1e-5)
    assert lora["against"]["mean"] == 0 and lora["bits"]["mean"] != lora["bits after 0"]["mean"]
    assert rows["SPT: both"]["bits after 0"]["mean"] != lora["bits after 0"]["mean"]
    memory = found["memory"]
    assert set(memory) == set(finetuning.COUNTED)
    dense, maps = ([memory[name][n]["step"] for n in (16, 64)] for name in (finetuning.LORA, "LoRA, whole maps"))
    assert maps[1] / maps[0] > dense[1] / dense[0] > 1  # maps grow with the square of the length
    state = model.state_dict()
    assert state.keys() == kept.keys() and all(torch.equal(t, kept[name]) for name, t in state.items())
    assert finetuning.measure(**call)["rows"] == found["rows"]  # from the file
