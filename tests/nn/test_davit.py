"""davit: attention between channels of a group, one test per criterion of its card."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.ops import channel_attention


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("davit", **{"dim": 12, "num_heads": 3, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("scale", ["width", "tokens"])
def test_it_is_its_equation_channel_by_channel(scale):
    m, x = make(scale=scale), data(2, 3, 5, 12)
    q, k, v = m.qkv(x.flatten(1, 2)).chunk(3, -1)
    factor = 4**-0.5 if scale == "width" else 15**-0.5
    out = torch.zeros_like(v)
    for i in range(12):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        logits = torch.stack([(q[..., i] * k[..., j]).sum(1) for j in group], -1) * factor
        out[..., i] = sum(w[:, None] * v[..., j] for w, j in zip(logits.softmax(-1).T, group, strict=True))
    torch.testing.assert_close(m(x), m.proj(out).view(2, 3, 5, 12))


def test_permuting_tokens_permutes_outputs():
    m, x, order = make(), data(2, 20, 12), torch.randperm(20)
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order])


def test_the_cost_is_linear_in_tokens_and_the_map_is_that_of_channels():
    m, counts = make(), []
    for n in (16, 32):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            m(torch.zeros(1, n, 12, dtype=torch.float64))
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0] > 0
    for n in (5, 10):
        x = torch.randn(1, 1, n, 12)
        assert channel_attention(x, x, x, return_weights=True)[1].shape == (1, 1, 12, 12)


def test_channels_meet_within_their_group_only():
    """Read before the output projection, with one group and with three."""
    for groups, reach in ((3, 4), (1, 12)):
        m, x = make(num_heads=groups), data(1, 6, 12)
        with torch.no_grad():
            m.qkv.weight.copy_(torch.eye(12).double().repeat(3, 1))
            m.proj.weight.copy_(torch.eye(12).double())
        (seen,) = torch.autograd.grad(m(x.requires_grad_())[0, 2, 1], x)
        assert (seen[0].abs().sum(0) > 0).nonzero().flatten().tolist() == list(range(reach))


def test_it_is_cross_covariance_attention_without_norm_and_temperature():
    m, x = make(), data(2, 7, 12)
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    lengths = [t.square().sum(2, keepdim=True).sqrt() for t in (q, k)]
    # Cross-covariance attention takes the lengths out; given back, it is the same.
    xca = channel_attention(q, k, v, l2=True, scale=0.3)
    logits = 0.3 * (q / lengths[0]).transpose(2, 3) @ (k / lengths[1])
    torch.testing.assert_close(xca, (logits.softmax(-1) @ v.transpose(2, 3)).transpose(2, 3))
    plain = channel_attention(q, k, v, l2=False, scale=0.5)
    torch.testing.assert_close(m(x), m.proj(plain.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_sums_in_float32(dtype):
    """A sum over 70,000 tokens is beyond float16, and beyond the integers of bfloat16."""
    x = torch.ones(1, 1, 70_000, 2, dtype=dtype)
    v = torch.stack([torch.ones(70_000), torch.zeros(70_000)], -1)[None, None].to(dtype)
    q = x.clone()
    q[..., 0, 0] += 1  # one more for channel 0 of the queries, and nothing for channel 1
    k = torch.stack([torch.ones(70_000), torch.ones(70_000)], -1)[None, None].to(dtype)
    k[..., 0, 1] = 0
    out, weights = channel_attention(q, k, v, scale=1.0, return_weights=True)
    expected = torch.tensor([[70_001.0, 69_999.0], [70_000.0, 69_999.0]]).softmax(-1)
    torch.testing.assert_close(weights[0, 0].float(), expected, atol=1e-3, rtol=0)
    assert out.isfinite().all()


def test_tokens_that_do_not_exist_enter_no_sum():
    for scale in ("width", "tokens"):
        m, x = make(scale=scale), data(2, 4, 6, 12)
        valid = torch.zeros(2, 4, 6, dtype=torch.bool)
        valid[:, :3, :5] = True
        y = m(x, valid=valid)
        torch.testing.assert_close(y[:, :3, :5], m(x[:, :3, :5]))
        assert not y[~valid].any()


def test_roles_of_the_two_releases():
    """Version 1: ``softmax(k^T v)`` times q; version 2: as usual."""
    m, x = make(qkv_bias=False), data(1, 5, 12)
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    first = attnlib.create("davit", dim=12, num_heads=3, qkv_bias=False).double()
    first.load_state_dict(attnlib.convert_state_dict("davit", m.state_dict()))
    weights = (0.5 * k.transpose(2, 3) @ v).softmax(-1)
    expected = (weights @ q.transpose(2, 3)).transpose(2, 3).transpose(1, 2).flatten(2)
    torch.testing.assert_close(first(x), m.proj(expected))
    second = attnlib.convert_state_dict("davit", m.state_dict(), version=2)
    assert all(second[name].equal(p) for name, p in m.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
        (dict(scale="head"), "scale='head' is not possible"),
        (dict(dim=0), "dim must be"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="takes no mask"):
        make()(data(1, 4, 12), mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="version=3"):
        attnlib.convert_state_dict("davit", make().state_dict(), version=3)
    with pytest.raises(ValueError, match="rows, which do not split"):
        attnlib.convert_state_dict("davit", {"qkv.weight": torch.zeros(7, 2)})
