"""Ways of generating that call the model for more than one sequence: each is followed by itself, or refused by name."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

import attnlib  # noqa: E402
from attnlib.cache import Cap, KeyNorm, KVCompression, SnapKV, SnapKVVotes  # noqa: E402
from attnlib.hooks import Record, TokenTypes  # noqa: E402
from hooks.models import NoOp, language_model, prompt  # noqa: E402

STEPS, SCALE = 4, 1.5
GUIDED = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, guidance_scale=SCALE)
TECHNIQUES = {
    "no-op": NoOp,
    "record": Record,
    "snapkv": lambda: SnapKV(ratio=0.5, window_size=4),
    "norms at every step": lambda: KVCompression(KeyNorm(), Cap(6), every=1),
    "votes at every step": lambda: KVCompression(SnapKVVotes(2), Cap(6), every=1),
}


def two_sequences(technique, given, other):
    """Guided scores of every step, from two models with a technique each: (steps, B, V)."""
    found, reads = [], []
    for inputs in (given, other):
        model = language_model()
        attnlib.attach(model, copy.deepcopy(technique))
        reads.append([model, inputs["input_ids"], inputs["attention_mask"], DynamicCache(config=model.config)])
    for _ in range(STEPS):
        logs = []
        for number, read in enumerate(reads):
            model, ids, mask, cache = read
            # Of a prompt with padding ``generate`` counts positions; its guidance leaves them to the model.
            places = {} if number else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
            logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **places).logits
            logs.append(logits[:, -1].log_softmax(-1))
            read[2] = torch.nn.functional.pad(mask, (0, 1), value=1)
        found.append(SCALE * (logs[0] - logs[1]) + logs[1])
        for read in reads:
            read[1] = found[-1].argmax(-1, keepdim=True)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True], ids=["last token", "negative prompt"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_guidance_reads_a_second_sequence(name, negative):
    model, given, technique = language_model(), prompt(), TECHNIQUES[name]()
    plain = model.generate(**given, max_new_tokens=STEPS, do_sample=False)
    ids = prompt(length=12, pad=(0, 0), seed=4)["input_ids"] if negative else given["input_ids"][:, -1:]
    other = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    said = {f"negative_prompt_{n.removeprefix('input_')}": t for n, t in other.items()} if negative else {}
    with attnlib.attach(model, technique) as session:
        out = model.generate(**given, **GUIDED, **said, output_scores=True, return_dict_in_generate=True)
        results = session.results.get(technique.name)
        alone = model.generate(**given, max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(model.generate(**given, **GUIDED, **said), out.sequences), "a second call is another one"
    torch.testing.assert_close(torch.stack(out.scores), two_sequences(technique, given, other), atol=1e-5, rtol=1e-5)
    with attnlib.attach(model, TECHNIQUES[name]()) as session:
        assert torch.equal(model.generate(**given, max_new_tokens=STEPS, do_sample=False), alone)
        of_prompt = session.results.get(technique.name)
    assert torch.equal(model.generate(**given, max_new_tokens=STEPS, do_sample=False), plain)
    if name == "record":
        assert [len(results[layer]["weights"]) for layer in (0, "0 unconditional")] == [STEPS, STEPS]
        assert results["0 unconditional"]["weights"][0].shape[-1] == ids.shape[1]
        torch.testing.assert_close(results[2]["weights"][0], of_prompt[2]["weights"][0])
    elif name == "snapkv":
        assert torch.equal(results[2]["kept"], of_prompt[2]["kept"]) and ("2 unconditional" in results) == negative


def test_types_of_a_second_sequence():
    model, given = language_model(), prompt()
    negative = {"negative_prompt_ids": prompt(length=12, pad=(0, 0), seed=4)["input_ids"]}
    types = torch.full((2, 20), 3)
    types[:, -1] = 4
    seen = []

    class See(NoOp):
        def around_attention(self, site, q, k, v, call):
            seen.append((site.branch, site.q_types))
            return call(q, k, v)

    with attnlib.attach(model, See(layers=[0]), token_types=types):
        model.generate(**given, **GUIDED)
        assert seen[1][0] == "unconditional" and seen[1][1].tolist() == [[4], [4]]
        with pytest.raises(ValueError, match="negative_prompt_ids is another prompt, of 12; give a rule"):
            model.generate(**given, **GUIDED, **negative)
    seen.clear()
    with attnlib.attach(model, See(layers=[0]), token_types=TokenTypes(image=5)):
        model.generate(**given, **GUIDED, **negative)
    assert seen[1][1].shape == (2, 12)


@pytest.mark.parametrize("make", TECHNIQUES.values(), ids=TECHNIQUES)
def test_drafts_of_the_attached_model_itself(make):
    model, given = language_model(), prompt(batch=1, pad=(0,))
    with attnlib.attach(model, make()):
        for own in ({"assistant_early_exit": 2}, {"assistant_model": model}):
            with pytest.raises(ValueError, match=r"drafts (come from the attached Llama|\(assistant_model)"):
                model.generate(**given, max_new_tokens=3, do_sample=False, **own)
