"""A transformers cache layer that holds the :class:`attnlib.State` of any mechanism.

Needs ``transformers``; nothing else in :mod:`attnlib.hooks` imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...extras import missing

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    raise missing(__name__, error) from error

from ...types import State
from .names import tokens_to_remove


class StateLayer(CacheLayerMixin):
    """State of one layer, and how many tokens it has been through.

    Layers of one model may hold very different things: all keys, the last few, or a matrix that does not grow. What
    ``generate`` needs of each is the same number of tokens seen, which therefore is counted here and never read off a
    tensor's shape, so that a layer without keys answers like one with them.

    >>> layer = StateLayer()
    >>> layer.advance(State({"S": torch.zeros(2, 3, 4, 4)}), 7)
    >>> layer.get_seq_length(), layer.state["S"].shape
    (7, torch.Size([2, 3, 4, 4]))
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    # ---- what a model does with it

    def advance(self, state: State, tokens: int) -> None:
        """Keep the state after ``tokens`` more tokens (padding included)."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    @property
    def batch_size(self) -> int:
        """Samples held, -1 before the first token."""
        return -1 if self.state is None else _leaves(self.state)[0].shape[0]

    @property
    def tokens(self) -> Tensor | None:
        """(B,) tokens that exist among those seen, by the state's own count or else all; ``None`` before the first."""
        if self.state is None:
            return None
        if "tokens" in self.state:
            return self.state["tokens"]
        return torch.full((self.batch_size,), self.seen, device=_leaves(self.state)[0].device)

    def key_positions(self) -> Tensor | None:
        """(B, M) positions of the keys held, counting the tokens that exist; -1 where none is held.

        ``None`` when the state holds no keys.
        """
        state = self.state
        if state is None or "k" not in state:
            return None
        held = state["k"].shape[2]
        if "valid" in state:
            return torch.where(state["valid"], state["valid"].long().cumsum(1) - 1, -1)
        tokens = self.tokens
        assert tokens is not None, "there is a state"
        return (tokens[:, None] - held + torch.arange(held, device=tokens.device)).clamp(min=-1)

    # ---- what transformers does with it

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(fn)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        if self.state is not None:
            self.device = _leaves(self.state)[0].device
            self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.state is not None and hasattr(self, "device"):
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def crop(self, tokens: int) -> None:
        if tokens_to_remove(tokens, self.seen):
            raise ValueError(
                f"crop({tokens}) is not possible: a state that has read a token cannot forget it; "
                "keep a copy (state.map(torch.clone)) from before instead"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise TypeError("StateLayer holds states, not keys and values; call advance(state, tokens)")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("StateLayer holds states, not keys and values; call advance(state, tokens)")


class PassingLayer(StateLayer):
    """A state that somebody else moves on: new keys and values go to attention as they come, and nothing is kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return key_states, value_states


def passing_layer(cache: Any, index: int, where: str) -> PassingLayer:
    """Layer ``index`` of any cache, made one of these while it is empty."""
    cache = getattr(cache, "self_attention_cache", cache)
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise ValueError(f"{where}: the cache has {len(cache.layers)} layers; it was made for another model")
    layer = cache.layers[index]
    if not isinstance(layer, PassingLayer):
        if layer.get_seq_length():
            raise ValueError(
                f"{where}: its cache holds {layer.get_seq_length()} keys, from before the layer was converted; start "
                "from the prompt"
            )
        layer = cache.layers[index] = PassingLayer()
    return layer


def _leaves(state: State) -> list[Tensor]:
    out: list[Tensor] = []
    for value in state.tensors.values():
        out += _leaves(value) if isinstance(value, State) else [value]
    return out


def state_cache(num_layers: int) -> Cache:
    """An empty cache of ``num_layers`` :class:`StateLayer`.

    >>> state_cache(3).get_seq_length()
    0
    """
    return Cache(layers=[StateLayer() for _ in range(num_layers)])


def counting_layer(cache: Cache) -> StateLayer:
    """The layer by which the tokens of a sequence are counted: the first whose state counts those that exist."""
    layers: Sequence[StateLayer] = cache.layers  # type: ignore[assignment]
    return next((layer for layer in layers if layer.state is not None and "tokens" in layer.state), layers[0])


def state_layers(cache: Any, num_layers: int) -> Sequence[StateLayer]:
    """The layers of ``cache``, or ``TypeError`` when it is another kind of cache."""
    layers = getattr(cache, "layers", None)
    if layers is None or len(layers) != num_layers or not all(isinstance(layer, StateLayer) for layer in layers):
        raise TypeError(
            f"cache must be made by attnlib.hooks.hf.state.state_cache({num_layers}) or left out, got {cache!r:.200}"
        )
    return layers
