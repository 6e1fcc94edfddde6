"""SG-Former: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.models.build import load_pretrained
from attnlib.nn.layers import ConvGroupNorm, masked_group_norm
from tests.parity import Models

TINY = dict(
    embed_dims=(8, 16, 16), depths=(2, 3, 1), num_heads=(2, 2, 4), mlp_ratios=(2, 2, 2), sr_ratios=(8, 2, 1),
    num_classes=5, img_size=32, drop_path_rate=0.0,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("sgformer_s", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_roles_and_ratios():
    with torch.device("meta"):
        m = attnlib.create_model("sgformer_s")
    roles = [[b.mixer.inner.role for b in stage.blocks] for stage in m.stages]
    assert roles == [["hybrid", "guided"], ["hybrid", "guided"] * 2, ["hybrid", "guided"] * 8, ["global"]]
    assert [stage.blocks[0].mixer.inner.sr_ratio for stage in m.stages[:3]] == [8, 4, 2]
    assert [stage.blocks[1].mixer.inner.key_count(n) for stage, n in zip(m.stages, (3136, 784, 196), strict=False)] == [
        60, 60, 147
    ]  # fmt: skip


def test_a_map_of_significance_does_not_outlive_its_stage():
    """An odd depth leaves one over, which the next stage, of other sides, must not take for its own."""
    m = tiny(depths=(1, 2, 1))
    assert m(images(1, 3, 32, 32)).isfinite().all()


def test_the_significance_reaches_the_next_block():
    m = tiny(sr_ratios=(2, 2, 1))
    held = {}
    first, second = (b.mixer.inner for b in m.stages[0].blocks)
    first.register_forward_hook(lambda mod, args, out: held.update(made=out.carry))
    second.register_forward_pre_hook(lambda mod, args, kw: held.update(read=kw["carry"]), with_kwargs=True)
    m(images(1, 3, 32, 32))
    assert held["made"].shape == (1, 8, 8) and held["made"] is held["read"]


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 37)])
def test_any_size(size):
    y = tiny()(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 40, 48)
    valid = torch.zeros(2, 40, 48, dtype=torch.bool)
    valid[0, :24, :28] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    torch.testing.assert_close(m(x, valid)[1], m(x)[1])


def test_maps_of_all_stages_are_normed():
    f = tiny(features_only=True)
    maps = f(images(1, 3, 33, 40))
    assert [tuple(t.shape) for t in maps] == [(1, 8, 9, 10), (1, 16, 5, 5), (1, 16, 3, 3)]
    for t in maps[:2]:
        torch.testing.assert_close(t.mean(1), torch.zeros_like(t[:, 0]), atol=1e-5, rtol=0)


def test_group_norm_of_tokens_that_exist_is_that_of_the_smaller_map():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(2, 8)
    torch.nn.init.normal_(norm.weight)
    x = images(2, 5, 4, 8)
    valid = torch.zeros(2, 5, 4, dtype=torch.bool)
    valid[:, :3, :2] = True
    torch.testing.assert_close(
        masked_group_norm(norm, x, valid)[:, :3, :2], masked_group_norm(norm, x[:, :3, :2], None)
    )
    assert masked_group_norm(norm, x, valid & False).isfinite().all()
    conv = ConvGroupNorm(8, 4, 3, 2)
    torch.testing.assert_close(conv(x, valid)[:, :2, :1], conv(x[:, :3, :2]))


def test_positions_start_as_sines_and_cosines_of_the_column_first():
    m = tiny()
    table = m.stem[1].pos_embed.detach()
    columns, rows = torch.arange(8.0), torch.arange(8.0)
    for i, at in ((0, columns.sin()), (1, (columns / 100).sin()), (2, columns.cos())):
        torch.testing.assert_close(table[i], at.expand(8, 8))
    torch.testing.assert_close(table[4], rows.sin()[:, None].expand(8, 8))
    with pytest.raises(ValueError, match="dim=6 must be a multiple of 4"):
        tiny(embed_dims=(6, 8, 8))


def test_the_table_of_positions_is_interpolated_when_loaded():
    small, large = tiny(), tiny(img_size=64)
    assert load_pretrained(large, small.state_dict()).resized == ["stem.1.pos_embed"]
    grown = torch.nn.functional.interpolate(small.stem[1].pos_embed[None], scale_factor=2, mode="bicubic")[0]
    torch.testing.assert_close(large.stem[1].pos_embed, grown)


def test_maps_read_up_to_the_last_whole_patch_on_request():
    """Where patches divide every map both are one model; elsewhere they differ."""
    ours, theirs = tiny(sr_ratios=(4, 2, 1)), tiny(sr_ratios=(4, 2, 1), compat="authors")
    x = images(1, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))
    x = images(1, 3, 24, 24)
    assert not torch.allclose(ours(x), theirs(x))


def test_released_weights_of_other_models_are_refused():
    with pytest.raises(ValueError, match="does not have"):
        load_pretrained(tiny(), Models("agent-attention").weights("pvt"))


def test_layers_start_as_the_authors():
    m = tiny(embed_dims=(32, 64, 64), depths=(2, 1, 1))
    block = m.stages[1].blocks[0]
    for linear in (block.mixer.inner.proj, block.mlp.inner.fc1, m.head.fc):
        assert 0.018 < linear.weight.std() < 0.022 and not linear.bias.any()
    first, last = m.stem[0].convs[1].conv, m.stages[1].downsample.convs[2].conv
    assert abs(first.weight.std() * (32 * 9 / 2) ** 0.5 - 1) < 0.05
    assert abs(last.weight.std() * (64 / 2) ** 0.5 - 1) < 0.05
    assert abs(block.mlp.inner.dwconv.weight.std() * (9 / 2) ** 0.5 - 1) < 0.1 and not block.mlp.inner.dwconv.bias.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sr_ratios=(8, 2)), "sr_ratios=.*one number for each of 3 stages"),
        (dict(sr_ratios=(3, 2, 1)), "sr_ratio=3"),
        (dict(sr_ratios=(0, 2, 1)), "sr_ratios"),
        (dict(mlp_ratios=4), "mlp_ratios=4"),
        (dict(num_heads=(1, 2, 4)), "does not divide num_heads=1"),
        (dict(num_heads=(3, 2, 4)), "num_heads=3 does not divide"),
        (dict(window_size=0), "at least 1"),
        (dict(compat="theirs"), "compat='theirs'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
