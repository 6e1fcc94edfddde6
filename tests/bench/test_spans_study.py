"""The study of spans per head on a model of a few numbers and documents of a few words."""

import pytest
import torch

from attnlib.bench import models
from attnlib.bench.data import files
from attnlib.bench.studies import spans

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_the_study_runs_and_leaves_the_model_alone(monkeypatch, tmp_path):
    model = llama()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr(models, "load", lambda name, dtype: (model, transformers.ByT5Tokenizer()))
    texts = [f"document {i}: " + "many words about little. " * 12 for i in range(8)]
    data = files.Dataset(texts[:5], texts[5:], "words", "some are held out", "0")
    monkeypatch.setattr(files, "documents", lambda: data)
    call = dict(
        keep=tmp_path / "kept.jsonl", pictures=tmp_path, densities=(0.75, 0.5), profiled=(64, 96), longer=192, block=8,
        documents=2, calibration=2, answer=4,
    )  # fmt: skip
    found = spans.measure(**call)
    names = {"full attention", "one window, 0.75", "one window, 0.5", "MoA, 0.75", "MoA, 0.5", "MoA on answers, 0.5"}
    assert {row["name"] for row in found["rows"]} == names and (tmp_path / "spans-cpu.svg").exists()
    assert set(found["plans"]) == {"text, 0.75", "text, 0.5", "answers, 0.5"}
    for plan, bound in zip(found["plans"].values(), (0.75, 0.5, 0.5), strict=False):
        assert all(d <= bound + 1e-6 for d in plan["density"].values())
    assert found["density of one window"] == {b: dict.fromkeys((64, 96, 192), float(b)) for b in ("0.75", "0.5")}
    assert set(found["gaps"]["MoA, 0.5"]) == {
        f"bits at {n}{m}" for n in (64, 96, 192) for m in ("", ", less one window's")
    }
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    assert spans.measure(**call)["rows"] == found["rows"]  # from the file


def test_documents_are_long_and_share_no_paragraph():
    data = files.documents(packages=("scipy.signal",))
    assert len(data.test) and all(len(text) >= 16_000 for text in (*data.train, *data.test))
    parts = [{p for text in texts for p in text.split("\n\n") if len(p) >= 60} for texts in (data.train, data.test)]
    assert not parts[0] & parts[1]
    with pytest.raises(files.DataError, match="not installed"):
        files.documents(packages=("no_such_package",))
