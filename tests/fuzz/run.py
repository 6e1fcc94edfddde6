"""All targets, and trials spread evenly over them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from .engine import TARGETS, Verdict, run_trial


def load() -> None:
    """Import every module of targets."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("of_"):
            importlib.import_module(f"{__package__}.{module.name}")


def trials(count: int, seed: int, names: list[str] | None = None, start: int = 0) -> Iterator[Verdict]:
    """Trials ``start..count-1``, going round the targets."""
    load()
    names = sorted(TARGETS) if names is None else names
    for i in range(start, count):
        yield run_trial(names[i % len(names)], seed, i // len(names))
