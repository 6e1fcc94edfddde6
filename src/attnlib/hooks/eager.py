"""Stages run as they are written, whatever ``torch.compile`` does around them.

A compiled model is a trace of what it ran when it was traced: of what is attached later it knows nothing, and what was
attached then it goes on doing. What was compiled is therefore forgotten whenever a session begins or ends, and the
stages of a session are never traced: the compiler ends its graph before them and begins another one behind them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, that no compiler looks into."""
    untraced = torch.compiler.disable(function, reason="stages of an attnlib session are run as they are written")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Outside a compiler the detour would cost more than all else that is done here.
        return untraced(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return run


def forget_compiled() -> None:
    """What was compiled before knows nothing of what is true from now on."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        dynamo.reset()
