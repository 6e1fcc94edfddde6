"""What tokens hold that do not exist reaches no technique: neither what the model gives, nor what a technique shows."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib import cache, reduce  # noqa: E402
from hooks.models import language_model, prompt, scores  # noqa: E402
from hooks.pictures import picture_inputs, picture_model  # noqa: E402
from hooks.test_protocol_pairs import ANSWER, LAYERS, TYPES, make  # noqa: E402
from hooks.test_technique_states import NAMES, answers  # noqa: E402

NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def kernels_that_ignore_absent_keys():
    """Models multiply what is absent by zero; with a kernel that does not, they are right, and techniques must be."""
    kernel = F.scaled_dot_product_attention

    def clean(q, k, v, attn_mask=None, **kwargs):
        if attn_mask is not None:
            read = attn_mask.expand(*q.shape[:2], -1, -1).any(-2).unflatten(1, (k.shape[1], -1)).any(2).unsqueeze(-1)
            k, v = k.masked_fill(~read, 0.0), v.masked_fill(~read, 0.0)
        return kernel(q, k, v, attn_mask=attn_mask, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", clean)
        yield


def padding_holds(model, value):
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = value
    return model


def leaves(x, path=""):
    if isinstance(x, torch.Tensor):
        yield path, x
    elif isinstance(x, dict):
        for key, value in x.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(x, (list, tuple)):
        for number, value in enumerate(x):
            yield from leaves(value, f"{path}[{number}]")
    elif isinstance(x, float):
        yield path, torch.tensor(x)


@pytest.fixture(scope="module")
def models():
    return [padding_holds(picture_model(num_hidden_layers=LAYERS), value) for value in (0.0, NAN)]


def padded():
    """The first sample is shorter; both have one image."""
    inputs = picture_inputs((1, 1))
    ids = F.pad(inputs["input_ids"], (4, 0))
    ids[1, :4] = torch.tensor([9, 10, 11, 12])
    ids[:, -1] = ANSWER
    return {**inputs, "input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("name", NAMES)
def test_techniques(name, models):
    inputs, given, shown = padded(), [], []
    for model in models:
        with attnlib.attach(model, make(name, model), token_types=TYPES) as session:
            given.append(answers(model, inputs)[0])
            shown.append(dict(leaves(session.results)))
    assert torch.equal(given[0], given[1])
    assert shown[0].keys() == shown[1].keys()
    for path, value in shown[0].items():
        torch.testing.assert_close(shown[1][path], value, equal_nan=True, msg=lambda m, path=path: f"{path}: {m}")


def test_soft_pruning_in_training(models):
    """The soft masks of ATP, and what its gates learn of."""
    inputs, found = padded(), []
    for model in models:
        gates = reduce.atp_gates(model, (1,), 0.25)
        for p in gates.parameters():
            torch.nn.init.constant_(p, 0.1)
        with attnlib.attach(model, reduce.ATP(gates), token_types=TYPES) as session:
            model.train()
            model(**inputs)
            losses = session.interventions[0].losses()["total"]
            model.eval()
        found.append([losses.detach(), *torch.autograd.grad(losses, list(gates.parameters()), allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b)


SCORERS = {
    "SnapKVVotes": lambda: cache.SnapKVVotes(4, 3),
    "Recency": lambda: cache.Recency(2),
    "KeyNorm": lambda: cache.KeyNorm(),
    "ValueNorm": lambda: cache.ValueNorm(),
    "RandomScores": lambda: cache.RandomScores(),
    "LastQuery": lambda: cache.LastQuery(),
    "ObservedAttention": lambda: cache.ObservedAttention(),
    "ExpectedAttention": lambda: cache.ExpectedAttention(sinks=1),
    "Product": lambda: cache.ExpectedAttention(sinks=1) * cache.ValueNorm(),
}


def test_every_scorer_stands_in_the_table():
    exported = {n for n in cache.__all__ if isinstance(c := getattr(cache, n), type) and issubclass(c, cache.Scorer)}
    assert exported - {"Scorer"} == SCORERS.keys()


@pytest.mark.parametrize("budget", [cache.Cap(7), cache.AcrossHeads(cache.Cap(7)), cache.AcrossLayers(cache.Cap(7))])
@pytest.mark.parametrize("name", SCORERS)
def test_scorers(name, budget):
    inputs, given, kept = prompt(), [], []
    for value in (0.0, NAN):
        technique = cache.KVCompression(SCORERS[name](), budget, cache.TopK(kernel_size=3), every=2)
        with attnlib.attach(padding_holds(language_model(), value), technique) as session:
            given.append(scores(session.model, inputs, suppress_tokens=[0])[0])  # it holds no number
            kept.append(session.results["kv-compression"])
    assert torch.equal(given[0], given[1])
    assert all(torch.equal(kept[0][n]["kept"], kept[1][n]["kept"]) for n in kept[0])
