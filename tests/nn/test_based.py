import pytest
import torch

import attnlib
from attnlib.nn.layers import last_tokens, to_front, to_places
from attnlib.ops.feature_maps import taylor_features


def oracle(m, x):
    """Pair by pair, in float64."""
    x, heads, f = x.double(), m.num_heads, m.feature_dim
    q, k, v = (
        (x @ p.weight.double().T).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (m.q, m.k, m.v)
    )  # fmt: skip
    s = q @ k.mT / f**0.5
    w = (1 + s + s.square() / 2).tril()
    y = w @ v / (w.sum(-1, keepdim=True) + m.eps)
    return y.transpose(1, 2).flatten(2) @ m.proj.weight.double().T


@pytest.mark.parametrize("f", [1, 4, 16])
def test_taylor_features_are_the_expansion_and_both_layouts_agree(f):
    q, k = torch.randn(2, 3, 7, f, dtype=torch.float64)
    s = (q * k).sum(-1) / f**0.5
    for packed in (True, False):
        dot = (taylor_features(q, packed) * taylor_features(k, packed)).sum(-1)
        torch.testing.assert_close(dot, 1 + s + s.square() / 2)
        assert bool((dot >= 0.5 - 1e-12).all())
    assert taylor_features(q).shape[-1] == 1 + f + f * (f + 1) // 2
    assert taylor_features(q, packed=False).shape[-1] == 1 + f + f * f


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_equals_the_quadratic_form(packed, chunk):
    m = attnlib.create("based", dim=12, num_heads=3, feature_dim=4, head_dim=5, packed=packed, chunk=chunk)
    x = torch.randn(2, 11, 12)
    torch.testing.assert_close(m(x).double(), oracle(m, x), atol=1e-5, rtol=1e-5)


def test_the_state_is_the_same_size_at_any_length():
    m = attnlib.create("based", dim=16, num_heads=2, feature_dim=4)
    sizes = [m(torch.randn(1, n, 16), returns=("state",)).state.numel() for n in (1, 40)]
    assert sizes[0] == sizes[1] == 2 * (8 + 1) * m.features + 1
    assert m.features == 15


def test_recurrent_equals_at_once_and_half_precision_sums_in_float32():
    m = attnlib.create("based", dim=16, num_heads=2, feature_dim=4, chunk=3)
    x, state, out = torch.randn(2, 9, 16), None, []
    for i in range(9):
        y, state = m.step(x[:, i : i + 1], state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), m(x), atol=1e-5, rtol=1e-5)
    half = m.half()(60 * x.half(), returns=("state",))
    assert half.state["S"].dtype == torch.float32 and bool(half.y.isfinite().all())


@pytest.mark.parametrize("window", [0, 1, 3, 40])
def test_window_reads_its_own_token_and_so_many_before(window):
    m = attnlib.create("based-window", dim=12, num_heads=3, window_size=window)
    full = attnlib.create(
        "softmax-attention", dim=12, num_heads=3, causal=True, rotary=10000.0, qkv_bias=False, proj_bias=False
    )
    full.load_state_dict(m.state_dict())
    x = torch.randn(2, 10, 12)
    mask = attnlib.masks.recent(window + 1)
    torch.testing.assert_close(m(x), full(x, mask=mask), atol=1e-5, rtol=1e-5)
    if window >= 10:
        torch.testing.assert_close(m(x), full(x), atol=1e-5, rtol=1e-5)
    if window == 0:
        torch.testing.assert_close(m(x), m.proj(m.v(x)), atol=1e-5, rtol=1e-5)
    kept = m(x, returns=("state",)).state
    assert kept["k"].shape[2] == window


def test_convolution_is_its_equation():
    m = attnlib.create("based-conv", dim=6, kernel_size=3, conv_bias=True)
    x = torch.randn(2, 8, 6)
    u, gate = m.to_inner(x).chunk(2, -1)
    u = torch.nn.functional.conv1d(u.mT, m.conv.weight, m.conv.bias, padding=2, groups=12)[..., :8].mT
    torch.testing.assert_close(m(x), m.proj(torch.nn.functional.silu(u) * gate), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["based", "based-window", "based-conv"])
def test_absent_tokens_take_no_place(name):
    kw = dict(window_size=3) if name == "based-window" else {}
    m = attnlib.create(name, dim=32, **kw) if name == "based-conv" else attnlib.create(name, dim=32, num_heads=2, **kw)
    x, valid = torch.randn(2, 12, 32), torch.rand(2, 12) > 0.4
    out = m(x, valid=valid)
    for b in range(2):
        alone = m(x[b : b + 1, valid[b]])
        torch.testing.assert_close(out[b : b + 1, valid[b]], alone, atol=1e-5, rtol=1e-5)


def test_last_tokens_of_those_that_exist():
    x = torch.arange(12.0).view(2, 6, 1)
    assert last_tokens(x, 2, None).flatten().tolist() == [4, 5, 10, 11]
    assert last_tokens(x, 2, torch.tensor([1, 3])).flatten().tolist() == [1, 2, 9, 10]


def test_tokens_go_to_the_front_and_back():
    x, valid = torch.randn(2, 6, 3), torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    front, now, order = to_front(x, valid)
    torch.testing.assert_close(front[0, :3], x[0, valid[0]])
    assert now.sum(1).tolist() == [3, 6] and bool((front[0, 3:] == 0).all())
    torch.testing.assert_close(to_places(front, order), x.masked_fill(~valid[..., None], 0.0))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("based", dict(causal=False), "causal=False is not possible"),
        ("based", dict(feature_dim=0), "feature_dim"),
        ("based", dict(chunk=0), "chunk must be an integer of at least 1"),
        ("based", dict(num_heads=5), "num_heads=5"),
        ("based-window", dict(window_size=-1), "window_size must be an integer of at least 0"),
        ("based-window", dict(causal=False), "causal=False is not possible"),
        ("based-window", dict(dim=6, num_heads=2), "rotary positions need an even width"),
        ("based-conv", dict(dim=3, expand=1), "expand=1 times dim=3 must be even"),
        ("based-conv", dict(kernel_size=0), "kernel_size must be an integer of at least 1"),
    ],
)
def test_bad_settings(name, change, message):
    with pytest.raises(ValueError, match=message):
        attnlib.create(name, **{"dim": 16, **({} if name == "based-conv" else {"num_heads": 2}), **change})


@pytest.mark.parametrize("name", ["based", "based-window", "based-conv"])
def test_a_state_of_another_batch_is_refused(name):
    m = attnlib.create(name, dim=32)
    state = m(torch.randn(3, 4, 32), returns=("state",)).state
    with pytest.raises(ValueError, match="state"):
        m.step(torch.randn(2, 1, 32), state)
