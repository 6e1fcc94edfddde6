"""Whether maps point at the evidence: questions about one thing of a scene, answered by the small multimodal model.

``attnlib bench --suite attribution --out benchmarks/results`` measures again what ``attribution-cpu.json`` holds. In
every scene stand several things, the evidence is the cell of one, and only questions that the model answers rightly
count. A map of the answer's logit over 8 x 8 patches is held to three tests:

- *pointing*: its largest patch lies in the cell of the thing that is asked about, and not in another thing's;
- *deletion*: by how much the answer's log-probability falls when the four patches with the largest values are painted
  over with background;
- *randomised*: rank correlation of the map with that of the same model with shuffled weights, which knows nothing: a
  map that hardly changes shows the picture, not the model.

Beside the library's maps stand noise and, where captum is installed, its own: input times gradient, integrated
gradients, Grad-CAM.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...grids import Layout
from ...look.attribution import (
    grad_cam,
    integrated_gradients,
    map_correlation,
    saliency,
    transformer_relevance,
)
from ..clock import machine
from ..data import scenes
from ..plots import PALETTE, _figure
from ..small import Progress, _write, study

SIDE = scenes.SIDE // scenes.PATCH
#: What the decoder gets of the vision tower, a token per patch.
TOWER, TOKENS = "model.multi_modal_projector", Layout.image(SIDE, SIDE)
KINDS = ("presence", "position", "content", "colour")


class Answers:
    """The model as a function of the picture: logits at the last given token."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[:, -1]


class Asked:
    """Questions of one length about one thing each: tokens up to the word that counts, that word, pictures, cells."""

    def __init__(self, ids: Tensor, target: Tensor, pixels: Tensor, cells: Tensor):
        self.ids, self.target, self.pixels, self.cells = ids, target, pixels, cells

    def only(self, rows: Tensor) -> Asked:
        return Asked(self.ids[rows], self.target[rows], self.pixels[rows], self.cells[rows])


def _about(scene: scenes.Scene, question: scenes.Question) -> int | None:
    """The cell of the only thing that a question is about."""
    for thing in scene.things:
        if question.about in (thing.name, thing.place, thing.name.partition(" ")[2]):
            return thing.cell
    return None


def questions(tokenizer: Any, seed: int, count: int) -> list[Asked]:
    """One question on each of so many test scenes, those of one length together."""
    rows: dict[int, list[tuple[list[int], int, scenes.Scene, int]]] = {}
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        scene = scenes.make_scene(100_000 * (seed + 1) + number, "test")
        kind = KINDS[number % len(KINDS)]
        possible = [(q, c) for q in scenes.questions(scene, kind) if (c := _about(scene, q)) is not None]
        if kind == "presence":
            possible = [(q, c) for q, c in possible if q.answer == "yes"]
        if not possible:
            continue
        question, cell = possible[int(torch.randint(len(possible), (), generator=generator))]
        said = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        ids = tokenizer(scenes.prompt(question.text))["input_ids"] + said[:-1]
        rows.setdefault(len(ids), []).append((ids, said[-1], scene, cell))
    return [
        Asked(torch.tensor([r[0] for r in group]), torch.tensor([r[1] for r in group]),
              scenes.pixel_values([r[2] for r in group]), torch.tensor([r[3] for r in group]))
        for _, group in sorted(rows.items())
    ]  # fmt: skip


def shuffled(model: Any, seed: int) -> Any:
    """The same model, the numbers of every weight in another order."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    return twin.eval()


def _pooled(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) relevance as (B, 8, 8) sums of patches."""
    return F.avg_pool2d(pixels.sum(1, keepdim=True), scenes.PATCH)[:, 0]


Method = Callable[[Any, Asked, int], Tensor]


def _ours(steps: int) -> dict[str, Method]:
    def given(asked: Asked) -> dict[str, Any]:
        return {"target": asked.target, "input_ids": asked.ids, "attention_mask": torch.ones_like(asked.ids)}

    def relevance(attention: str, rest: str = "") -> Method:
        more: dict[str, Any] = {"norm": rest, "activation": rest} if rest else {}
        return lambda model, asked, seed: _pooled(
            transformer_relevance(model, pixel_values=asked.pixels, attention=attention, **more, **given(asked))
        )

    at_tower: dict[str, Any] = {"modules": [TOWER], "layout": TOKENS}
    return {
        "random": lambda model, asked, seed: torch.rand(
            len(asked.ids), SIDE, SIDE, generator=torch.Generator().manual_seed(seed)),
        "gradient x input": relevance("gradient", "gradient"),
        "relevance, attention constant": relevance("constant"),
        "relevance, AttnLRP": relevance("attnlrp"),
        "integrated gradients": lambda model, asked, seed: _pooled(
            integrated_gradients(model, pixel_values=asked.pixels, steps=steps, chunk=64, **given(asked))),
        "NormGrad, tower": lambda model, asked, seed: saliency(
            model, pixel_values=asked.pixels, **at_tower, **given(asked))[TOWER],
        "Grad-CAM, tower": lambda model, asked, seed: grad_cam(
            model, pixel_values=asked.pixels, **at_tower, **given(asked))[TOWER],
    }  # fmt: skip


def _captum(steps: int) -> dict[str, Method]:
    if importlib.util.find_spec("captum") is None:
        return {}
    from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam

    def cam(model: Any, asked: Asked, seed: int) -> Tensor:
        tower = model.get_submodule(TOWER)
        whole = LayerGradCam(Answers(model), tower)
        # Captum means over all axes but the second: tokens where channels are expected, so tokens come out weighted.
        found = whole.attribute(
            asked.pixels, asked.target, (asked.ids,), relu_attributions=True, attr_dim_summation=False
        )
        return TOKENS.split(found.sum(-1))["image"].unflatten(1, (SIDE, SIDE))

    return {
        "captum: input x gradient": lambda model, asked, seed: _pooled(
            InputXGradient(Answers(model)).attribute(
                asked.pixels.clone().requires_grad_(), asked.target, (asked.ids,)).detach()),
        "captum: integrated gradients": lambda model, asked, seed: _pooled(
            IntegratedGradients(Answers(model)).attribute(
                asked.pixels, 0.0, asked.target, (asked.ids,), n_steps=steps, internal_batch_size=64).detach()),
        "captum: Grad-CAM, tower": lambda model, asked, seed: cam(model, asked, seed).detach(),
    }  # fmt: skip


def cell_of(patch: Tensor) -> Tensor:
    """The cell in which a patch lies."""
    half = SIDE // scenes.GRID
    return patch // SIDE // half * scenes.GRID + patch % SIDE // half


def painted(asked: Asked, maps: Tensor, patches: int) -> Tensor:
    """Pictures without their patches of largest values."""
    top = maps.flatten(1).topk(patches).indices
    gone = torch.zeros(len(maps), SIDE * SIDE, dtype=torch.bool).scatter(1, top, True).view(-1, 1, SIDE, SIDE)
    gone = gone.repeat_interleave(scenes.PATCH, 2).repeat_interleave(scenes.PATCH, 3)
    return torch.where(gone, (scenes.BACKGROUND - 0.5) * 2, asked.pixels)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    count: int = 48,
    steps: int = 8,
    patches: int = 4,
    names: Sequence[str] | None = None,
    folder: Path | str | None = None,
) -> dict[str, Any]:
    """Maps of every method, with every seed of scenes and of shuffling.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``attribution-cpu.svg``.
        seeds: of scenes and shuffled weights.
        count: scenes per seed.
        steps: of integrated gradients.
        patches: painted over.
        names: of methods, all by default.
        folder: of the multimodal model, as :func:`attnlib.bench.data.scenes.load_model` takes it.

    Returns:
        Plain values, for JSON.
    """
    model, tokenizer = scenes.load_model(folder)
    model.requires_grad_(False)
    methods = {**_ours(steps), **_captum(steps)}
    methods = {n: methods[n] for n in (methods if names is None else names)}

    @functools.cache
    def drawn(seed: int) -> tuple[list[Asked], list[Tensor], int, Any]:
        groups: list[Asked] = []
        clean: list[Tensor] = []
        total = 0
        for asked in questions(tokenizer, seed, count):
            with torch.no_grad():
                logs = Answers(model)(asked.pixels, asked.ids).log_softmax(-1)
            right = logs.argmax(-1) == asked.target
            total += len(right)
            groups.append(asked.only(right))
            clean.append(logs[right].gather(1, asked.target[right, None])[:, 0])
        return groups, clean, total, shuffled(model, seed)

    def run(name: str, seed: int) -> dict[str, float]:
        hits: list[bool] = []
        falls: list[float] = []
        alike: list[float] = []
        groups, clean, total, twin = drawn(seed)
        for asked, before in zip(groups, clean, strict=True):
            if not len(asked.ids):
                continue
            maps = methods[name](model, asked, seed).detach()
            hits += (cell_of(maps.flatten(1).argmax(1)) == asked.cells).tolist()
            with torch.no_grad():
                after = Answers(model)(painted(asked, maps, patches), asked.ids).log_softmax(-1)
            falls += (before - after.gather(1, asked.target[:, None])[:, 0]).tolist()
            against = methods[name](twin, asked, seed + 1000).detach()
            flat = ((maps.flatten(1).amax(1) == maps.flatten(1).amin(1))
                    | (against.flatten(1).amax(1) == against.flatten(1).amin(1)))  # fmt: skip
            if bool((~flat).any()):
                alike += map_correlation(maps[~flat], against[~flat], "spearman").tolist()
        mean = lambda v: sum(v) / len(v) if v else 0.0  # noqa: E731
        return {"pointing": 100 * mean(hits), "deletion": mean(falls), "randomised": mean(alike),
                "questions": float(len(hits)), "asked": float(total)}  # fmt: skip

    base = "random" if "random" in methods else next(iter(methods))
    found = study(list(methods), run, "pointing", base, seeds, progress, keep,
                  {"count": count, "steps": steps, "patches": patches})  # fmt: skip
    if pictures is not None:
        draw(Path(pictures) / "attribution-cpu.svg", found["rows"])
    return {
        "what": "maps of answers of the small multimodal model: pointing (%), fall of the answer's log-probability "
        f"when {patches} of {SIDE**2} patches are painted over, rank correlation with maps of shuffled weights",
        "machine": machine(), "chance": 100 / scenes.GRID**2, "captum": any(n.startswith("captum") for n in methods),
        **found,
    }  # fmt: skip


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of the three tests beside each other."""
    figure, first = _figure(9.5, 0.8 + 0.3 * len(rows))
    first.remove()
    axes = figure.subplots(1, 3, sharey=True)
    titles = {"pointing": "pointing, %", "deletion": "deletion: fall of log p",
              "randomised": "correlation with\nshuffled weights"}  # fmt: skip
    for number, (metric, title) in enumerate(titles.items()):
        axis = axes[number]
        means, halves = [r[metric]["mean"] for r in rows], [r[metric]["half"] or 0.0 for r in rows]
        axis.barh(range(len(rows)), means, xerr=halves, color=PALETTE[number], error_kw={"linewidth": 0.8})
        axis.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(title, fontsize=8, loc="left")
    axes[0].invert_yaxis()
    _write(path, figure)
