"""Fourteen pools, neighbours and a linear map on one frozen encoder; and what efficient probing costs.

``attnlib bench --suite probing --out benchmarks/results`` measures again what ``probing-cpu.json`` holds and draws it.
The encoder is a vision transformer of 36 patches on handwritten digits among pieces of others, pretrained by masking on
images without labels (:class:`attnlib.models.pretrain.MaskedPretraining`). It is frozen, its tokens are computed once,
and a few labels are given to all. Multi-head pooling (``aim-pool``) is what efficient probing is held against; both are
timed at the width of ViT-B, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.build import create_model
from ...models.pretrain import MaskedPretraining, block_mask
from ...nn.registry import create
from ..clock import interleave, machine
from ..data.worlds import cluttered_digits
from ..probing import Labelled, cached_tokens, linear, nearest_neighbours, probe
from ..small import Progress, fit, picture, started_small, study

SIDE, PATCH, DIM = 24, 4, 48

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


def build(seed: int) -> Any:
    """A vision transformer of three blocks on 6 x 6 patches."""
    torch.manual_seed(seed)
    model = create_model(
        "vit_tiny_patch16_224", patch_size=PATCH, img_size=SIDE, in_chans=1, embed_dim=DIM, depth=3, num_heads=4,
        mlp_ratio=2.0, num_classes=10, class_token=False, global_pool="avg",
    )  # fmt: skip
    return started_small(model, seed)


def pretrained(steps: int, batch: int, seed: int) -> Callable[[Tensor], Tensor]:
    """From images to the map of an encoder that saw no labels but those of its teacher's training."""

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return cluttered_digits(batch, SIDE, pieces=4, generator=g, digit=14)

    def masked(g: torch.Generator) -> tuple[Tensor, Tensor]:
        grid = (SIDE // PATCH, SIDE // PATCH)
        return draw(g)[0], block_mask(grid, ratio=0.4, batch=batch, least=2, generator=g)

    teacher = build(100 + seed)
    fit(teacher, draw, lambda m, given: F.cross_entropy(m(given[0]), given[1]), steps, lr=2e-3, seed=seed)
    step = MaskedPretraining(build(seed), teacher.eval(), DIM)
    fit(step, masked, lambda m, given: m(*given).loss, steps, lr=2e-3, seed=seed)
    return step.eval().features


def times(repeats: int, batch: int = 8, tokens: int = 196, dim: int = 768) -> dict[str, Any]:
    """Seconds of a forward and a backward pass at the width of ViT-B."""
    x = torch.randn(batch, tokens, dim)

    def step(pool: nn.Module) -> Callable[[], None]:
        def run() -> None:
            pool.zero_grad(set_to_none=True)
            pool(x).square().sum().backward()

        return run

    torch.manual_seed(0)
    pools = {name: create(name, dim=dim) for name in (OURS, BASELINE)}
    taken = interleave({name: step(pool) for name, pool in pools.items()}, repeats)
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
    steps: int = 200,
    batch: int = 48,
    labelled: int = 1000,
    tested: int = 1000,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
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
        labelled, tested: images with labels, and those the answers are counted on.
        seeds: of everything.
        repeats: of timing.

    Returns:
        Plain values, for JSON.
    """
    held: dict[int, tuple[Labelled, Labelled]] = {}

    def data(seed: int) -> tuple[Labelled, Labelled]:
        if seed not in held:
            held.clear()
            encode = pretrained(pretraining, batch, seed)
            sets = []
            for part, count in (("train", labelled), ("test", tested)):
                draw = torch.Generator().manual_seed(1000 + seed)
                images, labels = cluttered_digits(count, SIDE, part, pieces=4, generator=draw, digit=14)
                sets.append((F.layer_norm(cached_tokens(encode, images), (DIM,)), labels))
            held[seed] = (sets[0], sets[1])
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

    key = (pretraining, steps, batch, labelled, tested)
    found = study([NEIGHBOURS, LINEAR, *POOLS], run, "accuracy", BASELINE, seeds, progress, keep, key)
    result = {
        "what": "pools on one frozen encoder", "machine": machine(), "pretraining": pretraining, "steps": steps,
        "batch": batch, "labelled": labelled, "tested": tested, "chance": 10.0, **found, "cost": times(repeats),
    }  # fmt: skip
    if pictures is not None:
        curves = {
            r["name"]: [(max(r["parameters"]["mean"], 1), r["accuracy"]["mean"], r["accuracy"]["half"])]
            for r in found["rows"]
        }
        picture(
            Path(pictures) / "probing-cpu.svg", curves, "parameters of the pool (1: none)",
            "accuracy, %", "probes of one frozen encoder, digits on clutter", log="x",
        )  # fmt: skip
    return result
