"""A-STAR and Attend-and-Excite: latents moved so that the maps of the subjects of a prompt come out.

A-STAR (Agarwal et al., 2023): subjects must not look at the same places, and each must keep the places that it had,

    ``L_seg = sum_{m<n} sum min(A^m, A^n) / sum (A^m + A^n),
    L_ret = sum_m 1 - sum min(A^m_t, B^m) / sum (A^m_t + B^m),    B^m = 1[A^m_{t+1} > threshold]``,

sums over places; B is of the step before, which has more noise, and carries no gradient. The first step has the first
loss only. Attend-and-Excite (Chefer et al., 2023): every subject must be seen somewhere,

    ``L = max_m (1 - max A^m)``.

``A^m`` is the map of a subject's tokens at 16 x 16, the mean over heads and layers, after a softmax over the words
alone and a small blur. There is no released code of A-STAR, so where its text leaves something open the options below
name it and are our reading: the softmax over words and the blur, step sizes and steps with repeated moves are taken
from Attend-and-Excite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_real, shaped
from .losses import LatentUpdate
from .maps import normalize, of_spans, over_words, overlap, smooth

#: The blur of Attend-and-Excite's code. It is called with 0.5, but its Gaussian divides by (2 sigma)^2, not by
#: 2 sigma^2, which is one of this standard deviation.
SIGMA = 0.5**0.5

#: What a loss between 0 and 1 must reach at the steps with repeated moves, in Attend-and-Excite.
TARGETS = {0: 0.95, 10: 0.5, 20: 0.2}

NORMALIZERS = ("sum", "dice")
KEPT = ("before", "after")


@shaped(maps="float (M, h, w)")
def segregation(maps: Tensor) -> Tensor:
    """How much the maps of M subjects overlap: the sum over pairs, each 0 (disjoint) to 1/2 (equal).

    >>> segregation(torch.ones(3, 2, 2)).item()
    1.5
    """
    terms = [overlap(maps[m], maps[n]) for m, n in combinations(range(len(maps)), 2)]
    return torch.stack(terms).sum() if terms else maps.sum() * 0


@shaped(maps="float (M, h, w)", regions="tensor (M, h, w)")
def retention(maps: Tensor, regions: Tensor, normalizer: str = "sum") -> Tensor:
    """How much the maps of M subjects leave their regions.

    Args:
        maps: of this step.
        regions: boolean, or 0 and 1, of the step before.
        normalizer: ``"sum"`` divides by ``sum (A + B)``, so that a map that is its region gives 1/2, the least;
            ``"dice"`` by half of that, so that it gives 0.

    >>> kept = torch.eye(2)[None]
    >>> retention(kept, kept).item(), retention(kept, kept, "dice").item()
    (0.5, 0.0)
    """
    check_choice("normalizer", normalizer, NORMALIZERS)
    return (1 - (2 if normalizer == "dice" else 1) * overlap(maps, regions.to(maps))).sum()


@shaped(maps="float (M, h, w)")
def excitation(maps: Tensor) -> Tensor:
    """How far the least seen of M subjects is from being seen fully somewhere: ``max_m (1 - max A^m)``, at least 0.

    >>> excitation(torch.tensor([[[0.25, 0.5]], [[1.0, 0.0]]])).item()
    0.5
    """
    return (1 - maps.amax((-2, -1))).clamp(min=0).amax()


class _OfWords(LatentUpdate):
    """What both losses do to maps first.

    Args:
        words: subjects.
        targets: see :class:`LatentUpdate`.
        sharpness: of the softmax over words; ``None`` for weights as they are.
        sigma: of the blur; ``None`` for none.
        update: other settings of :class:`LatentUpdate`.
    """

    def __init__(
        self,
        words: Sequence[Any],
        *,
        targets: Mapping[int, float] | None = TARGETS,
        sharpness: float | None = 100.0,
        sigma: float | None = SIGMA,
        **update: Any,
    ):
        super().__init__(words, targets=targets, **update)
        self.sharpness = None if sharpness is None else check_real("sharpness", sharpness, above=0)
        self.sigma = None if sigma is None else check_real("sigma", sigma, above=0)

    def subjects(self, maps: dict[str, Tensor], spans: list[list[int]]) -> Tensor:
        """(M, h, w) maps of the subjects."""
        text = maps["text"] if self.sharpness is None else over_words(maps["text"], self.sharpness)
        some = of_spans(text, spans)
        return some if self.sigma is None else smooth(some, self.sigma)


class AttendExcite(_OfWords):
    """Attend-and-Excite: the least seen subject is made to be seen.

    Args:
        words: subjects, as words of the prompt or numbers of their tokens; a list for each prompt where they differ.
        sharpness: of the softmax over words, 100 by default; ``None`` for weights as they are.
        sigma: of the blur, :data:`SIGMA` by default; ``None`` for none.
        settings: ``step_size``, ``step_range``, ``steps``, ``targets`` (:data:`TARGETS` by default), ``inner``,
            ``resolution``, ``layers`` and ``loss_scale`` of :class:`attnlib.steer.diffusion.losses.LatentUpdate`.

    Words of several tokens have the mean of their maps; the authors take one token each.

    Reference: Chefer et al., 2023, arXiv 2301.13826; held to its pipeline in diffusers.

    >>> AttendExcite(("cat", "frog")).targets
    {0: 0.95, 10: 0.5, 20: 0.2}
    """

    name: ClassVar[str] = "attend-and-excite"

    def loss(self, maps: dict[str, Tensor], spans: list[list[int]], memory: dict[str, Any], step: int) -> Tensor:
        return excitation(self.subjects(maps, spans))


class AStar(_OfWords):
    """A-STAR: subjects of a prompt keep apart, and keep where they are.

    ::

        with attnlib.attach(pipe, AStar(("circle", "square"))):
            pipe("a red circle and a blue square")

    Args:
        words: two or more subjects, as words of the prompt or numbers of their tokens; a list for each prompt where
            they differ.
        segregation, retention: weights of the two losses; 0 leaves one out.
        threshold: from which on a place belongs to a subject's region.
        relative: the threshold is a share of the map's maximum, rather than a weight.
        normalizer: ``"sum"``, the paper's, or ``"dice"``; see :func:`retention`.
        kept: regions are those of the maps ``"before"`` the last move of a step, or ``"after"`` it, as the step is
            taken.
        settings: those of :class:`AttendExcite`; ``targets`` are shares of the range of the loss, from the least to the
            most that it can be.

    There is no released code. Ours: step sizes, steps with repeated moves and what maps go through first, from
    Attend-and-Excite; the threshold and that it is relative; ``kept``.

    Reference: Agarwal et al., 2023, arXiv 2306.14544.

    >>> AStar(("circle", "square")).name
    'a-star'
    """

    name: ClassVar[str] = "a-star"

    def __init__(
        self,
        words: Sequence[Any],
        segregation: float = 1.0,
        retention: float = 1.0,
        threshold: float = 0.5,
        relative: bool = True,
        normalizer: str = "sum",
        kept: str = "before",
        **settings: Any,
    ):
        super().__init__(words, **settings)
        self.segregation = check_real("segregation", segregation, least=0)
        self.retention = check_real("retention", retention, least=0)
        self.threshold = check_real("threshold", threshold, least=0, below=1)
        self.relative = check_flag("relative", relative)
        check_choice("normalizer", normalizer, NORMALIZERS)
        check_choice("kept", kept, KEPT)
        self.normalizer, self.looks_after = normalizer, kept == "after"
        lists = [w for w in self.words if not isinstance(w, str) and any(not isinstance(t, int) for t in w)]
        if any(len(some) < 2 for some in (lists or [self.words])):
            raise ValueError(f"A-STAR keeps subjects apart: words must name at least two, got {words!r:.80}")

    @property
    def identity(self) -> bool:
        return super().identity or self.segregation == self.retention == 0

    def region(self, maps: Tensor) -> Tensor:
        """(M, h, w) boolean: where the subjects of maps (M, h, w) are."""
        return (normalize(maps, "max") if self.relative else maps) > self.threshold

    def loss(self, maps: dict[str, Tensor], spans: list[list[int]], memory: dict[str, Any], step: int) -> Tensor:
        found = self.subjects(maps, spans)
        total = self.segregation * segregation(found)
        if "region" in memory and self.retention:
            total = total + self.retention * retention(found, memory["region"], self.normalizer)
        return total

    def score(self, loss: float, spans: list[list[int]], memory: dict[str, Any], step: int) -> float:
        m = len(spans)
        low, high = 0.0, self.segregation * m * (m - 1) / 4
        if "region" in memory:
            low += self.retention * m * (0.5 if self.normalizer == "sum" else 0.0)
            high += self.retention * m
        return (loss - low) / (high - low) if high > low else 0.0

    def remember(self, maps: dict[str, Tensor], spans: list[list[int]], memory: dict[str, Any], step: int) -> None:
        memory["region"] = self.region(self.subjects(maps, spans))
