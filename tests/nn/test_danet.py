"""Position and channel attention of DANet, and the additive gate of skips."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib.nn.dense.danet import PositionAttention
from attnlib.nn.gates.skip import AdditiveSkipGate
from attnlib.nn.modulation.danet import ChannelAttention
from attnlib.ops import channel_attention

FIXTURE = load_file(Path(__file__).parents[1] / "fixtures" / "danet.safetensors")


@pytest.mark.parametrize(("name", "make"), [("pam", PositionAttention), ("cam", ChannelAttention)])
def test_as_released(name, make):
    held = {k.split(".", 1)[1]: v for k, v in FIXTURE.items() if k.startswith(f"{name}.")}
    layer = make(dim=16).double()
    state = make.convert_state_dict({k[6:]: v for k, v in held.items() if k.startswith("state.")})
    layer.load_state_dict(state, strict=True)
    x = held["x"].permute(0, 2, 3, 1).requires_grad_(True)
    y = layer(x)
    y.backward(held["g"].permute(0, 2, 3, 1))
    torch.testing.assert_close(y.permute(0, 3, 1, 2), held["y"], rtol=0, atol=1e-10)
    torch.testing.assert_close(x.grad.permute(0, 3, 1, 2), held["gx"], rtol=0, atol=1e-9)
    theirs = make.convert_state_dict({k[5:]: v for k, v in held.items() if k.startswith("grad.")})
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("grid", [(7,), (4, 5), (3, 2, 4)])
def test_position_attention_is_its_equation(grid):
    torch.manual_seed(0)
    layer = attnlib.create("danet-position-attention", dim=8, qk_dim=3, bias=False).double()
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    assert layer(x).equal(x)  # gamma starts at 0
    layer.gamma.data.fill_(0.7)
    t = x.flatten(1, -2)
    weights = (layer.q(t) @ layer.k(t).mT).softmax(-1)
    torch.testing.assert_close(layer(x), (0.7 * weights @ layer.v(t)).view(x.shape) + x, rtol=0, atol=1e-12)
    constant = x[:, :1].expand_as(x) if len(grid) == 1 else torch.ones_like(x)
    torch.testing.assert_close(layer(constant), constant + 0.7 * layer.v(constant), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", ["unlike", "alike"])
@pytest.mark.parametrize("transposed", [False, True])
def test_channel_attention_is_its_equation(sign, transposed):
    torch.manual_seed(0)
    layer = attnlib.create("danet-channel-attention", dim=6, sign=sign, transposed=transposed).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert layer(x).equal(x)
    layer.gamma.data.fill_(0.7)
    t = x.flatten(1, 2)
    energy = t.mT @ t
    weights = (energy.amax(-1, keepdim=True) - energy if sign == "unlike" else energy).softmax(-1)  # as released
    want = t @ (weights if transposed else weights.mT)
    torch.testing.assert_close(layer(x), 0.7 * want.view(x.shape) + x, rtol=0, atol=1e-12)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[:, 2] = False
    seen = layer(torch.where(valid[..., None], x, torch.nan), valid=valid)[:, :2]
    torch.testing.assert_close(seen, layer(x[:, :2]), rtol=0, atol=1e-12)


def test_the_operator_takes_scales_below_zero():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    want = v @ (-2 * q.mT @ k).softmax(-1).mT
    torch.testing.assert_close(channel_attention(q, k, v, scale=-2.0), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        channel_attention(q, k, v, scale=float("nan"))


def test_the_map_of_positions_is_never_built():
    """Written elements stay linear: 64 x 64 places, whose map would be 16.8 million numbers."""
    x = torch.randn(1, 64, 64, 16)
    layer = PositionAttention(16)
    sizes = []

    def note(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x).sum().backward()
    assert max(sizes) <= x.numel() and sum(sizes) < 4096 * 4096 / 20


@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("grid", [(4, 5), (3, 2, 4)])
def test_skip_gate_is_its_equation(combine, grid):
    torch.manual_seed(0)
    gate = AdditiveSkipGate(6, 5, 4, combine).double()
    skip, signal = (torch.randn(2, *grid, n, dtype=torch.float64) for n in (6, 5))

    def norm(x):
        axes = tuple(range(x.dim() - 1))
        return (x - x.mean(axes)) / (x.var(axes, correction=0) + 1e-5).sqrt()

    g, s = norm(gate.signal(signal)), norm(gate.skip(skip))
    a = torch.cat([g, s], -1) if combine == "concat" else g + s
    psi = norm(gate.psi(a.relu())).sigmoid()
    torch.testing.assert_close(gate(skip, signal), skip * psi, rtol=0, atol=1e-10)
    assert gate.gate(skip, signal).shape == (2, *grid, 1) and 0 < psi.min() and psi.max() < 1
    valid = torch.ones(2, *grid, dtype=torch.bool)
    valid[:, -1] = False
    dirty = torch.where(valid[..., None], skip, torch.nan)
    assert not gate(dirty, signal, valid)[:, -1].any()
    torch.testing.assert_close(
        gate(dirty, signal, valid)[:, :-1], gate(skip[:, :-1], signal[:, :-1]), atol=1e-9, rtol=0
    )


def test_bad_gates():
    gate = AdditiveSkipGate(6, 5, 4, norm=False)
    for skip, signal, message in (
        ((2, 4, 4, 5), (2, 4, 4, 5), r"skip must be a map \(B, \*grid, 6\)"),
        ((2, 4, 4, 6), (2, 4, 4, 6), "signal must be a map"),
        ((2, 4, 4, 6), (2, 4, 2, 5), "must have one grid"),
    ):
        with pytest.raises(ValueError, match=message):
            gate(torch.zeros(skip), torch.zeros(signal))
    with pytest.raises(ValueError, match="combine"):
        AdditiveSkipGate(6, 5, 4, "product")
    with pytest.raises(ValueError, match="sign"):
        ChannelAttention(4, sign="+")
    for name in ("cam", "PAM"):
        with pytest.raises(ValueError, match="is ambiguous; it may mean 'danet-"):
            attnlib.create(name, dim=8)
