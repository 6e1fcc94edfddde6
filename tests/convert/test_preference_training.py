"""Preference training on vision-language models of transformers: rows, references, adapters, and what is refused."""

import copy
import random

import numpy as np
import pytest
import torch

from attnlib.convert import preference
from attnlib.convert.preference import MaskedAttention, MeanBlocks, MeanPixels, Read, dpo, opa_dpo, rdpo

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from hooks.llava import llava  # noqa: E402

TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0)  # fmt: skip
IMAGE = 62


def qwen(seed=0):
    if not hasattr(hf, "Qwen2VLTextConfig"):
        pytest.skip("this release of transformers has another configuration of Qwen2-VL")
    torch.manual_seed(seed)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    vision = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
                  temporal_patch_size=2, in_channels=3)  # fmt: skip
    config = hf.Qwen2VLConfig(
        text_config=dict(**TEXT, bos_token_id=1, eos_token_id=None, rope_parameters=rope), vision_config=vision,
        image_token_id=IMAGE, video_token_id=61, vision_start_token_id=60, vision_end_token_id=59,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config).eval()


def pixels(family, seed):
    g = torch.Generator().manual_seed(seed)
    if family == "llava":
        return {"pixel_values": torch.randn(1, 3, 8, 8, generator=g)}
    return {"pixel_values": torch.randn(16, 96, generator=g), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def make(family):
    return {"llava": llava, "qwen": qwen}[family]()


def draw(g, n):
    return torch.randint(3, 58, (n,), generator=g).tolist()


def pairs_of(family, count=3, pad=0):
    out = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        ids = torch.tensor([*[0] * pad, *draw(g, 2 + i), 60, *[IMAGE] * 4, 59, *draw(g, 2)])[None]
        mask = torch.ones_like(ids)
        mask[:, :pad] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, **pixels(family, i)}
        if family == "qwen":
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        spoken = {"chosen": draw(g, 2 + i), "rejected": draw(g, 4 - i), "standard": draw(g, 3)}
        weights = {"severity": {"rejected": [2.0] * (4 - i)}, "image": {"chosen": [3.0] * (2 + i)}}
        out.append(preference.Preference(inputs, spoken, {"retrieved": pixels(family, 10 + i)}, weights))
    return out


FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen"])
FAST = dict(rank=2, batch_size=2)


def one_by_one(model, pair, response, image=None):
    """The oracle: the plain model on one unpadded row."""
    inputs = {**pair.inputs, **(image or {})}
    keep = inputs["attention_mask"][0].bool()
    ids = torch.tensor(pair.responses[response])
    row = torch.cat([inputs["input_ids"][0][keep], ids])[None]
    more = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = (row == IMAGE).long()
    with torch.no_grad():
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), **more).logits[0]
    return logits.log_softmax(-1)[-len(ids) - 1 : -1].gather(1, ids[:, None]).squeeze(1)


@FAMILIES
def test_rows_of_a_batch_read_as_each_alone_also_with_left_padding(family):
    model = make(family)
    for pad in (0, 3):
        pairs = pairs_of(family, pad=pad)
        made, recipe = preference.to_pairs(pairs, rdpo())
        batch = preference.Collator(recipe, preference.About.of(model))(made)
        with torch.no_grad():
            found = preference.read_batch(model, recipe, batch)
        for read, value in found.items():
            for i, pair in enumerate(pairs):
                image = pair.images["retrieved"] if read.image == "retrieved" else None
                expected = one_by_one(model, pair, read.response, image)
                ours = value[i][batch["valid"][read.response][i]]
                torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


@FAMILIES
def test_hidden_image_tokens_keep_positions(family):
    """Hiding none is the plain image; hiding all equals a model whose image tokens hold anything else."""
    model = make(family)
    made, recipe = preference.to_pairs(pairs_of(family), rdpo(image=MaskedAttention(0.0)))
    found = []
    for ratio in (0.0, 1.0):
        recipe = rdpo(image=MaskedAttention(ratio))
        batch = preference.Collator(recipe, preference.About.of(model))(made)
        with torch.no_grad():
            found.append(preference.read_batch(model, recipe, batch))
    plain, hidden = Read("chosen", MaskedAttention(0.0)), Read("chosen", MaskedAttention(1.0))
    torch.testing.assert_close(found[0][plain], found[0][Read("chosen")], atol=1e-6, rtol=1e-5)
    other = [preference.Preference({**p.inputs, **pixels(family, 99)}, p.responses) for p in pairs_of(family)]
    made, recipe = preference.to_pairs(other, rdpo(image=MaskedAttention(1.0)))
    with torch.no_grad():
        again = preference.read_batch(model, recipe, preference.Collator(recipe, preference.About.of(model))(made))
    here = torch.stack([torch.arange(4) < 2 + i for i in range(3)])
    torch.testing.assert_close(again[hidden][here], found[1][hidden][here], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[1][hidden][here], found[0][plain][here], atol=1e-4)


@FAMILIES
@pytest.mark.parametrize("recipe", ["opa-dpo", "rdpo"])
def test_training_starts_at_log_2_and_prefers(family, recipe, tmp_path):
    model, pairs = make(family), pairs_of(family, 2, pad=2)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    kept = copy.deepcopy(pairs)
    wanted = opa_dpo(image_coefficient=1.0, anchor_coefficient=0.0) if recipe == "opa-dpo" else recipe
    out = preference.train(
        model, pairs, wanted, steps=5, align_steps=2, lr=2e-2, align_lr=1e-3, dropout=0.0,
        arguments={"warmup_steps": 0}, **FAST,
    )  # fmt: skip
    assert torch.get_rng_state().equal(states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    for a, b in zip(kept, pairs, strict=True):
        assert all(torch.as_tensor(v).equal(torch.as_tensor(b.inputs[k])) for k, v in a.inputs.items())
    first, last = out.history[0], out.history[-1]
    for name in out.terms:
        assert first[name] == pytest.approx(0.693147, abs=1e-5), name
    assert last["loss"] < first["loss"] and last.get("margin/text", 1.0) > 0, last
    assert len(out.alignment) == (2 if recipe == "opa-dpo" else 0) and not out.model.training
    # The adapter alone is saved, and loaded on a fresh base.
    out.save(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 100_000
    made, used = preference.to_pairs(pairs, rdpo())
    batch = preference.Collator(used)(made)
    with torch.no_grad():
        ours = preference.read_batch(out.model, used, batch)
        again = preference.read_batch(preference.load(make(family), tmp_path), used, batch)
        assert all(ours[r].equal(again[r]) for r in ours)
        moved = preference.evaluate(out.model, pairs, used)
        assert moved["loss"] != pytest.approx(2 * 0.693147, abs=1e-4)
        back = out.restore()
        assert back is model and all(v.equal(plain[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
        theirs = preference.read_batch(model, used, batch)
    assert not any(theirs[r].equal(ours[r]) for r in ours)


def test_short_margin_of_the_image_grows():
    """The card's small run: log p(chosen | v) - log p(chosen | v~) of a model that sees."""
    model, pairs = llava(), pairs_of("llava", 2)
    with torch.no_grad():
        for p in model.model.multi_modal_projector.parameters():
            p.mul_(20)

    def margin(model):
        made, recipe = preference.to_pairs(pairs, rdpo())
        batch = preference.Collator(recipe)(made)
        with torch.no_grad():
            found = preference.read_batch(model, recipe, batch)
        here = batch["valid"]["chosen"]
        return float(((found[Read("chosen")] - found[Read("chosen", "retrieved")]) * here).sum())

    before = margin(model)
    # At twice the rate, or after 20 steps, it grows or not by rounding alone; so it comes to 2 or more.
    out = preference.train(model, pairs, rdpo(beta=0.5), steps=60, lr=1e-2, dropout=0.0, **FAST)
    assert margin(out.model) > before + 1


def test_opa_dpo_without_the_standard_answer_leaves_its_terms_out():
    pairs = [preference.Preference(p.inputs, {k: v for k, v in p.responses.items() if k != "standard"})
             for p in pairs_of("llava", 2)]  # fmt: skip
    out = preference.train(llava(), pairs, recipe="opa-dpo", steps=1, align_steps=1, **FAST)
    assert out.terms == ["revised", "revised-image", "anchor-revised", "anchor-revised-image"]


def test_an_adapter_that_came_with_the_model_is_the_reference():
    model = llava()
    first = preference.train(model, pairs_of("llava", 2), "sft", steps=3, lr=1e-2, **FAST)
    start = {k: v.clone() for k, v in first.model.state_dict().items()}
    out = preference.train(first.model, pairs_of("llava", 2), "opa-dpo", steps=2, lr=1e-2, **FAST)
    assert out.model is first.model and not out.alignment and list(out.model.peft_config) == ["default"]
    assert out.history[0]["revised"] == pytest.approx(0.693147, abs=1e-5)
    assert set(out.model.state_dict()) == set(start)
    assert any(not v.equal(start[k]) for k, v in out.model.state_dict().items())


def test_text_alone_with_dropout_and_half_precision():
    sizes = dict(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).eval()
    pairs = [{"input_ids": [3, 4, 5], "chosen": [6, 7], "rejected": [8]}] * 2
    out = preference.train(model, pairs, "dpo", steps=3, lr=1e-2, **FAST)
    assert out.history[0]["text"] == pytest.approx(0.693147, abs=1e-5) and out.history[-1]["margin/text"] > 0
    assert model.transformer.drop.p == 0.1 and not model.training
    half = preference.train(llava().bfloat16(), pairs_of("llava", 2), "dpo", steps=3, lr=1e-2, **FAST)
    assert half.history[0]["text"] == pytest.approx(0.693147, abs=1e-5) and half.history[-1]["loss"] < 0.69


def test_reading_the_reference_leaves_the_policy_as_it_was():
    model = preference.train(llava(), pairs_of("llava", 2), dpo(), steps=2, lr=1e-2, **FAST).model.train()
    from attnlib.convert.preference.reference import freeze_copy

    freeze_copy(model, "default")
    flags = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for given in ("reference", None):
        held = preference.Reference(model, given)
        with pytest.raises(RuntimeError, match="stop"), held.reading(model) as other:
            assert other is model and not model.training and not torch.is_grad_enabled()
            raise RuntimeError("stop")
        assert model.training and model.active_adapter == "default" and torch.is_grad_enabled()
        assert [p.requires_grad for p in model.parameters()] == flags
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())


def test_whole_weights_against_a_frozen_copy_and_a_trainer_of_ones_own(tmp_path):
    model = llava()
    frozen = copy.deepcopy(model)
    out = preference.train(model, pairs_of("llava", 2), "dpo", adapter=False, reference=frozen, steps=3, lr=1e-3,
                           batch_size=2)  # fmt: skip
    assert out.model is model and out.history[-1]["margin/text"] > 0
    args = hf.TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True,
                                save_strategy="no", gradient_accumulation_steps=2,
                                per_device_train_batch_size=1)  # fmt: skip
    runner = preference.trainer(model, pairs_of("llava", 2), dpo(), args, reference=frozen)
    runner.train()
    assert runner.evaluate(runner.train_dataset)["eval_loss"] < 0.7


@pytest.mark.parametrize("variant", [MeanPixels(0.5), MeanBlocks(0.5, 4), MaskedAttention(0.5)])
@FAMILIES
def test_variants_change_one_image_and_draw_from_their_own_generator(family, variant):
    model, pairs = make(family), pairs_of(family, 2)
    made, recipe = preference.to_pairs(pairs, rdpo(image=variant))
    about = preference.About.of(model)
    state = torch.get_rng_state()
    batches = [preference.Collator(recipe, about, generator=torch.Generator().manual_seed(s))(made) for s in (1, 1, 2)]
    assert torch.get_rng_state().equal(state)
    key = "attention_mask" if isinstance(variant, MaskedAttention) else "pixel_values"
    a, b, c = (x["rows"]["1"][key] for x in batches)
    assert a.equal(b) and not a.equal(c)
    given = torch.cat([p.inputs["pixel_values"] for p in pairs])
    assert batches[0]["rows"]["0"]["pixel_values"].equal(given.repeat(2, *[1] * (given.dim() - 1)))
    if key == "attention_mask":
        assert int((batches[0]["rows"]["1"]["exists"] - a).sum()) == 4


# --------------------------------------------------------------------------------------------------------------------
# Refused


def test_references_that_are_none_are_refused():
    model, pairs = llava(), pairs_of("llava", 2)
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "vocab_size": 65}))
    for given, message in (
        (None, "share the weights that are trained"), (model, "shares modules"),
        (other, "other vocabularies: 64 and 65"), ("sft", "no adapter of the model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            preference.train(model, pairs, adapter=False, reference=given, steps=1)
    tied = copy.deepcopy(model)
    tied.lm_head.weight = model.lm_head.weight
    with pytest.raises(ValueError, match=r"share weights that are trained: \['lm_head.weight'\]"):
        preference.train(model, pairs, adapter=False, reference=tied, steps=1)
    with pytest.raises(TypeError, match="reference must be"):
        preference.train(model, pairs, adapter=False, reference=3, steps=1)
    with pytest.raises(ValueError, match="needs adapter=True"):
        preference.train(model, pairs, "opa-dpo", adapter=False, reference=copy.deepcopy(model))
    with pytest.raises(ValueError, match="reference"):
        preference.evaluate(model, pairs)


def test_a_model_is_as_it_was_after_a_refusal():
    model = llava()
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    for settings, error in (
        (dict(adapter="lora"), TypeError), (dict(rank=0), ValueError), (dict(lr=-1.0), ValueError),
        (dict(steps=0), ValueError), (dict(arguments={"no_such": 1}), TypeError), (dict(recipe="rpo"), ValueError),
        (dict(reference="x"), ValueError), (dict(align=True), ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            preference.train(model, pairs_of("llava", 2), **settings)
        assert list(model.state_dict()) == names and [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(TypeError, match="model must be"):
        preference.train("llava", pairs_of("llava", 1))
    with pytest.raises(ValueError, match="holds no adapter"):
        preference.load(model, "/nowhere")


def test_texts_go_through_the_processor():
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", "what", "a", "cat", "dog", "mat"])} | {
        "<image>": IMAGE
    }
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )

    class Processor:
        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, text, images=None, return_tensors="pt"):
            out = dict(tokenizer(text.replace("<image>", "<image> " * 4), return_tensors=return_tensors))
            return {**out, "pixel_values": images}

    pair = {"prompt": "<image> what", "image": torch.randn(1, 3, 8, 8), "chosen": "a cat", "rejected": "a dog",
            "retrieved": torch.randn(1, 3, 8, 8)}  # fmt: skip
    made, _ = preference.to_pairs([pair], rdpo(), Processor(), 64)
    assert made[0].responses["chosen"].tolist() == [4, 5, 1] and len(made[0].inputs["input_ids"]) == 5
    out = preference.train(llava(), [pair] * 2, "rdpo", processor=Processor(), steps=1, **FAST)
    assert out.history[0]["image"] == pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(ValueError, match="'chosen' is empty"):
        preference.to_pairs([{**pair, "chosen": " "}], rdpo(), Processor(), 64)
    with pytest.raises(ValueError, match="equals the rejected one"):
        preference.to_pairs([{**pair, "chosen": "a dog"}], rdpo(), Processor(), 64)
