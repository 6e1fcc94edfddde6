"""uniformer: one test per criterion of the card that concerns the local form."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib

F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    return attnlib.create("uniformer", **{"dim": 3, "grid_rank": 3, **config}).double()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("case", ["image", "clip"])
def test_the_authors_convolutions(case):
    fixture = Fixture("uniformer")
    fixture.holds(case, fixture.build(case), lambda m, given: m(given["x"]))


@pytest.mark.parametrize("grid", [(9,), (6, 7), (3, 4, 5)])
def test_it_is_attention_whose_map_is_learned_per_offset(grid):
    m, x = make(grid_rank=len(grid)), tokens(2, *grid, 3)
    places = list(itertools.product(*map(range, grid)))
    maps = torch.zeros(3, len(places), len(places), dtype=F64)  # (heads, queries, keys), one channel a head
    for i, at in enumerate(places):
        for j, other in enumerate(places):
            offset = [b - a for a, b in zip(at, other, strict=True)]
            if max(map(abs, offset)) <= 2:
                maps[:, i, j] = m.conv.weight[(slice(None), 0, *(o + 2 for o in offset))]
    value = F.linear(x, m.value.weight, m.value.bias).flatten(1, -2)
    mixed = torch.einsum("cij,bjc->bic", maps, value) + m.conv.bias
    expected = F.linear(mixed, m.proj.weight, m.proj.bias).unflatten(1, grid)
    torch.testing.assert_close(m(x), expected)


def test_an_impulse_reaches_exactly_five_tokens_per_axis():
    m, x = make(), torch.zeros(1, 9, 9, 9, 3, dtype=F64)
    x[0, 4, 4, 4] = 1
    reached = (m(x) - m(torch.zeros_like(x))).abs().amax(-1)[0] > 1e-12
    expected = torch.zeros(9, 9, 9, dtype=torch.bool)
    expected[2:7, 2:7, 2:7] = True
    assert torch.equal(reached, expected)


def test_a_kernel_of_one_axis_reads_that_axis_alone():
    m, x = make(kernel_size=(3, 1, 1), hidden=2), torch.zeros(1, 5, 3, 3, 3, dtype=F64)
    x[0, 2, 1, 1] = 1
    reached = (m(x) - m(torch.zeros_like(x))).abs().amax(-1)[0] > 1e-12
    expected = torch.zeros(5, 3, 3, dtype=torch.bool)
    expected[1:4, 1, 1] = True
    assert torch.equal(reached, expected) and m.conv.dim == 2


def test_absent_tokens_are_as_if_beyond_the_border():
    m, x = make(grid_rank=2), tokens(1, 6, 8, 3)
    valid = torch.zeros(1, 6, 8, dtype=torch.bool)
    valid[:, :4, :5] = True
    given = x.masked_fill(~valid[..., None], float("nan"))
    torch.testing.assert_close(m(given, valid=valid)[:, :4, :5], m(x[:, :4, :5]))


def test_bad_settings():
    for settings, message in ((dict(kernel_size=4), "must be odd"), (dict(kernel_size=0), "kernel_size"),
                              (dict(grid_rank=4), "grid_rank"), (dict(kernel_size=(3, 3)), "names 2 axes"),
                              (dict(kernel_size=(3, 2, 1)), "must be odd"), (dict(hidden=0), "hidden")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(**settings)
