"""shvit: single-head attention on part of the channels, one test per criterion of the card that concerns the layer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import attnlib

FIXTURE = Path(__file__).parents[1] / "fixtures" / "shvit.safetensors"
F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("shvit", **{"dim": 12, "partial_dim": 6, "qk_dim": 4, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_output_and_gradients_equal_the_authors(mode):
    data = load_file(FIXTURE)
    sd = {k.removeprefix("sd."): v for k, v in data.items() if k.startswith("sd.")}
    case = {k.removeprefix(f"{mode}."): v for k, v in data.items() if k.startswith(f"{mode}.")}
    module = attnlib.create("shsa", dim=12, partial_dim=6, qk_dim=4)
    module.load_state_dict(attnlib.convert_state_dict("shvit", sd))
    module.train(mode == "train")
    x = case["x"].clone().requires_grad_()
    y = module(x)
    (y * case["g"]).sum().backward()
    torch.testing.assert_close(y, case["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, case["dx"], atol=1e-5, rtol=1e-4)
    grads = {k.removeprefix("grad."): v for k, v in case.items() if k.startswith("grad.")}
    grads = attnlib.convert_state_dict("shvit", grads)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-4)


def test_deployed_equals_the_layer_and_has_no_batch_norm_left():
    module = make()
    x = torch.randn(2, 4, 5, 12, dtype=F64)
    deployed = attnlib.deploy(module)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(x), module(x), atol=1e-10, rtol=1e-8)
    assert deployed.deployed()(x).equal(deployed(x))


def test_at_initialisation_the_layer_adds_nothing():
    module = attnlib.create("shvit", dim=12)
    assert not module(torch.randn(2, 4, 4, 12)).any() and not module.eval()(torch.randn(2, 4, 4, 12)).any()


def test_all_channels_partial_is_one_head_attention_with_a_relu_projection():
    module = make(partial_dim=12)
    x = torch.randn(2, 9, 12, dtype=F64)
    normed = torch.nn.functional.group_norm(x.transpose(1, 2), 1, module.pre_norm.weight, module.pre_norm.bias)
    qkv, proj = module.qkv.folded(), module.proj.folded()
    q, k, v = qkv(normed.transpose(1, 2)).split([4, 4, 12], -1)
    out = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
    torch.testing.assert_close(module(x), proj(out.relu()))


def test_permuting_pixels_permutes_outputs():
    module = make()
    x, order = torch.randn(2, 20, 12, dtype=F64), torch.randperm(20)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


def test_matrix_products_are_cheaper_than_the_feed_forward_of_the_paper():
    # S1 at 224 x 224: stage 2 is 7 x 7 with 224 channels, stage 3 is 4 x 4 with 320; the FFN doubles the width
    for side, dim, part in ((7, 224, 48), (4, 320, 68)):
        module = attnlib.create("shvit", dim=dim, partial_dim=part).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(), attnlib.use_backend("eager"):
            module(torch.zeros(1, side, side, dim))
        counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        products = sum(n for op, n in counts.items() if op not in ("aten.mm", "aten.addmm"))
        assert 0 < products < 2 * side**2 * 2 * dim * 2 * dim


@pytest.mark.parametrize("train", [False, True])
def test_padding_marked_invalid_enters_no_statistic(train):
    x = torch.randn(3, 6, 5, 12, dtype=F64)
    valid = torch.zeros(3, 6, 5, dtype=torch.bool)
    valid[:, :4] = True
    padded, cropped = make().train(train), make().train(train)
    torch.testing.assert_close(padded(x, valid=valid)[:, :4], cropped(x[:, :4]))
    for (name, a), b in zip(padded.state_dict().items(), cropped.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_gradients_are_exact_in_training():
    module = make(dim=4, partial_dim=2, qk_dim=2).train()
    x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    assert torch.autograd.gradcheck(lambda t: module(t, valid=valid), (x,))


def test_batch_dependence_is_said():
    module = make()
    assert module.traits.batch_independent
    assert not module.train().traits.batch_independent
    assert attnlib.deploy(module).train().traits.batch_independent


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"partial_dim": 13}, "partial_dim must lie between 1 and dim=12"),
        ({"partial_dim": 0}, "partial_dim must be an integer of at least 1"),
        ({"qk_dim": 0}, "qk_dim must be an integer of at least 1"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="built with dim=12"):
        make()(torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="takes no mask"):
        make()(torch.zeros(1, 4, 12), mask=torch.ones(4, 4, dtype=torch.bool))


def test_a_deployed_layer_fills_a_folded_one():
    layer = attnlib.create("shvit", dim=12, qk_dim=4, partial_dim=6).eval()
    torch.nn.init.normal_(layer.proj.norm.weight)
    folded = attnlib.create("shvit", dim=12, qk_dim=4, partial_dim=6, folded=True)
    folded.load_state_dict(layer.deployed().state_dict())
    x = torch.randn(2, 3, 4, 12)
    torch.testing.assert_close(folded(x), layer(x), atol=1e-5, rtol=1e-5)
