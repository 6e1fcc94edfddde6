import itertools

import pytest
import torch
from parity import Fixture
from torch.utils.flop_counter import FlopCounterMode

import attnlib

FIXTURE = Fixture("scatterformer")


def make(**settings):
    torch.manual_seed(0)
    return attnlib.create("scatterformer", **{"dim": 16, "num_heads": 2, "window_size": 3, **settings}).double()


def dense(m, x):
    """One window: dense linear attention with ReLU features."""
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(0, 1) for t in m.qkv(x).chunk(3, -1))
    w = q.relu() @ k.relu().mT
    out = w @ v / (w.sum(-1, keepdim=True) + m.eps)
    return m.proj(out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("case", ["sla", "sla-bias"])
def test_equals_the_authors(case):
    module = attnlib.create("scatterformer", **FIXTURE.config[case]["settings"])
    module.load_state_dict(FIXTURE._convert(case, "sd"))
    FIXTURE.holds(case, module, lambda m, xs: m.packed(xs["x"], FIXTURE.tensors["cu"]))


@pytest.mark.parametrize("lengths", [[5], [1] * 6, [1000, 1, 3], [2, 0, 7]])
def test_segments_equal_windows_one_by_one_forward_and_backward(lengths):
    m, cu = make(), list(itertools.accumulate([0, *lengths]))
    x = torch.randn(cu[-1], 16, dtype=torch.float64, requires_grad=True)
    alone = torch.cat([dense(m, x[a:b]) for a, b in itertools.pairwise(cu)])
    out = m.packed(x, torch.tensor(cu))
    torch.testing.assert_close(out, alone)
    leaves = [x, *m.parameters()]
    for got, want in zip(*(torch.autograd.grad(t.sin().sum(), leaves) for t in (out, alone)), strict=True):
        torch.testing.assert_close(got, want)


def test_the_order_of_voxels_and_of_windows_is_of_no_account():
    m, x = make(), torch.randn(9, 16, dtype=torch.float64)
    out = m.packed(x, torch.tensor([0, 4, 9]))
    inside = torch.cat([torch.randperm(4), 4 + torch.randperm(5)])
    torch.testing.assert_close(m.packed(x[inside], torch.tensor([0, 4, 9])), out[inside])
    turned = torch.cat([torch.arange(4, 9), torch.arange(4)])
    torch.testing.assert_close(m.packed(x[turned], torch.tensor([0, 5, 9])), out[turned])


def test_a_map_is_the_same_as_its_windows_as_segments():
    m, x = make(), torch.randn(2, 4, 5, 7, 16, dtype=torch.float64)
    valid = torch.rand(2, 4, 5, 7) > 0.6
    coords = valid.nonzero()
    from attnlib.ops.voxels import window_segments

    order, cu = window_segments(coords, (4, 5, 7), 3)
    packed = m.packed(x[valid][order], cu)
    torch.testing.assert_close(m(x, valid=valid)[valid][order], packed)


def test_no_token_costs_more_than_its_own_sums():
    m = make(dim=32).float()
    counts = []
    for lengths in ([512], [1] * 512, [500, *[1] * 12]):
        with FlopCounterMode(display=False) as seen:
            m.packed(torch.zeros(512, 32), torch.tensor([0, *itertools.accumulate(lengths)]))
        counts.append(seen.get_total_flops())
    assert len(set(counts)) == 1


def test_a_query_without_positive_features_gives_the_bias_and_none_gives_none():
    m = make()
    with torch.no_grad():
        m.qkv.weight[:16] = 0
    out = m.packed(torch.randn(3, 16, dtype=torch.float64), torch.tensor([0, 3]))
    torch.testing.assert_close(out, m.proj.bias.expand(3, -1))
    assert m.packed(torch.zeros(0, 16, dtype=torch.float64), torch.tensor([0, 0])).shape == (0, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.packed(torch.zeros(4, 16).double(), torch.tensor([0, 3])), "cu_seqlens must run from 0 to N=4"),
        (lambda m: m.packed(torch.zeros(4, 16).double(), torch.tensor([0, 3, 2, 4])), "must not decrease"),
        (lambda m: m.packed(torch.zeros(4, 8).double(), torch.tensor([0, 4])), r"x must be \(N, 16\)"),
        (lambda m: make(window_size=0), "window_size must be an integer of at least 1"),
        (lambda m: make(num_heads=3), "num_heads=3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())
