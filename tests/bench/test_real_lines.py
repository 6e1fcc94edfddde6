"""Lines of evidence on real models, on models of a few numbers: heads, sinks, steering, exactness."""

import dataclasses
import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.bench import models  # noqa: E402
from attnlib.bench.data import files  # noqa: E402
from attnlib.bench.exams.words import CONNECTIONS  # noqa: E402
from attnlib.bench.studies.real import _facts, exactness, heads, remedies, sinks, steering, walls  # noqa: E402
from attnlib.bench.studies.real._items import Items, needle_items, row_losses, states  # noqa: E402
from attnlib.bench.studies.real._kept import Kept  # noqa: E402
from attnlib.steer import HeadScale  # noqa: E402

LAYERS, HEADS = 4, 4


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), transformers.ByT5Tokenizer()


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """A tokenizer of bytes takes long over much text."""
    whole = files.text()
    short = dataclasses.replace(whole, train=whole.train[:4000], test=whole.test[:4000])
    monkeypatch.setattr(files, "text", lambda: short)


@pytest.fixture
def unchanged(loaded):
    model, _ = loaded
    before = {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_every_line_says_what_it_asks_and_which_models_it_loads():
    for line in (heads, sinks, steering, exactness, remedies, walls):
        assert line.QUESTION.endswith("?") and set(line.MODELS) <= set(models.MODELS)


def test_pieces_are_computed_once_and_belong_to_their_settings(tmp_path):
    kept = Kept(tmp_path / "kept.jsonl", {"seed": 0})
    assert kept("a", lambda: (1.5, {2: 3})) == [1.5, {"2": 3}]
    again = Kept(tmp_path / "kept.jsonl", {"seed": 0})
    assert again("a", pytest.fail) == [1.5, {"2": 3}] and again.seconds == kept.seconds >= 0
    assert Kept(tmp_path / "kept.jsonl", {"seed": 1})("a", lambda: 2) == 2


def test_a_needle_is_asked_for_at_the_end_and_gone_without_it(loaded):
    _, tokenizer = loaded
    tokens = torch.tensor(tokenizer("nothing of that kind is said here. " * 60)["input_ids"])
    items = needle_items(tokenizer, tokens, rows=3, length=220)
    assert items.ids.shape == items.without.shape == (3, 220) and items.counts.sum(1).tolist() == [5, 5, 5]
    for with_it, bare in zip(items.ids, items.without, strict=True):
        text, code = tokenizer.decode(with_it), tokenizer.decode(with_it[-5:])
        assert code.isdigit() and text.count(code) == 2 and tokenizer.decode(bare).count(code) == 1
    with pytest.raises(ValueError, match="length=100"):
        needle_items(tokenizer, tokens, rows=1, length=100)


def test_losses_by_row_are_those_of_the_model(loaded):
    model, _ = loaded
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 12, dtype=torch.bool)
    counts[:, 5:] = True
    loss, right = row_losses(model, states(model, Items(ids, counts))[-1], Items(ids, counts), chunk=3)
    with torch.no_grad():
        logits = model(ids).logits
    for row in range(2):
        oracle = torch.nn.functional.cross_entropy(logits[row, 4:-1], ids[row, 5:])
        torch.testing.assert_close(loss[row], oracle)
        assert right[row] == (logits[row, 4:-1].argmax(-1) == ids[row, 5:]).float().mean()


def test_heads_scaled_from_their_layer_on_are_heads_scaled(loaded, unchanged):
    model, _ = loaded
    ids = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(1))
    items = Items(ids, torch.ones_like(ids, dtype=torch.bool))
    before = states(model, items)
    for layer in range(LAYERS):
        loss, _ = heads.scaled_alone(model, items, before[layer], layer, 0.0)
        for head in (0, HEADS - 1):
            with torch.no_grad(), attnlib.attach(model, HeadScale.ablate({layer: [head]})):
                out = model.model(input_ids=ids, use_cache=False).last_hidden_state
            torch.testing.assert_close(loss[head], row_losses(model, out, items)[0])
        same, _ = heads.scaled_alone(model, items, before[layer], layer, 1.0)
        torch.testing.assert_close(same, row_losses(model, before[-1], items)[0].expand(HEADS, -1))


def test_gates_have_the_slope_that_scaling_shows(loaded, unchanged):
    model, _ = loaded
    ids = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(2))
    items = Items(ids, torch.ones_like(ids, dtype=torch.bool))
    gradient = heads.gate_gradients(model, items)
    before, step = states(model, items), 1e-2
    for layer in (0, LAYERS - 1):
        up = heads.scaled_alone(model, items, before[layer], layer, 1 + step)[0].mean(1)
        down = heads.scaled_alone(model, items, before[layer], layer, 1 - step)[0].mean(1)
        torch.testing.assert_close((up - down) / (2 * step), gradient[layer], atol=2e-3, rtol=0.02)


def test_loudness_is_what_is_written(loaded):
    model, _ = loaded
    ids = torch.randint(3, 300, (1, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), attnlib.attach(model, heads.Loudness(), heads.LastOutputs(-1)) as session:
        model(ids)
        found = session.results["loudness"]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        out = model(ids, output_attentions=True, output_hidden_states=True)
        layer = model.model.layers[0]
        v = layer.self_attn.v_proj(layer.input_layernorm(out.hidden_states[0])).unflatten(-1, (2, -1)).transpose(1, 2)
        v = v.repeat_interleave(2, 1)
        model.set_attn_implementation("sdpa")
    norms = v.norm(dim=-1)
    norms[..., 0] = 0
    torch.testing.assert_close(found[0]["value_mass"], (out.attentions[0] @ norms[..., None])[0, :, :, 0].mean(1))
    heads_out = (out.attentions[0] @ v)[0]
    weight = layer.self_attn.o_proj.weight.unflatten(1, (HEADS, -1))
    added = torch.einsum("hnd,chd->hnc", heads_out, weight).norm(dim=-1).mean(1)
    torch.testing.assert_close(found[0]["output"], added.detach())


def test_the_line_of_heads(loaded, unchanged, tmp_path):
    call = dict(loaded=loaded, keep=tmp_path / "kept.jsonl", pictures=tmp_path, rows=(2, 2, 2),
                lengths=(24, 220, 16), removed=(0, 4), seeds=(0, 1))  # fmt: skip
    found = heads.measure(**call)
    json.dumps(found)
    assert np.array(found["damage"]["text"]).shape == (LAYERS, HEADS) and (tmp_path / "real-heads-cpu.svg").exists()
    base = found["untouched"]["text"]["loss"]
    for curve in found["curves"].values():
        assert curve[0]["text loss"] == pytest.approx(base, abs=1e-3) and curve[1]["removed"] == 4
    assert found["agreement"]["needle"]["divergence with and without (VHR)"]["interval"][0] <= 1
    again = heads.measure(progress=pytest.fail, **{**call, "pictures": None})
    assert again["agreement"] == found["agreement"]


def test_touching_a_key_moves_its_share(loaded):
    model, _ = loaded
    ids = torch.randint(3, 300, (1, 8), generator=torch.Generator().manual_seed(4))
    record = attnlib.hooks.Record(layers=[0], rows="all")

    def maps(*what):
        with torch.no_grad(), attnlib.attach(model, *what, record) as session:
            model(ids)
            return session.results["record"][0]["weights"][0]

    plain, halved = maps(), maps(sinks.KeyShare(0, 0.5))
    torch.testing.assert_close(halved[..., 1:, 0], plain[..., 1:, 0] / 2)
    torch.testing.assert_close(halved.sum(-1), torch.ones(1, HEADS, 8))
    recent = maps(sinks.RecentKeys(2, sinks=1))
    assert (recent[0, 0, 6] > 0).nonzero().flatten().tolist() == [0, 5, 6]
    with torch.no_grad(), attnlib.attach(model, sinks.SilentValue(0), sinks.Norms()) as session:
        model(ids)
        assert (session.results["norms"][0]["values"][:, 0] == 0).all()


def test_the_line_of_sinks(loaded, unchanged, tmp_path):
    found = sinks.measure(
        loaded=loaded, keep=tmp_path / "kept.jsonl", pictures=tmp_path, rows=(2, 2), lengths=(40, 220),
        search_layers=(1,), window=8,
    )  # fmt: skip
    json.dumps(found)
    rows = {row["name"]: row for row in found["touched"]}
    assert rows["untouched"]["text loss added"]["mean"] == 0 and rows["last 8 keys"]["text loss added"]["mean"] != 0
    seen = found["seen"]
    assert np.array(seen["first token"]).shape == (LAYERS, HEADS) and len(seen["stream"]) == LAYERS
    assert all(s["largest"] >= s["largest rest"] for s in seen["stream"]) and found["search"]["of"] == HEADS
    assert (tmp_path / "real-sinks-cpu.svg").exists()


def test_contexts_say_what_is_not_so_about_what_is_asked_or_about_something_else():
    about, beside = _facts.facts(True), _facts.facts(False)
    assert len(about) == len(beside) >= 100
    for fact in about + beside:
        assert fact.told in fact.context and fact.told != fact.truth
    subject = about[0].question.removeprefix("What is the capital of ").rstrip("?")
    assert subject in about[0].context and subject not in beside[0].context


def test_the_context_is_the_marked_span(loaded):
    _, tokenizer = loaded
    asked = _facts.facts(True)[:3]
    for times in (0, 1, 2):
        for batch in steering.batches(tokenizer, asked, times, size=2):
            for row, item in enumerate(batch.items):
                span = tokenizer.decode(batch.ids[row][batch.types[row] == steering.IMAGE])
                assert span == (asked[item].context + "\n") * times
                assert (batch.mask[row] == 0).sum() == (batch.types[row] == steering.PAD).sum()
    best = steering.gains(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), 2)
    assert best == {0: [0.0, 1.0], 1: [1.0, 0.0]}


def test_the_line_of_steering(loaded, unchanged, tmp_path):
    found = steering.measure(loaded=loaded, keep=tmp_path / "kept.jsonl", pictures=tmp_path, most=2, heads=2)
    json.dumps(found)
    assert found["rows"][0]["in conflict"]["says the truth"]["difference"] == 0
    assert len({row["name"] for row in found["rows"]}) == len(found["rows"]) == 13
    said = {name: tuple(text) for name, text in found["examples"].items()}
    assert said["two branches, alpha 2, in conflict"] != said["as it is, in conflict"]
    assert (tmp_path / "real-steering-cpu.svg").exists()


def test_the_line_of_exactness(loaded, unchanged, tmp_path):
    found = exactness.measure(loaded=loaded, keep=tmp_path / "kept.jsonl", pictures=tmp_path, new=6, new_alone=4)
    json.dumps(found)
    identities = [row for row in found["rows"] if row["kind"] == "identity"]
    assert {row["name"] for row in identities[1:]} == set(exactness.IDENTITY) and identities[0]["tokens"] == 6
    assert all(row["same"] and row["largest"] == 0 for row in identities)
    assert all(row["equal"] for row in found["detached"]) and {r["name"] for r in found["detached"]} == set(
        exactness.ACTING
    )
    assert found["rounding"]["largest"] > 0


def test_remedies_change_weights_and_outputs_as_their_equations_say(loaded):
    model, _ = loaded
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(5))

    def told(*what):
        record = attnlib.hooks.Record(layers=[1], rows="all")
        with torch.no_grad(), attnlib.attach(model, *what, record) as session:
            logits = model(ids).logits
            return logits, session.results["record"][1]["weights"][0]

    logits, plain = told()
    clipped = told(remedies.Clipped(-0.2))[1]
    before = told(remedies.Clipped(-1e-9))[1]
    torch.testing.assert_close(before, plain)
    assert bool(((clipped == 0) & (plain > 0)).any()) and bool((clipped.triu(1) == 0).all())
    # The layer before changes what this one reads, so its equation is held to on the first.
    for gate_at in (0.5, 0.2):
        gated = remedies.Gated(16, HEADS, LAYERS, gate_at)
        for gate in gated.gates:
            torch.nn.init.zeros_(gate.w2)
        torch.testing.assert_close(told(gated)[0], logits, atol=1e-5, rtol=1e-4)  # open at first
    for gate in gated.gates:
        torch.nn.init.constant_(gate.b2, -40.0)  # shut: attention adds nothing
    with torch.no_grad():
        states = model.get_input_embeddings()(ids)
        for layer in model.model.layers:
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        without = model.lm_head(model.model.norm(states))
    torch.testing.assert_close(told(gated)[0], without, atol=1e-5, rtol=1e-4)


def test_the_line_of_remedies(loaded, unchanged, tmp_path):
    settings = dict(loaded=loaded, steps=8, batch=2, length=24, held=2, lr=2e-2, seeds=(0, 1))
    found = remedies.measure(keep=tmp_path / "kept.jsonl", pictures=tmp_path, **settings)
    json.dumps(found)
    rows = {row["name"]: row for row in found["rows"]}
    for row in rows.values():
        assert row["loss"]["mean"] < row["loss, before"]["mean"], row["name"]  # it learns
    plain, gated = (rows[name]["loss, before"]["mean"] for name in (remedies.PLAIN, remedies.GATED))
    assert gated == pytest.approx(plain, abs=0.02) and rows[remedies.CLIPPED]["loss, before"]["mean"] != plain
    assert rows[remedies.PLAIN]["against"]["mean"] == 0 and 0 < rows[remedies.PLAIN]["first token"]["mean"] < 1
    assert (tmp_path / "real-remedies-cpu.svg").exists()
    again = remedies.measure(progress=pytest.fail, keep=tmp_path / "kept.jsonl", **settings)
    assert again["rows"] == found["rows"]


def test_the_line_of_walls(loaded, tmp_path):
    model, tokenizer = loaded
    for encode in walls.encoders(lambda name: (model, tokenizer)).values():
        vectors = encode(["Mercury", "Iron"])
        assert set(vectors) == {"Mercury", "Iron"} and vectors["Iron"].shape == (16,)
        assert float(vectors["Iron"].norm()) == pytest.approx(1, abs=1e-5)
        assert not torch.allclose(vectors["Iron"], vectors["Mercury"])

    def member(clues):
        """What a clue may be connected by: all that can be known without the other clues."""
        return {c: torch.tensor([float(c in clued) for clued in CONNECTIONS.values()]) for c in clues}

    told = []
    settings = dict(seeds=(0, 1), count=5, shuffles=1, embeddings={"member": member})
    found = walls.measure(told.append, tmp_path / "kept.jsonl", tmp_path, **settings)
    json.dumps(found)
    groups = {row["name"]: row["correct groups"]["mean"] for row in found["rows"]}
    assert set(groups) == {f"{how}: {kind}" for how in ("member", "chance") for kind in walls.KINDS}
    assert groups["member: randomised walls"] > groups["member: own walls"] > groups["chance: own walls"]
    number = found["herrings"]
    assert number["own walls"]["mean"] >= 4 > number["randomised walls"]["mean"]
    gap = found["red herrings"][0]["own less randomised"]["mean"]
    assert gap == pytest.approx(groups["member: own walls"] - groups["member: randomised walls"])
    assert len(told) == 8 and (tmp_path / "real-walls-cpu.svg").exists()
    again = walls.measure(pytest.fail, tmp_path / "kept.jsonl", **{**settings, "embeddings": {"member": pytest.fail}})
    assert again["rows"] == found["rows"]


@pytest.mark.slow
@pytest.mark.skipif(not models.is_here("smollm2-135m"), reason="make models")
def test_identity_settings_leave_a_real_model_alone():
    model, tokenizer = models.load("smollm2-135m", dtype=torch.float32)
    found = exactness.measure(loaded=(model, tokenizer), new=8, new_alone=4)
    assert all(row["same"] for row in found["rows"]) and all(row["equal"] for row in found["detached"])
    assert all(row["largest"] == 0 for row in found["rows"] if row["kind"] == "identity")
    for row in found["bfloat16"]:
        assert row["mean"] <= 2 * found["rounding"]["mean"], row["name"]
