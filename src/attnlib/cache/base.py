"""KV-cache compression: a scorer, a budget and a selector, after prefill and while decoding.

A :class:`~attnlib.cache.scorers.Scorer` says what each cached key is worth, a
:class:`~attnlib.cache.budgets.Budget` how many stay, a :class:`~attnlib.cache.selectors.TopK` which. Positions, masks
and batching are the adapter's: what is left of the cache is read at the true positions. Where heads or samples keep
different numbers of keys the cache of the layer is as long as the longest, and the rest of the others' is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..hooks.intervention import Intervention
from ..hooks.site import Site
from ..types import to_list
from .budgets import Budget
from .scorers import CacheView, Scorer
from .selectors import TopK


def existing(site: Site, device: torch.device) -> Tensor:
    """(B or 1, Hk or 1, M) boolean: keys that the last query may read; the rest is padding.

    A sample that is nothing but padding has none.

    Raises:
        ValueError: the last query may not read itself: padding on the right, after which nothing can be decoded.
    """
    assert site.mask is not None
    allowed, _ = site.mask.rows(torch.tensor([site.n_queries - 1], device=device))
    if allowed is None:
        return torch.ones(1, 1, site.n_keys, dtype=torch.bool, device=device)
    last = allowed[:, :: site.heads // site.kv_heads if allowed.shape[1] > 1 else 1, -1]
    whole = site.mask.allowed
    some = last.new_ones(1) if whole is None else whole.flatten(1).any(1)
    if not bool((last[..., -1] | ~some.view(-1, 1)).all()):
        raise ValueError(
            "the prompt is padded on the right; evicting keys needs padding on the left (padding_side='left')"
        )
    return last


class KVCompression(Intervention):
    """Evict keys and values; the model goes on with what is left, at the true positions.

    The prompt is what ``generate`` was given, in one call or in chunks, and it is compressed as one; drafts of assisted
    decoding are no part of it. By hand it is what the model reads while its cache is empty, or as many tokens as
    ``session.at(prompt_length=...)`` says. While a prompt is read in chunks nothing is evicted, and the queries of all
    chunks are kept. A later turn of a conversation is read, and not compressed again unless ``every`` says so. On
    models that also have layers with a sliding window, the layers of full attention are compressed, and
    ``session.report`` names the others.

    Args:
        scorer: what each key is worth.
        budget: how many keys stay, of the tokens that each sample really has.
        selector: which keys stay.
        layers: layers to compress; ``None`` for all.
        every: while decoding, evict down to the budget again after so many new tokens; 1 keeps a :class:`Cap` at all
            times. ``None`` evicts once, after the prompt.
        prefill: evict after the prompt; with ``False`` only while decoding.

    Raises:
        ValueError: ``every`` below 1, or neither ``prefill`` nor ``every``.

    >>> from attnlib.cache import Cap, KeyNorm
    >>> KVCompression(KeyNorm(), Cap(128), every=16).while_decoding
    True
    """

    name: ClassVar[str] = "kv-compression"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    follows_sequence: ClassVar[bool] = False  # what it keeps of a sequence is in the cache; the rest is for results

    def __init__(
        self,
        scorer: Scorer,
        budget: Budget,
        selector: TopK | None = None,
        layers: Sequence[int | str] | None = None,
        every: int | None = None,
        prefill: bool = True,
    ):
        for name, value, kind in (("scorer", scorer, Scorer), ("budget", budget, Budget)):
            if not isinstance(value, kind):
                hint = f"; make one: {value.__name__}(...)" if isinstance(value, type) else ""
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}{hint}")
        if selector is not None and not isinstance(selector, TopK):
            raise TypeError(f"selector must be a TopK, got {selector!r}")
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be at least 1: the new tokens after which keys are evicted; got {every!r}")
        if every is None and not prefill:
            raise ValueError("prefill=False needs every=...; nothing would ever be evicted")
        self.scorer, self.budget, self.selector = scorer, budget, selector or TopK()
        self.every, self.prefill = every, prefill
        self.layers = to_list("layers", layers)
        self._order: list[int] = []
        self.reset()

    @property
    def identity(self) -> bool:
        return self.budget.everything

    @property
    def reads_weights(self) -> bool:  # type: ignore[override]
        return self.scorer.reads_weights

    @property
    def while_decoding(self) -> bool:  # type: ignore[override]
        return self.every is not None

    def wants(self, site: Site) -> bool:
        return self.scorer.wants(site)

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._order = [site.layer for site in sites]
        self.budget.keep(1, 0, len(self._order))  # a budget for another number of layers says so now
        self.scorer.prepare(model, sites)

    def reset(self) -> None:
        self._kept: dict[int | str, tuple[int, Tensor, Tensor]] = {}
        self._waiting: dict[int, tuple[CacheView, Tensor, Tensor]] = {}

    # ---- the stage

    def on_cache(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor | dict[int, Tensor] | None:
        first = site.offset == 0
        last = int(site.q_pos.max()) if first and site.q_pos is not None else site.offset + site.n_queries - 1
        if first:
            self._kept.pop(self._key(site), None)
        due = first and self.prefill
        if self.every is not None and not first:
            due = site.evicted_at is None or last + 1 - site.evicted_at >= self.every
            if not due and not self.scorer.queries:
                return None
        with torch.no_grad():
            memory = {} if site.memory is None else site.memory
            valid = existing(site, k.device) if due or "missing" not in memory else None
            if valid is not None and (first or "missing" not in memory):
                memory["missing"] = last + 1 - valid.any(1).sum(-1).expand(k.shape[0])
            real = last + 1 - memory["missing"]
            seen = self._remembered(memory, q, *self._described(site, q, real, valid if first else None))
            if not due:
                return None
            assert valid is not None and site.k_pos is not None
            return self._choose(CacheView(site, *seen, k, v, valid, site.k_pos), real, last + 1)

    @staticmethod
    def _described(site: Site, q: Tensor, real: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, n) number of each query's token among those of its sample, -1 for padding, and its slot."""
        batch, n = q.shape[0], q.shape[2]
        new = torch.arange(n, device=q.device)
        slots = site.offset + new if site.q_pos is None else site.q_pos
        slots = slots.expand(batch, n)
        if valid is None:
            return real.unsqueeze(-1) - n + new, slots
        there = valid.any(1)[:, -n:].expand(batch, n)
        return (there.cumsum(-1) - 1).masked_fill(~there, -1), slots

    def _remembered(
        self, memory: dict[str, Tensor], q: Tensor, order: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries to score with; those that a later eviction may ask for stay in the cache layer's memory."""
        past, most = memory.get("queries"), self.scorer.queries
        if past is not None:
            order, slots = (torch.cat([memory[name][:, 0], t], 1) for name, t in (("order", order), ("slots", slots)))
            q = torch.cat([past, q], 2)[:, :, -most:]
            order, slots = order[:, -most:], slots[:, -most:]
        if most and self.every is not None:
            # Copies, so that the queries of a whole prompt are not kept alive.
            memory["queries"] = q[:, :, -most:].clone()
            memory["order"], memory["slots"] = (t[:, None, -most:].clone() for t in (order, slots))
        return q, order, slots

    def _choose(self, view: CacheView, real: Tensor, seen: int) -> Tensor | dict[int, Tensor] | None:
        """What stays of a layer; with a budget for all layers, of all of them once the last has run."""
        layer, shape = view.site.layer, view.k.shape[:3]
        place = (self._order.index(layer), len(self._order)) if layer in self._order else (0, 1)
        even = max([self.budget.keep(count, *place) for count in real.tolist()])
        if self.budget.scope == "head" and max(even, self.scorer.protected) >= shape[2]:
            return self._everything(view)
        scores = self.scorer.score(view).expand(shape).masked_fill(~view.valid, -torch.inf)
        if self.scorer.protected:
            order = torch.arange(shape[2], device=scores.device)
            scores = scores.masked_fill(view.valid & (order >= shape[2] - self.scorer.protected), torch.inf)
        ready = self.selector.ready(scores)
        if self.budget.scope != "layers":
            return self._done(view, ready, self.budget.counts([ready], [real], [place])[0], seen)
        if place[0] == 0:
            self._waiting.clear()
        self._waiting[layer] = (view, ready, real)
        if place[0] < place[1] - 1:
            return None
        waiting, self._waiting = self._waiting, {}
        if sorted(waiting) != sorted(self._order):
            missing = sorted(set(self._order) - set(waiting))
            raise RuntimeError(
                f"a budget over all layers needs them in one call of the model; layers {missing} are missing"
            )
        views, scored, reals = zip(*(waiting[n] for n in self._order), strict=True)
        counts = self.budget.counts(scored, reals, [(n, len(self._order)) for n in range(len(self._order))])
        answers = {}
        for one, score, count in zip(views, scored, counts, strict=True):
            kept = self._done(one, score, count, seen)
            if kept is not None:
                answers[one.site.layer] = kept
        return answers or None

    def _everything(self, view: CacheView) -> Tensor | None:
        if self.every is None:
            return None
        return torch.arange(view.k.shape[2], device=view.k.device).expand(view.k.shape[:3])

    def _done(self, view: CacheView, ready: Tensor, counts: Tensor, seen: int) -> Tensor | None:
        if bool((counts >= view.k.shape[2]).all()):
            return self._everything(view)
        kept = self.selector.pick(ready, counts)
        self._kept[self._key(view.site)] = (seen, view.slots, kept)
        return kept

    @staticmethod
    def _key(site: Site) -> int | str:
        return site.layer if site.branch is None else f"{site.layer} {site.branch}"

    def results(self) -> dict[int | str, dict[str, Any]]:
        """What the last eviction left: ``{layer: {"kept": (B, Hk, K) slots, -1 before shorter rows, "of": N}}``.

        Layers that kept everything are left out. Those of a second branch (contrastive decoding, ``guidance_scale``)
        stand apart, under ``"LAYER BRANCH"``.
        """
        shown: dict[int | str, dict[str, Any]] = {}
        for layer, (seen, slots, kept) in sorted(
            self._kept.items(), key=lambda item: (isinstance(item[0], str), item[0])
        ):
            there = slots.expand(*kept.shape[:2], -1).gather(-1, kept.clamp(min=0)).masked_fill(kept < 0, -1)
            shown[layer] = {"kept": there, "of": seen}
        return shown
