"""Decoding with two branches: the model reads the prompt a second time, otherwise, and both say what comes next.

With ``z`` the scores of the next token and ``z'`` those of the second branch,

    ``z~ = a z + b z'``  on  ``V = {v : z_v >= log(cutoff) + max z}``,  ``-inf`` elsewhere.

The second branch is the same model with a cache of its own; it reads the same new tokens, and what differs is its
prompt: without the image (:class:`NoImage`), with some of its tokens (:class:`ImageTokens`), with other pixels
(:class:`OtherPixels`), with given embeddings in its place (:class:`NullTokens`), or whatever a :class:`Branch` makes.
Contrast (``a = 1 + alpha, b = -alpha``), guidance (``a = w, b = 1 - w``) and ensembles (``b > 0``) are settings:
DAMRO, AGLA and LACING's soft-image guidance are built on it.

Positions of the second prompt are counted anew: tokens that leave it leave no gap. Prompts without image, and such rows
of a batch, are the model's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks.core import Intervention, Session
from ..hooks.tokens import IMAGE, PAD
from ..types import check_choice
from ._watch import reader, watch_prompts

#: Inputs of a prompt that a second reading of it makes anew.
_OWN = frozenset(
    "input_ids inputs_embeds attention_mask position_ids past_key_values use_cache logits_to_keep return_dict labels "
    "output_attentions output_hidden_states cache_position token_type_ids mm_token_type_ids".split()
)

#: Inputs with one number per token, which go with the tokens.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


def contrast(logits: Tensor, other: Tensor, a: float, b: float, cutoff: float = 0.0, normalize: bool = False) -> Tensor:
    """``a z + b z'`` where ``z`` is plausible, ``-inf`` elsewhere.

    Args:
        logits: (B, V) z.
        other: (B, V) z'.
        a: weight of z.
        b: weight of z'.
        cutoff: share of the largest probability that a token needs; 0 admits all.
        normalize: turn both into log-probabilities first.

    Returns:
        (B, V).

    >>> contrast(torch.tensor([[0.0, -1.0, -9.0]]), torch.tensor([[1.0, 0.0, 0.0]]), 2.0, -1.0, 0.1).tolist()
    [[-1.0, -2.0, -inf]]
    """
    if normalize:
        logits, other = logits.log_softmax(-1), other.log_softmax(-1)
    out = logits if a == 1 else a * logits
    if b:
        out = out + b * other
    if cutoff > 0:
        out = out.masked_fill(logits < math.log(cutoff) + logits.amax(-1, keepdim=True), float("-inf"))
    return out


def image_runs(types: Tensor, size: int | None = None) -> Tensor:
    """Which image each token belongs to.

    Args:
        types: (B, L) token types.
        size: tokens of an image; adjacent image tokens are one image by default.

    Returns:
        (B, L) slot of the image's first token, -1 where there is no image.

    >>> image_runs(torch.tensor([[1, 2, 2, 1, 2]])).tolist()
    [[-1, 1, 1, -1, 4]]
    """
    image = types == IMAGE
    slots = torch.arange(types.shape[1], device=types.device).expand_as(types)
    starts = image & ~F.pad(image, (1, 0))[:, :-1]
    first = torch.where(starts, slots, -1).cummax(1).values
    if size is not None:
        first = first + (slots - first) // size * size
    return torch.where(image, first, -1)


# --------------------------------------------------------------------------------------------------------------------
# The second prompt


class Reading(NamedTuple):
    """What a branch reads: inputs of the model (ids or embeddings of tokens, images) and types (B, K) of the tokens."""

    inputs: dict[str, Any]
    types: Tensor


@dataclass
class Prompt:
    """What the model has read when the branches part.

    Args:
        session: the session.
        ids: (B, L), ``None`` when the model was given embeddings.
        embeds: (B, L, C) what the decoder read, images included; ``None`` where it looked ids up by itself.
        types: (B, L) token types.
        inputs: named arguments with which the model was called.
    """

    session: Session
    ids: Tensor | None
    embeds: Tensor | None
    types: Tensor
    inputs: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        return self.session.model

    def embedded(self) -> Tensor:
        """(B, L, C) embeddings of all tokens."""
        if self.embeds is not None:
            return self.embeds
        assert self.ids is not None
        return self.model.get_input_embeddings()(self.ids)  # type: ignore[operator]

    def pick(self, index: Tensor) -> Reading:
        """A reading of chosen tokens.

        Args:
            index: (B, K) slots in the order in which they are read; -1, on the left of a row, for padding.
        """
        at = index.clamp(min=0)
        types = self.types.gather(1, at).masked_fill(index < 0, PAD)
        rest = {name: value.gather(1, at) for name, value in self.per_token().items()}
        if self.embeds is None:
            assert self.ids is not None
            return Reading({**rest, "input_ids": self.ids.gather(1, at)}, types)
        embeds = self.embeds.gather(1, at[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return Reading({**rest, "inputs_embeds": embeds.masked_fill((index < 0)[..., None], 0)}, types)

    def per_token(self) -> dict[str, Tensor]:
        """Inputs of the model that hold one number (B, L) per token."""
        found = {name: self.inputs.get(name) for name in _PER_TOKEN}
        return {n: v for n, v in found.items() if isinstance(v, Tensor) and v.shape == self.types.shape}

    def order(self, keys: Tensor) -> Tensor:
        """(B, K) index of the tokens with a finite key, by ascending key; padding of the prompt leaves it."""
        keys = keys.masked_fill(self.types == PAD, float("inf"))
        counts = keys.isfinite().sum(1)
        width = int(counts.max())
        sorted_by_key = keys.argsort(dim=1, stable=True)[:, :width]
        place = torch.arange(width, device=keys.device) - (width - counts)[:, None]
        return torch.where(place >= 0, sorted_by_key.gather(1, place.clamp(min=0)), -1)


class Branch:
    """How the second branch reads the prompt; a subclass says it in :meth:`read`."""

    name: str = "branch"

    def watch(self, session: Session) -> None:
        """Called when attached, to look at more than the prompt; hooks go through ``session.hook``."""

    def read(self, prompt: Prompt) -> Reading:
        raise NotImplementedError


class NoImage(Branch):
    """The prompt without its image tokens."""

    name = "no-image"

    def read(self, prompt: Prompt) -> Reading:
        slots = torch.arange(prompt.types.shape[1], device=prompt.types.device, dtype=torch.float64)
        return prompt.pick(prompt.order(slots.expand(prompt.types.shape).masked_fill(prompt.types == IMAGE, torch.inf)))


class ImageTokens(Branch):
    """The prompt with only the best ``k`` tokens of each image.

    Args:
        k: tokens that stay.
        scores: a function from the :class:`Prompt` to scores (B, L) of its tokens, or to those and the number of
            tokens of an image.
        order: ``"score"``, the best first, or ``"place"``, as they stood.
    """

    name = "image-tokens"

    def __init__(self, k: int, scores: Callable[[Prompt], Tensor | tuple[Tensor, int]], order: str = "score"):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        check_choice("order", order, ("score", "place"))
        self.k, self.scores, self.order = k, scores, order

    def read(self, prompt: Prompt) -> Reading:
        answer = self.scores(prompt)
        scores, size = answer if isinstance(answer, tuple) else (answer, None)
        if scores.shape != prompt.types.shape:
            raise ValueError(
                f"scores must be given for all {tuple(prompt.types.shape)} tokens, got {tuple(scores.shape)}"
            )
        first = image_runs(prompt.types, size)
        slots = torch.arange(first.shape[1], device=first.device, dtype=torch.float64).expand(first.shape)
        rank = self._ranks(first, scores)
        short = (first >= 0) & (rank == 0) & (self._sizes(first) < self.k)
        if bool(short.any()):
            raise ValueError(
                f"k={self.k} tokens of each image are to stay, but an image has {int(self._sizes(first)[short].min())}"
            )
        keys = slots if self.order == "place" else torch.where(first >= 0, first + rank, slots)
        return prompt.pick(prompt.order(keys.masked_fill((first >= 0) & (rank >= self.k), torch.inf)))

    @staticmethod
    def _ranks(first: Tensor, scores: Tensor) -> Tensor:
        """(B, L) place of each image token among those of its image, 0 for the best."""
        by_score = scores.argsort(dim=1, descending=True, stable=True)
        by_image = by_score.gather(1, first.gather(1, by_score).argsort(dim=1, stable=True))
        images = first.gather(1, by_image)
        place = torch.arange(first.shape[1], device=first.device).expand_as(first)
        starts = images != F.pad(images, (1, 0), value=-2)[:, :-1]
        rank = place - torch.where(starts, place, 0).cummax(1).values
        return torch.zeros_like(first).scatter(1, by_image, rank)

    @staticmethod
    def _sizes(first: Tensor) -> Tensor:
        """(B, L) tokens of the image that each token belongs to."""
        counts = torch.zeros_like(first).scatter_add(1, first.clamp(min=0), (first >= 0).to(first.dtype))
        return counts.gather(1, first.clamp(min=0))


class NullTokens(Branch):
    """The prompt with given embeddings in place of each image.

    Args:
        embedding: (T, C) for images of T tokens, or a module that has it as ``embedding``.
    """

    name = "null-image"

    def __init__(self, embedding: Tensor | nn.Module):
        self.source = embedding

    @property
    def embedding(self) -> Tensor:
        return self.source if isinstance(self.source, Tensor) else self.source.embedding  # type: ignore[return-value]

    def read(self, prompt: Prompt) -> Reading:
        embeds, null = prompt.embedded(), self.embedding
        size, width = null.shape
        if width != embeds.shape[-1]:
            raise ValueError(f"the null image has width {width}, the model's tokens have {embeds.shape[-1]}")
        image = prompt.types == IMAGE
        runs = image_runs(prompt.types)
        if bool((ImageTokens._sizes(runs)[image] % size).any()):
            raise ValueError(
                f"the null image stands for images of {size} tokens, but the prompt has images of "
                f"{sorted(set(ImageTokens._sizes(runs)[image].tolist()))} tokens"
            )
        slots = torch.arange(image.shape[1], device=image.device)
        at = torch.where(image, (slots - runs) % size, 0)
        embeds = torch.where(image[..., None], null.to(embeds)[at], embeds)
        return Reading({**prompt.per_token(), "inputs_embeds": embeds}, prompt.types)


class OtherPixels(Branch):
    """The same prompt with other pixels.

    Args:
        pixels: (images, ...) as the model's processor gives them, or a function from the prompt's own to such.
        name: of the branch.
    """

    def __init__(self, pixels: Tensor | Callable[[Tensor], Tensor], name: str = "other-pixels"):
        self._check(pixels, callable(pixels))
        self.pixels, self.name = pixels, name
        self._seen: Tensor | None = None

    @staticmethod
    def _check(pixels: Any, function: bool = False) -> None:
        if not function and not isinstance(pixels, Tensor):
            raise TypeError(f"pixels must be a tensor, or a function from pixels to pixels; got {pixels!r}")

    def watch(self, session: Session) -> None:
        if isinstance(self.pixels, Tensor):
            return
        names = ("vision_tower", "vision_model", "visual", "vision_encoder")
        found = [m for n, m in session.model.named_modules() if n.rsplit(".", 1)[-1] in names]
        if not found:
            raise ValueError(
                f"{type(session.model).__name__} has no vision encoder whose pixels could be read (looked for "
                f"{', '.join(names)}); give the second branch's pixels as a tensor"
            )

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if session.branch is None:
                read = kwargs.get("pixel_values", args[0] if args else None)
                self._seen = read if isinstance(read, Tensor) else None

        session.hook(found[0].register_forward_pre_hook(look, with_kwargs=True))

    def read(self, prompt: Prompt) -> Reading:
        given = prompt.inputs
        encoded: Any = (given.get("mm_encoder_outputs") or {}).get("image")
        own = given.get("pixel_values")
        if prompt.ids is None or (own is None and encoded is None):
            raise ValueError(
                "the second branch reads other pixels, but the model was not called with input_ids and pixel_values"
            )
        pixels = self.pixels
        if not isinstance(pixels, Tensor):
            seen = own if own is not None else self._seen
            if seen is None:
                raise ValueError("the pixels of the prompt were not seen; give the second branch's as a tensor")
            pixels = pixels(seen)
            self._check(pixels)
        images = len(own) if own is not None else len(encoded.pooler_output)
        if images % len(pixels):
            raise ValueError(
                f"the second branch has pixels of {len(pixels)} images, the prompt has {images}"
                + ("" if isinstance(self.pixels, Tensor) else "; where images come in crops, give them as a tensor")
            )
        repeats, rows = images // len(pixels), len(prompt.ids)
        if repeats > 1:
            samples = rows // repeats
            if rows % repeats or len(pixels) % samples:
                raise ValueError(f"{len(pixels)} images do not belong evenly to {samples} samples")
            per_sample = pixels.unflatten(0, (samples, -1))
            pixels = per_sample.repeat_interleave(repeats, 0).flatten(0, 1)
        rest = {k: v for k, v in given.items() if k not in _OWN and k not in ("mm_encoder_outputs", "pixel_values")}
        rest.update(prompt.per_token(), input_ids=prompt.ids, pixel_values=pixels.to(self._like(prompt)))
        return Reading(rest, prompt.types)

    @staticmethod
    def _like(prompt: Prompt) -> Tensor:
        return next(p for p in prompt.model.parameters() if p.is_floating_point())


# --------------------------------------------------------------------------------------------------------------------
# Decoding


@dataclass
class _State:
    """The second branch of one generation."""

    start: int
    seen: int
    valid: Tensor
    types: Tensor
    cache: Any
    logits: Tensor
    image: Tensor
    base: int = 0


class ContrastiveDecoding(Intervention):
    """Combine the scores of the next token with those of a second branch.

    Works in ``generate()``, and outside of it with ``session.logits(ids, logits)``. Token types come from
    ``attach(..., token_types=...)``.

    Args:
        branch: how the second branch reads the prompt.
        a: weight of the model's scores.
        b: weight of the second branch's; with 0 it is not run.
        cutoff: see :func:`contrast`.
        normalize: see :func:`contrast`.
        interval: combine at the first ``interval + 1`` steps only; ``None`` for all.

    Raises:
        ValueError: a cut-off outside [0, 1]; models with an encoder, or with positions kept from call to call.

    >>> ContrastiveDecoding(NoImage(), a=2.0, b=-1.0, cutoff=0.1).branch.name
    'no-image'
    """

    name: ClassVar[str] = "contrastive-decoding"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    #: Run the second branch even where it has no weight.
    always: ClassVar[bool] = False

    def __init__(
        self,
        branch: Branch,
        a: float,
        b: float,
        cutoff: float = 0.0,
        normalize: bool = False,
        interval: int | None = None,
    ):
        if not isinstance(branch, Branch):
            raise TypeError(f"branch must be a Branch such as NoImage(), got {branch!r}")
        if not 0.0 <= cutoff <= 1.0:
            raise ValueError(f"cutoff must lie in [0, 1], got {cutoff}")
        if interval is not None and interval < 0:
            raise ValueError(f"interval must not be negative, got {interval}")
        self.branch, self.a, self.b, self.cutoff = branch, float(a), float(b), float(cutoff)
        self.normalize, self.interval = normalize, interval
        self.layers = None
        self._branch_name = branch.name
        self.reset()

    @property
    def identity(self) -> bool:
        return self.a == 1 and self.b == 0 and self.cutoff == 0 and not self.normalize

    def reset(self) -> None:
        self._read: list[Tensor | None] = []
        self._fresh = True
        self.forwards = 0

    def results(self) -> dict[str, Any]:
        """The name of the branch, and how many calls of the model it took since it was attached."""
        return {"branch": self._branch_name, "forwards": self.forwards}

    # ---- watching the prompt

    def on_attach(self, session: Session) -> None:
        model: Any = session.model
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(self).__name__} serves decoders; {type(model).__name__} has an encoder")
        if any(hasattr(m, "rope_deltas") for m in model.modules()):
            raise ValueError(
                f"{type(self).__name__}: {type(model).__name__} keeps the positions of its last prompt in the model "
                "(rope_deltas), where a second branch would overwrite them"
            )
        same = [i for i in session.interventions if isinstance(i, ContrastiveDecoding)]
        number = sum(i.branch.name == self.branch.name for i in same[: same.index(self)])
        self._branch_name = self.branch.name + (f"-{number + 1}" if number else "")
        self.branch.watch(session)

        known = inspect.signature(model.forward).parameters
        self._takes = {n for n, p in known.items() if p.kind is not p.VAR_KEYWORD}
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            self._takes.add("position_ids")

        def started(given: dict[str, Any]) -> None:
            if session.branch is None:
                self._read.clear()
                self._fresh = True

        watch_prompts(session, started)
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        if isinstance(decoder, nn.Module) and decoder is not model:
            named = reader(decoder)

            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if session.branch is None and self._fresh:
                    self._read.append(named(args, kwargs).get("inputs_embeds"))

            session.hook(decoder.register_forward_pre_hook(look, with_kwargs=True))
        session.undo(self._read.clear)

    def _prompt(self, ids: Tensor) -> Prompt:
        session = self.session
        types = None if session.tracker is None else session.tracker.types
        if types is None:
            raise ValueError(
                f"{type(self).__name__}: scores came before the model read its prompt, as when another model drafts "
                "first (assistant_model); tokens that are taken back are not served"
            )
        given = session.prompt
        embeds: Tensor | None = None
        if any(e is not None for e in self._read):
            embeds = torch.cat([e for e in self._read if e is not None], 1)
            missing = types.shape[1] - embeds.shape[1]
            if missing > 0:
                later = session.model.get_input_embeddings()(ids[:, -missing:])  # type: ignore[operator]
                embeds = torch.cat([embeds, later.to(embeds)], 1)
            if embeds.shape[1] != types.shape[1]:
                raise ValueError(f"the decoder read {embeds.shape[1]} tokens, types are known of {types.shape[1]}")
        own = ids if ids.shape[1] == types.shape[1] else None
        if embeds is None and own is None:
            raise ValueError(f"ids must be the {types.shape[1]} tokens that the model has read, got {ids.shape[1]}")
        return Prompt(session, own, embeds, types.to(ids.device), given)

    # ---- the second branch

    def on_logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        if self.session.branch is not None:
            return logits
        state = self._follow(ids, logits)
        if state is None or not bool(state.image.any()):
            return logits
        if self.interval is not None and ids.shape[1] - state.start > self.interval:
            return logits
        out = contrast(logits, state.logits.to(logits), self.a, self.b, self.cutoff, self.normalize)
        return torch.where(state.image[:, None], out, logits)

    def _follow(self, ids: Tensor, logits: Tensor) -> _State | None:
        """The second branch, with the same tokens read as the first."""
        notes = self.session.notes
        key = f"{self.name}:{self._branch_name}"
        state = notes.get(key)
        if state is None:
            prompt = self._prompt(ids)
            image = (prompt.types == IMAGE).any(1)
            state = _State(ids.shape[1], ids.shape[1], image, prompt.types, None, logits, image)
            if (self.b or self.always) and bool(image.any()):
                self._begin(state, prompt)
            notes[key] = state
            self._fresh = False
            self._read.clear()
            return state
        new = ids.shape[1] - state.seen
        if new < 0:
            raise ValueError(
                f"{type(self).__name__}: the sequence became shorter ({state.seen} to {ids.shape[1]} tokens); tokens "
                "that are taken back, as in assisted generation, are not served"
            )
        if len(ids) != len(state.image):
            raise ValueError(f"{type(self).__name__}: the batch had {len(state.image)} rows, now it has {len(ids)}")
        over = self.interval is not None and ids.shape[1] - state.start > self.interval
        if state.cache is not None and new and not over:
            self._extend(state, ids[:, state.seen :])
        state.seen = ids.shape[1]
        return state

    def _begin(self, state: _State, prompt: Prompt) -> None:
        reading = self.branch.read(prompt)
        valid = reading.types != PAD
        state.types, state.valid = reading.types, valid
        state.base = self._first_position(prompt)
        positions = (valid.long().cumsum(1) - 1).clamp(min=0) + state.base
        self._call(state, {**reading.inputs, "position_ids": positions, "past_key_values": None})

    @staticmethod
    def _first_position(prompt: Prompt) -> int:
        """Where the model starts to count: most at 0, some at 1."""
        given = prompt.inputs.get("position_ids")
        if not isinstance(given, Tensor) or given.dim() != 2 or given.shape[1] > prompt.types.shape[1]:
            return 0
        exists = prompt.types[: len(given), : given.shape[1]] != PAD
        return int(given.expand(exists.shape).masked_fill(~exists, torch.iinfo(given.dtype).max).min())

    def _extend(self, state: _State, new: Tensor) -> None:
        parents = self.session.parents()
        if parents is not None and not torch.equal(parents, torch.arange(len(parents), device=parents.device)):
            state.cache.reorder_cache(parents)
            state.valid = state.valid[parents]
        state.valid = F.pad(state.valid, (0, new.shape[1]), value=True)
        positions = state.valid.long().cumsum(1)[:, -new.shape[1] :] - 1 + state.base
        self._call(state, {"input_ids": new, "position_ids": positions, "past_key_values": state.cache})

    def _call(self, state: _State, inputs: dict[str, Any]) -> None:
        inputs = {**inputs, "attention_mask": state.valid.long(), "use_cache": True, "logits_to_keep": 1}
        with self.session.at(branch=self._branch_name, token_types=state.types):
            out = self.session.model(**{k: v for k, v in inputs.items() if k in self._takes})
        self.forwards += 1
        state.cache, state.logits = out.past_key_values, out.logits[:, -1]
