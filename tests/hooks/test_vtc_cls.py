"""VTC-CLS: the authors' choice, true removal before the decoder, and what it saves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hooks.models import language_model, prompt, release, scores

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import AcrossHeads, Cap, KeyNorm, KVCompression, LastQuery, Ratio, SnapKV  # noqa: E402
from attnlib.hooks import Record, TokenTypes  # noqa: E402
from attnlib.hooks.vision import class_row  # noqa: E402
from attnlib.reduce import VTCCLS, Rate, ensemble  # noqa: E402
from hooks.pictures import COPIES, IMAGE_ID, TOKENS, image_slots, picture_inputs, picture_model, shorter  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vtc-cls.safetensors"
TYPES = TokenTypes(IMAGE_ID)


@pytest.fixture(scope="module")
def model():
    return picture_model()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def class_attention(q, k):
    """Averaged over heads."""
    return class_row(q, k).mean(1)


def class_rows(model, inputs):
    """Recorded maps of the tower, run eagerly: (L, I, n) attention of the class token."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation(before)
    return torch.stack([m.mean(1)[:, 0, 1:] for m in maps])


def chosen_slots(inputs, scores, k):
    """(B, N) boolean: text, and the k best tokens of each image, by (score, index)."""
    image = image_slots(inputs)
    keep = ~image
    flat = torch.zeros(int(image.sum()), dtype=torch.bool)
    for i, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: (-float(row[j]), j))[:k]
        flat[[i * len(row) + j for j in order]] = True
    keep[image] = flat
    return keep


@pytest.mark.parametrize("case", ["a", "b"])
def test_scores_and_features_equal_the_authors(case):
    with safe_open(FIXTURE, "pt") as f:
        t = {k[2:]: f.get_tensor(k) for k in f.keys() if k.startswith(case)}  # noqa: SIM118
        config = json.loads(f.metadata()["config"])[case]
    layers = [class_attention(t[f"q_proj/{n}"], t[f"k_proj/{n}"]) for n in range(4)]
    mine = ensemble(layers[config["start"] : -1])
    close(mine[0], t["scores"])
    keep = VTCCLS(**config).chosen(mine, torch.tensor([1]), VTCCLS(**config).schedule[0])
    features = torch.nn.functional.linear(t["hidden"][keep][None], t["w"], t["b"])
    close(features, t["features"])


def test_row_of_the_class_token_equals_recorded_maps(model):
    inputs = picture_inputs((2, 1))
    rows = class_rows(model, inputs)
    for start, end, how in ((0, -1, "sum"), (1, None, "sum"), (1, -1, "min"), (-3, -1, "max"), (2, 3, "sum")):
        vtc = VTCCLS(3, start=start, end=end, ensemble=how)
        with attnlib.attach(model, vtc, token_types=TYPES) as session, torch.no_grad():
            model(**inputs)
        stack = rows[start:end]
        want = {"sum": stack.sum(0), "min": stack.amin(0), "max": stack.amax(0)}[how]
        torch.testing.assert_close(session.results["vtc-cls"]["scores"], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoding_equals_a_shorter_prompt(family, implementation):
    model = picture_model(family, implementation=implementation)
    inputs = picture_inputs((1, 2))
    keep = chosen_slots(inputs, class_rows(model, inputs)[1:-1].sum(0), 5)
    assert not keep.all()
    want, ids = scores(model, shorter(model, inputs, keep))
    with attnlib.attach(model, VTCCLS(5, start=1), token_types=TYPES):
        got, mine = scores(model, inputs)
    close(got, want)
    assert torch.equal(mine[:, -5:], ids[:, -5:])


@pytest.mark.parametrize(
    "mode", [pytest.param({"num_beams": 3}, marks=COPIES), {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_beams_and_caches(model, mode):
    inputs = picture_inputs((2, 1))
    keep = chosen_slots(inputs, class_rows(model, inputs)[1:-1].sum(0), 4)
    short = shorter(model, inputs, keep)
    if mode == {"use_cache": False}:
        mode, short = {"use_cache": False}, short
        want, ids = scores(model, short)
    else:
        want, ids = scores(model, short, **mode)
    with attnlib.attach(model, VTCCLS(4, start=1), token_types=TYPES):
        got, mine = scores(model, inputs, **mode)
    close(got, want)
    assert torch.equal(mine[:, -5:], ids[:, -5:])


@COPIES
def test_several_samples_of_one_prompt(model):
    """The tower runs once for all copies of a prompt; each copy reads the tokens of its own images."""
    inputs = picture_inputs((2, 1))
    with attnlib.attach(model, VTCCLS(4, start=1), token_types=TYPES):
        greedy, _ = scores(model, inputs, new=1)
        out = model.generate(
            **inputs, max_new_tokens=2, do_sample=True, num_return_sequences=3, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    close(out.logits[0], greedy[0].repeat_interleave(3, 0))


def test_all_tokens_reproduce_the_untouched_model_bit_for_bit(model):
    inputs = picture_inputs()
    before = scores(model, inputs)
    for keep in (TOKENS, 1.0):
        with attnlib.attach(model, VTCCLS(keep, start=1), token_types=TYPES):
            after = scores(model, inputs)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_single_layer_ensembles_and_head_order():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    order = torch.tensor([2, 0, 3, 1])
    close(class_attention(q, k), class_attention(q[:, order], k[:, order]))
    one = class_attention(q, k)
    assert torch.equal(ensemble([one]), one)


def test_planted_attention_survives_in_raster_order(model):
    inputs = picture_inputs()
    planted = [9, 2, 14, 5]

    class Planted(VTCCLS):
        def on_attach(self, session):
            super().on_attach(session)
            rows = torch.full((2, TOKENS), 0.1)
            rows[:, planted] = torch.tensor([0.4, 0.3, 0.2, 0.15])
            self.scorer._images_of = lambda branch: [rows]

    vtc = Planted(4, start=1)
    with attnlib.attach(model, vtc, token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    slots = session.results["vtc-cls"]["slots"]
    image = image_slots(inputs)
    for b in range(2):
        first = int(image[b].nonzero()[0])
        kept = [s - first for s in slots[b].tolist() if image[b, s]]
        assert kept == sorted(planted)


def test_tokens_flops_and_cache_shrink_in_proportion(model):
    inputs = picture_inputs((1,))
    n = inputs["input_ids"].shape[1]
    text = n - TOKENS
    with attnlib.attach(model, VTCCLS(4, start=1), token_types=TYPES) as session:
        out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    shown = session.results["vtc-cls"]
    assert shown["lengths"] == (text + 4,) * 3 and shown["tokens"].flatten().tolist() == [text + 4] * 3
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [text + 4 + 1] * 3
    linear = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48)
    assert shown["flops"] == 3 * (linear * (text + 4) + 4 * 32 * (text + 4) ** 2)
    assert shown["flops_untouched"] == 3 * (linear * n + 4 * 32 * n * n)
    assert shown["saved"] == 1 - shown["flops"] / shown["flops_untouched"]


@pytest.mark.skipif(release() < (5, 19), reason="rotary angles were made by a matrix product, which torch counts")
def test_flops_equal_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = picture_model(implementation="eager")
    inputs = picture_inputs((1, 1))
    counted = []
    with attnlib.attach(model, VTCCLS(4, start=1), token_types=TYPES) as session, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    by_module = counter.get_flop_counts()
    for layer in range(3):
        (name,) = [n for n in by_module if n.endswith(f"language_model.layers.{layer}")]
        counted.append(sum(by_module[name].values()))
    assert session.results["vtc-cls"]["flops"] == sum(counted)


def test_ranking_over_the_images_of_a_sample(model):
    inputs = picture_inputs((3, 0, 1))
    rows = class_rows(model, inputs)[1:-1].sum(0)
    with attnlib.attach(model, VTCCLS(6, start=1, rank="sample"), token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    slots, image = session.results["vtc-cls"]["slots"], image_slots(inputs)
    for b, part in ((0, rows[:3].flatten()), (2, rows[3])):
        want = image[b].nonzero().flatten()[part.topk(6).indices.sort().values].tolist()
        assert [s for s in slots[b].tolist() if s >= 0 and image[b, s]] == want
    # The sample without an image keeps all it has.
    assert (slots[1] >= 0).sum() == inputs["attention_mask"][1].sum()


def test_ties_go_to_the_first(model):
    vtc = VTCCLS(2, start=0)
    keep = vtc.chosen(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), torch.tensor([1]), vtc.schedule[0])
    assert keep.tolist() == [[True, True, False, False]]


def test_a_tower_without_class_token():
    model = picture_model(tower="siglip")
    inputs = picture_inputs()
    with attnlib.attach(model, VTCCLS(5, start=1, what="received"), token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    assert session.results["vtc-cls"]["lengths"] == (8 + 5,) * 3
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions[1:-1]
    close(session.results["vtc-cls"]["scores"], torch.stack([m.mean((1, 2)) for m in maps]).sum(0))
    with pytest.raises(ValueError, match="no class token.*what='received'"):
        attnlib.attach(model, VTCCLS(5, start=1), token_types=TYPES)


def test_original_positions_are_an_option(model):
    inputs = picture_inputs()
    outs = []
    for positions in ("contiguous", "original"):
        with attnlib.attach(model, VTCCLS(4, start=1, positions=positions), token_types=TYPES):
            outs.append(scores(model, inputs)[0])
    assert not torch.allclose(*outs, atol=1e-4)


def test_composes_with_a_compressed_cache_and_records(model):
    inputs = picture_inputs()
    parts = [VTCCLS(6, start=1), SnapKV(ratio=0.3, window_size=3), Record(layers=[2])]
    with attnlib.attach(model, *parts, token_types=TYPES) as session:
        got, _ = scores(model, inputs)
    assert torch.isfinite(got).all()
    assert session.results["snapkv"][0]["kept"].shape[2] == int((8 + 6) * 0.7)
    kept = session.results["snapkv"][0]["kept"]
    slots = session.results["vtc-cls"]["slots"]
    assert all(set(kept[b, h].tolist()) <= set(slots[b].tolist()) for b in range(2) for h in range(2))


@pytest.mark.parametrize("mode", [{}, pytest.param({"num_beams": 2}, marks=COPIES), {"cache_implementation": "static"}])
@pytest.mark.parametrize(
    "compression",
    [
        lambda: SnapKV(ratio=0.4, window_size=3),
        lambda: KVCompression(KeyNorm(), Cap(9), every=2),
        lambda: KVCompression(LastQuery(), AcrossHeads(Ratio(0.4))),
    ],
    ids=["snapkv", "while-decoding", "across-heads"],
)
def test_a_compressed_cache_behind_it_equals_that_of_a_shorter_prompt(model, compression, mode):
    inputs = picture_inputs((1, 2))
    keep = chosen_slots(inputs, class_rows(model, inputs)[1:-1].sum(0), 5)
    with attnlib.attach(model, VTCCLS(5, start=1), compression(), token_types=TYPES):
        got, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, compression()):
        want, _ = scores(model, shorter(model, inputs, keep), **mode)
    close(got, want)


def test_beside_a_second_branch(model):
    """A branch that chooses image tokens by itself is left alone; one with other pixels keeps its own best."""
    from attnlib.steer import DAMRO, ContrastiveDecoding, OtherPixels

    inputs = picture_inputs((1, 2))
    other = torch.randn_like(inputs["pixel_values"])
    keep = chosen_slots(inputs, class_rows(model, inputs)[1:-1].sum(0), 5)
    with attnlib.attach(model, VTCCLS(5, start=1), DAMRO(k=4, alpha=0.5), token_types=TYPES) as session:
        got, _ = scores(model, inputs)
        assert torch.isfinite(got).all()
        slots = session.results["vtc-cls"]["slots"]
        assert all(keep[b, slots[b][slots[b] >= 0]].all() for b in range(2))
    there = {**inputs, "pixel_values": other}
    far = chosen_slots(inputs, class_rows(model, there)[1:-1].sum(0), 5)
    assert not torch.equal(keep, far)
    near_logits, _ = scores(model, shorter(model, inputs, keep), new=1)
    far_logits, _ = scores(model, shorter(model, there, far), new=1)
    seen = []

    class Look(ContrastiveDecoding):
        def on_logits(self, ids, logits):
            after = super().on_logits(ids, logits)
            seen.append((logits, after))
            return after

    both = Look(OtherPixels(other), a=2.0, b=-1.0)
    with attnlib.attach(model, VTCCLS(5, start=1), both, token_types=TYPES) as session:
        scores(model, inputs, new=1)
        slots = session.results["vtc-cls"]["slots"]
    assert all(keep[b, slots[b][slots[b] >= 0]].all() for b in range(2))
    close(seen[0][0], near_logits[0])
    close(seen[0][1], 2 * near_logits[0] - far_logits[0])


def test_prompts_without_images_are_left_alone(model):
    inputs = picture_inputs((0, 0))
    before = scores(model, inputs)
    with attnlib.attach(model, VTCCLS(4, start=1), token_types=TYPES) as session:
        after = scores(model, inputs)
    assert torch.equal(before[0], after[0]) and session.results["vtc-cls"]["saved"] == 0.0


@pytest.mark.parametrize(
    "settings, error, match",
    [
        (dict(keep=1.5, start=1), ValueError, r"rate must lie in \[0, 1\]"),
        (dict(keep=-3, start=1), ValueError, "k must be a non-negative integer"),
        (dict(keep="all", start=1), TypeError, "keep must be"),
        (dict(keep=3, start=1, ensemble="mean"), ValueError, "ensemble"),
        (dict(keep=3, start=1, rank="crop"), ValueError, "rank"),
        (dict(keep=3, start=1, positions="none"), ValueError, "positions"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        VTCCLS(**settings)


def test_bad_use(model):
    inputs = picture_inputs()
    with pytest.raises(ValueError, match="start=3, end=-1 name no layer of the vision tower, which has 4"):
        attnlib.attach(model, VTCCLS(3, start=3), token_types=TYPES)
    with pytest.raises(ValueError, match="tower='eyes' is not in"):
        attnlib.attach(model, VTCCLS(3, start=1, tower="eyes"), token_types=TYPES)
    with pytest.raises(ValueError, match="has no vision tower"):
        attnlib.attach(language_model(), VTCCLS(3, start=1), token_types=TYPES)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, VTCCLS(3, start=1))
    with attnlib.attach(model, VTCCLS(TOKENS + 1, start=1), token_types=TYPES):
        with pytest.raises(ValueError, match="keep=17 is more than the 16 tokens of image 0"):
            model(**inputs)
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with attnlib.attach(model, VTCCLS(3, start=1), token_types=TYPES):
        with pytest.raises(RuntimeError, match="vision tower did not run"):
            model(**text)
        with pytest.raises(ValueError, match="has a session already"):
            attnlib.attach(model, VTCCLS(3, start=1), token_types=TYPES)
    with attnlib.attach(model, VTCCLS(Rate(0.5), start=1), token_types=TokenTypes(int(inputs["input_ids"][0, 0]))):
        with pytest.raises(ValueError, match="they must be the same"):
            model(**inputs)
    assert prompt()["input_ids"].shape == (2, 20)


def test_a_wrong_image_id_is_refused():
    model = picture_model()
    inputs = picture_inputs()
    with (
        attnlib.attach(model, VTCCLS(keep=2, start=0), token_types=TokenTypes(image=2)),
        torch.no_grad(),
        pytest.raises(ValueError, match="finds no image token"),
    ):
        model(**inputs)
