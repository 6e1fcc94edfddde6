"""Prompts for tokens (TCPA) beside visual prompt tuning and a linear map, at equal parameters.

``attnlib bench --suite tuning --out benchmarks/results`` measures again what ``tuning-cpu.json`` holds and draws it.
The frozen vision transformer is that of :mod:`attnlib.bench.studies.prompting`, which knows sixteen patterns. Which one
of eight stands in an image, beside two others that say nothing, is now to be told under noise that the model has never
seen. With TCPA (Liu et al., 2025, arXiv 2505.02406) every token reads the prompts whose keys it resembles; keys are
parameters, for which visual prompt tuning (VPT-deep) gets as many prompts more. Prompts start as those of VPT, or as
the release of TCPA starts them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.prompts import TokenPrompts
from ..clock import machine
from ..small import Progress, fit, picture, study
from .prompting import CLASSES, DIM, PATCH, backbone, named, planted

NOISE = 0.5
LINEAR, VPT, TCPA, RELEASED = "linear map", "VPT", "TCPA, start of VPT", "TCPA, as released"
NAMES = LINEAR, VPT, TCPA, RELEASED
#: Prompts in front of a block: of the class token, and of patches. A prompt of TCPA has a key, one of VPT has none.
PAIR, CHOSEN = (8, 8), (4, 4)
RATE = 2e-2


def noisy(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with more noise than the backbone has seen, and which of the first patterns is there."""
    x, which, _ = planted(count, generator)
    return x + NOISE * torch.randn(x.shape, generator=generator), which


def contestant(name: str, given: Any, seed: int) -> Any:
    """A frozen model with a new head, and with prompts but for the linear map."""
    torch.manual_seed(1000 + seed)
    model: Any = copy.deepcopy(given)
    model.reset_classifier(CLASSES)
    if name == LINEAR:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model
    if name == VPT:
        twice = (2 * PAIR[0], 2 * PAIR[1])
        made = TokenPrompts(model, twice, (1, 1), twice, cross=True, drop=0.0)
        for keys in made.keys:  # everything is chosen
            keys.requires_grad_(False)
    else:
        made = TokenPrompts(model, PAIR, (1, 1), CHOSEN, drop=0.0)
    if name != RELEASED:
        bound = math.sqrt(6.0 / (3 * PATCH * PATCH + DIM))
        for pool in made.pools:
            nn.init.uniform_(pool, -bound, bound)
    return made


def trained(model: nn.Module) -> int:
    """Numbers that are learned."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tune(name: str, given: Any, steps: int, batch: int, seed: int) -> Any:
    """Train a contestant on noisy images; in TCPA, prompts are chosen at random for the first tenth of the steps."""
    what = contestant(name, given, seed)
    chooses, done = name in (TCPA, RELEASED), [0]

    def loss(m: nn.Module, x: tuple[Tensor, Tensor]) -> Tensor:
        if name == LINEAR:
            return F.cross_entropy(m(x[0]), x[1])
        logits, distance = m(x[0], random=chooses and done[0] < steps // 10)
        done[0] += 1
        return F.cross_entropy(logits, x[1]) + (10 * distance if chooses else 0)

    fit(what, lambda g: noisy(batch, g), loss, steps, lr=RATE, seed=seed)
    return what.eval()


@torch.no_grad()
def right(model: Any, images: tuple[Tensor, Tensor]) -> float:
    """Percent of images whose pattern is told."""
    answers = model(images[0])
    answers = answers[0] if isinstance(answers, tuple) else answers  # logits, and a distance beside those of prompts
    return 100 * float((answers.argmax(-1) == images[1]).float().mean())


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    pretraining: int = 300,
    steps: int = 100,
    batch: int = 32,
    tested: int = 1000,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train a backbone, freeze it, tune every contestant.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tuning-cpu.svg``.
        pretraining: steps of the backbone.
        steps, batch: of tuning.
        tested: images of the test.
        seeds: of weights and images.

    Returns:
        Plain values, for JSON.
    """
    test = noisy(tested, torch.Generator().manual_seed(1234))
    held: dict[int, Any] = {}

    def run(name: str, seed: int) -> dict[str, float]:
        if seed not in held:
            held.clear()
            held[seed] = backbone(pretraining, batch, seed)
        what = tune(name, held[seed], steps, batch, seed)
        return {"accuracy": right(what, test), "trained": trained(what), "backbone": named(held[seed], tested)}

    key = (pretraining, steps, batch, tested, RATE)
    result: dict[str, Any] = {
        "what": "prompts for tokens in front of a frozen vision transformer", "machine": machine(),
        "pretraining": pretraining, "steps": steps, "batch": batch, "tested": tested, "lr": RATE,
        "chance": 100 / CLASSES, **study(NAMES, run, "accuracy", VPT, seeds, progress, keep, key),
    }  # fmt: skip
    if pictures is not None:
        rows = [(r["name"], r["accuracy"]["mean"], r["accuracy"]["half"]) for r in result["rows"]]
        picture(Path(pictures) / "tuning-cpu.svg", {"right": rows}, "", "right, %", "patterns told in unseen noise")
    return result
