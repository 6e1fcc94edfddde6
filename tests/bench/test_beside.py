"""Techniques side by side on one model: what each is called, what is measured, the report, and bad input."""

import json

import pytest
import torch
from typer.testing import CliRunner

from attnlib.bench import beside, run_techniques
from attnlib.bench.data.files import DataError
from attnlib.cli import app
from tests.bench.test_real_prefill import llama

transformers = pytest.importorskip("transformers")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    made = {}

    def opened(name, dtype):
        made["model"] = llama(vocab_size=384, max_position_embeddings=160).to(dtype)
        return made["model"], transformers.ByT5Tokenizer()

    monkeypatch.setattr(beside, "open_model", opened)
    return made


def test_names_and_settings():
    known = beside.known_techniques()
    assert {"SnapKV", "KeyNorm", "HeadScale", "hedgehog", "Record"} <= set(known)
    assert "Scorer" not in known and "Intervention" not in known
    assert beside.technique("SnapKV,ratio=0.5,window_size=8").label == "SnapKV (ratio=0.5, window_size=8)"
    assert beside.technique("attnlib.cache:Recency,ratio=0.5,sinks=2").label == "Recency (ratio=0.5, sinks=2)"
    assert beside.technique("hedgehog").label == "hedgehog"
    for given, message in (
        ("SnapKv,ratio=0.5", r"with='SnapKv' is not possible; choose one of .*'SnapKV'"),
        ("KeyNorm", "KeyNorm cannot be made of no settings: say how much it evicts: ratio=0.5"),
        ("SnapKV,ratoi=0.5", "SnapKV cannot be made of.*ratoi"),
        ("SnapKV,ratio=1.5", r"ratio must lie in \[0, 1\)"),
        ("SnapKV,0.5", "write NAME,key=value"),
        ("attnlib.cache:Ratio,ratio=0.5", "neither an Intervention nor a Scorer"),
        ("attnlib.cache:Nothing", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            beside.technique(given)


def test_side_by_side(tiny, tmp_path):
    names = ["SnapKV,ratio=0.5,window_size=8", "KeyNorm,ratio=0.75", "hedgehog", "SnapKV,ratio=0.0"]
    found = beside.measure("tiny", names, length=100, tokens=6, windows=3, rounds=2, out=tmp_path)
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == [beside.UNTOUCHED, "SnapKV (ratio=0.5, window_size=8)", "KeyNorm (ratio=0.75)", "hedgehog",
                          "SnapKV (ratio=0.0)"]  # fmt: skip
    plain = rows[beside.UNTOUCHED]
    assert plain["more bits"]["mean"] == 0 and plain["agreement"] == plain["speed"] == plain["cache"] == 1
    for label in ("SnapKV (ratio=0.5, window_size=8)", "KeyNorm (ratio=0.75)", "hedgehog"):
        assert rows[label]["more bits"]["mean"] != 0 and rows[label]["tokens_per_s"] > 0, label
        assert rows[label]["cache_bytes"] > 0, label
    same = rows["SnapKV (ratio=0.0)"]
    assert same["more bits"]["mean"] == 0 and same["agreement"] == 1 and same["cache"] == 1
    assert json.loads((tmp_path / "techniques.json").read_text())["rows"][1]["label"] in rows
    page = (tmp_path / "report.html").read_text()
    assert all(label in page for label in rows) and "<svg" in page and "http://" not in page.replace("www.w3.org", "")
    # By hand: the same texts, an untouched model.
    model, tokenizer = tiny["model"], transformers.ByT5Tokenizer()
    from attnlib.bench.data import files

    ids = torch.tensor(list(files.text().test[: 3 * 106].tolist())) + 3
    with torch.no_grad():
        logits = model(ids.view(3, 106)).logits[:, 99:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.view(3, 106)[:, 100:].flatten()) * 6
    size = sum(len(tokenizer.decode(row[100:]).encode()) for row in ids.view(3, 106)) / 3
    assert plain["bits"]["mean"] == pytest.approx(float(loss) / torch.log(torch.tensor(2.0)).item() / size, rel=1e-3)


def test_bad_input(tiny, monkeypatch):
    for call, error, message in (
        (dict(techniques=[]), ValueError, "name a technique"),
        (dict(techniques=["SnapKV,ratio=0.5"] * 2), ValueError, "every technique once"),
        (dict(techniques=["KeyNorm,ratio=0.999"], length=100), ValueError, "ratio=0.999 leaves no key of 100"),
        (dict(techniques=["KeyNorm,ratio=0.5"], length=155), ValueError, "more than the 160"),
        (dict(techniques=["KeyNorm,ratio=0.5"], length=0), ValueError, "length"),
    ):
        with pytest.raises(error, match=message):
            beside.measure("tiny", tokens=6, **{"length": 100} | call)
    with pytest.raises(ValueError, match="name it, for example --model smollm2"):
        run_techniques(None, ["SnapKV,ratio=0.5"])
    encoder = transformers.BertModel(
        transformers.BertConfig(vocab_size=384, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    monkeypatch.setattr(beside, "open_model", lambda *_: (encoder, transformers.ByT5Tokenizer()))
    with pytest.raises(ValueError, match="BertModel, which predicts no next token"):
        beside.measure("tiny", ["SnapKV,ratio=0.5"], length=100)
    assert issubclass(DataError, ValueError)


def test_command(tiny, monkeypatch, tmp_path):
    run = CliRunner().invoke
    call = ["bench", "--model", "tiny", "--with", "KeyNorm,ratio=0.5", "--length", "64", "--out", str(tmp_path)]
    shown = run(app, call)
    assert shown.exit_code == 0, shown.output
    assert "KeyNorm" in shown.output and (tmp_path / "report.html").exists()
    refused = run(app, ["bench", "--with", "KeyNorm,ratio=0.5"])
    assert isinstance(refused.exception, ValueError) and "--model" in str(refused.exception)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(beside, "open_model", lambda *_: pytest.fail("a model was opened"))
    beside_file = run(app, [*call[:-1], str(tmp_path / "file")]).exception
    assert isinstance(beside_file, OSError) and "cannot be written" in str(beside_file)
    for more in (["softmax-attention"], ["--suite", "real-heads"], ["--against", "HEAD"]):
        refused = run(app, [*call, *more])
        assert isinstance(refused.exception, ValueError) and f"got {more[0]} too" in str(refused.exception)
