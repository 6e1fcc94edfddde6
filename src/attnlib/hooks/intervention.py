"""What to do: interventions, their stages, and on which layers and heads they act."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from typing import Any, ClassVar

from torch import Tensor, nn

from ..checks import checked
from .reading import Reading
from .site import KINDS, Site

#: Every stage of the protocol. An adapter says which of them it serves; ``attach`` refuses the rest by name.
STAGES = (
    "around_denoiser",
    "around_module",
    "on_embeddings",
    "on_block_input",
    "on_tokens",
    "around_sublayer",
    "on_context",
    "on_qkv",
    "on_kv_read",
    "around_attention",
    "on_scores",
    "on_weights",
    "on_output",
    "on_mlp_output",
    "on_cache",
    "on_states",
    "on_logits",
    "on_step",
)

#: Stages of the whole model; they belong to no layer, and a layer is not touched for them.
MODEL_STAGES = ("on_embeddings", "on_states", "on_logits", "on_step", "around_denoiser", "around_module")

#: Stages inside one attention call. A layer without them keeps its own attention function.
ATTENTION_STAGES = (
    "on_qkv",
    "on_kv_read",
    "around_attention",
    "on_scores",
    "on_weights",
    "on_output",
    "on_cache",
)


class Intervention:
    """Something that acts on attention. A subclass overrides the stages it needs; the others cost nothing.

    ``around_attention(site, q, k, v, call)``
        returns (B, H, N, Dv); ``call(q, k, v, mask=None, bias=None)`` is the rest, to be called zero, one or several
        times, with ``mask`` (an :class:`attnlib.masks.Mask` on ``site.q_pos``/``site.k_pos``, or a boolean tensor)
        replacing the model's, and ``bias`` (broadcastable to (B, H, N, M)) replacing what it adds to scores; what is
        not replaced stays. A bias alone stays on the fused kernel and makes no mask. In denoisers that mask nothing
        (``site.mask.free``) ``call`` takes any number of queries and keys without ``mask``. The first intervention of
        ``attach`` is the outermost.
    ``on_qkv(site, q, k, v)``
        new tokens before they are cached, (B, H, N, D) and twice (B, Hk, N, D); ``site.rotary`` says whether rotary
        positions are applied. Returns the three.
    ``on_kv_read(site, k, v)``
        all keys and values as read, same length out.
    ``on_context(site, k_source, v_source)``
        what keys and values are projected from, (B, M, C) each. Joint attention of two streams asks once for each,
        and ``site.k_layout`` names it; their lengths stay.
    ``on_scores(site, scores, rows)``, ``on_weights(site, weights, rows)``
        (B, H, r, M) scores (scaled, ``-inf`` where a pair may not meet) or weights of the query rows ``rows`` (r,), in
        the statistics dtype. Return a new tensor or the same one, untouched. ``edit_rows(site)`` may name the rows
        worth looking at; ``whole_map = True`` asks for all rows at once.
    ``on_output(site, out)``
        (B, H, N, Dv) before the output projection.
    ``on_mlp_output(site, out)``
        (B, N, C) what the feed-forward of the block of this attention adds to the residual stream, before it is added.
    ``on_cache(site, q, k, v)``
        after prefill: (B, Hk, K) ascending indices of the keys to keep, or ``None`` for all; -1 on the left of heads
        that keep fewer. ``{layer: indices}`` answers for this layer and for earlier ones of the same call. With
        ``while_decoding`` it is asked after every later call too: ``k`` and ``v`` are then all that is cached, ``q``
        the new queries.
    ``around_sublayer(site, hidden, call)``
        ``hidden`` (B, N, C) is what the attention module reads, after the norm; ``call(hidden)`` runs the module, zero,
        one or several times, and gives its output (B, N, C) before the residual is added. Returns (B, N, C). The cache
        keeps the keys of the first call; later calls read the tokens before them, and theirs are forgotten. Without
        any call the module still runs where it has a cache, so that its keys are there for later tokens. Joint
        attention of two streams has them side by side, as ``site.q_layout`` says, in and out.
    ``around_denoiser(site, inputs, call)``
        one call of a whole denoiser: ``inputs`` are its named arguments, ``inputs[site.main]`` the (B, ...) that it
        denoises; ``call(inputs)`` runs the model zero, one or several times, with or without gradient
        (:func:`attnlib.hooks.with_gradient`), and gives its prediction. Returns a prediction. ``site`` is a
        :class:`attnlib.hooks.CallSite`.
    ``around_module(site, inputs, call)``
        one call of a module that ``acts_on`` names: its named arguments, and ``call(inputs)`` that runs it zero, one or
        several times and gives what it gives, a tensor or, with several streams, a tuple. Returns the same.
    ``on_embeddings(reading, embeds)``
        (B, N, C) embeddings of the tokens ``reading.ids`` (B, N) of this call, before anything of the model reads them;
        features of images take their places afterwards. Returns them or new ones of the same shape and type, with or
        without gradient; nothing is written in place. ``reading`` is a :class:`attnlib.hooks.Reading`.
    ``on_states(reading, states)``
        (B, N, C) last hidden states of the tokens ``reading.ids``, as the head reads them, with gradient where the
        model runs with it, also while generating. Returns the same, or new ones. Of a prompt out of which tokens were
        removed, ``reading.ids`` and ``reading.slots`` are those that are left.
    ``on_block_input(site, hidden)``
        (B, N, C) residual stream entering the block of this attention; return ``None`` to leave it.
    ``on_tokens(site, hidden)``
        at the input of the block of this attention, in prefill only: which tokens go on from here. Returns ``None``
        for all of them, or ``(hidden (B, K, C), index (B, K))`` with ``index`` the ascending indices, among the
        *current* tokens, that each token that goes on stands at; -1, on the left of the row, pads samples that keep
        fewer. All blocks from here on, their positions, masks and cache layers follow: the cache layers hold the
        true slots of what is left, and decoding goes on at the true positions. ``site.q_pos`` is (B, N) from then on.
    ``on_logits(ids, logits)``
        every step of ``generate()``, before processors and sampling: ``ids`` (B, L) so far, ``logits`` (B, V) float32
        of the next token; also ``session.logits(ids, logits)``. Returns (B, V). Under beam search a constant per row
        is missing (log-probabilities come in), and what is returned is normalised again if it was changed. The model
        may be run from here, inside ``with self.session.at(branch="...")`` and with a cache of the branch's own.
    ``on_step(step)``
        before every decoding step: 0 is the prompt, then the number of tokens after it, counted by the cache; in
        denoisers when ``session.at(step=...)`` or the pipeline says another step than before. Not for branches.

    State that a technique keeps from one call to the next belongs to a branch: key it by ``(site.branch, site.layer)``,
    or keep it in ``session.notes[key]``; each branch has notes of its own.

    Attributes:
        name: key of ``session.results``.
        kinds: kinds of attention it acts on.
        layers: numbers (negative from the end) or name patterns of layers, ``None`` for all of ``kinds``.
        whole_map: score and weight edits need all query rows at once.
        needs_types: it reads ``site.k_types``.
        replaces_mask: it calls the rest with a mask of its own; two of them cannot act on one layer.
        splits_softmax: it calls the rest several times on parts of the keys, so that nobody inside sees one map.
        reads_weights: it computes attention weights beside the kernel, other than through scores, weights and probes.
        while_decoding: ``on_cache`` is asked after every call of the model, not only after prefill.
        sees_references: its stages inside attention also act on the branches of image prompts (IP-Adapter), one call
            each, whose ``site.reference`` says which; without it they see the model's own attention only.
        acts_on: what ``around_module`` acts on: kinds (:data:`attnlib.hooks.MODULE_KINDS`) or name patterns.
        companions: interventions that it brings along; they are attached with it, behind it.
        adds_keys: it calls the rest with more, fewer or other keys than the model's.
        own_keys: it needs the keys to be the model's own tokens, in their order.
        all_tokens: it needs every token of the prompt in every layer; company that removes some is refused.
        whole_prompt: what it does to a token of the prompt depends on later ones, so a prompt is read in one call.
        moves_latents: it changes what a pipeline denoises, other than through the prediction; one may, at a time.
        differentiates: it runs the model with gradient.
        reuses_features: it keeps what the model computed at one step for another, so that no gradient passes there.
        uses: the stages that this instance uses, of those that its class overrides; ``None`` for all.
        follows_sequence: it keeps something from call to call outside the cache and ``session.notes``, so that a branch
            must finish one sequence before it goes on with an older one.

    >>> class Silence(Intervention):
    ...     def on_output(self, site, out):
    ...         return out * 0
    """

    name: ClassVar[str] = "intervention"
    kinds: ClassVar[tuple[str, ...]] = KINDS
    whole_map: ClassVar[bool] = False
    needs_types: ClassVar[bool] = False
    replaces_mask: ClassVar[bool] = False
    splits_softmax: ClassVar[bool] = False
    follows_sequence: ClassVar[bool] = True
    reads_weights: bool = False
    while_decoding: bool = False
    adds_keys: bool = False
    own_keys: bool = False
    all_tokens: bool = False
    whole_prompt: bool = False
    moves_latents: bool = False
    differentiates: bool = False
    reuses_features: bool = False
    sees_references: bool = False
    acts_on: Sequence[str] = ()
    uses: Collection[str] | None = None
    layers: Sequence[int | str] | None = None
    _owner: Any = None

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in cls.__dict__ and cls.__module__.startswith("attnlib."):
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    @property
    def companions(self) -> Sequence[Intervention]:
        """Interventions that are attached with this one, behind it."""
        return ()

    @property
    def identity(self) -> bool:
        """Configured so that it can do nothing; no layer is touched for it then."""
        return False

    def wants(self, site: Site) -> bool:
        """Whether to act at this site at all, decided once, when attached; the site knows layer, kind and heads."""
        return True

    def conflicts(self, other: Intervention) -> str | None:
        """Why this cannot act at the same layer as ``other``; ``None`` when they compose."""
        return None

    def meet(self, model: nn.Module) -> None:
        """Called first, before layers are chosen: ``layers``, ``acts_on`` and ``uses`` may be set for this model."""

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Called once before anything is attached, with the sites this intervention will act on."""

    def on_attach(self, session: Any) -> None:
        """Called once when everything is attached, to watch more of the model than attention: what is changed or
        hooked goes through ``session.undo``, ``session.set_attribute`` or ``session.hook``."""

    def edit_rows(self, site: Site) -> Tensor | None:
        """(r,) query rows that ``on_scores`` and ``on_weights`` may change; ``None`` for all."""
        return None

    def reset(self) -> None:
        """Forget what earlier calls left behind."""

    def results(self) -> Any:
        """What ``session.results[name]`` shows."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and what is pickled, belong to no session."""
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

    @property
    def session(self) -> Any:
        """The session this is attached in."""
        if self._owner is None:
            raise RuntimeError(f"this {type(self).__name__} is not attached to a model")
        return self._owner

    # ---- stages

    def around_denoiser(self, site: Any, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        return call(inputs)

    def around_module(self, site: Any, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        return call(inputs)

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        return call(q, k, v)

    def around_sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Any]) -> Any:
        return call(hidden)

    def on_qkv(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def on_kv_read(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def on_context(self, site: Site, k_source: Tensor, v_source: Tensor) -> tuple[Tensor, Tensor]:
        return k_source, v_source

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        return scores

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        return weights

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        return out

    def on_mlp_output(self, site: Site, out: Tensor) -> Tensor:
        return out

    def on_cache(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor | dict[int, Tensor] | None:
        return None

    def on_block_input(self, site: Site, hidden: Tensor) -> Tensor | None:
        return None

    def on_tokens(self, site: Site, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        return None

    def on_embeddings(self, reading: Reading, embeds: Tensor) -> Tensor:
        return embeds

    def on_states(self, reading: Reading, states: Tensor) -> Tensor:
        return states

    def on_logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        return logits

    def on_step(self, step: int) -> None:
        return None


class Probe(Intervention):
    """Looks without changing anything: a few rows are computed beside the fast kernel, which stays.

    It sees the weights as edited by interventions listed before it.

    Attributes:
        differentiable: what it observes carries gradient, where the model runs with it.
    """

    name = "probe"
    differentiable: bool = False

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        """``(query rows (r,), heads or None for all)`` to look at in this call; ``None`` to skip it."""
        raise NotImplementedError

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        """Take a block: weights (B, h, r, M) of the query rows ``rows`` and which pairs may meet."""
        raise NotImplementedError


def implements(intervention: Intervention, stage: str) -> bool:
    """Whether the class of ``intervention`` overrides ``stage``, and this one uses it."""
    overridden = getattr(type(intervention), stage) is not getattr(Intervention, stage)
    return overridden and (intervention.uses is None or stage in intervention.uses)


class Stages:
    """The interventions of one layer, sorted by stage."""

    def __init__(self, interventions: Sequence[Intervention]):
        self.all = tuple(interventions)
        self._by_stage = {stage: [i for i in self.all if implements(i, stage)] for stage in STAGES}
        self.probes = [i for i in self.all if isinstance(i, Probe)]
        self.edits = [i for i in self.all if implements(i, "on_scores") or implements(i, "on_weights")]
        #: Whether somebody acts or looks inside the attention call.
        self.in_attention = bool(self.probes) or any(self._by_stage[stage] for stage in ATTENTION_STAGES)
        #: Whether weights computed beside the kernel were found to be its own.
        self.verified = False

    def __getitem__(self, stage: str) -> list[Intervention]:
        return self._by_stage[stage]

    @property
    def used(self) -> list[str]:
        """Stages that somebody implements."""
        return [stage for stage in STAGES if self._by_stage[stage]]

    @property
    def reads_map(self) -> bool:
        """Somebody needs scores or weights."""
        return bool(self.edits or self.probes) or any(i.reads_weights for i in self.all)


def _matches(chosen: Sequence[int | str], site: Site, last: int) -> bool:
    for layer in chosen:
        if isinstance(layer, str):
            if fnmatch.fnmatchcase(site.name, layer):
                return True
        elif site.layer == (layer if layer >= 0 else last + 1 + layer):
            return True
    return False


def check_layers(intervention: Intervention, sites: Sequence[Site]) -> list[Site]:
    """The sites an intervention acts on; raises when a layer it names does not exist or nothing is left."""
    name = type(intervention).__name__
    fitting = [s for s in sites if s.kind in intervention.kinds]
    if intervention.layers is not None:
        if not isinstance(intervention.layers, (list, tuple, range, set, frozenset)):
            got = f"{type(intervention.layers).__name__} {intervention.layers!r:.60}"
            raise TypeError(f"{name}: layers must be a sequence of numbers or names, got {got}")
        for layer in intervention.layers:
            if isinstance(layer, bool) or not isinstance(layer, (Integral, str)):
                raise TypeError(
                    f"{name}: layers holds numbers (negative from the end) or name patterns, got "
                    f"{type(layer).__name__} {layer!r:.60}"
                )
        if not intervention.layers:
            raise ValueError(f"{name}: layers is empty; name at least one, or leave it out for all")
        last = max((s.layer for s in sites), default=-1)
        numbers = sorted({s.layer for s in fitting})
        for layer in intervention.layers:
            if not any(_matches([layer], s, last) for s in fitting):
                what = numbers if isinstance(layer, int) else [s.name for s in fitting]
                raise ValueError(
                    f"{name}: layer {layer!r} does not exist among {'/'.join(intervention.kinds)} attention; "
                    f"possible: {what}"
                )
        fitting = [s for s in fitting if _matches(intervention.layers, s, last)]
    chosen = [s for s in fitting if intervention.wants(s)]
    if not chosen:
        kinds = sorted({s.kind for s in sites})
        raise ValueError(
            f"{name} acts on {'/'.join(intervention.kinds)} attention, but nothing of this model fits; "
            f"its {len(sites)} attention layers are of kind {kinds}"
        )
    return chosen


def check_heads(intervention: Intervention, heads: Sequence[int], site: Site) -> None:
    """Raise ``ValueError`` unless every head exists at the site."""
    for head in heads:
        if not 0 <= head < site.heads:
            raise ValueError(
                f"{type(intervention).__name__}: head {head} does not exist in layer {site.layer} ({site.name}); "
                f"possible: 0 to {site.heads - 1}"
            )
