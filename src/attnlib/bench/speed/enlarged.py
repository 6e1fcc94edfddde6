"""HiDiffusion beside the plain U-Net, at four and at sixteen times the pixels of its training.

``attnlib bench --suite enlarged`` measures it again. The U-Net is built as that of Stable Diffusion 1.5, narrower, and
of random weights, which do not change times. Each of the phases that a table has (both places, the first alone, windows
alone) is run in turn with the plain model, and counts as often as it comes in a sampling of 50 steps.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...hooks import attach
from ...steer.diffusion.hidiffusion import TABLES, HiDiffusion
from ..clock import interleave, limit_threads, machine, ratio

STEPS = 50
#: Times the pixels at training, and the shares of steps that the authors have there.
SIZES = ((4, (0.4, 0.0)), (16, (0.7, 0.3)))


def unet(side: int = 16, width: int = 32) -> Any:
    """A U-Net with the stages of Stable Diffusion 1.5, trained, so to say, at latents of ``side``."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=side, block_out_channels=(width, 2 * width, 2 * width, 2 * width), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, attention_head_dim=8, norm_num_groups=8,
        cross_attention_dim=64,
    ).eval()  # fmt: skip


def record(
    model: Any, times: int, ratios: Sequence[float], rounds: int, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Seconds of each phase, and how many times as fast a whole sampling is."""
    side = int(model.config.sample_size * times**0.5)
    x, text = torch.randn(1, 4, side, side), torch.randn(1, 8, 64)
    phases = Counter(
        tuple(place.how for place in TABLES["sd15"].shrunk(step, STEPS, (side, side), ratios)) for step in range(STEPS)
    )
    first = {
        phase: next(
            step for step in range(STEPS)
            if tuple(p.how for p in TABLES["sd15"].shrunk(step, STEPS, (side, side), ratios)) == phase
        )
        for phase in phases
    }  # fmt: skip

    def run(which: Any) -> Any:
        return which(x, 5, encoder_hidden_states=text)

    def at(session: Any, which: Any, step: int) -> Any:
        with session.at(step=step):
            return run(which)

    # A pipeline attaches once for all steps, so that attaching is not in the times.
    attached = copy.deepcopy(model)
    with torch.no_grad(), attach(attached, HiDiffusion("sd15", ratios=ratios, steps=STEPS)) as session:
        jobs: dict[str, Callable[[], Any]] = {"plain": partial(run, model)}
        jobs |= {" and ".join(phase) or "windows": partial(at, session, attached, n) for phase, n in first.items()}
        seconds = interleave(jobs, rounds, clock="cpu", progress=progress)
    faster = {name: ratio(seconds["plain"], seconds[name])["ratio"] for name in jobs if name != "plain"}
    counts = {" and ".join(phase) or "windows": count for phase, count in phases.items()}
    whole = STEPS / sum(count / faster[name] for name, count in counts.items())
    return {
        "pixels": times, "latents": side, "steps": counts, "plain_seconds": seconds["plain"].minimum,
        "times_as_fast": faster, "sampling_times_as_fast": whole,
    }  # fmt: skip


def measure(
    sizes: Sequence[tuple[int, Sequence[float]]] = SIZES,
    rounds: int = 5,
    side: int = 16,
    width: int = 32,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved ratios, on one thread.

    Args:
        sizes: times the pixels, and T1 and T2.
        rounds: turns of each.
        side: of the latents at training.
        width: of the U-Net.
        progress: told what is being measured.
    """
    with limit_threads(1):
        model = unet(side, width)
        rows = [record(model, times, ratios, rounds, progress) for times, ratios in sizes]
    return {"what": "HiDiffusion beside the plain U-Net", "records": rows, "machine": machine()}
