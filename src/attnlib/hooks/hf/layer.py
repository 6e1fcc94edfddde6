"""One attached attention layer of a transformers model."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import around
from ..call import WholeMap, only_map, run_attention
from ..eager import eagerly
from ..intervention import Intervention, Stages
from ..recompute import Shared
from ..session import Session
from ..site import PairMask, Site, read_mask, slots
from ..tokens import PAD
from .cache import (
    Kept,
    _DeferredCache,
    decode_mask,
    evicted_layer_class,
    present,
    snapshot,
    why_evict_alone,
    why_latent,
    why_not_evictable,
)
from .names import (
    BIAS,
    PREFIX,
    READABLE,
    _need,
    asks_for_weights,
    cache_in,
    cache_name,
    cache_parameter,
    gets_angles,
    holds_tokens,
    implementation_of,
    kernel_of,
    named_implementation,
    parameters_of,
    rotation_of,
    seen_through,
    shares_keys,
    tokens_before,
    told_its_layer,
    weighting_of,
)

_runtimes: weakref.WeakKeyDictionary[nn.Module, LayerRuntime] = weakref.WeakKeyDictionary()


def runtime_of(module: nn.Module) -> LayerRuntime | None:
    """What runs the stages of an attached module."""
    return _runtimes.get(module)


def _forget(module: nn.Module) -> None:
    _runtimes.pop(module, None)


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered function: through the stages of an attached layer, straight to the kernel elsewhere."""
    runtime = _runtimes.get(module)
    if runtime is None:
        return kernel_of(module, implementation_of(module))(module, query, key, value, attention_mask, *args, **kwargs)
    return runtime.run(query, key, value, attention_mask, args, kwargs)


def intercept(session: Session, runtime: LayerRuntime) -> None:
    """Let the attention of a module run through its stages, under whatever implementation its configuration names."""
    module = runtime.module
    session.set_attribute(module, "config", seen_through(module.config, register))
    _runtimes[module] = runtime
    session.undo(functools.partial(_forget, module), functools.partial(_runtimes.__setitem__, module, runtime))


@functools.cache
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


@functools.lru_cache(maxsize=16)
def _unmasked(n: int, m: int, causal: bool) -> PairMask:
    return PairMask(n, m, causal=causal)


@dataclass
class _Call:
    """What an attention module was called with."""

    cache: Any = None
    deferred: _DeferredCache | None = None
    offset: int = 0
    start: int | None = 0  # slot of the first key; None when it is not known
    kept: Kept | None = None
    before: Any = None  # the cache layer as it was before this call
    given: dict[str, Any] = field(default_factory=dict)  # what the module was given
    ran: bool = False

    again: bool = False  # the module runs once more in one call; what it writes is forgotten

    def seen(self, n: int) -> int:
        """Tokens of the sequence after this call read ``n``."""
        return self.offset + n if self.kept is None else self.kept.seen


def _joined(chunks: list[tuple[Site, Tensor]]) -> tuple[Site, Tensor]:
    """The site and the queries (B, H, N, D) of a prompt that was read in several calls, as of one."""
    last = chunks[-1][0]
    sites = [site for site, _ in chunks]
    q = torch.cat([part for _, part in chunks], 2)
    n, m = q.shape[2], last.n_keys
    allowed, biases = [], []
    for site in sites:
        assert site.mask is not None
        rows, bias = site.mask.rows(torch.arange(site.n_queries, device=q.device))
        if rows is None:
            rows = torch.ones(1, 1, site.n_queries, site.n_keys, dtype=torch.bool, device=q.device)
        rows = rows[..., :m].expand(q.shape[0], -1, -1, -1)
        allowed.append(torch.nn.functional.pad(rows, (0, m - rows.shape[-1])))
        if bias is not None:
            bias = bias[..., :m].expand(q.shape[0], -1, -1, -1)
            biases.append(torch.nn.functional.pad(bias, (0, m - bias.shape[-1])))
    bias = torch.cat(biases, 2) if len(biases) == len(sites) else None
    types = [site.q_types for site in sites if site.q_types is not None]
    whole = last.but(
        offset=0, n_queries=n, mask=PairMask(n, m, torch.cat(allowed, 2), bias), q_pos=slots(0, n, q.device),
        q_types=torch.cat(types, 1) if len(types) == len(sites) else None,
    )  # fmt: skip
    return whole, q


class LayerRuntime(Shared):
    """Stages of one attention module, and what is known about its current call."""

    def __init__(self, session: Session, site: Site, stages: Stages, kernel: Callable[..., Any], implementation: str):
        self.session, self.site, self.stages, self.kernel = session, site, stages, kernel
        self.implementation = implementation
        self._calls: list[_Call] = []
        self.module: Any = site.module
        self.names = parameters_of(self.module)
        cache_parameter(self.module)  # raises where a cache could not be followed
        if told_its_layer(self.module):
            raise ValueError(
                f"{self.where}: one {type(self.module).__name__} stands at several depths of this model, and a site is "
                "one layer; it cannot be acted on there"
            )
        shared = shares_keys(self.module)
        if shared is not None and stages["on_qkv"]:
            who = type(stages["on_qkv"][0]).__name__
            raise ValueError(f"{self.where}: {who} edits new keys (on_qkv), but {shared}; leave it out: layers=[...]")
        self.rotary = True if gets_angles(self.module) else None
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

        session = self.session

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not session.active:
                return forward(*args, **kwargs)  # a wrapper that the user put around it is left
            session.enter()
            given = {**dict(zip(self.names, args, strict=False)), **kwargs} if len(args) > 1 else kwargs
            call = self.look(given)
            call.given = given
            calls.append(call)
            try:
                if edits_new and call.cache is not None:
                    name = cache_name(kwargs)
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

        return eagerly(run)

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
                call.before = snapshot(call.cache.layers[self.site.layer])

            def innermost(x: Tensor) -> Tensor:
                new: dict[str, Any] = {first: x}
                if outputs and call.cache is not None:
                    held = cache_name(given)
                    assert held is not None, "the cache of the call was found by it"
                    new[held] = self._read_again(call)
                    mask, m = given.get("attention_mask"), call.offset + x.shape[1]
                    if type(call.before) is _need().cache.StaticLayer and isinstance(mask, Tensor):
                        new["attention_mask"] = mask[..., :m]  # only the slots that are written
                # What is passed by place stays there.
                placed = [new.pop(name, value) for name, value in zip(self.names, args, strict=False)]
                outputs.append(forward(*placed, **{**kwargs, **new}))
                return outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]

            site = self.sublayer_site(call, hidden, given.get("attention_mask"))
            chain: Callable[[Tensor], Tensor] = innermost
            for i in reversed(self.stages["around_sublayer"]):
                chain = functools.partial(around, i, site, chain)
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
        elif type(present(before)) is hf.cache.StaticLayer:
            again = hf.cache.DynamicLayer()
            again.lazy_initialization(before.keys, before.values)
            again.keys, again.values = before.keys[:, :, : call.offset], before.values[:, :, : call.offset]
        else:
            again = snapshot(before)
        cache = copy.copy(call.cache)
        cache.offloading = False  # the other layers stay where they are
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
            k_pos = torch.cat([layer.positions, new.expand(*layer.positions.shape[:2], n)], -1)
            mask = self._mask_of_kept(mask, k_pos, call, self.site.heads, n, layer.padded)
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
        given = {**dict(zip(parameters_of(block), args, strict=False)), **kwargs}
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise ValueError(f"{self.where}: the input of its block is not passed as hidden_states")
        return self.sublayer_site(self.look(given), hidden, given.get("attention_mask")), hidden

    def follow(self, implementation: str) -> None:
        """The user chose another implementation."""
        kernel = kernel_of(self.module, implementation)
        self.implementation, self.kernel = implementation, kernel
        if self.stages.reads_map and implementation not in READABLE:
            raise ValueError(self.pairs(None, 0, 0, False).opaque)

    # ---- description

    @property
    def where(self) -> str:
        return f"layer {self.site.layer} ({self.site.name})"

    def look(self, given: dict[str, Any]) -> _Call:
        """How many tokens came before, from the cache itself."""
        if self.implementation != (now := named_implementation(self.module.config)):
            self.follow(now)
        cache, hf = cache_in(given), _need()
        if isinstance(cache, hf.cache.EncoderDecoderCache):
            cache = cache.cross_attention_cache if self.site.kind == "cross" else cache.self_attention_cache
        if self.site.kind == "cross" or not isinstance(cache, hf.cache.Cache):
            return _Call(cache=None if self.site.kind == "cross" else cache, kept=self._kept())
        index = self.site.layer
        if self.stages.in_attention and index < len(cache.layers):
            layer = cache.layers[index]
            if isinstance(layer, evicted_layer_class()) and layer.session() is not self.session:
                layer.belong(self.session)  # filled in another session, or loaded
        offset = tokens_before(cache, index)
        return _Call(cache=cache, offset=offset, kept=None if offset else self._kept())

    def _kept(self) -> Kept | None:
        if self.site.kind == "cross":
            return None
        return self.session.notes.kept.get(self.site.layer)

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
            "phase": None if cross else "prefill" if self.session.notes.reading_prompt(call.offset) else "decode",
        }  # fmt: skip
        if shape is not None:
            fields.update(shape)
            if self.rotary:
                fields["rotation"] = rotation_of(self.module, call.given, q_pos)
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
        allowed, bias = read_mask(mask)
        return PairMask(n, m, allowed, bias)

    def pairs_of(self, mask: Any, n: int, m: int, kwargs: dict[str, Any]) -> PairMask:
        """The same with what else the arguments of a call say: whether it is causal, and a bias of positions."""
        is_causal = kwargs.get("is_causal")
        pair = self.pairs(mask, n, m, getattr(self.module, "is_causal", True) if is_causal is None else is_causal)
        added = kwargs.get(BIAS)
        if added is None:
            return pair
        bias = added[..., :m] if pair.bias is None else added[..., :m] + pair.bias
        return replace(pair, bias=bias.expand(*bias.shape[:2], n, m))

    def shape_of(self, q: Tensor, k: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Fields of a site from the tensors and arguments of a call."""
        heads, dim = q.shape[1], q.shape[3]
        scaling = kwargs.get("scaling", args[1] if len(args) > 1 else None)
        return dict(
            heads=heads,
            kv_heads=k.shape[1],
            head_dim=dim,
            scale=float(dim**-0.5 if scaling is None else scaling),
            rotary=self.rotary,
            weighting=weighting_of(self.module, self.implementation, kwargs, heads),
        )

    # ---- the call

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        call, stages = self.call, self.stages
        if call.ran and call.cache is not None and (stages["on_qkv"] or stages["on_cache"]):
            raise ValueError(
                f"{self.where}: {type(self.module).__name__} computes attention more than once per call, so what it "
                "caches cannot be edited (on_qkv, on_cache)"
            )
        call.ran = True
        batch, heads, n = q.shape[:3]
        shape = self.shape_of(q, k, args, kwargs)
        dropout = kwargs.get("dropout", args[0] if args else 0.0)
        if dropout and (stages.edits or stages["around_attention"]):
            raise ValueError(
                f"{self.where}: attention dropout {dropout} is active and would differ between the model's kernel and "
                "the "
                "edit; call model.eval()"
            )
        if stages["on_qkv"]:
            if call.deferred is not None and not call.deferred.hands_on(k, v):
                raise ValueError(
                    f"{self.where}: {type(self.module).__name__} makes what its attention reads from the keys and "
                    "values that it caches, so new ones cannot be edited before they are cached (on_qkv); use "
                    "on_kv_read, for all keys as they are read"
                )
            site = self.describe(call, batch, n, n, q.device, None, None, shape)
            for i in stages["on_qkv"]:
                q, k, v = i.on_qkv(site, q, k, v)
            if call.deferred is not None:
                k, v = call.deferred.store(k, v)
                makes_mask = isinstance(mask, Tensor) and not any(mask is value for value in call.given.values())
                if makes_mask and mask.shape[-1] < k.shape[2]:
                    raise ValueError(
                        f"{self.where}: {type(self.module).__name__} makes its mask from the keys and values that it "
                        "caches, so new ones cannot be edited before they are cached (on_qkv); use on_kv_read, for all "
                        "keys as they are read"
                    )

        layer = self._cache_layer(call)
        m = k.shape[2]
        k_pos = None
        if isinstance(layer, evicted_layer_class()):
            if kwargs.get(BIAS) is not None:
                bias = self._at_kept(kwargs[BIAS], layer.positions, batch, heads)
                kwargs = {**kwargs, BIAS: bias}
            if call.offset and self.prompt_only and n == 1 and mask is None and not layer.padded:
                return self.kernel(self.module, q, k, v, mask, *args, **kwargs)
            k_pos = layer.positions
            mask = self._mask_of_kept(mask, k_pos, call, heads, n, layer.padded)
        elif call.kept is not None:
            # A static cache holds slots that nothing was written to yet.
            left = torch.nn.functional.pad(call.kept.slots, (0, m - n), value=-1)
            k_pos = left[:, None].expand(-1, k.shape[1], -1)
        elif self.site.kind == "cross" or (layer is not None and not layer.is_sliding):
            call.start = 0
        elif isinstance(layer, _need().cache.StaticLayer):
            call.start = None  # a ring buffer
        else:
            # A layer without keys of its own may read those of a static cache, written or not.
            call.start = max(0, call.offset + n - m) if layer is None else call.offset + n - m
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > m:
            mask = mask[..., :m]
        if call.offset and self.prompt_only and not self.session.notes.reading_prompt(call.offset):
            return self.kernel(self.module, q, k, v, mask, *args, **kwargs)
        pair = self.pairs_of(mask, n, m, kwargs)
        site = self.describe(call, batch, n, m, q.device, pair, k_pos, shape)
        if isinstance(layer, evicted_layer_class()) and layer.memory:
            site = site.but(memory=layer.memory)

        own: list[Tensor | None] = []
        maps: list[WholeMap] = []
        plain: list[tuple[Tensor, Tensor]] = []

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, weights = self.kernel(self.module, q, k, v, mask, *args, **kwargs)
            own.append(weights)
            plain.append((out.transpose(1, 2), out))
            return plain[-1][0]

        out = run_attention(site, q, k, v, stages, kernel, random=bool(dropout), maps=maps)
        if stages["on_cache"]:
            self._evict(call, site, q, k, v, n, mask)
        weights = own[0] if len(own) == 1 else None
        if stages.edits or stages["around_attention"]:
            # Eager attention always gives its map; another one is made only where somebody takes it.
            gives = own[0] is not None if own else self.implementation == "eager"
            weights = only_map(site, maps, stages, own) if gives and asks_for_weights(self.module, kwargs) else None
        if len(plain) == 1 and plain[0][0] is out:
            return plain[0][1], weights
        return out.transpose(1, 2).contiguous(), weights

    def _cache_layer(self, call: _Call) -> Any:
        if call.cache is None or self.site.layer >= len(getattr(call.cache, "layers", ())):
            return None
        layer = call.cache.layers[self.site.layer]
        return layer if holds_tokens(layer) else None

    def _mask_of_kept(self, mask: Any, k_pos: Tensor, call: _Call, heads: int, n: int, padded: bool) -> Tensor | None:
        """The model's mask, made for all slots, at the slots that are left; one row of heads per query head."""
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1):
            raise ValueError(
                f"{self.where}: its cache lost keys, and masks of attn_implementation={self.implementation!r} cannot "
                f"be read at the keys that are left; load the model with one of {list(READABLE)}"
            )
        return decode_mask(mask, k_pos, n, call.offset, heads, padded)

    @staticmethod
    def _at_kept(bias: Tensor, k_pos: Tensor, batch: int, heads: int) -> Tensor:
        """A bias (B or 1, H, N, L) by slot, at the keys that are left."""
        at = k_pos.clamp(min=0).repeat_interleave(heads // k_pos.shape[1], 1)
        return bias.expand(batch, heads, -1, -1).gather(-1, at[:, :, None].expand(-1, -1, bias.shape[2], -1))

    def _evict(self, call: _Call, site: Site, q: Tensor, k: Tensor, v: Tensor, n: int, mask: Any) -> None:
        if call.again:
            return
        notes = self.session.notes
        reading = notes.reading_prompt(call.offset)
        asked = [i for i in self.stages["on_cache"] if reading or i.while_decoding]
        if not asked:
            return
        if reading:
            length, chunks = notes.prompt_length or 0, notes.chunks.setdefault(site.layer, [])
            if call.seen(n) < length:
                chunks.append((site, q.detach()))
                return
            if chunks:
                site, q = _joined([*chunks, (site, q)])
                chunks.clear()
        who = type(asked[0]).__name__
        if call.cache is None:
            raise ValueError(f"{who} evicts keys from the cache, but the model was called without one; use_cache=True")
        layer = self._cache_layer(call)
        evicted = isinstance(layer, evicted_layer_class())
        why = why_evict_alone(self.module) or why_not_evictable(layer) or why_latent(present(layer), k, v)
        if why is None and not evicted and isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] != 1:
            why = f"{type(self.module).__name__} makes a mask for each head from what its cache holds"
        if why is not None:
            raise ValueError(
                f"{who} cannot evict keys from layer {site.layer}: {why}. Leave the layer out with layers=[...]"
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
        removed = None if call.kept is None else self.session.notes.kept.get(number)
        again = isinstance(layer, evicted)
        static = isinstance(layer, _need().cache.StaticLayer)
        seen = int(layer.get_seq_length())
        present(layer)
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
        if getattr(cache, "offloading", False):
            new.offload()  # as its cache does with every layer that was read

    def _check_kept(self, intervention: Intervention, kept: Tensor, k: Tensor) -> None:
        if kept.dim() != 3 or kept.shape[:2] != k.shape[:2] or kept.shape[2] == 0:
            raise ValueError(
                f"{type(intervention).__name__}.on_cache must return indices (B, Hk, K) with batch and heads "
                f"{tuple(k.shape[:2])}, got {tuple(kept.shape)}"
            )
