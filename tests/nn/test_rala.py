import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.nn.linear.rala import grid_angles
from attnlib.ops.linear import linear_attention
from attnlib.positions import rotate


def make(**settings):
    torch.manual_seed(0)
    return attnlib.create("rala-ravlt", **{"dim": 16, "num_heads": 2, **settings}).double()


def explicit(m, x):
    """The N x N form, pair by pair."""
    flat = x.flatten(1, 2)
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in m.qkv(flat).chunk(3, -1))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    alpha = (m.scale * q.mean(2, keepdim=True) @ k.mT).softmax(-1).squeeze(2)
    k = k * alpha.unsqueeze(-1) * flat.shape[1]
    angles = grid_angles(*x.shape[1:3], m.head_dim, 10000.0, x.device)
    num = rotate(q, angles, True) @ rotate(k, angles, True).mT / flat.shape[1]
    den = (q @ k.mT).mean(-1, keepdim=True) + m.eps
    out = (num / den @ v).transpose(1, 2).flatten(2).view_as(x)
    return m.proj((out + m.lepe(m.qkv(x).chunk(3, -1)[2])) * m.gate(x))


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 2)])
def test_equals_the_explicit_form(grid):
    m, x = make(), torch.randn(2, *grid, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), explicit(m, x))


def test_without_its_parts_it_is_plain_linear_attention():
    m = make(reweight=False, gate=False, kernel_size=0, rotary=None, eps=0.0)
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in m.qkv(x.flatten(1, 2)).chunk(3, -1))
    plain = linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, normalizer="sum", causal=False)
    torch.testing.assert_close(m(x), m.proj(plain.transpose(1, 2).flatten(2)).view_as(x))


def test_shares_of_keys_sum_to_one_over_those_that_exist():
    m = make()
    q, k = torch.rand(2, 2, 2, 12, 8, dtype=torch.float64)
    valid = torch.rand(2, 12) > 0.4
    for shares in (m.key_weights(q, k, valid), make(reweight=False).key_weights(q, k, valid)):
        there = shares.masked_fill(~valid[:, None], 0.0)
        torch.testing.assert_close(there.sum(-1), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_absent_tokens_have_no_part_in_any_mean(attention):
    m, x = make(attention=attention), torch.randn(2, 6, 7, 16, dtype=torch.float64)
    valid = torch.zeros(2, 6, 7, dtype=torch.bool)
    valid[:, :4, :5] = True
    torch.testing.assert_close(m(x, valid=valid)[:, :4, :5], m(x[:, :4, :5]))


def rank(matrix, share=0.99):
    """How many singular values hold this share of the energy."""
    energy = torch.linalg.svdvals(matrix).square()
    return int((energy.cumsum(-1) / energy.sum() < share).sum()) + 1


def test_outputs_have_a_higher_rank_than_those_of_plain_linear_attention():
    torch.manual_seed(0)
    low = torch.randn(1, 8, 8, 6, dtype=torch.float64) @ torch.randn(6, 32, dtype=torch.float64)
    x = (low + 0.1 * torch.randn(1, 8, 8, 32, dtype=torch.float64)) * torch.linspace(0.2, 2, 8)[:, None, None]
    settings = dict(dim=32, num_heads=1, kernel_size=0)
    mixed = make(**settings), make(**settings, reweight=False, gate=False, rotary=None)
    ranks = []
    for m in mixed:
        seen = []
        handle = m.proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        m(x)
        handle.remove()
        ranks.append(rank(seen[0].flatten(0, 2)))
    assert ranks[0] >= 2 * ranks[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention="relu"), "attention='relu'"),
        (dict(kernel_size=4), "kernel_size=4"),
        (dict(dim=12), "width is a multiple of 4"),
        (dict(num_heads=3), "num_heads=3"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)
