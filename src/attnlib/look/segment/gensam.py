"""GenSAM: one generic prompt for many images, camouflaged animals for instance, segmented without training.

A vision-language model names the thing and what is around it; CLIP surgery turns the names into a map; its highest and
lowest cells are a segmenter's points; the map then dims the image where nothing is,

    ``I_(i+1) = w I_0 s_i + (1 - w) I_i``,

and all begins again. The answer is the mask nearest to the mean of all.

Differs from the authors' code: an empty answer is left out, where theirs
crashes; a map that is the same everywhere gives no points, where theirs divides by zero; of the last mask's parts the
largest makes the next box, grown alike to all sides and kept inside the image. ``compat="authors"`` takes the part with
the largest box, grows it unevenly and unclipped, and cuts points to whole pixels. Their bytes and PIL's resizing are
ours in floats.

Source: Hu et al., 2023, arXiv 2312.07374; code jyLin8100/GenSAM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_axes, check_choice, check_flag, check_int, check_real, check_size, describe, shaped
from ...ops.points import ABSENT, extreme_points, min_max
from ..prompts import component_boxes, components
from ..speak import BaseSpeaker
from .segmenter import Predict, Segments, check_image

#: ``ask(image, question, history)`` -> answer; ``history`` holds the (question, answer) pairs before.
Ask = Callable[[Tensor, str, list[tuple[str, str]]], str]

#: What is asked, by the authors; the key is filled in.
QUESTIONS = (
    "This image is from {} detection task, describe the {} in one sentence",
    "Name of the {} in one word.",
    "Name of the environment of the {} in one word.",
)

#: Words for what is looked for.
CAMOUFLAGED = ("camouflaged animal", "disguised animal", "hidden animal")


def clean(answer: str) -> str:
    """A name out of an answer.

    >>> clean(' The animal is a "frog".'), clean("It is an owl."), clean("  ")
    ('frog', 'owl', '')
    """
    for mark in ("<im_end>", "<|im_end|>", "</s>"):
        answer = answer.replace(mark, "")
    if answer.find('"') > 0:
        answer = answer.split('"')[1]
    else:
        for verb in (" is an ", " is a "):
            if verb in answer:
                answer = answer.split(verb)[1]
                break
    return answer.strip().removesuffix(".").strip()


def spoken(speaker: BaseSpeaker) -> Ask:
    """A speaker as :data:`Ask`: what was said before is the conversation before."""

    def ask(image: Tensor, question: str, history: list[tuple[str, str]]) -> str:
        turns = [turn for q, a in history for turn in (("user", q), ("assistant", a))]
        return speaker.ask(image, [*turns, ("user", question)])

    return ask


class NameChain:
    """Names of a thing and of what is around it, from questions about an image asked one after the other.

    Args:
        ask: see :data:`Ask`; or a :class:`attnlib.look.speak.Speaker`, which is given the dialogue as a conversation.
        keys: words for what is looked for; one dialogue for each.
        questions: first any that only prepare, then for the name, then for its surroundings; ``{}`` is the key.
        fallback: what is around where no answer says.

    >>> answers = iter(["a frog on a leaf", "Frog.", "Leaf."])
    >>> NameChain(lambda image, question, history: next(answers), ["hidden animal"])(torch.zeros(2, 2, 3))
    (['Frog'], ['Leaf'])
    """

    def __init__(
        self,
        ask: Ask | BaseSpeaker,
        keys: Sequence[str] = CAMOUFLAGED,
        questions: Sequence[str] = QUESTIONS,
        fallback: str = "background",
    ):
        if isinstance(ask, BaseSpeaker):
            ask = spoken(ask)
        if not callable(ask):
            raise TypeError(f"ask must be a Speaker, or callable as ask(image, question, history), got {describe(ask)}")
        keys, questions = ((value,) if isinstance(value, str) else tuple(value) for value in (keys, questions))
        if not keys:
            raise ValueError("keys must hold at least one word for what is looked for, got none")
        if len(questions) < 2:
            raise ValueError(f"questions must end with one for the name and one for its surroundings, got {questions}")
        self.ask, self.keys, self.questions, self.fallback = ask, keys, questions, fallback

    def __call__(self, image: Tensor) -> tuple[list[str], list[str]]:
        """(names, surroundings) of an image (H, W, 3)."""
        names: list[str] = []
        around: list[str] = []
        for key in self.keys:
            history: list[tuple[str, str]] = []
            for question in self.questions:
                question = question.replace("{}", key)
                history.append((question, self.ask(image, question, list(history))))
            name, place = clean(history[-2][1]), clean(history[-1][1])
            if name:
                names.append(name)
            if place and place.upper() != name.upper():
                around.append(place)
        return names, around or [self.fallback]


@dataclass(frozen=True)
class Step:
    """One round."""

    names: tuple[tuple[str, ...], tuple[str, ...]]
    map: Tensor  # (h, w) in [0, 1]
    points: Tensor  # (K, 2)
    labels: Tensor  # (K,)
    box: Tensor | None  # (4,) the box that was given
    logits: Tensor  # (H, W)

    @property
    def mask(self) -> Tensor:
        return self.logits > 0


@dataclass(frozen=True)
class Segmentation:
    """An answer.

    Attributes:
        mask: (H, W) bool.
        logits: (H, W) the mean over rounds.
        chosen: which round the mask is of.
        steps: what happened, round by round.
        image: (H, W, 3) as it was dimmed at the end.
    """

    mask: Tensor
    logits: Tensor
    chosen: int
    steps: list[Any] = field(repr=False)
    image: Tensor = field(repr=False)


@shaped(logits="float (S, H, W)")
def fuse(logits: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, int]:
    """The mask nearest to the mean.

    Args:
        logits: (S, H, W) of S rounds.
        threshold: what a mask is above.

    Returns:
        (H, W) the mask, (H, W) the mean of ``logits``, and whose mask it is: the first of the nearest.

    >>> fuse(torch.tensor([[[4.0, -1.0]], [[-1.0, -1.0]]]))[2]
    0
    """
    if not len(logits):
        raise ValueError("logits must hold at least one round, got none")
    mean = logits.mean(0)
    masks = logits > threshold
    chosen = int((masks != (mean > threshold)).flatten(1).sum(1).argmin())
    return masks[chosen], mean, chosen


@shaped(mask="bool (H, W)")
def largest_box(mask: Tensor, compat: str | None = None) -> Tensor:
    """(4,) x1, y1, x2, y2 around the largest connected part; the whole image where the mask is empty.

    Args:
        compat: ``"authors"`` takes the part with the largest box, which may hold fewer pixels.

    >>> largest_box(torch.tensor([[True, True, False], [False, False, False]])).tolist()
    [0.0, 0.0, 2.0, 1.0]
    """
    check_choice("compat", compat, (None, "authors"))
    if not bool(mask.any()):
        return torch.tensor([0.0, 0.0, mask.shape[1], mask.shape[0]], device=mask.device)
    boxes = component_boxes(components(mask[None]), mask.shape)[0]
    if compat != "authors":
        return boxes[0]
    return boxes[int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argmax())]


@shaped(box="float (4)")
def grown_box(box: Tensor, by: float, image_size: Sequence[int], compat: str | None = None) -> Tensor:
    """A box that is larger by a share of its size on every side, inside the image.

    Args:
        compat: ``"authors"`` grows the lower right corner by a share of the size that the upper left one left, in whole
            pixels, and does not stop at the border.

    >>> grown_box(torch.tensor([10.0, 10.0, 30.0, 20.0]), 0.1, (100, 31)).tolist()
    [8.0, 9.0, 31.0, 21.0]
    """
    check_real("by", by, least=0)
    check_choice("compat", compat, (None, "authors"))
    height, width = check_size("image_size", image_size)
    low, high = box[:2], box[2:]
    if compat == "authors":
        # In float64, as numpy has it: a tenth of 30 is 3 there, and 3.0000001 in float32, which is rounded up.
        low, high = low.double(), high.double()
        low = low - ((high - low) * by).floor()
        return torch.cat([low, high + ((high - low) * by).ceil()]).to(box)
    more = (high - low) * by
    border = box.new_tensor([width, height])
    return torch.cat([(low - more).clamp(min=0), torch.minimum(high + more, border)])


def best(found: Segments) -> Tensor:
    """(H, W) logits of the mask that the segmenter believes in."""
    return found.logits[int(found.scores.argmax())]


def points_of(found: Tensor, size: tuple[int, int], threshold: float, upsample: float, compat: str | None) -> Any:
    """Points (K, 2) and labels (K,) of a map (h, w)."""
    check_axes("what maps(...) gives", found, h=None, w=None)
    if not bool(found.isfinite().all()):
        raise ValueError("maps must give finite scores, but they hold NaN or infinity")
    wider = [max(1, int(n * upsample)) for n in found.shape]
    cells = min_max(F.interpolate(found[None, None], wider, mode="bilinear")[0], (1, 2))
    points, labels = extreme_points(cells, size, threshold=threshold, compat=compat)
    return points[0][labels[0] != ABSENT], labels[0][labels[0] != ABSENT]


def dimmed(image: Tensor, now: Tensor, found: Tensor, weight: float, running: bool = True) -> Tensor:
    """The image of the next round: ``w I_0 s + (1 - w) I_i``."""
    wide = F.interpolate(found[None, None].to(image), image.shape[:2], mode="bilinear")[0, 0]
    wide = min_max(wide, (0, 1))[..., None]
    if not bool(wide.any()):
        return now  # a map that says nothing dims nothing
    return weight * (image if running else now) * wide + (1 - weight) * now


class GenSAM:
    """See the module.

    Args:
        segmenter: from an image (H, W, 3) to :data:`attnlib.look.segment.segmenter.Predict`.
        maps: ``maps(image, names, surroundings)`` -> (h, w) in [0, 1], as
            :class:`attnlib.look.surgery.SurgeryMaps`.
        names: ``names(image)`` -> (names, surroundings), as :class:`NameChain`; or the two lists themselves.
        rounds: how often a map is made.
        weight: ``w`` of the image's update.
        threshold: cells of the map from here on are points on the thing.
        upsample: of the map before.
        grow: share by which the last mask's box grows on every side.
        update_names: ask anew in every round, always about the image as it was given.
        running: ``False`` dims the image of the round before again, in place of the given one.
        stop: end when the mean change of probabilities is below this and no longer changes by more; ``None`` for all
            rounds. The authors use 0.003.
        compat: ``"authors"``; see the module.

    Raises:
        ValueError: no name.
    """

    def __init__(
        self,
        segmenter: Callable[[Tensor], Predict],
        maps: Callable[[Tensor, Sequence[str], Sequence[str]], Tensor],
        names: Callable[[Tensor], tuple[Sequence[str], Sequence[str]]] | tuple[Sequence[str], Sequence[str]],
        rounds: int = 6,
        weight: float = 0.3,
        threshold: float = 0.9,
        upsample: float = 2,
        grow: float = 0.1,
        update_names: bool = True,
        running: bool = True,
        stop: float | None = None,
        compat: str | None = None,
    ):
        for name, value in (("segmenter", segmenter), ("maps", maps)):
            if not callable(value):
                raise TypeError(f"{name} must be callable, got {describe(value)}")
        if not callable(names) and (not isinstance(names, (tuple, list)) or len(names) != 2):
            raise TypeError(f"names must be callable or a pair of lists (names, surroundings), got {describe(names)}")
        check_choice("compat", compat, (None, "authors"))
        self.segmenter, self.maps, self.names, self.compat = segmenter, maps, names, compat
        self.rounds = check_int("rounds", rounds, least=1)
        self.weight = check_real("weight", weight, least=0, most=1)
        self.threshold = check_real("threshold", threshold, least=0, most=1)
        self.upsample, self.grow = check_real("upsample", upsample, above=0), check_real("grow", grow, least=0)
        self.update_names, self.running = check_flag("update_names", update_names), check_flag("running", running)
        self.stop = None if stop is None else check_real("stop", stop, above=0)

    def _ask(self, image: Tensor) -> tuple[list[str], list[str]]:
        found = self.names(image) if callable(self.names) else self.names
        names, around = ([part] if isinstance(part, str) else list(part) for part in found)
        if not names:
            raise ValueError("names gave no name of a thing to look for in this image")
        return names, around

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Segmentation:
        """Segment an image (H, W, 3) in [0, 1].

        Returns:
            :class:`Segmentation`, whose ``steps`` are :class:`Step`.
        """
        image = check_image(image)
        size = (image.shape[0], image.shape[1])
        predict, now = self.segmenter(image), image
        steps: list[Step] = []
        box: Tensor | None = None
        names, changes = self._ask(image), []
        for number in range(self.rounds):
            if number and self.update_names:
                names = self._ask(image)
            found = self.maps(now, *names)
            points, labels = points_of(found, size, self.threshold, self.upsample, self.compat)
            if not len(points) and box is None:
                box = torch.tensor([0.0, 0.0, size[1], size[0]], device=image.device)
            given: dict[str, Any] = dict(points=points, labels=labels) if len(points) else {}
            logits = best(predict(**given, box=box))
            steps.append(Step((tuple(names[0]), tuple(names[1])), found, points, labels, box, logits))
            now = dimmed(image, now, found, self.weight, self.running)
            box = largest_box(logits > 0, self.compat)
            if bool((logits > 0).any()):
                box = grown_box(box, self.grow, size, self.compat)
            if number:
                changes.append(float((logits.sigmoid() - steps[-2].logits.sigmoid()).abs().mean()))
            still = self.stop is not None and len(changes) > 1
            if still and abs(changes[-1] - changes[-2]) < (self.stop or math.inf) > changes[-1]:
                break
        mask, mean, chosen = fuse(torch.stack([step.logits for step in steps]))
        return Segmentation(mask, mean, chosen, steps, now)
