"""Patches from 16 pixels down to single ones: how the loss falls with the number of tokens, and its exponent.

``attnlib bench --suite patches --out benchmarks/results`` measures again what ``patches-cpu.json`` holds and draws it.
Wang et al., 2025, "Scaling Laws in Patchification", arXiv 2502.03738, keep a model and shrink its patches. Here, a
vision transformer of two blocks tells which photograph a crop of 32 x 32 pixels is from, by parts of the photographs
that it was not trained on; from one patch size to the next only the embedding of patches and the table of positions
change. Its tokens are mixed by attention, as in the paper's DeiT, or by focal modulation, whose cost is linear in the
number of tokens, as is that of the paper's Adventurer. The law is ``loss(N) = a + b N^-c`` for N tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.build import create_model
from ..clock import machine
from ..data.worlds import TEXTURES, texture_crops
from ..small import Progress, fit, interval, operations, picture, scored, started_small, study
from ..stats import fit_power_law, mean_interval, paired_interval

SIDE, DIM = 32, 32

#: Contestant -> the mechanism of its blocks.
MIXERS: dict[str, str | None] = {"attention": None, "focal modulation": "focalnet"}
PATCHES = (16, 8, 4, 2, 1)


def build(mixer: str, patch: int, seed: int = 0) -> Any:
    """A vision transformer of two blocks that pools its patches."""
    torch.manual_seed(seed)
    model = create_model(
        "vit_tiny_patch16_224", patch_size=patch, img_size=SIDE, in_chans=1, embed_dim=DIM, depth=2, num_heads=2,
        mlp_ratio=2.0, num_classes=len(TEXTURES), class_token=False, global_pool="avg", mechanism=MIXERS[mixer],
    )  # fmt: skip
    return started_small(model, seed)


def flops(model: nn.Module) -> float:
    """Of one image, forward, in millions."""
    return operations(lambda: model(torch.zeros(1, 1, SIDE, SIDE))) / 1e6


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 400,
    batch: int = 16,
    crops: int = 1024,
    seeds: tuple[int, ...] = (0, 1, 2),
    patches: tuple[int, ...] = PATCHES,
    mixers: tuple[str, ...] = tuple(MIXERS),
) -> dict[str, Any]:
    """Train both mixers at every patch size, and fit the law.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``patches-cpu.svg``.
        steps, batch: of training, the same for all.
        crops: of the test.
        seeds: of initial weights and batches.
        patches: sides in pixels, from the largest, at least three; the first is the baseline.
        mixers: of :data:`MIXERS`.

    Returns:
        Plain values, for JSON: per mixer the rows of the study, the ``law`` of the mean losses with the interval of its
        exponent, the exponents of single seeds, paired ``steps`` from each patch size to the next, and, where the loss
        does not fall all the way, the law down to the patch size behind which it first rises.
    """
    test = texture_crops(crops, part="test", generator=torch.Generator().manual_seed(1234))
    result: dict[str, Any] = {
        "what": "loss against the number of patches", "machine": machine(), "steps": steps, "batch": batch,
        "tested": crops, "chance loss": float(torch.tensor(len(TEXTURES)).log()), "mixers": {},
    }  # fmt: skip
    curves: dict[str, list[tuple[Any, float, float | None]]] = {}
    tokens = [(SIDE // p) ** 2 for p in patches]
    names = [f"P = {p}" for p in patches]
    for mixer in mixers:

        def run(name: str, seed: int, mixer: str = mixer) -> dict[str, float]:
            model = build(mixer, int(name.rpartition(" ")[2]), seed)

            def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(m(given[0]), given[1])

            losses = fit(model, lambda g: texture_crops(batch, generator=g), loss, steps, lr=3e-3, seed=seed)
            return {**scored(model, *test), "train_loss": sum(losses[-40:]) / len(losses[-40:])}

        found = study(names, run, "loss", names[0], seeds, progress, keep, (mixer, steps, batch, crops))
        by_patch = {
            p: {r["seed"]: r["loss"] for r in found["runs"] if r["name"] == n}
            for p, n in zip(patches, names, strict=True)
        }
        for row, p, n in zip(found["rows"], patches, tokens, strict=True):
            model = build(mixer, p)
            whole = sum(w.numel() for w in model.parameters())
            row |= {
                "tokens": n, "megaflops": flops(model), "parameters": whole,
                "parameters of blocks and head": whole - model.pos_embed.numel() - model.stem.proj.weight.numel(),
            }  # fmt: skip
        law = fit_power_law(tokens, [row["loss"]["mean"] for row in found["rows"]])
        single = [fit_power_law(tokens, [by_patch[p][s] for p in patches]).exponent for s in seeds]
        gaps, falls = {}, []
        for a, b in zip(patches, patches[1:], strict=False):
            gap = paired_interval(by_patch[b], by_patch[a])
            gaps[f"{a} to {b}"] = None if gap is None else interval(gap)
            falls.append(gap is not None and gap.mean <= 0)
        down = 1 + falls.index(False) if False in falls else len(patches)  # patch sizes until the loss first rises
        part = None
        if 3 <= down < len(patches):
            part = fit_power_law(tokens[:down], [row["loss"]["mean"] for row in found["rows"][:down]])
        result["mixers"][mixer] = {
            **found, "law": law._asdict(), "exponents of seeds": single,
            "exponent over seeds": interval(mean_interval(single)), "steps": gaps,
"falls from patch to patch": all(falls), "law down to the best patch": None if part is None else part._asdict(),
        }  # fmt: skip
        curves[mixer] = [(row["tokens"], row["loss"]["mean"], row["loss"]["half"]) for row in found["rows"]]
        shown = law if part is None else part
        spread = "" if shown.half is None else f" ± {shown.half:.2f}"
        last = tokens[-1] if part is None else tokens[down - 1]
        at = [tokens[0] * (last / tokens[0]) ** (i / 24) for i in range(25)]
        curves[f"{mixer}: exponent {shown.exponent:.2f}{spread}"] = [(n, shown(n), None) for n in at]
    if pictures is not None:
        picture(
            Path(pictures) / "patches-cpu.svg", curves, "patches of an image of 32 x 32 pixels",
            "loss on held-out parts, nats", "which photograph, by the number of patches", log=("x",),
            dashed=[name for name in curves if name not in mixers],
        )  # fmt: skip
    return result
