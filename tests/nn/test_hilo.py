"""hilo-litv2: high- and low-frequency heads, one test per acceptance criterion of the card that concerns the layer."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import attnlib
from attnlib.grids import block_windows, unblock_windows
from attnlib.nn.dense.softmax_attention import SoftmaxAttention
from attnlib.nn.partition.maxvit import PartitionAttention

F64 = torch.float64
#: Work of the fused product on the CPU, which torch's counter does not know.
FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q, k, v
    )
}


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("hilo-litv2", **{"dim": 12, "num_heads": 4, **config}).double().eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module


def heads(q, k, v, count):
    """Plain attention of (N, H * D) queries over (M, H * D) keys and values, head by head."""
    out = []
    for one in zip(*(t.chunk(count, -1) for t in (q, k, v)), strict=True):
        a, b, c = one
        out.append((a @ b.T * a.shape[-1] ** -0.5).softmax(-1) @ c)
    return torch.cat(out, -1)


def oracle(m, x, size):
    """(H, W, C): both branches token by token, on a map that windows divide."""
    parts = []
    if m.high is not None:
        windows = block_windows(x[None], size)
        out = torch.zeros(*windows.shape[:-1], m.high.proj.out_features, dtype=x.dtype)
        for i in range(windows.shape[1]):
            for j in range(windows.shape[2]):
                q, k, v = m.high.qkv(windows[0, i, j].flatten(0, 1)).chunk(3, -1)
                out[0, i, j] = heads(q, k, v, m.high.num_heads).view(size, size, -1)
        parts.append(m.high.proj(unblock_windows(out)[0]))
    if m.low is not None:
        means = block_windows(x[None], size)[0].mean((2, 3)).flatten(0, 1)
        k, v = m.low.kv(means).chunk(2, -1)
        out = heads(m.low.q(x.flatten(0, 1)), k, v, m.low.num_heads)
        parts.append(m.low.proj(out).view(*x.shape[:2], -1))
    return torch.cat(parts, -1)


@pytest.mark.parametrize(("alpha", "low"), [(0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (0.9, 3), (1, 4)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_output_equals_both_branches(alpha, low, size):
    m = make(alpha=alpha, window_size=size, qkv_bias=True)
    low = 4 if size == 1 else low
    assert (m.low.num_heads if m.low else 0, m.high.num_heads if m.high else 0) == (low, 4 - low)
    x = torch.randn(2, 6, 12, 12, dtype=F64)
    torch.testing.assert_close(m(x), torch.stack([oracle(m, one, size) for one in x]))


def test_windows_of_one_token_are_plain_attention():
    m, plain = make(window_size=1, qkv_bias=True), SoftmaxAttention(12, 4).double()
    k, v = m.low.kv.weight.chunk(2), m.low.kv.bias.chunk(2)
    theirs = {"q.weight": m.low.q.weight, "q.bias": m.low.q.bias, "proj.weight": m.low.proj.weight}
    theirs |= {"k.weight": k[0], "v.weight": k[1], "k.bias": v[0], "v.bias": v[1], "proj.bias": m.low.proj.bias}
    plain.load_state_dict(theirs)
    x = torch.randn(2, 5, 3, 12, dtype=F64)
    ours, expected = m(x, returns=("weights",)), plain(x, returns=("weights",))
    torch.testing.assert_close(ours.y, expected.y)
    torch.testing.assert_close(ours.weights, expected.weights)
    mask = torch.rand(15, 15) < 0.7
    torch.testing.assert_close(m(x, mask=mask), plain(x, mask=mask))


def test_high_heads_alone_are_window_attention():
    m = make(alpha=0.0, window_size=3)
    windows = PartitionAttention(12, 4, 3, rel_bias=False, qkv_bias=False).double()
    windows.load_state_dict({k.removeprefix("high."): v for k, v in m.state_dict().items()})
    x = torch.randn(2, 7, 6, 12, dtype=F64)
    torch.testing.assert_close(m(x), windows(x))


def test_a_map_that_is_constant_in_windows_is_read_as_a_whole():
    """Keys that are the same weigh as one: means of windows give what all tokens give."""
    m, full = make(alpha=1.0, window_size=2), make(window_size=1)
    x = torch.randn(1, 3, 4, 12, dtype=F64).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(m(x), full(x))


def test_the_share_of_heads_is_cut_off_as_the_authors_do():
    assert attnlib.create("hilo", dim=24, num_heads=12, alpha=0.9).low.num_heads == 10
    assert attnlib.create("hilo", dim=100, num_heads=100, alpha=0.29).low.num_heads == 28


def test_work_falls_as_the_share_of_low_heads_grows():
    """On a map of 14 x 14 tokens, windows of 2: as the authors' figure shows, and as their formula counts."""
    n, dim, count, size = 196, 24, 12, 2
    measured, counted = [], []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        m = attnlib.create("hilo", dim=dim, num_heads=count, alpha=alpha, window_size=size).eval()
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, torch.no_grad():
            m(torch.randn(1, 14, 14, dim))
        measured.append(counter.get_total_flops() / 2)
        low = int(count * alpha) * dim // count
        high, keys = dim - low, n // size**2
        counted.append(
            3 * n * dim * high + 2 * n * size**2 * high + n * high**2
            + n * dim * low + 2 * keys * dim * low + 2 * n * keys * low + n * low**2
        )  # fmt: skip
    assert measured == counted
    assert attnlib.create("hilo", dim=384, num_heads=12, alpha=0.9).low.num_heads == 10


def test_maps_that_windows_do_not_divide():
    x = torch.randn(2, 5, 7, 12, dtype=F64)
    masked, zeros = make(window_size=4), make(window_size=4, pad="zeros")
    valid = torch.zeros(2, 8, 8, dtype=torch.bool)
    valid[:, :5, :7] = True
    large = torch.randn(2, 8, 8, 12, dtype=F64)
    large[:, :5, :7] = x
    torch.testing.assert_close(masked(x), masked(large, valid=valid)[:, :5, :7])
    torch.testing.assert_close(zeros(x), zeros(large.masked_fill(~valid[..., None], 0.0))[:, :5, :7])
    assert not torch.allclose(masked(x), zeros(x))
    with pytest.raises(ValueError, match=r"window_size=\(4, 4\) does not divide the grid \(5, 7\)"):
        make(window_size=4, pad="refuse")(x)


def test_dropout_acts():
    x = torch.randn(1, 4, 4, 12, dtype=F64)
    for name in ("attn_drop", "proj_drop"):
        m = make(**{name: 0.5})
        y = m(x)
        changed = (m.train()(x) - y).abs()
        assert changed[..., :6].max() > 1e-3 and changed[..., 6:].max() > 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(window_size=0), "window_size must be an integer of at least 1"),
        (dict(window_size=(2, 0)), "window_size"),
        (dict(window_size=(2, 2), rank=3), "window_size"),
        (dict(alpha=1.5), "alpha"),
        (dict(alpha=-0.1), "alpha"),
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
        (dict(pad="crop"), "pad='crop' is not possible"),
        (dict(rank=4), "rank"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_bad_calls_are_refused():
    m = make()
    with pytest.raises(ValueError, match="takes no mask"):
        m(torch.randn(1, 4, 4, 12, dtype=F64), mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot return 'weights'"):
        m(torch.randn(1, 4, 4, 12, dtype=F64), returns=("weights",))
    with pytest.raises(ValueError, match=r"x must have shape \(B, H, W, C\)"):
        make(window_size=(2, 2))(torch.randn(1, 4, 12, dtype=F64))
