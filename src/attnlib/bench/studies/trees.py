"""Trees of reversed attention in images of two objects: whether they are the objects, and what pruning leaves costs.

``attnlib bench --suite trees --out benchmarks/results`` measures again what ``trees-cpu.json`` holds and draws it. A
small DependencyViT and a vision transformer of equal width and depth learn which two handwritten digits an image shows.
Then the patches of the digits are told apart: by cutting the tree of a dependency mask in two, and by clustering what
the plain model has: its attention, its features; or no model at all: the places of patches. Which block is read is
chosen on images of the training part. Pruning lets tokens go by what they receive, by chance, or by what they receive
the other way round, from the same weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...extras import need
from ...grids import coordinates
from ...look.trees import dependency_tree
from ...models.build import create_model
from ...nn.dense.dependency_vit import ReversedAttention
from ..clock import machine
from ..data.worlds import two_digits
from ..small import Progress, fit, picture, started_small, study

SIDE, PATCH, DIM, DEPTH, HEADS = 28, 4, 48, 3, 4
GRID = SIDE // PATCH
#: A patch is a digit's from this share of ink on.
INK = 0.08
BASELINE = "attention of a ViT, clustered"
#: Way of telling patches apart -> (model, how).
WAYS: dict[str, tuple[str, str]] = {
    BASELINE: ("vit", "spectral"),
    "features of a ViT, clustered": ("vit", "features"),
    "dependency tree, cut": ("dependency", "tree"),
    "dependency mask, clustered": ("dependency", "spectral"),
    "features of a DependencyViT, clustered": ("dependency", "features"),
    "places, clustered": ("", "places"),
}
PRUNED = ("received", "chance", "reversed")


def build(name: str, seed: int, **settings: Any) -> nn.Module:
    """A model for ten labels of images (B, 1, 28, 28).

    Heads are chosen at a temperature of 1 and pooled tokens weighted by their messages: at the paper's 0.1, with
    messages as factors, the same steps leave a model this small near chance.
    """
    torch.manual_seed(seed)
    small: dict[str, Any] = dict(
        patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=10, in_chans=1, img_size=SIDE,
        global_pool="avg",
    )  # fmt: skip
    if name == "vit":
        return started_small(create_model("vit_tiny_patch16_224", class_token=False, **small), seed)
    own: dict[str, Any] = dict(layer_scale=None, temperature=1.0, message_pool="weighted")
    return started_small(create_model("dependency_vit_ti", **small, **own, **settings), seed)


class _Otherwise(ReversedAttention):
    """Reversed attention that lets other tokens go than those that receive least."""

    order = "chance"

    def _left(self, scores: Tensor, valid: Tensor | None, slots: int) -> Tensor:
        return super()._left(torch.rand_like(scores) if self.order == "chance" else -scores, valid, slots)


def lite(model: nn.Module, by: str, ratio: float) -> nn.Module:
    """The same weights, with ``ratio`` of all patches let go behind every block but the last."""
    pruned = build("dependency", 0, prune_blocks=tuple(range(DEPTH - 1)), prune_ratio=ratio)
    pruned.load_state_dict(model.state_dict())
    for part in pruned.modules():
        if isinstance(part, ReversedAttention) and by != "received":
            part.__class__, part.order = _Otherwise, by  # type: ignore[assignment]
    return pruned.eval()


def owners(ink: Tensor) -> Tensor:
    """(B, N): 0 or 1 for patches of either digit, -1 for the others, from ink (B, 2, H, W)."""
    share = F.avg_pool2d(ink, PATCH).flatten(2)
    return torch.where(share.amax(1) >= INK, share.argmax(1), -1)


def _loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = given
    return F.binary_cross_entropy_with_logits(model(x), F.one_hot(labels, 10).sum(1).float()) * 10


@torch.no_grad()
def right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Percent of the digits that are among the two of the highest logits."""
    best = torch.cat([model(part) for part in x.split(100)]).topk(2).indices
    return 100 * float((best.unsqueeze(-1) == labels.unsqueeze(1)).any(1).float().mean())


@torch.no_grad()
def relations(name: str, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Maps (B, N, N), receivers or readers in rows, of every block and their sum."""
    if name == "dependency":
        maps = model.dependencies(x).masks  # type: ignore[operator]
    else:
        found: list[Tensor] = []
        inner = [block.mixer.inner for block in model.stages]  # type: ignore[union-attr]

        def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> None:
            found.append(args[0])

        hooks = [m.register_forward_hook(note, with_kwargs=True) for m in inner]
        try:
            model(x)
        finally:
            for hook in hooks:
                hook.remove()
        maps = torch.stack([m(t, returns=("weights",)).weights.mean(1) for m, t in zip(inner, found, strict=True)])
    return {**{str(i): m for i, m in enumerate(maps)}, "sum": maps.sum(0)}


def rand_index(how: str, held: Tensor, truth: Tensor) -> float:
    """Mean adjusted Rand index of two groups of the digits' patches.

    Args:
        how: ``"tree"`` or ``"spectral"`` of maps (B, N, N); ``"features"`` or ``"places"`` of vectors (B, N, C).
        held: what is grouped.
        truth: (B, N) of :func:`owners`.
    """
    cluster = need("sklearn.cluster", "the study of trees")
    score = need("sklearn.metrics", "the study of trees").adjusted_rand_score
    total = 0.0
    for one, own in zip(held, truth, strict=True):
        mine = own >= 0
        if how == "tree":
            # Every patch may be an ancestor of one of a digit's, but only these are asked for.
            groups = dependency_tree(one, roots="one", valid=mine).groups(2, least=3)[mine].numpy()
        elif how == "spectral":
            near = one[mine][:, mine].double()
            near = (near + near.T) / 2 + 1e-9
            groups = cluster.SpectralClustering(2, affinity="precomputed", random_state=0).fit_predict(near.numpy())
        else:
            groups = cluster.KMeans(2, n_init=4, random_state=0).fit_predict(one[mine].double().numpy())
        total += float(score(own[mine].numpy(), groups))
    return total / len(held)


@torch.no_grad()
def vectors(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Tokens (B, N, C) behind every block, normed."""
    maps = model.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)  # type: ignore[operator]
    return {str(i): m for i, m in enumerate(maps)}


def best(how: str, held: dict[str, Tensor], truth: Tensor) -> str:
    """The block whose groups fit best."""
    return max(held, key=lambda key: rand_index(how, held[key], truth))


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 1400,
    batch: int = 32,
    seeds: tuple[int, ...] = (0, 1, 2),
    chosen: int = 40,
    tested: int = 120,
    classified: int = 1000,
    drawn: int = 6000,
) -> dict[str, Any]:
    """Train both models, tell patches apart in every way, and prune.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``trees-cpu.svg``.
        steps, batch, seeds: of training.
        chosen: images of the training part on which the block that is read is chosen.
        tested, classified: images of the test whose patches are told apart, and that are classified.
        drawn: images that are trained on.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {
        "what": "trees of reversed attention in images of two digits", "machine": machine(), "steps": steps,
        "batch": batch, "tested": tested, "classified": classified,
        "drawn": drawn, "chance": {"digits right": 20.0, "Rand index": 0.0},
    }  # fmt: skip
    images, labels, _ = two_digits(classified, SIDE, "test", torch.Generator().manual_seed(77))
    seen, _, seen_ink = two_digits(chosen, SIDE, "train", torch.Generator().manual_seed(78))
    told, _, told_ink = two_digits(tested, SIDE, "test", torch.Generator().manual_seed(79))
    truths = owners(seen_ink), owners(told_ink)
    made: dict[tuple[str, int], nn.Module] = {}
    pool = two_digits(drawn, SIDE, "train", torch.Generator().manual_seed(76))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(drawn, (batch,), generator=generator)
        return pool[0][at], pool[1][at]

    def trained(name: str, seed: int) -> nn.Module:
        if (name, seed) not in made:
            model = build(name, seed)
            losses = fit(model, draw, _loss, steps, lr=3e-3, seed=seed)
            assert all(map(math.isfinite, losses))
            made[name, seed] = model.eval()
        return made[name, seed]

    def grouped(way: str, seed: int) -> dict[str, float]:
        name, how = WAYS[way]
        if how == "places":
            at = coordinates((GRID, GRID)).float().expand(len(told), -1, -1)
            return {"index": rand_index(how, at, truths[1])}
        model = trained(name, seed)
        read = (lambda x: vectors(model, x)) if how == "features" else (lambda x: relations(name, model, x))
        block = best(how, read(seen), truths[0])
        held = read(told)[block]
        found = {"index": rand_index(how, held, truths[1]), "digits right": right(model, images, labels)}
        if how == "tree":
            found["trees"] = sum(len(dependency_tree(one).roots) for one in held) / len(held)
        return found | {"block": DEPTH if block == "sum" else float(block)}

    def pruning(by: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = trained("dependency", seed)
        if by == "nothing":
            return {"digits right": right(model, images, labels)}
        return {
            f"{'' if ratio == 0.16 else f'{ratio:g}: '}digits right": right(lite(model, by, ratio), images, labels)
            for ratio in (0.16, 0.3)
        }

    key = (steps, batch, chosen, tested, classified)
    result["groups"] = study(list(WAYS), grouped, "index", BASELINE, seeds, progress, keep, ("groups", *key))
    result["pruned"] = study(
        ["nothing", *PRUNED], pruning, "digits right", "nothing", seeds, progress, keep, ("pruned", *key)
    )
    if pictures is not None:
        rows = result["groups"]["rows"]
        curves = {row["name"]: [(row["name"], row["index"]["mean"], row["index"]["half"])] for row in rows}
        picture(
            Path(pictures) / "trees-cpu.svg", {"": [p for points in curves.values() for p in points]}, "",
            "adjusted Rand index", "patches of two digits told apart",
        )  # fmt: skip
    return result
