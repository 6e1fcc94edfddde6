"""DiMR against a DiT of equal size: noise in latents of painted things, after the same training.

``attnlib bench --suite diffusion-resolutions --out benchmarks/results`` writes
``diffusion-resolutions-cpu.json``. Pictures of one thing, 64 classes of a colour and a shape, come through the
trained autoencoder; a DiT, a DiMR with as many parameters, and a DiT of about as many multiply-adds as the DiMR learn
to say the noise, from the same batches, noise and times. They are compared by the mean square of what they miss on
pictures that training did not show, with classes; 1 is what saying nothing misses. The DiMR learns its loss over two
resolutions, the others the one at the full size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.diffusion.dimr import Branch, DiMR, log_snr
from ...clock import machine, now
from ...small import Progress, fit, operations, parameters, picture, study
from ...worlds import models, painter
from ...worlds.painter import Want, write

QUESTION = "Does a DiMR say noise better than a DiT of equal size?"
PARTS = ("vae",)
BASELINE, OURS, DEEPER = "DiT", "DiMR", "DiT, deeper"
NAMES = (BASELINE, OURS, DEEPER)
METRIC = "noise missed"

CLASSES = len(models.CLASSES)
#: Of timesteps at which models are tested.
TIMES = (50, 200, 400, 600, 800, 950)


def alphas() -> Tensor:
    """(1000,) of the schedule of Stable Diffusion."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def build(name: str, width: int = 64, depth: int = 6) -> nn.Module:
    """A model of 16 x 16 x 4 latents.

    Args:
        name: of :data:`NAMES`.
        width, depth: of the DiT; the DiMR has a width and depth that give as many parameters.
    """
    if name == OURS:
        low = Branch(width, 2 * width, depth + 3, 8, num_heads=4, patch_size=2)
        full = Branch(width // 2, width, 6, 16)
        return DiMR([low, full], num_classes=CLASSES + 1, sample_size=16, time=log_snr(alphas()))
    from diffusers import DiTTransformer2DModel

    layers = depth if name == BASELINE else math.ceil(depth * 2.3)
    return DiTTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, num_attention_heads=4,
        attention_head_dim=width // 4, num_embeds_ada_norm=CLASSES, dropout=0.0,
    )  # fmt: skip


@torch.no_grad()
def latents(vae: Any, count: int, part: str) -> tuple[Tensor, Tensor]:
    """(count, 4, 16, 16) of pictures of one thing, a unit of noise large, and (count,) their classes."""
    g = torch.Generator().manual_seed({"train": 0, "dev": 1, "test": 2}[part])
    labels = torch.randint(CLASSES, (count,), generator=g)
    pairs = [models.CLASSES[n].split(" ") for n in labels.tolist()]
    scenes = painter.sample(
        count, part, "any", plain=True, wants=[write([Want(colour, shape)]) for colour, shape in pairs]
    )
    images = painter.paint(scenes, part).images
    z = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in images.split(32)])
    return z * vae.config.scaling_factor, labels


def noised(z: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    a = alphas()[times].to(z).view(-1, 1, 1, 1)
    return a.sqrt() * z + (1 - a).sqrt() * noise


@torch.no_grad()
def missed(model: Any, z: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean squares of what a model misses of noise, at each of :data:`TIMES` and on average."""
    model.eval()
    found = {}
    for time in TIMES:
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(time))
        times = torch.full((len(z),), time)
        said = torch.cat(
            [
                model(noised(a, t, n), t, y).sample
                for a, t, n, y in zip(z.split(64), times.split(64), noise.split(64), labels.split(64), strict=True)
            ]
        )
        found[f"at {time}"] = float((said - noise).square().mean())
    return {METRIC: sum(found.values()) / len(found), **found}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    names: Sequence[str] = NAMES,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 150,
    batch: int = 32,
    lr: float = 2e-3,
    drawn: int = 1536,
    tested: int = 256,
    width: int = 64,
    depth: int = 6,
    part: str = "test",
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Train every model with every seed, and test it.

    Args:
        progress: told of every run.
        keep: file to go on from.
        pictures: folder for ``diffusion-resolutions-cpu.svg``.
        names: of :data:`NAMES`.
        seeds: of first weights, batches, times and noise.
        steps, batch, lr: of training.
        drawn, tested: pictures.
        width, depth: see :func:`build`.
        part: of the pictures that models are tested on; settings are to be chosen on ``"dev"``.
        folder: of trained parts.

    Returns:
        Plain values, for JSON: what :func:`attnlib.bench.small.study` gives, and the sizes of the models.
    """
    vae = models.part("vae", folder)
    (z, labels), (tz, tlabels) = latents(vae, drawn, "train"), latents(vae, tested, part)

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(drawn, (batch,), generator=g)
        times = torch.randint(1000, (batch,), generator=g)
        noise = torch.randn(batch, *z.shape[1:], generator=g)
        silent = torch.rand(batch, generator=g) < 0.1
        return noised(z[rows], times, noise), times, labels[rows].masked_fill(silent, CLASSES), noise

    def loss(model: Any, given: tuple[Tensor, ...]) -> Tensor:
        x, times, of, noise = given
        said = model(x, times, of)
        if isinstance(model, DiMR):
            return torch.stack(list(model.loss(said, noise).values())).sum()
        return (said.sample - noise).square().mean()

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = build(name, width, depth)
        began = now("cpu")
        fit(model, draw, loss, steps, lr, seed)
        return {**missed(model, tz, tlabels), "seconds of training": now("cpu") - began}

    settings = {"steps": steps, "batch": batch, "lr": lr, "drawn": drawn, "width": width, "depth": depth, "part": part}
    found = study(names, run, METRIC, BASELINE, seeds, progress, keep, {**settings, "tested": tested})
    sizes = {}
    for name in names:
        model: Any = build(name, width, depth).eval()
        one = (torch.zeros(1, 4, 16, 16), torch.tensor([5]), torch.tensor([1]))
        sizes[name] = {"parameters": parameters(model), "operations": operations(lambda: model(*one))}  # noqa: B023
    result = {"question": QUESTION, "settings": settings, "sizes": sizes, "machine": machine(), **found}
    if pictures is not None:
        curves = {
            row["name"]: [(float(t), row[f"at {t}"]["mean"], row[f"at {t}"]["half"]) for t in TIMES]
            for row in found["rows"]
        }
        where = Path(pictures) / "diffusion-resolutions-cpu.svg"
        picture(where, curves, "timestep", "mean square of noise missed", QUESTION, ("y",), (BASELINE,))
    return result
