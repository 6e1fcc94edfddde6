import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib import Layout
from attnlib.nn.linear.inline_attention import FEATURES
from attnlib.ops.linear import linear_attention


def weights(q, k, scale):
    """(B, H, N, N) of the paper, pair by pair."""
    n = k.shape[2]
    s = q @ k.mT * scale / n
    return s - s.mean(-1, keepdim=True) + 1 / n


def heads(m, x):
    phi = FEATURES[m.features]
    q, k, v = F.linear(x, m.qkv.weight, m.qkv.bias).chunk(3, -1)
    return (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (phi(q), phi(k), v))


def make(**settings):
    torch.manual_seed(0)
    return attnlib.create("inline-attention", **{"dim": 12, "num_heads": 3, **settings}).double()


@pytest.mark.parametrize("features", list(FEATURES))
def test_equals_its_explicit_weights_whose_rows_sum_to_one(features):
    m, x = make(features=features, residual=False), torch.randn(2, 4, 5, 12, dtype=torch.float64)
    q, k, v = heads(m, x.flatten(1, 2))
    w = weights(q, k, 4**-0.5)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, 20, dtype=torch.float64))
    out = (w @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x), m.proj(out).view_as(x))


def test_queries_on_a_ray_read_differently_where_division_makes_them_equal():
    gen = torch.Generator().manual_seed(1)
    k, v = torch.rand(2, 1, 1, 9, 4, generator=gen, dtype=torch.float64)
    q = torch.rand(1, 1, 1, 4, generator=gen, dtype=torch.float64)
    both = torch.cat([q, 2 * q], 2)
    one, two = linear_attention(both, k, v, normalizer="sum", causal=False)[0, 0]
    torch.testing.assert_close(one, two)
    one, two = linear_attention(both, k, v, normalizer="subtract", causal=False)[0, 0]
    assert float((one - two).abs().max()) > 1e-3
    # different queries, different weights, when centred keys span all directions
    centred = k - k.mean(2, keepdim=True)
    assert int(torch.linalg.matrix_rank(centred[0, 0])) == 4
    other = weights(torch.randn(1, 1, 6, 4, generator=gen, dtype=torch.float64), k, 1.0)[0, 0]
    assert float(torch.pdist(other).min()) > 1e-3


def test_equal_keys_give_every_query_the_mean_value():
    k = torch.ones(1, 2, 9, 4, dtype=torch.float64)
    q, v = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    out = linear_attention(q, k, v, normalizer="subtract", causal=False)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


def test_the_predicted_kernel():
    m, x = make(), torch.randn(2, 4, 5, 12, dtype=torch.float64)
    plain = make(residual=False)
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if not n.startswith("residual")})
    last = m.residual[2]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    torch.testing.assert_close(m(x), plain(x))
    with torch.no_grad():
        last.bias.view(12, 9)[:, 4] = 1.0  # the middle of every kernel
    v = F.linear(x, m.qkv.weight, m.qkv.bias).chunk(3, -1)[2]
    torch.testing.assert_close(m(x), plain(x) + v @ m.proj.weight.T)


def test_kernels_are_those_of_a_convolution_grouped_by_sample_and_channel():
    m, x = make(), torch.randn(2, 4, 5, 12, dtype=torch.float64)
    v = F.linear(x, m.qkv.weight, m.qkv.bias).chunk(3, -1)[2]
    theta = m.residual(x.mean((1, 2)).unsqueeze(-1)).reshape(24, 1, 3, 3)
    local = F.conv2d(v.movedim(-1, 1).reshape(1, 24, 4, 5), theta, padding=1, groups=24)
    bare = make(residual=False)
    bare.load_state_dict({n: p for n, p in m.state_dict().items() if not n.startswith("residual")})
    local = local.view(2, 12, 4, 5).movedim(1, -1) @ m.proj.weight.T
    torch.testing.assert_close(m(x), bare(x) + local)


def test_means_are_those_of_the_tokens_that_exist():
    m, x = make(), torch.randn(2, 6, 7, 12, dtype=torch.float64)
    valid = torch.zeros(2, 6, 7, dtype=torch.bool)
    valid[:, :4, :5] = True
    torch.testing.assert_close(m(x, valid=valid)[:, :4, :5], m(x[:, :4, :5]))


def test_a_class_token_is_a_token_like_others_but_for_the_convolution():
    m = make()
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    y = m(x, layout=Layout.image(4, 5, cls=1))
    q, k, v = heads(m, x)
    out = (weights(q, k, 0.5) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y[:, 0], m.proj(out[:, 0]))


def test_windows_are_samples_of_their_own():
    m, whole = make(window_size=(2, 5)), make()
    whole.load_state_dict(m.state_dict())
    x = torch.randn(1, 4, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(m(x)[:, 2:], whole(x[:, 2:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features="elu"), "features='elu'"),
        (dict(shift_size=1), "shift_size=1 needs a window_size"),
        (dict(window_size=0), "window_size=0 must be at least 1"),
        (dict(num_heads=5), "num_heads=5"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_blocks_of_two_kinds_of_stripes_are_refused():
    with pytest.raises(ValueError, match="stripes do not run"):
        attnlib.convert_state_dict("inline-attention", {"attns.1.residual.0.weight": torch.zeros(4, 2, 1)})
