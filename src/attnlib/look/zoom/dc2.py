"""DC²: quarter a large picture, merge what looks alike, caption the leaves, remember where each object was confirmed.

A picture is quartered until its parts are small; quarters whose features are alike (average linkage on cosine
distances, cut at ``theta``) become one picture, their mean. The model captions the leaves; going up, it writes one
caption from those below, and an object it names there is remembered only if a part below named it too: at this node
if several did, else at the part that did. To answer, the objects nearest to the question are looked at again where
they were confirmed, and what is found there stands before the question.

A *region* is the boxes, of one size, whose mean is looked at: one box, or more after a merge.

What differs from the authors' code: the memory belongs to one picture (theirs is a file that any later picture
reads); parts of a merged picture keep the places of all its quarters, not of the first, also when they are looked at
again; odd sizes lose no row or column, quarters overlap by one; regions are compared as sets of boxes; objects come
from JSON that is read, never evaluated. ``compat="authors"`` halves, places and remembers as theirs. The wording of
the prompts is ours: they are data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...checks import check_axes, check_choice, check_int, check_real, check_type, describe
from ..pixels import Box, Picture, cut, to_picture
from ..speak import BaseSpeaker, check_text, need_speaker
from .zoom_eye import Answer

Region: TypeAlias = tuple[Box, ...]


@dataclass(frozen=True)
class DC2Prompts:
    """What the model is asked."""

    caption: str = "Describe this image."
    refine: str = (
        "Captions of parts of the image follow. Write one caption of the whole image from what they say and what "
        "can be "
        "seen. Captions: {captions}"
    )
    objects: str = (
        "List the things that this text says are in an image, as general nouns in the singular, each once, leaving out "
        'what is abstract or doubtful. Answer in JSON: {"object_list": ["dog", "bench"]}. Text: {caption}'
    )
    helper: str = (
        "Question: {question} Say what can be seen here that helps to answer it, and why. If nothing does, say NONE."
    )
    combined: str = "A closer look showed: {findings}\n\nQuestion: {question}\nGive only the answer."

    def __post_init__(self) -> None:
        for name, place in (
            ("refine", "{captions}"), ("objects", "{caption}"), ("helper", "{question}"), ("combined", "{question}"),
            ("combined", "{findings}"),
        ):  # fmt: skip
            check_type(name, getattr(self, name), str, "a string")
            if place not in getattr(self, name):
                raise ValueError(f"{name} must have a place {place}, got {getattr(self, name)!r}")


@dataclass
class VisualMemory:
    """What was seen in one picture: where each object was confirmed, the caption of the whole, the calls it took.

    ``unread`` counts lists of objects that were no JSON.
    """

    objects: dict[str, list[Region]] = field(default_factory=dict)
    caption: str = ""
    size: tuple[int, int] = (0, 0)
    calls: Counter[str] = field(default_factory=Counter)
    unread: int = 0


def read_objects(text: str) -> list[str]:
    """Objects from what a model wrote: ``{"object_list": [...]}`` or ``[...]``, alone or in a fenced block.

    Raises:
        ValueError: no such JSON.

    >>> read_objects('Here: {"object_list": ["dog", "bench", "dog"]}')
    ['dog', 'bench']
    """
    fenced = re.search(r"```(?:json)?(.*?)```", text, re.DOTALL)
    inner = fenced.group(1) if fenced else text
    for start in (m.start() for m in re.finditer(r"[\[{]", inner)):
        try:
            found, _ = json.JSONDecoder().raw_decode(inner[start:])
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            found = found.get("object_list")
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return list(dict.fromkeys(name.strip() for name in found if name.strip()))
    raise ValueError(f'an answer must hold JSON like {{"object_list": ["dog"]}}, got {text!r:.200}')


def cluster(features: Tensor, theta: float) -> list[list[int]]:
    """Groups of rows by average linkage on cosine distances, merged up to a distance of ``theta``.

    Args:
        features: (n, D).
        theta: 0 merges equal rows only, 2 all of them.

    Returns:
        Groups of row numbers, in the order of their first rows.

    >>> cluster(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), 0.1)
    [[0, 2], [1]]
    """
    check_axes("features", features, n=None, D=None)
    check_real("theta", theta, least=0)
    x = features.double()
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
    distance = (1 - unit @ unit.T).clamp(0, 2)
    distance[distance < 1e-12] = 0  # rounding, so that equal directions are at 0
    empty = x.norm(dim=1) == 0
    distance[empty[:, None] & empty] = 0  # nothing is like nothing
    groups = [[i] for i in range(len(x))]
    while len(groups) > 1:
        pairs = [
            (float(distance[a][:, b].mean()), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups[:i])
        ]
        nearest, i, j = min(pairs)
        if not nearest <= theta:
            break
        groups[j] = sorted(groups[j] + groups.pop(i))
    return sorted(groups)


def covers(larger: Region, smaller: Region) -> bool:
    """Whether every box of one region lies in a box of the other."""
    return all(
        any(a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2] and a[3] >= b[3] for a in larger) for b in smaller
    )  # fmt: skip


def largest(regions: Sequence[Region]) -> list[Region]:
    """Regions that no other covers, each once, in their order.

    >>> largest([((0, 0, 2, 2),), ((0, 0, 4, 4),), ((0, 0, 4, 4),)])
    [((0, 0, 4, 4),)]
    """
    every = list(dict.fromkeys(tuple(region) for region in regions))
    return [
        region
        for i, region in enumerate(every)
        if not any(
            covers(other, region) and (not covers(region, other) or j < i) for j, other in enumerate(every) if j != i
        )
    ]


def retrieve(question: Tensor, objects: Tensor, alpha: float = 0.3, top: int = 2) -> list[int]:
    """Rows of ``objects`` (n, D) whose cosine with ``question`` (D,) is at least ``alpha``: the ``top`` largest."""
    check_real("alpha", alpha)
    check_int("top", top, least=1)
    if not len(objects):
        return []
    check_axes("question", question, D=None)
    check_axes("objects", objects, n=None, D=len(question))
    scores = torch.nn.functional.cosine_similarity(question.double()[None], objects.double(), dim=1)
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [i for i in order if scores[i] >= alpha]


def mean_picture(parts: Sequence[Picture]) -> Picture:
    """The mean of pictures of one size; bytes are cut off, not rounded."""
    mean = np.mean([part.astype(np.float64) for part in parts], axis=0)
    return mean.astype(parts[0].dtype)


class DC2:
    """Divide, conquer and combine.

    Args:
        speaker: a :class:`attnlib.look.speak.Speaker`, with features.
        embed: ``embed(text) -> (D,)``, a sentence embedder such as :func:`sentence_embedder` makes.
        leaf: quarters are at least this many pixels high and wide.
        max_depth: deepest level of quarters; 0 leaves the plain model.
        alpha: least cosine of an object's name with the question; above 1 the model is left plain.
        theta: cosine distance up to which quarters are merged.
        top: objects that are looked at again.
        objects: ``objects(caption) -> names`` in place of asking the model.
        prompts: what is asked.
        small: what becomes of pictures smaller than a leaf: ``"refuse"``, or ``"root"``, the plain answer.
        unread: what becomes of a list of objects that is no JSON: ``"skip"``, no objects, or ``"refuse"``.
        compat: ``"authors"`` drops the last row and column of odd sizes, places parts of merged quarters in the first
            of
            them, and with ``max_depth=1`` remembers also what only the whole's caption names.

    Reference: Wang et al., 2024, arXiv 2408.15556.
    """

    def __init__(
        self,
        speaker: Any,
        embed: Callable[[str], Any] | None = None,
        *,
        leaf: int = 168,
        max_depth: int = 5,
        alpha: float = 0.3,
        theta: float = 0.1,
        top: int = 2,
        objects: Callable[[str], Sequence[str]] | None = None,
        prompts: DC2Prompts = DC2Prompts(),  # noqa: B008
        small: str = "refuse",
        unread: str = "skip",
        compat: str | None = None,
    ):
        self.speaker: BaseSpeaker = need_speaker(speaker)
        for name, function in (("embed", embed), ("objects", objects)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function of a text, got {describe(function)}")
        self.embed, self.objects = embed, objects
        self.leaf = check_int("leaf", leaf, least=1)
        self.max_depth = check_int("max_depth", max_depth, least=0)
        self.alpha, self.theta = check_real("alpha", alpha), check_real("theta", theta, least=0)
        self.top = check_int("top", top, least=1)
        check_type("prompts", prompts, DC2Prompts)
        check_choice("small", small, ("refuse", "root"))
        check_choice("unread", unread, ("skip", "refuse"))
        check_choice("compat", compat, (None, "authors"))
        self.prompts, self.small, self.unread, self.compat = prompts, small, unread, compat

    # Divide and conquer

    def observe(self, image: Any) -> VisualMemory:
        """Look at a picture before any question is asked.

        Raises:
            ValueError: a picture of one pixel or, unless ``small="root"``, smaller than a leaf.
        """
        picture = to_picture(image)
        height, width = picture.shape[:2]
        if height * width == 1:
            raise ValueError("image must have more than one pixel: there is nothing to divide")
        if max(height, width) < self.leaf and self.small == "refuse" and self.max_depth:
            raise ValueError(
                f"image of {width} × {height} pixels is smaller than a leaf of {self.leaf}: there is nothing to "
                f"divide; "
                'give a smaller leaf, or small="root" for the plain answer'
            )
        memory = VisualMemory(size=(height, width))
        if self._is_leaf(picture, 0):
            return memory
        with self.speaker.counting() as calls:
            memory.caption, _ = self._look(picture, ((0, 0),), 0, memory)
        memory.calls = calls
        memory.objects = {name: largest(regions) for name, regions in memory.objects.items()}
        return memory

    def _is_leaf(self, picture: Picture, depth: int) -> bool:
        return min(picture.shape[0] // 2, picture.shape[1] // 2) < max(self.leaf, 1) or depth >= self.max_depth

    def _look(
        self, picture: Picture, corners: tuple[tuple[int, int], ...], depth: int, memory: VisualMemory
    ) -> tuple[str, list[str]]:
        """Caption and objects of a picture that stands at ``corners`` of the whole."""
        if self._is_leaf(picture, depth):
            if not picture.any():
                return "", []
            caption = self.speaker.ask(picture, self.prompts.caption)
            return caption, self._named(caption, memory)
        height, width = picture.shape[:2]
        exact = self.compat is None
        h, w = (height + exact) // 2, (width + exact) // 2
        places = [(x, y) for x in (0, width - w if exact else w) for y in (0, height - h if exact else h)]
        parts = [cut(picture, (x, y, x + w, y + h)) for x, y in places]
        groups = cluster(self.speaker.features(parts), self.theta)
        below: list[tuple[str, list[str]]] = []
        regions: list[Region] = []
        first = corners if exact else corners[:1]
        for group in groups:
            spots = tuple((x0 + places[i][0], y0 + places[i][1]) for i in group for x0, y0 in first)
            regions.append(tuple((x, y, x + w, y + h) for x, y in spots))
            part = parts[group[0]] if len(group) == 1 else mean_picture([parts[i] for i in group])
            below.append(self._look(part, spots, depth + 1, memory))
        if not picture.any():
            return "", []
        caption = self.speaker.ask(
            picture, self.prompts.refine.replace("{captions}", "".join(f"{said}\n" for said, _ in below))
        )  # fmt: skip
        named = self._named(caption, memory)
        whole: Region = tuple((x, y, x + width, y + height) for x, y in first)
        for name in named:
            by = [i for i, (_, names) in enumerate(below) if name in names]
            if by or (self.compat and self.max_depth <= 1):
                here = len(by) > 1 or self.max_depth <= 1
                memory.objects.setdefault(name, []).append(whole if here else regions[by[0]])
        if self.max_depth <= 1:  # a single level: what the parts say counts by itself
            for i, (_, names) in enumerate(below):
                for name in names:
                    memory.objects.setdefault(name, []).append(regions[i])
        return caption, named

    def _named(self, caption: str, memory: VisualMemory) -> list[str]:
        if self.objects is not None:
            given = self.objects(caption)
            if isinstance(given, str) or not all(isinstance(name, str) for name in given):
                raise TypeError(f"objects must give a list of names, got {describe(given)}")
            return list(dict.fromkeys(given))
        said = self.speaker.ask(None, self.prompts.objects.replace("{caption}", caption))
        try:
            return read_objects(said)
        except ValueError:
            if self.unread == "refuse":
                raise
            memory.unread += 1
            return []

    # Combine

    def retrieve(self, memory: VisualMemory, question: str) -> list[str]:
        """Names of the remembered objects that a question is about."""
        if not memory.objects or self.alpha > 1:
            return []
        if self.embed is None:
            raise ValueError("embed must be given to find the objects of a question: a function text -> vector")
        names = list(memory.objects)
        vectors = torch.stack([torch.as_tensor(self.embed(name)).flatten() for name in names])
        asked = torch.as_tensor(self.embed(question)).flatten()
        return [names[i] for i in retrieve(asked, vectors, self.alpha, self.top)]

    def answer(self, image: Any, question: str, memory: VisualMemory | None = None) -> Answer:
        """Answer a question about a picture.

        Args:
            image: one picture.
            question: what is asked.
            memory: of :meth:`observe` on this picture, to ask several questions.

        Returns:
            An :class:`attnlib.look.zoom.Answer`; ``cues`` are the objects that were looked at again.

        Raises:
            ValueError: a memory of a picture of another size.
        """
        check_type("question", question, str, "a string")
        check_text("question", question)
        picture = to_picture(image)
        size = (picture.shape[0], picture.shape[1])
        with self.speaker.counting() as calls:
            if memory is None:
                memory = self.observe(picture)
            check_type("memory", memory, VisualMemory)
            if memory.size != size:
                raise ValueError(f"memory is of a picture of size {memory.size}, but image has {size}")
            names = self.retrieve(memory, question)
            findings, boxes = [], []
            helper = self.prompts.helper.replace("{question}", question)
            for region in (region for name in names for region in memory.objects[name]):
                said = self.speaker.ask(mean_picture([cut(picture, box) for box in region]), helper)
                if said.strip(" .'\"").upper() not in ("NONE", ""):
                    findings.append(said)
                    boxes += [box for box in region if box not in boxes]
            text = question
            if findings:
                text = self.prompts.combined.replace("{question}", question)
                text = text.replace("{findings}", "\n\n".join(findings))
            said = self.speaker.ask(picture, text)
        return Answer.of(said, boxes=tuple(boxes), cues=tuple(names), views=(picture,), calls=calls)


def sentence_embedder(model: torch.nn.Module, tokenizer: Any, max_length: int = 512) -> Callable[[str], Tensor]:
    """``embed(text) -> (D,)``: the mean of the last states over the tokens of a text encoder of transformers."""
    check_int("max_length", max_length, least=1)

    def embed(text: str) -> Tensor:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        place = next(model.parameters()).device
        with torch.no_grad():
            states = model(**{k: v.to(place) for k, v in inputs.items()})[0]
        mask = inputs["attention_mask"].to(place)[..., None].bool()
        return (states.masked_fill(~mask, 0).sum(1) / mask.sum(1))[0].float().cpu()

    return embed
