"""dual-token-vit: fusion of local and global tokens, held to the equations in float64; one test per criterion."""

import math

import pytest
import torch
import torch.nn.functional as F

import attnlib

F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    m = attnlib.create("dual-token-vit", **{"dim": 8, "num_heads": 2, "grid": 3, **config}).double().eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return m


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def mlp(x, layer):
    z = linear(x, layer.fc1)
    return linear(z * 0.5 * (1 + torch.erf(z / math.sqrt(2))), layer.fc2)


def conv(x, layer):
    """Depthwise, by shifts."""
    k = layer.weight.shape[-1]
    wide = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
    h, w = x.shape[1:3]
    return layer.bias + sum(
        wide[:, i : i + h, j : j + w] * layer.weight[:, 0, i, j] for i in range(k) for j in range(k)
    )


def attend(x, y, layer, heads=2):
    """Attention of (B, N, C) to (B, M, C), head by head."""
    q, k, v = linear(x, layer.q), linear(y, layer.k), linear(y, layer.v)
    width = q.shape[-1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    out = [torch.softmax(q[..., p] @ k[..., p].mT / math.sqrt(width), -1) @ v[..., p] for p in parts]
    return linear(torch.cat(out, -1), layer.proj)


def oracle(m, x, before, token_mlp=mlp):
    local = x + mlp(norm(conv(x, m.local.dwconv), m.local.norm), m.local.mlp)
    small = local
    for step in m.steps:
        small = small + conv(small, step.conv)
        small = small.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean((2, 4))
    cells = small.shape[1] // 3, small.shape[2] // 3
    small = small.unflatten(1, (3, cells[0])).unflatten(3, (3, cells[1])).mean((2, 4))
    z = norm(small, m.gather_norm).flatten(1, 2)
    made = attend(z, z, m.gather)
    if before is not None:
        share = torch.sigmoid(m.alpha) if m.alpha is not None else m.fixed_alpha
        made = share * token_mlp(norm(before, m.token_norm).flatten(1, 2), m.token_mlp) + (1 - share) * made
    read = attend(norm(local, m.read_norm).flatten(1, 2), norm(made, m.key_norm), m.read).view(x.shape)
    y = local + read if m.fuse is None else linear(torch.cat([local, read], -1), m.fuse)
    return y, made.view(len(x), 3, 3, -1)


def mixed(x, layer):
    x = x + mlp(x.mT, layer.across).mT
    return x + mlp(norm(x, layer.norm), layer.mlp)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        ({}, (6, 9)), (dict(steps=1), (6, 12)), (dict(steps=2, kernel_size=3), (12, 12)),
        (dict(fusion="concat"), (3, 6)),
        (dict(token_mlp="mix", alpha=0.2, learn_alpha=False), (6, 6)), (dict(token_mlp="none", alpha=0.7), (3, 3)),
    ],
)  # fmt: skip
def test_it_is_the_equations_with_gradients(config, grid):
    m, x, before = make(**config), tokens(2, *grid, 8).requires_grad_(), tokens(2, 3, 3, 8, seed=2).requires_grad_()
    rule = {"mix": mixed, "none": lambda z, layer: z}.get(config.get("token_mlp"), mlp)
    for given in (before, None):
        out = m(x, carry=given, returns=("carry",))
        y, made = oracle(m, x, given, rule)
        torch.testing.assert_close(out.y, y, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(out.carry, made, atol=1e-9, rtol=1e-9)
    inputs = [x, before, *m.parameters()]
    grads = [
        torch.autograd.grad((t * tokens(*t.shape, seed=3)).sum(), inputs)
        for t in (m(x, carry=before), oracle(m, x, before, rule)[0])
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


def test_without_alpha_it_pools_attends_and_broadcasts():
    m, x = make(alpha=0.0, learn_alpha=False), tokens(1, 6, 6, 8)
    torch.testing.assert_close(m(x, carry=tokens(1, 3, 3, 8)), m(x))
    assert m.token_mlp is None
    assert not torch.allclose(make()(x, carry=tokens(1, 3, 3, 8)), make()(x))


def test_at_the_grids_own_size_nothing_is_pooled():
    m, x = make(steps=2), tokens(2, 3, 3, 8)
    pooled, exists = m.pooled(x)
    assert torch.equal(pooled, x) and exists is None
    torch.testing.assert_close(make(resize="bilinear")(x), make()(x))


def test_steps_that_would_leave_too_little_are_left_out():
    m = make(steps=3)
    full = m.pooled(tokens(1, 12, 12, 8))[0]
    with torch.no_grad():
        m.steps[2].conv.weight.mul_(2)  # the third step would leave less than 3 a side
    torch.testing.assert_close(m.pooled(tokens(1, 12, 12, 8))[0], full)


def test_global_tokens_keep_their_places():
    """A grid moved by one place is another input; the same cells in another order, moved in both, are not."""
    m, x, before = make(), tokens(1, 6, 6, 8), tokens(1, 3, 3, 8, seed=2)
    assert not torch.allclose(m(x, carry=before.roll(1, 2)), m(x, carry=before))
    # The map moved by one cell together with the grid: global tokens move along (away from the convolution's border).
    flat = make(kernel_size=1)
    moved = flat(x.roll(2, 2), carry=before.roll(1, 2), returns=("carry",))
    still = flat(x, carry=before, returns=("carry",))
    torch.testing.assert_close(moved.carry, still.carry.roll(1, 2))
    torch.testing.assert_close(moved.y, still.y.roll(2, 2))


def test_resizing_by_lines_and_absent_tokens():
    x = tokens(2, 7, 8, 8)
    want = F.interpolate(x.permute(0, 3, 1, 2), (3, 3), mode="bilinear").permute(0, 2, 3, 1)
    m = make(resize="bilinear")
    torch.testing.assert_close(m.pooled(x)[0], want)
    valid = tokens(2, 7, 8) > 0
    valid[0, :3] = False
    bad = x.masked_fill(~valid.unsqueeze(-1), float("nan"))
    for resize in ("mean", "bilinear"):
        m = make(resize=resize, steps=1)
        for carry in (None, tokens(2, 3, 3, 8, seed=2)):
            y = m(bad, valid=valid, carry=carry)
            torch.testing.assert_close(y, m(x, valid=valid, carry=carry))
            assert y.isfinite().all() and not y[~valid].any()
    cells, exist = make().pooled(x.masked_fill(~valid.unsqueeze(-1), 0), valid)
    assert not exist[0, 0].any() and not cells[0, 0].any()


def test_bad_settings_and_carries():
    for settings, words in (
        (dict(kernel_size=4), "kernel_size"), (dict(step_kernel=2), "step_kernel"), (dict(alpha=1.5), "alpha"),
        (dict(alpha=0.0), "alpha"), (dict(fusion="gate"), "fusion"), (dict(token_mlp="gru"), "token_mlp"),
        (dict(resize="max"), "resize"), (dict(grid=0), "grid"), (dict(steps=-1), "steps"),
        (dict(num_heads=3), "num_heads"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            make(**settings)
    for carry in (tokens(1, 3, 4, 8), torch.zeros(1, 3, 3, 8, dtype=torch.long), "x"):
        with pytest.raises((TypeError, ValueError), match="carry must be global tokens"):
            make()(tokens(1, 6, 6, 8), carry=carry)
