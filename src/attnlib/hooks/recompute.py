"""Gradient checkpointing: what is recomputed for a backward pass sees what the forward saw.

``torch.utils.checkpoint`` runs a part of a model twice, the second time from within ``backward()``, which may come when
the session is over, when other steps or branches are current, or when what an intervention keeps has moved on. The
first time the part enters anything of ours, the state of session and interventions is put aside, and the function that
the checkpoint will run again is wrapped: the second run finds the model attached and the state as it was, and leaves
both as it found them, so that what is stateful acts once.

The function to run again stands in objects of PyTorch that are not public, and they are known here only. Whatever else
recomputes a part of a model is noticed, and refused by name, as long as the session lives.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as _checkpoint

#: Tensors in the state of interventions up to this many elements are copied; larger ones are watched.
COPIED = 1 << 16

#: The code of the two kinds of checkpoints, by which their calls are known on the stack; since 2.14 ``checkpoint``
#: may also be a decorator, and what it does lies in a function of its own.
_REENTRANT: Any = inspect.unwrap(_checkpoint.CheckpointFunction.forward).__code__
_PLAIN: Any = inspect.unwrap(getattr(_checkpoint, "_checkpoint_impl", _checkpoint.checkpoint)).__code__


class Shared:
    """Base of what objects refer to without it being state of theirs: sessions and what runs their stages."""


class Recomputed:
    """A function that runs again as it ran the first time."""

    def __init__(self, session: Any, function: Callable[..., Any], state: State):
        self.session, self.function, self.state = session, function, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.as_it_was(self.state):
            return self.function(*args, **kwargs)

    def of(self, session: Any) -> bool:
        """Whether it already runs for a session."""
        function: Any = self
        while isinstance(function, Recomputed):
            if function.session is session:
                return True
            function = function.function
        return False


_AGAIN: Any = Recomputed.__call__.__code__


def running_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def checkpoints(frame: FrameType | None) -> list[tuple[Any, str]]:
    """Checkpoints whose forward is running: the objects, innermost first, that hold what will be run again.

    Within something that runs again, those that are entered there.
    """
    found: list[tuple[Any, str]] = []
    while frame is not None:
        code = frame.f_code
        if code is _AGAIN:
            break
        if code is _REENTRANT:
            found.append((frame.f_locals["ctx"], "run_function"))
        elif code is _PLAIN:
            generator = frame.f_locals.get("gen")
            inner = None if generator is None else generator.gi_frame
            held = None if inner is None else inner.f_locals.get("new_frame")
            if held is not None:
                found.append((held, "recompute_fn"))
        frame = frame.f_back
    return found


def refuse_reentrant(who: str, what: str) -> None:
    """Raise where a reentrant checkpoint runs: tensors that reach a layer past its arguments get no gradients there."""
    if not torch.is_grad_enabled() and any(name == "run_function" for _, name in checkpoints(sys._getframe(1))):
        raise ValueError(
            f"{who}: {what} needs gradients, which checkpointing with use_reentrant=True does not pass on from one "
            "layer to another; use model.gradient_checkpointing_enable({'use_reentrant': False})"
        )


def follow(session: Any, made: Callable[[], State], depth: int = 2) -> bool:
    """Wrap what will be run again of the checkpoints around the caller; whether there are any."""
    state: State | None = None
    around = checkpoints(sys._getframe(depth))
    for holder, name in around:
        function = getattr(holder, name)
        if isinstance(function, Recomputed) and function.of(session):
            break  # those around it were wrapped with it
        if state is None:
            state = made()
        setattr(holder, name, Recomputed(session, function, state))
    return bool(around)


class State:
    """What objects hold in their attributes, put aside.

    Small tensors are copied; a large one is kept as it is, and must not have been written to by the time it is asked
    for.
    """

    def __init__(self, objects: list[Any]):
        self.watched: list[tuple[Tensor, int]] = []
        memo: dict[int, Any] = {id(o): o for o in objects}
        self.held = [(o, {name: self._copy(value, memo) for name, value in o.__dict__.items()}) for o in objects]

    def _copy(self, value: Any, memo: dict[int, Any]) -> Any:
        if id(value) in memo:
            return memo[id(value)]
        new = self._new(value, memo)
        memo[id(value)] = new
        return new

    def _new(self, value: Any, memo: dict[int, Any]) -> Any:
        new: Any
        if isinstance(value, Tensor):
            if value.is_leaf and not value.requires_grad and value.numel() <= COPIED:
                return value.clone()
            if not value.is_inference():
                self.watched.append((value, value._version))
            return value
        if isinstance(value, torch.Generator):
            return torch.Generator(value.device).set_state(value.get_state())
        if isinstance(value, random.Random):
            return copy.deepcopy(value)
        if isinstance(value, (list, set, deque)):
            new = memo[id(value)] = copy.copy(value)
            new.clear()
            for one in value:
                (new.add if isinstance(new, set) else new.append)(self._copy(one, memo))
            return new
        if isinstance(value, dict):
            new = memo[id(value)] = copy.copy(value)
            new.clear()
            for key, one in value.items():
                new[key] = self._copy(one, memo)
            return new
        if type(value) is tuple:
            return tuple(self._copy(one, memo) for one in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._copy(one, memo) for one in value))
        # Objects that an intervention keeps are its state; the model, functions and the like are not.
        own, cls = getattr(value, "__dict__", None), type(value)
        plain = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
        functions = (nn.Module, type, Shared, FunctionType, MethodType, ModuleType)
        if plain and isinstance(own, dict) and not isinstance(value, functions):
            new = memo[id(value)] = object.__new__(type(value))
            new.__dict__.update({name: self._copy(one, memo) for name, one in own.items()})
            return new
        return value

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The objects hold it again; afterwards what they hold now."""
        for tensor, version in self.watched:
            if tensor._version != version:
                raise RuntimeError(
                    f"an intervention wrote into a tensor {tuple(tensor.shape)} that it keeps, after a checkpointed "
                    "part of the model ran; that part can no longer be recomputed as it ran. Make a new tensor instead"
                )
        now = [(o, o.__dict__) for o, _ in self.held]
        memo: dict[int, Any] = {id(o): o for o, _ in self.held}
        again = [(o, {name: self._copy(value, memo) for name, value in held.items()}) for o, held in self.held]
        try:
            for o, held in again:
                object.__setattr__(o, "__dict__", held)
            yield
        finally:
            for o, held in now:
                object.__setattr__(o, "__dict__", held)
