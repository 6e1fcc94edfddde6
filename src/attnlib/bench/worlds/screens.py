"""Drawn screens: windows with a bar, buttons, fields, boxes to tick and text, light and dark, and what to click.

Large parts of a screen are empty and some are dense, as on real ones, so that crops by content have something to save.

>>> screen = make_screen(0)
>>> screen.image.shape, screen.dark in (True, False)
(torch.Size([3, 256, 320]), True)
>>> task = tasks(screen)[0]
>>> screen.at(*task.centre) is task.target
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int
from .numbered import generator, put

KINDS = ("button", "field", "tick", "label", "tab")
ACTIONS = (
    "save", "open", "print", "close", "undo", "redo", "copy", "paste", "send", "reply", "find", "next", "back", "help",
    "zoom", "share", "play", "stop", "sort", "edit",
)  # fmt: skip
THINGS = ("name", "city", "mail", "phone", "date", "code", "title", "size", "price", "note", "user", "street")
OPTIONS = ("wifi", "sound", "sync", "alerts", "grid", "night", "cloud", "backup", "hints", "macros")
TABS = ("home", "files", "inbox", "tools", "view", "media")
WORDS = ("red fox", "two keys", "old map", "page one", "blue ink", "no news", "all done", "draft")


@dataclass(frozen=True)
class Widget:
    """Something on the screen: kind, its words, its box (left, top, right, bottom) in pixels, whether it is ticked."""

    kind: str
    text: str
    box: tuple[int, int, int, int]
    on: bool = False


@dataclass(frozen=True)
class Screen:
    """A picture (3, height, width) in [0, 1] and its widgets; no two that can be clicked have one text."""

    widgets: tuple[Widget, ...]
    image: Tensor
    dark: bool

    def at(self, x: float, y: float) -> Widget | None:
        """What is clicked at a pixel."""
        for widget in self.widgets:
            left, top, right, bottom = widget.box
            if left <= x < right and top <= y < bottom:
                return widget
        return None


@dataclass(frozen=True)
class Task:
    """What to do, and what is to be clicked for it."""

    text: str
    target: Widget

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.target.box
        return (left + right) / 2, (top + bottom) / 2


def _width(text: str) -> int:
    return 2 * (4 * len(text) - 1)


def make_screen(number: int, part: str = "train", height: int = 256, width: int = 320) -> Screen:
    """The screen of a number.

    Args:
        number: of the screen.
        part: ``"train"``, ``"dev"`` or ``"test"``: other screens.
        height, width: pixels.
    """
    check_int("height", height, least=160)
    check_int("width", width, least=240)
    rng = generator("screens", number, part)
    dark = bool(rng.random() < 0.4)
    ground, ink = (rng.uniform(0.08, 0.2), 0.9) if dark else (rng.uniform(0.88, 0.98), 0.1)
    accent = rng.uniform(0.2, 0.7, 3) if dark else rng.uniform(0.55, 0.85, 3)
    faint = (ground + ink) / 2 if dark else ground - 0.12
    image = np.full((3, height, width), ground, dtype=np.float32)
    widgets: list[Widget] = []

    def fill(box: tuple[int, int, int, int], colour: object, edge: float | None = None) -> None:
        left, top, right, bottom = box
        if edge is not None:
            image[:, top:bottom, left:right] = edge
            left, top, right, bottom = left + 1, top + 1, right - 1, bottom - 1
        image[:, top:bottom, left:right] = np.broadcast_to(np.asarray(colour, np.float32), (3,))[:, None, None]

    def pick(names: Sequence[str], count: int) -> list[str]:
        return [names[i] for i in rng.permutation(len(names))[:count]]

    fill((0, 0, width, 18), faint)
    left = 6
    for text in pick(TABS, int(rng.integers(2, 4))):
        box = (left, 1, left + _width(text) + 8, 17)
        fill(box, ground)
        put(image, text, 4, left + 4, (ink,) * 3, 2)
        widgets.append(Widget("tab", text, box))
        left = box[2] + 6
    actions, fields, options = pick(ACTIONS, 8), pick(THINGS, 5), pick(OPTIONS, 5)
    columns = int(rng.integers(1, 3))
    for column in range(columns):
        x0 = 8 + column * (width // columns)
        x1, y = x0 + width // columns - 16, 26 + int(rng.integers(0, 24))
        while y < height - 24 and rng.random() < 0.9:
            kind = ("button", "field", "tick", "label")[rng.choice(4, p=[0.35, 0.25, 0.2, 0.2])]
            if kind == "button" and actions:
                left = x0
                while actions and left + _width(actions[-1]) + 12 <= x1 and (left == x0 or rng.random() < 0.6):
                    text = actions.pop()
                    box = (left, y, left + _width(text) + 12, y + 18)
                    fill(box, accent, ink)
                    put(image, text, y + 4, left + 6, (ink,) * 3, 2)
                    widgets.append(Widget("button", text, box))
                    left = box[2] + 8
                y += 26
            elif kind == "field" and fields:
                text = fields.pop()
                put(image, text, y + 4, x0, (ink,) * 3, 2)
                box = (x0 + 52, y, min(x1, x0 + 52 + int(rng.integers(50, 90))), y + 18)
                fill(box, ground, ink)
                widgets.append(Widget("field", text, box))
                y += 26
            elif kind == "tick" and options:
                text, on = options.pop(), bool(rng.random() < 0.5)
                box = (x0, y, x0 + 14, y + 14)
                fill(box, ground, ink)
                if on:
                    fill((x0 + 4, y + 4, x0 + 10, y + 10), ink)
                put(image, text, y + 2, x0 + 20, (ink,) * 3, 2)
                widgets.append(Widget("tick", text, box, on))
                y += 22
            elif kind == "label":
                text = WORDS[rng.integers(len(WORDS))]
                widgets.append(Widget("label", text, put(image, text, y, x0, (ink,) * 3, 2)))
                y += 16
            y += int(rng.integers(0, 3) ** 3) * 2
    noise = rng.standard_normal(image.shape, dtype=np.float32) * 0.004
    return Screen(tuple(widgets), torch.from_numpy(np.clip(image + noise, 0, 1)), dark)


def tasks(screen: Screen) -> list[Task]:
    """Something to do with every widget that can be clicked."""
    says = {"button": "click {}", "field": "write into {}", "tick": "switch {}", "tab": "go to {}"}
    return [Task(says[w.kind].format(w.text), w) for w in screen.widgets if w.kind in says]
