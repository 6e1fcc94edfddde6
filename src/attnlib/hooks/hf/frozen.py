"""A cache that is read and never written to: what comes behind a prefix may be computed many times, for many variants.

A batch that is a multiple of the cached one reads the cached tokens once per variant: row ``v * B + b`` those of
sample ``b``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .names import _need


@functools.cache
def frozen_layer_class() -> type[Any]:
    """The cache layer (a class made on first use, since transformers is imported only then)."""
    hf = _need()

    class FrozenLayer(hf.cache.DynamicLayer):  # type: ignore[name-defined, misc]
        """Keys and values of a prefix; what is new is handed on behind them, and forgotten."""

        def __init__(self, keys: Tensor, values: Tensor):
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True
            self.dtype, self.device = keys.dtype, keys.device

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return self._behind(self.keys, key_states), self._behind(self.values, value_states)

        @staticmethod
        def _behind(old: Tensor, new: Tensor) -> Tensor:
            if new.shape[0] == old.shape[0]:
                return torch.cat([old, new], 2)
            variants = new.shape[0] // old.shape[0]
            return torch.cat([old.expand(variants, *old.shape), new.unflatten(0, (variants, -1))], 3).flatten(0, 1)

        def get_seq_length(self) -> int:
            return int(self.keys.shape[2])

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.get_seq_length() + query_length, 0

    return FrozenLayer


def frozen(cache: Any, tokens: int) -> Any:
    """The cache of a prefix of ``tokens`` tokens, frozen; ``None`` where a layer keeps anything but all of them."""
    hf = _need()
    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer) is not hf.cache.DynamicLayer for layer in layers):
        return None
    if any(not layer.is_initialized or layer.keys.shape[2] != tokens for layer in layers):
        return None
    kept = hf.cache.DynamicCache()
    kept.layers = [frozen_layer_class()(layer.keys, layer.values) for layer in layers]
    return kept
