"""The study of pretrained weights of few bits, on a model of a few numbers."""

import json

import pytest
import torch

from attnlib.bench.studies.real import rounding
from tests.bench.test_real_prefill import llama

transformers = pytest.importorskip("transformers")
TEXT = "".join(f"{i} words of a text that goes on and on. " for i in range(60))


def test_bits_of_a_rounded_model(tmp_path, monkeypatch):
    made = []

    def opened(name, dtype=torch.float32):
        made.append(llama(vocab_size=384, max_position_embeddings=256))
        return made[-1], transformers.ByT5Tokenizer()

    monkeypatch.setattr(rounding, "open_model", opened)
    call = dict(keep=tmp_path / "kept.jsonl", pictures=tmp_path, bits=(4, 2), samples=2, length=24, held=8,
                seeds=(0, 1), text=TEXT)  # fmt: skip
    found = rounding.measure(**call)
    for number in ("4", "2"):
        rows = {row["name"]: row for row in found["weights"][number]["rows"]}
        assert rows.keys() == set(rounding.NAMES) and rows[rounding.BASELINE]["against"]["mean"] == 0
        assert rows[rounding.BASELINE]["error"]["mean"] < rows["rounding"]["error"]["mean"]
        # Rounding alone knows neither text nor rotation, so all seeds are one.
        assert rows["rounding"]["lost"]["half"] == 0 < rows[rounding.OURS]["lost"]["half"]
    assert len(made) == 1 and (tmp_path / "real-rounding-cpu.svg").exists() and json.dumps(found)
    assert rounding.measure(**call)["weights"] == found["weights"] and len(made) == 1  # from the file
