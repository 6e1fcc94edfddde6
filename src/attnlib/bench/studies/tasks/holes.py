"""Square holes in photographs: PEPSI scaled down, with its patch attention and without, beside biharmonic inpainting.

Two worlds. *Photographs*: crops, of which the test sees other thirds than the training. *Repeating*: made-up textures
of random periods, in which a patch elsewhere says exactly what is missing. The network without patch attention is the
same in every number: what it would have copied is the map as the encoder left it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.restore.masks import square_masks
from ....models.restore.pepsi import PEPSI, ContextAttention
from ...clock import machine
from ...data.files import require
from ...data.worlds import photo_crops
from ...small import Progress, fit, parameters, picture, psnr, sheet, study, told

QUESTION = "Does patch attention fill holes better than the same network without it, and than biharmonic inpainting?"
BIHARMONIC, PLAIN, OURS = "biharmonic", "without patch attention", "PEPSI"
NAMES = (BIHARMONIC, PLAIN, OURS)


def photographs(count: int, side: int, part: str, generator: torch.Generator) -> Tensor:
    """Grey crops (count, 1, side, side) in [0, 1]; see :func:`attnlib.bench.data.worlds.photo_crops`."""
    return photo_crops(count, side, part, generator).mean(1, keepdim=True)


def repeating(count: int, side: int, part: str, generator: torch.Generator) -> Tensor:
    """Textures (count, 1, side, side) in [0, 1]: a smooth random tile of 16 or 24 pixels either way, all over.

    Args:
        count, side: of the textures.
        part: not read: every texture is a new one.
        generator: of what is drawn.
    """
    out = []
    for _ in range(count):
        height, width = (8 * torch.randint(2, 4, (2,), generator=generator)).tolist()
        tile = torch.rand(1, 1, height // 8, width // 8, generator=generator)
        tile = F.interpolate(F.pad(tile, (1, 1, 1, 1), mode="circular"), scale_factor=8, mode="bilinear")
        tile = tile[0, :, 8:-8, 8:-8]
        tile = (tile - tile.amin()) / (tile.amax() - tile.amin())
        rows, columns = torch.arange(side) % height, torch.arange(side) % width
        out.append(tile[:, rows][:, :, columns])
    return torch.stack(out)


WORLDS = {"photographs": photographs, "repeating": repeating}


class Unfilled(ContextAttention):
    """Nothing is copied: the map stays as the encoder left it, and the rest is the same."""

    def filled(self, x: Tensor, known: Tensor) -> Tensor:
        return x


def build(name: str, dims: Sequence[int] = (8, 16, 32, 64)) -> PEPSI:
    """A contestant; both have the same numbers at the start, from the same seed."""
    model = PEPSI(1, dims, (2, 4), valid_only=True, coarse=0.0)
    if name == PLAIN:
        model.attention.__class__ = Unfilled
    return model


def biharmonic(images: Tensor, known: Tensor) -> Tensor:
    """scikit-image's, of grey images (n, 1, H, W) in [0, 1]."""
    inpaint: Any = require("skimage.restoration").inpaint_biharmonic
    shown = images.masked_fill(~known, 0.0)
    made = [torch.from_numpy(inpaint(x[0].numpy(), ~k[0].numpy())) for x, k in zip(shown, known, strict=True)]
    return torch.stack(made).float()[:, None]


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    batch: int = 4,
    side: int = 64,
    hole: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 64,
    lr: float = 3e-3,
    worlds: Sequence[str] = tuple(WORLDS),
) -> dict[str, Any]:
    """Train both networks in each world.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-holes-cpu.svg`` and ``tasks-holes-predictions.png``, what the last seed fills.
        steps, batch, seeds, tested, lr: of training and of the test.
        side, hole: pixels a side of crops and of their holes.
        worlds: of :data:`WORLDS`.

    Returns:
        Plain values, for JSON: PSNR inside the hole, in decibels.
    """
    result: dict[str, Any] = {
        "question": QUESTION, "machine": machine(), "steps": steps, "batch": batch, "side": side, "hole": hole,
        "tested": tested, "lr": lr, "worlds": {},
    }  # fmt: skip
    rows: dict[str, list[Tensor]] = {}
    for world in worlds:
        draw = WORLDS[world]
        shown: dict[str, Tensor] = {}

        def run(name: str, seed: int, draw: Any = draw, shown: dict[str, Tensor] = shown) -> dict[str, float]:
            g = torch.Generator().manual_seed(10_000 + seed)
            test = draw(tested, side, "test", g)
            known = square_masks(tested, (side, side), hole, g)
            if name == BIHARMONIC:
                made, count = biharmonic(test, known), 0
            else:
                torch.manual_seed(seed)
                model = build(name)

                def some(generator: torch.Generator) -> tuple[Tensor, Tensor]:
                    images = draw(batch, side, "train", generator) * 2 - 1
                    return images, square_masks(batch, (side, side), hole, generator)

                def loss(m: Any, given: tuple[Tensor, Tensor]) -> Tensor:
                    total: Tensor = sum(m.loss(m(*given), given[0]).values())  # type: ignore[assignment]
                    return total

                fit(model, some, loss, steps, lr=lr, seed=seed)
                made = torch.cat([
                    model.predict(x * 2 - 1, k) / 2 + 0.5
                    for x, k in zip(test.split(32), known.split(32), strict=True)
                ])  # fmt: skip
                count = parameters(model)
            shown |= {"input": torch.where(known, test, 1.0)[:4], "truth": test[:4], name: made[:4]}
            return {"psnr": psnr(made, test, ~known), "parameters": count}

        found = study(NAMES, run, "psnr", PLAIN, seeds, progress, keep, (world, steps, batch, side, hole, tested, lr))
        result["worlds"][world] = found
        for name in ("input", "truth", *NAMES):
            if name in shown:
                rows.setdefault(name, []).append(shown[name])
    if pictures is not None:
        curves = {
            name: [
                (world, r["psnr"]["mean"], r["psnr"]["half"])
                for world, found in result["worlds"].items()
                for r in found["rows"]
                if r["name"] == name
            ]
            for name in NAMES
        }
        picture(Path(pictures) / "tasks-holes-cpu.svg", curves, "", "PSNR inside the hole, dB", "square holes")
        if rows:
            sheet(
                Path(pictures) / "tasks-holes-predictions.png", {n: torch.cat(v) for n, v in rows.items()}, zoom=0.75,
                colours=64,
            )  # fmt: skip
    return result


def table(found: Mapping[str, Any]) -> str:
    """The results as a table of a page."""
    lines = ["| world | filled by | PSNR in the hole, dB | against without | parameters |", "|---|---|---|---|---|"]
    for world, part in found["worlds"].items():
        for row in part["rows"]:
            gap = "" if row["name"] == PLAIN else f"{told(row, 'against', 2)}"
            gap = gap if gap.startswith("-") or not gap else f"+{gap}"
            count = f"{row['parameters']['mean']:,.0f}"
            lines.append(f"| {world} | {row['name']} | {told(row, 'psnr', 2)} | {gap} | {count} |")
    return "\n".join(lines)
