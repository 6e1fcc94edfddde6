"""ViT: tokens beside the patches, positions of any grid, patches of any size, timm's interface."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnlib
from attnlib.models.build import load_pretrained, resampled_patch
from tests.parity import HERE, Models

TINY = dict(embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5, img_size=32, patch_size=8)


def tiny(name="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loaded(case="plain", **settings):
    """Ours with the recorded model's weights."""
    recorded = Models("vit")
    model = attnlib.create_model(recorded.config[case]["model"], **{**recorded.config[case]["settings"], **settings})
    load_pretrained(model, recorded.weights(case))
    return model.eval()


# ---- timm's interface


def test_what_timm_models_answer_to():
    m, x = tiny(reg_tokens=2), images(2, 3, 33, 40)
    features = m.forward_features(x)
    assert features.shape == (2, 1 + 2 + 5 * 5, 24) and m.num_features == 24 and m.num_prefix_tokens == 3
    torch.testing.assert_close(m.forward_head(features), m(x))
    torch.testing.assert_close(m.forward_head(features, pre_logits=True), features[:, 0])
    assert [f["reduction"] for f in m.feature_info] == [8, 8] and m.get_classifier() is m.head.fc
    last, maps = m.forward_intermediates(x, norm=True)
    torch.testing.assert_close(last, features)
    assert [tuple(t.shape) for t in maps] == [(2, 24, 5, 5)] * 2
    ((patches, prefix),) = m.forward_intermediates(
        x, 1, norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    torch.testing.assert_close(torch.cat([prefix, patches], 1), features)
    (first,) = m.forward_intermediates(x, [0], stop_early=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(first.permute(0, 3, 1, 2), m.forward_intermediates(x, [0], intermediates_only=True)[0])
    names = {n.rpartition(".")[2] for n in m.no_weight_decay()}
    assert names == {"cls_token", "reg_token", "pos_embed", "prefix_pos_embed"}
    m.reset_classifier(3, "avg")
    torch.testing.assert_close(m.forward_head(features, pre_logits=True), features[:, 3:].mean(1))
    m.reset_classifier(0, "")
    torch.testing.assert_close(m(x), features)
    with pytest.raises(ValueError, match="global_pool"):
        tiny(class_token=False, global_pool="avg").reset_classifier(3, "token")


def test_features_only_gives_maps():
    m, x = tiny(), images(1, 3, 32, 24)
    f = tiny(features_only=True, out_indices=[0])
    assert len(f.model.stages) == 1 and f.feature_info.module_name() == ["stages.0"]
    torch.testing.assert_close(f(x)[0], m.forward_intermediates(x, [0], intermediates_only=True)[0])
    assert [tuple(t.shape) for t in tiny(features_only=True, class_token=False, global_pool="avg")(x)] == [
        (1, 24, 4, 3)
    ] * 2


def test_checkpointing_changes_nothing():
    m, x = tiny().train(), images(2, 3, 24, 24)
    grads = []
    for on in (False, True):
        m.set_grad_checkpointing(on)
        m.zero_grad()
        m(x).square().sum().backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_it_compiles():
    m, x = tiny(depth=1), images(1, 3, 16, 16)
    torch.testing.assert_close(torch.compile(m, backend="eager", fullgraph=True)(x), m(x))


# ---- any size


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (64, 17)])
@pytest.mark.parametrize("more", [{}, dict(class_token=False, global_pool="max"), dict(reg_tokens=1, positions="none")])
def test_any_size_from_one_patch_up(size, more):
    y = tiny(**more)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


@pytest.mark.parametrize("pool", ["token", "avg", "max"])
def test_pixels_that_do_not_exist_change_nothing(pool):
    m, x = tiny(global_pool=pool, positions="none"), images(2, 3, 32, 32)
    valid = torch.zeros(2, 32, 32, dtype=torch.bool)
    valid[0, :16, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x.masked_fill(~valid[:, None], 7.0), valid))
    torch.testing.assert_close(m(other, valid)[:1], m(x[:1, :, :16, :24]))


# ---- weights


def test_weights_at_another_size_give_what_interpolating_in_the_call_gives():
    """The table is interpolated once when it is loaded, or in every call: the same."""
    x = images(1, 3, 56, 56)
    torch.testing.assert_close(loaded(img_size=56)(x), loaded()(x))


def test_other_heads_and_channels(tmp_path):
    m, x = loaded(), images(1, 3, 32, 32)
    save_file({k: v.contiguous() for k, v in m.state_dict().items()}, path := tmp_path / "w.safetensors")
    torch.testing.assert_close(attnlib.create_model("vit_tiny_patch16_224", path, **TINY).eval()(x), m(x))
    grey = attnlib.create_model("vit_tiny_patch16_224", path, **{**TINY, "num_classes": 2}, in_chans=1).eval()
    torch.testing.assert_close(
        grey.forward_features(x[:, :1]), m.forward_features(x[:, :1].expand(1, 3, 32, 32)), atol=1e-5, rtol=1e-4
    )
    assert grey(x[:, :1]).shape == (1, 2)


def test_positions_that_are_no_square_are_refused():
    weights = Models("vit").weights("plain")
    with pytest.raises(ValueError, match="no square grid"):
        load_pretrained(tiny(), {**weights, "pos_embed": weights["pos_embed"][:, :-1]})


# ---- patches of another size


@pytest.mark.parametrize("size", [(16, 16), (11, 20)])
def test_larger_patches_keep_the_embedding_of_enlarged_images(size):
    """<x, w> = <B x, pinv(B^T) w>."""
    kernel = images(6, 3, 8, 8).double()
    patch = images(4, 3, 8, 8, seed=2).double()
    larger = torch.nn.functional.interpolate(patch, size, mode="bicubic", antialias=True)
    ours = torch.einsum("oihw,bihw->bo", resampled_patch(kernel, size), larger)
    torch.testing.assert_close(ours, torch.einsum("oihw,bihw->bo", kernel, patch))


def test_smaller_patches_keep_the_embedding_of_enlarged_images_nearly():
    patch = images(64, 3, 8, 8, seed=2).double()
    larger = torch.nn.functional.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    at = torch.linspace(0, 3, 16).double()
    kernel = torch.stack([torch.cos(a * at)[:, None] * torch.cos(b * at) for a in (0, 1, 2) for b in (0, 1)])[:, None]
    kernel = kernel.expand(-1, 3, -1, -1)
    theirs = torch.einsum("oihw,bihw->bo", kernel, larger)
    ours = torch.einsum("oihw,bihw->bo", resampled_patch(kernel, (8, 8)), patch)
    assert (ours - theirs).square().mean() < 0.02 * theirs.square().mean()
    plain = torch.einsum("oihw,bihw->bo", resampled_patch(kernel, (8, 8), "bicubic"), patch)
    assert (plain - theirs).square().mean() > 0.3 * theirs.square().mean()  # fewer pixels, smaller sums


def test_resampled_kernels_are_timms():
    held = load_file(HERE / "patch_kernels.safetensors")
    for i in range(4):
        expected = held[f"{i}/resampled"]
        ours = resampled_patch(held[f"{i}/kernel"], expected.shape[2:])
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_released_weights_at_another_patch_size():
    x = images(1, 3, 32, 32)
    double = torch.nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True)
    same = loaded(patch_size=16, img_size=64)
    assert same.pos_embed.shape == (24, 4, 4) and same(double).shape == (1, 5)
    half = loaded(patch_size=4)
    assert half.pos_embed.shape == (24, 8, 8) and half(x).shape == (1, 5)
    one = tiny(patch_size=1, img_size=8)
    assert one.forward_features(images(1, 3, 8, 8)).shape == (1, 65, 24)
    with pytest.raises(ValueError, match="method="):
        resampled_patch(images(2, 3, 4, 4), (2, 2), "nearest")


@pytest.mark.parametrize("size", [16, 4, 1])
def test_a_copy_with_patches_of_another_size(size):
    """Kernel and positions follow, all else is the same."""
    m, x = loaded(), images(1, 3, 32, 32)
    other = m.with_patches(size)
    grid = 32 // size
    count = sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in m.parameters())
    assert count == 24 * (3 * (size**2 - 8**2) + grid**2 - 4**2)
    assert other(x).shape == (1, 5) and other.feature_info[0]["reduction"] == size
    torch.testing.assert_close(other.stages[1].state_dict(), m.stages[1].state_dict())
    larger = m.with_patches(16, img_size=64)
    double = torch.nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True)
    near = larger.stem(double.permute(0, 2, 3, 1))[0] - m.stem(x.permute(0, 2, 3, 1))[0]
    assert near.abs().mean() < 0.2 * m.stem(x.permute(0, 2, 3, 1))[0].abs().mean()  # patches know no neighbours
    with pytest.raises(ValueError, match="img_size="):
        m.with_patches(64)
    with pytest.raises(ValueError, match="patch_size"):
        m.with_patches(0)


def test_patches_of_one_pixel_are_50176_tokens():
    with torch.device("meta"):
        m = attnlib.create_model("deit_tiny_patch16_224", patch_size=1)
    assert m.pos_embed.shape[1:].numel() == 50_176


# ---- any mechanism


@pytest.mark.parametrize("name", ["softmax-attention", "agent-attention", "dinat", "davit"])
def test_mechanisms_beside_a_class_token(name):
    settings = {
        "dinat": {"kernel_size": 3},
        "agent-attention": {"extra_tokens": 1, "grid": (4, 4), "num_agents": 4},
    }.get(name)
    m = tiny(mechanism=name, mechanism_settings=settings)
    assert m(images(1, 3, 32, 32)).isfinite().all()


def test_mechanisms_of_maps_need_maps():
    with pytest.raises(ValueError, match="class_token=False, reg_tokens=0, global_pool='avg'"):
        tiny(mechanism="biformer")
    m = tiny(mechanism="biformer", class_token=False, global_pool="avg", embed_dim=32, num_heads=2)
    assert m(images(1, 3, 40, 32)).shape == (1, 5)


# ---- how it starts


def test_initial_weights_are_timms():
    m = tiny(embed_dim=96, depth=2, swiglu=True, reg_tokens=8, layer_scale=1e-5, rescale=True)
    inner, mlp = m.stages[1].mixer.inner, m.stages[1].mlp.inner
    assert 0.018 < inner.q.weight.std() < 0.022 and not inner.q.bias.any()
    assert 0.018 < m.pos_embed.std() < 0.022 and m.reg_token.abs().max() < 1e-4
    assert mlp.fc1.weight[192:].abs().max() < 1e-4 and bool((mlp.fc1.bias[192:] == 1).all())
    assert not mlp.fc1.bias[:192].any() and bool((m.stages[0].mixer.scale.gamma == 1e-5).all())
    assert 0.0085 < inner.proj.weight.std() < 0.0115  # 0.02 / sqrt(2 * 2)


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(patch_size=0), "patch_size"),
        (dict(patch_size=64), "must hold at least one patch"),
        (dict(reg_tokens=-1), "reg_tokens"),
        (dict(num_heads=5), "num_heads=5 does not divide"),
        (dict(class_token=False), "global_pool"),
        (dict(positions="some"), "positions"),
        (dict(stem_grad=2.0), "stem_grad"),
        (dict(features_only=True, out_indices=[2]), "names stages that are not there"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_an_image_below_one_patch():
    with pytest.raises(ValueError, match="at least one patch of 8 x 8"):
        tiny()(images(1, 3, 7, 8))


# ---- distillation, dropout


def test_a_distilled_model_reads_two_tokens():
    m, x = tiny("deit_tiny_distilled_patch16_224"), images(2, 3, 33, 40)
    features = m.forward_features(x)
    assert features.shape == (2, 2 + 25, 24) and m.num_prefix_tokens == 2
    first, second = m.head.fc(features[:, 0]), m.head.fc_dist(features[:, 1])
    torch.testing.assert_close(m(x), (first + second) / 2)
    torch.testing.assert_close(m.forward_head(features, pre_logits=True), (features[:, 0] + features[:, 1]) / 2)
    m.set_distilled_training()
    assert m(x).shape == (2, 5)  # in evaluation still their mean
    m.train()
    for a, b in zip(m(x), (first, second), strict=True):
        torch.testing.assert_close(a, b)
    m.set_distilled_training(False)
    torch.testing.assert_close(m(x), (first + second) / 2)
    assert m.get_classifier() == (m.head.fc, m.head.fc_dist)
    assert not torch.equal(m.head.fc.weight, m.head.fc_dist.weight)
    m.reset_classifier(3)
    assert m(x).shape == (2, 3)
    assert "dist_token" in m.no_weight_decay()
    maps = tiny("deit_tiny_distilled_patch16_224").forward_intermediates(x, intermediates_only=True)
    assert maps[0].shape == (2, 24, 5, 5)


def test_another_number_of_classes_gives_both_heads_anew():
    old = tiny("deit_tiny_distilled_patch16_224")
    new = tiny("deit_tiny_distilled_patch16_224", num_classes=7)
    done = load_pretrained(new, old.state_dict())
    assert set(done.dropped) == {f"head.{n}.{k}" for n in ("fc", "fc_dist") for k in ("weight", "bias")}
    torch.testing.assert_close(new.dist_token, old.dist_token)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(distilled=True, global_pool="avg"), "distilled=True reads the class and the distillation token"),
        (dict(distilled=True, class_token=False), "distilled=True reads the class and the distillation token"),
        (dict(pos_drop_rate=1.0), "pos_drop_rate"),
        (dict(proj_drop_rate=-0.1), "proj_drop"),
        (dict(attn_drop_rate=1.5), "attn_drop"),
    ],
)
def test_bad_distillation_and_dropout(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(**settings)


def test_only_a_distilled_model_trains_two_heads():
    with pytest.raises(TypeError, match="distilled=True"):
        tiny().set_distilled_training()


@pytest.mark.parametrize("name", ["pos_drop_rate", "proj_drop_rate", "attn_drop_rate"])
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "eva_giant_patch14_224"])
def test_dropout_acts_in_training_alone(name, model):
    m, plain, x = tiny(model, **{name: 0.4}), tiny(model), images(1, 3, 32, 32)
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), plain(x))
    m.train()
    assert not torch.allclose(m.forward_features(x), m.forward_features(x))
    rates = [part.p for part in m.modules() if isinstance(part, torch.nn.Dropout) and part.p]
    inner = m.stages[0].mixer.inner
    if name == "attn_drop_rate":
        assert inner.attn_drop == 0.4 and not rates
    else:
        assert len(rates) == (1 if name == "pos_drop_rate" else 4)
