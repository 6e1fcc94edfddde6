"""Voxels in windows of unequal numbers: segments of one sequence against windows padded to one length.

``attnlib bench --suite voxels --out benchmarks/results`` measures again what ``voxels-cpu.json`` holds. Scenes are
generated: surfaces of three kinds, scanned by few points or by many, and stray points; what is to be told is of which
kind every voxel is. All contestants are a convolution on voxels and the same two layers of ScatterFormer (He et al.,
2024, arXiv 2401.00912), which differ in how the voxels of a window are mixed: by linear attention in segments, by
softmax attention in windows padded to the longest, by the same with a limit beyond which voxels are left out, as padded
windows have it where memory is bounded, or not at all; convolutions across windows stay. Beside the accuracy stand the
time of a training step and how many places of the windows are filled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.detect.scatterformer import ResidualVoxels, ScatterStage, Voxels
from ...nn.layers import merge_heads, split_heads
from ...ops.voxels import conv_sites, window_segments
from ..clock import interleave, machine
from ..small import Progress, fit, parameters, study, training_step
from .clouds import SURFACES, surfaces

SHAPE, WINDOW, DIM, HEADS, DEPTH = (12, 32, 32), 8, 32, 4, 2
KINDS = tuple(SURFACES.index(name) for name in ("box", "torus", "helix"))
#: Voxels of a padded window where that is limited.
LIMIT = 32
BASELINE, SEGMENTS, LIMITED, NONE = (
    "padded windows, softmax", "segments (ScatterFormer)", f"padded windows of at most {LIMIT}", "no attention"
)  # fmt: skip
NAMES = (BASELINE, SEGMENTS, LIMITED, NONE)
METRIC = "accuracy"


class Scenes(NamedTuple):
    """Features (N, 5) and places (N, 4) of voxels, and what each is of: a kind, or ``len(KINDS)`` for stray points."""

    x: Tensor
    coords: Tensor
    labels: Tensor


def scenes(count: int, generator: torch.Generator) -> Scenes:
    """Scenes with an object in each quarter, of 40 to 640 points, and 40 stray points."""
    coords, labels = [], []
    sides = torch.tensor(SHAPE)
    for scene in range(count):
        kinds = torch.randint(len(KINDS), (4,), generator=generator)
        clouds = surfaces(4, 640, generator, torch.tensor(KINDS)[kinds])
        sizes = (40 * 16 ** torch.rand(4, generator=generator)).long()
        shift = torch.rand(4, 3, generator=generator) * torch.tensor([0.5, 3.0, 3.0])
        points, told = [], []
        for i in range(4):
            corner = torch.tensor([6.0, 8.0 + 16 * (i // 2), 8.0 + 16 * (i % 2)]) + shift[i] - 1
            points.append(clouds[i, : int(sizes[i])] * 5.5 + corner)
            told.append(torch.full((int(sizes[i]),), int(kinds[i])))
        points.append(torch.rand(40, 3, generator=generator) * sides)
        told.append(torch.full((40,), len(KINDS)))
        at = torch.cat(points).floor().long()
        inside = ((at >= 0) & (at < sides)).all(1)
        at, what = at[inside], torch.cat(told)[inside]
        order = torch.randperm(len(at), generator=generator)
        at, what = at[order], what[order]
        places, which = at.unique(dim=0, return_inverse=True)
        first = torch.full((len(places),), len(at)).scatter_reduce(0, which, torch.arange(len(at)), "amin")
        mixed = torch.randperm(len(places), generator=generator)  # what a limit leaves out is left to chance
        coords.append(F.pad(places[mixed], (1, 0), value=scene))
        labels.append(what[first][mixed])
    coords_, labels_ = torch.cat(coords), torch.cat(labels)
    place = coords_[:, 1:].float()
    inside = place[:, 1:] % WINDOW / WINDOW
    return Scenes(torch.cat([place / sides, inside], 1) * 2 - 1, coords_, labels_)


class PaddedSoftmax(nn.Module):
    """Softmax attention in windows padded to one length; voxels beyond ``limit`` take no part.

    Args:
        dim, num_heads: as of the segments' attention, with as many parameters.
        limit: the most voxels of a window; ``None`` for as many as the fullest holds.
    """

    def __init__(self, dim: int, num_heads: int, limit: int | None = None):
        super().__init__()
        self.num_heads, self.limit = num_heads, limit
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def packed(self, x: Tensor, bounds: Tensor) -> Tensor:
        """(N, C) of windows one after another, which begin at ``bounds``."""
        lengths = bounds.diff()
        window = torch.arange(len(lengths)).repeat_interleave(lengths)
        place = torch.arange(len(x)) - bounds[:-1].repeat_interleave(lengths)
        longest = int(lengths.max()) if self.limit is None else self.limit
        inside = place < longest
        window, place = window[inside], place[inside]
        qkv = self.qkv(x[inside])
        cut = qkv.new_zeros(len(lengths), longest, qkv.shape[1]).index_put((window, place), qkv)
        q, k, v = (split_heads(t, self.num_heads) for t in cut.chunk(3, -1))
        there = torch.arange(longest) < lengths[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
        made = self.proj(merge_heads(out)[window, place])
        return torch.zeros_like(x).index_put((inside.nonzero().squeeze(1),), made)


class Nothing(nn.Module):
    """Adds nothing to a voxel."""

    def packed(self, x: Tensor, bounds: Tensor) -> Tensor:
        return torch.zeros_like(x)


MIXERS: dict[str, Callable[[], nn.Module] | None] = {
    BASELINE: lambda: PaddedSoftmax(DIM, HEADS),
    SEGMENTS: None,
    LIMITED: lambda: PaddedSoftmax(DIM, HEADS, LIMIT),
    NONE: Nothing,
}


class Teller(nn.Module):
    """Says of which kind every voxel is."""

    def __init__(self, name: str):
        super().__init__()
        self.embed, self.conv = nn.Linear(5, DIM), ResidualVoxels(DIM)
        self.stage = ScatterStage(DIM, HEADS, DEPTH, WINDOW)
        make = MIXERS[name]
        if make is not None:
            self.stage.mixers = nn.ModuleList(make() for _ in range(DEPTH))
        self.head = nn.Linear(DIM, len(KINDS) + 1)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.momentum = 0.1  # as usual: the authors' takes hundreds of steps to follow

    def forward(self, given: Scenes) -> Tensor:
        """(N, kinds + 1) logits, in the order of the voxels given."""
        x = self.conv(self.embed(given.x), conv_sites(given.coords, SHAPE, 3).table)
        order, _ = window_segments(given.coords, SHAPE, WINDOW)
        out = self.head(self.stage(Voxels(x, given.coords, SHAPE)).x)
        return torch.empty_like(out).index_copy(0, order, out)


@torch.no_grad()
def mean_accuracy(model: nn.Module, given: Scenes) -> float:
    """Percent of the voxels of a kind that are told right, averaged over kinds and stray points."""
    model.eval()
    right = (model(given).argmax(-1) == given.labels).float()
    return 100 * float(torch.stack([right[given.labels == i].mean() for i in given.labels.unique()]).mean())


def costs(given: Scenes, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Seconds of a training step, all contestants in turn; and the share of places that voxels fill."""
    lengths = window_segments(given.coords, SHAPE, WINDOW)[1].diff().double()

    steps = {}
    for name in NAMES:
        torch.manual_seed(0)
        steps[name] = training_step(Teller(name), lambda m: F.cross_entropy(m(given), given.labels))
    times = interleave(steps, repeats, clock="cpu")
    filled = {
        BASELINE: float(lengths.mean() / lengths.max()), LIMITED: float(lengths.clamp(max=LIMIT).mean() / LIMIT),
        SEGMENTS: 1.0, NONE: 1.0,
    }  # fmt: skip
    left = float(lengths.clamp(max=LIMIT).sum() / lengths.sum())
    return {
        n: {
            "step_seconds": t.minimum, "x_padded": t.minimum / times[BASELINE].minimum, "filled": filled[n],
            "voxels that take part": {LIMITED: left, NONE: 0.0}.get(n, 1.0),
        }
        for n, t in times.items()
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    steps: int = 120,
    batch: int = 4,
    pool: int = 120,
    lr: float = 4e-3,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 40,
    timed: int = 8,
) -> dict[str, Any]:
    """Train every contestant on generated scenes, and time it.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        steps, batch, lr, seeds: of training.
        pool: batches that it draws from.
        tested: scenes of the test.
        timed: scenes of a step that is timed.

    Returns:
        Plain values, for JSON.
    """
    generator = torch.Generator().manual_seed(4321)
    batches = [scenes(batch, generator) for _ in range(pool)]
    test = scenes(tested, torch.Generator().manual_seed(1234))

    def some(generator: torch.Generator) -> Scenes:
        return batches[int(torch.randint(pool, (), generator=generator))]

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = Teller(name)
        fit(model, some, lambda m, given: F.cross_entropy(m(given), given.labels), steps, lr=lr, seed=seed)
        return {METRIC: mean_accuracy(model, test), "parameters": parameters(model)}

    found = study(NAMES, run, METRIC, BASELINE, seeds, progress, keep, (steps, batch, pool, lr, tested))
    lengths = window_segments(test.coords, SHAPE, WINDOW)[1].diff().double()
    return {
        "what": "kinds of voxels in generated scenes", "machine": machine(), "shape": list(SHAPE), "window": WINDOW,
        "steps": steps, "batch": batch, "pool": pool, "lr": lr, "tested": tested, "chance": 100 / (len(KINDS) + 1),
        "voxels of a scene": len(test.x) / tested, "voxels of a window": float(lengths.mean()),
        "voxels of the fullest window": int(lengths.max()), **found,
        "costs": costs(scenes(timed, torch.Generator().manual_seed(7))),
    }  # fmt: skip
