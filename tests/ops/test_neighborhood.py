"""Engine A: the tiled path and the specification against the authors' masks and an independent oracle."""

import itertools
import math
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import attnlib
from attnlib import masks
from attnlib.grids import coordinates
from attnlib.ops import attention, attention_partial
from attnlib.ops.neighborhood import BORDERS, axis_rules, neighborhood_attention, neighborhood_partial

FIXTURE = Path(__file__).parents[1] / "fixtures" / "fused-neighborhood-attention.safetensors"


def recorded_masks():
    """(grid, kernel, dilation, stride, causal, mask) of every recorded setting."""
    with safe_open(FIXTURE, "pt") as f:
        settings, packed = f.get_tensor("settings").tolist(), f.get_tensor("masks")
    data = np.frombuffer(zlib.decompress(packed.numpy().tobytes()), dtype=np.uint8)
    start = 0
    for rank, *rest in settings:
        grid, kernel, dilation, stride, causal = (tuple(rest[3 * i : 3 * i + rank]) for i in range(5))
        n = math.prod(grid)
        size = -(-n * n // 8)
        mask = np.unpackbits(data[start : start + size])[: n * n].reshape(n, n).astype(bool)
        start += size
        yield grid, kernel, dilation, stride, tuple(map(bool, causal)), torch.from_numpy(mask)


def test_every_recorded_mask_of_the_authors_is_ours():
    """400 random settings in 1 to 3 dimensions: the mask, and what the tiled path really reads."""
    count = 0
    for grid, kernel, dilation, stride, causal, expected in recorded_masks():
        n = math.prod(grid)
        assert torch.equal(masks.neighborhood(grid, kernel, dilation, stride, causal).dense(n), expected)
        # Equal scores and one-hot values: the output is the mask over its row sums.
        zero, eye = torch.zeros(1, 1, n, 1, dtype=torch.float64), torch.eye(n, dtype=torch.float64)[None, None]
        out = neighborhood_attention(zero, zero, eye, grid, kernel, dilation, stride, causal)[0, 0]
        torch.testing.assert_close(out, expected / expected.sum(-1, keepdim=True).double(), atol=1e-12, rtol=0)
        count += 1
    assert count == 400


def oracle(q, k, v, kernel, dilation, stride, causal, table=None):
    """Neighborhood attention as the paper states it, query by query, in Python. (H, *grid, D) tensors."""
    grid = q.shape[1:-1]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    rows = []
    for place in itertools.product(*map(range, grid)):
        axes, steps = [], []
        for x, length, w, d, s, c in zip(place, grid, kernel, dilation, stride, causal, strict=True):
            own = list(range(x % d, length, d))  # the residue class, in order
            i, last = own.index(x), len(own) - 1
            if c:
                leader = min(i // s * s + s - 1, last)
                seen = list(range(max(0, leader - w + 1), i + 1))
            else:
                leader = min(i // s * s + s // 2, last)
                start = min(max(leader - w // 2, 0), len(own) - w)
                seen = list(range(start, start + w))
            axes.append([own[j] for j in seen])
            steps.append([j - i + w - 1 for j in seen])
        keys = list(itertools.product(*axes))
        index = [torch.tensor(column) for column in zip(*keys, strict=True)]
        scores = torch.einsum("hd,hkd->hk", q[(slice(None), *place)], k[(slice(None), *index)]) * q.shape[-1] ** -0.5
        if table is not None:
            relative = [torch.tensor(column) for column in zip(*itertools.product(*steps), strict=True)]
            scores = scores + table[(slice(None), *relative)]
        rows.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), v[(slice(None), *index)]))
    return torch.stack(rows, 1).reshape(out.shape)


SETTINGS = [
    ((11,), (4,), (2,), (1,), (False,)),
    ((13,), (5,), (2,), (3,), (True,)),
    ((6, 7), (3, 4), (2, 1), (1, 1), (False, False)),
    ((7, 8), (3, 5), (1, 1), (2, 5), (False, True)),
    ((4, 5, 6), (2, 3, 3), (2, 1, 2), (1, 2, 1), (True, False, False)),
]


@pytest.mark.parametrize("backend", ["eager", "tiles"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "x".join(map(str, s[0])))
def test_output_and_gradients_equal_the_oracle(setting, backend):
    grid, kernel, dilation, stride, causal = setting
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *grid, d, dtype=torch.float64, requires_grad=True) for d in (3, 3, 5))
    table = torch.randn(2, *(2 * w - 1 for w in kernel), dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, *grid, 5, dtype=torch.float64)
    expected = oracle(q, k, v, kernel, dilation, stride, causal, table)
    wanted = torch.autograd.grad(expected, (q, k, v, table), g)
    out = neighborhood_attention(
        q[None], k[None], v[None], None, kernel, dilation, stride, causal, bias_table=table, backend=backend
    )[0]
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    for got, want in zip(torch.autograd.grad(out, (q, k, v, table), g), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def random_call(rng, border):
    """A random problem of small size with a random choice of every option, and its differentiable inputs."""
    rank = rng.choice([1, 1, 2, 2, 3])
    grid = tuple(rng.randint(3, {1: 30, 2: 9, 3: 5}[rank]) for _ in range(rank))
    kernel, dilation, stride, causal = [], [], [], []
    for x in grid:
        w = rng.randint(2, x) if border == "clamp" else rng.randint(1, x + 2)
        kernel.append(w)
        dilation.append(rng.randint(1, x // w) if border == "clamp" else rng.randint(1, 3))
        stride.append(rng.randint(1, w))
        causal.append(rng.random() < 0.3)
    batch, heads, n = rng.choice([1, 2]), 2, math.prod(grid)
    kv_heads = rng.choice([1, 2])

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    q, k, v = leaf(batch, heads, *grid, 3), leaf(batch, kv_heads, *grid, 3), leaf(batch, kv_heads, *grid, 4)
    leaves, options = [q, k, v], {}
    if rng.random() < 0.5:
        options["bias_table"] = leaf(heads, *(2 * w - 1 for w in kernel))
        leaves.append(options["bias_table"])
    if rng.random() < 0.3:
        options["axis_bias"] = [leaf(batch, heads, *grid, 2 * w - 1) for w in kernel]
        leaves += options["axis_bias"]
    if rng.random() < 0.5:
        options["valid"] = torch.rand(batch, *grid) < 0.7
    if rng.random() < 0.4:
        options.update(extra_k=leaf(batch, kv_heads, 3, 3), extra_v=leaf(batch, kv_heads, 3, 4))
        leaves += [options["extra_k"], options["extra_v"]]
        if rng.random() < 0.5:
            options["extra_valid"] = torch.rand(batch, 3) < 0.5
    if rng.random() < 0.5:
        options.update(offset=1, extra_pos=torch.tensor([0, n + 1, n + 2]))
        options["mask"] = rng.choice([
            masks.causal(), masks.strided(3), masks.explicit(torch.rand(batch, heads, n + 3, n + 3) < 0.6),
            masks.explicit(torch.rand(batch, 1, n + 3, n + 3) < 0.6), masks.documents(torch.arange(n + 3) // 4),
            masks.documents((torch.arange(n + 3) // 4).expand(batch, -1)),
        ])  # fmt: skip
    if rng.random() < 0.5:
        options["tile"] = tuple(rng.randint(1, 5) for _ in range(rank))
    return (q, k, v, None, kernel, dilation, stride, causal), options, leaves


@pytest.mark.parametrize("border", BORDERS)
def test_tiles_equal_the_specification_whatever_the_options(border):
    rng = random.Random(BORDERS.index(border))
    torch.manual_seed(0)
    for number in range(40):
        args, options, leaves = random_call(rng, border)
        spec = neighborhood_attention(*args, border=border, backend="eager", **options)
        fast = neighborhood_attention(*args, border=border, backend="tiles", **options)
        said = f"call {number}: {[a for a in args[4:]]} {sorted(options)}"
        torch.testing.assert_close(fast, spec, atol=1e-12, rtol=0, msg=said)
        g = torch.randn_like(spec)
        want = torch.autograd.grad(spec, leaves, g, allow_unused=True)
        got = torch.autograd.grad(fast, leaves, g, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0, msg=said)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    table = torch.randn(1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, t: neighborhood_attention(q, k, v, None, 3, bias_table=t, tile=2), (q, k, v, table)
    )


def test_extra_keys_equal_a_merge_of_partials():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 6, 4, dtype=torch.float64)
    extra_k, extra_v = torch.randn(2, 2, 2, 7, 4, dtype=torch.float64)
    both = neighborhood_attention(q, k, v, None, 3, extra_k=extra_k, extra_v=extra_v)
    near = neighborhood_partial(q, k, v, None, 3)
    far = attention_partial(q.flatten(2, 3), extra_k, extra_v)
    torch.testing.assert_close(near.merge(far).finish(), both.flatten(2, 3), atol=1e-12, rtol=0)
    alone = neighborhood_attention(q, k, v, None, 3).flatten(2, 3)
    torch.testing.assert_close(near.finish(), alone, atol=1e-12, rtol=0)


def test_extra_keys_keep_gradients_through_the_merge():
    torch.manual_seed(0)
    leaves = [torch.randn(1, 1, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: neighborhood_partial(q, k, v, None, 3).finish(), leaves)


def test_zero_border_is_blocked_attention_with_a_halo():
    """Stride b, window b + 2h, zero keys outside: the blocks and halos of HaloNet, by unfold."""
    torch.manual_seed(0)
    b, h, d = 4, 3, 5
    q, k, v = torch.randn(3, 2, 8, 12, d, dtype=torch.float64)
    ours = neighborhood_attention(*(t[:, None] for t in (q, k, v)), None, b + 2 * h, stride=b, border="zero")[:, 0]

    def halo(t):
        cut = F.unfold(t.permute(0, 3, 1, 2), b + 2 * h, padding=h, stride=b)
        return cut.unflatten(1, (d, -1)).permute(0, 3, 2, 1)

    blocks = F.unfold(q.permute(0, 3, 1, 2), b, stride=b).unflatten(1, (d, -1)).permute(0, 3, 2, 1)
    out = F.scaled_dot_product_attention(blocks, halo(k), halo(v))
    expected = F.fold(out.permute(0, 3, 2, 1).flatten(1, 2), (8, 12), b, stride=b).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_masked_border_keeps_constants_and_zero_border_shrinks_them():
    q, k = torch.randn(2, 1, 1, 6, 6, 4)
    ones = torch.ones(1, 1, 6, 6, 1)
    kept = neighborhood_attention(q, k, ones, None, 5, border="mask")
    shrunk = neighborhood_attention(q, k, ones, None, 5, border="zero")
    torch.testing.assert_close(kept, ones)
    assert (shrunk[0, 0, 0] < 0.999).all() and torch.allclose(shrunk[0, 0, 2:4, 2:4], ones[0, 0, 2:4, 2:4])


def test_circular_window_and_text_tokens_beside_the_grid():
    """A circle inside the box and global tokens: what CLEAR asks of this engine."""
    torch.manual_seed(0)
    grid, radius, text = (9, 10), 3, 4
    layout = attnlib.Layout((("text", text), ("image", grid)))
    q, k, v = torch.randn(3, 1, 2, len(layout), 6, dtype=torch.float64)
    circle = masks.circular_window(grid, radius)
    inner = [t[:, :, text:] for t in (q, k, v)]
    ours = neighborhood_attention(
        *inner, grid, 2 * radius - 1, border="mask", mask=masks.on_segment(layout, "image", circle), offset=text,
        extra_k=k[:, :, :text], extra_v=v[:, :, :text], extra_pos=torch.arange(text),
    )  # fmt: skip
    expected = attention(q, k, v, mask=masks.on_segment(layout, "image", circle))
    torch.testing.assert_close(ours, expected[:, :, text:], atol=1e-12, rtol=0)


def test_rows_without_keys_give_zeros_and_zero_gradients():
    x = torch.randn(1, 1, 12, 3, requires_grad=True)
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[:, :6] = False
    for backend in ("eager", "tiles"):
        out = neighborhood_attention(x, x, x, kernel_size=3, valid=valid, backend=backend, tile=4)
        assert out[0, 0, :5].abs().sum() == 0 and out.isfinite().all()
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.isfinite().all() and grad[0, 0, :5].abs().sum() == 0


def test_backend_is_obeyed(monkeypatch):
    import sys

    module = sys.modules["attnlib.ops.neighborhood"]
    used = []
    for name in ("_tiles", "_eager"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **k: used.append(name) or real(*a, **k))
    x = torch.randn(1, 1, 8, 4)
    neighborhood_attention(x, x, x, kernel_size=3)
    neighborhood_attention(x, x, x, kernel_size=3, backend="eager")
    with attnlib.use_backend("eager"):
        neighborhood_attention(x, x, x, kernel_size=3)
        neighborhood_attention(x, x, x, kernel_size=3, backend="tiles")
    assert used == ["_tiles", "_eager", "_eager", "_tiles"]


def test_layout_of_the_answer_follows_the_question():
    x = torch.randn(2, 3, 4, 5, 6)
    on_grid = neighborhood_attention(x, x, x, kernel_size=3)
    flat = neighborhood_attention(*[x.flatten(2, 3)] * 3, (4, 5), 3)
    assert on_grid.shape == x.shape and torch.equal(on_grid.flatten(2, 3), flat)


def test_windows_of_a_rule_are_the_dense_mask():
    (rule,) = axis_rules((17,), 4, 2, 3)
    rows = masks.neighborhood((17,), 4, 2, 3).dense(17)
    for x in coordinates((17,))[:, 0].tolist():
        low, high = rule.window(x // 2, rule.group_length(x % 2))
        assert [x % 2 + 2 * j for j in range(low, high + 1)] == rows[x].nonzero()[:, 0].tolist()


X = torch.zeros(1, 2, 6, 6, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kernel_size=7), "kernel_size=7 is larger than the grid"),
        (dict(kernel_size=3, dilation=3), "possible: dilation from 1 to 2"),
        (dict(kernel_size=1), "at least 2"),
        (dict(kernel_size=3, stride=4), "stride=4 on axis 0 must be between 1 and kernel_size=3"),
        (dict(kernel_size=(3, 3, 3)), "names 3 axes, but the grid has 2"),
        (dict(kernel_size=2.5), "kernel_size must be an integer"),
        (dict(kernel_size=3, border="wrap"), "border='wrap' is not possible"),
        (dict(kernel_size=3, backend="fast"), "backend='fast' is unknown"),
        (dict(kernel_size=3, bias_table=torch.zeros(2, 3, 3)), r"bias_table must be \(2, 5, 5\)"),
        (dict(kernel_size=3, axis_bias=[torch.zeros(1, 2, 6, 6, 5)]), "axis_bias must be tensors of shapes"),
        (dict(kernel_size=3, extra_k=torch.zeros(1, 2, 1, 4)), "belong together"),
        (dict(kernel_size=3, extra_k=torch.zeros(1, 2, 1, 3), extra_v=torch.zeros(1, 2, 1, 4)), "extra_k must be"),
        (dict(kernel_size=3, extra_valid=torch.ones(1, 1, dtype=torch.bool)), "without extra_k"),
        (dict(kernel_size=3, valid=torch.ones(1, 5, 6, dtype=torch.bool)), r"valid must have shape \(1, 6, 6\)"),
        (dict(kernel_size=3, tile=0), "tile="),
        (dict(kernel_size=3, border="mask", stride=0), "stride=0"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(X, X, X, **change)


def test_tensors_off_the_grid_are_refused():
    flat = torch.zeros(1, 2, 35, 4)
    with pytest.raises(ValueError, match=r"does not lie on the grid \(6, 6\)"):
        neighborhood_attention(flat, flat, flat, (6, 6), 3)
    with pytest.raises(TypeError, match="valid must be a boolean"):
        neighborhood_attention(X, X, X, kernel_size=3, valid=torch.ones(1, 6, 6))
    extra = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="extra_pos"):
        neighborhood_attention(X, X, X, kernel_size=3, extra_k=extra, extra_v=extra, mask=masks.causal())
