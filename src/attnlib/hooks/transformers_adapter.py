"""Sites of transformers models.

Attention modules of transformers look their function up by name in ``AttentionInterface`` at every call. A layer with
stages gets a copy of its config under the name ``attnlib_<implementation>``; the others keep config and function. The
same name is registered in ``AttentionMaskInterface`` with the mask function of the implementation it stands for: a name
that is registered only in the first gets no mask at all, and attention silently turns non-causal. The masks of a model
are built by the model, before its layers, so unattached layers see exactly the mask they always saw.

A cache layer that lost keys (:func:`evicted_layer_class`) goes on counting every token it ever saw, so positions and
masks keep the true length; the mask of an attached layer is then read at the slots of the keys that are left.

Steps are counted by the cache; without one, by the tokens that a call reads beyond those of the call before. The score
of the next token is handed to ``on_logits`` by the first of the processors that ``generate`` makes for itself, so that
the user's own processors stay what and where they are. Nothing is kept by the number of calls: what a layer knows of
its current call lives on a stack, and what must survive a call belongs to a branch of the session. A second branch may
therefore be run at any time, also from within ``on_logits``.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .core import Adapter, Intervention, PairMask, Session, Site, Stages, run_attention
from .tokens import IMAGE, PAD, TypeTracker

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


# --------------------------------------------------------------------------------------------------------------------
# The function that attached layers call

_runtimes: weakref.WeakKeyDictionary[nn.Module, LayerRuntime] = weakref.WeakKeyDictionary()


def _forget(module: nn.Module) -> None:
    _runtimes.pop(module, None)


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


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered function: through the stages of an attached layer, straight to the kernel elsewhere."""
    runtime = _runtimes.get(module)
    if runtime is None:
        implementation = module.config._attn_implementation.removeprefix(PREFIX)  # type: ignore[union-attr, operator]
        return kernel_of(module, implementation)(module, query, key, value, attention_mask, *args, **kwargs)
    return runtime.run(query, key, value, attention_mask, args, kwargs)


def register(implementation: str) -> str:
    """Register the name that stands for ``implementation`` in both interfaces; returns it."""
    hf = _need()
    name = PREFIX + implementation
    if implementation not in hf.masks:
        raise ValueError(
            f"attn_implementation={implementation!r} has no mask function in AttentionMaskInterface; "
            f"use one of {sorted(hf.masks.keys())}"
        )
    hf.attention.register(name, _dispatch)
    hf.mask_interface.register(name, hf.masks[implementation])
    return name


# --------------------------------------------------------------------------------------------------------------------
# Caches


@functools.cache
def evicted_layer_class() -> type:
    """The cache layer of a compressed layer (a class made on first use, since transformers is imported only then)."""
    hf = _need()

    class EvictedLayer(hf.cache.DynamicLayer):  # type: ignore[name-defined, misc]
        """Keys and values that are left, the slots they came from, and the count of all tokens seen.

        ``keys``, ``values``: (B, Hk, K, D); ``positions``: (B, Hk, K) slots in the sequence, new tokens appended, -1 on
        the left of heads that hold fewer; ``memory``: named tensors, batch first, that follow the samples, and where
        they have a third axis, the tokens along it, the newest last.
        """

        is_croppable = True

        def __init__(self, session: Session, keys: Tensor, values: Tensor, positions: Tensor, seen: int, capacity: int):
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values
            self._chosen, self._first_new = positions, seen
            self.seen, self.capacity, self.session = seen, capacity, weakref.ref(session)
            self.evicted_from = self.evicted_at = seen
            self.padded = bool((positions < 0).any())
            self.memory: dict[str, Tensor] = {}
            self._places: dict[str, Tensor] = {}

        @property
        def positions(self) -> Tensor:
            new = self.keys.shape[2] - self._chosen.shape[2]
            if not new:
                return self._chosen
            slots = torch.arange(self._first_new, self._first_new + new, device=self._chosen.device)
            return torch.cat([self._chosen, slots.expand(*self._chosen.shape[:2], new)], -1)

        def __copy__(self) -> Any:
            new = object.__new__(type(self))
            # Two layers must not write behind the same keys.
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
                    "more; "
                    "decode inside the session, or start from the prompt"
                )
            self.seen += key_states.shape[-2]
            self.keys, self.values = self._longer("keys", key_states), self._longer("values", value_states)
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return (self.capacity, 0) if self.capacity > 0 else (self.seen + query_length, 0)

        def crop(self, tokens_to_remove: int) -> None:
            remove = abs(tokens_to_remove)
            if remove > self.seen - self.evicted_from:
                raise ValueError(
                    f"cannot remove {remove} tokens: only {self.seen - self.evicted_from} came after the keys were "
                    "evicted; drafts (assistant_model, prompt_lookup_num_tokens) would be among the tokens that chose"
                )
            if remove:
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


@functools.lru_cache(maxsize=16)
def _unmasked(n: int, m: int, causal: bool) -> PairMask:
    return PairMask(n, m, causal=causal)


@functools.lru_cache(maxsize=16)
def slots(start: int, count: int, device: torch.device) -> Tensor:
    """``start``, ``start + 1``, ...: all layers of a step ask for the same ones. Never written to."""
    with torch.inference_mode(False):
        return torch.arange(start, start + count, device=device)


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of a prompt in one layer while the prompt is read, when tokens were removed before it.

    Whoever removes tokens puts ``session.notes["kept"][layer]`` down for every layer behind, before it runs, and gives
    those layers masks and positions of what is left.

    Args:
        slots: (B, N) slot in the sequence of each token that is left, -1 for padding.
        seen: tokens of the prompt, removed ones included.
    """

    slots: Tensor
    seen: int


def _snapshot(layer: Any) -> Any:
    """A shallow copy of a cache layer; its tensors are never written to, except by static layers."""
    new = object.__new__(type(layer))
    new.__dict__.update(layer.__dict__)
    return new


class _DeferredCache:
    """Stands for a cache during one attention call, so that new keys can be edited before they are stored."""

    def __init__(self, cache: Any):
        self._cache = cache
        self.arguments: tuple[Any, ...] | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.arguments = (layer_idx, args, kwargs)
        return key, value

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.arguments is None:
            return key, value
        layer_idx, args, kwargs = self.arguments
        return self._cache.update(key, value, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


# --------------------------------------------------------------------------------------------------------------------
# One attached layer


@dataclass
class _Call:
    """What an attention module was called with."""

    cache: Any = None
    deferred: _DeferredCache | None = None
    offset: int = 0
    start: int | None = 0  # slot of the first key; None when it is not known
    kept: Kept | None = None
    before: Any = None  # the cache layer as it was before this call
    ran: bool = False

    again: bool = False  # the module runs once more in one call; what it writes is forgotten

    def seen(self, n: int) -> int:
        """Tokens of the sequence after this call read ``n``."""
        return self.offset + n if self.kept is None else self.kept.seen


def _cache_name(kwargs: dict[str, Any]) -> str | None:
    """The name under which an attention module gets its cache."""
    return next((name for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None), None)


class LayerRuntime:
    """Stages of one attention module, and what is known about its current call."""

    def __init__(self, session: Session, site: Site, stages: Stages, kernel: Callable[..., Any], implementation: str):
        self.session, self.site, self.stages, self.kernel = session, site, stages, kernel
        self.implementation = implementation
        self._calls: list[_Call] = []
        self.module = site.module
        parameters = inspect.signature(_forward_of(self.module)).parameters
        self.names = list(parameters)[1:]
        self.rotary = True if "position_embeddings" in self.names else None
        # Nothing to do here while decoding but to read what is left of the cache.
        self.prompt_only = stages.used == ["on_cache"] and not stages.probes
        self.prompt_only &= not any(i.while_decoding for i in stages.all)

    # ---- around the module

    @property
    def call(self) -> _Call:
        """The call that is running; a call may run within another one."""
        return self._calls[-1] if self._calls else _Call()

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The module's forward, with what is known about its call put down for the time it runs.

        In place of hooks around it: they cost a module more than all else that is done here.
        """
        calls, edits_new, in_attention = self._calls, self.stages["on_qkv"], self.stages.in_attention
        inner = self.around_module(forward) if self.stages["around_sublayer"] else forward

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = self.look({**dict(zip(self.names, args, strict=False)), **kwargs} if len(args) > 1 else kwargs)
            calls.append(call)
            try:
                if edits_new and call.cache is not None:
                    name = _cache_name(kwargs)
                    if name is None:
                        raise ValueError(f"{self.where}: on_qkv needs the cache to be passed by keyword")
                    call.deferred = _DeferredCache(call.cache)
                    kwargs = {**kwargs, name: call.deferred}
                output = inner(*args, **kwargs)
            finally:
                last = calls.pop()
            if in_attention and not (call.ran or last.ran):
                raise RuntimeError(
                    f"{self.where}: its forward ran without calling the attention function it was given, so nothing "
                    "could act there; this model's attention is not reachable through AttentionInterface"
                )
            return output

        return run

    def around_module(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The module's forward under ``around_sublayer``."""
        first = self.names[0]

        def run(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(self.names, args, strict=False)), **kwargs}
            hidden = given.get(first)
            if not isinstance(hidden, Tensor):
                raise ValueError(f"{self.where}: its input is not passed as {first}")
            call = self.call
            outputs: list[Any] = []
            if call.cache is not None and self.site.kind != "cross" and len(call.cache.layers) > self.site.layer:
                call.before = _snapshot(call.cache.layers[self.site.layer])

            def innermost(x: Tensor) -> Tensor:
                new = kwargs
                if outputs and call.cache is not None:
                    new = {**kwargs, _cache_name(kwargs) or "past_key_values": self._read_again(call)}
                    mask, m = kwargs.get("attention_mask"), call.offset + x.shape[1]
                    if type(call.before) is _need().cache.StaticLayer and isinstance(mask, Tensor):
                        new["attention_mask"] = mask[..., :m]  # only the slots that are written
                inner = (x, *args[1:]) if args else args
                outputs.append(forward(*inner, **(new if args else {**new, first: x})))
                return outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]

            site = self.sublayer_site(call, hidden, given.get("attention_mask"))
            chain: Callable[[Tensor], Tensor] = innermost
            for i in reversed(self.stages["around_sublayer"]):
                chain = functools.partial(_around, i, site, chain)
            result = chain(hidden)
            if not isinstance(result, Tensor) or result.shape != hidden.shape:
                got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(
                    f"{self.where}: around_sublayer must return (B, N, C)={tuple(hidden.shape)}, got {got}"
                )
            if not outputs and call.cache is not None:
                innermost(hidden)  # later tokens read its keys
            call.ran = True
            if not outputs:
                return result, None
            return (result, *outputs[0][1:]) if isinstance(outputs[0], tuple) else result

        return run

    def _read_again(self, call: _Call) -> Any:
        """A cache for one more run of the module: the tokens before this call; what it writes is forgotten."""
        hf, index, before = _need(), self.site.layer, call.before
        if call.offset == 0 or before is None:
            again = hf.cache.DynamicLayer()
        elif type(before) is hf.cache.StaticLayer:
            again = hf.cache.DynamicLayer()
            again.lazy_initialization(before.keys, before.values)
            again.keys, again.values = before.keys[:, :, : call.offset], before.values[:, :, : call.offset]
        elif type(before) in (hf.cache.DynamicLayer, hf.cache.DynamicSlidingWindowLayer, evicted_layer_class()):
            again = _snapshot(before)
        else:
            raise ValueError(
                f"{self.where}: around_sublayer called the module several times, but a {type(before).__name__} cannot "
                "be read again within one call"
            )
        cache = copy.copy(call.cache)
        cache.layers = [again if i == index else other for i, other in enumerate(call.cache.layers)]
        repeated = _Call(cache=cache, offset=call.offset, kept=call.kept, before=before, again=True)
        if self.stages["on_qkv"]:
            repeated.deferred = _DeferredCache(cache)
        self._calls[-1] = repeated
        return repeated.deferred or cache

    def sublayer_site(self, call: _Call, hidden: Tensor, mask: Any) -> Site:
        """The site of a call as known before queries and keys are made."""
        batch, n = hidden.shape[:2]
        if self.site.kind == "cross":
            return self.describe(call, batch, n, 0, hidden.device, None)
        layer = self._cache_layer(call)
        k_pos = None
        if isinstance(layer, evicted_layer_class()):
            new = torch.arange(call.offset, call.offset + n, device=hidden.device)
            k_pos = torch.cat([layer.positions, new.expand(*layer.positions.shape[:2], n)], -1)  # type: ignore[attr-defined]
            mask = self._mask_of_kept(mask, k_pos, call, batch, self.site.heads, n, layer.padded)  # type: ignore[attr-defined]
            m = k_pos.shape[-1]
        elif call.kept is not None:
            m, k_pos = n, call.kept.slots[:, None].expand(-1, self.site.kv_heads, -1)
        else:
            m = call.offset + n
            if layer is not None and layer.is_sliding:
                m = min(m, (mask.shape[-1] if isinstance(mask, Tensor) else m))
                call.start = None if isinstance(layer, _need().cache.StaticLayer) else call.offset + n - m
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > m:
            mask = mask[..., :m]
        pair = self.pairs(mask, n, m, getattr(self.module, "is_causal", True))
        return self.describe(call, batch, n, m, hidden.device, pair, k_pos)

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site, hidden = self.block_site(module, args, kwargs)
        for i in self.stages["on_block_input"]:
            edited = i.on_block_input(site, hidden)
            hidden = hidden if edited is None else edited
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def block_site(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Site, Tensor]:
        """The site and the tokens (B, N, C) at the input of the block of this attention."""
        names = list(inspect.signature(_forward_of(block)).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise ValueError(f"{self.where}: the input of its block is not passed as hidden_states")
        return self.sublayer_site(self.look(given), hidden, given.get("attention_mask")), hidden

    # ---- description

    @property
    def where(self) -> str:
        return f"layer {self.site.layer} ({self.site.name})"

    def look(self, given: dict[str, Any]) -> _Call:
        """How many tokens came before, from the cache itself."""
        cache = given.get("past_key_values")
        if cache is None:
            cache = given.get("layer_past")  # GPT-NeoX
        hf = _need()
        if isinstance(cache, hf.cache.EncoderDecoderCache):
            cache = cache.cross_attention_cache if self.site.kind == "cross" else cache.self_attention_cache
        if self.site.kind == "cross" or not isinstance(cache, hf.cache.Cache):
            return _Call(cache=None if self.site.kind == "cross" else cache, kept=self._kept())
        index = self.site.layer
        offset = int(cache.layers[index].get_seq_length()) if index < len(cache.layers) else 0
        return _Call(cache=cache, offset=offset, kept=None if offset else self._kept())

    def _kept(self) -> Kept | None:
        if self.site.kind == "cross":
            return None
        return self.session.notes.get("kept", {}).get(self.site.layer)

    def describe(
        self,
        call: _Call,
        batch: int,
        n: int,
        m: int,
        device: torch.device,
        pair: PairMask | None,
        k_pos: Tensor | None = None,
        shape: dict[str, Any] | None = None,
    ) -> Site:
        cross = self.site.kind == "cross"
        if call.kept is None:
            q_pos = slots(call.offset, n, device)
        else:
            q_pos = call.kept.slots.to(device)
        if k_pos is None and call.start is not None:
            k_pos = slots(call.start, m, device)
        q_types = k_types = None
        tracker = self.session.tracker
        if tracker is not None and not cross and k_pos is not None:
            length = max(call.seen(n), call.start + m if k_pos.dim() == 1 and call.start is not None else 0)
            seen = tracker.upto(length, batch, device)
            if q_pos.dim() == 1:
                q_types = seen[:, call.offset : call.offset + n]
            else:
                q_types = seen.gather(1, q_pos.clamp(min=0)).masked_fill(q_pos < 0, PAD)
            if k_pos.dim() == 1:
                k_types = seen[:, call.start : call.start + m] if call.start is not None else seen[:, k_pos]
            else:
                k_types = seen[:, None].expand(-1, k_pos.shape[1], -1).gather(-1, k_pos.clamp(min=0))
                k_types = k_types.masked_fill(k_pos < 0, PAD)
        fields = {
            **self.site.__dict__, "n_queries": n, "n_keys": m, "mask": pair, "q_pos": q_pos, "k_pos": k_pos,
            "q_types": q_types, "k_types": k_types, "offset": call.offset,
            "phase": None if cross else "decode" if call.offset else "prefill",
        }  # fmt: skip
        if shape is not None:
            fields.update(shape)
        return self.session.made(fields, batch)

    def pairs(self, mask: Any, n: int, m: int, is_causal: bool) -> PairMask:
        """The model's own mask, whatever its form."""
        if self.implementation not in READABLE:
            return PairMask(
                n, m,
                opaque=f"{self.where}: masks of attn_implementation={self.implementation!r} cannot be read pair by "
                "pair; "
                f"load the model with one of {list(READABLE)}",
            )  # fmt: skip
        if mask is None:
            # SDPA turns causal by itself when it gets no mask; eager attention does not.
            return _unmasked(n, m, self.implementation == "sdpa" and n > 1 and is_causal)
        if mask.dtype == torch.bool:
            return PairMask(n, m, allowed=mask)
        allowed = mask > torch.finfo(mask.dtype).min / 2
        finite = torch.where(allowed, mask, torch.zeros_like(mask))
        return PairMask(n, m, allowed=allowed, bias=finite if bool((finite != 0).any()) else None)

    # ---- the call

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        call, stages = self.call, self.stages
        call.ran = True
        batch, heads, n, dim = q.shape
        scaling = kwargs.get("scaling", args[1] if len(args) > 1 else None)
        shape = dict(
            heads=heads,
            kv_heads=k.shape[1],
            head_dim=dim,
            scale=float(dim**-0.5 if scaling is None else scaling),
            rotary=self.rotary,
        )
        special = [name for name in kwargs if name in SPECIAL and kwargs[name] is not None]
        if special and (stages.reads_map or stages["around_attention"]):
            raise ValueError(f"{self.where}: it uses {special[0]}, so its weights cannot be computed beside its kernel")
        dropout = kwargs.get("dropout", args[0] if args else 0.0)
        if dropout and (stages.edits or stages["around_attention"]):
            raise ValueError(
                f"{self.where}: attention dropout {dropout} is active and would differ between the model's kernel and "
                "the "
                "edit; call model.eval()"
            )
        if stages["on_qkv"]:
            site = self.describe(call, batch, n, n, q.device, None, None, shape)
            for i in stages["on_qkv"]:
                q, k, v = i.on_qkv(site, q, k, v)
            if call.deferred is not None:
                k, v = call.deferred.store(k, v)

        layer = self._cache_layer(call)
        m = k.shape[2]
        k_pos = None
        if isinstance(layer, evicted_layer_class()):
            if call.offset and self.prompt_only and n == 1 and mask is None and not layer.padded:  # type: ignore[attr-defined]
                return self.kernel(self.module, q, k, v, mask, *args, **kwargs)
            k_pos = layer.positions  # type: ignore[attr-defined]
            mask = self._mask_of_kept(mask, k_pos, call, batch, heads, n, layer.padded)  # type: ignore[attr-defined]
        elif call.kept is not None:
            # A static cache holds slots that nothing was written to yet.
            left = torch.nn.functional.pad(call.kept.slots, (0, m - n), value=-1)
            k_pos = left[:, None].expand(-1, k.shape[1], -1)
        elif self.site.kind == "cross" or (layer is not None and not layer.is_sliding):
            call.start = 0
        elif isinstance(layer, _need().cache.StaticLayer):
            call.start = None  # a ring buffer
        else:
            call.start = call.offset + n - m
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > m:
            mask = mask[..., :m]
        if call.offset and self.prompt_only:
            return self.kernel(self.module, q, k, v, mask, *args, **kwargs)
        is_causal = kwargs.get("is_causal")
        pair = self.pairs(mask, n, m, getattr(self.module, "is_causal", True) if is_causal is None else is_causal)
        site = self.describe(call, batch, n, m, q.device, pair, k_pos, shape)

        maps: list[Tensor | None] = []
        plain: list[tuple[Tensor, Tensor]] = []

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, weights = self.kernel(self.module, q, k, v, mask, *args, **kwargs)
            maps.append(weights)
            plain.append((out.transpose(1, 2), out))
            return plain[-1][0]

        out = run_attention(site, q, k, v, stages, kernel)
        if stages["on_cache"]:
            self._evict(call, site, q, k, v, n)
        edited = stages.edits or stages["around_attention"]
        weights = maps[0] if len(maps) == 1 and not edited else None
        if len(plain) == 1 and plain[0][0] is out:
            return plain[0][1], weights
        return out.transpose(1, 2).contiguous(), weights

    def _cache_layer(self, call: _Call) -> Any:
        if call.cache is None or self.site.layer >= len(getattr(call.cache, "layers", ())):
            return None
        return call.cache.layers[self.site.layer]

    def _mask_of_kept(
        self, mask: Any, k_pos: Tensor, call: _Call, batch: int, heads: int, n: int, padded: bool
    ) -> Tensor | None:
        """The model's mask, made for all slots, at the slots that are left; one row of heads per query head."""
        groups = heads // k_pos.shape[1]
        if mask is None:
            if n == 1 and not padded:
                return None
            q_pos = torch.arange(call.offset, call.offset + n, device=k_pos.device)
            kept = k_pos[:, :, None] <= q_pos[:, None]
        elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1:
            wide = mask.expand(batch, k_pos.shape[1], n, mask.shape[-1])
            kept = wide.gather(-1, k_pos[:, :, None].clamp(min=0).expand(-1, -1, n, -1))
        else:
            raise ValueError(
                f"{self.where}: its cache lost keys, and masks of attn_implementation={self.implementation!r} cannot "
                "be "
                f"read at the keys that are left; load the model with one of {list(READABLE)}"
            )
        if padded:
            nothing = (k_pos < 0)[:, :, None]
            kept = kept.masked_fill(nothing, False if kept.dtype == torch.bool else torch.finfo(kept.dtype).min)
        return kept.repeat_interleave(groups, 1)

    def _evict(self, call: _Call, site: Site, q: Tensor, k: Tensor, v: Tensor, n: int) -> None:
        if call.again:
            return
        asked = [i for i in self.stages["on_cache"] if call.offset == 0 or i.while_decoding]
        if not asked:
            return
        hf = _need()
        who = type(asked[0]).__name__
        if call.cache is None:
            raise ValueError(f"{who} evicts keys from the cache, but the model was called without one; use_cache=True")
        layer = self._cache_layer(call)
        evicted = isinstance(layer, evicted_layer_class())
        if not evicted and type(layer) not in (hf.cache.DynamicLayer, hf.cache.StaticLayer):
            raise ValueError(
                f"{who} cannot evict keys from a {type(layer).__name__} (layer {site.layer}); possible: full "
                "attention with a "
                "dynamic or static cache. Leave the layer out with layers=[...]"
            )
        assert site.mask is not None and site.k_pos is not None
        held = k.shape[2] if evicted else n if call.kept is not None else call.offset + n
        k, v = k[:, :, :held], v[:, :, :held]
        memory: dict[str, Tensor] = layer.memory if evicted else {}
        prompt = site.but(
            n_keys=held,
            mask=site.mask.first_keys(held),
            k_pos=site.k_pos[..., :held],
            k_types=None if site.k_types is None else site.k_types[..., :held],
            memory=memory,
            evicted_at=layer.evicted_at if evicted else None,
        )
        for i in asked:
            answer = i.on_cache(prompt, q, k, v)
            if answer is None:
                if not i.while_decoding or evicted:
                    continue
                # The layer counts and carries from now on; keys may leave it later.
                answer = torch.arange(held, device=k.device).expand(k.shape[0], k.shape[1], held)
            for number, kept in (answer if isinstance(answer, dict) else {site.layer: answer}).items():
                self._keep(i, call, number, kept)
            if not evicted and isinstance(self._cache_layer(call), evicted_layer_class()):
                call.cache.layers[site.layer].memory = memory

    def _keep(self, intervention: Intervention, call: _Call, number: int, kept: Tensor) -> None:
        """Leave only the keys ``kept`` in one layer of a cache."""
        cache = call.cache
        layer, evicted = cache.layers[number], evicted_layer_class()
        removed = None if call.kept is None else self.session.notes["kept"].get(number)
        again = isinstance(layer, evicted)
        static = isinstance(layer, _need().cache.StaticLayer)
        seen = int(layer.get_seq_length())
        keys, values = layer.keys, layer.values
        if static:
            keys, values = keys[:, :, :seen], values[:, :, :seen]
        self._check_kept(intervention, kept, keys)
        everything = kept.shape[2] == keys.shape[2] and bool((kept >= 0).all())
        slots = layer.positions if again else None
        if removed is not None and not again:
            slots, seen = removed.slots[:, None].expand(-1, keys.shape[1], -1), removed.seen
        if everything:
            positions = kept if slots is None else slots
        else:
            index = kept.clamp(min=0)
            keys = keys.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1]))
            values = values.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1]))
            positions = index if slots is None else slots.gather(2, index)
            positions = positions.masked_fill(kept < 0, -1)
        new = evicted(self.session, keys, values, positions, seen, layer.max_cache_len if static else -1)
        if again:
            new.memory, new.capacity = layer.memory, layer.capacity
        if everything:
            new.evicted_from = layer.evicted_from if again else 0
        cache.layers[number] = new

    def _check_kept(self, intervention: Intervention, kept: Tensor, k: Tensor) -> None:
        if kept.dim() != 3 or kept.shape[:2] != k.shape[:2] or kept.shape[2] == 0:
            raise ValueError(
                f"{type(intervention).__name__}.on_cache must return indices (B, Hk, K) with batch and heads "
                f"{tuple(k.shape[:2])}, got {tuple(kept.shape)}"
            )


# --------------------------------------------------------------------------------------------------------------------
# The family


class TransformersAdapter(Adapter):
    """Interception by name in both interfaces; token types from the ids that the model reads."""

    name = "transformers"
    stages: ClassVar[frozenset[str]] = frozenset(
        "on_block_input on_tokens around_sublayer on_context on_qkv on_kv_read around_attention on_scores on_weights "
        "on_output on_cache on_logits on_step".split()
    )

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        hf = _need()
        root, prefix = model, ""
        if part is not None:
            try:
                root, prefix = model.get_submodule(part), part + "."
            except AttributeError as error:
                names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
                raise ValueError(f"part={part!r} is not in {type(model).__name__}; it has {names}") from error
        elif isinstance(model, hf.model):
            decoder = model.get_decoder()
            paths = {module: name for name, module in model.named_modules()}
            if isinstance(decoder, nn.Module) and decoder is not model and paths.get(decoder):
                root, prefix = decoder, paths[decoder] + "."
        found = [(prefix + name, m) for name, m in root.named_modules() if name and reachable(m)]
        if not found:
            raise TypeError(
                f"{type(model).__name__} has no attention that can be reached: none of its modules looks its function "
                "up in "
                "transformers' AttentionInterface (ALL_ATTENTION_FUNCTIONS)"
            )
        sites = []
        for number, (name, module) in enumerate(found):
            config: Any = module.config
            index = getattr(module, "layer_idx", None)
            heads = getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
            if not isinstance(heads, int):
                raise TypeError(f"{type(module).__name__} ({name}) does not say how many heads it has")
            groups = getattr(module, "num_key_value_groups", 1)
            cross = bool(getattr(module, "is_cross_attention", False)) or any(
                word in name.rsplit(".", 1)[-1].lower() for word in ("cross", "encoder_attn", "encdec")
            )
            sites.append(
                Site(
                    layer=index if isinstance(index, int) else number,
                    name=name,
                    module=module,
                    kind="cross" if cross else "self",
                    heads=heads,
                    kv_heads=heads // groups,
                    head_dim=getattr(module, "head_dim", 0),
                    scale=float(getattr(module, "scaling", 1.0)),
                )
            )
        return sites

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        session.counts_steps = True
        follows = [i for stage in ("on_logits", "on_step", "on_tokens") for i in session.acting(stage)]
        if session.tracker is not None or follows:
            session.hook(session.model.register_forward_pre_hook(_Follow(session, bool(follows)), with_kwargs=True))
        if follows and callable(getattr(session.model, "_get_logits_processor", None)):
            session.set_attribute(session.model, "_get_logits_processor", _processors(session))
        runtimes = []
        for site, stages in plan:
            module = site.module
            config: Any = module.config
            implementation = config._attn_implementation or "eager"
            runtime = LayerRuntime(session, site, stages, kernel_of(module, implementation), implementation)
            if stages["on_qkv"] and site.kind == "cross":
                raise ValueError(
                    f"{runtime.where}: on_qkv is missing for cross-attention, whose keys are projected once per "
                    "prompt; use "
                    "on_kv_read, or on_context for what they are projected from"
                )
            if stages.reads_map and implementation not in READABLE:
                raise ValueError(runtime.pairs(None, 0, 0, False).opaque)
            runtimes.append(runtime)
            if stages.in_attention:
                view = copy.copy(config)
                view.__dict__["_attn_implementation_internal"] = register(implementation)
                session.set_attribute(module, "config", view)
                _runtimes[module] = runtime
                session.undo(functools.partial(_forget, module))
            if stages.in_attention or stages["around_sublayer"] or stages["on_context"]:
                session.set_attribute(module, "forward", runtime.wrap(module.forward))
            if stages["on_block_input"]:
                block = block_of(session.model, site)
                session.hook(block.register_forward_pre_hook(runtime.before_block, with_kwargs=True))
            if stages["on_context"]:
                self._swap_sources(session, runtime)
        if any(stages["on_cache"] for _, stages in plan):
            for site in session.sites:
                if site.kind == "self":
                    hide = functools.partial(_hide_unwritten, site)
                    session.hook(block_of(session.model, site).register_forward_pre_hook(hide, with_kwargs=True))
        if any(stages["on_tokens"] for _, stages in plan):
            removal = importlib.import_module(".removal", __package__)
            removal.install(session, runtimes)

    @staticmethod
    def _swap_sources(session: Session, runtime: LayerRuntime) -> None:
        module = runtime.module
        missing = [name for name in ("k_proj", "v_proj") if not isinstance(getattr(module, name, None), nn.Module)]
        if missing:
            raise ValueError(
                f"{runtime.where}: on_context needs separate projections of keys and values; {missing} are missing in "
                f"{type(module).__name__}"
            )

        def site(source: Tensor) -> Site:
            return session.described(runtime.site, source.shape[0], offset=runtime.call.offset, n_keys=source.shape[1])

        swap_sources(session, runtime.stages, site, module.k_proj, module.v_proj)  # type: ignore[arg-type]


def block_of(model: nn.Module, site: Site) -> nn.Module:
    """The numbered block that contains an attention module."""
    parent = site.name.rpartition(".")[0]
    while parent and not parent.rpartition(".")[2].isdigit():
        parent = parent.rpartition(".")[0]
    if not parent:
        raise ValueError(f"layer {site.layer} ({site.name}) is not inside a numbered block, so it has no block input")
    return model.get_submodule(parent)


def implementation_of(module: nn.Module) -> str:
    """Which attention a module runs, under whatever name."""
    config: Any = module.config
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


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


def _hide_unwritten(site: Site, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache: Any = kwargs.get(_cache_name(kwargs) or "past_key_values")
    layers = getattr(cache, "layers", ())
    if site.layer >= len(layers) or type(layers[site.layer]) is not _need().cache.StaticLayer:
        return None
    if not layers[site.layer].get_seq_length():
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    mask = kwargs.get("attention_mask")
    return args, {**kwargs, "attention_mask": mask_unwritten(site, layers[site.layer], hidden, mask)}


def _around(intervention: Intervention, site: Site, inner: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return intervention.around_sublayer(site, hidden, inner)


def _processors(session: Session) -> Callable[..., Any]:
    """``generate``'s own list of processors, with ``on_logits`` in front of it."""
    original = session.model._get_logits_processor

    @functools.wraps(original)  # type: ignore[arg-type]
    def make(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original(generation_config, *args, **kwargs)  # type: ignore[operator]
        if session._in_logits:
            return processors  # a generate() that an intervention runs by itself
        beams = generation_config.num_beams or 1
        session.notes.clear()
        session.notes["beams"] = beams
        length = kwargs.get("input_ids_seq_length", args[0] if args else None)
        if length:
            session.notes["prompt_length"] = int(length)

        def process(ids: Tensor, scores: Tensor) -> Tensor:
            after = session.logits(ids, scores)
            if beams > 1 and after is not scores and not torch.equal(after, scores):
                # Beams add log-probabilities up.
                after = after.log_softmax(-1)
            return after

        if session.acting("on_logits"):
            processors.insert(0, process)
        return processors

    return make


class _Follow:
    """Before every call of the model: token types, the prompt, and which decoding step this is."""

    def __init__(self, session: Session, watch: bool):
        self.session, self.watch = session, watch
        self.names = list(inspect.signature(session.model.forward).parameters)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache: Any = given.get("past_key_values")
        offset = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        decoder = given.get("decoder_input_ids")
        ids = given.get("input_ids") if decoder is None else decoder
        embeds = given.get("inputs_embeds")
        read = ids if ids is not None else embeds
        tracker = self.session.tracker
        if tracker is not None:
            self._types(model, tracker, given, offset)
        if self.watch:
            self._step(given, cache, offset, read)

    @staticmethod
    def _types(model: nn.Module, tracker: TypeTracker, given: dict[str, Any], offset: int) -> None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        read = ids if ids is not None else embeds
        if read is None:
            raise ValueError(f"{type(model).__name__} was called without input_ids or inputs_embeds")
        tracker.advance(ids, offset, read.shape[1], given.get("attention_mask"))
        assert tracker.types is not None
        if given.get("pixel_values") is not None and not bool((tracker.types == IMAGE).any()):
            raise ValueError(
                f"{type(model).__name__} was given pixel_values, but token_types finds no image token in the prompt; "
                "TokenTypes(image=...) takes the id of the image placeholder, often model.config.image_token_id"
            )

    def _step(self, given: dict[str, Any], cache: Any, offset: int, read: Any) -> None:
        session, notes = self.session, self.session.notes
        count = read.shape[1] if isinstance(read, Tensor) else 0
        cached = hasattr(cache, "get_seq_length")
        length: int = notes.get("length", -1)
        if not offset:
            notes.pop("kept", None)
            if cached or length < 0 or not _continues(notes.get("read"), read):
                session.new_prompt(given)
                length = notes.get("prompt_length", count)
            if not cached:
                notes["read"] = read
        elif length < 0:
            session.new_prompt(given)
            length = notes.get("prompt_length", offset + count)
        elif "prompt_length" not in notes and count > 1 and offset == length == notes["total"]:
            length = offset + count  # the prompt is read in chunks
        notes["length"], notes["total"] = length, offset + count
        if session.branch is None:
            session.announce(max(0, offset + 1 - length if cached else count - length))


def _continues(before: Any, read: Any) -> bool:
    """Whether a call without cache reads what the last one read and more (beams may have changed places)."""
    if not isinstance(before, Tensor) or not isinstance(read, Tensor) or read.dim() != 2 or before.dim() != 2:
        return False
    if len(read) != len(before) or read.shape[1] <= before.shape[1]:
        return False
    return bool((read[:, None, : before.shape[1]] == before).all(-1).any(1).all())


def swap_sources(
    session: Session, stages: Stages, site: Callable[[Tensor], Site], to_k: nn.Module, to_v: nn.Module
) -> None:
    """Let ``on_context`` choose what the two projections read; whichever is called first asks."""
    waiting: dict[nn.Module, Tensor] = {}

    def before(projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if projection in waiting:
            return (waiting.pop(projection), *args[1:])
        source = args[0]
        k_source, v_source = source, source
        for i in stages["on_context"]:
            k_source, v_source = i.on_context(site(source), k_source, v_source)
        for name, new in (("k_source", k_source), ("v_source", v_source)):
            if new.shape[0] != source.shape[0] or new.shape[-1] != source.shape[-1]:
                raise ValueError(
                    f"on_context returned {name} of shape {tuple(new.shape)}, the model reads {tuple(source.shape)}"
                )
        waiting.clear()
        mine, other, partner = (k_source, v_source, to_v) if projection is to_k else (v_source, k_source, to_k)
        waiting[partner] = other
        return (mine, *args[1:])

    for projection in (to_k, to_v):
        session.hook(projection.register_forward_pre_hook(before))
    session.undo(waiting.clear)
