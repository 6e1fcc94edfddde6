"""A second reading of a prompt: without its image, with some of its tokens, with other pixels or embeddings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import checked
from ..types import check_choice
from .blocks import block_of
from .hf.names import (
    ENCODED,
    OWN_INPUTS,
    PER_TOKEN,
    VISION_TOWERS,
    cache_in,
    cache_name,
    encoded_images,
    vision_towers,
)
from .session import Session
from .tokens import IMAGE, PAD


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


def check_branches(model: Any, who: str, what: str) -> None:
    """Raise ``ValueError`` for a model in which ``what`` cannot be read beside the prompt, naming ``who`` reads it."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{who} serves decoders; {type(model).__name__} has an encoder")
    if any(hasattr(m, "rope_deltas") for m in model.modules()):
        raise ValueError(
            f"{who}: {type(model).__name__} keeps the positions of its last prompt in the model (rope_deltas), where "
            f"{what} would overwrite them"
        )


class BranchInputs(NamedTuple):
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

    def pick(self, index: Tensor) -> BranchInputs:
        """A reading of chosen tokens.

        Args:
            index: (B, K) slots in the order in which they are read; -1, on the left of a row, for padding.
        """
        at = index.clamp(min=0)
        types = self.types.gather(1, at).masked_fill(index < 0, PAD)
        rest = {name: value.gather(1, at) for name, value in self.per_token().items()}
        if self.embeds is None:
            assert self.ids is not None
            return BranchInputs({**rest, "input_ids": self.ids.gather(1, at)}, types)
        embeds = self.embeds.gather(1, at[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return BranchInputs({**rest, "inputs_embeds": embeds.masked_fill((index < 0)[..., None], 0)}, types)

    def per_token(self) -> dict[str, Tensor]:
        """Inputs of the model that hold one number (B, L) per token."""
        found = {name: self.inputs.get(name) for name in PER_TOKEN}
        rows, length = self.types.shape
        return {
            n: v[:, :length]  # drafts may have been read with the prompt
            for n, v in found.items()
            if isinstance(v, Tensor) and v.dim() == 2 and len(v) == rows and v.shape[1] >= length
        }

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

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in cls.__dict__ and cls.__module__.startswith("attnlib."):
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    def watch(self, session: Session) -> None:
        """Called when attached, to look at more than the prompt; hooks go through ``session.hook``."""

    def read(self, prompt: Prompt) -> BranchInputs:
        raise NotImplementedError


class NoImage(Branch):
    """The prompt without its image tokens."""

    name = "no-image"

    def read(self, prompt: Prompt) -> BranchInputs:
        slots = torch.arange(prompt.types.shape[1], device=prompt.types.device, dtype=torch.float64)
        return prompt.pick(prompt.order(slots.expand(prompt.types.shape).masked_fill(prompt.types == IMAGE, torch.inf)))


class ImageTokens(Branch):
    """The prompt with only the best ``k`` tokens of each image.

    Args:
        k: tokens that stay.
        scores: a function from the :class:`Prompt` to scores (B, L) of its tokens, or to those and the number of
            tokens of an image, or to those, ``None`` and another number of tokens that stay.
        order: ``"score"``, the best first, or ``"place"``, as they stood.
    """

    name = "image-tokens"

    def __init__(self, k: int, scores: Callable[[Prompt], Any], order: str = "score"):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        check_choice("order", order, ("score", "place"))
        self.k, self.scores, self.order = k, scores, order

    def read(self, prompt: Prompt) -> BranchInputs:
        answer = self.scores(prompt)
        scores, size, k = (*answer, self.k, self.k)[:3] if isinstance(answer, tuple) else (answer, None, self.k)
        if scores.shape != prompt.types.shape:
            raise ValueError(
                f"scores must be given for all {tuple(prompt.types.shape)} tokens, got {tuple(scores.shape)}"
            )
        first = image_runs(prompt.types, size)
        slots = torch.arange(first.shape[1], device=first.device, dtype=torch.float64).expand(first.shape)
        rank = self._ranks(first, scores)
        short = (first >= 0) & (rank == 0) & (self._sizes(first) < k)
        if bool(short.any()):
            raise ValueError(
                f"k={k} tokens of each image are to stay, but an image has {int(self._sizes(first)[short].min())}"
            )
        keys = slots if self.order == "place" else torch.where(first >= 0, first + rank, slots)
        return prompt.pick(prompt.order(keys.masked_fill((first >= 0) & (rank >= k), torch.inf)))

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

    def read(self, prompt: Prompt) -> BranchInputs:
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
        return BranchInputs({**prompt.per_token(), "inputs_embeds": embeds}, prompt.types)


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
        found = [m for _, m in vision_towers(session.model)]
        if not found:
            raise ValueError(
                f"{type(session.model).__name__} has no vision encoder whose pixels could be read (looked for "
                f"{', '.join(VISION_TOWERS)}); give the second branch's pixels as a tensor"
            )

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if session.branch is None:
                read = kwargs.get("pixel_values", args[0] if args else None)
                self._seen = read if isinstance(read, Tensor) else None

        session.hook(found[0].register_forward_pre_hook(look, with_kwargs=True))

    def read(self, prompt: Prompt) -> BranchInputs:
        given = prompt.inputs
        encoded = encoded_images(given)
        own = given.get("pixel_values")
        if prompt.ids is None or (own is None and encoded is None):
            raise ValueError(
                "the second branch reads other pixels, but the model was not called with input_ids and pixel_values"
            )
        first = given.get("input_ids")
        if isinstance(first, Tensor) and first.shape[1] < (prompt.session.notes.prompt_length or 0):
            raise ValueError(
                f"the second branch reads other pixels, but of the prompt {first.shape[1]} of "
                f"{prompt.session.notes.prompt_length} tokens were read in one call, and its images with them; leave "
                "prefill_chunk_size out"
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
        rest = {k: v for k, v in given.items() if k not in OWN_INPUTS and k not in (ENCODED, "pixel_values")}
        rest.update(prompt.per_token(), input_ids=prompt.ids, pixel_values=pixels.to(self._like(prompt)))
        return BranchInputs(rest, prompt.types)

    @staticmethod
    def _like(prompt: Prompt) -> Tensor:
        return next(p for p in prompt.model.parameters() if p.is_floating_point())


class BlockPass:
    """Another reading of a prompt: once to learn how the model's blocks are called, then block by block.

    What interventions do to a block then depends on what they did to the blocks before it.

    Args:
        session: the session.
        reading: what is read.
        branch: under which name.
    """

    def __init__(self, session: Session, reading: BranchInputs, branch: str):
        self.session, self.branch, self.types = session, branch, reading.types
        self.stepping, self.done = False, -1
        sites = {s.layer: s for s in session.sites if s.kind == "self"}
        self.blocks = [(layer, block_of(session.model, sites[layer])) for layer in sorted(sites)]
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.cache: Any = None
        handles = [
            block.register_forward_pre_hook(self._remember(layer), with_kwargs=True) for layer, block in self.blocks
        ]
        valid = reading.types != PAD
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        known = inspect.signature(session.model.forward).parameters
        given = {"attention_mask": valid.long(), "position_ids": positions, "logits_to_keep": 1}
        try:
            with session.at(branch=branch, token_types=reading.types):
                session.model(**reading.inputs, **{k: v for k, v in given.items() if k in known}, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()

    def _remember(self, layer: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.cache is None:
                self.cache = copy.deepcopy(cache_in(kwargs))  # nothing is in it yet
            if not args:
                kwargs = dict(kwargs)
                args = (kwargs.pop("hidden_states"),)
            # What enters later blocks is made anew.
            self.calls[layer] = (args if not self.calls else args[1:], kwargs)

        return before

    def advance(self, layer: int) -> None:
        """Read on to the end of the block of ``layer``."""
        self.stepping = True
        with self.session.at(branch=self.branch, token_types=self.types):
            for number, block in self.blocks:
                if not self.done < number <= layer:
                    continue
                args, kwargs = self.calls[number]
                if self.done < 0:
                    self.hidden, args = args[0], args[1:]
                if (name := cache_name(kwargs)) is not None:
                    kwargs = {**kwargs, name: self.cache}
                out = block(self.hidden, *args, **kwargs)
                self.hidden = out[0] if isinstance(out, tuple) else out
                self.done = number
