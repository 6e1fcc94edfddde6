"""The small generators themselves: does what they draw show what prompts ask for?

``attnlib bench --suite diffusion-generators --out benchmarks/results`` writes
``diffusion-generators-cpu.json`` and its pictures. Every generator has bars, written down before it was trained; a
technique is measured on a generator only where its bar is met, and a bar that is missed is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...clock import machine
from ...small import Progress, interval, sheet
from ...stats import mean_interval
from ...worlds import judge as judging
from ...worlds import models, painter
from ...worlds.prompts import draw, prompts
from ._judged import judged

QUESTION = "Do the trained generators show what prompts ask for, well enough to measure techniques on them?"
PARTS = ("vae", "text", "unet", "judge")

#: To be chosen on ``"dev"``, once there are trained generators.
SETTINGS: dict[str, dict[str, Any]] = {
    "unet": {"num_inference_steps": 20, "guidance_scale": 4.0},
    "sd3": {"num_inference_steps": 20, "guidance_scale": 3.0},
    "dit": {"num_inference_steps": 20, "guidance_scale": 3.0},
    "pixel": {"num_inference_steps": 50, "guidance_scale": 4.0},
}
#: By set of prompts, the metric and the least (and, where it must leave room, the largest) share that it must reach.
BARS: dict[str, tuple[str, float, float]] = {
    "one": ("right", 0.95, 1.0), "places": ("right", 0.85, 1.0), "two": ("present", 0.80, 1.0),
    "held-out": ("bound", 0.50, 0.85),
}  # fmt: skip


def enlarged(images: torch.Tensor) -> torch.Tensor:
    """Pictures as large as the judge's."""
    if images.shape[-1] == painter.SIDE:
        return images
    size = (painter.SIDE, painter.SIDE)
    return torch.nn.functional.interpolate(images, size, mode="bicubic", align_corners=False).clamp(0, 1)


@torch.no_grad()
def reconstruction(vae: Any, judge: judging.Judge, count: int, part: str = "test") -> dict[str, Any]:
    """How well pictures come through the autoencoder: decibels, and what a judge says of originals and copies."""
    scenes = painter.sample(count, part)
    images = painter.paint(scenes, part).images
    copies = torch.cat([vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample for x in images.split(50)])
    copies = (copies / 2 + 0.5).clamp(0, 1)
    decibels = -10 * (copies - images).square().mean((1, 2, 3)).log10()
    said = judging.said(scenes)
    first, second = ([float(v.right) for v in judge.judge(x, said)] for x in (images, copies))
    gap = [b - a for a, b in zip(first, second, strict=True)]
    return {
        "psnr": interval(mean_interval(decibels.tolist())), "originals": interval(mean_interval(first)),
        "copies": interval(mean_interval(second)), "gap": interval(mean_interval(gap)),
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    names: Sequence[str] | None = None,
    kinds: Sequence[str] = ("one", "places", "two", "held-out", "relations", "counts", "three"),
    count: int = 160,
    part: str = "test",
    folder: str | Path | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure the autoencoder and every generator.

    Args:
        progress: told of every batch.
        keep: file to go on from.
        pictures: folder for ``diffusion-generators-cpu.png``.
        names: of :data:`attnlib.bench.worlds.models.PIPELINES`; by default those that are trained.
        kinds: of :data:`attnlib.bench.worlds.prompts.KINDS`; the class-conditional generator draws ``"one"`` only.
        count: prompts of every kind.
        part: of prompts and scenes.
        folder: of trained parts.
        settings: of pipelines' calls, by name; :data:`SETTINGS` by default.

    Returns:
        Plain values, for JSON: ``reconstruction``, ``generators`` by name and set of prompts, and ``bars``.
    """
    judge = judging.load(folder)
    chosen = {**SETTINGS, **(settings or {})}
    result: dict[str, Any] = {"part": part, "settings": chosen, "generators": {}, "bars": {}}
    result["reconstruction"] = found = reconstruction(models.part("vae", folder), judge, 4 * count, part)
    result["bars"]["reconstruction"] = {
        "psnr": found["psnr"]["mean"], "met": found["psnr"]["mean"] >= 28 and found["gap"]["mean"] >= -0.01,
    }  # fmt: skip
    shown: dict[str, torch.Tensor] = {}
    if names is None:
        names = [n for n in models.PIPELINES if not models.missing_parts([n], folder)]
    for name in names:
        pipe = models.pipeline(name, folder)
        result["generators"][name] = own = {}
        result["bars"][name] = {}
        for kind in kinds if name != "dit" else [k for k in kinds if k == "one"]:
            asked = prompts(kind, count, part)

            def sketch(some: Sequence[painter.Prompt], seeds: Sequence[int], name: str = name, pipe: Any = pipe) -> Any:
                return enlarged(draw(pipe, some, seeds, batch=len(some), **chosen[name]))

            found = judged(
                {name: sketch}, asked, None, judge, 16, progress=progress, keep=keep, key=[part, kind, chosen[name]]
            )  # fmt: skip
            own[kind] = found["rows"][0]
            if kind in BARS:
                metric, low, high = BARS[kind]
                share = own[kind][metric]["mean"]
                result["bars"][name][kind] = {"metric": metric, "share": share, "bar": [low, high],
                                              "met": low <= share <= high}  # fmt: skip
            if pictures is not None:
                shown[f"{name}: {kind}"] = sketch(asked[:8], range(min(8, count)))
    if pictures is not None and shown:
        sheet(Path(pictures) / "diffusion-generators-cpu.png", shown, colours=64)
    return {**result, "machine": machine()}
