"""Window attention upsampling: the equation as we complete it, and what its card asks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.nn.partition.window_attention_upsample import WindowAttentionUpsample


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(**settings):
    torch.manual_seed(0)
    m = WindowAttentionUpsample(**{"dim": 8, "context_dim": 6, "num_heads": 2, "window_size": 4, **settings})
    m = m.double().eval()
    if m.rel_bias is not None:
        with torch.no_grad():
            m.rel_bias.copy_(rand(*m.rel_bias.shape))
    return m


def bilinear(m, context, grid):
    low = m.low(context).permute(0, 3, 1, 2)
    up = F.interpolate(low, scale_factor=m.factor, mode="bilinear", align_corners=False)
    return up.permute(0, 2, 3, 1)[:, : grid[0], : grid[1]]


def oracle(m, x, context):
    """Every query on its own: the keys of its window, looked up."""
    batch, height, width, dim = x.shape
    up = bilinear(m, context, (height, width))
    low = m.low(context)
    query = {"lateral": x, "both": x + up}[m.query_source]
    q = m.q(m.norm_q(query)).view(batch, height, width, m.num_heads, -1)
    source = low if m.kv_source == "low" else up
    k, v = m.kv(m.norm_kv(source)).view(*source.shape[:3], 2, m.num_heads, -1).unbind(3)
    side, step, out = m.window_size, m.key_step, torch.zeros_like(q)
    move = side - m.shift if m.shift else 0
    for i in range(height):
        for j in range(width):
            top, left = (i + move) // side * side - move, (j + move) // side * side - move
            rows = [r for r in range(k.shape[1]) if top <= r * step < top + side]
            columns = [c for c in range(k.shape[2]) if left <= c * step < left + side]
            near, values = k[:, rows][:, :, columns], v[:, rows][:, :, columns]
            score = torch.einsum("bhd,brchd->bhrc", q[:, i, j], near) / math.sqrt(m.head_dim)
            if m.rel_bias is not None:
                dy = torch.tensor(rows) * step - i + side - 1
                dx = torch.tensor(columns) * step - j + side - 1
                score = score + m.rel_bias[:, dy][:, :, dx]
            weights = score.flatten(2).softmax(-1).view(score.shape)
            out[:, i, j] = torch.einsum("bhrc,brchd->bhd", weights, values)
    y = up + m.proj(out.flatten(3))
    return y if m.mlp is None else y + m.mlp(m.norm(y))


@pytest.mark.parametrize(
    "settings",
    [
        {}, dict(query_source="both"), dict(query_source="both", kv_source="upsampled"), dict(shift=2),
        dict(kv_source="upsampled", shift=2), dict(rel_bias=False, mlp_ratio=0.0), dict(factor=4, window_size=8),
        dict(factor=1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("grid", [(8, 12), (7, 5)])
def test_it_is_the_equation(settings, grid):
    m = make(**settings)
    x, context = rand(2, *grid, 8), rand(2, *(-(-n // m.factor) for n in grid), 6, seed=2)
    torch.testing.assert_close(m(x, context), oracle(m, x, context))


def test_a_zero_output_projection_leaves_bilinear_upsampling():
    m = make(mlp_ratio=0.0)
    nn.init.zeros_(m.proj.weight), nn.init.zeros_(m.proj.bias)
    x, context = rand(1, 7, 10, 8), rand(1, 4, 5, 6)
    torch.testing.assert_close(m(x, context), bilinear(m, context, (7, 10)), atol=0, rtol=0)


def test_one_window_over_the_map_is_the_plain_form():
    wide, plain = make(window_size=8, rel_bias=False), make(window_size=None)
    plain.load_state_dict(wide.state_dict())
    for grid in ((8, 8), (8, 6), (5, 7)):
        x, context = rand(2, *grid, 8), rand(2, *(-(-n // 2) for n in grid), 6)
        torch.testing.assert_close(wide(x, context), plain(x, context))


def test_a_query_reads_its_window_and_what_bilinear_resizing_reads():
    m = make()
    x, context = rand(1, 16, 16, 8).requires_grad_(), rand(1, 8, 8, 6).requires_grad_()
    y = m(x, context)
    gx, gc = torch.autograd.grad(y[0, 9, 9].square().sum(), (x, context))
    assert (gx[0].abs().sum(-1) > 0).nonzero().tolist() == [[9, 9]]
    read = gc[0].abs().sum(-1) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4:6, 4:6] = True  # the window of 8 to 11 holds the coarse tokens 4 and 5, and so does bilinear here
    assert torch.equal(read, expected)
    gc = torch.autograd.grad(m(x, context)[0, 8, 8].square().sum(), context)[0]
    read = (gc[0].abs().sum(-1) > 0).nonzero()
    assert read.min() == 3 and read.max() == 5  # bilinear reaches one token further at the border of a window


def test_self_attention_comes_first():
    m = make(self_attention=True)
    x, context = rand(1, 8, 8, 8).requires_grad_(), rand(1, 4, 4, 6)
    read = torch.autograd.grad(m(x, context)[0, 1, 1].square().sum(), x)[0][0].abs().sum(-1) > 0
    assert read[:4, :4].all() and not read[4:].any() and not read[:, 4:].any()
    without = make()
    own = dict(m.state_dict())
    without.load_state_dict({k: v for k, v in own.items() if not k.startswith("self_")})
    query = x + m.self_attention(m.self_norm(x))
    torch.testing.assert_close(m(x, context), without(query, context))


@pytest.mark.parametrize("grid", [(1, 1), (3, 10), (9, 9)])
@pytest.mark.parametrize("settings", [{}, dict(shift=2, self_attention=True), dict(window_size=None), dict(factor=4)])
def test_any_size(grid, settings):
    m = make(**settings)
    for coarse in ([-(-n // m.factor) for n in grid], (2, 3)):  # of the right size, and resized to it
        y = m(rand(2, *grid, 8), rand(2, *coarse, 6))
        assert y.shape == (2, *grid, 8) and y.isfinite().all()


def test_keys_that_do_not_exist_are_not_read():
    m = make()
    x, context = rand(1, 8, 8, 8), rand(1, 4, 4, 6)
    there = torch.ones(1, 4, 4, dtype=torch.bool)
    there[:, :, 2:] = False
    other = context.masked_fill(~there[..., None], float("nan"))
    torch.testing.assert_close(m(x, other, context_valid=there), m(x, context, context_valid=there))
    # the half of the map that is there is as if it were the whole of it
    torch.testing.assert_close(m(x, context, context_valid=there)[:, :, :4], m(x[:, :, :4], context[:, :, :2]))


def test_a_sharp_mask_from_a_blurred_map_and_edges():
    """After equal steps, attention upsampling has the higher Dice."""
    side, dim = 16, 8

    def batch(seed, count=16):
        g = torch.Generator().manual_seed(seed)
        at = torch.rand(count, 2, 1, 1, generator=g) * 10 + 3
        radius = torch.rand(count, 1, 1, generator=g) * 3 + 2
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        mask = ((y - at[:, 0]).square() + (x - at[:, 1]).square() < radius.square()).float()
        blurred = F.avg_pool2d(F.avg_pool2d(mask[:, None], 5, 1, 2), 2)  # coarse, and out of focus
        edges = (F.max_pool2d(mask[:, None], 3, 1, 1) - mask[:, None])[:, 0]
        fine = torch.stack([edges, edges.cumsum(1), edges.cumsum(2)], -1)
        return fine, blurred.permute(0, 2, 3, 1), mask

    def dice(attention):
        torch.manual_seed(0)
        up = attnlib.create(
            "window-attention-upsample", dim=dim, context_dim=4, num_heads=2, window_size=8, mlp_ratio=2.0
        )
        stem, coarse, last = nn.Linear(3, dim), nn.Linear(1, 4), nn.Linear(dim, 1)
        parts = nn.ModuleList([up, stem, coarse, last])
        optimizer = torch.optim.AdamW(parts.parameters(), 1e-2)

        def predict(fine, low):
            s, c = stem(fine), coarse(low)
            y = up(s, c) if attention else up.upsampled(c, (side, side))[2]
            return last(y)[..., 0]

        for step in range(60):
            fine, low, mask = batch(step)
            loss = F.binary_cross_entropy_with_logits(predict(fine, low), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fine, low, mask = batch(1000, 64)
        with torch.no_grad():
            found = (predict(fine, low) > 0).float()
        return float(2 * (found * mask).sum() / (found.sum() + mask.sum()))

    assert dice(True) > dice(False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window_size=3), "factor=2 does not divide window_size=3"),
        (dict(window_size=0), "window_size"),
        (dict(factor=0), "factor"),
        (dict(shift=4), "shift=4 must be less than"),
        (dict(shift=1), "multiple of factor"),
        (dict(shift=2, window_size=None), "shift=2"),
        (dict(self_attention=True, window_size=None), "self_attention needs a window_size"),
        (dict(query_source="low"), "query_source"),
        (dict(kv_source="lateral"), "kv_source"),
        (dict(num_heads=3), "num_heads=3"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_input():
    m = make()
    with pytest.raises(ValueError, match="needs a context"):
        m(rand(1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"context must be a map \(B, h, w, C\)"):
        m(rand(1, 8, 8, 8), rand(1, 16, 6))
    with pytest.raises(ValueError, match="context must hold at least one token"):
        m(rand(1, 8, 8, 8), rand(1, 0, 4, 6))
