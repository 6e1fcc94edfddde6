"""VAR: the authors' classes on recorded weights, an independent oracle, and its life under ``generate()``."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib.cache import SnapKV
from attnlib.hooks import IMAGE, PAD, TEXT, Record, TokenTypes
from attnlib.steer import VisualRedistribution, find_sink_dims, redistribute, sink_tokens
from hooks.models import call_site, dense_attention, language_model, prompt, run, scores

FIXTURE = Path(__file__).parents[1] / "fixtures" / "visual-attention-redistribution.safetensors"
IMAGE_ID = 61


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


def oracle(weights, image, sinks, eligible, p, rho, summ):
    """One row at a time, as the equations read."""
    out = weights.clone()
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape[:3])).tolist():
        row = weights[b, h, i]
        visual, rest = image[b] & sinks[b], image[b] & ~sinks[b]
        vis = row[image[b]].sum()
        if not eligible[b, i] or not visual.any() or vis < summ or row[visual].sum() > rho * vis:
            continue
        budget = (1 - p) * row[sinks[b]].sum()
        out[b, h, i, sinks[b]] = p * row[sinks[b]]
        out[b, h, i, rest] = row[rest] + budget * row[rest] / row[rest].sum()
    return out


@pytest.fixture
def problem():
    torch.manual_seed(0)
    weights = torch.softmax(torch.randn(2, 3, 10, 14) * 2, -1)
    image = torch.zeros(2, 14, dtype=torch.bool)
    image[0, 2:8], image[1, 3:9] = True, True
    sinks = torch.zeros(2, 14, dtype=torch.bool)
    sinks[0, [0, 3]], sinks[1, [0, 5, 11]] = True, True
    eligible = torch.ones(2, 10, dtype=torch.bool)
    eligible[:, :2] = False
    return weights, image, sinks, eligible


# ---- equations


def test_sinks_and_edited_weights_equal_the_authors(recorded):
    sinks = sink_tokens(recorded["hidden"], (1, 4), tau=5.0)
    assert torch.equal(sinks[0].nonzero().squeeze(1), recorded["sinks"])
    image = torch.zeros(1, 1, 12, dtype=torch.bool)
    image[..., 2:8] = True
    after = (torch.arange(12) >= 8)[None]
    for compat in (None, "authors"):
        mine = redistribute(recorded["weights"], image, sinks[:, None], after, compat=compat)
        torch.testing.assert_close(mine, recorded["edited"], atol=1e-6, rtol=1e-5)
    pad = torch.nn.functional.pad
    mine = redistribute(
        recorded["weights_decode"], pad(image, (0, 1)), pad(sinks[:, None], (0, 1)), torch.ones(1, 1, dtype=torch.bool)
    )
    torch.testing.assert_close(mine, recorded["edited_decode"], atol=1e-6, rtol=1e-5)
    assert not torch.equal(recorded["weights"], recorded["edited"])


@pytest.mark.parametrize("p, rho, summ", [(0.6, 0.5, 0.2), (0.0, 0.9, 0.0), (0.3, 0.3, 0.4)])
def test_explicit_rows(problem, p, rho, summ):
    weights, image, sinks, eligible = problem
    mine = redistribute(weights, image[:, None], sinks[:, None], eligible, p, rho, summ)
    torch.testing.assert_close(mine, oracle(weights, image, sinks, eligible, p, rho, summ), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine.sum(-1), weights.sum(-1), atol=1e-5, rtol=0)
    changed = (mine != weights).any(-1)
    assert changed.any() and not changed[:, :, :2].any()
    rest = (image & ~sinks)[:, None, None].expand_as(weights)
    gain = torch.where(rest, mine - weights, 0).sum(-1)
    assert (gain[changed] > 0).all() and (gain[~changed] == 0).all()


def test_p_zero_empties_the_only_sink_and_keeps_ratios(problem):
    weights, image, sinks, eligible = problem
    sinks[:, 0] = False
    sinks[1, 11] = False
    mine = redistribute(weights, image[:, None], sinks[:, None], eligible, p=0.0, rho=1.0, summ=0.0)
    assert (mine[0, :, 2:, 3] == 0).all() and (mine[1, :, 2:, 5] == 0).all()
    ratio = mine[0, :, 2:, [2, 4, 5, 6, 7]] / weights[0, :, 2:, [2, 4, 5, 6, 7]]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), atol=1e-5, rtol=1e-5)


def test_p_one_changes_nothing(problem):
    weights, image, sinks, eligible = problem
    assert torch.equal(
        redistribute(weights, image[:, None], sinks[:, None], eligible, p=1.0, rho=1.0, summ=0.0), weights
    )


def test_thresholds():
    image = torch.tensor([False, True, True, True, False])[None, None]
    sinks = torch.tensor([False, True, False, False, False])[None, None]
    every = torch.ones(1, 1, dtype=torch.bool)

    def touched(row, **kwargs):
        weights = torch.tensor(row)[None, None, None]
        return bool((redistribute(weights, image, sinks, every, p=0.5, **kwargs) != weights).any())

    row = [0.5, 0.1, 0.05, 0.05, 0.3]
    assert touched(row, rho=0.51, summ=0.19) and not touched(row, rho=0.49, summ=0.19)
    assert not touched(row, rho=0.51, summ=0.21)


def test_all_image_weight_on_sinks_is_left_alone():
    image = torch.tensor([[[True, True, False]]])
    weights = torch.tensor([[[[0.5, 0.4, 0.1]]]])
    for row in (weights, torch.tensor([[[[0.0, 0.9, 0.1]]]])):
        every = torch.ones(1, 1, dtype=torch.bool)
        out = redistribute(row, image, torch.tensor([[[False, True, False]]]), every, p=0.5, rho=1.0, summ=0.0)
        assert out.isfinite().all()
    assert torch.equal(redistribute(weights, image, image, every, p=0.5, rho=1.0, summ=0.0), weights)


def test_half_precision_statistics_are_wide():
    hidden = torch.full((1, 2, 64), 200.0, dtype=torch.float16)
    hidden[0, 1, 3] = 30000.0
    assert sink_tokens(hidden, (3,), tau=5.0).tolist() == [[False, True]]


def test_one_call_with_padding_and_grouped_heads():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 12, 8) * 2, torch.randn(2, 2, 12, 8) * 2, torch.randn(2, 2, 12, 8)
    types = torch.full((2, 12), TEXT)
    types[0, :3], types[0, 4:9], types[1, 2:7] = PAD, IMAGE, IMAGE
    hidden = torch.randn(2, 12, 64)
    for row, slot in ((0, 1), (0, 5), (1, 0), (1, 3), (1, 6)):
        hidden[row, slot, 7] = 1000.0
    allowed = torch.ones(12, 12).tril().bool()[None, None] & (types != PAD)[:, None, None]
    site = call_site(q, k, types=types, allowed=allowed)
    var = VisualRedistribution((7,), p=0.3, rho=0.8, summ=0.05, tau=5.0)
    var.on_block_input(site, hidden)
    sinks = var.results()["sinks"][2]
    assert sinks.nonzero().tolist() == [[0, 5], [1, 0], [1, 3], [1, 6]]  # the padding token is none
    out = run(var, site, q, k, v)
    plain, weights = dense_attention(q, k, v, allowed)
    eligible = torch.zeros(2, 12, dtype=torch.bool)
    eligible[0, 9:], eligible[1, 7:] = True, True
    want = oracle(weights, types == IMAGE, sinks, eligible, 0.3, 0.8, 0.05)
    torch.testing.assert_close(out, want @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
    same = (want == weights).all(-1)
    assert same[:, :, :9].sum() >= 60 and (~same).any() and torch.equal(out[same], plain[same])


# ---- in a model

pytest.importorskip("transformers")


def sinky(family="llama", dims=(3, 17), tokens=(9, 5), **changes):
    """A model whose embedding gives some tokens massive activations."""
    model = language_model(family, **changes)
    with torch.no_grad():
        for token in tokens:
            model.model.embed_tokens.weight[token, dims[0]] = 40.0
    return model


def image_prompt(**kwargs):
    inputs = prompt(**kwargs)
    ids = inputs["input_ids"]
    ids[(ids == 5) | (ids == 9)] = 6
    ids[:, 7:13] = IMAGE_ID
    # One image slot and one text slot of each sample are sinks.
    rule = TokenTypes([IMAGE_ID, 9])
    ids[:, 9], ids[:, 6] = 9, 5
    return inputs, rule


SETTINGS = dict(p=0.2, rho=1.0, summ=0.0, tau=4.0, first_layer=1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_weights_under_generate(family, mode):
    model = sinky(family)
    inputs, rule = image_prompt()
    var = VisualRedistribution((3, 17), **SETTINGS)
    before, after = Record(layers=[1], rows="all"), Record(layers=[1], rows="all")
    plain, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, before, var, after, token_types=rule) as session:
        got, _ = scores(model, inputs, **mode)
        assert list(session.results) == ["record", "visual-redistribution", "record-2"]
    assert not torch.allclose(got, plain, atol=1e-4)
    result = var.results()
    assert result["sinks"][1][:, [6, 9]].all() and all(n > 0 for n in result["edited"].values())
    rows = 2 * mode.get("num_beams", 1)
    types = rule(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD).repeat_interleave(rows // 2, 0)
    pairs = zip(before.results()[1]["weights"], after.results()[1]["weights"], strict=True)
    for step, (w, edited) in enumerate(pairs):
        pad = (0, w.shape[-1] - 20)
        image = torch.nn.functional.pad(types == IMAGE, pad)
        sinks = torch.nn.functional.pad(result["sinks"][1], pad)
        eligible = torch.ones(rows, 1, dtype=torch.bool) if step else (torch.arange(20) > 12).expand(rows, 20)
        want = oracle(w, image, sinks, eligible, 0.2, 1.0, 0.0)
        torch.testing.assert_close(edited, want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(edited.sum(-1), w.sum(-1), atol=1e-5, rtol=0)


def test_batch_with_padding_equals_single_prompts():
    model = sinky()
    inputs, rule = image_prompt()
    together, alone = None, []
    for row, start in ((None, 0), (0, 5), (1, 0)):
        some = inputs if row is None else {n: t[row : row + 1, start:] for n, t in inputs.items()}
        with attnlib.attach(model, VisualRedistribution((3, 17), **SETTINGS), token_types=rule):
            got, _ = scores(model, some)
        together, alone = (got, alone) if row is None else (together, [*alone, got])
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_identity_no_image_and_no_sink_are_the_model():
    model = sinky()
    inputs, rule = image_prompt()
    plain, _ = scores(model, inputs)
    cases = [
        (VisualRedistribution((3, 17), p=1.0), rule, inputs),
        (VisualRedistribution((3, 17), **{**SETTINGS, "tau": 1000.0}), rule, inputs),
        (VisualRedistribution((3, 17), **SETTINGS), TokenTypes(63), inputs),
    ]
    for var, types, given in cases:
        with attnlib.attach(model, var, token_types=types) as session:
            assert torch.equal(scores(model, given)[0], plain)
            assert bool(session.attached) != var.identity


def test_it_composes_with_a_compressed_cache():
    model = sinky()
    inputs, rule = image_prompt()
    var = VisualRedistribution((3, 17), **SETTINGS)
    before, after = Record(layers=[1], phase="decode"), Record(layers=[1], phase="decode")
    snap = SnapKV(cap=16, window_size=3, kernel_size=3)
    with attnlib.attach(model, snap, before, var, after, token_types=rule):
        scores(model, inputs)
    slots = before.results()[1]["keys"]
    types = rule(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    changed = 0
    for w, edited, keys in zip(before.results()[1]["weights"], after.results()[1]["weights"], slots, strict=True):
        pad = (0, int(keys.max()) + 1 - 20)
        image, sinks = (
            torch.nn.functional.pad(t, pad)[:, None].expand(-1, 4, -1).gather(-1, keys.clamp(min=0)) & (keys >= 0)
            for t in (types == IMAGE, var.results()["sinks"][1])
        )
        for h in range(4):
            want = oracle(w[:, h : h + 1], image[:, h], sinks[:, h], torch.ones(2, 1, dtype=torch.bool), 0.2, 1.0, 0.0)
            torch.testing.assert_close(edited[:, h : h + 1], want, atol=1e-6, rtol=1e-5)
        changed += int((w != edited).sum())
    assert changed


def test_sink_dimensions_are_found():
    model = sinky(tokens=(1,))
    with torch.no_grad():
        model.model.embed_tokens.weight[1, 17] = -30.0
    assert find_sink_dims(model, layer=1) == (3, 17)
    inputs, rule = image_prompt()
    var = VisualRedistribution("auto", first_layer=1)
    with attnlib.attach(model, var, token_types=rule):
        model(**inputs)
    assert var.sink_dims == (3, 17)
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"):
        attnlib.attach(model, VisualRedistribution("auto"), token_types=rule)
    with attnlib.attach(model, Record()):
        pass


def test_vision_language_model_under_generate():
    from hooks.llava import IMAGE_ID as LLAVA_IMAGE
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    var = VisualRedistribution((3,), p=0.2, rho=1.0, summ=0.0, tau=1.5, first_layer=1)
    plain, _ = scores(model, inputs)
    with attnlib.attach(model, var, token_types=TokenTypes(LLAVA_IMAGE)):
        got, _ = scores(model, inputs)
    assert got.shape == plain.shape and not torch.equal(got, plain) and sum(var.results()["edited"].values()) > 0
    assert torch.equal(scores(model, inputs)[0], plain)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({}, "sink_dims is needed"),
        ({"sink_dims": "gpt-5"}, "llama-2-7b"),
        ({"sink_dims": ()}, "empty"),
        ({"sink_dims": (1,), "p": 1.5}, r"p must lie in \[0, 1\]"),
        ({"sink_dims": (1,), "rho": -1.0}, r"rho must lie in \[0, 1\]"),
        ({"sink_dims": (1,), "compat": "mine"}, "compat"),
    ],
)
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        VisualRedistribution(**kwargs)


def test_refusals():
    model = sinky()
    with pytest.raises(ValueError, match="hidden size 32"):
        attnlib.attach(model, VisualRedistribution("llama-2-7b"), token_types=TokenTypes(IMAGE_ID))
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, VisualRedistribution((1,)))
    with pytest.raises(ValueError, match="nothing of this model fits"):
        attnlib.attach(model, VisualRedistribution((1,), first_layer=5), token_types=TokenTypes(IMAGE_ID))


def test_sinks_are_kept_by_slot_where_tokens_were_removed_before():
    """Text that leaves before the layer changes no weight there: the sinks, the image and the new rows stay."""
    from attnlib.hooks import Intervention
    from hooks.llava import IMAGE_ID, llava, llava_inputs

    class DropText(Intervention):
        name = "drop-text"
        layers = [1]

        def on_tokens(self, site, hidden):
            index = torch.tensor([0, 2, 3, 4, 5, 6, *range(8, hidden.shape[1])]).expand(len(hidden), -1)
            return hidden[:, index[0]], index

    model = llava()
    inputs = llava_inputs(model)
    types = TokenTypes(image=IMAGE_ID)

    def run(*others):
        edit = VisualRedistribution(sink_dims=(1, 4), p=0.5, rho=1.0, summ=0.0, tau=1.2, layers=[2])
        with torch.no_grad(), attnlib.attach(model, *others, edit, token_types=types) as session:
            model(**inputs)
            return session.results["visual-redistribution"]

    kept, shorter = run(), run(DropText())
    assert shorter["sinks"][2].shape == kept["sinks"][2].shape == (2, 14)
    assert not bool(shorter["sinks"][2][:, [1, 7]].any()) and bool(shorter["sinks"][2].any())
    assert shorter["edited"][2] > 0
