"""Engine G: aggregation, gates, and attention between features, each against the plainest formula."""

import pytest
import torch
import torch.nn.functional as F

from attnlib.ops.modulation import (
    channel_attention,
    depthwise,
    gated_sum,
    grid_softmax,
    mixed_depthwise,
    modulate,
    pool,
    pyramid,
    weighted_pool,
)

F64 = torch.float64


@pytest.mark.parametrize("grid", [(9,), (6, 7), (3, 4, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_depthwise_equals_the_channels_first_convolution(grid, dilation):
    torch.manual_seed(0)
    rank, c = len(grid), 4
    x = torch.randn(2, *grid, c, dtype=F64)
    weight, bias = torch.randn(c, 1, *(3,) * rank, dtype=F64), torch.randn(c, dtype=F64)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    want = conv(x.movedim(-1, 1).contiguous(), weight, bias, padding=dilation, dilation=dilation, groups=c)
    torch.testing.assert_close(depthwise(x, weight, bias, dilation=dilation), want.movedim(1, -1))


def test_depthwise_treats_invalid_tokens_as_beyond_the_border():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8, 3, dtype=F64), torch.randn(3, 1, 5, dtype=F64)
    valid = torch.arange(8)[None] < 5
    torch.testing.assert_close(depthwise(x, weight, valid=valid)[:, :5], depthwise(x[:, :5], weight))


def test_a_chain_of_dilated_convolutions_has_the_reach_of_the_decomposition_rule():
    # 5x5, then 7x7 of dilation 3, then nothing per pixel: 5 + 3 * 6 = 23 wide, as in large kernel attention
    c = 2
    weights = [torch.ones(c, 1, 5, 5, dtype=F64), torch.ones(c, 1, 7, 7, dtype=F64)]
    x = torch.zeros(1, 31, 31, c, dtype=F64)
    x[0, 15, 15] = 1
    hit = pyramid(x, weights, dilations=[1, 3])[-1][0, ..., 0] > 0
    rows = hit.any(1).nonzero().flatten()
    assert (rows.min(), rows.max()) == (15 - 11, 15 + 11) and torch.equal(hit.any(0), hit.any(1))


def test_mixed_depthwise_gives_every_run_its_own_reach():
    weights = [torch.ones(2, 1, 3 + 2 * i, 3 + 2 * i, dtype=F64) for i in range(4)]
    x = torch.zeros(1, 13, 13, 8, dtype=F64)
    x[0, 6, 6] = 1
    y = mixed_depthwise(x, weights)
    assert [(y[0, ..., 2 * i] > 0).sum().item() for i in range(4)] == [(3 + 2 * i) ** 2 for i in range(4)]


def test_pool_over_the_grid_and_over_strips_counts_valid_tokens_only():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 3, dtype=F64)
    torch.testing.assert_close(pool(x), x.mean((1, 2), keepdim=True))
    torch.testing.assert_close(pool(x, keep=0), x.mean(2, keepdim=True))
    torch.testing.assert_close(pool(x, keep=1), x.mean(1, keepdim=True))
    valid = torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[:, :3, :2] = True
    torch.testing.assert_close(pool(x, valid=valid), x[:, :3, :2].mean((1, 2), keepdim=True))
    strips = pool(x, keep=0, valid=valid)
    torch.testing.assert_close(strips[:, :3], x[:, :3, :2].mean(2, keepdim=True))
    assert (strips[:, 3:] == 0).all()
    assert (pool(x, valid=torch.zeros_like(valid)) == 0).all()


def test_pool_of_half_precision_keeps_float32_sums():
    x = torch.ones(1, 70000, 1, dtype=torch.float16)
    assert pool(x).item() == 1.0


def test_strip_gates_multiply_to_rank_one():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 3, dtype=F64)
    gates = modulate(torch.ones_like(x), pool(x, keep=0), pool(x, keep=1), activation=torch.sigmoid)
    for channel in range(3):
        assert torch.linalg.matrix_rank(gates[0, ..., channel]) == 1
    assert (gates > 0).all() and (gates < 1).all()


def test_gated_sum_equals_the_formula_also_for_pools():
    torch.manual_seed(0)
    a, b, g = torch.randn(2, 3, 4, 5), torch.randn(2, 1, 1, 5), torch.randn(2, 3, 4, 2)
    torch.testing.assert_close(gated_sum([a, b], g), a * g[..., :1] + b * g[..., 1:])


def channel_oracle(q, k, scale, v, l2):
    if l2:
        q, k = q / q.norm(dim=2, keepdim=True), k / k.norm(dim=2, keepdim=True)
    weights = (scale * torch.einsum("bhni,bhnj->bhij", q, k)).softmax(-1)
    return torch.einsum("bhij,bhnj->bhni", weights, v)


@pytest.mark.parametrize("l2", [False, True])
def test_channel_attention_equals_the_formula(l2):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=F64)
    want = channel_oracle(q, k, 1.0 if l2 else 7**-0.5, v, l2)
    torch.testing.assert_close(channel_attention(q, k, v, l2=l2), want)
    temperature = torch.rand(3, 1, 1, dtype=F64)
    torch.testing.assert_close(
        channel_attention(q, k, v, l2=l2, scale=temperature), channel_oracle(q, k, temperature, v, l2)
    )
    out, weights = channel_attention(q, k, v, l2=l2, return_weights=True)
    assert weights.shape == (2, 3, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, dtype=F64))


@pytest.mark.parametrize("l2", [False, True])
def test_channel_attention_ignores_tokens_that_do_not_exist(l2):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 4, dtype=F64)
    valid = torch.arange(9).expand(2, 9) < 6
    y = channel_attention(q, k, v, valid=valid, l2=l2)
    torch.testing.assert_close(y[:, :, :6], channel_attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], l2=l2))
    assert (y[:, :, 6:] == 0).all()


def test_gradients_are_exact():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 3, 2, dtype=F64, requires_grad=True)
    w = torch.randn(2, 1, 3, 3, dtype=F64, requires_grad=True)
    g = torch.randn(1, 3, 3, 2, dtype=F64, requires_grad=True)
    valid = torch.tensor([[[True, True, False], [True, True, True], [True, False, True]]])

    def operator(x, w, g):
        (level,) = pyramid(x, [w], activation=F.gelu, valid=valid)
        return modulate(x, gated_sum([level, pool(level, valid=valid)], g))

    assert torch.autograd.gradcheck(operator, (x, w, g))
    qkv = [torch.randn(1, 1, 4, 3, dtype=F64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: channel_attention(*t, l2=True), qkv)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: depthwise(torch.zeros(1, 4, 4, 2), torch.zeros(2, 1, 4, 4)), "only odd sizes"),
        (lambda: depthwise(torch.zeros(1, 4, 4, 2), torch.zeros(3, 1, 3, 3)), "weight must have shape"),
        (lambda: depthwise(torch.zeros(4, 2), torch.zeros(2, 1, 3)), "x must have shape"),
        (lambda: pyramid(torch.zeros(1, 4, 2), [torch.zeros(2, 1, 3)], dilations=[1, 2]), "dilations must have one"),
        (lambda: mixed_depthwise(torch.zeros(1, 4, 5), [torch.zeros(2, 1, 3)] * 2), "weights cover"),
        (lambda: pool(torch.zeros(1, 4, 2), keep=1), "keep must be an integer of at least 0 and at most 0"),
        (lambda: gated_sum([torch.zeros(1, 4, 2)], torch.zeros(1, 4, 2)), "gates must have one channel"),
        (lambda: modulate(torch.zeros(1, 4, 2), torch.zeros(1, 3, 2)), "broadcast"),
        (lambda: channel_attention(*torch.zeros(2, 1, 1, 4, 2), torch.zeros(1, 1, 3, 2)), "share their tokens"),
        (lambda: channel_attention(*torch.zeros(2, 1, 1, 4, 2), torch.zeros(1, 1, 4, 3)), "share their features"),
        (lambda: channel_attention(*torch.zeros(2, 1, 1, 4, 2), torch.zeros(2, 1, 4, 2)), "q, k and v must share the"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_standard_deviations_count_valid_tokens_only_and_none_over_one_token():
    x = torch.randn(2, 3, 4, 5, dtype=torch.double)
    torch.testing.assert_close(pool(x, stat="std"), x.std((1, 2), keepdim=True))
    torch.testing.assert_close(pool(x, stat="std", correction=0, keep=1), x.std(1, keepdim=True, correction=0))
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    valid[:, :2, 1:] = True
    dirty = x.masked_fill(~valid.unsqueeze(-1), float("nan")).requires_grad_()
    out = pool(dirty, stat="std", valid=valid)
    torch.testing.assert_close(out, x[:, :2, 1:].std((1, 2), keepdim=True))
    (dx,) = torch.autograd.grad(out.sum(), dirty)
    assert dx.isfinite().all() and (dx[~valid] == 0).all()
    one = torch.randn(1, 1, 1, 3, requires_grad=True)
    for still in (pool(one, stat="std"), pool(one.expand(1, 2, 2, 3), stat="std")):
        (dx,) = torch.autograd.grad(still.sum(), one)
        assert (still == 0).all() and (dx == 0).all()
    with pytest.raises(ValueError, match="stat"):
        pool(x, stat="max")


@pytest.mark.parametrize("grid", [(6,), (2, 3), (1, 2, 3)])
def test_weighted_pool_is_a_softmax_over_the_grid(grid):
    x, scores = torch.randn(2, *grid, 4, dtype=torch.double), torch.randn(2, *grid, 3, dtype=torch.double)
    flat, keys = x.flatten(1, -2), scores.flatten(1, -2)
    out = torch.stack([sum(keys[:, :, h].softmax(1)[:, n, None] * flat[:, n] for n in range(6)) for h in range(3)], 1)
    torch.testing.assert_close(weighted_pool(x, scores), out)
    valid = (torch.arange(6).view(1, *grid) < torch.tensor([4, 0]).view(2, *[1] * len(grid))).expand(2, *grid)
    found = weighted_pool(x.masked_fill(~valid[..., None], float("inf")), scores, valid=valid)
    torch.testing.assert_close(found[0], weighted_pool(flat[:, :4], keys[:, :4])[0])
    assert (found[1] == 0).all(), "a sample without tokens"
    weights = grid_softmax(scores.bfloat16(), valid=valid)
    assert weights.dtype == torch.float32 and (weights[~valid] == 0).all()
    torch.testing.assert_close(weights[0].flatten(0, -2).sum(0), torch.ones(3))
    with pytest.raises(ValueError, match="scores must be"):
        weighted_pool(x, scores[..., :1, :])
