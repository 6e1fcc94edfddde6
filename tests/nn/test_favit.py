"""favit: factorization self-attention, one test per acceptance criterion of the card that concerns the layer."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import attnlib
from attnlib.grids import mirrored_places
from attnlib.nn.reduced.favit import WindowReader

F64 = torch.float64
#: Work of the fused product on the CPU, which torch's counter does not know.
FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q, k, v
    )
}


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("favit", **{"dim": 32, "num_heads": 2, "sr_ratio": 2, "window_size": 3, **config})
    module = module.double().eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return module


def attend(q, k, v):
    """Plain attention of (N, D) queries over (M, D) keys and values."""
    return (q @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v


def oracle(m, x):
    """One image (H, W, C): windows are cut out of a map padded by reflection, and averaged one by one."""
    height, width, dim = x.shape
    first, side = m.widths[0], m.readers[0].window_size
    nchw = x.permute(2, 0, 1)[None]
    q = m.q(x).flatten(0, 1)
    cells = m.norm(m.pool(nchw[:, :first]).permute(0, 2, 3, 1))[0]
    k, v = m.kv(cells).chunk(2, -1)
    v = v + m.conv(v[None])[0]
    parts = [attend(q[:, :first], k.flatten(0, 1), v.flatten(0, 1))]
    z = m.pointwise(m.depthwise(x[None, ..., first:]))
    rest = q[:, first:].unflatten(1, (m.num_heads, -1))
    at, lane = 0, 0
    for reader, channels in zip(m.readers, m.widths[1:], strict=True):
        group = z[..., at : at + channels].permute(0, 3, 1, 2)
        reach, per = reader.dilation * (side - 1) + 1, channels // m.num_heads
        padded = F.pad(group, (0, -width % reach, 0, -height % reach), mode="reflect")[0]
        windows = [
            padded[:, i : i + reach : reader.dilation, j : j + reach : reader.dilation]
            for i in range(0, padded.shape[1], reach)
            for j in range(0, padded.shape[2], reach)
        ]
        fused = sum(windows) / len(windows)  # (channels, side, side)
        keys, values = [], []
        for h in range(m.num_heads):
            one = fused[h * per : (h + 1) * per].flatten(1).T
            k, v = reader.kv(reader.fc(one)).chunk(2, -1)
            keys.append(k)
            values.append(v.T.unflatten(1, (side, side)))
        values = torch.cat(values)
        values = values + reader.conv(values.permute(1, 2, 0)[None])[0].permute(2, 0, 1)
        out = [
            attend(rest[:, h, lane : lane + per], keys[h], values[h * per : (h + 1) * per].flatten(1).T)
            for h in range(m.num_heads)
        ]
        parts.append(torch.cat(out, -1))
        at, lane = at + channels, lane + per
    return m.proj(torch.cat(parts, -1)).view(height, width, dim)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (dict(), (6, 10)),
        (dict(sr_ratio=1), (7, 5)),
        (dict(sr_ratio=3, window_size=2, qkv_bias=False), (9, 6)),
        (dict(sr_ratio=1, window_size=7, num_heads=4), (7, 7)),
    ],
)
def test_output_equals_windows_cut_and_averaged(config, grid):
    m, x = make(**config), torch.randn(2, *grid, 32, dtype=F64)
    torch.testing.assert_close(m(x), torch.stack([oracle(m, one) for one in x]))


def test_every_query_reads_the_same_few_keys():
    m, seen = make(window_size=7, sr_ratio=2), []
    for reader in m.readers:
        reader.kv.register_forward_hook(lambda f, args, y: seen.append(y.shape))
    m.kv.register_forward_hook(lambda f, args, y: seen.append(y.shape))
    m(torch.randn(1, 28, 28, 32, dtype=F64))
    assert [tuple(s[1:-1]) for s in seen] == [(14, 14), (7, 7, 2), (7, 7, 2)]


@pytest.mark.parametrize("legacy", [False, True])
def test_the_order_of_windows_does_not_matter_unless_neighbours_are_averaged(legacy):
    torch.manual_seed(0)
    reader = WindowReader(12, 2, 1, 3, True).double()
    z, weight = torch.randn(1, 6, 9, 8, dtype=F64), torch.randn(12, 8, dtype=F64)
    fuse = reader.scrambled if legacy else reader.fused
    turned = z.unflatten(1, (2, 3)).flip(1).flatten(1, 2).unflatten(2, (3, 3)).roll(1, 2).flatten(2, 3)
    same = torch.allclose(
        fuse(z, lambda t: F.linear(t, weight), None)[0], fuse(turned, lambda t: t @ weight.T, None)[0]
    )
    assert same is not legacy


def test_one_window_is_read_alike_either_way():
    x = torch.randn(1, 3, 3, 32, dtype=F64)
    torch.testing.assert_close(make(sr_ratio=1)(x), make(sr_ratio=1, legacy_fusion=True)(x))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_far_pixel_changes_every_output(legacy):
    m, x = make(sr_ratio=1, legacy_fusion=legacy), torch.randn(1, 12, 12, 32, dtype=F64)
    other = x.clone()
    other[0, 11, 11] += 1
    assert bool(((m(x) - m(other)).abs().amax(-1) > 1e-9).all())


def test_work_grows_with_the_map_alone():
    """But for the first group, whose keys a ratio that grows with the map keeps as few."""

    def work(side, ratio):
        m = attnlib.create("favit", dim=64, num_heads=1, sr_ratio=ratio).eval()
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, torch.no_grad():
            m(torch.randn(1, side, side, 64))
        return counter.get_total_flops()

    assert work(112, 16) / work(56, 8) < 4.3


def test_cells_that_are_not_whole():
    x = torch.randn(1, 7, 9, 32, dtype=F64)
    m, theirs = make(legacy_fusion=True), make(compat="authors")
    assert theirs.legacy_fusion and not torch.allclose(m(x), theirs(x))
    torch.testing.assert_close(m(x[:, :6, :8]), theirs(x[:, :6, :8]))
    edge = x.clone()
    edge[0, 6, :, : m.widths[0]] += 1  # the first group's channels of the last row
    assert not torch.allclose(m(edge)[0, 0], m(x)[0, 0])
    read = theirs(edge) - theirs(x)
    assert read[0, :6].abs().max() < 1e-12 and read[0, 6].abs().max() > 1e-6  # as queries alone


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 2), (4, 13)])
@pytest.mark.parametrize("compat", [None, "authors"])
def test_any_size(grid, compat):
    y = make(sr_ratio=4, window_size=7, compat=compat)(torch.randn(2, *grid, 32, dtype=F64))
    assert y.shape == (2, *grid, 32) and y.isfinite().all()


def test_reflection_is_that_of_torch_where_torch_reflects():
    x = torch.arange(5.0)
    assert x[mirrored_places(0, 9, 5)].equal(F.pad(x[None, None], (0, 4), mode="reflect")[0, 0])


def test_a_key_of_tokens_that_do_not_exist_is_not_read():
    m, x = make(sr_ratio=1), torch.randn(1, 3, 6, 32, dtype=F64)
    valid = torch.ones(1, 3, 6, dtype=torch.bool)
    valid[:, :, 2] = valid[:, :, 5] = False  # the last place of both windows
    weight = torch.eye(28, dtype=F64)
    for fuse in (m.readers[0].fused, m.readers[0].scrambled):
        assert fuse(x[..., :28], lambda t: t @ weight, valid)[1][0].tolist() == [[True, True, False]] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(dim=24), "shares of channels=16 does not divide dim=24"),
        (dict(dim=12, sr_ratio=1), "shares of channels=8 does not divide dim=12"),
        (dict(num_heads=3), "num_heads=3 does not divide channels of a group=14"),
        (dict(sr_ratio=0), "sr_ratio"),
        (dict(window_size=0), "window_size"),
        (dict(compat="paper"), "compat='paper' is not possible"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_it_starts_as_the_authors():
    m = attnlib.create("favit", dim=128, num_heads=2, sr_ratio=2)
    for linear in (m.q, m.proj, m.kv):
        assert 0.018 < linear.weight.std() < 0.022 and not linear.bias.any()
    for conv, fan_out in ((m.pool, 64), (m.conv, 9), (m.depthwise, 9), (m.pointwise, 112), (m.readers[0].conv, 9)):
        assert 0.8 < conv.weight.std() / (2 / fan_out) ** 0.5 < 1.2 and not conv.bias.any()
