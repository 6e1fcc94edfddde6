"""Backends for CUDA: kernels that other libraries keep, and ours in Triton where none does.

Each is an extra, imported when a call first runs on it, and says by ``supports`` and ``prefers`` which calls are its.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...extras import EXTRAS, installed
from .._dispatch import device_kind

HALF = (torch.float16, torch.bfloat16)


def absent(package: str, x: Tensor, traced: str = "") -> str | None:
    """Why the kernels of a package cannot serve a call on ``x`` here; ``None`` when they may.

    Args:
        package: as it is imported.
        traced: why graphs cannot hold them, where they cannot.
    """
    kind = device_kind(x)
    if kind != "cuda":
        return f"its kernels run on CUDA, the tensors lie on {kind}"
    if traced and torch.compiler.is_compiling():
        return traced
    if not installed(package):
        extra = next(name for name, packages in EXTRAS.items() if package in packages)
        return f"{package} is not installed: pip install 'attnlib[{extra}]'"
    return None


def exact(dtype: torch.dtype) -> str | None:
    """Why kernels that multiply in TF32 are not chosen for a type by themselves; ``None`` for half precision."""
    return None if dtype in HALF else f"it multiplies {str(dtype).removeprefix('torch.')} in TF32, which rounds coarser"
