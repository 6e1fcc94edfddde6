"""MoH-ViT's two attentions: parity with the authors' classes, routing, absent tokens, bad settings."""

import pytest
import torch
from parity import Fixture

import attnlib

GLOBAL, AGGREGATED = "moh-vit-attention", "moh-vit-aggregated-attention"
FIXTURES = {slug: Fixture(slug) for slug in (GLOBAL, AGGREGATED)}
CASES = [(slug, case) for slug, fixture in FIXTURES.items() for case in fixture.config]
SETTINGS = dict(dim=16, num_heads=4, shared_heads=1, active_heads=2, bias_hidden=8)


@pytest.mark.parametrize(("slug", "case"), CASES)
def test_equals_the_authors(slug, case):
    module = FIXTURES[slug].build(case).eval()
    FIXTURES[slug].holds(case, module, lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("slug", FIXTURES)
def test_absent_tokens_are_as_if_the_image_ended_before_them(slug):
    """Rows below the image that do not exist change nothing, whatever they hold."""
    m = attnlib.create(slug, **SETTINGS, base_grid=6, **({"sr_ratio": 2} if slug == AGGREGATED else {})).double().eval()
    x = torch.randn(2, 4, 6, 16, dtype=torch.float64)
    taller = torch.cat([x, torch.full((2, 2, 6, 16), float("nan"), dtype=torch.float64)], 1)
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    valid[:, 4:] = False
    torch.testing.assert_close(m(taller, valid=valid)[:, :4], m(x))


@pytest.mark.parametrize("slug", FIXTURES)
def test_evaluation_equals_training_and_the_plan_is_obeyed(slug):
    m = attnlib.create(slug, **SETTINGS, **({"sr_ratio": 2} if slug == AGGREGATED else {})).double()
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    out = m(x, returns=("losses",))
    assert float(out.losses["balance"]) > 0
    torch.testing.assert_close(m.eval()(x), out.y)
    plan = m.plan(x)
    torch.testing.assert_close(m(x, plan=plan), out.y)


@pytest.mark.parametrize(("slug", "settings", "words"), [
    (AGGREGATED, dict(window_size=2), "window_size=2 must be odd"),
    (AGGREGATED, dict(sr_ratio=0), "sr_ratio"),
    (GLOBAL, dict(bias_hidden=0), "bias_hidden"),
    (GLOBAL, dict(active_heads=4), "active_heads=4"),
])  # fmt: skip
def test_bad_settings(slug, settings, words):
    with pytest.raises(ValueError, match=words):
        attnlib.create(slug, **{**SETTINGS, **settings})


@pytest.mark.parametrize(("settings", "grid", "cells"), [
    (dict(sr_ratio=8), (4, 6), (1, 1)), (dict(sr_ratio=3), (7, 2), (2, 1)), (dict(pool_size=5), (4, 6), (4, 5)),
    (dict(sr_ratio=8), (1, 1), (1, 1)),
])  # fmt: skip
def test_a_pooled_map_has_at_least_one_cell_and_at_most_one_per_token(settings, grid, cells):
    m = attnlib.create(AGGREGATED, **SETTINGS, **settings).double().eval()
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    assert m._cells(grid) == cells
    other = attnlib.create(AGGREGATED, **SETTINGS, pool_size=cells).double().eval()
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), other(x))


def test_a_pool_that_does_not_fit_is_refused_on_request():
    m = attnlib.create(AGGREGATED, **SETTINGS, sr_ratio=2, pad="refuse")
    assert m.traits.grid_multiple == 2 and m(torch.randn(1, 4, 6, 16)).shape == (1, 4, 6, 16)
    with pytest.raises(ValueError, match=r"sr_ratio=2 does not fit the grid \(4, 5\)"):
        m(torch.randn(1, 4, 5, 16))
    with pytest.raises(ValueError, match=r"pool_size=\(5, 5\) does not fit"):
        attnlib.create(AGGREGATED, **SETTINGS, pool_size=5, pad="refuse")(torch.randn(1, 4, 6, 16))
    with pytest.raises(ValueError, match="pad='zeros'"):
        attnlib.create(AGGREGATED, **SETTINGS, pad="zeros")
