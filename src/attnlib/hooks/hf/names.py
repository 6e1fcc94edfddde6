"""Everything that is not public in transformers, in one place."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a block, whatever its name."""
    given = kwargs.get("past_key_values")
    if given is None:
        kind = _need().cache.Cache
        given = next((value for value in kwargs.values() if isinstance(value, kind)), None)
    return given


PREFIX = "attnlib_"

#: Implementations whose masks can be read pair by pair.
READABLE = ("sdpa", "eager")

#: Extra arguments that change the softmax itself; where one is in use only the model's own kernel is right.
SPECIAL = ("softcap", "s_aux", "position_bias", "sinks", "block_indices")


@functools.cache
def _need() -> types.SimpleNamespace:
    """The parts of transformers used here; ``ImportError`` says what to install."""
    try:
        from transformers import cache_utils, masking_utils, modeling_utils

        return types.SimpleNamespace(
            cache=cache_utils,
            attention=modeling_utils.AttentionInterface,
            functions=modeling_utils.ALL_ATTENTION_FUNCTIONS,
            masks=masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
            mask_interface=masking_utils.AttentionMaskInterface,
            model=modeling_utils.PreTrainedModel,
        )
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "acting on transformers models needs transformers 5 or newer with its AttentionInterface and "
            "AttentionMaskInterface: pip install 'attnlib[hf]'"
        ) from error


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def reachable(module: nn.Module) -> bool:
    """Whether a module looks its attention function up in transformers' interface."""
    code = getattr(_forward_of(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def kernel_of(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that the module would call under ``implementation``; the same object it would look up itself."""
    scope = _forward_of(module).__globals__
    interface = scope.get("ALL_ATTENTION_FUNCTIONS")
    eager = scope.get("eager_attention_forward")
    function = interface.get(implementation, eager if implementation == "eager" else None)
    if function is None:
        raise ValueError(
            f"{type(module).__name__} has no attention function for attn_implementation={implementation!r} that can be "
            f"reached; possible: {sorted(interface.keys())}"
        )
    return function


def _cache_name(kwargs: dict[str, Any]) -> str | None:
    """The name under which an attention module gets its cache."""
    return next((name for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None), None)


def implementation_of(module: nn.Module) -> str:
    """Which attention a module runs, under whatever name."""
    config: Any = module.config
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def reader(model: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """A function from the arguments of a call of ``model`` to the same by name."""
    names = list(inspect.signature(model.forward).parameters)
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def cached_tokens(given: dict[str, Any]) -> int:
    """Tokens that the cache of a call holds before it."""
    cache: Any = given.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
