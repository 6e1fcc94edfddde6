"""UniFormerV2: what its card asks; it starts as the image model, looks along time, and one token reads the clip."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.uniformerv2 import clip_weights, from_clip
from attnlib.models.build import load_pretrained, model_entry
from tests.parity import Models

TINY = dict(patch_size=4, embed_dim=16, depth=3, num_heads=2, global_layers=(1, 2), num_classes=5, img_size=16)


def tiny(name="uniformerv2_b16", **settings):
    """With numbers in all that starts at zero."""
    torch.manual_seed(0)
    model = attnlib.create_model(name, **{**TINY, **settings}).double().eval()
    for _, p in sorted(model.named_parameters()):
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return model


def clips(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clip_encoder(**settings):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=16)
    model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes, patch_size=4, **settings)).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


# ---- sizes


def test_counts_of_its_card():
    million = {n: round(model_entry(n).params / 1e6, 3) for n in attnlib.list_models("uniformerv2*")}
    assert million["uniformerv2_b16"] == 114.552 and million["uniformerv2_b16_ssv2"] == 162.993
    assert round(million["uniformerv2_l14"], 1) == 354.1


# ---- it starts as the mean of what the image model says of the frames


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("stride", "local"), [(1, 0), (1, 2), (2, 1)])
def test_it_starts_as_the_frame_averaged_image_model(stride, local, act):
    clip = clip_encoder(hidden_act=act)
    model = from_clip(clip, local=local, temporal_stride=stride, num_classes=4).eval()
    x = clips(2, 3, 5, 16, 16)
    with torch.no_grad():
        frames = [clip(x[:, :, t]).last_hidden_state[:, 0] for t in range(0, 5, stride)]
        mean = torch.stack(frames).mean(0)
        torch.testing.assert_close(2 * model.forward_features(x), mean, atol=1e-9, rtol=1e-9)
        # The head's norm takes the half away, but for what it adds to the variance.
        torch.testing.assert_close(model(x), model.forward_head(mean), atol=1e-4, rtol=1e-4)
        first = model.forward_intermediates(x, [0], output_fmt="NLC", intermediates_only=True)[0]
        layers = [clip(x[:, :, t], output_hidden_states=True).hidden_states[1][:, 1:] for t in range(0, 5, stride)]
        torch.testing.assert_close(first, torch.cat(layers, 1), atol=1e-9, rtol=1e-9)


def test_every_weight_of_clip_is_accounted_for():
    clip = clip_encoder()
    model = attnlib.create_model("uniformerv2_b16", **TINY, mlp_ratio=2.5).double()
    state = clip.state_dict()
    load_pretrained(model, clip_weights(state, model))
    with pytest.raises(ValueError, match="does not have: mine"):
        clip_weights({**state, "mine": torch.zeros(1)}, model)
    lacking = {k: v for k, v in state.items() if "pre_layrnorm" not in k}
    with pytest.raises(ValueError, match=r"2 entries of the model need: pre_norm.bias"):
        clip_weights(lacking, model)
    with pytest.raises(ValueError, match="of image has shape"):
        clip_weights(state, attnlib.create_model("uniformerv2_b16", **TINY, mlp_ratio=2.0))
    with pytest.raises(ValueError, match="does not have"):
        clip_weights(state, attnlib.create_model("uniformerv2_b16", **{**TINY, "depth": 2, "global_layers": ()}))


def test_what_is_no_clip_encoder():
    with pytest.raises(TypeError, match="CLIPVisionModel of transformers"):
        from_clip(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="depth, patch_size cannot be set"):
        from_clip(clip_encoder(), depth=2, patch_size=8)


def test_with_a_projection_and_text_beside_it():
    hf = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = hf.CLIPConfig(
        text_config=dict(**sizes, vocab_size=20), vision_config=dict(**sizes, image_size=16, patch_size=4)
    )
    whole = hf.CLIPModel(config).double().eval()
    x = clips(1, 3, 2, 16, 16)
    with torch.no_grad():
        frames = [whole.vision_model(x[:, :, t]).last_hidden_state[:, 0] for t in range(2)]
    torch.testing.assert_close(2 * from_clip(whole).eval().forward_features(x), torch.stack(frames).mean(0))


# ---- along time


def test_a_relation_along_time_reaches_three_frames_of_one_place():
    model = tiny(local=1)
    block = model.stages[0]
    nn.init.zeros_(block.mixer.inner.proj.weight)
    layout, x = model._layout((2, 3)), clips(1, 6, 1 + 6, 16)
    moved = x.clone()
    moved[0, 3, 1 + 4] += 1
    with torch.no_grad():
        changed = (block(moved, layout=layout)[0] - block(x, layout=layout)[0]).abs().amax(-1)[0] > 1e-12
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[2:5, 1 + 4] = True
    assert torch.equal(changed, expected)


def test_without_positions_of_time_the_order_of_frames_is_nothing():
    model, x = tiny(), clips(2, 3, 5, 16, 16)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x[:, :, order]))
        for reader in model.reader.readers:
            nn.init.zeros_(reader.position.conv.weight)
        torch.testing.assert_close(model(x), model(x[:, :, order]))


def test_one_token_reads_all_tokens_of_all_frames():
    """The oracle: a loop over heads, of one query."""
    model = tiny()
    reader, layout = model.reader.readers[0], model._layout((2, 3))
    x, token = clips(1, 2, 1 + 6, 16), clips(1, 1, 16, seed=2)
    y = x.clone()
    for c in range(16):
        patches = x[0, :, 1:, c].view(1, 1, 2, 2, 3)
        conv = nn.functional.conv3d(patches, reader.position.conv.weight[c : c + 1], padding=1)
        y[0, :, 1:, c] += conv.view(2, 6) + reader.position.conv.bias[c]
    keys = reader.context_norm(y).view(14, 16)
    a, heads = reader.attention, []
    query = a.q(reader.norm(token))[0, 0]
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        weights = torch.softmax(a.k(keys)[:, part] @ query[part] / 8**0.5, 0)
        heads.append(weights @ a.v(keys)[:, part])
    read = token[0, 0] + a.proj(torch.cat(heads))
    mlp = reader.mlp.inner
    hidden = mlp.fc1(reader.mlp.norm(read))
    expected = read + mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(reader(token, x, None, layout)[0, 0], expected)


# ---- what the head reads


def test_shares_of_the_token_and_of_the_frames():
    model, x = tiny(), clips(1, 3, 3, 16, 16)
    with torch.no_grad():
        model.reader.balance.fill_(40)
        frames = tiny(global_layers=())
        frames.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("reader.")})
        torch.testing.assert_close(model(x), frames(x))
        model.reader.balance.fill_(-40)
        token = model.forward_features(x)
        frozen = tiny("uniformerv2_l14_336_frozen", **TINY)
        frozen.load_state_dict({k: v for k, v in model.state_dict().items() if k != "reader.balance"})
        torch.testing.assert_close(frozen.forward_features(x), token)


def test_a_frozen_image_model_is_not_trained():
    model = tiny("uniformerv2_l14_336_frozen", **TINY)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"reader", "head"}
    model(clips(1, 3, 2, 16, 16)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_maps_need_no_reader():
    maps = tiny(features_only=True, local=2, temporal_stride=2)
    assert not [n for n, _ in maps.named_parameters() if "reader" in n or "head" in n]
    assert [t.shape for t in maps(clips(2, 3, 5, 18, 24))] == [(2, 16, 3, 5, 6)] * 3
    model, x = tiny(), clips(1, 3, 2, 16, 16)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    final, all_maps = model.forward_intermediates(x)
    assert final.shape == (1, 2, 17, 16) and [t.shape for t in all_maps] == [(1, 16, 2, 4, 4)] * 3


# ---- any clip


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 4, 4), (2, 17, 9), (5, 30, 16)])
def test_clips_of_any_length_and_form(size, stride):
    model = tiny(local=2, temporal_stride=stride)
    assert model(clips(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_pixels_and_frames_that_do_not_exist_change_nothing(train, stride):
    x = clips(2, 3, 6, 16, 24)
    valid = torch.zeros(2, 6, 16, 24, dtype=torch.bool)
    valid[0, :4, :8, :16] = valid[1] = True
    given = x.masked_fill(~valid[:, None], float("nan"))
    off = dict(drop_rate=0.0, global_drop_rate=0.0)
    first, second = (tiny(local=2, temporal_stride=stride, **off).train(train) for _ in range(2))
    torch.testing.assert_close(first(given, valid), second(x, valid))


def test_a_padded_clip_is_the_shorter_clip():
    model, x = tiny(local=2), clips(1, 3, 5, 16, 16)
    valid = torch.zeros(1, 5, 16, 16, dtype=torch.bool)
    valid[:, :3] = True
    with torch.no_grad():
        torch.testing.assert_close(model(x, valid), model(x[:, :, :3]))
        assert not torch.allclose(model(x), model(x[:, :, :3]))


# ---- weights and their start


def test_the_wrapper_of_released_weights_is_taken_off():
    recorded = Models("uniformerv2")
    model = recorded.build_model("motion")
    wrapped = {f"backbone.{name}": value for name, value in recorded.weights("motion").items()}
    again = recorded.build_model("motion", wrapped)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_what_starts_at_zero_and_how_the_rest_starts():
    torch.manual_seed(0)
    model = attnlib.create_model("uniformerv2_b16_ssv2", **{**TINY, "embed_dim": 64})
    assert {n.split(".", 2)[-1] for n, p in model.named_parameters() if n.endswith("weight") and not p.any()} == {
        "before.inner.proj.weight", "between.inner.proj.weight", "1.attention.proj.weight", "1.mlp.inner.fc2.weight",
        "0.attention.proj.weight", "0.mlp.inner.fc2.weight",
    }  # fmt: skip
    assert not model.reader.video_token.any() and not model.reader.balance.any()
    for attention in (model.stages[0].mixer.inner, model.reader.readers[0].attention):
        assert attention.k.weight.std().item() == pytest.approx((2 / (4 * 64)) ** 0.5, rel=0.05)
        assert not attention.k.bias.any() and not attention.proj.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.reader.readers[0].mlp.inner.fc1.weight.std().item() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.05)
    assert model.head.fc.weight.std().item() == pytest.approx((1 / 3 / 64) ** 0.5, rel=0.1)
    x = torch.randn(2, 3, 4, 16, 16)
    model.train()(x).square().sum().backward()
    assert model.stages[0].before.inner.proj.weight.grad.abs().max() > 0
    assert model.reader.readers[0].attention.proj.weight.grad.abs().max() > 0


def test_another_mechanism_within_frames():
    model = tiny(mechanism="softmax-attention", mechanism_settings={"qk_norm": True})
    assert model(clips(1, 3, 2, 16, 16)).shape == (1, 5)
    with pytest.raises(ValueError, match="no layout"):
        tiny(mechanism=lambda place: attnlib.create("focalnet", dim=place.dim))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(global_layers=(2, 1)), "global_layers must be blocks from 0 to 2, ascending"),
        (dict(global_layers=(3,)), "global_layers"), (dict(local=3), "local"), (dict(temporal_stride=3), "temporal"),
        (dict(frozen=True, local=1), "frozen=True"), (dict(frozen=True, global_layers=()), "frozen=True"),
        (dict(activation="relu"), "activation"), (dict(reduction=0.5), "reduction"),
        (dict(reduction=17), "reduction"), (dict(global_pool="avg"), "global_pool"), (dict(img_size=3), "img_size"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_images_and_small_frames_are_refused():
    with pytest.raises(ValueError, match=r"clips \(B, 3, T, H, W\)"):
        tiny()(clips(1, 3, 16, 16))
    with pytest.raises(ValueError, match="at least one patch of 4 x 4"):
        tiny()(clips(1, 3, 2, 3, 16))
    with pytest.raises(TypeError, match="reads clips"):
        tiny().with_patches(2)
