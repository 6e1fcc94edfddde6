"""Readers of explanations: what is said, how it is read, the study on models of a few numbers."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")
from attnlib.bench.studies.real import readers  # noqa: E402


class Bytes:
    """A tokenizer of words by their letters."""

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        texts = [text] if isinstance(text, str) else text
        rows = [[1 + sum(map(ord, w)) % 60 for w in t.split()] or [1] for t in texts]
        if return_tensors:
            return {"input_ids": torch.tensor(rows)}
        return {"input_ids": rows[0] if isinstance(text, str) else rows}

    def convert_ids_to_tokens(self, ids):
        return [f"w{i}" for i in ids]


def tiny(name):
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    if name == "minilm-l6":
        return transformers.BertModel(transformers.BertConfig(**small)).eval(), Bytes()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).eval(), Bytes()


def test_what_is_said_names_as_many_words():
    words, scores = "a stitch in time saves nine men".split(), [0.0, 0.9, 0.1, 0.8, -0.3, 0.2, 0.0]
    text, named = readers.said_by("verbalization", words, scores, 0)
    assert "»" in text and named
    for arm in ("top words", "random words"):
        said, others = readers.said_by(arm, words, scores, 0)
        assert len(others) == len(named) and said == " ".join(words[i] for i in others)
    assert readers.said_by("top words", words, scores, 0)[1] == sorted(
        sorted(range(7), key=lambda i: -scores[i])[: len(named)]
    )
    assert readers.said_by("nothing", words, scores, 0) == ("...", [])
    assert readers.said_by("whole text", words, scores, 0)[0] == " ".join(words)


def test_docstrings_hold_no_paragraph_twice():
    found = readers.docstrings()
    every = [t for texts in found.values() for t in texts]
    assert list(found) == list(readers.TOPICS) and len(every) == len(set(every))
    assert all(10 <= len(t.split()) <= 45 for t in every) and min(map(len, found.values())) >= 40


def test_study_on_small_models(tmp_path):
    found = readers.measure(seeds=(0, 1), shots=2, count=1, load=tiny, keep=tmp_path / "kept.jsonl", pictures=tmp_path)
    rows = {r["name"]: r for r in found["rows"]}
    assert set(rows) == set(readers.ARMS) and (tmp_path / "real-readers-cpu.svg").is_file()
    assert rows["nothing"]["coverage"]["mean"] == 0 and rows["nothing"]["deletion"]["mean"] == 0
    assert rows["top words"]["coverage"]["mean"] >= rows["random words"]["coverage"]["mean"]
    assert rows["top words"]["words"]["mean"] == rows["random words"]["words"]["mean"]
    assert readers.QUESTION.endswith("?") and set(readers.MODELS) == {"minilm-l6", "smollm2-135m"}
