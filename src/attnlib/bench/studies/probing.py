"""Fourteen pools, neighbours and a linear map on one frozen encoder; and what efficient probing costs.

``attnlib bench --suite probing --out benchmarks/results`` measures again what ``probing-cpu.json`` holds and draws it.
The encoder is the small vision transformer of :mod:`attnlib.bench.studies.pretraining`: 16 patches of handwritten
digits, pretrained by masking on images without labels, to say what a trained teacher says of hidden patches. It is
frozen, its tokens are computed once, and the same few labels are given to all. Multi-head pooling (``aim-pool``) is
what efficient probing is held against; both are timed at the width of ViT-B, forward and backward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.registry import create
from ..clock import interleave, machine
from ..data.files import digits
from ..probing import Labelled, cached_tokens, linear, nearest_neighbours, probe
from ..small import Progress, picture, study, training_step
from .pretraining import DIM, PATCH, SIDE, build, pretrained, train_on

NEIGHBOURS, LINEAR, BASELINE, OURS = "nearest neighbours", "linear", "aim-pool", "efficient-probing"

#: Pools and their settings at this width.
POOLS: dict[str, dict[str, Any]] = {
    OURS: {"num_queries": 8},
    "mean-pool": {},
    BASELINE: {"num_heads": 8},
    "abmilp": {},
    "simpool": {},
    "esimpool": {"num_heads": 8},
    "clip-pool": {"num_tokens": (SIDE // PATCH) ** 2},
    "siglip-pool": {},
    "jepa-pool": {"num_heads": 8},
    "cae-pool": {},
    "coca-pool": {"head_dim": 8},
    "cait-pool": {},
    "cbam-pool": {},
    "dino-vit-pool": {},
    "dolg-pool": {},
}


def times(repeats: int, batch: int = 8, tokens: int = 196, dim: int = 768) -> dict[str, Any]:
    """Seconds of a forward and a backward pass at the width of ViT-B."""
    x = torch.randn(batch, tokens, dim)

    torch.manual_seed(0)
    pools = {name: create(name, dim=dim) for name in (OURS, BASELINE)}
    taken = interleave(
        {name: training_step(pool, lambda m: m(x).square().sum()) for name, pool in pools.items()}, repeats
    )
    found: dict[str, Any] = {
        name: {"step_seconds": taken[name].median, "parameters": sum(p.numel() for p in pools[name].parameters())}
        for name in pools
    }
    found["times faster"] = taken[BASELINE].median / taken[OURS].median
    return {"batch": batch, "tokens": tokens, "dim": dim, **found}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    pretraining: int = 300,
    steps: int = 100,
    batch: int = 64,
    labelled: int = 200,
    seeds: tuple[int, ...] = (0, 1, 2),
    repeats: int = 7,
) -> dict[str, Any]:
    """Pretrain, freeze, cache, probe.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``probing-cpu.svg``.
        pretraining: steps of teacher and student.
        steps: of a probe.
        batch: images per step of pretraining.
        labelled: images with labels; answers are counted on all of the test.
        seeds: of everything.
        repeats: of timing.

    Returns:
        Plain values, for JSON.
    """
    found_digits = digits()
    known, asked = ((x.permute(0, 3, 1, 2), y) for x, y in (found_digits.train, found_digits.test))
    held: dict[int, tuple[Labelled, Labelled]] = {}

    def data(seed: int) -> tuple[Labelled, Labelled]:
        if seed not in held:
            held.clear()
            teacher = build(100 + seed)
            train_on(teacher, *known, pretraining, batch, seed)
            student, _ = pretrained(teacher, known[0], pretraining, batch, seed)
            few = torch.randperm(len(known[0]), generator=torch.Generator().manual_seed(1000 + seed))[:labelled]

            def read(images: Tensor) -> Tensor:
                return F.layer_norm(cached_tokens(student.features, images), (DIM,))

            held[seed] = (read(known[0][few]), known[1][few]), (read(asked[0]), asked[1])
        return held[seed]

    def run(name: str, seed: int) -> dict[str, float]:
        train, test = data(seed)
        if name == NEIGHBOURS:
            return {"accuracy": nearest_neighbours(train, test), "parameters": 0}
        if name == LINEAR:
            return {"accuracy": linear(train, test), "parameters": 0}
        torch.manual_seed(seed)
        pool = create(name, dim=DIM, **POOLS[name])
        right, _ = probe(pool, train, test, steps, seed=seed)
        return {"accuracy": right, "parameters": sum(p.numel() for p in pool.parameters())}

    key = (pretraining, steps, batch, labelled)
    found = study([NEIGHBOURS, LINEAR, *POOLS], run, "accuracy", BASELINE, seeds, progress, keep, key)
    result = {
        "what": "pools on one frozen encoder", "machine": machine(), "pretraining": pretraining, "steps": steps,
        "batch": batch, "labelled": labelled, "tested": len(asked[0]), "data": found_digits.source, "chance": 10.0,
        **found, "cost": times(repeats),
    }  # fmt: skip
    if pictures is not None:
        curves = {
            r["name"]: [(max(r["parameters"]["mean"], 1), r["accuracy"]["mean"], r["accuracy"]["half"])]
            for r in found["rows"]
        }
        picture(
            Path(pictures) / "probing-cpu.svg", curves, "parameters of the pool (1: none)",
            "accuracy, %", "probes of one frozen encoder, handwritten digits", log="x",
        )  # fmt: skip
    return result
