import math

import pytest
import torch
from torch import nn

import attnlib
from attnlib.ops.feature_maps import positive_random_features, random_directions, trigonometric_random_features
from attnlib.ops.toeplitz import toeplitz_attention
from attnlib.positions import _transform_size, relative_offsets, toeplitz_matmul

SLUG = "nprf-rpe-fft-attention"
DOUBLE = torch.double


def build(**settings):
    """Float64, with a bias that does something."""
    m = attnlib.create(SLUG, **{"dim": 12, "num_heads": 3, "num_features": 7, "max_distance": 9, **settings})
    m = m.double().eval()
    if m.bias is not None:
        nn.init.normal_(m.bias)
    return m


def oracle(m, x, valid=None):
    """The equation, pair by pair."""
    grid, d = x.shape[1:-1], m.head_dim
    flat, (b, n) = x.flatten(1, -2), x.flatten(1, -2).shape[:2]
    at = torch.cartesian_prod(*(torch.arange(g) for g in grid)).view(n, len(grid))
    q, k, v = (f(flat).view(b, n, m.num_heads, d) for f in (m.q, m.k, m.v))
    if m.norm == "l2":
        q, k = (t / t.norm(dim=-1, keepdim=True) * m.scale**0.5 for t in (q, k))
    else:
        q, k = q / d**0.25, k / d**0.25

    def phi(t):
        z, size = t @ m.directions.T, (t * t).sum(-1, keepdim=True)
        count = m.directions.shape[0]
        if m.features == "positive":
            return torch.exp(z - size / 2) / math.sqrt(count)
        return torch.exp(size / 2) * torch.cat([z.sin(), z.cos()], -1) / math.sqrt(count)

    fq, fk = phi(q), phi(k)
    out = torch.zeros(b, n, m.num_heads, d, dtype=x.dtype)
    for s in range(b):
        for h in range(m.num_heads):
            for i in range(n):
                num, den = torch.zeros(d, dtype=x.dtype), torch.zeros((), dtype=x.dtype)
                for j in range(n):
                    if (m.causal and j > i) or (valid is not None and not valid.flatten(1)[s, j]):
                        continue
                    entry = [
                        int((at[j, a] - at[i, a]).clamp(1 - p, p - 1)) + p - 1 for a, p in enumerate(m.max_distance)
                    ]
                    w = (fq[s, i, h] * fk[s, j, h]).sum()
                    w = w * (m.bias[(h, *entry)].exp() if m.bias is not None else 1.0)
                    num, den = num + w * v[s, j, h], den + w
                out[s, i, h] = num / den if den != 0 else 0.0
    return m.proj(out.flatten(2)).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("form", ["fft", "fft64", "direct"])
@pytest.mark.parametrize(
    "settings, grid",
    [
        (dict(), (11,)),
        (dict(causal=True), (11,)),
        (dict(causal=True, norm="none", max_distance=4), (11,)),
        (dict(features="trigonometric", num_features=40, scale=0.5), (6,)),
        (dict(rank=2, max_distance=(3, 6)), (4, 3)),
    ],
    ids=["plain", "causal", "clamped", "trigonometric", "image"],
)
def test_equals_the_equation(settings, grid, form):
    m, x = build(form=form, **settings), torch.randn(2, *grid, 12, dtype=DOUBLE)
    torch.testing.assert_close(m(x), oracle(m, x), atol=1e-10, rtol=1e-10)
    valid = torch.rand(2, *grid) > 0.4
    expected = oracle(m, x, valid).masked_fill(~valid[..., None], 0.0)
    torch.testing.assert_close(m(x, valid=valid), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "causal, form, spread, limit",
    [(False, "fft", 0.5, 2e-6), (True, "fft", 0.5, 1e-4), (False, "fft64", 2.0, 2e-6), (True, "fft64", 2.0, 2e-6)],
)
def test_float32_is_near_the_dense_construction(causal, form, spread, limit):
    """The transform's rounding grows with the spread of the bias; causal rows of few keys bear that of all products.

    In float64 it does not matter.
    """
    m, dense = (build(causal=causal, form=f).float() for f in (form, "direct"))
    with torch.no_grad():
        m.bias *= spread
    dense.load_state_dict(m.state_dict())
    x = torch.randn(2, 200, 12)
    torch.testing.assert_close(m(x), dense(x), atol=limit, rtol=limit)


@pytest.mark.parametrize("causal", [True, False])
def test_without_bias_it_is_performer(causal):
    """Ordinary linear attention on the same features."""
    m, x = build(causal=causal, norm="none"), torch.randn(2, 10, 12, dtype=DOUBLE)
    nn.init.zeros_(m.bias)
    q, k, v = (f(x).view(2, 10, 3, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
    out = attnlib.ops.linear_attention(m.feature_map(q), m.feature_map(k), v, causal=causal, normalizer="sum")
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)), atol=1e-10, rtol=1e-10)
    bare = build(causal=causal, norm="none", relative=False)
    bare.load_state_dict(m.state_dict(), strict=False)
    torch.testing.assert_close(bare(x), m(x), atol=1e-10, rtol=1e-10)


def test_converges_to_softmax_with_bias_as_features_grow():
    """Error against softmax(q k + b) v falls like one over the root of the number of features."""
    m, x = build(max_distance=10), torch.randn(4, 10, 12, dtype=DOUBLE)
    q, k, v = (f(x).view(4, 10, 3, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
    with torch.no_grad():
        m.bias *= 0.5
    unit_q, unit_k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    bias = torch.stack([torch.stack([m.bias[:, j - i + 9] for j in range(10)], -1) for i in range(10)], 1)
    exact = (unit_q @ unit_k.mT + bias).softmax(-1) @ v
    table = relative_offsets(m.bias, (-9,), (19,))
    errors = []
    for count in (256, 4096, 65536):
        total = 0.0
        for seed in range(6):
            m.directions = random_directions(count, 4, generator=torch.Generator().manual_seed(seed)).double()
            got = toeplitz_attention(m.feature_map(q), m.feature_map(k), v, table, form="direct")
            total += float((got - exact).square().mean())
        errors.append((total / 6) ** 0.5)
    slopes = [math.log(b / a) / math.log(16) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(-0.65 < slope < -0.35 for slope in slopes), (errors, slopes)


def test_random_features_are_unbiased_and_normalisation_bounds_their_error():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 200, 8, generator=generator, dtype=DOUBLE)
    unit = [torch.nn.functional.normalize(t, dim=-1) for t in (x, y)]
    w = random_directions(2**17, 8, generator=generator).double()
    for phi in (positive_random_features, trigonometric_random_features):
        ratio = (phi(unit[0], w) * phi(unit[1], w)).sum(-1) / torch.exp((unit[0] * unit[1]).sum(-1))
        assert (ratio - 1).abs().max() < 0.05
    few = random_directions(64, 8, generator=generator).double()

    def error(radius):
        a, b = (t * radius for t in unit)
        exact = torch.exp((a * b).sum(-1))
        got = (positive_random_features(a, few) * positive_random_features(b, few)).sum(-1)
        return float(((got - exact) / exact).square().mean().sqrt())

    assert error(1.0) < 0.5 and error(2.5) > 2 * error(1.0)


@pytest.mark.parametrize("causal", [True, False])
def test_a_constant_added_to_the_bias_changes_nothing(causal):
    m, x = build(causal=causal), torch.randn(2, 11, 12, dtype=DOUBLE)
    y = m(x)
    with torch.no_grad():
        m.bias += 50.0
    torch.testing.assert_close(m(x), y, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        m.bias -= 1000.0
    torch.testing.assert_close(m(x), y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("settings, grid", [(dict(causal=True), (9,)), (dict(rank=2, max_distance=4), (3, 5))])
def test_gradients_equal_those_of_the_dense_form(settings, grid):
    fast, dense = build(**settings), build(form="direct", **settings)
    dense.load_state_dict(fast.state_dict())
    x = torch.randn(2, *grid, 12, dtype=DOUBLE)
    grads = []
    for m in (fast, dense):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        grads.append({"x": leaf.grad, **{n: p.grad for n, p in m.named_parameters()}})
    assert grads[1]["bias"].abs().max() > 1e-3
    for name, expected in grads[1].items():
        torch.testing.assert_close(grads[0][name], expected, atol=1e-9, rtol=1e-9, msg=name)


def test_slices_of_features_change_nothing(monkeypatch):
    m, x = build(), torch.randn(2, 11, 12, dtype=DOUBLE, requires_grad=True)
    whole = m(x)
    (grad,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr("attnlib.ops.toeplitz.SLICE", 1)
    sliced = m(x)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(torch.autograd.grad(sliced.square().sum(), x)[0], grad)


def test_weights_rebuild_the_output():
    m, x = build(causal=True), torch.randn(2, 8, 12, dtype=DOUBLE)
    out = m(x, returns=("weights",))
    v = m.v(x).view(2, 8, 3, 4).transpose(1, 2)
    torch.testing.assert_close(m.proj((out.weights @ v).transpose(1, 2).flatten(2)), out.y)
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(2, 3, 8, dtype=DOUBLE))


def test_a_tail_far_below_the_largest_sum_stays_finite():
    """Rows whose true sums drown in rounding give finite values, and rows that see nothing give zeros."""
    m = build(max_distance=20, num_heads=1).float()
    with torch.no_grad():
        m.bias.copy_(torch.linspace(-80, 0, 39)[None])
    x = torch.randn(1, 20, 12, requires_grad=True)
    y = m(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all() and y.abs().max() < 20
    none = torch.zeros(1, 20, dtype=torch.bool)
    assert not m(x, valid=none).any()


def test_the_state_grows_with_the_sequence():
    """There is none of fixed size: every pair of tokens has its own factor."""
    m, x = build(causal=True), torch.randn(1, 80, 12, dtype=DOUBLE)
    first = m(x[:, :5], returns=("state",)).state
    y, second = m.step(x[:, 5:], first)  # more new tokens than go through the map
    assert all(second[name].numel() == 16 * first[name].numel() for name in ("k", "v", "valid"))
    torch.testing.assert_close(y, m(x)[:, 5:])
    with pytest.raises(ValueError, match="state holds k of shape"):
        build(causal=True, num_heads=2).step(x[:, 5:], first)


@pytest.mark.parametrize("n, k", [((1,), (1,)), ((3,), (7,)), ((7,), (3,)), ((13,), (13,)), ((3, 2), (2, 5))])
def test_toeplitz_product_is_the_matrix(n, k):
    c = torch.randn(2, *(a + b - 1 for a, b in zip(n, k, strict=True)), dtype=DOUBLE)
    x = torch.randn(5, 2, *k, 3, dtype=DOUBLE)
    got = toeplitz_matmul(c, x, n).flatten(2, -2)
    rows, columns = (torch.cartesian_prod(*(torch.arange(s) for s in g)).view(-1, len(n)) for g in (n, k))
    at = columns[None] - rows[:, None] + torch.tensor(n) - 1
    matrix = c[(slice(None), *at.unbind(-1))]
    torch.testing.assert_close(got, matrix @ x.flatten(2, -2))


def test_transform_sizes_are_the_next_without_large_factors():
    smooth = sorted(2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6))
    for n in range(1, 1000):
        assert _transform_size(n) == next(s for s in smooth if s >= n)


def test_bad_input():
    for settings, message in (
        (dict(features="cosine"), "features='cosine' is not possible"),
        (dict(norm="l1"), "norm='l1'"),
        (dict(form="dense"), "form='dense'"),
        (dict(rank=3), "rank=3"),
        (dict(rank=2, causal=True), "an image has no order"),
        (dict(num_features=0), "num_features must be an integer of at least 1"),
        (dict(scale=0.0), "scale must be a finite number above 0"),
        (dict(max_distance=0), "max_distance must be at least 1"),
        (dict(max_distance=(3, 3)), "names 2 axes"),
        (dict(num_heads=5), "num_heads=5 does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings)
    q = torch.randn(1, 2, 6, 4)
    for args, kw, message in (
        ((q, q, q, torch.zeros(2, 10)), {}, r"bias must be \(H or 1, 11\)"),
        ((q, q[..., :3], q, torch.zeros(2, 11)), {}, "head_dim=4, k has head_dim=3"),
        ((q, q, q, torch.zeros(2, 11)), dict(grid=(2, 2)), "has 4 tokens"),
        ((q, q, q, torch.zeros(2, 11)), dict(form="loop"), "form='loop'"),
    ):
        with pytest.raises(ValueError, match=message):
            toeplitz_attention(*args, **kw)
    with pytest.raises(ValueError, match="must have"):
        toeplitz_matmul(torch.zeros(5), torch.zeros(3, 1), (4,))


def test_redraw_changes_the_features_and_nothing_else():
    m = build(orthogonal=True)
    before = m.directions.clone()
    m.redraw(torch.Generator().manual_seed(9))
    assert not torch.equal(m.directions, before)
    block = m.directions[:4] @ m.directions[:4].T
    assert (block - torch.diag(block.diagonal())).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_an_empty_sequence_gives_an_empty_sequence(causal):
    m = attnlib.create("nprf-rpe-fft-attention", dim=8, num_heads=2, causal=causal)
    out = m(torch.randn(2, 0, 8), returns=("weights",))
    assert out.y.shape == (2, 0, 8) and out.weights.shape == (2, 2, 0, 0)
