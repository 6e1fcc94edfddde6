"""Are searched plans better than random ones of the same budget? Kinds of attention by layer, and heads by their alpha.

``attnlib bench --suite plans --out benchmarks/results`` measures again what ``plans-cpu.json`` holds and draws it. The
task is :func:`attnlib.bench.data.worlds.texture_crops` of 16 x 16 pixels: which photograph a crop is from.

*Kinds of attention* (Liu et al., 2022, arXiv 2207.13955): one small network, whose layers share weights over softmax
attention or cosFormer and over widths of the MLP, learns under random plans. Plans within a bound of the counted
operations are then scored with shared weights: random ones, those of an evolution, and those that a ranker of random
plans and an evolution on it propose, all with as many evaluations. What each finds is also trained anew.

*Heads without exponentials* (MPCViT, Zeng et al., 2022, arXiv 2211.13955): alphas between ReLU-softmax and scaling
attention learn under a cost; half of all heads stay ReLU-softmax, chosen by alpha or at random, and every choice is
trained on from the same weights.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.architecture import (
    KINDS,
    Found,
    Gene,
    Ranker,
    SharedAttention,
    Space,
    attention_cost,
    evolve,
    kendall_tau,
    sample_best,
)
from ...models.backbones.mpcvit import mpcvit
from ...models.backbones.stages import Backbone, Head, Stage
from ...models.blocks import Block
from ...nn.dense.mpcvit import MPCAttention, choose_heads, clamp_shares
from ..clock import machine
from ..data.worlds import TEXTURES, texture_crops
from ..small import Progress, accuracy, fit, picture, started_small, study
from .mixers import PATCH, Positions

SIDE, DIM, HEADS, DEPTH = 16, 48, 4, 4
TOKENS = (SIDE // PATCH) ** 2
WIDTHS = (24, 72, 144)
SPACE = Space({f"kind{i}": KINDS for i in range(DEPTH)} | {f"width{i}": WIDTHS for i in range(DEPTH)})

ONE, DRAWN, EVOLVED, RANKED = (
    "one random plan", "best of random plans", "evolution", "a ranker, and evolution on it"
)  # fmt: skip
SEARCHES = (DRAWN, EVOLVED, RANKED, ONE)
SCORE = "loss with shared weights"

CHOSEN, RANDOM = "largest alphas (MPCViT)", "random heads"
HEAD_PLANS = (RANDOM, CHOSEN, "smallest alphas", "all ReLU-softmax", "all scaling")
#: Weight of the cost of heads in the search, and the share that stays ReLU-softmax.
COST, SHARE = 0.2, 0.5


# --------------------------------------------------------------------------------------------------------------------
# Kinds of attention


class SharedMlp(nn.Module):
    """An MLP of which the first ``active`` hidden channels work."""

    def __init__(self, dim: int, widths: tuple[int, ...]):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, max(widths)), nn.Linear(max(widths), dim)
        self.active = max(widths)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        h = F.gelu(F.linear(x, self.fc1.weight[: self.active], self.fc1.bias[: self.active]))
        return F.linear(h, self.fc2.weight[:, : self.active], self.fc2.bias)


def network() -> Backbone:
    """The network whose layers hold all choices of :data:`SPACE`."""
    blocks = [Block(DIM, SharedAttention(DIM, HEADS, causal=False), mlp=SharedMlp(DIM, WIDTHS)) for _ in range(DEPTH)]
    classes = len(TEXTURES)
    head = Head(DIM, classes)
    return Backbone(
        Positions(DIM, SIDE // PATCH), [Stage(blocks)], (DIM,), (PATCH,), nn.LayerNorm(DIM), head, classes, 1, SIDE
    )


def take(model: nn.Module, gene: Gene) -> None:
    """Let a network work by a plan."""
    attentions = [m for m in model.modules() if isinstance(m, SharedAttention)]
    mlps = [m for m in model.modules() if isinstance(m, SharedMlp)]
    for i, (attention, mlp) in enumerate(zip(attentions, mlps, strict=True)):
        attention.active, mlp.active = gene[f"kind{i}"], gene[f"width{i}"]


def operations(gene: Gene) -> float:
    """Of all layers of a plan, for one image."""
    attention = sum(attention_cost(gene[f"kind{i}"], DIM, HEADS, TOKENS)["flops"] for i in range(DEPTH))
    return attention + sum(4 * DIM * gene[f"width{i}"] * TOKENS for i in range(DEPTH))


def middle(draws: int = 200) -> float:
    """Half of all plans cost at most this."""
    rng = random.Random(0)
    return sorted(operations(SPACE.sample(rng)) for _ in range(draws))[draws // 2]


@torch.no_grad()
def held_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Cross entropy in evaluation mode."""
    model.eval()
    return float(F.cross_entropy(torch.cat([model(part) for part in images.split(128)]), labels))


def _plain(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(pair[0]), pair[1])


def by_ranker(score: Callable[[Gene], float], evaluations: int, bound: float, tried: int, seed: int) -> Found:
    """Random plans teach a ranker, evolution finds what it likes best, and ``tried`` of these are scored."""
    drawn = sample_best(SPACE, score, evaluations - tried, operations, bound, seed)
    ranker = Ranker(SPACE).fit(*map(list, zip(*drawn.seen, strict=True)))
    liked = evolve(SPACE, lambda g: ranker.predict([g])[0], operations, bound, 10, 40, 10, 15, seed=seed)
    known = {SPACE.key(g) for g, _ in drawn.seen}
    fresh = [g for g, _ in sorted(liked.seen, key=lambda pair: pair[1]) if SPACE.key(g) not in known][:tried]
    seen = [*drawn.seen, *((g, score(g)) for g in fresh)]
    gene, best = min(seen, key=lambda pair: pair[1])
    return Found(gene, best, seen)


# --------------------------------------------------------------------------------------------------------------------
# Heads


def heads_network(alpha: float = 0.5) -> nn.Module:
    """A small MPCViT whose alphas start in the middle."""
    return mpcvit(
        DIM, DEPTH, HEADS, 2.0, PATCH, alpha, attn_drop=0.0, drop_path_rate=0.0, in_chans=1, img_size=SIDE,
        num_classes=len(TEXTURES),
    )  # fmt: skip


def _mixers(model: nn.Module) -> list[MPCAttention]:
    return [m for m in model.modules() if isinstance(m, MPCAttention)]


def _search(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    clamp_shares(model)
    shares = torch.cat([m.shares() for m in _mixers(model)])
    return _plain(model, pair) + COST * shares.mean()


@torch.no_grad()
def decide(model: nn.Module, plan: str, seed: int) -> nn.Module:
    """A copy whose heads are of one kind each."""
    out = copy.deepcopy(model)
    mixers = _mixers(out)
    generator = torch.Generator().manual_seed(seed)
    for m in mixers:
        if plan == RANDOM:
            m.alpha.copy_(torch.rand(m.alpha.shape, generator=generator))
        elif plan == "smallest alphas":
            m.alpha.neg_()
        m.alpha.requires_grad_(False)
    choose_heads(out, {"all ReLU-softmax": 1.0, "all scaling": 0.0}.get(plan, SHARE))
    return out


# --------------------------------------------------------------------------------------------------------------------


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    shared_steps: int = 200,
    steps: int = 100,
    batch: int = 16,
    lr: float = 3e-3,
    seeds: tuple[int, ...] = (0, 1, 2),
    rounds: int = 5,
    validated: int = 128,
    tested: int = 512,
    unseen: int = 30,
) -> dict[str, Any]:
    """Search both kinds of plans, and train what is found.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``plans-cpu.svg``.
        shared_steps, steps: of training the network of all plans, and a plan that was found.
        batch, lr, seeds: of training; the seed is also that of the searches.
        rounds: of evolution.
        validated, tested: crops that plans are scored on, and crops for the numbers reported.
        unseen: plans that a ranker is asked to order and has not seen.

    Returns:
        Plain values, for JSON.
    """
    valid = texture_crops(validated, SIDE, generator=torch.Generator().manual_seed(4321))
    test = texture_crops(tested, SIDE, "test", generator=torch.Generator().manual_seed(1234))
    bound = middle()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return texture_crops(batch, SIDE, generator=generator)

    @functools.cache
    def shared(seed: int) -> tuple[nn.Module, Callable[[Gene], float], int, Found]:
        """The trained network, the score of a plan, and what evolution found with how many scores."""
        torch.manual_seed(seed)
        model, rng = started_small(network(), seed), random.Random(seed)

        def loss(m: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
            take(m, SPACE.sample(rng))
            return _plain(m, pair)

        fit(model, draw, loss, shared_steps, lr=lr, seed=seed)

        def score(gene: Gene) -> float:
            take(model, gene)
            return held_loss(model, *valid)

        found = evolve(SPACE, score, operations, bound, rounds, 16, 4, 6, seed=seed)
        return model, score, len(found.seen), found

    def search(name: str, seed: int) -> dict[str, float]:
        model, score, count, evolved = shared(seed)
        other = seed + 100  # draws of its own
        extra: dict[str, float] = {}
        if name == EVOLVED:
            found = evolved
        elif name == RANKED:
            found = by_ranker(score, count, bound, min(12, count // 2), other)
            rng = random.Random(seed + 200)
            genes = [SPACE.sample(rng) for _ in range(unseen)]
            guessed = Ranker(SPACE).fit(*map(list, zip(*found.seen, strict=True))).predict(genes)
            extra["tau"] = kendall_tau(guessed, [score(g) for g in genes])
        else:
            found = sample_best(SPACE, score, 1 if name == ONE else count, operations, bound, other)
        take(model, found.gene)
        extra |= {"loss on other photographs' parts": held_loss(model, *test)}
        torch.manual_seed(seed)
        anew = started_small(network(), seed)
        take(anew, found.gene)
        fit(anew, draw, _plain, steps, lr=lr, seed=seed)
        return {
            SCORE: found.score, "evaluations": len(found.seen), "megaflops": operations(found.gene) / 1e6,
            "softmax layers": sum(found.gene[f"kind{i}"] == KINDS[0] for i in range(DEPTH)),
            "accuracy, trained anew": accuracy(anew, *test), "loss, trained anew": held_loss(anew, *test), **extra,
        }  # fmt: skip

    @functools.cache
    def alphas(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = started_small(heads_network(), seed)
        fit(model, draw, _search, shared_steps, lr=lr, seed=seed)
        clamp_shares(model)
        return model

    def heads(name: str, seed: int) -> dict[str, float]:
        model = alphas(seed)
        spread = torch.cat([m.alpha for m in _mixers(model)]).detach()
        chosen = decide(model, name, seed)
        before = accuracy(chosen, *test)
        fit(chosen, draw, _plain, steps, lr=lr / 3, seed=seed + 50)
        kept = sum(float(m.alpha.sum()) for m in _mixers(chosen))
        return {
            "accuracy": accuracy(chosen, *test), "loss": held_loss(chosen, *test), "accuracy before training": before,
            "ReLU-softmax heads": kept, "deviation of alphas": float(spread.std()),
        }  # fmt: skip

    sizes = (shared_steps, steps, batch, lr, rounds, validated, tested, unseen)
    kinds = study(SEARCHES, search, SCORE, DRAWN, seeds, progress, keep, ("kinds", *sizes))
    by_alpha = study(HEAD_PLANS, heads, "accuracy", RANDOM, seeds, progress, keep, ("heads", COST, SHARE, *sizes))
    if pictures is not None:
        curves = {
            label: [(r["name"], r[metric]["mean"], r[metric]["half"]) for r in rows["rows"]]
            for label, rows, metric in (
                ("kinds of attention, trained anew", kinds, "accuracy, trained anew"),
                ("heads by alpha, trained on", by_alpha, "accuracy"),
            )
        }
        picture(Path(pictures) / "plans-cpu.svg", curves, "", "accuracy, %", "plans of one budget on texture crops")
    return {
        "what": "searched plans against random ones of the same budget", "machine": machine(), "plans": SPACE.size,
        "bound": bound, "shared_steps": shared_steps, "steps": steps, "batch": batch, "lr": lr, "validated": validated,
        "tested": tested, "most frequent class": 100 * float(test[1].bincount().max()) / len(test[1]),
        "kinds of attention": kinds, "heads without exponentials": by_alpha,
    }  # fmt: skip
