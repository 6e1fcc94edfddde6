"""VAN: what its card asks of the backbone."""

import math

import pytest
import torch

import attnlib
from attnlib.models.build import model_entry

TINY = dict(embed_dims=(8, 12), depths=(1, 2), mlp_ratios=(2, 2), num_classes=5)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("van_b0", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_of_the_card():
    counts = [round(model_entry(f"van_b{i}").params / 1e6, 3) for i in range(7)]
    assert counts == [4.106, 13.862, 26.578, 44.766, 60.283, 89.968, 199.829]


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_any_size(size):
    maps = tiny().forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((4, 8), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    first, second = tiny().train(train), tiny().train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_starts_are_the_authors():
    m = tiny(embed_dims=(64, 96))
    block = m.stages[1].blocks[0]
    assert block.mixer.scale.gamma.unique().tolist() == pytest.approx([1e-2])
    assert block.mixer.inner.point.weight.std().item() == pytest.approx(math.sqrt(2 / 96), rel=0.05)
    assert block.mixer.inner.dilated.weight.std().item() == pytest.approx(math.sqrt(2 / 49), rel=0.05)
    assert block.mlp.inner.fc1.weight.std().item() == pytest.approx(math.sqrt(2 / 192), rel=0.05)


def test_another_mechanism_and_bad_settings():
    assert tiny(mechanism="softmax-attention", num_heads=(2, 4))(images(1, 3, 16, 16)).shape == (1, 5)
    for settings, message in ((dict(mlp_ratios=(2,)), "mlp_ratios"), (dict(depths=(1, 0)), r"depths\[1\]")):
        with pytest.raises(ValueError, match=message):
            tiny(**settings)
