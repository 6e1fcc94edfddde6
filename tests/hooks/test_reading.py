"""Embeddings and last states of chosen tokens: the same as another table of embeddings, and as what the head reads."""

import copy

import pytest
import torch

from hooks.llava import llava, llava_inputs
from hooks.models import language_model, prompt, scores
from hooks.qwen_vl import qwen_vl, qwen_vl_inputs

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention, Reading  # noqa: E402
from hooks.test_removal import Drop, keeps  # noqa: E402

CHOSEN = 7
MODES = [
    pytest.param({}, id="greedy"),
    pytest.param({"num_beams": 3}, id="beams"),
    pytest.param({"cache_implementation": "static"}, id="static-cache"),
    pytest.param({"use_cache": False}, id="no-cache"),
]


def padded_llava():
    model = llava()
    inputs = llava_inputs(model)
    inputs["input_ids"][0, :2], inputs["attention_mask"][0, :2] = 0, 0
    return model, inputs


FAMILIES = {
    "llama": lambda: (language_model("llama"), prompt()),
    "qwen2": lambda: (language_model("qwen2"), prompt()),
    "llava": padded_llava,
    "qwen2-vl": lambda: (qwen_vl(), qwen_vl_inputs()),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    model, inputs = FAMILIES[request.param]()
    inputs["input_ids"][:, -3] = CHOSEN
    return model, inputs


class Put(Intervention):
    """A row in place of one token's."""

    name = "put"

    def __init__(self, row, token=CHOSEN):
        self.row, self.token, self.seen = row, token, []

    def on_embeddings(self, reading, embeds):
        self.seen.append(reading)
        return torch.where((reading.ids == self.token).unsqueeze(-1), self.row, embeds)


class Take(Intervention):
    name = "take"

    def __init__(self, fn=None):
        self.fn, self.seen = fn, []

    def on_states(self, reading, states):
        self.seen.append((reading, states))
        return states if self.fn is None else self.fn(states)


@pytest.mark.parametrize("mode", MODES)
def test_rows_in_place_of_a_token_are_another_table(family, mode):
    model, inputs = family
    torch.manual_seed(5)
    row = torch.randn(32)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight[CHOSEN] = row
    if other.get_input_embeddings().weight is other.get_output_embeddings().weight:
        pytest.skip("tied")
    want, ids = scores(other, inputs, **mode)
    before, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, put := Put(row)):
        got, mine = scores(model, inputs, **mode)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert torch.equal(ids, mine) and not torch.allclose(before, want, atol=1e-3)
    again, _ = scores(model, inputs, **mode)
    assert torch.equal(again, before)
    first, second = put.seen[:2]
    assert first.phase == "prefill" and first.offset == 0 and first.step == 0 and second.step == 1
    if mode.get("use_cache", True):
        assert second.phase == "decode" and second.offset == inputs["input_ids"].shape[1] == int(second.slots[0, 0])
        assert second.ids.shape[1] == 1
    assert first.beams == mode.get("num_beams", 1)


@pytest.mark.parametrize("mode", MODES)
def test_last_states_are_what_the_head_reads(family, mode):
    model, inputs = family
    want, ids = scores(model, inputs, **mode)
    with attnlib.attach(model, take := Take()):
        got, mine = scores(model, inputs, **mode)
    assert torch.equal(got, want) and torch.equal(ids, mine)
    if mode.get("num_beams", 1) == 1:
        last = torch.stack([model.get_output_embeddings()(s[:, -1]) for _, s in take.seen[: len(want)]])
        torch.testing.assert_close(last, want, atol=1e-5, rtol=1e-5)
    assert all(r.ids.shape == s.shape[:2] == r.slots.shape for r, s in take.seen)


def test_states_and_rows_carry_gradient(family):
    model, inputs = family
    row = torch.zeros(32, requires_grad=True)
    with attnlib.attach(model, Put(row), take := Take()):
        model(**inputs)
    states = take.seen[0][1]
    states[:, -1].sum().backward()
    assert states.requires_grad and row.grad is not None and float(row.grad.abs().sum()) > 0
    model.zero_grad()


def test_new_states_reach_the_head_and_the_last_of_all_states(family):
    model, inputs = family
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        with attnlib.attach(model, Take(lambda s: 2 * s)):
            got = model(**inputs, output_hidden_states=True)
            plain = model(**inputs, return_dict=False)
    torch.testing.assert_close(got.logits, 2 * want.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain[0], got.logits)
    if want.hidden_states is not None:
        torch.testing.assert_close(got.hidden_states[-1], 2 * want.hidden_states[-1])
        assert torch.equal(got.hidden_states[0], want.hidden_states[0])


def test_features_of_images_take_their_places_afterwards():
    model, inputs = padded_llava()
    with torch.no_grad():
        want = model(**inputs).logits
        with attnlib.attach(model, Put(torch.ones(32), token=62)):
            assert torch.equal(model(**inputs).logits, want)


def test_tokens_that_left_are_named():
    model, inputs = language_model(), prompt()
    keep = keeps(inputs, (1, 2), ragged=True)
    with attnlib.attach(model, Drop(keep)):
        want, _ = scores(model, inputs)
    with attnlib.attach(model, Drop(keep), take := Take()):
        got, _ = scores(model, inputs)
    assert torch.equal(got, want)
    reading, states = take.seen[0]
    assert reading.ids.shape == states.shape[:2]
    for b in range(len(reading.ids)):
        here = reading.slots[b] >= 0
        assert torch.equal(reading.ids[b, here], inputs["input_ids"][b, reading.slots[b, here]])
        assert bool((reading.ids[b, ~here] == -1).all())


def test_several_compose_in_order_and_identity_touches_nothing():
    model, inputs = language_model(), prompt()
    inputs["input_ids"][:, -3] = CHOSEN
    a, b = torch.randn(32), torch.randn(32)
    with torch.no_grad():
        before = model(**inputs).logits
        with attnlib.attach(model, Put(b)):
            want = model(**inputs).logits
        with attnlib.attach(model, Put(a), Put(b)):
            assert torch.equal(model(**inputs).logits, want)

        class Nothing(Put):
            identity = True

        with attnlib.attach(model, Nothing(a)):
            assert not model.get_input_embeddings()._forward_hooks
            assert torch.equal(model(**inputs).logits, before)
        assert not model.get_input_embeddings()._forward_hooks and not model.model._forward_hooks


def test_a_base_model_and_a_branch():
    model, inputs = language_model(), prompt()
    with torch.no_grad():
        want = model.model(**inputs).last_hidden_state
        with attnlib.attach(model.model, take := Take()) as session, session.at(branch="other"):
            model.model(**inputs)
    assert torch.equal(take.seen[0][1], want) and take.seen[0][0].branch == "other"
    assert repr(take.seen[0][0]) == "Reading((2, 20) after 0, prefill, branch=other)"


def test_an_exception_in_mid_call_leaves_nothing():
    model, inputs = language_model(), prompt()

    def fail(states):
        raise ZeroDivisionError

    before = model(**inputs).logits
    with attnlib.attach(model, take := Take(fail)):
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        take.fn = None
        assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)


def test_checkpointing_and_compiled_models_see_them():
    model, inputs = language_model(), prompt()
    inputs["input_ids"][:, -3] = CHOSEN
    row, grads = torch.randn(32), []
    for on in (False, True):
        other = copy.deepcopy(model).train()
        if on:
            other.gradient_checkpointing_enable({"use_reentrant": False})
        mine = row.clone().requires_grad_()
        with attnlib.attach(other, Put(mine), take := Take()):
            other(**inputs, use_cache=False)
            take.seen[0][1].square().sum().backward()
        grads.append(mine.grad)
    torch.testing.assert_close(grads[0], grads[1])
    with torch.no_grad(), attnlib.attach(model, Put(row)):
        want = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, want)


def test_bad_calls_and_answers_are_told_by_name():
    model, inputs = language_model(), prompt()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with attnlib.attach(model, Take()), pytest.raises(ValueError, match="Take chooses tokens by their ids.*input_ids"):
        model(inputs_embeds=embeds)
    for bad in (lambda s: s[:, 1:], lambda s: None, lambda s: s.double()):
        with (
            attnlib.attach(model, Take(bad)),
            pytest.raises(ValueError, match=r"Take.on_states must return \(B, N, C\)"),
        ):
            model(**inputs)

    class Wrong(Intervention):
        def on_embeddings(self, reading, embeds):
            assert isinstance(reading, Reading)
            return embeds[:1]

    with attnlib.attach(model, Wrong()), pytest.raises(ValueError, match="Wrong.on_embeddings must return"):
        model(**inputs)
    t5 = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises((ValueError, TypeError)):
        attnlib.attach(transformers.T5ForConditionalGeneration(t5), Take())
    unet_like = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    with pytest.raises(ValueError, match="on_states"):
        attnlib.attach(unet_like, Take())
