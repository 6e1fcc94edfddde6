"""Time against judged quality at equal executed work: what is lost when half of all modules hand on old features?

``attnlib bench --suite diffusion-caching --out benchmarks/results`` writes ``diffusion-caching-cpu.json`` and its
pictures. All contestants but the full sampling run half of the attentions, feed-forwards and (in a U-Net) resnets, or
take half of the steps in full: what a sceptic would do. HarmoniCa's router is learnt on prompts of training, and runs
the half that it scores highest; beside it stands a table of as many entries at random. A contestant is judged on the
same prompts and seeds as the full sampling, and by how near its pictures come to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnlib

from ....cache import DiffusersCache, FeatureInheritance, HarmoniCa, Router, StepCache, train_router
from ....cache.steps import every
from ....checks import check_choice
from ....hooks.intervention import Intervention
from ...clock import machine
from ...small import Progress, interval, sheet
from ...stats import mean_interval
from ...worlds import models
from ...worlds.judge import load
from ...worlds.prompts import class_name, prompts
from ._judged import Draw, drawing, judged
from .generators import SETTINGS

QUESTION = "What is lost when half of the modules of a denoiser hand on what they gave at an earlier step?"
PARTS = ("vae", "dit", "judge")
BASELINE = "full"
#: By generator, what has a column of its own in a table.
MODULES = {"dit": ("attention", "feed-forward"), "unet": ("attention", "feed-forward", "resnet")}
#: By generator, the set of prompts.
ASKED = {"dit": "one", "unet": "two"}
#: Of the router, to be chosen on ``"dev"``.
TRAINING: dict[str, Any] = {"epochs": 24, "lr": 0.1, "beta": 1e-4, "seed": 0}


def half(router: Router) -> Tensor:
    """(S, M) bool: the first step, and of the rest the entries with the highest scores, half of all together."""
    scores = router.scores().detach()
    steps, modules = scores.shape
    table = torch.zeros(steps, modules, dtype=torch.bool)
    table[0] = True
    order = scores[1:].flatten().argsort(descending=True, stable=True)
    rest = torch.zeros((steps - 1) * modules, dtype=torch.bool)
    rest[order[: steps * modules // 2 - modules]] = True
    table[1:] = rest.view(steps - 1, modules)
    return table


def at_random(steps: int, modules: int, seed: int = 0) -> Tensor:
    """As many entries, drawn without looking."""
    router = Router(steps, modules)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for step in range(1, steps):
            router.row(step).copy_(torch.randn(modules, generator=g))
    return half(router)


def learn(
    pipe: Any,
    steps: int,
    given: Mapping[str, Any],
    progress: Progress | None = None,
    name: str = "dit",
    **training: Any,
) -> tuple[Router, list[dict[str, float]]]:
    """A router for a generator, on prompts that no contestant is judged on."""
    with attnlib.attach(pipe, StepCache(every(2), MODULES[name])) as session:
        modules = len(session.interventions[0].columns)
    router = Router(steps, modules, 0.5)
    with torch.no_grad():
        for step in range(1, steps):
            router.row(step).zero_()
    settings = {**TRAINING, **training}
    epochs = settings.pop("epochs")
    asked = prompts(ASKED[name], 2 * epochs, "train")

    def some(epoch: int) -> dict[str, Any]:
        own = asked[2 * epoch : 2 * epoch + 2]
        if name == "dit":
            return {"class_labels": pipe.get_label_ids([class_name(p) for p in own]), **given}
        return {"prompt": [p.text for p in own], **given}

    def told(epoch: int, losses: list[dict[str, float]]) -> None:
        if progress is not None:
            progress(f"router, epoch {epoch}: data {sum(one['data'] for one in losses):.4g}")

    history = train_router(
        pipe,
        router,
        some,
        epochs,
        refresh=steps * max(1, epochs // 2),
        progress=told,
        acts_on=MODULES[name],
        **settings,
    )
    return router, history


class Learnt(HarmoniCa):
    """A router's table of half of all entries, whatever its threshold says."""

    def __init__(self, router: Router, acts_on: Sequence[str]):
        super().__init__(router, acts_on)
        self.table = half(router)


def contestants(steps: int, router: Router, name: str = "dit") -> dict[str, Callable[[], list[Intervention]]]:
    """By name, what is attached to a generator."""
    import diffusers.hooks as caches

    modules, everywhere = MODULES[name], (-1, 1001)

    def broadcast() -> list[Intervention]:
        config = caches.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=everywhere, cross_attention_timestep_skip_range=everywhere,
        )  # fmt: skip
        return [DiffusersCache(config, modules)]

    def taylor() -> list[Intervention]:
        config = caches.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r".*\.attn[12]", r".*\.ff", r".*resnets\.\d+"],
        )  # fmt: skip
        return [DiffusersCache(config, modules)]

    made: dict[str, Callable[[], list[Intervention]]] = {
        BASELINE: lambda: [],
        "half of the steps": lambda: [],
        "every second step": lambda: [StepCache(every(2), modules)],
        "at random": lambda: [StepCache(at_random(steps, router.modules_count), modules)],
        "HarmoniCa": lambda: [Learnt(router, modules)],
        "inherited resolutions": lambda: [FeatureInheritance("block", every(2))],
        "TaylorSeer": taylor,
        "attention broadcast": broadcast,
    }
    if name != "unet":
        del made["inherited resolutions"]  # a transformer has one resolution
    return made


def decibels(a: Tensor, b: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of pictures in [0, 1]."""
    return (-10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-10).log10()).tolist()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    names: Sequence[str] | None = None,
    generator: str = "dit",
    count: int = 64,
    near: int = 16,
    part: str = "test",
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """Learn a router, draw with every contestant, and let the judge say what is there.

    Args:
        progress: told of every batch.
        keep: file to go on from.
        pictures: folder for ``diffusion-caching-cpu.png``.
        names: of :func:`contestants`, all by default.
        generator: of :data:`MODULES`; the class-conditional one is asked for one thing, the other for two.
        count: prompts.
        near: of them, for the distance from the full sampling.
        part: of prompts.
        folder: of trained parts.
        settings: of the pipeline's call; an even number of steps.
        training: of the router, see :data:`TRAINING`.
        batch: prompts at a time.

    Returns:
        Plain values, for JSON: rows with intervals and paired differences from the full sampling, ``executed`` shares,
        and ``near``, decibels to its pictures.
    """
    check_choice("generator", generator, tuple(MODULES))
    kind = ASKED[generator]
    chosen = {**SETTINGS[generator], **(settings or {})}
    steps = chosen["num_inference_steps"]
    pipe, judge = models.pipeline(generator, folder), load(folder)
    router, history = learn(
        pipe, steps, {"guidance_scale": chosen["guidance_scale"]}, progress, generator, **(training or {})
    )  # fmt: skip
    table = half(router)
    made = contestants(steps, router, generator)
    wanted = list(made if names is None else names)
    executed: dict[str, float] = {}

    def drawn_by(name: str) -> Draw:
        own = steps // 2 if name == "half of the steps" else steps

        def told(session: Any) -> None:
            executed[name] = own / steps
            if session is not None:
                (ran,) = session.results.values()
                executed[name] = int(ran["executed"].sum()) / int(ran["possible"].sum())

        return drawing(pipe, lambda some: made[name](), told, **{**chosen, "num_inference_steps": own})

    asked = prompts(kind, count, part)
    drawn = {name: drawn_by(name) for name in wanted}
    key = [part, generator, chosen, {**TRAINING, **(training or {})}]
    result = judged(drawn, asked, BASELINE, judge, batch, progress=progress, keep=keep, key=key)
    first = asked[: min(near, count)]
    shown = {name: sketch(first, range(len(first))) for name, sketch in drawn.items()}
    for row in result["rows"]:
        row["executed"] = executed[row["name"]]
        if row["name"] != BASELINE:
            row["near"] = interval(mean_interval(decibels(shown[row["name"]], shown[BASELINE])))
    if pictures is not None:
        some = {name: images[:8] for name, images in shown.items()}
        sheet(Path(pictures) / "diffusion-caching-cpu.png", some, [p.text for p in first[:8]])
    settings_of = {
        "part": part,
        "generator": generator,
        "kind": kind,
        **chosen,
        "training": {**TRAINING, **(training or {})},
    }
    kinds = {"per step": table.float().mean(1).tolist(), "per module": table.float().mean(0).tolist()}
    data = {e: sum(h["data"] for h in history if h["epoch"] == e) for e in {h["epoch"] for h in history}}
    return {
        "question": QUESTION, "settings": settings_of, **result, "router": {**kinds, "data": list(data.values())},
        "machine": machine(),
    }  # fmt: skip
