"""Gradient checkpointing of attached models: what is recomputed for a backward pass sees what the forward saw.

``backward()`` may come when the session is over, when other steps or branches are current, or when what an intervention
keeps has moved on. So session and interventions put their state aside and find it again, as
:mod:`attnlib.nn.recompute` has it. Whatever else recomputes a part of a model is noticed, and refused by name, as long
as the session lives.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.recompute import reentrant

#: Tensors in the state of interventions up to this many elements are copied; larger ones are watched.
COPIED = 1 << 16


class Shared:
    """Base of what objects refer to without it being state of theirs: sessions and what runs their stages."""


def refuse_reentrant(who: str, what: str) -> None:
    """Raise where a reentrant checkpoint runs: tensors that reach a layer past its arguments get no gradients there."""
    if not torch.is_grad_enabled() and reentrant():
        raise ValueError(
            f"{who}: {what} needs gradients, which checkpointing with use_reentrant=True does not pass on from one "
            "layer to another; use model.gradient_checkpointing_enable({'use_reentrant': False})"
        )


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
