"""Editing and composition: is the wanted change made, and the rest kept? Does a rectangle stay free?

``attnlib bench --suite diffusion-editing --out benchmarks/results`` writes ``diffusion-editing-cpu.json`` and its
pictures. Scenes are painted, so that the true mask of what is edited is known; every editor starts from the
same inversion, or from the same latents where it needs none. Three lines: how far sampling misses an inverted picture;
edits of one word; pictures with a thing put into them. A fourth draws prompts with a rectangle kept free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnlib

from ....steer.diffusion.attencraft import ssim
from ....steer.diffusion.dynamic_prompt import DynamicPrompt, LearntPrompt
from ....steer.diffusion.edit import PromptToPrompt
from ....steer.diffusion.invert import NullText, ddim_invert, ddim_sample, denoiser, noise_predictor, null_text
from ....steer.diffusion.primecomposer import PrimeComposer
from ....steer.diffusion.textcengen import TextCenGen, grey
from ....steer.diffusion.uniform_maps import UniformMaps, masked_edit
from ....steer.diffusion.vimaedit import ViMAEdit
from ...clock import machine, now
from ...small import Progress, interval, sheet
from ...stats import mean_interval, paired_interval
from ...store import identity
from ...worlds import models, painter
from ...worlds.judge import load
from ...worlds.painter import Prompt
from ...worlds.prompts import prompts
from .generators import SETTINGS

QUESTION = "Do editors that copy attention make the wanted change and keep the rest?"
PARTS = ("vae", "text", "unet", "judge")

#: Rectangle that is to stay free, (top, left, bottom, right).
REGION = (0.0, 0.0, 0.4, 1.0)


@dataclass(frozen=True)
class Task:
    """A picture and how it is to be changed.

    Args:
        source, target: prompts that differ in a colour or a shape.
        scene: that is painted, one.
        image: (3, h, w) in [0, 1].
        mask: (h, w) what the change may touch.
        latents: (1, C, h, w) of the image.
        path: of its inversion under the source prompt, the clean ones first.
    """

    source: Prompt
    target: Prompt
    scene: painter.Scenes
    image: Tensor
    mask: Tensor
    latents: Tensor
    path: list[Tensor]

    @property
    def words(self) -> list[list[str]]:
        """The thing, in both prompts."""
        return [[p.wants[0].shape or "thing"] for p in (self.source, self.target)]


class Studio:
    """A pipeline with its settings, and what the lines need of it."""

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]):
        self.pipe, self.judge = models.pipeline("unet", folder), load(folder)
        self.steps, self.guidance = settings["num_inference_steps"], settings["guidance_scale"]

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        return self.pipe.encode_prompt(prompt, "cpu", 1, False)[0]

    @torch.no_grad()
    def encoded(self, image: Tensor) -> Tensor:
        return self.pipe.vae.encode(image[None] * 2 - 1).latent_dist.mode() * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        images = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def predict(self, prompt: str, guided: bool = False, **more: Any) -> Any:
        uncond = self.text("") if guided else None
        return noise_predictor(self.pipe.unet, self.text(prompt), uncond, self.guidance, **more)

    def sampled(self, texts: Sequence[str], latents: Tensor, *attached: Any) -> Tensor:
        """Pictures of a call of the pipeline from given noise."""
        given = dict(
            latents=latents.expand(len(texts), -1, -1, -1).contiguous(), num_inference_steps=self.steps,
            guidance_scale=self.guidance, output_type="latent",
        )  # fmt: skip
        if not attached:
            return self.decoded(self.pipe(list(texts), **given).images)
        with attnlib.attach(self.pipe, *attached):
            return self.decoded(self.pipe(list(texts), **given).images)

    def task(self, prompt: Prompt, number: int, part: str) -> Task:
        """The painted scene of a prompt with one thing, whose colour or shape is to be another's."""
        want = prompt.wants[0]
        colours, shapes = list(painter.COLOURS), list(painter.GEOMETRIC)
        other = replace(want, colour=colours[(colours.index(want.colour or colours[0]) + 3) % len(colours)])
        if number % 2 and want.shape in shapes:
            other = replace(want, shape=shapes[(shapes.index(want.shape) + 2) % len(shapes)])
        target = painter.write([other], background=prompt.background)
        scene = painter.sample([number], part, wants=[prompt], plain=True)
        done = painter.paint(scene, part)
        mask = F.max_pool2d(done.masks[:, :1], 7, 1, 3)[0, 0] > 0.05
        latents = self.encoded(done.images[0])
        path = ddim_invert(self.predict(prompt.text), self.pipe.scheduler, latents, self.steps)
        return Task(prompt, target, scene, done.images[0], mask, latents, path)


# ---- editors: from a studio and a task to a picture


def plain(studio: Studio, task: Task) -> Tensor:
    """The target prompt from the inverted noise."""
    return studio.sampled([task.target.text], task.path[-1])[0]


def _control() -> PromptToPrompt:
    return PromptToPrompt("replace", cross=0.8, self_maps=0.4)


def prompt_to_prompt(studio: Studio, task: Task) -> Tensor:
    return studio.sampled([task.source.text, task.target.text], task.path[-1], _control())[1]


def with_null_text(studio: Studio, task: Task) -> Tensor:
    empty = null_text(
        denoiser(studio.pipe.unet), studio.pipe.scheduler, task.path, studio.text(task.source.text), studio.text(""),
        studio.guidance,
    )  # fmt: skip
    return studio.sampled([task.source.text, task.target.text], task.path[-1], NullText(empty), _control())[1]


def dpl(studio: Studio, task: Task) -> Tensor:
    learn = DynamicPrompt(task.words[0], path=task.path, inner=5, null_inner=10, resolution=16)
    studio.sampled([task.source.text], task.path[-1], learn)
    held = [LearntPrompt.of(learn)] if task.words[0] == task.words[1] else [NullText(learn.empty)]
    return studio.sampled([task.source.text, task.target.text], task.path[-1], *held, _control())[1]


def vimaedit(studio: Studio, task: Task) -> Tensor:
    it = ViMAEdit(task.latents, "replace", blend=task.words, resolution=16, between_resolution=16)
    noise = torch.randn(task.latents.shape, generator=torch.Generator().manual_seed(0))
    return studio.sampled([task.source.text, task.target.text], noise, it)[1]


def uniform(studio: Studio, task: Task) -> Tensor:
    both = torch.cat([studio.text(task.source.text), studio.text(task.target.text)])
    with attnlib.attach(studio.pipe.unet, UniformMaps(pass_name="uniform")) as session:
        flat = noise_predictor(studio.pipe.unet, studio.text(""), session=session, pass_name="uniform")
        noise = ddim_invert(flat, studio.pipe.scheduler, task.latents, studio.steps)[-1]
        edit = noise_predictor(studio.pipe.unet, both, studio.text(""), studio.guidance, session, "text")
        pair, _ = masked_edit(
            edit, flat, studio.pipe.scheduler, noise.expand(2, -1, -1, -1), noise, studio.steps, below=400
        )
    return studio.decoded(pair[1:])[0]


EDITORS: dict[str, Callable[[Studio, Task], Tensor]] = {
    "plain": plain, "prompt-to-prompt": prompt_to_prompt, "null text": with_null_text, "DPL": dpl,
    "ViMAEdit": vimaedit, "uniform maps": uniform,
}  # fmt: skip


def kept(image: Tensor, edited: Tensor, mask: Tensor) -> dict[str, float]:
    """How much is as it was outside a mask: decibels, and SSIM with the inside made equal."""
    outside = ~mask
    error = (image - edited)[:, outside].square().mean().clamp(min=1e-10)
    same = torch.where(mask, image, edited)
    return {"decibels": float(-10 * error.log10()), "ssim": ssim(grey(image), grey(same))}


def inverted(studio: Studio, task: Task) -> dict[str, dict[str, float]]:
    """Mean squared error of latents after an inversion and back, by how both are done."""
    scheduler, pipe = studio.pipe.scheduler, studio.pipe
    back = {"text": ddim_sample(studio.predict(task.source.text), scheduler, task.path[-1], studio.steps)}
    back["guided"] = ddim_sample(studio.predict(task.source.text, True), scheduler, task.path[-1], studio.steps)
    with attnlib.attach(pipe.unet, UniformMaps()):
        flat = studio.predict("")
        noise = ddim_invert(flat, scheduler, task.latents, studio.steps)[-1]
        back["uniform maps"] = ddim_sample(flat, scheduler, noise, studio.steps)
    text, empty = studio.text(task.source.text), studio.text("")
    learnt = null_text(denoiser(pipe.unet), scheduler, task.path, text, empty, studio.guidance)
    with attnlib.attach(pipe, NullText(learnt)):
        back["guided, null text"] = pipe(
            task.source.text, latents=task.path[-1], num_inference_steps=studio.steps,
            guidance_scale=studio.guidance, output_type="latent",
        ).images  # fmt: skip
    return {name: {"error": float((z - task.latents).square().mean())} for name, z in back.items()}


def composed(studio: Studio, task: Task, number: int, part: str) -> tuple[dict[str, dict[str, float]], Tensor]:
    """The thing of a task on another background: pasted into the latents, and composed."""
    ground = next(b for b in painter.PLAIN if b != painter.BACKGROUNDS[int(task.scene.background)])
    asked = painter.write([replace(task.source.wants[0], place=None)], background=ground)
    scene = painter.sample([number], part, wants=[asked], plain=True)
    behind = painter.paint(scene.change(count=torch.zeros_like(scene.count)), part).images[0]
    latents = studio.encoded(behind)
    path = ddim_invert(studio.predict(""), studio.pipe.scheduler, latents, studio.steps)
    reference = ddim_invert(studio.predict(""), studio.pipe.scheduler, task.latents, studio.steps)
    small = F.adaptive_max_pool2d(task.mask[None, None].float(), latents.shape[-2:])[0, 0] > 0
    made = PrimeComposer(path, reference, small, words=task.words[0])
    pictures = {
        "pasted": studio.decoded(torch.where(small, task.latents, latents))[0],
        "PrimeComposer": studio.sampled([asked.text], made.start(number), made)[0],
    }
    found = {}
    for name, picture in pictures.items():
        (verdict,) = studio.judge.judge(picture[None], [asked])
        found[name] = {"right": float(verdict.right), **kept(behind, picture, task.mask)}
    return found, torch.stack(list(pictures.values()))


def free(studio: Studio, asked: Prompt, seed: int) -> tuple[dict[str, dict[str, float]], Tensor]:
    """A prompt drawn with a rectangle kept free, and without."""
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed))
    found, pictures = {}, []
    for name, attached in (
        ("plain", []),
        ("TextCenGen", [TextCenGen(REGION, [w.shape or "thing" for w in asked.wants])]),
    ):
        picture = studio.sampled([asked.text], noise, *attached)[0]
        pictures.append(picture)
        (verdict,), (things,) = studio.judge.judge(picture[None], [asked]), studio.judge.look(picture[None])
        top, bottom = REGION[0] * painter.SIDE, REGION[2] * painter.SIDE
        empty = all(not (t.box[1] < bottom - 2 and t.box[3] > top + 2) for t in things)
        found[name] = {"free": float(empty and bool(things)), "present": float(verdict.present)}
    return found, torch.stack(pictures)


# ---- the lines

LINES = ("inversion", "editing", "composition", "free rectangle")
BASELINES = {"inversion": "text", "editing": "plain", "composition": "pasted", "free rectangle": "plain"}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    lines: Sequence[str] = LINES,
    count: int = 24,
    part: str = "test",
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Edit, compose and draw, and let the judge and the truth say what came of it.

    Args:
        progress: told of every scene.
        keep: file to go on from.
        pictures: folder for ``diffusion-editing-cpu.png``.
        lines: of :data:`LINES`.
        count: scenes of every line.
        part: of scenes and prompts.
        folder: of trained parts.
        settings: of the pipeline's call.
        names: of :data:`EDITORS`, all by default.

    Returns:
        Plain values, for JSON: by line, rows with 95 % intervals over scenes and paired differences from the baseline.
    """
    chosen = {**SETTINGS["unet"], **(settings or {})}
    studio = Studio(folder, chosen)
    wanted = list(EDITORS if names is None else names)
    file = None if keep is None else Path(keep)
    held: dict[str, Any] = {}
    if file is not None and file.exists():
        held = {r["key"]: r["found"] for r in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    result: dict[str, Any] = {"part": part, "settings": chosen, "lines": {}}
    shown: dict[str, list[Tensor]] = {}
    asked = prompts("one", count, part)
    for line in lines:
        rows: dict[str, dict[int, dict[str, float]]] = {}
        for number, prompt in enumerate(asked):
            key = identity([line, number, part, chosen, wanted if line == "editing" else None])
            if key not in held:
                began = now()
                found: dict[str, dict[str, float]] = {}
                if line == "free rectangle":
                    found, _ = free(studio, prompt, number)
                else:
                    task = studio.task(prompt, number, part)
                    if line == "inversion":
                        found = inverted(studio, task)
                    elif line == "composition":
                        found, _ = composed(studio, task, number, part)
                    else:
                        for name in wanted:
                            picture = EDITORS[name](studio, task)
                            (verdict,) = studio.judge.judge(picture[None], [task.target])
                            found[name] = {"right": float(verdict.right), **kept(task.image, picture, task.mask)}
                            shown.setdefault(name, []).append(picture)
                held[key] = found
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps({"key": key, "found": found}) + "\n")
                if progress is not None:
                    progress(f"{line}, scene {number + 1} of {count}: {now() - began:.1f} s")
            for name, values in held[key].items():
                rows.setdefault(name, {})[number] = values
        result["lines"][line] = [_row(name, own, rows[BASELINES[line]]) for name, own in rows.items()]
    if pictures is not None and shown:
        sheet(
            Path(pictures) / "diffusion-editing-cpu.png", {n: torch.stack(p[:8]) for n, p in shown.items()},
            [p.text for p in asked[:8]],
        )  # fmt: skip
    return {**result, "machine": machine()}


def _row(name: str, own: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    metrics = list(next(iter(own.values())))
    row: dict[str, Any] = {"name": name}
    row |= {m: interval(mean_interval([v[m] for v in own.values()])) for m in metrics}
    if own is not base:
        row["against"] = {}
        for m in metrics:
            gap = paired_interval({i: v[m] for i, v in own.items()}, {i: v[m] for i, v in base.items()})
            row["against"][m] = None if gap is None else interval(gap)
    return row
