"""Cache layers of transformers that lost keys, and caches that wait."""

from __future__ import annotations

import copy
import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..session import Session
from ..site import Site
from .names import _need, holds_tokens, implementation_of, makes_bias, shares_keys, tokens_to_remove


@functools.cache
def evicted_layer_class() -> type[Any]:
    """The cache layer of a compressed layer (a class made on first use, since transformers is imported only then)."""
    hf = _need()

    class EvictedLayer(hf.cache.DynamicLayer):  # type: ignore[name-defined, misc]
        """Keys and values that are left, the slots they came from, and the count of all tokens seen.

        ``keys``, ``values``: (B, Hk, K, D); ``positions``: (B, Hk, K) slots in the sequence, new tokens appended, -1 on
        the left of heads that hold fewer; ``memory``: named tensors, batch first, that follow the samples, and where
        they have a third axis, the tokens along it, the newest last.
        """

        is_croppable = True

        def __init__(
            self,
            session: Session | None,
            keys: Tensor,
            values: Tensor,
            positions: Tensor,
            seen: int,
            capacity: int,
        ):
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values
            self._chosen, self._first_new = positions, seen
            self.seen, self.capacity = seen, capacity
            self.belong(session)
            self.evicted_from = self.evicted_at = seen
            self.padded = bool((positions < 0).any())
            self.memory: dict[str, Tensor] = {}
            self._places: dict[str, Tensor] = {}

        def belong(self, session: Session | None) -> None:
            """A session reads it, and adapts masks to it."""
            self.session = _nobody if session is None else weakref.ref(session)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # A layer that is saved belongs to no session; one that reads it makes it its own.
            state = {k: v for k, v in self.__dict__.items() if k not in ("session", "_places")}
            return _empty_layer, (), {**state, "_places": {}}

        @property
        def positions(self) -> Tensor:
            new = self.keys.shape[2] - self._chosen.shape[2]
            if not new:
                return self._chosen
            slots = torch.arange(self._first_new, self._first_new + new, device=self._chosen.device)
            return torch.cat([self._chosen, slots.expand(*self._chosen.shape[:2], new)], -1)

        def __copy__(self) -> Any:
            new = object.__new__(type(self))
            # Two layers must not write behind the same keys, nor one behind keys that the other took back.
            self._places = {}
            new.__dict__.update(self.__dict__, _places={}, memory=dict(self.memory))
            return new

        def _longer(self, name: str, new: Tensor) -> Tensor:
            """What is held under ``name`` (B, Hk, K, D) and ``new`` behind it, mostly without copying what is held."""
            held, place = getattr(self, name), self._places.get(name)
            if torch.is_grad_enabled() and (held.requires_grad or new.requires_grad):
                return torch.cat([held, new], 2)
            stop = held.shape[2] + new.shape[2]
            if (
                place is None
                or place.shape[2] < stop
                or place.shape[:2] != held.shape[:2]
                or place.data_ptr() != held.data_ptr()
                or place.is_inference() != torch.is_inference_mode_enabled()
            ):
                place = held.new_empty(*held.shape[:2], stop + 16 + stop // 16, held.shape[3])
                place[:, :, : held.shape[2]] = held
                self._places[name] = place
            place[:, :, held.shape[2] : stop] = new
            return place[:, :, :stop]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            session = self.session()
            if session is None or not session.active:
                raise RuntimeError(
                    "this cache lost keys inside an attnlib session that is over, and nothing adapts its masks any "
                    "more; decode inside a session whose interventions act on this layer, or start from the prompt"
                )
            if 0 < self.capacity < self.seen + key_states.shape[-2]:
                raise ValueError(
                    f"the static cache was made for {self.capacity} tokens, but with these {key_states.shape[-2]} the "
                    f"sequence has {self.seen + key_states.shape[-2]}"
                )
            self.seen += key_states.shape[-2]
            self.keys, self.values = self._longer("keys", key_states), self._longer("values", value_states)
            return self.keys, self.values

        def offload(self) -> None:
            self._places = {}  # room behind the keys is kept where they are used only
            super().offload()

        def get_seq_length(self) -> int:
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return (self.capacity, 0) if self.capacity > 0 else (self.seen + query_length, 0)

        def crop(self, tokens: int) -> None:
            remove = tokens_to_remove(tokens, self.seen)
            if remove > self.seen - self.evicted_from:
                raise ValueError(
                    f"cannot remove {remove} tokens: only {self.seen - self.evicted_from} came after the keys were "
                    "evicted; drafts (assistant_model, prompt_lookup_num_tokens) would be among the tokens that chose"
                )
            if remove:
                self._places = {}  # whoever holds these keys keeps them
                self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
                self._chosen, self.seen = self._chosen[..., : self.keys.shape[2]], self.seen - remove
                self._first_new = min(self._first_new, self.seen)
                self.evicted_at = min(self.evicted_at, self.seen)
                for name, held in list(self.memory.items()):
                    if held.dim() > 2:
                        self.memory[name] = held[:, :, :-remove]

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            rows = beam_idx.to(self._chosen.device)
            self._chosen = self._chosen.index_select(0, rows)
            self.memory.update({name: t.index_select(0, rows) for name, t in self.memory.items()})

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._chosen = self._chosen.repeat_interleave(repeats, 0)
            self.memory.update({name: t.repeat_interleave(repeats, 0) for name, t in self.memory.items()})

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._chosen = self._chosen[indices]
            self.memory.update({name: t[indices] for name, t in self.memory.items()})

        def reset(self) -> None:
            raise RuntimeError("a cache that lost keys cannot be reset; make a new one")

    return EvictedLayer


def _nobody() -> None:
    return None


def _empty_layer() -> Any:
    """A compressed layer to be filled with what was saved."""
    layer = object.__new__(evicted_layer_class())
    layer.session = _nobody
    return layer


def why_evict_alone(module: nn.Module) -> str | None:
    """Why an attention module cannot lose keys, whatever its cache is; ``None`` where it can."""
    if makes_bias(module):
        return "it makes the bias of positions of all layers from the number of keys it reads"
    return shares_keys(module)


def why_not_evictable(layer: Any) -> str | None:
    """Why keys cannot leave a cache layer head by head; ``None`` where they can."""
    cache = _need().cache
    if type(layer) in (cache.DynamicLayer, cache.StaticLayer, evicted_layer_class()):
        return None
    name = type(layer).__name__
    if not holds_tokens(layer):
        return f"a {name} holds no keys"
    if "LinearAttention" in name:
        beside = " beside its keys" if isinstance(layer, cache.DynamicLayer) else ""
        return f"a {name} holds a recurrent state{beside}"
    if getattr(layer, "is_sliding", False):
        return f"a {name} holds its last tokens only, and forgets the others by itself"
    return f"a {name} does not hold keys as they are read; possible: full attention with a dynamic or static cache"


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of it that are alike."""
    alike = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return a is b or (alike and a.device == b.device and a.data_ptr() == b.data_ptr())


def why_latent(layer: Any, k: Tensor, v: Tensor) -> str | None:
    """Why keys (B, Hk, M, D) as read are not those that a cache layer holds; ``None`` where they are."""
    held = layer.keys.shape, layer.values.shape
    if all(a[1] == t.shape[1] and a[-1] == t.shape[-1] for a, t in zip(held, (k, v), strict=True)):
        m = k.shape[2]
        for name, own, read in (("keys", layer.keys[:, :, :m], k), ("values", layer.values[:, :, :m], v)):
            if not same(own, read) and not torch.equal(own, read.to(own.device)):
                return (
                    f"the {name} that it reads are made from those that its cache holds, head by head or token by "
                    "token, so what leaves the cache would take others along"
                )
        return None
    return (
        f"its cache holds latents (keys {tuple(held[0])}, values {tuple(held[1])}) from which the keys of all heads "
        f"{tuple(k.shape)} are made, so keys cannot leave it head by head"
    )


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of a prompt in one layer while the prompt is read, when tokens were removed before it.

    Whoever removes tokens puts ``session.notes.kept[layer]`` down for every layer behind, before it runs, and gives
    those layers masks and positions of what is left.

    Args:
        slots: (B, N) slot in the sequence of each token that is left, -1 for padding.
        seen: tokens of the prompt, removed ones included.
    """

    slots: Tensor
    seen: int


def present(layer: Any) -> Any:
    """A cache layer with its keys where they are used: a cache that offloads moves them away right after each call."""
    device = getattr(layer, "device", None)
    if device is not None and isinstance(layer.keys, Tensor) and layer.keys.device != device:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # they may still be on their way
        layer.prefetch()
    return layer


def snapshot(layer: Any) -> Any:
    """A cache layer as it is now, whatever is written into the other from now on.

    Layers that only ever put new tensors in place of the old ones share them; of a layer that writes in place
    everything is copied.
    """
    cache = _need().cache
    if isinstance(layer, evicted_layer_class()):
        return copy.copy(layer)
    new = object.__new__(type(layer))
    # Behind the tokens that a static layer of full attention holds, it may write: nobody reads there.
    if type(layer) in (cache.DynamicLayer, cache.DynamicSlidingWindowLayer, cache.StaticLayer):
        new.__dict__.update(layer.__dict__)
    else:
        new.__dict__.update({name: _own(value) for name, value in layer.__dict__.items()})
    return new


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_own(one) for one in value)
    return {name: _own(one) for name, one in value.items()} if isinstance(value, dict) else value


class _DeferredCache:
    """Stands for a cache during one attention call, so that new keys can be edited before they are stored."""

    def __init__(self, cache: Any):
        self._cache = cache
        self.arguments: tuple[Any, ...] | None = None
        self.given: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.arguments, self.given = (layer_idx, args, kwargs), (key, value)
        return key, value

    def hands_on(self, key: Tensor, value: Tensor) -> bool:
        """Whether these are what was to be stored, so that attention reads what the cache holds, and nothing else."""
        return self.given is None or (same(key, self.given[0]) and same(value, self.given[1]))

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.arguments is None:
            return key, value
        layer_idx, args, kwargs = self.arguments
        return self._cache.update(key, value, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def fill(mask: Tensor, dead: Tensor) -> Tensor:
    """A mask with the pairs of ``dead`` forbidden, in the form it has."""
    return mask.masked_fill(dead, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def decode_mask(mask: Any, k_slots: Tensor, n: int, offset: int, heads: int, padded: bool) -> Tensor | None:
    """The mask of ``n`` new tokens over the keys that are left and the new ones themselves.

    Args:
        mask: (B or 1, 1, n, M) over all slots, or ``None``.
        k_slots: (B, Hk, K + n), -1 for padding, or (B, 1, K + n) where all heads hold the same.
        n: new tokens.
        offset: slot of the first new token.
        heads: query heads.
        padded: there is padding in ``k_slots``.

    Returns:
        (B, 1 or heads, n, K + n), or ``None``.
    """
    slots = k_slots if k_slots.shape[1] == 1 else k_slots.repeat_interleave(heads // k_slots.shape[1], 1)
    batch, groups, count = slots.shape
    if mask is None:
        if n == 1 and not padded:
            return None
        new = torch.arange(offset, offset + n, device=slots.device)
        allowed = slots[:, :, None] <= new[:, None]
        return allowed & (slots >= 0)[:, :, None]
    # A mask of one column, as of a model whose count of tokens is off, is that of all keys.
    wide = mask.expand(batch, groups, n, int(slots.max()) + 1 if mask.shape[-1] == 1 else mask.shape[-1])
    picked = wide.gather(-1, slots.clamp(min=0)[:, :, None].expand(batch, groups, n, count))
    return fill(picked, (slots < 0)[:, :, None]) if padded else picked


def mask_unwritten(site: Site, layer: Any, hidden: Tensor, mask: Any) -> Any:
    """The mask of a static cache layer that shares its cache with layers that lost keys.

    The model leaves the mask out when it has one new token and not all layers are static, but such a layer hands out
    slots to which nothing was written.
    """
    if mask is not None or layer.is_sliding or implementation_of(site.module) != "sdpa":
        return mask
    n, seen = hidden.shape[1], int(layer.get_seq_length())
    slots = torch.arange(layer.max_cache_len, device=hidden.device)
    allowed = slots <= torch.arange(seen, seen + n, device=hidden.device)[:, None]
    return allowed.expand(hidden.shape[0], 1, -1, -1)
