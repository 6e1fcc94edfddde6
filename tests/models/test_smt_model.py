"""SMT: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import model_entry
from attnlib.nn.dense.attention_lepe import AttentionLePE

TINY = dict(
    embed_dims=(8, 12, 16), depths=(1, 3, 1), num_heads=(1, 2, 4), mixers=("modulation", "alternating", "attention"),
    mlp_ratios=(2, 2, 1), num_classes=5,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("smt_t", **{**TINY, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_of_the_card():
    """The small one is the code's, not the 20.5 M of the paper's table."""
    counts = [round(model_entry(f"smt_{size}").params / 1e6, 3) for size in "tsbl"]
    assert counts == [11.507, 22.551, 32.037, 80.590]


@pytest.mark.parametrize("size", "tsbl")
def test_the_third_stage_alternates(size):
    with torch.device("meta"):
        m = attnlib.create_model(f"smt_{size}")
    attends = [[isinstance(b.mixer.inner, AttentionLePE) for b in stage.blocks] for stage in m.stages]
    assert not any(attends[0] + attends[1]) and all(attends[3])
    assert attends[2] == [bool(i % 2) for i in range(len(attends[2]))]


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_any_size(size):
    maps = tiny().forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((4, 8, 16), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    first, second = tiny(drop_path_rate=0.0).train(train), tiny(drop_path_rate=0.0).train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_folded_it_is_the_same_and_has_no_norm_left():
    m, x = tiny().double(), images(2, 3, 48, 40).double()
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed.modules())
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)


def test_starts_are_the_authors():
    m = tiny(embed_dims=(64, 64, 64), num_heads=(2, 2, 2))
    assert m.stem[0][0].conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    assert m.stages[1].downsample.proj.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    block = m.stages[2].blocks[0]
    assert block.mixer.inner.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.inner.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.15)


def test_another_mechanism_and_bad_settings():
    assert tiny(mechanism="softmax-attention")(images(1, 3, 16, 16)).shape == (1, 5)
    for settings, message in ((dict(mlp_ratios=(2,)), "mlp_ratios"), (dict(mixers=("attention",)), "mixers"),
                              (dict(mixers=("modulation", "both", "attention")), "mixers"),
                              (dict(stem_kernel=4), "stem_kernel")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tiny(**settings)
