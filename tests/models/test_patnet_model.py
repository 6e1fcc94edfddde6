"""PATNet: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import model_entry

TINY = dict(
    embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), mixers=("channel", "self"), spatial=True, hidden_size=12,
    attn_drop_rate=0.0, proj_drop_rate=0.0, drop_path_rate=0.0, num_classes=5,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("patnet_t1", **{**TINY, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "without", "with_spatial"),
    [("t0", 3.486, 3.558), ("t1", 5.986, 6.145), ("t2", 12.270, 12.650), ("s", 28.013, 28.976), ("m", 59.179, 61.367),
     ("l", 100.641, 104.465)],
)  # fmt: skip
def test_counts_of_the_card(size, without, with_spatial):
    """The released files give the second smallest spatial attention and no other."""
    for spatial, expected in ((False, without), (True, with_spatial)):
        with torch.device("meta"):
            m = attnlib.create_model(f"patnet_{size}", spatial=spatial)
        assert round(sum(p.numel() for p in m.parameters()) / 1e6, 3) == expected
    assert round(model_entry(f"patnet_{size}").params / 1e6, 3) == (with_spatial if size == "t1" else without)


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_any_size(size):
    maps = tiny().forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((4, 8), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(3, 3, 48, 40)
    valid = torch.zeros(3, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1:] = True
    first, second = tiny().train(train), tiny().train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_deployed_it_is_the_same_and_only_gated_maps_keep_norms():
    m, x = tiny().double(), images(2, 3, 48, 40).double()
    deployed = attnlib.deploy(m)
    left = [name for name, part in deployed.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert left and all(name.endswith(("mixer.norm.norm", "spatial.norm.norm")) for name in left)
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)


def test_heads_are_an_argument():
    with torch.device("meta"):
        m = attnlib.create_model("patnet_t1", num_heads=(6, 6, 6, 6))
    assert m.stages[3].blocks[0].mixer.num_heads == 6


def test_another_mechanism_and_bad_settings():
    assert tiny(mechanism="softmax-attention")(images(1, 3, 16, 16)).shape == (1, 5)
    for settings, message in ((dict(mixers=("self",)), "mixers"), (dict(mixers=("channel", "both")), "mixers"),
                              (dict(activation="silu"), "activation"),
                              (dict(num_heads=(1, 5)), "num_heads")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tiny(**settings)
