"""Options of the authors' classes off their defaults: output, input gradients and weight gradients of recorded runs."""

import functools

import pytest
from parity import Options


@pytest.mark.parametrize(("slug", "case"), Options.all())
def test_output_and_gradients_equal_the_authors(slug, case):
    fixture = Options(slug)
    fixture.holds(case, fixture.build(case), functools.partial(fixture.call, case))


def test_there_are_runs():
    assert Options.all()
