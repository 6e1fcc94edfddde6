"""What the small multimodal model must be able to do before anything is measured on it.

Questions are about things that stand out, on test scenes that nobody looked at while the model was made. Half of the
presence questions are true, and every name is asked for as often where it is as where it is not, so that names tell
nothing. What is known without a picture is told by the commonest answer to the same question on training scenes; the
model that reads its learned image of nothing must not know more. On scenes without the second thing of a pair some
seconds must still be invented: a technique against that has nothing to show otherwise.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int
from ..clock import machine
from ..data import scenes
from ..data.scenes import Item, Question, Scene
from .multimodal import Rates, bootstrap

#: A thing stands out from this contrast on.
CLEAR = 0.5
#: Least shares, in percent.
BARS = {"presence": 90, "position": 90, "content": 85, "colour": 95, "count": 80, "digit": 80, "list": 85}
#: How many percent of broken pairs are to be completed by the model.
INVENTED = (10, 30)
#: How many points more than what is known without a picture the model without a picture may have.
BLIND = 3


def _clear(scene: Scene) -> list[scenes.Thing]:
    return [thing for thing in scene.things if thing.contrast >= CLEAR]


def clear_items(count: int, first: int = scenes.FRESH, part: str = "test") -> list[Item]:
    """At most one question of every kind, and two of presence, about clear things of each scene.

    Args:
        count: scenes.
        first: number of the first scene.
        part: of the scenes.

    Returns:
        Items; those of one scene hold the same scene object.

    >>> sorted({item.question.kind for item in clear_items(4, 0, "train")}) == sorted(BARS)
    True
    """
    check_int("count", count, least=1)
    found: list[Item] = []
    drawn = [scenes.make_scene(first + number, part) for number in range(count)]
    asked: list[str] = []
    for number, scene in enumerate(drawn):
        rng = np.random.default_rng([first + number, 17])
        clear = _clear(scene)
        shapes = [thing.name.split()[1] for thing in clear if thing.name in scenes.SHAPED]
        hidden = {thing.name.split()[1] for thing in scene.things if thing not in clear}
        about: dict[str, set[str]] = {
            "position": {thing.name for thing in clear}, "content": {thing.place for thing in clear},
            "digit": {thing.name for thing in clear}, "colour": set(shapes) - hidden,
            "count": set(scenes.SHAPES) - hidden,
        }  # fmt: skip
        for kind, wanted in about.items():
            possible = [q for q in scenes.questions(scene, kind) if q.about in wanted]
            found += [Item(scene, possible[i]) for i in rng.permutation(len(possible))[:1]]
        found.append(Item(scene, scenes.questions(scene, "list")[0]))
        if clear:
            asked.append(clear[rng.integers(len(clear))].name)
            found.append(Item(scene, scenes.presence(scene, asked[-1])))
    # The same names once more, each in a scene where it is not.
    rng = np.random.default_rng([first, 18])
    order = rng.permutation(len(drawn)).tolist()
    for name in asked:
        place = next((i for i, number in enumerate(order) if name not in drawn[number].names), None)
        if place is not None:
            scene = drawn[order.pop(place)]
            found.append(Item(scene, scenes.presence(scene, name)))
    return found


def broken_items(count: int, first: int = scenes.FRESH) -> list[Item]:
    """On scenes that hold the first thing of a pair, clear, and not the second: the list, and whether it is there."""
    found: list[Item] = []
    number = first
    while len(found) < 2 * count:
        scene = scenes.make_scene(number, "test", pairs="broken")
        number += 1
        names = {thing.name for thing in _clear(scene)}
        seconds = [b for a, b in scenes.PAIRS if a in names and b not in scene.names]
        if seconds:
            found += [Item(scene, scenes.questions(scene, "list")[0]), Item(scene, scenes.presence(scene, seconds[0]))]
    return found


def known(count: int = 2000) -> Callable[[Question], str]:
    """The commonest answer to a question on training scenes, which needs no picture."""
    tables: dict[tuple[str, str], Counter[str]] = {}
    for item in clear_items(count, 40_000_000, "train"):
        q = item.question
        for key in ((q.kind, q.about if q.kind not in ("digit", "presence") else ""), (q.kind, "")):
            tables.setdefault(key, Counter())[q.answer] += 1

    def tell(q: Question) -> str:
        return tables.get((q.kind, q.about), tables[q.kind, ""]).most_common(1)[0][0]

    return tell


class _Shares(Rates):
    """Right answers per kind, and of lists the clear things named and what was invented, summed per scene."""

    def __init__(self, items: Sequence[Item], said: Sequence[str]):
        places: dict[int, int] = {}
        for item in items:
            places.setdefault(id(item.scene), len(places))
        self.count, self.sums = len(places), {}
        for item, text in zip(items, said, strict=True):
            for name, pair in self._of(item, text):
                self.sums.setdefault(name, np.zeros((self.count, 2)))[places[id(item.scene)]] += pair

    @staticmethod
    def _of(item: Item, said: str) -> list[tuple[str, tuple[float, float]]]:
        scene, q = item.scene, item.question
        seconds = [b for a, b in scenes.PAIRS if a in scene.names and b not in scene.names]
        if q.kind != "list":
            out = [(q.kind, (float(said == q.answer), 1.0))]
            if q.kind == "presence":
                out.append((f"presence: {q.answer}", (float(said == q.answer), 1.0)))
                if q.about in seconds:
                    out.append(("second affirmed", (float(said == "yes"), 1.0)))
            return out
        names, clear = scenes.named(said), [thing.name for thing in _clear(scene)]
        right = sum(name in scene.names for name in names)
        out = [
            ("list", (float(sum(name in names for name in clear)), float(len(clear)))),
            ("list: named and there", (float(right), float(len(names)))),
        ]
        if seconds:
            out.append(("second listed", (float(any(b in names for b in seconds)), 1.0)))
        return out


def measure(
    count: int = 400,
    model: tuple[Any, Any] | None = None,
    null_image: Tensor | None = None,
    first: int = scenes.FRESH,
    priors: int = 2000,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every bar, with intervals over resampled scenes.

    Args:
        count: scenes, and as many with a broken pair.
        model: ``(model, tokenizer)``; ``None`` for the repository's own.
        null_image: (64, C) learned embedding of no image, of a given model.
        first: number of the first scene.
        priors: training scenes from which it is taken what is known without a picture.
        progress: told what is being asked.

    Returns:
        A dict of plain values: under ``bars`` share, interval, bar and whether it holds, also for the same questions
        without a picture beside what is known without one; under ``other picture`` those with another scene's.
    """
    check_int("count", count, least=2)
    tell = progress or (lambda line: None)
    null = scenes.load_null_image() if model is None else null_image
    speaker, tokenizer = scenes.load_model() if model is None else model
    items, broken, guess = clear_items(count, first), broken_items(count, first), known(priors)
    tell(f"{len(items)} questions")
    shares = bootstrap(_Shares(items, scenes.answer(speaker, tokenizer, items)))
    tell(f"{len(broken)} questions on broken pairs")
    pairs = bootstrap(_Shares(broken, scenes.answer(speaker, tokenizer, broken)))
    plain = [item for item in items if item.question.kind != "list"]
    tell("the same without the picture")
    guessed = _Shares(plain, [guess(item.question) for item in plain])
    chance = bootstrap(guessed)
    blind: dict[str, Any] = {}
    if null is not None:
        value: Tensor = null

        def nothing(module: Any, args: Any, out: Tensor) -> Tensor:
            return value.to(out.dtype).expand_as(out)

        handle = speaker.model.multi_modal_projector.register_forward_hook(nothing)
        try:
            blind = bootstrap(_Shares(plain, scenes.answer(speaker, tokenizer, plain, max_new_tokens=8)), guessed)
        finally:
            handle.remove()
    tell("the same with the picture of another scene")
    kinds = {id(item.scene): item.scene for item in items}
    others = dict(zip(kinds, [*list(kinds.values())[1:], next(iter(kinds.values()))], strict=True))
    swapped = scenes.answer(
        speaker, tokenizer, [Item(others[id(i.scene)], i.question) for i in plain], max_new_tokens=8
    )
    bars: dict[str, Any] = {}
    for kind, bar in BARS.items():
        bars[kind] = {**shares[kind], "bar": bar / 100, "holds": shares[kind]["value"] >= bar / 100}
    invented = pairs["second listed"]
    low, high = (share / 100 for share in INVENTED)
    bars["second of a broken pair listed"] = {
        **invented, "bar": [low, high], "holds": low <= invented["value"] <= high
    }  # fmt: skip
    for kind in BARS:
        if kind in blind:
            entry, knows = blind[kind], chance[kind]["value"]
            bars[f"without the picture: {kind}"] = {
                "value": entry["value"], "interval": entry["interval"], "known": knows,
                "beyond": entry["difference"], "beyond_interval": entry["difference_interval"], "bar": BLIND / 100,
                "holds": entry["difference"] <= BLIND / 100,
            }  # fmt: skip
    return {
        "what": "bars of the small multimodal model: shares with 95 % intervals over resampled scenes",
        "settings": {"scenes": count, "first": first, "clear": CLEAR, "questions": len(items) + len(broken)},
        "machine": machine(),
        "bars": bars,
        "all": {name: entry for name, entry in {**shares, **pairs}.items() if name not in bars},
        "other picture": bootstrap(_Shares(plain, swapped)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/multimodal-bars-cpu.json")
    found = measure(
        int(sys.argv[2]) if len(sys.argv) > 2 else 400,
        scenes.load_model(sys.argv[3]) if len(sys.argv) > 3 else None,
        scenes.load_null_image(sys.argv[3]) if len(sys.argv) > 3 else None,
        int(sys.argv[4]) if len(sys.argv) > 4 else scenes.FRESH,
        progress=lambda line: print(line, file=sys.stderr),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, entry in found["bars"].items():
        print(f"{name:40} {entry['value']:.3f} {entry['interval']} {entry['bar']} {entry['holds']}")
