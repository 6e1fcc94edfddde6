"""What a pretrained vision transformer attends to, and what its features lose when tokens leave.

``attnlib bench --suite real-vit --out benchmarks/results`` measures again what ``real-vit-cpu.json`` holds. The model
is DINOv2 ViT-S/14, its backbone fine-tuned for saliency by those who packed it. Images are grey crops of photographs
and textures inside scikit-image and scikit-learn: crops of the left part of each image are known, crops of the right
part, at another scale and mirrored or not, are asked: from which image are they (nearest neighbour by the class
token's cosine)?

Looked at, per layer: entropy and effective rank of maps, distance on the grid of patches, attention that the class
token gets from all and gives to itself, and patches whose norm exceeds three times the median ("high-norm patches",
Darcet et al., 2023, arXiv 2309.16588). Then patches leave before one block, by the scorers, selectors and mergers of
:mod:`attnlib.reduce`, and the accuracy of the same questions is held against random tokens, against a regular grid and
against averages of neighbouring patches; intervals are bootstrapped over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....grids import Layout
from ....hooks import Record, attach
from ....look import Statistics
from ....reduce import ClusterMerge, Grid, NearestMerge, TopK
from ... import models
from ...clock import machine
from ...data.files import _packaged, _read_photo
from ...plots import PALETTE
from ...small import Progress
from ._kept import Kept
from ._pictures import heat, panels, save
from .steering import rate

QUESTION = "what does a real vision transformer attend to, and which of its tokens can leave?"
MODELS = ("dinov2-small",)

#: From patches (B, N, C), and what the class token and all tokens gave each (B, N), to patches that go on.
Make = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Photographs and textures, by package and file.
IMAGES = (
    *(("skimage", f"data/{name}") for name in (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
        "rocket.jpg")),
    *(("sklearn", f"datasets/images/{name}") for name in ("china.jpg", "flower.jpg")),
)  # fmt: skip

PATCH = 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grey(photo: Tensor) -> Tensor:
    """(H, W, 3) bytes as (H, W) in [0, 1], its shorter side 300 pixels, so that scales are comparable."""
    x = photo.float().mean(-1)[None, None] / 255
    factor = 300 / min(x.shape[-2:])
    size = [round(s * factor) for s in x.shape[-2:]]
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)[0, 0]


def crops(
    images: Sequence[Tensor], known: int, asked: int, side: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops of the left parts and of the right parts of images.

    Args:
        images: (H, W) in [0, 1].
        known, asked: crops of each image.
        side: pixels after resizing.
        seed: of places, scales and mirrors.

    Returns:
        ``known`` (n, 3, side, side) normalised as the model expects, and which image each is of; ``asked``, likewise.
    """
    rng = np.random.default_rng(seed)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))

    def cut(image: Tensor, right: bool, size: int, mirror: bool) -> Tensor:
        height, width = image.shape
        half = width // 2
        left = int(rng.integers(half, width - size + 1)) if right else int(rng.integers(0, max(1, half - size + 1)))
        top = int(rng.integers(0, height - size + 1))
        part = image[top : top + size, left : left + size][None, None]
        part = F.interpolate(part, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
        return ((part.flip(-1) if mirror else part).expand(3, -1, -1) - mean) / std

    found: list[tuple[list[Tensor], list[int]]] = [([], []), ([], [])]
    for number, image in enumerate(images):
        for _ in range(known):
            found[0][0].append(cut(image, False, 120, False))
            found[0][1].append(number)
        for _ in range(asked):
            found[1][0].append(cut(image, True, int(rng.integers(84, 150)), bool(rng.integers(2))))
            found[1][1].append(number)
    (a, b), (c, d) = found
    return torch.stack(a), torch.tensor(b), torch.stack(c), torch.tensor(d)


# --------------------------------------------------------------------------------------------------------------------
# Looking


@torch.no_grad()
def look(model: Any, pixels: Tensor) -> dict[str, Any]:
    """Statistics of maps and norms of patches, per layer."""
    side = pixels.shape[-1] // PATCH
    layout = Layout((("cls", 1), ("image", (side, side))))
    maps = Statistics(what=("entropy", "distance", "sink", "rank"), grid=layout)
    received = Record(rows="all", what=("received",))
    with attach(model, maps, received) as session:
        out = model(pixel_values=pixels, output_hidden_states=True)
        seen, got = session.results["statistics"], session.results["record"]
    layers = []
    for layer, hidden in enumerate(out.hidden_states[:-1]):
        norms = hidden[:, 1:].float().norm(dim=-1)
        middle = norms.median(1, keepdim=True).values
        high = norms > 3 * middle
        share = (got[layer]["received"] / got[layer]["seen"].clamp_min(1)).mean(1)[:, 1:]  # over heads
        centred = hidden.float() - hidden.float().mean(-1, keepdim=True)
        kurtosis = centred.pow(4).mean(-1) / centred.pow(2).mean(-1).square() - 3
        layers.append(
            {
                "norm median": float(middle.mean()),
                "norm largest": float((norms.amax(1, keepdim=True) / middle).mean()),
                "high-norm share": float(high.float().mean()),
                "attention on a high-norm patch": float(share[high].mean()) if bool(high.any()) else None,
                "attention on another patch": float(share[~high].mean()),
                "class norm": float(hidden[:, 0].float().norm(dim=-1).mean()),
                "kurtosis class": float(kurtosis[:, 0].mean()), "kurtosis patches": float(kurtosis[:, 1:].mean()),
                "largest entry": float(hidden.float().abs().max()),
            }
        )  # fmt: skip
    tables = {
        name: [[round(float(v), 4) for v in seen[n][key]] for n in sorted(seen)]
        for name, key in (("entropy share", "entropy_share"), ("distance", "grid_distance"), ("rank", "rank"),
                          ("class token", "sink_score"))
    }  # fmt: skip
    return {**tables, "layers": layers}


@torch.no_grad()
def class_maps(model: Any, pixels: Tensor, layers: Sequence[int]) -> list[list[list[list[float]]]]:
    """What the class token reads, mean over heads, as grids: per image, per layer."""
    side = pixels.shape[-1] // PATCH
    with attach(model, Record(layers=list(layers), rows=[0])) as session:
        model(pixel_values=pixels)
        found = session.results["record"]
    grids = torch.stack([found[n]["weights"][0][:, :, 0, 1:].mean(1) for n in layers], 1).unflatten(-1, (side, side))
    return [[[[round(float(v), 5) for v in row] for row in grid] for grid in image] for image in grids]


# --------------------------------------------------------------------------------------------------------------------
# Leaving


def body(model: Any) -> tuple[Any, Any]:
    """The blocks and the last norm."""
    return (model.encoder.layer if hasattr(model.encoder, "layer") else model.encoder.layers), model.layernorm


def run_blocks(blocks: Sequence[Any], hidden: Tensor) -> Tensor:
    for block in blocks:
        out = block(hidden)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


@torch.no_grad()
def until(model: Any, pixels: Tensor, layer: int, size: int = 38) -> tuple[Tensor, Tensor, Tensor]:
    """States (B, 1 + N, C) before a block; what each patch got from the class token and from all, (B, N), before it."""
    hidden, by_class, by_all = [], [], []
    for some in pixels.split(size):
        record = Record(layers=[layer - 1], rows="all", what=("weights",))
        with attach(model, record) as session:
            blocks, _ = body(model)
            held: list[Tensor] = []
            hook = blocks[layer].register_forward_pre_hook(
                lambda m, a, k, held=held: held.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            )
            try:
                model(pixel_values=some)
            finally:
                hook.remove()
            weights = session.results["record"][layer - 1]["weights"][0]
        hidden.append(held[0])
        by_class.append(weights[:, :, 0, 1:].float().mean(1))
        by_all.append(weights[..., 1:].float().mean((1, 2)))
    return torch.cat(hidden), torch.cat(by_class), torch.cat(by_all)


def leave(patches: Tensor, scores: Tensor, selector: Any, merger: Any = None) -> Tensor:
    """Patches (B, N, C) that stay, (B, K, C), in their order."""
    there = torch.ones(scores.shape, dtype=torch.bool)
    keep = selector.keep(scores, there, there.sum(1))
    if merger is not None:
        keep, patches = merger.merge(scores, keep, there, patches)
    return patches[keep].unflatten(0, (len(patches), -1))


def pooled(patches: Tensor, by: tuple[int, int]) -> Tensor:
    """Averages of neighbouring patches (B, N, C) -> (B, N / (a b), C)."""
    side = round(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).unflatten(-1, (side, side))
    return F.avg_pool2d(grid, by, by).flatten(2).transpose(1, 2)


@torch.no_grad()
def features(model: Any, hidden: Tensor, layer: int, size: int = 38) -> Tensor:
    """Class tokens (B, C) of length one, after the blocks from ``layer`` on."""
    blocks, norm = body(model)
    found = [norm(run_blocks(blocks[layer:], some))[:, 0] for some in hidden.split(size)]
    return F.normalize(torch.cat(found).float(), dim=-1)


def by_chance(seed: int, count: int, patches: Tensor, by_class: Tensor, by_all: Tensor) -> Tensor:
    """Random patches, the same places for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return leave(patches, torch.rand(by_class.shape, generator=generator), TopK(count))


def ways(count: int, side: int, seeds: Sequence[int]) -> dict[str, Make]:
    """By name, how ``count`` of ``side`` x ``side`` patches are left."""
    found: dict[str, Make] = {
        "class attention": lambda x, c, r: leave(x, c, TopK(count)),
        "received attention": lambda x, c, r: leave(x, r, TopK(count)),
        "least class attention": lambda x, c, r: leave(x, -c, TopK(count)),
        "largest norm": lambda x, c, r: leave(x, x.norm(dim=-1), TopK(count)),
        "class attention, rest merged into nearest": lambda x, c, r: leave(x, c, TopK(count), NearestMerge()),
        "class attention, rest in clusters (VMTC)": lambda x, c, r: leave(
            x, c, TopK(count - count // 4), ClusterMerge(count // 4)),
        **{f"random, seed {s}": partial(by_chance, s, count) for s in seeds},
    }  # fmt: skip
    sizes = [(p, q) for p in range(1, 5) for q in (p, p + 1) if not side % p and not side % q]
    by = next((size for size in sizes if size[0] * size[1] * count == side * side), None)
    if by is not None:
        found["average pooling"] = lambda x, c, r: pooled(x, by)
    if by is not None and by[0] == by[1]:
        found["regular grid"] = lambda x, c, r: leave(x, c, Grid(by[0]))
    return found


def nearest(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> list[bool]:
    """Whether the nearest known feature is of the same image."""
    return (labels[(asked @ known.T).argmax(1)] == truth).tolist()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    name: str = "dinov2-small",
    images: int | None = None,
    known: int = 3,
    asked: int = 6,
    side: int = 12,
    layers: Sequence[int] = (3,),
    counts: Sequence[int] = (36, 16),
    seeds: Sequence[int] = (0, 1, 2),
    loaded: Any = None,
) -> dict[str, Any]:
    """Look, then let patches leave.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``real-vit-cpu.svg``.
        name: of :mod:`attnlib.bench.models`.
        images: how many; ``None`` for all.
        known, asked: crops of each.
        side: patches along a side.
        layers: blocks before which patches leave.
        counts: patches that stay.
        seeds: of random tokens.
        loaded: a model in place of a named one.

    Returns:
        Plain values, for JSON.
    """
    model = models.load(name, dtype=torch.bfloat16)[0] if loaded is None else loaded
    photos = [grey(_read_photo(_packaged(*place))) for place in IMAGES[:images]]
    a, labels, b, truth = crops(photos, known, asked, side * PATCH)
    dtype = next(model.parameters()).dtype
    a, b = a.to(dtype), b.to(dtype)
    both = torch.cat([a, b])
    kept = Kept(keep, ["vit", name, images, known, asked, side, list(layers), list(counts)], progress)
    seen = kept("looked at", lambda: look(model, b[:: max(1, len(b) // 34)]))
    shown = [i for i in (0, 4, 15) if i < len(photos)] or [0]
    depths = sorted({min(n, len(body(model)[0]) - 1) for n in (1, 4, 8, 11)})
    first = [int((truth == i).nonzero()[0]) for i in shown]
    maps = kept("maps of the class token", lambda: class_maps(model, b[first], depths))

    def told(hidden: Tensor, layer: int) -> list[bool]:
        got = features(model, hidden, layer)
        return nearest(got[: len(a)], labels, got[len(a) :], truth)

    rows: list[dict[str, Any]] = []
    base: list[bool] = []
    held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def at(layer: int) -> tuple[Tensor, Tensor, Tensor]:
        if layer not in held:
            held.clear()
            held[layer] = until(model, both, layer)
        return held[layer]

    def all_of(layer: int) -> list[bool]:
        return told(at(layer)[0], layer)

    def reduced(make: Make, layer: int) -> list[bool]:
        hidden, by_class, by_all = at(layer)
        return told(torch.cat([hidden[:, :1], make(hidden[:, 1:], by_class, by_all)], 1), layer)

    for layer in layers:
        base = base or kept("untouched", partial(all_of, layer))
        for count in counts:
            for label, make in ways(count, side, seeds).items():
                piece = f"layer {layer}, {count} patches, {label}"
                hits = kept(piece, partial(reduced, make, layer))
                rows.append({"layer": layer, "patches": count, "name": label, **rate(hits, base)})
    result: dict[str, Any] = {
        "what": "a pretrained vision transformer: what it attends to, and nearest neighbours after patches left",
        "model": models.MODELS[models.canonical(name)].title if loaded is None else "given", "machine": machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "images": [file.rpartition("/")[2] for _, file in IMAGES[:images]], "known": len(a), "asked": len(b),
        "patches": side * side, "seen": seen, "maps": {"layers": depths, "images": shown, "grids": maps},
        "untouched": rate(base), "rows": rows, "chance": round(1 / len(photos), 4),
        "seconds": round(kept.seconds, 1),
    }  # fmt: skip
    if pictures is not None:
        draw(Path(pictures) / "real-vit-cpu.svg", result)
    return result


def draw(path: Path, result: dict[str, Any]) -> None:
    """Statistics per layer, maps of the class token, and accuracy by patches left."""
    maps = result["maps"]
    depths = maps["layers"]
    figure, axes = panels(3, 4, 14, 10)
    seen = result["seen"]
    for axis, (key, title) in zip(axes[0], (("entropy share", "entropy of maps, share of the largest"),
                                            ("distance", "attended distance, patches"),
                                            ("rank", "effective rank of maps"),
                                            ("class token", "attention on the class token")), strict=True):  # fmt: skip
        heat(axis, np.array(seen[key]), title, "head", "layer")
    for axis, grid, depth in zip(axes[1], maps["grids"][0], depths, strict=False):
        heat(axis, np.array(grid), f"class token of block {depth} reads (image 1)", "", "")
    layers = range(len(seen["layers"]))
    axes[2][0].plot(layers, [x["norm largest"] for x in seen["layers"]], color="#e8590c", label="largest / median norm")
    axes[2][0].plot(layers, [100 * x["high-norm share"] for x in seen["layers"]], color="#2f7de1",
                    label="% of patches above 3 x median")  # fmt: skip
    axes[2][0].set_title("norms of patches before each block", fontsize=10)
    axes[2][0].legend(fontsize=7, frameon=False)
    names = list(dict.fromkeys(r["name"] for r in result["rows"] if not r["name"].startswith("random")))
    for axis, layer in zip(axes[2][1:3], dict.fromkeys(r["layer"] for r in result["rows"]), strict=False):
        own = [r for r in result["rows"] if r["layer"] == layer]
        for i, name in enumerate(names):
            points = [r for r in own if r["name"] == name]
            axis.plot([r["patches"] for r in points], [r["value"] for r in points], marker="o", markersize=3,
                      linewidth=1.2, color=PALETTE[i], label=name)  # fmt: skip
        counts = list(dict.fromkeys(r["patches"] for r in own))
        chance = [[r["value"] for r in own if r["patches"] == n and r["name"].startswith("random")] for n in counts]
        axis.plot(counts, [float(np.mean(c)) for c in chance], linestyle="--", color="#888888", label="random tokens")
        axis.axhline(result["untouched"]["value"], color="#000000", linewidth=0.8, label="all patches")
        axis.set_title(f"right answers, patches leave before block {layer}", fontsize=10)
        axis.set_xlabel("patches left", fontsize=9)
    handles, labels = axes[2][1].get_legend_handles_labels()
    for axis in axes[2][1 + len({r["layer"] for r in result["rows"]}) :]:
        axis.axis("off")
    axes[2][3].legend(handles, labels, fontsize=8, frameon=False, loc="center")
    save(figure, path)
