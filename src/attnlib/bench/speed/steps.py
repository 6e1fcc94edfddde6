"""How much faster a denoiser samples when half of its modules hand on what they gave at an earlier step.

``python -m attnlib.bench.speed.steps benchmarks/results/steps-cpu.json`` measures again what that file holds. A class-
conditional DiT and a U-Net of random weights sample with guidance in their pipelines; contenders take turns on one
thread, and each is compared to the full sampling of its own round. Times are those of the processor. The first module
calls of a table and its bookkeeping are inside the measurement.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...cache import FeatureInheritance, HarmoniCa, Router
from ...cache.steps import every
from ...hooks import attach
from ..clock import interleave, limit_threads, machine, ratio


class _Decoded:
    """Stands for a decoder: what is measured is sampling."""

    def __init__(self, latents: torch.Tensor):
        self.sample = latents


class _NoDecoder(nn.Module):
    config = type("Config", (), {"scaling_factor": 1.0})
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: torch.Tensor) -> _Decoded:
        return _Decoded(latents)


def _dit(width: int, depth: int, size: int) -> tuple[Any, dict[str, Any], int]:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    model = DiTTransformer2DModel(
        sample_size=size, num_layers=depth, num_attention_heads=width // 64, attention_head_dim=64, patch_size=2,
        num_embeds_ada_norm=1000, out_channels=8,
    ).eval()  # fmt: skip
    pipe = DiTPipeline(transformer=model, vae=_NoDecoder(), scheduler=DDIMScheduler())
    return pipe, {"class_labels": [3], "output_type": "pt"}, 2 * depth


def _unet(width: int, size: int) -> tuple[Any, dict[str, Any], int]:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=size, block_out_channels=(width, 2 * width, 2 * width), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64,
        attention_head_dim=width // 32,
    ).eval()  # fmt: skip
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=model, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False, **none
    )
    text = {"prompt_embeds": torch.randn(1, 16, 64), "negative_prompt_embeds": torch.randn(1, 16, 64)}
    return pipe, {**text, "output_type": "latent"}, 0


def half(steps: int, modules: int, seed: int = 0) -> Router:
    """A router that lets half of all modules run: all of the first step, the others spread at random."""
    router = Router(steps, modules, 0.5)
    run = modules * steps // 2 - modules
    order = torch.randperm(modules * (steps - 1), generator=torch.Generator().manual_seed(seed))
    flat = torch.full((modules * (steps - 1),), -5.0)
    flat[order[: max(run, 0)]] = 5.0
    with torch.no_grad():
        for step, row in enumerate(flat.view(steps - 1, modules), 1):
            router.row(step).copy_(row)
    return router


def measure(
    width: int = 384,
    depth: int = 6,
    size: int = 32,
    steps: int = 10,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved samplings, and of their ratio to the full one.

    Args:
        width: of the DiT, a multiple of 64; the U-Net starts at a third of it.
        depth: blocks of the DiT.
        size: side of the latents of the DiT; half of it in the U-Net.
        steps: of sampling, even.
        rounds: turns of each contender.
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine and one record per contender.

    >>> [r["contender"] for r in measure(64, 1, 4, 2, rounds=1)["records"]][:2]
    ['DiT, full', 'DiT, HarmoniCa']
    """
    torch.manual_seed(0)
    dit, classes, modules = _dit(width, depth, size)
    unet, text, _ = _unet(-(-width // 96) * 32, max(8, size // 2))
    runs: dict[str, Callable[[], Any]] = {}
    shares: dict[str, float] = {}
    plans: Mapping[str, tuple[Any, dict[str, Any], Callable[[], Any] | None]] = {
        "DiT, full": (dit, classes, None),
        "DiT, HarmoniCa": (dit, classes, lambda: HarmoniCa(half(steps, modules))),
        "DiT, inherited halves of blocks": (dit, classes, lambda: FeatureInheritance("unit", every(2))),
        "U-Net, full": (unet, text, None),
        "U-Net, inherited layers": (unet, text, lambda: FeatureInheritance("layer", every(2))),
        "U-Net, inherited resolutions": (unet, text, lambda: FeatureInheritance("block", every(2))),
    }
    for name, (pipe, given, make) in plans.items():
        pipe.set_progress_bar_config(disable=True)
        runs[name] = _run(name, pipe, {**given, "num_inference_steps": steps}, make, shares)
    with limit_threads(1):
        found = interleave(runs, rounds, "cpu", progress)
    records = []
    for name, timing in found.items():
        full = found[name.split(",")[0] + ", full"]
        faster = ratio(full, timing)
        records.append(
            {"contender": name, "seconds": timing.median, "executed": shares[name], "times as fast": faster["ratio"]}
        )
    return {
        "what": "sampling with half of the modules left out, against full sampling",
        "settings": {"width": width, "depth": depth, "size": size, "steps": steps, "rounds": rounds},
        "machine": machine(),
        "records": records,
    }


def _run(
    name: str, pipe: Any, given: dict[str, Any], make: Callable[[], Any] | None, shares: dict[str, float]
) -> Callable[[], Any]:
    def run() -> None:
        generator = torch.Generator().manual_seed(0)
        if make is None:
            shares[name] = 1.0
            pipe(**given, generator=generator)
            return
        with attach(pipe, make()) as session:
            pipe(**given, generator=generator)
        (count,) = session.results.values()
        shares[name] = int(count["executed"].sum()) / int(count["possible"].sum())

    return run


if __name__ == "__main__":
    found = measure(progress=lambda text: print(text, flush=True))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
