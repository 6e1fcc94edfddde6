"""Models of tasks on made-up and real data whose truth is known: one module per question, lines of ``tasks``.

``attnlib bench --suite tasks --out benchmarks/results`` goes through all lines, ``--suite tasks-<line>`` through one. A
line is a module of this package with ``QUESTION``, a sentence, and ``measure(progress=None, keep=None, pictures=None,
...)``, as the lines of :mod:`attnlib.bench.studies.multimodal_models` are.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ....checks import check_choice

#: Names of the lines.
LINES = tuple(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def line(name: str) -> Any:
    """The module of a line."""
    check_choice("name", name, LINES)
    return importlib.import_module(f".{name}", __name__)
