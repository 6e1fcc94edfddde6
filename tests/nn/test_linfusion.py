"""linfusion: means over keys, one test per acceptance criterion of the card; the hook on a tiny U-Net."""

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.grids import Layout

F64 = torch.float64


def make(**settings):
    torch.manual_seed(0)
    m = attnlib.create("linfusion", **{"dim": 8, "num_heads": 2, **settings}).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return m


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def weights(m, x, context=None):
    """(B, H, N, M): the explicit map."""
    q, k, _ = m.features(x, context)
    scores = q @ k.mT / k.shape[2]
    return scores / (scores.sum(-1, keepdim=True) + m.eps)


def test_the_linear_form_is_the_explicit_map_whose_rows_sum_to_one():
    m, x = make(), noise(2, 9, 8)
    w = weights(m, x)
    _, _, v = m.features(x)
    torch.testing.assert_close(m(x), m.proj((w @ v).transpose(1, 2).flatten(2)))
    sums = w.sum(-1)
    assert (sums <= 1).all() and (sums > 1 - 1e-3).all()


def test_networks_stand_before_queries_and_keys():
    m, x = make(mid_dim=5), noise(1, 4, 8)
    first, norm, _, last = m.g_q
    g = F.leaky_relu(norm(x @ first.weight.T + first.bias)) @ last.weight.T + last.bias
    q = F.elu((x + g) @ m.q.weight.T) + 1
    torch.testing.assert_close(m.features(x)[0], q.unflatten(-1, (2, 4)).transpose(1, 2))
    m = make(mid_dim=0)
    torch.testing.assert_close(m.features(x)[1].transpose(1, 2).flatten(2), F.elu(2 * x @ m.k.weight.T) + 1)


def test_tokens_that_come_twice_change_nothing():
    m, x = make(), noise(1, 6, 8)
    twice = torch.cat([x, x], 1)
    torch.testing.assert_close(m(twice), m(x).repeat(1, 2, 1))
    context = noise(1, 5, 8, seed=2)
    torch.testing.assert_close(m(x, torch.cat([context] * 3, 1)), m(x, context))
    theirs = make(compat="authors")
    torch.testing.assert_close(theirs(x), m(x))
    assert not torch.allclose(theirs(x, context), m(x, context))
    plain = torch.einsum("bhnd,bhmd,bhme->bhne", *m.features(twice))  # sums without a denominator double
    assert torch.allclose(plain[:, :, :6], 2 * torch.einsum("bhnd,bhmd,bhme->bhne", *m.features(x)))


def test_constant_values_come_out_as_they_are():
    m = make()
    torch.nn.init.zeros_(m.v.weight)
    m.v.bias = torch.nn.Parameter(noise(8))
    expected = m.v.bias @ m.proj.weight.T + m.proj.bias
    assert (m(noise(1, 7, 8)) - expected).abs().max() < 1e-2 * expected.abs().max()


def test_maps_and_tokens_beside_them_are_tokens():
    m, x = make(), noise(1, 3, 4, 8)
    torch.testing.assert_close(m(x), m(x.flatten(1, 2)).unflatten(1, (3, 4)))
    flat = noise(1, 14, 8)
    torch.testing.assert_close(m(flat, layout=Layout.image(3, 4, text=2)), m(flat))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="mid_dim must be an integer of at least 0"):
        make(mid_dim=-2)
    with pytest.raises(ValueError, match="num_heads=3 does not divide dim=8"):
        make(num_heads=3)
    with pytest.raises(ValueError, match="takes no mask"):
        make()(noise(1, 4, 8), mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="compat='theirs'"):
        make(compat="theirs")
