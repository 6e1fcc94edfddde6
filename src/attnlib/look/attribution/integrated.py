"""Integrated gradients of the input or of any module's output, in memory that does not depend on the steps.

``IG_i = (a_i - a'_i) int_0^1 ds(a' + t (a - a')) / da_i dt`` by Gauss-Legendre points, which add up to
``s(a) - s(a')``.

Reference: Sundararajan, Taly and Yan, 2017, "Axiomatic Attribution for Deep Networks"
(https://arxiv.org/abs/1703.01365).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...hooks.tape import Target, _cut, _first_tensor, _with_first, logits_of, quantized, score_of

T = TypeVar("T")


@torch.inference_mode(False)
def integrated_gradients(
    model: nn.Module,
    *inputs: Any,
    module: str = "",
    target: Target | None = None,
    baseline: Tensor | float = 0.0,
    steps: int = 32,
    rule: str = "legendre",
    chunk: int | None = None,
    position: int = -1,
    **named: Any,
) -> Tensor:
    """Integrated gradients; what belongs to one place is the sum over its channels.

    Args:
        model: any module, in evaluation mode.
        inputs, named: of the model; every tensor whose first axis is the batch's belongs to the samples.
        module: whose output is varied, such as the embedding of tokens; ``""`` is the first input itself.
        target: class or token, one or one per sample, or ``f(output) -> (B,)``; the most likely one by default.
        baseline: what is started from, a number or of the shape of what is varied.
        steps: points between the two.
        rule: ``"legendre"``, or ``"middle"`` for the middle of equal parts.
        chunk: points of all samples that are run at once, which bounds memory; the samples by default.
        position: of the token whose logits count.

    Returns:
        of the shape of what is varied.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, -2.0]])
    >>> bool(torch.allclose(integrated_gradients(model, x, target=0), x * model.weight))
    True
    """
    check_choice("rule", rule, ("legendre", "middle"))
    check_int("steps", steps, least=1)
    if (where := quantized(model)) is not None:
        raise ValueError(f"{where} is quantized, and no gradient passes through it; load floating-point weights")
    place = Place(model, module, inputs, named)
    full, wanted = place.floating(), place.target(target, position)
    batch = place.batch
    start = torch.as_tensor(baseline, dtype=full.dtype, device=full.device)
    try:
        start = start.expand_as(full)
    except RuntimeError:
        raise ValueError(f"baseline must fit {tuple(full.shape)}, got {tuple(start.shape)}") from None
    size = max(batch, 1) if chunk is None else check_int("chunk", chunk, least=1)
    if rule == "legendre":
        at, weight = np.polynomial.legendre.leggauss(steps)
        at, weight = (at + 1) / 2, weight / 2
    else:
        at, weight = (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    ts, ws = (torch.as_tensor(v, dtype=full.dtype, device=full.device) for v in (at, weight))
    total = torch.zeros_like(full)
    for first in range(0, batch * steps, size):
        rows = torch.arange(first, min(first + size, batch * steps), device=full.device)
        sample, step = rows % batch, rows // batch
        shape = (-1, *[1] * (full.dim() - 1))
        point = torch.addcmul(start[sample], ts[step].view(shape), full[sample] - start[sample])

        def gradient(point: Tensor, sample: Tensor = sample) -> Tensor | None:
            with torch.enable_grad():
                point = point.detach().requires_grad_()
                score = score_of(place.run(point, sample), wanted(sample), position)
                return torch.autograd.grad(score.sum(), point, allow_unused=True)[0]

        grad = place.laid_out(gradient, point)
        if grad is not None:
            total.index_add_(0, sample, ws[step].view(shape) * grad)
    return total * (full - start)


def laid_out(step: Callable[[Tensor], T], point: Tensor, channels_last: bool = True) -> tuple[T, bool]:
    """``step(point)``, images being channels-last, in which a CPU convolves and pools faster, unless the model views
    them in a way that needs channels first; and whether that may be tried again."""
    if channels_last and point.dim() == 4 and point.is_floating_point() and point.device.type == "cpu":
        try:
            return step(point.contiguous(memory_format=torch.channels_last)), True
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            channels_last = False
    return step(point), channels_last


class Place:
    """The tensor that is varied, and the model run with another in its place.

    Args:
        model: any module.
        module: whose output is varied; ``""`` for the first input.
        inputs, named: of the model.

    Raises:
        TypeError: no tensor with the batch first.
        ValueError: no such module.
    """

    def __init__(self, model: nn.Module, module: str, inputs: tuple[Any, ...], named: dict[str, Any]):
        if module not in dict(model.named_modules()):
            raise ValueError(f"module: {type(model).__name__} has no {module!r}")
        found = next((len(t) for t in (*inputs, *named.values()) if isinstance(t, Tensor) and t.dim()), None)
        if found is None:
            raise TypeError("the model must be given at least one tensor with the batch first")
        self.model, self.module, self.batch, self.channels_last = model, module, found, True
        self.inputs = tuple(_cut(a, slice(None), found) for a in inputs)  # safe from inference mode
        self.named = {k: _cut(v, slice(None), found) for k, v in named.items()}

    def floating(self) -> Tensor:
        """What is varied.

        Raises:
            TypeError: it holds whole numbers.
        """
        full = self.value()
        if not full.is_floating_point():
            raise TypeError(
                f"what is varied must be floating-point, got {full.dtype}; name the module that embeds it, module=..."
            )
        return full

    def target(self, target: Target | None, position: int) -> Callable[[Tensor], Target]:
        """The target of some samples; the most likely one as the model stands where none is given."""
        if callable(target):
            score: Target = target
            return lambda sample: score
        if target is None:
            with torch.no_grad():
                logits = logits_of(self.model(*self.inputs, **self.named))
            target = (logits[:, position] if logits.dim() == 3 else logits).argmax(-1)
        index = torch.as_tensor(target)
        if index.dim() == 1 and len(index) != self.batch:
            raise ValueError(f"target names {len(index)} samples, but the batch has {self.batch}")
        return lambda sample: index[sample.to(index.device)] if index.dim() else index

    def laid_out(self, step: Callable[[Tensor], T], point: Tensor) -> T:
        """:func:`laid_out`, tried until it fails once."""
        found, self.channels_last = laid_out(step, point, self.channels_last)
        return found

    def value(self) -> Tensor:
        if not self.module:
            found = _first_tensor(self.inputs if self.inputs else self.named)
            assert found is not None
            return found.detach().clone()
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            first = _first_tensor(output)
            if first is not None:
                kept.append(first.detach())

        handle = self.model.get_submodule(self.module).register_forward_hook(keep)
        try:
            with torch.no_grad():
                self.model(*self.inputs, **self.named)
        finally:
            handle.remove()
        if len(kept) != 1:
            raise ValueError(f"module {self.module!r} was called {len(kept)} times; one that is called once is needed")
        return kept[0]

    def run(self, point: Tensor, sample: Tensor) -> Any:
        """What the model gives for some samples with ``point`` in place of what is varied."""

        def cut(v: Any) -> Any:
            return v[sample] if isinstance(v, Tensor) and v.dim() and len(v) == self.batch else v

        args, named = tuple(cut(a) for a in self.inputs), {k: cut(v) for k, v in self.named.items()}
        if not self.module:
            if args:
                args = tuple(_with_first(list(args), point))
            else:
                named = _with_first(named, point)
            return self.model(*args, **named)
        handle = self.model.get_submodule(self.module).register_forward_hook(
            lambda module, args, output: _with_first(output, point)
        )
        try:
            return self.model(*args, **named)
        finally:
            handle.remove()
