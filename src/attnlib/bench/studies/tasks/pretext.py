"""CroCo scaled down: what a second view is worth, to the loss and to disparities afterwards.

Grey crops of photographs are right views; left views are the same moved to the right by 0, 4, 8 or 12 pixels, whole
patches. Three starts of one network for two views are compared after the same
few labelled batches: *scratch*; *one view*, pretrained as a masked autoencoder, that is the same network and steps with
a second view that is blank; *CroCo*, pretrained with the true second view. The real pair is scikit-image's motorcycle,
made six times smaller; it is one pair only, and no photograph of it is in the training.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.pretrain.croco import CroCo, CroCoBinocular
from ....models.pretrain.masks import random_mask
from ...clock import machine
from ...data.files import _packaged, _read_photo, photos, require
from ...small import Progress, fit, interval, parameters, picture, sheet, study, told
from ...stats import paired_interval

QUESTION = "Does a second view lower the loss of hidden patches, and disparities be learnt better afterwards?"
SCRATCH, ALONE, OURS = "scratch", "one view", "CroCo"
NAMES = (SCRATCH, ALONE, OURS)
HEIGHT, WIDTH, PATCH, MOST = 16, 32, 4, 12


@functools.lru_cache(maxsize=2)
def _grey(part: str) -> list[Tensor]:
    held = photos()
    images = held.train[:-1] if part == "train" else held.test  # the last that trains is the motorcycle
    return [image.float().mean(-1) / 255 for image in images]


def standard(*images: Tensor) -> list[Tensor]:
    """Views (n, 1, H, W) in units of the first one's deviation, around its mean."""
    first = images[0]
    mean, deviation = first.mean((1, 2, 3), keepdim=True), first.std((1, 2, 3), keepdim=True)
    return [(image - mean) / (deviation + 0.02) for image in images]


def pairs(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Left views, right views and disparities (count, 1, 16, 32): left(x) = right(x - disparity)."""
    images = _grey(part)
    shift = 4 * torch.randint(MOST // 4 + 1, (count,), generator=generator)
    lefts, rights = [], []
    for moved in shift.tolist():
        image = images[int(torch.randint(len(images), (), generator=generator))]
        height, width = 2 * HEIGHT, 2 * (WIDTH + MOST)
        top, left = (
            int(torch.randint(n - m + 1, (), generator=generator))
            for n, m in zip(image.shape, (height, width), strict=True)
        )
        crop = F.avg_pool2d(image[None, None, top : top + height, left : left + width], 2)
        lefts.append(crop[..., MOST - moved : MOST - moved + WIDTH])
        rights.append(crop[..., MOST:])
    first, second = standard(torch.cat(lefts), torch.cat(rights))
    return first, second, shift.view(-1, 1, 1, 1).expand(count, 1, HEIGHT, WIDTH).float()


@functools.lru_cache(maxsize=1)
def motorcycle() -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of scikit-image's stereo pair, six times smaller: left, right (n, 1, 16, 32), disparity, NaN if unknown."""
    left, right = (
        _read_photo(_packaged("skimage", f"data/motorcycle_{side}.png")).float().mean(-1) / 255
        for side in ("left", "right")
    )
    np = require("numpy")
    with np.load(_packaged("skimage", "data/motorcycle_disp.npz")) as file:
        disparity = torch.from_numpy(file["arr_0"]).float()
    known = disparity.isfinite().float()
    share = F.avg_pool2d(known[None, None], 6)
    small = F.avg_pool2d((disparity.nan_to_num(0, 0, 0) * known)[None, None], 6) / share / 6
    small = torch.where(share > 0.5, small, torch.nan)
    one, two = (F.avg_pool2d(image[None, None], 6) for image in (left, right))
    tiles = [
        [image[..., y : y + HEIGHT, x : x + WIDTH] for image in (one, two, small)]
        for y in range(0, one.shape[2] - HEIGHT + 1, 8)
        for x in range(0, one.shape[3] - WIDTH + 1, 8)
    ]
    first, second, truth = (torch.cat(t) for t in zip(*tiles, strict=True))
    return (*standard(first, second), truth)  # type: ignore[return-value]


def build(seed: int) -> CroCo:
    """Two blocks and two, width 48, patches of four pixels, of which three quarters are hidden."""
    torch.manual_seed(seed)
    return CroCo((HEIGHT, WIDTH), PATCH, 1, 48, 2, 4, 48, 2, 4, 2.0, 0.75)


def _hidden(count: int, generator: torch.Generator) -> Tensor:
    return random_mask(count, HEIGHT * WIDTH // PATCH**2, ratio=0.75, generator=generator)


def pretrained(name: str, seed: int, steps: int, batch: int, lr: float) -> CroCo:
    """A network after its pretraining, if it has any."""
    model = build(seed)
    if name == SCRATCH:
        return model

    def some(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        first, second, _ = pairs(batch, "train", g)
        return first, second if name == OURS else torch.zeros_like(second), _hidden(batch, g)

    def loss(m: Any, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        found: Tensor = m.loss(m(*given), given[0])["pixels"]
        return found

    fit(model, some, loss, steps, lr=lr, seed=seed)
    return model.eval()


@torch.no_grad()
def completion(model: CroCo, tested: int, seed: int) -> dict[str, Tensor]:
    """Squared error of hidden patches: with the view that belongs to it, with another pair's, and with none."""
    g = torch.Generator().manual_seed(seed)
    first, second, _ = pairs(tested, "test", g)
    mask = _hidden(tested, g)
    views = {"own": second, "another": second.roll(1, 0), "none": torch.zeros_like(second)}
    return {what: model.loss(model(first, view, mask), first)["pixels"] for what, view in views.items()}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 300,
    batch: int = 16,
    tuning: int = 150,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 128,
    lr: float = 3e-3,
) -> dict[str, Any]:
    """Pretrain, and learn disparities from each start.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-pretext-cpu.svg`` and ``tasks-pretext-predictions.png``, what the last seed sees.
        steps, batch, lr: of the pretraining.
        tuning: steps on labelled pairs, of the same size.
        seeds, tested: of training and of the test.

    Returns:
        Plain values, for JSON: errors of disparity in pixels, on made-up pairs and on the motorcycle, and squared
        errors of hidden patches with their own second view, with another's and with none.
    """
    shown: dict[str, Tensor] = {}

    def run(name: str, seed: int) -> dict[str, float]:
        start = pretrained(name, seed, steps, batch, lr)
        found = {f"hidden_{k}": float(v) for k, v in completion(start, tested, 10_000 + seed).items()}
        torch.manual_seed(1000 + seed)
        model = CroCoBinocular(start)

        def some(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            return pairs(batch, "train", g)

        def loss(m: Any, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            error: Tensor = m.loss(m(given[0], given[1]), given[2] / MOST)["l1"]
            return error

        fit(model, some, loss, tuning, lr=2 * lr / 3, seed=500 + seed)
        model.eval()
        first, second, truth = pairs(tested, "test", torch.Generator().manual_seed(20_000 + seed))
        real = motorcycle()
        with torch.no_grad():
            made, there = MOST * model(first, second), MOST * model(real[0], real[1])
        known = real[2].isfinite()
        shown.update({
            "left": torch.cat([first[:4], real[0][50:52]]) / 5 + 0.5,
            "right": torch.cat([second[:4], real[1][50:52]]) / 5 + 0.5,
            "truth": torch.cat([truth[:4], real[2][50:52].nan_to_num(0.0)]) / MOST,
            name: torch.cat([made[:4], there[50:52]]) / MOST,
        })  # fmt: skip
        return {
            "error": float((made - truth).abs().mean()), "motorcycle": float((there - real[2]).abs()[known].mean()),
            "guess": float((truth - truth.mean()).abs().mean()),
            "motorcycle_guess": float((real[2][known] - real[2][known].mean()).abs().mean()), **found,
            "parameters": parameters(model),
        }  # fmt: skip

    result = study(NAMES, run, "error", SCRATCH, seeds, progress, keep, (steps, batch, tuning, tested, lr))
    scores = {n: {r["seed"]: r for r in result["runs"] if r["name"] == n} for n in NAMES}
    for row in result["rows"]:
        own = scores[row["name"]]
        for key, values, others in (
            ("against_one_view", {s: r["error"] for s, r in own.items()}, scores[ALONE]),
            ("motorcycle_against_one_view", {s: r["motorcycle"] for s, r in own.items()}, scores[ALONE]),
        ):
            what = "motorcycle" if key.startswith("motorcycle") else "error"
            gap = paired_interval(values, {s: r[what] for s, r in others.items()})
            row[key] = None if gap is None else interval(gap)
        gap = paired_interval(
            {s: r["hidden_own"] for s, r in own.items()}, {s: r["hidden_another"] for s, r in own.items()}
        )
        row["own_against_another"] = None if gap is None else interval(gap)
    result |= {
        "question": QUESTION, "machine": machine(), "steps": steps, "batch": batch, "tuning": tuning, "tested": tested,
        "lr": lr,
    }  # fmt: skip
    if pictures is not None:
        curves = {
            r["name"]: [("made-up pairs", r["error"]["mean"], r["error"]["half"]),
                        ("motorcycle", r["motorcycle"]["mean"], r["motorcycle"]["half"])]
            for r in result["rows"]
        }  # fmt: skip
        path = Path(pictures)
        picture(path / "tasks-pretext-cpu.svg", curves, "", "error of disparity, pixels", "after the same labels")
        if shown:
            rows = {n: shown[n] for n in ("left", "right", "truth", *NAMES) if n in shown}
            sheet(path / "tasks-pretext-predictions.png", rows, zoom=0.8, colours=64)
    return result


def table(found: Mapping[str, Any]) -> str:
    """Errors of disparity as a table of a page."""
    lines = [
        "| start | made-up pairs, pixels | against scratch | against one view | motorcycle, pixels |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [told(row, "error", 2)]
        for key, alone in (("against", SCRATCH), ("against_one_view", ALONE)):
            gap = "" if row["name"] == alone else told(row, key, 2)
            cells.append(gap if gap.startswith("-") or not gap else f"+{gap}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {told(row, 'motorcycle', 2)} |")
    guess = found["rows"][0]
    lines.append(f"| the mean, always | {told(guess, 'guess', 2)} | | | {guess['motorcycle_guess']['mean']:.2f} |")
    return "\n".join(lines)


def views(found: Mapping[str, Any]) -> str:
    """Errors of hidden patches as a table of a page."""
    lines = [
        "| pretrained | with the pair's other view | with another pair's | difference | with none |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if row["name"] != SCRATCH:
            cells = [told(row, k, 3) for k in ("hidden_own", "hidden_another", "own_against_another", "hidden_none")]
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)
