"""Another mixer between the projections of attention modules, in models that exist.

What an attention module does between its queries, keys and values, positions applied, and its output projection is
handed to a :class:`attnlib.nn.linear.heads.HeadMixer`. In transformers this stands where the module looks up its
kernel, and a layer of the cache holds the mixer's state while the model generates; in diffusers it stands where the
processor calls ``scaled_dot_product_attention``; of our own layers it takes the operator's place. The weights of the
model stay where they are, so that restoring is exact.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import check_type
from ..hooks.attach import _adapter
from ..hooks.hf.names import CONVERTED
from ..hooks.site import Site
from ..nn.linear.heads import HeadMixer, MixedHeads, softmax_map, softmax_mask
from ..ops import attention
from ..types import State

#: ``watch(q, k, v, valid, truth)``: what a mixer would have been given, and what the model's own attention made of it.
Watch = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor], None]

#: A mixer for the attention that a site describes.
Make = Callable[[Site], HeadMixer]


def _aliases(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are other ones' as well, and theirs: what is tied is saved once."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: own for name, p in named if (own := first.setdefault(id(p), name)) != name}


def _save_once(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in _aliases(module):
        state.pop(prefix + name, None)


def _load_once(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, own in _aliases(module).items():
        if prefix + own in state:
            state.setdefault(prefix + name, state[prefix + own])


class Socket(HeadMixer):
    """Where a mixer sits, and what acts: the mixer, or the model's own attention, perhaps watched.

    Args:
        inner: the mixer.
        name: what it was made as, and
        settings: with what; both are saved with the model.
        cross: keys are another sequence's.
        window: keys that the model's own attention reads at most; ``None`` for all.
    """

    def __init__(
        self, inner: HeadMixer, name: str | None = None, settings: dict[str, Any] | None = None, cross: bool = False,
        window: int | None = None,
    ):  # fmt: skip
        super().__init__(inner.num_heads, inner.head_dim, inner.num_kv_heads, inner.causal, inner.scale)
        self.inner = inner
        self.name, self.settings = name, dict(settings or {})
        self.cross, self.window = cross, window
        self.original, self.watch, self.listen = False, None, None
        self.layer: Any = None
        self.register_state_dict_post_hook(_save_once)
        self.register_load_state_dict_pre_hook(_load_once)

    watch: Watch | None
    #: ``listen(q, k, valid)``: told what the mixer itself is given.
    listen: Callable[[Tensor, Tensor, Tensor | None], None] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Socket:
        new = Socket(copy.deepcopy(self.inner, memo), self.name, copy.deepcopy(self.settings), self.cross, self.window)
        new.train(self.training)
        return new

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: State | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        if not self.original:
            if self.listen is not None:
                self.listen(q.detach(), k.detach(), valid)
            return self.inner(q, k, v, valid=valid, state=state, keep=keep)
        if state is not None or keep:
            raise ValueError("a teacher keeps no state here; call the model without a cache")
        mask = softmax_mask(self.causal, self.window)
        return self.seen(q, k, v, valid, attention(q, k, v, mask=mask, valid=valid, scale=self.scale)), None

    def rows(self, q: Tensor, valid: Tensor | None) -> Tensor:
        """(B, N) boolean: which queries exist, as far as ``valid``, which is of the keys, says so."""
        if valid is not None and not self.cross:
            return valid
        return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and weights of the model's own attention."""
        return softmax_map(q, k, v, self.scale, self.causal, valid, self.window)

    def seen(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, truth: Tensor) -> Tensor:
        """Tell whoever watches what the model's own attention made (B, H, N, D); returns it."""
        if self.watch is not None:
            self.watch(q.detach(), k.detach(), v.detach(), valid, truth.detach())
        return truth

    def weights(self, q: Tensor, k: Tensor, *, valid: Tensor | None = None) -> Tensor:
        return self.inner.weights(q, k, valid=valid)

    def trained(self) -> list[nn.Parameter]:
        return self.inner.trained()

    def own_losses(self, q: Tensor, k: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        return self.inner.own_losses(q, k, valid)

    @property
    def kernel(self) -> Callable[..., Any]:
        return attend_in_transformers


# --------------------------------------------------------------------------------------------------------------------
# Masks of models


def validity(
    mask: Tensor | None, n: int, start: int, causal: bool, where: str, cross: bool = False, window: int | None = None
) -> Tensor | None:
    """(B, n) boolean, which of the new keys exist, from a model's mask; ``None`` when all do.

    Args:
        mask: (B, M) boolean or integer, or (B or 1, 1 or H, N, M) boolean or added to scores.
        n: new tokens.
        start: keys before them.
        causal: the model's order.
        where: for errors.
        cross: the queries are another sequence's.
        window: keys that the layer reads at most.

    Raises:
        ValueError: the mask says more than which tokens exist.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        valid = mask[:, -n:].bool()
        return None if bool(valid.all()) else valid
    allowed = mask
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        if bool((mask.masked_fill(~allowed, 0) != 0).any()):
            raise ValueError(f"{where}: the model adds a bias to its scores; a converted layer has no scores")
    new = allowed[:, :, :, start : start + n]
    whole = new.shape[2] == n and not cross
    # In a window the last query does not see all keys, but every token that exists sees itself.
    valid = new[:, 0].diagonal(dim1=-2, dim2=-1) if whole and window is not None else new[:, 0, -1]
    order = torch.ones(n, n, dtype=torch.bool, device=mask.device)
    order = order.tril() if causal else order
    expected = (order if window is None else order.triu(1 - window)) & valid[:, None, None]
    # What a token reads that does not exist itself says nothing.
    agrees = (new == expected) | ~valid[:, None, :, None] if whole else new == valid[:, None, None]
    if not bool(agrees.all()):
        raise ValueError(
            f"{where}: the mask hides more than {'later tokens and ' if causal else ''}padding (a window, packed "
            "documents, a prefix); a converted layer cannot follow it"
        )
    return None if bool(valid.all()) else valid


# --------------------------------------------------------------------------------------------------------------------
# transformers


def attend_in_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function of a converted module."""
    from ..hooks.hf.names import BIAS, CHOOSES, SINKS, implementation_of, plain_kernel_of

    socket: Socket = getattr(module, CONVERTED)
    where = f"{type(module).__name__} {getattr(module, 'layer_idx', '')}".rstrip()
    for name in (BIAS, "softcap", "sliding_window", *SINKS, *CHOOSES):
        own = socket.window if name == "sliding_window" else None
        if kwargs.get(name) is not None and kwargs[name] != own:
            raise ValueError(f"{where}: its attention is given {name}, which a converted layer does not have")
    layer, socket.layer = socket.layer, None
    n = key.shape[2] if socket.cross else query.shape[2]
    seen = 0 if layer is None else layer.seen
    valid = validity(attention_mask, n, seen, socket.causal, where, socket.cross, socket.window)
    if socket.original:
        if layer is not None:
            raise ValueError(f"{where}: a teacher keeps no state here; call the model with use_cache=False")
        kernel = plain_kernel_of(module, implementation_of(module))
        out, weights = kernel(module, query, key, value, attention_mask, *args, **kwargs)
        socket.seen(query, key, value, valid, out.transpose(1, 2))
        return out, weights
    if valid is not None and valid.shape[0] != query.shape[0]:
        valid = valid.expand(query.shape[0], -1)
    state = None if layer is None else layer.state
    mixed, new = socket(query, key, value, valid=valid, state=state, keep=layer is not None)
    if layer is not None:
        layer.advance(new, n)
    return mixed.transpose(1, 2).contiguous(), None


def _find_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a converted module runs: the layer of the cache that holds its state."""
    from ..hooks.hf.names import cache_in, parameters_of
    from ..hooks.hf.state import passing_layer

    socket: Socket = getattr(module, CONVERTED)
    if socket.cross:  # keys and values lie in the model's own cache, or are made anew
        socket.layer = None
        return
    cache = cache_in({**dict(zip(parameters_of(module), args, strict=False)), **kwargs})
    index: Any = getattr(module, "layer_idx", None)
    socket.layer = None
    if cache is not None and index is not None:
        socket.layer = passing_layer(cache, index, f"{type(module).__name__} {index}")


@functools.cache
def _named(implementation: str) -> str:
    """The name under which a converted module finds :func:`attend_in_transformers`, with the model's masks."""
    from ..hooks.hf.names import PREFIX, _need

    hf = _need()
    name = f"{PREFIX}converted_{implementation}"
    hf.attention.register(name, attend_in_transformers)
    if implementation in hf.masks:
        hf.mask_interface.register(name, hf.masks[implementation])
    return name


def _put_in_transformers(site: Site, socket: Socket) -> Callable[[], None]:
    from ..hooks.hf.names import seen_through

    module: Any = site.module
    before = module.config
    module.config = seen_through(before, _named)
    setattr(module, CONVERTED, socket)
    handle = module.register_forward_pre_hook(_find_cache, with_kwargs=True)

    def take() -> None:
        handle.remove()
        delattr(module, CONVERTED)
        module.config = before

    return take


def window_of(site: Site) -> int | None:
    """Keys that a layer with a sliding window reads at most; ``None`` for other layers."""
    module: Any = site.module
    config = getattr(module, "config", None)
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:  # Mistral and its kin hand on what their configuration says, to all layers or to some
        kinds = getattr(config, "layer_types", None)
        some = kinds is not None and kinds[site.layer % len(kinds)] != "sliding_attention"
        window = None if some or site.kind != "self" else getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _slides(site: Site) -> str:
    return f"it reads a sliding window of {window_of(site)} tokens only, which nothing but a window can stand for"


def _why_not_in_transformers(site: Site) -> str | None:
    from ..hooks.hf.names import makes_bias, shares_keys

    module: Any = site.module
    if hasattr(module, CONVERTED):
        return "it was converted already"
    if window_of(site) is not None:
        return _slides(site)
    if getattr(module, "is_sliding", False):
        return "it reads a sliding window, how long is not known"
    if makes_bias(module) or getattr(module, "has_relative_attention_bias", False):
        return "it adds a bias of positions to its scores"
    return shares_keys(module)


def _as_transformers_say(site: Site) -> Site:
    module: Any = site.module
    width = site.head_dim or getattr(module, "attention_head_size", 0) or module.config.hidden_size // site.heads
    scale = getattr(module, "scaling", None)
    return replace(site, head_dim=width, scale=width**-0.5 if scale is None else float(scale))


# --------------------------------------------------------------------------------------------------------------------
# diffusers


class _Redirect(TorchFunctionMode):
    """The one call of ``scaled_dot_product_attention`` in a processor goes to a mixer."""

    def __init__(self, socket: Socket, where: str):
        super().__init__()
        self.socket, self.where, self.used = socket, where, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        known = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
        call = {**known, **(kwargs or {})}
        q, k, v = call["query"], call["key"], call["value"]
        self.used += 1
        valid = validity(call.get("attn_mask"), k.shape[2], 0, self.socket.causal, self.where, self.socket.cross)
        if self.socket.original:
            return self.socket.seen(q, k, v, valid, func(*args, **(kwargs or {})))
        return self.socket(q, k, v, valid=valid)[0].to(q.dtype)


@functools.cache
def _mixing(cls: Any) -> Any:
    """A subclass of a processor's class that mixes as its module's socket says."""

    @functools.wraps(cls.__call__)
    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        socket = getattr(attn, CONVERTED, None)
        if socket is None:
            return cls.__call__(self, attn, *args, **kwargs)
        with _Redirect(socket, type(attn).__name__) as mode:
            out = cls.__call__(self, attn, *args, **kwargs)
        if not mode.used:
            raise RuntimeError(f"{cls.__name__} bypasses scaled_dot_product_attention, so it cannot be converted")
        return out

    return type(f"Converted{cls.__name__}", (cls,), {"__call__": call, "plain": cls})


def _put_in_diffusers(site: Site, socket: Socket) -> Callable[[], None]:
    module: Any = site.module
    before = module.processor
    mixing: Any = object.__new__(_mixing(before.__class__))
    object.__setattr__(mixing, "__dict__", before.__dict__)
    place = module._modules if isinstance(before, nn.Module) else module.__dict__
    setattr(module, CONVERTED, socket)
    place["processor"] = mixing

    def take() -> None:
        place["processor"] = before
        delattr(module, CONVERTED)

    return take


def _why_not_in_diffusers(site: Site) -> str | None:
    return "it was converted already" if hasattr(site.module, CONVERTED) else None


def _as_diffusers_say(site: Site) -> Site:
    module: Any = site.module
    width = site.head_dim or getattr(module, "inner_dim", 0) // site.heads
    scale = getattr(module, "scale", None)
    return replace(site, head_dim=width, scale=width**-0.5 if scale is None else float(scale))


# --------------------------------------------------------------------------------------------------------------------
# Our own layers


@functools.cache
def _mixed(cls: Any) -> Any:
    return type(f"Converted{cls.__name__}", (MixedHeads, cls), {"__module__": cls.__module__})


def _put_in_ours(model: nn.Module, site: Site, socket: Socket) -> Callable[[], None]:
    module: Any = site.module
    new: Any = object.__new__(_mixed(module.__class__))
    containers = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    new.__dict__.update(module.__dict__, **{name: module.__dict__[name].copy() for name in containers})
    new.attention_transfer = False
    new.heads = socket
    owner, _, last = site.name.rpartition(".")
    place = model.get_submodule(owner)._modules
    place[last] = new

    def take() -> None:
        place[last] = module

    return take


def _why_not_in_ours(site: Site) -> str | None:
    from ..hooks.modules.native import _softmax

    module: Any = site.module
    if isinstance(module, MixedHeads):
        return "it was converted already"
    if not _softmax(module):
        return f"{type(module).__name__} is not softmax attention"
    return "it adds a bias of positions to its scores" if module.biased else None


# --------------------------------------------------------------------------------------------------------------------


def _family(model: nn.Module) -> tuple[Any, Callable[[Site], str | None], Callable[[Site], Site], Callable[..., Any]]:
    """Sites of a model; why one cannot be converted; what it is; how it is done."""
    adapter = _adapter(model)
    if adapter.name == "transformers":
        return adapter, _why_not_in_transformers, _as_transformers_say, _put_in_transformers
    if adapter.name == "diffusers":
        return adapter, _why_not_in_diffusers, _as_diffusers_say, _put_in_diffusers
    return (
        adapter, _why_not_in_ours, lambda site: replace(site, scale=float(site.module.scale)),  # type: ignore[arg-type]
        functools.partial(_put_in_ours, model),
    )  # fmt: skip


def is_causal(site: Site) -> bool:
    """Whether an attention module reads no later tokens."""
    module: Any = site.module
    if site.kind != "self":
        return False
    own = getattr(module, "is_causal", None)
    return bool(getattr(module, "causal", False) if own is None else own)


def convertible(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Sites whose attention a mixer can take over, heads and widths filled in; and why each other cannot be.

    >>> import attnlib
    >>> from attnlib.models.tiny import TinyBackbone
    >>> model = TinyBackbone(16, 2, lambda: attnlib.create("softmax-attention", dim=16, num_heads=2))
    >>> [site.name for site in convertible(model)[0]]
    ['blocks.0.mixer', 'blocks.1.mixer']
    """
    adapter, why_not, describe, _ = _family(model)
    sites, reasons = [], {}
    for site in adapter.sites(model, None):
        reason = why_not(site)
        if reason is None:
            sites.append(describe(site))
        else:
            reasons[site.name] = reason
    return sites, reasons


class Swap:
    """Mixers in a model, by :func:`swap`.

    Attributes:
        sites: where they are.
        sockets: by the path of the attention module.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.sites: list[Site] = []
        self.sockets: dict[str, Socket] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        return bool(self._undo)

    def restore(self) -> None:
        """The model as it was, bit for bit; its own weights were never touched."""
        while self._undo:
            self._undo.pop()()

    def __repr__(self) -> str:
        return f"Swap({len(self.sockets)} layers of {type(self.model).__name__})"


def _chosen(model: nn.Module, layers: Sequence[int | str] | None) -> list[Site]:
    sites, reasons = convertible(model)
    if layers is None:
        reasons |= {site.name: "it is cross attention, name it in layers" for site in sites if site.kind == "cross"}
        sites = [site for site in sites if site.kind != "cross"]
        if not sites:
            said = "; ".join(sorted({f"{name}: {why}" for name, why in list(reasons.items())[:4]}))
            raise ValueError(f"{type(model).__name__} has no layer that can be converted ({said})")
        if any(why == "it was converted already" for why in reasons.values()):
            raise ValueError(f"{type(model).__name__} was converted already; restore it first, or choose other layers")
        return sites
    found: list[Site] = []
    adapter, _, describe, _ = _family(model)
    windows = [describe(s) for s in adapter.sites(model, None) if reasons.get(s.name) == _slides(s)]
    # Numbers are those of layers that read their own sequence.
    sites = [*(s for s in sites if s.kind == "cross"), *(s for s in sites if s.kind != "cross"), *windows]
    known: dict[int | str, Site] = {site.layer: site for site in sites}
    known |= {site.name: site for site in sites}
    for layer in layers:
        if layer not in known:
            why = reasons.get(layer) if isinstance(layer, str) else None
            if why is None and "it was converted already" in reasons.values():
                why = "it was converted already, or there is none such"
            raise ValueError(
                f"layers holds {layer!r}, which cannot be converted: {why or 'there is none such'}; possible: "
                f"{[site.layer for site in sites]}"
            )
        found.append(known[layer])
    return found


def swap(model: nn.Module, make: Make, layers: Iterable[int | str] | None = None) -> Swap:
    """Put mixers into the attention modules of a model.

    Args:
        model: of transformers, of diffusers (the denoiser), or built of our softmax attention.
        make: gives the mixer for a site: ``site.heads``, ``site.kv_heads``, ``site.head_dim``, ``site.scale`` and
            :func:`is_causal` describe the attention. A :class:`Socket` keeps a name and settings with it.
        layers: numbers or paths of attention modules; by default all that read their own sequence, or a joint one,
            as a whole. Cross attention is converted by path, and so are layers with a sliding window, to windows that
            are no longer.

    Returns:
        :class:`Swap`, which gives the model back.

    Raises:
        ValueError: no such layer, none that can be converted, or one that was converted already.

    >>> import attnlib
    >>> from attnlib.models.tiny import TinyBackbone
    >>> from attnlib.nn.linear.hedgehog import HedgehogHeads
    >>> model = TinyBackbone(16, 2, lambda: attnlib.create("softmax-attention", dim=16, num_heads=2))
    >>> swapped = swap(model, lambda site: HedgehogHeads(site.heads, site.head_dim, causal=is_causal(site)))
    >>> swapped.restore()
    """
    check_type("model", model, nn.Module)
    sites = _chosen(model, None if layers is None else list(layers))
    _, _, _, put = _family(model)
    made = Swap(model)
    try:
        for site in sites:
            mixer = make(site)
            if not isinstance(mixer, HeadMixer):
                raise TypeError(f"make must give a HeadMixer, got {type(mixer).__name__} for {site.name}")
            like = next((p for p in site.module.parameters() if p.is_floating_point()), None)
            window = window_of(site)
            socket = mixer if isinstance(mixer, Socket) else Socket(mixer, None, None, site.kind == "cross", window)
            if window is not None and not 0 < (getattr(socket, "inner", socket).reach or 0) <= window:
                raise ValueError(
                    f"layer {site.layer} ({site.name}): {_slides(site)}; possible is 'window' with a window_size of at "
                    f"most {window}"
                )
            if like is not None:
                socket = socket.to(device=like.device, dtype=like.dtype)
            socket.train(site.module.training)
            made._undo.append(put(site, socket))
            made.sites.append(site)
            made.sockets[site.name] = socket
    except BaseException:
        made.restore()
        raise
    return made
