"""What models that train in a task share: a prediction, the terms of its loss, an answer, and the steps of a batch.

A model is trained by :func:`train_batch` without a word about its task: what alternates (a generator and its
discriminator, the two halves of a minimax, the stages of a schedule, an inner and an outer loop) is what
:meth:`TaskModel.steps` yields.

>>> class Line(TaskModel):
...     def __init__(self):
...         super().__init__()
...         self.map = nn.Linear(2, 1)
...     def forward(self, x): return self.map(x)
...     def loss(self, prediction, target): return {"square": (prediction - target).square().mean()}
>>> model = Line()
>>> optimizers = Optimizers(lambda name, params: torch.optim.SGD(params, 0.1))
>>> batch = {"x": torch.randn(8, 2), "target": torch.zeros(8, 1)}
>>> list(train_batch(model, batch, optimizers))
['all']
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checks import check_real, check_type, describe
from ..nn.base import check_weights
from ..types import stats_dtype

F = TypeVar("F", bound=Callable[..., Any])
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One update within a batch.

    Args:
        name: of the group of parameters; steps of one name share an optimizer, and must update the same parameters.
        params: what is updated; nothing else gets a gradient meanwhile.
        terms: called when it is this step's turn, after all updates before it: terms of the loss by name, each a
            number. Their sum is made small.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    terms: Callable[[], Terms]

    def __init__(self, name: str, params: Iterable[nn.Parameter], terms: Callable[[], Terms]):
        check_type("name", name, str, "the name of a step")
        held = tuple(params)
        for p in held:
            check_type("params", p, nn.Parameter, "parameters")
        if not callable(terms):
            raise TypeError(f"terms must be a function that gives the terms of the loss, got {describe(terms)}")
        for key, value in (("name", name), ("params", held), ("terms", terms)):
            object.__setattr__(self, key, value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: all of a model in evaluation; then every part as it was, also one that was frozen in evaluation."""
    training, modes = model.training, [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(training)  # by the method, which models override
        for module, mode in modes:
            module.training = mode


@contextmanager
def naming(model: nn.Module, method: Callable[..., Any], inputs: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within: what fails on an input in another precision than all parameters have says which input that is."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if type(error) in (RuntimeError, TypeError):
            given = {**dict(zip(inspect.signature(method).parameters, inputs, strict=False)), **settings}
            try:
                check_weights(model, type(model).__name__, given)
            except TypeError as found:
                raise found from error
        raise


def answering(method: F) -> F:
    """A method of a model that runs without a gradient, the model in evaluation meanwhile (see :func:`evaluating`).

    :meth:`TaskModel.predict` is one in every subclass, without a word; this is for other methods that answer.

    >>> class Noisy(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.drop = nn.Dropout(0.5)
    ...     @answering
    ...     def clean(self, x): return self.drop(x)
    >>> model = Noisy()
    >>> model.clean(torch.ones(2)), model.training
    (tensor([1., 1.]), True)
    """

    @functools.wraps(method)
    def answer(self: nn.Module, *inputs: Any, **settings: Any) -> Any:
        with torch.no_grad(), evaluating(self), naming(self, method.__get__(self), inputs, settings):
            return method(self, *inputs, **settings)

    return answer  # type: ignore[return-value]


def _wide(value: Any) -> Any:
    """What a model gave, with float32 in place of half precision."""
    if isinstance(value, Tensor):
        return value.to(stats_dtype(value.dtype)) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_wide, value))
    if type(value) in (list, tuple):
        return type(value)(map(_wide, value))
    if type(value) is dict:
        return {key: _wide(held) for key, held in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _wide(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def _labels(value: Any) -> Any:
    """A target, with int64 in place of shorter whole numbers, which torch takes for masks or not at all."""
    if isinstance(value, Tensor):
        return value.long() if value.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_labels, value))
    if type(value) in (list, tuple):
        return type(value)(map(_labels, value))
    return {key: _labels(held) for key, held in value.items()} if type(value) is dict else value


def measuring(method: F) -> F:
    """A loss that is computed in float32, also under autocast: it rounds no product to half precision, in which terms
    that are nearly equal no longer differ and slopes are not finite. Classes may be whole numbers of any width.
    :meth:`TaskModel.loss` is one in every subclass.
    """

    @functools.wraps(method)
    def loss(self: nn.Module, prediction: Any, *target: Any, **settings: Any) -> Any:
        target = tuple(map(_labels, target))
        if "target" in settings:
            settings["target"] = _labels(settings["target"])
        device = next((p.device.type for p in self.parameters()), "cpu")
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return method(self, prediction, *target, **settings)
        with torch.autocast(device, enabled=False):
            return method(self, _wide(prediction), *target, **settings)

    return loss  # type: ignore[return-value]


class TaskModel(nn.Module):
    """A model of a task.

    A subclass has ``forward(...) -> prediction``, :meth:`loss` and, where an answer is more than the prediction,
    :meth:`predict`, which needs no ``no_grad`` and no ``eval``: it is an answer (see :func:`answering`) in every
    subclass, and the loss is computed in float32 under autocast (see :func:`measuring`). What trains in turns overrides
    :meth:`steps`.
    """

    def __init_subclass__(cls, **settings: Any):
        super().__init_subclass__(**settings)
        if "loss" in vars(cls):
            cls.loss = measuring(vars(cls)["loss"])  # type: ignore[method-assign]
        for owner in cls.__mro__:
            if "predict" in vars(owner):
                if not issubclass(owner, TaskModel) or owner is cls:  # its own, or that of a class it is mixed with
                    cls.predict = answering(vars(owner)["predict"])  # type: ignore[method-assign]
                break

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        """``forward`` with its hooks; inputs in another precision than all parameters have are named."""
        if torch.compiler.is_compiling():
            return super().__call__(*inputs, **settings)
        with naming(self, self.forward, inputs, settings):
            return super().__call__(*inputs, **settings)

    def loss(self, prediction: Any, target: Any) -> Terms:
        """Terms of the loss by name, each a number; their sum is trained."""
        raise NotImplementedError(f"{type(self).__name__} has no loss(prediction, target)")

    @answering
    def predict(self, *inputs: Any, **settings: Any) -> Any:
        """The answer to inputs of any size, without a gradient, as in evaluation; the prediction, by default."""
        return self(*inputs, **settings)

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """The updates that a batch is good for, in order; by default one, of all parameters.

        Args:
            batch: ``"target"`` for :meth:`loss`, and everything else by the name that ``forward`` has for it.

        Raises:
            TypeError: no mapping.
            ValueError: no target, or what ``forward`` does not take.
        """
        inputs, target = split_batch(self, batch)
        yield Step("all", trained(self), lambda: self.loss(self(**inputs), target))


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """Parameters of modules that are to be trained, each once."""
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())


def split_batch(model: nn.Module, batch: Any) -> tuple[dict[str, Any], Any]:
    """What ``forward`` takes of a batch, and its target.

    Raises:
        TypeError: no mapping.
        ValueError: no ``"target"``, names that ``forward`` does not have, or not all that it needs.
    """
    check_type("batch", batch, Mapping, "a mapping from names to inputs, with a 'target'")
    if "target" not in batch:
        raise ValueError(f"batch has no 'target', got {sorted(batch)}")
    inputs = {name: value for name, value in batch.items() if name != "target"}
    taken = inspect.signature(model.forward).parameters
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError as error:
        raise ValueError(f"batch must hold 'target' and what forward{tuple(taken)} takes: {error}") from None
    return inputs, _labels(batch["target"])


def total_loss(terms: Any, where: str = "loss") -> Tensor:
    """The sum of the terms of a loss.

    Raises:
        TypeError: no mapping from names to tensors.
        ValueError: no terms, one that is no single number, one that is not finite (it is named).
    """
    check_type(where, terms, Mapping, "terms of the loss by name")
    if not terms:
        raise ValueError(f"{where} has no terms")
    total: Tensor | None = None
    for name, term in terms.items():
        check_type(f"{where}[{name!r}]", term, Tensor)
        if term.numel() != 1:
            raise ValueError(f"{where}[{name!r}] must be one number, got {describe(term)}")
        if not torch.isfinite(term.detach()).all():
            raise ValueError(f"{where}[{name!r}] is {float(term.detach())}: the loss must be finite")
        total = term.reshape(()) if total is None else total + term.reshape(())
    assert total is not None
    return total


@contextmanager
def updating(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within: only ``params`` get gradients, of all parameters of a model."""
    kept = {id(p) for p in params}
    still = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for p in still:
            p.requires_grad_(False)
        yield
    finally:
        for p in still:
            p.requires_grad_(True)


class Optimizers:
    """An optimizer for every name that steps have, made when it is first met; saved and loaded as one.

    Args:
        make: called with the name and its parameters.
    """

    def __init__(self, make: Callable[[str, list[nn.Parameter]], torch.optim.Optimizer]):
        if not callable(make):
            raise TypeError(f"make must give an optimizer for a name and its parameters, got {describe(make)}")
        self.make = make
        self.held: dict[str, torch.optim.Optimizer] = {}
        self._loaded: dict[str, Any] = {}

    def of(self, step: Step) -> torch.optim.Optimizer:
        """The optimizer of a step.

        Raises:
            ValueError: other parameters than the step of that name had before, or none.
        """
        found = self.held.get(step.name)
        if found is None:
            if not step.params:
                raise ValueError(f"step {step.name!r} has no parameters to update")
            found = self.held[step.name] = self.make(step.name, list(step.params))
            if step.name in self._loaded:
                found.load_state_dict(self._loaded.pop(step.name))
        elif [id(p) for g in found.param_groups for p in g["params"]] != [id(p) for p in step.params]:
            raise ValueError(f"step {step.name!r} updates other parameters than before; give it a name of its own")
        return found

    def state_dict(self) -> dict[str, Any]:
        """States by name, also of those that were loaded and not met again yet."""
        return {**self._loaded, **{name: o.state_dict() for name, o in self.held.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take states; those of optimizers to come are kept until they are made."""
        self._loaded = copy.deepcopy(dict(state))  # optimizers write into what they are given
        for name in [n for n in self._loaded if n in self.held]:
            self.held[name].load_state_dict(self._loaded.pop(name))


def train_batch(
    model: Any,
    batch: Mapping[str, Any],
    optimizers: Optimizers,
    *,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
    ready: Callable[[Step], Any] | None = None,
    clip: float | None = None,
) -> dict[str, dict[str, float]]:
    """All steps of a batch.

    Args:
        model: a :class:`TaskModel`, or anything with its ``steps``.
        batch: as ``steps`` takes it.
        optimizers: of the steps.
        backward: called with the loss of a step.
        ready: called when the gradients of a step are there, before they are clipped.
        clip: largest norm of the gradients of a step.

    Returns:
        The terms of the loss of every step, by name; of steps that come several times, the last.
    """
    if clip is not None:
        check_real("clip", clip, above=0)
    seen: dict[str, dict[str, float]] = {}
    for step in model.steps(batch):
        check_type("steps", step, Step, "to yield Steps")
        optimizer = optimizers.of(step)
        optimizer.zero_grad(set_to_none=True)
        with updating(model, step.params):
            terms = step.terms()
            backward(total_loss(terms, f"loss of step {step.name!r}"))
        if ready is not None:
            ready(step)
        if clip is not None:
            nn.utils.clip_grad_norm_(step.params, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen[step.name] = {name: float(term.detach()) for name, term in terms.items()}
    if not seen:
        raise ValueError(f"{type(model).__name__}.steps yielded no step")
    return seen
