"""DisenDiff: words of two or three concepts of one image come apart while they are learnt.

For a prompt such as "<new1> cat and <new2> dog", with a map ``m`` of each word stretched over [0, 1] and blurred to
``g``, and maps of class words squared, ``s = g^2``,

    ``L = sum_c (1 - IoU(stop(s_c), g_new(c))) + mean_(c < d) IoU(s_c, s_d),
    IoU(a, b) = (sum a b + 1) / (sum a + sum b - sum a b + 1)``:

the modifier goes where its class word is, and class words go apart. Classes move by the second term alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real, shaped
from .maps import of_spans, resized, smooth
from .personalize import Seen, Term
from .prompts import Word

APART = ("iou", "product")

#: Deviation of the blur: the released kernel is ``exp(-(d / (2 * 0.5))^2)``.
SIGMA = 0.5**0.5


@shaped(a="float (..., h, w)", b="float (..., h, w)")
def soft_iou(a: Tensor, b: Tensor, smoothing: float = 1.0) -> Tensor:
    """Intersection over union of soft masks by their product, ``smoothing`` added above and below; (...).

    >>> soft_iou(torch.eye(2), torch.eye(2)).item(), soft_iou(torch.eye(2), torch.eye(2).flip(0)).item()
    (1.0, 0.20000000298023224)
    """
    check_real("smoothing", smoothing, least=0)
    both = (a * b).sum((-2, -1))
    return (both + smoothing) / ((a + b).sum((-2, -1)) - both + smoothing)


@shaped(modifiers="float (K, h, w)", classes="float (K, h, w)")
def binding(modifiers: Tensor, classes: Tensor, smoothing: float = 1.0) -> Tensor:
    """How far modifiers are from their classes, the sum over pairs; classes get no gradient."""
    return (1 - soft_iou(classes.detach(), modifiers, smoothing)).sum()


@shaped(classes="float (K, h, w)")
def separation(classes: Tensor, how: str = "iou", smoothing: float = 1.0) -> Tensor:
    """How much classes overlap, the mean over pairs; 0 for one class.

    Args:
        classes: their maps.
        how: ``"iou"``, or ``"product"`` for the mean product.
        smoothing: of ``"iou"``.
    """
    check_choice("how", how, APART)
    pairs = list(itertools.combinations(range(len(classes)), 2))
    if not pairs:
        return classes.sum() * 0
    a, b = classes[[i for i, _ in pairs]], classes[[j for _, j in pairs]]
    return soft_iou(a, b, smoothing).mean() if how == "iou" else (a * b).mean()


class DisenDiff(Term):
    """The term of DisenDiff.

    ::

        pairs = [("<new1>", "cat"), ("<new2>", "dog")]
        learner = Personalize(pipe, {"<new1>": None, "<new2>": None}, terms=[DisenDiff(pairs)])
        learner.fit([Example(image, "<new1> cat and <new2> dog")], steps=250, lr=1e-5, accumulate=4)

    Args:
        pairs: modifier and class word of each concept: words of the prompt, names in ``Example.spans``, or numbers of
            tokens. Words of several tokens have the mean of their maps. A prompt may name some of the pairs.
        weight: what the term counts; 0 leaves Custom Diffusion.
        sigma: of the blur of 3 x 3; ``None`` for none.
        squared: how often maps of class words are squared.
        apart: ``"iou"``, ``"product"``, or ``None`` for binding alone.
        apart_weight: what it counts against binding; the authors' ``"product"`` is not multiplied by their weight, so
            that it is 1 / ``weight`` there.
        smoothing: see :func:`soft_iou`; against sums of at most h w it is not nothing where maps are sparse.
        resolution: of the maps; several of them, with ``size``, for the mean over layers of all, as in the release
            without ``attn16``.
        size: side to which maps are resized first (bicubic), 64 in that case; ``None`` for none.
        layers: whose maps, see :class:`attnlib.hooks.Maps`.

    The authors take the token behind the modifier for the class.

    Reference: Zhang et al., 2024, arXiv 2403.18551; held to CustomDiffusion.p_losses of the authors.

    >>> DisenDiff([("<new1>", "cat"), ("<new2>", "dog")]).weight
    0.01
    """

    name: ClassVar[str] = "disendiff"

    def __init__(
        self,
        pairs: Sequence[tuple[Word, Word]],
        weight: float = 0.01,
        sigma: float | None = SIGMA,
        squared: int = 1,
        apart: str | None = "iou",
        apart_weight: float = 1.0,
        smoothing: float = 1.0,
        resolution: int | Sequence[int] = 16,
        size: int | None = None,
        layers: Sequence[int | str] | None = None,
    ):
        if isinstance(pairs, str) or not len(pairs) or any(isinstance(p, str) or len(p) != 2 for p in pairs):
            raise TypeError(f"pairs must be of a modifier and a class word: [('<new1>', 'cat')], got {pairs!r:.80}")
        check_choice("apart", apart, (*APART, None))
        self.pairs = [tuple(pair) for pair in pairs]
        self.weight = check_real("weight", weight)
        self.sigma = None if sigma is None else check_real("sigma", sigma, above=0)
        self.squared = check_int("squared", squared, least=0)
        self.smoothing = check_real("smoothing", smoothing, least=0)
        self.size = None if size is None else check_int("size", size, least=3)
        self.apart, self.layers = apart, layers
        self.apart_weight = check_real("apart_weight", apart_weight)
        sides = [resolution] if isinstance(resolution, int) else list(resolution)
        for side in sides:
            check_int("resolution", side, least=1)
        if not sides or len(set(sides)) != len(sides):
            raise ValueError(f"resolution must be one, or several that differ, got {resolution!r}")
        if len(sides) > 1 and self.size is None:
            raise ValueError(
                f"resolution={resolution!r} has maps of several sides; size says to which they are resized"
            )
        self.reads = {"text": sides[0]} if len(sides) == 1 else {f"text@{side}": side for side in sides}

    def pictures(self, maps: Sequence[tuple[Tensor, float]], spans: Sequence[Sequence[int]]) -> Tensor:
        """(M, h, w) of words of one prompt, stretched and blurred, from (T, h, w) of each resolution and its weight."""
        each = [(of_spans(one, spans), weight) for one, weight in maps]
        if self.size is not None:
            each = [(resized(one, (self.size, self.size)), weight) for one, weight in each]
        some = each[0][0]
        if len(each) > 1:
            some = torch.stack([one * weight for one, weight in each]).sum(0) / sum(weight for _, weight in each)
        low, high = some.amin((-2, -1), keepdim=True), some.amax((-2, -1), keepdim=True)
        some = (some - low) / (high - low + 1e-8)
        return some if self.sigma is None else smooth(some, self.sigma)

    def __call__(self, seen: Seen) -> Tensor:
        rows = []
        for row in range(len(seen.examples)):
            spans = [(seen.span(row, modifier), seen.span(row, word)) for modifier, word in self.pairs]
            there = [(a, b) for a, b in spans if a is not None and b is not None]
            if not there:
                continue
            given = [(seen.maps[name][row], float(seen.layers.get(name, 1))) for name in self.reads]
            maps = self.pictures(given, [*(a for a, _ in there), *(b for _, b in there)])
            modifiers, classes = maps[: len(there)], maps[len(there) :]
            for _ in range(self.squared):
                classes = classes.square()
            loss = binding(modifiers, classes, self.smoothing)
            if self.apart is not None:
                loss = loss + self.apart_weight * separation(classes, self.apart, self.smoothing)
            rows.append(loss)
        return torch.stack(rows).mean() if rows else next(iter(seen.maps.values())).sum() * 0
