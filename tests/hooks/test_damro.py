"""DAMRO: the authors' choice of outliers and their combination of scores, and its life under ``generate()``."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib.cache import SnapKV
from attnlib.hooks import TokenTypes
from attnlib.hooks.vision import class_attention
from attnlib.steer import DAMRO, contrast, select_outliers
from hooks.models import language_model, prompt
from hooks.two_branches import Scratch, equal, generated

FIXTURE = Path(__file__).parents[1] / "fixtures" / "damro.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


# ---- the authors' functions


def test_class_attention_and_outliers_equal_the_authors(recorded):
    attention = class_attention(recorded["q"], recorded["k"], 2, 0.5, "concat")
    torch.testing.assert_close(attention, recorded["cls_attn"], atol=1e-6, rtol=1e-5)
    assert torch.equal(attention.topk(3, 1).indices, recorded["idx"])
    assert torch.equal(select_outliers(recorded["features"], attention, 3), recorded["kept"])


def test_heads_are_averaged_as_in_their_instructblip_branch(recorded):
    q, k, _ = recorded["qkv"].chunk(3, -1)
    attention = class_attention(q, k, 2, 4**-0.5, "mean")
    torch.testing.assert_close(attention, recorded["blip_cls_attn"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(class_attention(q, k, 2, 4**-0.5, "heads").sum(1), attention * 2)
    theirs = select_outliers(recorded["embeds"], attention, 3, compat="authors")
    assert torch.equal(theirs, recorded["blip_kept"])
    # Theirs counts patches from the class token: every feature is its left neighbour.
    ours = select_outliers(recorded["embeds"], attention, 3)
    assert torch.equal(ours, select_outliers(recorded["embeds"][:, 1:], attention, 3))
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("case, alpha, cutoff", [(0, 2.0, 0.1), (1, 0.5, 0.3), (2, 0.0, 0.1)])
def test_scores_equal_the_authors(recorded, case, alpha, cutoff):
    damro = DAMRO(alpha, 3, cutoff)
    out = contrast(recorded["z"], recorded["z2"], damro.a, damro.b, damro.cutoff)
    assert torch.equal(out.isinf(), recorded[f"out_{case}"].isinf()) and out.isinf().any()
    torch.testing.assert_close(out, recorded[f"out_{case}"], atol=1e-5, rtol=1e-5)


def test_the_choice_follows_the_patches():
    torch.manual_seed(0)
    attention, features = torch.rand(2, 12), torch.randn(2, 12, 4)
    order = torch.randperm(12)
    assert torch.equal(
        select_outliers(features[:, order], attention[:, order], 4), select_outliers(features, attention, 4)
    )


# ---- in a model

pytest.importorskip("transformers")


@pytest.fixture
def case():
    from hooks.llava import IMAGE_ID, outspoken_llava

    model, inputs = outspoken_llava()
    with torch.no_grad():
        for name, p in model.model.vision_tower.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(20)
    return model, inputs, TokenTypes(IMAGE_ID)


def outlier_branch(model, inputs, k, head_merge, repeats=1):
    """The second branch by hand: features of the chosen patches, projected, between the prompt's halves."""
    tower = model.model.vision_tower
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        layer = tower.encoder.layers[-2]
        read = layer.layer_norm1(states[0])
        q, key = layer.self_attn.q_proj(read), layer.self_attn.k_proj(read)
        if head_merge == "concat":
            attention = torch.softmax(q @ key.transpose(1, 2) / 4, -1)[:, 0, 1:]
        else:
            q, key = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, key))
            attention = torch.softmax(q @ key.transpose(-1, -2) / 8**0.5, -1)[:, :, 0, 1:].mean(1)
        features = states[-2][:, 1:]
        chosen = attention.argsort(1, descending=True)[:, :k]
        images = model.model.multi_modal_projector(torch.stack([f[c] for f, c in zip(features, chosen, strict=True)]))

    def other(ids):
        rows = []
        for row, image in zip(ids, images.repeat_interleave(repeats, 0), strict=True):
            row = row[row != 0]
            at = (row == 62).nonzero().flatten()
            text = model.get_input_embeddings()(row)
            embeds = torch.cat([text[: at[0]], image, text[at[-1] + 1 :]])
            with torch.no_grad():
                rows.append(model(inputs_embeds=embeds[None]).logits[:, -1])
        return torch.cat(rows)

    return other


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("head_merge", ["concat", "mean"])
def test_decoding_equals_two_models(case, mode, head_merge):
    model, inputs, rule = case
    rows = mode.get("num_beams", 1)
    other = outlier_branch(model, inputs, 2, head_merge, rows)
    want = generated(model, inputs, mode, processor=Scratch(other, 2.5, -1.5, 0.1, beams=rows))
    plain = generated(model, inputs, mode)
    damro = DAMRO(1.5, 2, 0.1, head_merge=head_merge)
    with attnlib.attach(model, damro, token_types=rule):
        equal(generated(model, inputs, mode), want, atol=1e-5)
    assert damro.forwards == 5 and not torch.equal(want[0], plain[0])
    equal(generated(model, inputs, mode), plain, atol=0)
    q_proj = model.model.vision_tower.encoder.layers[-2].self_attn.q_proj
    assert not q_proj._forward_hooks and not model._forward_pre_hooks


def test_several_images_each_keep_their_outliers():
    from hooks.pictures import IMAGE_ID, TOKENS, picture_inputs, picture_model

    model = picture_model()
    inputs = picture_inputs(images=(2, 1))
    tower = model.model.vision_tower
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        layer = tower.encoder.layers[-2]
        read = layer.layer_norm1(states[-3])
        q, k = layer.self_attn.q_proj(read), layer.self_attn.k_proj(read)
        chosen = (q[:, :1] @ k.transpose(1, 2))[:, 0, 1:].argsort(1, descending=True)[:, :3]
        images = model.model.multi_modal_projector(states[-2][:, 1:])
        kept = [image[some] for image, some in zip(images, chosen, strict=True)]
        pieces, number = [], 0
        for row in inputs["input_ids"]:
            row, parts = row[row != 0], []
            for run in torch.split(row, [1] * len(row)):
                parts.append(model.get_input_embeddings()(run) if run != IMAGE_ID else None)
            embeds, i = [], 0
            while i < len(parts):
                if parts[i] is None:
                    embeds.append(kept[number])
                    number, i = number + 1, i + TOKENS
                else:
                    embeds.append(parts[i])
                    i += 1
            pieces.append(model(inputs_embeds=torch.cat(embeds)[None]).logits[:, -1])
        other = torch.cat(pieces)
        z = model(**inputs).logits[:, -1]
        with attnlib.attach(model, DAMRO(1.0, 3, 0.0), token_types=TokenTypes(IMAGE_ID)) as session:
            got = session.logits(inputs["input_ids"], model(**inputs).logits[:, -1])
    torch.testing.assert_close(got, 2 * z - other, atol=1e-5, rtol=1e-5)


def test_all_tokens_in_place_are_the_model(case):
    model, inputs, rule = case
    plain = generated(model, inputs)
    with attnlib.attach(model, DAMRO(2.0, 4, 0.0, order="place"), token_types=rule):
        equal(generated(model, inputs), plain, atol=1e-5)
    with attnlib.attach(model, DAMRO(0.0, 2, 0.3), token_types=rule) as session:
        got, sequences = generated(model, inputs)
        assert session.results["damro"]["forwards"] == 0
    assert torch.equal(sequences, plain[1]) and got.isinf().any()
    with attnlib.attach(model, DAMRO(0.0, 2, 0.0), token_types=rule) as session:
        assert session.interventions[0].identity
        equal(generated(model, inputs), plain, atol=0)
    with attnlib.attach(model, DAMRO(3.0, 2, 1.0), token_types=rule):
        assert torch.equal(generated(model, inputs)[1], plain[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_largest_embeddings_where_there_is_no_encoder(family):
    model = language_model(family)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    inputs = prompt()
    ids = inputs["input_ids"]
    ids[ids == 61] = 7
    ids[:, 7:11] = torch.tensor([50, 51, 52, 53])
    types = TokenTypes([50, 51, 52, 53])(ids)
    types[inputs["attention_mask"] == 0] = 0
    types[:, :7], types[:, 11:] = types[:, :7].clamp(max=1), 1
    norms = model.get_input_embeddings().weight[50:54].norm(dim=-1).argsort(descending=True)[:2] + 50

    def other(tokens):
        out = []
        for row, start in zip(tokens, (5, 0), strict=True):
            some = torch.cat([row[start:7], norms, row[11:]])
            with torch.no_grad():
                out.append(model(input_ids=some[None]).logits[:, -1])
        return torch.cat(out)

    want = generated(model, inputs, processor=Scratch(other, 3.0, -2.0, 0.1))
    with attnlib.attach(model, DAMRO(2.0, 2, 0.1, score="norm"), token_types=types):
        equal(generated(model, inputs), want, atol=1e-5)


def test_it_composes_with_a_compressed_cache_and_leaves_text_alone(case):
    model, inputs, rule = case
    with attnlib.attach(model, SnapKV(cap=10, window_size=3, kernel_size=3), DAMRO(1.0, 2), token_types=rule):
        got, _ = generated(model, inputs)
    with attnlib.attach(model, DAMRO(1.0, 2), token_types=rule):
        full, _ = generated(model, inputs)
        text = {n: t for n, t in inputs.items() if n != "pixel_values"}
        text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == 62, 9)
        spoken = generated(model, text)
    assert not got.isnan().any() and torch.equal(got[0], full[0]) and not torch.equal(got, full)
    equal(generated(model, text), spoken, atol=0)


def test_refusals(case):
    model, inputs, rule = case
    for kwargs, match in (
        ({"alpha": -1.0}, "alpha must not be negative"),
        ({"k": 0}, "k must be at least 1"),
        ({"cutoff": 2.0}, r"cutoff must lie in \[0, 1\]"),
        ({"score": "size"}, "score='size'"),
        ({"head_merge": "max"}, "head_merge='max'"),
    ):
        with pytest.raises(ValueError, match=match):
            DAMRO(**kwargs)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, DAMRO())
    with pytest.raises(ValueError, match="no vision tower"):
        attnlib.attach(language_model(), DAMRO(), token_types=rule)
    with pytest.raises(ValueError, match="layer 5 of the vision tower"):
        attnlib.attach(model, DAMRO(layer=5), token_types=rule)
    with attnlib.attach(model, DAMRO(1.0, 10), token_types=rule), pytest.raises(ValueError, match="an image has 4"):
        generated(model, inputs)
    with pytest.raises(ValueError, match="between 1 and the 3 patches"):
        select_outliers(torch.zeros(1, 3, 2), torch.zeros(1, 3), 4)
    with pytest.raises(ValueError, match="do not fit attention"):
        select_outliers(torch.zeros(1, 5, 2), torch.zeros(1, 3), 2)


def test_a_class_token_among_the_image_tokens_and_line_breaks():

    from hooks.llava import llava, llava_inputs

    model = llava()
    model.config.vision_feature_select_strategy = "full"
    inputs = llava_inputs(model)
    inputs["input_ids"][:, 7] = 62  # five tokens per image, the class token first
    rule = TokenTypes(62)
    plain = generated(model, inputs)
    with attnlib.attach(model, DAMRO(2.0, 5, 0.0, order="place"), token_types=rule):
        equal(generated(model, inputs), plain, atol=1e-5)
    with attnlib.attach(model, DAMRO(2.0, 4, 0.0, order="place"), token_types=rule) as session:
        seen = []
        session.hook(
            model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
        )
        generated(model, inputs, new=1)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, *range(8, 14)])  # all but the class token
    assert torch.equal(seen[1]["inputs_embeds"], seen[0]["inputs_embeds"][:, kept])
    # Theirs counts outliers from the class token: every kept token is its left neighbour.
    with attnlib.attach(model, DAMRO(2.0, 2, 0.0, compat="authors"), token_types=rule) as session:
        seen = []
        session.hook(
            model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
        )
        generated(model, inputs, new=1)
    with torch.no_grad():
        tower = model.model.vision_tower
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        layer = tower.encoder.layers[-2]
        read = layer.layer_norm1(states[-3])
        attention = class_attention(layer.self_attn.q_proj(read), layer.self_attn.k_proj(read), 2, 1.0, "concat")
        theirs = model.model.multi_modal_projector(select_outliers(states[-2], attention, 2, compat="authors"))
    torch.testing.assert_close(seen[1]["inputs_embeds"][:, 3:5], theirs, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="compat"):
        DAMRO(compat="paper")


def anyres():
    """LLaVA-NeXT: a whole view of 2 x 2 patches, then crops with a line break behind every row of theirs."""
    import transformers as hf

    from hooks.llava import llava

    model = llava()
    torch.manual_seed(0)
    config = hf.LlavaNextConfig(
        text_config=model.config.text_config, vision_config=model.config.vision_config, image_token_id=62,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8]], vision_feature_select_strategy="default",
    )  # fmt: skip
    model = hf.LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
        for name, p in model.model.vision_tower.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(20)
    ids = torch.randint(3, 60, (2, 20))
    ids[0, :4], ids[0, 6:16], ids[1, 2:16] = 0, 62, 62  # 4 + 2 * 3 and 4 + 2 * 5 tokens
    crops = {"pixel_values": torch.randn(2, 3, 3, 8, 8), "image_sizes": torch.tensor([[8, 8], [8, 16]])}
    return model, {"input_ids": ids, "attention_mask": (ids != 0).long(), **crops}


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=str)
def test_images_cut_into_crops_as_the_authors_pack_them(mode):
    """Outliers of the whole view and a line break; theirs packs nothing else."""
    model, inputs = anyres()
    tower = model.model.vision_tower
    with torch.no_grad():
        whole = inputs["pixel_values"][:, 0]
        states = tower(whole, output_hidden_states=True).hidden_states
        layer = tower.encoder.layers[-2]
        read = layer.layer_norm1(states[-3])
        attention = class_attention(layer.self_attn.q_proj(read), layer.self_attn.k_proj(read), 2, 1.0, "concat")
        kept = model.model.multi_modal_projector(select_outliers(states[-2][:, 1:], attention, 2))
        line = model.model.image_newline.expand(2, 1, -1)
        pictures = torch.cat([kept, line], 1)
    rows = mode.get("num_beams", 1)

    def other(ids):
        out = []
        for row, picture in zip(ids, pictures.repeat_interleave(rows, 0), strict=True):
            row = row[row != 0]
            at = (row == 62).nonzero().flatten()
            text = model.get_input_embeddings()(row)
            embeds = torch.cat([text[: at[0]], picture, text[at[-1] + 1 :]])
            with torch.no_grad():
                out.append(model(inputs_embeds=embeds[None]).logits[:, -1])
        return torch.cat(out)

    want = generated(model, inputs, mode, processor=Scratch(other, 2.5, -1.5, 0.1, beams=rows))
    rule = TokenTypes(62)
    with attnlib.attach(model, DAMRO(1.5, 2, 0.1), token_types=rule):
        equal(generated(model, inputs, mode), want, atol=1e-5)
    with attnlib.attach(model, DAMRO(1.5, 5), token_types=rule), pytest.raises(ValueError, match="has 4 patches"):
        generated(model, inputs)
    inputs["input_ids"][1, 9] = 5  # one image in two pieces
    inputs["input_ids"][1, 16] = 62
    with attnlib.attach(model, DAMRO(1.5, 2), token_types=rule), pytest.raises(ValueError, match="runs of image"):
        generated(model, inputs)


def test_an_encoder_without_class_token_is_refused():
    import transformers as hf

    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = language_model().config
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=62, image_seq_length=4,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="no class token"):
        attnlib.attach(model, DAMRO(), token_types=TokenTypes(62))
    from hooks.llava import llava_inputs

    with attnlib.attach(model, DAMRO(1.0, 2, score="norm"), token_types=TokenTypes(62)) as session:
        generated(model, llava_inputs(model))
        assert session.results["damro"]["forwards"] == 5
