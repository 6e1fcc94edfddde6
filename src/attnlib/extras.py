"""What is only there with an extra, and which extra that is."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

#: Packages by the extra that brings them.
EXTRAS = {
    "hf": ("transformers", "diffusers", "peft", "accelerate"),
    "vision": ("timm",),
    "bench": ("sklearn", "skimage", "scipy", "matplotlib", "jinja2", "joblib", "gguf"),
    "look": ("himalaya",),
    "theory": ("cvxpy", "clarabel"),
    "ray": ("ray",),
    "fla": ("fla",),
    "natten": ("natten",),
    "triton": ("triton",),
}


def installed(module: str) -> bool:
    """Whether a package is at hand; it is not imported."""
    return module in sys.modules or _findable(module)


@functools.cache
def _findable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing(what: str, error: ImportError, module: str = "") -> ImportError:
    """The error to raise in place of ``error`` where ``what`` needs ``module``: it names the extra that brings it.

    >>> missing("plots", ImportError("No module named 'matplotlib'", name="matplotlib"))
    ImportError("plots needs 'matplotlib': pip install 'attnlib[bench]'")
    """
    package = (error.name or module).partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return ImportError(f"{what} needs {package!r}: pip install 'attnlib[{extra}]'", name=error.name)
    return error


def need(module: str, what: str) -> ModuleType:
    """Import ``module`` for ``what``; ``ImportError`` names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(what, error, module) from error
