"""Agent-DeiT: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.models.build import load_pretrained
from attnlib.nn.dense.softmax_attention import SoftmaxAttention
from attnlib.nn.reduced.agent_attention import AgentAttention

TINY = dict(
    embed_dim=16, depth=3, num_heads=2, patch_size=8, num_agents=4, mlp_ratio=2.0, num_classes=5, img_size=32,
    drop_path_rate=0.0,
)  # fmt: skip


def tiny(name="agent_deit_tiny", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_base_has_agents_in_its_first_four_blocks_only():
    with torch.device("meta"):
        inner = [s.mixer.inner for s in attnlib.create_model("agent_deit_base").stages]
        small = [s.mixer.inner for s in attnlib.create_model("agent_deit_small_448").stages]
    assert [type(m) for m in inner] == [AgentAttention] * 4 + [SoftmaxAttention] * 8
    assert {m.num_agents for m in inner[:4]} == {81} and inner[0].extra_tokens == 1
    assert {(m.num_agents, m.cores[0].grid) for m in small} == {(49, (28, 28))}


@pytest.mark.parametrize("size", [(8, 8), (9, 23), (45, 37)])
def test_any_size_from_one_patch_up(size):
    for m in (tiny(), tiny("agent_deit_base", agent_blocks=1)):
        y = m(images(2, 3, *size))
        assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(agent_blocks=2), images(2, 3, 40, 32)
    valid = torch.zeros(2, 40, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_tables_are_interpolated_when_loaded():
    small, large = tiny(), tiny(img_size=64)
    done = load_pretrained(large, small.state_dict())
    assert {k.rpartition(".")[2] for k in done.resized} == {"pos_embed", "ah_bias", "aw_bias", "ha_bias", "wa_bias"}
    before, after = small.state_dict(), large.state_dict()
    grown = torch.nn.functional.interpolate(before["pos_embed"][None], scale_factor=2, mode="bicubic")[0]
    torch.testing.assert_close(after["pos_embed"], grown)
    name = "stages.1.mixer.inner.cores.0.wa_bias"
    torch.testing.assert_close(after[name], torch.nn.functional.interpolate(before[name], size=8, mode="linear"))
    # a smaller table is not low-pass filtered, as theirs is not
    load_pretrained(small, after)
    shrunk = torch.nn.functional.interpolate(after["pos_embed"][None], scale_factor=0.5, mode="bicubic")[0]
    torch.testing.assert_close(small.state_dict()["pos_embed"], shrunk)


def test_other_mechanisms_and_other_pools():
    assert tiny(mechanism="softmax-attention", global_pool="avg")(images(1, 3, 20, 16)).shape == (1, 5)
    with pytest.raises(ValueError, match="class_token=False"):
        tiny(mechanism="cswin-attention")
    for mechanism in ("cswin-attention", None):
        m = tiny(mechanism=mechanism, class_token=False, global_pool="avg")
        assert m(images(1, 3, 20, 16)).shape == (1, 5)


def test_linear_maps_tokens_and_tables_start_as_the_authors():
    m = tiny(embed_dim=128, img_size=64)
    inner = m.stages[1].mixer.inner
    for linear in (inner.qkv, inner.proj, m.stages[1].mlp.inner.fc1, m.head.fc):
        assert 0.019 < linear.weight.std() < 0.021 and not linear.bias.any()
    assert 0.015 < m.cls_token.std() < 0.025 and 0.018 < m.pos_embed.std() < 0.022
    assert 0.018 < inner.cores[0].na_bias.std() < 0.022


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_agents=5), "num_agents=5 is no square"),
        (dict(agent_blocks=-1), "agent_blocks"),
        (dict(patch_size=0), "patch_size"),
        (dict(img_size=4), "at least one patch"),
        (dict(num_heads=3), "num_heads=3 does not divide"),
        (dict(global_pool="mean"), "global_pool"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
