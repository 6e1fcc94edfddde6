"""Resolution: denoisers trained on images of 16 x 16, and what they are worth at 32 x 32.

``attnlib bench --suite resolution --out benchmarks/results`` measures again what ``resolution-cpu.json`` holds and
draws it. LinFusion (arXiv 2409.02097) says that means over keys let linear attention read images of another size like
those before, CLEAR (arXiv 2412.16112) that a circle around every token does; softmax attention spreads its weights over
four times as many keys. Each is the mixer of the same small denoiser of grey crops of photographs, without positions
but for a convolution of 3 x 3 before every block; with nothing in its place, that convolution is all there is.

Denoisers are those of Karras et al. (arXiv 2206.00364). Told are their loss on crops of photographs that were held out,
at the side of training and at twice that, and how far patches of sampled images are from patches of the held-out ones:
the sliced Wasserstein distance of 8 x 8 pixels, in units of grey levels between -1 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.tiny import make_apart, mlp
from ...nn.registry import create
from ..clock import machine
from ..data.files import photos
from ..small import Progress, fit, picture, study

DIM, HEADS, DEPTH = 32, 4, 2
#: Noise levels of the test, in the units of the images.
LEVELS = (0.1, 0.3, 1.0)
#: Standard deviation of the images, for the preconditioning.
SIGMA = 0.5
BASELINE = "softmax attention"
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    BASELINE: dict(name="softmax-attention", num_heads=HEADS),
    "LinFusion": dict(name="linfusion", num_heads=HEADS),
    "CLEAR, radius 4": dict(name="clear", num_heads=HEADS, window_size=4),
    "convolution only": None,
}


class Denoiser(nn.Module):
    """From noisy images (B, H, W, 1) and their noise (B,) to clean ones; any size.

    >>> Denoiser(CONTESTANTS["LinFusion"])(torch.randn(2, 4, 6, 1), torch.ones(2)).shape
    torch.Size([2, 4, 6, 1])
    """

    def __init__(self, spec: dict[str, Any] | None):
        super().__init__()
        self.embed, self.noise = nn.Conv2d(1, DIM, 3, padding=1), nn.Linear(16, DIM)
        self.blocks = nn.ModuleList()
        for _ in range(DEPTH):
            parts: dict[str, nn.Module] = {
                "near": nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), "norm1": nn.LayerNorm(DIM),
                "norm2": nn.LayerNorm(DIM), "mlp": mlp(DIM, 2.0),
            }  # fmt: skip
            if spec is not None:
                settings = dict(spec)
                name = settings.pop("name")
                parts["mixer"] = make_apart(lambda n=name, s=settings: create(n, dim=DIM, **s))  # type: ignore[misc]
            self.blocks.append(nn.ModuleDict(parts))
        self.norm, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        size = (s**2 + SIGMA**2).sqrt()
        made = self.body(x / size, sigma.log() / 4)
        return x * SIGMA**2 / size**2 + made * s * SIGMA / size

    def body(self, x: Tensor, level: Tensor) -> Tensor:
        waves = level[:, None] * torch.arange(1, 9)
        told = self.noise(torch.cat([waves.sin(), waves.cos()], 1))[:, None, None]
        x = _local(self.embed, x) + told
        for block in self.blocks:
            parts: Any = block
            x = x + _local(parts["near"], x)
            if "mixer" in parts:
                x = x + parts["mixer"](parts["norm1"](x))
            x = x + parts["mlp"](parts["norm2"](x) + told)
        return self.out(self.norm(x))


def _local(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of channels-first images on channels-last ones."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def crops(images: Sequence[Tensor], side: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, side, side, 1) grey crops between -1 and 1 of photographs (H, W, 3), halved in size."""
    found = []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        y, x = (int(torch.randint(n - 2 * side + 1, (), generator=generator)) for n in image.shape[:2])
        grey = image[y : y + 2 * side, x : x + 2 * side].float().mean(-1) / 127.5 - 1
        found.append(F.avg_pool2d(grey[None], 2)[0])
    return torch.stack(found).unsqueeze(-1)


def loss_at(model: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean square of what the network itself gives, 1 for one that says nothing at high noise."""
    s = sigma.view(-1, 1, 1, 1)
    weight = (s**2 + SIGMA**2) / (s * SIGMA) ** 2
    return (weight * (model(clean + s * noise, sigma) - clean).square()).mean()


@torch.no_grad()
def sample(model: Denoiser, count: int, side: int, steps: int, generator: torch.Generator, most: float = 5.0) -> Tensor:
    """(count, side, side, 1): images from noise, by Heun's method."""
    levels = torch.linspace(most ** (1 / 7), 0.02 ** (1 / 7), steps) ** 7
    x = torch.randn(count, side, side, 1, generator=generator) * most
    for now, then in zip(levels, [*levels[1:], torch.tensor(0.0)], strict=True):
        slope = (x - model(x, now.expand(count))) / now
        after = x + (then - now) * slope
        if then > 0:
            slope = (slope + (after - model(after, then.expand(count))) / then) / 2
        x = x + (then - now) * slope
    return x


def distance(a: Tensor, b: Tensor, patch: int = 8, directions: int = 64, count: int = 2000) -> float:
    """Sliced Wasserstein distance between the patches of two sets of images (B, H, W, 1).

    >>> x = torch.randn(3, 12, 12, 1)
    >>> distance(x, x), 0.5 < distance(x, x + 1) < 1.1
    (0.0, True)
    """
    generator = torch.Generator().manual_seed(0)
    lines = F.normalize(torch.randn(patch * patch, directions, generator=generator), dim=0)

    def sliced(images: Tensor) -> Tensor:
        rows = F.unfold(images.permute(0, 3, 1, 2), patch).transpose(1, 2).flatten(0, 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:count]
        at = torch.linspace(0.5 / 200, 1 - 0.5 / 200, 200)
        return torch.quantile(rows[order] @ lines, at, dim=0)

    return float((sliced(a) - sliced(b)).abs().mean())


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 80,
    batch: int = 8,
    side: int = 16,
    held: int = 48,
    samples: int = 16,
    sampling: int = 8,
    lr: float = 4e-3,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train every contestant with every seed, and judge it at the side of training and at twice that.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``resolution-cpu.svg``.
        steps, batch, lr: of training.
        side: of the images of training.
        held: crops of the test.
        samples, sampling: images drawn at either side, and steps of each.
        seeds: of weights, crops and noise.

    Returns:
        Plain values, for JSON.
    """
    data = photos()

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = Denoiser(CONTESTANTS[name])

        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            clean = crops(data.train, side, batch, generator)
            sigma = (torch.randn(batch, generator=generator) * 1.2 - 1.2).exp()
            return clean, sigma, torch.randn(clean.shape, generator=generator)

        fit(model, draw, lambda m, given: loss_at(m, *given), steps, lr, seed)  # type: ignore[arg-type]
        model.eval()
        found: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
        for size in (side, 2 * side):
            generator = torch.Generator().manual_seed(1000 + seed)
            clean = crops(data.test, size, held, generator)
            noise = torch.randn(clean.shape, generator=generator)
            with torch.no_grad():
                losses = [float(loss_at(model, clean, torch.full((held,), s), noise)) for s in LEVELS]
            found[f"loss at {size}"] = sum(losses) / len(losses)
            found |= {f"loss at {size}, noise {s}": value for s, value in zip(LEVELS, losses, strict=True)}
            made = sample(model, samples, size, sampling, generator)
            found[f"distance at {size}"] = distance(made, clean)
        found["loss, twice over once"] = found[f"loss at {2 * side}"] / found[f"loss at {side}"]
        return found

    key = (steps, batch, side, held, samples, sampling, lr, data.fingerprint)
    rows = study(list(CONTESTANTS), run, f"loss at {2 * side}", BASELINE, seeds, progress, keep, key)
    result = {
        "what": "denoisers trained at one side, judged at twice that", "machine": machine(), "data": data.source,
        "split": data.split, "steps": steps, "batch": batch, "side": side, "held": held, "samples": samples,
        "sampling": sampling, "lr": lr, "levels": list(LEVELS), **rows,
    }  # fmt: skip
    if pictures is not None:
        curves = {
            row["name"]: [
                (f"{size} x {size}", row[f"loss at {size}"]["mean"], row[f"loss at {size}"]["half"])
                for size in (side, 2 * side)
            ]
            for row in rows["rows"]
        }
        picture(Path(pictures) / "resolution-cpu.svg", curves, "side of held-out crops", "denoising loss",
                f"Trained at {side} x {side}")  # fmt: skip
    return result
