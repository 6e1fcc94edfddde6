"""DaViT: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.nn.modulation.davit import ChannelGroupAttention
from attnlib.nn.partition.maxvit import PartitionAttention

TINY = dict(
    embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), window_size=3, num_classes=5, drop_path_rate=0.0, mlp_ratio=2.0
)


def tiny(name="davit_tiny", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_windows_and_channels_alternate():
    kinds = [type(b.mixer.inner) for b in tiny().stages[1].blocks]
    assert kinds == [PartitionAttention, ChannelGroupAttention] * 2
    assert [type(b.mixer.inner) for b in tiny(kinds=["channel"]).stages[1].blocks] == [ChannelGroupAttention] * 2
    scales = {b.mixer.inner.scale for b in tiny("davit_base_fl").stages[0].blocks[1:]}
    assert scales == {"tokens"} and tiny("davit_base_fl").stages[1].downsample.proj.kernel_size == (3, 3)


def test_stochastic_depth_grows_over_every_block_of_the_pairs():
    m = tiny(drop_path_rate=0.5)
    rates = [getattr(b.mixer.drop_path, "p", 0.0) for stage in m.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (29, 22)])
@pytest.mark.parametrize("name", ["davit_tiny", "davit_base_fl"])
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_padding_of_windows_is_not_attended_to_unless_the_authors_say_so():
    """Where windows divide every map both are one model; elsewhere they differ."""
    ours, theirs = tiny(), tiny(compat="authors")
    x = images(1, 3, 24, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    x = images(1, 3, 28, 20)
    assert not torch.allclose(ours(x), theirs(x))
    with pytest.raises(ValueError, match="compat="):
        tiny(compat="timm")
    with pytest.raises(ValueError, match="kinds="):
        tiny(kinds=["spatial"])


@pytest.mark.parametrize("compat", [None, "authors"])
def test_pixels_that_do_not_exist_change_nothing(compat):
    m, x = tiny(compat=compat), images(2, 3, 32, 28)
    valid = torch.zeros(2, 32, 28, dtype=torch.bool)
    valid[0, :20, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    if compat is None:  # a padded image is that image
        torch.testing.assert_close(m(x, valid)[:1], m(x[:1, :, :20, :16]))


def test_maps_of_all_stages():
    f = attnlib.create_model("davit_tiny", **TINY, features_only=True)
    assert [tuple(t.shape) for t in f(images(1, 3, 33, 40))] == [(1, 8, 9, 10), (1, 16, 5, 5)]
    assert f.feature_info.reduction() == [4, 8]


def test_linear_maps_start_as_the_authors_whole_model():
    m = attnlib.create_model("davit_tiny", embed_dims=(32, 64), depths=(1, 1), num_heads=(1, 2))
    for block in m.stages[1].blocks:
        for linear in (block.mixer.inner.qkv, block.mixer.inner.proj, block.mlp.inner.fc1):
            assert 0.019 < linear.weight.std() < 0.021 and not linear.bias.any()


def test_tower_of_florence_in_its_own_names():
    """Its names, its order of roles, the language model left out; the norm behind the pool, which it lacks, is new."""
    m = tiny("davit_base_fl", num_classes=0)
    state = {
        k.replace("stem.", "convs.0."): v for k, v in m.state_dict().items() if not k.startswith(("head.", "stages."))
    }
    for key, value in m.state_dict().items():
        if not key.startswith("stages."):
            continue
        _, stage, *rest = key.split(".")
        if rest[0] == "downsample":
            state[f"convs.{stage}.{'.'.join(rest[1:])}"] = value
            continue
        pair, kind = divmod(int(rest[1]), 2)
        attn = ("window", "channel")[kind] + "_attn"
        name = ".".join(rest[2:])
        for ours, theirs in {
            "mlp_position.conv": "conv2.fn.dw", "position.conv": "conv1.fn.dw", "mixer.norm": f"{attn}.norm",
            "mixer.inner": f"{attn}.fn", "mlp.norm": "ffn.norm", "mlp.inner": "ffn.fn.net",
        }.items():  # fmt: skip
            if name.startswith(ours):
                block = f"{('spatial', 'channel')[kind]}_block"
                state[f"blocks.{stage}.{pair}.{block}.{theirs}{name[len(ours) :]}"] = value
                break
    assert len(state) == len(m.state_dict()) - 2
    released = {f"vision_tower.{k}": v for k, v in state.items()} | {"language_model.shared.weight": torch.zeros(2, 2)}
    again = tiny("davit_base_fl", num_classes=0)
    with torch.no_grad():
        for p in again.parameters():
            p.fill_(7.0)
    attnlib.models.build.load_pretrained(again, released)
    x = images(1, 3, 24, 24)
    torch.testing.assert_close(again(x), m(x))
