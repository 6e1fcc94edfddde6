"""The study of conversion on models of a few numbers."""

import pytest
import torch

from attnlib import convert
from attnlib.bench import models
from attnlib.bench.studies import conversion

transformers = pytest.importorskip("transformers")
SMALL = dict(vocab_size=384, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return transformers.LlamaForCausalLM(config).eval()


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


@pytest.fixture
def tiny(monkeypatch):
    made = {"smollm2": llama(), "minilm": bert()}
    monkeypatch.setattr(models, "load", lambda name: (made[name], transformers.ByT5Tokenizer()))
    return made


def test_the_study_runs_and_leaves_its_models_alone(tiny, tmp_path):
    kept = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in tiny.items()}
    call = dict(
        keep=tmp_path / "kept.jsonl", pictures=tmp_path, steps=2, marks=(0, 1, 2), layers=None, length=24,
        held_windows=2, encoder_steps=1, held_sentences=4, seeds=(0, 1),
    )  # fmt: skip
    found = conversion.measure(**call)
    rows = {row["name"]: row for row in found["decoder"]["rows"]}
    assert set(rows) == set(conversion.CONTESTANTS) and (tmp_path / "conversion-cpu.svg").exists()
    softmax, elu = rows[conversion.TEACHER], rows["1 + elu"]
    assert softmax["bits after 0"] == softmax["bits"] and softmax["against"]["mean"] == 0
    assert elu["bits after 0"]["mean"] == elu["bits"]["mean"] != softmax["bits"]["mean"]
    for name, row in rows.items():
        if name != conversion.TEACHER:
            assert row["bits after 2"] == row["bits"] and -1 <= row["monotony"]["mean"] <= 1
    encoder = {row["name"] for row in found["encoder"]["rows"]}
    assert encoder == {n for n, c in conversion.CONTESTANTS.items() if not c.causal}
    for name, m in tiny.items():
        assert all(torch.equal(v, kept[name][k]) for k, v in m.state_dict().items())
    again = conversion.measure(**call)  # from the file
    assert again["decoder"]["rows"] == found["decoder"]["rows"]


def test_monotony_is_one_for_softmax_and_rises_as_drawn_features_learn_its_maps():
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj"):
                getattr(layer.self_attn, name).weight.mul_(8)
    given = [{"input_ids": torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))}]
    made = convert.linearize(model, "window", window_size=30)
    assert conversion.monotony(made, given) == pytest.approx(1.0)  # it is softmax
    made.restore()
    made = convert.linearize(model, "hedgehog", feature_options=dict(normal=True))
    before = conversion.monotony(made, given)
    made.fit(given * 60, loss="xent")
    assert before < conversion.monotony(made, given) - 0.05 < 0.95


def test_bad_marks():
    with pytest.raises(ValueError, match="marks must begin with 0"):
        conversion.measure(marks=(1, 20))
