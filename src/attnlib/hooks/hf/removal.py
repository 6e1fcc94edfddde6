"""Taking tokens out of the sequence inside a transformers decoder.

The stage ``on_tokens`` answers, at the input of a block and while the prompt is read, which tokens go on. Everything
after follows: the blocks get shorter inputs, their rotary positions, position ids and masks are read at the tokens that
are left, and their cache layers hold only those, together with the slots of the sequence they came from. A cache layer
that is shorter still counts every token of the prompt, so that positions and masks while decoding are the true ones.

Samples may keep different numbers of tokens. Shorter rows are padded on the left with slot ``-1``: such a token is
masked everywhere, as padding of the prompt is.

An intervention with ``compact_positions = True`` asks for contiguous positions instead: the tokens that are left count
0, 1, 2, ... as if the prompt had been shorter, and decoding goes on from there.

After the last block the tokens that left are put back where they stood, with the state in which they left, so that the
model returns as many states (and logits) as it was given tokens. Those of removed tokens mean nothing: a loss whose
labels ask for the prediction at one of them raises.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import block_of
from ..choose import take
from ..intervention import Intervention
from ..recompute import Shared, refuse_reentrant
from ..session import Session
from ..site import Site, read_mask
from .cache import Kept, decode_mask, evicted_layer_class, fill, mask_unwritten
from .layer import LayerRuntime, _runtimes, intercept
from .names import (
    ANGLES,
    BETWEEN_BLOCKS,
    OWN_INPUTS,
    PER_TOKEN,
    READABLE,
    _need,
    cache_in,
    hooks_are_recomputed,
    image_features_between,
    implementation_of,
    rotary_of,
    tokens_before,
)

#: Under this name a cache layer carries by how much the positions of its sample moved.
SHIFT = "position_shift"


@dataclass(frozen=True, eq=False)
class Lengths:
    """What one reading of a prompt ran on.

    Args:
        total: N, tokens of the prompt, padding included.
        layers: numbers of the blocks, in order.
        lengths: tokens that each block ran on, padding included.
        tokens: (L, B) tokens of each sample that existed in each block.
        slots: slots (B, K) in each block, ``None`` where nothing was removed yet.
    """

    total: int
    layers: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor
    slots: tuple[Tensor | None, ...]


class _Memory(dict[str, Tensor]):
    """What a cache layer carries: tokens that are taken back change all of it but how far positions moved."""

    def clear(self) -> None:
        moved = self[SHIFT]
        super().clear()
        self[SHIFT] = moved


def prompt_mask(mask: Any, slots: Tensor, ragged: bool, causal: bool) -> Tensor | None:
    """The mask of a prompt among the tokens that are left.

    Args:
        mask: (B or 1, 1 or H, N, M) as the model made it, or ``None`` where it needs none.
        slots: (B, K), -1 for padding.
        ragged: there is padding in ``slots``.
        causal: what ``None`` means.

    Returns:
        (B, 1 or H, K, K), or ``None``.
    """
    if mask is None:
        if not ragged:
            return None
        alive = slots >= 0
        allowed = alive[:, None] & alive[:, :, None]
        if causal:
            allowed = allowed & (slots[:, None] <= slots[:, :, None])
        return allowed[:, None]
    batch, count = slots.shape
    picked = mask.expand(batch, -1, -1, -1)
    heads, keys = picked.shape[1], picked.shape[3]
    index = slots.clamp(min=0)
    picked = picked.gather(2, index[:, None, :, None].expand(batch, heads, count, keys))
    picked = picked.gather(3, index[:, None, None].expand(batch, heads, count, count))
    return fill(picked, (slots < 0)[:, None, None] | (slots < 0)[:, None, :, None]) if ragged else picked


class _Prompt:
    """What is left of the prompt that is being read."""

    def __init__(self, total: int):
        self.total = total
        self.slots: Tensor | None = None  # (B, K), None as long as all tokens are there
        self.ragged = False
        self.ids: Tensor | None = None  # (B, K) contiguous positions, where somebody asked for them
        self.frozen: Tensor | None = None  # (B, N, C) states of the tokens that left
        self.lengths: dict[int, int] = {}
        self.tokens: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor | None] = {}
        self.existing: Tensor | None = None  # (B, N) boolean, no padding of the prompt
        self.moved: Tensor | None = None  # (B, 1) by how much later positions go back
        self.capacity: dict[int, int] = {}  # of static cache layers
        self._masks: list[tuple[Any, Tensor, Tensor | None]] = []

    def all_slots(self, batch: int, device: torch.device) -> Tensor:
        if self.slots is not None:
            return self.slots
        return torch.arange(self.total, device=device).expand(batch, -1)

    def leave(self, hidden: Tensor, index: Tensor, compact: bool) -> None:
        """Only the tokens ``index`` (B, K) of the current ones go on; ``hidden`` are the states of all current ones."""
        self.frozen = self.restored(hidden)
        slots = self.all_slots(hidden.shape[0], hidden.device)
        self.slots = slots.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        self.ragged = bool((index < 0).any())
        if compact:
            # Counted among the tokens that exist, as a shorter prompt would be.
            assert self.existing is not None
            alive = (self.slots >= 0) & self.existing.gather(1, self.slots.clamp(min=0))
            self.ids = (alive.cumsum(1) - 1).clamp(min=0)
        elif self.ids is not None:
            self.ids = self.ids.gather(1, index.clamp(min=0))

    def restored(self, hidden: Tensor) -> Tensor:
        """(B, N, C): the current states at their slots, those that left elsewhere."""
        if self.slots is None or self.frozen is None:
            return hidden
        where = self.slots.new_full((hidden.shape[0], self.total + 1), -1)
        count = torch.arange(self.slots.shape[1], device=hidden.device).expand_as(self.slots)
        # Padding writes into a column of its own, which is cut off.
        where = where.scatter(1, self.slots.masked_fill(self.slots < 0, self.total), count)[:, : self.total]
        back = hidden.gather(1, where.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return torch.where((where >= 0).unsqueeze(-1), back, self.frozen)

    def gone(self) -> Tensor:
        """(B, N) boolean: tokens that left."""
        assert self.slots is not None
        here = torch.zeros(self.slots.shape[0], self.total + 1, dtype=torch.bool, device=self.slots.device)
        here.scatter_(1, self.slots.masked_fill(self.slots < 0, self.total), True)
        return ~here[:, : self.total]

    def whole_from(self) -> int:
        """The slot from which on nothing is missing."""
        place = torch.arange(1, self.total + 1, device=None if self.slots is None else self.slots.device)
        return int((self.gone() * place).max())

    def mask(self, given: Any, causal: bool) -> Tensor | None:
        """The model's mask at the tokens that are left; made once for all blocks that share it."""
        assert self.slots is not None
        for mask, slots, made in self._masks:
            if mask is given and slots is self.slots:
                return made
        made = prompt_mask(given, self.slots, self.ragged, causal)
        self._masks.append((given, self.slots, made))
        return made

    def position_ids(self, original: Any) -> Any:
        """Of the tokens that are left, when the model gave ``original`` for all."""
        assert self.slots is not None
        if self.ids is not None:
            return self.ids
        return take(original, self.slots, original.dim() - 1) if isinstance(original, Tensor) else original


def install(session: Session, runtimes: Sequence[LayerRuntime]) -> None:
    """For the adapter: serve ``on_tokens`` of all attached layers of a session."""
    Removal(session, runtimes).install()


class Removal(Shared):
    """Serves ``on_tokens`` for one session.

    Args:
        session: the session, with all its sites.
        runtimes: attached layers.
    """

    def __init__(self, session: Session, runtimes: Sequence[LayerRuntime]):
        self.session = session
        self.runtimes = {runtime.site.name: runtime for runtime in runtimes}
        self.sites = [s for s in session.sites if s.kind == "self"]
        self.behind: list[Site] = []
        self.prompt: _Prompt | None = None
        self.rotary: Any = None
        self.beside: list[str] = []
        self.beside_until = 0
        self.interventions = session.acting("on_tokens")

    # ---- attaching

    def install(self) -> None:
        """Hook the blocks from the first removal on, the decoder around them, and the model for its labels."""
        session = self.session
        acting = [n for n, s in enumerate(self.sites) if self._stage(s)]
        if not acting:
            return
        behind = self.sites[acting[0] :]
        self.behind = behind
        self._check_implementation()
        for site in behind:
            self._intercept(site)
        blocks = [block_of(session.model, site) for site in self.sites]
        decoder = self._decoder(blocks)
        self.rotary = rotary_of(decoder)
        session.hook(decoder.register_forward_pre_hook(self._start, with_kwargs=True))
        for site, block in zip(behind, blocks[acting[0] :], strict=True):
            # Reading a prompt, stages that look at the input of a block see the tokens that are left; while decoding
            # they still see the mask of all slots, and read it at the slots of the keys by themselves.
            read = functools.partial(self._read, site)
            session.hook(block.register_forward_pre_hook(read, with_kwargs=True, prepend=True))
            session.hook(block.register_forward_hook(functools.partial(self._store, site), with_kwargs=True))
        for site, block in zip(self.sites, blocks, strict=True):
            decode = functools.partial(self._decode, site)
            session.hook(block.register_forward_pre_hook(decode, with_kwargs=True))
        session.hook(blocks[-1].register_forward_hook(self._finish))
        session.hook(session.model.register_forward_hook(self._check_labels, with_kwargs=True))
        session.undo(self._forget)
        session.stateful.append(self)

    def _check_implementation(self) -> None:
        for site in self.behind:
            implementation = implementation_of(site.module)
            if implementation not in READABLE:
                raise ValueError(
                    f"layer {site.layer} ({site.name}): tokens cannot be removed under "
                    f"attn_implementation={implementation!r}, whose masks cannot be read at the tokens that are left; "
                    f"load the model with one of {list(READABLE)}"
                )

    def _intercept(self, site: Site) -> None:
        """A layer with a stage around the whole module describes the mask of all slots; its kernel needs the mask of
        the keys that are left, which the adapter makes inside the attention call only."""
        runtime = self.runtimes.get(site.name)
        if runtime is None or runtime.stages.in_attention or not runtime.stages["around_sublayer"]:
            return
        intercept(self.session, runtime)

    def _forget(self) -> None:
        self.prompt = None

    def _stage(self, site: Site) -> list[Intervention]:
        runtime = self.runtimes.get(site.name)
        return [] if runtime is None else runtime.stages["on_tokens"]

    def _decoder(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """The module that runs the blocks."""
        model = self.session.model
        for name, module in model.named_modules():
            children = list(module.children())
            if children and all(any(block is child for child in children) for block in blocks):
                return model.get_submodule(name.rpartition(".")[0])
        raise ValueError(
            f"the blocks of {type(model).__name__} are not one list, so tokens cannot be removed between them"
        )

    # ---- reading a prompt

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.prompt = None
        self._check_implementation()
        self.session.notes.kept.clear()
        self.beside = _per_token(kwargs)
        added = image_features_between(kwargs)
        self.beside_until = added if set(self.beside) <= set(BETWEEN_BLOCKS) else len(self.sites)

    def _read(self, site: Site, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise ValueError(f"{_where(site)}: the input of its block is not passed as hidden_states")
        if len(args) > 1:
            raise ValueError(
                f"{_where(site)}: its block gets more than the hidden states by position, so mask and positions cannot "
                "be told apart"
            )
        cache = cache_in(kwargs)
        if self._seen(cache, site):
            return None
        if hooks_are_recomputed():
            refuse_reentrant("removing tokens", "what is left of the prompt")
        if self.prompt is None:
            length = self.session.notes.prompt_length or 0
            if length > hidden.shape[1]:
                raise ValueError(
                    f"{_where(site)}: tokens are removed from a prompt that is read as a whole, but of this one "
                    f"{hidden.shape[1]} of {length} tokens were read; leave prefill_chunk_size out"
                )
            self.prompt = _Prompt(hidden.shape[1])
            self.prompt.existing = _existing(kwargs.get("attention_mask"), hidden)
        prompt, before, states = self.prompt, kwargs, hidden
        kwargs = self._shorten(site, hidden, before)
        for i in self._stage(site):
            answer = i.on_tokens(self._describe(site, states, kwargs), states)
            if answer is None:
                continue
            new, index = self._check(i, site, states, answer)
            if self.beside and site.layer < self.beside_until:
                first = f", from layer {self.beside_until} on it can" if self.beside_until < len(self.sites) else ""
                raise ValueError(
                    f"{_where(site)}: {type(i).__name__} cannot remove tokens here: the decoder is given {self.beside} "
                    f"for all tokens, and uses it between later blocks{first}"
                )
            prompt.leave(states, index, bool(getattr(i, "compact_positions", False)))
            states = new
            kwargs = self._shorten(site, states, before)
        self._count(site, states)
        if prompt.slots is None:
            return None
        if cache is not None:
            self._make_room(cache, site)
        if states is hidden:
            return args, kwargs
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def _seen(self, cache: Any, site: Site) -> int:
        """Tokens that were cached before this call."""
        hf = _need()
        if cache is None:
            return 0
        if not isinstance(cache, hf.cache.Cache):
            raise ValueError(
                f"{_where(site)}: tokens cannot be removed with a {type(cache).__name__}; possible: a dynamic or "
                "static cache, or none"
            )
        return tokens_before(cache, site.layer)

    def _make_room(self, cache: Any, site: Site) -> None:
        """A cache layer that takes the keys of what is left, whatever their number."""
        hf, prompt = _need(), self.prompt
        assert prompt is not None
        while len(cache.layers) <= site.layer and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[site.layer]
        if type(layer) not in (hf.cache.DynamicLayer, hf.cache.StaticLayer):
            raise ValueError(
                f"{_where(site)}: tokens were removed before it, but its cache is a {type(layer).__name__}; possible: "
                "full attention with a dynamic or static cache"
            )
        if type(layer) is hf.cache.StaticLayer:
            # It would hand out all its slots, written or not, and the mask is made for what is left.
            prompt.capacity[site.layer] = layer.max_cache_len
            cache.layers[site.layer] = hf.cache.DynamicLayer()

    def _store(self, site: Site, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After a block has read its part of a prompt: its cache layer knows the slots and counts every token."""
        prompt, cache = self.prompt, cache_in(kwargs)
        if prompt is None or prompt.slots is None or cache is None or site.layer not in prompt.lengths:
            return
        layer, evicted = cache.layers[site.layer], evicted_layer_class()
        if not layer.get_seq_length():
            return
        capacity = prompt.capacity.get(site.layer, -1)
        if isinstance(layer, evicted):
            layer.capacity = capacity
        else:
            slots = prompt.slots[:, None].expand(-1, layer.keys.shape[1], -1)
            layer = evicted(self.session, layer.keys, layer.values, slots, prompt.total, capacity)
            # Drafted tokens at the end of a prompt may be taken back, up to the last token that left.
            layer.evicted_from = prompt.whole_from()
            layer.shared = True
            cache.layers[site.layer] = layer
        if prompt.moved is not None:
            layer.memory = _Memory({**layer.memory, SHIFT: prompt.moved})

    def _shorten(self, site: Site, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a block, made by the model for all tokens, for those that are left."""
        prompt = self.prompt
        assert prompt is not None
        if prompt.slots is None:
            return kwargs
        self.session.notes.kept[site.layer] = Kept(prompt.slots, prompt.total)
        new = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise ValueError(
                f"{_where(site)}: its mask is a {type(mask).__name__}, which cannot be read at the tokens that are left"
            )
        causal = bool(getattr(site.module, "is_causal", True)) and implementation_of(site.module) == "sdpa"
        new["attention_mask"] = prompt.mask(mask, causal)
        ids = prompt.position_ids(kwargs.get("position_ids"))
        if "position_ids" in kwargs or prompt.ids is not None:
            new["position_ids"] = ids
        if prompt.ids is not None:
            original = kwargs.get("position_ids")
            if not isinstance(original, Tensor) or original.dim() != 2 or ids is None:
                raise ValueError(
                    f"{_where(site)}: contiguous positions need position_ids (B, N); keep the original ones"
                )
            prompt.moved = original[:, -1:] - ids[:, -1:]
        embeddings = kwargs.get(ANGLES)
        if isinstance(embeddings, tuple):
            if prompt.ids is not None:
                new[ANGLES] = self._rotate(site, hidden, ids)
            else:
                new[ANGLES] = tuple(take(t, prompt.slots, t.dim() - 2) for t in embeddings)
        elif embeddings is not None:
            raise ValueError(
                f"{_where(site)}: its rotary angles are a {type(embeddings).__name__}; removing tokens knows a "
                "tuple (cos, sin)"
            )
        return new

    def _rotate(self, site: Site, hidden: Tensor, position_ids: Any) -> Any:
        if self.rotary is None:
            raise ValueError(
                f"{_where(site)}: contiguous positions need a decoder that makes rotary angles, which this one does "
                "not; keep the original positions"
            )
        return self.rotary(hidden, position_ids)

    def _finish(self, block: nn.Module, args: Any, output: Any) -> Any:
        prompt = self.prompt
        if prompt is None:
            return None
        lengths = self._lengths(prompt)
        for i in self.interventions:
            told = getattr(i, "on_removed", None)
            if told is not None:
                told(lengths)
        if prompt.slots is None:
            return None
        if isinstance(output, tuple):
            return (prompt.restored(output[0]), *output[1:])
        return prompt.restored(output)

    def _check_labels(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        prompt, self.prompt = self.prompt, None
        labels = kwargs.get("labels")
        if labels is None and args:
            names = list(inspect.signature(model.forward).parameters)
            labels = dict(zip(names, args, strict=False)).get("labels")
        if prompt is None or prompt.slots is None or labels is None or labels.shape[1] != prompt.total:
            return
        gone = prompt.gone()
        asked = gone[:, :-1] & (labels[:, 1:] != -100).to(gone.device)
        if bool(asked.any()):
            row, slot = asked.nonzero()[0].tolist()
            raise ValueError(
                f"labels ask for the prediction at token {slot} of sample {row}, which was removed from the sequence; "
                "set labels of tokens that follow a removed one to -100"
            )

    # ---- decoding

    def _decode(self, site: Site, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = cache_in(kwargs)
        if not self._seen(cache, site):
            return None
        layer: Any = cache.layers[site.layer]  # type: ignore[union-attr]
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(layer, _need().cache.StaticLayer):
            mask = kwargs.get("attention_mask")
            return args, {**kwargs, "attention_mask": mask_unwritten(site, layer, hidden, mask)}
        evicted: Any = evicted_layer_class()
        if not isinstance(layer, evicted):
            return None
        n, new, slots = hidden.shape[1], dict(kwargs), layer.positions
        if SHIFT in layer.memory:
            ids = kwargs["position_ids"] - layer.memory[SHIFT].to(hidden.device)
            new["position_ids"], new[ANGLES] = ids, self._rotate(site, hidden, ids)
        runtime = self.runtimes.get(site.name)
        if runtime is None or site.module not in _runtimes:
            if getattr(layer, "shared", False):
                slots = slots[:, :1]
            fresh = torch.arange(layer.seen, layer.seen + n, device=slots.device)
            slots = torch.cat([slots, fresh.expand(*slots.shape[:2], n)], -1)
            given = kwargs.get("attention_mask")
            new["attention_mask"] = decode_mask(given, slots, n, layer.seen, site.heads, layer.padded)
        return args, new

    # ---- description

    def _describe(self, site: Site, hidden: Tensor, kwargs: dict[str, Any]) -> Site:
        """The tokens before a removal, queries and keys alike."""
        runtime = self.runtimes[site.name]
        return runtime.sublayer_site(runtime.look(kwargs), hidden, kwargs.get("attention_mask"))

    def _check(self, i: Intervention, site: Site, hidden: Tensor, answer: Any) -> tuple[Tensor, Tensor]:
        where = f"{type(i).__name__}.on_tokens at {_where(site)}"
        if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(t, Tensor) for t in answer)):
            raise TypeError(
                f"{where} must return None or (hidden (B, K, C), index (B, K)), got {type(answer).__name__}"
            )
        new, index = answer
        batch, n, width = hidden.shape
        if new.dim() != 3 or new.shape[0] != batch or new.shape[2] != width or index.shape != new.shape[:2]:
            raise ValueError(
                f"{where} returned hidden {tuple(new.shape)} and index {tuple(index.shape)}; for {tuple(hidden.shape)} "
                f"they must be ({batch}, K, {width}) and ({batch}, K)"
            )
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"{where}: index must be integers, got {index.dtype}")
        if not 1 <= index.shape[1] <= n:
            raise ValueError(f"{where} returned {index.shape[1]} tokens; between 1 and the current {n} can go on")
        index = index.to(torch.long)
        rising = (index[:, 1:] > index[:, :-1]) | ((index[:, 1:] < 0) & (index[:, :-1] < 0))
        if int(index.min()) < -1 or int(index.max()) >= n or not bool(rising.all()):
            raise ValueError(
                f"{where}: each row of index must ascend within 0 to {n - 1}, with -1 only on its left; got "
                f"{index.tolist()}"
            )
        if bool((index[:, -1] != n - 1).any()):
            raise ValueError(f"{where}: the last token of the prompt must go on, since it predicts the next one")
        prompt = self.prompt
        assert prompt is not None
        if prompt.slots is not None:
            padding = (prompt.slots < 0).gather(1, index.clamp(min=0)) & (index >= 0)
            if bool(padding.any()):
                raise ValueError(f"{where}: index names padding that stands for tokens removed before")
        return new, index

    def _count(self, site: Site, hidden: Tensor) -> None:
        prompt = self.prompt
        assert prompt is not None and prompt.existing is not None
        alive = prompt.existing
        if prompt.slots is not None:
            alive = alive.gather(1, prompt.slots.clamp(min=0)) & (prompt.slots >= 0)
        prompt.lengths[site.layer] = hidden.shape[1]
        prompt.tokens[site.layer] = alive.sum(1)
        prompt.kept[site.layer] = prompt.slots

    def _lengths(self, prompt: _Prompt) -> Lengths:
        assert prompt.existing is not None
        everything = prompt.existing.sum(1)
        layers = [s.layer for s in self.sites]
        return Lengths(
            total=prompt.total,
            layers=tuple(layers),
            lengths=tuple(prompt.lengths.get(n, prompt.total) for n in layers),
            tokens=torch.stack([prompt.tokens.get(n, everything) for n in layers]),
            slots=tuple(prompt.kept.get(n) for n in layers),
        )


def _per_token(given: dict[str, Any]) -> list[str]:
    """Names of what a decoder is given for each token beside states, masks and positions."""
    embeds, ids = given.get("inputs_embeds"), given.get("input_ids")
    read = embeds if isinstance(embeds, Tensor) else ids
    if not isinstance(read, Tensor):
        return []
    known = OWN_INPUTS.union(PER_TOKEN)
    return sorted(
        n for n, t in given.items() if n not in known and isinstance(t, Tensor) and t.shape[:2] == read.shape[:2]
    )


def _where(site: Site) -> str:
    return f"layer {site.layer} ({site.name})"


def _existing(mask: Any, hidden: Tensor) -> Tensor:
    """(B, N) boolean: tokens that some query may read; padding is read by nobody."""
    batch, n = hidden.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return torch.ones(batch, n, dtype=torch.bool, device=hidden.device)
    allowed, _ = read_mask(mask)
    return allowed[..., :n].any(-2).any(1).expand(batch, n)
