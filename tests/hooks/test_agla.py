"""AGLA: the authors' masks from a matching model's gradients, their scores, and its life under ``generate()``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib.hooks import TokenTypes
from attnlib.steer import (
    AGLA,
    BlipRelevance,
    VisualBoost,
    contrast,
    grad_cam,
    mask_pixels,
    relevance_mask,
    spread_relevance,
)
from hooks.two_branches import Scratch, equal, generated

FIXTURE = Path(__file__).parents[1] / "fixtures" / "agla.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


def toy_attention():
    """A map and a gradient by formulas, as the recording was made with."""
    h = torch.arange(12.0)[None, :, None, None]
    t = torch.arange(6.0)[None, None, :, None]
    p = torch.arange(577.0)[None, None, None]
    attention = torch.softmax(2 * torch.sin(0.37 * h + 0.9 * t + 0.021 * p * (1 + 0.1 * h)), -1)
    return attention, torch.cos(0.5 * h - 0.3 * t + 0.013 * p * (1 + 0.2 * t))


# ---- the authors' functions


def test_relevance_equals_the_authors(recorded):
    attention, gradient = toy_attention()
    valid = torch.ones(1, 6, dtype=torch.bool)
    cam = grad_cam(attention, gradient, valid, (24, 24))
    torch.testing.assert_close(cam[0], recorded["gradcam"], atol=1e-8, rtol=1e-5)
    # The class token in front, padding behind.
    longer = torch.nn.functional.pad(attention, (0, 0, 0, 2), value=1.0)
    slope = torch.nn.functional.pad(gradient, (0, 0, 0, 2), value=1.0)
    padded = torch.nn.functional.pad(valid, (0, 2))
    torch.testing.assert_close(grad_cam(longer, slope, padded, (24, 24)), cam)
    torch.testing.assert_close(grad_cam(attention[..., 1:], gradient[..., 1:], valid, (24, 24)), cam)


def test_smooth_map_and_masks_equal_the_authors(recorded):
    cam = recorded["gradcam"][None]
    spread = spread_relevance(cam)
    torch.testing.assert_close(spread[0, ::16, ::16].float(), recorded["blurred"], atol=1e-5, rtol=1e-5)
    for i, score in enumerate((0.4, 1.9, -0.2)):
        theirs = torch.from_numpy(np.unpackbits(recorded[f"mask_{i}"].numpy()).reshape(384, 384)).bool()
        mine = relevance_mask(cam, score)[0]
        assert torch.equal(mine, theirs)
        wanted = int(384 * 384 * min(1 - score / 2, 1 - 1e-5)) + 1
        assert int(mine.sum()) == wanted


def test_smooth_maps_equal_scikit_image_at_other_sizes():
    transform = pytest.importorskip("skimage.transform")
    ndimage = pytest.importorskip("scipy.ndimage")
    torch.manual_seed(0)
    for grid, size in (((6, 9), (40, 60)), ((7, 7), (28, 28)), ((3, 3), (224, 224))):
        cam = torch.rand(2, *grid)
        for blur in (0.02, 0.05, 0.0):  # the authors' getAttMap(blur=False) stops after resizing
            mine = spread_relevance(cam, size, blur)
            for one, want in zip(mine, cam.double().numpy(), strict=True):
                want = (want - want.min()) / (want.max() - want.min())
                want = transform.resize(want, size, order=3, mode="constant")
                if blur:
                    want = ndimage.gaussian_filter(want, blur * max(size))
                    want = (want - want.min()) / (want - want.min()).max()
                torch.testing.assert_close(one, torch.from_numpy(want), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="blur"):
        spread_relevance(cam, size, -1.0)


def test_maps_of_single_tokens_are_what_is_averaged():
    attention, gradient = toy_attention()
    valid = torch.tensor([[True] * 5 + [False]])
    each = grad_cam(attention, gradient, valid, (24, 24), average=False)
    assert each.shape == (1, 6, 24, 24) and (each[0, 5] == 0).all()
    torch.testing.assert_close(each[:, 1:4].mean(1), grad_cam(attention, gradient, valid, (24, 24)))
    want = (attention[0, :, 2, 1:] * gradient[0, :, 2, 1:].clamp(min=0)).mean(0)
    torch.testing.assert_close(each[0, 2].flatten(), want)


def test_masks_of_a_batch_flat_maps_and_extreme_scores():
    torch.manual_seed(0)
    cam = torch.rand(3, 8, 8)
    masks = relevance_mask(cam, torch.tensor([0.2, 1.0, 2.0]), (32, 32))
    for i, score in enumerate((0.2, 1.0, 2.0)):
        assert torch.equal(masks[i], relevance_mask(cam[i : i + 1], score, (32, 32))[0])
    assert masks.flatten(1).sum(1).tolist() == [int(1024 * 0.9) + 1, 513, 1]
    assert relevance_mask(cam, -5.0, (16, 16)).flatten(1).sum(1).tolist() == [256] * 3
    assert relevance_mask(torch.zeros(1, 4, 4), 1.5, (16, 16)).all()


@pytest.mark.parametrize("case, alpha, cutoff", [(0, 2.0, 0.5), (1, 1.0, 0.1)])
def test_scores_equal_the_authors(recorded, case, alpha, cutoff):
    agla = AGLA(torch.zeros(1), alpha, cutoff)
    out = contrast(recorded["z"], recorded["z2"], agla.a, agla.b, agla.cutoff)
    assert torch.equal(out.isinf(), recorded[f"out_{case}"].isinf()) and out.isinf().any()
    torch.testing.assert_close(out, recorded[f"out_{case}"], atol=1e-5, rtol=1e-5)


def test_black_is_black_before_normalisation():
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    mask = torch.rand(2, 8, 8) > 0.5
    back = mask_pixels(normal, mask, mean, std) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(back, pixels * mask[:, None], atol=1e-6, rtol=1e-5)
    coarse = torch.tensor([[[True, False], [False, True]]]).expand(2, -1, -1)
    big = mask_pixels(pixels, coarse)
    assert torch.equal(big[:, :, :4, :4], pixels[:, :, :4, :4]) and (big[:, :, :4, 4:] == 0).all()


def test_grad_cam_peaks_at_the_patch_that_matters():
    torch.manual_seed(0)
    attention = torch.softmax(torch.randn(1, 2, 5, 16), -1).requires_grad_()
    value = torch.zeros(16)
    value[9] = 1.0
    (gradient,) = torch.autograd.grad((attention @ value).sum(), attention)
    cam = grad_cam(attention.detach(), gradient, torch.ones(1, 5, dtype=torch.bool), (4, 4))
    assert cam.flatten().argmax() == 9 and (cam > 0).sum() == 1
    assert spread_relevance(cam, (16, 16))[0].flatten().argmax() in (16 * 9 + 5, 16 * 9 + 6, 16 * 10 + 5, 16 * 10 + 6)


# ---- with transformers

transformers = pytest.importorskip("transformers")


def blip():
    torch.manual_seed(0)
    config = transformers.BlipConfig(
        text_config=dict(
            vocab_size=32, hidden_size=16, encoder_hidden_size=16, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=1, pad_token_id=0, eos_token_id=2,
            sep_token_id=2,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=4,
        ),
        image_text_hidden_size=8,
    )  # fmt: skip
    model = transformers.BlipForImageTextRetrieval(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("weight") and p.dim() > 1:
                p.normal_(0, 0.4)
    return model


def test_relevance_of_a_matching_model_of_transformers():
    model = blip()
    torch.manual_seed(1)
    pixels, ids = torch.randn(2, 3, 16, 16).double(), torch.randint(3, 30, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.inference_mode():
        relevance, score = BlipRelevance(model, layer=1)(pixels, ids, mask)
    assert relevance.shape == (2, 4, 4) and (relevance >= 0).all() and relevance.any()
    # Gradients by small changes of one weight at a time, put in with a hook.
    attention = model.text_encoder.encoder.layer[1].crossattention.self
    args = dict(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    seen, slopes = [], {}
    handle = attention.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    (gradient,) = torch.autograd.grad(model(**args).itm_score[:, 1].sum(), seen[0])
    handle.remove()
    weights = seen[0].detach()
    with torch.no_grad():
        for where in ((0, 0, 2, 5), (0, 1, 3, 9), (1, 0, 1, 3), (1, 1, 2, 16)):
            matches = []
            for step in (1e-4, -1e-4):
                changed = weights.clone()
                changed[where] += step
                handle = attention.dropout.register_forward_hook(lambda m, args, out, new=changed: new)
                matches.append(model(**args).itm_score[:, 1].sum())
                handle.remove()
            slopes[where] = (matches[0] - matches[1]) / 2e-4
        want = model(**args, use_itm_head=False).itm_score
    assert max(slopes.values()) > 1e-3
    for where, slope in slopes.items():
        torch.testing.assert_close(gradient[where], slope, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(score, want.diagonal(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(relevance, grad_cam(weights, gradient, mask.bool(), (4, 4)), atol=1e-6, rtol=1e-5)
    assert not model.training and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="layer 6"):
        BlipRelevance(model)


@pytest.fixture
def case():
    from hooks.llava import IMAGE_ID, outspoken_llava

    model, inputs = outspoken_llava()
    return model, inputs, TokenTypes(IMAGE_ID)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}], ids=str)
def test_decoding_equals_two_models(case, mode):
    model, inputs, rule = case
    rows = mode.get("num_beams", 1)
    torch.manual_seed(2)
    relevance, match = torch.rand(2, 4, 4), torch.tensor([0.9, 1.3])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = mask_pixels(inputs["pixel_values"], relevance_mask(relevance, match, (8, 8)), mean, std)

    def other(ids):
        with torch.no_grad():
            return model(
                input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixels.repeat_interleave(rows, 0)
            ).logits[:, -1]

    want = generated(model, inputs, mode, processor=Scratch(other, 1.0, 2.0, 0.3, beams=rows))
    plain = generated(model, inputs, mode)
    for agla in (AGLA(pixels, 2.0, 0.3), AGLA.from_relevance(relevance, match, mean, std, alpha=2.0, cutoff=0.3)):
        with attnlib.attach(model, agla, token_types=rule):
            equal(generated(model, inputs, mode), want, atol=1e-5)
        # The branch has a cache of its own: one call per new token, and it never coincides with the main one.
        assert agla.forwards == 5
    assert not torch.equal(want[0], plain[0])
    equal(generated(model, inputs, mode), plain, atol=0)


def test_the_authors_read_the_branch_once(case):
    """From the second new token on their branch goes on with the main cache: both scores are one."""
    model, inputs, rule = case
    pixels = inputs["pixel_values"].flip(-1)

    class Once(Scratch):
        def __call__(self, ids, scores):
            self.step += 1
            return contrast(scores, self.other(ids) if self.step == 0 else scores, *self.settings)

    def other(ids):
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixels).logits[:, -1]

    want = generated(model, inputs, processor=Once(other, 1.0, 2.0, 0.3))
    agla = AGLA(pixels, 2.0, 0.3, compat="authors")
    with attnlib.attach(model, agla, token_types=rule):
        equal(generated(model, inputs), want, atol=1e-5)
    assert agla.forwards == 1
    ours = AGLA(pixels, 2.0, 0.3)
    with attnlib.attach(model, ours, token_types=rule):
        assert not torch.allclose(generated(model, inputs)[0][1], want[0][1])
    with pytest.raises(ValueError, match="compat"):
        AGLA(pixels, compat="paper")


def test_the_same_image_only_sharpens(case):
    model, inputs, rule = case
    free = {"suppress_tokens": None}
    plain, tokens = generated(model, inputs, free)
    with attnlib.attach(model, AGLA(inputs["pixel_values"], 2.0, 0.0), token_types=rule):
        got, same = generated(model, inputs, free)
    assert torch.equal(same, tokens)
    torch.testing.assert_close(got, 3 * plain, atol=1e-5, rtol=1e-5)
    with attnlib.attach(model, AGLA(inputs["pixel_values"], 0.0, 0.4), token_types=rule):
        got, same = generated(model, inputs, free)
    assert torch.equal(same, tokens) and torch.equal(got.isfinite(), plain >= plain.amax(-1, True) + np.log(0.4))
    with attnlib.attach(model, AGLA(inputs["pixel_values"], 0.0, 0.0), token_types=rule) as session:
        assert session.interventions[0].identity
        equal(generated(model, inputs, free), (plain, tokens), atol=0)


def test_it_composes_with_a_boost_and_leaves_text_alone(case):
    model, inputs, rule = case
    boost = VisualBoost(1.0, 0.5, first_layer=1)
    with attnlib.attach(model, boost, AGLA(lambda p: p * 0, 1.0, 0.2), token_types=rule):
        got, _ = generated(model, inputs)
    assert not got.isnan().any() and boost.results()["gain"][None].any()
    text = {n: t for n, t in inputs.items() if n != "pixel_values"}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == 62, 9)
    plain = generated(model, text)
    agla = AGLA(lambda p: p * 0)
    with attnlib.attach(model, agla, token_types=rule):
        equal(generated(model, text), plain, atol=0)
    assert agla.forwards == 0


def test_refusals(case):
    model, inputs, rule = case
    with pytest.raises(ValueError, match="alpha must not be negative"):
        AGLA(torch.zeros(1), -1.0)
    with pytest.raises(ValueError, match=r"cutoff must lie in \[0, 1\]"):
        AGLA(torch.zeros(1), 1.0, -0.5)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, AGLA(inputs["pixel_values"]))
    with pytest.raises(TypeError, match="model must be a BlipForImageTextRetrieval, got LlavaForCond"):
        BlipRelevance(model)
    with pytest.raises(ValueError, match=r"relevance must have shape \(B, h, w\)"):
        spread_relevance(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"score must have shape"):
        relevance_mask(torch.rand(3, 4, 4), torch.zeros(2), (8, 8))
    with pytest.raises(ValueError, match="must agree"):
        grad_cam(torch.zeros(1, 2, 3, 9), torch.zeros(1, 2, 3, 9), torch.ones(1, 3, dtype=torch.bool), (4, 4))
    three = torch.zeros(3, 3, 8, 8)
    with attnlib.attach(model, AGLA(three), token_types=rule), pytest.raises(ValueError, match="pixels of 3 images"):
        generated(model, inputs)
    agla = AGLA.from_relevance(torch.rand(3, 4, 4), 1.0)
    with attnlib.attach(model, agla, token_types=rule), pytest.raises(ValueError, match="maps of 3 images"):
        generated(model, inputs)
