"""float64 without islands of float32, for recordings and comparisons that must not depend on the machine.

A model in float64 still turns times into sines, positions into rotary tables and norms into means in float32 where its
code says so. The last bit of a sine or an exponential in float32 differs between processors (vector width, library),
and a time of 999 or a guidance of 6000 makes 1e-4 of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode


class _Doubles(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.float:
            func = torch.Tensor.double
        swapped = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*swapped, **named)


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Whatever asks for float32 meanwhile, by name or by default, gets float64: the library, diffusers, authors' code.

    A fixture whose metadata names ``doubles`` was recorded inside of this, and is to be compared inside of it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)
