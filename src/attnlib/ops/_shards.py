"""Where a sequence is cut over processes: what operators and mechanisms ask about the tokens that lie with the others.

Nothing here communicates. :mod:`attnlib.parallel` puts somebody in who does, for the time of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Others(Protocol):
    """The processes that hold the other chunks of a sequence."""

    def linear(self, call: Any, run: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Linear attention of the queries here to the keys of all; ``run`` computes a call that lies here whole."""

    def scan(self, call: Any, run: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The same for a selective scan."""

    def attention(self, call: Any, run: Callable[[Any], Any]) -> Any:
        """The same for attention with a normalizer."""

    def before(self, valid: Tensor | None, batch: int, n: int, device: torch.device) -> Tensor:
        """(B,) tokens that exist in the chunks before this one."""

    def halo(self, x: Tensor, width: int, axis: int) -> Tensor:
        """``x`` behind the ``width`` tokens before it, zeros where the sequence has none."""


class _Thread(threading.local):
    others: Others | None = None


_thread = _Thread()
#: What compiled code sees: compilers notice when a plain variable changes, and not when a thread's own does.
_plain: Others | None = None
#: Blocks that any thread is in: where there are none, nothing else is asked.
entered = 0
_lock = threading.Lock()


def others() -> Others | None:
    """Who holds the rest of the sequence; ``None`` where it lies here whole."""
    if not entered:
        return None
    return _plain if torch.compiler.is_compiling() else _thread.others


@contextmanager
def cut_over(who: Others | None) -> Iterator[None]:
    """Cut every sequence over ``who`` inside the block, in this thread."""
    global _plain, entered
    kept = _thread.others, _plain
    _thread.others = _plain = who
    with _lock:
        entered += 1
    try:
        yield
    finally:
        _thread.others, _plain = kept
        with _lock:
            entered -= 1


def behind(x: Tensor, width: int, axis: int) -> Tensor:
    """``x`` behind the ``width`` tokens before it (zeros at the beginning of a sequence), along ``axis``.

    >>> behind(torch.ones(1, 2, 3), 1, 1)[..., 0]
    tensor([[0., 1., 1.]])
    """
    who = others()
    if who is not None:
        return who.halo(x, width, axis)
    axis = axis % x.dim()
    return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (width, 0))
