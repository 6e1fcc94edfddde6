"""Decoding with two branches: held to both branches recomputed from scratch at every step."""

import pytest
import torch

import attnlib
from attnlib.cache import SnapKV
from attnlib.hooks import IMAGE, PAD, TokenTypes
from attnlib.hooks.branches import Prompt, image_runs
from attnlib.steer import (
    Branch,
    ContrastiveDecoding,
    ImageTokens,
    NoImage,
    NullTokens,
    OtherPixels,
    VisualBoost,
    VisualRedistribution,
    contrast,
)
from hooks import models
from hooks.models import prompt
from hooks.two_branches import Scratch, by_rows, equal, generated

pytest.importorskip("transformers")

IMAGE_ID = 61
RULE = TokenTypes(IMAGE_ID)
MODES = [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}, {"use_cache": False}]


def language_model(family="llama", **changes):
    """A tiny model that is surer of what comes next, so that a cut-off leaves something out and beams have no ties."""
    model = models.language_model(family, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


def image_prompt(spans=((7, 13), (2, 6)), **kwargs):
    inputs = prompt(**kwargs)
    inputs["input_ids"][inputs["input_ids"] == IMAGE_ID] = 7
    for row, (start, stop) in enumerate(spans):
        inputs["input_ids"][row, start:stop] = IMAGE_ID
    return inputs


def without_image(model):
    return lambda ids: by_rows(model, [row[(row != IMAGE_ID) & (row != 0)] for row in ids])


# ---- the combination


def test_combination():
    torch.manual_seed(0)
    z, other = torch.randn(2, 3, 40) * 3
    out = contrast(z, other, 3.0, -2.0, 0.1)
    kept = z.softmax(-1) >= 0.1 * z.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(out.isfinite(), kept) and 3 <= kept.sum() < 60
    torch.testing.assert_close(out[kept], (3 * z - 2 * other)[kept])
    assert torch.equal(contrast(z, other, 1.0, 0.0), z)
    assert contrast(z, other, 5.0, -4.0, 0.0).isfinite().all()
    assert torch.equal(contrast(z, other, 2.0, -1.0, 1.0).argmax(-1), z.argmax(-1))
    torch.testing.assert_close(contrast(z, z, 4.0, -3.0), z, atol=1e-5, rtol=1e-5)
    normal = contrast(z, other, 2.0, -1.0, normalize=True)
    torch.testing.assert_close(normal, 2 * z.log_softmax(-1) - other.log_softmax(-1))


def test_which_image_tokens_belong_together():
    types = torch.tensor([[1, 2, 2, 2, 2, 1, 2, 2], [0, 0, 2, 2, 1, 1, 1, 1]])
    assert image_runs(types).tolist() == [[-1, 1, 1, 1, 1, -1, 6, 6], [-1, -1, 2, 2, -1, -1, -1, -1]]
    assert image_runs(types, 2).tolist() == [[-1, 1, 1, 3, 3, -1, 6, 6], [-1, -1, 2, 2, -1, -1, -1, -1]]


def test_the_best_tokens_of_each_image():
    types = torch.tensor([[0, 1, 2, 2, 2, 1, 2, 2, 2], [1, 2, 2, 2, 1, 1, 1, 1, 1]])
    scores = torch.tensor([[9, 9, 1.0, 3, 2, 9, 5, 4, 6], [0, 0.1, 0.3, 0.2, 9, 9, 9, 9, 9]])
    ids = torch.arange(18).view(2, 9)
    made = Prompt(None, ids, None, types, {})
    for order, want in (
        ("score", [[1, 3, 4, 5, 8, 6], [9, 11, 12, 13, 14, 15, 16, 17]]),
        ("place", [[1, 3, 4, 5, 6, 8], [9, 11, 12, 13, 14, 15, 16, 17]]),
    ):
        inputs, kept = ImageTokens(2, lambda p: scores, order).read(made)
        rows = [row[t != PAD].tolist() for row, t in zip(inputs["input_ids"], kept, strict=True)]
        assert rows == want and (kept[0, :2] == PAD).all() and kept.shape == (2, 8)
    kinds = {"token_type_ids": (types == IMAGE).long()}
    inputs, kept = ImageTokens(2, lambda p: scores).read(Prompt(None, ids, None, types, kinds))
    assert torch.equal(inputs["token_type_ids"][kept != PAD] == 1, (kept == IMAGE)[kept != PAD])
    shuffled = torch.tensor([0, 1, 4, 2, 3, 5, 6, 7, 8])
    inputs, _ = ImageTokens(2, lambda p: scores[:, shuffled]).read(made)
    assert inputs["input_ids"][0, 2:].tolist() == [1, 4, 2, 5, 8, 6]  # the choice follows the patches


# ---- decoding


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_image_free_branch_equals_two_models(family, mode):
    model = language_model(family)
    inputs = image_prompt()
    settings = (1.8, -0.8, 0.05)
    want = generated(
        model, inputs, mode, processor=Scratch(without_image(model), *settings, beams=mode.get("num_beams", 1))
    )
    plain = generated(model, inputs, mode)
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), *settings), token_types=RULE) as session:
        got = generated(model, inputs, mode)
        again = generated(model, inputs, mode)
        assert session.results["contrastive-decoding"]["forwards"] == 10
    equal(got, want)
    equal(again, got, atol=0)
    assert not torch.equal(got[1], plain[1])
    equal(generated(model, inputs, mode), plain, atol=0)
    assert not model._forward_pre_hooks and not model.model._forward_pre_hooks


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_some_image_tokens_and_a_null_image(mode):
    model = language_model()
    inputs = image_prompt(spans=((7, 13), (2, 8)))
    torch.manual_seed(0)
    # Half of the image's tokens, which here differ by the id they are looked up with.
    ids = inputs["input_ids"]
    types = RULE(ids).masked_fill(inputs["attention_mask"] == 0, PAD)
    for row in range(2):
        ids[row, types[row] == IMAGE] = torch.arange(50, 56)
    worth = torch.randn(64)

    def best(tokens):
        rows = []
        for row in tokens:
            row = row[row != 0]
            at = ((row >= 50) & (row < 56)).nonzero().flatten()[:6]
            kept = row[at][worth[row[at]].argsort(descending=True)[:3]]
            rows.append(torch.cat([row[: at[0]], kept, row[at[-1] + 1 :]]))
        return by_rows(model, rows)

    null = torch.randn(6, 32)

    def nothing(tokens):
        out = []
        for row in tokens:
            row = row[row != 0]
            at = ((row >= 50) & (row < 56)).nonzero().flatten()[:6]
            embeds = model.get_input_embeddings()(row).clone()
            embeds[at] = null
            with torch.no_grad():
                out.append(model(inputs_embeds=embeds[None]).logits[:, -1])
        return torch.cat(out)

    rows = mode.get("num_beams", 1)
    given = types.repeat_interleave(rows, 0)
    ids[ids.ge(50) & ids.lt(56) & (types != IMAGE)] = 9
    for branch, other in (
        (ImageTokens(3, lambda p: worth[p.ids]), best),
        (NullTokens(null), nothing),
    ):
        want = generated(model, inputs, mode, processor=Scratch(other, 2.0, -1.0, 0.1, beams=rows))
        with attnlib.attach(model, ContrastiveDecoding(branch, 2.0, -1.0, 0.1), token_types=given):
            equal(generated(model, inputs, mode), want)


def test_batch_with_padding_equals_single_prompts():
    model = language_model()
    inputs = image_prompt()
    together, alone = None, []
    for row, start in ((None, 0), (0, 5), (1, 0)):
        some = inputs if row is None else {n: t[row : row + 1, start:] for n, t in inputs.items()}
        with attnlib.attach(model, ContrastiveDecoding(NoImage(), 2.0, -1.0), token_types=RULE):
            got, _ = generated(model, some)
        together, alone = (got, alone) if row is None else (together, [*alone, got])
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_equal_branches_give_the_model_back():
    model = language_model()
    inputs = image_prompt()
    same = ImageTokens(4, lambda p: -torch.arange(20.0).expand(2, -1), "place")
    inputs["input_ids"][0, 11:13] = 8
    plain = generated(model, inputs)
    with attnlib.attach(model, ContrastiveDecoding(same, 4.0, -3.0), token_types=RULE):
        equal(generated(model, inputs), plain, atol=1e-5)


def test_identity_and_no_weight_on_the_branch():
    model = language_model()
    inputs = image_prompt()
    plain = generated(model, inputs, {"suppress_tokens": None})
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), 1.0, 0.0), token_types=RULE):
        assert not model._forward_pre_hooks
        equal(generated(model, inputs, {"suppress_tokens": None}), plain, atol=0)
    cut = ContrastiveDecoding(NoImage(), 1.0, 0.0, 0.2)
    with attnlib.attach(model, cut, token_types=RULE):
        got, sequences = generated(model, inputs, {"suppress_tokens": None})
        assert cut.forwards == 0
    z = plain[0].log_softmax(-1)
    kept = z.exp() >= 0.2 * z.exp().amax(-1, keepdim=True)
    assert torch.equal(sequences, plain[1]) and torch.equal(got.isfinite(), kept)
    assert torch.equal(got[kept], plain[0][kept])


def test_prompts_without_image_are_the_model():
    model = language_model()
    inputs = prompt()
    inputs["input_ids"][inputs["input_ids"] == IMAGE_ID] = 7
    plain, _ = generated(model, inputs)
    decoding = ContrastiveDecoding(NoImage(), 3.0, -2.0, 0.1)
    with attnlib.attach(model, decoding, token_types=RULE):
        assert torch.equal(generated(model, inputs)[0], plain) and decoding.forwards == 0
        inputs["input_ids"][0, 8:12] = IMAGE_ID
        mixed, _ = generated(model, inputs)
        assert torch.equal(mixed[:, 1], plain[:, 1]) and mixed[0, 0].isinf().any()


def test_only_the_first_steps():
    model = language_model()
    inputs = image_prompt()
    want = generated(model, inputs, processor=Scratch(without_image(model), 1.8, -0.8, interval=2))
    decoding = ContrastiveDecoding(NoImage(), 1.8, -0.8, interval=2)
    with attnlib.attach(model, decoding, token_types=RULE):
        equal(generated(model, inputs), want)
    assert decoding.forwards == 3


def test_a_prompt_read_in_chunks():
    model = language_model()
    inputs = image_prompt()
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=RULE):
        whole = generated(model, inputs)
        chunks = generated(model, inputs, {"prefill_chunk_size": 6})
    equal(chunks, whole)


def test_outside_of_generate():
    model = language_model()
    inputs = image_prompt(pad=(0, 0))
    other = without_image(model)
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=RULE) as session, torch.no_grad():
        ids, earlier = inputs["input_ids"], []
        out = model(input_ids=ids)
        for _ in range(3):
            z = out.logits[:, -1]
            got = session.logits(ids, z)
            assert torch.equal(session.logits(ids, z), got)
            earlier.append((ids, z, got))
            ids = torch.cat([ids, got.argmax(-1, keepdim=True)], 1)
            out = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values)
        for one, own, want in (earlier[1], earlier[2], earlier[0], earlier[2]):  # tokens taken back, and read again
            torch.testing.assert_close(session.logits(one, own), want, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="only tokens after the prompt can be taken back"):
            session.logits(ids.flip(1), z)
    drafts = {"assistant_model": language_model(seed=1, num_hidden_layers=1), "num_assistant_tokens": 2}
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=RULE):
        with pytest.raises(ValueError, match="the model that drafts .*not served"):
            model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, **drafts)
    torch.testing.assert_close(got, 1.8 * z - 0.8 * other(ids[:, :-1]), atol=1e-5, rtol=1e-5)


def test_embeddings_as_prompt():
    model = language_model()
    inputs = image_prompt()
    types = RULE(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=types):
        want, tokens = generated(model, inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        got = generated(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    equal(got, (want, tokens[:, 20:]))


# ---- vision-language models


def llava_case():
    from hooks.llava import IMAGE_ID as LLAVA_IMAGE
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    inputs["input_ids"][0, :2] = 0
    inputs["attention_mask"][0, :2] = 0
    with torch.no_grad():
        for p in model.model.multi_modal_projector.parameters():
            p.mul_(40)
    return model, inputs, TokenTypes(LLAVA_IMAGE)


@pytest.mark.parametrize("mode", [*MODES[:3], {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_other_pixels_of_a_vision_language_model(mode):
    model, inputs, rule = llava_case()
    beams = mode.get("num_beams", 1)
    rows = beams * mode.get("num_return_sequences", 1)
    masked = inputs["pixel_values"].clone()
    masked[..., :4] = 0

    def other(ids):
        keep = {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "pixel_values": masked.repeat_interleave(rows, 0),
        }
        with torch.no_grad():
            return model(**keep).logits[:, -1]

    want = generated(model, inputs, mode, processor=Scratch(other, 1.0, 2.0, 0.3, beams=beams))
    plain = generated(model, inputs, mode)

    def black(pixels):
        pixels = pixels.clone()
        pixels[..., :4] = 0
        return pixels

    for pixels in (masked, black):
        with attnlib.attach(model, ContrastiveDecoding(OtherPixels(pixels), 1.0, 2.0, 0.3), token_types=rule):
            equal(generated(model, inputs, mode), want)
    assert not torch.allclose(want[0].nan_to_num(neginf=0), plain[0], atol=1e-3)


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_an_image_free_branch_of_a_vision_language_model(mode):
    model, inputs, rule = llava_case()
    rows = mode.get("num_beams", 1)

    def other(ids):
        return by_rows(model, [row[(row != rule.image[0]) & (row != 0)] for row in ids])

    want = generated(model, inputs, mode, processor=Scratch(other, 1.5, -0.5, 0.1, beams=rows))
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), 1.5, -0.5, 0.1), token_types=rule):
        equal(generated(model, inputs, mode), want)


def test_positions_are_counted_as_the_model_counts_them():
    """With learned positions the start of counting matters; OPT's own count is kept by its prompt."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = hf.OPTForCausalLM(config).eval()
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.normal_(0, 0.3)
        model.lm_head.weight.mul_(20)
    inputs = image_prompt()
    want = generated(model, inputs, processor=Scratch(without_image(model), 1.8, -0.8))
    with attnlib.attach(model, ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=RULE):
        equal(generated(model, inputs), want, atol=1e-5)


# ---- beside other techniques


def test_techniques_of_the_main_branch_leave_the_second_alone():
    model = language_model()
    inputs = image_prompt()
    boost = VisualBoost(0.7, sets="all")
    with attnlib.attach(model, boost, token_types=RULE):
        main, _ = generated(model, inputs, new=1)
    with attnlib.attach(
        model, VisualBoost(0.7, sets="all"), ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=RULE
    ):
        got, _ = generated(model, inputs, new=1)
    want = 1.8 * main[0] - 0.8 * without_image(model)(inputs["input_ids"])
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)


def test_two_at_once_and_a_compressed_cache():
    model = language_model()
    inputs = image_prompt()
    first, second = ContrastiveDecoding(NoImage(), 1.4, -0.4), ContrastiveDecoding(NoImage(), 1.5, -0.5)
    with attnlib.attach(model, first, second, token_types=RULE) as session:
        got = generated(model, inputs)
        names = [r["branch"] for r in session.results.values()]
    assert names == ["no-image", "no-image-2"]
    once = Scratch(without_image(model), 1.4 * 1.5, -(0.4 * 1.5 + 0.5))
    equal(got, generated(model, inputs, processor=once), atol=1e-5)
    with attnlib.attach(
        model, SnapKV(cap=64, window_size=3, kernel_size=3), ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=RULE
    ):
        wide = generated(model, inputs)
    equal(wide, generated(model, inputs, processor=Scratch(without_image(model), 1.8, -0.8)), atol=1e-5)
    with attnlib.attach(
        model, SnapKV(cap=8, window_size=3, kernel_size=3), ContrastiveDecoding(NoImage(), 1.8, -0.8), token_types=RULE
    ):
        tight = generated(model, inputs, {"num_beams": 2})
    assert not tight[0].isnan().any() and tight[1].shape == (2, 25)


def test_state_of_other_techniques_is_kept_per_branch():
    model = language_model()
    inputs = image_prompt()
    with torch.no_grad():
        model.model.embed_tokens.weight[9, 3] = 40.0
    inputs["input_ids"][:, 14] = 9
    inputs["input_ids"][0, 8] = inputs["input_ids"][1, 3] = 9
    rule = TokenTypes([IMAGE_ID, 9])
    settings = dict(sink_dims=(3,), p=0.2, rho=1.0, summ=0.0, tau=4.0, first_layer=1)
    alone = VisualRedistribution(**settings)
    with attnlib.attach(model, alone, token_types=rule):
        generated(model, inputs)
    both = VisualRedistribution(**settings)
    decoding = ContrastiveDecoding(NoImage(), 1.0, 0.0, 0.0, normalize=True)
    with attnlib.attach(model, both, ContrastiveDecoding(NoImage(), 1.0, -1e-6), decoding, token_types=rule):
        generated(model, inputs)
    for layer, sinks in alone.results()["sinks"].items():
        assert sinks.any() and torch.equal(both.results()["sinks"][layer], sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model, inputs, rule = llava_case()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    plain, _ = generated(model.to(dtype), inputs, {"suppress_tokens": None}, new=1)
    null = torch.zeros(4, 32)
    for decoding in (
        ContrastiveDecoding(OtherPixels(inputs["pixel_values"]), 1.0, 1.0),
        ContrastiveDecoding(ImageTokens(4, lambda p: torch.zeros(p.types.shape), "place"), 1.0, 1.0),
        ContrastiveDecoding(NullTokens(null), 1.0, 1.0),
    ):
        with attnlib.attach(model, decoding, token_types=rule):
            got, _ = generated(model, inputs, {"suppress_tokens": None}, new=1)
        assert got.dtype == torch.float32 and got.isfinite().all()
        if not isinstance(decoding.branch, NullTokens):
            error = float((got - 2 * plain).abs().max() / plain.abs().max())
            assert error < {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype], f"{error:.1e}"


# ---- bad input


def test_bad_settings():
    with pytest.raises(TypeError, match="must be a Branch"):
        ContrastiveDecoding("no-image", 2.0, -1.0)
    with pytest.raises(TypeError, match="pixels must be a tensor, or a function.*got None"):
        OtherPixels(None)
    with pytest.raises(ValueError, match=r"cutoff must lie in \[0, 1\]"):
        ContrastiveDecoding(NoImage(), 2.0, -1.0, 1.5)
    with pytest.raises(ValueError, match="interval must not be negative"):
        ContrastiveDecoding(NoImage(), 2.0, -1.0, interval=-1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        ImageTokens(0, lambda p: p.types)
    with pytest.raises(ValueError, match="order='random'"):
        ImageTokens(2, lambda p: p.types, order="random")


@pytest.mark.parametrize(
    "branch, match",
    [
        (ImageTokens(9, lambda p: torch.zeros(2, 20)), "an image has 4"),
        (ImageTokens(2, lambda p: torch.zeros(2, 4)), r"all \(2, 20\) tokens"),
        (NullTokens(torch.zeros(4, 8)), "width 8"),
        (NullTokens(torch.zeros(5, 32)), "images of 5 tokens"),
        (OtherPixels(torch.zeros(2, 3, 8, 8)), "pixel_values"),
    ],
)
def test_branches_that_do_not_fit_the_prompt(branch, match):
    model = language_model()
    with (
        attnlib.attach(model, ContrastiveDecoding(branch, 2.0, -1.0), token_types=RULE),
        pytest.raises(ValueError, match=match),
    ):
        generated(model, image_prompt())


def test_refusals():
    import transformers as hf

    model = language_model()
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, ContrastiveDecoding(NoImage(), 2.0, -1.0))
    with pytest.raises(ValueError, match="no vision encoder"):
        attnlib.attach(model, ContrastiveDecoding(OtherPixels(lambda p: p), 2.0, -1.0), token_types=RULE)
    assert not model._forward_pre_hooks
    decoding = ContrastiveDecoding(NoImage(), 2.0, -1.0)
    with attnlib.attach(model, decoding, token_types=RULE), pytest.raises(ValueError, match="attached already"):
        attnlib.attach(language_model(seed=1), decoding, token_types=RULE)
    t5 = hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    )  # fmt: skip
    with pytest.raises(ValueError, match="has an encoder"):
        attnlib.attach(t5, ContrastiveDecoding(NoImage(), 2.0, -1.0), token_types=RULE)
    model.model.rope_deltas = None
    with pytest.raises(ValueError, match="rope_deltas"):
        attnlib.attach(model, ContrastiveDecoding(NoImage(), 2.0, -1.0), token_types=RULE)


class Broken(Branch):
    def read(self, prompt):
        raise RuntimeError("broken branch")


def test_an_error_in_a_branch_leaves_the_model_as_it_was():
    model = language_model()
    inputs = image_prompt()
    plain = generated(model, inputs)
    with (
        pytest.raises(RuntimeError, match="broken branch"),
        attnlib.attach(model, ContrastiveDecoding(Broken(), 2.0, -1.0), token_types=RULE),
    ):
        generated(model, inputs)
    equal(generated(model, inputs), plain, atol=0)
    assert not model._forward_pre_hooks
