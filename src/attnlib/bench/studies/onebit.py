"""Attention of one bit in a trained vision transformer: which threshold its maps need.

``attnlib bench --suite onebit --out benchmarks/results`` measures again what ``onebit-cpu.json`` holds and draws it. A
small vision transformer learns handwritten digits; then every map of its attention, and what they read, become signs
(BiViT; He et al., 2022, arXiv 2211.07091), and the model is trained on. The attention map becomes 0 or 1: 1 where a
weight reaches a quarter of its row's largest (BiViT's softmax-aware binarization), the mean of its row, or where a
score is positive, the released baseline. With the same signs but a map of softmax itself the loss of the map's bits is
told from that of all others. MLPs, embedding and head stay whole. All contestants of a seed start from the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...convert.binarize import binarize
from ...normalizers import Normalizer, Step, Thresholded, as_normalizer
from ..clock import machine
from ..data.files import digits
from ..small import Progress, picture, scored, study
from .pretraining import build, train_on


@dataclass(frozen=True)
class AboveMean(Thresholded, register=False):
    """1 where softmax reaches the mean of its row."""

    name = "above-mean"

    def _hard(self, soft: Tensor) -> Tensor:
        return ((soft >= soft.mean(-1, keepdim=True)) & (soft > 0)).to(soft.dtype)


WHOLE, SOFT, BASELINE = "not binary", "binary, softmax map", "threshold at 0"
#: Contestant -> normalizer of its binary attention; ``None``: the model itself, trained on.
CONTESTANTS: dict[str, Normalizer | None] = {
    WHOLE: None, SOFT: as_normalizer("softmax"), BASELINE: Step(), "threshold at the row's mean": AboveMean(),
    "BiViT: a quarter of the row's largest": Thresholded(0.25),
}  # fmt: skip


def binary(model: nn.Module, normalizer: Normalizer) -> nn.Module:
    """A copy whose attention is of one bit, with the model's weights."""
    made: Any = copy.deepcopy(model)
    binarize(made, "attention")
    for block in made.stages:
        block.mixer.inner.normalizer = normalizer
    return made


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 300,
    more: int = 400,
    batch: int = 32,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train, make binary, train on.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``onebit-cpu.svg``.
        steps: of the model's training.
        more: of what follows.
        batch: images per step.
        seeds: of weights and batches.

    Returns:
        Plain values, for JSON.
    """
    data = digits()
    train, test = ((x.permute(0, 3, 1, 2), y) for x, y in (data.train, data.test))
    held: dict[int, nn.Module] = {}

    def run(name: str, seed: int) -> dict[str, float]:
        if seed not in held:
            held.clear()
            held[seed] = build(seed)
            train_on(held[seed], *train, steps, batch, seed)
        normalizer = CONTESTANTS[name]
        model = copy.deepcopy(held[seed]) if normalizer is None else binary(held[seed], normalizer)
        before = scored(model, *test)
        train_on(model, *train, more, batch, 100 + seed)
        return {**scored(model, *test), **{f"{what} before": value for what, value in before.items()}}

    result: dict[str, Any] = {
        "what": "attention of one bit, by its threshold", "data": data.source, "split": data.split,
        "machine": machine(), "steps": steps, "more": more, "batch": batch, "chance": 10.0,
        **study(list(CONTESTANTS), run, "accuracy", BASELINE, seeds, progress, keep, (steps, more, batch)),
    }  # fmt: skip
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            row["name"]: [(when, row[what]["mean"], row[what]["half"])
                          for when, what in (("made binary", "accuracy before"), ("trained on", "accuracy"))]
            for row in result["rows"]
        }  # fmt: skip
        picture(Path(pictures) / "onebit-cpu.svg", curves, "", "right, %", "attention of one bit, by threshold")
    return result
