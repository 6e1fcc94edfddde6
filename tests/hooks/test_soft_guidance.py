"""LACING's soft-image guidance: the authors' guidance and token_drop, and its life under ``generate()``."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib.hooks import PAD, TokenTypes
from attnlib.steer import DualAttention, NullImage, SoftImageGuidance, contrast
from hooks import models
from hooks.models import prompt
from hooks.two_branches import Scratch, equal, generated

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lacing-ifg.safetensors"
IMAGE_ID = 61


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


# ---- the authors' functions


def test_scores_equal_the_authors(recorded):
    null = torch.zeros(4, 8)
    cases = {
        "guided": SoftImageGuidance(null, 1.75),
        "contrast": SoftImageGuidance(null, contrast=0.5, cutoff=0.1),
        "inside": SoftImageGuidance(null, 1.5),
    }
    for name, guidance in cases.items():
        out = contrast(recorded["z"], recorded["u"], guidance.a, guidance.b, guidance.cutoff)
        assert torch.equal(out.isinf(), recorded[name].isinf())
        torch.testing.assert_close(out, recorded[name], atol=1e-5, rtol=1e-5)
    assert recorded["contrast"].isinf().any() and torch.equal(recorded["after"], recorded["z"])


def test_images_are_dropped_as_by_the_authors(recorded):
    null = NullImage(4, 5, prob=0.4)
    with torch.no_grad():
        null.embedding.copy_(recorded["null"])
    torch.manual_seed(11)
    out = null(recorded["features"])
    assert torch.equal(out, recorded["dropped"]) and not torch.equal(out, recorded["features"])
    assert torch.equal(null.eval()(recorded["features"]), recorded["features"])


def test_the_null_image_learns_and_hides_the_image():
    torch.manual_seed(0)
    null = NullImage(3, 4, prob=1.0)
    features = torch.randn(2, 3, 4, requires_grad=True)
    out = null(features)
    out.square().sum().backward()
    assert torch.equal(out, null.embedding.expand(2, -1, -1))
    assert (features.grad == 0).all() and torch.allclose(null.embedding.grad, 4 * null.embedding)
    assert abs(float(NullImage(576, 1024).embedding.detach().std()) - 1024**-0.5) < 1e-3
    projector = torch.nn.Linear(4, 4)
    handle = projector.register_forward_hook(null.hook)
    assert torch.equal(projector(torch.randn(2, 3, 4)), projector(torch.randn(2, 3, 4)))
    handle.remove()


# ---- in a model

pytest.importorskip("transformers")


def language_model(family="llama"):
    model = models.language_model(family)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


def image_prompt(spans=((7, 13), (2, 8))):
    inputs = prompt()
    inputs["input_ids"][inputs["input_ids"] == IMAGE_ID] = 7
    for row, (start, stop) in enumerate(spans):
        inputs["input_ids"][row, start:stop] = IMAGE_ID
    return inputs


def null_branch(model, inputs, null):
    spans = [(row == IMAGE_ID).nonzero().flatten().tolist() for row in inputs["input_ids"]]

    def other(ids):
        out, repeats = [], len(ids) // len(spans)
        for i, row in enumerate(ids):
            embeds = model.get_input_embeddings()(row)[None].clone()
            at = spans[i // repeats]
            embeds[0, at] = null.repeat(len(at) // len(null), 1)
            start = int((row != 0).nonzero()[0])
            with torch.no_grad():
                out.append(model(inputs_embeds=embeds[:, start:]).logits[:, -1])
        return torch.cat(out)

    return other


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_decoding_equals_two_models(family, mode):
    model = language_model(family)
    inputs = image_prompt()
    null = NullImage(6, 32).eval()
    rows = mode.get("num_beams", 1)
    scratch = Scratch(null_branch(model, inputs, null.embedding.detach()), 1.75, -0.75, beams=rows, interval=2)
    want = generated(model, inputs, mode, processor=scratch)
    plain = generated(model, inputs, mode)
    guidance = SoftImageGuidance(null, 1.75, interval=2)
    with torch.no_grad(), attnlib.attach(model, guidance, token_types=TokenTypes(IMAGE_ID)):
        equal(generated(model, inputs, mode), want, atol=1e-5)
    assert guidance.forwards == 3 and not torch.equal(plain[0], want[0])


def test_several_images_and_the_contrastive_form():
    model = language_model()
    inputs = image_prompt(spans=((7, 13), (2, 5)))
    inputs["input_ids"][1, 9:12] = IMAGE_ID
    null = torch.randn(3, 32)
    want = generated(model, inputs, processor=Scratch(null_branch(model, inputs, null), 1.5, -0.5, 0.1))
    with attnlib.attach(model, SoftImageGuidance(null, contrast=0.5), token_types=TokenTypes(IMAGE_ID)):
        equal(generated(model, inputs), want, atol=1e-5)


def test_a_scale_of_one_and_an_image_that_is_the_null_image():
    model = language_model()
    inputs = image_prompt()
    rule = TokenTypes(IMAGE_ID)
    plain = generated(model, inputs)
    with attnlib.attach(model, SoftImageGuidance(torch.zeros(6, 32), 1.0), token_types=rule) as session:
        assert session.interventions[0].identity and not session.attached
        equal(generated(model, inputs), plain, atol=0)
    itself = model.get_input_embeddings().weight[IMAGE_ID].detach().expand(6, -1)
    with attnlib.attach(model, SoftImageGuidance(itself, 3.0), token_types=rule):
        equal(generated(model, inputs), plain, atol=1e-5)


def test_vision_language_model():
    from hooks.llava import IMAGE_ID as LLAVA_IMAGE
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    null = torch.randn(4, 32)

    def other(ids):
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[:, 3:7] = null
        with torch.no_grad():
            return model(inputs_embeds=embeds).logits[:, -1]

    want = generated(model, inputs, processor=Scratch(other, 2.0, -1.0))
    with attnlib.attach(model, SoftImageGuidance(null, 2.0), token_types=TokenTypes(LLAVA_IMAGE)):
        equal(generated(model, inputs), want, atol=1e-5)


def test_beside_dual_attention_both_branches_have_it():
    model = language_model()
    inputs = image_prompt()
    rule, null = TokenTypes(IMAGE_ID), torch.randn(6, 32)
    types = rule(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[inputs["input_ids"] == IMAGE_ID] = null.repeat(2, 1)
    mask = inputs["attention_mask"]
    with torch.no_grad(), attnlib.attach(model, DualAttention(), token_types=types):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        z = model(**inputs, position_ids=places).logits[:, -1]
        u = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places).logits[:, -1]
    with attnlib.attach(model, DualAttention(), SoftImageGuidance(null, 1.75), token_types=rule):
        got, _ = generated(model, inputs, {"suppress_tokens": None}, new=1)
    torch.testing.assert_close(got[0], 1.75 * z - 0.75 * u, atol=1e-5, rtol=1e-5)


def test_refusals():
    model = language_model()
    rule = TokenTypes(IMAGE_ID)
    with pytest.raises(ValueError, match=r"prob must lie in \[0, 1\]"):
        NullImage(4, 8, prob=1.5)
    with pytest.raises(ValueError, match="must be positive"):
        NullImage(0, 8)
    with pytest.raises(ValueError, match="the null image is"):
        NullImage(4, 8)(torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match="must not be negative"):
        SoftImageGuidance(torch.zeros(4, 8), -1.0)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, SoftImageGuidance(torch.zeros(4, 32)))
    for null, match in ((torch.zeros(5, 32), "images of 5 tokens"), (torch.zeros(6, 16), "width 16")):
        with (
            attnlib.attach(model, SoftImageGuidance(null), token_types=rule),
            pytest.raises(ValueError, match=match),
        ):
            generated(model, image_prompt())
