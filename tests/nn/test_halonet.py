"""Halo attention: blocks of queries, a halo of keys, and what lies outside the map."""

import pytest
import torch

import attnlib
from attnlib.nn.local.halonet import HaloAttention, HaloDownsampling
from attnlib.nn.partition.maxvit import PartitionAttention


def data(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(cls=HaloAttention, **settings):
    torch.manual_seed(0)
    return cls(**{"dim": 8, "num_heads": 2, "block_size": 4, "halo_size": 1, **settings}).double()


def spec(m, x, pad_mode):
    """One query at a time: softmax(q k^T D^-1/2 + q . R_y + q . R_x) v over the window of its block."""
    h, side = m.halo, m.halo.block_size + 2 * m.halo.halo_size
    q, k, v = (t.unflatten(-1, (2, -1)) for t in (h.q(x), h.k(x), h.v(x)))
    out = torch.zeros_like(v)
    for y in range(x.shape[1]):
        for z in range(x.shape[2]):
            start = [p // h.block_size * h.block_size - h.halo_size for p in (y, z)]
            if pad_mode == "clamp":
                start = [max(0, min(s, n - side)) for s, n in zip(start, x.shape[1:3], strict=True)]
            scores, values = [], []
            for ky in range(start[0], start[0] + side):
                for kz in range(start[1], start[1] + side):
                    inside = 0 <= ky < x.shape[1] and 0 <= kz < x.shape[2]
                    if not inside and pad_mode == "masked":
                        continue
                    key = k[0, ky, kz] if inside else torch.zeros_like(k[0, 0, 0])
                    values.append(v[0, ky, kz] if inside else torch.zeros_like(v[0, 0, 0]))
                    at = [(g + h.halo_size + side - 1) % (2 * side - 1) for g in (ky - y, kz - z)]
                    place = h.height_rel[at[0]] + h.width_rel[at[1]]
                    scores.append((q[0, y, z] * key).sum(-1) * h.scale + (q[0, y, z] * place).sum(-1))
            w = torch.stack(scores).softmax(0)
            out[0, y, z] = (w[..., None] * torch.stack(values)).sum(0)
    return out.flatten(-2)


@pytest.mark.parametrize("pad_mode", ["masked", "zero", "clamp"])
def test_one_query_at_a_time(pad_mode):
    m, x = make(block_size=2, pad_mode=pad_mode), data(1, 4, 6, 8)
    torch.testing.assert_close(m(x), spec(m, x, pad_mode))


def test_without_a_halo_it_is_attention_in_windows_with_a_query_dependent_bias():
    m, x = make(halo_size=0), data(2, 8, 8, 8)
    with torch.no_grad():
        m.halo.height_rel.zero_()
        m.halo.width_rel.zero_()
    windows = PartitionAttention(8, 2, 4, rel_bias=False, qkv_bias=False, proj_bias=False).double()
    parts = [m.halo.q.weight, m.halo.k.weight, m.halo.v.weight]
    windows.load_state_dict({"qkv.weight": torch.cat(parts), "proj.weight": torch.eye(8)})
    torch.testing.assert_close(m(x), windows(x))


def test_one_token_a_block_is_a_sliding_window():
    m, x = make(block_size=1, halo_size=2), data(1, 6, 6, 8).requires_grad_()
    (seen,) = torch.autograd.grad(m(x)[0, 3, 3].sum(), x)
    rows = (seen[0].abs().sum(-1) > 0).any(1).nonzero().flatten().tolist()
    assert rows == [1, 2, 3, 4, 5]


def test_a_block_as_large_as_the_map_reads_everything():
    m, x = make(halo_size=0), data(1, 4, 4, 8)
    torch.testing.assert_close(m(x), spec(m, x, "masked"))


def test_constant_images_stay_constant_where_the_border_is_masked():
    x = data(1, 1, 1, 8).expand(1, 8, 8, 8)
    for pad_mode, constant in (("masked", True), ("clamp", True), ("zero", False)):
        y = make(pad_mode=pad_mode)(x)
        assert torch.allclose(y, y[:, :1, :1].expand_as(y)) == constant, pad_mode


def test_pixels_further_than_the_halo_change_nothing():
    m, x = make(), data(1, 12, 12, 8)
    other = x.clone()
    other[:, 9:] += 1
    assert torch.equal(m(other)[:, :4], m(x)[:, :4])
    assert not torch.equal(m(other)[:, 8:], m(x)[:, 8:])


@pytest.mark.parametrize("compat", [None, "authors"])
def test_downsampling_is_every_second_query(compat):
    """With tables of zeros, nothing but which queries are asked differs from the whole map."""
    few, all_of_them, x = make(HaloDownsampling, compat=compat), make(), data(2, 8, 8, 8)
    all_of_them.load_state_dict(few.state_dict())
    if compat is None:
        torch.testing.assert_close(few(x), all_of_them(x)[:, ::2, ::2])
    else:
        assert not torch.allclose(few(x), all_of_them(x)[:, ::2, ::2])
    with torch.no_grad():
        for m in (few, all_of_them):
            m.halo.height_rel.zero_()
            m.halo.width_rel.zero_()
    torch.testing.assert_close(few(x), all_of_them(x)[:, ::2, ::2])


def test_means_of_the_outputs():
    mean, all_of_them, x = make(HaloDownsampling, average=True), make(), data(2, 8, 8, 8)
    all_of_them.load_state_dict(mean.state_dict())
    expected = all_of_them(x).unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))
    torch.testing.assert_close(mean(x), expected)
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[:, :, 5:] = False
    y = mean(x, valid)
    torch.testing.assert_close(y[:, :, 2], all_of_them(x, valid=valid)[:, :, 4].unflatten(1, (4, 2)).mean(2))
    assert not y[:, :, 3].any()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 3)])
@pytest.mark.parametrize("settings", [{}, {"average": True}, {"block_size": 3}])
def test_downsampling_takes_any_size(size, settings):
    m = make(HaloDownsampling, **settings)
    x = data(1, *size, 8)
    y = m(x)
    assert y.shape == (1, -(-size[0] // 2), -(-size[1] // 2), 8) and y.isfinite().all()
    valid = torch.ones(1, 12, 12, dtype=torch.bool)
    valid[:, size[0] :], valid[:, :, size[1] :] = False, False
    padded = torch.full((1, 12, 12, 8), float("nan"), dtype=x.dtype)
    padded[:, : size[0], : size[1]] = x
    torch.testing.assert_close(m(padded, valid)[:, : y.shape[1], : y.shape[2]], y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(block_size=0), "block_size"),
        (dict(halo_size=-1), "halo_size"),
        (dict(pad_mode="wrap"), "pad_mode="),
        (dict(pad="wrap"), "pad="),
        (dict(num_heads=3), "num_heads=3 does not divide"),
        (dict(qk_ratio=0), "qk_ratio"),
        (dict(cls=HaloDownsampling, compat="timm"), "compat="),
        (dict(cls=HaloDownsampling, stride=0), "stride"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_input():
    with pytest.raises(ValueError, match="does not divide the grid"):
        make(pad="refuse")(data(1, 6, 8, 8))
    with pytest.raises(ValueError, match="x must have"):
        make(HaloDownsampling)(data(1, 6, 8))
    with pytest.raises(ValueError, match="num_heads"):
        attnlib.convert_state_dict("halonet", {"kv.weight": torch.zeros(10, 8, 1, 1)}, num_heads=4)


def test_bottleneck_attention_is_one_block_without_a_halo():
    """Its queries, keys and values are one convolution's, one after another; every displacement has a vector."""
    m = make(block_size=4, halo_size=0)
    own = m.halo.state_dict()
    theirs = {"qkv.weight": torch.cat([own[f"{n}.weight"] for n in "qkv"])[..., None, None]}
    theirs |= {f"pos_embed.{n}": own[n] for n in ("height_rel", "width_rel")}
    for options in ({}, {"head_dim": 4}):
        again = make(block_size=4, halo_size=0)
        again.load_state_dict(HaloAttention.convert_state_dict(theirs, num_heads=2, **options))
        x = data(1, 4, 4, 8)
        torch.testing.assert_close(again(x), m(x))
    with pytest.raises(ValueError, match="num_heads"):
        HaloAttention.convert_state_dict(theirs, num_heads=5)
