"""FeatEnHancer against the authors' class, and in front of a detector whose loss alone trains it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.models.build import load_pretrained, model_entry
from attnlib.models.detect.anchor_free import AnchorFreeDetector, DecoupledHead
from attnlib.models.detect.featenhancer import Enhanced, FeatEnHancer, ScaleAggregation, convert
from attnlib.models.detect.pan import PAN, CSPBackbone
from attnlib.nn.gates.scale_attention import attend_scales, scale_weights
from tests.parity import synthetic

PATH = Path(__file__).parents[1] / "fixtures" / "models" / "featenhancer.safetensors"
with safe_open(PATH, "pt") as held:
    SHAPES, SIZES = json.loads(held.metadata()["shapes"]), json.loads(held.metadata()["sizes"])
    WANT = {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118


def waves(*shape, seed=0.0):
    """Inputs of the recording."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * 0.37 + n**2 * 0.0113 + seed).view(shape)


def small(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("featenhancer", **{**dict(dim=8), **settings})


@pytest.mark.parametrize("which", range(3))
def test_the_authors_class(which):
    model = FeatEnHancer().double()
    state = {k: v.double() for k, v in synthetic(SHAPES).items()}
    model.load_state_dict(convert(state, model), strict=True)
    x = (0.5 + 0.5 * waves(2, 3, *SIZES[which])).requires_grad_()
    y = model(x)
    (y * waves(*y.shape, seed=5.0)).sum().backward()
    torch.testing.assert_close(y[:, :, ::3, ::3], WANT[f"{which}/y"], rtol=0, atol=1e-9)
    torch.testing.assert_close(x.grad[:, :, ::3, ::3], WANT[f"{which}/gx"], rtol=1e-9, atol=1e-9)
    numbered = convert({n: torch.full(s, float(i)) for i, (n, s) in enumerate(SHAPES.items())}, model)
    for name, p in model.named_parameters():
        i = int(numbered[name].flatten()[0])
        torch.testing.assert_close(p.grad.norm(), WANT[f"{which}/norms"][i], rtol=1e-9, atol=1e-9)
        wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64)).view_as(p)
        torch.testing.assert_close((p.grad * wave).sum(), WANT[f"{which}/sums"][i], rtol=1e-9, atol=1e-8)


def test_parameters():
    assert sum(p.numel() for p in attnlib.create_model("featenhancer").parameters()) == 139_400
    assert model_entry("featenhancer").params == 139_400


@pytest.mark.parametrize("size", [(256, 256), (600, 800), (256, 320), (250, 333), (15, 15), (31, 64)])
def test_shape_stays_and_change_is_bounded(size):
    model = small(dim=2, curves=2, num_heads=2)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        for layer in model.fuse:
            layer.weight.mul_(50)  # as far as it goes
        y = model(x)
    assert y.shape == x.shape and y.isfinite().all() and (y - x).abs().max() <= 2
    one = small()
    with torch.no_grad():
        one.fuse[1].bias.fill_(100.0)
        torch.testing.assert_close(one(x[..., :32, :32]), x[..., :32, :32] + 8)


def test_weights_over_scales():
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 4, 5, 24, generator=g, dtype=torch.float64)
    w = scale_weights(maps, 1, 8)
    torch.testing.assert_close(w.sum(1), torch.ones(2, 4, 5, 8, dtype=torch.float64))
    for h in (0, 5):
        own = maps[0, :, 2, 3, 3 * h : 3 * h + 3]
        want = torch.stack([own[i] @ own[1] for i in range(3)]).div(3**0.5).softmax(0)
        torch.testing.assert_close(w[0, :, 2, 3, h], want)
        torch.testing.assert_close(attend_scales(maps, 1, 8)[0, 2, 3, 3 * h : 3 * h + 3], want @ own)
    same = maps[:, :1].expand(2, 2, 4, 5, 24)
    torch.testing.assert_close(scale_weights(same, 1, 8), torch.full((2, 2, 4, 5, 8), 0.5, dtype=torch.float64))
    torch.testing.assert_close(attend_scales(same, 1, 8), maps[:, 0])
    assert torch.autograd.gradcheck(
        lambda m: attend_scales(m, 0, 2), torch.randn(1, 2, 2, 1, 4).double().requires_grad_()
    )
    huge = attend_scales(torch.full((1, 2, 1, 1, 4), 300.0, dtype=torch.bfloat16), 0, 1)
    assert huge.isfinite().all()


def test_the_quadratic_curve_is_an_option():
    model = small(curve="quadratic")
    x = torch.rand(1, 3, 20, 24)
    want = x
    for a in model.maps(x).unbind(1):
        want = want + a * want * (1 - want)
    torch.testing.assert_close(model(x), want)
    assert model(x).ge(0).all() and model(x).le(1).all()  # as Zero-DCE's curves keep it
    assert not torch.allclose(model(x), small()(x))


def test_work_is_linear_in_pixels():
    model = small()

    def flops(side):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, 512))
        return counter.get_total_flops()

    assert flops(512) / flops(256) == pytest.approx(2, rel=0.02)


def detector(classes=2):
    torch.manual_seed(0)
    dims = (8, 8, 8, 16, 16)
    return AnchorFreeDetector(CSPBackbone(dims, (1, 1, 1, 1)), PAN(dims[2:]), DecoupledHead(dims[2:], classes))


def test_a_detectors_loss_reaches_all_of_it():
    model = Enhanced(detector(), small(), between=lambda x: (x - 0.5) / 0.25)
    x = torch.rand(2, 3, 40, 48)
    target = [{"boxes": torch.tensor([[4.0, 4, 40, 36]]), "labels": torch.tensor([1])}] * 2
    model.enhancer.down[0].bias.data.fill_(0.1)  # no ReLU is dead
    sum(model.loss(model(x), target).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.enhancer.parameters())
    found = model.train().predict(x, threshold=0.0, most=3)
    assert model.training and all(f.boxes.shape[0] <= 3 for f in found)
    model.model.eval()  # a frozen reader
    model.predict(x)
    assert model.enhancer.training and not any(m.training for m in model.model.modules())
    plain = Enhanced(nn.Conv2d(3, 1, 1), small())
    assert plain.predict(x).shape == (2, 1, 40, 48)
    with pytest.raises(TypeError, match="model has no loss"):
        plain.loss(None, None)


def test_states_copies_precision_and_export():
    model, x = small().eval(), torch.rand(2, 3, 21, 30)
    again = small()
    load_pretrained(again, copy.deepcopy(model).state_dict())
    torch.testing.assert_close(again(x), model(x))
    assert copy.deepcopy(model).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert model(x[:0]).shape == (0, 3, 21, 30)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    one = small(in_chans=1, num_heads=4)
    assert one(x[:, :1]).shape == (2, 1, 21, 30)


def test_bad_input():
    model = small()
    with pytest.raises(ValueError, match=r"15 pixels a side at least, got \(14, 40\)"):
        model(torch.rand(1, 3, 14, 40))
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, H, W\)"):
        model(torch.rand(1, 1, 20, 20))
    with pytest.raises(ValueError, match="num_heads=7 does not divide"):
        small(num_heads=7)
    with pytest.raises(ValueError, match="curve"):
        small(curve="cubic")
    with pytest.raises(ValueError, match="quarter must be what"):
        ScaleAggregation(4, 2)(torch.rand(1, 4, 30, 30), torch.rand(1, 4, 9, 9))
    with pytest.raises(ValueError, match=r"x must be a tensor of shape \(B, C=4, H, W\)"):
        ScaleAggregation(4, 2)(torch.rand(1, 3, 30, 30), torch.rand(1, 4, 9, 9))
    with pytest.raises(TypeError, match="between must be a function"):
        Enhanced(nn.Identity(), between=3)
    with pytest.raises(ValueError, match="key"):
        scale_weights(torch.zeros(1, 2, 3, 3, 4), 2, 2)
    with pytest.raises(ValueError, match=r"maps must be \(B, S, \*grid, C\)"):
        scale_weights(torch.zeros(2, 3, 4), 0, 2)
    with pytest.raises(ValueError, match="e_conv1|mine"):
        convert({"mine.weight": torch.zeros(1)}, model)
