"""Following a transformers model: prompts, steps, and scores of the next token."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..session import Session
from ..tokens import IMAGE, TypeTracker
from .names import PROCESSORS, cache_in, cached_tokens, reader, without_cache


def _processors(session: Session) -> Callable[..., Any]:
    """``generate``'s own list of processors, with ``on_logits`` in front of it."""
    original = getattr(session.model, PROCESSORS)

    @functools.wraps(original)  # type: ignore[arg-type]
    def make(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original(generation_config, *args, **kwargs)  # type: ignore[operator]
        if session._in_logits:
            return processors  # a generate() that an intervention runs by itself
        beams = generation_config.num_beams or 1
        notes = session.notes
        notes.begin(None)
        notes.beams = beams
        length = kwargs.get("input_ids_seq_length", args[0] if args else None)
        notes.prompt_length = int(length) if length else None

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
        cache = cache_in(given)
        offset = 0 if cache is None else int(cache.get_seq_length())
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
        cached = cache is not None
        length = notes.length
        if not offset:
            notes.kept.clear()
            if cached or length is None or not _continues(notes.read, read):
                session.new_prompt(without_cache(given))
                length = notes.prompt_length or count
            if not cached:
                notes.read = read
        elif length is None:
            session.new_prompt(without_cache(given))
            length = notes.prompt_length or offset + count
        elif notes.prompt_length is None and count > 1 and offset == length == notes.total:
            length = offset + count  # the prompt is read in chunks
        notes.length, notes.total = length, offset + count
        if session.branch is None:
            session.announce(max(0, offset + 1 - length if cached else count - length))


def _continues(before: Any, read: Any) -> bool:
    """Whether a call without cache reads what the last one read and more (beams may have changed places)."""
    if not isinstance(before, Tensor) or not isinstance(read, Tensor) or read.dim() != 2 or before.dim() != 2:
        return False
    if len(read) != len(before) or read.shape[1] <= before.shape[1]:
        return False
    return bool((read[:, None, : before.shape[1]] == before).all(-1).any(1).all())


def watch_prompts(session: Session, started: Callable[[dict[str, Any]], None]) -> None:
    """Call ``started(inputs by name)`` before every call of the model that begins a sequence."""

    named = reader(session.model)

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = named(args, kwargs)
        if cached_tokens(given) == 0:
            started(given)

    session.hook(session.model.register_forward_pre_hook(before, with_kwargs=True))
