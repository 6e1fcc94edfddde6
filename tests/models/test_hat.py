"""HAT: overlapping windows, channel attention beside windows, and the model around them."""

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.models.restore.base import reflected
from attnlib.nn.local.hat import OverlappingCrossAttention
from attnlib.nn.partition.maxvit import PartitionAttention
from tests.parity import Models

RECORDED = Models("hat")
TINY = dict(
    embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, compress_ratio=4, squeeze_factor=4, drop_path_rate=0.0
)


def data(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(**settings):
    torch.manual_seed(0)
    m = OverlappingCrossAttention(**{"dim": 8, "num_heads": 2, "window_size": 4, **settings}).double()
    torch.nn.init.normal_(m.rel_bias)
    return m


def tiny(name="hat_x2", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


@pytest.mark.parametrize("case", RECORDED.config)
def test_the_authors_model(case):
    RECORDED.model_holds(case)


@pytest.mark.parametrize("compat", [None, "authors"])
def test_overlapping_windows_one_query_at_a_time(compat):
    """softmax(q k^T D^-1/2 + B[key - query]) v over the window around each query's window."""
    m, x = make(compat=compat), data(1, 8, 12, 8)
    q, k, v = (t.unflatten(-1, (2, 4)) for t in m.qkv(x).chunk(3, -1))
    out = torch.zeros_like(q)
    for y in range(8):
        for z in range(12):
            top, left = y // 4 * 4 - 1, z // 4 * 4 - 1
            scores, values = [], []
            for ky in range(top, top + 6):
                for kz in range(left, left + 6):
                    inside = 0 <= ky < 8 and 0 <= kz < 12
                    if not inside and compat is None:
                        continue
                    key = k[0, ky, kz] if inside else torch.zeros(2, 4).double()
                    values.append(v[0, ky, kz] if inside else torch.zeros(2, 4).double())
                    bias = m.rel_bias[:, ky - top - (y - top - 1) + 3, kz - left - (z - left - 1) + 3]
                    scores.append((q[0, y, z] * key).sum(-1) * 0.5 + bias)
            w = torch.stack(scores).softmax(0)
            out[0, y, z] = (w[..., None] * torch.stack(values)).sum(0)
    torch.testing.assert_close(m(x), m.proj(out.flatten(-2)))


def test_without_overlap_it_is_attention_in_windows():
    m, x = make(overlap_ratio=0.0), data(2, 8, 8, 8)
    windows = PartitionAttention(8, 2, 4).double()
    windows.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), windows(x))


def test_a_query_reads_half_the_overlap_further():
    m, x = make(), data(1, 12, 12, 8).requires_grad_()
    (seen,) = torch.autograd.grad(m(x)[0, 5, 5].sum(), x)
    rows = (seen[0].abs().sum(-1) > 0).any(1).nonzero().flatten().tolist()
    assert rows == list(range(3, 9))  # its window 4..7 and one beyond on every side


def test_without_channel_attention_and_overlap_it_is_swinir():
    """alpha = 0 and no overlap leave residual blocks of windows, every second one shifted."""
    m = tiny(alpha=0.0, overlap_ratio=0.0).double()
    x = data(1, 8, 8, 8)
    block = m.groups[0].blocks[1]
    assert block.attention.shift == (2, 2) and m.groups[0].blocks[0].attention.shift == (0, 0)
    expected = x + block.attention(block.norm(x))
    torch.testing.assert_close(block(x), expected + block.mlp.inner(block.mlp.norm(expected)))


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (3, 17)])
def test_any_size(size):
    m, x = tiny(), torch.rand(1, 3, *size)
    y = m(x)
    assert y.shape == (1, 3, 2 * size[0], 2 * size[1]) and y.isfinite().all()
    whole = reflected(x, (-size[0] % 4, -size[1] % 4))
    torch.testing.assert_close(y, m(whole)[..., : 2 * size[0], : 2 * size[1]])
    if min(size) > 3:
        torch.testing.assert_close(whole, F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4), mode="reflect"))


def test_the_start_of_the_authors():
    m = tiny()
    tables = [p for n, p in m.named_parameters() if n.endswith("rel_bias")]
    assert all(0.01 < float(t.std()) < 0.03 for t in tables)
    assert float(m.norm.weight.std()) == 0 and float(m.groups[0].blocks[0].mlp.inner.fc1.bias.abs().max()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(overlap_ratio=0.25), "must be even"),
        (dict(overlap_ratio=-1), "overlap_ratio"),
        (dict(window_size=0), "window_size"),
        (dict(compat="theirs"), "compat="),
        (dict(pad="wrap"), "pad="),
        (dict(num_heads=3), "num_heads=3 does not divide"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_input():
    with pytest.raises(ValueError, match="scale=5 is not possible"):
        tiny(scale=5)
    for bad in (torch.rand(1, 1, 8, 8), torch.rand(3, 8, 8), torch.rand(1, 3, 0, 8), torch.zeros(1, 3, 8, 8).long()):
        with pytest.raises(ValueError, match="x must"):
            tiny()(bad)
    with pytest.raises(ValueError, match="does not divide|windows"):
        make(pad="refuse")(data(1, 6, 8, 8))
    with pytest.raises(ValueError, match="relative_position_bias_table has 9"):
        OverlappingCrossAttention.convert_state_dict({"relative_position_bias_table": torch.zeros(9, 2)})
