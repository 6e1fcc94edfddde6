"""Encoding models: ridge, folds, ceilings, resampling; held to scikit-learn and to the authors' pipeline."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.model_selection import KFold
from torch import nn

from attnlib import look
from attnlib.look.encoding import (
    ALPHAS,
    bootstrap,
    encode,
    features_of,
    folds,
    noise_ceiling,
    pearson,
    project,
    resamples,
    ridge,
    ridge_path,
)

FIXTURE = Path(__file__).parent.parent / "fixtures" / "vl-integration-brain-encoding.safetensors"


def data(events=60, features=6, targets=4, noise=0.5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(events, features, generator=g, dtype=dtype) * 2 + 1
    w = torch.randn(features, targets, generator=g, dtype=dtype)
    return x, x @ w + noise * torch.randn(events, targets, generator=g, dtype=dtype) + 3


def closed_form(x, y, alpha, intercept):
    """Float64: a column of ones, penalised as features are or not at all."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalty = alpha * torch.eye(ones.shape[1], dtype=x.dtype)
    if intercept == "free":
        penalty[-1, -1] = 0
    return torch.linalg.solve(ones.T @ ones + penalty, ones.T @ y)


@pytest.mark.parametrize("intercept", ["free", "penalised"])
@pytest.mark.parametrize("side", ["primal", "dual"])
@pytest.mark.parametrize("features", [6, 90])
def test_every_penalty_of_a_path_is_the_closed_form(intercept, side, features):
    x, y = data(features=features)
    new = torch.randn(7, features, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    alphas = torch.tensor([0.3, 20.0, 4000.0], dtype=x.dtype)
    found = ridge_path(x, y, new, alphas, intercept, side)
    for i, alpha in enumerate(alphas.tolist()):
        w = closed_form(x, y, alpha, intercept)
        assert torch.allclose(found[i], new @ w[:-1] + w[-1], atol=1e-8)
    own = torch.tensor([0.3, 20.0, 4000.0, 20.0], dtype=x.dtype)
    fitted = ridge(x, y, own, intercept=intercept, side=side, standardize=False)
    for t, alpha in enumerate(own.tolist()):
        w = closed_form(x, y, alpha, intercept)[:, t]
        assert torch.allclose(fitted.weight[:, t], w[:-1], atol=1e-8) and torch.allclose(fitted.bias[t], w[-1])


def test_it_is_scikit_learns_with_and_without_a_penalised_offset():
    x, y = data(dtype=torch.float32)
    for alpha in (0.1, 100.0):
        theirs = SklearnRidge(alpha).fit(x.numpy(), y.numpy()).predict(x.numpy())
        assert torch.allclose(ridge(x, y, alpha, standardize=False)(x), torch.tensor(theirs), atol=1e-4)
        ones = torch.cat([x, torch.ones(len(x), 1)], 1).numpy()
        theirs = SklearnRidge(alpha, fit_intercept=False).fit(ones, y.numpy()).predict(ones)
        ours = ridge(x, y, alpha, intercept="penalised", standardize=False)(x)
        assert torch.allclose(ours, torch.tensor(theirs), atol=1e-4)


def test_a_fitted_map_scales_new_features_as_it_scaled_those_it_saw():
    x, y = data()
    x = torch.cat([x, torch.full((len(x), 1), 0.1, dtype=x.dtype)], 1)  # and one that is the same everywhere
    model = ridge(x, y, 1e-9)
    assert torch.allclose(model(x), ridge(x * 50 - 3, y, 1e-9)(x * 50 - 3), atol=1e-6)
    assert torch.isfinite(model(x[:1] + 5)).all() and model.weight[-1].abs().max() < 1e-9
    assert model(x.float()).dtype == torch.float64 and ridge(x.bfloat16(), y.bfloat16())(x).dtype == torch.float32


def test_himalayas_backend_is_as_it_was():
    from himalaya.backend import get_backend, set_backend

    set_backend("numpy")
    encode(*data())
    assert get_backend().name == "numpy"
    with pytest.raises(ValueError, match="nan|NaN|finite"):
        encode(torch.full((60, 2), torch.nan), data()[1])
    assert get_backend().name == "numpy"


@pytest.mark.parametrize("case", ["tall", "wide"])
def test_the_authors_pipeline(case):
    with safe_open(FIXTURE, "pt") as f:
        t = {k.partition("/")[2]: f.get_tensor(k) for k in f.keys() if k.startswith(case + "/")}  # noqa: SIM118
    x, y = t["x"].double(), t["y"].double()
    found = encode(x, y, choose="shared", intercept="penalised")
    assert (found.alpha == t["alpha"]).all() and len(set(found.alpha[0].tolist())) > 1
    assert torch.allclose(found.val, t["val"].double(), atol=1e-4)
    assert torch.allclose(found.test, t["test"].double(), atol=1e-4)
    ours = ridge(x, y, 10.0, intercept="penalised", standardize=False)
    assert torch.allclose(torch.cat([ours.bias[None], ours.weight]), t["w_ones"].double(), atol=1e-4)
    centred = ridge_path(x, y, torch.eye(x.shape[1]).double(), torch.tensor([10.0]).double(), "penalised")
    assert torch.allclose(centred[0] - ours.bias, t["w_ones"][1:].double(), atol=1e-4)


def test_folds_are_those_of_scikit_learn_and_a_gap_keeps_neighbours_apart():
    for events, count in ((53, 5), (30, 3), (64, 4)):
        for fold, (train, held) in zip(folds(events, count), KFold(count).split(range(events)), strict=True):
            assert fold.train.tolist() == train.tolist()
            assert fold.val.tolist() == held[: len(held) // 2].tolist()
            assert fold.test.tolist() == held[len(held) // 2 :].tolist()
        plain = folds(events, count)
        for fold, same in zip(folds(events, count, gap=2), plain, strict=True):
            assert fold.test.tolist() == same.test.tolist()
            parts = [set(p.tolist()) for p in fold]
            for i, a in enumerate(parts):
                for b in parts[i + 1 :]:
                    assert min(abs(p - q) for p in a for q in b) > 2


def test_the_penalty_is_chosen_without_what_is_tested():
    x, y = data(80, noise=8.0)
    split = folds(80, 4)
    whole = encode(x, y, split=4)
    for i, fold in enumerate(split):
        changed = y.clone()
        changed[fold.test] = y[fold.test[torch.randperm(len(fold.test))]]
        again = encode(x, changed, split=4)
        assert torch.equal(again.alpha[i], whole.alpha[i]) and torch.equal(again.val_folds[i], whole.val_folds[i])
        assert not torch.allclose(again.test_folds[i], whole.test_folds[i])
    val = torch.stack([encode(x, y, split=4, alphas=[a]).val_folds for a in ALPHAS])
    assert torch.equal(whole.alpha, torch.tensor(ALPHAS, dtype=x.dtype)[val.argmax(0)])
    shared = encode(x, y, split=4, choose="shared")
    assert torch.equal(shared.alpha[0], torch.tensor(ALPHAS, dtype=x.dtype)[val.mean(1).argmax(0)])
    assert (shared.alpha == shared.alpha[0]).all()


def test_what_was_predicted_belongs_to_the_scores():
    x, y = data()
    found = encode(x, y)
    for i, fold in enumerate(folds(60)):
        assert torch.allclose(pearson(found.predicted[fold.test], y[fold.test]), found.test_folds[i])
        assert found.predicted[fold.val].isnan().all()
    assert torch.allclose(found.test, found.test_folds.mean(0))
    assert torch.allclose(encode(x, y, side="dual").predicted, found.predicted, atol=1e-6, equal_nan=True)
    moved = encode(x, y, intercept="penalised")
    assert torch.allclose(moved.test, found.test, atol=1e-6)  # r does not see an offset


def test_features_that_know_nothing_predict_nothing():
    g = torch.Generator().manual_seed(0)
    found = encode(torch.randn(400, 20, generator=g), torch.randn(400, 60, generator=g))
    assert abs(float(found.test.mean())) < 0.05
    assert (found.test_folds.abs() < 2 / 40**0.5).float().mean() > 0.9


def test_the_ceiling_is_what_a_perfect_model_reaches():
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(4000, 3, generator=g, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.0])
    repeats = signal + 1.5 * torch.randn(3, 4000, 3, generator=g, dtype=torch.float64)
    found = noise_ceiling(repeats)
    assert torch.allclose(found[:2], pearson(signal, repeats.mean(0))[:2], atol=0.02)
    assert torch.allclose(found[:2], (torch.tensor([4.0, 1.0]) / (torch.tensor([4.0, 1.0]) + 0.75)).sqrt().double(),
                          atol=0.02)  # fmt: skip
    assert found[2] < 0.2
    told = encode(signal + 0.01 * torch.randn_like(signal), repeats[..., :2])
    assert torch.allclose(told.normalized, torch.ones(2, dtype=torch.float64), atol=0.02)
    assert torch.equal(told.ceiling, found[:2]) and encode(signal, repeats[0, :, :2]).ceiling is None
    assert noise_ceiling(torch.ones(2, 5, 1)).isnan().all()


def test_resampling_keeps_copies_and_neighbours_on_their_side():
    split = folds(60, 3, gap=2)
    rows = resamples(split, 60, 50)
    for row in rows:
        for fold in split:
            train, val, test = (set(row[p].tolist()) for p in fold)
            assert not train & val and not train & test and not val & test
            assert test <= set(fold.test.tolist()) and min(abs(a - b) for a in train for b in test) > 2
    assert torch.equal(rows, resamples(split, 60, 50)) and not torch.equal(rows, resamples(split, 60, 50, seed=1))
    assert (rows != torch.arange(60)).any(1).all()


def test_equal_models_differ_by_nothing_in_every_resample():
    x, y = data()
    rows = resamples(folds(60), 60, 5)
    a, b = bootstrap(x, y, rows), bootstrap(x.clone(), y, rows)
    assert torch.equal(a.test, b.test) and torch.equal(a.val, b.val) and a.test.shape == (5, 4)
    assert torch.equal(bootstrap(x, y, 5).test, a.test)  # the same seed draws the same rows
    assert torch.equal(bootstrap(x, y, torch.arange(60)[None]).test[0], encode(x, y).test)
    low, high = a.interval("test")
    assert (low <= a.test.mean(0)).all() and (a.test.mean(0) <= high).all()


def test_features_of_a_model_feed_the_encoder():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(300, 3, 4)
    flat = features_of(model, x, modules=["0", "2"], chunk=70)
    assert flat["0"].shape == (300, 18) and torch.allclose(flat["0"], model[0](x).flatten(1), atol=1e-6)
    assert torch.allclose(features_of(model, x, modules=["2"], tokens="mean")["2"], model(x).mean(1), atol=1e-6)
    assert torch.allclose(features_of(model, x, modules=["2"], tokens="first")["2"], model(x)[:, 0], atol=1e-6)
    twice = nn.Sequential(model[0], nn.Linear(6, 4), model[0])
    assert list(features_of(twice, x, modules=["0"], chunk=100)) == ["0#0", "0#1"]
    assert (look.encode(flat["0"], flat["2"]).test > 0.8).all()
    assert (look.encode(flat["0"][:, :6], flat["2"]).test[2:].abs() < 0.5).all()  # of another token


def test_projections_keep_distances():
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(10, 6000, generator=g)
    small = project(wide, eps=0.3, seed=0)
    assert small.shape[1] < 400 and torch.equal(small, project(wide, eps=0.3, seed=0))
    ratio = torch.pdist(small) / torch.pdist(wide)
    assert ratio.min() > 0.7**0.5 and ratio.max() < 1.3**0.5
    assert torch.equal(project(wide[:, :50], eps=0.3), wide[:, :50])
    assert project(wide[:, :50], eps=0.3, always=True).shape == small.shape  # the release always projects


def test_bad_input_is_refused():
    x, y = data()
    cases = [
        (lambda: encode(x[:20], y[:20]), "folds=5 with gap=0 need at least 30 events .* got 20"),
        (lambda: encode(x, y, gap=5), "need at least 80 events .* got 60"),
        (lambda: encode(x, torch.cat([y, torch.ones(60, 1).double()], 1)), r"responses \[4\] are the same for every"),
        (lambda: encode(x, y[:-1]), "responses must have shape"),
        (lambda: encode(x, y, alphas=[]), "alphas is empty"),
        (lambda: encode(x, y, alphas=[1.0, 0.0]), "alphas must be a finite number above 0"),
        (lambda: encode(x, y, intercept="none"), "intercept='none' is not possible"),
        (lambda: encode(x, y, choose="test"), "choose='test' is not possible"),
        (lambda: encode(x, y, side="left"), "side='left' is not possible"),
        (lambda: encode(x, y.clone().index_fill_(1, torch.tensor([2]), torch.nan)), r"responses must be finite.*\[2\]"),
        (lambda: encode(x, y, split=[folds(60)[0]._replace(val=folds(60)[0].test)]), "an event in two parts"),
        (lambda: encode(x, y, split=[folds(80)[4]]), "places of the 60 events"),
        (lambda: encode(x, y, split=[]), "split holds no folds"),
        (lambda: encode(x, y, split=folds(60), gap=1), "gap is for folds that are made here"),
        (lambda: encode(x[:, :0], y), "a column each at least"),
        (lambda: encode(x, y).normalized, "there is no ceiling"),
        (lambda: noise_ceiling(y[None]), "at least twice, got 1"),
        (lambda: bootstrap(x, y, torch.zeros(2, 5, dtype=torch.long)), r"rows must be \(R, 60\)"),
        (lambda: bootstrap(x, y, torch.full((2, 60), 60)), "places of the 60 events"),
        (lambda: ridge(x, y, torch.ones(3)), "one for each of the 4 responses, got 3"),
        (lambda: features_of(nn.Linear(6, 2).double(), x, modules=["conv"]), "has no 'conv'"),
        (lambda: features_of(nn.Linear(6, 2).double(), x, modules=[""], tokens="mean"), "needs tokens"),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    with pytest.raises(TypeError, match="alphas must be a sequence"):
        encode(x, y, alphas=1.0)
    kept = encode(x, torch.cat([y, torch.ones(60, 1).double()], 1), constant="nan")
    assert kept.test[-1].isnan()
    torch.testing.assert_close(kept.test[:-1], encode(x, y).test, atol=1e-12, rtol=1e-12)
