"""ProMaC: a language model's guesses about crops are put to use, and what it would say without the thing is taken away.

Asked about crops, the model names candidates, real and imagined. They are painted out of the image; every later answer
is decoded in contrast to that picture, ``(1 + a) z - a z'`` on plausible tokens
(:func:`attnlib.steer.contrastive.contrast`), so that what the scene alone suggests goes. One name and one box then
prompt a segmenter in every crop; the masks are weighed by how much what they cut out looks like the name; their sum
dims the image, and all begins again.

Differs from the authors' code: the cut-off of implausible tokens, which the release computes and does not use, is used;
soft masks lie in [0, 1] and are cut at 0.5, the release compares them with 0, so that all of an image is the thing; a
crop without box and points is asked with its whole, where the release crashes; boxes say whether they are shares or
pixels. ``compat="authors"`` takes cut-off and 0 as theirs are.

Source: Hu et al., 2024, arXiv 2408.15205; code lwpyh/ProMaC_code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, check_size, describe, shaped
from ...hooks.attach import attach
from ...hooks.branches import OtherPixels
from ...ops.points import min_max
from ...steer.contrastive import ContrastiveDecoding
from ..surgery import SurgeryMaps, surgery_features
from .gensam import Segmentation, best, clean, points_of
from .segmenter import Predict, check_image

UNITS = ("relative", "pixels", "auto")
SCALES = (0.5, 1, 2, 4)

Crop = tuple[int, int, int, int]


class Answer(NamedTuple):
    """What a model said, and how much in doubt it was: the mean of ``-log p`` over its tokens; lower is surer."""

    text: str
    doubt: float = 0.0


#: ``ask(image, question, history, without=None)`` -> :class:`Answer` or its text; ``without`` is the image to contrast.
ContrastiveAskType = Callable[..., "Answer | str"]


@dataclass(frozen=True)
class Questions:
    """What is asked: ``{key}`` is looked for, ``{names}`` and ``{boxes}`` are candidates, ``{name}`` the answer."""

    caption: str = "This image is from {key} detection task, describe the {key} in one sentence"
    name: str = "Name of the {key} in one word."
    place: str = "Name of the environment of the {key} in one word."
    box: str = "Output the bounding box of the {key} in this image as [x1, y1, x2, y2]."
    one_name: str = (
        "The potential {key} are: {names}, and the potential bounding boxes of {key} are: {boxes}. "
        "Output the name of this {key} in this image in one word."
    )
    one_box: str = "Output one bounding box of this {key} in this image as [x1, y1, x2, y2]."


def crops(image_size: Sequence[int], scales: Sequence[float] = (1, 2)) -> list[Crop]:
    """x1, y1, x2, y2 of the crops of an image.

    Args:
        image_size: (height, width).
        scales: 1 is the whole; 2 its halves, left, right, upper, lower; 4 its quarters, cut along the longer side; 0.5
            its middle.

    >>> crops((10, 20), [1, 2])
    [(0, 0, 20, 10), (0, 0, 10, 10), (10, 0, 20, 10), (0, 0, 20, 5), (0, 5, 20, 10)]
    """
    height, width = check_size("image_size", image_size, least=2)
    found: list[Crop] = []
    for scale in scales:
        check_choice("scales", scale, SCALES)
        if scale == 1:
            found.append((0, 0, width, height))
        elif scale == 2:
            x, y = width // 2, height // 2
            found += [(0, 0, x, height), (x, 0, width, height), (0, 0, width, y), (0, y, width, height)]
        elif scale == 4:
            parts = [(0, 0, width, height)]
            for _ in range(2):
                parts = [half for part in parts for half in _halves(part)]
            found += parts
        else:
            x, y = width // 4, height // 4
            found.append((x, y, x + width // 2, y + height // 2))
    if not found:
        raise ValueError(f"scales must name at least one of {list(SCALES)}, got none")
    return found


def _halves(part: Crop) -> tuple[Crop, Crop]:
    x1, y1, x2, y2 = part
    if x2 - x1 >= y2 - y1:
        middle = (x1 + x2) // 2
        return (x1, y1, middle, y2), (middle, y1, x2, y2)
    middle = (y1 + y2) // 2
    return (x1, y1, x2, middle), (x1, middle, x2, y2)


def _area(box: Tensor) -> bool:
    return float(box[2]) > float(box[0]) and float(box[3]) > float(box[1])


@shaped(box="number (4)")
def clip_box(box: Tensor, crop: Sequence[int]) -> Tensor | None:
    """A box of the image in the pixels of a crop; ``None`` where they do not meet.

    >>> clip_box(torch.tensor([5, 5, 15, 9]), (10, 0, 20, 10)).tolist()
    [0, 5, 5, 9]
    """
    x1, y1, x2, y2 = crop
    if box[2] <= x1 or box[0] >= x2 or box[3] <= y1 or box[1] >= y2:
        return None
    low = torch.maximum(box[:2], box.new_tensor([x1, y1]))
    high = torch.minimum(box[2:], box.new_tensor([x2, y2]))
    return torch.cat([low, high]) - box.new_tensor([x1, y1, x1, y1])


def boxes_in(text: str, image_size: Sequence[int], units: str = "relative") -> list[Tensor]:
    """Boxes that an answer names, in pixels.

    Args:
        text: with four numbers per box.
        image_size: (height, width).
        units: ``"relative"`` numbers are shares of the image; ``"pixels"``; ``"auto"`` is the authors' rule: shares
            where the first is below 1.

    Returns:
        Boxes (4,) with an area, cut to the image; none where no four numbers in a row make one.

    >>> boxes_in("It is at [0.1, 0.2, 0.5, 1.0].", (10, 20))[0].tolist()
    [2.0, 2.0, 10.0, 10.0]
    """
    check_choice("units", units, UNITS)
    height, width = image_size
    found = []
    number = r"(\d+(?:\.\d+)?)"
    for match in re.findall(rf"{number},\s*{number},\s*{number},\s*{number}", text):
        box = torch.tensor([float(part) for part in match])
        if units == "relative" or (units == "auto" and box[0] < 1):
            box = box * torch.tensor([width, height, width, height])
        box = torch.minimum(box, torch.tensor([width, height, width, height], dtype=box.dtype))
        if _area(box):
            found.append(box)
    return found


@shaped(scores="float (J)")
def align(scores: Tensor, keep: float = 0.7) -> tuple[Tensor, Tensor]:
    """How much each crop counts, by how much what was cut out of it looks like the name.

    Args:
        scores: (J,) of the crops.
        keep: crops above this share of the best join the hard mask.

    Returns:
        (J,) weights that sum to 1, and (J,) which crops are kept: always the first.

    >>> weights, kept = align(torch.tensor([1.0, 5.0, 1.0]))
    >>> weights.tolist(), kept.tolist()
    ([0.0, 1.0, 0.0], [True, True, False])
    """
    check_real("keep", keep, least=0, most=1)
    if not len(scores):
        raise ValueError("scores must hold at least one crop, got none")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite, got {scores.tolist()}")
    share = scores.softmax(0)
    value = min_max(share) if bool(share.max() > share.min()) else torch.ones_like(share)
    kept = value > keep
    kept[0] = True
    return value / value.sum(), kept


def confidence(logprobs: Sequence[float]) -> float:
    """The doubt of an answer: the mean of ``-log p`` over its useful tokens; 0 of no token."""
    return -sum(logprobs) / len(logprobs) if len(logprobs) else 0.0


@shaped(masks="bool (J, H, W)")
def masked_images(image: Tensor, masks: Tensor) -> Tensor:
    """(J, H, W, 3) of an image (H, W, 3): black outside each mask."""
    return image * masks[..., None]


class CLIPSimilarity:
    """``similarity(images, name)`` -> (J,) CLIP logits of images (J, H, W, 3) for a name, with transformers' CLIP.

    Args:
        maps: whose CLIP, tokenizer and templates are shared; a name stands alone, without a sentence, unless
            ``templates`` is ``True``.
    """

    def __init__(self, maps: SurgeryMaps, templates: bool = False):
        alone = maps if templates else SurgeryMaps(maps.clip, maps.tokenize, maps.layers, maps.path, ("{}",))
        self.maps = alone

    @torch.no_grad()
    def __call__(self, images: Tensor, name: str) -> Tensor:
        clip: Any = self.maps.clip
        pixels = torch.cat([self.maps.pixels(image) for image in images])
        found = surgery_features(clip, pixels, 1, "qk")[:, 0]  # the class token is the model's own
        return (F.normalize(found, dim=-1) @ self.maps.text([name])[0]) * clip.logit_scale.exp()


class ContrastiveAsk:
    """Ask a transformers vision-language model, decoding in contrast to another image.

    Args:
        model: with ``generate``.
        inputs: ``inputs(image, question, history)`` -> what ``generate`` takes, ``pixel_values`` among it.
        decode: from token ids (N,) to text.
        token_types: for :func:`attnlib.attach`.
        alpha: a of the contrast.
        cutoff: share of the largest probability that a token needs.
        compat: ``"authors"`` leaves the cut-off out.
        **generate: of ``generate``; greedy unless ``do_sample`` is given.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Callable[..., dict[str, Any]],
        decode: Callable[[Tensor], str],
        token_types: Any,
        alpha: float = 1.0,
        cutoff: float = 0.1,
        compat: str | None = None,
        **generate: Any,
    ):
        for name, value in (("inputs", inputs), ("decode", decode)):
            if not callable(value):
                raise TypeError(f"{name} must be callable, got {describe(value)}")
        check_choice("compat", compat, (None, "authors"))
        self.model, self.inputs, self.decode, self.token_types = model, inputs, decode, token_types
        self.alpha = check_real("alpha", alpha, least=0)
        self.cutoff = 0.0 if compat == "authors" else check_real("cutoff", cutoff, least=0, most=1)
        self.generate = {"do_sample": False, **generate}

    @torch.no_grad()
    def __call__(
        self, image: Tensor, question: str, history: Sequence[tuple[str, str]] = (), without: Tensor | None = None
    ) -> Answer:
        given = self.inputs(image, question, history)
        model: Any = self.model
        asked = dict(return_dict_in_generate=True, output_scores=True, **self.generate)
        if without is None or not self.alpha:
            out = model.generate(**given, **asked)
        else:
            pixels = self.inputs(without, question, history)["pixel_values"]
            contrast = ContrastiveDecoding(OtherPixels(pixels, "painted-out"), 1 + self.alpha, -self.alpha, self.cutoff)
            with attach(model, contrast, token_types=self.token_types):
                out = model.generate(**given, **asked)
        new = out.sequences[0, given["input_ids"].shape[1] :]
        logprobs = [
            float(scores[0].float().log_softmax(-1)[token]) for scores, token in zip(out.scores, new, strict=False)
        ]
        return Answer(self.decode(new), confidence([p for p in logprobs if p > -torch.inf]))


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        name, box: what prompted the segmenter.
        doubt: of the answers that gave them.
        candidates: (names, surroundings, boxes) from the crops.
        without: (H, W, 3) the image with the candidates painted out.
        weights: (J,) of the crops.
        soft: (H, W) in [0, 1].
        mask: (H, W) the crops that were kept, joined.
    """

    name: str
    box: Tensor
    doubt: float
    candidates: tuple[list[str], list[str], list[Tensor]]
    without: Tensor
    weights: Tensor
    soft: Tensor
    mask: Tensor


class ProMaC:
    """See the module.

    Args:
        segmenter: from an image (H, W, 3) to :data:`attnlib.look.segment.segmenter.Predict`.
        maps: as in :class:`attnlib.look.segment.GenSAM`.
        ask: see :data:`ContrastiveAskType`; :class:`ContrastiveAsk` is one.
        similarity: ``similarity(images, name)`` -> (J,), as :class:`CLIPSimilarity`.
        inpaint: ``inpaint(image, mask, names, surroundings)`` -> the image with the mask (H, W) painted over.
        key: what is looked for.
        rounds: how often mask and prompt refine each other.
        scales: see :func:`crops`.
        weight, threshold, upsample: as in :class:`attnlib.look.segment.GenSAM`.
        keep: see :func:`align`.
        cut: the mean of soft masks is cut here.
        fusion: ``"mean"`` over rounds, or weighed by ``"confidence"``: by ``exp(-doubt)``, which is ours.
        units: see :func:`boxes_in`.
        questions: see :class:`Questions`.
        compat: ``"authors"`` cuts soft masks at 0 and points to whole pixels.
    """

    def __init__(
        self,
        segmenter: Callable[[Tensor], Predict],
        maps: Callable[[Tensor, Sequence[str], Sequence[str]], Tensor],
        ask: ContrastiveAskType,
        similarity: Callable[[Tensor, str], Tensor],
        inpaint: Callable[..., Tensor],
        key: str = "camouflaged animal",
        rounds: int = 4,
        scales: Sequence[float] = (1, 2),
        weight: float = 0.3,
        threshold: float = 0.9,
        upsample: float = 2,
        keep: float = 0.7,
        cut: float = 0.5,
        fusion: str = "mean",
        units: str = "relative",
        questions: Questions | None = None,
        compat: str | None = None,
    ):
        called = dict(segmenter=segmenter, maps=maps, ask=ask, similarity=similarity, inpaint=inpaint)
        for name, value in called.items():
            if not callable(value):
                raise TypeError(f"{name} must be callable, got {describe(value)}")
        check_choice("fusion", fusion, ("mean", "confidence"))
        check_choice("units", units, UNITS)
        check_choice("compat", compat, (None, "authors"))
        self.segmenter, self.maps, self.ask = segmenter, maps, ask
        self.similarity, self.inpaint, self.key = similarity, inpaint, key
        self.rounds, self.scales = check_int("rounds", rounds, least=1), tuple(scales)
        self.weight = check_real("weight", weight, least=0, most=1)
        self.threshold = check_real("threshold", threshold, least=0, most=1)
        self.upsample, self.keep = check_real("upsample", upsample, above=0), check_real("keep", keep, least=0, most=1)
        self.cut = 0.0 if compat == "authors" else check_real("cut", cut, least=0, most=1)
        self.fusion, self.units, self.compat = fusion, units, compat
        self.questions = Questions() if questions is None else questions
        crops((8, 8), self.scales)

    # ---- the prompt

    def _asked(self, image: Tensor, text: str, history: list[tuple[str, str]], without: Tensor | None) -> Answer:
        question = text.replace("{key}", self.key)
        said = self.ask(image, question, list(history), without=without)
        answer = said if isinstance(said, Answer) else Answer(str(said))
        history.append((question, answer.text))
        return answer

    def _candidates(
        self, image: Tensor, parts: Sequence[Crop], without: Tensor | None
    ) -> tuple[list[str], list[str], list[Tensor]]:
        names: list[str] = []
        places: list[str] = []
        boxes: list[Tensor] = []
        for x1, y1, x2, y2 in parts:
            piece = image[y1:y2, x1:x2]
            other = None if without is None else without[y1:y2, x1:x2]
            history: list[tuple[str, str]] = []
            q = self.questions
            self._asked(piece, q.caption, history, other)
            name = clean(self._asked(piece, q.name, history, other).text)
            place = clean(self._asked(piece, q.place, history, other).text)
            found = boxes_in(self._asked(piece, q.box, history, other).text, (y2 - y1, x2 - x1), self.units)
            if not found:
                continue  # a crop where the model points at nothing suggests nothing
            boxes.append(found[0] + torch.tensor([x1, y1, x1, y1]))
            if name and name not in names:
                names.append(name)
            if place and place.upper() != name.upper():
                places.append(place)
        return names, places, boxes

    def _painted(self, image: Tensor, mask: Tensor, names: list[str], places: list[str]) -> Tensor:
        if bool(mask.all()):
            return torch.zeros_like(image)  # nothing is left to paint from
        if not bool(mask.any()):
            return image
        out = self.inpaint(image, mask, names, places)
        if not isinstance(out, Tensor) or out.shape != image.shape:
            raise ValueError(f"inpaint must give an image {tuple(image.shape)}, got {describe(out)}")
        return out

    def _prompt(
        self, image: Tensor, parts: Sequence[Crop], last: Tensor | None, before: tuple[list[str], list[str]]
    ) -> tuple[str, Tensor, float, tuple[list[str], list[str], list[Tensor]], Tensor]:
        height, width = image.shape[:2]
        if last is None:
            names, places, boxes = self._candidates(image, parts, None)
            mask = torch.zeros(height, width, dtype=torch.bool, device=image.device)
            for box in boxes:
                x1, y1, x2, y2 = (int(v) for v in (*box[:2].floor(), *box[2:].ceil()))
                mask[y1:y2, x1:x2] = True
            without = self._painted(image, mask, names, places)
        else:
            without = self._painted(image, last, *before)
            names, places, boxes = self._candidates(image, parts, without)
        q, history = self.questions, []  # type: tuple[Questions, list[tuple[str, str]]]
        size = torch.tensor([width, height, width, height])
        listed = [[round(float(v), 2) for v in box / size] for box in boxes]
        text = q.one_name.replace("{names}", str(names)).replace("{boxes}", str(listed))
        first = self._asked(image, text, history, without)
        name = clean(first.text) or (names[0] if names else self.key)
        second = self._asked(image, q.one_box.replace("{name}", name), history, without)
        found = boxes_in(second.text, (height, width), self.units)
        box = found[0] if found else boxes[0] if boxes else torch.tensor([0.0, 0.0, width, height])
        return name, box, (first.doubt + second.doubt) / 2, (names, places, boxes), without

    # ---- the mask

    def _cut_out(
        self, now: Tensor, parts: Sequence[Crop], name: str, places: Sequence[str], box: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(J, H, W) probabilities and masks of the crops, laid into the image."""
        height, width = now.shape[:2]
        soft = torch.zeros(len(parts), height, width, device=now.device)
        for number, (x1, y1, x2, y2) in enumerate(parts):
            piece = now[y1:y2, x1:x2]
            size = (y2 - y1, x2 - x1)
            found = self.maps(piece, [name], list(places))
            points, labels = points_of(found, size, self.threshold, self.upsample, self.compat)
            inside = clip_box(box, (x1, y1, x2, y2))
            inside = inside if inside is not None and _area(inside) else None
            if not len(points) and inside is None:
                inside = torch.tensor([0.0, 0.0, size[1], size[0]])
            given: dict[str, Any] = dict(points=points, labels=labels) if len(points) else {}
            soft[number, y1:y2, x1:x2] = best(self.segmenter(piece)(**given, box=inside)).sigmoid().to(soft)
        return soft, soft > 0.5

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Segmentation:
        """Segment an image (H, W, 3) in [0, 1].

        Returns:
            :class:`attnlib.look.segment.Segmentation`, whose ``steps`` are :class:`Round` and whose ``logits`` are the
            mean of their soft masks, in [0, 1].
        """
        image = check_image(image)
        parts = crops((image.shape[0], image.shape[1]), self.scales)
        now, last, before = image, None, ([], [])  # type: Tensor, Tensor | None, tuple[list[str], list[str]]
        rounds: list[Round] = []
        for _ in range(self.rounds):
            name, box, doubt, candidates, without = self._prompt(image, parts, last, before)
            soft, masks = self._cut_out(now, parts, name, candidates[1] or ["background"], box)
            scores = self.similarity(masked_images(now, masks), name)
            if not isinstance(scores, Tensor) or scores.shape != (len(parts),):
                raise ValueError(
                    f"similarity must give one score for each of {len(parts)} images, got {describe(scores)}"
                )
            weights, kept = align(scores.float().to(soft.device), self.keep)
            summed = (weights[:, None, None] * soft).sum(0)
            whole = min_max(summed, (0, 1)) if bool(summed.max() > summed.min()) else summed
            rounds.append(Round(name, box, doubt, candidates, without, weights, whole, masks[kept].any(0)))
            now = self.weight * image * whole[..., None] + (1 - self.weight) * now
            last, before = whole > 1 / 255, candidates[:2]
        stacked = torch.stack([r.soft for r in rounds])
        share = torch.tensor([0.0 if self.fusion == "mean" else -r.doubt for r in rounds]).softmax(0).to(stacked)
        mean = (share[:, None, None] * stacked).sum(0)
        unions = torch.stack([r.mask for r in rounds])
        chosen = int((unions != (mean > self.cut)).flatten(1).sum(1).argmin())
        return Segmentation(unions[chosen], mean, chosen, rounds, now)
