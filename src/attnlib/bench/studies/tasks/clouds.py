"""Clouds on several dates: PMAA scaled down, with its attention and without, beside means and medians of the dates.

Crops of photographs are the ground. Every date has its own light, noise and painted clouds, soft at their edges; about
one pixel in ten is clear on no date. *Median* takes every pixel's over the dates; *clear dates* is told where clouds
are and takes the mean of the dates that are clear, which no method without masks can do. The network without attention
is the same in every number, but the convolutional modulation of what is global is left out; it is still injected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....models.dense.context import ASPP
from ....models.restore.pmaa import PMAA
from ...clock import machine
from ...data.worlds import photo_crops
from ...small import Progress, fit, parameters, picture, psnr, sheet, study, told

QUESTION = "Does PMAA take clouds off better than a mean over clear dates, and does its attention add to that?"
MEDIAN, CLEAR, PLAIN, OURS = "median", "clear dates, told", "without attention", "PMAA"
NAMES = (MEDIAN, CLEAR, PLAIN, OURS)


def cloudy(count: int, side: int, part: str, dates: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Dates (count, dates, 3, side, side), what is right (count, 3, side, side), and how thick clouds are, 0 to 1.

    Args:
        count, side, part: of :func:`attnlib.bench.data.worlds.photo_crops`.
        dates: of every place.
        generator: of what is drawn.

    Returns:
        Images from 0 to 1; clouds (count, dates, 1, side, side).
    """
    ground = photo_crops(count, side, part, generator)
    shape = (count * dates, 1)
    coarse, fine = (torch.randn(*shape, n, n, generator=generator) for n in (3, 6))
    field, more = (F.interpolate(t, (side, side), mode="bicubic", align_corners=False) for t in (coarse, fine))
    clouds = (2 * (field + 0.4 * more - 0.4)).clamp(0, 1).unflatten(0, (count, dates))
    gain = 0.85 + 0.3 * torch.rand(count, dates, 1, 1, 1, generator=generator)
    lit = gain * ground[:, None] + 0.02 * torch.randn(count, dates, *ground.shape[1:], generator=generator)
    return (lit * (1 - clouds) + 0.95 * clouds).clamp(0, 1), ground, clouds


def of_clear_dates(x: Tensor, clouds: Tensor) -> Tensor:
    """The mean of the dates with hardly a cloud; where there is none, of all, the thinner the more."""
    weight = (clouds < 0.05).float() + 1e-4 * (1.001 - clouds)
    return (x * weight).sum(1) / weight.sum(1)


def build(name: str, dates: int, dim: int = 8, depth: int = 3) -> PMAA:
    """A contestant; both have the same numbers at the start, from the same seed."""
    model = PMAA(3, dates, dim, depth, norm="batch_noact", drop_path=0.0)
    model.extractor.aspp = ASPP(dim, 16, (1, 2, 4), last_dim=dim, mean_bias=False, mean_norm=False)
    if name == PLAIN:
        for stage in model.stages:
            stage.attention = nn.Identity()
    return model


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    batch: int = 4,
    side: int = 24,
    dates: int = 3,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 96,
    lr: float = 3e-3,
) -> dict[str, Any]:
    """Train both networks, and take medians and means.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-clouds-cpu.svg`` and ``tasks-clouds-predictions.png``, what the last seed makes.
        steps, batch, side, dates, seeds, tested, lr: of training and of the test.

    Returns:
        Plain values, for JSON: PSNR in decibels.
    """
    shown: dict[str, Tensor] = {}

    def run(name: str, seed: int) -> dict[str, float]:
        g = torch.Generator().manual_seed(10_000 + seed)
        x, true, clouds = cloudy(tested, side, "test", dates, g)
        count = 0
        if name == MEDIAN:
            made = x.median(1).values
        elif name == CLEAR:
            made = of_clear_dates(x, clouds)
        else:
            torch.manual_seed(seed)
            model = build(name, dates)

            def some(generator: torch.Generator) -> tuple[Tensor, Tensor]:
                given, right, _ = cloudy(batch, side, "train", dates, generator)
                return given * 2 - 1, right * 2 - 1

            def loss(m: Any, given: tuple[Tensor, Tensor]) -> Tensor:
                found: Tensor = m.loss(m(given[0]), given[1])["l1"] / m.l1
                return found

            fit(model, some, loss, steps, lr=lr, seed=seed)
            made, count = torch.cat([model.predict(part * 2 - 1) for part in x.split(32)]) / 2 + 0.5, parameters(model)
        shown.update({f"date {i + 1}": x[:6, i] for i in range(dates)} | {"truth": true[:6], name: made[:6]})
        covered = (clouds > 0.05).all(1).expand_as(true)
        return {
            "psnr": psnr(made, true), "seen": psnr(made, true, ~covered),
            "never_seen": psnr(made, true, covered), "parameters": count,
        }  # fmt: skip

    result = study(NAMES, run, "psnr", PLAIN, seeds, progress, keep, (steps, batch, side, dates, tested, lr))
    result |= {
        "question": QUESTION, "machine": machine(), "steps": steps, "batch": batch, "side": side, "dates": dates,
        "tested": tested, "lr": lr,
    }  # fmt: skip
    if pictures is not None:
        curves = {
            r["name"]: [
                (what.replace("_", " "), r[what]["mean"], r[what]["half"]) for what in ("psnr", "seen", "never_seen")
            ]
            for r in result["rows"]
        }
        picture(Path(pictures) / "tasks-clouds-cpu.svg", curves, "", "PSNR, dB", "clouds on several dates")
        if shown:
            order = [*(f"date {i + 1}" for i in range(dates)), "truth", *NAMES]
            rows = {n: shown[n] for n in order if n in shown}
            sheet(Path(pictures) / "tasks-clouds-predictions.png", rows, zoom=0.7, colours=64)
    return result


def table(found: Mapping[str, Any]) -> str:
    """The results as a table of a page."""
    lines = [
        "| made by | PSNR, dB | against without attention | clear on some date | on none | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        gap = "" if row["name"] == PLAIN else told(row, "against", 2)
        gap = gap if gap.startswith("-") or not gap else f"+{gap}"
        parts = " | ".join(told(row, what, 2) for what in ("seen", "never_seen"))
        lines.append(f"| {row['name']} | {told(row, 'psnr', 2)} | {gap} | {parts} | {row['parameters']['mean']:,.0f} |")
    return "\n".join(lines)
