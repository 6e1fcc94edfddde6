"""PAINT: the authors' sets, scores and guidance, an independent oracle, and its life under ``generate()``."""

from pathlib import Path

import pytest
import torch
from parity import Fixture
from safetensors.torch import load_file

import attnlib
from attnlib.cache import SnapKV
from attnlib.hooks import IMAGE, PAD, TEXT, Record, TokenTypes
from attnlib.steer import VisualBoost, boost_sets, contrast, image_guidance
from hooks.models import call_site, dense_attention, language_model, prompt, run, scores

FIXTURE = Path(__file__).parents[1] / "fixtures" / "paint-attention-boost.safetensors"
IMAGE_ID = 61


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


def oracle(q, k, v, allowed, gain, row):
    """Scores of one row raised token by token, (B, M) gains."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    for b in range(q.shape[0]):
        for j in range(k.shape[2]):
            if gain[b, j] and s[b, 0, row, j] > float("-inf"):
                s[b, :, row, j] += gain[b, j] * s[b, :, row, j].abs()
    return torch.softmax(s, -1) @ v, torch.softmax(s, -1)


# ---- equations


def test_sets_equal_the_authors(recorded):
    first, late = (recorded[n][:, :, 0, 1:].sum(1) for n in ("first", "late"))
    local, summary = boost_sets(first, late, 0.25)
    assert torch.equal(local[0].nonzero().flatten(), recorded["local"])
    assert torch.equal(summary[0].nonzero().flatten(), recorded["summary"])
    assert len(recorded["summary"]) == 3 and len(recorded["local"]) > 3


OPTIONS = Fixture("paint-options")


@pytest.mark.parametrize("case", OPTIONS.config)
def test_sets_of_other_ratios_equal_the_authors(case):
    """Half and none of the patches, the spatial term, and an outlier lost to rounding."""
    t, settings = OPTIONS.under(case), OPTIONS.config[case]
    local, summary = boost_sets(t["first"], t["late"], **settings, spatial=t["spatial"], compat="authors")
    assert torch.equal(local[0].nonzero().flatten(), t["local"])
    assert torch.equal(summary[0].nonzero().flatten(), t["summary"])
    ours = boost_sets(t["first"], t["late"], settings["ratio"])[1]
    assert int(ours.sum()) - int(summary.sum()) == (case == "rounded")
    with pytest.raises(ValueError, match="spatial must be"):
        boost_sets(t["first"], t["late"], spatial=t["spatial"][:, 2:])


def test_prefill_and_decoding_equal_the_authors(recorded):
    q, k, v = (recorded[n] for n in "qkv")
    types = torch.full((1, 44), TEXT)
    types[:, 3:39] = IMAGE
    local, summary = torch.zeros(1, 44, dtype=torch.bool), torch.zeros(1, 44, dtype=torch.bool)
    local[0, 3 + recorded["local"]], summary[0, 3 + recorded["summary"]] = True, True
    boost = VisualBoost(0.7, 0.3, sets=(local, summary))
    site = call_site(q, k, types=types)
    out = run(boost, site, q, k, v)
    torch.testing.assert_close(out, recorded["out"], atol=1e-5, rtol=1e-5)
    plain, _ = dense_attention(q, k, v, site.mask.allowed)
    assert torch.equal(out[:, :, :-1], plain[:, :, :-1]) and not torch.allclose(
        out[:, :, -1], plain[:, :, -1], atol=1e-5
    )
    boost.reset()
    boost._gain[None] = local * 0.7 + summary * 0.3
    new = q[:, :, -1:]
    out = run(boost, call_site(new, k, types=types, offset=43, phase="decode"), new, k, v)
    torch.testing.assert_close(out, recorded["out_decode"], atol=1e-5, rtol=1e-5)


def test_an_image_without_outliers_and_planted_ones():
    flat = torch.full((2, 64), 0.5)
    assert not boost_sets(torch.rand(2, 64), flat)[1].any()
    late = torch.rand(1, 64) * 0.1
    late[0, [3, 17, 40]] = 5.0
    local, summary = boost_sets(late, late, 0.25)
    assert summary[0].nonzero().flatten().tolist() == [3, 17, 40]
    assert not (local & summary).any() and local.sum() == 13


def test_weight_on_the_sets_never_falls_and_grows_with_alpha():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 10, 8) * 2, torch.randn(2, 2, 10, 8) * 2, torch.randn(2, 2, 10, 8)
    types = torch.full((2, 10), TEXT)
    types[0, :2], types[0, 3:7], types[1, 2:6] = PAD, IMAGE, IMAGE
    allowed = torch.ones(10, 10).tril().bool() & (types != PAD)[:, None, None]
    site = call_site(q, k, types=types, allowed=allowed)
    _, before = dense_attention(q, k, v, allowed)
    share = before[:, :, -1][(types == IMAGE)[:, None].expand(2, 4, 10)].view(2, 4, 4).sum(-1)
    for alpha in (0.2, 0.6, 1.5):
        boost = VisualBoost(alpha, sets="all")
        gain = (types == IMAGE) * alpha
        out, weights = oracle(q, k, v, allowed, gain, 9)
        torch.testing.assert_close(run(boost, site, q, k, v)[:, :, -1], out[:, :, -1], atol=1e-5, rtol=1e-5)
        now = weights[:, :, -1][(types == IMAGE)[:, None].expand(2, 4, 10)].view(2, 4, 4).sum(-1)
        assert (now >= share).all()
        share = now


def test_masked_image_keys_stay_masked_and_heads_have_their_gain():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    types = torch.tensor([[IMAGE, IMAGE, IMAGE, TEXT, TEXT, TEXT]])
    allowed = torch.ones(6, 6).tril().bool()[None, None].clone()
    allowed[..., 1] = False
    site = call_site(q, k, types=types, allowed=allowed)
    out = run(VisualBoost(0.7, sets="all", head_gain=[0.0, 1.0]), site, q, k, v)
    plain, _ = dense_attention(q, k, v, allowed)
    want, _ = oracle(q, k, v, allowed, (types == IMAGE) * 0.7, 5)
    assert out.isfinite().all() and torch.equal(out[:, 0], plain[:, 0])
    torch.testing.assert_close(out[:, 1], want[:, 1], atol=1e-6, rtol=1e-5)


def test_equal_gains_on_a_split_of_the_image_are_one_gain_on_all_of_it():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    types = torch.tensor([[1, 2, 2, 2, 2, 2, 1, 1, 1]])
    local = torch.zeros(1, 9, dtype=torch.bool)
    local[0, 1:4] = True
    split = VisualBoost(0.6, 0.6, sets=(local, (types == IMAGE) & ~local))
    site = call_site(q, k, types=types)
    assert torch.equal(run(split, site, q, k, v), run(VisualBoost(0.6, sets="all"), site, q, k, v))


def test_guidance_equals_the_authors(recorded):
    for scale in (1, 2):
        guide = image_guidance(float(scale))
        out = contrast(recorded["z"], recorded["u"], guide.a, guide.b, guide.cutoff, guide.normalize)
        want = recorded[f"guided_{scale}"]
        assert torch.equal(out.isinf(), want.isinf()) and bool(want.isinf().any()) == (scale == 2)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


# ---- in a model

pytest.importorskip("transformers")


def image_prompt(**kwargs):
    inputs = prompt(**kwargs)
    inputs["input_ids"][:, 7:13] = IMAGE_ID
    return inputs, TokenTypes(IMAGE_ID)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_weights_under_generate(family, mode):
    model = language_model(family)
    inputs, rule = image_prompt()
    rows = 2 * mode.get("num_beams", 1)
    before, after = Record(layers=[2], rows="all"), Record(layers=[2], rows="all")
    plain, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, before, VisualBoost(0.7, sets="all"), after, token_types=rule):
        got, _ = scores(model, inputs, **mode)
    assert not torch.allclose(got, plain, atol=1e-4)
    image = (rule(inputs["input_ids"]) == IMAGE).repeat_interleave(rows // 2, 0)
    pairs = zip(before.results()[2]["weights"], after.results()[2]["weights"], strict=True)
    for step, (w, edited) in enumerate(pairs):
        gain = torch.nn.functional.pad(image, (0, w.shape[-1] - 20))[:, None].expand(-1, 4, -1)
        if not step:
            assert torch.equal(w[:, :, :-1], edited[:, :, :-1])
        w, edited = w[:, :, -1], edited[:, :, -1]
        # Weights know scores up to a constant per row, |S| does not: recover the constant from two image keys.
        ratio = (edited / w).masked_fill(w == 0, 1).log()
        text = ratio.masked_fill(gain, 0).sum(-1, keepdim=True) / ((w > 0) & ~gain).sum(-1, keepdim=True)
        assert (ratio.masked_fill(gain | (w == 0), 0) - text.masked_fill(gain | (w == 0), 0)).abs().max() < 1e-4
        assert ((ratio - text).masked_fill(~gain, 0) >= -1e-4).all()
        assert (torch.where(gain, edited - w, 0).sum(-1) >= -1e-6).all()


def test_batch_with_padding_equals_single_prompts():
    model = language_model()
    inputs, rule = image_prompt()
    together, alone = None, []
    for row, start in ((None, 0), (0, 5), (1, 0)):
        some = inputs if row is None else {n: t[row : row + 1, start:] for n, t in inputs.items()}
        with attnlib.attach(model, VisualBoost(0.7, sets="all"), token_types=rule):
            got, _ = scores(model, some)
        together, alone = (got, alone) if row is None else (together, [*alone, got])
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_identity_and_prompts_without_image_are_the_model():
    model = language_model()
    inputs, rule = image_prompt()
    plain, _ = scores(model, inputs)
    for boost, types in (
        (VisualBoost(0.0, 0.0), rule),
        (VisualBoost(0.0, 0.3, sets="all"), rule),
        (VisualBoost(0.7, sets="all"), TokenTypes(63)),
    ):
        with attnlib.attach(model, boost, token_types=types) as session:
            assert torch.equal(scores(model, inputs)[0], plain)
            assert bool(session.attached) != boost.identity


def test_sampling_with_a_seed_is_reproducible_and_branches_are_kept_apart():
    model = language_model()
    inputs, rule = image_prompt()
    with attnlib.attach(model, VisualBoost(2.0, sets="all", first_layer=0), token_types=rule) as session:
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(model.generate(**inputs, max_new_tokens=8, do_sample=True))
        boosted = model(**inputs).logits
        with session.at(branch="negative"):
            other = model(**inputs).logits
    assert torch.equal(*runs)
    assert torch.equal(other, model(**inputs).logits) and not torch.allclose(boosted, other, atol=1e-3)


def test_guidance_beside_the_boost():
    model = language_model()
    inputs, rule = image_prompt(pad=(0, 0))
    ids = inputs["input_ids"]
    boost = dict(alpha=1.5, sets="all", first_layer=0)
    with torch.no_grad():
        with attnlib.attach(model, VisualBoost(**boost), token_types=rule):
            c = model(input_ids=ids).logits[:, -1].log_softmax(-1)
        u = model(input_ids=torch.stack([row[row != IMAGE_ID] for row in ids])).logits[:, -1].log_softmax(-1)
        with attnlib.attach(model, VisualBoost(**boost), image_guidance(2.0, 0.5), token_types=rule) as session:
            got = session.logits(ids, model(input_ids=ids).logits[:, -1])
    kept = c >= c.amax(-1, keepdim=True) + torch.tensor(0.5).log()
    assert torch.equal(got.isfinite(), kept)
    torch.testing.assert_close(got[kept], (2 * (c - u) + u)[kept], atol=1e-5, rtol=1e-5)


def test_it_composes_with_a_compressed_cache():
    model = language_model()
    inputs, rule = image_prompt()
    snap = SnapKV(cap=16, window_size=3, kernel_size=3)
    before, after = Record(layers=[2], phase="decode"), Record(layers=[2], phase="decode")
    with attnlib.attach(model, snap, before, VisualBoost(0.7, sets="all"), after, token_types=rule):
        scores(model, inputs)
    image = rule(inputs["input_ids"]) == IMAGE
    changed = 0
    records = (before.results()[2]["weights"], after.results()[2]["weights"], before.results()[2]["keys"])
    for w, edited, keys in zip(*records, strict=True):
        by_slot = torch.nn.functional.pad(image, (0, int(keys.max()) - 19))[:, None].expand(-1, 4, -1)
        gain = by_slot.gather(-1, keys.clamp(min=0)) & (keys >= 0)
        share = torch.where(gain, edited[:, :, 0] - w[:, :, 0], 0).sum(-1)
        assert (share >= -1e-6).all()
        changed += int((share > 1e-4).sum())
    assert changed


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=str)
def test_sets_come_from_the_vision_encoder(mode):
    from hooks.llava import IMAGE_ID as LLAVA_IMAGE
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    boost = VisualBoost(1.5, 0.5, local_ratio=0.5, first_layer=1)
    plain, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, boost, token_types=TokenTypes(LLAVA_IMAGE)):
        got, _ = scores(model, inputs, **mode)
        gain = boost.results()["gain"][None]
        text = {n: t for n, t in inputs.items() if n != "pixel_values"}
        text["input_ids"] = text["input_ids"].clamp(max=60)
        with torch.no_grad():
            without = model(**text).logits
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
        assert torch.equal(model(**text).logits, without)
    local, summary = boost_sets(maps[0][:, :, 0, 1:].sum(1), maps[-2][:, :, 0, 1:].sum(1), 0.5)
    want = torch.zeros(2, 14)
    want[:, 3:7] = local * 1.5 + summary * 0.5
    torch.testing.assert_close(gain, want.double().repeat_interleave(mode.get("num_beams", 1), 0))
    assert not torch.allclose(got, plain, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"alpha": -0.1}, "alpha must not be negative"),
        ({"local_ratio": 1.5}, r"local_ratio must lie in \[0, 1\]"),
        ({"sets": "some"}, "sets='some'"),
        ({"sets": (torch.ones(4), torch.ones(4))}, "boolean tensors"),
    ],
)
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        VisualBoost(**kwargs)


def test_refusals():
    model = language_model()
    inputs, rule = image_prompt()
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, VisualBoost(sets="all"))
    with pytest.raises(ValueError, match="no vision tower"):
        attnlib.attach(model, VisualBoost(), token_types=rule)
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match=r"must be \(4,\)"):
        attnlib.attach(model, VisualBoost(sets="all", head_gain=[1.0]), token_types=rule)
    with pytest.raises(ValueError, match="nothing of this model fits"):
        attnlib.attach(model, VisualBoost(sets="all", first_layer=3), token_types=rule)
    beside = torch.zeros(2, 20, dtype=torch.bool)
    beside[:, 14] = True
    boost = VisualBoost(sets=(beside, torch.zeros_like(beside)))
    with attnlib.attach(model, boost, token_types=rule), pytest.raises(ValueError, match="no image tokens"):
        model(**inputs)


def test_image_tokens_that_no_encoder_read_are_refused():
    from hooks.llava import IMAGE_ID as LLAVA_IMAGE
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    types = TokenTypes(LLAVA_IMAGE)(inputs["input_ids"])
    with (
        attnlib.attach(model, VisualBoost(first_layer=1), token_types=types),
        pytest.raises(ValueError, match="encoder did not run"),
    ):
        model(inputs_embeds=embeds)
    inputs["input_ids"][0, 13] = 61  # called an image token, but no patch
    with (
        attnlib.attach(model, VisualBoost(first_layer=1), token_types=TokenTypes([LLAVA_IMAGE, 61])),
        pytest.raises(ValueError, match="one per patch"),
    ):
        model(**inputs)
