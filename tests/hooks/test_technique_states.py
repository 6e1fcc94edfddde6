"""Techniques between calls: every exported one, through everything that may lie between two uses of it.

Each situation is compared with the same technique, made anew, in a session of its own; or refused by name.
"""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib import cache, reduce, steer  # noqa: E402
from hooks.pictures import IMAGE_ID, picture_inputs, picture_model  # noqa: E402
from hooks.test_protocol_pairs import ANSWER, LAYERS, LOOKS, MAKE, TYPES, make  # noqa: E402

NAMES = [name for name, maker in MAKE.items() if maker is not None]
NEW = 3

#: Techniques for samples that have as many images each, at the settings of the table.
EVEN = ("DyVTEByAttention", "SceneMagnifier", "ScheduledPruning")


@pytest.fixture(scope="module")
def model():
    return picture_model(num_hidden_layers=LAYERS)


def prompt(images=(1, 1), seed=1):
    inputs = picture_inputs(images, seed=seed)
    inputs["input_ids"][:, -1] = ANSWER
    return inputs


def answers(model, inputs, **mode):
    torch.manual_seed(11)
    out = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=[0, ANSWER, IMAGE_ID], output_scores=True,
        return_dict_in_generate=True, **{"do_sample": False, **mode},
    )  # fmt: skip
    return torch.stack(out.scores)


def fresh(name, model, inputs, **mode):
    with attnlib.attach(model, make(name, model), token_types=TYPES):
        return answers(model, inputs, **mode)


@pytest.mark.parametrize("name", NAMES)
def test_several_prompts_of_several_sizes_in_one_session(name, model):
    prompts = [prompt((1, 1)), prompt((1,), 5), prompt((1, 1, 1), 7), prompt((1, 1))]
    want = [fresh(name, model, p) for p in prompts]
    with attnlib.attach(model, make(name, model), token_types=TYPES):
        got = [answers(model, p) for p in prompts]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_without_image_between_two_others(name, model):
    plain = {n: t for n, t in prompt((1, 1)).items() if n != "pixel_values"}
    plain["input_ids"] = plain["input_ids"].clamp(max=60)
    want = fresh(name, model, prompt((1, 1))), fresh(name, model, plain)
    with attnlib.attach(model, make(name, model), token_types=TYPES):
        got = answers(model, prompt((1, 1))), answers(model, plain), answers(model, prompt((1, 1)))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(got[2], want[0])


@pytest.mark.parametrize("name", NAMES)
def test_one_object_in_a_second_session_and_copies_of_it(name, model):
    inputs = prompt()
    technique = make(name, model)
    with attnlib.attach(model, technique, token_types=TYPES):
        want = answers(model, prompt((1,), 5)), answers(model, inputs)
    for copied in (lambda t: t, copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        again = copied(technique)
        with attnlib.attach(model, again, token_types=TYPES):
            assert torch.equal(answers(model, inputs), want[1])


@pytest.mark.parametrize("name", NAMES)
def test_copied_while_attached_it_is_not_attached_itself(name, model):
    technique = make(name, model)
    with attnlib.attach(model, technique, token_types=TYPES):
        want = answers(model, prompt())
        again = copy.deepcopy(technique)
    with attnlib.attach(model, again, token_types=TYPES):
        assert torch.equal(answers(model, prompt()), want)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_exception_in_the_middle_leaves_nothing_behind(name, step, model):
    want, inputs = fresh(name, model, prompt()), prompt()
    calls = []

    def stop(module, args):
        calls.append(1)
        if len(calls) == at:
            raise Interrupt

    with attnlib.attach(model, make(name, model), token_types=TYPES):
        at = 10**9
        handle = model.model.language_model.layers[3].register_forward_pre_hook(stop)
        answers(model, inputs)
        per = len(calls)
        calls.clear()
        at = 1 + (per * step) // NEW
        with pytest.raises(Interrupt):
            answers(model, inputs)
        handle.remove()
        assert torch.equal(answers(model, inputs), want)


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_samples_follow_their_rows(name, model):
    """Rows of beams are those of the prompt repeated; a technique that keeps things by row has to move them along."""
    inputs = prompt((1, 1))
    mode = dict(num_beams=3, num_return_sequences=3)
    batched = fresh(name, model, inputs, **mode)
    assert not batched.isnan().any()
    for row in range(2):
        alone = {n: t[row : row + 1] for n, t in inputs.items()}
        got = fresh(name, model, alone, **mode)
        a, b = batched[:, 3 * row : 3 * row + 3].nan_to_num(neginf=0.0), got.nan_to_num(neginf=0.0)
        torch.testing.assert_close(a, b, atol=2e-4 * float(b.abs().max()), rtol=1e-4)


def loss_and_gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs, use_cache=False).logits
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().div(out.numel()).backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["reentrant", "not"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_computes_what_is_computed_without(name, kind, model):
    inputs = prompt()
    found = []
    model = copy.deepcopy(model).train()
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        try:
            with attnlib.attach(model, make(name, model), token_types=TYPES):
                found.append(loss_and_gradients(model, inputs))
        except ValueError as error:
            assert len(str(error)) > 50  # refused, with a reason
            return
    assert torch.equal(found[0][0], found[1][0])
    for n, g in found[0][1].items():
        torch.testing.assert_close(found[1][1][n], g, atol=1e-5 * float(g.abs().max()) + 1e-12, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_type_gives_numbers_of_that_type(name, dtype, model):
    other = copy.deepcopy(model).to(dtype)
    inputs = prompt()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad(), attnlib.attach(other, make(name, other), token_types=TYPES):
        out = other(**inputs).logits
        assert out.dtype == dtype and out.isfinite().all()
        assert not answers(other, inputs).isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, model):
    inputs = prompt()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs).logits
        with attnlib.attach(model, make(name, model), token_types=TYPES):
            out = model(**inputs).logits
            assert out.isfinite().all() and out.dtype == before.dtype
            assert not answers(model, inputs).isnan().any()
        if name in LOOKS:
            assert torch.equal(out, before)


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_served_or_refused(name, model):
    """Prompt lookup gives what greedy decoding gives, or says that it cannot be served."""
    inputs = prompt((1,))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -5:]], 1)  # drafts at once
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, suppress_tokens=[0, ANSWER, IMAGE_ID],
                    output_scores=True, return_dict_in_generate=True)  # fmt: skip
    with attnlib.attach(model, make(name, model), token_types=TYPES):
        want = model.generate(**inputs, **settings)
    with attnlib.attach(model, make(name, model), token_types=TYPES):
        try:
            got = model.generate(**inputs, **settings, prompt_lookup_num_tokens=2)
        except ValueError as error:
            assert any(word in str(error) for word in ("draft", "assisted", "taken back", "assistant")), str(error)
            return
    assert torch.equal(got.sequences, want.sequences)
    a, b = (torch.stack(out.scores).nan_to_num(neginf=0.0) for out in (got, want))
    torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("size", [9, 20])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_chunks_is_read_as_one_or_refused(name, size, model):
    """Chunks that end within images, and samples with unequal numbers of those."""
    inputs = prompt((1, 1) if name in EVEN else (2, 1))
    with attnlib.attach(model, make(name, model), token_types=TYPES):
        want = answers(model, inputs)
        try:
            got = answers(model, inputs, prefill_chunk_size=size)
        except ValueError as error:
            assert any(word in str(error) for word in ("prefill_chunk_size", "in chunks")), str(error)
            assert torch.equal(answers(model, inputs), want), "the session is not what it was"
            return
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: steer.AGLA(torch.zeros(1, 3, 8, 8), x), lambda x: steer.DAMRO(x), lambda x: steer.SinkCalibration(
            threshold=x), lambda x: steer.SinkCalibration(beta=x), lambda x: steer.VisualBoost(x, sets="all"),
        lambda x: steer.ContrastiveDecoding(steer.NoImage(), x, 0.0), lambda x: steer.HeadReinforcement(x),
        lambda x: steer.SoftImageGuidance(torch.zeros(4, 8), x), lambda x: reduce.CMAI(x), lambda x: reduce.Rate(x),
        lambda x: reduce.Threshold(x), lambda x: cache.Ratio(x), lambda x: cache.Pyramid(cache.Ratio(0.5), x),
        lambda x: steer.SoftPAG(x), lambda x: reduce.SigmoidSchedule(0.0, 1.0, x, 0.0),
    ],
)  # fmt: skip
def test_no_setting_is_not_a_number(make):
    with pytest.raises(ValueError, match="nan"):
        make(float("nan"))
