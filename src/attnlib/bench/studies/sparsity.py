"""Half to nineteen twentieths of a trained vision transformer set to zero, without training afterwards.

``attnlib bench --suite sparsity --out benchmarks/results`` measures again what ``sparsity-cpu.json`` holds and draws
it. A plain and a hierarchical vision transformer (Swin V2) learn handwritten digits; then queries with keys and values,
output projections and MLPs lose their least important weights in one shot, by magnitude in every layer alike, by
magnitude in all layers together, by LAMP (a layer to a scope) and by DIMAP (a module of layers of one function to a
scope; Li et al., 2024, arXiv 2404.13648), and at random, which says what there is to lose. Embeddings, norms, merging
and heads stay whole. All contestants of a seed prune the same trained model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ...convert.prune import kind_of, prune
from ...models.build import create_model
from ..clock import machine
from ..data.files import digits
from ..small import Progress, picture, scored, started_small, study
from .pretraining import build as plain
from .pretraining import train_on

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BASELINE, OURS = "magnitude, all layers", "DIMAP"

#: Contestant -> scope of :func:`attnlib.convert.prune.prune`; ``None``: the same share of every layer.
CONTESTANTS: dict[str, str | None] = {
    "random": None, "magnitude, every layer": None, BASELINE: "global", "LAMP": "layer", OURS: "module",
}  # fmt: skip


class Enlarged(nn.Module):
    """A model of larger images reads these."""

    def __init__(self, model: nn.Module, side: int):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x: Tensor) -> Tensor:
        return self.model(F.interpolate(x, size=(self.side, self.side), mode="nearest"))


def swin(seed: int) -> nn.Module:
    """Two stages of two blocks on 8 x 8 and 4 x 4 patches."""
    torch.manual_seed(seed)
    model = create_model(
        "swinv2_tiny_window8_256", img_size=32, in_chans=1, num_classes=10, embed_dim=24, depths=(2, 2),
        num_heads=(2, 4), window_size=4, pretrained_windows=(0, 0), global_blocks=((), ()),
        drop_path_rate=0.0,
    )  # fmt: skip
    for part in model.modules():  # norms behind branches start at 0, with which a small model learns too slowly
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
    return Enlarged(started_small(model, seed), 32)


MODELS: dict[str, Callable[[int], nn.Module]] = {"vision transformer": plain, "Swin V2": swin}


def trained(name: str, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int) -> nn.Module:
    """A model that knows the digits, moved by at most a pixel in training."""
    model = MODELS[name](seed)
    train_on(model, images, labels, steps, batch, seed, lr=3e-3)
    return model


def pruned(model: nn.Module, name: str, level: float, seed: int) -> tuple[nn.Module, float]:
    """A copy as a contestant leaves it, and the share of its layers' weights that are zero."""
    made = copy.deepcopy(model)
    if (scope := CONTESTANTS[name]) is not None:
        told = prune(made, level, scope)
        return made, told.dropped / sum(told.of.values())
    gone = whole = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for place, layer in made.named_modules():
            if isinstance(layer, nn.Linear) and kind_of(place) is not None:
                cut = torch_prune.random_unstructured if name == "random" else torch_prune.l1_unstructured
                cut(layer, "weight", level)
                mask: Any = layer.weight_mask
                gone, whole = gone + int((mask == 0).sum()), whole + layer.weight.numel()
    return made, gone / whole


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 500,
    batch: int = 32,
    levels: Sequence[float] = LEVELS,
    seeds: Sequence[int] = (0, 1, 2),
    models: Sequence[str] = tuple(MODELS),
) -> dict[str, Any]:
    """Train, prune, test.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``sparsity-cpu.svg`` and ``sparsity-swin-cpu.svg``.
        steps, batch: of training.
        levels: shares of weights that become zero.
        seeds: of weights, batches and random zeros.
        models: of :data:`MODELS`.

    Returns:
        Plain values, for JSON: per model the accuracy of the whole model and, per level, the rows of a study.
    """
    data = digits()
    train, test = ((x.permute(0, 3, 1, 2), y) for x, y in (data.train, data.test))
    result: dict[str, Any] = {
        "what": "weights of a trained vision transformer set to zero", "data": data.source, "split": data.split,
        "machine": machine(), "steps": steps, "batch": batch, "chance": 10.0, "models": {},
    }  # fmt: skip

    for kind in models:
        held: dict[int, nn.Module] = {}

        def run(name: str, seed: int, kind: str = kind, held: dict[int, nn.Module] = held) -> dict[str, float]:
            if seed not in held:
                held.clear()
                held[seed] = trained(kind, *train, steps, batch, seed)
            found = {f"whole {k}": v for k, v in scored(held[seed], *test).items()}
            for level in levels:
                made, share = pruned(held[seed], name, level, seed)
                assert abs(share - level) < 0.002, (name, level, share)
                found |= {f"{k} at {100 * level:g} %": v for k, v in scored(made, *test).items()}
            return found

        first = f"accuracy at {100 * levels[0]:g} %"
        runs = study(list(CONTESTANTS), run, first, BASELINE, seeds, progress, keep, (kind, steps, batch, levels))
        by = {(r["name"], r["seed"]): r for r in runs["runs"]}
        found: dict[str, Any] = {"whole": runs["rows"][0]["whole accuracy"], "levels": {}}
        for level in levels:
            end = f" at {100 * level:g} %"

            def one(name: str, seed: int, end: str = end, by: Any = by) -> dict[str, float]:
                return {what: by[name, seed][what + end] for what in ("accuracy", "loss")}

            found["levels"][end.strip(" at")] = study(list(CONTESTANTS), one, "accuracy", BASELINE, seeds)
        result["models"][kind] = found
        if pictures is not None:
            curves: dict[str, list[tuple[Any, float, float | None]]] = {name: [] for name in CONTESTANTS}
            for level, rows in zip(levels, found["levels"].values(), strict=True):
                for row in rows["rows"]:
                    curves[row["name"]].append((100 * level, row["accuracy"]["mean"], row["accuracy"]["half"]))
            file = "sparsity-cpu.svg" if kind != "Swin V2" else "sparsity-swin-cpu.svg"
            picture(
                Path(pictures) / file, curves, "weights that are zero, %", "right, %",
                f"a trained {kind}, pruned in one shot", dashed=("random", BASELINE),
            )  # fmt: skip
    return result
