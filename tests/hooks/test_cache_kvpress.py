"""Compressed caches give what kvpress gives: its scores, its budgets, and logits decoded after its presses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hooks.models import call_site

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import (  # noqa: E402
    AcrossHeads,
    CacheView,
    Cap,
    ExpectedAttention,
    KeyNorm,
    KVCompression,
    LastQuery,
    ObservedAttention,
    PerLayer,
    Pyramid,
    RandomScores,
    Ratio,
    Recency,
    SnapKV,
    SnapKVVotes,
    TopK,
    ValueNorm,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kvpress.safetensors"


class Recording:
    def __init__(self):
        with safe_open(FIXTURE, "pt") as f:
            self.tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            self.config = json.loads(f.metadata()["config"])
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**self.config["model"])).eval()
        weights = {name[3:]: t for name, t in self.tensors.items() if name.startswith("sd/")}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected
        self.model.tie_weights()

    def __getitem__(self, name):
        return self.tensors[name]


@pytest.fixture(scope="module")
def recorded():
    return Recording()


def expected(**changes):
    return ExpectedAttention(**{"future": 16, "sinks": 3, **changes})


SCORERS = {
    "knorm": KeyNorm(),
    "random": RandomScores(2),  # in layer 1: its number is added to the seed
    "tova": LastQuery(),
    "snapkv": SnapKVVotes(4, 3),
    "observed": ObservedAttention(),
    "expected": expected() * ValueNorm(),
    "expected-mean": expected(covariance=False),
    "expected-epsilon": expected(epsilon=0.02) * ValueNorm(),
}

PRESSES = {
    "plain": lambda: KVCompression(KeyNorm(), Ratio(0.0)),
    "knorm": lambda: KVCompression(KeyNorm(), Ratio(0.5)),
    "snapkv": lambda: SnapKV(ratio=0.4, window_size=4, kernel_size=3),
    "streaming": lambda: KVCompression(Recency(3), Ratio(0.6)),
    "tova": lambda: KVCompression(LastQuery(), Ratio(0.5)),
    "observed": lambda: KVCompression(ObservedAttention(), Ratio(0.5)),
    "expected": lambda: KVCompression(expected() * ValueNorm(), Ratio(0.5)),
    "expected-mean": lambda: KVCompression(expected(covariance=False), Ratio(0.5)),
    "expected-epsilon": lambda: KVCompression(expected(epsilon=0.02) * ValueNorm(), Ratio(0.5)),
    "pyramid": lambda: KVCompression(SnapKVVotes(2, 3), Pyramid(Ratio(0.7), 3, 2)),
    "pyramid-full": lambda: KVCompression(SnapKVVotes(2, 3), Pyramid(Ratio(0.3), 4, 2)),
    "pyramid-fallback": lambda: KVCompression(SnapKVVotes(8, 3), Pyramid(Ratio(0.7), 20, 8)),
    "per-layer": lambda: KVCompression(KeyNorm(), PerLayer([Ratio(0.2), Ratio(0.5), Ratio(0.7)])),
    "adakv-knorm": lambda: KVCompression(KeyNorm(), AcrossHeads(Ratio(0.5), 0.2)),
    "adakv-expected": lambda: KVCompression(expected() * ValueNorm(), AcrossHeads(Ratio(0.7), 0.3)),
    "decoding-knorm": lambda: KVCompression(KeyNorm(), Cap(12), every=3, prefill=False),
    "decoding-tova": lambda: KVCompression(LastQuery(), Cap(14), every=2, prefill=False),
    "decoding-ratio": lambda: KVCompression(KeyNorm(), Ratio(0.5), every=3, prefill=False),
}


@pytest.mark.parametrize("name", SCORERS)
def test_scores_equal_kvpress(recorded, name):
    scorer, theirs = SCORERS[name], recorded[f"{name}/scores"]
    q, k, v = recorded["q"], recorded["k"], recorded["v"]
    module = recorded.model.model.layers[1].self_attn
    site = call_site(q, k, layer=1).but(name="model.layers.1.self_attn", module=module)
    scorer.prepare(recorded.model, [site])
    valid = torch.ones(1, 1, k.shape[2], dtype=torch.bool)
    order = torch.arange(k.shape[2])[None]
    mine = scorer.score(CacheView(site, q, order, order, k, v, valid, site.k_pos)).expand(theirs.shape)
    if name == "tova":  # the last key stays, which the compression adds to every score
        mine = torch.cat([mine[..., :-1], torch.full_like(mine[..., :1], torch.inf)], -1)
    if name == "snapkv":
        assert mine[..., -4:].isinf().all()
        mine = mine / 4  # their mean over the window is our sum
    must = mine == torch.inf
    assert (theirs[must] > theirs[~must].max()).all()
    torch.testing.assert_close(mine[~must], theirs[~must], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PRESSES)
def test_decoding_equals_kvpress(recorded, name):
    """Logits of a given continuation, step by step, and the length of every layer's cache."""
    ids, n = recorded["ids"], recorded.config["prompt"]
    cache = transformers.DynamicCache(config=recorded.model.config)
    logits, lengths = [], []

    def note():
        lengths.append([layer.keys.shape[2] for layer in cache.layers])

    with torch.no_grad(), attnlib.attach(recorded.model, PRESSES[name]()):
        recorded.model(ids[:, :n], past_key_values=cache)
        note()
        for t in range(n, ids.shape[1]):
            logits.append(recorded.model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0])
            note()
        assert cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(torch.cat(logits), recorded[f"{name}/logits"], atol=1e-5, rtol=1e-5)
    if name.startswith("adakv"):  # kvpress hides such keys and stores them all the same
        held = torch.tensor(lengths)
        assert (held < torch.tensor(recorded.config["lengths"][name])).all()
    else:
        assert lengths == recorded.config["lengths"][name]
    if name != "plain":
        assert not torch.allclose(torch.cat(logits), recorded["plain/logits"], atol=1e-2)


def test_pyramid_budgets_equal_kvpress(recorded):
    for layers, n, ratio, beta, window, *theirs in recorded["pyramid/table"].tolist():
        layers, n, window = int(layers), int(n), int(window)
        budget = Pyramid(Ratio(round(ratio, 6)), beta, window)
        mine = [budget.keep(n, place, layers) for place in (0, layers // 2, layers - 1)]
        assert mine == theirs, (layers, n, ratio, beta, window)


@pytest.mark.parametrize("number", range(4))
def test_heads_compete_as_in_kvpress(recorded, number):
    ratio, minimum = recorded.config["adakv"][number]
    scores, theirs = recorded["adakv/scores"], recorded[f"adakv/{number}/kept"]
    real = torch.tensor([scores.shape[-1]] * 2)
    counts = AcrossHeads(Ratio(ratio), minimum).counts([scores], [real], [(0, 1)])[0]
    kept = TopK().pick(scores, counts)
    mine = torch.zeros_like(theirs)
    mine.scatter_(-1, kept.clamp(min=0), kept >= 0)
    # A padding index must not overwrite key 0.
    mine[..., 0] = (kept == 0).any(-1)
    assert torch.equal(mine, theirs)
    assert torch.equal(counts, theirs.sum(-1))
