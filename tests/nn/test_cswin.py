"""cswin-attention: stripes of half of the heads each, padding, absent tokens, bad settings; parity is elsewhere."""

import pytest
import torch
import torch.nn.functional as F

import attnlib

F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("cswin-attention", **{"dim": 8, "num_heads": 4, "split_size": 2, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module


def oracle(m, x):
    """Every stripe by itself, in plain loops."""
    batch, height, width, dim = x.shape
    q, k, v = F.linear(x, m.qkv.weight, m.qkv.bias).chunk(3, -1)
    out, half, s = torch.zeros_like(x), dim // 2, m.split_size
    for number, conv in enumerate(m.lepe):
        channels = slice(number * half, (number + 1) * half)
        for start in range(0, width if number == 0 else height, s):
            cut = (slice(None), slice(start, start + s))[:: -1 if number else 1]
            where = (slice(None), *cut, channels)
            grid = q[where].shape[1:3]
            heads = [t[where].flatten(1, 2).unflatten(-1, (m.num_heads // 2, -1)).transpose(1, 2) for t in (q, k, v)]
            y = ((heads[0] @ heads[1].mT * m.scale).softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
            values = v[where].permute(0, 3, 1, 2)
            local = F.conv2d(values, conv.weight, conv.bias, padding=1, groups=half).permute(0, 2, 3, 1)
            out[where] = y.view(batch, *grid, half) + local
    return F.linear(out, m.proj.weight, m.proj.bias)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 3), (1, 1)])
@pytest.mark.parametrize("split", [1, 2, 9])
def test_equals_the_equation_on_maps_of_any_size(grid, split):
    m, x = make(split_size=split), torch.randn(2, *grid, 8, dtype=F64)
    torch.testing.assert_close(m(x), oracle(m, x))


def test_a_stripe_sees_nothing_of_its_neighbours():
    m, x = make(), torch.randn(1, 6, 6, 8, dtype=F64, requires_grad=True)
    with torch.no_grad():
        m.proj.weight.copy_(torch.eye(8))
    for channels, rows, columns in ((slice(0, 4), slice(0, 6), slice(2, 4)), (slice(4, 8), slice(4, 6), slice(0, 6))):
        (grad,) = torch.autograd.grad(m(x)[0, 4, 3, channels].sum(), x)
        read = grad[0].abs().sum(-1) > 0
        assert read[rows, columns].all() and read.sum() == read[rows, columns].sum()


def test_stripes_as_wide_as_the_map_are_dense_attention_with_lepe():
    wide = make(split_size=9)
    dense = attnlib.create("attention-lepe", dim=8, num_heads=4, side_dwconv=3, qkv_bias=True).double()
    state = {k: v for k, v in wide.state_dict().items() if not k.startswith("lepe")}
    for name in ("weight", "bias"):
        state[f"lepe.{name}"] = torch.cat([getattr(conv, name) for conv in wide.lepe])
    dense.load_state_dict(state)
    x = torch.randn(2, 5, 4, 8, dtype=F64)
    torch.testing.assert_close(wide(x), dense(x))


def test_padding_marked_invalid_equals_the_smaller_map():
    m, x = make(), torch.randn(2, 4, 4, 8, dtype=F64)
    taller = F.pad(x, (0, 0, 0, 3, 0, 2), value=float("nan"))
    valid = torch.zeros(2, 6, 7, dtype=torch.bool)
    valid[:, :4, :4] = True
    torch.testing.assert_close(m(taller, valid=valid)[:, :4, :4], m(x))


def test_dropout_and_no_convolution():
    m, x = make(attn_drop=0.5, kernel_size=0), torch.randn(1, 4, 4, 8, dtype=F64)
    assert not torch.equal(m(x), m(x)) and not len(m.lepe)
    assert torch.equal(m.eval()(x), m(x))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"split_size": 0}, "split_size"),
        ({"num_heads": 1}, "does not divide num_heads=1"),
        ({"num_heads": 6}, "num_heads=6 does not divide dim=8"),
        ({"kernel_size": 2}, "kernel_size=2 is not possible"),
        ({"pad": "zeros"}, "pad='zeros'"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_maps_that_stripes_do_not_divide_are_refused_on_request():
    m = make(pad="refuse")
    assert m.traits.grid_multiple == 2 and m(torch.randn(1, 4, 2, 8, dtype=F64)).shape == (1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"split_size=2 does not divide the grid \(4, 3\).*pad='refuse'"):
        m(torch.randn(1, 4, 3, 8, dtype=F64))
