"""Prompts of classes in front of a frozen vision transformer: where their maps look.

``attnlib bench --suite prompting --out benchmarks/results`` measures again what ``prompting-cpu.json`` holds and draws
it. Images are grids of cells of noise, in some of which stand patterns; a small vision transformer learns which three
of sixteen patterns are there, and of every patch which it is, is frozen, and gets another task. One pattern of eight is
planted in one cell; two of eight others, which the model knows as well, say nothing, and the other cells are noise.
Prompt-CAM (Chowdhury et al., 2025, arXiv 2501.09333) learns a prompt per class; a hit is a map of the true class's
prompt whose highest patch is the planted one. Held against: the map of the class token of the same frozen model, and of
one that is trained on the task itself, all of it; and Prompt-CAM on a model that has not learned what patches are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.prompts import PromptCam
from ...hooks import Intervention, attach
from ...hooks.site import Site
from ..clock import machine
from ..small import Progress, fit, picture, small_vit, study

CELLS, PATCH, DIM, DEPTH, KNOWN, CLASSES = 5, 4, 48, 3, 16, 8
SIDE = CELLS * PATCH
PROMPTED, TOKEN, TUNED = "Prompt-CAM", "class token, frozen", "class token, trained on the task"
BLIND = "Prompt-CAM, patches not taught"


def patterns() -> Tensor:
    """(KNOWN, PATCH, PATCH) of zeros and ones, each with half of its pixels."""
    generator = torch.Generator().manual_seed(7)
    made = torch.rand(4 * KNOWN, PATCH * PATCH, generator=generator).argsort(1) < PATCH * PATCH // 2
    return made.float().view(-1, PATCH, PATCH)[:KNOWN]


def scenes(
    count: int, among: Sequence[int], number: int, generator: torch.Generator, beside: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of chance, in some of which stand patterns.

    Args:
        count: images.
        among: patterns that are drawn from.
        number: of these, in every image, no two alike.
        generator: of what is drawn.
        beside: further patterns, of all others.

    Returns:
        Images (count, 1, side, side), which patterns (count, number) of ``among`` there are and in which cells
        (count, number).
    """
    others = [i for i in range(KNOWN) if i not in among]
    which = torch.tensor(list(among))[torch.rand(count, len(among), generator=generator).argsort(1)[:, :number]]
    if beside:
        more = torch.tensor(others)[torch.rand(count, len(others), generator=generator).argsort(1)[:, :beside]]
        which = torch.cat([which, more], 1)
    where = torch.rand(count, CELLS**2, generator=generator).argsort(1)[:, : number + beside]
    cells = (torch.rand(count, CELLS**2, PATCH, PATCH, generator=generator) < 0.5).float()
    cells[torch.arange(count)[:, None], where] = patterns()[which]
    images = cells.view(count, CELLS, CELLS, PATCH, PATCH).transpose(2, 3).reshape(count, 1, SIDE, SIDE)
    images = images + 0.2 * torch.randn(images.shape, generator=generator)
    return images, which[:, :number], where[:, :number]


def build(seed: int, classes: int = KNOWN) -> Any:
    """A vision transformer with a class token."""
    return small_vit(seed, SIDE, PATCH, classes, DEPTH, DIM)


class _Cells(nn.Module):
    """A model, and a linear map that says of every patch which pattern it is, if any."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.cells = model, nn.Linear(DIM, KNOWN + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(x)
        return self.model.forward_head(tokens), self.cells(tokens[:, 1:]).transpose(1, 2)


def backbone(steps: int, batch: int, seed: int, cells: bool = True) -> Any:
    """Trained to say which three patterns are there and, with ``cells``, of every patch which it is."""
    model = _Cells(build(seed))

    def loss(m: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, which, where = given
        there, at = m(x)
        found = F.binary_cross_entropy_with_logits(there, torch.zeros_like(there).scatter_(1, which, 1.0))
        if not cells:
            return found
        return found + F.cross_entropy(at, torch.full((len(x), CELLS**2), KNOWN).scatter_(1, where, which))

    fit(model, lambda g: scenes(batch, range(KNOWN), 3, g), loss, steps, 3e-3, seed)
    return model.model.eval()


@torch.no_grad()
def named(model: nn.Module, tested: int) -> float:
    """Percent of the patterns that are there among the three that a backbone names."""
    x, which, _ = scenes(tested, range(KNOWN), 3, torch.Generator().manual_seed(4321))
    found = model(x).topk(3, 1).indices
    return 100 * float((found[:, :, None] == which[:, None]).any(2).float().mean())


def planted(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images, which of the first patterns is there beside two of the others, and in which cell."""
    x, which, where = scenes(count, range(CLASSES), 1, generator, beside=2)
    return x, which[:, 0], where[:, 0]


class _ClassRow(Intervention):
    """What the class token reads of the patches in the last layer, mean over heads."""

    name = "class token's row"
    layers = (-1,)
    whole_map = True

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        self.found = weights[:, :, 0, 1:].mean(1)
        return weights


@torch.no_grad()
def hits(maps: Tensor, where: Tensor) -> float:
    """Percent of maps (B, N) whose highest patch is the planted one."""
    return 100 * float((maps.argmax(-1) == where).float().mean())


@torch.no_grad()
def class_map(model: nn.Module, images: Tensor) -> Tensor:
    """(B, N): what the class token reads."""
    kept = _ClassRow()
    with attach(model, kept):
        model(images)
    assert kept.found is not None
    return kept.found


def looked(name: str, given: Any, steps: int, batch: int, tested: int, seed: int) -> dict[str, float]:
    """Train what a contestant trains on planted patterns, and see where its maps look."""
    test = planted(tested, torch.Generator().manual_seed(1234))
    torch.manual_seed(1000 + seed)
    model: Any = copy.deepcopy(given)
    if name.startswith(PROMPTED):
        what: Any = PromptCam(model, CLASSES)
    else:
        model.reset_classifier(CLASSES)
        what = model.requires_grad_(name == TUNED)
        model.head.requires_grad_(True)
    lr = 3e-3 if name == TUNED else 2e-2
    fit(
        what, lambda g: planted(batch, g)[:2], lambda m, x: F.cross_entropy(m(x[0]), x[1]), steps, lr=lr, seed=seed
    )  # fmt: skip
    what.eval()
    with torch.no_grad():
        right = 100 * float((what(test[0]).argmax(-1) == test[1]).float().mean())
        if not name.startswith(PROMPTED):
            return {"hits": hits(class_map(model, test[0]), test[2]), "accuracy": right}
        own = what.maps(test[0])[torch.arange(tested), :, test[1]]  # (B, heads, N)
        single = [hits(own[:, head], test[2]) for head in range(own.shape[1])]
    return {"hits": hits(own.mean(1), test[2]), "accuracy": right, "hits of the best head": max(single)}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    pretraining: int = 300,
    steps: int = 150,
    batch: int = 32,
    tested: int = 500,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train a backbone, freeze it, train prompts.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``prompting-cpu.svg``.
        pretraining: steps of the backbone.
        steps, batch: of what is learned then.
        tested: images of the test.
        seeds: of weights and images.

    Returns:
        Plain values, for JSON.
    """
    held: dict[tuple[int, bool], Any] = {}

    def frozen(seed: int, cells: bool = True) -> Any:
        if (seed, cells) not in held:
            held[seed, cells] = backbone(pretraining, batch, seed, cells)
        return held[seed, cells]

    def where(name: str, seed: int) -> dict[str, float]:
        given = frozen(seed, name != BLIND)
        return {**looked(name, given, steps, batch, tested, seed), "backbone": named(given, tested)}

    key = (pretraining, steps, batch, tested)
    result: dict[str, Any] = {
        "what": "where maps of classes look, of a frozen vision transformer", "machine": machine(),
        "pretraining": pretraining, "steps": steps, "batch": batch, "tested": tested,
        "chance": {"hits": 100 / CELLS**2, "accuracy": 100 / CLASSES},
        "where maps look": study(
            (TOKEN, TUNED, PROMPTED, BLIND), where, "hits", TOKEN, seeds, progress, keep, (*key, "where")
        ),
    }  # fmt: skip
    if pictures is not None:
        rows = result["where maps look"]["rows"]
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            "highest patch is the planted one": [(r["name"], r["hits"]["mean"], r["hits"]["half"]) for r in rows],
            "class is right": [(r["name"], r["accuracy"]["mean"], r["accuracy"]["half"]) for r in rows],
        }
        picture(Path(pictures) / "prompting-cpu.svg", curves, "", "%", "prompts in front of a frozen transformer")
    return result
