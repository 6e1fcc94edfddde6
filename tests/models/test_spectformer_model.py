"""SpectFormer: what its card asks of the plain and of the hierarchical models."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.spectformer import FilterBlock
from attnlib.models.build import load_pretrained, model_entry
from attnlib.nn.modulation.spectformer import SpectralGating

PLAIN = dict(patch_size=4, embed_dim=12, depth=3, num_heads=2, alpha=1, num_classes=5, img_size=24)
H = dict(
    embed_dims=(8, 12, 16, 20), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), mlp_ratios=(2, 2, 2, 2), stem_dim=4,
    num_classes=5, img_size=64,
)  # fmt: skip


def plain(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("spectformer_ti", **{**PLAIN, **settings}).eval()
    for gate in (part for part in m.modules() if isinstance(part, SpectralGating)):
        nn.init.normal_(gate.filter, 0, 0.5)
    return m


def hierarchical(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("spectformer_h_s", **{**H, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_of_the_card():
    names = ("ti", "xs", "s", "b", "h_s", "h_b", "h_l")
    counts = [round(model_entry(f"spectformer_{n}").params / 1e6, 3) for n in names]
    assert counts == [9.158, 20.029, 32.450, 57.160, 21.778, 32.540, 54.163]
    with torch.device("meta"):
        models = [attnlib.create_model(f"spectformer_h_{n}", token_label=True) for n in "sbl"]
        filters = [s.blocks[0].mixer.inner.filter.shape[2:] for s in models[0].stages[:2]]
    assert [round(sum(p.numel() for p in m.parameters()) / 1e6, 3) for m in models] == [22.227, 33.053, 54.676]
    assert [tuple(f) for f in filters] == [(56, 29), (28, 15)]
    assert model_entry("spectformer_b").settings["num_heads"] == 8


def test_without_filters_it_is_a_vision_transformer():
    m, x = plain(alpha=0), images(2, 3, 24, 24)
    vit = attnlib.create_model(
        "vit_tiny_patch16_224", patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=5, img_size=24,
        class_token=False, global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    vit.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), vit(x))


def test_with_filters_alone_it_is_gfnet():
    m, x = plain(alpha=3).double(), images(2, 3, 24, 24).double()

    def norm(t, layer):
        return nn.functional.layer_norm(t, (12,), layer.weight, layer.bias, 1e-6)

    y = nn.functional.conv2d(x, m.stem.proj.weight, m.stem.proj.bias, stride=4) + m.pos_embed
    y = y.permute(0, 2, 3, 1)
    for block in m.stages:
        z = torch.fft.rfft2(norm(y, block.norm1), dim=(1, 2), norm="ortho")
        z = z * torch.complex(*block.inner.filter).permute(1, 2, 0)
        z = norm(torch.fft.irfft2(z, s=(6, 6), dim=(1, 2), norm="ortho"), block.norm2)
        z = nn.functional.gelu(z @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        y = y + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    logits = norm(y, m.norm).mean((1, 2)) @ m.head.fc.weight.T + m.head.fc.bias
    torch.testing.assert_close(m(x), logits)
    assert [isinstance(b, FilterBlock) for b in plain(alpha=2).stages] == [True, True, False]


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_any_size(size):
    if min(size) >= 4:
        maps = plain().forward_intermediates(images(2, 3, *size), intermediates_only=True)
        assert all(t.shape[2:] == (9, 13) and t.isfinite().all() for t in maps)
    maps = hierarchical().forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((4, 8, 16, 32), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


def test_other_sizes_are_refused_where_filters_are_not_resampled():
    for m, side in ((plain(resample=False), 24), (hierarchical(resample=False), 64)):
        m(images(1, 3, side, side))
        with pytest.raises(ValueError, match="resample=True"):
            m(images(1, 3, side, side + 32))


def test_filters_and_positions_of_another_size_are_interpolated():
    assert len(load_pretrained(plain(img_size=48), plain().state_dict()).resized) == 2
    assert len(load_pretrained(hierarchical(img_size=96), hierarchical().state_dict()).resized) == 2


@pytest.mark.parametrize("make", [plain, hierarchical])
@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(make, train):
    x = images(2, 3, 64, 48)
    valid = torch.zeros(2, 64, 48, dtype=torch.bool)
    valid[0, :32, :40] = valid[1] = True
    first, second = make().train(train), make().train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))


def test_labels_of_tokens():
    m, x = hierarchical(token_label=True), images(2, 3, 64, 96)
    logits, tokens = m.head.train()(m.forward_features(x))
    assert logits.shape == (2, 5) and tokens.shape == (2, 6, 5)
    torch.testing.assert_close(m.eval()(x), logits + 0.5 * tokens.amax(1))
    with pytest.raises(ValueError, match="token_label=True"):
        theirs = {"aux_head.weight": torch.zeros(5, 20), "head.weight": torch.zeros(5, 20)}
        load_pretrained(hierarchical(), theirs)


def test_the_class_token_starts_as_the_mean():
    head, x = hierarchical().double().head, images(2, 2, 3, 20).double()
    for p in (*head.attn.proj.parameters(), *head.mlp.fc2.parameters()):
        nn.init.zeros_(p)
    torch.testing.assert_close(head(x), head.fc(head.norm(x.mean((1, 2)))))


def test_another_mechanism_and_bad_settings():
    for make in (plain, hierarchical):
        assert make(mechanism="softmax-attention")(images(1, 3, 24, 24)).shape == (1, 5)
    for make, settings, message in (
        (plain, dict(alpha=4), "alpha"), (plain, dict(num_heads=5), "num_heads"), (plain, dict(resample=1), "resample"),
        (hierarchical, dict(spectral_stages=5), "spectral_stages"), (hierarchical, dict(mlp_ratios=(2,)), "mlp_ratios"),
        (hierarchical, dict(global_pool="avg"), "global_pool"), (hierarchical, dict(token_label=2), "token_label"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            make(**settings)
