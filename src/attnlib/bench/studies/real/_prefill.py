"""A prompt that was read once, and the caches that different techniques would have kept of it.

Eviction after the prompt changes nothing of the prompt's own pass, so one pass serves every technique: the queries,
keys and values of all layers are recorded, each technique chooses from them as it would have under
:func:`attnlib.attach`, and the chosen keys are read by the untouched model. A test holds this to ``attach``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....cache import KVCompression
from ....cache.scorers import CacheView, Scorer
from ....hooks import Intervention, PairMask, Site, attach
from ....hooks.hf.names import cache_argument, rotary_of
from ...converting import needs_head

#: What a technique keeps of each layer: (1, Hk, K) indices, ``None`` for everything.
Kept = list[Tensor | None]


@dataclass(frozen=True)
class Layer:
    """What one layer saw: queries (1, H, N, D), keys and values (1, Hk, N, D), and the inputs of its attention."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    angles: tuple[Tensor, Tensor]


class _Recorder(Intervention):
    name = "recorder"

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Site, Tensor, Tensor, Tensor]] = {}

    def on_qkv(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen[site.layer] = (site, q, k, v)
        return q, k, v


class OnceScored(Scorer):
    """A scorer that scores a layer of a prompt once, for budgets of several ratios."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.queries, self.protected, self.reads_weights = scorer.queries, scorer.protected, scorer.reads_weights
        self._known: dict[int, Tensor] = {}

    def forget(self) -> None:
        self._known.clear()

    def wants(self, site: Site) -> bool:
        return self.scorer.wants(site)

    def prepare(self, model: Any, sites: Sequence[Site]) -> None:
        self.scorer.prepare(model, sites)

    def score(self, view: CacheView) -> Tensor:
        layer = view.site.layer
        if layer not in self._known:
            self._known[layer] = self.scorer.score(view)
        return self._known[layer]


class Press:
    """A class of kvpress, scoring what was recorded; it needs kvpress, installed or on the path, and no more of it."""

    def __init__(self, module: str, name: str, **settings: Any):
        from ...speed.cache import _kvpress

        found = kvpress_folder()
        if found is None:
            raise ImportError("kvpress is not installed")
        _kvpress(found)
        self.press = getattr(importlib.import_module(f"kvpress.presses.{module}"), name)(**settings)
        self._known: dict[int, Tensor] = {}

    def forget(self) -> None:
        self._known.clear()

    @torch.no_grad()
    def kept(self, prompt: Prompt, ratio: float) -> Kept:
        found: Kept = []
        rotary = rotary_of(prompt.reader.model.base_model)
        for layer in prompt.layers:
            number, module = layer.site.layer, layer.site.module
            if number not in self._known:
                module.__dict__["rotary_emb"] = rotary  # its presses look for it there
                given = {"position_embeddings": layer.angles}
                self._known[number] = self.press.score(module, layer.hidden, layer.k, layer.v, None, given)
                del module.__dict__["rotary_emb"]
            # As its ScorerPress.compress counts them.
            found.append(self._known[number].topk(int(layer.k.shape[2] * (1 - ratio)), dim=-1).indices)
        return found


def kvpress_folder() -> Path | None:
    """Where kvpress is, without importing it: its imports want a dozen packages, and change transformers."""
    loaded = sys.modules.get("kvpress")
    spec = None if loaded is not None else importlib.util.find_spec("kvpress")
    paths = loaded.__path__ if loaded is not None else () if spec is None else spec.submodule_search_locations or ()
    return next((Path(path).parent for path in paths), None)


def kvpress_version() -> str | None:
    try:
        return metadata.version("kvpress")
    except metadata.PackageNotFoundError:
        return None


class Reader:
    """A causal language model of transformers that reads prompts, each layer of which reads the whole past."""

    def __init__(self, model: Any):
        needs_head(model)
        self.model = model
        self.limit = int(getattr(model.config, "max_position_embeddings", 1 << 30))

    def check(self, tokens: int) -> None:
        if tokens > self.limit:
            raise ValueError(f"the prompt has {tokens} tokens, more than the {self.limit} that the model can read")

    def _run(self, ids: Tensor, cache: Any, start: int, last: int) -> tuple[Tensor, dict[int, Any]]:
        recorder, inputs, handles = _Recorder(), {}, []

        def look(layer: int) -> Any:
            def hook(module: Any, args: Any, given: dict[str, Any]) -> None:
                hidden = given["hidden_states"] if "hidden_states" in given else args[0]
                inputs[layer] = (hidden, given.get("position_embeddings"))

            return hook

        with attach(self.model, recorder) as session:
            for site in session.sites:
                handles.append(site.module.register_forward_pre_hook(look(site.layer), with_kwargs=True))
            try:
                where = torch.arange(start, start + ids.shape[1])[None]
                out = self.model(ids, **cache_argument(self.model, cache), position_ids=where, logits_to_keep=last)
            finally:
                for handle in handles:
                    handle.remove()
        seen = {n: (*recorder.seen[n], *inputs[n]) for n in sorted(recorder.seen)}
        return out.logits, seen

    @torch.no_grad()
    def read(self, ids: Tensor) -> Prompt:
        """Read a prompt (1, N).

        Raises:
            ValueError: a prompt longer than the model's context.
        """
        from transformers import DynamicCache

        self.check(ids.shape[1])
        logits, seen = self._run(ids, DynamicCache(config=self.model.config), 0, 1)
        layers = [Layer(_whole(s, ids.shape[1]), q, k, v, h, a) for s, q, k, v, h, a in seen.values()]
        return Prompt(self, layers, logits[:, -1])


def _whole(site: Site, n: int) -> Site:
    every = torch.arange(n)
    return site.but(
        n_queries=n, n_keys=n, offset=0, q_pos=every, k_pos=every, phase="prefill",
        mask=PairMask(n, n, causal=True), memory={},
    )  # fmt: skip


class Prompt:
    """A prompt that was read: every layer's part of it, and ``last``, (1, V) logits of what follows."""

    def __init__(self, reader: Reader, layers: Sequence[Layer], last: Tensor):
        self.reader, self.layers, self.last = reader, list(layers), last

    def __len__(self) -> int:
        return int(self.layers[0].k.shape[2])

    @torch.no_grad()
    def extended(self, ids: Tensor) -> Prompt:
        """The prompt with more tokens (1, M), as if all had been read at once."""
        self.reader.check(len(self) + ids.shape[1])
        logits, seen = self.reader._run(ids, self._cache([None]), len(self), 1)
        layers = []
        for old, (site, q, k, v, hidden, angles) in zip(self.layers, seen.values(), strict=True):
            both = tuple(torch.cat([a, b], 1) for a, b in zip(old.angles, angles, strict=True))
            q, k, v = (torch.cat(pair, 2) for pair in ((old.q, q), (old.k, k), (old.v, v)))
            hidden = torch.cat([old.hidden, hidden], 1)
            layers.append(Layer(_whole(site, k.shape[2]), q, k, v, hidden, (both[0], both[1])))
        return Prompt(self.reader, layers, logits[:, -1])

    def kept(self, technique: KVCompression) -> Kept:
        """What a technique keeps.

        Raises:
            ValueError: heads that keep different numbers of keys, or a choice made for all layers at once.
        """
        if technique.budget.keep(len(self)) < 1:
            raise ValueError(f"{technique.budget} leaves no key of {len(self)}")
        technique.reset()
        technique.prepare(self.reader.model, [layer.site for layer in self.layers])
        found: Kept = []
        for layer in self.layers:
            kept = technique.on_cache(layer.site.but(memory={}), layer.q, layer.k, layer.v)
            if isinstance(kept, dict) or (kept is not None and bool((kept < 0).any())):
                raise ValueError(f"{technique.name} keeps different numbers of keys, which cannot stand side by side")
            found.append(kept)
        return found

    def _cache(self, choices: Sequence[Kept | None]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.reader.model.config)
        for n, layer in enumerate(self.layers):
            parts = []
            for choice in choices:
                index = None if choice is None else choice[n]
                if index is None:
                    parts.append((layer.k, layer.v))
                    continue
                index = index.expand(*layer.k.shape[:2], -1).unsqueeze(-1)
                k, v = (t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in (layer.k, layer.v))
                parts.append((k, v))
            cache.update(torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts]), layer.site.layer)
        return cache

    @torch.no_grad()
    def follow(self, choices: Sequence[Kept | None], ids: Tensor, most: int = 16) -> Tensor:
        """(len(choices), L, V) logits of tokens (1, L) read after the prompt, from each of several kept caches.

        ``None`` is the whole cache. ``most`` caches that are equally long are read at a time, and those of the same
        keys once, in whatever order these were named.
        """
        self.reader.check(len(self) + ids.shape[1])
        where = torch.arange(len(self), len(self) + ids.shape[1])[None]
        groups: dict[tuple[int, ...], list[int]] = {}
        first: dict[Any, int] = {}
        same: list[int] = []
        for i, choice in enumerate(choices):
            same.append(first.setdefault(self._keys(choice), i))
            if same[i] < i:
                continue
            sizes = tuple(len(self) if c is None else c.shape[-1] for c in choice or [None] * len(self.layers))
            groups.setdefault(sizes, []).append(i)
        rows: dict[int, Tensor] = {}
        for sizes, members in groups.items():
            if len(set(sizes)) > 1:
                raise ValueError(f"layers keep different numbers of keys, {sizes}: masks are made for one number")
            for start in range(0, len(members), most):
                part = members[start : start + most]
                model, cache = self.reader.model, self._cache([choices[i] for i in part])
                places = where.expand(len(part), -1)
                out = model(ids.expand(len(part), -1), **cache_argument(model, cache), position_ids=places)
                rows |= dict(zip(part, out.logits, strict=True))
        return torch.stack([rows[i] for i in same])

    def _keys(self, choice: Kept | None) -> Any:
        """What tells a choice from every other one."""
        if choice is None:
            return None
        digest = hashlib.sha256()
        for layer, index in zip(self.layers, choice, strict=True):
            if index is not None:
                whole = index.expand(*layer.k.shape[:2], -1).sort(-1).values
                digest.update(f"{tuple(whole.shape)}".encode() + whole.to("cpu", torch.int64).numpy().tobytes())
            digest.update(b";")
        return digest.hexdigest()
