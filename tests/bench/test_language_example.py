"""The language example: tokenizers that lose nothing, training that resumes, models that load and generate."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "language"
SMALL = (
    "--dim 16 --depth 2 --heads 2 --length 32 --batch 4 --steps 6 --save-steps 3 --log-steps 1 --sample 8"
).split()  # fmt: skip


def load(name: str):
    """A script of the example, under a name that no other example has."""
    spec = importlib.util.spec_from_file_location(f"language_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train():
    return load("train")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    lines = [f"line {i}: the attention of head {i % 7} reads {i * i % 31} keys, naïvely.\n\n" for i in range(160)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_tokenizers_lose_nothing(train, tmp_path):
    text = "Grüße, 世界!  two  spaces\n\ttab é" + bytes(range(256)).decode("latin-1")
    corpus = "the cat sat on the mat, the cat\n\n" * 50
    for kind, vocab in (("byte", 258), ("bpe", 270)):
        tokenizer = train.make_tokenizer(kind, corpus, 270)
        assert len(tokenizer) == vocab
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert kind == "bpe" or len(ids) == len(text.encode())
        tokenizer.save_pretrained(tmp_path / kind)
        assert AutoTokenizer.from_pretrained(tmp_path / kind)(text)["input_ids"] == ids
    assert len(train.make_tokenizer("bpe", corpus, 270)("the cat")["input_ids"]) < 7
    with pytest.raises(ValueError, match="vocab=100 must be at least 258"):
        train.make_tokenizer("bpe", corpus, 100)
    with pytest.raises(ValueError, match="kind must be one of"):
        train.make_tokenizer("words", corpus)


def test_training_resumes_to_the_same_losses(train, text, tmp_path, capsys):
    ask = ["--text", str(text), *SMALL, "--layers", "lightning-attention-2", "moh-mixture-of-heads,shared_heads=1"]
    through = train.main([*ask, "--out", str(tmp_path / "a")])
    assert [entry["step"] for entry in through["history"]] == [1, 2, 3, 4, 5, 6]
    # As if it had been stopped after the third step.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(tmp_path / "b" / "model")
    resumed = train.main([*ask, "--out", str(tmp_path / "b")])
    assert "going on from" in capsys.readouterr().out
    for one, other in zip(through["history"], resumed["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]
    assert resumed["bits_per_byte"] == pytest.approx(through["bits_per_byte"], rel=1e-6)
    assert resumed["sample"] == through["sample"] and resumed["sample"].startswith("The ")
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "model") for run in "ab")
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(x, y, msg=name)
    names = [type(layer.mixer).__name__ for layer in a.model.layers]
    assert names == ["LightningAttention2", "MixtureOfHeads"]


def test_pldr_is_judged_with_its_metric_frozen(train, text, tmp_path):
    found = train.main([
        "--text", str(text), *SMALL, "--out", str(tmp_path / "p"), "--model", "pldr", "--tokenizer", "bpe",
        "--vocab", "300", "--metric-hidden", "4",
    ])  # fmt: skip
    assert found["bits_per_byte"] > 0 and found["bits_per_byte_looking_ahead"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p" / "model")
    assert model.config.metric == "cached" and model.config.vocab_size == 300


def test_windows(train):
    windows = train.Windows(list(range(11)), 4)
    assert len(windows) == 2 and windows[1]["input_ids"].tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="the text has 3 tokens"):
        train.Windows([1, 2, 3], 4)


def test_invariance_is_measured(train, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "train", train)
    script = load("pldr_invariance")
    small = "--dim 16 --depth 2 --heads 2 --length 32 --batch 4 --metric-hidden 4 --steps 2 --seeds 1".split()
    found = script.main([
        *small, "--text", str(text), "--out", str(tmp_path / "run"), "--json", str(tmp_path / "found.json"),
    ])  # fmt: skip
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == found["runs"]
    states = found["runs"][0]["states"]
    assert [state["step"] for state in states] == [0, 1, 2]
    for state in states:
        assert all(state[key] >= 0 for key in state)
        assert state["spread, G"] > 1e-4  # an untrained metric follows the prompt
        assert 0 <= state["tokens that agree, KV-cache and G-cache against none"] <= 1


def test_losses_with_a_frozen_metric_agree_with_and_without_the_cache(train, monkeypatch):
    """Once the metric cannot change, halves read after one another and windows read at once lose the same."""
    monkeypatch.setitem(sys.modules, "train", train)
    script = load("pldr_invariance")
    given = train.parse([*SMALL, "--model", "pldr", "--metric-hidden", "4", "--out", "unused"])
    torch.manual_seed(0)
    model = train.make_model(given, 50, 0, 1).eval()
    windows = torch.randint(2, 50, (3, 12))
    model.freeze_metric(windows)
    with torch.no_grad():
        assert script.half_loss(model, windows) == pytest.approx(script.second_half(model, windows), abs=1e-5)
        model.thaw_metric()
        assert script.half_loss(model, windows) != pytest.approx(script.second_half(model, windows), abs=1e-5)
