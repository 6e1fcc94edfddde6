"""Block-sparse policies on a small video denoiser: how near its videos stay, by density.

``attnlib bench --suite video --out benchmarks/results`` measures again what ``video-cpu.json`` holds and draws it. A
diffusion transformer of four blocks learns videos of a digit that moves (8 frames of 24 x 24 pixels, 288 tokens). Per
seed a model is trained; from the same noise it samples with dense attention and under every policy at every density,
and the peak signal-to-noise ratio of one beside the other is taken. Sliding tiles (the nearest blocks) and random
blocks are what a policy has to beat; ``block_entropy`` says how evenly the dense maps lie on blocks (1: evenly, so that
no choice of blocks can be much better than another).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.consistency import cosine_schedule, ddim_step
from ...hooks import attach
from ...models.blocks import Block
from ...nn.registry import create
from ...ops.block_mass import block_mass
from ...ops.block_sparse import BlockPlan
from ...steer.diffusion.video import PARO, AdaSpa, BlockSparse, FrameTiles, Look, MixtureOfBlocks, Policy
from ..clock import machine
from ..data.worlds import moving_digits
from ..small import Progress, fit, interval, picture, study
from ..stats import paired_interval

FRAMES, SIDE, PATCH, DIM, HEADS, DEPTH = 8, 24, 4, 64, 4, 4
GRID = (FRAMES, SIDE // PATCH, SIDE // PATCH)
BLOCK = 12


class VideoDenoiser(nn.Module):
    """Predicts clean videos (B, T, H, W, 1) from noisy ones and times (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, DIM)
        self.places = nn.Parameter(0.02 * torch.randn(1, *GRID, DIM))
        self.time = nn.Sequential(nn.Linear(16, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.blocks = nn.ModuleList(
            Block(DIM, create("softmax-attention", dim=DIM, num_heads=HEADS, causal=False), mlp_ratio=2.0)
            for _ in range(DEPTH)
        )
        self.norm, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, PATCH * PATCH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch, frames, height, width, _ = x.shape
        cut = x.reshape(batch, frames, height // PATCH, PATCH, width // PATCH, PATCH)
        tokens = self.embed(cut.transpose(3, 4).flatten(4))
        waves = t[:, None] * torch.pi * 2.0 ** torch.arange(8)
        at = self.time(torch.cat([waves.sin(), waves.cos()], -1))[:, None, None, None]
        y = tokens + self.places + at
        for block in self.blocks:
            y, _ = block(y)
        y = self.out(self.norm(y)).unflatten(-1, (PATCH, PATCH)).transpose(3, 4)
        return y.reshape(batch, frames, height, width, 1)


class Fixed(Policy):
    """A plan that knows nothing of the video: ``"random"`` blocks and the own one, or the ``"nearest"`` ones."""

    def __init__(self, density: float, kind: str, block: int = BLOCK):
        self.density, self.kind, self.block = density, kind, block

    def choose(self, look: Look) -> BlockPlan | None:
        if "plan" not in look.memory:
            n = look.q.shape[2]
            count = -(-n // self.block)
            keep = max(1, round(self.density * count))
            at = torch.arange(count)
            if self.kind == "nearest":
                score = -(at[:, None] - at).abs().float()
            else:
                score = torch.rand(count, count, generator=torch.Generator().manual_seed(look.site.layer))
                score[at, at] = 2.0
            look.memory["plan"] = BlockPlan(score.topk(keep, -1).indices, self.block, self.block, n)
        plan: BlockPlan = look.memory["plan"]
        return plan


def _moba(density: float) -> Policy:
    """Its blocks have 36, 48 and 18 tokens in turn; over all layers nearly the wanted share is read."""
    return MixtureOfBlocks((1, (2, 3), (2, 3, 3)), topk=max(1, round(density * 8)), per="head")


#: Policy -> from a density to the policy.
POLICIES: dict[str, Callable[[float], Policy]] = {
    "sliding tiles": lambda d: Fixed(d, "nearest"),
    "random blocks": lambda d: Fixed(d, "random"),
    "AdaSpa": lambda d: AdaSpa(1 - d, searches=(1, 4), block=BLOCK),
    "PARO": lambda d: PARO(d, block=BLOCK),
    "VMoBA": _moba,
    "frame tiles": lambda d: FrameTiles(_references(d), block=BLOCK),
}

BASELINE = "sliding tiles"


def _references(density: float) -> int:
    """As many reference frames as keep nearly that share of tiles."""
    shares = [(FRAMES**2 - (FRAMES - k) * max(FRAMES - k - 1, 0)) / FRAMES**2 for k in range(FRAMES + 1)]
    return min(range(FRAMES + 1), key=lambda k: abs(shares[k] - density))


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, steps: int, session: Any = None) -> Tensor:
    """Clean videos from noise by deterministic steps."""
    x = noise
    for i in range(steps):
        t, u = (torch.full((len(x),), 1 - (i + j) / steps) for j in (0, 1))
        if session is None:
            clean = model(x, t)
        else:
            with session.at(step=i):
                clean = model(x, t)
        x = ddim_step(x, clean, t, u)
    return x


class _Spread(Policy):
    """Dense attention, and how evenly its mass lies on blocks: the entropy over that of an even map."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def choose(self, look: Look) -> BlockPlan | None:
        mass = block_mass(look.q, look.k, BLOCK, BLOCK, scale=look.site.scale).mass
        share = mass / mass.sum(-1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(-1).mean()
        self.values.append(float(entropy) / math.log(share.shape[-1]))
        return None


def psnr(x: Tensor, truth: Tensor) -> float:
    """Decibels, for videos in [0, 1]."""
    return float(-10 * (x.clamp(0, 1) - truth.clamp(0, 1)).square().mean().clamp(min=1e-10).log10())


def trained(seed: int, steps: int, batch: int) -> tuple[VideoDenoiser, float]:
    """A denoiser, and its loss over the last steps beside that of the mean video."""
    torch.manual_seed(seed)
    model = VideoDenoiser()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        videos, _ = moving_digits(batch, FRAMES, SIDE, generator=generator)
        t = torch.rand(batch, generator=generator).clamp(0.02, 1.0)
        return videos, t, torch.randn(videos.shape, generator=generator)

    def loss(m: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        videos, t, noise = given
        a, s = (x.view(-1, 1, 1, 1, 1) for x in cosine_schedule(t))
        return F.mse_loss(m(a * videos + s * noise, t), videos)

    losses = fit(model, draw, loss, steps, lr=2e-3, seed=seed)
    last = losses[-max(1, len(losses) // 10) :]
    return model.eval(), sum(last) / len(last)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 1200,
    batch: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
    densities: tuple[float, ...] = (0.25, 0.5, 0.75),
    videos: int = 8,
    sampled: int = 8,
) -> dict[str, Any]:
    """Train a denoiser per seed, and sample with every policy at every density.

    Args:
        progress, keep: as of :func:`attnlib.bench.small.study`.
        pictures: folder for ``video-cpu.svg``.
        steps, batch, seeds: of training.
        densities: shares of blocks to read.
        videos: sampled per seed.
        sampled: denoising steps.

    Returns:
        Plain values, for JSON.
    """
    models: dict[int, tuple[VideoDenoiser, Tensor, Tensor, float, float, float]] = {}

    def model_of(seed: int) -> tuple[VideoDenoiser, Tensor, Tensor, float, float, float]:
        if seed not in models:
            model, last = trained(seed, steps, batch)
            noise = torch.randn(videos, FRAMES, SIDE, SIDE, 1, generator=torch.Generator().manual_seed(100 + seed))
            test, _ = moving_digits(256, FRAMES, SIDE, "test", generator=torch.Generator().manual_seed(3))
            mean_loss = float((test - test.mean(0)).square().mean())
            spread = _Spread()
            with attach(model, BlockSparse(spread, grid=GRID)) as session:
                dense = sample(model, noise, sampled, session)
            models[seed] = model, noise, dense, last, mean_loss, sum(spread.values) / len(spread.values)
        return models[seed]

    names = [f"{policy}, {d:g}" for d in densities for policy in POLICIES]

    def run(name: str, seed: int) -> dict[str, float]:
        policy_name, _, density = name.rpartition(", ")
        model, noise, dense, last, mean_loss, spread = model_of(seed)
        policy = POLICIES[policy_name](float(density))
        layers: dict[str, list[float]] = {}
        if isinstance(policy, PARO):
            with attach(model, BlockSparse(policy, grid=GRID)) as session:
                sample(model, noise[:2].flip(0), 2, session)
            policy.freeze()
        with attach(model, BlockSparse(policy, grid=GRID)) as session:
            out = noise
            for i in range(sampled):
                t, u = (torch.full((len(out),), 1 - (i + j) / sampled) for j in (0, 1))
                with torch.no_grad(), session.at(step=i):
                    out = ddim_step(out, model(out, t), t, u)
                for layer, value in session.results["block-sparse"].items():
                    layers.setdefault(layer, []).append(value)
        every = [v for values in layers.values() for v in values]
        return {
            "psnr": psnr(out, dense), "density": sum(every) / len(every), "loss": last, "mean_video_loss": mean_loss,
            "block_entropy": spread,
        }  # fmt: skip

    found = study(names, run, "psnr", None, seeds, progress, keep, (steps, batch, videos, sampled))
    rows = {r["name"]: r for r in found["rows"]}
    by_seed = {(r["name"], r["seed"]): r["psnr"] for r in found["runs"]}

    for name, row in rows.items():
        density = name.rpartition(", ")[2]
        gap = paired_interval(
            {s: by_seed[name, s] for s in seeds}, {s: by_seed[f"{BASELINE}, {density}", s] for s in seeds}
        )
        row["against"] = None if gap is None else interval(gap)
    if pictures is not None:
        curves = {
            policy: [
                (rows[f"{policy}, {d:g}"]["density"]["mean"], rows[f"{policy}, {d:g}"]["psnr"]["mean"],
                 rows[f"{policy}, {d:g}"]["psnr"]["half"])
                for d in densities
            ]
            for policy in POLICIES
        }  # fmt: skip
        picture(
            Path(pictures) / "video-cpu.svg", curves, "share of pairs that are read", "PSNR beside dense attention, dB",
            "a small video denoiser under block-sparse policies", dashed=("sliding tiles", "random blocks"),
        )  # fmt: skip
    return {
        "what": "videos sampled under block-sparse policies beside those of dense attention", "machine": machine(),
        "steps": steps, "videos": videos, "baseline": BASELINE, **{k: v for k, v in found.items() if k != "baseline"},
    }  # fmt: skip
