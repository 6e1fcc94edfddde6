"""The study of what survives eviction, on a model of a few numbers."""

import json
import math
import sys
import types

import pytest
import torch

from attnlib.bench.studies.real import _prefill as prefill
from attnlib.bench.studies.real import _prompts as prompts
from attnlib.bench.studies.real import eviction, eviction_long
from tests.bench.test_real_prefill import llama

transformers = pytest.importorskip("transformers")
TEXT = "Some words that say nothing at all, over and over again. " * 400
ASKED = {"needle": (0.25, 0.75), "lookup": (0.5,)}
PLAN = {900: {"asked": ASKED, "unseen": {"needle": (0.5,)}, "second": {"several": (0.25,)}}}


def tokenizer():
    return transformers.ByT5Tokenizer()


def model():
    return llama(vocab_size=384, max_position_embeddings=2048)


def test_items_hold_their_facts_and_answers_are_digits():
    tok = tokenizer()
    for depth in (0.0, 0.4, 1.0):
        item = prompts.make_item(tok, 1200, depth, seed=3, text=TEXT)
        context = tok.decode(item.context[0])
        assert item.context.shape[1] <= 1200 and set(item.questions) == set(prompts.TASKS)
        assert context[item.place :].startswith("\nThe special magic number is " + item.questions["needle"].answer)
        for question in item.questions.values():
            assert question.answer.isdigit() and question.answer in context
        assert item.place == pytest.approx(depth * 1200, abs=700 if 0 < depth < 1 else 500)
        for task in prompts.TASKS:
            asked, answer = prompts.question_ids(tok, item, task)
            assert tok.decode(answer[0]) == item.questions[task].answer
            assert tok.decode(asked[0]).startswith("\n\nWhat is the")
            more, answer_of = prompts.next_turn_ids(tok, item, task, [52])
            assert torch.equal(answer, answer_of) and more[0, 0] == 52
    assert torch.equal(item.context, prompts.make_item(tok, 1200, 1.0, seed=3, text=TEXT).context)
    assert not torch.equal(item.context, prompts.make_item(tok, 1200, 1.0, seed=4, text=TEXT).context)
    with pytest.raises(ValueError, match="length=300 leaves no room.*the needle would be cut off"):
        prompts.make_item(tok, 300, 0.5, seed=0, text=TEXT)
    with pytest.raises(ValueError, match="depth"):
        prompts.make_item(tok, 1200, 1.5, seed=0, text=TEXT)


def test_an_answer_is_right_when_every_digit_is_the_first_choice():
    logits = torch.zeros(2, 3, 10)
    answer = torch.tensor([[4, 5, 6]])
    for row, said in enumerate(((4, 5, 6), (4, 5, 7))):
        for i, digit in enumerate(said):
            logits[row, i, digit] = 20.0
    found = eviction.judged(logits, answer)
    assert [right for right, _ in found] == [1.0, 0.0]
    assert found[0][1] == 0 and found[1][1] == pytest.approx(20 / 3 / math.log(2), abs=1e-3)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("attnlib.bench.converting.open_model", lambda name, dtype: (model().to(dtype), tokenizer()))


def test_the_study_runs_goes_on_and_draws(tiny, tmp_path):
    keep, said = tmp_path / "kept.jsonl", []
    call = dict(keep=keep, pictures=tmp_path, plan=PLAN, depths=(0.0, 1.0), items={900: 2}, dtype=torch.float32,
                presses=False, quadratic={900: 1}, text=TEXT)  # fmt: skip
    found = eviction.measure(progress=said.append, **call)
    assert len(said) == 4 and found["kvpress"] is None and json.dumps(found)
    rows = {(r["mode"], r["task"], r["ratio"], r["name"]): r for r in found["runs"]}
    assert {key[0] for key in rows} == {"asked", "unseen", "second", "settings"}
    for key, row in rows.items():
        h2o = key[3] in eviction.QUADRATIC  # on one text a depth
        assert row["n"] == (2 if h2o else 4) and 0 <= row["low"] <= row["right"] <= row["high"] <= 1, key
        if key[3] == eviction.ALL:
            assert row["more bits"]["mean"] == 0
    for name in (eviction.SNAPKV, "random"):
        assert rows["asked", "needle", 0.75, name]["more bits"]["mean"] != 0
    assert {key[:3] for key in rows if key[3] in eviction.QUADRATIC} >= {("asked", "needle", 0.25)}
    snapkv, beside = (rows["asked", "needle", 0.75, n] for n in (eviction.SNAPKV, eviction.BESIDE))
    paired = snapkv[f"more bits than {eviction.BESIDE}"]["mean"]
    assert paired == pytest.approx(snapkv["more bits"]["mean"] - beside["more bits"]["mean"], abs=1e-6)
    table = found["tables"]["900 tokens, asked, needle"]["rows"]
    assert [r["name"] for r in table][:2] == [eviction.ALL, eviction.SNAPKV]
    shown, row = table[1]["right, 75% evicted"], rows["asked", "needle", 0.75, eviction.SNAPKV]
    assert shown == {"mean": row["right"], "half": (row["high"] - row["low"]) / 2, "n": 4}
    grid = found["needle by depth"]["900"][eviction.SNAPKV]
    assert found["needle by depth"]["900"]["observed attention (H2O)"]["n"] == 1
    assert grid["n"] == 2 and len(grid["right"]) == 2 and len(grid["right"][0]) == 2
    assert (tmp_path / "real-eviction-cpu.svg").read_text().startswith("<?xml")
    lines = keep.read_text().splitlines()
    keep.write_text("\n".join(lines[:3]) + "\n")
    again = eviction.measure(progress=said.append, **call)  # the last text only
    assert len(said) == 5 and again["runs"] == found["runs"]


def test_longer_texts_are_asked_for_the_needle_alone(tiny, tmp_path):
    call = dict(keep=tmp_path / "kept.jsonl", pictures=tmp_path, plan={900: {"asked": {"needle": (0.5,)}}},
                items={900: 1}, depths=(0.5,), presses=False, text=TEXT)  # fmt: skip
    found = eviction_long.measure(**call)
    assert {(r["mode"], r["task"], r["n"]) for r in found["runs"]} == {("asked", "needle", 1)}
    assert found["dtype"] == "float32" and found["what"] == eviction_long.QUESTION
    drawn = (tmp_path / "real-eviction-long-cpu.svg").read_text()
    assert "900 tokens" in drawn and not (tmp_path / "real-eviction-cpu.svg").exists()
    assert eviction_long.measure(progress=pytest.fail, **call)["runs"] == found["runs"]


def test_lengths_that_the_model_cannot_read_and_absent_models(tiny, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="length=2000 and a question are more than the 2048 tokens"):
        eviction.measure(plan={2000: PLAN[900]}, dtype=torch.float32)
    monkeypatch.undo()
    monkeypatch.setenv("ATTNLIB_MODELS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make models"):
        eviction.measure()


def test_a_class_of_kvpress_scores_what_was_recorded(monkeypatch, tmp_path):
    """A stand-in of the form of theirs: kvpress itself is not at hand."""
    folder = tmp_path / "kvpress" / "presses"
    folder.mkdir(parents=True)
    (folder / "snapkv_press.py").write_text(
        "class SnapKVPress:\n"
        "    def score(self, module, hidden_states, keys, values, attentions, kwargs):\n"
        "        assert attentions is None and hidden_states.shape[1] == keys.shape[2]\n"
        "        cos, sin = kwargs['position_embeddings']\n"
        "        assert cos.shape[1] == keys.shape[2] and module.rotary_emb is not None\n"
        "        return -keys.norm(dim=-1)\n"
    )
    for name in [m for m in sys.modules if m.partition(".")[0] == "kvpress"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert prefill.kvpress_folder() is None or prefill.kvpress_folder() == tmp_path
        (tmp_path / "kvpress" / "__init__.py").write_text("raise ImportError('wants a dozen packages')\n")
        assert prefill.kvpress_folder() == tmp_path
        press = prefill.Press("snapkv_press", "SnapKVPress")
        small = llama()
        read = prefill.Reader(small).read(torch.randint(3, 64, (1, 30))).extended(torch.randint(3, 64, (1, 10)))
        theirs = press.kept(read, 0.5)
        ours = read.kept(eviction.KVCompression(eviction.KeyNorm(), eviction.Ratio(0.5)))
        for a, b in zip(theirs, ours, strict=True):
            assert torch.equal(a.sort(-1).values, b)
        assert all("rotary_emb" not in layer.self_attn.__dict__ for layer in small.model.layers)
        assert isinstance(sys.modules["kvpress"], types.ModuleType) and prefill.kvpress_folder() == tmp_path
    finally:
        for name in [m for m in sys.modules if m.partition(".")[0] == "kvpress"]:
            del sys.modules[name]
