"""What a model lists and affirms on scenes: what it invents and misses, and how sure it is of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...data import scenes
from ...data.scenes import Item, Scene
from ..multimodal import Rates
from ..multimodal_bars import CLEAR

#: Below this contrast a thing cannot be seen: it is in what captions tell alone.
SEEN = 0.1


class Asked(NamedTuple):
    """Scenes, and of each the name of a thing that stands out."""

    scenes: list[Scene]
    there: list[str]


def visible(scene: Scene) -> list[str]:
    """Names of what can be seen, in reading order."""
    return [thing.name for thing in scene.things if thing.contrast >= SEEN]


def clear(scene: Scene) -> list[str]:
    """Names of what stands out."""
    return [thing.name for thing in scene.things if thing.contrast >= CLEAR]


def seconds(scene: Scene) -> list[str]:
    """What the clear things of a scene lead one to expect, and is not there."""
    return [b for a, b in scenes.PAIRS if a in clear(scene) and b not in scene.names]


def ask(count: int, first: int, part: str) -> Asked:
    """Scenes with a broken pair, and behind them as many usual ones.

    Args:
        count: of each kind.
        first: number of the first scene.
        part: of the scenes.
    """
    drawn: list[Scene] = []
    number = first
    while len(drawn) < count:
        scene = scenes.make_scene(number, part, pairs="broken")
        number += 1
        if seconds(scene):
            drawn.append(scene)
    number = first
    while len(drawn) < 2 * count:
        scene = scenes.make_scene(number, part)
        number += 1
        if clear(scene):
            drawn.append(scene)
    rng = np.random.default_rng([first, 29])
    there = [str(rng.choice(clear(scene))) for scene in drawn]
    return Asked(drawn, there)


@torch.no_grad()
def lists(model: Any, tokenizer: Any, drawn: Sequence[Scene], size: int = 64) -> list[list[tuple[str, float]]]:
    """What a model lists, greedily, with the probability of every name: the product over its two words."""
    items = [Item(scene, scenes.questions(scene, "list")[0]) for scene in drawn]
    found: list[list[tuple[str, float]]] = [[] for _ in items]
    for chosen, inputs in scenes.batches(items, tokenizer, size):
        out = model.generate(
            **inputs, max_new_tokens=28, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        said = out.sequences[:, inputs["input_ids"].shape[1] :]
        logs = torch.stack([step.log_softmax(-1) for step in out.logits], 1).gather(-1, said[..., None])[..., 0]
        for i, ids, log in zip(chosen, said.tolist(), logs, strict=True):
            words = tokenizer.convert_ids_to_tokens(ids)
            for t in range(len(words) - 1):
                name = f"{words[t]} {words[t + 1]}"
                if name in scenes.NAMES and name not in [n for n, _ in found[i]]:
                    found[i].append((name, float(log[t : t + 2].sum().exp())))
    return found


@torch.no_grad()
def affirmed(model: Any, tokenizer: Any, drawn: Sequence[Scene], names: Sequence[str], size: int = 64) -> list[float]:
    """Probability of yes against no when a name is asked for in each scene."""
    items = [Item(scene, scenes.presence(scene, name)) for scene, name in zip(drawn, names, strict=True)]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    found = [0.0] * len(items)
    for chosen, inputs in scenes.batches(items, tokenizer, size):
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
        for i, p in zip(chosen, (logits[:, yes] - logits[:, no]).sigmoid().tolist(), strict=True):
            found[i] = p
    return found


class Told(Rates):
    """Sums per scene of what is listed and affirmed.

    Rates: ``invented second`` of scenes with a broken pair; ``invented``, share of names listed that cannot be seen;
    ``recall`` of clear things, ``missed`` the rest; ``errors``, names invented and clear things missed per scene;
    ``Brier`` and ``too sure`` (probability less share right) of listed names; ``yes to absent seconds``, ``yes to what
    is there``, and of both kinds of questions ``presence right`` and ``Brier of yes and no``.
    """

    def __init__(self, sums: dict[str, np.ndarray]):
        self.sums, self.count = sums, len(next(iter(sums.values())))

    @classmethod
    def of(cls, model: Any, tokenizer: Any, asked: Asked, presence: bool = True) -> Told:
        """Ask a model for lists and, where a pair is broken, whether a clear thing and the absent second are there."""
        sums: dict[str, np.ndarray] = {}

        def put(name: str, place: int, top: float, bottom: float) -> None:
            table = sums.setdefault(name, np.zeros((len(asked.scenes), 2)))
            table[place] += (top, bottom)

        for i, (scene, named) in enumerate(zip(asked.scenes, lists(model, tokenizer, asked.scenes), strict=True)):
            here, stand_out, listed = visible(scene), clear(scene), [n for n, _ in named]
            wrong = sum(n not in here for n in listed)
            missed = sum(n not in listed for n in stand_out)
            put("invented", i, wrong, len(listed))
            put("recall", i, len(stand_out) - missed, len(stand_out))
            put("missed", i, missed, len(stand_out))
            put("errors", i, wrong + missed, 1)
            put("Brier", i, sum((p - (n in here)) ** 2 for n, p in named), len(named))
            put("too sure", i, sum(p - (n in here) for n, p in named), len(named))
            if seconds(scene):
                put("invented second", i, any(n in seconds(scene) for n in listed), 1)
        broken = [i for i, scene in enumerate(asked.scenes) if seconds(scene)] if presence else []
        about = [asked.scenes[i] for i in broken]
        for right in (True, False):
            names = [asked.there[i] if right else seconds(asked.scenes[i])[0] for i in broken]
            for i, p in zip(broken, affirmed(model, tokenizer, about, names), strict=True):
                put("yes to what is there" if right else "yes to absent seconds", i, p > 0.5, 1)
                put("Brier of yes and no", i, (p - right) ** 2, 1)
                put("presence right", i, (p > 0.5) == right, 1)
        return cls(sums)

    def plain(self) -> dict[str, list[list[float]]]:
        """For JSON."""
        return {name: np.round(table, 6).tolist() for name, table in self.sums.items()}

    @classmethod
    def joined(cls, parts: Sequence[dict[str, list[list[float]]]]) -> Told:
        """Of several sets of scenes, one behind the other."""
        return cls({name: np.concatenate([np.asarray(p[name]) for p in parts]) for name in parts[0]})
