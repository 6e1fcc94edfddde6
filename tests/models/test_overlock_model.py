"""OverLoCK: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import counted_params, model_entry

TINY = dict(
    embed_dims=(8, 8, 8, 16), depths=(1, 1, 1, 1), focus_depths=(1, 1), num_heads=(1, 2), kernel_sizes=(9, 7, 5, 5),
    projection=16, num_classes=5,
)  # fmt: skip


def tiny(name="overlock_xt", **settings):
    torch.manual_seed(0)
    m = attnlib.create_model(name, **{**TINY, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_of_the_card():
    whole = {"xt": 17.307, "t": 34.990, "s": 58.310, "b": 98.013}
    bare = {"xt": 16_453_712, "t": 33_467_040, "s": 56_156_452, "b": 94_942_528}
    for name, count in bare.items():
        entry = model_entry(f"overlock_{name}")
        assert round(entry.params / 1e6, 3) == whole[name]
        with torch.device("meta"):
            merged = entry.make(**{**entry.settings, "auxiliary": False, "merged": True})
        assert sum(p.numel() for p in merged.parameters()) == count
    assert counted_params(model_entry("overlock_xt_reparam")) == 16_791_384


def test_deployed_it_is_the_same_and_has_no_norm_left():
    m, x = tiny().double(), images(2, 3, 96, 80).double()
    deployed = attnlib.deploy(m)
    assert not any(isinstance(m, nn.BatchNorm2d) for n, m in deployed.named_modules() if "auxiliary" not in n)
    torch.testing.assert_close(deployed(x), m(x), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_any_size(size):
    maps = tiny().forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((4, 8, 16, 32), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


def test_a_stage_taken_alone_has_its_own_channels():
    """The overview is beside the tokens of the last stage alone, also where stages behind are let go."""
    x = images(1, 3, 64, 64)
    want = tiny().forward_intermediates(x, intermediates_only=True)
    for i in range(4):
        f = tiny(features_only=True, out_indices=(i,))
        (got,) = f(x)
        assert f.feature_info.channels() == [got.shape[1]]
        torch.testing.assert_close(got, want[i])


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(2, 3, 96, 96)
    valid = torch.zeros(2, 96, 96, dtype=torch.bool)
    valid[0, :64, :70] = valid[1] = True
    first, second = tiny().train(train), tiny().train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))


def test_training_gives_a_pair_and_both_learn():
    m = tiny().train()
    main, overview = m(images(2, 3, 64, 64))
    assert main.shape == overview.shape == (2, 5)
    (main.square().sum() + overview.square().sum()).backward()
    assert all(p.grad is not None for p in m.parameters())
    m.reset_classifier(3)
    assert [t.shape for t in m(images(2, 3, 64, 64))] == [(2, 3), (2, 3)]
    assert m.eval()(images(1, 3, 64, 64)).shape == (1, 3)
    assert isinstance(tiny(auxiliary=False).train()(images(2, 3, 64, 64)), torch.Tensor)


def test_the_overview_reaches_every_token_of_the_focus():
    """A corner of the image changes the third map everywhere, through the overview; the second only near by."""
    m, x = tiny().double(), images(1, 3, 256, 256).double()
    for p in m.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    other = x.clone()
    other[..., -8:, -8:] += 1
    a, b = (m.forward_intermediates(t, intermediates_only=True) for t in (x, other))
    assert (a[2] - b[2]).abs().amax(1).gt(0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(embed_dims=(7, 8, 8, 16)), "embed_dims="),
        (dict(kernel_sizes=(9, 7, 5, 4)), "kernel_size=4"),
        (dict(focus_depths=(1, 0)), r"focus_depths\[1\]"),
        (dict(num_heads=(3, 1)), "num_heads"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
