"""ProbSparse: the released class with its own draws, the choice as a plan, the ends of the scale, absent tokens."""

import math

import pytest
import torch
from parity import Fixture

from attnlib.nn.sparse.probsparse import ProbSparse
from attnlib.types import Plan

FIXTURE = Fixture("probsparse")


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    """Keys are drawn from the same seed as in their run."""

    def call(m, xs):
        torch.manual_seed(7)
        return m(xs["x"])

    FIXTURE.holds(case, FIXTURE.build(case), call)


def oracle(m, x, plan):
    """Every chosen query attends, every other reads the mean."""
    q, k, v = (f(x).unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for f in (m.q, m.k, m.v))
    full = (q @ k.mT * m.scale).softmax(-1) @ v
    chosen = torch.zeros(q.shape[:3], dtype=torch.bool).scatter(2, plan["queries"], True)
    out = torch.where(chosen[..., None], full, v.mean(2, keepdim=True))
    return m.proj(out.transpose(1, 2).flatten(2))


def test_equals_the_equation():
    m, x = ProbSparse(12, 3, factor=1).double(), torch.randn(2, 30, 12, dtype=torch.double)
    plan = m.plan(x)
    assert plan["queries"].shape == (2, 3, math.ceil(math.log(30)))
    torch.testing.assert_close(m(x), oracle(m, x, plan))
    torch.testing.assert_close(m(x, plan=plan), m(x))


def test_a_factor_that_takes_all_queries_is_softmax_attention():
    m, x = ProbSparse(12, 3, factor=10).double(), torch.randn(2, 9, 12, dtype=torch.double)
    everything = Plan("probsparse", {"queries": torch.arange(9).expand(2, 3, 9)})
    torch.testing.assert_close(m(x), oracle(m, x, everything))


def test_a_query_that_tells_keys_apart_is_chosen():
    """Keys alternate; all queries but one are nothing, so that all their scores are alike."""
    m = ProbSparse(4, 1, factor=3).double()
    with torch.no_grad():
        for layer, channel in ((m.q, 1), (m.k, 0)):
            layer.weight.zero_()
            layer.weight[0, channel] = 1.0
            layer.bias.zero_()
    x = torch.zeros(1, 40, 4, dtype=torch.double)
    x[0, ::2, 0], x[0, 1::2, 0], x[0, 17, 1] = 1.0, -1.0, 5.0
    assert 17 in m.plan(x)["queries"]


@pytest.mark.parametrize("factor", [1, 5])
def test_absent_tokens_change_nothing_but_the_number_of_queries(factor):
    m = ProbSparse(12, 3, factor=factor).double()
    x, there = torch.randn(2, 12, 12, dtype=torch.double), torch.ones(2, 12, dtype=torch.bool)
    there[0, 3:6] = False
    other = torch.where(there[..., None], x, torch.full_like(x, 50.0))
    torch.testing.assert_close(m(x, valid=there), m(other, valid=there))
    chosen = m.plan(x, valid=there)["queries"]
    if factor == 1:
        assert there[:, None].expand(2, 3, 12).gather(2, chosen).all()


def test_other_seeds_draw_other_keys_the_same_every_time():
    m, other = ProbSparse(8, 2, factor=1), ProbSparse(8, 2, factor=1, seed=1)
    drawn = m._drawn(200, torch.device("cpu"))
    assert torch.equal(drawn, m._drawn(200, torch.device("cpu")))
    assert not torch.equal(drawn, other._drawn(200, torch.device("cpu")))
    share = drawn.flatten().bincount(minlength=200).float() / drawn.numel()
    assert float(share.max()) < 4 / 200 and 0 <= int(drawn.min()) and int(drawn.max()) < 200


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ProbSparse(8, 2, factor=0), "factor must be at least 1, got 0"),
        (lambda x: ProbSparse(8, 3), "num_heads"),
        (lambda x: ProbSparse(8, 2)(x, x), "takes no context"),
        (lambda x: ProbSparse(8, 2).step(x), "cannot decode step by step"),
        (lambda x: ProbSparse(8, 2)(x, plan=Plan("probsparse", {"queries": torch.zeros(1, 2, 7)}, (("N", 7),))), "N=7"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 5, 8))
