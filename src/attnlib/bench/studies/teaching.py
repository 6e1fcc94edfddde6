"""What a student learns from a teacher beside its own labels: nothing, logits, features, or ScaleKD.

``attnlib bench --suite teaching --out benchmarks/results`` measures again what ``teaching-cpu.json`` holds and draws
it. The teacher is a small Swin V2 that was trained on the labels of all training digits; the student, a smaller ResNet,
gets few of them, the same images for all, moved by a pixel at most in training, and by ScaleKD (Fan et al., 2024, arXiv
2411.06786) what the teacher makes of these images: features of its last stage through attention projectors, the
student's lower ones passing through the teacher's frozen last stage, and logits. Held against: labels alone, labels and
logits (Hinton et al., 2015), which ScaleKD contains, and labels, logits and features behind a linear map (FitNets). The
student has the same parameters and the same steps in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.distill import DistillationLoss, FeatureLoss, LogitLoss, distill
from ...convert.scalekd import ScaleKD
from ...models.build import create_model
from ..clock import machine
from ..data.files import digits
from ..small import Progress, accuracy, fit, parameters, picture, study
from .pretraining import moved
from .sparsity import trained

SIDE, WIDTHS = 32, (12, 24)
LABELS, LOGITS, FEATURES, OURS = "labels", "labels, logits", "labels, logits, features", "ScaleKD"
BASELINE = LOGITS


def student_of(seed: int) -> Any:
    """A ResNet of two stages, on maps of 8 x 8 and of 4 x 4 as the teacher's."""
    torch.manual_seed(seed)
    return create_model(
        "resnet18", in_chans=1, num_classes=10, embed_dims=WIDTHS, depths=(1, 1), stem_dim=WIDTHS[0]
    )  # fmt: skip


def lessons(name: str, student: nn.Module, teacher: Any) -> list[DistillationLoss]:
    """What a contestant reads of the teacher."""
    if name == FEATURES:
        return [LogitLoss(weight=0.5), FeatureLoss((WIDTHS[-1], teacher.feature_info[-1]["num_chs"]))]
    if name == OURS:
        return [LogitLoss(weight=0.5), ScaleKD(student, teacher, SIDE, num_heads=(4, 4))]
    return [LogitLoss(weight=0.5)]


def taught(
    name: str, teacher: Any, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """A student, and the parts of its loss at the end."""
    student = student_of(seed)
    lesson: Any = None
    if name != LABELS:
        torch.manual_seed(1000 + seed)  # projectors
        lesson = distill(student, teacher, *lessons(name, student, teacher), task=0.5)
    held: dict[str, float] = {}

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(images), (batch,), generator=g)
        return F.interpolate(moved(images[at], g), size=(SIDE, SIDE), mode="nearest"), labels[at]

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        if lesson is None:
            return F.cross_entropy(model(given[0]), given[1])
        found = model(*given)
        held.update({f"loss: {k}": float(v.detach()) for k, v in found.items() if k != "total"})
        return found["total"]

    fit(student if lesson is None else lesson, draw, loss, steps, lr=3e-3, seed=seed)
    return student.eval(), held


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    teaching: int = 400,
    steps: int = 200,
    batch: int = 32,
    labelled: tuple[int, ...] = (200,),
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train a teacher, teach students.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``teaching-cpu.svg``.
        teaching: steps of the teacher's training.
        steps, batch: of a student's.
        labelled: numbers of images that students see.
        seeds: of weights, batches and of which images these are.

    Returns:
        Plain values, for JSON.
    """
    data = digits()
    train, test = ((x.permute(0, 3, 1, 2), y) for x, y in (data.train, data.test))
    large = F.interpolate(test[0], size=(SIDE, SIDE), mode="nearest")
    held: dict[int, Any] = {}

    result: dict[str, Any] = {
        "what": "a student taught by labels, logits, features or ScaleKD", "data": data.source, "split": data.split,
        "machine": machine(), "teaching": teaching, "steps": steps, "batch": batch, "chance": 10.0,
        "parameters": parameters(student_of(0)), "labelled": {},
    }  # fmt: skip
    rows: dict[int, list[dict[str, Any]]] = {count: [] for count in labelled}
    for seed in seeds:
        for count in labelled:

            def run(name: str, seed: int, count: int = count) -> dict[str, float]:
                if seed not in held:
                    held.clear()
                    whole: Any = trained("Swin V2", *train, teaching, batch, 100 + seed)
                    held[seed] = whole.model.eval()
                few = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:count]
                student, parts = taught(name, held[seed], train[0][few], train[1][few], steps, batch, seed)
                told = {"accuracy": student, "teacher": held[seed]}
                return {what: accuracy(model, large, test[1]) for what, model in told.items()} | parts

            found = study(
                (LABELS, LOGITS, FEATURES, OURS), run, "accuracy", BASELINE, (seed,), progress, keep,
                (teaching, steps, batch, count),
            )  # fmt: skip
            rows[count] += found["runs"]
    curves: dict[str, list[tuple[Any, float, float | None]]] = {}
    for count in labelled:
        by = {(r["name"], r["seed"]): {k: r[k] for k in ("accuracy", "teacher")} for r in rows[count]}

        def measured(name: str, seed: int, by: Any = by) -> dict[str, float]:
            return by[name, seed]

        found = study((LABELS, LOGITS, FEATURES, OURS), measured, "accuracy", BASELINE, seeds)
        result["labelled"][str(count)] = {**found, "runs": rows[count]}
        for row in found["rows"]:
            curves.setdefault(row["name"], []).append((str(count), row["accuracy"]["mean"], row["accuracy"]["half"]))
    if pictures is not None:
        picture(
            Path(pictures) / "teaching-cpu.svg", curves, "images that the student sees", "right, %",
            "a small ResNet taught by a Swin transformer",
        )  # fmt: skip
    return result
