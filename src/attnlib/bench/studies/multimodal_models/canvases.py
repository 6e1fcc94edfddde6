"""Looking again at large pictures: what it costs to find a small thing, and whether it is found.

``attnlib bench --suite multimodal-models-canvases --out benchmarks/results`` writes
``multimodal-models-canvases-cpu.json`` and its picture. Canvases of 512 × 512 pixels hold eight things, shapes of 10
to 14 pixels and digits of 8 (:mod:`attnlib.bench.worlds.canvas`); the small model of :mod:`attnlib.bench.data.scenes`
reads 64 × 64 pixels.
Asked is what its bars hold for: whether a thing is there, once for one that is and once for one that is not, and which
colour a shape has that stands there alone.

The small model says nothing but answers to the questions it was trained on. So "can a thing be seen here" is put to it
as its own question of presence, for a shape of unknown colour once for every colour, of which the surest counts; and
where a technique has a model put findings into words, a rule takes the place of the words.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....checks import check_choice
from ....hooks.hf.names import CACHE_ARGUMENTS
from ....look.pixels import Picture, digest, resize, to_picture
from ....look.speak import MARK, BaseSpeaker, Text
from ....look.zoom import (
    DC2,
    DC2Prompts,
    InformationCrops,
    Iris,
    ZoomEye,
    ZoomPrompts,
    crop,
    grown,
)
from ...clock import machine
from ...data import scenes
from ...small import Progress, picture, study, told
from ...worlds.canvas import Canvas, Choice, choices, make_canvas

QUESTION = "On 512 × 512 pixels, does looking again find what the whole picture at 64 × 64 does not show, at what cost?"

WHOLE = "whole picture"
#: "What is in the picture" of DC², whose places for words the small model cannot read.
LIST, REFINE, HELP, COMBINE = (
    "list the objects",
    "list again {captions}",
    "{question}",
    "combine {findings} | {question}",
)


def wanted(text: str) -> tuple[str, ...]:
    """Names of things of which one must be seen to answer a question.

    >>> wanted("is there a red cross ?"), len(wanted("what colour is the cross ?")), len(wanted("which digit ?"))
    (('red cross',), 5, 10)
    """
    words = text.split()
    shape = next((word for word in words if word in scenes.SHAPES), None)
    colour = next((word for word in words if word in scenes.COLOURS), None)
    if "digit" in words:
        number = next((word for word in words if word.isdigit()), None)
        return scenes.NUMBERED if number is None else (f"digit {number}",)
    if shape is None:
        raise ValueError(f"text must name a shape or a digit, got {text!r}")
    return (f"{colour} {shape}",) if colour else tuple(f"{c} {shape}" for c in scenes.COLOURS)


def thing(text: str) -> str:
    """What a question is about.

    >>> thing("what colour is the cross ?"), thing("is there a red cross ?")
    ('cross', 'red cross')
    """
    names = (*scenes.COLOURS, *scenes.SHAPES, "digit")
    return " ".join(word for word in text.split() if word in names or word.isdigit())


class CanvasSpeaker(BaseSpeaker):
    """The small model, read in batches, that counts what a technique has it read.

    ``pictures`` are views whose 64 tokens were read: questions on one view go on from its keys. ``prompts`` are
    questions put. Both count what is new since :meth:`begin`, though answers are kept for other techniques.

    Args:
        model, tokenizer: of :func:`attnlib.bench.data.scenes.load_model`.
        batch_size: views that are read together.
    """

    input_size = scenes.SIDE
    background = (scenes.BACKGROUND,) * 3

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8):
        super().__init__(0, batch_size)
        self.model, self.tokenizer = model, tokenizer
        self.known: dict[Any, Any] = {}
        taken = inspect.signature(model.forward).parameters
        self.cache_name = next((name for name in CACHE_ARGUMENTS if name in taken), "past_key_values")
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.seen: set[Any] = set()
        self.put: set[Any] = set()
        self.alone = 0  # views in prompts of several, which share nothing

    @property
    def pictures(self) -> int:
        return len(self.seen) + self.alone

    @property
    def prompts(self) -> int:
        return len(self.put)

    def _count(self, images: tuple[Picture, ...], *said: str) -> tuple[Any, ...]:
        marks = tuple(map(digest, images))
        new = {(marks, text) for text in said} - self.put
        self.put |= new
        if len(images) == 1:
            self.seen.add(marks)
        elif new:
            self.alone += len(images)
        return marks

    @staticmethod
    def _pixels(images: Sequence[Picture]) -> Tensor:
        rows = [torch.from_numpy(np.array(resize(to_picture(i), (scenes.SIDE, scenes.SIDE)))) for i in images]
        return (torch.stack(rows).permute(0, 3, 1, 2) - 0.5) * 2

    def prepare(self, views: Sequence[Picture], texts: Sequence[str]) -> None:
        """Read views for several questions at once, uncounted; whoever needs them later has them counted as his."""
        names = tuple(dict.fromkeys(name for text in texts for name in wanted(text)))
        self._margins([(view, names) for view in views])

    @torch.no_grad()
    def _margins(self, asked: Sequence[tuple[Picture, tuple[str, ...]]]) -> None:
        """How much likelier "yes" is than "no" for names on views, into ``known``; views of as many names together."""
        start = self.tokenizer(f"<s> {'<image> ' * scenes.PATCHES}<q> is there a")["input_ids"]
        words = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        by_count: dict[int, list[tuple[Picture, tuple[str, ...]]]] = {}
        for image, names in asked:
            mark = (digest(image),)
            left = tuple(n for n in names if (mark, n) not in self.known)
            if left:
                by_count.setdefault(len(left), []).append((image, left))
        for count, rows in by_count.items():
            for first in range(0, len(rows), self.batch_size):
                part = rows[first : first + self.batch_size]
                ids = torch.tensor([start] * len(part))
                pixels = self._pixels([image for image, _ in part])
                out = self.model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)
                keys = getattr(out, self.cache_name, None) or out.past_key_values
                keys.batch_repeat_interleave(count)
                said = torch.tensor([self.tokenizer(f"{n} ? <a>")["input_ids"] for _, names in part for n in names])
                logits = self.model(input_ids=said, use_cache=True, **{self.cache_name: keys}).logits[:, -1, words]
                values = (logits[:, 0] - logits[:, 1]).view(len(part), count).tolist()
                for (image, names), row in zip(part, values, strict=True):
                    self.known.update({((digest(image),), n): v for n, v in zip(names, row, strict=True)})

    def _logits(self, asked: list[tuple[tuple[Picture, ...], Text]], words: tuple[str, ...]) -> list[Tensor]:
        found = [(images[0], wanted(str(text))) for images, text in asked]
        self._margins(found)
        out = []
        for image, names in found:
            mark = self._count((image,), *(f"is there a {n} ?" for n in names))
            out.append(torch.tensor([max(self.known[mark, n] for n in names), 0.0]))
        return out

    def _ask(self, asked: list[tuple[tuple[Picture, ...], Text]], settings: dict[str, Any]) -> list[str]:
        return [self._answer(images, str(text)) for images, text in asked]

    def _answer(self, images: tuple[Picture, ...], text: str) -> str:
        if text.startswith("combine "):  # a rule in place of words: the first finding that is no "no"
            found = [line.strip() for line in text.removeprefix("combine ").split("|")[0].split("\n\n")]
            return next((line for line in found if line != "no"), "no")
        text = LIST if text.startswith("list again") else " ".join(text.replace(MARK, " ").split())
        mark = self._count(images, text)
        if (mark, text) not in self.known:
            body = scenes.prompt(text).replace("<image> " * scenes.PATCHES, "<image> " * scenes.PATCHES * len(images))
            ids = torch.tensor([self.tokenizer(body)["input_ids"]])
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=self._pixels(images),
                    max_new_tokens=28 if text == LIST else 1 if text.startswith("is there") else 4, do_sample=False,
                )  # fmt: skip
            self.known[mark, text] = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return self.known[mark, text]

    @torch.no_grad()
    def _features(self, pictures: list[Picture]) -> list[Tensor]:
        for image in pictures:
            self.seen.add((digest(image),))
        out = self.model.get_image_features(pixel_values=self._pixels(pictures))
        return [rows.mean(0) for rows in getattr(out, "pooler_output", out)]


# ---------------------------------------------------------------------------------------------------------------------
# Techniques: from a picture and questions to answers


class Asked:
    """A canvas as an array, and what is asked of it: presence of a thing that is there and of one that is not, and
    the colour of a shape that stands alone."""

    def __init__(self, number: int, part: str, side: int):
        canvas = make_canvas(number, part, side)
        rng = np.random.default_rng([number, 23])
        missing = [name for name in scenes.SHAPED if name not in {thing.name for thing in canvas.things}]
        found = choices(canvas, absent=missing[rng.integers(len(missing))])
        there = [c for c in found if c.kind == "presence" and c.about and c.about[0].name in scenes.SHAPED]
        colours = [c for c in found if c.kind == "colour"]
        self.canvas: Canvas = canvas
        self.image: Picture = canvas.image.permute(1, 2, 0).contiguous().numpy()
        self.number, self.side = number, side
        self.questions: list[Choice] = [there[rng.integers(len(there))], next(c for c in found if not c.about)]
        self.questions += [colours[rng.integers(len(colours))]] if colours else []

    @property
    def complete(self) -> bool:
        return len(self.questions) == 3

    def right(self, question: Choice, said: str) -> bool:
        return said.split()[-1:] == [question.answer]


def numbers(count: int, part: str, side: int, first: int) -> list[int]:
    """The first ``count`` canvases from ``first`` on that all questions can be asked of."""
    found: list[int] = []
    while len(found) < count:
        if Asked(first, part, side).complete:
            found.append(first)
        first += 1
    return found


def tiles(side: int, across: int) -> list[tuple[int, int, int, int]]:
    """Squares that tile a canvas, row by row.

    >>> tiles(4, 2)
    [(0, 0, 2, 2), (2, 0, 4, 2), (0, 2, 2, 4), (2, 2, 4, 4)]
    """
    step = side // across
    return [(x, y, x + step, y + step) for y in range(0, side, step) for x in range(0, side, step)]


def _best(speaker: CanvasSpeaker, views: Sequence[Picture], text: str) -> str:
    """The answer of the view that shows most surely what is asked for."""
    scores = speaker.logits_each([(view, text) for view in views], ("yes", "no"))
    return speaker.ask(views[int((scores[:, 0] - scores[:, 1]).argmax())], text)


def _whole(speaker: CanvasSpeaker, asked: Asked) -> list[str]:
    return [speaker.ask(asked.image, q.text) for q in asked.questions]


def _uniform(speaker: CanvasSpeaker, asked: Asked, across: int) -> list[str]:
    views = [crop(asked.image, box).image for box in tiles(asked.side, across)]
    return [_best(speaker, views, q.text) for q in asked.questions]


def _random(speaker: CanvasSpeaker, asked: Asked) -> list[str]:
    boxes, rng = tiles(asked.side, asked.side // scenes.SIDE), np.random.default_rng([asked.number, 29])
    return [speaker.ask(crop(asked.image, boxes[rng.integers(len(boxes))]).image, q.text) for q in asked.questions]


def _oracle(speaker: CanvasSpeaker, asked: Asked) -> list[str]:
    said, boxes = [], tiles(asked.side, asked.side // scenes.SIDE)
    for i, q in enumerate(asked.questions):
        box = grown(q.about[0].cell, (asked.side, asked.side), scenes.SIDE) if q.about else boxes[asked.number % 7 + i]
        said.append(speaker.ask(crop(asked.image, box).image, q.text))
    return said


#: Windows of Iris; the share of edges that a window needs was chosen on 30 canvases of the part "dev".
WINDOWS: dict[str, Any] = dict(k_min=scenes.SIDE, rho_min=0.007, size=scenes.SIDE)


def _information(speaker: CanvasSpeaker, asked: Asked) -> list[str]:
    views = [c.image for c in InformationCrops(**WINDOWS)(asked.image)]
    return [_best(speaker, views, q.text) for q in asked.questions]


def _iris(speaker: CanvasSpeaker, asked: Asked) -> list[str]:
    iris = Iris(speaker, InformationCrops(**WINDOWS), place="<image>\n", last="<image>\n")
    return [iris.answer(asked.image, q.text) for q in asked.questions]


def _zoom_eye(speaker: CanvasSpeaker, asked: Asked, **changes: Any) -> list[str]:
    same = "{cue}"
    prompts = ZoomPrompts(
        yes="yes", no="no", exists=same, latent=same, exists_zoomed=same, latent_zoomed=same, answerable="{question}"
    )
    depth = int(np.log2(asked.side // scenes.SIDE))
    eye = ZoomEye(speaker, "llava", prompts=prompts, cues=lambda text: [thing(text)], max_depth=depth, **changes)
    return [eye.answer(asked.image, q.text) for q in asked.questions]


_VOCABULARY = (*scenes.COLOURS, *scenes.SHAPES, "digit", *map(str, range(10)))


def _embed(text: str) -> Tensor:
    words = text.split()
    return torch.tensor([float(word in words) for word in _VOCABULARY])


def _dc2(speaker: CanvasSpeaker, asked: Asked, theta: float) -> list[str]:
    prompts = DC2Prompts(caption=LIST, refine=REFINE, helper=HELP, combined=COMBINE)
    dc2 = DC2(speaker, _embed, leaf=scenes.SIDE, theta=theta, objects=scenes.named, prompts=prompts)
    memory = dc2.observe(asked.image)
    return [dc2.answer(asked.image, q.text, memory) for q in asked.questions]


Technique = Callable[[CanvasSpeaker, Asked], Sequence[str]]
#: By name; the limit of "patient" lets the search open every box, 0.95 is the bar of the authors' settings for Qwen-VL.
TECHNIQUES: dict[str, Technique] = {
    WHOLE: _whole,
    "random crop": _random,
    "oracle crop": _oracle,
    **{f"uniform {n} × {n}": functools.partial(_uniform, across=n) for n in (2, 4, 8)},
    "ISC crops": _information,
    "ISC crops in one prompt (Iris)": _iris,
    "ZoomEye": _zoom_eye,
    "ZoomEye, patient": functools.partial(_zoom_eye, pops=85),
    "ZoomEye, patient, bar of 0.95": functools.partial(_zoom_eye, pops=85, upper=0.95),
    "DC²": functools.partial(_dc2, theta=0.1),
    "DC², nothing merged": functools.partial(_dc2, theta=0.0),
}
#: Those that take seconds for a canvas are measured on fewer.
SLOW = (*(name for name in TECHNIQUES if name.startswith("ZoomEye")), "DC², nothing merged")


def _prepare(speaker: CanvasSpeaker, asked: Asked) -> None:
    across = [2**i for i in range(int(np.log2(asked.side // scenes.SIDE)) + 1)]
    views = [crop(asked.image, box).image for n in across for box in tiles(asked.side, n)]
    views += [c.image for c in InformationCrops(**WINDOWS)(asked.image)]
    speaker.prepare(views, [q.text for q in asked.questions])


def measured(name: str, number: int, speaker: CanvasSpeaker, part: str, side: int) -> dict[str, float]:
    """What a technique answers about a canvas, in percent, and what it reads for all three questions together."""
    check_choice("name", name, TECHNIQUES)
    asked = Asked(number, part, side)
    speaker.begin()
    said = TECHNIQUES[name](speaker, asked)
    right = [100.0 * asked.right(q, text) for q, text in zip(asked.questions, said, strict=True)]
    return {
        "right": float(np.mean(right)), "presence": float(np.mean(right[:2])), "found": right[0], "denied": right[1],
        "colour": right[2], "prompts": float(speaker.prompts), "pictures": float(speaker.pictures),
        "visual tokens": float(speaker.pictures * scenes.PATCHES),
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    count: int = 400,
    slow: int = 100,
    side: int = 512,
    part: str = "test",
    first: int = scenes.FRESH,
    model: tuple[Any, Any] | None = None,
    techniques: Sequence[str] = tuple(TECHNIQUES),
) -> dict[str, Any]:
    """Every technique on the same questions about the same canvases.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``multimodal-models-canvases-cpu.svg``.
        count: canvases, with three questions each.
        slow: canvases for what takes seconds for each.
        side: of the canvases.
        part: of them.
        first: number of the first that may be asked.
        model: ``(model, tokenizer)``; ``None`` for the repository's own.
        techniques: of :data:`TECHNIQUES`; the whole picture is always measured.

    Returns:
        Plain values, for JSON: per technique shares of right answers with intervals over canvases, the paired
        difference from the whole picture, and what was read per canvas.
    """
    for name in techniques:
        check_choice("techniques", name, TECHNIQUES)
    speaker = CanvasSpeaker(*(scenes.load_model() if model is None else model))
    asked = numbers(count, part, side, first)
    names = [WHOLE, *(n for n in TECHNIQUES if n in techniques and n != WHOLE)]
    last: list[int] = []  # the canvas whose answers are held

    def run(name: str, number: int) -> dict[str, float]:
        if last != [number]:  # answers are kept for the canvas alone
            speaker.known.clear()
            _prepare(speaker, Asked(number, part, side))
            last[:] = [number]
        return measured(name, number, speaker, part, side)

    def all_of(some: list[str], seeds: list[int]) -> dict[str, Any]:
        found = study(
            some, run, "right", WHOLE, seeds=seeds, progress=progress, keep=keep, key=[part, side, "canvases"]
        )
        return {row["name"]: row for row in found["rows"]}

    rows = all_of([n for n in names if n not in SLOW], asked)
    few = [n for n in names if n in SLOW]
    if few:
        found = all_of([WHOLE, *few], asked[:slow])
        rows.update({n: found[n] for n in few})
    result: dict[str, Any] = {
        "question": QUESTION, "canvases": count, "slow canvases": slow, "side": side, "part": part, "first": first,
        "questions per canvas": 3, "rows": [rows[n] for n in names],
    }  # fmt: skip
    if pictures is not None:
        curves = {
            n: [(rows[n]["visual tokens"]["mean"], rows[n]["right"]["mean"], rows[n]["right"]["half"])] for n in names
        }
        picture(
            Path(pictures) / "multimodal-models-canvases-cpu.svg", curves, "visual tokens read for three questions",
            "right, %", f"Small things on {side} × {side} pixels", log="x",
        )  # fmt: skip
    return {**result, "machine": machine()}


def table(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| technique | canvases | right % | against the whole | there | not there | colour | prompts | visual tokens |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        cells = [
            row["name"],
            str(row["right"]["n"]),
            told(row, "right"),
            told(row, "against") if row["against"] else "",
        ]
        cells += [told(row, kind) for kind in ("found", "denied", "colour")]
        lines.append(
            "| " + " | ".join([*cells, *(f"{row[k]['mean']:.0f}" for k in ("prompts", "visual tokens"))]) + " |"
        )
    return "\n".join(lines)
