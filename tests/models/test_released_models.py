"""Whole released models in tiny configurations: their weights load strictly, and give their outputs and gradients."""

import pytest

from attnlib.models.build import model_entry
from tests.parity import Models


@pytest.mark.parametrize(("slug", "case"), Models.all())
def test_the_authors_model(slug, case):
    recorded = Models(slug)
    assert recorded.meta["repository"] and recorded.meta["commit"]
    assert model_entry(recorded.config[case]["model"]).family == slug
    recorded.model_holds(case)


@pytest.mark.parametrize(("slug", "case"), Models.all())
def test_every_entry_is_accounted_for(slug, case):
    """One that they do not have and one that is missing are named."""
    recorded = Models(slug)
    weights = recorded.weights(case)
    floats = [name for name, t in weights.items() if t.is_floating_point()]
    with pytest.raises(ValueError, match="one_of_mine"):
        recorded.build_model(case, {**weights, "one_of_mine": weights[floats[0]]})
    del weights[floats[-1]]
    with pytest.raises(ValueError, match="missing|has no"):
        recorded.build_model(case, weights)
