"""Studies of what eviction costs, in bits of text and in time, on a model of a few numbers."""

import json

import pytest
import torch

from attnlib.bench import models
from attnlib.bench.data.files import DataError
from attnlib.bench.studies.real import eviction_cost, eviction_text
from tests.bench.test_real_prefill import llama

transformers = pytest.importorskip("transformers")
TEXT = "".join(f"{i} words of a text that goes on and on. " for i in range(200))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    def opened(name, dtype):
        return llama(vocab_size=384, max_position_embeddings=256).to(dtype), transformers.ByT5Tokenizer()

    for study in (eviction_text, eviction_cost):
        monkeypatch.setattr(study, "open_model", opened)


def test_bits_of_text_that_goes_on(tmp_path):
    call = dict(keep=tmp_path / "kept.jsonl", pictures=tmp_path, length=120, more=8, ratios=(0.25, 0.4), windows=2,
                seeds=(0, 1), dtype=torch.float32, text=TEXT)  # fmt: skip
    found = eviction_text.measure(**call)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows[eviction_text.ALL]["against"]["mean"] == 0 and found["windows"] == 2
    for name in ("SnapKV", "random", "small keys"):
        shares = [rows[eviction_text.label(name, r)]["against"]["mean"] for r in (0.25, 0.4)]
        assert all(share != 0 for share in shares) and shares[0] != shares[1], name
    model, tokenizer = llama(vocab_size=384, max_position_embeddings=256), transformers.ByT5Tokenizer()
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    order = torch.randperm(len(ids) // 128, generator=torch.Generator().manual_seed(0))[:2]
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)[order]
    with torch.no_grad():
        log_p = model(windows).logits[:, 119:-1].log_softmax(-1)
    bits = -log_p.gather(-1, windows[:, 120:, None]).sum() / torch.log(torch.tensor(2.0))
    first = next(r for r in found["runs"] if r["name"] == eviction_text.ALL and r["seed"] == 0)
    size = sum(len(tokenizer.decode(w[120:])) for w in windows)
    assert first["bits per byte"] == pytest.approx(float(bits) / size, rel=1e-4)
    assert (tmp_path / "real-eviction-text-cpu.svg").exists() and json.dumps(found)
    assert eviction_text.measure(**call)["rows"] == found["rows"]  # from the file
    with pytest.raises(ValueError, match="264 tokens, more than the 256"):
        eviction_text.measure(**call | {"length": 256})
    with pytest.raises(DataError, match="windows of 128 tokens, not 400"):
        eviction_text.measure(**call | {"windows": 200})


def test_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(eviction_cost, "ONCE", 100)
    call = dict(keep=tmp_path / "kept.jsonl", pictures=tmp_path, lengths=(96, 192), ratios=(0.25,), tokens=1, rounds=2,
                evicted=0.25, dtype=torch.float32, presses=False, text=TEXT)  # fmt: skip
    said = []
    found = eviction_cost.measure(progress=said.append, **call)
    assert len(said) == 2 and found["kvpress"] is None and json.dumps(found)
    for length, parts in found["lengths"].items():
        rows = {row["name"]: row for row in parts["decoding"]}
        assert rows[eviction_cost.PLAIN]["against"] == rows[eviction_cost.PLAIN]["cache"] == 1
        assert rows["SnapKV"]["keys"] == int(int(length) * 0.75) and rows["SnapKV"]["cache_bytes"] > 0
        prompts = {row["name"]: row for row in parts["prompt"]}
        assert rows[eviction_cost.PLAIN]["peak"] == 1 and rows["SnapKV"]["peak_bytes"] > 0
        plain = prompts.pop(eviction_cost.PLAIN)
        assert plain["against"] == 1 and plain["cache_bytes"] == 2 * 2 * int(length) * 2 * 8 * 4
        assert set(eviction_cost.SCORERS) == set(prompts) and all(row["against"] > 1 for row in prompts.values())
        assert {n for n, row in prompts.items() if row["rounds"] != 2} == (
            set(eviction_cost.QUADRATIC) if int(length) > 100 else set()
        )
        assert "load" in parts
        assert prompts["expected attention"]["peak_bytes"] > prompts["last only"]["peak_bytes"] > 0
    eviction_cost.measure(progress=said.append, **call)
    assert len(said) == 2 and (tmp_path / "real-eviction-cost-cpu.svg").exists()
    with pytest.raises(ValueError, match=r"lengths=\[256\] and 1 tokens are more than the 256"):
        eviction_cost.measure(**call | {"lengths": (256,)})
    with pytest.raises(DataError, match="fewer than lengths"):
        eviction_cost.measure(**call | {"lengths": (250,), "text": "short"})


def test_an_absent_model_is_named(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("ATTNLIB_MODELS", str(tmp_path))
    for study in (eviction_text, eviction_cost):
        assert study.MODELS == ("smollm2-135m",) and study.QUESTION.endswith("?")
        with pytest.raises(FileNotFoundError, match="make models"):
            study.measure()
    assert models.title("smollm2").startswith("SmolLM2") and models.title("./mine") == "./mine"
