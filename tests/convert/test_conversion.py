"""Models that exist, converted: trained to agree, generating with and without a cache, saved, loaded and given back."""

import copy
import json

import pytest
import torch

import attnlib
from attnlib import convert
from attnlib.convert.agreement import call_model, prediction_of
from attnlib.convert.saved import MODEL_TYPE
from attnlib.convert.swap import validity
from attnlib.hooks.hf.names import cache_argument
from attnlib.models.tiny import TinyBackbone
from attnlib.nn.linear.hedgehog import HedgehogHeads
from attnlib.nn.linear.lolcats import LoLCATsHeads

transformers = pytest.importorskip("transformers")
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def ids(batch=2, length=14, pad=(4, 0), seed=1):
    torch.manual_seed(seed)
    found = torch.randint(3, 60, (batch, length))
    for row, count in enumerate(pad):
        found[row, :count] = 0
    return {"input_ids": found, "attention_mask": (found != 0).long()}


def sharp(model):
    """Random weights attend almost evenly; larger ones choose."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                p.mul_(10)
    return model.eval()


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SMALL | dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None) | changes
    )
    return sharp(transformers.LlamaForCausalLM(config))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    torch.manual_seed(0)
    return sharp(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)))


def vit():
    torch.manual_seed(0)
    config = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    return sharp(transformers.ViTForImageClassification(transformers.ViTConfig(**config, image_size=16, patch_size=4)))


def decoder():
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM

    torch.manual_seed(0)
    return DecoderForCausalLM(DecoderConfig(**SMALL, pad_token_id=0)).eval()


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16,
        attention_head_dim=8, norm_num_groups=4,
    ).eval()  # fmt: skip


def backbone():
    torch.manual_seed(0)
    return TinyBackbone(16, 2, lambda: attnlib.create("softmax-attention", dim=16, num_heads=2)).eval()


def noise():
    torch.manual_seed(2)
    return {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }  # fmt: skip


def pixels():
    torch.manual_seed(2)
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


MODELS = {
    "llama": (llama, ids, "lolcats", dict(window_size=4)),
    "gpt2": (gpt2, ids, "hedgehog", {}),
    "bert": (bert, ids, "hedgehog", {}),
    "vit": (vit, pixels, "hedgehog", dict(features="exp")),
    "decoder": (decoder, ids, "lolcats", dict(window_size=4)),
    "unet": (unet, noise, "hedgehog", {}),
    "backbone": (backbone, lambda: torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3)), "hedgehog", {}),
}
AUTO = {
    "llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM", "decoder": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification",
}  # fmt: skip


@torch.no_grad()
def predict(model, batch):
    return prediction_of(call_model(model, batch))


@pytest.mark.parametrize("name", MODELS)
def test_trains_and_is_given_back_bit_for_bit(name):
    make, batch, to, settings = MODELS[name]
    model, batch = make(), batch()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    before = predict(model, batch)
    conversion = convert.linearize(model, to, **settings)
    assert not torch.equal(predict(model, batch), before)
    for losses in ({"mse": 1000.0}, {"xent": 1.0}, ["features", "prediction"]):
        found = conversion.fit([batch] * 6, loss=losses)
        assert found[-1] < found[0]
    found = conversion.fit([batch] * 6, blocks=2)
    assert found[-1] < found[0]
    base = {k: v for k, v in model.state_dict().items() if k in kept}
    assert all(torch.equal(v, kept[k]) for k, v in base.items())  # only mixers were trained
    conversion.restore()
    assert model.state_dict().keys() == kept.keys()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(predict(model, batch), before)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_merge_and_go(name):
    pytest.importorskip("peft")
    make, batch, to, settings = MODELS[name]
    model, batch = make(), batch()
    kept, before = {k: v.clone() for k, v in model.state_dict().items()}, predict(model, batch)
    attributes = set(vars(model))
    conversion = convert.linearize(model, to, **settings)
    conversion.lora(rank=2, alpha=4)
    assert all("lora_" in n for n, p in model.named_parameters() if any(p is t for t in conversion.trained("adapters")))
    conversion.fit([batch] * 4, loss="prediction")
    adapted = predict(model, batch)
    conversion.merge()
    assert set(vars(model)) == attributes
    torch.testing.assert_close(predict(model, batch), adapted, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(v, kept[k]) for k, v in model.state_dict().items() if k in kept)
    conversion.restore()
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert torch.equal(predict(model, batch), before)


@pytest.mark.parametrize("name", AUTO)
def test_saved_models_load_as_any_other(name, tmp_path):
    make, batch, to, settings = MODELS[name]
    model, batch = make(), batch()
    conversion = convert.linearize(model, to, **settings)
    if name == "llama":
        conversion.fit([batch], loss="xent")
    want = predict(model, batch)
    conversion.save(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["model_type"] == MODEL_TYPE and config["attnlib_conversion"]["model_type"] == model.config.model_type
    loaded = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "one").eval()
    assert isinstance(loaded, type(model)) and torch.equal(predict(loaded, batch), want)
    loaded.save_pretrained(tmp_path / "two")
    again = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "two").eval()
    assert torch.equal(predict(again, batch), want)
    with pytest.raises(ValueError, match="converted already"):
        convert.linearize(loaded, to)


@pytest.mark.parametrize("name", ["unet", "backbone"])
def test_other_models_load_into_one_built_alike(name, tmp_path):
    make, batch, to, settings = MODELS[name]
    model, batch = make(), batch()
    conversion = convert.linearize(model, to, **settings, tie_features=True)
    conversion.fit([batch] * 2)
    conversion.save(tmp_path)
    other = make()
    convert.load(other, tmp_path)
    other.load_state_dict(model.state_dict())
    assert torch.equal(predict(other, batch), predict(model, batch))


def test_a_loaded_base_model_has_the_same_mixers(tmp_path):
    model = llama()
    conversion = convert.linearize(model, "hedgehog")
    conversion.save(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    got, want = base(**ids()).last_hidden_state, model.model(**ids()).last_hidden_state
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "decoder"])
@pytest.mark.parametrize("to", ["hedgehog", "lolcats", "elu1", "window"])
def test_generates_alike_with_and_without_a_cache(name, to):
    model = MODELS[name][0]()
    settings = dict(window_size=5) if to in ("lolcats", "window") else {}
    convert.linearize(model, to, **settings)
    logits = []
    for cache in (True, False):
        call = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
        out = model.generate(**ids(), **call, output_logits=True, return_dict_in_generate=True)
        logits.append(torch.stack(out.logits))
        out = model.generate(**ids(), **call, num_beams=3)
        logits.append(out)
    torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits[1], logits[3])


@pytest.mark.parametrize("settings", [dict(window="terraced"), dict(consistent=True, affine=True, tie_features=True)])
def test_every_window_generates_saves_and_loads(settings, tmp_path):
    model = llama()
    conversion = convert.linearize(model, "lolcats", window_size=4, **settings)
    conversion.fit([ids()] * 2)
    call = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    want = model.generate(**ids(), **call)
    assert torch.equal(model.generate(**ids(), **call, use_cache=False), want)
    conversion.save(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(**ids(), **call), want)


def test_blocks_are_trained_in_runs_on_the_original_s_hidden_states():
    model, batch = llama(num_hidden_layers=3), ids()
    seen = {}
    for n in (1, 2, 3):
        conversion = convert.linearize(model, "lolcats", window_size=4)
        torch.manual_seed(0)
        for p in conversion.trained():
            torch.nn.init.normal_(p, std=0.3)
        # Runs of so many: hidden states behind each run against the original's, from the original's before it.
        blocks = model.model.layers
        with torch.no_grad():
            for socket in conversion.swap.sockets.values():
                socket.original = True
            hidden = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
            for socket in conversion.swap.sockets.values():
                socket.original = False
            position = torch.arange(14)[None]
            angles = model.model.rotary_emb(hidden[0], position)
            exists = batch["attention_mask"].bool()
            allowed = exists[:, None, None] & torch.ones(14, 14, dtype=torch.bool).tril()
            truth = [*hidden[:3], None]
            final = blocks[2]
            for socket in conversion.swap.sockets.values():
                socket.original = True
            truth[3] = final(hidden[2], attention_mask=allowed, position_embeddings=angles)
            for socket in conversion.swap.sockets.values():
                socket.original = False
            errors = []
            for start in range(0, 3, n):
                x = truth[start]
                for block in blocks[start : start + n]:
                    x = block(x, attention_mask=allowed, position_embeddings=angles)
                end = truth[min(start + n, 3)]
                errors.append(((x - end)[exists].square().mean() / end[exists].square().mean()).item())
        found = conversion.fit([batch], blocks=n)
        seen[n] = found[0]
        assert found[0] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        conversion.restore()
    assert len(set(seen.values())) == 3


def test_states_do_not_grow():
    from transformers import DynamicCache

    model = llama()
    convert.linearize(model, "lolcats", window_size=4)
    sizes = []
    for length in (9, 40):
        cache = DynamicCache(config=model.config)
        model(**ids(length=length, pad=(0, 0)), **cache_argument(model, cache), use_cache=True)
        assert cache.get_seq_length() == length
        sizes.append([tuple(t.shape) for layer in cache.layers for t in layer.state.tensors.values()])
    assert sizes[0] == sizes[1]


def test_part_of_the_layers_keep_softmax():
    model, batch = llama(), ids()
    conversion = convert.linearize(model, "hedgehog", layers=[1])
    assert [site.layer for site in conversion.swap.sites] == [1]
    a = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(a, model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False))


def test_a_window_as_long_as_the_text_is_the_original():
    model, batch = llama(), ids()
    want = predict(model, batch)
    convert.linearize(model, "lolcats", window_size=14)
    exists = batch["attention_mask"].bool()
    torch.testing.assert_close(predict(model, batch)[exists], want[exists], atol=1e-4, rtol=1e-4)


def test_training_goes_on_where_it_stopped(tmp_path):
    batches = [ids(seed=seed) for seed in range(5)]
    whole = convert.linearize(llama(), "hedgehog")
    want = whole.fit(batches, loss="xent", steps=8, schedule="plateau")

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 5:
            raise Stop

    file = tmp_path / "training.pt"
    first = convert.linearize(llama(), "hedgehog")
    with pytest.raises(Stop):
        first.fit(batches, loss="xent", steps=8, schedule="plateau", checkpoint=file, every=2, progress=stop)
    second = convert.linearize(llama(), "hedgehog")
    seen = []
    got = second.fit(
        batches, loss="xent", steps=8, schedule="plateau", checkpoint=file, every=2,
        progress=lambda step, loss: seen.append(step),
    )  # fmt: skip
    assert got == want and seen == [5, 6, 7, 8]
    for a, b in zip(whole.trained(), second.trained(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another training"):
        second.fit(batches, loss="mse", steps=8, checkpoint=file)


def test_the_report_says_how_close_it_stayed():
    model, batch = llama(), ids()
    conversion = convert.linearize(model, "hedgehog")
    before = conversion.report([batch])
    conversion.fit([batch] * 30, loss="xent")
    after = conversion.report([batch])
    assert len(after.layers) == 2 and after.trained == sum(p.numel() for p in conversion.trained())
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new["divergence"] < old["divergence"] and abs(new["teacher_entropy"] - old["teacher_entropy"]) < 1e-6
    assert after.model["divergence"] < before.model["divergence"]
    assert json.loads(json.dumps(after.to_dict()))["to"] == "hedgehog" and "self_attn" in str(after)


def test_teachers_are_the_original_after_merging():
    pytest.importorskip("peft")
    model, batch = llama(), ids()
    want = convert.linearize(model, "hedgehog")
    first = want.report([batch]).model["teacher_loss"]
    want.lora(rank=2)
    want.fit([batch] * 5, loss="task", lr=0.1)
    want.merge()
    report = want.report([batch]).model
    assert report["teacher_loss"] == first and report["loss"] < first


@pytest.mark.parametrize("make", [llama, decoder])
def test_training_everything_is_taken_back(make):
    model, batch = make(), ids()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with convert.linearize(model, "elu1") as conversion:
        with pytest.raises(ValueError, match="nothing to train"):
            conversion.fit([batch])
        conversion.fit([batch] * 2, loss="task", train="all", lr=1e-3)
        assert any(not torch.equal(v, kept[k]) for k, v in model.state_dict().items() if k in kept)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_copies_and_pickles_are_models_of_their_own(tmp_path):
    model, batch = llama(), ids()
    conversion = convert.linearize(model, "hedgehog")
    want = predict(model, batch)
    other = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    conversion.restore()
    assert torch.equal(predict(other, batch), want)
    assert torch.equal(predict(torch.load(tmp_path / "model.pt", weights_only=False), batch), want)


def test_another_implementation_stays_converted():
    model, batch = llama(), ids()
    convert.linearize(model, "hedgehog")
    want = predict(model, batch)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(predict(model, batch), want)


def test_interventions_act_on_converted_layers():
    from attnlib.hooks import Intervention

    class Nothing(Intervention):
        name = "nothing"

        def on_output(self, site, out):
            return out * 0

    model, batch = llama(), ids()
    convert.linearize(model, "hedgehog")
    want = predict(model, batch)
    with attnlib.attach(model, Nothing()):
        assert not torch.equal(predict(model, batch), want)
    assert torch.equal(predict(model, batch), want)


def test_mixers_of_one_s_own(tmp_path):
    model, batch = llama(), ids()
    made = convert.swap(model, lambda site: LoLCATsHeads(site.heads, site.head_dim, site.kv_heads, window_size=3), [0])
    assert list(made.sockets) == ["model.layers.0.self_attn"]
    with pytest.raises(ValueError, match="attnlib.convert.target"):
        convert.Conversion(made, "mine").save(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(TypeError, match="HeadMixer"):
        convert.swap(model, lambda site: torch.nn.Identity(), [1])
    made.restore()
    predict(model, batch)


@pytest.mark.parametrize("valid", [None, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_are_read_as_order_and_padding(valid, causal):
    exists = None if valid is None else torch.tensor([valid, [1] * 6]).bool()
    allowed = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    if exists is not None:
        allowed = allowed & exists[:, None, None]
    for mask in (allowed, torch.zeros(2, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)):
        found = validity(mask, 6, 0, causal, "here")
        assert found is None if exists is None else torch.equal(found, exists)
    window = allowed & torch.ones(6, 6, dtype=torch.bool).triu(-2)
    with pytest.raises(ValueError, match="hides more"):
        validity(window, 6, 0, causal, "here")
    with pytest.raises(ValueError, match="bias"):
        validity(torch.randn(2, 1, 6, 6), 6, 0, causal, "here")


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="to must be one of|'to'|to="):
        convert.linearize(llama(), "nothing")
    with pytest.raises(ValueError, match="cannot become 'lolcats'.*not possible"):
        convert.linearize(bert(), "lolcats")
    with pytest.raises(ValueError, match="layers holds 7"):
        convert.linearize(llama(), layers=[7])
    model = llama()
    conversion = convert.linearize(model)
    with pytest.raises(ValueError, match="converted already"):
        convert.linearize(model)
    with pytest.raises(ValueError, match="loss"):
        conversion.fit([ids()], loss="nothing")
    with pytest.raises(ValueError, match="lora"):
        conversion.fit([ids()], loss="task", train="adapters")
    with pytest.raises(ValueError, match="merge"):
        conversion.merge()
    with pytest.raises(ValueError, match="steps"):
        conversion.fit(iter([ids()]))
    with pytest.raises(ValueError, match="ran out"):
        conversion.fit(iter([ids()]), steps=3)
    conversion.restore()
    with pytest.raises(ValueError, match="restored"):
        conversion.fit([ids()])
    with pytest.raises(ValueError, match="restored"):
        conversion.save(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    linear = TinyBackbone(16, 1, lambda: attnlib.create("lightning-attention-2", dim=16, num_heads=2))
    with pytest.raises(ValueError, match="no layer that can be converted"):
        convert.linearize(linear)
    with pytest.raises(ValueError, match="holds .* keys, from before"):
        model = llama()
        out = model(**ids(), use_cache=True)
        convert.linearize(model)
        cache = getattr(out, "cache", None) or out.past_key_values
        model(ids()["input_ids"][:, :1], use_cache=True, **cache_argument(model, cache))


@pytest.mark.parametrize(
    "heads", [HedgehogHeads(4, 4, 2), LoLCATsHeads(4, 4, 2, window_size=3)], ids=["hedgehog", "lolcats"]
)
def test_maps_and_steps_of_mixers_agree_with_their_outputs(heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 4), torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :3] = False
    rows = valid[:, None].expand(-1, 4, -1)
    out, none = heads(q, k, v, valid=valid)
    mixed = heads.weights(q, k, valid=valid) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(mixed[rows], out[rows], atol=1e-6, rtol=1e-5)
    state, steps = None, []
    for t in range(9):
        now = slice(t, t + 1)
        y, state = heads(q[:, :, now], k[:, :, now], v[:, :, now], valid=valid[:, now], state=state, keep=True)
        steps.append(y)
    assert none is None and state["tokens"].tolist() == [6, 9]
    torch.testing.assert_close(torch.cat(steps, 2)[rows], out[rows], atol=1e-6, rtol=1e-5)
