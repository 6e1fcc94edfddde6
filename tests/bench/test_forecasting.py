"""The study of forecasts, as small as it goes."""

import pytest
import torch

from attnlib.bench.studies import forecasting as study


def test_some_generated_series_tell_what_others_will_do():
    """Series m + 1 holds what series m held four values ago, in other shares."""
    x = study.coupled(2000, noise=0.0)
    assert torch.equal(x, study.coupled(2000, noise=0.0))
    first, later = x[:-4, 0], x[4:, 1]
    at_once = torch.corrcoef(torch.stack([x[:, 0], x[:, 1]]))[0, 1].abs()
    assert torch.corrcoef(torch.stack([first, later]))[0, 1] > max(0.6, float(at_once))


@pytest.mark.parametrize("task", study.TASKS)
def test_parts_share_nothing_and_are_long_enough(task):
    train, test = study.TASKS[task]()
    for part in (train, test):
        assert all(len(s) >= study.PAST + study.FUTURE and bool(s.isfinite().all()) for s in part)
    assert train[0].shape[1] == test[0].shape[1] and sum(map(len, train)) > sum(map(len, test))


@pytest.mark.parametrize("together", [True, False])
def test_linear_maps_find_a_linear_law(together):
    time = torch.arange(600.0)
    x = torch.stack([(time / 3).sin(), (time / 3 + 1).cos()], 1)
    past, future = study.windows([x], study.PAST, study.FUTURE)
    torch.testing.assert_close(study.ridge(past, future, together)(past), future, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", study.TRAINED)
def test_windows_of_other_levels_and_sizes_are_forecast_alike(name):
    torch.manual_seed(0)
    model = study.TRAINED[name](3).double()
    x = torch.randn(2, study.PAST, 3, dtype=torch.double)
    y = model.predict(x)
    torch.testing.assert_close(model.predict(100 + 5 * x), 100 + 5 * y, atol=1e-2, rtol=0)
    other = x.clone()
    other[:, :, 2] = 0.5 * x[:, :, 2].flip(1)
    same = torch.allclose(model.predict(other)[:, :, :2], y[:, :, :2])
    assert same == (name == "TSM2, along time alone")


def test_the_study_runs(tmp_path):
    found = study.measure(pictures=tmp_path, steps=1, batch=2, seeds=(0, 1), tasks=("membrane potential",))
    (held,) = found["tasks"].values()
    assert [r["name"] for r in held["rows"]] == list(study.NAMES) and (tmp_path / "forecasting-cpu.svg").exists()
    assert held["rows"][0]["mse"]["half"] == 0 and held["rows"][2]["against"]["n"] == 2
