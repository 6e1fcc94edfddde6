"""``attnlib convert``: a language model in a folder becomes another in a folder, with a report."""

import json

import pytest
import torch
from typer.testing import CliRunner

from attnlib.bench import converting
from attnlib.bench.data.files import DataError
from attnlib.cli import app, parse_numbers

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    transformers.ByT5Tokenizer().save_pretrained(place)
    return place


def test_the_command_converts_trains_reports_and_saves(folder, tmp_path):
    out = tmp_path / "converted"
    call = ["convert", str(folder), "--to", "lolcats", "--set", "window_size=4", "--steps", "3", "--adapter-steps", "2",
            "--length", "32", "--out", str(out)]  # fmt: skip
    result = CliRunner().invoke(app, [*call, "--json"])
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1] and report["to"] == "lolcats"
    assert report["bits_per_byte"]["original"] > 0 and 0 <= report["model"]["agreement"] <= 1
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    given = tokenizer("a b", return_tensors="pt")
    with_cache = model.generate(**given, max_new_tokens=8, do_sample=False)
    assert torch.equal(with_cache, model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=False))
    # Again, with training already done.
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0 and "converted to lolcats" in shown.stdout and "bits per byte" in shown.stdout


def test_some_layers_without_training(folder):
    report = converting.convert_model(str(folder), "window", settings={"window_size": 4}, layers=[1], length=32)
    assert [row["layer"] for row in report["layers"]] == [1] and report["trained"] == 0


def test_bits_per_byte_of_an_even_guess():
    class Even(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(*input_ids.shape, 256))

    tokenizer = transformers.ByT5Tokenizer()
    ids = converting.tokens_of(tokenizer, torch.frombuffer(bytearray(b"abcd efgh ijkl mnop "), dtype=torch.uint8))
    assert tokenizer.decode(ids) == "abcd efgh ijkl mnop "
    batches = converting.batches_of(ids, 5, 2)
    assert [b["input_ids"].shape for b in batches] == [(2, 5), (2, 5)]
    assert sorted(i for b in batches for i in b["input_ids"].flatten().tolist()) == sorted(ids.tolist())
    assert converting.bits_per_byte(Even(), tokenizer, batches) == pytest.approx(8.0)


def test_a_name_that_nobody_knows_is_told_with_those_known(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")

    def absent(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", absent)
    with pytest.raises(FileNotFoundError, match="model='smollm3' is none of .*'smollm2-135m'.*no network"):
        converting.open_model("smollm3")
    with pytest.raises(OSError, match="^no network$"):  # a folder is there: what it lacks is said alone
        converting.open_model(str(tmp_path))


def test_bad_input(folder, tmp_path):
    with pytest.raises(DataError, match="fewer than one window"):
        converting.batches_of(torch.arange(4), 8)
    with pytest.raises(ValueError, match="length"):
        converting.convert_model(str(folder), "hedgehog", length=1)
    with pytest.raises(ValueError, match="'nothing'"):
        converting.convert_model(str(folder), "nothing", length=32)
    with pytest.raises(ValueError, match="--layers"):
        parse_numbers("1,x")
    assert parse_numbers("0, 3") == (0, 3)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(to="nope"), "to='nope'"),
        (dict(loss="nope"), "loss='nope'"),
        (dict(batch=0), "batch"),
        (dict(name="./no/folder"), "no such folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_fetched(changes, what, monkeypatch):
    if "name" not in changes:
        monkeypatch.setattr(converting, "open_model", lambda name: pytest.fail("a model was opened"))
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        converting.convert_model(**{"name": "a-name", "to": "hedgehog", **changes})
