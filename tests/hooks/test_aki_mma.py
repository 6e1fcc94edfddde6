"""Masks by type of token: AKI's modality-mutual attention and its relatives, alone and inside models."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hooks.models import dense_attention, language_model, prompt, scores

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib import masks  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import (  # noqa: E402
    GENERATED,
    IMAGE,
    PAD,
    QUESTION,
    SYSTEM,
    TEXT,
    MaskByType,
    Record,
    TokenTypes,
    TypeRule,
    bidirectional,
    causal_frames,
    composite,
    modality_mutual,
)
from attnlib.steer import DualAttention  # noqa: E402

IMG, ANSWER = 61, 60
TYPES = TokenTypes(image=IMG, answer=ANSWER)
RULES = {
    "modality-mutual": modality_mutual(),
    "bidirectional": bidirectional(),
    "prefix": bidirectional((IMAGE, SYSTEM, QUESTION)),
    "composite": composite(),
    "composite-text": composite(reads_text=True),
    "both": composite(reads_text=True) | modality_mutual(),
}


def image_prompt(pad=(5, 0), length=20, image=(7, 12), answer=17, **changes):
    """Ids: text, image, question, answer marker, a word of the answer; with padding on the left."""
    inputs = prompt(pad=pad, length=length, **changes)
    inputs["input_ids"][:, image[0] : image[1]] = IMG
    if answer is not None:
        inputs["input_ids"][:, answer] = ANSWER
    return inputs


def brute_force(rule, types):
    """Pair by pair, from the sentence: lock against the order, unlock beside it, padding never."""
    allowed = torch.zeros(len(types), len(types), dtype=torch.bool)
    for q, k in itertools.product(range(len(types)), repeat=2):
        tq, tk = int(types[q]), int(types[k])
        ordered = k <= q and ((tq, tk) not in rule.lock or k == q)
        allowed[q, k] = (ordered or (tq, tk) in rule.unlock) and tq != PAD and tk != PAD
    return allowed


# ---- types


def test_types_of_a_prompt_with_a_question():
    ids = torch.tensor([[0, 1, 4, IMG, IMG, 7, 8, ANSWER, 3], [1, 2, 3, 4, 5, 6, 7, ANSWER, 3]])
    types = TokenTypes(image=IMG, pad=0, answer=ANSWER)(ids)
    want = [PAD, SYSTEM, SYSTEM, IMAGE, IMAGE, QUESTION, QUESTION, GENERATED, GENERATED]
    assert types.tolist() == [want, [TEXT] * 9]  # without an image there is no question about one
    no_marker = ids.clone()
    no_marker[0, 7] = 9
    assert TokenTypes(image=IMG, answer=ANSWER)(no_marker)[0].tolist() == [1, 1, 1, 2, 2, 1, 1, 1, 1]
    before = torch.tensor([[1, ANSWER, IMG, 5, ANSWER, 6, 7, ANSWER, 8]])
    want = [SYSTEM, SYSTEM, IMAGE, QUESTION, *[GENERATED] * 5]  # only the first question after the image
    assert TokenTypes(image=IMG, answer=ANSWER)(before)[0].tolist() == want


def test_the_authors_know_no_question_behind_an_answer():
    ids = torch.tensor([[1, ANSWER, IMG, 5, ANSWER, 6], [1, 2, IMG, 5, ANSWER, 6]])
    assert TokenTypes(image=IMG, answer=ANSWER)(ids).tolist() == [[3, 3, 2, 4, 5, 5], [3, 3, 2, 4, 5, 5]]
    types = TokenTypes(image=IMG, answer=ANSWER, compat="authors")(ids)
    assert types.tolist() == [[1, 1, 2, 1, 1, 1], [3, 3, 2, 4, 4, 5]]


def test_markers_of_several_tokens():
    ids = torch.tensor([[1, IMG, 5, 40, 41, 5, 40, 42, 7, 40]])
    assert TokenTypes(image=IMG, answer=(40, 42))(ids)[0].tolist() == [3, 2, 4, 4, 4, 4, 5, 5, 5, 5]
    assert TokenTypes(image=IMG, answer=[40, 41])(ids)[0].tolist() == [3, 2, 4, 5, 5, 5, 5, 5, 5, 5]
    assert (TokenTypes(image=IMG, answer=(7, 40, 9))(ids) <= IMAGE).all()
    assert (TokenTypes(image=IMG, answer=(7,) * 12)(ids) <= IMAGE).all()
    for bad, match in (
        ({"answer": ()}, "at least one"),
        ({"compat": "authors"}, "one token"),
        ({"compat": "x"}, "compat"),
    ):
        with pytest.raises(ValueError, match=match):
            TokenTypes(image=IMG, **bad)


# ---- masks


@pytest.mark.parametrize("name", RULES)
def test_masks_are_the_sentence_pair_by_pair(name):
    rule = RULES[name]
    types = TYPES(image_prompt()["input_ids"]).masked_fill(image_prompt()["attention_mask"] == 0, PAD)
    dense = rule.mask(types).dense(20)
    for row in range(2):
        assert torch.equal(dense[row, 0], brute_force(rule, types[row]))
    one = rule.mask(types[1])
    assert torch.equal(one.dense(20), brute_force(rule, types[1]))
    assert torch.equal(masks.raise_mask(*one.lower()).dense(20), one.dense(20))
    right = types.flip(1)
    assert torch.equal(rule.mask(right).dense(20)[0, 0], brute_force(rule, right[0]))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_our_own_attention_takes_the_masks(backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 20, 8).unbind(0)
    types = TYPES(image_prompt()["input_ids"])
    for rule in RULES.values():
        out = attnlib.attention(q, k, v, mask=rule.mask(types), backend=backend)
        allowed = torch.stack([brute_force(rule, t) for t in types])[:, None]
        torch.testing.assert_close(out, dense_attention(q, k, v, allowed)[0], atol=1e-5, rtol=1e-5)


def test_modality_mutual_counts_and_vanishes():
    types = TYPES(image_prompt(pad=(0, 0))["input_ids"])
    causal = int(masks.causal().dense(20).sum())
    assert (modality_mutual().mask(types).dense(20)[:, 0].sum((1, 2)) == causal + 5 * 5).all()
    for gone in (
        image_prompt((0, 0), image=(7, 7)),
        image_prompt((0, 0), answer=12),
        image_prompt((0, 0), answer=None),
    ):
        assert torch.equal(
            modality_mutual().mask(TYPES(gone["input_ids"])).dense(20)[:, 0], masks.causal().dense(20).expand(2, -1, -1)
        )


def test_masks_equal_the_authors():
    with safe_open(Path(__file__).parents[1] / "fixtures" / "aki-mma.safetensors", "pt") as f:
        cases = sorted({key.split("/")[0] for key in f.keys()})  # noqa: SIM118
        assert len(cases) == 6
        for case in cases:
            ids, valid, theirs = (f.get_tensor(f"{case}/{name}") for name in ("ids", "valid", "allowed"))
            rule = TokenTypes(image=9, answer=32001, compat="authors")
            types = rule(ids[None]).masked_fill(valid[None] == 0, PAD)
            ours = modality_mutual().mask(types).dense(len(ids))
            ours = ours[0, 0] if ours.dim() == 4 else ours
            assert torch.equal(ours[valid == 1], theirs[valid == 1]), case
            # By default the marker itself is not part of the question.
            strict = TokenTypes(image=9, answer=32001)(ids[None]).masked_fill(valid[None] == 0, PAD)
            more = int((strict == QUESTION).sum()) - int((types == QUESTION).sum())
            assert more == (-1 if (types == QUESTION).any() else 0)


@pytest.mark.parametrize("queries, frames", [(8, 1), (8, 2), (8, 3), (8, 8), (8, 12), (4, 16), (5, 7), (1, 3)])
def test_causal_frames(queries, frames):
    dense = causal_frames(queries, frames, 3).dense(queries, frames * 3)
    assert torch.equal(dense, dense[:, ::3].repeat_interleave(3, 1))  # whole frames
    seen = dense[:, ::3].sum(1)
    assert (dense[:, ::3].long().diff(dim=1) <= 0).all() and (seen.diff() >= 0).all()
    assert seen[0] >= 1 and seen[-1] == frames
    if frames <= queries:
        assert seen.tolist() == [i * frames // queries + 1 for i in range(queries)]
    if frames == 1:
        assert dense.all()


def test_causal_frames_keep_order_and_read_nothing_later():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    mask = causal_frames(6, 3, 4)
    base = attnlib.attention(q, k, v, mask=mask)
    later = v.clone()
    later[:, :, 8:] += 1
    changed = attnlib.attention(q, k, later, mask=mask)
    assert torch.equal(changed[:, :, :4], base[:, :, :4]) and (changed[:, :, 4:] != base[:, :, 4:]).any(-1).all()
    swap = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11])
    shuffled = attnlib.attention(q, k[:, :, swap], v[:, :, swap], mask=mask)
    assert not torch.allclose(shuffled, base, atol=1e-3)
    plain = attnlib.attention(q, k, v)
    torch.testing.assert_close(attnlib.attention(q, k[:, :, swap], v[:, :, swap]), plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attnlib.attention(q, k, v, mask=causal_frames(6, 1, 12)), plain, atol=1e-6, rtol=1e-5)


# ---- inside models


def full_forward(model, ids, attention_mask, rule):
    """The oracle: no cache, no hooks; an additive mask built pair by pair is handed to the model itself."""
    types = TYPES(ids)
    types[:, 20:] = GENERATED
    types = types.masked_fill(attention_mask == 0, PAD)
    allowed = torch.stack([brute_force(rule, t) for t in types])[:, None]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=bias, position_ids=position_ids, use_cache=False).logits


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral"])
def model(request):
    return language_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return language_model("llama")


@pytest.mark.parametrize("name", ["modality-mutual", "bidirectional", "composite", "both"])
def test_generate_equals_the_full_forward_pass(model, name):
    inputs = image_prompt()
    plain, _ = scores(model, inputs)
    with attnlib.attach(model, MaskByType(RULES[name]), token_types=TYPES):
        got, ids = scores(model, inputs)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    want = full_forward(model, ids, mask, RULES[name])[:, 19:-1]
    torch.testing.assert_close(got.transpose(0, 1), want, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_every_way_of_decoding(llama, mode):
    inputs = image_prompt()
    with attnlib.attach(llama, MaskByType(modality_mutual()), token_types=TYPES):
        ids = llama.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **mode)
        greedy, _ = scores(llama, inputs)
        if "num_beams" not in mode:
            torch.testing.assert_close(scores(llama, inputs, **mode)[0], greedy, atol=1e-5, rtol=1e-5)
        again, _ = scores(llama, {"input_ids": ids[:, :20], "attention_mask": inputs["attention_mask"]})
        assert torch.equal(again, greedy)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    best = full_forward(llama, ids, mask, modality_mutual()).log_softmax(-1)[:, 19:-1]
    chosen = best.gather(-1, ids[:, 20:, None]).sum((1, 2))
    plain = full_forward(llama, ids, mask, TypeRule()).log_softmax(-1)[:, 19:-1]
    assert (chosen - plain.gather(-1, ids[:, 20:, None]).sum((1, 2))).abs().min() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_chosen_layers_and_implementations(implementation):
    model = language_model(attn_implementation=implementation)
    inputs = image_prompt()
    plain, _ = scores(model, inputs)
    rule, seen = modality_mutual(), {}
    for layers in ([0], [1, 2], [0, 1, 2], None):
        with attnlib.attach(model, MaskByType(rule, layers), Record(rows="all"), token_types=TYPES) as session:
            seen[str(layers)], _ = scores(model, inputs, new=1)
        types = TYPES(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
        for layer in range(3):
            weights = session.results["record"][layer]["weights"][0]
            mine = rule if layers is None or layer in layers else TypeRule()
            want = torch.stack([brute_force(mine, t) for t in types])[:, None]
            exists = types != PAD
            assert torch.equal(
                (weights > 0).transpose(1, 2)[exists], want.expand(-1, 4, -1, -1).transpose(1, 2)[exists]
            )
    torch.testing.assert_close(seen["[0, 1, 2]"], seen["None"])
    assert not torch.allclose(seen["[0]"], plain[:1], atol=1e-4)
    assert not torch.allclose(seen["[0]"], seen["[1, 2]"], atol=1e-4)


def test_questions_reach_image_states_and_answers_never_do(llama):
    inputs = image_prompt(pad=(0, 0))

    def states(**changes):
        ids = inputs["input_ids"].clone()
        for slot, value in changes.items():
            ids[:, int(slot[1:])] = value
        with torch.no_grad(), attnlib.attach(llama, MaskByType(modality_mutual()), token_types=TYPES):
            return llama(input_ids=ids, output_hidden_states=True).hidden_states[-1]

    base, question, answer = states(), states(s13=5), states(s18=5)
    assert (question[:, 7:12] != base[:, 7:12]).any(-1).all() and torch.equal(question[:, :7], base[:, :7])
    assert torch.equal(answer[:, :18], base[:, :18]) and (answer[:, 18:] != base[:, 18:]).any(-1).all()


def test_padding_on_either_side_changes_nothing(llama):
    ids = image_prompt(pad=(0, 0))["input_ids"][:1]
    with torch.no_grad(), attnlib.attach(llama, MaskByType(modality_mutual()), token_types=TYPES):
        alone = llama(input_ids=ids).logits
        for left, right in ((4, 0), (0, 4), (3, 2)):
            padded = torch.nn.functional.pad(ids, (left, right))
            mask = (padded != 0).long()
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            got = llama(input_ids=padded, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(got[:, left : left + 20], alone, atol=2e-5, rtol=1e-5)
            assert got.isfinite().all()


def test_without_image_or_question_it_is_the_model(llama):
    cases = [image_prompt(image=(7, 7)), image_prompt(answer=12), image_prompt(answer=None)]
    for inputs in cases:
        before, _ = scores(llama, inputs)
        with attnlib.attach(llama, MaskByType(modality_mutual()), token_types=TYPES):
            assert torch.equal(scores(llama, inputs)[0], before)
    inputs = image_prompt()
    before, _ = scores(llama, inputs)
    with attnlib.attach(llama, MaskByType(TypeRule()), token_types=TYPES) as session:
        assert not session.attached and torch.equal(scores(llama, inputs)[0], before)
    half = image_prompt()
    half["input_ids"][0] = prompt()["input_ids"][0].clamp(max=59)
    plain, _ = scores(llama, half)
    with attnlib.attach(llama, MaskByType(modality_mutual()), token_types=TYPES):
        mixed, _ = scores(llama, half)
    torch.testing.assert_close(mixed[:, 0], plain[:, 0], atol=1e-5, rtol=1e-5)  # a sample without image, in the batch
    assert not torch.allclose(mixed[0, 1], plain[0, 1], atol=1e-3)


def test_composite_image_states_know_nothing_of_each_other(llama):
    """Permuted image tokens, with their positions: permuted states; a single one first in the sequence: causal."""
    inputs = image_prompt(pad=(0, 0), image=(0, 6))
    embeds = llama.get_input_embeddings()(inputs["input_ids"]).detach()
    torch.manual_seed(0)
    embeds[:, :6] = torch.randn(2, 6, 32) * 0.1
    types = TYPES(inputs["input_ids"])

    def states(x, positions):
        with torch.no_grad(), attnlib.attach(llama, MaskByType(composite()), token_types=types):
            out = llama(inputs_embeds=x, position_ids=positions[None].expand(2, -1), output_hidden_states=True)
        return out.hidden_states[-1]

    order, where = torch.arange(20), torch.arange(20)
    order[:6] = torch.tensor([3, 1, 5, 0, 4, 2])
    base = states(embeds, where)
    torch.testing.assert_close(
        states(embeds[:, order], where[order])[:, :6], base[:, order][:, :6], atol=1e-5, rtol=1e-5
    )
    other = embeds.clone()
    other[:, 2] += 1
    changed = states(other, where)
    assert torch.equal(changed[:, [0, 1, 3, 4, 5]], base[:, [0, 1, 3, 4, 5]])
    assert (changed[:, 6:] != base[:, 6:]).any(-1).all()  # text reads it
    single = image_prompt(pad=(0, 0), image=(0, 1))
    before, _ = scores(llama, single)
    with attnlib.attach(llama, MaskByType(composite()), token_types=TYPES):
        assert torch.equal(scores(llama, single)[0], before)


def test_in_a_vision_language_model():
    from hooks.llava import IMAGE_ID, llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    inputs["input_ids"][:, 11] = 50
    before, _ = scores(model, inputs)
    with attnlib.attach(model, MaskByType(modality_mutual()), token_types=TokenTypes(IMAGE_ID, answer=50)):
        got, ids = scores(model, inputs)
        inside = model.get_decoder().layers[0].self_attn.config._attn_implementation
    assert inside == "attnlib_sdpa" and not torch.allclose(got, before, atol=1e-5)
    # The oracle without hooks: prefill with the four-dimensional mask, then plain cached decoding.
    types = TokenTypes(IMAGE_ID, answer=50)(inputs["input_ids"])
    allowed = torch.stack([brute_force(modality_mutual(), t) for t in types])[:, None]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = model(**{**inputs, "attention_mask": bias}, use_cache=True)
        steps = [out.logits[:, -1]]
        for i in range(4):
            out = model(input_ids=ids[:, 14 + i : 15 + i], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[:, -1])
    torch.testing.assert_close(got, torch.stack(steps), atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_forward_edge(llama):
    embeds = llama.get_input_embeddings()(image_prompt(pad=(0, 0))["input_ids"]).detach().requires_grad_()
    types = TYPES(image_prompt(pad=(0, 0))["input_ids"])
    with attnlib.attach(llama, MaskByType(modality_mutual()), token_types=types):
        out = llama(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
    grad = torch.autograd.grad(out[:, 7:12].square().sum(), embeds)[0]
    assert (grad[:, 12:17].abs().amax(-1) > 0).all() and grad[:, 17:].abs().max() == 0


def test_it_composes_with_a_compressed_cache_and_refuses_two_masks(llama):
    inputs = image_prompt(length=24)
    snap = SnapKV(cap=12, window_size=4, kernel_size=3)
    with attnlib.attach(llama, MaskByType(modality_mutual()), snap, token_types=TYPES):
        got, _ = scores(llama, inputs)
    with attnlib.attach(llama, MaskByType(modality_mutual()), token_types=TYPES):
        full, _ = scores(llama, inputs)
    assert torch.equal(got[0], full[0]) and not torch.allclose(got[1:], full[1:], atol=1e-4)
    for other in (MaskByType(composite()), DualAttention()):
        with pytest.raises(ValueError, match="both say which query reads which key"):
            attnlib.attach(llama, MaskByType(modality_mutual()), other, token_types=TYPES)
    with attnlib.attach(llama, MaskByType(composite(), [0]), MaskByType(bidirectional(), [1]), token_types=TYPES):
        scores(llama, inputs, new=2)


# ---- bad input


def test_prompts_in_chunks_are_refused_where_they_would_be_wrong(llama):
    inputs = image_prompt(pad=(0, 0))
    with attnlib.attach(llama, MaskByType(modality_mutual()), token_types=TYPES(inputs["input_ids"])):
        with pytest.raises(ValueError, match="image tokens should read question tokens.*not in chunks"):
            llama.generate(**inputs, max_new_tokens=2, prefill_chunk_size=9)
    with attnlib.attach(llama, MaskByType(composite()), token_types=TYPES(inputs["input_ids"])):
        whole, _ = scores(llama, inputs)
        pieces, _ = scores(llama, inputs, prefill_chunk_size=9)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_bad_rules(llama):
    with pytest.raises(ValueError, match="padding is read by nobody"):
        TypeRule(unlock={(IMAGE, PAD)})
    with pytest.raises(ValueError, match="unlock must hold pairs"):
        TypeRule(unlock={(IMAGE, 9)})
    with pytest.raises(ValueError, match="locked and unlocked at once"):
        bidirectional() | composite()
    with pytest.raises(TypeError, match="must be a TypeRule.*call it"):
        MaskByType(modality_mutual)
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        attnlib.attach(llama, MaskByType(modality_mutual(), [7]), token_types=TYPES)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(llama, MaskByType(modality_mutual()))
    for rule in (modality_mutual(), bidirectional((IMAGE, SYSTEM, QUESTION))):
        with pytest.raises(ValueError, match="without an answer marker.*TokenTypes.image=..., answer=...."):
            attnlib.attach(llama, MaskByType(rule), token_types=TokenTypes(image=IMG))
    for rule in (bidirectional(), composite(), composite(reads_text=True)):
        attnlib.attach(llama, MaskByType(rule), token_types=TokenTypes(image=IMG)).detach()
    for bad in ("<image>", None, 1.5, ["<image>"]):
        with pytest.raises(TypeError, match="image must be a token id or several"):
            TokenTypes(image=bad)
    with pytest.raises(TypeError, match="answer must be a token id or several.*got 'ASSISTANT:'"):
        TokenTypes(image=IMG, answer="ASSISTANT:")
    for bad in ((0, 1, 1), (1, 2.0, 1), (1, 1, -1)):
        with pytest.raises((TypeError, ValueError), match="at least 1"):
            causal_frames(*bad)
