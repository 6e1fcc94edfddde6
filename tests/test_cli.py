import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

import attnlib
from attnlib import cli
from attnlib.catalog import papers
from attnlib.cli import app, parse_grid, parse_settings
from attnlib.ops._dispatch import operators

RUN = CliRunner()


def invoke(*args):
    return RUN.invoke(app, list(args))


def test_list_names_every_mechanism():
    result = invoke("list", "--json")
    data = json.loads(result.stdout)
    assert [row["name"] for row in data["mechanisms"]] == attnlib.list_mechanisms()
    assert all(row["summary"] for row in data["mechanisms"])
    causal = json.loads(invoke("list", "--pattern", "causal-self", "--json").stdout)["mechanisms"]
    assert 0 < len(causal) < len(data["mechanisms"])
    assert "softmax-attention" in invoke("list").stdout


def test_info_narrows_claims_to_the_instance():
    loose = json.loads(invoke("info", "softmax-attention", "--json").stdout)
    tight = json.loads(
        invoke("info", "mha", "--set", "dim=8", "--set", "num_heads=2", "--set", "causal=true", "--json").stdout
    )
    assert tight["name"] == "softmax-attention"
    assert set(tight["traits"]["patterns"]) < set(loose["traits"]["patterns"])
    assert "verified" in invoke("info", "sigmoid-attention").stdout


def test_info_tells_of_every_paper():
    for entry in papers():
        told = json.loads(invoke("info", entry.slug, "--json").stdout)
        assert entry.slug in [p["slug"] for p in told["papers"]] and (told.get("doc") or told["techniques"][0]["doc"])
    shown = invoke("info", "SnapKV").stdout
    assert "attnlib.cache.SnapKV" in shown and "window_size" in shown and "verified" in shown
    assert json.loads(invoke("info", "vtccls", "--json").stdout)["name"] == "vtc-cls"


def test_list_shows_what_a_default_instance_claims():
    rows = {row["name"]: row for row in json.loads(invoke("list", "--json").stdout)["mechanisms"]}
    assert rows["lolcats"]["work"]["N"] == 1 and rows["nprf-rpe-fft-attention"]["work"]["N"] == 1
    assert rows["softmax-attention"]["work"]["N"] == 2


@pytest.mark.parametrize("args", [("list",), ("papers",), ("info", "softmax-attention"), ("info", "snapkv")])
def test_tables_fit_eighty_columns_and_cut_no_name(args, monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=80))
    text = invoke(*args).stdout
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    if args == ("list",):
        assert all(name in text for name in attnlib.list_mechanisms())


def test_info_prints_text_not_markup(monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=80))
    for name in ("softmax-attention", "lolcats", "snapkv", "biformer"):
        text = invoke("info", name).stdout
        code = [line for line in text.splitlines() if "``" in line or ":class:" in line or ":func:" in line]
        assert not code, code


@pytest.mark.parametrize("op", operators())
def test_explain_knows_every_operator(op):
    more = {
        "neighborhood_attention": ["--set", "grid=4,4", "--set", "kernel_size=3"],
    }.get(op, [])
    result = invoke("explain", op, "--shape", "1,2,16,8", *more)
    # An operator that needs more than q, k and v names what is missing.
    assert result.stdout.startswith("runs: ") or "argument" in str(result.exception), (op, result.exception)


def test_errors_are_one_line_with_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attnlib", "info", "sofmax-attention"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and len(said.err.strip().splitlines()) == 1 and said.err.startswith("error ")


def test_papers_and_explain():
    assert json.loads(invoke("papers", "sigmoid", "--json").stdout)[0]["arxiv"] == "2409.04431"
    told = json.loads(invoke("explain", "--shape", "1,2,16,8", "--normalizer", "sigmoid", "--json").stdout)
    assert "sdpa" in told["passed_over"] and told["runs"] in ("eager", "tiled")
    there = ["explain", "linear_attention", "--dtype", "bfloat16", "--device", "cuda", "--json"]
    told = json.loads(invoke(*there).stdout)
    assert "fla" in {told["runs"], *told["passed_over"]} and "lie on" not in told["passed_over"].get("fla", "")
    told = json.loads(invoke("explain", "--window", "64", "--grad", "--device", "cuda", "--json").stdout)
    assert told["runs"] == "flex"


@pytest.mark.parametrize("command", ["list", "info", "papers", "explain", "check", "bench", "compare"])
def test_help_shows_an_example(command):
    assert f"attnlib {command}" in invoke(command, "--help").stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (("info", "sofmax-attention"), "did you mean 'softmax-attention'"),
        (("info", "snapkw"), "unknown mechanism or paper 'snapkw'; did you mean 'snapkv'"),
        (("info", "snapkv", "--set", "cap=8"), "--set is not possible"),
        (("explain", "--shape", "1,2"), "four whole numbers"),
        (("explain", "attentoin"), "choose one of"),
        (("compare", "softmax-attention", "--device", "abacus"), "device='abacus'"),
        (("compare", "--preset", "huge"), "preset='huge'"),
        (("explain", "--backend", "cuda"), "choose one of"),
        (("explain", "--device", "abacus"), "device='abacus' is no device"),
        (("explain", "--dtype", "int8"), "dtype='int8'"),
        (("info", "mha", "--set", "dim"), "name=value"),
        (("info", "mha", "--set", "dim=10", "--set", "num_heads=4"), "does not divide"),
        (("list", "--pattern", "sideways"), "choose one of"),
        (("check", "biformer", "--grid", "8"), "grid=(8,) has 1 axes, but biformer takes grids of rank [2]"),
        (("check", "torch.nn:Linear"), "target='torch.nn:Linear' cannot be built with the settings {}: TypeError"),
    ],
)
def test_bad_use_is_told(args, words):
    result = invoke(*args)
    assert result.exit_code != 0 and words in str(result.exception)


@pytest.mark.parametrize(
    "text, says", [("def (:\n", "SyntaxError: invalid syntax"), ("raise RuntimeError('boom')\n", "RuntimeError: boom")]
)
def test_a_module_that_cannot_be_imported_is_named(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_broken.py").write_text(text)
    found = str(invoke("check", "mine_broken:A").exception)
    assert "target='mine_broken:A': cannot import 'mine_broken'" in found and says in found


@pytest.mark.parametrize(
    "args",
    [
        ("bench", "sigmoid-attention", "--grid", "16", "--set", "dim=8"),
        ("bench", "--suite", "sparse"),
        ("bench", "--model", "smollm2", "--with", "SnapKV,ratio=0.5"),
        ("convert", "smollm2", "--to", "lolcats"),
        ("compare", "softmax-attention", "--tasks", "digits"),
    ],
)
def test_a_folder_that_cannot_be_is_told_before_anything_is_measured(args, tmp_path, monkeypatch):
    (place := tmp_path / "file").write_text("")
    for module, name in (("bench.beside", "open_model"), ("bench.converting", "open_model")):
        monkeypatch.setattr(f"attnlib.{module}.{name}", lambda *_: pytest.fail("a model was read"))
    monkeypatch.setattr("attnlib.bench.speed.operators.bench_mechanism", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr("attnlib.bench._engine", lambda *_: pytest.fail("measured"))
    found = str(invoke(*args, "--out", str(place)).exception)
    assert f"out={str(place)!r} cannot be written" in found, found


def test_parsing():
    assert parse_settings(["dim=3", "gate=none", "causal=True", "rotary=1e4"]) == {
        "dim": 3, "gate": "none", "causal": True, "rotary": 1e4,
    }  # fmt: skip
    assert parse_grid("4x5") == (4, 5) and parse_grid("7") == (7,)
    for bad in ("a", "1,2,3,4", "0"):
        with pytest.raises(ValueError, match="grid"):
            parse_grid(bad)


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.output.strip() == f"attnlib {attnlib.__version__}"


@pytest.mark.parametrize(
    ("command", "text", "near"),
    [
        ("models", "maxvit_tinny", "maxvit_tiny"),
        ("papers", "snapkvv", "snapkv"),
        ("list", "agent-atention", "agent-attention"),
    ],
)
def test_a_search_that_finds_nothing_says_so(command, text, near):
    result = invoke(command, text)
    assert result.exit_code != 0 and f"contains '{text}'; did you mean" in str(result.exception)
    assert f"'{near}'" in str(result.exception)
    empty = json.loads(invoke(command, text, "--json").stdout)
    assert not any(empty.values() if isinstance(empty, dict) else empty)
