"""Does pruning a Vision Mamba need alignment, and scores? Patches removed from trained models, 50 to 90 % kept.

``attnlib bench --suite pruning --out benchmarks/results`` measures again what ``pruning-cpu.json`` holds and draws it.
Small Vision Mambas (convolutions, then scans both ways, a class token in the middle of 64 patches) learn to tell
handwritten digits with pieces of others around them. Then patches are removed behind the first block, nothing is
trained any more, and the state of what is left either goes on decaying where patches were (ToP-ViM's alignment, Zhan et
al., 2024, arXiv 2409.18962: by the step of the next patch that is left, or by the steps that the removed ones had) or
does not (deletion). Which patches stay is decided by their scores or at random. Beside the accuracy, *divergence* is
how far predictions are from those of the same model with all patches: the mean of Kullback and Leibler, in nats.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.vim import Remaining, VisionMamba, vim
from ...models.blocks import ConvStem
from ...nn.layers import ConvNorm
from ..clock import machine
from ..data.worlds import cluttered_digits
from ..small import Progress, accuracy, fit, parameters, picture, study

SIDE, DIGIT, PIECES, PATCH, DIM, DEPTH = 24, 20, 2, 3, 48, 3
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
METRIC = "accuracy at 70 %"
DELETION = "deletion"

#: Contestant -> how the state passes what was removed, and whether scores decide what is removed.
CONTESTANTS: dict[str, tuple[str, bool]] = {
    DELETION: ("none", True),
    "aligned, next patch's step": ("gap", True),
    "aligned, own steps": ("last", True),
    "random patches, deletion": ("none", False),
    "random patches, aligned by the next": ("gap", False),
}


def build() -> VisionMamba:
    """The model that is pruned."""
    model = vim(
        patch_size=PATCH, embed_dim=DIM, depth=DEPTH, d_state=4, num_classes=10, in_chans=1, img_size=SIDE,
        mixer=dict(expand=1.0),
    )  # fmt: skip
    model.stem = ConvStem(ConvNorm(1, DIM // 2, 3), ConvNorm(DIM // 2, DIM, 3, PATCH))
    for table, spread in ((model.pos_embed, 0.2), (model.cls_token, 0.5)):  # starts of large models learn too slowly
        assert table is not None
        nn.init.normal_(table, std=spread)
    return model


def draw(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    return cluttered_digits(count, SIDE, part, PIECES, generator, DIGIT)


@contextmanager
def pruned(model: VisionMamba, share: float, align: str, scored: bool, seed: int) -> Iterator[None]:
    """Remove patches behind the first block inside of the context."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(block: nn.Module, args: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        x, carry = out
        if scored or not isinstance(carry, Remaining) or carry.scores is None:
            return out
        return x, replace(carry, scores=torch.rand(carry.scores.shape, generator=generator))

    handle = model.stages[0].register_forward_hook(shuffle)  # type: ignore[union-attr, index]
    model.prune((0,), share, align)
    try:
        yield
    finally:
        model.prune()
        handle.remove()


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes) logarithms of probabilities."""
    model.eval()
    return torch.cat([model(part) for part in images.split(128)]).log_softmax(-1)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 280,
    batch: int = 16,
    pool: int = 1536,
    lr: float = 4e-3,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 384,
    shares: Sequence[float] = SHARES,
) -> dict[str, Any]:
    """Train a model for every seed, and prune it in every way.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``pruning-cpu.svg``.
        steps, batch, lr, seeds: of training.
        pool: images that it draws from.
        tested: images, of digits that were not trained on.
        shares: of the patches that stay; 0.7 among them.

    Returns:
        Plain values, for JSON.
    """
    test = draw(tested, "test", torch.Generator().manual_seed(1234))
    images, labels = draw(pool, "train", torch.Generator().manual_seed(4321))

    def some(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(pool, (batch,), generator=generator)
        return images[at], labels[at]

    @functools.cache
    def trained(seed: int) -> tuple[VisionMamba, Tensor, float]:
        torch.manual_seed(seed)
        model = build()

        def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(m(given[0]), given[1])

        fit(model, some, loss, steps, lr=lr, seed=seed)
        return model.eval(), answers(model, test[0]), accuracy(model, *test)

    def run(name: str, seed: int) -> dict[str, float]:
        model, whole, right = trained(seed)
        align, scored = CONTESTANTS[name]
        found: dict[str, float] = {}
        for share in shares:
            with pruned(model, share, align, scored, seed):
                told = answers(model, test[0])
            percent = f"at {round(100 * share)} %"
            found[f"accuracy {percent}"] = 100 * float((told.argmax(-1) == test[1]).float().mean())
            found[f"divergence {percent}"] = float(F.kl_div(told, whole, reduction="batchmean", log_target=True))
        return {**found, "accuracy of the model": right}

    found = study(
        tuple(CONTESTANTS), run, METRIC, DELETION, seeds, progress, keep, (steps, batch, pool, lr, tested, list(shares))
    )  # fmt: skip
    if pictures is not None:
        curves = {
            r["name"]: [(100 * s, *(r[f"accuracy at {round(100 * s)} %"][x] for x in ("mean", "half"))) for s in shares]
            for r in found["rows"]
        }
        curves["all patches"] = [(100.0, *(found["rows"][0]["accuracy of the model"][x] for x in ("mean", "half")))]
        picture(
            Path(pictures) / "pruning-cpu.svg", curves, "patches kept, %", "accuracy, %",
            "patches removed from trained Vision Mambas", dashed=(DELETION,),
        )  # fmt: skip
    return {
        "what": "pruning of trained Vision Mambas", "machine": machine(), "task": "digits with pieces of others",
        "patches": (SIDE // PATCH) ** 2, "blocks": DEPTH, "steps": steps, "batch": batch, "pool": pool, "lr": lr,
        "tested": tested,
        "most frequent class": 100 * float(test[1].bincount().max()) / len(test[1]),
        "parameters": parameters(build()), **found,
    }  # fmt: skip
