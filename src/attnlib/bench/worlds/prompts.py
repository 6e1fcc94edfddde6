"""Sets of prompts whose answer a judge can tell, the same on every machine; settings are chosen on ``"dev"``.

>>> [p.text for p in prompts("places", 2)]
['a blue heart on the right', 'a green square at the bottom left']
>>> prompts("held-out", 40) == prompts("held-out", 40), prompts("held-out", 1) == prompts("held-out", 1, "dev")
(True, False)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_int
from .painter import COLOURS, GEOMETRIC, HELD_OUT, PARTS, PLACES, RELATIONS, Prompt, Want, write

#: ``one``: one thing, no place. ``places``: one thing and where. ``two``: two things of pairings of colour and shape
#: that training saw. ``held-out``: two things of pairings that it did not see. ``relations``: two things and how they
#: lie. ``counts``: two or three alike. ``three``: three things.
KINDS = ("one", "places", "two", "held-out", "relations", "counts", "three")


def prompts(kind: str, count: int, part: str = "test") -> list[Prompt]:
    """The first prompts of a set.

    Args:
        kind: of :data:`KINDS`.
        count: how many.
        part: ``"dev"`` and ``"test"`` are other prompts.
    """
    check_choice("kind", kind, KINDS)
    check_choice("part", part, PARTS)
    check_int("count", count, least=1)
    draw = np.random.default_rng([KINDS.index(kind), PARTS.index(part)])
    return [_one(kind, draw) for _ in range(count)]


def _things(draw: np.random.Generator, count: int, held_out: bool = False) -> list[Want]:
    """Things of different shapes and colours."""
    shapes = draw.permutation(len(GEOMETRIC))[:count]
    if held_out:
        return [Want(*HELD_OUT[i]) for i in shapes]
    while True:
        colours = draw.permutation(len(COLOURS))[:count]
        pairs = [(list(COLOURS)[c], GEOMETRIC[s]) for c, s in zip(colours, shapes, strict=True)]
        if not set(pairs) & set(HELD_OUT):
            return [Want(*p) for p in pairs]


def _one(kind: str, draw: np.random.Generator) -> Prompt:
    if kind == "places":
        want = _things(draw, 1)[0]
        return write([Want(want.colour, want.shape, place=list(PLACES)[draw.integers(len(PLACES))])])
    if kind == "relations":
        return write(_things(draw, 2), RELATIONS[draw.integers(len(RELATIONS))])
    if kind == "counts":
        return write(_things(draw, 1) * int(draw.integers(2, 4)), counted=True)
    count = {"one": 1, "three": 3}.get(kind, 2)
    return write(_things(draw, count, kind == "held-out"))


def class_name(prompt: Prompt | str) -> str:
    """What a generator of classes is asked for in place of a prompt: colour and shape of its one thing.

    Raises:
        ValueError: several things, or one whose colour or shape is left open.
    """
    if isinstance(prompt, str):
        return prompt
    (want,) = prompt.wants if len(prompt.wants) == 1 else (Want(),)
    if want.colour is None or want.shape is None:
        raise ValueError(f"a class is one thing of one colour and shape, and the prompt asks for {prompt.text!r}")
    return f"{want.colour} {want.shape}"


def draw(
    pipe: Any,
    asked: Sequence[Prompt] | Sequence[str],
    seeds: Sequence[int] | None = None,
    batch: int = 8,
    **given: Any,
) -> Tensor:
    """Pictures (B, 3, h, w) in [0, 1] of prompts, each from a seed of its own, whatever else is in the batch.

    Args:
        pipe: of :func:`attnlib.bench.worlds.models.pipeline`; a ``DiTPipeline`` takes prompts that are a class, see
            :func:`class_name`.
        asked: prompts.
        seeds: of starting noise; 0, 1, ... by default.
        batch: pictures at a time.
        given: of the pipeline's call, such as ``num_inference_steps`` and ``guidance_scale``.
    """
    texts = [p.text if isinstance(p, Prompt) else p for p in asked]
    own = list(range(len(texts))) if seeds is None else list(seeds)
    if len(own) != len(texts):
        raise ValueError(f"seeds must hold one per prompt, {len(texts)}, got {len(own)}")
    out = []
    for i in range(0, len(texts), batch):
        generators = [torch.Generator().manual_seed(s) for s in own[i : i + batch]]
        if hasattr(pipe, "get_label_ids"):
            labels = pipe.get_label_ids([class_name(p) for p in asked[i : i + batch]])
            images = pipe(labels, generator=generators, output_type="np", **given).images
            out.append(torch.from_numpy(images).permute(0, 3, 1, 2))
        else:
            images = pipe(texts[i : i + batch], generator=generators, output_type="pt", **given).images
            out.append(images.float().clamp(0, 1))
    return torch.cat(out)
