"""VL-SAM, as we read it: a model says what is in an image, and where it looked while it said so prompts a segmenter.

The flow of attention from a name's tokens to the image (:class:`attnlib.look.flow.Flow`, heads by their mean of maxima,
columns held back) is a map. Weak cells are dropped; of the largest connected part the highest cell is a point on the
thing, the lowest cell outside of it one off it. The segmenter's mask is given back to it as a prompt, then hides the
map outside of itself and the points are taken anew. Corners of the image are asked too, questions in several wordings;
what is found twice is merged.

Everything here is our reading: the code is not public, and the paper was known second-hand. Each choice is an argument.

Source: Lin et al., 2024, arXiv 2410.05963.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_real, check_size, describe, shaped
from ...hooks.attach import attach
from ..flow import Flow, flow_map
from ..prompts import from_map
from .segmenter import Predict, Segments, check_image

Crop = tuple[int, int, int, int]


@dataclass(frozen=True)
class Found:
    """A thing.

    Attributes:
        name: as the model said it.
        mask: (H, W) bool.
        box: (4,) x1, y1, x2, y2 around it.
        score: the segmenter's.
        map: (h, w) where the model looked, of the crop it was found in.
        crop: x1, y1, x2, y2 of that.
    """

    name: str
    mask: Tensor
    box: Tensor
    score: float
    map: Tensor
    crop: Crop


@shaped(a="bool (H, W)", b="bool (H, W)")
def iou(a: Tensor, b: Tensor) -> float:
    """Overlap of two masks; 0 of empty ones.

    >>> iou(torch.tensor([[True, True]]), torch.tensor([[True, False]]))
    0.5
    """
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def corners(image_size: Sequence[int]) -> list[Crop]:
    """The whole image and its four quarters.

    >>> corners((4, 6))
    [(0, 0, 6, 4), (0, 0, 3, 2), (3, 0, 6, 2), (0, 2, 3, 4), (3, 2, 6, 4)]
    """
    height, width = check_size("image_size", image_size, least=2)
    y, x = height // 2, width // 2
    return [(0, 0, width, height), (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]


def merge(found: Sequence[Found], overlap: float = 0.5, by_name: bool = True) -> list[Found]:
    """Drop what is found again: the best first, and nothing that overlaps one that is kept by more.

    Args:
        overlap: of masks.
        by_name: only things of one name are the same.
    """
    check_real("overlap", overlap, least=0, most=1)
    kept: list[Found] = []
    for one in sorted(found, key=lambda f: -f.score):
        same = (k for k in kept if not by_name or k.name.casefold() == one.name.casefold())
        if all(iou(one.mask, k.mask) <= overlap for k in same):
            kept.append(one)
    return kept


class FlowReader:
    """``reader(image, question)`` -> ``[(name, map (h, w)), ...]`` of a transformers vision-language model.

    The model writes its answer; then it reads prompt and answer once more while attention flows through it, so that one
    matrix is kept whatever the depth.

    Args:
        model: with ``generate``; its image tokens come before its answer.
        inputs: ``inputs(image, question)`` -> what ``generate`` takes.
        names: from the ids (N,) of the answer to ``[(name, positions in the answer), ...]``.
        image_token: id of an image token.
        grid: (rows, columns) of the image tokens, without class or newline tokens.
        flow: what rolls attention out.
        **generate: of ``generate``; greedy unless ``do_sample`` is given.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Callable[[Tensor, str], dict[str, Any]],
        names: Callable[[Tensor], Sequence[tuple[str, Sequence[int]]]],
        image_token: int,
        grid: Sequence[int],
        flow: Flow | None = None,
        **generate: Any,
    ):
        for name, value in (("inputs", inputs), ("names", names)):
            if not callable(value):
                raise TypeError(f"{name} must be callable, got {describe(value)}")
        self.model, self.inputs, self.names = model, inputs, names
        self.image_token, self.grid = check_int("image_token", image_token, least=0), tuple(grid)
        self.flow = Flow("mean-max", 0.5, "column") if flow is None else flow
        self.generate = {"do_sample": False, **generate}

    @torch.no_grad()
    def __call__(self, image: Tensor, question: str) -> list[tuple[str, Tensor]]:
        given, model = self.inputs(image, question), self.model  # type: dict[str, Any], Any
        ids = given["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"inputs must give one prompt, got {len(ids)}")
        written = model.generate(**given, **self.generate)
        start = ids.shape[1]
        told = list(self.names(written[0, start:]))
        if not told:
            return []
        whole = {**given, "input_ids": written, "attention_mask": torch.ones_like(written)}
        with attach(model, self.flow) as session:
            model(**whole, use_cache=False)
            flow = session.results[self.flow.name]
        image_at = (written[0] == self.image_token).nonzero()[:, 0].cpu()
        return [
            (name, flow_map(flow, torch.as_tensor(list(places)) + start, image_at, self.grid)[0])
            for name, places in told
        ]


class VLSAM:
    """See the module.

    Args:
        segmenter: from an image (H, W, 3) to :data:`attnlib.look.segment.segmenter.Predict`.
        reader: ``reader(image, question)`` -> ``[(name, map (h, w)), ...]``, as :class:`FlowReader`.
        questions: wordings of "what is in the image"; all answers count.
        part: cells of the map from here on, of [0, 1], are its strong ones.
        refine: how often the mask goes back into the segmenter and onto the map.
        crops: asks the four quarters too.
        overlap, by_name: see :func:`merge`.
        least: score that a thing needs.
    """

    def __init__(
        self,
        segmenter: Callable[[Tensor], Predict],
        reader: Callable[[Tensor, str], Sequence[tuple[str, Tensor]]],
        questions: Sequence[str] = ("List all objects in the image.",),
        part: float = 0.5,
        refine: int = 1,
        crops: bool = True,
        overlap: float = 0.5,
        by_name: bool = True,
        least: float | None = None,
    ):
        for name, value in (("segmenter", segmenter), ("reader", reader)):
            if not callable(value):
                raise TypeError(f"{name} must be callable, got {describe(value)}")
        questions = (questions,) if isinstance(questions, str) else tuple(questions)
        if not questions:
            raise ValueError("questions must hold at least one wording, got none")
        self.segmenter, self.reader, self.questions = segmenter, reader, questions
        self.part = check_real("part", part, above=0, most=1)
        self.refine = check_int("refine", refine, least=0)
        self.crops, self.by_name = check_flag("crops", crops), check_flag("by_name", by_name)
        self.overlap = check_real("overlap", overlap, least=0, most=1)
        self.least = None if least is None else check_real("least", least)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[Found]:
        """Things in an image (H, W, 3) in [0, 1], the best first; a map that is the same everywhere gives none."""
        image = check_image(image)
        size = (image.shape[0], image.shape[1])
        parts = corners(size) if self.crops else [(0, 0, size[1], size[0])]
        found: list[Found] = []
        for crop in parts:
            x1, y1, x2, y2 = crop
            piece = image[y1:y2, x1:x2]
            predict: Predict | None = None
            for question in self.questions:
                for name, seen in self.reader(piece, question):
                    predict = predict or self.segmenter(piece)
                    one = self._segment(predict, name, seen, (y2 - y1, x2 - x1), crop)
                    if one is None or (self.least is not None and one.score < self.least):
                        continue
                    mask = torch.zeros(size, dtype=torch.bool, device=image.device)
                    mask[y1:y2, x1:x2] = one.mask
                    found.append(replace(one, mask=mask, box=one.box + torch.tensor([x1, y1, x1, y1])))
        return merge(found, self.overlap, self.by_name)

    def _segment(self, predict: Predict, name: str, seen: Tensor, size: tuple[int, int], crop: Crop) -> Found | None:
        prompt = from_map(seen, size, "component", part=self.part)
        if bool(prompt.empty[0]):
            return None
        out = predict(prompt.points[0], prompt.labels[0])
        best = int(out.scores.argmax())
        for _ in range(self.refine):
            out, best = self._again(predict, out, best, prompt.points[0], prompt.labels[0])
            inside = F.adaptive_max_pool2d((out.logits[best] > 0).float()[None], tuple(seen.shape))[0]
            narrowed = from_map(seen * inside, size, "component", part=self.part)
            if bool(narrowed.empty[0]):
                break  # the mask left nothing of the map
            prompt = narrowed
            out, best = self._again(predict, out, best, prompt.points[0], prompt.labels[0])
        mask = out.logits[best] > 0
        if not bool(mask.any()):
            return None
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float().cpu()
        return Found(name, mask, box, float(out.scores[best]), seen, crop)

    @staticmethod
    def _again(predict: Predict, out: Segments, best: int, points: Tensor, labels: Tensor) -> tuple[Segments, int]:
        """The segmenter once more, with its own mask as a prompt."""
        low = None if out.low is None else out.low[best]
        out = predict(points, labels, mask=low)
        return out, int(out.scores.argmax())
