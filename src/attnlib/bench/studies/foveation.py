"""What a foveated first stage does: to networks trained behind it, and to images it makes metamers of.

Digits on photographs, of one class all over the image, go through an autoencoder trained here and four fixed stages:
none, foveated texture, foveated blur and uniform blur, of which the last three lose equally much (mean similarity).
Networks with the same first weights learn to name the digit behind each. Then the middle of one image is put on
another: ``crossing`` is the share of area at which both digits are named equally often, so that a smaller one leans to
the centre more.

Metamers in one pass are held against the older way, descent on the same statistics from the same noise, and against a
uniform blur that loses as much: how far pixels are from the reference, by distance from the fixation, and how long it
takes.

``attnlib bench --suite foveation --out benchmarks/results`` measures again what ``foveation-cpu.json`` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...grids import LogPolarWindows, log_polar_windows
from ...models.perception.foveation import (
    crossing,
    cue_conflict,
    foveated_blur,
    generalisation,
    match_strength,
    occlude,
    shared_start,
    similarity,
    uniform_blur,
)
from ...models.perception.metamers import (
    FoveatedTransfer,
    coral,
    decoder,
    descend,
    encoder,
    statistic_loss,
    texture_share,
)
from ..clock import machine, now
from ..data.worlds import photo_crops, tiled_digits
from ..small import Progress, fit, picture, study

STAGES = ("reference", "foveated texture", "foveated blur", "uniform blur")
WAYS = ("one pass", "descent", "uniform blur")
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
_SIDE, _SCALE, _FOVEA, _DEGREES = 64, 0.6, 8, 13


class Eye(NamedTuple):
    """An autoencoder's transfer, windows on its features, shares of texture, and the four stages by name."""

    transfer: FoveatedTransfer
    coarse: LogPolarWindows
    share: Tensor
    stages: dict[str, Callable[[Tensor], Tensor]]
    similarity: dict[str, float]


def eye(seed: int, steps: int) -> Eye:
    """Train an autoencoder on photographs and digits, and match the stages behind it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(encoder(16, pools=1), decoder(16, pools=1))

    def batch(generator: torch.Generator) -> Tensor:
        digits, _ = tiled_digits(6, _SIDE, generator=generator)
        return torch.cat([digits, photo_crops(2, _SIDE, generator=generator)])

    fit(net, batch, lambda m, x: F.mse_loss(m(x), x), steps, lr=3e-3, seed=seed)
    transfer = FoveatedTransfer(net[0], net[1]).eval().requires_grad_(False)
    fine = log_polar_windows((_SIDE, _SIDE), _SCALE, fovea=_FOVEA)
    coarse = log_polar_windows((_SIDE, _SIDE), _SCALE, fovea=_FOVEA, reduce=2)
    share = texture_share(coarse, _SIDE, degrees=_DEGREES)
    noise = torch.Generator().manual_seed(seed)

    def texture(x: Tensor) -> Tensor:
        return transfer(x, coarse, share, generator=noise)

    known, _ = tiled_digits(64, _SIDE, generator=torch.Generator().manual_seed(500 + seed))
    reference = transfer.reference(known)
    target = float(similarity(reference, texture(known)).mean())
    foveal = match_strength(lambda x, s: foveated_blur(x, fine, s), reference, target)
    uniform = match_strength(uniform_blur, reference, target)
    stages: dict[str, Callable[[Tensor], Tensor]] = {
        "reference": transfer.reference,
        "foveated texture": texture,
        "foveated blur": lambda x: foveated_blur(transfer.reference(x), fine, foveal),
        "uniform blur": lambda x: uniform_blur(transfer.reference(x), uniform),
    }
    others, _ = tiled_digits(64, _SIDE, part="test", generator=torch.Generator().manual_seed(600 + seed))
    held = {n: float(similarity(transfer.reference(others), s(others)).mean()) for n, s in stages.items()}
    return Eye(transfer, coarse, share, stages, held)


def classifier() -> nn.Module:
    """Three strided convolutions and a map of places to ten digits."""
    layers: list[nn.Module] = []
    dim = 3
    for out in (16, 32, 32):
        layers += [nn.Conv2d(dim, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        dim = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(dim * (_SIDE // 8) ** 2, 10))


@torch.no_grad()
def _named(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).argmax(1) == labels).float().mean())


def trained(eyes: Eye, name: str, seed: int, images: int, steps: int) -> nn.Module:
    """A network behind a stage; every stage's has the same first weights and batches."""
    with torch.no_grad():
        x, y = tiled_digits(images, _SIDE, generator=torch.Generator().manual_seed(seed))
        x = torch.cat([eyes.stages[name](part) for part in x.split(200)])
    net = shared_start(classifier, STAGES, seed)[name]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        some = torch.randint(len(x), (32,), generator=generator)
        return x[some], y[some]

    fit(net, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps, lr=3e-3, seed=seed)
    return net.eval()


@torch.no_grad()
def probed(net: nn.Module, eyes: Eye, name: str, seed: int, count: int = 150) -> dict[str, float]:
    """Accuracy, leaning to the centre, and what covering the middle or the surround costs, behind its own stage."""
    x, y = tiled_digits(count, _SIDE, part="test", generator=torch.Generator().manual_seed(1000 + seed))
    seen = eyes.stages[name](x)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    other = seen[order]
    differ = y != y[order]
    fovea, surround = [], []
    for share in SHARES:
        mixed, _ = cue_conflict(seen[differ], other[differ], share)
        fovea.append(_named(net, mixed, y[differ]))
        surround.append(_named(net, mixed, y[order][differ]))
    accuracy = {f"on {stage}": 100 * a for (_, stage), a in generalisation({name: net}, eyes.stages, x, y).items()}
    return {
        "crossing": crossing(SHARES, fovea, surround), "accuracy": 100 * _named(net, seen, y),
        "middle covered": 100 * _named(net, occlude(seen, "scotoma", 4)[0], y),
        "surround covered": 100 * _named(net, occlude(seen, "glaucoma", 12)[0], y),
        **accuracy,
    }  # fmt: skip


def metamers(eyes: Eye, way: str, seed: int, count: int, steps: int) -> dict[str, float]:
    """Differences from the reference by eccentricity, the loss of statistics, and the time, of one way."""
    x, _ = tiled_digits(count, _SIDE, part="test", generator=torch.Generator().manual_seed(2000 + seed))
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(3000 + seed))
    transfer, windows = eyes.transfer, eyes.coarse
    reference = transfer.reference(x)
    transfer(x, windows, eyes.share, noise=z)  # warm
    began = now()
    made = transfer(x, windows, eyes.share, noise=z)
    once = seconds = now() - began
    goal = float(statistic_loss(transfer.encoder, made, reference, windows))
    passes = 1.0
    reached = 1.0
    if way == "descent":
        began = now()
        made, losses = descend(transfer.encoder, reference, windows, coral(z, x).clamp(0, 1), steps, 0.02)
        seconds, passes = now() - began, float(len(losses))
        reached = float(next((i for i, loss in enumerate(losses) if loss <= goal), len(losses)))
    elif way == "uniform blur":
        made = eyes.stages["uniform blur"](x)
    away = torch.hypot(*torch.meshgrid(*(torch.arange(_SIDE) - (_SIDE - 1) / 2,) * 2, indexing="ij"))
    off = (made - reference).abs().mean((0, 1))
    rings = {"fovea": (0, 5), "parafovea": (8, 16), "periphery": (20, 32)}
    apart = {f"off, {k}": float(off[(away >= a) & (away < b)].mean()) for k, (a, b) in rings.items()}
    return {
        "outside over inside": apart["off, periphery"] / max(apart["off, fovea"], 1e-4), **apart,
        "statistics off": float(statistic_loss(transfer.encoder, made, reference, windows)), "loss of one pass": goal,
        "passes": passes, "passes to the loss of one pass": reached, "time over one pass": seconds / once,
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    coding: int = 150,
    images: int = 600,
    steps: int = 150,
    descent: int = 100,
) -> dict[str, Any]:
    """Train networks behind four stages and make metamers in two ways.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``foveation-cpu.svg`` and ``foveation-metamers-cpu.svg``.
        seeds: of weights, images and noise.
        coding: steps of the autoencoder.
        images: in the training set.
        steps: of each network.
        descent: most steps of descent.

    Returns:
        Plain values, for JSON.
    """
    made: dict[int, Eye] = {}

    def eyes(seed: int) -> Eye:
        if seed not in made:
            made.clear()
            made[seed] = eye(seed, coding)
        return made[seed]

    def behind(name: str, seed: int) -> dict[str, float]:
        net = trained(eyes(seed), name, seed, images, steps)
        return {**probed(net, eyes(seed), name, seed), "similarity": eyes(seed).similarity[name]}

    def by(way: str, seed: int) -> dict[str, float]:
        return metamers(eyes(seed), way, seed, 4, descent)

    setting = {"coding": coding, "images": images, "steps": steps, "descent": descent, "scale": _SCALE}
    result: dict[str, Any] = {
        "what": "networks behind foveated stages, and metamers", "machine": machine(), "chance": 10.0, **setting,
        "data": "scikit-learn's digits on photographs of scikit-learn and scikit-image",
    }  # fmt: skip
    for seed in seeds:  # one autoencoder serves both
        study(STAGES, behind, "crossing", None, [seed], progress, keep, {"of": "stages", **setting})
        study(WAYS, by, "outside over inside", None, [seed], progress, keep, {"of": "metamers", **setting})
    result["stages"] = study(
        STAGES, behind, "crossing", "uniform blur", seeds, progress, keep, {"of": "stages", **setting}
    )
    result["metamers"] = study(
        WAYS, by, "outside over inside", "descent", seeds, progress, keep, {"of": "metamers", **setting}
    )
    nets, ways = result["stages"]["rows"], result["metamers"]["rows"]
    result["rows"] = [{**r, "name": f"behind {r['name']}"} for r in nets]
    result["rows"] += [{**r, "name": f"metamers by {r['name']}"} for r in ways]
    if pictures is not None:
        shown = {"whole image": "accuracy", "middle covered": "middle covered", "surround covered": "surround covered"}
        picture(
            Path(pictures) / "foveation-cpu.svg",
            {r["name"]: [(k, r[v]["mean"], r[v]["half"]) for k, v in shown.items()] for r in nets},
            "", "right, %", "digits behind four first stages that lose equally much",
        )  # fmt: skip
        rings = ("fovea", "parafovea", "periphery")
        picture(
            Path(pictures) / "foveation-metamers-cpu.svg",
            {r["name"]: [(k, r[f"off, {k}"]["mean"], r[f"off, {k}"]["half"]) for k in rings] for r in ways},
            "", "mean difference from the reference", "where images of equal statistics differ",
        )  # fmt: skip
    return result
