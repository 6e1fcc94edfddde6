"""What routed, sparse and sampled patterns keep of the attention of small trained models, by how much they compute.

``attnlib bench --suite routed --out benchmarks/results`` measures again what ``routed-cpu.json`` holds and draws it. A
vision transformer of two blocks on 16 x 16 tokens learns to tell the photograph that a crop is from. Then, for
every block and head, *recall* is the share of the dense attention weights that lies on the pairs of a pattern, and
*density* the share of all pairs that the pattern has. Predicted pairs have their predictor fitted to that model's maps,
which stay as they are; nothing else is learned from them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...grids import block_windows
from ...nn.layers import split_heads
from ...nn.sparse.sparsifiner import Sparsifiner
from ...ops.block_policies import block_affinity, topk_blocks
from ...ops.block_sparse import BlockPlan, block_recall
from ..clock import machine
from ..data.worlds import TEXTURES, texture_crops
from ..small import Progress, accuracy, fit, picture, study
from .mixers import BASELINE, DIM, HEADS, PATCH, build

#: Pixels a side, tokens a side, and a side of a region.
SIDE, TOKENS, REGION = 16 * PATCH, 16, 4
DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
METRIC = "recall at 1/8"
RANDOM = "random keys"
PREDICTED = {"predicted pairs (Sparsifiner)": 0.0, "predicted pairs, small entries of the basis cut as released": 0.02}

#: From queries and keys (B, H, N, D), regions one after another, to a plan of a density.
Pattern = Callable[[Tensor, Tensor, float], BlockPlan]


def _single(index: Tensor) -> BlockPlan:
    return BlockPlan(index, 1, 1, TOKENS**2)


def _places() -> Tensor:
    """(N, 2) rows and columns of the tokens, regions one after another."""
    at = torch.arange(TOKENS)
    return block_windows(torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)[None], (REGION, REGION)).reshape(-1, 2)


def _most(q: Tensor, k: Tensor, density: float) -> BlockPlan:
    return _single((q @ k.mT).topk(round(density * k.shape[2]), -1).indices)


def _blocks(q: Tensor, k: Tensor, density: float, q_block: int, shared: bool = False) -> BlockPlan:
    size = REGION**2
    if shared:  # all heads share one routing, by the whole width
        q, k = (t.transpose(1, 2).flatten(2)[:, None] for t in (q, k))
    scores = block_affinity(q, k, q_block, size)
    return topk_blocks(scores, max(1, round(density * scores.shape[-1])), q_block, size, q.shape[2])


def _regular(q: Tensor, k: Tensor, density: float) -> BlockPlan:
    n = k.shape[2]
    return _single(torch.arange(0, n, round(1 / density)).expand(n, -1))


def _nearest(q: Tensor, k: Tensor, density: float) -> BlockPlan:
    at = _places().float()
    return _single(torch.cdist(at, at).topk(round(density * k.shape[2]), -1, largest=False).indices)


def _random(q: Tensor, k: Tensor, density: float) -> BlockPlan:
    return _single(torch.rand(*q.shape[:3], k.shape[2]).topk(round(density * k.shape[2]), -1).indices)


PATTERNS: dict[str, Pattern] = {
    "largest pairs, the most there is": _most,
    "blocks of 16 keys for every query": functools.partial(_blocks, q_block=1),
    "routed regions (BiFormer)": functools.partial(_blocks, q_block=REGION**2, shared=True),
    "a regular sample of keys": _regular,
    "nearest keys": _nearest,
    RANDOM: _random,
}
NAMES = (*list(PATTERNS)[:1], *PREDICTED, *list(PATTERNS)[1:])


def _reads(model: nn.Module, images: Tensor) -> list[tuple[Any, Tensor]]:
    """The mechanism of every block, and what it read: (B, 16, 16, C)."""
    found: list[tuple[Any, Tensor]] = []
    mixers = [m.mixer.inner for m in model.stages[0].blocks]  # type: ignore[union-attr, index]
    hooks = [m.register_forward_hook(lambda m, args, out: found.append((m, args[0]))) for m in mixers]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _heads(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Queries and keys of a mixer (B, H, N, D), regions one after another, and its scale."""
    x = block_windows(x.view(x.shape[0], TOKENS, TOKENS, -1), (REGION, REGION)).reshape(x.shape[0], TOKENS**2, -1)
    return split_heads(mixer.q(x), HEADS), split_heads(mixer.k(x), HEADS), mixer.scale


def predictors(model: nn.Module, steps: int, batch: int, seed: int) -> list[Sparsifiner]:
    """A Sparsifiner for every block, with its projections, fitted to its attention."""
    made = nn.ModuleList()
    torch.manual_seed(seed)
    for block in model.stages[0].blocks:  # type: ignore[union-attr, index]
        own = Sparsifiner(
            DIM, HEADS, grid=TOKENS, cls_tokens=0, reduce_n=6, basis_threshold=0.0, coef_topk=8, recon_share=1.0
        )
        own.load_state_dict({**own.state_dict(), **block.mixer.inner.state_dict()})
        for name, p in own.named_parameters():
            p.requires_grad_(name.startswith(("cheap", "reduce", "expand")))
        made.append(own)

    def loss(fitted: nn.Module, images: Tensor) -> Tensor:
        total = images.new_zeros(())
        for own, (_, x) in zip(fitted, _reads(model, images), strict=True):  # type: ignore[call-overload]
            total = total + own(x, returns=("losses",)).losses["reconstruction"]
        return total / (len(images) * HEADS * TOKENS**2)

    model.eval()
    fit(made, lambda g: texture_crops(batch, SIDE, generator=g)[0], loss, steps, lr=1e-2, seed=seed, weight_decay=0)
    return list(made.eval())  # type: ignore[arg-type]


def said(density: float) -> str:
    """``1/8``."""
    return f"1/{round(1 / density)}"


@torch.no_grad()
def recalls(model: nn.Module, images: Tensor, pattern: Pattern) -> dict[str, float]:
    """Percent of the dense weights on the pairs of a pattern, over all blocks, heads and queries, by density."""
    found: dict[str, list[Tensor]] = {}
    for mixer, x in _reads(model, images):
        q, k, scale = _heads(mixer, x)
        for density in DENSITIES:
            kept = block_recall(q, k, pattern(q, k, density), scale=scale).mean()
            found.setdefault(f"recall at {said(density)}", []).append(100 * kept)
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


@torch.no_grad()
def predicted_recalls(
    model: nn.Module, images: Tensor, fitted: list[Sparsifiner], threshold: float
) -> dict[str, float]:
    """The same of the pairs that fitted predictors choose."""
    found: dict[str, list[Tensor]] = {}
    for own, (_, x) in zip(fitted, _reads(model, images), strict=True):
        q, k = (split_heads(f(x.flatten(1, -2)), HEADS) for f in (own.q, own.k))
        own.basis_threshold = threshold
        for density in DENSITIES:
            own.keep_rate = density
            plan = own.plan(x)
            assert isinstance(plan, BlockPlan)
            kept = block_recall(q, k, plan, scale=own.scale).mean()
            found.setdefault(f"recall at {said(density)}", []).append(100 * kept)
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 700,
    fitting_steps: int = 120,
    batch: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 256,
    shown: int = 4,
) -> dict[str, Any]:
    """Train the models, fit the predictors, and take recalls on images that were not trained on.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``routed-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test of accuracy.
        fitting_steps: of the predictors.
        shown: images that recall is taken on.

    Returns:
        Plain values, for JSON.
    """
    test = texture_crops(tested, SIDE, "test", generator=torch.Generator().manual_seed(1234))

    @functools.cache
    def trained(seed: int) -> tuple[nn.Module, float]:
        torch.manual_seed(seed)
        model = build(BASELINE, len(TEXTURES), side=SIDE)

        def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(m(given[0]), given[1])

        fit(model, lambda g: texture_crops(batch, SIDE, generator=g), loss, steps, lr=3e-3, seed=seed)
        return model.eval(), accuracy(model, *test)

    @functools.cache
    def fitted(seed: int) -> list[Sparsifiner]:
        return predictors(trained(seed)[0], fitting_steps, batch, seed)

    def run(name: str, seed: int) -> dict[str, float]:
        model, right = trained(seed)
        torch.manual_seed(seed)
        images = test[0][:shown]
        if name in PREDICTED:
            found = predicted_recalls(model, images, fitted(seed), PREDICTED[name])
        else:
            found = recalls(model, images, PATTERNS[name])
        return {**found, "accuracy of the model": right}

    found = study(NAMES, run, METRIC, RANDOM, seeds, progress, keep, (steps, fitting_steps, batch, tested, shown))
    majority = 100 * float(test[1].bincount().max()) / len(test[1])
    if pictures is not None:
        curves = {
            r["name"]: [(d, r[f"recall at {said(d)}"]["mean"], r[f"recall at {said(d)}"]["half"]) for d in DENSITIES]
            for r in found["rows"]
        }
        picture(
            Path(pictures) / "routed-cpu.svg", curves, "density: share of all pairs", "recall: share of attention, %",
            "what patterns keep of trained dense attention", log="x", dashed=(RANDOM, "nearest keys"),
        )  # fmt: skip
    return {
        "what": "recall of dense attention by density", "machine": machine(), "task": "texture crops",
        "tokens": TOKENS**2, "steps": steps, "fitting_steps": fitting_steps, "batch": batch, "tested": tested,
        "shown": shown, "most frequent class": majority, **found,
    }  # fmt: skip
