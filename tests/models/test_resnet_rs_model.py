"""ResNet-RS: counts, starts, the pairs that were trained, and a recipe whose every knob turns something."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.resnet_rs import Recipe, scale
from attnlib.models.build import model_entry

TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 2, 1, 1), stem_dim=8, num_classes=5)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("resnetrs50", **{**TINY, **settings})


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_of_the_card():
    counts = [round(model_entry(f"resnetrs{n}").params / 1e6, 3) for n in (50, 101, 152, 200, 270, 350, 420)]
    assert counts == [35.692, 63.619, 86.622, 93.210, 129.861, 163.956, 191.892]


def test_at_the_start_branches_are_zero():
    m = tiny().eval()
    for stage in m.stages:
        for block in stage.blocks:
            assert not block.conv3.norm.weight.any() and block.squeeze_last
            if block.shortcut is None:
                x = images(1, 3, 3, block.conv1.conv.in_channels).relu()
                torch.testing.assert_close(block(x)[0], x)


def test_folded_it_is_the_same_and_has_no_norm_left():
    m, x = tiny().double(), images(2, 3, 64, 48).double()
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.running_mean, std=0.3)
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed.modules())
    torch.testing.assert_close(deployed(x), m.eval()(x), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(3, 3, 64, 64)
    valid = torch.zeros(3, 64, 64, dtype=torch.bool)
    valid[0, :32, :48] = valid[1:] = True
    first, second = tiny().train(train), tiny().train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))


def test_the_pairs_of_the_table():
    assert scale(50, 160) == {"name": "resnetrs50", "img_size": 160}
    assert [scale(350, side)["img_size"] for side in (256, 320)] == [256, 320]
    with pytest.raises(ValueError, match="resolution=224 is not possible"):
        scale(50, 224)
    with pytest.raises(ValueError, match="depth=51 is not possible"):
        scale(51, 160)
    with torch.device("meta"):
        assert attnlib.create_model(**scale(50, 160)).img_size == (160, 160)


def test_every_knob_turns_something():
    recipe, m = Recipe(), tiny()
    optimizer = recipe.optimizer(m)
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 4e-5 and rest["weight_decay"] == 0 and decayed["momentum"] == 0.9
    assert sum(map(len, (decayed["params"], rest["params"]))) == len(list(m.parameters()))
    assert all(p.dim() > 1 for p in decayed["params"])
    x, labels = torch.tensor([[3.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
    logs = x.log_softmax(-1)
    torch.testing.assert_close(recipe.loss()(x, labels), -0.9 * logs[0, 0] - 0.1 * logs.mean())
    torch.testing.assert_close(replace(recipe, label_smoothing=0.0).loss()(x, labels), -logs[0, 0])
    assert replace(recipe, dropout=0.4, stochastic_depth=0.1).settings() == {"drop_rate": 0.4, "drop_path_rate": 0.1}
    assert tiny(**replace(recipe, dropout=0.4).settings()).head.drop.p == 0.4


def test_the_rate_warms_up_and_falls_along_a_cosine():
    def rates(recipe, steps=100):
        optimizer = recipe.optimizer(nn.Linear(2, 2))
        schedule, seen = recipe.schedule(optimizer, steps), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    seen = rates(Recipe(epochs=100, warmup_epochs=10, learning_rate=1.0))
    assert seen[0] == pytest.approx(1e-3) and seen[10] == pytest.approx(1.0)
    assert seen[55] == pytest.approx(0.5) and seen[-1] < 0.01
    flat = rates(Recipe(epochs=100, warmup_epochs=0, cosine=False, learning_rate=1.0))
    assert set(flat) == {1.0}


def test_the_average_of_weights():
    m = nn.Linear(2, 1)
    averaged = Recipe(ema_decay=0.9).averaged(m)
    averaged.update_parameters(m)
    before = m.weight.detach().clone()
    with torch.no_grad():
        m.weight.add_(1)
    averaged.update_parameters(m)
    torch.testing.assert_close(averaged.module.weight, before + 0.1)
    assert Recipe(ema_decay=0.0).averaged(m) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(epochs=0), "epochs"), (dict(warmup_epochs=350), "warmup_epochs"), (dict(dropout=1.0), "dropout"),
        (dict(label_smoothing=-0.1), "label_smoothing"), (dict(learning_rate=0.0), "learning_rate"),
    ],
)  # fmt: skip
def test_bad_recipes(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_bad_settings():
    for settings, message in ((dict(pool="mean"), "pool='mean' is not possible"), (dict(squeeze=-1.0), "squeeze")):
        with pytest.raises(ValueError, match=message):
            tiny(**settings)
