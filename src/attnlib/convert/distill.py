"""Distillation: a student learns from what a frozen teacher makes of the same images, at any depth.

Both models are read through the hook protocol and ``forward_intermediates``, so that attnlib's models serve, and others
that have timm's method: features behind stages, attention scores of layers, logits. A loss says what it reads and gives
named numbers; what it learns itself (projectors) lives in the loss and is let go with it. The teacher is no part of the
state dict, stays in evaluation and gets no gradient, though gradients may pass through it (:class:`ScaleKD`).

- :class:`MapLoss`: attention maps (UNIP: Zhang et al., 2025, arXiv 2502.02257).
- :class:`FeatureLoss`: features, behind a linear map where widths differ (Romero et al., 2014, arXiv 1412.6550).
- :class:`LogitLoss`: predictions (Hinton et al., 2015, arXiv 1503.02531).

>>> import attnlib
>>> small = dict(patch_size=4, img_size=16, num_classes=3)
>>> teacher = attnlib.create_model("vit_tiny_patch16_224", embed_dim=24, depth=3, num_heads=4, **small)
>>> student = attnlib.create_model("vit_tiny_patch16_224", embed_dim=12, depth=2, num_heads=2, last_heads=4, **small)
>>> lesson = distill(student, teacher, MapLoss(teacher=1))
>>> sorted(lesson(torch.randn(2, 3, 16, 16)))
['maps', 'total']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_real, checked, describe
from ..hooks import Intervention, attach
from ..hooks.site import Site
from ..types import stats_dtype
from .agreement import prediction_of


@dataclass
class Reading:
    """What was read of a model in one call.

    Args:
        features: behind stages, (B, h, w, C), behind the model's last norm where it has one for them.
        scores: of layers, before the softmax, (B, H, N, M).
        logits: (B, K); ``None`` where nobody asked.
    """

    features: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to be read of a model: stages whose features, layers whose scores (negative from the end), logits."""

    features: frozenset[int] = frozenset()
    scores: frozenset[int] = frozenset()
    logits: bool = False

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(self.features | other.features, self.scores | other.scores, self.logits or other.logits)


class _Enough(Exception):
    """Everything that was asked for has been read."""


class _Scores(Intervention):
    """Keep the scores of a layer, as parts of the graph."""

    name = "distilled scores"
    whole_map = True

    def __init__(self, layer: int, found: Callable[[Tensor], None]):
        self.layers, self.found = (layer,), found

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        self.found(scores)
        return scores


def read(model: nn.Module, x: Tensor, wanted: Wanted) -> Reading:
    """Call a model and read what is wanted; where that is maps alone, nothing behind the last of them runs.

    Raises:
        TypeError: features of a model without ``forward_intermediates``.
    """
    got = Reading()

    def keep(layer: int) -> Callable[[Tensor], None]:
        def found(scores: Tensor) -> None:
            got.scores[layer] = scores
            if len(got.scores) == len(wanted.scores) and not wanted.features and not wanted.logits:
                raise _Enough

        return found

    with ExitStack() as stack:
        if wanted.scores:
            stack.enter_context(attach(model, *(_Scores(layer, keep(layer)) for layer in sorted(wanted.scores))))
        try:
            if not wanted.features:
                got.logits = prediction_of(model(x))
                return got
            if not hasattr(model, "forward_intermediates"):
                raise TypeError(f"features need a model with forward_intermediates(), got {describe(model)}")
            order = sorted({_level(model, i) for i in wanted.features})
            final, maps = model.forward_intermediates(x, order, norm=True)  # type: ignore[operator]
            got.features = {i: maps[order.index(_level(model, i))].permute(0, 2, 3, 1) for i in wanted.features}
            if wanted.logits:
                got.logits = model.forward_head(final)  # type: ignore[operator]
        except _Enough:
            pass
    return got


def _level(model: Any, index: int) -> int:
    count = len(model.feature_info)
    if not -count <= index < count:
        raise ValueError(f"stage {index} is not there; {type(model).__name__} has {count}: 0 to {count - 1}")
    return index % count


class DistillationLoss(nn.Module):
    """Base: what a loss reads of the student and of the teacher, and the named numbers that it makes of it."""

    student = Wanted()
    teacher = Wanted()

    def forward(self, student: Reading, teacher: Reading, model: nn.Module) -> dict[str, Tensor]:
        """Named losses; ``model`` is the frozen teacher, for losses whose gradients pass through a part of it."""
        raise NotImplementedError


class MapLoss(DistillationLoss):
    """``mean KL(softmax(T) || softmax(S))`` over samples, heads and queries, T and S being scores; over keys.

    Only queries and keys of the student's layer, and what comes before it, get gradients.

    Args:
        student, teacher: layers, negative from the end; UNIP's teacher is at its hybrid layer
            (:func:`attnlib.look.hybrid_layer`).
        temperature: that both scores are divided by.
        weight: of the loss.

    Raises:
        ValueError: in the call, maps of unlike heads or tokens.

    Reference: Zhang et al., 2025, arXiv 2502.02257.
    """

    @checked
    def __init__(self, student: int = -1, teacher: int = -1, temperature: float = 1.0, weight: float = 1.0):
        super().__init__()
        self.layers = student, teacher
        self.temperature = check_real("temperature", temperature, above=0)
        self.weight = check_real("weight", weight, least=0)
        self.student, self.teacher = (Wanted(scores=frozenset({layer})) for layer in self.layers)

    def forward(self, student: Reading, teacher: Reading, model: nn.Module) -> dict[str, Tensor]:
        s, t = student.scores[self.layers[0]], teacher.scores[self.layers[1]]
        for axis, what, help in (
            (1, "heads", "; build the student's last block with as many (vit(..., last_heads=))"),
            (2, "queries", ": their grids differ"),
            (3, "keys", ": their grids differ"),
        ):
            if s.shape[axis] != t.shape[axis]:
                raise ValueError(
                    f"the student's layer {self.layers[0]} has {s.shape[axis]} {what}, the teacher's layer "
                    f"{self.layers[1]} has {t.shape[axis]}{help}"
                )
        return {"maps": self.weight * map_divergence(s / self.temperature, t / self.temperature)}


def map_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence over rows of scores (..., M) of the student from the teacher, in float32 at least.

    >>> float(map_divergence(torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3)))
    0.0
    """
    dtype = stats_dtype(torch.promote_types(student.dtype, teacher.dtype))
    p, q = teacher.to(dtype).log_softmax(-1), student.to(dtype).log_softmax(-1)
    never = p.isneginf()
    return (p.exp() * (p.masked_fill(never, 0) - q.masked_fill(never, 0))).sum(-1).mean()


class FeatureLoss(DistillationLoss):
    """Distance of features behind two stages, the student's behind a linear map to the teacher's width.

    Args:
        dims: widths of the student's and the teacher's features.
        student, teacher: stages, negative from the end.
        loss: ``"mse"``, or ``"cosine"`` (one minus the mean cosine).
        project: a linear map between them; needed where widths differ.
        weight: of the loss.

    Raises:
        ValueError: other widths without a map; in the call, unlike grids.
    """

    @checked
    def __init__(
        self,
        dims: Sequence[int],
        student: int = -1,
        teacher: int = -1,
        loss: str = "mse",
        project: bool = True,
        weight: float = 1.0,
    ):
        super().__init__()
        check_choice("loss", loss, ("mse", "cosine"))
        if len(dims) != 2 or (not project and dims[0] != dims[1]):
            raise ValueError(f"dims must be the two widths, equal without project, got {tuple(dims)}, {project=}")
        self.stages, self.loss, self.weight = (student, teacher), loss, check_real("weight", weight, least=0)
        self.student, self.teacher = (Wanted(features=frozenset({stage})) for stage in self.stages)
        self.project = nn.Linear(dims[0], dims[1]) if project else nn.Identity()

    def forward(self, student: Reading, teacher: Reading, model: nn.Module) -> dict[str, Tensor]:
        s, t = student.features[self.stages[0]], teacher.features[self.stages[1]]
        if s.shape[:3] != t.shape[:3]:
            raise ValueError(
                f"the student's stage {self.stages[0]} has a grid of {tuple(s.shape[1:3])}, the teacher's stage "
                f"{self.stages[1]} one of {tuple(t.shape[1:3])}"
            )
        y = self.project(s)
        found = F.mse_loss(y, t) if self.loss == "mse" else 1 - F.cosine_similarity(y, t, dim=-1).mean()
        return {"features": self.weight * found}


class LogitLoss(DistillationLoss):
    """``weight T^2 KL(softmax(t / T) || softmax(s / T))`` of logits.

    Args:
        temperature: T.
        weight: of the loss.

    Raises:
        ValueError: in the call, other classes.

    Reference: Hinton et al., 2015, arXiv 1503.02531.
    """

    student = Wanted(logits=True)
    teacher = Wanted(logits=True)

    @checked
    def __init__(self, temperature: float = 1.0, weight: float = 0.5):
        super().__init__()
        self.temperature = check_real("temperature", temperature, above=0)
        self.weight = check_real("weight", weight, least=0)

    def forward(self, student: Reading, teacher: Reading, model: nn.Module) -> dict[str, Tensor]:
        s, t = student.logits, teacher.logits
        assert s is not None and t is not None
        if s.shape != t.shape:
            raise ValueError(f"the student gives logits of {tuple(s.shape)}, the teacher of {tuple(t.shape)}")
        found = map_divergence(s / self.temperature, t / self.temperature)
        return {"logits": self.weight * self.temperature**2 * found}


class Distillation(nn.Module):
    """A student, what it is taught by, and a teacher beside them; see :func:`distill`.

    Its parameters are the student's and the losses'. The student is not changed: after training, ``student`` is the
    plain model, and projectors go with this module.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, losses: Iterable[DistillationLoss], task: float | None = 1.0
    ):
        super().__init__()
        for name, part in (("student", student), ("teacher", teacher)):
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name} must be a model, got {describe(part)}")
        lessons = list(losses)
        for loss in lessons:
            if not isinstance(loss, DistillationLoss):
                raise TypeError(f"losses must be distillation losses (MapLoss, ...), got {describe(loss)}")
        if not lessons:
            raise ValueError("losses is empty; name at least one of MapLoss, FeatureLoss, LogitLoss, ScaleKD")
        held = {id(p): name for name, p in [*teacher.named_parameters(), *teacher.named_buffers()]}
        for name, p in [*student.named_parameters(), *student.named_buffers()]:
            if id(p) in held:
                raise ValueError(
                    f"student and teacher share {name!r} (the teacher's {held[id(p)]!r}), which would be frozen and "
                    "trained at once; copy one of them (copy.deepcopy)"
                )
        self.student, self.losses = student, nn.ModuleList(lessons)
        self.task = check_real("task", task, least=0) if task is not None else 0.0
        self._teacher = [teacher.requires_grad_(False).eval()]  # no child: neither trained nor saved with the student

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.teacher._apply(fn)  # to a device and a type with the rest
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, labels: Tensor | None = None, teacher_x: Tensor | None = None) -> dict[str, Tensor]:
        """Losses by name (those of one name added), and their sum ``"total"``.

        Args:
            x: images.
            labels: classes, for the student's own cross-entropy ``"task"``.
            teacher_x: what the teacher sees of the same images; ``x`` by default.
        """
        wanted = [Wanted(logits=labels is not None), Wanted()]
        for loss in self.losses:
            wanted = [wanted[0] | loss.student, wanted[1] | loss.teacher]  # type: ignore[operator]
        with torch.no_grad():
            theirs = read(self.teacher.eval(), x if teacher_x is None else teacher_x, wanted[1])
        ours = read(self.student, x, wanted[0])
        found: dict[str, Tensor] = {}
        if labels is not None:
            found["task"] = self.task * F.cross_entropy(ours.logits, labels)  # type: ignore[arg-type]
        for loss in self.losses:
            for name, value in loss(ours, theirs, self.teacher).items():
                found[name] = found[name] + value if name in found else value
        return {**found, "total": torch.stack(list(found.values())).sum()}


def distill(
    student: nn.Module, teacher: nn.Module, *losses: DistillationLoss, task: float | None = 1.0
) -> Distillation:
    """What a student is taught with: ``lesson(images, labels)["total"].backward()``, an optimiser of its parameters.

    Args:
        student: the model that learns.
        teacher: the model that it learns from; frozen and put into evaluation here.
        losses: what of the teacher.
        task: weight of the student's own cross-entropy, where labels are given.

    Raises:
        ValueError: no loss, models that share parameters; in the call, unlike grids, heads or classes.
        TypeError: what is no model, or no loss.
    """
    return Distillation(student, teacher, losses, task)
