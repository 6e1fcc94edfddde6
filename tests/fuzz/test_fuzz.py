"""A few hundred trials of the fuzzer, and planted faults that it must see."""

import pytest
import torch

from fuzz import run
from fuzz.engine import TARGETS, Call, run_trial

TRIALS, SHARES = 300, 4

run.load()


@pytest.mark.parametrize("share", range(SHARES))
def test_no_call_is_answered_wrongly_or_by_an_internal_error(share):
    """Each share goes round all targets with a seed of its own."""
    wrong = [v for v in run.trials(TRIALS // SHARES, seed=share) if v.wrong]
    assert not wrong, "\n".join(
        f"{v.trial}: {v.wrong}\n    {v.what}\n    -> {v.outcome[:300]}\n    again: --trial {v.trial}" for v in wrong
    )


def test_a_trial_repeats_exactly():
    names = sorted(TARGETS)[:3]
    first, second = ([run_trial(n, 5, i) for n in names for i in range(4)] for _ in range(2))
    assert first == second


def refuses_inside(x, n):
    return x.reshape(n)


def swallows(x, n):
    return x * 1.0


def loses_a_digit(x, n):
    if not isinstance(n, int) or isinstance(n, bool) or not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        raise TypeError(f"x must be a float32 tensor and n an integer, got {n!r}")
    return x * 1.001


def gives_nan(x, n):
    return x * float("nan")


@pytest.mark.parametrize(
    "fn, words",
    [
        (refuses_inside, "internal error"),
        (swallows, "meaningless call is accepted"),
        (loses_a_digit, "wrong number"),
        (gives_nan, "NaN"),
    ],
)
def test_planted_faults_are_seen(fn, words, monkeypatch):
    def make(rng):
        return Call(fn, dict(x=torch.ones(4), n=4), lambda x, n: x.double())

    monkeypatch.setitem(TARGETS, "planted", make)
    verdicts = [run_trial("planted", 0, i) for i in range(60)]
    assert any(words in v.wrong for v in verdicts)
