"""fused-neighborhood-attention: what the card asks for, streaming, tokens beside the grid, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib import Layout, masks
from attnlib.ops import attention, attention_partial
from attnlib.ops.neighborhood import neighborhood_attention, neighborhood_partial


def make(seed=0, **config):
    torch.manual_seed(seed)
    return attnlib.create(
        "fused-neighborhood-attention", **{"dim": 8, "num_heads": 2, "kernel_size": 3, **config}
    ).double()


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(m, x, **call):
    """The module's projections around plain attention."""
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).flatten(1, -3).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    return m.proj(attention(q, k, v, **call).transpose(1, 2).flatten(2)).reshape(x.shape)


@pytest.mark.parametrize("grid", [(9,), (5, 6), (3, 4, 5)])
def test_kernel_of_the_grid_is_dense_attention(grid):
    m, x = make(kernel_size=grid), data(2, *grid, 8)
    torch.testing.assert_close(m(x), dense(m, x), atol=1e-12, rtol=0)


def test_causal_kernel_of_the_sequence_is_causal_attention():
    m, x = make(kernel_size=9, causal=True), data(2, 9, 8)
    torch.testing.assert_close(m(x), dense(m, x, mask=masks.causal()), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "kernel", "dilation"), [((17,), 4, 3), ((9, 10), (3, 4), (2, 1)), ((4, 6, 5), 2, 2)])
def test_every_query_sees_exactly_the_kernel_also_in_corners(grid, kernel, dilation):
    """Counted on what the tiled path reads, not on a mask: equal scores, one-hot values."""
    n = math.prod(grid)
    zero, eye = torch.zeros(1, 1, n, 1), torch.eye(n)[None, None]
    read = neighborhood_attention(zero, zero, eye, grid, kernel, dilation)[0, 0] > 0
    assert (read.sum(-1) == math.prod(attnlib.types.to_tuple("k", kernel, len(grid)))).all()


def test_interior_follows_a_shift_and_corners_do_not():
    x = data(1, 12, 12, 8)
    m = make(kernel_size=5)
    shifted = m(x.roll((2, 1), (1, 2)))
    y = m(x).roll((2, 1), (1, 2))
    inner = (slice(None), slice(4, 10), slice(3, 10))
    torch.testing.assert_close(shifted[inner], y[inner], atol=1e-12, rtol=0)
    assert (shifted - y)[:, 0, 0].abs().max() > 1e-3


def test_dilation_is_interleaved_grids():
    m, local = make(dilation=(2, 3)), make()
    x = data(2, 8, 9, 8)
    parts = torch.empty_like(x)
    for i in range(2):
        for j in range(3):
            parts[:, i::2, j::3] = local(x[:, i::2, j::3])
    torch.testing.assert_close(m(x), parts, atol=1e-12, rtol=0)


def test_merging_with_extra_tokens_equals_additional_keys():
    q, k, v = data(3, 2, 2, 6, 7, 4)
    more_k, more_v = data(2, 2, 2, 5, 4, seed=2)
    merged = neighborhood_partial(q, k, v, None, 3).merge(attention_partial(q.flatten(2, 3), more_k, more_v)).finish()
    joined = neighborhood_attention(q, k, v, None, 3, extra_k=more_k, extra_v=more_v).flatten(2, 3)
    torch.testing.assert_close(merged, joined, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rel_bias", [False, True])
@pytest.mark.parametrize("segments", [(("cls", 2), ("image", (5, 6))), (("text", 3), ("image", (5, 6)), ("reg", 1))])
def test_tokens_beside_the_grid_read_and_are_read_by_everything(segments, rel_bias):
    layout = Layout(segments)
    m = make(rank=2, rel_bias=rel_bias)
    x, valid = data(2, len(layout), 8), torch.rand(2, len(layout), generator=torch.Generator().manual_seed(0)) < 0.8
    bias = None
    start, stop = layout.span("image")
    if rel_bias:
        places = attnlib.grids.coordinates((5, 6))
        step = (places[None] - places[:, None] + 2).clamp(0, 4)
        bias = torch.zeros(2, len(layout), len(layout), dtype=torch.float64)
        bias[:, start:stop, start:stop] = m.rpb[:, step[..., 0], step[..., 1]].detach()
    for mask in (None, masks.strided(2, local=4)):
        allowed = masks.on_segment(layout, "image", masks.neighborhood((5, 6), 3))
        allowed = allowed if mask is None else allowed & mask
        expected = dense(m, x, mask=allowed, valid=valid, bias=bias).masked_fill(~valid[..., None], 0)
        torch.testing.assert_close(m(x, layout=layout, valid=valid, mask=mask), expected, atol=1e-12, rtol=0)
        shown = m(x, layout=layout, valid=valid, mask=mask, returns=("weights",))
        torch.testing.assert_close(shown.y, expected, atol=1e-12, rtol=0)
        assert not (shown.weights > 0)[:, :, ~(allowed.dense(len(layout)))].any()


@pytest.mark.parametrize("rel_bias", [False, True])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("chunks", [[1] * 20, [5, 1, 14], [20], [13, 7], [2, 18]])
def test_streaming_equals_the_whole_and_keeps_a_ring(kernel, dilation, chunks, rel_bias):
    m = make(kernel_size=kernel, dilation=dilation, causal=True, rel_bias=rel_bias)
    x, valid = data(2, 20, 8), torch.ones(2, 20, dtype=torch.bool)
    valid[0, :4] = False
    for mask in (None, masks.strided(3)):
        whole, state, parts = m(x, valid=valid, mask=mask), None, []
        for piece, exists in zip(x.split(chunks, 1), valid.split(chunks, 1), strict=True):
            y, state = m.step(piece, state, valid=exists, mask=mask)
            parts.append(y)
            assert state["k"].shape[2] <= (kernel - 1) * dilation
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rel_bias", [False, True])
@pytest.mark.parametrize("chunks", [[2, 1, 9], [12], [7, 5]])
def test_weights_of_a_stream_are_those_of_the_whole(chunks, rel_bias):
    """(B, H, n, M): remembered tokens first; a sequence shorter than its window shows its weights too."""
    m = make(kernel_size=4, dilation=2, causal=True, rel_bias=rel_bias)
    x, valid = data(2, 12, 8), torch.ones(2, 12, dtype=torch.bool)
    valid[1, :3] = False
    whole = m(x, valid=valid, returns=("weights",)).weights
    state, at = None, 0
    for piece, exists in zip(x.split(chunks, 1), valid.split(chunks, 1), strict=True):
        out = m(piece, valid=exists, state=state, returns=("weights", "state"))
        plain = m(piece, valid=exists, state=state, returns=("state",))
        torch.testing.assert_close(out.y, plain.y, atol=1e-12, rtol=0)
        stop, (rows, keys) = at + piece.shape[1], out.weights.shape[2:]
        assert rows == piece.shape[1] and keys == (0 if state is None else state["k"].shape[2]) + rows
        want = whole[:, :, at:stop, stop - keys : stop]
        torch.testing.assert_close(out.weights, want, atol=1e-12, rtol=0)
        state, at = out.state, stop


def test_causal_axes_mix_with_bidirectional_ones():
    """A video that is causal in time: a frame reads earlier frames and the whole neighbourhood in space."""
    m, x = make(kernel_size=3, causal=(True, False, False)), data(1, 5, 4, 4, 8).requires_grad_()
    (grad,) = torch.autograd.grad(m(x)[:, 2].sum(), x)
    touched = grad.abs().sum((0, 2, 3, 4)) > 0
    assert touched.tolist() == [True, True, True, False, False]
    assert (grad[0, 0].abs().sum(-1) > 0).all()
    assert m.traits.patterns == {"causal-self"} and not m.traits.streaming
    assert make(kernel_size=3, causal=(False, True)).traits.patterns == {"noncausal-self"}


def test_dropout_acts_in_training_only():
    m, x = make(attn_drop=0.5), data(1, 9, 8)
    torch.manual_seed(0)
    assert not torch.equal(m.train()(x), m(x))
    assert torch.equal(m.eval()(x), m(x))


def test_forced_specification_gives_the_same():
    m, x = make(rel_bias=True, rank=2), data(2, 6, 7, 8)
    with attnlib.use_backend("eager"):
        expected = m(x)
    torch.testing.assert_close(m(x), expected, atol=1e-12, rtol=0)


def test_one_instance_takes_every_rank_unless_told():
    m = make()
    for grid in ((6,), (4, 5), (3, 4, 3)):
        assert m(data(1, *grid, 8)).shape == (1, *grid, 8)
    assert make(causal=True).traits.grid_ranks == {1}
    assert make(kernel_size=(3, 5)).traits.grid_ranks == {2}


def test_parameters_carry_the_authors_names():
    assert set(make(rank=2, rel_bias=True).state_dict()) == {
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
        "rpb",
    }
    assert set(make(qkv_bias=False).state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}


def test_equal_to_sliding_windows_away_from_borders_only():
    """Clamped windows are not zero-padded ones: inside they agree, at the border they do not."""
    q, k, v = data(3, 1, 1, 30, 4)
    clamped = neighborhood_attention(q, k, v, None, 5)
    cut = attention(q, k, v, mask=masks.sliding_window(5))
    torch.testing.assert_close(clamped[:, :, 2:-2], cut[:, :, 2:-2], atol=1e-12, rtol=0)
    assert (clamped - cut)[:, :, 0].abs().max() > 1e-3


def test_output_equals_explicit_gathering():
    """One row of a 2-D map by hand."""
    m, x = make(kernel_size=3), data(1, 5, 5, 8)
    q, k, v = (t.unflatten(-1, (2, 4))[0] for t in m.qkv(x).chunk(3, -1))
    window = (slice(0, 3), slice(2, 5))  # of the corner (0, 4)
    keys, values = k[window].flatten(0, 1), v[window].flatten(0, 1)
    weights = F.softmax(torch.einsum("hd,khd->hk", q[0, 4], keys) / 2, -1)
    expected = m.proj(torch.einsum("hk,khd->hd", weights, values).flatten())
    torch.testing.assert_close(m(x)[0, 0, 4], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide dim=8"),
        (dict(kernel_size=1), "at least 2"),
        (dict(dilation=0), "dilation must be at least 1"),
        (dict(kernel_size=(3, 3), dilation=(1, 1, 1)), "names 3 axes"),
        (dict(kernel_size=(3, 3), rank=1), "rank=1"),
        (dict(rank=4), "rank=4 is not possible"),
        (dict(rel_bias=True), "give rank=1, 2 or 3"),
        (dict(kernel_size=2.5), "kernel_size must be an integer"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**config)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"kernel_size=3 is larger than the grid \(2, 8\) on axis 0"):
        make(pad="refuse")(data(1, 2, 8, 8))
    with pytest.raises(ValueError, match="possible: dilation from 1 to 2"):
        make(dilation=4, pad="refuse")(data(1, 8, 8))
    with pytest.raises(ValueError, match="layout adds up to 21 tokens"):
        make()(data(1, 20, 8), layout=Layout.image(4, 5, cls=1))
    with pytest.raises(ValueError, match="rank=2"):
        make(rank=2)(data(1, 6, 8), layout=Layout((("sequence", (5,)), ("cls", 1))))
    with pytest.raises(ValueError, match="trait streaming is False"):
        make().step(data(1, 1, 8))
    with pytest.raises(ValueError, match="valid must have shape"):
        make()(data(1, 4, 4, 8), valid=torch.ones(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not divide|takes no context"):
        make()(data(1, 4, 8), data(1, 4, 8))
