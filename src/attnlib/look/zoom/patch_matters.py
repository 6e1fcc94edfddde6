"""Patch Matters: describe a picture from patches that keep objects whole, and keep what is said twice or can be seen.

*Divide*: four quadrants, each grown around the objects it mostly meets, and the box of what the picture is mainly
about. *Describe*: every patch several times. *Aggregate*: a language model sorts the statements of descriptions into
those that say the same, contradict each other, or stand alone; an image-text scorer filters them on the pixels::

    R = same  +  best of each contradiction, if its score > threshold  +  unique with score > threshold

and the descriptions of a patch, then of patches that overlap, are merged given ``R``; the main box corrects the
description of the whole, and the last call writes it anew from the regions.

What differs from the authors' code: a patch gets its own descriptions (theirs gives patch ``i`` the answers ``i, i +
1, i + 2`` of one list of all patches); where two patches were merged, the others keep their merged descriptions
(theirs passes the raw lists after one merge and drops them after two that share a patch: ``compat="authors"`` drops
them); the whole picture is ``(0, 0, W, H)``, theirs a pixel less; groups are read from JSON. Detector, captioner,
language model and scorer are functions. The wording of the prompts is ours: they are data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...checks import check_choice, check_int, check_real, check_type, describe
from ...extras import need
from ..pixels import Box, Picture, cut, to_bytes, to_picture
from ..speak import BaseSpeaker, need_speaker
from .dc2 import read_objects
from .iris import box_iou
from .views import union
from .zoom_eye import Answer

#: Patches that lie beside each other: upper, right, lower and left pair.
NEIGHBOURS = ((0, 1), (1, 3), (2, 3), (0, 2))

# ---------------------------------------------------------------------------------------------------------------------
# Divide


@dataclass(frozen=True)
class Detection:
    """A detected thing: its box (x1, y1, x2, y2), how sure that is, and its name."""

    box: tuple[float, float, float, float]
    score: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Patches:
    """Four patches, in reading order, and the box of what the picture is mainly about."""

    four: tuple[Box, Box, Box, Box]
    main: Box
    size: tuple[int, int]

    @property
    def main_share(self) -> float:
        """Intersection over union of the main box and the picture."""
        return box_iou(self.main, (0, 0, self.size[1], self.size[0]))


def merge_overlapping(boxes: Sequence[Sequence[float]], threshold: float = 0.3) -> list[tuple[float, ...]]:
    """Boxes that overlap by more than ``threshold`` (intersection over union) become one, time and again.

    A merge in which another follows stays in the list too, as in the authors' code.

    >>> merge_overlapping([(0, 0, 10, 10), (2, 0, 12, 10), (50, 50, 60, 60)])
    [(0, 0, 12, 10), (50, 50, 60, 60)]
    """
    check_real("threshold", threshold, least=0, most=1)
    current = [tuple(box) for box in boxes]
    for _ in range(len(current) + 1):
        rows, found = current, []
        while rows:
            near = [b for b in rows[1:] if box_iou(rows[0], b) > threshold]
            if near:
                around = _around([*near, rows[0]])
                found.append(around)
                rows = [b for b in rows[1:] if b not in near] + [around]
            else:
                if rows[0] not in found:
                    found.append(rows[0])
                rows = rows[1:]
        current = found
        if not any(box_iou(current[0], b) > threshold for b in current[1:]):
            break
    return sorted(current)


def _around(boxes: Sequence[Sequence[float]]) -> tuple[float, ...]:
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def share_inside(box: Sequence[float], region: Sequence[float]) -> float:
    """Share of a box's area that lies in a region."""
    sides = [max(min(box[k + 2], region[k + 2]) - max(box[k], region[k]), 0.0) for k in (0, 1)]
    return sides[0] * sides[1] / ((box[2] - box[0]) * (box[3] - box[1]))


class PatchDivider:
    """Divide a picture around its objects.

    Args:
        detector: ``detector(picture) -> detections``: :class:`Detection`, or (box, score, name).
        main: ``main(picture, names) -> names`` of those things the picture is mainly about; ``None`` for the whole
            picture.
        units: of the detector's boxes: ``"pixels"``, or ``"relative"`` to width and height.
        least_score: detections above it count; where none is, the two best.
        merge: boxes that overlap by more become one.
        overlap: a quadrant grows around boxes that have more than this share of their area in it.

    Reference: Peng et al., 2025, arXiv 2504.06666.
    """

    def __init__(
        self,
        detector: Callable[[Picture], Iterable[Any]],
        main: Callable[[Picture, list[str]], Sequence[str]] | None = None,
        *,
        units: str = "pixels",
        least_score: float = 0.3,
        merge: float = 0.3,
        overlap: float = 0.3,
    ):
        if not callable(detector):
            raise TypeError(f"detector must be a function of a picture, got {describe(detector)}")
        if main is not None and not callable(main):
            raise TypeError(f"main must be a function (picture, names), got {describe(main)}")
        check_choice("units", units, ("pixels", "relative"))
        self.detector, self.main, self.units = detector, main, units
        self.least_score = check_real("least_score", least_score)
        self.merge, self.overlap = check_real("merge", merge, least=0, most=1), check_real("overlap", overlap, least=0)

    def _detections(self, picture: Picture) -> list[Detection]:
        height, width = picture.shape[:2]
        found = []
        for one in self.detector(picture):
            one = one if isinstance(one, Detection) else Detection(*one)
            if len(one.box) != 4:
                raise ValueError(f"a detection must have a box (x1, y1, x2, y2), got {one.box}")
            x1, y1, x2, y2 = (float(v) for v in one.box)
            if not (x1 < x2 and y1 < y2):
                raise ValueError(f"a detection must have x1 < x2 and y1 < y2, got {one.box}")
            if self.units == "relative":
                if x2 > 1 + 1e-6 or y2 > 1 + 1e-6:
                    raise ValueError(f'units="relative" means boxes within [0, 1], got {one.box}')
                x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
            elif max(x2, y2) <= 1 and min(height, width) > 1:
                raise ValueError(f'units="pixels", but {one.box} looks relative; say units="relative"')
            found.append(Detection((x1, y1, x2, y2), float(one.score), str(one.name)))
        return found

    def __call__(self, image: Any) -> Patches:
        """The patches of a picture.

        Raises:
            ValueError: a picture less than two pixels high or wide, boxes with x2 <= x1 or of other units.
        """
        picture = to_picture(image)
        height, width = picture.shape[:2]
        if min(height, width) < 2:
            raise ValueError(f"image must be at least 2 × 2 pixels to be divided, got {width} × {height}")
        every = self._detections(picture)
        kept = [d for d in every if d.score > self.least_score]
        if not kept and len(every) >= 2:
            kept = sorted(every, key=lambda d: -d.score)[:2]
        boxes = [d.box for d in kept] or [(0.0, 0.0, float(width), float(height))]
        merged = merge_overlapping(boxes, self.merge)
        x, y = width // 2, height // 2
        four = []
        for quadrant in ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)):
            met = [box for box in merged if share_inside(box, quadrant) > self.overlap]
            four.append(_whole_pixels(_around([quadrant, *met]), width, height))
        main: Box = (0, 0, width, height)
        names = list(dict.fromkeys(d.name for d in kept if d.name))
        if self.main is not None and names:
            chosen = self.main(picture, names)
            if isinstance(chosen, str):
                raise TypeError(f"main must give a list of names, got {describe(chosen)}")
            about = [d.box for d in kept if d.name in set(chosen)]
            if about:
                main = _whole_pixels(_around(about), width, height)
        return Patches((four[0], four[1], four[2], four[3]), main, (height, width))


def _whole_pixels(box: Sequence[float], width: int, height: int) -> Box:
    x1, y1 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    return x1, y1, max(min(round(box[2]), width), x1 + 1), max(min(round(box[3]), height), y1 + 1)


def main_things(
    speaker: Any, llm: Any, prompts: PatchPrompts | None = None
) -> Callable[[Picture, list[str]], list[str]]:
    """``main(picture, names)`` for :class:`PatchDivider`: a short caption, and which names it is about.

    Args:
        speaker: describes the picture.
        llm: a function or speaker that reads text.
        prompts: of which ``brief`` and ``main`` are used.
    """
    captioner, reader, asked = need_speaker(speaker), need_speaker(llm, "llm"), prompts or PatchPrompts()

    def main(picture: Picture, names: list[str]) -> list[str]:
        caption = captioner.ask(picture, asked.brief)
        said = reader.ask(None, asked.main.replace("{names}", json.dumps(names)).replace("{caption}", caption))
        try:
            listed = read_objects(said)
        except ValueError:
            return []
        return [name for name in names if name in listed]

    return main


# ---------------------------------------------------------------------------------------------------------------------
# Filter


@dataclass
class Groups:
    """Statements of several descriptions; sources are numbers of descriptions, from 1."""

    same: list[str] = field(default_factory=list)
    contradictory: list[list[tuple[str, int]]] = field(default_factory=list)
    unique: list[tuple[str, int]] = field(default_factory=list)


def read_groups(text: str, sources: int) -> Groups:
    """Groups from what a language model wrote: ``{"same": [...], "contradictory": [[[text, n], ...]], "unique": "
    "[...]}``.

    Args:
        text: the answer, perhaps with words around the JSON.
        sources: how many descriptions there were.

    Raises:
        ValueError: no such JSON; sources that do not exist.

    >>> read_groups('{"same": ["a dog"], "unique": [["a red ball", 2]]}', 3).unique
    [('a red ball', 2)]
    """
    fenced = re.search(r"```(?:json)?(.*?)```", text, re.DOTALL)
    inner = fenced.group(1) if fenced else text
    start = inner.find("{")
    wanted = '{"same": [text, ...], "contradictory": [[[text, number], ...], ...], "unique": [[text, number], ...]}'
    try:
        found, _ = json.JSONDecoder().raw_decode(inner[start:] if start >= 0 else "")
    except json.JSONDecodeError as error:
        raise ValueError(f"groups must be JSON {wanted}, got {text!r:.200}") from error

    def sourced(pair: Any) -> tuple[str, int]:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int):
            raise ValueError(f"groups must be JSON {wanted}, got a statement {describe(pair)}")
        if not 1 <= pair[1] <= sources:
            raise ValueError(f"groups must name descriptions 1..{sources}, got {pair[1]}")
        return pair[0], pair[1]

    same, contradictory, unique = (found.get(name, []) for name in ("same", "contradictory", "unique"))
    if not all(isinstance(part, list) for part in (same, contradictory, unique, *contradictory)):
        raise ValueError(f"groups must be JSON {wanted}, got {text!r:.200}")
    if not all(isinstance(one, str) for one in same):
        raise ValueError(f"groups must be JSON {wanted}, got same={describe(same)}")
    return Groups(
        list(same), [[sourced(pair) for pair in group] for group in contradictory], [sourced(pair) for pair in unique]
    )


def reliable(
    groups: Groups,
    score: Callable[[str], float],
    score_unique: Callable[[str, int], float] | None = None,
    threshold: float = 0.3,
) -> list[str]:
    """Statements that can be relied on.

    Args:
        groups: of statements.
        score: how well a statement fits the pixels; decides contradictions.
        score_unique: the same for a statement of a description by its number; ``None`` for ``score``.
        threshold: a score must be above it.

    Returns:
        What was said alike, the best of each contradiction, and what was said once, as far as above the threshold.

    Reference: Peng et al., 2025, arXiv 2504.06666.
    """
    check_real("threshold", threshold)
    found = list(groups.same)
    for group in groups.contradictory:
        scores = [float(score(text)) for text, _ in group]
        if scores and max(scores) > threshold:
            found.append(group[scores.index(max(scores))][0])
    for text, source in groups.unique:
        if float(score(text) if score_unique is None else score_unique(text, source)) > threshold:
            found.append(text)
    return found


class BlipScorer:
    """``score(picture, text)``: the mean of BLIP's matching probability and cosine.

    Args:
        model: a ``BlipForImageTextRetrieval`` of transformers.
        processor: its processor.
    """

    def __init__(self, model: nn.Module, processor: Any):
        if not hasattr(model, "itm_head"):
            raise TypeError(f"model must be a BlipForImageTextRetrieval, got {type(model).__name__}")
        self.model, self.processor = model, processor

    def __call__(self, picture: Picture, text: str) -> float:
        image = need("PIL.Image", "BlipScorer").fromarray(to_bytes(to_picture(picture)))
        inputs = self.processor(images=image, text=text, return_tensors="pt")
        parameter = next(self.model.parameters())
        given = {k: v.to(parameter.device) for k, v in inputs.items()}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                match = self.model(**given).itm_score.float().softmax(-1)[0, 1]
                cosine = self.model(**given, use_itm_head=False).itm_score.float().flatten()[0]
        finally:
            self.model.train(training)
        return float((match + cosine) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Aggregate


@dataclass(frozen=True)
class PatchPrompts:
    """What captioner and language model are asked."""

    describe: str = "Describe this image in detail."
    brief: str = "Say in one sentence what this image shows."
    main: str = (
        "A caption of an image: {caption}\nWhich of these things is it about? {names}\n"
        'Answer in JSON: {"object_list": ["dog"]}.'
    )
    group: str = (
        "Descriptions of one thing follow. Sort every statement in them: said alike by several, contradicting "
        "another, or "
        'said once. Answer in JSON: {"same": ["a dog"], "contradictory": [[["a red ball", 1], ["a blue ball", 2]]], '
        '"unique": [["a fence", 3]]}, with the number of the description.\n{descriptions}'
    )
    merge: str = (
        "Write one description from these, without what contradicts the facts. Facts: {facts}\n{descriptions}\n"
        "Give only the description."
    )
    correct: str = (
        "A description of an image: {whole}\nIts main part, seen closely: {main}\nCorrect and enrich the "
        "description by "
        "what is seen closely. Give only the description."
    )
    final: str = (
        "A description of an image: {whole}\nRegions, (x1, y1, x2, y2) relative to the image, seen "
        "closely:\n{regions}\n"
        "Correct and enrich the description by them, naming nothing twice. Give only the description."
    )

    def __post_init__(self) -> None:
        for name, places in (
            ("main", ("{caption}", "{names}")), ("group", ("{descriptions}",)),
            ("merge", ("{facts}", "{descriptions}")), ("correct", ("{whole}", "{main}")),
            ("final", ("{whole}", "{regions}")),
        ):  # fmt: skip
            check_type(name, getattr(self, name), str, "a string")
            for place in places:
                if place not in getattr(self, name):
                    raise ValueError(f"{name} must have a place {place}, got {getattr(self, name)!r}")


class Description(Answer):
    """A description: a string, with its ``patches``, the ``reliable`` statements of each step by name, and how many
    groups were ``unread`` for being no JSON; see :class:`attnlib.look.zoom.Answer`."""

    patches: Patches
    reliable: dict[str, list[str]]
    unread: int


class CaptionAggregator:
    """Describe a picture from its patches.

    Args:
        captioner: a speaker, or a function (pictures, text), asked to describe pictures.
        llm: a speaker or function that reads and writes text; ``None`` for the captioner.
        scorer: ``scorer(picture, text) -> number``, for instance a :class:`BlipScorer`.
        divider: a :class:`PatchDivider`.
        group: ``group(descriptions) -> Groups`` in place of asking the language model.
        samples: descriptions per patch.
        threshold: least score of a statement, not met.
        overlap: patches that overlap by more (intersection over union) are merged.
        main: a main box with less of the picture than this is described and corrects the whole.
        temperatures: of the captions of the whole, of patches, of merging and of the last call.
        unread: what becomes of groups that are no JSON: ``"skip"``, no statement is reliable, or ``"refuse"``.
        compat: ``"authors"`` leaves patches out of the last call that were not merged, where two others were.

    Raises:
        ValueError: no scorer.

    Reference: Peng et al., 2025, arXiv 2504.06666.
    """

    def __init__(
        self,
        captioner: Any,
        llm: Any = None,
        scorer: Callable[[Picture, str], float] | None = None,
        divider: PatchDivider | None = None,
        *,
        group: Callable[[list[str]], Groups] | None = None,
        samples: int = 3,
        threshold: float = 0.3,
        overlap: float = 0.4,
        main: float = 0.4,
        temperatures: tuple[float, float, float, float] = (0.2, 0.7, 0.6, 0.2),
        prompts: PatchPrompts = PatchPrompts(),  # noqa: B008
        unread: str = "skip",
        compat: str | None = None,
    ):
        self.captioner: BaseSpeaker = need_speaker(captioner, "captioner")
        self.llm: BaseSpeaker = self.captioner if llm is None else need_speaker(llm, "llm")
        if scorer is None or not callable(scorer):
            raise ValueError(
                f"scorer must be given, a function (picture, text) -> number such as BlipScorer, got {describe(scorer)}"
            )
        if divider is None:
            raise ValueError("divider must be given: PatchDivider(detector), with a function that finds things")
        check_type("divider", divider, PatchDivider)
        self.scorer, self.divider, self.group = scorer, divider, group
        self.samples = check_int("samples", samples, least=1)
        self.threshold = check_real("threshold", threshold)
        self.overlap = check_real("overlap", overlap, least=0, most=1)
        self.main = check_real("main", main, least=0, most=1)
        if len(temperatures) != 4:
            raise ValueError(f"temperatures must be four numbers: whole, patches, merging, last, got {temperatures}")
        self.temperatures = tuple(check_real("temperatures", t, least=0) for t in temperatures)
        check_type("prompts", prompts, PatchPrompts)
        check_choice("unread", unread, ("skip", "refuse"))
        check_choice("compat", compat, (None, "authors"))
        self.prompts, self.unread, self.compat = prompts, unread, compat

    def _groups(self, descriptions: list[str], result: dict[str, Any]) -> Groups:
        if self.group is not None:
            found = self.group(descriptions)
            check_type("group", found, Groups, "a function that gives Groups")
            return found
        listed = "\n".join(f"Description {n}: {text}" for n, text in enumerate(descriptions, 1))
        said = self.llm.ask(None, self.prompts.group.replace("{descriptions}", listed))
        try:
            return read_groups(said, len(descriptions))
        except ValueError:
            if self.unread == "refuse":
                raise
            result["unread"] += 1
            return Groups()

    def _merge(self, descriptions: list[str], facts: list[str]) -> str:
        listed = "\n".join(f"Description {n}: {text}" for n, text in enumerate(descriptions, 1))
        text = self.prompts.merge.replace("{facts}", "; ".join(facts) or "none").replace("{descriptions}", listed)
        return self.llm.ask(None, text, temperature=self.temperatures[2])

    def _patch(self, picture: Picture, box: Box, name: str, result: dict[str, Any]) -> str:
        """Several descriptions of a box, merged."""
        view = cut(picture, box)
        said = [
            self.captioner.ask(view, self.prompts.describe, temperature=self.temperatures[1], sample=n)
            for n in range(self.samples)
        ]
        facts = reliable(self._groups(said, result), lambda text: self.scorer(view, text), threshold=self.threshold)
        result["reliable"][name] = facts
        return self._merge(said, facts)

    def describe(self, image: Any, patches: Patches | None = None) -> Description:
        """A description of a picture.

        Args:
            image: one picture.
            patches: how it is divided, where that is known.
        """
        picture = to_picture(image)
        size = (picture.shape[0], picture.shape[1])
        patches = self.divider(picture) if patches is None else patches
        check_type("patches", patches, Patches)
        if patches.size != size:
            raise ValueError(f"patches are of a picture of size {patches.size}, but image has {size}")
        result: dict[str, Any] = {"patches": patches, "reliable": {}, "unread": 0}
        calls: Counter[str] = Counter()
        speakers = [self.captioner] if self.llm is self.captioner else [self.captioner, self.llm]
        before = [Counter(speaker.calls) for speaker in speakers]

        whole = self.captioner.ask(picture, self.prompts.describe, temperature=self.temperatures[0])
        merged = [self._patch(picture, box, f"patch {i}", result) for i, box in enumerate(patches.four)]
        if patches.main_share < self.main:
            close = self._patch(picture, patches.main, "main", result)
            whole = self.llm.ask(None, self.prompts.correct.replace("{whole}", whole).replace("{main}", close))
        regions: list[tuple[Box, str]] = []
        used: set[int] = set()
        for a, b in NEIGHBOURS:
            boxes = (patches.four[a], patches.four[b])
            if not box_iou(*boxes) > self.overlap:
                continue
            both = union(boxes)
            facts = reliable(
                self._groups([merged[a], merged[b]], result),
                lambda text, view=cut(picture, both): self.scorer(view, text),  # type: ignore[misc]
                lambda text, n, boxes=boxes: self.scorer(cut(picture, boxes[n - 1]), text),  # type: ignore[misc]
                self.threshold,
            )
            result["reliable"][f"patches {a} and {b}"] = facts
            regions.append((both, self._merge([merged[a], merged[b]], facts)))
            used |= {a, b}
        if not (self.compat and len(regions) > 1):
            regions += [(patches.four[i], merged[i]) for i in range(4) if i not in used]
        listed = "\n".join(f"{self._relative(box, size)}: {text}" for box, text in regions)
        text = self.prompts.final.replace("{whole}", whole).replace("{regions}", listed)
        said = self.llm.ask(None, text, temperature=self.temperatures[3])
        for speaker, start in zip(speakers, before, strict=True):
            calls += Counter(speaker.calls) - start
        found = Description.of(said, boxes=tuple(box for box, _ in regions), views=(picture,), calls=calls, **result)
        assert isinstance(found, Description)
        return found

    @staticmethod
    def _relative(box: Box, size: tuple[int, int]) -> str:
        x1, y1, x2, y2 = box
        return f"({x1 / size[1]:.3f}, {y1 / size[0]:.3f}, {x2 / size[1]:.3f}, {y2 / size[0]:.3f})"
