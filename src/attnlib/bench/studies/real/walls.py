"""Red herrings: clues that fit several groups, and embeddings that sort them.

``attnlib bench --suite real-walls --out benchmarks/results`` measures again what ``real-walls-cpu.json`` holds. Walls
of our own (:mod:`attnlib.bench.exams.walls`), each with one solution and at least four clues that fit another group
too, are sorted by clusters of four over embeddings of their clues, and so are the same groups rearranged into walls
from four different ones. Embeddings are MiniLM's, of which the mean over a clue's tokens is a sentence encoder's, and
two of SmolLM2-135M: the mean over a clue's rows of the embedding table, and over its last states. Chance sorts at
random. Every seed draws walls of its own.

After Naeini et al., 2023, arXiv 2306.11167, whose walls are the quiz's and whose models are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import models
from ...clock import machine
from ...exams.walls import SCORES, Wall, cluster_groups, herrings, own_walls, randomized, score_groups
from ...exams.words import CONNECTIONS
from ...small import Progress, interval, picture, study
from ...stats import mean_interval

QUESTION = "do red herrings hurt?"
MODELS = ("minilm-l6", "smollm2-135m")

KINDS = ("own walls", "randomised walls")

Encoder = Callable[[Sequence[str]], dict[str, Tensor]]


@torch.no_grad()
def encoders(load: Callable[[str], Any] = models.load) -> dict[str, Encoder]:
    """From clues to unit vectors, by name."""

    def mean(states: Tensor, mask: Tensor) -> Tensor:
        weight = mask[..., None].to(states.dtype)
        return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)

    def encoder(name: str, static: bool) -> Encoder:
        def encode(clues: Sequence[str]) -> dict[str, Tensor]:
            model, tokenizer = load(name)
            found: dict[str, Tensor] = {}
            with torch.no_grad():
                for clue in clues:  # one by one: nothing is padded
                    inputs = tokenizer([clue.lower()], return_tensors="pt")
                    if static:
                        states = model.get_input_embeddings()(inputs["input_ids"])
                    else:
                        out = model(input_ids=inputs["input_ids"], output_hidden_states=True)
                        states = out.hidden_states[-1]
                    found[clue] = mean(states.float(), torch.ones_like(inputs["input_ids"]))[0]
            return found

        return encode

    return {
        "MiniLM": encoder("minilm-l6", False),
        "SmolLM2, embedding table": encoder("smollm2-135m", True),
        "SmolLM2, last states": encoder("smollm2-135m", False),
    }


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    count: int = 40,
    shuffles: int = 2,
    embeddings: dict[str, Encoder] | None = None,
) -> dict[str, Any]:
    """Sort walls with and without herrings.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-walls-cpu.svg``.
        seeds: of walls and clusters.
        count: walls per seed.
        shuffles: orders of the clues of a wall, each clustered.
        embeddings: by name; those of :func:`encoders` by default.

    Returns:
        Plain values, for JSON.
    """
    encode = encoders() if embeddings is None else embeddings
    walls: dict[int, dict[str, list[Wall]]] = {}
    for seed in seeds:
        made = own_walls(count, seed)
        walls[seed] = {"own walls": made, "randomised walls": randomized(made, seed)}
    clues = sorted({c for pair in walls.values() for group in pair.values() for w in group for c in w.clues})
    vectors: dict[str, dict[str, Tensor]] = {}

    def sorted_by(name: str, seed: int) -> dict[str, float]:
        how, kind = name.rsplit(": ", 1)
        if how != "chance" and how not in vectors:
            vectors[how] = encode[how](clues)
        rng, found = np.random.default_rng(seed), []
        for wall in walls[seed][kind]:
            for shuffle in range(shuffles):
                if how == "chance":
                    mixed = [wall.clues[i] for i in rng.permutation(16)]
                    groups = [mixed[4 * g : 4 * g + 4] for g in range(4)]
                else:
                    groups = cluster_groups(wall, vectors[how], 1000 * seed + shuffle)
                scores = score_groups(groups, wall)
                found.append([scores[k] for k in SCORES])
        return dict(zip(SCORES, np.mean(found, 0).tolist(), strict=True))

    settings = {"count": count, "shuffles": shuffles, "connections": CONNECTIONS}
    rows, runs, against = [], [], []
    for how in (*encode, "chance"):
        names = [f"{how}: {kind}" for kind in KINDS]
        told = study(names, sorted_by, "correct groups", names[1], seeds, progress, keep, settings)
        rows += told["rows"]
        runs += told["runs"]
        against.append({"name": how, "own less randomised": told["rows"][0]["against"]})
    number = {kind: interval(mean_interval([float(np.mean([herrings(w) for w in walls[s][kind]])) for s in seeds]))
              for kind in KINDS}  # fmt: skip
    if pictures is not None:
        by_name = {row["name"]: row for row in rows}
        curves = {
            kind: [
                (how, (r := by_name[f"{how}: {kind}"]["correct groups"])["mean"], r["half"])
                for how in (*encode, "chance")
            ]
            for kind in KINDS
        }
        picture(Path(pictures) / "real-walls-cpu.svg", curves, "embedding", "groups of a wall found, of four",
                "Walls with and without red herrings")  # fmt: skip
    return {
        "question": QUESTION, "machine": machine(), "count": count, "shuffles": shuffles, "seeds": list(seeds),
        "herrings": number, "rows": rows, "red herrings": against, "runs": runs,
    }  # fmt: skip
