"""One pass of a prompt for many techniques: what it keeps and predicts is what ``attach`` would."""

import pytest
import torch

import attnlib
from attnlib.bench.studies.real import _prefill as prefill
from attnlib.cache import (
    AcrossHeads,
    ExpectedAttention,
    KeyNorm,
    KVCompression,
    LastQuery,
    ObservedAttention,
    Pyramid,
    RandomScores,
    Ratio,
    Recency,
    SnapKV,
    ValueNorm,
)

transformers = pytest.importorskip("transformers")


def llama(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=96)  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes, pad_token_id=0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)  # scores that differ
    return model


@torch.no_grad()
def attached(model, technique, prompt, more):
    with attnlib.attach(model, technique) as session:
        out = model(prompt, use_cache=True)
        logits = model(more, past_key_values=out.past_key_values).logits
        return logits, session.results[technique.name]


TECHNIQUES = {
    "snapkv": lambda: SnapKV(ratio=0.5, window_size=8),
    "expected": lambda: KVCompression(ExpectedAttention(future=8) * ValueNorm(), Ratio(0.5)),
    "observed": lambda: KVCompression(ObservedAttention(), Ratio(0.6)),
    "last query": lambda: KVCompression(LastQuery(), Ratio(0.5)),
    "norms": lambda: KVCompression(KeyNorm(), Ratio(0.5)),
    "recent": lambda: KVCompression(Recency(), Ratio(0.75)),
    "random": lambda: KVCompression(RandomScores(1), Ratio(0.5)),
}


def test_every_technique_keeps_and_predicts_what_it_does_when_attached():
    model = llama()
    prompt, more = torch.randint(3, 64, (1, 40)), torch.randint(3, 64, (1, 5))
    read = prefill.Reader(model).read(prompt)
    assert len(read) == 40
    choices = [None, *(read.kept(make()) for make in TECHNIQUES.values())]
    found = read.follow(choices, more, most=2)
    with torch.no_grad():
        whole = model(torch.cat([prompt, more], 1)).logits
    torch.testing.assert_close(found[0], whole[0, -5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read.last, whole[:, 39], atol=1e-5, rtol=1e-5)
    for i, (name, make) in enumerate(TECHNIQUES.items(), 1):
        logits, kept = attached(model, make(), prompt, more)
        for n in range(2):
            assert torch.equal(choices[i][n].expand(1, 2, -1), kept[n]["kept"].expand(1, 2, -1)), name
        torch.testing.assert_close(found[i], logits[0], atol=1e-5, rtol=1e-5)
        assert (found[i] - found[0]).abs().max() > 1e-3


def test_a_prompt_that_goes_on_is_one_prompt():
    model = llama()
    ids = torch.randint(3, 64, (1, 40))
    reader = prefill.Reader(model)
    at_once, in_two = reader.read(ids), reader.read(ids[:, :29]).extended(ids[:, 29:])
    torch.testing.assert_close(in_two.last, at_once.last, atol=1e-5, rtol=1e-5)
    for a, b in zip(at_once.layers, in_two.layers, strict=True):
        for name in ("q", "k", "v", "hidden"):
            torch.testing.assert_close(getattr(b, name), getattr(a, name), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(b.angles, a.angles)
    for make in TECHNIQUES.values():
        for one, other in zip(at_once.kept(make()), in_two.kept(make()), strict=True):
            assert torch.equal(one, other)


def test_scores_are_computed_once_for_several_ratios(monkeypatch):
    calls, score = [], KeyNorm.score
    monkeypatch.setattr(KeyNorm, "score", lambda self, view: (calls.append(1), score(self, view))[1])
    read = prefill.Reader(llama()).read(torch.randint(3, 64, (1, 40)))
    once = prefill.OnceScored(KeyNorm())
    for ratio in (0.25, 0.5):
        kept = read.kept(KVCompression(once, Ratio(ratio)))
        assert [k.shape[-1] for k in kept] == [int(40 * (1 - ratio))] * 2
    assert len(calls) == 2
    once.forget()
    read.kept(KVCompression(once, Ratio(0.5)))
    assert len(calls) == 4


def test_choices_of_the_same_keys_are_read_once():
    model = llama()
    prompt, more = torch.randint(3, 64, (1, 40)), torch.randint(3, 64, (1, 5))
    read = prefill.Reader(model).read(prompt)
    one, other = (read.kept(KVCompression(scorer, Ratio(0.5))) for scorer in (KeyNorm(), Recency()))
    twin = [layer.flip(-1) for layer in one]
    rows, seen = [], read._cache
    read._cache = lambda choices: (rows.append(len(choices)), seen(choices))[1]
    found = read.follow([None, one, other, twin, None], more)
    assert sorted(rows) == [1, 2]
    apart = torch.cat([read.follow([choice], more) for choice in (None, one, other, twin, None)])
    torch.testing.assert_close(found, apart, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], found[3]) and not torch.equal(found[1], found[2])


def test_what_cannot_be_read_or_kept_is_refused():
    reader = prefill.Reader(llama())
    with pytest.raises(ValueError, match="97 tokens, more than the 96"):
        reader.read(torch.ones(1, 97, dtype=torch.long))
    read = reader.read(torch.randint(3, 64, (1, 90)))
    with pytest.raises(ValueError, match="97 tokens, more than the 96"):
        read.extended(torch.ones(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="97 tokens, more than the 96"):
        read.follow([None], torch.ones(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="different numbers of keys"):
        read.kept(KVCompression(KeyNorm("high"), AcrossHeads(Ratio(0.5))))
    pyramid = read.kept(KVCompression(KeyNorm(), Pyramid(Ratio(0.5), beta=4, window_size=2)))
    with pytest.raises(ValueError, match="layers keep different numbers"):
        read.follow([pyramid], torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="Ratio.ratio=0.99. leaves no key of 90"):
        read.kept(KVCompression(KeyNorm(), Ratio(0.99)))
    sizes = dict(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ValueError, match="BertModel, which predicts no next token"):
        prefill.Reader(transformers.BertModel(transformers.BertConfig(**sizes)))
