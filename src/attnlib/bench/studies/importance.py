"""Which heads a small vision transformer can do without, by the importance that one ablation at a time gives them.

``attnlib bench --suite importance --out benchmarks/results`` measures again what ``importance-cpu.json`` holds and
draws it. A vision transformer of 12 heads in three layers learns to tell a handwritten digit anywhere in an image. Its
heads are then silenced together, one more at a time, the least important first: by each measure of
:func:`attnlib.look.head_importance` on images that are neither trained nor tested on. Against them stand random orders,
and the size of what a head can write, ``|W_V W_O|``, which needs no images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hooks import Node, Nodes, Patch, attach
from ...look.importance import head_importance
from ..clock import machine
from ..data.worlds import cluttered_digits
from ..small import Progress, accuracy, fit, picture, small_vit, study

SIDE, PATCH, DIM, HEADS, DEPTH = 24, 4, 48, 4, 3
BASELINE = "random order"

#: Order -> (how heads are silenced to measure their importance, the measure); of others ``None``.
ORDERS: dict[str, tuple[str, str] | None] = {
    BASELINE: None,
    "size of weights": None,
    "zero: divergence": ("zero", "divergence"),
    "zero: probability": ("zero", "probability"),
    "zero: accuracy": ("zero", "accuracy"),
    "mean: divergence": ("mean", "divergence"),
    "uniform: divergence": ("uniform", "divergence"),
}


def images(count: int, part: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(count, 1, SIDE, SIDE) and the digits."""
    return cluttered_digits(count, SIDE, part, 0, generator, digit=16)


def build(seed: int = 0) -> Any:
    """The transformer."""
    return small_vit(seed, SIDE, PATCH, depth=DEPTH, dim=DIM)


def trained(seed: int, steps: int, batch: int) -> Any:
    """The transformer, in evaluation mode."""
    model = build(seed)

    def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(given[0]), given[1])

    fit(model, lambda g: images(batch, "train", g), loss, steps, 2e-3, seed)
    return model.eval()


def sizes(model: Any) -> dict[Node, float]:
    """Frobenius norm of every head's path from values to the stream."""
    nodes, found = Nodes(model), {}
    for number in range(len(nodes)):
        out = nodes.output_weight(number)  # (H, D, C)
        value = model.stages[number].mixer.inner.v.weight.detach().unflatten(0, (HEADS, -1))  # (H, D, C)
        for head in range(HEADS):
            found[Node("z", number, head)] = float(torch.linalg.matrix_norm(value[head].T @ out[head]))
    return found


def silenced(model: nn.Module, test: tuple[Tensor, Tensor], silent: Sequence[Node] = ()) -> float:
    """Percent right with some heads silent."""
    if not silent:
        return accuracy(model, *test)
    with attach(model, Patch({node: torch.zeros(1, 1, DIM // HEADS) for node in silent})):
        return accuracy(model, *test)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 500,
    batch: int = 24,
    fitting: int = 256,
    tested: int = 256,
    draws: int = 3,
    seeds: tuple[int, ...] = (0, 1, 2),
    orders: tuple[str, ...] = tuple(ORDERS),
) -> dict[str, Any]:
    """Train, rank heads, and silence them from the least important on.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``importance-cpu.svg``.
        steps, batch: of training.
        fitting: images that importance is measured on.
        tested: images of the test, of digits that were not trained on.
        draws: random orders per seed.
        seeds: of initial weights and batches.
        orders: of :data:`ORDERS`; the random one must be among them.

    Returns:
        Plain values, for JSON: per order the accuracy with 1 to 11 silent heads, its ``mean accuracy`` over these, the
        intact model's, and paired differences from random orders.
    """
    test = images(tested, "test", torch.Generator().manual_seed(1234))
    held = images(fitting, "train", torch.Generator().manual_seed(4321))
    count = HEADS * DEPTH
    models: dict[int, Any] = {}

    def ascending(name: str, seed: int, model: Any) -> list[list[Node]]:
        asked = ORDERS[name]
        if asked is not None:
            return [head_importance(model, [held], asked[0]).ranked(asked[1])[::-1]]
        found = sizes(model)
        if name == "size of weights":
            return [sorted(found, key=lambda node: found[node])]
        maker = torch.Generator().manual_seed(seed)
        return [[list(found)[i] for i in torch.randperm(count, generator=maker).tolist()] for _ in range(draws)]

    def run(name: str, seed: int) -> dict[str, float]:
        if seed not in models:
            models.clear()
            models[seed] = trained(seed, steps, batch)
        model = models[seed]
        curves = [
            [silenced(model, test, order[:silent]) for silent in range(1, count)]
            for order in ascending(name, seed, model)
        ]
        mean = torch.tensor(curves).mean(0).tolist()
        said = {f"{silent} silent": value for silent, value in enumerate(mean, 1)}
        return {"mean accuracy": sum(mean) / len(mean), "intact": silenced(model, test), **said}

    key = (steps, batch, fitting, tested, draws)
    found = study(orders, run, "mean accuracy", BASELINE, seeds, progress, keep, key)
    result = {
        "what": "accuracy with the least important heads silent", "machine": machine(), "steps": steps, "batch": batch,
        "tested": tested, "fitting": fitting, "chance": 10.0, "heads": count, **found,
    }  # fmt: skip
    if pictures is not None:
        curves = {
            row["name"]: [(n, row[f"{n} silent"]["mean"], row[f"{n} silent"]["half"]) for n in range(1, count)]
            for row in found["rows"]
        }
        picture(
            Path(pictures) / "importance-cpu.svg", curves, f"silent heads of {count}", "accuracy, %",
            "heads silenced from the least important on (3 seeds, 95 % intervals)",
            dashed=[name for name in curves if ORDERS[name] is None],
        )  # fmt: skip
    return result
