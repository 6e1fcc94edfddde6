"""LACING's dual attention: the authors' masks, an independent oracle, decoding, and what it claims about bias."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib.hooks import IMAGE, PAD, TEXT, Record, TokenTypes
from attnlib.steer import DualAttention, VisualRedistribution
from hooks.models import call_site, dense_attention, language_model, prompt, run, scores

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lacing-mda-ifg.safetensors"
IMAGE_ID = 61


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


def site_of(q, k, types, offset=0):
    """Causal, and no padding key: what a model's mask says."""
    n, m = q.shape[2], k.shape[2]
    causal = (torch.arange(m) <= torch.arange(offset, offset + n)[:, None])[None, None]
    allowed = causal & (types != PAD)[:, None, None]
    return call_site(q, k, types=types, allowed=allowed, offset=offset)


def oracle(q, k, v, types, full=True, offset=0):
    """Two explicit softmaxes, row by row."""
    out = torch.zeros(*q.shape[:3], v.shape[-1])
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            at = offset + i
            text = [j for j in range(k.shape[2]) if types[b, j] == TEXT and j <= at]
            image = [j for j in range(k.shape[2]) if types[b, j] == IMAGE]
            if not full:
                image = [j for j in image if j <= at and (types[b, at] != IMAGE or j == at)]
            for keys in (text, image):
                if keys:
                    out[b, :, i] += torch.einsum("hj,hjd->hd", torch.softmax(s[b, :, i, keys], -1), v[b, :, keys])
    return out


def test_output_and_gradients_equal_the_authors(recorded):
    q, k, v = (recorded[n].requires_grad_() for n in "qkv")
    types = recorded["types"]
    out = run(DualAttention(), site_of(q, k, types), q, k, v)
    real = (types != PAD)[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real], recorded["out"][real], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad((out * recorded["g"]).sum(), (q, k, v)), ("dq", "dk", "dv"), strict=True
    ):
        torch.testing.assert_close(mine, recorded[theirs], atol=1e-5, rtol=1e-5)


def test_one_new_token_equals_the_authors(recorded):
    q, k, v, types = (recorded[n] for n in ("q", "k", "v", "types"))
    out = run(DualAttention(), site_of(q[:, :, -1:], k, types, offset=7), q[:, :, -1:], k, v)
    torch.testing.assert_close(out, recorded["out_decode"], atol=1e-5, rtol=1e-5)


def test_causal_image_mask_equals_the_authors_where_a_row_has_image_keys(recorded):
    """Elsewhere theirs is uniform over finfo.min, future included; ours is zero there, as the equation says."""
    q, k, v, types = (recorded[n] for n in ("q", "k", "v", "types"))
    out = run(DualAttention("causal"), site_of(q, k, types), q, k, v)
    torch.testing.assert_close(out, oracle(q, k, v, types, full=False), atol=1e-5, rtol=1e-5)
    sees = (types == IMAGE).cumsum(1) > 0
    rows = (sees & (types != PAD))[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[rows], recorded["out_causal"][rows], atol=1e-5, rtol=1e-5)
    before = torch.tensor([True] + [False] * 7)
    assert not torch.allclose(out[0, :, before], recorded["out_causal"][0, :, before], atol=1e-3)
    torch.testing.assert_close(out[0, :, 0], v[0, :, 0])


@pytest.mark.parametrize("image_mask", ["full", "causal"])
def test_the_authors_blank_rows_equal_theirs(image_mask):
    """An image in front of all text, padding, text alone; one key head; outputs and gradients of every row."""
    t = load_file(FIXTURE.parent / "lacing-options.safetensors")
    q, k, v = (t[n].requires_grad_() for n in "qkv")
    types, dual = t["types"], DualAttention(image_mask, compat="authors")
    out = run(dual, site_of(q, k, types), q, k, v)
    torch.testing.assert_close(out, t[f"{image_mask}/y"], atol=1e-5, rtol=1e-5)
    for mine, name in zip(torch.autograd.grad((out * t["g"]).sum(), (q, k, v)), "qkv", strict=True):
        torch.testing.assert_close(mine, t[f"{image_mask}/d{name}"], atol=1e-5, rtol=1e-5)
    step = run(dual, site_of(q[:, :, -1:], k, types, offset=6), q[:, :, -1:], k, v)
    torch.testing.assert_close(step, t[f"{image_mask}/step"], atol=1e-5, rtol=1e-5)
    one = run(dual, site_of(q[:1], k[:1], types[:1]), q[:1], k[:1], v[:1])
    torch.testing.assert_close(one, t[f"{image_mask}/one"], atol=1e-5, rtol=1e-5)
    plain = run(DualAttention(image_mask), site_of(q, k, types), q, k, v)
    rows = (plain - out).abs().amax((1, 3)) > 1e-4
    # Text parts of the image in front (and, by order, of nothing else); image parts of text before the image.
    before = [[True, True] + [False] * 5, [True, True, image_mask == "causal"] + [False] * 4, [False] * 7]
    assert rows.tolist() == before


def test_explicit_softmaxes_grouped_heads_and_rows_without_images():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    types = torch.tensor([[0, 0, 1, 2, 2, 1, 2, 1, 1], [1] * 9])
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    for full, name in ((True, "full"), (False, "causal")):
        out = run(DualAttention(name), site_of(q, k, types), q, k, v)
        torch.testing.assert_close(out, oracle(q, *wide, types, full), atol=1e-5, rtol=1e-5)
        plain = dense_attention(q, k, v, torch.ones(9, 9).tril().bool())[0]
        torch.testing.assert_close(out[1], plain[1], atol=1e-5, rtol=1e-5)


def test_limits_and_row_sums():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 8, 4)
    ones = torch.ones(1, 2, 8, 3)
    mixed = torch.tensor([[1, 2, 2, 2, 1, 1, 1, 1]])
    sums = run(DualAttention(), site_of(q, k, mixed), q, k, ones)
    torch.testing.assert_close(sums, torch.full_like(sums, 2.0))
    image = torch.full((1, 8), IMAGE)
    v = torch.randn(1, 2, 8, 3)
    only = run(DualAttention(), site_of(q, k, image), q, k, v)
    torch.testing.assert_close(only, dense_attention(q, k, v)[0], atol=1e-6, rtol=1e-5)
    text = torch.full((1, 8), TEXT)
    causal = torch.ones(8, 8).tril().bool()
    assert torch.equal(run(DualAttention(), site_of(q, k, text), q, k, v), dense_attention(q, k, v, causal)[0])


def test_more_text_does_not_starve_the_image():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 3)
    types = torch.tensor([[1, 1, 2, 2, 2, 1, 1, 1]])
    image_values = torch.where((types == IMAGE)[:, None, :, None], v, torch.zeros_like(v))

    def last(copies):
        order = torch.cat([torch.arange(2)] * copies + [torch.arange(2, 8)])
        k2, v2, t2 = k[:, :, order], image_values[:, :, order], types[:, order]
        q2 = q[:, :, order]
        dual = run(DualAttention(), site_of(q2, k2, t2), q2, k2, v2)[:, :, -1]
        return dual, dense_attention(q2, k2, v2)[0][:, :, -1]

    (dual1, plain1), (dual9, plain9) = last(1), last(9)
    torch.testing.assert_close(dual1, dual9, atol=1e-6, rtol=1e-5)
    assert plain9.norm() < 0.7 * plain1.norm()


# ---- in a model

pytest.importorskip("transformers")


def image_prompt(spans=((8, 12), (8, 12)), **kwargs):
    inputs = prompt(**kwargs)
    for row, (start, stop) in enumerate(spans):
        inputs["input_ids"][row, start:stop] = IMAGE_ID
    return inputs


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("image_mask", ["full", "causal"])
def test_decoding_equals_the_full_forward_pass(family, image_mask):
    model = language_model(family)
    inputs = image_prompt(spans=((8, 12), (3, 5)))
    with attnlib.attach(model, DualAttention(image_mask), token_types=TokenTypes(IMAGE_ID)):
        cached, ids = scores(model, inputs)
        beams, _ = scores(model, inputs, num_beams=2)
        whole = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
        with torch.no_grad():
            at_once = model(input_ids=ids, attention_mask=whole).logits[:, 19:-1].transpose(0, 1)
    plain, _ = scores(model, inputs)
    torch.testing.assert_close(cached, at_once, atol=1e-5, rtol=1e-5)
    assert beams.shape[1] == 4 and not torch.allclose(cached, plain, atol=1e-3)


def test_prompts_without_images_are_untouched():
    model = language_model()
    inputs = prompt()
    before, _ = scores(model, inputs)
    with attnlib.attach(model, DualAttention(), token_types=TokenTypes(IMAGE_ID)):
        assert torch.equal(scores(model, inputs)[0], before)
    # In a batch beside a prompt with an image, a prompt without one still gives the same up to rounding.
    inputs["input_ids"][0, 8:12] = IMAGE_ID
    with attnlib.attach(model, DualAttention(), token_types=TokenTypes(IMAGE_ID)):
        torch.testing.assert_close(scores(model, inputs)[0][:, 1], before[:, 1], atol=1e-5, rtol=1e-5)


def test_gradients_to_the_image_survive_a_long_text():
    model = language_model(num_hidden_layers=2, max_position_embeddings=600)
    torch.manual_seed(0)
    embeds = torch.randn(1, 512, 32, requires_grad=True)
    types = torch.full((1, 512), TEXT)
    types[:, 4:12] = IMAGE
    norms = []
    for attached in (True, False):
        session = attnlib.attach(model, DualAttention(), token_types=types) if attached else None
        loss = model(inputs_embeds=embeds).logits[:, -1].log_softmax(-1)[:, 5].sum()
        grad = torch.autograd.grad(loss, embeds)[0]
        norms.append(grad[:, 4:12].norm())
        if session:
            session.detach()
    assert norms[0] > norms[1]


def test_refusals():
    model = language_model()
    types = TokenTypes(IMAGE_ID)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, DualAttention())
    with pytest.raises(ValueError, match="no single map"):
        attnlib.attach(model, DualAttention(), Record(), token_types=types)
    with pytest.raises(ValueError, match="no single map"):
        attnlib.attach(model, VisualRedistribution((1,)), DualAttention(layers=[2]), token_types=types)
    with attnlib.attach(model, DualAttention(layers=[0]), Record(layers=[1]), token_types=types):
        model(**image_prompt())
    with pytest.raises(ValueError, match="image_mask='none'"):
        DualAttention("none")
    with pytest.raises(ValueError, match="compat"):
        DualAttention(compat="paper")
