"""Agent-PVT, Agent-Swin and Agent-CSWin: what their card asks of the backbones."""

import pytest
import torch

import attnlib
from attnlib.models.backbones.agent import convert_swin
from attnlib.models.build import load_pretrained, resized
from attnlib.nn.dense.attention_lepe import AttentionLePE
from attnlib.nn.layers import PositionTable
from attnlib.nn.partition.cswin import CrossShapedAttention
from attnlib.nn.partition.maxvit import PartitionAttention
from attnlib.nn.reduced.agent_attention import AgentAttention
from tests.parity import Models

TINY = {
    "agent_pvt_tiny": dict(
        embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2, 2), num_agents=(4, 9), sr_ratios=(2, 1)
    ),
    "agent_swin_tiny": dict(
        embed_dim=8, depths=(2, 2), num_heads=(1, 2), mlp_ratio=2.0, num_agents=(4, 9), agent_blocks=(1, None)
    ),
    "agent_cswin_tiny": dict(
        embed_dim=8, depths=(1, 2, 1), num_heads=(2, 2, 2), mlp_ratio=2.0, num_agents=(4, 4, 1),
        agent_split=(3, None, 1), split_size=(1, 2, 7), agent_blocks=(None, 1, 0),
    ),
}  # fmt: skip


def tiny(name, **settings):
    torch.manual_seed(0)
    base = {"num_classes": 5, "img_size": 32, "drop_path_rate": 0.0}
    return attnlib.create_model(name, **{**base, **TINY[name], **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixers(m):
    return [[b.mixer.inner for b in stage.blocks] for stage in m.stages]


def test_where_agents_stand():
    """AAAB, AAMB2 and AABB of the released configurations, and what the other blocks have."""

    def kinds(name, depths, **settings):
        with torch.device("meta"):
            return [[type(x) for x in row] for row in mixers(attnlib.create_model(name, depths=depths, **settings))]

    a, p = AgentAttention, PartitionAttention
    assert kinds("agent_swin_tiny", (1, 1, 1, 2)) == [[a], [a], [a], [p, p]]
    assert kinds("agent_swin_base", (1, 1, 4, 1)) == [[a], [a], [a, a, p, p], [p]]
    assert kinds("agent_cswin_tiny", (1, 1, 2, 1)) == [[a], [a], [CrossShapedAttention] * 2, [AttentionLePE]]
    assert kinds("agent_pvt_tiny", (1, 1, 1, 1)) == [[a]] * 4


def test_windows_of_the_released_sizes():
    with torch.device("meta"):
        for name, side in (("agent_swin_small", 7), ("agent_swin_small_288", 9), ("agent_swin_base_384", 12)):
            rows = mixers(attnlib.create_model(name, depths=(1, 1, 4, 2)))
            assert [x.shift for x in rows[2][2:]] == [(0, 0), (side // 2,) * 2] and rows[3][0].window_size == (
                side,
            ) * 2
            assert rows[0][0].cores[0].grid == (8 * side, 8 * side) and not rows[0][0].windows
            assert [x.num_agents for x in (rows[0][0], rows[1][0])] == [9, 16]


def test_windows_of_agents_are_shifted_in_every_second_block():
    rows = mixers(tiny("agent_swin_tiny", agent_blocks=(None, None), agent_window=4))
    assert [x.shift_size for x in rows[0]] == [(0, 0), (2, 2)] and rows[0][0].windows == ((4, 4),)
    assert [x.shift_size for x in rows[1]] == [(0, 0), (0, 0)] and rows[1][1].windows == ()  # one window
    stripes = mixers(tiny("agent_cswin_tiny"))[0][0]
    assert stripes.windows == ((8, 3), (3, 8))


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 37)])
@pytest.mark.parametrize("name", TINY)
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_pixels_that_do_not_exist_change_nothing(name):
    m, x = tiny(name), images(2, 3, 40, 32)
    valid = torch.zeros(2, 40, 32, dtype=torch.bool)
    valid[0, :24, :20] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    assert not torch.allclose(m(x, valid)[0], m(x)[0])


@pytest.mark.parametrize("name", TINY)
def test_maps_of_all_stages(name):
    f = tiny(name, features_only=True)
    widths = f.feature_info.channels()
    sides = [(9, 10), (5, 5), (3, 3)]
    assert [tuple(t.shape) for t in f(images(1, 3, 33, 40))] == [
        (1, c, *side) for c, side in zip(widths, sides, strict=False)
    ]
    assert f.feature_info.reduction() == [4, 8, 16][: len(widths)]


@pytest.mark.parametrize("name", TINY)
def test_tables_are_interpolated_when_loaded(name):
    """To images twice as large: biases linearly, positions bicubically, as the authors' load_pretrained."""
    small, large = tiny(name), tiny(name, img_size=64)
    done = load_pretrained(large, small.state_dict())
    kinds = {key.rpartition(".")[2] for key in done.resized}
    expected = {"ah_bias", "aw_bias", "ha_bias", "wa_bias"} | ({"pos_embed"} if "pvt" in name else set())
    if name == "agent_swin_tiny":
        assert all("cores" in key for key in done.resized)  # windows stay as they are
    assert kinds == expected
    before, after = small.state_dict(), large.state_dict()
    for key in done.resized:
        if key.endswith("pos_embed"):
            grown = torch.nn.functional.interpolate(before[key][None], scale_factor=2, mode="bicubic")[0]
        else:
            grown = torch.nn.functional.interpolate(before[key], size=after[key].shape[-1], mode="linear")
        torch.testing.assert_close(after[key], grown)


def test_a_table_made_for_another_map_is_the_one_interpolated_when_called():
    small, large = PositionTable(4, (4, 3)), PositionTable(4, (8, 6))
    x = torch.zeros(1, 8, 6, 4)
    with torch.no_grad():
        large.pos_embed.copy_(resized(small.pos_embed, (8, 6)))
    torch.testing.assert_close(small(x)[0], large(x)[0])


def test_constants_of_released_windows_are_left_out():
    recorded = Models("agent-attention")
    weights = recorded.weights("swin")
    mask = {"layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    assert convert_swin({**weights, **mask}).keys() == convert_swin(weights).keys()


@pytest.mark.parametrize("name", TINY)
def test_weights_of_another_host_are_refused(name):
    other = {"agent_pvt_tiny": "swin", "agent_swin_tiny": "cswin", "agent_cswin_tiny": "pvt"}[name]
    with pytest.raises(ValueError, match="does not have|missing"):
        load_pretrained(tiny(name), Models("agent-attention").weights(other))


@pytest.mark.parametrize("name", TINY)
def test_linear_maps_and_tables_start_as_the_authors(name):
    torch.manual_seed(0)
    width = {"embed_dims": (64, 128)} if "pvt" in name else {"embed_dim": 64}
    m = attnlib.create_model(name, **{**TINY[name], **width, "img_size": 32})
    inner = m.stages[1].blocks[0].mixer.inner
    for linear in (inner.qkv, inner.proj, m.stages[1].blocks[0].mlp.inner.fc1, m.head.fc):
        assert 0.019 < linear.weight.std() < 0.021 and not linear.bias.any()
    assert 0.018 < inner.cores[0].an_bias.std() < 0.022
    if "pvt" in name:
        assert 0.018 < m.stem[1].pos_embed.std() < 0.022


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("agent_pvt_tiny", dict(num_agents=(5, 9)), "num_agents=5 is no square"),
        ("agent_pvt_tiny", dict(num_agents=(9,)), "num_agents=.*one number for each of 2 stages"),
        ("agent_pvt_tiny", dict(sr_ratios=(0, 1)), "sr_ratio"),
        ("agent_pvt_tiny", dict(mlp_ratios=8), "mlp_ratios=8 must have one number"),
        ("agent_swin_tiny", dict(agent_blocks=(1,)), "agent_blocks="),
        ("agent_swin_tiny", dict(window_size=0), "window_size"),
        ("agent_swin_tiny", dict(agent_window=0), "window_size=0"),
        ("agent_swin_tiny", dict(num_heads=(3, 2)), "num_heads=3 does not divide"),
        ("agent_cswin_tiny", dict(split_size=(1, 2)), "split_size="),
        ("agent_cswin_tiny", dict(num_heads=(2, 1, 2)), "does not divide num_heads=1"),
        ("agent_cswin_tiny", dict(agent_split=(1,)), "agent_split="),
        ("agent_swin_tiny", dict(img_size=0), "img_size"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **settings)
