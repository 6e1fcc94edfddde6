"""Bags: does ACMIL look at more of what makes a bag positive than ABMIL does, and what does that cost?

Bags of digits and pieces of stained tissue with planted spots, so that every instance is known. Few bags to train on,
the same for both: one branch that hides nothing (ABMIL), and five that hide what they like best (ACMIL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.bags.acmil import ACMIL
from ...clock import machine
from ...data.bags import SIDE, Bags, digit_bags, tissue_bags
from ...small import Progress, fit, interval, panels, parameters, picture, study, told
from ...stats import paired_interval

QUESTION = "Does ACMIL look at more of what makes a bag positive than ABMIL, and are bags told apart as well?"
NAMES = {
    "ABMIL": dict(num_branches=1, top_k=0),
    "ACMIL": dict(num_branches=5, top_k=10),
}
WORLDS: dict[str, Callable[..., Bags]] = {"digits": digit_bags, "tissue": tissue_bags}


def scored(weights: Tensor, logits: Tensor, made: Bags) -> dict[str, float]:
    """What the weights (B, N) and logits (B, 2) of bags are worth.

    Returns:
        ``top ten``, the share of attention on the ten strongest instances of positive bags; ``instances`` and ``bags``,
        areas under ROC curves, the former the mean over positive bags; ``on positives``, the share of attention on the
        instances that make them so; all in percent.
    """
    from sklearn.metrics import roc_auc_score

    there = made.target.bool()
    held, truth = weights[there], made.truth[there]
    each = [roc_auc_score(t.numpy(), w.numpy()) for t, w in zip(truth, held, strict=True)]
    return {
        "top ten": 100 * float(held.topk(min(10, held.shape[1]), 1).values.sum(1).mean()),
        "instances": 100 * sum(each) / len(each),
        "bags": 100 * float(roc_auc_score(made.target.numpy(), (logits[:, 1] - logits[:, 0]).numpy())),
        "on positives": 100 * float((held * truth).sum(1).mean()),
    }


def trained(world: str, name: str, seed: int, steps: int, bags: int) -> ACMIL:
    """A model of :data:`NAMES` after training on so many bags of a world of :data:`WORLDS`."""
    held = WORLDS[world](bags, torch.Generator().manual_seed(1_000 + seed))
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(dim=32, hidden_dim=32) | NAMES[name]
    model = ACMIL(held.bags.shape[2], 2, **settings)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        some = torch.randperm(bags, generator=generator)[:16]
        return held.bags[some], held.target[some]

    def loss(m: Any, given: tuple[Tensor, Tensor]) -> Tensor:
        total: Tensor = sum(m.loss(m(given[0]), given[1]).values())  # type: ignore[assignment]
        return total

    fit(model, batch, loss, steps, lr=3e-3, seed=seed)
    return model.eval()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 300,
    seeds: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    bags: int = 60,
    tested: int = 200,
) -> dict[str, Any]:
    """Train both in both worlds.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-bags-cpu.svg`` and ``.png``.
        steps, seeds, bags, tested: of training, the bags for it and for the test.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {"question": QUESTION, "machine": machine(), "steps": steps, "bags": bags, "worlds": {}}
    for world, make in WORLDS.items():

        def run(name: str, seed: int, world: str = world, make: Callable[..., Bags] = make) -> dict[str, float]:
            model = trained(world, name, seed, steps, bags)
            made = make(tested, torch.Generator().manual_seed(10_000 + seed), test=True)
            with torch.no_grad():
                found = model(made.bags)
            return scored(found.weights.mean((1, 2)), found.logits, made) | {"parameters": parameters(model)}

        key = (world, steps, bags, tested)
        result["worlds"][world] = study(list(NAMES), run, "instances", "ABMIL", seeds, progress, keep, key)
        result["worlds"][world]["top ten"] = _against(result["worlds"][world]["runs"], "top ten")
        result["worlds"][world]["bags"] = _against(result["worlds"][world]["runs"], "bags")
    if pictures is not None:
        curves = {
            name: [
                (f"{world}: {what}", row[what]["mean"], row[what]["half"])
                for world, found in result["worlds"].items()
                for row in found["rows"]
                if row["name"] == name
                for what in ("top ten", "instances", "bags")
            ]
            for name in NAMES
        }
        picture(Path(pictures) / "tasks-bags-cpu.svg", curves, "", "%", "attention in bags", (), ("ABMIL",))
        _draw(Path(pictures) / "tasks-bags-cpu.png", seeds[0], steps, bags)
    return result


def _against(runs: Sequence[dict[str, Any]], metric: str) -> dict[str, dict[str, float | int | None]]:
    """Paired differences from ABMIL in another number."""
    by = {name: {r["seed"]: r[metric] for r in runs if r["name"] == name} for name in NAMES}
    found = {name: paired_interval(own, by["ABMIL"]) for name, own in by.items()}
    return {name: interval(gap) for name, gap in found.items() if gap is not None and name != "ABMIL"}


def _draw(path: Path, seed: int, steps: int, bags: int) -> None:
    """Two pieces of tissue, where the spots are, and where two models look."""
    made = tissue_bags(4, torch.Generator().manual_seed(20_000 + seed), test=True)
    names = ("ABMIL", "ACMIL")
    models = {n: trained("tissue", n, seed, steps, bags) for n in names}
    with torch.no_grad():
        seen = {n: model(made.bags).weights.mean((1, 2)) for n, model in models.items()}
    with panels(path, ["", ""], ["tissue", "spots", *names]) as axes:
        for line, i in zip(axes, (1, 3), strict=True):
            line[0].imshow(made.pictures[i].numpy(), interpolation="nearest")
            line[1].imshow(made.truth[i].reshape(SIDE, SIDE).numpy(), cmap="gray")
            for axis, name in zip(line[2:], names, strict=True):
                axis.imshow(seen[name][i].reshape(SIDE, SIDE).numpy(), cmap="magma", vmin=0)


def table(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| bags of | pool | on the ten strongest, % | against ABMIL | instances, AUROC, % | against ABMIL "
        "| bags, AUROC, % | against ABMIL | parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for world, found in result["worlds"].items():
        for row in found["rows"]:
            name = row["name"]
            gaps = ["", "", ""]
            if name != "ABMIL":
                held = (found["top ten"][name], row["against"], found["bags"][name])
                gaps = [f"{g['mean']:+.1f} ± {g['half']:.1f}" for g in held]
            cells = [world, name]
            for what, gap in zip(("top ten", "instances", "bags"), gaps, strict=True):
                cells += [told(row, what), gap]
            lines.append("| " + " | ".join([*cells, f"{row['parameters']['mean']:.0f}"]) + " |")
    return "\n".join(lines)
