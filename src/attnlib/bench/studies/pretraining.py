"""Masked pretraining against a trained teacher: what a few labels give afterwards, beside training from scratch.

``attnlib bench --suite pretraining --out benchmarks/results`` measures again what ``pretraining-cpu.json`` holds and
draws it. The images are handwritten digits of 8 x 8 pixels in patches of 2. The teacher is a small vision transformer
that was trained on the labels of all training digits; the student, of the same shape, sees the images alone, hides
blocks of patches and predicts the teacher's features of them (EVA). Then a few labels are given: a linear map reads
the mean of the student's frozen patches, or all of it is trained on. Held against: the same from initial weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.pretrain import MaskedPretraining, block_mask, last_map
from ..clock import machine
from ..data.files import digits
from ..small import Progress, fit, picture, small_vit, study

SIDE, PATCH, DIM = 8, 2, 48

SCRATCH, BASELINE = "trained from scratch", "probe of initial weights"
#: Contestants, in the order of the picture.
CONTESTANTS = (
    BASELINE, "probe, pretrained on an untrained teacher", "probe, pretrained on the teacher", "probe of the teacher",
    SCRATCH, "pretrained on the teacher, then trained",
)  # fmt: skip


def build(seed: int) -> Any:
    """A vision transformer of three blocks, 16 patches and the mean of them."""
    return small_vit(seed, SIDE, PATCH, dim=DIM, class_token=False, global_pool="avg")


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by at most a pixel, so that few of them are never the same twice."""
    down, right = torch.randint(3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + SIDE, right : right + SIDE]


def train_on(model: Any, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int, lr: float = 2e-3) -> None:
    """Train to name images, moved by at most a pixel each time."""

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(images), (batch,), generator=g)
        return moved(images[at], g), labels[at]

    fit(model, draw, lambda m, given: F.cross_entropy(m(given[0]), given[1]), steps, lr=lr, seed=seed)
    model.eval()


def pretrained(teacher: Any, images: Tensor, steps: int, batch: int, seed: int) -> tuple[Any, float]:
    """A student of a frozen teacher, and the cosine between prediction and target at the end."""
    step = MaskedPretraining(build(seed), teacher, DIM)

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(images), (batch,), generator=g)
        grid = (SIDE // PATCH, SIDE // PATCH)
        return moved(images[at], g), block_mask(grid, ratio=0.4, batch=batch, least=2, generator=g)

    losses = fit(step, draw, lambda m, given: m(*given).loss, steps, lr=2e-3, seed=seed)
    return step.eval(), -sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def _means(model: Any, images: Tensor) -> Tensor:
    """(n, C): the mean of the patches behind the last block, in standard units."""
    read = model.features if isinstance(model, MaskedPretraining) else functools.partial(last_map, model)
    found = [read(part) for part in images.split(256)]
    return F.layer_norm(torch.cat(found).mean((1, 2)), (DIM,))


def probe(model: Any, few: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Percent of test images that a linear map of frozen features gets right, trained on a few labels."""
    features, others = _means(model, few[0]), _means(model, test[0])
    linear = torch.nn.Linear(DIM, 10)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), few[1]) + 1e-3 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return 100 * float((linear(others).argmax(-1) == test[1]).float().mean())


@torch.no_grad()
def _right(model: Any, test: tuple[Tensor, Tensor]) -> float:
    return 100 * float((model(test[0]).argmax(-1) == test[1]).float().mean())


def _of(held: dict[tuple[str, int], dict[str, float]], name: str, seed: int) -> dict[str, float]:
    return held[name, seed]


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 600,
    labels: tuple[int, ...] = (20, 50, 200),
    batch: int = 64,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, Any]:
    """Pretrain, probe and train on, for several numbers of labels.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``pretraining-cpu.svg``.
        steps: of the teacher's training, of pretraining and of training on few labels.
        labels: numbers of labelled images.
        batch: images per step.
        seeds: of initial weights, batches, masks and of which images have labels.

    Returns:
        Plain values, for JSON.
    """
    data = digits()
    train, test = ((x.permute(0, 3, 1, 2), y) for x, y in (data.train, data.test))
    cosines: dict[str, dict[int, float]] = {}
    made: dict[tuple[str, int], Any] = {}

    def model_of(name: str, seed: int) -> Any:
        """Teachers and students are made once per seed."""
        if (name, seed) not in made:
            for other in [key for key in made if key[1] != seed]:
                del made[other]
            if name == "teacher":
                made[name, seed] = build(100 + seed)
                train_on(made[name, seed], *train, steps, batch, seed)
            else:
                teacher = build(200 + seed) if name == "untrained" else model_of("teacher", seed)
                made[name, seed], cosine = pretrained(teacher, train[0], steps, batch, seed)
                cosines.setdefault(name, {})[seed] = cosine
        return made[name, seed]

    result: dict[str, Any] = {
        "what": "masked pretraining against a teacher, then few labels", "data": data.source, "split": data.split,
        "machine": machine(), "steps": steps, "batch": batch, "chance": 10.0, "labels": {},
    }  # fmt: skip
    runs: dict[int, Callable[[str, int], dict[str, float]]] = {}
    for count in labels:

        def run(name: str, seed: int, count: int = count) -> dict[str, float]:
            order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(1000 + seed))[:count]
            few = train[0][order], train[1][order]
            if name == BASELINE:
                return {"accuracy": probe(build(seed).eval(), few, test)}
            if name == "probe of the teacher":
                return {"accuracy": probe(model_of("teacher", seed), few, test)}
            if name.startswith("probe, "):
                student = model_of("untrained" if "untrained" in name else "student", seed)
                return {"accuracy": probe(student, few, test)}
            model = build(seed)
            if name != SCRATCH:
                student = model_of("student", seed)
                known = {k: v for k, v in student.student.state_dict().items() if not k.startswith("head")}
                model.load_state_dict(known, strict=False)
            train_on(model, *few, steps, batch, seed)
            return {"accuracy": _right(model, test)}

        runs[count] = run
    # One seed after another, so that a teacher and a student serve all numbers of labels.
    rows: dict[int, list[dict[str, Any]]] = {count: [] for count in labels}
    for seed in seeds:
        for count in labels:
            found = study(
                CONTESTANTS, runs[count], "accuracy", BASELINE, (seed,), progress, keep, (steps, batch, count)
            )
            rows[count] += found["runs"]
    for count in labels:
        held = {(r["name"], r["seed"]): {"accuracy": r["accuracy"]} for r in rows[count]}
        against = {}
        for base in (BASELINE, SCRATCH):
            found = study(CONTESTANTS, functools.partial(_of, held), "accuracy", base, seeds)
            against[base] = {r["name"]: r["against"] for r in found["rows"]}
        for row in found["rows"]:
            row["against"] = {base: gaps[row["name"]] for base, gaps in against.items()}
        result["labels"][str(count)] = {"rows": found["rows"], "runs": found["runs"]}
    result["cosine at the end"] = {n: sum(v.values()) / len(v) for n, v in cosines.items()}
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {name: [] for name in CONTESTANTS}
        for count in labels:
            for row in result["labels"][str(count)]["rows"]:
                curves[row["name"]].append((count, row["accuracy"]["mean"], row["accuracy"]["half"]))
        picture(
            Path(pictures) / "pretraining-cpu.svg", curves, "labelled images", "accuracy on held-out digits, %",
            "masked pretraining against a teacher, 8 x 8 digits", log=("x",), dashed=(BASELINE, SCRATCH),
        )  # fmt: skip
    return result
