"""Forecasts of time series: TSM2's scans against linear maps, against softmax in their place, and without series scans.

``attnlib bench --suite forecasting --out benchmarks/results`` measures again what ``forecasting-cpu.json`` holds and
draws it. Three kinds of series: six generated ones that follow two hidden drivers with delays of their own, so that
some tell what others will do; four channels of an electroencephalogram and a neuron's membrane potential, both inside
matplotlib. Every contestant reads the same windows, normalised each by its own mean and deviation; linear maps are
fitted in closed form (as ridge regressions, whose strength is chosen on the end of the training part), the others are
trained. What is reported is the mean squared error on the end of the series, in variances of the training part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...models.tsm2 import TSM2
from ...nn.registry import create
from ..cab.tasks import windows
from ..clock import machine
from ..data import files
from ..small import Progress, fit, picture, study

PAST, FUTURE = 64, 16
DIM, DEPTH, HEADS, PATCH, STRIDE = 24, 1, 4, 8, 8
BASELINE = "linear map of each series"
METRIC = "mse"


def coupled(length: int = 3000, series: int = 6, seed: int = 0, noise: float = 0.1) -> Tensor:
    """(length, series): mixtures of two random oscillations, each series behind the first one by a delay of its own.

    >>> coupled(50).shape
    torch.Size([50, 6])
    """
    generator = torch.Generator().manual_seed(seed)
    delays = torch.arange(series) * 4
    total = length + int(delays[-1]) + 200
    drivers = []
    for period, fade in ((23.0, 0.97), (9.0, 0.95)):
        angle, state, found = 2 * np.pi / period, torch.zeros(2), []
        turn = fade * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).float()
        for push in torch.randn(total, 2, generator=generator):
            state = turn @ state + push
            found.append(state[0])
        values = torch.stack(found)
        drivers.append(values / values.std())
    shares = torch.rand(series, 2, generator=generator) + 0.2
    start = 200 + int(delays[-1])
    made = [
        sum(s * d[start - lag : start - lag + length] for s, d in zip(row, drivers, strict=True))
        for row, lag in zip(shares, delays.tolist(), strict=True)
    ]
    x = torch.stack(made, 1)  # type: ignore[arg-type]
    return x / x.std(0) + noise * torch.randn(x.shape, generator=generator)


def electroencephalogram() -> Tensor:
    """(800, 4) of matplotlib's ``eeg.dat``."""
    file = files._packaged("matplotlib", "mpl-data/sample_data/eeg.dat")
    return torch.from_numpy(np.fromfile(file, dtype="<f8").astype(np.float32)).view(-1, 4)


def _split(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The first three quarters and the rest, in units of the former."""
    cut = len(x) * 3 // 4
    x = (x - x[:cut].mean(0)) / x[:cut].std(0)
    return [x[:cut]], [x[cut:]]


def _membrane() -> tuple[list[Tensor], list[Tensor]]:
    held = files.series()
    return held.train, held.test


#: Task -> training and test stretches (T, M).
TASKS: dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]] = {
    "generated, six series": lambda: _split(coupled()),
    "electroencephalogram, four channels": lambda: _split(electroencephalogram()),
    "membrane potential": _membrane,
}


class Nothing(nn.Module):
    """Answers zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def tsm2(series: int) -> TSM2:
    """The forecaster under test."""
    return TSM2(series, PAST, FUTURE, PATCH, STRIDE, DIM, DEPTH, d_state=8)


def along_time(series: int) -> TSM2:
    """The same without scans along the series."""
    model = tsm2(series)
    model.series_mixers = nn.ModuleList([Nothing() for _ in range(DEPTH)])
    return model


def softmax(series: int) -> TSM2:
    """The same with softmax attention in place of every scan: causal along time, not so along the series."""
    model = tsm2(series)
    for name, causal in (("time_mixers", True), ("series_mixers", False)):
        made = [create("softmax-attention", dim=DIM, num_heads=HEADS, causal=causal) for _ in range(DEPTH)]
        setattr(model, name, nn.ModuleList(made))
    return model


TRAINED: dict[str, Callable[[int], TSM2]] = {
    "TSM2": tsm2,
    "TSM2, along time alone": along_time,
    "softmax attention in place of scans": softmax,
}
#: Maps fitted in closed form: whether one reads all series.
FITTED = {BASELINE: False, "linear map of all series": True}
LAST = "last value"
NAMES = (*FITTED, *TRAINED, LAST)


def normalised(past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows (B, L, M) with mean 0 and deviation 1, the means and the deviations."""
    mean, spread = past.mean(1, keepdim=True), past.std(1, keepdim=True) + 1e-5
    return (past - mean) / spread, mean, spread


def ridge(past: Tensor, future: Tensor, together: bool) -> Callable[[Tensor], Tensor]:
    """A linear map of windows to their future; the last fifth of the windows chooses how strongly it is held back."""
    x, mean, spread = normalised(past)
    y = (future - mean) / spread

    def flat(t: Tensor) -> Tensor:
        return (t.flatten(1) if together else t.transpose(1, 2).flatten(0, 1)).double()

    def solved(a: Tensor, b: Tensor, strength: float) -> Tensor:
        gram = a.T @ a + strength * torch.eye(a.shape[1], dtype=torch.float64)
        return torch.linalg.solve(gram, a.T @ b)

    cut = len(x) * 4 // 5
    known, held = slice(None, cut), slice(cut + PAST + FUTURE, None)  # windows that share nothing
    errors = {
        s: float((flat(x[held]) @ solved(flat(x[known]), flat(y[known]), s) - flat(y[held])).square().mean())
        for s in (0.1, 1.0, 10.0, 100.0, 1000.0)
    }
    weight = solved(flat(x), flat(y), min(errors, key=lambda s: errors[s]))

    def forecast(given: Tensor) -> Tensor:
        z, at, by = normalised(given)
        out = (flat(z) @ weight).float()
        if together:
            return out.view(len(given), FUTURE, -1) * by + at
        return out.view(len(given), given.shape[2], FUTURE).transpose(1, 2) * by + at

    return forecast


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 150,
    batch: int = 16,
    lr: float = 4e-3,
    seeds: tuple[int, ...] = (0, 1, 2),
    names: tuple[str, ...] = NAMES,
    tasks: tuple[str, ...] = tuple(TASKS),
) -> dict[str, Any]:
    """Fit or train every contestant on every kind of series, and forecast the part held out.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``forecasting-cpu.svg``.
        steps, batch, lr, seeds: of training; what is fitted in closed form is the same for every seed.
        names: contestants, the linear map of each series among them.
        tasks: of :data:`TASKS`.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {
        "what": "forecasts of series", "machine": machine(), "past": PAST, "future": FUTURE, "steps": steps,
        "batch": batch, "lr": lr, "tasks": {},
    }  # fmt: skip
    for task in tasks:
        train, test = TASKS[task]()
        past, future = windows(train, PAST, FUTURE)
        given, truth = windows(test, PAST, FUTURE)
        series = past.shape[2]

        @functools.cache
        def linear(together: bool, past: Tensor = past, future: Tensor = future) -> Callable[[Tensor], Tensor]:
            return ridge(past, future, together)

        def run(
            name: str, seed: int, past: Tensor = past, future: Tensor = future, given: Tensor = given,
            truth: Tensor = truth, series: int = series, linear: Any = linear,
        ) -> dict[str, float]:  # fmt: skip
            learned = 0
            if name == LAST:
                out = given[:, -1:].expand_as(truth)
            elif name in FITTED:
                out = linear(FITTED[name])(given)
                learned = PAST * FUTURE * (series**2 if FITTED[name] else 1)
            else:
                torch.manual_seed(seed)
                model = TRAINED[name](series)

                def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
                    at = torch.randint(len(past), (batch,), generator=generator)
                    return past[at], future[at]

                def loss(m: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
                    spread = normalised(pair[0])[2]  # as linear maps are fitted: every window counts alike
                    return ((m(pair[0]) - pair[1]) / spread).square().mean()

                fit(model, draw, loss, steps, lr=lr, seed=seed)
                out = torch.cat([model.predict(part) for part in given.split(128)])
                learned = sum(p.numel() for p in model.parameters())
            gap = out - truth
            return {METRIC: float(gap.square().mean()), "mae": float(gap.abs().mean()), "parameters": learned}

        found = study(names, run, METRIC, BASELINE, seeds, progress, keep, (task, steps, batch, lr))
        result["tasks"][task] = {**found, "series": series, "windows": len(past), "tested": len(given)}
    if pictures is not None:
        curves = {
            name: [
                (task.partition(",")[0], *(_row(held, name)[METRIC][x] for x in ("mean", "half")))
                for task, held in result["tasks"].items()
            ]
            for name in names
        }
        picture(
            Path(pictures) / "forecasting-cpu.svg", curves, "", "mean squared error, variances",
            f"forecasts of {FUTURE} values from {PAST}", log="y",
        )  # fmt: skip
    return result


def _row(held: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in held["rows"] if r["name"] == name)
