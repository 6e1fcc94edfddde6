"""Which attention becomes what: its own sequence, a joint one, another one, a window; and what is refused by name."""

import pytest
import torch
from test_conversion import SMALL, ids, llama, noise, predict, sharp, unet

from attnlib import convert
from attnlib.convert.agreement import layer_losses, originals
from attnlib.convert.swap import convertible, validity

transformers = pytest.importorskip("transformers")


def bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return sharp(transformers.BartForConditionalGeneration(config))


def mistral(window=4):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **SMALL, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, sliding_window=window
    )
    return sharp(transformers.MistralForCausalLM(config))


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def pair():
    given = ids(length=9)
    return {**given, "decoder_input_ids": ids(length=7, pad=(0, 0), seed=2)["input_ids"]}


def joint():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    ).eval()  # fmt: skip


def latents():
    torch.manual_seed(2)
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1)
    return {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 3, 16),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([0.3, 0.5]), "img_ids": places,
        "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip


CROSS = {
    "bart": (bart, pair, ["model.decoder.layers.0.encoder_attn", "model.decoder.layers.1.encoder_attn"]),
    "unet": (unet, noise, ["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]),
}


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_is_converted_by_path_and_trained_to_agree(name):
    make, batch, paths = CROSS[name]
    model, batch = make(), batch()
    before = predict(model, batch)
    with convert.linearize(model) as plain:  # not by default
        assert not set(paths) & set(plain.swap.sockets)
    with convert.linearize(model, "hedgehog", layers=paths) as conversion:
        assert list(conversion.swap.sockets) == paths
        after = predict(model, batch)
        assert not torch.allclose(after, before, atol=1e-4)
        for loss in ("xent", "mse"):
            history = conversion.fit([batch], loss, steps=30, lr=1e-2)
            assert history[-1] < history[0]
        report = conversion.report([batch])
        assert all(row["divergence"] >= 0 for row in report.layers)
        with originals(conversion.swap):
            torch.testing.assert_close(predict(model, batch), before)
    assert predict(model, batch).equal(before)


def test_heads_of_a_cross_layer_are_the_mixer_over_all_keys_that_exist():
    model, batch = bart(), pair()
    (path,) = CROSS["bart"][2][:1]
    with convert.linearize(model, "hedgehog", layers=[path]) as conversion:
        socket, seen = conversion.swap.sockets[path], {}
        socket.listen = lambda q, k, valid: seen.update(q=q, k=k, valid=valid)
        model(**batch)
        assert seen["q"].shape[2] == 7 and seen["k"].shape[2] == 9
        assert seen["valid"].equal(batch["attention_mask"].bool())
        kept = socket.weights(seen["q"], seen["k"], valid=seen["valid"])
        assert not kept[0, :, :, :4].any() and torch.allclose(kept.sum(-1), torch.ones(()), atol=1e-4)
        # Padding of the keys says nothing about the queries, even where there are as many.
        q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
        assert socket.rows(q, seen["valid"]).all()
        assert layer_losses(socket, ["mse"], q, k, k, seen["valid"], q)["mse"] > 0


def test_cross_layers_generate_alike_with_and_without_a_cache(tmp_path):
    model, batch = bart(), ids(length=9)
    call = dict(max_new_tokens=6, do_sample=False, num_beams=2)
    conversion = convert.linearize(model, "hedgehog", layers=CROSS["bart"][2])
    own = convert.linearize(model, "elu1", layers=["model.decoder.layers.0.self_attn"])
    given = model.generate(**batch, **call)
    assert given.equal(model.generate(**batch, **call, use_cache=False))
    own.restore()
    expected = predict(model, pair())
    conversion.save(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(predict(again, pair()), expected)


def test_joint_attention_is_converted_as_a_whole():
    model, batch = joint(), latents()
    before = predict(model, batch)
    sites, _ = convertible(model)
    assert {site.kind for site in sites} == {"joint"} or len(sites) == 2
    with convert.linearize(model, "hedgehog") as conversion:
        assert len(conversion.swap.sockets) == 2
        assert not torch.allclose(predict(model, batch), before, atol=1e-5)
        history = conversion.fit([batch], "mse", steps=30, lr=1e-2)
        assert history[-1] < history[0]
    assert predict(model, batch).equal(before)


@pytest.mark.parametrize("window", [3, 4])
def test_a_sliding_window_becomes_a_window(window, tmp_path):
    model, batch = mistral(), ids()
    before = predict(model, batch)
    with pytest.raises(ValueError, match="no layer that can be converted.*sliding window of 4 tokens"):
        convert.linearize(model, "window", window_size=window)
    conversion = convert.linearize(model, "window", layers=[0, 1], window_size=window)
    exists = batch["attention_mask"].bool()
    after = predict(model, batch)
    assert torch.allclose(after[exists], before[exists], atol=1e-5) == (window == 4)
    with originals(conversion.swap):
        torch.testing.assert_close(predict(model, batch)[exists], before[exists])
    error = conversion.report([batch]).layers[0]["divergence"]
    assert error == pytest.approx(0, abs=1e-5) if window == 4 else error > 0.01
    call = dict(max_new_tokens=8, do_sample=False)
    given = model.generate(**batch, **call)
    assert given.equal(model.generate(**batch, **call, use_cache=False))
    conversion.save(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(predict(again, batch)[exists], after[exists])


#: Model, layers, target and settings -> what the refusal says.
REFUSED = {
    "a longer window": (mistral, [0], "window", dict(window_size=5), "window of 4 tokens only.*at most 4"),
    "linear for a window": (mistral, [0], "hedgehog", {}, "window of 4 tokens only.*at most 4"),
    "a window and more": (mistral, [0], "lolcats", dict(window_size=2), "window of 4 tokens only.*at most 4"),
    "biases of positions": (
        t5,
        ["decoder.block.0.layer.0.SelfAttention"],
        "hedgehog",
        {},
        "bias of positions|T5ForConditionalGeneration has no attention that can be reached",  # in older releases
    ),
    "causal mixers across": (bart, CROSS["bart"][2][:1], "lolcats", {}, "cannot become 'lolcats'.*not possible"),
    "spans across": (bart, CROSS["bart"][2][:1], "moa-spans", {}, "cannot become 'moa-spans'.*not possible"),
    "codes across": (bart, CROSS["bart"][2][:1], "spt", {}, "cannot become 'spt'.*not possible"),
    "spans over a joint sequence": (joint, None, "moa-spans", {}, "cannot become 'moa-spans'.*not possible"),
    "no such layer": (llama, [7], "hedgehog", {}, "layers holds 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mathematics_does_not_allow_is_refused_by_name(name):
    make, layers, to, settings, says = REFUSED[name]
    model = make()
    state = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=says):
        convert.linearize(model, to, layers=layers, **settings)
    assert state.keys() == model.state_dict().keys()


def test_masks_of_windows_and_of_other_sequences():
    exists = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]).bool()
    near = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2) & exists[:, None, None]
    assert validity(near, 6, 0, True, "here", window=3).equal(exists)
    for other in (2, 4):
        with pytest.raises(ValueError, match="hides more"):
            validity(near, 6, 0, True, "here", window=other)
    keys = exists[:, None, None].expand(-1, -1, 6, -1)
    assert validity(keys, 6, 0, False, "here", cross=True).equal(exists)
    odd = keys.clone()
    odd[0, 0, 1, 3] = False  # of a query that is absent as a key, which says nothing about it as a query
    assert validity(odd, 6, 0, False, "here").equal(exists)
    with pytest.raises(ValueError, match="hides more"):
        validity(odd, 6, 0, False, "here", cross=True)
