"""Drawn forms with text fields, of which some are filled in, and questions that the form answers.

>>> form = make_form(0)
>>> form.image.shape, all(question.answer for question in questions(form))
(torch.Size([3, 320, 256]), True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .numbered import generator, put

HEIGHT, WIDTH = 320, 256
TITLES = ("order", "invoice", "permit", "report", "ticket", "survey")
TEXTS = {
    "name": ("anna berg", "li wei", "omar haddad", "eva novak", "juan cruz", "mia olsen"),
    "city": ("oslo", "lima", "cairo", "osaka", "turin", "quito"),
    "item": ("lamp", "chair", "radio", "bicycle", "clock", "guitar"),
    "payment": ("cash", "card", "cheque"),
}
#: Fields that hold numbers, with how many digits.
NUMBERS = {"amount": 3, "year": 4, "room": 2, "number": 5, "zip": 5}
TICKS = ("urgent", "paid", "member", "insured")
EMPTY = "nothing"


@dataclass(frozen=True)
class Entry:
    """A field: what it is called, what is written in it (``""`` for nothing; ``"yes"`` or ``"no"`` for a tick), boxes.

    Boxes are (left, top, right, bottom) in pixels: of the name, and of the field itself.
    """

    name: str
    value: str
    name_box: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    tick: bool = False


@dataclass(frozen=True)
class Form:
    """A picture (3, 320, 256) in [0, 1], its title and its fields from top to bottom."""

    title: str
    entries: tuple[Entry, ...]
    image: Tensor


@dataclass(frozen=True)
class Asked:
    """A question, its answer and the field it stands in."""

    text: str
    answer: str
    entry: Entry


def make_form(number: int, part: str = "train") -> Form:
    """The form of a number.

    Args:
        number: of the form.
        part: ``"train"``, ``"dev"`` or ``"test"``: other forms.
    """
    rng = generator("forms", number, part)
    ink, pen = (0.15, 0.15, 0.15), (0.1, 0.15, 0.55)
    image = np.full((3, HEIGHT, WIDTH), rng.uniform(0.9, 1.0), dtype=np.float32)
    title = TITLES[rng.integers(len(TITLES))]
    put(image, title, 12, int(rng.integers(12, 100)), ink, 3)
    names = [*TEXTS, *NUMBERS]
    names = [names[i] for i in rng.permutation(len(names))[: rng.integers(4, 8)]]
    ticks = [TICKS[i] for i in rng.permutation(len(TICKS))[: rng.integers(0, 3)]]
    found, y, left = [], 44, int(rng.integers(10, 30))

    def frame(box: tuple[int, int, int, int]) -> None:
        a, b, c, d = box
        image[:, b:d, a:c] = 0.4
        image[:, b + 1 : d - 1, a + 1 : c - 1] = 1.0

    for name in rng.permutation([*names, *ticks]).tolist():
        name_box = put(image, name, y + 5, left, ink, 2)
        x = left + 70
        if name in TICKS:
            value, box = ("yes", "no")[rng.integers(2)], (x, y + 2, x + 16, y + 18)
            frame(box)
            if value == "yes":
                put(image, "x", y + 5, x + 5, pen, 2)
        else:
            box = (x, y, x + 130, y + 20)
            frame(box)
            if name in NUMBERS:
                first = str(rng.integers(1, 10))
                value = first + "".join(map(str, rng.integers(0, 10, NUMBERS[name] - 1)))
            else:
                value = TEXTS[name][rng.integers(len(TEXTS[name]))]
            if rng.random() < 0.2:
                value = ""
            else:
                put(image, value, y + 5 + int(rng.integers(-1, 2)), x + int(rng.integers(4, 20)), pen, 2)
        found.append(Entry(name, value, name_box, box, name in TICKS))
        y += int(rng.integers(24, 30))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * 0.02
    return Form(title, tuple(found), torch.from_numpy(np.clip(image + noise, 0, 1)))


def questions(form: Form) -> list[Asked]:
    """What every field holds; an empty one holds ``"nothing"``."""
    return [
        Asked(f"is {e.name} ticked ?" if e.tick else f"what is in {e.name} ?", e.value or EMPTY, e)
        for e in form.entries
    ]  # fmt: skip
