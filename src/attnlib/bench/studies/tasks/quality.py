"""How good a picture looks: does reading from meaning to details rank distortions better than pooled features?

Crops of photographs under graded blur, noise and JPEG; whole photographs are held out. TOPIQ, without and with a
reference, against a regressor of means of the same encoder's maps, and against PSNR and SSIM. The truth is the grade:
nobody was asked how the pictures look.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....models.backbones.resnet import resnet
from ....models.backbones.stages import Features
from ....models.restore.topiq import TOPIQ, norm_in_norm_loss
from ...clock import machine
from ...data.files import photos, require
from ...small import Progress, fit, parameters, picture, sheet, study, told

QUESTION = "Does TOPIQ rank blur, noise and JPEG on unseen photographs better than pooled features, PSNR and SSIM?"
NAMES = ("pooled", "TOPIQ", "pooled, with reference", "TOPIQ, with reference", "PSNR", "SSIM")
KINDS = ("blur", "noise", "JPEG")
#: Standard deviations in pixels and of values in [0, 1], and Pillow's quality; the grade 0 leaves a crop as it is.
GRADES = {
    "blur": (0.45, 0.6, 0.8, 1.1, 1.5), "noise": (0.015, 0.03, 0.05, 0.08, 0.12), "JPEG": (70, 45, 28, 16, 8),
}  # fmt: skip
SIDE = 32


def distorted(x: Tensor, kind: str, grade: int, generator: torch.Generator) -> Tensor:
    """A picture (3, H, W) in [0, 1] under one of the :data:`GRADES`.

    Args:
        x: the picture.
        kind: of :data:`KINDS`.
        grade: 0 for none, to 5.
        generator: of the noise.
    """
    if not grade:
        return x
    much = GRADES[kind][grade - 1]
    if kind == "noise":
        return (x + much * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    if kind == "blur":
        at = torch.arange(-5.0, 6.0)
        kernel = (-0.5 * (at / much).square()).softmax(0)
        y = F.conv2d(F.pad(x[:, None], (5, 5, 0, 0), mode="reflect"), kernel.view(1, 1, 1, -1))
        return F.conv2d(F.pad(y, (0, 0, 5, 5), mode="reflect"), kernel.view(1, 1, -1, 1))[:, 0]
    image_module, held = require("PIL.Image"), io.BytesIO()
    image_module.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()).save(held, "JPEG", quality=much)
    return torch.from_numpy(np.asarray(image_module.open(held), dtype=np.float32) / 255).permute(2, 0, 1)


def graded(images: Sequence[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops under every kind in turns, every grade in turns.

    Args:
        images: photographs (3, H, W) in [0, 1].
        count: crops of each, 18 of which share a place.
        generator: of places and noise.

    Returns:
        What is judged and what it was, (N, 3, 32, 32) each; its quality, 1 to 0; the number of its kind.
    """
    x, reference, quality, which = [], [], [], []
    for image in images:
        for i in range(count):
            if i % 18 == 0:
                top, left = (int(torch.randint(0, n - SIDE + 1, (), generator=generator)) for n in image.shape[1:])
                crop = image[:, top : top + SIDE, left : left + SIDE]
            kind, grade = i % 3, i // 3 % 6
            x.append(distorted(crop, KINDS[kind], grade, generator))
            reference.append(crop)
            quality.append(1 - grade / 5)
            which.append(kind)
    return torch.stack(x), torch.stack(reference), torch.tensor(quality), torch.tensor(which)


class Pooled(nn.Module):
    """Means over the maps of an encoder, or over their absolute differences from the reference's, through an MLP.

    Args:
        encoder: gives maps.
        dims: their channels.
        hidden: width of the MLP.
    """

    def __init__(self, encoder: nn.Module, dims: Sequence[int], hidden: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.LayerNorm(sum(dims)), nn.Linear(sum(dims), hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 1)."""
        maps = self.encoder(2 * x - 1)
        if reference is not None:
            maps = [(a - b).abs() for a, b in zip(maps, self.encoder(2 * reference - 1), strict=True)]
        return self.head(torch.cat([m.mean((2, 3)) for m in maps], 1))


def built(name: str) -> nn.Module:
    """A contestant that is trained, by its name; its first numbers come from torch's seed."""
    encoder = Features(resnet((16, 32), (1, 1), basic=True, stem="deep", stem_dim=16, num_classes=0), (0, 1, 2))
    if name.startswith("pooled"):
        return Pooled(encoder, (16, 16, 32), 320)
    wanted = "reference" in name
    return TOPIQ(
        wanted, dim=32, num_heads=2, drop=0.0, encoder=encoder, freeze_norms=False, mean=(0.5,) * 3, std=(0.5,) * 3
    )


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 300,
    seeds: Sequence[int] = (1, 2, 3),
    taught: int = 180,
    tested: int = 108,
) -> dict[str, Any]:
    """Train what is trained on five photographs, and rank crops of the two others; every seed holds out another pair.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-quality-cpu.svg`` and ``tasks-quality-predictions.png``.
        steps, seeds: of training.
        taught, tested: crops of each photograph.

    Returns:
        Plain values, for JSON.
    """
    spearman = require("scipy.stats").spearmanr
    metrics = require("skimage.metrics")
    found = photos()
    all_photos = [F.avg_pool2d(p.float().permute(2, 0, 1) / 255, 2) for p in (*found.train, *found.test)]
    held: dict[Any, Any] = {}

    def parts(seed: int) -> Any:
        if ("parts", seed) not in held:
            g = torch.Generator().manual_seed(10_000 + seed)
            order = torch.randperm(len(all_photos), generator=g).tolist()
            held["parts", seed] = tuple(
                graded([all_photos[i] for i in rows], count, g)
                for rows, count in ((order[2:], taught), (order[:2], tested))
            )
        return held["parts", seed]

    def scores(name: str, seed: int) -> tuple[Tensor, int]:
        """Of the crops that were held out, and how many numbers were trained."""
        train, (x, reference, *_) = parts(seed)
        if name == "PSNR":
            return -(x - reference).square().mean((1, 2, 3)), 0
        if name == "SSIM":
            pairs = zip(reference.movedim(1, -1).numpy(), x.movedim(1, -1).numpy(), strict=True)
            found = [metrics.structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]
            return torch.tensor(found), 0
        if (name, seed) not in held:
            torch.manual_seed(seed)
            model, full = built(name), "reference" in name

            def batch(g: torch.Generator) -> list[Tensor]:
                rows = torch.randint(0, len(train[0]), (12,), generator=g)
                return [t[rows] for t in train[:3]]

            def loss(m: nn.Module, given: list[Tensor]) -> Tensor:
                y = m(*given[: 1 + full])[:, 0]
                return (y - given[2]).square().mean() + norm_in_norm_loss(y, given[2])

            fit(model, batch, loss, steps, lr=3e-3, seed=seed)
            with torch.no_grad():
                given = [t.split(64) for t in (x, reference)[: 1 + full]]
                held[name, seed] = (
                    torch.cat([model.eval()(*p)[:, 0] for p in zip(*given, strict=True)]),
                    parameters(model),
                )
        return held[name, seed]

    def run(name: str, seed: int) -> dict[str, float]:
        given, count = scores(name, seed)
        _, (_, _, quality, which) = parts(seed)
        each = {k: 100 * spearman(given[which == i], quality[which == i])[0] for i, k in enumerate(KINDS)}
        return {"srocc": 100 * spearman(given, quality)[0], **each, "parameters": count}

    result = study(NAMES, run, "srocc", "pooled", seeds, progress, keep, (steps, taught, tested))
    result |= {"question": QUESTION, "machine": machine(), "steps": steps, "taught": taught, "tested": tested}
    if pictures is not None:
        curves = {
            r["name"]: [
                (label, r[k]["mean"], r[k]["half"]) for label, k in (("all", "srocc"), *((k, k) for k in KINDS))
            ]
            for r in result["rows"]
        }
        place = Path(pictures)
        picture(
            place / "tasks-quality-cpu.svg",
            curves,
            "",
            "Spearman correlation, %",
            "rank of grades on unseen photographs",
        )
        (x, _, quality, which), seed = parts(seeds[0])[1], seeds[0]
        some = [i for i in (0, 6, 12, 7, 13, 8, 14, 17) if i < len(x)]
        told = {name: scores(name, seed)[0] for name in NAMES[:2]}
        titles = [
            f"{KINDS[int(which[i])]}: {quality[i]:.1f}, " + ", ".join(f"{n} {told[n][i]:.2f}" for n in NAMES[:2])
            for i in some
        ]
        sheet(
            place / "tasks-quality-predictions.png", {"true quality, and what is said": x[some]}, titles, 1.1, 14, 128
        )
    return result


def table(found: Mapping[str, Any]) -> str:
    """The results as a table of a page."""
    lines = ["| score | all, % | against pooled | blur | noise | JPEG | parameters |", "|---" * 7 + "|"]
    for row in found["rows"]:
        gap = "" if row["name"] == NAMES[0] else f"{row['against']['mean']:+.1f} ± {row['against']['half']:.1f}"
        beside = " | ".join(told(row, k) for k in KINDS)
        count = f"{row['parameters']['mean']:,.0f}"
        lines.append(f"| {row['name']} | {told(row, 'srocc')} | {gap} | {beside} | {count} |")
    return "\n".join(lines)
