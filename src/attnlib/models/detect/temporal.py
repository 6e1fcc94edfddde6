"""Actions in time: where they begin and end, from features along a video, and how well that was found.

A small boundary network in the manner of BMN: convolutions make localisation features ``F`` of recognition features
``R``, three heads say for every point how much it is a start, an end, or within an action; segments are pairs of a
start and a later end, scored by both and by the mean of what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_float, check_int, check_real, check_type, check_valid, shaped
from ...nn.gates.class_semantics import ClassSemanticsAttention
from ..protocol import TaskModel, Terms

KINDS = ("start", "end", "inside")


class Points(NamedTuple):
    """Logits (B, T, 3): start, end, inside; and which points exist, (B, T) or ``None``."""

    logits: Tensor
    valid: Tensor | None = None


class Segments(NamedTuple):
    """Of one video: (N, 2) begin and end in points, the end behind the last one; (N,) scores, falling."""

    bounds: Tensor
    scores: Tensor


class BoundaryDetector(TaskModel):
    """Where actions are in time.

    Args:
        in_dim: channels of the recogniser's features R.
        dim: of the localiser's F.
        attention: how F is weighed: ``"csa"`` by R (:class:`ClassSemanticsAttention`), ``"se"`` by itself the same way,
            ``"none"``.
        kernel_size: of all convolutions along time.

    Shape:
        features: (B, T, in_dim), ``valid`` (B, T) boolean. ``target`` of the loss: a list of (N, 2) begins and ends.

    >>> BoundaryDetector(6)(torch.randn(2, 20, 6)).logits.shape
    torch.Size([2, 20, 3])
    """

    def __init__(self, in_dim: int, dim: int = 32, attention: str = "csa", kernel_size: int = 3):
        super().__init__()
        if attention not in ("csa", "se", "none"):
            raise ValueError(f"attention={attention!r} is not possible; choose one of ['csa', 'se', 'none']")
        self.in_dim, self.attention = check_int("in_dim", in_dim, least=1), attention
        around = check_int("kernel_size", kernel_size, least=1) // 2
        self.encode1 = nn.Conv1d(in_dim, dim, kernel_size, padding=around)
        self.encode2 = nn.Conv1d(dim, dim, kernel_size, padding=around)
        semantic = {"csa": in_dim, "se": dim}.get(attention)
        self.gate = None if semantic is None else ClassSemanticsAttention(dim, semantic)
        self.head1 = nn.Conv1d(dim, dim, kernel_size, padding=around)
        self.head2 = nn.Conv1d(dim, len(KINDS), 1)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Points:
        check_axes("features", features, B=None, T=None, in_dim=self.in_dim)
        check_float("features", features)
        check_valid("valid", valid, features.shape[:2])

        def kept(x: Tensor) -> Tensor:
            return x if valid is None else x.masked_fill(~valid[:, None], 0.0)

        r = kept(features.mT)
        f = kept(self.encode2(kept(self.encode1(r).relu())).relu())
        if self.gate is not None:
            f = self.gate(f.mT, r.mT if self.attention == "csa" else f.mT, valid).mT
        return Points(self.head2(kept(self.head1(f).relu())).mT, valid)

    def loss(self, prediction: Points, target: Sequence[Tensor]) -> Terms:
        """Binary cross-entropies, both kinds of points of equal weight."""
        logits, valid = prediction
        wanted = point_labels(target, logits.shape[1]).to(logits)
        if len(wanted) != len(logits):
            raise ValueError(f"target must name the actions of {len(logits)} videos, got {len(wanted)}")
        there = torch.ones_like(wanted[..., 0], dtype=torch.bool) if valid is None else valid
        terms = {}
        for i, kind in enumerate(KINDS):
            each = F.binary_cross_entropy_with_logits(logits[..., i], wanted[..., i], reduction="none")
            terms[kind] = sum_of_halves(each, wanted[..., i] > 0.5, there)
        return terms

    def predict(
        self, features: Tensor, valid: Tensor | None = None, most: int = 20, longest: int | None = None,
        sigma: float = 0.4,
    ) -> list[Segments]:  # fmt: skip
        """Segments of every video.

        Args:
            features: see :meth:`forward`.
            valid: which points exist.
            most: segments of a video.
            longest: of a segment, in points.
            sigma: of soft suppression.
        """
        points = self(features, valid).logits.sigmoid()
        out = []
        for i, p in enumerate(points):
            here = p if valid is None else p[valid[i]]  # points that exist are numbered on their own
            found = segments(here[:, 0], here[:, 1], here[:, 2], longest)
            out.append(soft_nms(found, sigma, most))
        return out


def point_labels(target: Sequence[Tensor], length: int) -> Tensor:
    """(B, T, 3): first points, last points, points within of every action.

    Raises:
        ValueError: an action that ends where it begins or before, or lies outside.
    """
    out = torch.zeros(len(target), length, len(KINDS))
    for i, one in enumerate(target):
        check_axes(f"target[{i}]", one, N=None, **{"begin, end": 2})
        for begin, end in one.tolist():
            if not 0 <= begin < end <= length:
                raise ValueError(
                    f"target[{i}] has an action from {begin} to {end}: 0 <= begin < end <= {length} must hold"
                )
            first, last = int(begin), min(length, max(int(begin) + 1, round(end)))
            out[i, first, 0] = out[i, last - 1, 1] = 1
            out[i, first:last, 2] = 1
    return out


def sum_of_halves(each: Tensor, positive: Tensor, there: Tensor) -> Tensor:
    """The mean over positives and the mean over the rest, added and halved; of what does not exist nothing."""
    total = each.new_zeros(())
    for part in (positive & there, ~positive & there):
        total = total + (each * part).sum() / part.sum().clamp(min=1)
    return total / 2


@shaped(start="float (T)", end="float (T)", inside="float (T)")
def segments(start: Tensor, end: Tensor, inside: Tensor, longest: int | None = None) -> Segments:
    """All pairs of a start and an end behind it, (T,) each, by ``start * end * mean of inside``."""
    length = len(start)
    total = torch.cat([inside.new_zeros(1), inside.cumsum(0)])
    i, j = torch.triu_indices(length, length, device=start.device)
    if longest is not None:
        near = j - i < check_int("longest", longest, least=1)
        i, j = i[near], j[near]
    scores = start[i] * end[j] * (total[j + 1] - total[i]) / (j - i + 1)
    order = scores.argsort(descending=True, stable=True)
    return Segments(torch.stack([i, j + 1], 1)[order].to(start.dtype), scores[order])


@shaped(a="float (N, 2)", b="float (M, 2)")
def overlap(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) intersection over union in time of (N, 2) and (M, 2).

    >>> overlap(torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 6.0], [5.0, 6.0]])).tolist()[0][1]
    0.0
    """
    low, high = torch.maximum(a[:, None, 0], b[None, :, 0]), torch.minimum(a[:, None, 1], b[None, :, 1])
    inter = (high - low).clamp(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - inter
    return inter / union.clamp(min=1e-12)


def soft_nms(found: Segments, sigma: float = 0.4, most: int = 20) -> Segments:
    """Scores fall by ``exp(-overlap^2 / sigma)`` with every better segment that overlaps.

    Args:
        found: candidates; the two hundred best are looked at.
        sigma: how slowly.
        most: segments that stay.
    """
    check_type("found", found, Segments)
    check_real("sigma", sigma, above=0)
    bounds, scores = found.bounds[:200], found.scores[:200].clone()
    fall = (-overlap(bounds, bounds).square() / sigma).exp() if len(bounds) else scores[:, None]
    chosen, kept = [], []
    for _ in range(min(check_int("most", most, least=1), len(bounds))):
        best = int(scores.argmax())
        chosen.append(best)
        kept.append(scores[best].clone())
        scores = (scores * fall[best]).index_fill(0, torch.tensor([best], device=scores.device), -1.0)
    rows = torch.tensor(chosen, dtype=torch.long, device=bounds.device)
    return Segments(bounds[rows], torch.stack(kept) if kept else scores[:0])


def average_precision(
    found: Sequence[Segments], target: Sequence[Tensor], thresholds: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7)
) -> dict[float, float]:
    """Mean precision over recall of all segments of all videos, for each overlap that is asked for.

    Every action is found once at most, by the best segment that overlaps it enough; precision is interpolated.
    """
    if len(found) != len(target):
        raise ValueError(f"found and target must be of as many videos, got {len(found)} and {len(target)}")
    for i, truth in enumerate(target):
        check_axes(f"target[{i}]", truth, N=None, **{"begin, end": 2})
    count = sum(len(t) for t in target)
    if not count:
        raise ValueError("target has no action: there is nothing to find")
    out = {}
    for threshold in thresholds:
        check_real("thresholds", threshold, above=0, most=1)
        rows = []
        for one, truth in zip(found, target, strict=True):
            free = torch.ones(len(truth), dtype=torch.bool)
            for n in one.scores.argsort(descending=True, stable=True).tolist():
                right = False
                if len(truth):
                    fit = overlap(one.bounds[n : n + 1], truth.to(one.bounds))[0].masked_fill(~free, -1.0)
                    best = int(fit.argmax())
                    right = float(fit[best]) >= threshold
                    free[best] &= not right
                rows.append((float(one.scores[n]), right))
        rows.sort(key=lambda r: -r[0])
        hits = torch.tensor([r[1] for r in rows], dtype=torch.float64).cumsum(0)
        precision = hits / torch.arange(1, len(rows) + 1)
        precision = precision.flip(0).cummax(0).values.flip(0) if len(rows) else precision
        new = torch.tensor([r[1] for r in rows], dtype=torch.bool)
        out[threshold] = float(precision[new].sum()) / count
    return out
