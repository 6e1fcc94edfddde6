"""Teaching a sparse model what a dense one of the same weights gives, sublayer by sublayer and at the end.

Ding et al., 2025, "Efficient-vDiT", arXiv 2502.06155, stage 3. Teacher and student see the same input; the student's
attention reads few blocks. With A and M what attention and MLP of a layer give::

    loss = w_a mean_l |A_l - A'_l|^2 + w_m mean_l |M_l - M'_l|^2 + w_p |f(x_t, t) - target|^2

The paper's weights are not known; here they are 1 and options. The target of the last term is what the denoiser is
trained to give, or, where none is handed over, what the teacher gives. ::

    student = copy.deepcopy(teacher)
    distil = SublayerDistillation(student, teacher)
    with attnlib.attach(student, BlockSparse(FrameTiles(search.references(0.01)))):
        for batch, noise in data:
            loss = distil.loss(**batch, target=noise).total
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_real
from ..hooks.attach import _adapter
from .agreement import prediction_of, relative_error

#: Last parts of the names that MLPs of denoisers have.
FEEDFORWARDS = ("ff", "ffn", "ff_context", "mlp", "feed_forward")


class Terms(NamedTuple):
    """Terms of :meth:`SublayerDistillation.loss`, weighted, and their sum."""

    total: Tensor
    attention: Tensor
    feedforward: Tensor
    prediction: Tensor


class SublayerDistillation:
    """Losses of a student against a teacher of the same layers.

    Args:
        student: trained; whatever makes it sparse is attached to it, or built in.
        teacher: dense; it runs without gradient and in evaluation.
        attention: paths of attention modules, or patterns of them (``"*.attn1"``); those that attend to themselves or
            to a joint sequence by default, where the library knows the model.
        feedforward: the same of MLPs; by default modules named as denoisers name them.
        weights: of the three terms: attention, MLPs, prediction.
        relative: every sublayer's error is divided by the mean square of what the teacher gives, so that layers of
            large outputs do not outweigh the others; the paper has plain mean squares.

    Raises:
        ValueError: patterns that match nothing, or a teacher without one of the layers.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        attention: Sequence[str] | None = None,
        feedforward: Sequence[str] | None = None,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        relative: bool = False,
    ):
        if student is teacher:
            raise ValueError("teacher must be another model than student; copy.deepcopy(student) makes one")
        if len(weights) != 3:
            raise ValueError(f"weights={tuple(weights)} must have three numbers: attention, MLPs, prediction")
        self.weights = tuple(check_real("weights", w, least=0) for w in weights)
        self.student, self.teacher, self.relative = student, teacher, relative
        names = [name for name, _ in student.named_modules() if name]
        if attention is None:
            sites = _adapter(student).sites(student, None)
            self.attention = [site.name for site in sites if site.kind in ("self", "joint")]
        else:
            self.attention = _matched("attention", attention, names)
        if feedforward is None:
            self.feedforward = [name for name in names if name.rpartition(".")[2] in FEEDFORWARDS]
        else:
            self.feedforward = _matched("feedforward", feedforward, names)
        for what, chosen, weight in zip(("attention", "feedforward"), self.chosen, self.weights, strict=False):
            if weight and not chosen:
                raise ValueError(f"no module of {type(student).__name__} is known to be {what}; give {what}=patterns")
        theirs = {name for name, _ in teacher.named_modules()}
        missing = [name for names in self.chosen for name in names if name not in theirs]
        if missing:
            raise ValueError(f"teacher has no {missing[0]!r}, which is a layer of the student")

    @property
    def chosen(self) -> tuple[list[str], list[str]]:
        return self.attention, self.feedforward

    @contextmanager
    def _heard(self, model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        """What the sublayers of a model give in one call, by name."""
        seen: dict[str, list[Tensor]] = {}
        wanted = {name for names, w in zip(self.chosen, self.weights, strict=False) if w for name in names}

        def hear(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                many = output if isinstance(output, (tuple, list)) else (output,)
                seen[name] = [t for t in many if isinstance(t, Tensor) and t.is_floating_point()]

            return hook

        handles = [m.register_forward_hook(hear(name)) for name, m in model.named_modules() if name in wanted]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, *inputs: Any, target: Tensor | None = None, **named: Any) -> Terms:
        """Of one batch, given as both models are called.

        Args:
            target: what the prediction should be; the teacher's by default.
        """
        modes = {m: m.training for m in self.teacher.modules()}
        self.teacher.eval()
        try:
            with torch.no_grad(), self._heard(self.teacher) as theirs:
                truth = prediction_of(self.teacher(*inputs, **named))
        finally:
            for m, training in modes.items():
                m.training = training
        with self._heard(self.student) as ours:
            made = prediction_of(self.student(*inputs, **named))
        target = truth if target is None else target
        if target.shape != made.shape:
            raise ValueError(f"target must be {tuple(made.shape)} as the prediction is, got {tuple(target.shape)}")
        of_layers = [self._error(names, ours, theirs, made) for names in self.chosen]
        prediction = (made - target).float().square().mean()
        terms = [w * t for w, t in zip(self.weights, (*of_layers, prediction), strict=True)]
        return Terms(terms[0] + terms[1] + terms[2], *terms)

    def _error(
        self, names: Sequence[str], ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]], like: Tensor
    ) -> Tensor:
        errors = []
        for name in names:
            if (name in ours) != (name in theirs):
                raise ValueError(f"{name!r} ran in one of student and teacher only")
            for mine, truth in zip(ours.get(name, ()), theirs.get(name, ()), strict=True):
                plain = (mine - truth).float().square().mean()
                errors.append(relative_error(mine, truth) if self.relative else plain)
        return torch.stack(errors).mean() if errors else like.new_zeros((), dtype=torch.float32)


def _matched(what: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        raise TypeError(f"{what} must be a sequence of patterns, got {patterns!r}; write {what}=({patterns!r},)")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{what} holds {pattern!r}, which matches no module; there are {list(names[:8])} ...")
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
