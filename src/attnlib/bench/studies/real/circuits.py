"""Heads that patching finds in SmolLM2-135M, silenced: against random heads and heads that look at the names.

``attnlib bench --suite real-circuits --out benchmarks/results`` measures it again. Sentences name one of two persons
again and ask for the other ("When Ada and Tom met, Tom gave a ring to"). Heads are ranked on some of them: by their
total effect at the last token when the repeated name is the other one, by the same to first order, by their attention
from the last token to the two names, or at random. On the others the first of each ranking are put to their mean over
all tokens, and the logit of the right name less that of the other one is read. Intervals are over seeds, each with
sentences of its own.

After Merullo et al., 2023, arXiv 2310.08744; their model is GPT-2 Medium.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....hooks import Node, Nodes, attach
from ....look import (
    AttendTo,
    Effects,
    ablated,
    agreement,
    answer_attention,
    first_order,
    logit_difference,
    overlap,
    patch,
)
from ... import models
from ...clock import machine
from ...data.circuits import NAMES, Pairs, indirect_objects, one_token
from ...small import Progress, picture, study

QUESTION = "Do the heads that patching finds carry the answer?"
MODELS = ("smollm2-135m",)

RANKINGS = ("patching", "first order", "attention", "random")


def name_places(ids: Tensor, names: Tensor) -> Tensor:
    """(B, N) boolean: tokens that are one of the names (B, n) of their sentence."""
    return (ids[:, :, None] == names[:, None]).any(-1)


def looking(model: Any, inputs: dict[str, Tensor], names: Tensor) -> list[Node]:
    """All heads, those first that give the names of a sentence the most attention from its end."""
    there = name_places(inputs["input_ids"], names).float()
    mass = torch.einsum("lbhn,bn->lh", answer_attention(model, inputs), there)
    heads = mass.shape[1]
    return [Node("z", i // heads, i % heads) for i in mass.flatten().argsort(descending=True, stable=True).tolist()]


@torch.no_grad()
def difference(model: Any, inputs: dict[str, Tensor], answers: tuple[Tensor, Tensor], edit: Any = None) -> Tensor:
    """(B,) logit of the right name less that of the other one."""
    with nullcontext() if edit is None else attach(model, edit):
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    rows = torch.arange(len(logits))
    return logits[rows, answers[0]] - logits[rows, answers[1]]


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    found_on: int = 12,
    tested_on: int = 16,
    sizes: Sequence[int] = (5, 10, 20),
    draws: int = 3,
    decoder: str = "smollm2-135m",
) -> dict[str, Any]:
    """Rank heads on some sentences, silence the first of them on others.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-circuits-cpu.svg``.
        seeds: of the sentences and of random heads.
        found_on, tested_on: sentences.
        sizes: heads that are silenced.
        draws: random sets whose mean is taken.
        decoder: name in :mod:`attnlib.bench.models`.

    Returns:
        Plain values, for JSON.
    """
    model, tokenizer = models.load(decoder)
    every = Nodes(model).of("z")
    names = one_token(tokenizer, NAMES)

    @functools.cache
    def sentences(seed: int) -> tuple[Pairs, Pairs]:
        pairs = indirect_objects(found_on + tested_on, names, seed=seed)
        return pairs.part(0, found_on), pairs.part(found_on, found_on + tested_on)

    @functools.cache
    def ranked(seed: int) -> tuple[dict[str, list[Node]], dict[str, float], Effects]:
        clean, other, right, wrong = sentences(seed)[0].tokens(tokenizer)
        metric = logit_difference(right, wrong)
        exact, slope = patch(model, clean, other, metric), first_order(model, clean, other, metric)
        by_looks = looking(model, clean, torch.stack([right, wrong], 1))
        orders = {"patching": exact.ranked(largest=False), "first order": slope.ranked(largest=False),
                  "attention": by_looks}  # fmt: skip
        shared = overlap(orders["patching"][:10], by_looks[:10], every, "first", by_layer=True)
        first = [exact.nodes.index(node) for node in orders["patching"][:10]]
        told = {"rank agreement": agreement(exact, slope), "overlap with attention": shared.value,
                "p of the overlap by layer": shared.p,
                "share of the first ten": float(exact.share[first].sum())}  # fmt: skip
        return orders, told, exact

    @functools.cache
    def tested(seed: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
        clean, _, right, wrong = sentences(seed)[1].tokens(tokenizer)
        return clean, (right, wrong), difference(model, clean, (right, wrong))

    def chosen(name: str, seed: int, size: int) -> list[list[Node]]:
        if name != "random":
            return [ranked(seed)[0][name][:size]]
        maker = torch.Generator().manual_seed(seed)
        return [[every[i] for i in torch.randperm(len(every), generator=maker)[:size].tolist()] for _ in range(draws)]

    def silenced(name: str, seed: int, size: int) -> dict[str, float]:
        clean, answers, plain = tested(seed)
        fitting = sentences(seed)[0].tokens(tokenizer)[0]
        after = torch.stack([
            difference(model, clean, answers, ablated(model, nodes, fitting)) for nodes in chosen(name, seed, size)
        ])  # fmt: skip
        return {"loss": float(plain.mean() - after.mean()), "right": float((after > 0).float().mean()) * 100,
                "difference": float(after.mean()), "clean difference": float(plain.mean()),
                "clean right": float((plain > 0).float().mean()) * 100}  # fmt: skip

    def turned(name: str, seed: int) -> dict[str, float]:
        """The first heads made to look at the name that is wrong, from the last token."""
        clean, answers, plain = tested(seed)
        ids, size = clean["input_ids"], sizes[0]
        wrong = (ids == answers[1][:, None]).float().argmax(1)[:, None]
        after = torch.stack([
            difference(model, clean, answers, AttendTo(nodes, wrong)) for nodes in chosen(name, seed, size)
        ])  # fmt: skip
        return {"loss": float(plain.mean() - after.mean()), "right": float((after > 0).float().mean()) * 100}

    settings = {"found_on": found_on, "tested_on": tested_on, "draws": draws}
    by_size = {}
    for size in sizes:
        by_size[size] = study(
            RANKINGS, functools.partial(silenced, size=size), "loss", "random", seeds, progress, keep,
            {**settings, "size": size},
        )  # fmt: skip
    found = {
        "silenced": by_size,
        "looking at the wrong name": study(RANKINGS, turned, "loss", "random", seeds, progress, keep,
                                           {**settings, "what": "turned", "size": sizes[0]}),
        "agreement": study(["patching"], lambda name, seed: ranked(seed)[1], "rank agreement", None, seeds, progress,
                           keep, {**settings, "what": "agreement"}),
    }  # fmt: skip
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            name: [
                (size, (row := next(r for r in one["rows"] if r["name"] == name))["loss"]["mean"], row["loss"]["half"])
                for size, one in by_size.items()
            ]
            for name in RANKINGS
        }
        picture(Path(pictures) / "real-circuits-cpu.svg", curves, "heads silenced, of 270",
                "loss of logit difference", "Indirect objects in SmolLM2-135M", (), ["random"])  # fmt: skip
    return {"machine": machine(), "question": QUESTION, "model": decoder, "heads": len(every), **settings, **found}
