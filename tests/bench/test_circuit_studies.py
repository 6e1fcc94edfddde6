"""Studies and speeds of circuits, on models of a few numbers."""

import json

import pytest
import torch
from bench.test_circuit_data import Words

from attnlib.bench import models
from attnlib.bench.data.circuits import ChoiceWorld
from attnlib.bench.speed import look
from attnlib.bench.studies import choices
from attnlib.bench.studies.real import circuits

transformers = pytest.importorskip("transformers")


def stand_in(name, **settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, head_dim=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), Words()


def test_heads_are_ranked_silenced_and_turned(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", stand_in)
    keep = tmp_path / "kept.jsonl"
    settings = dict(keep=keep, found_on=3, tested_on=4, sizes=(3,), draws=1, seeds=(0, 1))
    found = circuits.measure(pictures=tmp_path, **settings)
    json.dumps(found)
    assert set(found["silenced"]) == {3} and (tmp_path / "real-circuits-cpu.svg").exists()
    rows = {row["name"]: row for row in found["silenced"][3]["rows"]}
    assert set(rows) == set(circuits.RANKINGS) and rows["random"]["against"]["mean"] == 0
    for row in rows.values():
        assert abs(row["clean difference"]["mean"] - row["difference"]["mean"] - row["loss"]["mean"]) < 1e-5
    told = []
    again = circuits.measure(progress=told.append, **settings)
    assert not told and again["silenced"][3]["rows"] == found["silenced"][3]["rows"]  # nothing was run twice


def test_attention_ranks_heads_by_what_they_give_the_names():
    model, tokenizer = stand_in("any")
    pairs = circuits.indirect_objects(3, seed=0)
    clean, _, right, wrong = pairs.tokens(tokenizer)
    names = torch.stack([right, wrong], 1)
    places = circuits.name_places(clean["input_ids"], names)
    assert places.sum(1).tolist() == [3, 3, 3]
    order = circuits.looking(model, clean, names)
    weights = circuits.answer_attention(model, clean)
    mass = [float((weights[n.layer, :, n.head] * places).sum()) for n in order]
    assert mass == sorted(mass, reverse=True) and len(order) == 12


@pytest.mark.parametrize("task", choices.TASKS)
def test_three_tasks_have_one_answer_each(task):
    world = ChoiceWorld()
    clean, other, right, wrong = choices.prompts(task, world, 40, torch.Generator().manual_seed(1))
    assert clean.shape == other.shape == (40, world.length) and bool(((clean != other).sum(1) == 1).all())
    value = world.vocabulary - world.facts
    for a, b, r, w in zip(clean.tolist(), other.tolist(), right.tolist(), wrong.tolist(), strict=True):
        assert r in a and w in a and r != w
        if task == "names":
            persons = [t for t in a if value <= t < world.vocabulary]
            assert persons.count(r) == 1 and persons.count(w) == 2 and b.count(r) == 2
        if task == "objects":
            assert a[a.index(r) + 1] == a[-1] and b[b.index(w) + 1] == b[-1]
        if task == "choices":
            assert a[a.index(r) + 2] == a[3] and b[b.index(w) + 2] == b[3]
    wanted = choices.labelled(clean, right, world)
    assert torch.equal(wanted[:, -1], right)
    inside = wanted[:, :-1] >= 0
    assert int(inside.sum()) == {"choices": 160, "objects": 160, "names": 0}[task]


def test_decoders_are_trained_patched_and_compressed(tmp_path):
    settings = dict(
        tasks=choices.TASKS, seeds=(0,), steps=3, batch=6, width=16, layers=2, heads=2, size=2, ranks=(0, 2), count=6
    )
    found = choices.measure(keep=tmp_path / "kept.jsonl", pictures=tmp_path, **settings)
    json.dumps(found)
    assert (tmp_path / "choices-cpu.svg").exists()
    assert [row["name"] for row in found["pairs"]["rows"]] == [
        "choices and objects", "choices and names", "objects and names",
    ]  # fmt: skip
    names = [row["name"] for row in found["compression"]["rows"]]
    assert names[0] == "full, 0" and len(names) == 1 + 2 * 3
    assert set(found["tasks"]["rows"][0]) >= {"accuracy", "share of the circuit"}


def test_speeds_are_measured_and_results_agree(monkeypatch):
    monkeypatch.setattr(models, "load", stand_in)
    found = look.measure(prompts=2, every=3, rounds=1)
    assert [r["case"] for r in found["records"]][-1] == "all z captured" and len(found["records"]) == 4
    assert all(r["apart"] < 1e-5 for r in found["records"][:-1])
