"""Liars that are honest except in one situation are rejected for the right reason; honest modules pass everywhere."""

import pytest
import torch
from check.situations import SITUATIONS
from torch import nn

from attnlib import Traits
from attnlib.check import check


@pytest.mark.parametrize("liar", SITUATIONS, ids=lambda c: c.__name__)
def test_a_liar_in_one_situation_is_rejected_for_the_right_reason(liar):
    report = check(liar, dim=8, grid=10)
    failed = {f.claim for f in report.failed}
    assert (failed == liar.caught_by) if liar.exactly else (failed >= liar.caught_by), str(report)


@pytest.mark.parametrize("liar", SITUATIONS, ids=lambda c: c.__name__)
def test_its_honest_twin_passes_everywhere(liar):
    report = check(liar, dim=8, lie=False, grid=10)
    assert report.ok, str(report)
    assert all(report[claim].status == "pass" for claim in liar.caught_by)


@pytest.mark.parametrize(
    "liar, claim, says",
    [
        ("PeeksBeyond64", "causality", "at 131 tokens"),
        ("PeeksInTraining", "causality", "in training"),
        ("CausalInOneDimension", "causality", "on a grid of rank 2"),
        ("ReadsPaddingOnTheLeft", "validity", "with a gap on the left"),
        ("ValidInEvalOnly", "validity", "in training"),
        ("ScalesByTheLongestRow", "batch", "with valid of the other samples"),
        ("OtherwiseInInferenceMode", "modes", "under inference_mode"),
        ("OtherwiseWhenFrozen", "modes", "with frozen parameters"),
        ("LinearAtPowersOfTwo", "work", "at odd sizes"),
        ("LinearWithoutGradients", "work", "forward and backward"),
        ("CachesMasksBySize", "mask", "of the size of an earlier one"),
        ("ReadsContextAsItLies", "strides", "context lies"),
        ("UniformWeights", "extras", "do not explain y"),
        ("WeightsBeforeTheMask", "extras", "weights at keys that valid excludes"),
        ("ReturnsItsInput", "inputs untouched", "shares memory with x"),
        ("AdvancesTheGenerator", "no hidden state", "the random state of torch"),
        ("StateInHalf", "streaming", "kept in float32"),
        ("StateOfTheInput", "streaming", "the state shares memory with x"),
    ],
)
def test_the_situation_is_named(liar, claim, says):
    cls = next(c for c in SITUATIONS if c.__name__ == liar)
    finding = check(cls, dim=8, grid=10, select=[claim])[claim]
    assert finding.status == "fail" and says in finding.why, finding


class WrappedAttention(nn.Module):
    """nn.MultiheadAttention as anyone would wrap it."""

    def __init__(self, dim=16, weights=False):
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(dim, 2, batch_first=True), weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.weights)[0]


class Recurrent(nn.Module):
    """A GRU."""

    def __init__(self, dim=16):
        super().__init__()
        self.inner = nn.GRU(dim, dim, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Fourier(nn.Module):
    """The token mixing of FNet: no parameters, no bfloat16 in torch's transform, no empty batch."""

    def forward(self, x):
        return torch.fft.fft2(x, dim=(-2, -1)).real


NO_VALID = Traits(valid=False, work={"N": 1}, memory={"N": 1}, traceable=False)
HONEST = [
    (WrappedAttention(), NO_VALID.but(work={"N": 2}, memory={"N": 2}, permutation_equivariant=True)),
    (WrappedAttention(weights=True), NO_VALID.but(work={"N": 2}, memory={"N": 2}, traceable=True)),
    (Recurrent(), NO_VALID.but(patterns={"causal-self"})),
    (Fourier(), NO_VALID),
    (Fourier(), NO_VALID.but(traceable=True)),
]


@pytest.mark.parametrize("module, claims", HONEST)
@pytest.mark.parametrize("claimed", [True, False])
def test_no_wolf_is_cried(module, claims, claimed):
    report = check(module, claims=claims if claimed else None, grid=12)
    assert report.ok, str(report)
    slowest = max(report.findings, key=lambda f: f.seconds)
    assert slowest.seconds < 20, slowest


def test_lying_about_a_recurrent_network_is_noticed():
    report = check(Recurrent(), claims=NO_VALID.but(permutation_equivariant=True, patterns={"noncausal-self"}), grid=12)
    assert {f.claim for f in report.failed} == {"patterns", "permutation"}
