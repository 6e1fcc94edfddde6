"""Techniques on a model with adapters of preference training act as on its merged copy."""

import copy

import pytest
import torch

import attnlib
from attnlib import cache, reduce, steer
from attnlib.convert import preference
from attnlib.models.multimodal.chatrex import KnownObjects
from attnlib.models.multimodal.task_tokens import TaskTokens, UseTaskTokens

pytest.importorskip("transformers")
pytest.importorskip("peft")

from hooks.llava import IMAGE_ID, outspoken_llava  # noqa: E402


def task_tokens():
    torch.manual_seed(3)
    tokens = TaskTokens({"box": 58, "end": 57}, 32, {"box": torch.nn.Linear(32, 4), "end": None}, outputs=True)
    return [UseTaskTokens(tokens), KnownObjects(range(10, 40), [4, 9])]


COMPANY = {
    "SnapKV": lambda: [cache.SnapKV(cap=7, window_size=3, kernel_size=3)],
    "contrast": lambda: [steer.ContrastiveDecoding(steer.NoImage(), 1.5, -0.5, 0.1)],
    "pruning": lambda: [reduce.ReduceByAttention({1: 2})],
    "task tokens": task_tokens,
    "pruning and task tokens": lambda: [reduce.ReduceByAttention({1: 2}), *task_tokens()],
    "both": lambda: [steer.ContrastiveDecoding(steer.NoImage(), 1.5, -0.5, 0.1),
                     cache.SnapKV(cap=7, window_size=3, kernel_size=3)],
}  # fmt: skip


def said(model, inputs, **more):
    out = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True,
        output_scores=True, **more,
    )  # fmt: skip
    return out.sequences, torch.stack(out.scores, 1)


@pytest.fixture(scope="module")
def trained():
    model, inputs = outspoken_llava()
    pairs = [
        {**{k: v[i : i + 1] for k, v in inputs.items()}, "chosen": [5, 6, 7 + i], "rejected": [9, 8]} for i in range(2)
    ]
    out = preference.train(model, pairs, "dpo", steps=2, rank=2, lr=0.02, batch_size=2)
    return out.model.eval(), copy.deepcopy(out).merge().eval(), inputs


@pytest.mark.parametrize("name", COMPANY)
def test_techniques_act_on_adapters_as_on_merged_weights(trained, name):
    adapted, merged, inputs = trained
    types = attnlib.hooks.TokenTypes(image=IMAGE_ID)
    before, logits = said(adapted, inputs)
    found = []
    for model in (adapted, merged):
        with attnlib.attach(model, *COMPANY[name](), token_types=types):
            found.append(said(model, inputs))
    (ids, ours), (same, theirs) = found
    assert ids.equal(same) and not ours.equal(logits)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    with adapted.disable_adapter(), attnlib.attach(adapted, *COMPANY[name](), token_types=types):
        assert not said(adapted, inputs)[1].equal(ours)
    again, after = said(adapted, inputs)
    assert again.equal(before) and after.equal(logits)


@pytest.mark.parametrize("name", ["SnapKV", "contrast"])
def test_beams(trained, name):
    adapted, merged, inputs = trained
    types = attnlib.hooks.TokenTypes(image=IMAGE_ID)
    found = []
    for model in (adapted, merged):
        with attnlib.attach(model, *COMPANY[name](), token_types=types):
            found.append(said(model, inputs, num_beams=2)[0])
    assert found[0].equal(found[1])
