"""RGT: what its card asks of the restorer."""

import pytest
import torch

import attnlib
from attnlib.models.restore.rgt import SpatialGateMlp
from attnlib.nn.partition.rgt import RectangularAttention
from attnlib.nn.reduced.rgt import RecursiveGeneralization

TINY = dict(embed_dim=96, depths=(2,), num_heads=(6,), split_size=(2, 4), drop_path_rate=0.0)


def tiny(name="rgt_x2", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def data(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "params"),
    [("rgt_s_x2", 10_051_055), ("rgt_s_x3", 10_235_695), ("rgt_x2", 13_217_831), ("rgt_x3", 13_402_471)],
)
def test_parameters_at_other_scales(name, params):
    from attnlib.models.build import counted_params, model_entry

    assert counted_params(model_entry(name)) == params


def test_both_kinds_of_attention_by_turns_and_where_windows_are_shifted():
    m = tiny(depths=(6, 5, 3), num_heads=(6,) * 3)
    mixers = [[b.mixer.inner for b in g.blocks] for g in m.groups]
    for row in mixers:
        assert all(isinstance(a, (RectangularAttention, RecursiveGeneralization)[i % 2]) for i, a in enumerate(row))
    shifted = [[i for i, a in enumerate(row) if getattr(a, "shift", False)] for row in mixers]
    assert shifted == [[2], [0, 4], [2]]


def test_a_block_adds_what_it_reads_by_one_number_per_channel():
    m, x = tiny().double(), data(1, 16, 16, 96)
    block = m.groups[0].blocks[0]
    torch.testing.assert_close(block.again.gamma.detach(), torch.full((96,), 1e-4).double())
    with torch.no_grad():
        block.again.gamma.zero_()
    y = x + block.mixer.inner(block.mixer.norm(x))
    plain = y + block.mlp.inner(block.mlp.norm(y))
    torch.testing.assert_close(block(x)[0], plain)
    with torch.no_grad():
        block.again.gamma.copy_(torch.arange(96.0))
    torch.testing.assert_close(block(x)[0], plain + torch.arange(96.0).double() * x)


def test_half_of_the_mlp_gates_the_other_half():
    torch.manual_seed(0)
    mlp, x = SpatialGateMlp(8, 1.5).double(), data(1, 3, 5, 8)
    a, b = torch.nn.functional.gelu(mlp.fc1(x)).split(6, -1)
    around = torch.nn.functional.conv2d(
        mlp.norm(b).permute(0, 3, 1, 2), mlp.conv.weight, mlp.conv.bias, padding=1, groups=6
    )
    torch.testing.assert_close(mlp(x), mlp.fc2(a * around.permute(0, 2, 3, 1)))
    with pytest.raises(ValueError, match="mlp_ratio="):
        SpatialGateMlp(5, 1.0)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (3, 33)])
@pytest.mark.parametrize("compat", [None, "authors"])
def test_any_size(size, compat):
    y = tiny(compat=compat)(torch.rand(1, 3, *size))
    assert y.shape == (1, 3, 2 * size[0], 2 * size[1]) and y.isfinite().all()


def test_tiles_are_cut_where_windows_begin():
    m, x = tiny().double(), data(1, 3, 20, 12)
    assert m.align == 4 and attnlib.create_model("rgt_x4", depths=(1,), num_heads=(6,)).align == 32
    torch.testing.assert_close(m.restore(x, tile=32, scale=2), m(x).detach())
    assert m.restore(x, tile=8, overlap=4).shape == (1, 3, 40, 24)
    with pytest.raises(ValueError, match="built for scale=2"):
        m.restore(x, scale=3)


def test_another_mechanism_takes_both_places():
    m = tiny(mechanism="hat", mechanism_settings={"window_size": 4})
    assert {type(b.mixer.inner).__name__ for b in m.groups[0].blocks} == {"OverlappingCrossAttention"}
    assert m(torch.rand(1, 3, 9, 8)).isfinite().all()


def test_the_start_of_the_authors():
    m = tiny()
    recursive = m.groups[0].blocks[1].mixer.inner
    for linear in (recursive.v, m.groups[0].blocks[0].mixer.inner.qkv, m.groups[0].blocks[0].mlp.inner.fc1):
        assert 0.019 < float(linear.weight.detach().std()) < 0.021 and not linear.bias.any()
    assert float(recursive.narrow.conv.weight.detach().std()) > 0.05  # convolutions start as they do


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(residual_conv="2conv"), "residual_conv="),
        (dict(num_heads=(5,)), "num_heads"),
        (dict(num_heads=(3,)), "halves"),
        (dict(num_heads=(6, 6)), "num_heads="),
        (dict(split_size=(0, 4)), "split_size"),
        (dict(c_ratio=0.0), "c_ratio"),
        (dict(scale=6), "scale=6 is not possible"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
