"""The skeleton of vision models: timm's interface, any size, weights, any mechanism in the blocks."""

import json
import logging

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import attnlib
from attnlib.models import build
from attnlib.models.blocks import Block, Residual, fitted, places
from attnlib.models.build import counted_params, load_pretrained, model_entry, resized

TINY = dict(embed_dim=8, depths=(1, 2), num_heads=(1, 2), kernel_size=3, drop_path_rate=0.0, dilations=[[1], [1, 2]])


def tiny(name="dinat_mini", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, "num_classes": 5, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- every registered model


@pytest.mark.parametrize("name", attnlib.list_models())
def test_parameters_are_those_of_the_authors(name):
    entry = model_entry(name)
    assert entry.params is None or counted_params(entry) == entry.params


#: Encoders without attention, which other models stand on: no papers of the catalogue.
PLAIN = {"efficientnet", "mobilenetv3", "regnet", "resnet"}


@pytest.mark.parametrize("family", sorted({model_entry(n).family for n in attnlib.list_models()} - PLAIN))
def test_a_family_has_an_entry_in_the_catalogue(family):
    from attnlib.catalog import paper

    assert paper(family).slug == family


# ---- timm's interface


def test_what_timm_models_answer_to():
    m, x = tiny(), images(2, 3, 33, 40)
    features = m.forward_features(x)
    assert features.shape == (2, 5, 5, 16) and m.num_features == 16
    torch.testing.assert_close(m.forward_head(features), m(x))
    assert m.forward_head(features, pre_logits=True).shape == (2, 16)
    assert m.get_classifier() is m.head.fc and [f["reduction"] for f in m.feature_info] == [4, 8]
    last, maps = m.forward_intermediates(x)
    assert [tuple(t.shape) for t in maps] == [(2, 8, 9, 10), (2, 16, 5, 5)]
    torch.testing.assert_close(last, features)
    (only,) = m.forward_intermediates(x, [0], stop_early=True, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(only.permute(0, 3, 1, 2), maps[0])
    m.reset_classifier(3, "max")
    assert m(x).shape == (2, 3) and m.num_classes == 3
    m.reset_classifier(0, "")
    torch.testing.assert_close(m(x), features)
    assert {n.rpartition(".")[2] for n in m.no_weight_decay()} == {"rpb"}
    assert m.pretrained_cfg["input_size"] == (3, 224, 224) and m.pretrained_cfg["license"] == "MIT"
    groups = m.group_matcher()
    assert set(groups) == {"stem", "blocks"} and len(groups["blocks"]) == 4


def test_features_only():
    m, x = tiny(), images(1, 3, 32, 32)
    f = tiny(features_only=True)
    torch.testing.assert_close(f(x)[1], m.forward_intermediates(x, intermediates_only=True)[1])
    assert f.feature_info.channels() == [8, 16] and f.feature_info.reduction() == [4, 8]
    last = tiny(features_only=True, out_indices=[-1])
    assert [tuple(t.shape) for t in last(x)] == [(1, 16, 4, 4)] and last.feature_info.module_name() == ["stages.1"]
    first = tiny(features_only=True, out_indices=(0,))
    assert len(first.model.stages) == 1  # what nobody asks for is let go


def test_checkpointing_changes_nothing():
    m, x = tiny().train(), images(2, 3, 24, 24)
    grads = []
    for on in (False, True):
        m.set_grad_checkpointing(on)
        m.zero_grad()
        m(x).square().sum().backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_stochastic_depth_grows_over_the_blocks():
    row = [p.drop_path for stage in places([8, 16], [2, 3], [1, 2], [4, 8], 0.4) for p in stage]
    assert row == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    dropped = Residual(4, nn.Identity(), None, drop_path=0.5)
    dropped.inner.forward = lambda x, valid: x
    x = torch.ones(4000, 1, 4)
    y = dropped(x)[0][:, 0]
    assert set(y.unique().tolist()) == {1.0, 3.0} and bool((y == y[:, :1]).all())
    assert abs(y.mean().item() - 2) < 0.1  # 4000 coins: three standard deviations are 0.05
    torch.testing.assert_close(dropped.eval()(x)[0], 2 * x)


# ---- any size, and images of several sizes in one batch


@pytest.mark.parametrize("size", [(4, 4), (5, 31), (1, 1), (37, 22)])
def test_any_size_from_one_token_up(size):
    for name in ("dinat_mini", "dinat_s_tiny"):
        assert tiny(name)(images(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny"])
def test_pixels_that_do_not_exist_change_nothing(name):
    m = tiny(name)
    x = images(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    other = torch.where(valid[:, None], x, torch.full_like(x, float("nan")))
    torch.testing.assert_close(m(other, valid), m(x.masked_fill(~valid[:, None], 7.0), valid))
    assert not torch.allclose(m(x, valid)[0], m(x)[0])


# ---- weights


def test_own_weights_load_from_a_file(tmp_path):
    m, x = tiny(), images(1, 3, 20, 20)
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"weights.{suffix}"
        if suffix == "pth":
            torch.save({"epoch": 3, "model": m.state_dict()}, path)
        else:
            from safetensors.torch import save_file

            save_file(m.state_dict(), path)
        torch.manual_seed(5)
        again = attnlib.create_model("dinat_mini", path, **TINY, num_classes=5).eval()
        torch.testing.assert_close(again(x), m(x))


def test_another_head_and_other_channels(tmp_path, caplog):
    m = tiny()
    torch.save(m.state_dict(), path := tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "attnlib"):
        grey = attnlib.create_model("dinat_mini", path, **TINY, num_classes=7, in_chans=1).eval()
    assert "adapted stem.0.proj.weight" in caplog.text and "left new head.fc.bias, head.fc.weight" in caplog.text
    x = images(1, 1, 16, 16)
    torch.testing.assert_close(grey.forward_features(x), m.forward_features(x.expand(1, 3, 16, 16)))
    five = attnlib.create_model("dinat_mini", path, **TINY, num_classes=5, in_chans=6).eval()
    torch.testing.assert_close(five(x.expand(1, 6, 16, 16)), m(x.expand(1, 3, 16, 16)), atol=1e-5, rtol=1e-5)
    none = attnlib.create_model("dinat_mini", path, **TINY, num_classes=0).eval()
    assert none(x.expand(1, 3, 16, 16)).shape == (1, 16)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    m = tiny()
    state = m.state_dict()
    state["extra"] = state.pop("norm.weight")
    with pytest.raises(ValueError, match="does not have: extra|left over: extra"):
        load_pretrained(m, state)
    state = tiny(embed_dim=16).state_dict()
    with pytest.raises(ValueError, match=r"of another shape: .*ours"):
        load_pretrained(m, state)
    with pytest.raises(ValueError, match="missing: .*norm.weight"):
        load_pretrained(m, {k: v for k, v in m.state_dict().items() if k != "norm.weight"})
    with pytest.raises(FileNotFoundError, match="pretrained="):
        attnlib.create_model("dinat_mini", tmp_path / "none.pth")
    torch.save([1], path := tmp_path / "no.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        attnlib.create_model("dinat_mini", path)


def test_weights_that_cannot_be_fetched(monkeypatch):
    with pytest.raises(OSError, match="not on the Hugging Face hub: pretrained=PATH"):
        attnlib.create_model("dinat_mini", True)
    import dataclasses

    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def offline(*args):
        asked.append(args)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    entry = dataclasses.replace(model_entry("dinat_mini"), weights=("owner/name", "model.safetensors"))
    monkeypatch.setitem(build._MODELS, "dinat_mini", entry)
    with pytest.raises(OSError, match="model.safetensors of owner/name .* pretrained=PATH"):
        attnlib.create_model("dinat_mini", pretrained=True)
    assert asked == [("owner/name", "model.safetensors")]


def test_tables_are_interpolated():
    table = torch.arange(9.0).view(1, 3, 3)
    assert resized(table, (3, 3)).equal(table) and resized(table, (5, 5)).shape == (1, 5, 5)
    flat = torch.full((2, 4), 3.0)
    torch.testing.assert_close(resized(flat, (7,)), torch.full((2, 7), 3.0))


def test_tables_of_another_kernel_are_interpolated_when_loaded():
    """As the authors made their 11 x 11 DiNAT from that of 7 x 7."""
    small, large = tiny(), tiny(kernel_size=5)
    done = load_pretrained(large, small.state_dict())
    assert done.resized and all(name.endswith("rpb") for name in done.resized)
    for name, table in small.state_dict().items():
        expected = resized(table, (9, 9)) if name.endswith("rpb") else table
        torch.testing.assert_close(large.state_dict()[name], expected)


# ---- any mechanism


def test_a_mechanism_of_the_users_own_choice():
    m = tiny(mechanism="softmax-attention", mechanism_settings={"qkv_bias": False})
    assert m(images(1, 3, 20, 16)).shape == (1, 5)
    inner = m.stages[1].blocks[0].mixer.inner
    assert inner.slug == "softmax-attention" and inner.num_heads == 2
    own = tiny(mechanism=lambda place: attnlib.create("focalnet", dim=place.dim))
    assert own(images(1, 3, 20, 16)).shape == (1, 5)


#: Settings with which a mechanism reads both ways, and fits maps this small.
SETTINGS = {
    "gaussian-adaptive-attention": {"axis": "tokens"},
    "s4d": {"bidirectional": True},
    "spectformer": {"resample": True},
}


@pytest.mark.parametrize("name", attnlib.list_mechanisms())
def test_every_mechanism_builds_or_says_why_not(name):
    """In a skeleton with maps of 5 x 6 and 3 x 3: nothing but a missing pattern or a missing setting keeps one out."""
    most = attnlib.nn.registry.find(name).class_traits
    try:
        m = tiny(mechanism=name, mechanism_settings=SETTINGS.get(name), embed_dim=32, num_heads=(4, 4))
    except ValueError as error:
        assert "noncausal-self" not in most.patterns and "noncausal-self" in str(error), error
        return
    y = m(images(2, 3, 20, 24), returns=("losses",))
    assert y.y.shape == (2, 5) and y.y.isfinite().all()


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(name="dinat_minni"), ValueError, "did you mean 'dinat_mini'"),
        (dict(name="dinat"), ValueError, "did you mean 'dinat_"),
        (dict(num_classes=-1), ValueError, "num_classes"),
        (dict(in_chans=0), ValueError, "in_chans"),
        (dict(features_only=True, out_indices=[2]), ValueError, r"out_indices=\[2\] names stages that are not there"),
        (dict(out_indices=[0]), ValueError, "without features_only"),
        (dict(global_pool="mean"), ValueError, "global_pool"),
        (dict(drop_path_rate=1.5), ValueError, "drop_path"),
        (dict(kernal_size=3), TypeError, "kernal_size"),
        (dict(pretrained=3), TypeError, "pretrained must be True, False or a path"),
        (dict(mechanism="sofmax"), ValueError, "unknown mechanism"),
        (dict(mechanism_settings={}), ValueError, "without the name of a mechanism"),
        (dict(num_heads=(3, 2)), ValueError, "num_heads=3 does not divide"),
        (dict(num_heads=(1, 2, 4)), ValueError, "must have one number for each of 2 stages"),
        (dict(depths=(0, 2), dilations=None), ValueError, r"depths\[0\]"),
        (dict(dilations=[[1], [1]]), ValueError, "dilations="),
        (dict(layout="swim"), ValueError, "layout='swim' is not possible"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        tiny(**settings)


def test_bad_images():
    m = tiny()
    for bad in (images(2, 1, 8, 8), images(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.long), images(1, 3, 0, 8)):
        with pytest.raises(ValueError, match="x must"):
            m(bad)
    with pytest.raises(ValueError, match="valid"):
        m(images(1, 3, 8, 8), torch.ones(1, 8, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="returns="):
        m(images(1, 3, 8, 8), returns=("weights",))
    with pytest.raises(ValueError, match="names stages"):
        m.forward_intermediates(images(1, 3, 8, 8), [5])


def test_blocks_by_hand():
    block = Block(
        8, attnlib.create("softmax-attention", dim=8, num_heads=2), position=3, mlp_position=3, layer_scale=0.5
    )
    x = images(1, 4, 5, 8)
    y, carry = block(x)
    assert y.shape == x.shape and carry is None
    with pytest.raises(ValueError, match="patterns"):
        fitted("lightning-attention-2")(places([8], [1], [1], [1])[0][0])


def test_the_command_lists_models():
    from attnlib.cli import app

    result = CliRunner().invoke(app, ["models", "dinat_mini", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)[0]["params"] == 19_984_174
    shown = CliRunner().invoke(app, ["models", "dinat_mini"])
    assert "19,984,174" in shown.output and "MIT" in shown.output
