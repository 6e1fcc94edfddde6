"""Encoding models on real features: routed read-outs, sites of integration, noise ceilings, with the truth planted.

``attnlib bench --suite real-encoding --out benchmarks/results`` measures again what ``real-encoding-cpu.json`` holds.
Features are real: DINOv2's patches of generated scenes and MiniLM's vectors of captions. Responses are simulated from
them, so that what there is to find is known.

- *Read-outs.* A scene holds a circle, a square, a triangle and a cross, each in a cell of its own. An area answers to
  DINOv2's features in the cell of its shape, wherever that is (``routed``), or in a cell that is the same for all
  scenes (``fixed``). Against the attention read-out stand a map over places that is learned once, ridge regression on
  all patches, and on the mean patch. ``true cell`` is ridge regression that is told the cell. Scores are Pearson's r on
  held-out scenes as a share of the ceiling, which follows from three repeats.
- *Sites.* A caption names the colour of one shape, rightly or wrongly. Half of the sites answer to features of the
  scene, features of the caption and whether the two agree; the others to the two alone, with the same variance. A small
  network that read scenes and captions to tell whether they agree, its twin with random weights and its twin that
  learned the colours without captions stand beside both kinds of features alone and side by side. Told is which sites
  pass which controls; and at how many sites one of two models is called better that are equally good, the scene's
  features with different noise added.
- *Ceilings.* The estimate from 2, 4 and 8 repeats, less the r that the true signal reaches.

Whether brains do any of this is not shown: recordings are in no package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....look.encoding import (
    AttentionReadout,
    Fold,
    SpatialReadout,
    better,
    bootstrap,
    encode,
    fit_readout,
    folds,
    integration,
    noise_ceiling,
    pearson,
    resamples,
)
from ....ops import attention
from ... import models
from ...clock import machine
from ...data.scenes import COLOURS, GRID, NOISE, SHAPES, SIDE, Thing, _draw
from ...small import Progress, picture, study
from .vit import MEAN, PATCH, STD
from .walls import encoders

QUESTION = "do routed read-outs, tests of integration and noise ceilings find what was planted in real features?"
MODELS = ("dinov2-small", "minilm-l6")

READOUTS = ("attention", "one map", "ridge, all patches", "ridge, mean patch", "true cell")
WORLDS = ("routed", "fixed")
#: Units of an area, repeats of a scene, time bins of a site, sites of each kind.
UNITS, REPEATS, BINS, SITES = 8, 3, 10, 8

#: (n, 3, side, side) -> (n, h, w, C), and captions -> (n, D).
See = Callable[[Tensor], Tensor]
Read = Callable[[Sequence[str]], Tensor]


@torch.no_grad()
def dinov2(pixels: Tensor) -> Tensor:
    """Patches behind the last block."""
    model = _loaded()
    side = pixels.shape[-1] // PATCH
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    parts = [model(pixel_values=(p - mean) / std).last_hidden_state for p in pixels.split(32)]
    return torch.cat(parts)[:, -side * side :].unflatten(1, (side, side))


@functools.lru_cache(1)
def _loaded() -> Any:
    return models.load("dinov2-small")[0]


def minilm(captions: Sequence[str]) -> Tensor:
    """A vector per caption."""
    distinct = sorted(set(captions))
    found = encoders()["MiniLM"](distinct)
    return torch.stack([found[c] for c in captions])


class Scenes(NamedTuple):
    """Features of patches (n, h, w, C), the cell of each shape (n, 4), its colour (n, 4)."""

    patches: Tensor
    cells: Tensor
    colours: Tensor


def scenes(see: See, count: int, seed: int, width: int, side: int = 8 * PATCH) -> Scenes:
    """Scenes with one thing of each shape, in ``width`` principal components of their patches' features."""
    rng = np.random.default_rng(seed)
    cells = np.stack([rng.permutation(GRID * GRID)[: len(SHAPES)] for _ in range(count)])
    colours = rng.integers(len(COLOURS), size=cells.shape)
    names = list(COLOURS)
    images = []
    for where, which in zip(cells, colours, strict=True):
        things = [
            Thing(f"{names[c]} {shape}", int(cell), float(rng.uniform(0.7, 1.0)),
                  (int(rng.integers(-1, 2)), int(rng.integers(-1, 2))), int(rng.integers(1 << 20)))
            for shape, cell, c in zip(SHAPES, where, which, strict=True)
        ]  # fmt: skip
        images.append(_draw(things, "train", NOISE * rng.standard_normal((3, SIDE, SIDE), dtype=np.float32)))
    pixels = F.interpolate(torch.stack(images), size=(side, side), mode="bilinear", antialias=True)
    return Scenes(components(see(pixels), width), torch.tensor(cells), torch.tensor(colours))


def components(x: Tensor, width: int) -> Tensor:
    """The first principal components of the last axis, of variance 1 in all."""
    flat = x.flatten(0, -2)
    flat = flat - flat.mean(0)
    directions = torch.linalg.eigh(flat.T @ flat / len(flat))[1].flip(1)[:, :width]
    made = flat @ directions
    return (made / made.std()).unflatten(0, x.shape[:-1])


def at_cells(patches: Tensor, cells: Tensor) -> Tensor:
    """(n, h, w, C) and (n, r) -> (n, r, C): the mean patch of each cell."""
    pooled = F.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), GRID).flatten(2).mT
    return pooled.gather(1, cells[..., None].expand(-1, -1, pooled.shape[-1]))


# --------------------------------------------------------------------------------------------------------------------
# Read-outs


class Answers(NamedTuple):
    """Responses (R, n, T) of all areas, what is behind them (n, T), and the features that made them (n, 4, C)."""

    repeats: Tensor
    signal: Tensor
    sources: Tensor


def answers(seen: Scenes, world: str, seed: int, repeats: int = REPEATS, noise: float = 1.0) -> Answers:
    """Each area answers to one cell: that of its shape, or one that is the same for all scenes."""
    g = torch.Generator().manual_seed(seed)
    cells = seen.cells
    if world == "fixed":
        cells = torch.randperm(GRID * GRID, generator=g)[: len(SHAPES)].expand(len(cells), -1)
    sources = at_cells(seen.patches, cells)
    sources = (sources - sources.mean(0)) / sources.std(0)
    weights = torch.randn(len(SHAPES), sources.shape[-1], UNITS, generator=g)
    signal = torch.einsum("nrc,rcu->nru", sources, weights).flatten(1)
    signal = signal / signal.std(0)
    return Answers(signal + noise * torch.randn(repeats, *signal.shape, generator=g), signal, sources)


def read_out(how: str, seen: Scenes, told: Answers, split: Fold, seed: int, epochs: int) -> dict[str, float]:
    """Test r of one read-out, as it is and as a share of the ceiling."""
    areas = torch.eye(len(SHAPES), dtype=torch.bool).repeat_interleave(UNITS, 1)
    y, ceiling = told.repeats.mean(0), noise_ceiling(told.repeats)
    height, width, dim = seen.patches.shape[1:]
    if how in ("attention", "one map"):
        torch.manual_seed(seed)
        model: nn.Module
        if how == "attention":
            model, lr = AttentionReadout(dim, [areas], num_heads=4, hidden=2 * dim), 3e-3
        else:
            model, lr = SpatialReadout(dim, [areas], (height, width)), 3e-2
        rows = torch.cat([split.train, split.val])
        fit_readout(model, seen.patches[rows], [y[rows]], epochs=epochs, batch=50, lr=lr, clip=1.0, seed=seed)
        with torch.no_grad():
            r = pearson(model(seen.patches[split.test]).responses[0], y[split.test])
    elif how == "true cell":
        r = torch.cat([
            encode(told.sources[:, i], y[:, UNITS * i : UNITS * (i + 1)], split=[split]).test
            for i in range(len(SHAPES))
        ])  # fmt: skip
    else:
        x = seen.patches.flatten(1) if how == "ridge, all patches" else seen.patches.mean((1, 2))
        r = encode(x, y, split=[split]).test
    return {"share of the ceiling": float((r / ceiling).mean()), "r": float(r.mean())}


# --------------------------------------------------------------------------------------------------------------------
# Sites


class Joint(nn.Module):
    """A caption reads the patches of a scene: whether they agree, or, without captions, which colours there are."""

    def __init__(self, dim: int, words: int, hidden: int = 48):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(words, hidden), nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.mix, self.out = nn.Linear(2 * hidden, hidden), nn.Linear(hidden, hidden)
        self.agree, self.colours = nn.Linear(hidden, 1), nn.Linear(hidden, len(SHAPES) * len(COLOURS))

    def features(self, patches: Tensor, words: Tensor) -> Tensor:
        """(n, hidden) of the last hidden layer."""
        flat, q = patches.flatten(1, 2), self.q(words)
        seen = attention(q[:, None, None], self.k(flat)[:, None], self.v(flat)[:, None])[:, 0, 0]
        return torch.relu(self.out(torch.relu(self.mix(torch.cat([seen, q], 1)))))


class Events(NamedTuple):
    """Scenes with captions: vectors (n, D), whether they agree (n,), and all captions there are (4, colours, D)."""

    seen: Scenes
    words: Tensor
    agree: Tensor
    captions: Tensor

    def part(self, rows: slice) -> Events:
        """Some of the events."""
        return Events(Scenes(*(t[rows] for t in self.seen)), self.words[rows], self.agree[rows], self.captions)


def told_of(colours: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """For scenes with these colours (n, 4): which shape is named, with which colour, and whether that is right."""
    n = len(colours)
    shape = torch.randint(len(SHAPES), (n,), generator=g)
    agree = torch.rand(n, generator=g) < 0.5
    own = colours[torch.arange(n), shape]
    other = (own + torch.randint(1, len(COLOURS), (n,), generator=g)) % len(COLOURS)
    return shape, torch.where(agree, own, other), agree.float()


def events(seen: Scenes, read: Read, seed: int, width: int = 24) -> Events:
    """A caption for each scene, in principal components of all captions there are."""
    texts = [f"the {shape} is {colour}" for shape in SHAPES for colour in COLOURS]
    captions = components(read(texts), min(width, len(texts) - 1)).unflatten(0, (len(SHAPES), len(COLOURS)))
    shape, colour, agree = told_of(seen.colours, torch.Generator().manual_seed(seed))
    return Events(seen, captions[shape, colour], agree, captions)


def learned(train: Events, how: str, seed: int, steps: int) -> tuple[Joint, float]:
    """The network after learning ``agree``, ``colours`` (without captions) or ``nothing``; how often it is right."""
    torch.manual_seed(seed)
    model = Joint(train.seen.patches.shape[-1], train.words.shape[1])
    if how == "nothing":
        return model, 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(seed)
    right = []
    for _ in range(steps):
        rows = torch.randint(len(train.words), (100,), generator=g)
        patches, colours = train.seen.patches[rows], train.seen.colours[rows]
        shape, colour, agree = told_of(colours, g)  # other captions of the same scenes
        words = train.captions[shape, colour]
        hidden = model.features(patches, words if how == "agree" else 0 * words)
        if how == "agree":
            logits = model.agree(hidden)[:, 0]
            loss = F.binary_cross_entropy_with_logits(logits, agree)
            right.append(float(((logits > 0) == agree.bool()).float().mean()))
        else:
            logits = model.colours(hidden).unflatten(1, (len(SHAPES), len(COLOURS)))
            loss = F.cross_entropy(logits.flatten(0, 1), colours.flatten())
            right.append(float((logits.argmax(-1) == colours).float().mean()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, float(np.mean(right[-20:]))


def site_responses(held: Events, vision: Tensor, seed: int, noise: float = 1.0) -> Tensor:
    """(n, sites * bins): the first half of the sites answer to agreement too, the others add both up."""
    g = torch.Generator().manual_seed(seed)

    def unit(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)

    total = 2 * SITES
    added = unit(vision @ torch.randn(vision.shape[1], total, generator=g))
    added = unit(added + unit(held.words @ torch.randn(held.words.shape[1], total, generator=g)))
    met = unit(held.agree[:, None])
    signal = torch.cat([unit(added[:, :SITES] + met), added[:, SITES:]], 1)
    shared = torch.randn(len(signal), total, 1, generator=g)  # bins overlap, and so does their noise
    apart = torch.randn(len(signal), total, BINS, generator=g)
    return (signal[..., None] + noise * (0.7 * shared + 0.7 * apart)).flatten(1)


def find_sites(train: Events, held: Events, seed: int, rows: int, steps: int) -> dict[str, float]:
    """Which sites pass which controls."""
    vision = components(held.seen.patches.mean((1, 2)), 24)
    y = site_responses(held, vision, seed)
    features = {"vision": vision, "language": held.words, "side by side": torch.cat([vision, held.words], 1)}
    told: dict[str, float] = {}
    for name, how in (("both", "agree"), ("random", "nothing"), ("twin", "colours")):
        model, right = learned(train, how, seed, steps)
        told |= {"network right": right} if how == "agree" else {}
        with torch.no_grad():
            words = 0 * held.words if how == "colours" else held.words
            features[name] = model.features(held.seen.patches, words)
    g = torch.Generator().manual_seed(seed)
    for twin in ("one", "other"):  # in truth equally good
        features[twin] = vision + 0.5 * vision.std() * torch.randn(vision.shape, generator=g)
    split = folds(len(y), 5, gap=1)
    drawn = resamples(split, len(y), rows, seed)
    scores = {
        name: bootstrap(x, y, drawn, split=split, alphas=[1.0, 1e1, 1e2, 1e3], constant="nan")
        for name, x in features.items()
    }
    for test in ("resamples", "bins"):
        found = integration(
            scores, BINS, multimodal=["both"], unimodal=["vision", "language"], concat="side by side",
            untrained={"both": "random"}, matched=("both", "twin"), test=test,
        )  # fmt: skip
        for label, passed in (("all", found.sites), *((c, b.holds) for c, b in found.controls.items())):
            told[f"{test}, {label}: planted"] = float(passed[:SITES].float().mean())
            told[f"{test}, {label}: absent"] = float(passed[SITES:].float().mean())
        one, other = (scores[n].test.unflatten(1, (-1, BINS)) for n in ("one", "other"))
        found_twice = [better(a, b, test=test).holds for a, b in ((one, other), (other, one))]
        told[f"{test}, equal models"] = float(torch.stack(found_twice).any(0).float().mean())
    return told


# --------------------------------------------------------------------------------------------------------------------


def ceiling_error(seen: Scenes, repeats: int, seed: int) -> dict[str, float]:
    """The estimate less what the true signal reaches; the noise of half the responses is twice that of the others."""
    told = answers(seen, "fixed", seed, repeats)
    loud = told.repeats.clone()
    loud[..., ::2] += 3**0.5 * torch.randn(loud[..., ::2].shape, generator=torch.Generator().manual_seed(seed))
    reached = pearson(told.signal, loud.mean(0))
    gap = noise_ceiling(loud) - reached
    return {"error": float(gap.mean()), "size": float(gap.abs().mean()), "reached": float(reached.mean())}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    see: See = dinov2,
    read: Read = minilm,
    count: int = 700,
    width: int = 48,
    epochs: int = 40,
    rows: int = 79,
    steps: int = 600,
) -> dict[str, Any]:
    """Plant, look, and say what was found.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-encoding-cpu.svg`` and ``real-encoding-sites-cpu.svg``.
        seeds: of scenes, responses and networks; at least two.
        see, read: features of pictures and captions; the real models' by default.
        count: scenes.
        width: principal components of features.
        epochs: of read-outs.
        rows: resamples of events.
        steps: of the network that reads both.

    Returns:
        Plain values, for JSON.
    """
    made: dict[int, Scenes] = {}

    def of(seed: int) -> Scenes:
        if seed not in made:
            made[seed] = scenes(see, count, seed, width)
        return made[seed]

    order = torch.arange(count)
    cut, third = int(0.65 * count), int(0.75 * count)
    split = Fold(order[:cut], order[cut:third], order[third:])

    def run(name: str, seed: int) -> dict[str, float]:
        how, _, world = name.rpartition(": ")
        if how == "sites":
            whole, middle = events(of(seed), read, seed), count // 2
            first, rest = whole.part(slice(0, middle)), whole.part(slice(middle, None))
            return find_sites(first, rest, seed, rows, steps)
        if how == "ceiling":
            return ceiling_error(of(seed), int(world.split()[0]), seed)
        return read_out(how, of(seed), answers(of(seed), world, seed), split, seed, epochs)

    settings = {"count": count, "width": width, "epochs": epochs, "rows": rows, "steps": steps}
    found: dict[str, Any] = {}
    for world in WORLDS:
        names = [f"{how}: {world}" for how in READOUTS]
        found[world] = study(names, run, "share of the ceiling", names[0], seeds, progress, keep, settings)
    counts = [f"ceiling: {n} repeats" for n in (2, 4, 8)]
    found["ceilings"] = study(counts, run, "error", None, seeds, progress, keep, settings)
    found["sites"] = study(["sites: all"], run, "resamples, all: planted", None, seeds, progress, keep, settings)
    result = {
        "question": QUESTION, "machine": machine(), "models": list(MODELS), "settings": settings,
        "seeds": list(seeds), **{k: v["rows"] for k, v in found.items()},
        "runs": [r for v in found.values() for r in v["runs"]],
    }  # fmt: skip
    if pictures is not None:
        draw(Path(pictures), result)
    return result


def draw(folder: Path, result: dict[str, Any]) -> None:
    """Read-outs by world, and sites by control."""
    curves = {
        world: [(row["name"].rpartition(": ")[0], (m := row["share of the ceiling"])["mean"], m["half"])
                for row in result[world]]
        for world in WORLDS
    }  # fmt: skip
    picture(folder / "real-encoding-cpu.svg", curves, "read-out", "r, share of the ceiling",
            "Areas that follow a shape, or look at a fixed cell")  # fmt: skip
    row = result["sites"][0]
    controls = ("unimodal", "trained", "concat", "matched", "all")
    shown = {
        f"{kind}, {test}": [(c, (m := row[f"{test}, {c}: {kind}"])["mean"], m["half"]) for c in controls]
        for test in ("resamples", "bins") for kind in ("planted", "absent")
    }  # fmt: skip
    picture(folder / "real-encoding-sites-cpu.svg", shown, "control", "share of sites that pass",
            "Sites with and without integration")  # fmt: skip
