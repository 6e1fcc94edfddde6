"""A vision-language model of a few numbers: what is built, what trains, and that its loss falls."""

import json

import pytest
import torch

from attnlib.bench import models
from attnlib.bench.studies.real import vision_language as study
from tests.bench.test_real_prefill import llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


def parts():
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=112, patch_size=14
    )
    return transformers.Dinov2Model(config).eval(), llama(vocab_size=384, max_position_embeddings=256)


def test_the_parts_are_kept_and_only_the_new_ones_train():
    vision, decoder = parts()
    model = study.build(vision, decoder, 383, rank=2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("projector" in n or "lora" in n for n in trained)
    assert any("projector" in n for n in trained) and any("lora" in n for n in trained)
    assert not any("vision_tower" in n for n in trained)
    ids = torch.randint(3, 380, (1, 7))
    with torch.no_grad():  # without a picture it is the decoder: adapters begin as nothing
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, decoder(ids).logits)
    given = next(study.batches(transformers.ByT5Tokenizer(), 383, 2, seed=0))
    assert (given["input_ids"] == 383).sum(1).tolist() == [64, 64] and given["pixel_values"].shape == (2, 3, 112, 112)
    said = given["labels"][0][given["labels"][0] >= 0]
    assert transformers.ByT5Tokenizer().decode(said).endswith("\n")
    with torch.no_grad():
        other = dict(given, pixel_values=-given["pixel_values"])
        assert not torch.equal(model(**given).logits, model(**other).logits)


def test_the_study_runs_and_its_loss_falls(monkeypatch, tmp_path):
    made = dict(zip(study.MODELS, parts(), strict=True))
    monkeypatch.setattr(models, "load", lambda name: (made[name], transformers.ByT5Tokenizer()))
    call = dict(keep=tmp_path / "kept.jsonl", pictures=tmp_path, steps=12, size=2, rank=2, lr=1e-2)
    found = study.measure(**call)
    run = found["seeds of runs"]["0"]
    assert len(run["losses"]) == 12 and sum(run["losses"][-3:]) < sum(run["losses"][:3])
    assert run["step_s"] > 0 and run["step_peak_bytes"] > 0 and 0 < run["trained"] < run["parameters"]
    assert (tmp_path / "real-vision-language-cpu.svg").exists() and json.dumps(found)
    monkeypatch.setattr(models, "load", None)
    assert study.measure(**call)["seeds of runs"] == found["seeds of runs"]  # from the file
