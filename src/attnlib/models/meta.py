"""Models that adapt to whoever labels: first-order meta-learning over the people behind the labels.

Of every annotator a batch shows some samples (*shots*) to adapt to, and others to be judged by. A few steps of gradient
descent on the shots lead from the model's weights to weights of that annotator; the gradient of their loss on the other
samples, taken there, serves as the gradient of the model's own (first-order MAML: the way is not differentiated).

Reference: Finn, Abbeel, Levine, 2017, arXiv 1703.03400.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checks import check_axes, check_batch, check_int, check_real, check_type, check_whole
from .protocol import Step, TaskModel, Terms, split_batch, total_loss, trained

M = TypeVar("M", bound="MetaLearner")


class Rated(NamedTuple):
    """Labels, one for each sample, and who gave them: (B,) whole numbers, one for each annotator."""

    values: Tensor
    annotator: Tensor


def fast_weights(
    model: nn.Module, terms: Callable[[Callable[..., Any]], Terms], steps: int, lr: float
) -> dict[str, Tensor]:
    """Weights after some steps of gradient descent, of first order.

    Args:
        model: where they start; it is not changed (buffers that ``forward`` writes are, in training).
        terms: of the loss that is descended; gets what to call instead of the model.
        steps, lr: of the descent.

    Returns:
        By name, those that want a gradient: the model's own plus numbers without one, so that gradients of what is
        computed with them are gradients of the model's own.
    """
    check_type("model", model, nn.Module)
    check_int("steps", steps, least=0)
    check_real("lr", lr, least=0)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moved = {name: torch.zeros_like(p) for name, p in own.items()}
    for step in range(steps):
        with torch.enable_grad():
            here = {name: (p.detach() + moved[name]).requires_grad_() for name, p in own.items()}
            total = total_loss(terms(called(model, here)), f"loss of inner step {step + 1}")
            grads = torch.autograd.grad(total, list(here.values()), allow_unused=True)
        for name, grad in zip(here, grads, strict=True):
            if grad is not None:
                moved[name] = moved[name] - lr * grad
    return {name: p + moved[name] for name, p in own.items()}


def called(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model with other weights, as a function of what ``forward`` takes by name."""
    return lambda **inputs: functional_call(model, dict(weights), (), inputs)


class MetaLearner(TaskModel):
    """A :class:`TaskModel` that learns to adapt to annotators.

    A batch whose target is :class:`Rated` trains by adaptation: of each annotator, the first ``shots`` samples in the
    batch are adapted to, the rest are judged. Any other target trains plainly.

    Args:
        inner_steps: of gradient descent for an annotator.
        inner_lr: of these; 0 leaves every annotator with the model as it is.
        shots: samples that are adapted to.
    """

    def __init__(self, inner_steps: int = 16, inner_lr: float = 5e-3, shots: int = 1):
        super().__init__()
        self.inner_steps = check_int("inner_steps", inner_steps, least=0)
        self.inner_lr = check_real("inner_lr", inner_lr, least=0)
        self.shots = check_int("shots", shots, least=1)

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """One update: of the mean over annotators, or of the batch as a whole where nobody is told apart."""
        inputs, target = split_batch(self, batch)
        if not isinstance(target, Rated):
            yield from super().steps(batch)
            return
        groups = self._groups(target)
        told = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        check_batch(**{"target.annotator": target.annotator, **told})

        def terms() -> Terms:
            total: Terms = {}
            for mine in groups:
                shots, rest = ((picked(inputs, i), target.values[i]) for i in (mine[: self.shots], mine[self.shots :]))
                weights = self._adapted(*shots, self.inner_steps, self.inner_lr)
                for name, term in self.loss(called(self, weights)(**rest[0]), rest[1]).items():
                    total[name] = total.get(name, 0) + term / len(groups)
            return total

        yield Step("all", trained(self), terms)

    def _adapted(self, inputs: Mapping[str, Any], target: Tensor, steps: int, lr: float) -> dict[str, Tensor]:
        return fast_weights(self, lambda call: self.loss(call(**inputs), target), steps, lr)

    def _groups(self, target: Rated) -> list[Tensor]:
        """Samples of each annotator, in the order of the batch."""
        check_type("target.values", target.values, Tensor)
        check_whole("target.annotator", target.annotator)
        check_axes("target.annotator", target.annotator, B=len(target.values))
        groups = [(target.annotator == who).nonzero().flatten() for who in target.annotator.unique()]
        if not groups:
            raise ValueError("target is empty: nobody labelled anything")
        for mine in groups:
            if len(mine) <= self.shots:
                who = int(target.annotator[mine[0]])
                raise ValueError(
                    f"annotator {who} has {len(mine)} sample{'s' * (len(mine) != 1)} in the batch; with shots="
                    f"{self.shots} at least {self.shots + 1} are needed, to adapt to and to judge by"
                )
        return groups

    def adapt(self: M, batch: Mapping[str, Any], inner_steps: int | None = None, inner_lr: float | None = None) -> M:
        """A copy that has adapted to one annotator; the model stays as it is, with its buffers.

        It adapts in the mode it is in: in training, dropout and statistics of batches take part, as in the release.

        Args:
            batch: inputs by name and ``"target"``: what the annotator said of them.
            inner_steps, inner_lr: those of the model by default.
        """
        inputs, target = split_batch(self, batch)
        steps = self.inner_steps if inner_steps is None else check_int("inner_steps", inner_steps, least=0)
        lr = self.inner_lr if inner_lr is None else check_real("inner_lr", inner_lr, least=0)
        other = copy.deepcopy(self)
        weights = other._adapted(inputs, target.values if isinstance(target, Rated) else target, steps, lr)
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name in weights:
                    p.copy_(weights[name])
        return other


def picked(inputs: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Some samples of inputs; what is no tensor serves all."""
    return {name: value[index] if isinstance(value, Tensor) else value for name, value in inputs.items()}
