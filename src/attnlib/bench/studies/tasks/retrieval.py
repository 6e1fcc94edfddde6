"""Retrieval and metric learning: what each idea adds to the plain model that a sceptic would name.

Five small questions, each on made-up data, every contestant with the same encoders, steps and batches: captions of two
bound things (FILIP against pooled tokens), two attributes of an image (conditional cross attention against one space),
classes that come in two styles (two subspaces against one), a thing at another size (with and without the loss over
scales), clips that only sound tells apart (TEFAL against frames, and against frames and sound in one block).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.retrieval.conditional import ConditionalCrossAttention
from ....models.retrieval.contrast import recall
from ....models.retrieval.filip import FILIP, Tokens
from ....models.retrieval.scale_invariant import Known, MemoryBank, ScaleInvariantSearch
from ....models.retrieval.subspaces import SubspaceEmbedding
from ....models.retrieval.tefal import TEFAL
from ...clock import machine
from ...small import Progress, fit, picture, study

QUESTION = "Do token-wise scores, conditions, subspaces, losses over scales and sound find what plain embeddings miss?"

COLOURS = SHAPES = 4


def pairs(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Two things of other colours and shapes: of an image six noisy patches, of a caption ``c s c s``.

    Every second sample is its neighbour with colours swapped, which has the same words.
    """
    half = (count + 1) // 2
    colour = torch.rand(half, COLOURS, generator=generator).argsort(1)[:, :2]
    shape = torch.rand(half, SHAPES, generator=generator).argsort(1)[:, :2]
    colour = torch.stack([colour, colour.flip(1)], 1).flatten(0, 1)[:count]
    shape = shape.repeat_interleave(2, 0)[:count]
    images = 0.25 * torch.randn(count, 6, COLOURS + SHAPES, generator=generator)
    at = torch.rand(count, 6, generator=generator).argsort(1)[:, :2]
    row = torch.arange(count)[:, None]
    images[row, at, colour] += 1
    images[row, at, COLOURS + shape] += 1
    order = torch.rand(count, 2, generator=generator).argsort(1)
    words = torch.stack([colour.gather(1, order), COLOURS + shape.gather(1, order)], 2).flatten(1)
    named = (colour * SHAPES + shape).sort(1).values
    same = (named[:, None] == named[None]).all(-1)
    return {"images": images, "texts": words, "same": same}


class _Encoder(nn.Module):
    """Tokens under two layers of attention."""

    def __init__(self, first: nn.Module, places: int, dim: int):
        super().__init__()
        self.first, self.place = first, nn.Parameter(0.2 * torch.randn(places, dim))
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True, norm_first=True), 2,
            enable_nested_tensor=False,
        )  # fmt: skip

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(self.first(x) + self.place)
        return out


class PooledCLIP(FILIP):
    """The same encoders; one vector an image and a text, the mean of its tokens."""

    def compare(self, images: Tokens, texts: Tokens) -> Any:
        one = [Tokens(nn.functional.normalize(t.values.mean(1, keepdim=True), dim=-1)) for t in (images, texts)]
        return super().compare(one[0], one[1])


def captions(name: str, seed: int, steps: int, tested: int) -> dict[str, float]:
    """R@1 of captions among all, and how often the right one beats the one with colours swapped."""
    torch.manual_seed(seed)
    dim = 32
    patches, words = nn.Linear(COLOURS + SHAPES, dim), nn.Embedding(COLOURS + SHAPES, dim)
    kind = FILIP if name == "FILIP" else PooledCLIP
    model = kind(_Encoder(patches, 6, dim), _Encoder(words, 4, dim), dim, dim, 16, 0, 0)

    def loss(m: Any, given: dict[str, Tensor]) -> Tensor:
        found: Tensor = m.loss(m(given["images"], given["texts"]), given["same"])["contrast"]
        return found

    fit(model, lambda g: pairs(64, g), loss, steps, lr=3e-3, seed=seed)
    test = pairs(tested, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        scores = model.eval().predict(test["images"], test["texts"])
    swapped = torch.arange(tested) ^ 1
    right, wrong = scores.diagonal(), scores[torch.arange(tested), swapped]
    return {"recall": 100 * float(recall(scores, test["same"])), "bound": 100 * float((right > wrong).float().mean())}


def two_attributes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Six tokens (count, 6, 12), two of which show one of five colours and one of five shapes; (count, 2)."""
    names = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    values = torch.randint(0, 5, (count, 2), generator=generator)
    images = 0.5 * torch.randn(count, 6, 12, generator=generator)
    for which in range(2):
        images[:, which] += names[which][values[:, which]]
    return images, values


def conditions(name: str, seed: int, steps: int, tested: int) -> dict[str, float]:
    """R@1 for each attribute, the nearest of all others; one space answers both alike."""
    torch.manual_seed(seed)
    spaces = 2 if name == "conditional" else 1
    model = ConditionalCrossAttention(nn.Identity(), spaces, 12, 8, 2)

    def loss(m: Any, given: tuple[Tensor, Tensor]) -> Tensor:
        images, values = given
        if spaces == 2:
            both: Tensor = m.loss(m(images), values)["triplet"]
            return both
        found = m(images, 0)
        return (m.loss(found, values[:, 0])["triplet"] + m.loss(found, values[:, 1])["triplet"]) / 2

    fit(model, lambda g: two_attributes(32, g), loss, steps, lr=3e-3, seed=seed)
    images, values = two_attributes(tested, torch.Generator().manual_seed(10_000 + seed))
    found = {}
    itself = torch.eye(tested, dtype=torch.bool)
    for which, what in enumerate(("colour", "shape")):
        vectors = model.eval().predict(images, which if spaces == 2 else 0).vectors
        same = (values[:, which, None] == values[None, :, which]) & ~itself
        found[what] = 100 * float(recall((vectors @ vectors.mT).masked_fill(itself, -2), same))
    return {"recall": (found["colour"] + found["shape"]) / 2, **found}


def styles(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (count, 32, 3, 3) of eight classes in two styles, in which other channels tell them apart."""
    names = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    target, style = torch.arange(count) % 8, torch.arange(count) // 8 % 2
    images = 3.0 * torch.randn(count, 32, 3, 3, generator=generator)
    for s in range(2):
        mine = style == s
        images[mine, 16 * s : 16 * s + 16] += names[s][target[mine]][:, :, None, None]
        images[mine, 16 * (1 - s) : 16 * (1 - s) + 16] += 2.0  # the other half says which style it is
    return images, target, style


def subspaces(name: str, seed: int, steps: int, tested: int) -> dict[str, float]:
    """R@1 of classes; learners see the style that is theirs, as clusters would give it."""
    torch.manual_seed(seed)
    several = name == "two subspaces"
    model = SubspaceEmbedding(nn.Identity(), 32, 16, 2 if several else 1, drop=0.0)

    def loss(m: Any, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, target, style = given
        if not several:
            whole: Tensor = m.loss(m(images, 0), target)["margin"]
            return whole
        parts = [m.loss(m(images[style == s], s), target[style == s])["margin"] for s in range(2)]
        return (parts[0] + parts[1]) / 2

    fit(model, lambda g: styles(32, g), loss, steps, lr=3e-3, seed=seed)
    images, target, _ = styles(tested, torch.Generator().manual_seed(10_000 + seed))
    vectors = model.eval().predict(images).vectors
    itself = torch.eye(tested, dtype=torch.bool)
    same = (target[:, None] == target[None]) & ~itself
    return {"recall": 100 * float(recall((vectors @ vectors.mT).masked_fill(itself, -9), same))}


def one_thing(count: int, generator: torch.Generator, low: int = 6, high: int = 24) -> tuple[Tensor, Tensor]:
    """Scenes (count, 3, 32, 32) with a thing each, of any side: a frame of one colour around another."""
    colours = 2 * torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1))
    images, boxes = 1.2 * torch.randn(count, 3, 32, 32, generator=generator), torch.zeros(count, 5)
    for i in range(count):
        side = int(torch.randint(low, high, (), generator=generator))
        x, y = (int(torch.randint(0, 33 - side, (), generator=generator)) for _ in range(2))
        edge = max(1, side // 4)
        images[i, :, y : y + side, x : x + side] += colours[0, i % 12][:, None, None]
        inner = slice(edge, side - edge)
        images[i, :, y : y + side, x : x + side][:, inner, inner] += colours[1, (5 * i) % 12][:, None, None]
        boxes[i] = torch.tensor([i, x, y, x + side, y + side])
    return images, boxes


def scales(name: str, seed: int, steps: int, tested: int) -> dict[str, float]:
    """R@1 of small things among large ones and back."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2, padding=1))
    model = ScaleInvariantSearch(body, 24, MemoryBank(12, 12), 12, size=16)

    before: list[Tensor] = []  # the bank takes features once their gradient is through

    def loss(m: Any, given: tuple[Tensor, Tensor]) -> Tensor:
        if before:
            m.bank.update(torch.arange(12), before.pop())
        found = m(*given)
        before.append(found.scene.detach())
        terms = m.loss(found, Known(torch.arange(12), 1.0))
        total: Tensor = terms["labels"] + (terms["scale"] if name == "with scales" else 0)
        return total

    fit(model, lambda g: one_thing(12, g), loss, steps, lr=3e-3, seed=seed)
    g = torch.Generator().manual_seed(10_000 + seed)
    count = 12 * max(1, tested // 24)
    small, large = (model.eval().predict(*one_thing(count, g, *sides)) for sides in ((6, 9), (20, 24)))
    same = torch.arange(count)[:, None] % 12 == torch.arange(count)[None] % 12
    scores = small @ large.mT
    return {"recall": 50 * float(recall(scores, same) + recall(scores.mT, same))}


def clips(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Texts (count, 16), frames (count, 6, 16) that tell one half, sound (count, 8, 16) that tells the other.

    One clip in four has no sound, one frame in three and most of the sound are about nothing.
    """
    text = torch.randn(count, 16, generator=generator)
    seen, heard = torch.cat([torch.ones(8), torch.zeros(8)]), torch.cat([torch.zeros(8), torch.ones(8)])
    text[1::2, :8] = text[::2, :8][: len(text[1::2])]  # neighbours look alike
    frames = 0.6 * torch.randn(count, 6, 16, generator=generator)
    frames[:, :4] += (text * seen)[:, None]
    audio = 0.6 * torch.randn(count, 8, 16, generator=generator)
    audio[:, :3] += (text * heard)[:, None]
    valid = (torch.arange(count) // 2 % 4 != 3)[:, None].expand(count, 8).clone()
    return {"text": text, "frames": frames, "audio": audio, "audio_valid": valid}


def sound(name: str, seed: int, steps: int, tested: int) -> dict[str, float]:
    """R@1 of clips for texts, all and those with sound."""
    torch.manual_seed(seed)
    model = TEFAL(16, drop=0.0)

    def given(batch: dict[str, Tensor]) -> dict[str, Any]:
        if name == "TEFAL":
            return dict(batch)
        if name == "frames":
            return {"text": batch["text"], "frames": batch["frames"]}
        there = torch.ones(batch["frames"].shape[:2], dtype=torch.bool)
        both = {"frames": torch.cat([batch["frames"], batch["audio"]], 1)}
        return {"text": batch["text"], **both, "frames_valid": torch.cat([there, batch["audio_valid"]], 1)}

    def loss(m: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = m.loss(m(**given(batch)))["contrast"]
        return found

    fit(model, lambda g: clips(32, g), loss, steps, lr=3e-3, seed=seed)
    test = clips(tested, torch.Generator().manual_seed(10_000 + seed))
    scores = model.eval().predict(**given(test))
    heard = test["audio_valid"].any(1)
    eye = torch.eye(tested, dtype=torch.bool)
    return {"recall": 100 * float(recall(scores)), "with sound": 100 * float(recall(scores[heard], eye[heard]))}


#: Question -> how it is measured, contestants, the one that others are held against.
QUESTIONS: dict[str, tuple[Callable[[str, int, int, int], dict[str, float]], tuple[str, ...], str]] = {
    "two bound things": (captions, ("pooled tokens", "FILIP"), "pooled tokens"),
    "two attributes": (conditions, ("one space", "conditional"), "one space"),
    "two styles": (subspaces, ("one subspace", "two subspaces"), "one subspace"),
    "another size": (scales, ("without scales", "with scales"), "without scales"),
    "clips with sound": (sound, ("frames", "frames and sound in one block", "TEFAL"), "frames"),
}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 400,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    tested: int = 400,
    questions: Sequence[str] = tuple(QUESTIONS),
) -> dict[str, Any]:
    """Train every contestant of every question.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-retrieval-cpu.svg``.
        steps, seeds, tested: of training and of the test.
        questions: of :data:`QUESTIONS`.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {"question": QUESTION, "machine": machine(), "steps": steps, "tested": tested, "parts": {}}
    for question in questions:
        run, names, baseline = QUESTIONS[question]

        def one(name: str, seed: int, run: Any = run) -> dict[str, float]:
            found: dict[str, float] = run(name, seed, steps, tested)
            return found

        key = (question, steps, tested)
        result["parts"][question] = study(names, one, "recall", baseline, seeds, progress, keep, key)
    if pictures is not None:
        curves = {
            f"{question}: {row['name']}": [(question, row["recall"]["mean"], row["recall"]["half"])]
            for question, part in result["parts"].items()
            for row in part["rows"]
        }
        dashed = [f"{q}: {QUESTIONS[q][2]}" for q in questions]
        picture(
            Path(pictures) / "tasks-retrieval-cpu.svg", curves, "", "first found, %", "what each idea finds", (), dashed
        )
    return result
