"""VHR: the paper's equations, an oracle of full forward passes layer after layer, and its life under ``generate()``."""

import pytest
import torch

import attnlib
from attnlib.cache import SnapKV
from attnlib.hooks import PAD, TokenTypes
from attnlib.reduce import DyVTE
from attnlib.steer import (
    ContrastiveDecoding,
    HeadDivergence,
    HeadReinforcement,
    HeadScale,
    NoImage,
    VisualBoost,
    head_divergence,
    sensitive_heads,
    token_divergence,
)
from hooks import models
from hooks.models import prompt
from hooks.two_branches import equal, generated

IMAGE_ID = 61
RULE = TokenTypes(IMAGE_ID)


# ---- equations


@pytest.mark.parametrize("correction", [0, 1])
def test_divergence_and_its_outliers_head_by_head(correction):
    torch.manual_seed(0)
    a, b = torch.randn(3, 8, 5), torch.randn(3, 8, 5)
    b[0, 2] *= 9
    b[1, 5], a[1, 5] = b[1, 5] * 9, b[1, 5] * 9  # loud, but it does not change
    a[2, 1], b[2, 1] = a[2, 1] * 9, b[2, 1] * 0.1  # it changes, but is not loud without the image
    got, plain = head_divergence(a, b, correction=correction), head_divergence(a, b, outliers=False)
    zeroed = 0
    for i in range(3):
        vhd = [float(sum((x - y) ** 2 for x, y in zip(a[i, h], b[i, h], strict=True)) ** 0.5) for h in range(8)]
        loud = [float(sum(y**2 for y in b[i, h])) for h in range(8)]

        def limit(values):
            mean = sum(values) / 8
            return mean + (sum((v - mean) ** 2 for v in values) / (8 - correction)) ** 0.5

        for h in range(8):
            out = vhd[h] > limit(vhd) and loud[h] > limit(loud)
            zeroed += out
            assert float(got[i, h]) == pytest.approx(0.0 if out else vhd[h], rel=1e-5)
            assert float(plain[i, h]) == pytest.approx(vhd[h], rel=1e-5)
    assert got[0, 2] == 0 and got[1, 5] == plain[1, 5] and got[2, 1] == plain[2, 1] and 1 <= zeroed <= 3


def test_the_correction_decides_about_a_head_near_the_limit(monkeypatch):
    without = torch.tensor([0.0, 1.0, 3.0, 3.1])[None, :, None]  # limits 3.09 and 3.30
    assert head_divergence(torch.zeros(1, 4, 1), without, correction=0)[0, 3] == 0
    assert head_divergence(torch.zeros(1, 4, 1), without, correction=1)[0, 3] > 3
    # both techniques ask for the one they were given
    asked = []

    def spy(a, b, outliers=True, correction=1):
        asked.append(correction)
        return head_divergence(a, b, outliers, correction)

    monkeypatch.setattr("attnlib.steer.head_reinforcement.head_divergence", spy)
    for made in (HeadReinforcement(3.0, [1, 2], correction=0), HeadDivergence(layers=[1, 2], correction=0)):
        model = language_model("llama")
        with attnlib.attach(model, made, token_types=RULE):
            generated(model, image_prompt())
        assert asked and set(asked) == {0}, made
        asked.clear()


@pytest.mark.parametrize("heads", [2, 5, 8])
def test_half_of_the_heads_are_chosen(heads):
    torch.manual_seed(0)
    divergence = torch.rand(4, heads)
    chosen = sensitive_heads(divergence)
    assert (chosen.sum(1) == heads // 2).all()
    assert (divergence.masked_fill(~chosen, 2).amin(1) > divergence.masked_fill(chosen, -1).amax(1)).all()


def test_reliance_of_a_token():
    table = {1: torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 0.0]]), 4: torch.tensor([[0.0, 1.0, 7.0], [1.0, 0.0, 0.0]])}
    assert token_divergence(table, 2).tolist() == [16.0, 5.0]
    with pytest.raises(ValueError, match="empty"):
        token_divergence({}, 2)


def test_scaling_a_head_turns_the_sum_towards_it():
    """Proposition 1: after normalisation only the direction is left."""
    torch.manual_seed(0)
    parts = torch.randn(20, 6, 32)
    for alpha in (1.5, 2.0, 4.0):
        before, after = parts.sum(1), parts.sum(1) + (alpha - 1) * parts[:, 0]
        cos = torch.nn.functional.cosine_similarity
        assert (cos(after, parts[:, 0]) > cos(before, parts[:, 0])).all()


# ---- in a model

pytest.importorskip("transformers")


def language_model(family="llama", **changes):
    model = models.language_model(family, **{"num_hidden_layers": 4, **changes})
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(3)
    return model


def image_prompt(spans=((7, 13), (2, 6)), **kwargs):
    inputs = prompt(**kwargs)
    inputs["input_ids"][inputs["input_ids"] == IMAGE_ID] = 7
    for row, (start, stop) in enumerate(spans):
        inputs["input_ids"][row, start:stop] = IMAGE_ID
    return inputs


def last_outputs(model, layer, factors, **inputs):
    """(1, H, D) outputs of the heads of a layer at the last position, earlier layers scaled by ``factors``."""
    seen = []
    projection = model.model.layers[layer].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with attnlib.attach(model, HeadScale(factors)), torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0][:, -1].unflatten(-1, (4, -1))


def by_full_passes(model, inputs, layers, alpha, selection="layers", outliers=True):
    """Heads and divergences of each row read alone, two whole forward passes for each layer."""
    heads, divergences = {}, {}
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask == 1]
        factors, chosen = {}, {}
        for layer in layers:
            earlier = factors if selection == "layers" else {}
            a = last_outputs(model, layer, earlier, input_ids=ids[None])
            b = last_outputs(model, layer, earlier, input_ids=ids[ids != IMAGE_ID][None])
            vhd = head_divergence(a, b, outliers)
            pick = vhd[0] > vhd[0].sort().values[1]
            factors[layer] = torch.where(pick, alpha, 1.0)
            chosen[layer] = (pick, vhd[0])
        rows.append(chosen)
    for layer in layers:
        heads[layer] = torch.stack([r[layer][0] for r in rows])
        divergences[layer] = torch.stack([r[layer][1] for r in rows])
    return heads, divergences


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("selection", ["layers", "passes"])
def test_heads_equal_full_passes_layer_after_layer(family, selection):
    model = language_model(family)
    inputs = image_prompt()
    layers = [1, 2, 3]
    want, divergence = by_full_passes(model, inputs, layers, 3.0, selection)
    vhr = HeadReinforcement(3.0, layers, selection=selection)
    with attnlib.attach(model, vhr, token_types=RULE):
        got = generated(model, inputs)
    for layer in layers:
        torch.testing.assert_close(vhr.results()["divergence"][layer], divergence[layer], atol=1e-5, rtol=1e-5)
        assert torch.equal(vhr.results()["heads"][layer], want[layer]) and (want[layer].sum(1) <= 2).all()
    # The same as scaling these heads throughout.
    factors = {layer: torch.where(want[layer], 3.0, 1.0) for layer in layers}
    with attnlib.attach(model, HeadScale(factors)):
        equal(got, generated(model, inputs))


def test_both_selections_differ_once_a_layer_was_scaled():
    model = language_model()
    inputs = image_prompt()
    found = []
    for selection in ("layers", "passes"):
        vhr = HeadReinforcement(4.0, [1, 2, 3], selection=selection)
        with attnlib.attach(model, vhr, token_types=RULE), torch.no_grad():
            model(**inputs)
        found.append(vhr.results()["divergence"])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0][3], found[1][3], rtol=0.05)


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_every_way_to_generate_scales_the_same_heads(mode):
    model = language_model()
    inputs = image_prompt()
    vhr = HeadReinforcement(2.0, [1, 3])
    with attnlib.attach(model, vhr, token_types=RULE):
        greedy = generated(model, inputs)
        heads = vhr.results()["heads"]
        got = generated(model, inputs, mode)
        again = generated(model, inputs, mode)
    equal(again, got, atol=0)
    repeats = mode.get("num_beams", 1)
    assert torch.equal(vhr.results()["heads"][3], heads[3].repeat_interleave(repeats, 0))
    factors = {layer: torch.where(h, 2.0, 1.0).repeat_interleave(repeats, 0) for layer, h in heads.items()}
    plain = generated(model, inputs, mode)
    with attnlib.attach(model, HeadScale(factors)):
        equal(got, generated(model, inputs, mode))
    assert greedy[0].shape[0] == 5 and not torch.allclose(plain[0], got[0], atol=1e-2)
    assert not model._forward_pre_hooks and not model.model.layers[1]._forward_pre_hooks


def test_batch_with_padding_equals_single_prompts():
    model = language_model()
    inputs = image_prompt()
    together, alone = None, []
    for row, start in ((None, 0), (0, 5), (1, 0)):
        some = inputs if row is None else {n: t[row : row + 1, start:] for n, t in inputs.items()}
        with attnlib.attach(model, HeadReinforcement(2.0, [0, 1, 2, 3]), token_types=RULE):
            got, _ = generated(model, some)
        together, alone = (got, alone) if row is None else (together, [*alone, got])
    torch.testing.assert_close(
        together.nan_to_num(neginf=0), torch.cat(alone, 1).nan_to_num(neginf=0), atol=1e-5, rtol=1e-5
    )


def test_identity_and_prompts_without_image_are_the_model():
    model = language_model()
    inputs = image_prompt()
    plain = generated(model, inputs)
    with attnlib.attach(model, HeadReinforcement(1.0, [1]), token_types=RULE) as session:
        assert not session.attached
        equal(generated(model, inputs), plain, atol=0)
    vhr = HeadReinforcement(3.0, [1, 2])
    with attnlib.attach(model, vhr, token_types=TokenTypes(63)):
        equal(generated(model, inputs), plain, atol=0)
        assert not vhr.results()["heads"]
    # A row without image in a batch beside one with an image.
    inputs["input_ids"][1, 2:6] = 8
    plain = generated(model, inputs)
    with attnlib.attach(model, vhr, token_types=RULE):
        got = generated(model, inputs)
    assert torch.equal(got[0][:, 1], plain[0][:, 1]) and not torch.equal(got[0][:, 0], plain[0][:, 0])
    assert not vhr.results()["heads"][1][1].any()


def test_a_head_that_reads_no_image_does_not_diverge():
    """Head 0 of layer 0 sees the last token only, whose value does not depend on the image."""
    model = language_model(num_key_value_heads=4)
    attention = model.model.layers[0].self_attn
    inputs = image_prompt(pad=(0, 0))
    with torch.no_grad():
        attention.v_proj.weight[:8] = 0.0
    vhr = HeadReinforcement(2.0, [0], outliers=False)
    with attnlib.attach(model, vhr, token_types=RULE), torch.no_grad():
        model(**inputs)
    divergence = vhr.results()["divergence"][0]
    assert (divergence[:, 0] < 1e-5).all() and (divergence[:, 1:] > 1e-2).all()
    assert not vhr.results()["heads"][0][:, 0].any()


def test_layers_by_default():
    model = language_model(num_hidden_layers=18)
    with attnlib.attach(model, HeadReinforcement(), token_types=RULE) as session:
        assert [s.layer for s in session.attached] == [1, *range(4, 18)]


def test_embeddings_as_prompt():
    model = language_model()
    inputs = image_prompt()
    types = RULE(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    with attnlib.attach(model, HeadReinforcement(2.0, [1, 3]), token_types=types):
        want, tokens = generated(model, inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        got = generated(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
        with pytest.raises(ValueError, match="read in chunks"):
            generated(model, inputs, {"prefill_chunk_size": 6})
    equal(got, (want, tokens[:, 20:]))


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("selection", ["layers", "passes"])
def test_vision_language_model(mode, selection):
    from hooks.llava import IMAGE_ID as LLAVA_IMAGE
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    with torch.no_grad():
        for p in model.model.multi_modal_projector.parameters():
            p.mul_(40)
        model.lm_head.weight.mul_(15)
    plain = generated(model, inputs, mode)
    vhr = HeadReinforcement(3.0, [1, 2], selection=selection)
    with attnlib.attach(model, vhr, token_types=TokenTypes(LLAVA_IMAGE)):
        got = generated(model, inputs, mode)
    heads = vhr.results()["heads"]
    assert set(heads) == {1, 2} and (heads[1].sum(1) <= 2).all() and heads[1].any()
    factors = {layer: torch.where(h, 3.0, 1.0) for layer, h in heads.items()}
    with attnlib.attach(model, HeadScale(factors)):
        equal(got, generated(model, inputs, mode))
    assert not torch.equal(got[0], plain[0])
    equal(generated(model, inputs, mode), plain, atol=0)


# ---- looking, token by token


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"use_cache": False}], ids=str)
def test_reliance_of_every_new_token_equals_full_passes(mode):
    model = language_model()
    inputs = image_prompt()
    plain = generated(model, inputs, mode)
    look = HeadDivergence(k=2, layers=[0, 2])
    with attnlib.attach(model, look, token_types=RULE):
        equal(generated(model, inputs, mode), plain, atol=0)
        equal(generated(model, inputs, mode), plain, atol=0)
    results = look.results()
    assert results["reliance"].shape == (5, 2) and results["divergence"][2].shape == (5, 2, 4)
    for step in range(5):
        for row, start in enumerate((5, 0)):
            ids, total = plain[1][row, start : 20 + step], 0.0
            for layer in (0, 2):
                a = last_outputs(model, layer, {}, input_ids=ids[None])
                b = last_outputs(model, layer, {}, input_ids=ids[ids != IMAGE_ID][None])
                want = (a - b).norm(dim=-1)[0]
                torch.testing.assert_close(results["divergence"][layer][step, row], want, atol=1e-5, rtol=1e-5)
                total += float(want.sort().values[-2:].sum())
            assert float(results["reliance"][step, row]) == pytest.approx(total, rel=1e-3)


def test_looking_refuses_and_rests():
    model = language_model()
    with pytest.raises(ValueError, match="k must be at least 1"):
        HeadDivergence(0)
    with pytest.raises(ValueError, match="has 4 heads"):
        attnlib.attach(model, HeadDivergence(5), token_types=RULE)
    look = HeadDivergence(1)
    with attnlib.attach(model, look, token_types=TokenTypes(63)):
        generated(model, image_prompt())
    assert look.results()["reliance"] is None and look.forwards == 0


# ---- beside other techniques


def test_it_composes():
    model = language_model()
    inputs = image_prompt()
    alone = HeadReinforcement(2.0, [1, 3])
    with attnlib.attach(model, alone, token_types=RULE):
        main, _ = generated(model, inputs, {"suppress_tokens": None}, new=1)
        text = [row[(row != IMAGE_ID) & (row != 0)] for row in inputs["input_ids"]]
    for others, check in (
        ([SnapKV(cap=10, window_size=3, kernel_size=3)], False),
        ([DyVTE(exit_layer=2)], False),
        ([VisualBoost(0.7, sets="all")], False),
        ([ContrastiveDecoding(NoImage(), 1.8, -0.8)], True),
    ):
        removes = isinstance(others[0], DyVTE)
        vhr = HeadReinforcement(2.0, [1, 3], selection="passes" if removes else "layers")
        with attnlib.attach(model, vhr, *others, token_types=RULE):
            got, _ = generated(model, inputs, {"suppress_tokens": None}, new=1 if check else 4)
        assert not got.isnan().any() and vhr.results()["heads"][3].any()
        if check:
            # The second branch is not reinforced.
            with torch.no_grad():
                other = torch.cat([model(input_ids=row[None]).logits[:, -1] for row in text])
            torch.testing.assert_close(got[0], 1.8 * main[0] - 0.8 * other, atol=1e-5, rtol=1e-5)


def test_refusals():
    model = language_model()
    with pytest.raises(ValueError, match="alpha must be positive"):
        HeadReinforcement(0.0)
    with pytest.raises(ValueError, match="selection='both'"):
        HeadReinforcement(selection="both")
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, HeadReinforcement())
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        attnlib.attach(model, HeadReinforcement(layers=[9]), token_types=RULE)
    with pytest.raises(ValueError, match=r"with_image must have shape \(B, H, D\)"):
        head_divergence(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="two HeadReinforcements"):
        attnlib.attach(model, HeadReinforcement(layers=[1]), HeadReinforcement(layers=[2]), token_types=RULE)
    with pytest.raises(ValueError, match="selection='passes' composes"):
        attnlib.attach(model, HeadReinforcement(layers=[1]), DyVTE(exit_layer=2), token_types=RULE)
    assert not model._forward_pre_hooks
    vhr = HeadReinforcement(layers=[1])
    with attnlib.attach(model, vhr, token_types=RULE), pytest.raises(ValueError, match="attached already"):
        attnlib.attach(language_model(seed=1), vhr, token_types=RULE)
