"""All targets, and trials spread evenly over them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from .engine import TARGETS, WEIGHTS, Verdict, run_trial


def load() -> None:
    """Import every module of targets."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("of_"):
            importlib.import_module(f"{__package__}.{module.name}")


def turns(prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """One round of targets whose names start so, each as often as its weight says."""
    load()
    names = [n for n in sorted(TARGETS) if n.startswith(prefixes)]
    return [n for turn in range(max(WEIGHTS.values())) for n in names if turn < WEIGHTS[n]]


def trials(count: int, seed: int, names: list[str] | None = None, start: int = 0) -> Iterator[Verdict]:
    """Trials ``start..count-1``, going round the targets."""
    names = turns() if names is None else names
    for i in range(start, count):
        yield run_trial(names[i % len(names)], seed, i)
