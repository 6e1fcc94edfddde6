"""Gradient checkpointing: what runs again for a backward pass is known, and runs as it ran.

``torch.utils.checkpoint`` runs a part of a model twice, the second time from within ``backward()``. What is stateful
would act twice, and the second time on what the first one left. So the first time the part enters something stateful,
that puts its state aside, and the function that the checkpoint will run again is wrapped: the second run finds the
state as it was, and leaves it as it found it.

The function to run again stands in objects of PyTorch that are not public, and they are known here only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import checkpoint as _checkpoint

#: The code of the two kinds of checkpoints, by which their calls are known on the stack; since 2.14 ``checkpoint``
#: may also be a decorator, and what it does lies in a function of its own.
_REENTRANT: Any = inspect.unwrap(_checkpoint.CheckpointFunction.forward).__code__
_PLAIN: Any = inspect.unwrap(getattr(_checkpoint, "_checkpoint_impl", _checkpoint.checkpoint)).__code__

Again = Callable[[], AbstractContextManager[Any]]


class Recomputed:
    """A function that runs again within ``again()``, as it ran the first time."""

    def __init__(self, owner: Any, function: Callable[..., Any], again: Again):
        self.owner, self.function, self.again = owner, function, again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.again():
            return self.function(*args, **kwargs)

    def of(self, owner: Any) -> bool:
        """Whether it already runs for an owner."""
        function: Any = self
        while isinstance(function, Recomputed):
            if function.owner is owner:
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


def reentrant(depth: int = 2) -> bool:
    """Whether a reentrant checkpoint runs around the caller."""
    return any(name == "run_function" for _, name in checkpoints(sys._getframe(depth)))


def follow(owner: Any, made: Callable[[], Again], depth: int = 2) -> bool:
    """Wrap what will be run again of the checkpoints around the caller; whether there are any.

    Args:
        owner: who asks; the first time of each counts.
        made: puts the state of the owner aside, and gives what runs it again.
        depth: frames between this one and the caller's.
    """
    again: Again | None = None
    around = checkpoints(sys._getframe(depth))
    for holder, name in around:
        function = getattr(holder, name)
        if isinstance(function, Recomputed) and function.of(owner):
            break  # those around it were wrapped with it
        if again is None:
            again = made()
        setattr(holder, name, Recomputed(owner, function, again))
    return bool(around)


def buffers_once(module: nn.Module) -> None:
    """For a forward that may change buffers: under a checkpoint it changes them once, and reads the same ones again."""
    follow(module, lambda: _Buffers(module).restored, 2)


class _Buffers:
    """The buffers of a module as they are now."""

    def __init__(self, module: nn.Module):
        self.held: list[tuple[nn.Module, str, Tensor]] = [
            (m, name, b.detach().clone()) for m in module.modules() for name, b in m._buffers.items() if b is not None
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The module has them; afterwards those it has now. They are exchanged, since graphs notice what is written."""
        now = [m._buffers[name] for m, name, _ in self.held]
        try:
            for m, name, held in self.held:
                m._buffers[name] = held.clone()
            yield
        finally:
            for (m, name, _), buffer in zip(self.held, now, strict=True):
                m._buffers[name] = buffer


def checkpointed(module: nn.Module, *args: Any, when: bool = True) -> Any:
    """``module(*args)``, whose insides, ``when`` there is a backward pass, are computed again instead of being kept.

    Batch norms count a batch once: when they run again they use its statistics and leave their own as they are.
    """
    if not when or not torch.is_grad_enabled():
        return module(*args)
    contexts: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        contexts["context_fn"] = lambda: (nullcontext(), _counted(module))
    return _checkpoint.checkpoint(module, *args, use_reentrant=False, **contexts)


@contextmanager
def _counted(module: nn.Module) -> Iterator[None]:
    """What batch norms count of the batch that runs again goes to copies; a graph saves as many tensors as before."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    counts = [m._buffers.copy() for m in norms]
    try:
        for norm in norms:
            norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
        yield
    finally:
        for norm, held in zip(norms, counts, strict=True):
            norm._buffers.update(held)
