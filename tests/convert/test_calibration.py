"""Spans from texts and answers to a converted model: what is asked, searched, chosen and put."""

import pytest
import torch
from test_spans import ids, llama

from attnlib.convert.agreement import task_loss
from attnlib.convert.calibration import answered, losses_of, mixture
from attnlib.convert.spans import Plan, influence, rules, search


def test_answers_are_the_model_s_own_and_alone_have_labels():
    model, prompt = llama(), ids(9)
    (batch,) = answered(model, [{"input_ids": prompt}], tokens=5)
    whole = batch["input_ids"]
    assert whole.shape == (2, 14) and whole[:, :9].equal(prompt)
    assert (batch["labels"][:, :9] == -100).all() and batch["labels"][:, 9:].equal(whole[:, 9:])
    assert "attention_mask" not in batch
    for at in range(9, 14):
        assert model(whole[:, :at]).logits[:, -1].argmax(-1).equal(whole[:, at])
    # Only positions that predict an answer have gradients, so rows of the map before them have no influence.
    effect = influence(model, [batch], block=2)
    assert not effect[-1, :, :4].any() and effect[-1, :, 4:].any()


def test_padding_stays_hidden():
    prompt = ids(9)
    prompt[0, :4] = 0
    (batch,) = answered(llama(), [{"input_ids": prompt, "attention_mask": (prompt != 0).long()}], tokens=3)
    assert batch["attention_mask"].shape == (2, 12) and batch["attention_mask"][0].tolist() == [0] * 4 + [1] * 8


def test_one_call_profiles_searches_chooses_and_puts():
    model = llama()
    before = model(ids(32)).logits
    batches = {16: [{"input_ids": ids(16)}], 24: [{"input_ids": ids(24)}]}
    bounds = {16: 0.6, 24: 0.6, 32: 0.6}
    held = [{"input_ids": ids(32)}]
    found = mixture(model, batches, bounds, held, block=2, points=3)
    assert all(found.plan.density(n, 2) <= 0.6 + 1e-6 for n in bounds)
    assert found.plan == found.plans[min(range(len(found.losses)), key=found.losses.__getitem__)]
    assert task_loss(model, held[0]).item() == pytest.approx(min(found.losses))
    found.conversion.restore()
    assert model(ids(32)).logits.equal(before)
    assert found.losses == pytest.approx(losses_of(model, found.plans, held, block=2))
    maps = {n: influence(model, given, 2) for n, given in batches.items()}
    again = mixture(model, {}, bounds, held, block=2, maps=maps, points=3)
    assert again.plans == found.plans
    again.conversion.restore()


def test_a_floor_holds_densities_from_below():
    """Where nothing matters, any plan is best, and the floor decides."""
    effect = torch.zeros(1, 2, 8, 8)
    choices = rules(-8, 32, 32, 32, interval=8, betas=3)
    (plan,) = search({32: effect}, choices, {32: 0.8}, block=4, rules_per_layer=None, floor=0.9)
    assert 0.72 - 1e-6 <= plan.density(32, 4) <= 0.8 + 1e-6
    with pytest.raises(ValueError, match="lower floor=1.0"):
        search({32: effect}, choices, {32: 0.8}, block=4, rules_per_layer=None, floor=1.0)


def test_bad_input_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="prompts holds none"):
        answered(model, [], 4)
    with pytest.raises(ValueError, match=r"prompts\[0\] has no input_ids"):
        answered(model, [{}], 4)
    with pytest.raises(ValueError, match="must generate"):
        answered(torch.nn.Linear(2, 2), [{"input_ids": ids(4)}], 4)
    with pytest.raises(ValueError, match="tokens"):
        answered(model, [{"input_ids": ids(4)}], 0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        losses_of(model, [Plan([[0] * 4] * 2, [[1] * 4] * 2)], [])
    with pytest.raises(ValueError, match=r"batches\[16\] holds inputs of length 12"):
        mixture(model, {16: [{"input_ids": ids(12)}]}, {16: 0.5}, block=2)
    with pytest.raises(ValueError, match="plans were found"):
        mixture(model, {n: [{"input_ids": ids(n)}] for n in (16, 24)}, {16: 0.6, 24: 0.6}, block=2, points=2)
