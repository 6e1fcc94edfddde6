"""EE-MLLM: composite attention as a mechanism, as a block, and in models that exist."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from parity import Fixture
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib import Layout, masks
from attnlib.nn.multimodal.ee_mllm import CompositeBlock, composite_flops

sys.path.insert(0, str(Path(__file__).parents[1]))

SHORTV = Fixture("ee-mllm-shortv")
PICTURE = Layout((("text", 3), ("image", (2, 3)), ("question", 4)))
IMAGE = slice(3, 9)


def _attend(**settings):
    return attnlib.create("ee-mllm", dim=16, num_heads=4, **settings).double()


def _x(batch=2, n=13):
    return torch.randn(batch, n, 16, dtype=torch.float64, requires_grad=True)


def _rule(n=13, image=IMAGE):
    """Causal, and an image token reads itself alone: pair by pair."""
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    for i in range(image.start, image.stop):
        allowed[i] = False
        allowed[i, i] = True
    return allowed


@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 2, "rotary": 1e4}, {"qk_norm": True, "head_dim": 6}])
def test_equals_attention_under_the_mask(settings):
    m = _attend(**settings)
    full = attnlib.create("softmax-attention", dim=16, num_heads=4, causal=True, **settings).double()
    full.load_state_dict(m.state_dict())
    x = _x()
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, :2], valid[1, 5] = False, False
    ours = m(x, layout=PICTURE, valid=valid)
    spec = full(x, mask=masks.explicit(_rule()), valid=valid)
    torch.testing.assert_close(ours, spec, rtol=0, atol=1e-12)
    g = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, x, g) for y in (ours, spec)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    output = m(x, layout=PICTURE, returns=("weights",))
    assert torch.equal(output.weights[0, 0] > 0, _rule())


@pytest.mark.parametrize("case", ["grouped", "heads"])
def test_frozen_image_tokens_equal_a_released_layer(case):
    """ShortV's layer, which is a Llama layer whose image tokens stay as they are; no code of this paper is released."""
    norm = functools.partial(torch.nn.RMSNorm, eps=1e-6)
    block = CompositeBlock(
        **SHORTV.config[case], variant="frozen", norm=norm, rotary=1e4, qkv_bias=False, proj_bias=False
    )
    block.load_state_dict(CompositeBlock.convert_state_dict(SHORTV.under(f"{case}/sd")))
    x = SHORTV.tensors[f"{case}/x/x"].clone().requires_grad_()
    y = block(x, layout=Layout((("text", 2), ("image", (2, 2)), ("question", 3))))
    torch.testing.assert_close(y, SHORTV.tensors[f"{case}/y"], rtol=1e-5, atol=1e-5)
    assert torch.equal(y[:, 2:6], x[:, 2:6])
    (y * SHORTV.tensors[f"{case}/g"]).sum().backward()
    torch.testing.assert_close(x.grad, SHORTV.tensors[f"{case}/dx/x"], rtol=1e-5, atol=1e-5)
    for name, expected in CompositeBlock.convert_state_dict(SHORTV.under(f"{case}/dw")).items():
        torch.testing.assert_close(block.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-5)


def test_image_states_know_no_neighbour_and_text_knows_the_image():
    m = _attend()
    x = _x().detach()
    y = m(x, layout=PICTURE)
    order = torch.tensor([0, 1, 2, 7, 3, 8, 5, 6, 4, 9, 10, 11, 12])
    torch.testing.assert_close(m(x[:, order], layout=PICTURE)[:, IMAGE], y[:, order][:, IMAGE])
    other = x.clone()
    other[:, :3] += 1
    torch.testing.assert_close(m(other, layout=PICTURE)[:, IMAGE], y[:, IMAGE])
    other = x.clone()
    other[:, 5] += 1
    changed = (m(other, layout=PICTURE) - y).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [i == 5 or i >= 9 for i in range(13)]


def test_no_image_and_one_leading_image_token_are_the_language_model():
    m = _attend(rotary=1e4)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=4, causal=True, rotary=1e4).double()
    plain.load_state_dict(m.state_dict())
    x = _x().detach()
    torch.testing.assert_close(m(x), plain(x))
    torch.testing.assert_close(m(x, layout=Layout((("image", (0, 0)), ("text", 13)))), plain(x))
    torch.testing.assert_close(m(x, layout=Layout((("image", (1, 1)), ("text", 12)))), plain(x))


def test_decoding_after_a_prompt_with_an_image():
    m = _attend(rotary=1e4)
    x = _x(n=16).detach()
    whole = m(x, layout=Layout((("text", 3), ("image", (2, 3)), ("question", 7))))
    prompt = m(x[:, :13], layout=PICTURE, returns=("state",))
    assert prompt.state["k"].shape[2] == 13
    state, steps = prompt.state, []
    for t in range(13, 16):
        y, state = m.step(x[:, t : t + 1], state)
        steps.append(y)
    torch.testing.assert_close(torch.cat([prompt.y, *steps], 1), whole)


@pytest.mark.parametrize("variant", ["ffn", "vo+ffn", "frozen"])
def test_block_is_its_equations(variant):
    block = CompositeBlock(16, 4, hidden=24, variant=variant, qkv_bias=False, proj_bias=False).double()
    x = _x().detach()
    full = attnlib.create("softmax-attention", dim=16, num_heads=4, causal=True, qkv_bias=False, proj_bias=False)
    full.double().load_state_dict(block.attn.state_dict())
    mixed = full(block.norm1(x), mask=masks.explicit(_rule()))
    if variant != "vo+ffn":
        mixed[:, IMAGE] = 0
    u = x + mixed
    y = block._feed(u)
    if variant == "frozen":
        y[:, IMAGE] = x[:, IMAGE]
    torch.testing.assert_close(block(x, PICTURE), y)


@pytest.mark.parametrize("variant", ["ffn", "vo+ffn", "frozen", None])
def test_counted_operations_are_the_formulas(variant):
    text, side, dim, hidden = 24, 5, 32, 88
    settings = dict(hidden=hidden, qkv_bias=False, proj_bias=False, norm=torch.nn.LayerNorm)
    block = CompositeBlock(dim, 4, variant=variant or "ffn", **settings)
    image = side * side
    layout = None if variant is None else Layout((("image", (side, side)), ("text", text)))
    # The specification computes the rectangle that the formula counts; other backends skip what causality forbids.
    with torch.no_grad(), attnlib.use_backend("eager"), FlopCounterMode(display=False) as counter:
        block(torch.randn(1, text + image, dim), layout)
    assert counter.get_total_flops() == composite_flops(text, image, dim, hidden, variant)


def test_savings_of_a_7b_layer():
    """Per variant, for 576 to 4900 image tokens, in percent: the figures of the card."""

    def saved(variant, image, text):
        ours, full = (composite_flops(text, image, 4096, 11008, v) for v in (variant, None))
        return round(100 * (1 - ours / full))

    for image, ffn, vo in ((576, 17, 10), (1296, 20, 13), (2304, 23, 16), (2880, 25, 18), (4900, 30, 23)):
        assert min(abs(saved("ffn", image, t) - ffn) for t in (64, 100)) <= 1
        assert min(abs(saved("vo+ffn", image, t) - vo) for t in (64, 100)) <= 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: _attend(aligner="both"), "aligner"),
        (lambda: _attend(causal=False), "causal=False"),
        (lambda: _attend(alibi=True), "alibi"),
        (lambda: CompositeBlock(16, 4, variant="all"), "variant"),
        (lambda: composite_flops(1, 1, 8, 8, "all"), "variant"),
        (lambda: _attend(image="picture")(_x(), layout=PICTURE), "image='picture' is no segment"),
        (lambda: _attend(image=""), "image must not be empty"),
        (lambda: _attend()(_x(n=9), layout=PICTURE), "13"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- in models that exist


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral"])
def model(request):
    pytest.importorskip("transformers")
    from hooks.models import language_model

    return language_model(request.param)


def _prompt(pad=(5, 0)):
    from hooks.models import prompt

    inputs = prompt(pad=pad)
    inputs["input_ids"][0, 7:12] = 61
    inputs["input_ids"][1, 6:12] = 61
    return inputs


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_layers_of_a_model_equal_the_mask(model, mode):
    from attnlib.hooks import MaskByType, TokenTypes, composite
    from attnlib.reduce import CompositeLayers

    inputs, got = _prompt(), []
    for layers in ([1], None):
        for intervention in (CompositeLayers(layers), MaskByType(composite(), layers)):
            with attnlib.attach(model, intervention, token_types=TokenTypes(image=61)) as session:
                out = model.generate(
                    **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
                    return_dict_in_generate=True, **mode,
                )  # fmt: skip
            got.append((out.sequences, torch.stack(out.logits)))
            if isinstance(intervention, CompositeLayers):
                shown = session.results["composite-layers"]
                assert sorted(shown) == ([1] if layers else [0, 1, 2])
                assert all(row["scored"] * 20 == row["of"] * 15 for row in shown.values())
        (ids, ours), (expected, spec) = got[-2:]
        assert torch.equal(ids, expected)
        torch.testing.assert_close(ours, spec, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[0][1], got[2][1])


def test_prompt_without_image_is_untouched_and_bad_use_is_refused(model):
    from hooks.models import prompt, scores

    from attnlib.hooks import MaskByType, Record, TokenTypes, composite
    from attnlib.reduce import CompositeLayers

    inputs = prompt()
    before, _ = scores(model, inputs)
    with attnlib.attach(model, CompositeLayers(), token_types=TokenTypes(image=61)):
        assert torch.equal(scores(model, inputs)[0], before)
    assert torch.equal(scores(model, inputs)[0], before)
    types = TokenTypes(image=61)
    for others, words in (([Record()], "no rows"), ([MaskByType(composite())], "both say")):
        with pytest.raises(ValueError, match=words):
            attnlib.attach(model, CompositeLayers(), *others, token_types=types)
    with pytest.raises(ValueError, match="layer 9"):
        attnlib.attach(model, CompositeLayers([9]), token_types=types)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, CompositeLayers())
    with pytest.raises(ValueError, match="aligner"):
        CompositeLayers(aligner="ffn")
