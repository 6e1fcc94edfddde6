"""Sixteen examples and a sentence: does telling a classifier what its classes are replace examples?

``attnlib bench --suite real-labels --out benchmarks/results`` measures again what ``real-labels-cpu.json`` holds. Texts
are docstrings of SciPy, classes the rooms that they stand in, features the frozen tokens of MiniLM. The head of
:mod:`attnlib.models.label_head` reads a sentence about every room, written here; the linear probe reads the mean token,
alone or with the sentences as one more example each; the nearest sentence needs no example. All choose their one
setting (steps, penalty) on as many further examples, and every seed draws its own. Shuffled sentences say what the
sentences do.

After Luo et al., 2024, arXiv 2403.12468, whose encoder, data and generated texts are not here.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.label_head import LabelCrossAttentionHead, pooled
from ... import models
from ...clock import machine
from ...data.files import DataError, require
from ...small import Progress, picture, study

QUESTION = "does a sentence about a class replace examples of it?"
MODELS = ("minilm-l6",)

#: Rooms of SciPy, and what is said of them.
SENTENCES = {
    "integrate": "Numerical integration of functions and of ordinary differential equations.",
    "interpolate": "Interpolation: splines and smooth curves through given points.",
    "linalg": "Linear algebra: matrices, decompositions, eigenvalues and linear systems.",
    "ndimage": "Image processing: filters, morphology and measurements of labelled regions.",
    "optimize": "Minimisation of functions, root finding, curve fitting and linear programming.",
    "signal": "Signal processing: filter design, windows, spectra and systems.",
    "sparse": "Sparse matrices and arrays, their formats, and graphs.",
    "spatial": "Distances, nearest neighbours, triangulations and rotations in space.",
    "stats": "Statistics: probability distributions, hypothesis tests and random samples.",
}

NAMES = (
    "linear probe", "linear probe, sentences too", "nearest sentence", "head: match", "head: match, shuffled sentences",
    "head: shared scorer",
)  # fmt: skip
BASELINE = "linear probe"
METRIC = "accuracy"


class Features(NamedTuple):
    """Frozen tokens (B, N, D), which of them exist (B, N), and classes (B,)."""

    tokens: Tensor
    valid: Tensor
    target: Tensor

    def at(self, rows: Tensor) -> Features:
        """Some of them."""
        return Features(self.tokens[rows], self.valid[rows], self.target[rows])


def docstrings(room: str, package: str = "scipy", least: int = 80, most: int = 300) -> list[str]:
    """Beginnings of the docstrings of public functions and classes in a room of a package, each once, in order."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / room).is_dir():
        raise DataError(f"room={room!r} is not a folder of {package!r}, which must be installed")
    found: dict[str, None] = {}
    for file in sorted((Path(spec.origin).parent / room).rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= least:
                    found[text[:most]] = None
    return list(found)


@torch.no_grad()
def _encoded(model: Any, tokenizer: Any, texts: Sequence[str], longest: int) -> tuple[Tensor, Tensor]:
    tokens, exists = [], []
    for i in range(0, len(texts), 32):
        inputs = tokenizer(
            list(texts[i : i + 32]), return_tensors="pt", padding="max_length", truncation=True, max_length=longest
        )
        out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        tokens.append(out.last_hidden_state.float())
        exists.append(inputs["attention_mask"].bool())
    return torch.cat(tokens), torch.cat(exists)


@functools.lru_cache(maxsize=1)
def features(count: int, longest: int) -> tuple[Features, Features]:
    """Of ``count`` docstrings per room, evenly from all of them, and of the sentences."""
    model, tokenizer = models.load("minilm-l6")
    texts, target = [], []
    for i, room in enumerate(SENTENCES):
        held = docstrings(room)
        if len(held) < count:
            raise DataError(f"count={count} docstrings are wanted of scipy.{room}, which has {len(held)}")
        texts += [held[j * len(held) // count] for j in range(count)]
        target += [i] * count
    told = _encoded(model, tokenizer, list(SENTENCES.values()), longest)
    rooms = torch.arange(len(SENTENCES))
    return Features(*_encoded(model, tokenizer, texts, longest), torch.tensor(target)), Features(*told, rooms)


def split(target: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to train on and to choose settings by, ``shots`` per class each, and the others."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for c in target.unique():
        rows = (target == c).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, some in zip(parts, (rows[:shots], rows[shots : 2 * shots], rows[2 * shots :]), strict=True):
            part.append(some)
    return torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2])


def _probe(train: Features, dev: Features, test: Features, more: Features | None) -> float:
    linear = require("sklearn.linear_model")

    def mean(f: Features) -> Any:
        return F.normalize(pooled(f.tokens, f.valid, "mean"), dim=-1).numpy()

    x, y = mean(train), train.target
    if more is not None:
        x, y = torch.cat([torch.from_numpy(x), torch.from_numpy(mean(more))]).numpy(), torch.cat([y, more.target])
    fitted = [linear.LogisticRegression(C=c, max_iter=500).fit(x, y.numpy()) for c in (1.0, 10.0, 100.0)]
    best = max(fitted, key=lambda m: m.score(mean(dev), dev.target.numpy()))
    return float(best.score(mean(test), test.target.numpy()))


@torch.no_grad()
def _right(head: LabelCrossAttentionHead, given: Features, labels: Features) -> float:
    told = head(given.tokens, labels.tokens, given.valid, labels.valid)
    return float((told.argmax(-1) == given.target).float().mean())


def _head(
    train: Features, dev: Features, test: Features, labels: Features, scorer: str, steps: int, batch: int, seed: int
) -> float:
    torch.manual_seed(seed)
    match = scorer == "match"
    head = LabelCrossAttentionHead(train.tokens.shape[-1], 4, scorer=scorer, identity=match)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-4 if match else 1e-3)
    generator = torch.Generator().manual_seed(seed)
    best, kept = -1.0, 0.0
    for step in range(steps + 1):
        if step % max(1, steps // 4) == 0:
            now = _right(head, dev, labels)
            if now > best:
                best, kept = now, _right(head, test, labels)
        some = train.at(torch.randint(len(train.target), (batch,), generator=generator))
        loss = head.loss(some.tokens, labels.tokens, some.target, text_valid=some.valid, labels_valid=labels.valid)
        optimizer.zero_grad()
        loss["class"].backward()
        optimizer.step()
    return kept


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    shots: int = 16,
    count: int = 56,
    longest: int = 40,
    steps: int = 40,
    batch: int = 32,
    names: Sequence[str] = NAMES,
    given: tuple[Features, Features] | None = None,
) -> dict[str, Any]:
    """Classify docstrings by the room they stand in, from few examples.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-labels-cpu.svg``.
        seeds: of examples and of heads.
        shots: examples of a class to train on, and as many to choose by.
        count: docstrings of a class; the others are the test.
        longest: tokens of a text.
        steps, batch: of training a head.
        names: contestants, the baseline among them.
        given: texts and sentences as features; MiniLM's by default.

    Returns:
        Plain values, for JSON.
    """

    def run(name: str, seed: int) -> dict[str, float]:
        texts, labels = features(count, longest) if given is None else given
        train, dev, test = (texts.at(rows) for rows in split(texts.target, shots, seed))
        if name.startswith("linear probe"):
            return {METRIC: 100 * _probe(train, dev, test, labels if "sentences" in name else None)}
        if name == "nearest sentence":
            near = F.cosine_similarity(
                pooled(test.tokens, test.valid, "mean")[:, None],
                pooled(labels.tokens, labels.valid, "mean")[None],
                dim=-1,
            )
            return {METRIC: 100 * float((near.argmax(-1) == test.target).float().mean())}
        if "shuffled" in name:  # no sentence keeps its class
            labels = labels.at(torch.arange(len(labels.target)).roll(1 + seed))
        scorer = "match" if "match" in name else "shared"
        return {METRIC: 100 * _head(train, dev, test, labels, scorer, steps, batch, seed)}

    told = study(names, run, METRIC, BASELINE, seeds, progress, keep, (shots, count, longest, steps, batch, SENTENCES))
    if pictures is not None:
        curves = {r["name"]: [(r["name"], r[METRIC]["mean"], r[METRIC]["half"])] for r in told["rows"]}
        title = f"docstrings of SciPy, {shots} of a class"
        picture(Path(pictures) / "real-labels-cpu.svg", curves, "what is trained on MiniLM's tokens", "right, %", title)
    return {
        "question": QUESTION, "machine": machine(), "classes": list(SENTENCES), "sentences": SENTENCES, "shots": shots,
        "count": count, "longest": longest, "steps": steps, "batch": batch, "chance": 100 / len(SENTENCES), **told,
    }  # fmt: skip
