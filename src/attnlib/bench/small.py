"""What small studies share: a model trained for a minute, the same for every contestant and seed, and what came of it.

>>> rows = study(["plain", "ours"], lambda name, seed: {"accuracy": {"plain": 80.0, "ours": 90.0}[name] + seed % 2},
...              metric="accuracy", baseline="plain")["rows"]
>>> [(r["name"], r["accuracy"]["mean"] > 85, r["against"]["mean"]) for r in rows]
[('plain', False, 0.0), ('ours', True, 10.0)]
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_int, check_real
from ..models.build import create_model
from ..ops._count import counted
from .plots import _FAINT, PALETTE, _figure
from .stats import Interval, mean_interval, paired_interval
from .store import identity, plain, write_text

Progress = Callable[[str], None]


def fit(
    model: nn.Module,
    batch: Callable[[torch.Generator], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    steps: int,
    lr: float = 1e-3,
    seed: int = 0,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip: float = 1.0,
) -> list[float]:
    """Train a model with AdamW, a warm-up and a cosine; the batches depend on the seed alone.

    Args:
        model: trained in place, left in training mode.
        batch: from a generator to what ``loss`` takes.
        loss: from the model and a batch to a scalar.
        steps: optimiser steps.
        lr: learning rate at its highest.
        seed: of batches and of dropout.
        weight_decay: of AdamW.
        warmup: share of the steps over which the rate rises.
        clip: largest gradient norm.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    check_int("steps", steps, least=1)
    check_real("lr", lr, above=0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for step in range(steps):
            rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
            value = loss(model, batch(generator))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step + 1} of {steps}")
    return losses


@torch.no_grad()
def started_small(model: nn.Module, seed: int, positions: float = 0.2) -> nn.Module:
    """The same model, started for widths of tens of channels and minutes of training.

    Linear maps of blocks start as torch's own, tables of positions with this standard deviation: the truncated normal
    distribution of 0.02 that large vision transformers start from leaves small ones near chance for hundreds of steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.reset_parameters()
        for name, table in model.named_parameters():
            if name.rpartition(".")[2] == "pos_embed":
                nn.init.normal_(table, std=positions)
    return model


def small_vit(
    seed: int, side: int, patch: int = 4, classes: int = 10, depth: int = 3, dim: int = 48, **settings: Any
) -> Any:
    """A vision transformer of four heads for grey images, started as small models are.

    Args:
        seed: of its weights.
        side, patch: pixels per side of an image and of a patch.
        classes: of its head.
        depth: blocks.
        dim: channels.
        settings: of :func:`attnlib.models.backbones.vit.vit`.
    """
    torch.manual_seed(seed)
    model = create_model(
        "vit_tiny_patch16_224", patch_size=patch, img_size=side, in_chans=1, embed_dim=dim, depth=depth, num_heads=4,
        mlp_ratio=2.0, num_classes=classes, **settings,
    )  # fmt: skip
    return started_small(model, seed)


def parameters(model: nn.Module) -> int:
    """How many numbers a model has.

    >>> parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def operations(call: Callable[[], Any]) -> int:
    """Multiplications and additions of convolutions and products in a call, each by itself, without gradients.

    Attention is not fused for it, neither ours nor torch's: nothing of it would be counted.

    >>> operations(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
    60
    """
    with counted() as counter:
        call()
    return int(counter.get_total_flops())


def training_step(model: nn.Module, loss: Callable[[Any], Tensor]) -> Callable[[], None]:
    """A call for clocks: ``loss(model)`` forward and back, with gradients of the parameters made anew.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> run = training_step(model, lambda m: m(torch.tensor([1.0, 2.0])).sum())
    >>> run(), run(), model.weight.grad.tolist()
    (None, None, [[1.0, 2.0]])
    """

    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    return run


@torch.no_grad()
def scored(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy``, in percent, and ``loss``, the cross-entropy, of a classifier, which is put into evaluation mode."""
    model.eval()
    logits = torch.cat([model(part) for part in images.split(128)])
    right = (logits.argmax(-1) == labels).float().mean()
    return {"accuracy": 100 * float(right), "loss": float(F.cross_entropy(logits, labels))}


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images that a classifier gets right; it is put into evaluation mode."""
    return scored(model, images, labels)["accuracy"]


def study(
    names: Sequence[str],
    run: Callable[[str, int], Mapping[str, float]],
    metric: str,
    baseline: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
    keep: str | Path | None = None,
    key: Any = None,
) -> dict[str, Any]:
    """Run every contestant with every seed, and say with 95 % intervals what came of it.

    Args:
        names: of the contestants.
        run: from a name and a seed to numbers by name; the same seed must give every contestant the same data.
        metric: the number that contestants are compared by.
        baseline: the contestant that the others are held against, seed by seed.
        seeds: at least one; an interval needs two.
        progress: called with a line after every run.
        keep: a file that takes every run as soon as it has ended, and from which a later call goes on; ``None`` for
            none.
        key: what runs in that file depend on beside name and seed, such as steps and sizes.

    Returns:
        ``metric``, ``baseline``, ``seeds``, ``runs`` (every number), and ``rows``: per contestant ``name``, every
        number as ``{"mean", "half", "n"}``, and ``against``: the paired difference of the metric from the baseline.
    """
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline={baseline!r} is not among the contestants {list(names)}")
    if not len(names) or not len(seeds):
        raise ValueError(f"names and seeds must hold at least one each, got {list(names)} and {list(seeds)}")
    mark = identity(key)
    file = None if keep is None else Path(keep)
    runs: list[dict[str, Any]] = []
    if file is not None and file.exists():
        runs = [r for r in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if r.get("key") == mark]
    for seed in seeds:
        for name in names:
            if any(r["name"] == name and r["seed"] == seed for r in runs):
                continue
            numbers = plain(dict(run(name, seed)))
            if metric not in numbers:
                raise ValueError(f"metric={metric!r} is not among what {name!r} gave: {list(numbers)}")
            runs.append({"name": name, "seed": seed, "key": mark, **numbers})
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(runs[-1]) + "\n")
            if progress is not None:
                said = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, (int, float)))
                progress(f"{name}, seed {seed}: {said}")
    wanted = [r for r in runs if r["name"] in names and r["seed"] in seeds]
    by_name = {n: {r["seed"]: r for r in wanted if r["name"] == n} for n in names}
    rows = []
    for name, own in by_name.items():
        first = next(iter(own.values()))
        measured = [k for k, v in first.items() if k not in ("seed", "key") and isinstance(v, (int, float))]
        row: dict[str, Any] = {"name": name}
        row |= {k: interval(mean_interval([r[k] for r in own.values()])) for k in measured}
        if baseline is not None:
            values = {s: r[metric] for s, r in own.items()}
            gap = paired_interval(values, {s: r[metric] for s, r in by_name[baseline].items()})
            row["against"] = None if gap is None else interval(gap)
        rows.append(row)
    shown = [{k: v for k, v in r.items() if k != "key"} for r in wanted]
    return {"metric": metric, "baseline": baseline, "seeds": list(seeds), "rows": rows, "runs": shown}


def interval(found: Interval) -> dict[str, float | int | None]:
    """An interval as plain values."""
    return {"mean": found.mean, "half": found.half, "n": found.n}


def told(row: Mapping[str, Any], metric: str, digits: int = 1) -> str:
    """``"81.2 ± 0.4"``."""
    held = row[metric]
    half = "" if held["half"] is None else f" ± {held['half']:.{digits}f}"
    return f"{held['mean']:.{digits}f}{half}"


def picture(
    path: str | Path,
    curves: Mapping[str, Sequence[tuple[Any, float, float | None]]],
    x: str,
    y: str,
    title: str,
    log: Sequence[str] = (),
    dashed: Sequence[str] = (),
) -> None:
    """Write an SVG of means with their intervals.

    Args:
        path: of the file.
        curves: by label, points ``(x, mean, half or None)``; names instead of numbers for x give columns.
        x, y: what the axes show, with units.
        title: above.
        log: ``"x"``, ``"y"`` or both, for logarithmic axes.
        dashed: labels of baselines.
    """
    figure, axes = _figure(6.4, 4.0)
    names: list[str] = []
    for points in curves.values():
        names += [p[0] for p in points if isinstance(p[0], str) and p[0] not in names]
    for i, (label, points) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        shift = (i - (len(curves) - 1) / 2) * 0.6 / max(1, len(curves))
        at = [names.index(p[0]) + shift if names else p[0] for p in points]
        axes.errorbar(
            at, [p[1] for p in points], yerr=[p[2] or 0.0 for p in points], label=label, color=colour, capsize=2.5,
            marker="o", markersize=4, linewidth=1.4, linestyle="none" if names else "--" if label in dashed else "-",
        )  # fmt: skip
    if names:
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    for axis in log:
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)
    _write(path, figure)


def heat_maps(
    path: str | Path,
    panels: Mapping[tuple[str, str], Sequence[Sequence[float | None]]],
    xs: Sequence[str],
    ys: Sequence[str],
    x: str,
    y: str,
    title: str,
) -> None:
    """Write an SVG of tables of shares, 0 to 1, as colours with their numbers in per cent.

    Args:
        path: of the file.
        panels: by ``(row of panels, column of panels)``, shares by y and x; ``None`` where nothing was measured.
        xs, ys: what columns and rows of each table are.
        x, y: what the axes show.
        title: above.
    """
    down, across = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    figure, first = _figure(1.0 + 2.1 * len(across), 0.9 + 1.75 * len(down))
    first.remove()
    grid = figure.subplots(len(down), len(across), squeeze=False, sharex=True, sharey=True)
    for i, row in enumerate(down):
        for j, column in enumerate(across):
            axes = grid[i][j]
            if (row, column) not in panels:
                axes.axis("off")
                continue
            shares = [[math.nan if s is None else s for s in line] for line in panels[row, column]]
            axes.imshow(shares, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
            for b, line in enumerate(shares):
                for a, share in enumerate(line):
                    if share == share:
                        ink = "white" if share > 0.55 else "#222222"
                        axes.text(a, b, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=ink)
            axes.set_xticks(range(len(xs)), xs, fontsize=7)
            axes.set_yticks(range(len(ys)), ys, fontsize=7)
            axes.tick_params(length=0)
            if i == 0:
                axes.set_title(column, fontsize=8)
            if i == len(down) - 1:
                axes.set_xlabel(x, fontsize=8)
            if j == 0:
                axes.set_ylabel(f"{row}\n{y}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    _write(path, figure)


def psnr(made: Tensor, true: Tensor, among: Tensor | None = None) -> float:
    """Peak signal to noise ratio of all pixels together in decibels, of images in [0, 1].

    Args:
        made, true: of one shape; ``made`` is cut to [0, 1].
        among: boolean, of their shape: which pixels count; by default all.

    >>> round(psnr(torch.zeros(2, 2), torch.full((2, 2), 0.1)), 3)
    20.0
    """
    gap = made.clamp(0, 1) - true
    return float(-10 * (gap if among is None else gap[among]).square().mean().log10())


def write_png(figure: Any, path: str | Path, dpi: int, colours: int | None = None) -> None:
    """Write a figure of matplotlib as a PNG, of so many different colours (at most 256), which makes it small."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png", facecolor="white")
    if colours is None:
        Path(path).write_bytes(buffer.getvalue())
        return
    from PIL import Image

    with Image.open(buffer) as full:
        full.convert("RGB").quantize(colours).save(path, "PNG", optimize=True)


@contextmanager
def panels(
    path: str | Path, rows: Sequence[str], columns: Sequence[str], cell: tuple[float, float] = (1.3, 1.3), dpi: int = 90
) -> Iterator[Any]:
    """An array of matplotlib's axes, ``(rows, columns)``, without ticks; written as a small PNG when the block ends.

    Args:
        path: of the PNG.
        rows, columns: what stands left and above.
        cell: width and height of one, in inches.
        dpi: dots an inch.
    """
    figure, axes = _bare(len(rows), len(columns), (cell[0] * len(columns) + 0.3, cell[1] * len(rows) + 0.3))
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label, fontsize=7)
    yield axes
    write_png(figure, path, dpi, 128)


def _bare(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns) without ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def sheet(
    path: str | Path,
    rows: Mapping[str, Tensor],
    titles: Sequence[str] = (),
    zoom: float = 1.0,
    wrap: int = 18,
    colours: int | None = None,
) -> None:
    """Write a PNG of pictures: a row of them per name, titles above.

    Args:
        path: of the file.
        rows: by name, pictures (n, 1 or 3, h, w) in [0, 1].
        titles: n of them, broken into lines.
        zoom: size of everything.
        wrap: letters per line of a title.
        colours: how many different ones the file has, at most 256, which makes it small; ``None``: all.
    """
    import textwrap

    if colours is not None:
        check_int("colours", colours, least=2, most=256)
    count = max(len(v) for v in rows.values())
    figure, axes = _bare(len(rows), count, (zoom * (0.9 * count + 0.9), zoom * (0.95 * len(rows) + 0.6)))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for i, axis in enumerate(line):
            for side in axis.spines.values():
                side.set_visible(False)
            if i < len(images):
                shown = images[i].expand(3, *images.shape[2:]).permute(1, 2, 0).clamp(0, 1)
                axis.imshow(shown.numpy(), interpolation="nearest")
        line[0].set_ylabel("\n".join(textwrap.wrap(name, 14)), fontsize=7)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title("\n".join(textwrap.wrap(title, wrap)), fontsize=5.5)
    write_png(figure, path, 140, colours)


def _write(path: str | Path, figure: Any) -> None:
    import matplotlib

    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attnlib"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    write_text(place, buffer.getvalue().replace(_FAINT, "#d8d8d8"))
