"""The conformance kit rejects every planted liar for the right reason, and never cries wolf."""

import json
import sys

import pytest
import torch
from check.liars import LIARS, Liar, PeeksOneAhead, QuadraticInDisguise
from torch import nn

import attnlib
from attnlib import Output, Traits
from attnlib.check import CLAIMS, ORDER, Case, check, conformance, run_cli
from attnlib.check.growth import count, exponent


@pytest.mark.parametrize("liar", LIARS, ids=lambda c: c.__name__)
def test_a_liar_is_rejected_for_the_right_reason(liar):
    report = check(liar, dim=8, grid=10)
    failed = {f.claim for f in report.failed}
    assert (failed == liar.caught_by) if liar.exactly else (failed >= liar.caught_by), str(report)
    assert not report.ok


@pytest.mark.parametrize("liar", LIARS, ids=lambda c: c.__name__)
def test_its_honest_twin_passes(liar):
    report = check(liar, dim=8, lie=False, grid=10)
    assert report.ok, str(report)
    assert all(report[claim].status == "pass" for claim in liar.caught_by)


@pytest.mark.parametrize(
    "liar, claim, says",
    [
        ("PeeksOneAhead", "causality", "reaches x at 1"),
        ("ChoosesByTheFuture", "causality", "changes when the tokens after it do"),
        ("QuadraticInDisguise", "work", "claimed is N^1"),
        ("NanOnAnEmptyRow", "mask", "NaN"),
        ("StreamDrifts", "streaming", "token by token differs"),
        ("LooksAtItsNeighbours", "batch", "reaches other samples"),
        ("WritesIntoItsInput", "inputs untouched", "changes x in place"),
        ("IgnoresValid", "validity", "a bias stands in for their content"),
        ("ZeroesInsteadOfHiding", "validity", "a bias stands in for their content"),
        ("CalibratesItself", "no hidden state", "changes size of the module"),
        ("AnswersFromMemory", "no hidden state", "the second call answers differently"),
        ("LosesItsLoss", "checkpointing", "the backward pass breaks"),
        ("SurrogateCalledExact", "gradient", "a central difference"),
    ],
)
def test_the_reason_is_spelled_out(liar, claim, says):
    cls = next(c for c in LIARS if c.__name__ == liar)
    finding = check(cls, dim=8, grid=10, select=[claim])[claim]
    assert finding.status == "fail" and says in finding.why, finding


def test_small_leaks_are_seen():
    class Whisper(Liar):
        class_traits = PeeksOneAhead.class_traits

        def mix(self, x, context=None, *, valid=None, **_):
            y = self.attend(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), valid)
            return y + 1e-5 * x.roll(-1, 1) if valid is None else y

    assert check(Whisper, dim=8, grid=10, select=["causality"])["causality"].status == "fail"


def test_every_claim_has_its_place_in_the_report():
    assert sorted(CLAIMS) == sorted(ORDER)
    report = check(Liar, dim=8, lie=False, grid=6)
    assert [f.claim for f in report.findings] == list(ORDER)
    assert all(f.why for f in report.findings)


def test_report_prints_and_serialises():
    report = check(PeeksOneAhead, dim=8, grid=10, select=["patterns", "causality", "plan"])
    text = str(report)
    assert "causality" in text and "fail" in text and "not claimed" in text and "breaks causality" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False and data["config"] == {"dim": 8} and data["grid"] == [10]
    assert [f["status"] for f in data["findings"]] == ["pass", "fail", "skip"]
    assert data["claims"]["patterns"] == ["causal-self"]


def test_growth_is_measured_not_timed():
    counts = {}
    for lie in (True, False):
        claims = QuadraticInDisguise.class_traits.but(work={"N": 2}, memory={"N": 2})
        report = check(QuadraticInDisguise, dim=8, lie=lie, grid=8, claims=claims, select=["work", "memory"])
        assert report.ok
        counts[lie] = report["work"].measured, report["memory"].measured, report["work"].loose
    assert counts[True][0] == pytest.approx(2, abs=0.1) and counts[True][1] == pytest.approx(2, abs=0.1)
    assert not counts[True][2]
    assert counts[False][0] == pytest.approx(1, abs=0.05) and counts[False][1] == pytest.approx(1, abs=0.05)
    assert counts[False][2]


def test_counting_leaves_projections_out_and_knows_views():
    linear = nn.Linear(4, 4)

    def work(f):
        return count(f, torch.ones(3, 4))

    assert work(linear) == (0.0, 0.0, True)
    assert work(lambda x: x.view(4, 3).t())[:2] == (0, 0)
    assert work(lambda x: x + 1)[:2] == (12, 12)
    assert work(lambda x: x @ x.t())[:2] == (2 * 3 * 4 * 3, 9)
    assert work(lambda x: x.sum())[:2] == (12, 1)
    assert work(lambda x: x[:, :1].add_(1))[:2] == (3, 3)
    assert work(lambda x: float(x.sum()))[2] is False  # looks at values, so it is counted on real ones
    assert exponent([(2, 8.0), (4, 32.0)]) == 2


def test_growth_in_another_symbol():
    class Wide(Liar):
        class_traits = Liar.class_traits.but(work={"N": 2, "width": 2}, memory={"N": 2, "width": 1})

        def __init__(self, dim, width=4, lie=True):
            super().__init__(dim, lie)
            self.width = width

        def mix(self, x, context=None, *, valid=None, **_):
            y = self.attend(x, None, valid)
            return y + 0 * (x.new_ones(self.width, self.width) @ x.new_ones(self.width, 10**4)).sum()

    symbols = {"width": ((64, {"width": 64}), (256, {"width": 256}))}
    case = Case("Wide", {"dim": 8}, (8,), symbols=symbols)
    assert check(Wide, case, select=["work"]).ok
    tight = Wide.class_traits.but(work={"N": 2, "width": 1})
    report = check(Wide, case, claims=tight, select=["work"])
    assert not report.ok and "width^" in report["work"].why
    silent = check(Wide, Case("Wide", {"dim": 8}, (8,)), select=["work"])["work"]
    assert "width: not counted" in silent.why


def test_fixed_size_mechanisms_are_grown_by_their_setting():
    class Fixed(Liar):
        class_traits = Liar.class_traits.but(resolution_free=False)

        def __init__(self, dim, tokens=6):
            super().__init__(dim, False)
            self.place = nn.Parameter(torch.zeros(tokens, dim))

        def mix(self, x, context=None, *, valid=None, **_):
            if x.shape[1] != len(self.place):
                raise ValueError(f"x has {x.shape[1]} tokens, this module was built for tokens={len(self.place)}")
            return self.attend(x + self.place, None, valid)

    report = check(Fixed, Case("Fixed", {"dim": 8}, (6,), grid_setting="tokens"))
    assert report.ok, str(report)
    assert "refused" in report["resolution"].why and report["work"].measured == pytest.approx(2, abs=0.1)
    assert check(Fixed, Case("Fixed", {"dim": 8}, (6,)), select=["work"])["work"].status == "skip"


def test_a_required_carry_comes_from_the_case():
    class Needy(Liar):
        class_traits = Liar.class_traits.but(carries=True)

        def mix(self, x, context=None, *, valid=None, carry=None, returns=(), **_):
            if carry is None:
                raise ValueError("carry is needed: the scores of the previous block")
            y = self.attend(x, None, valid) * carry[..., None].to(x.dtype)
            return Output(y, carry=carry)

    case = Case("Needy", {"dim": 8}, (6,), extras=lambda x: {"carry": x.new_ones(x.shape[:-1])})
    assert check(Needy, case).ok
    report = check(Needy, Case("Needy", {"dim": 8}, (6,)), select=["patterns"])
    assert "carry is needed" in report["patterns"].why


def test_a_class_may_say_what_to_try_it_on():
    class Picky(Liar):
        example = {"grid": (9,)}

    assert check(Picky, dim=8, select=["patterns"]).grid == (9,)
    assert check(Picky, dim=8, grid=5, select=["patterns"]).grid == (5,)
    report = check("softmax-attention", dim=8, num_heads=2, grid=4, context_grid="3,2", select=["patterns"])
    assert report.ok


class Plain(nn.Module):
    """A user's module that knows nothing of attnlib."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_plain_modules_are_probed():
    report = run_cli("check.test_kit:Plain", {"dim": 8, "num_heads": 2}, (10,), infer=True)
    assert report.ok, str(report)
    assert report["permutation"].status == "pass" and report["batch"].status == "pass"
    assert report["work"].measured == pytest.approx(2, abs=0.1)
    assert "would not hold" in report["causality"].why
    assert report["validity"].status == "skip"


def test_claims_can_be_given_from_outside():
    claims = Traits(patterns={"causal-self"}, valid=False, work={"N": 1}, memory={}, traceable=False)
    report = check(Plain(8, 2), claims=claims, grid=9)
    assert {f.claim for f in report.failed} == {"causality", "work"}


def test_ways_to_name_a_target():
    only = ["patterns"]
    assert check("softmax-attention", dim=8, num_heads=2, select=only).ok
    assert check("mha", select=only).ok
    assert check(lambda dim: Plain(dim, 2), dim=8, select=only).ok
    assert check(Plain(8, 2), select=only).ok
    assert check(Case("softmax-attention", dict(dim=8, num_heads=2), (3, 3)), select=only).grid == (3, 3)
    assert attnlib.check("softmax-attention", dim=8, num_heads=2, select=only).ok
    assert attnlib.check.Case is Case


@pytest.mark.parametrize(
    "target, says",
    [
        ("sofmax-attention", "did you mean 'softmax-attention'"),
        ("no_such_module:Thing", "cannot import 'no_such_module'"),
        ("check.test_kit:Missing", "has no 'Missing'"),
    ],
)
def test_unknown_targets_are_refused(target, says):
    with pytest.raises(ValueError, match=says):
        check(target)


def test_unknown_claims_and_settings_are_refused():
    with pytest.raises(ValueError, match="possible"):
        check("softmax-attention", select=["honesty"])
    with pytest.raises(TypeError, match="built already"):
        check(Plain(8, 2), dim=8)
    with pytest.raises(TypeError, match="not a torch.nn.Module"):
        check(lambda: 3)


def test_checking_leaves_no_trace():
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    module = Plain(8, 2)
    torch.set_rng_state(state)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    check(module, grid=6)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()) and module.training


test_as_a_users_parametrised_test = conformance(
    [Case("check.liars:IgnoresValid", dict(dim=8, lie=False), (6,), "honest")]
)


def test_the_parametrised_test_fails_on_a_liar():
    test = conformance([])
    with pytest.raises(AssertionError, match="causality: causal-self: the gradient"):
        test(Case("check.liars:PeeksOneAhead", dict(dim=8), (6,)))
    assert "pytest" in sys.modules
