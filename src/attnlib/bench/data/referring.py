"""Scenes and sentences that name nothing, one thing or many of them, with the mask of what is named.

Pictures are those of :mod:`attnlib.bench.data.scenes`. A sentence names a colour and a shape (*the red circle*), a
colour (*all red things*) or a shape (*all circles*). Things too faint to be seen are neither named nor denied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int
from ...types import check_choice
from .scenes import CELL, COLOURS, GRID, SHAPED, SHAPES, SIDE, Scene, coverage, make_scene, pixel_values

KINDS = ("none", "one", "many")
#: Things of less contrast are not spoken of.
SEEN = 0.1
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
#: By number; 0 fills up sentences, 1 stands for what was erased.
WORDS = ("", "[mask]", "the", "all", "things", *COLOURS, *SHAPES, *PLURALS.values())
LENGTH = 3
#: All that can be said.
SENTENCES = (
    *(f"the {name}" for name in SHAPED), *(f"all {colour} things" for colour in COLOURS),
    *(f"all {plural}" for plural in PLURALS.values()),
)  # fmt: skip


class Referred(NamedTuple):
    """Samples, some of one scene.

    Args:
        pixels: (N, 3, 64, 64), -1 to 1, of scenes.
        scene: (S,) which of them a sample is about.
        kind: (S,) which of :data:`KINDS`.
        sentences: S of them.
        words, erased: (S, 3) numbers of :data:`WORDS`; in ``erased`` what names is masked.
        masks: (S, 64, 64) boolean.
    """

    pixels: Tensor
    scene: Tensor
    kind: Tensor
    sentences: list[str]
    words: Tensor
    erased: Tensor
    masks: Tensor


def mask(scene: Scene, names: Sequence[str]) -> Tensor:
    """(64, 64) boolean: where the things of these names, of shapes, stand; digits have no mask.

    >>> scene = make_scene(0)
    >>> shaped = [name for name in scene.names if not name.startswith("digit")]
    >>> bool(mask(scene, shaped).any()), bool(mask(scene, ()).any())
    (True, False)
    """
    out = np.zeros((SIDE, SIDE), dtype=bool)
    for thing in scene.things:
        if thing.name in names and thing.contrast >= SEEN:
            top, left = thing.cell // GRID * CELL, thing.cell % GRID * CELL
            out[top : top + CELL, left : left + CELL] |= coverage(thing) > 0.5
    return torch.from_numpy(out)


def _named(sentence: str) -> list[str]:
    """Names of :data:`attnlib.bench.data.scenes.SHAPED` that a sentence fits."""
    first, *rest = sentence.split()
    if first == "the":
        return [" ".join(rest)]
    singular = {plural: shape for shape, plural in PLURALS.items()}
    return [name for name in SHAPED if (rest[0] if len(rest) == 2 else singular[rest[0]]) in name.split()]


def sentences(scene: Scene, kind: str) -> list[str]:
    """All sentences that name nothing, one thing or many in a scene.

    Args:
        scene: a scene.
        kind: one of :data:`KINDS`.

    >>> "the red circle" in sentences(make_scene(0), "none") + sentences(make_scene(0), "one")
    True
    """
    check_choice("kind", kind, KINDS)
    seen = [t.name for t in scene.things if t.contrast >= SEEN]
    faint = [t.name for t in scene.things if t.contrast < SEEN]
    out = []
    for sentence in SENTENCES:
        fits = _named(sentence)
        count = sum(name in fits for name in seen)
        if any(name in fits for name in faint):
            continue
        if KINDS[min(count, 2)] == kind and (kind != "one" or sentence.startswith("the")):
            out.append(sentence)
    return out


def numbers(sentence: str) -> tuple[list[int], list[int]]:
    """Words of a sentence, and the same with what names masked, both filled up.

    >>> numbers("all red things")[1]
    [3, 1, 1]
    """
    ids = [WORDS.index(word) for word in sentence.split()]
    fill = [0] * (LENGTH - len(ids))
    return ids + fill, [ids[0], *[1] * (len(ids) - 1), *fill]


def referred(count: int, seed: int, part: str = "train") -> Referred:
    """One sentence of every kind, where there is one, for each of some scenes.

    Args:
        count: scenes.
        seed: of the first scene and of the sentences.
        part: of the scenes, as of :func:`attnlib.bench.data.scenes.make_scene`.

    >>> samples = referred(4, 0)
    >>> [bool(m.any()) for m, k in zip(samples.masks, samples.kind) if k == 0]
    [False, False, False, False]
    """
    check_int("count", count, least=1)
    rng = np.random.default_rng([seed, 7])
    scenes = [make_scene(seed * 100_000 + i, part) for i in range(count)]
    which, kinds, said, masks = [], [], [], []
    for i, scene in enumerate(scenes):
        for k, kind in enumerate(KINDS):
            possible = sentences(scene, kind)
            if possible:
                sentence = possible[rng.integers(len(possible))]
                which.append(i)
                kinds.append(k)
                said.append(sentence)
                masks.append(mask(scene, _named(sentence)))
    words, erased = (torch.tensor(rows) for rows in zip(*map(numbers, said), strict=True))
    return Referred(
        pixel_values(scenes), torch.tensor(which), torch.tensor(kinds), said, words, erased, torch.stack(masks)
    )
