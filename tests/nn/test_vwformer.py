"""Varying window attention: the equation, and what its card asks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.nn.partition.vwformer import VaryingWindowAttention, copied_places, copy_shift_pad


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(dim=16, **settings):
    torch.manual_seed(0)
    m = VaryingWindowAttention(dim, **{"num_heads": 2, "num_windows": 2, **settings}).double().eval()
    if m.proj.norm is not None:
        with torch.no_grad():
            m.proj.norm.weight.copy_(1 + 0.3 * rand(dim))
            m.q.weight.copy_(rand(dim, dim) * 0.5)
    return m


def oracle(m, x, window):
    """One window after the other, every token of its context looked up."""
    batch, height, width, dim = x.shape
    (ph, pw), r = window, m.ratio
    f = x
    if m.pre is not None:
        a, b = (r - 1) // 2, r // 2
        f = F.conv2d(F.pad(x.permute(0, 3, 1, 2), (a, b, a, b)), m.pre.conv.weight)
        f = F.relu(m.pre.norm(f)).permute(0, 2, 3, 1)

    def source(i, p, length):
        """Which token of the map stands at place ``i`` of the padded axis."""
        side = r * p - (r + 1) * p // 2
        if i < side:
            return (r + 1) * p // 2 + i
        return i - side if i < side + length else length - r * p + (i - side - length)

    rows = [[source(w * ph + i, ph, height) for i in range(r * ph)] for w in range(height // ph)]
    columns = [[source(w * pw + i, pw, width) for i in range(r * pw)] for w in range(width // pw)]
    out = torch.zeros_like(x)
    for wi, row in enumerate(rows):
        for wj, column in enumerate(columns):
            context = f[:, row][:, :, column].view(batch, ph, r, pw, r, -1)
            keys = context.permute(0, 1, 3, 2, 4, 5).reshape(batch, ph * pw, dim)
            here = slice(wi * ph, (wi + 1) * ph), slice(wj * pw, (wj + 1) * pw)
            q = m.q(x[:, here[0], here[1]].reshape(batch, -1, dim))
            k, v = m.kv(keys).chunk(2, -1)
            q, k, v = (t.view(batch, -1, m.num_heads, m.head_dim).transpose(1, 2) for t in (q, k, v))
            y = torch.softmax(q @ k.mT / math.sqrt(m.head_dim), -1) @ v
            out[:, here[0], here[1]] = y.transpose(1, 2).reshape(batch, ph, pw, dim)
    return m.proj(out)


@pytest.mark.parametrize(
    ("ratio", "grid", "windows"),
    [
        (2, (8, 16), 4), (2, (6, 12), 2), (4, (16, 16), 4), (4, (8, 8), 4), (2, (12, 4), 4), (4, (20, 24), 4),
        (3, (9, 9), 3), (2, (4, 4), 4), (1, (8, 8), 2),
    ],
)  # fmt: skip
def test_it_is_the_equation(ratio, grid, windows):
    m = make(dim=16 if ratio != 3 else 18, ratio=ratio, num_windows=windows)
    x = rand(2, *grid, m.dim)
    torch.testing.assert_close(m(x), oracle(m, x, tuple(n // windows for n in grid)))
    sized = make(dim=m.dim, ratio=ratio, window_size=grid[0] // windows)
    if grid[0] == grid[1]:
        torch.testing.assert_close(sized(x), m(x))


def test_ratio_1_is_attention_in_windows():
    m = make(ratio=1, norm=False)
    own = attnlib.create(
        "maxvit", dim=16, num_heads=2, window_size=4, rel_bias=False
    ).double()  # its first half is attention in blocks
    block = own.block
    with torch.no_grad():
        block.qkv.weight.copy_(torch.cat([m.q.weight, m.kv.weight]))
        block.qkv.bias.copy_(torch.cat([m.q.bias, m.kv.bias]))
        block.proj.weight.copy_(m.proj.conv.weight.flatten(1))
        block.proj.bias.copy_(m.proj.conv.bias)
    x = rand(2, 8, 8, 16)
    torch.testing.assert_close(m(x), block(x))


@pytest.mark.parametrize("ratio", [2, 4])
def test_a_window_reads_its_context_and_the_kernel_around_it(ratio):
    """Tokens that change the middle window: ``R P`` a side, and what the convolution adds."""
    m = make(ratio=ratio, window_size=4)
    m.pre.norm.bias.data.fill_(50.0)  # so that no ReLU is shut
    x = rand(1, 36, 36, 16).requires_grad_()
    y = m(x)
    read = torch.autograd.grad(y[0, 16:20, 16:20].square().sum(), x)[0].abs().sum(-1)[0] > 0
    start = 16 - (ratio - 1) * 4 // 2
    expected = torch.zeros(36, 36, dtype=torch.bool)
    low, high = start - (ratio - 1) // 2, start + 4 * ratio + ratio // 2
    expected[low:high, low:high] = True
    assert torch.equal(read, expected)


def test_keys_are_as_many_for_every_ratio():
    from torch.utils.flop_counter import FlopCounterMode

    def attention_flops(ratio):
        m = make(dim=64, ratio=ratio, num_windows=4).float()
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            m(torch.zeros(1, 32, 32, 64))
        counts = counter.get_flop_counts()["Global"]
        return sum(v for k, v in counts.items() if "bmm" in str(k) or "attention" in str(k))

    assert attention_flops(1) == attention_flops(2) == attention_flops(4) == attention_flops(8) > 0


def test_folded_keys_are_a_permutation_of_the_context():
    """With numbers instead of channels: every token of ``R P x R P`` stands in exactly one key, rows first."""
    from attnlib.nn.partition.vwformer import _contexts, _folded_tokens

    numbers = torch.arange(144.0).view(1, 12, 12, 1)
    context = _contexts(numbers, (1, 1), (12, 12), (4, 4))
    keys = _folded_tokens(context, 3)
    assert keys.shape == (1, 1, 4, 4, 9) and torch.equal(keys.flatten().sort().values, numbers.flatten())
    assert keys[0, 0, 1, 2].tolist() == [float(12 * (3 + i) + 6 + j) for i in range(3) for j in range(3)]


def test_copied_sides():
    line = torch.arange(16.0).view(1, 16, 1, 1)
    padded = copy_shift_pad(line, (4, 1), 2)
    assert padded.shape[1] == 20
    assert padded[0, :, 1, 0].tolist() == [6, 7, *range(16), 8, 9]
    assert copied_places(9, 3, 2) == ([4, 5], [3, 4])  # an odd window: two tokens and not one and a half
    assert copied_places(8, 4, 8) == ([6, 7] + [-1] * 12, [-1] * 12 + [0, 1])


def test_zeros_beyond_a_small_map_are_keys_for_the_authors_alone():
    ours, theirs = make(ratio=4, num_windows=1), make(ratio=4, num_windows=1, compat="authors")
    x = rand(1, 8, 8, 16)
    assert not torch.allclose(ours(x), theirs(x))
    torch.testing.assert_close(make(ratio=2, num_windows=2)(x), make(ratio=2, num_windows=2, compat="authors")(x))


@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (9, 13)])
@pytest.mark.parametrize("settings", [dict(ratio=2), dict(ratio=4, num_windows=3), dict(ratio=2, window_size=5)])
def test_any_map(grid, settings):
    m, x = make(**settings), rand(2, *grid, 16)
    assert m(x).shape == x.shape and m(x).isfinite().all()


def test_it_starts_as_the_authors_class():
    torch.manual_seed(0)
    m = VaryingWindowAttention(128, 4, 4)
    assert not m.proj.norm.weight.any() and not m(torch.randn(1, 16, 16, 128)).any()
    assert abs(m.q.weight.std() / 0.01 - 1) < 0.05 and abs(m.kv.weight.std() / math.sqrt(2 / 128) - 1) < 0.05
    assert abs(m.pre.conv.weight.std() / math.sqrt(2 / (8 * 16)) - 1) < 0.05
    assert not m.q.bias.any() and not m.kv.bias.any()
    plain = VaryingWindowAttention(128, 4, 4, norm=False)
    bound = nn.MultiheadAttention(128, 4).in_proj_weight.abs().max()
    assert abs(plain.q.weight.abs().max() / bound - 1) < 0.02 and not plain.proj.conv.bias.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide"),
        (dict(ratio=0), "ratio"),
        (dict(ratio=8), r"ratio \*\* 2"),
        (dict(num_windows=0), "num_windows"),
        (dict(window_size=0), "window_size"),
        (dict(compat="theirs"), "compat"),
        (dict(attn_drop=1.0), "attn_drop"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_input():
    m = make()
    with pytest.raises(ValueError, match="x must"):
        m(rand(1, 8, 16))
    with pytest.raises(ValueError, match="theta"):
        VaryingWindowAttention.convert_state_dict({"phi.conv.weight": torch.zeros(2, 2, 1, 1)})
