"""Small lesions: do gates on skips, attention at the bottom and guiding find more of them than the plain U-Net?

Ellipses that look like grey matter, planted into the white matter of a real average head (of a made-up one where
nilearn is not installed; the result says which). Slabs from front to back are held out. All networks have the encoder
of the plain U-Net, of equal width, the same batches and steps; the gated ones have deep supervision and an input
pyramid besides, so these stand alone as a contestant, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.dense.context import ASPP
from ....models.dense.resunet import channel_gate
from ....models.dense.unet import UNet
from ....models.medusa import SharedAttention
from ...clock import machine
from ...data.brain import Head, lesions, mni, mni_folder, phantom, slabs
from ...small import Progress, fit, interval, parameters, picture, sheet, study, told
from ...stats import paired_interval

QUESTION = "Do gates and guiding find small lesions that a plain U-Net of equal width does not?"
DIMS = (8, 12, 16, 24)
DEEP: dict[str, Any] = dict(deep_supervision=True, input_pyramid=True)
DUAL: dict[str, Any] = dict(bottleneck="dual", norm_all=True)
#: Mean diameters in mm of what is tested on.
SIZES = {"small": (4.0, 6.0), "medium": (6.0, 10.0), "large": (10.0, 20.0)}
SHOWN = {
    "unet": "U-Net", "deep": "U-Net, deep supervision and image pyramid", "agunet": "AGUNet", "daunet": "DAUNet",
    "dagunet": "DAGUNet", "eca": "U-Net, ECA and ASPP (ResUNet's)",
    "medusa": "U-Net, MEDUSA",
}  # fmt: skip
#: Those that are measured by default.
NAMES = ("unet", "deep", "agunet", "dagunet")
#: What a contestant differs from in its attention alone.
BESIDE = {"agunet": "deep", "daunet": "deep", "dagunet": "deep"}

Images = tuple[Tensor, Tensor]


def network(name: str) -> Any:
    """A contestant, freshly drawn."""

    def unet(**settings: Any) -> UNet:
        return UNet(1, 2, DIMS, 2, momentum=0.1, loss_kind="both", **settings)

    if name == "eca":
        return unet(residual=True, skip_attention=channel_gate("eca"), bottleneck=lambda dim: ASPP(dim, dim, (1, 2)))
    if name == "medusa":
        stages = [f"encoder.blocks.{i}" for i in range(len(DIMS))]
        body = UNet(1, 4, DIMS[:3], 2, momentum=0.1, upsample="resize")
        return SharedAttention(unet(), stages, DIMS, "NCHW", body, 4, body_size=None)
    return unet(**{
        "unet": {}, "deep": DEEP, "agunet": DEEP | {"skip_gate": "concat"}, "daunet": DEEP | DUAL,
        "dagunet": DEEP | DUAL | {"guided": True},
    }[name])  # fmt: skip


def objective(model: Any, given: Images) -> Tensor:
    """Dice and cross entropy of all that the network predicts."""
    judge: Any = model.model if isinstance(model, SharedAttention) else model
    total: Tensor = sum(judge.loss(model(given[0]), given[1]).values())  # type: ignore[assignment]
    return total


@torch.no_grad()
def answers(model: Any, x: Tensor) -> Tensor:
    """Where lesions are: (B, H, W) boolean."""
    model.eval()
    return torch.cat([model(part).argmax(1) == 1 for part in x.split(32)])


def false_alarms(found: Tensor, truth: Tensor) -> float:
    """Connected groups of pixels per image that touch no lesion."""
    from scipy import ndimage

    total = 0
    for own, right in zip(found.numpy(), truth.numpy(), strict=True):
        groups, count = ndimage.label(own)
        total += count - len(set(groups[right & own].tolist()) - {0})
    return total / len(found)


def scores(found: Tensor, truth: Tensor) -> dict[str, float]:
    """``dice``, in percent, mean over images, and ``detected``: in how many half of the lesion is found, in percent."""
    both, right = (found & truth).flatten(1).sum(1), truth.flatten(1).sum(1)
    dice = 2 * both / (found.flatten(1).sum(1) + right)
    return {"dice": 100 * float(dice.mean()), "detected": 100 * float((2 * both >= right).float().mean())}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 64,
    made: int = 800,
    names: Sequence[str] = NAMES,
    head: Head | None = None,
    lr: float = 1e-2,
) -> dict[str, Any]:
    """Train every network, and look for lesions in slabs that were held out.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-lesions-cpu.svg``, and for ``tasks-lesions-cpu.png`` of predictions.
        steps, seeds: of training.
        tested: images with one lesion, of each size, and images without.
        made: images to train on.
        names: contestants, of :data:`SHOWN`; ``"unet"`` must be among them.
        head: where lesions are planted; the MNI template by default, or a made-up head where nilearn is not installed.
        lr: learning rate.

    Returns:
        Plain values, for JSON.
    """
    if head is None:
        head = phantom() if mni_folder() is None else mni()
    if progress is not None:
        progress(f"lesions are planted into {head.source}")
    train, test = slabs(head)
    trained: dict[tuple[str, int], Any] = {}
    held: dict[int, tuple[Images, dict[str, Images]]] = {}

    def samples(seed: int) -> tuple[Images, dict[str, Images]]:
        if seed not in held:
            own, g = torch.Generator().manual_seed(20_000 + seed), torch.Generator().manual_seed(10_000 + seed)
            exam = {k: lesions(head, test, tested, g, number=(1, 1), diameter=d) for k, d in SIZES.items()}
            exam["none"] = lesions(head, test, tested, g, number=(0, 0))
            held[seed] = lesions(head, train, made, own, number=(1, 3)), exam
        return held[seed]

    def model(name: str, seed: int) -> Any:
        if (name, seed) not in trained:
            torch.manual_seed(seed)
            net, (x, y) = network(name), samples(seed)[0]

            def batch(g: torch.Generator) -> Images:
                chosen = torch.randint(0, made, (4,), generator=g)
                return x[chosen], y[chosen]

            fit(net, batch, objective, steps, lr=lr, seed=seed)
            trained[name, seed] = net
        return trained[name, seed]

    def run(name: str, seed: int) -> dict[str, float]:
        exam = samples(seed)[1]
        found = {k: answers(model(name, seed), x) for k, (x, _) in exam.items()}
        numbers: dict[str, float] = {}
        for size in SIZES:
            numbers |= {f"{what} {size}": n for what, n in scores(found[size], exam[size][1] == 1).items()}
        truth = torch.cat([y == 1 for _, y in exam.values()])
        numbers["false alarms"] = false_alarms(torch.cat([*found.values()]), truth)
        return numbers | {"parameters": parameters(model(name, seed))}

    result = study(names, run, "dice small", "unet", seeds, progress, keep, (steps, tested, made, lr, head.source))
    result |= {
        "question": QUESTION, "machine": machine(), "data": head.source, "steps": steps, "tested": tested, "made": made,
        "lr": lr,
    }  # fmt: skip
    for row in result["rows"]:
        if row["name"] in BESIDE and BESIDE[row["name"]] in names:
            row["beside"] = _gap(result["runs"], row["name"], BESIDE[row["name"]])
    if pictures is not None:
        curves = {
            SHOWN[r["name"]]: [(f"{k}, {a:.0f} to {b:.0f} mm", r[f"dice {k}"]["mean"], r[f"dice {k}"]["half"])
                               for k, (a, b) in SIZES.items()]
            for r in result["rows"]
        }  # fmt: skip
        picture(Path(pictures) / "tasks-lesions-cpu.svg", curves, "lesion", "Dice, %", "planted lesions")
        seed = seeds[-1]
        _drawn(
            Path(pictures) / "tasks-lesions-cpu.png", names, samples(seed)[1], lambda n, x: answers(model(n, seed), x)
        )
    return result


def _gap(runs: Sequence[Mapping[str, Any]], name: str, base: str) -> dict[str, float | int | None] | None:
    """Paired difference in the Dice of small lesions."""
    own, other = ({r["seed"]: r["dice small"] for r in runs if r["name"] == n} for n in (name, base))
    gap = paired_interval(own, other)
    return None if gap is None else interval(gap)


def _drawn(
    path: Path, names: Sequence[str], exam: Mapping[str, Images], answer: Callable[[str, Tensor], Tensor]
) -> None:
    """The first images of each size: as they are, with the truth, and with what the networks find, in red."""
    each = min(3, len(exam["none"][0]))
    x = torch.cat([x[:each] for x, _ in exam.values()])
    truth = torch.cat([y[:each] == 1 for _, y in exam.values()])
    grey = (0.25 * x + 0.5).clamp(0, 1)

    def marked(mask: Tensor) -> Tensor:
        return torch.where(mask[:, None], 0.35 * grey + 0.65 * torch.tensor([1.0, 0.1, 0.1])[:, None, None], grey)

    rows = {"image": grey, "truth": marked(truth)}
    rows |= {SHOWN[n]: marked(answer(n, x)) for n in NAMES if n in names}
    sheet(path, rows, [k for k in exam for _ in range(each)], zoom=0.5, colours=48)


def table(result: Mapping[str, Any]) -> str:
    """The table of the page."""

    def signed(found: Mapping[str, Any] | None) -> str:
        return "" if found is None else f"{found['mean']:+.1f} ± {found['half']:.1f}"

    heads = [f"{what}, {size}" for what in ("Dice", "found") for size in SIZES]
    heads = ["network", *heads, "false alarms", "Dice, small, against U-Net", "against its base", "parameters"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [told(row, f"{what} {size}") for what in ("dice", "detected") for size in SIZES]
        cells += [told(row, "false alarms", 2), "" if row["name"] == "unet" else signed(row["against"])]
        cells += [signed(row.get("beside")), f"{row['parameters']['mean']:.0f}"]
        lines.append(f"| {SHOWN[row['name']]} | {' | '.join(cells)} |")
    return "\n".join(lines)
