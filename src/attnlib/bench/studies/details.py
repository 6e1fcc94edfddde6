"""Glyphs that are nearly alike: a vision transformer with and without the companions of dual cross-attention learning.

``attnlib bench --suite details --out benchmarks/results`` measures again what ``details-cpu.json`` holds and draws it.
Every image holds a handwritten digit, whichever, in a frame with one gap; the class is where on the frame the gap is,
so that classes differ in a few pixels of a glyph that stands anywhere among noise. DCAL (Zhu et al., 2022, arXiv
2205.02151) trains the transformer beside a block that reads what its class token is made of, and beside pairs of
samples that share a softmax. A step of it costs more; so the plain transformer is also given as many steps as take the
same counted work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.dual_cross_attention import DualCrossAttention
from ..clock import machine
from ..data.worlds import digit_glyphs
from ..small import Progress, accuracy, fit, operations, picture, small_vit, started_small, study

SIDE, FRAME, GAP, PATCH, CLASSES = 20, 16, 4, 4, 8
#: Standard deviation of the noise, and pixels between places where a frame may stand.
NOISE, STEP = 0.25, 2
PLAIN, LONGER, OURS = "plain", "plain, equal work", "DCAL"
NAMES = PLAIN, LONGER, OURS
#: Upper left pixel of the gap of each class, in the frame.
GAPS = ((0, 0), (0, 6), (0, 12), (6, 12), (12, 12), (12, 6), (12, 0), (6, 0))


def glyphs(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, side, side), and which gap each frame has."""
    digits, _ = digit_glyphs(part, 10)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    which = torch.randint(len(digits), (count,), generator=generator).tolist()
    corners = (STEP * torch.randint((SIDE - FRAME) // STEP + 1, (count, 2), generator=generator)).tolist()
    images = NOISE * torch.randn(count, SIDE, SIDE, generator=generator)
    frame = torch.ones(FRAME, FRAME)
    frame[2:-2, 2:-2] = 0
    for i, (label, digit, (top, left)) in enumerate(zip(labels.tolist(), which, corners, strict=True)):
        made = frame.clone()
        made[3:13, 3:13] = digits[digit]
        row, column = GAPS[label]
        made[row : row + GAP, column : column + GAP] = 0
        images[i, top : top + FRAME, left : left + FRAME] += made
    return images.unsqueeze(1), labels


def build(seed: int) -> Any:
    """A vision transformer of three blocks with a class token."""
    return small_vit(seed, SIDE, PATCH, CLASSES)


def companion(model: nn.Module, seed: int) -> DualCrossAttention:
    """The model with both companions, started as small models are."""
    torch.manual_seed(1000 + seed)
    made = DualCrossAttention(model, top=0.1, read="selected")
    for part in (made.blocks, made.head):
        started_small(part, seed)
    return made


def loss_of(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    """What is trained by: the cross-entropy, or the weighted sum of three."""
    x, labels = given
    if isinstance(model, DualCrossAttention):
        return model.loss(x, labels)["total"]
    return F.cross_entropy(model(x), labels)


def work(name: str, batch: int = 8) -> float:
    """Counted operations of the loss of one image, in millions."""
    model = build(0)
    what = companion(model, 0) if name == OURS else model
    given = glyphs(batch, "train", torch.Generator().manual_seed(0))
    return operations(lambda: loss_of(what, given)) / 1e6 / batch


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 300,
    batch: int = 32,
    tested: int = 1000,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train every contestant on the same images.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``details-cpu.svg``.
        steps, batch: of training.
        tested: images of the test.
        seeds: of weights and images.

    Returns:
        Plain values, for JSON. Of DCAL, ``accuracy`` is that of both branches and ``alone`` that of the transformer.
    """
    test = glyphs(tested, "test", torch.Generator().manual_seed(1234))
    costs = {name: work(name) for name in (PLAIN, OURS)}
    longer = round(steps * costs[OURS] / costs[PLAIN])

    def run(name: str, seed: int) -> dict[str, float]:
        model = build(seed)
        what = companion(model, seed) if name == OURS else model
        count = longer if name == LONGER else steps
        fit(what, lambda g: glyphs(batch, "train", g), loss_of, count, lr=3e-3, seed=seed)
        return {"accuracy": accuracy(what, *test), "alone": accuracy(model, *test)}

    result: dict[str, Any] = {
        "what": "glyphs that are nearly alike", "machine": machine(), "steps": steps, "batch": batch,
        "tested": tested, "chance": 100 / CLASSES, "megaflops": costs, "steps of equal work": longer,
        **study(NAMES, run, "accuracy", PLAIN, seeds, progress, keep, (steps, batch, tested, NOISE, STEP)),
    }  # fmt: skip
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            label: [(row["name"], row[what]["mean"], row[what]["half"]) for row in result["rows"]]
            for label, what in (("as it answers", "accuracy"), ("the transformer alone", "alone"))
        }
        picture(Path(pictures) / "details-cpu.svg", curves, "", "right, %", "glyphs that differ in a gap")
    return result
