"""Conformance: every claim in the traits, tested.

``attnlib.check("softmax-attention", dim=16, num_heads=4)`` holds a mechanism to what it claims and returns a
:class:`Report`; ``conformance(rows)`` makes a parametrised pytest of a table of :class:`Case`.
"""

import sys
from types import ModuleType
from typing import Any

from .case import Case
from .kit import ORDER, check, conformance, run_cli
from .report import Finding, Report
from .subject import CLAIMS

__all__ = ["CLAIMS", "ORDER", "Case", "Finding", "Report", "check", "conformance", "run_cli"]


class _Callable(ModuleType):
    """This module is also the function: ``attnlib.check(...)`` and ``from attnlib.check import Case`` both work."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return check(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
