"""What a session changes in a model: each change can be undone, done again, and be seen to have been overwritten.

A change is undone only where it still stands: what the user put in its place during the session stays. Modules that
carry a change know how to be copied without it, so that a copy (``copy.deepcopy``, pickle, an average of weights) is a
plain model with its own weights; replicas that share nothing but the attributes are refused.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

_MISSING: Any = object()


class Change:
    """One change: done when made."""

    def undo(self) -> bool:
        """Take it back, and say whether it still stood."""
        raise NotImplementedError

    def redo(self) -> None:
        """Do it once more, on what stands there now."""


class Action(Change):
    """Something to be called at the end."""

    def __init__(self, undo: Callable[[], None], redo: Callable[[], None] | None = None):
        self._undo, self._redo = undo, redo

    def undo(self) -> bool:
        self._undo()
        return True

    def redo(self) -> None:
        if self._redo is not None:
            self._redo()


class Entry(Change):
    """An entry of a dictionary: of an object's attributes, or of a module's children."""

    def __init__(self, owner: Any, entries: dict[str, Any], name: str, value: Any):
        self.owner, self.entries, self.name, self.value = owner, entries, name, value
        self.redo()

    def redo(self) -> None:
        self.before = self.entries.get(self.name, _MISSING)
        self.entries[self.name] = self.value

    def undo(self) -> bool:
        # A wrapper around ours is the user's, and stays.
        if self.entries.get(self.name, _MISSING) is not self.value:
            return False
        if self.before is _MISSING:
            self.entries.pop(self.name, None)
        else:
            self.entries[self.name] = self.before
        return True

    def undo_in(self, state: dict[str, Any]) -> None:
        """Undo it in a copy of the owner's attributes."""
        if self.entries is not self.owner.__dict__:
            held = next(name for name, value in self.owner.__dict__.items() if value is self.entries)
            entries = state[held] = dict(state[held])
        else:
            entries = state
        if entries.get(self.name, _MISSING) is not self.value:
            return
        if self.before is _MISSING:
            entries.pop(self.name)
        else:
            entries[self.name] = self.before


#: Where a module keeps its hooks.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class Hook(Change):
    """A hook of a module, by its handle."""

    def __init__(self, handle: Any):
        self.handle = handle
        self.id: int = handle.id
        self.hook = handle.hooks_dict_ref()[self.id]
        extra = [ref() for ref in getattr(handle, "extra_dict_ref", ())]
        self.dicts = [(d, d[self.id]) for d in (handle.hooks_dict_ref(), *extra) if d is not None and self.id in d]
        hooks = self.dicts[0][0]
        self.first = len(hooks) > 1 and next(iter(hooks)) == self.id

    def instead(self, hook: Callable[..., Any]) -> None:
        """Run another function in its place."""
        hooks = self.dicts[0][0]
        hooks[self.id] = hook
        self.dicts[0] = (hooks, hook)

    def undo(self) -> bool:
        stood = self.id in self.dicts[0][0]
        self.handle.remove()
        return stood

    def redo(self) -> None:
        for hooks, value in self.dicts:
            hooks[self.id] = value
            if self.first:
                hooks.move_to_end(self.id, last=False)


def wraps(entries: dict[Any, Any], name: Any, value: Any) -> bool:
    """Whether what stands under ``name`` is a wrapper around ``value``, as libraries that move weights put there."""
    now = entries.get(name)
    if name == "forward" and entries.get("_old_forward") is value:
        return True
    while now is not None and now is not value:
        now = getattr(now, "__wrapped__", None)
    return now is value


def hooks_of(model: nn.Module) -> dict[int, nn.Module]:
    """The module that each dictionary of hooks in a model belongs to, by identity of the dictionary."""
    return {id(module.__dict__[name]): module for module in model.modules() for name in _HOOKS}


def plain_state(module: nn.Module, state: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    """The attributes of a module as they would be without the changes of a session."""
    state = dict(state)
    ids = {change.id for change in changes if isinstance(change, Hook)}
    for name, value in state.items():
        if name.startswith(("_forward_", "_backward_")) and isinstance(value, dict) and ids & value.keys():
            state[name] = type(value)((k, v) for k, v in value.items() if k not in ids)
    for change in reversed(changes):
        if isinstance(change, Entry) and change.owner is module:
            change.undo_in(state)
    return state


@contextmanager
def _plainly(module: nn.Module, changes: list[Change]) -> Iterator[None]:
    """The module itself as if no session had changed it, for as long as its class takes a copy of it."""
    attached = module.__dict__
    object.__setattr__(module, "__dict__", plain_state(module, attached, changes))
    try:
        yield
    finally:
        object.__setattr__(module, "__dict__", attached)


def _holds_attached(module: nn.Module) -> str | None:
    """The name of a part of a module that is attached, too."""
    return next((name for name, part in module.named_modules() if name and "__reduce_ex__" in part.__dict__), None)


def plain_copies(module: nn.Module, changes: list[Change]) -> list[Change]:
    """Let copies of a module be made as if no session had changed it, and refuse what would share its attached parts.

    How a class copies itself is its own affair, and may change inside a session (``torch.nn.utils.parametrize`` gives
    it a way of its own), so it is asked when a copy is made.
    """

    def reduce(protocol: Any) -> Any:
        part = _holds_attached(module) if sys._getframe(1).f_code is copy.copy.__code__ else None
        if part is not None:
            raise RuntimeError(
                f"{type(module).__name__} is attached, and copy.copy(...) of it would share {part}, which is attached "
                "too; copy.deepcopy(...) makes a plain model of its own, or detach first"
            )
        with _plainly(module, changes):
            return module.__reduce_ex__(protocol)

    def deepcopy(memo: dict[int, Any]) -> Any:
        with _plainly(module, changes):
            return copy.deepcopy(module, memo)

    def replicate() -> NoReturn:
        raise RuntimeError(
            f"{type(module).__name__} is attached, and a replica of it (torch.nn.DataParallel) would compute with the "
            "weights of the original; attach to one model per device, or use DistributedDataParallel"
        )

    ways = {"__reduce_ex__": reduce, "__deepcopy__": deepcopy, "_replicate_for_data_parallel": replicate}
    return [Entry(module, module.__dict__, name, way) for name, way in ways.items()]
