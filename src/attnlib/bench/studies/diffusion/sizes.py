"""Above the size of training: does a picture of more pixels still show as many things as were asked for?

``attnlib bench --suite diffusion-sizes --out benchmarks/results`` writes ``diffusion-sizes-cpu.json`` and its pictures.
Prompts of one thing and of two are drawn on one and a half times and twice as many pixels a side as the generator saw.
Pictures are brought back to 64 pixels before the judge looks, so that a thing that grew with its picture is as large as
it ever was, and one that did not is small or doubled. The sceptic's baseline enlarges pictures of the size of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnlib

from ....steer.diffusion.c_upscale import CUpscale, PromptMaps
from ....steer.diffusion.hidiffusion import HiDiffusion, Place, Table
from ....steer.diffusion.tiles import TiledDenoiser
from ....steer.diffusion.variable_size import VariableSizeScale
from ...clock import machine
from ...small import Progress, sheet
from ...worlds import models, painter
from ...worlds.judge import load
from ...worlds.painter import Prompt
from ...worlds.prompts import draw, prompts
from ._judged import Draw, drawing, judged
from .generators import SETTINGS

QUESTION = "Are there as many things as asked for in pictures of more pixels than the generator saw?"
PARTS = ("vae", "text", "unet", "judge")
BASELINE, ENLARGED = "plain", "drawn small, enlarged"
#: Times the pixels a side at training.
FACTORS = (1.5, 2.0)
#: What HiDiffusion does in the small U-Net: its one downsampling takes four pixels at a time, windows are of the top.
TABLE = Table(2, Place("conv", 0), None, ("up_blocks.1.attentions.*.transformer_blocks.0.attn1",))
#: Of C-Upscale, to be chosen on ``"dev"``: how much of the noise the enlarged picture gets.
STRENGTH = 0.7


def smaller(images: Tensor) -> Tensor:
    """As large as the judge's, by means over pixels."""
    return F.interpolate(images, (painter.SIDE, painter.SIDE), mode="area")


def contestants(pipe: Any, side: int, given: dict[str, Any]) -> dict[str, Draw]:
    """By name, who draws prompts from seeds on ``side`` pixels a side."""
    from diffusers import StableDiffusionImg2ImgPipeline

    large: dict[str, Any] = {**given, "height": side, "width": side}

    def enlarged(some: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        small = draw(pipe, some, seeds, len(some), **given)
        return F.interpolate(small, (side, side), mode="bicubic", antialias=True).clamp(0, 1)

    def upscaled(some: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        second = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        second.set_progress_bar_config(disable=True)
        out = []
        for prompt, seed in zip(some, seeds, strict=True):
            with attnlib.attach(pipe, maps := PromptMaps()):
                small = draw(pipe, [prompt], [seed], 1, **given)
            structure = CUpscale.encode(second, small, (side, side))
            image = F.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)
            with attnlib.attach(second, CUpscale(structure=structure, maps=maps)):
                found = second(
                    prompt.text, image=image, strength=STRENGTH, output_type="pt",
                    generator=torch.Generator().manual_seed(seed), **given,
                ).images  # fmt: skip
            out.append(found.float().clamp(0, 1))
        return torch.cat(out)

    return {
        BASELINE: drawing(pipe, lambda some: [], **large),
        ENLARGED: enlarged,
        "scaled queries": drawing(pipe, lambda some: [VariableSizeScale()], **large),
        "HiDiffusion": drawing(pipe, lambda some: [HiDiffusion(TABLE)], **large),
        "tiles": drawing(pipe, lambda some: [TiledDenoiser()], **large),
        "C-Upscale": upscaled,
    }


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    names: Sequence[str] | None = None,
    factors: Sequence[float] = FACTORS,
    kinds: Sequence[str] = ("one", "two"),
    count: int = 32,
    part: str = "test",
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """Draw above the size of training in several ways, and let the judge count.

    Args:
        progress: told of every batch.
        keep: file to go on from.
        pictures: folder for ``diffusion-sizes-cpu.png``.
        names: of :func:`contestants`, all by default.
        factors: times the pixels a side at training.
        kinds: of :data:`attnlib.bench.worlds.prompts.KINDS`.
        count: prompts of every kind.
        part: of prompts.
        folder: of trained parts.
        settings: of the pipeline's call.
        batch: prompts at a time.

    Returns:
        Plain values, for JSON: by factor and kind, rows with intervals and paired differences from the plain pipeline.
    """
    chosen = {**SETTINGS["unet"], **(settings or {})}
    pipe, judge = models.pipeline("unet", folder), load(folder)
    result: dict[str, Any] = {"question": QUESTION, "part": part, "settings": {**chosen, "strength": STRENGTH}}
    result["factors"] = {}
    shown: dict[str, Tensor] = {}
    for factor in factors:
        side = round(painter.SIDE * factor)
        made = contestants(pipe, side, chosen)
        made = made if names is None else {name: made[name] for name in names}
        result["factors"][f"{factor:g}"] = own = {}
        for kind in kinds:
            asked = prompts(kind, count, part)

            def seen(sketch: Draw) -> Draw:
                return lambda some, seeds: smaller(sketch(some, seeds))

            own[kind] = judged(
                {name: seen(sketch) for name, sketch in made.items()}, asked, BASELINE, judge, batch,
                progress=progress, keep=keep, key=[part, kind, factor, chosen, STRENGTH],
            )  # fmt: skip
        if pictures is not None and factor == factors[-1]:
            asked = prompts(kinds[0], min(8, count), part)
            shown = {name: sketch(asked, range(len(asked))) for name, sketch in made.items()}
            sheet(Path(pictures) / "diffusion-sizes-cpu.png", shown, [p.text for p in asked])
    return {**result, "machine": machine()}
