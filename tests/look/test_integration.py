"""Sites where two modalities meet: planted, absent, and by chance."""

import pytest
import torch

from attnlib.look.encoding import (
    Bootstrapped,
    better,
    bootstrap,
    false_discoveries,
    folds,
    in_all,
    integration,
    resamples,
)


def scores(means, resamples=199, sites=8, bins=12, noise=0.02, seed=0):
    """(R, E * B) with a mean per site."""
    g = torch.Generator().manual_seed(seed)
    base = torch.as_tensor(means, dtype=torch.float64)[:, None].expand(sites, bins).flatten()
    val, test = (base + noise * torch.randn(resamples, sites * bins, generator=g, dtype=torch.float64) for _ in "ab")
    return Bootstrapped(val, test)


def six():
    """The first four sites pass everything; each of the others fails one control."""
    g = torch.full((8,), 0.3)
    both, one, side, random, twin = g + 0.2, g + 0.1, g + 0.1, g - 0.1, g + 0.0
    both[4], side[4], twin[4] = 0.3, 0.1, 0.1
    side[5], random[6], twin[7] = 0.6, 0.6, 0.6
    made = {"both": both, "vision": one - 0.1, "language": one, "side": side, "random": random, "twin": twin}
    return {name: scores(m, seed=i) for i, (name, m) in enumerate(made.items())}


ROLES = dict(
    multimodal=["both"], unimodal=["vision", "language"], concat="side", untrained={"both": "random"},
    matched=("both", "twin"),
)  # fmt: skip


@pytest.mark.parametrize("test", ["resamples", "bins"])
@pytest.mark.parametrize("choose", ["val", "test"])
def test_a_site_must_pass_every_control(test, choose):
    found = integration(six(), 12, **ROLES, test=test, choose=choose)
    assert found.sites.tolist() == [True] * 4 + [False] * 4 and found.best == ["both"] * 8
    fails = {"unimodal": 4, "concat": 5, "trained": 6, "matched": 7}
    for control, site in fails.items():
        assert [i for i in range(8) if not found.controls[control].holds[i]] == [site]
    fewer = {k: v for k, v in ROLES.items() if k not in ("concat", "matched", "untrained")}
    assert integration(six(), 12, **fewer).sites.sum() == 7
    other = integration({**six(), "both": scores([0.0] * 3 + [0.5] * 5)}, 12, **ROLES)
    assert in_all([found, other]).tolist() == [False] * 3 + [True] + [False] * 4


def test_the_best_model_of_a_site_is_chosen_before_it_is_compared():
    a, b = scores([0.3] * 8), scores([0.5, 0.1] * 4, seed=1)
    made = {**six(), "a": a, "b": b}
    found = integration(made, 12, multimodal=["a", "b"], unimodal=["vision"])
    assert found.best == ["b", "a"] * 4
    swapped = {**made, "b": Bootstrapped(1 - b.val, b.test)}
    assert integration(swapped, 12, multimodal=["a", "b"], unimodal=["vision"]).best[0] == "b"
    swapped = {**made, "b": Bootstrapped(0 * b.val, b.test)}
    assert integration(swapped, 12, multimodal=["a", "b"], unimodal=["vision"]).best == ["a"] * 8
    assert integration(swapped, 12, multimodal=["a", "b"], unimodal=["vision"], choose="test").best == ["b", "a"] * 4


def test_bins_that_no_model_predicts_do_not_count():
    made = six()
    for one in made.values():
        one.val[:, :5] = -1.0  # five of twelve bins of the first site
    found = integration(made, 12, **ROLES)
    assert not found.kept[0, :5].any() and found.kept[1:].all()
    assert found.controls["unimodal"].p[0].isnan() and not found.sites[0]
    assert integration(made, 12, **ROLES, least=7).sites[0]


def test_chance_passes_no_more_often_than_it_may():
    g = torch.Generator().manual_seed(0)
    a, b = (0.05 * torch.randn(99, 400, 12, generator=g) for _ in "ab")
    for kind in ("resamples", "bins"):
        assert better(a, b, test=kind).holds.float().mean() <= 0.05
    same = better(a, a)
    assert (same.gap == 0).all() and (same.p == 1).all() and not same.holds.any()
    assert (better(a, a, test="bins").p == 1).all()
    # bins that overlap are no independent evidence
    shared = (0.05 * torch.randn(1, 400, 1, generator=g)).expand(99, 400, 12)
    off = (
        shared
        + 0.05 * torch.randn(99, 400, 1, generator=g) * torch.ones(12)
        + 0.005 * torch.randn(99, 400, 12, generator=g)
    )
    naive, careful = (
        better(off, torch.zeros(()).expand_as(off), test=k).holds.float().mean() for k in ("bins", "resamples")
    )
    assert naive > 0.4 and careful < naive


def test_false_discoveries_leave_out_what_is_not_a_number():
    p = torch.tensor([0.01, float("nan"), 0.02, 0.5])
    assert false_discoveries(p).tolist() == [True, False, True, False]
    assert false_discoveries(torch.full((3,), float("nan"))).tolist() == [False] * 3


def world(events=160, seed=0):
    """Vision, language, and sites that add both up (first half) or read their product (second half)."""
    g = torch.Generator().manual_seed(seed)
    vision, language = torch.randn(events, 4, generator=g), torch.randn(events, 4, generator=g)
    product = vision * language
    added = torch.cat([vision, language], 1) @ torch.randn(8, 3, generator=g)
    met = product @ torch.randn(4, 3, generator=g)
    sites = torch.cat([added / added.std(0), met / met.std(0)], 1)
    y = (sites[:, :, None] + torch.randn(events, 6, 10, generator=g)).flatten(1)
    untrained = torch.tanh(torch.cat([vision, language], 1) @ torch.randn(8, 12, generator=g) * 0.1)
    models = {
        "vision": vision, "language": language, "side": torch.cat([vision, language], 1),
        "both": torch.cat([vision, language, product], 1), "random": untrained,
    }  # fmt: skip
    return models, y


def test_planted_integration_is_found_and_addition_is_not():
    models, y = world()
    rows = resamples(folds(160, 4, gap=1), 160, 19)
    found = {m: bootstrap(x, y, rows, split=4, gap=1, alphas=[1.0, 100.0]) for m, x in models.items()}
    told = integration(
        found, 10, multimodal=["both"], unimodal=["vision", "language"], concat="side",
        untrained={"both": "random"}, test="bins",
    )  # fmt: skip
    assert told.sites.tolist() == [False] * 3 + [True] * 3
    assert told.controls["unimodal"].holds[:3].all()  # without the concatenation they would have passed
    assert not told.controls["concat"].holds[:3].any()


def test_bad_input_is_refused():
    made = six()
    cases = [
        (lambda: integration(made, 12, multimodal=["both"], unimodal=["sound"]), r"scores hold no \['sound'\]"),
        (lambda: integration(made, 12, multimodal=[], unimodal=["vision"]), "at least one model each"),
        (lambda: integration(made, 7, multimodal=["both"], unimodal=["vision"]), "bins=7 do not divide the 96"),
        (lambda: integration(made, 12, multimodal=["both"], unimodal=["vision"], untrained={}), "no twin of"),
        (lambda: integration({**made, "both": scores([0.0] * 8, 9)}, 12, multimodal=["both"], unimodal=["vision"]),
         "of the same resamples"),
        (lambda: integration({"a": 1, "b": made["both"]}, 12, multimodal=["a"], unimodal=["b"]),
         "must be Bootstrapped"),
        (lambda: better(torch.zeros(2, 3), torch.zeros(2, 3)), r"a must have shape \(R, E, B\)"),
        (lambda: better(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), "the same resamples"),
        (lambda: in_all([]), "found is empty"),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            call()
