"""attnlib: every attention mechanism under one interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names of the top level and where they live; imported on first use, so that `import attnlib` stays fast.
_LAZY = {
    "create": "attnlib.nn.registry",
    "list_mechanisms": "attnlib.nn.registry",
    "convert_state_dict": "attnlib.nn.registry",
    "register": "attnlib.nn.registry",
    "create_model": "attnlib.models.build",
    "list_models": "attnlib.models.build",
    "deploy": "attnlib.nn.base",
    "Mechanism": "attnlib.nn.base",
    "Fusion": "attnlib.nn.base",
    "Pool": "attnlib.nn.pools.base",
    "attention": "attnlib.ops",
    "attention_partial": "attnlib.ops",
    "explain": "attnlib.ops",
    "use_backend": "attnlib.ops",
    "Layout": "attnlib.grids",
    "Output": "attnlib.types",
    "Partial": "attnlib.types",
    "Plan": "attnlib.types",
    "State": "attnlib.types",
    "Traits": "attnlib.types",
    "attach": "attnlib.hooks",
}
_MODULES = frozenset(
    "bench cache catalog check checks grids hooks look masks models nn normalizers ops optim parallel positions reduce "
    "steer theory types".split()
)

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from .grids import Layout
    from .models.build import create_model, list_models
    from .nn.base import Fusion, Mechanism, deploy
    from .nn.pools.base import Pool
    from .nn.registry import convert_state_dict, create, list_mechanisms, register
    from .ops.attention import attention, attention_partial, explain, use_backend
    from .types import Output, Partial, Plan, State, Traits


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"attnlib.{name}")
    raise AttributeError(f"module 'attnlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
