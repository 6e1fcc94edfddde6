"""Calls of ``scaled_dot_product_attention`` caught where they are made."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .site import PairMask, read_mask


class Intercept(TorchFunctionMode):
    """Hands the attention call inside it to ``run``, or each of the ``calls`` that are known."""

    def __init__(self, run: Callable[..., Tensor], where: str, what: str, calls: int = 1):
        super().__init__()
        self.run, self.where, self.what, self.calls = run, where, what, calls
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.count += 1
            if self.count > self.calls:
                times = "once" if self.calls == 1 else f"{self.calls} times"
                raise ValueError(
                    f"{self.where}: {self.what} computes attention more than {times} per call; a description of its "
                    "branches is missing"
                )
            return self.run(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            # It would hide the call inside it: a function mode is off while it handles a function. This is the same
            # code with another function under that name.
            names = {**func.__globals__, "has_torch_function": _never, "scaled_dot_product_attention": self._attend}
            func = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        return func(*args, **(kwargs or {}))

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.__torch_function__(F.scaled_dot_product_attention, (), args, kwargs)


def _never(tensors: Any) -> bool:
    return False


def pair_mask(mask: Tensor | None, n: int, m: int, causal: bool) -> PairMask:
    """What a mask given to ``scaled_dot_product_attention`` says."""
    if mask is None:
        return PairMask(n, m, causal=causal)
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    allowed, bias = read_mask(mask.expand(*mask.shape[:2], n, m))
    return PairMask(n, m, None if bool(allowed.all()) else allowed, bias)
