"""The table of mechanisms that the conformance kit runs: one module per family, one row per configuration."""

from __future__ import annotations

import importlib
import pkgutil

from attnlib.check import Case


def rows() -> list[Case]:
    """Every row of every family."""
    found: list[Case] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").ROWS
    return found
