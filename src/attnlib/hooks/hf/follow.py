"""Following a transformers model: prompts, steps, and scores of the next token."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..sequences import Sequence, put
from ..session import Session
from ..tokens import IMAGE, TypeTracker
from .cache import evicted_layer_class
from .names import (
    BATCHED,
    CANDIDATES,
    DRAFTING,
    PROCESSORS,
    UNCONDITIONAL,
    UNCONDITIONAL_CONTEXT,
    UNCONDITIONAL_IDS,
    cache_in,
    cached_tokens,
    made_cache,
    prompt_being_read,
    reader,
    without_cache,
)


def follow_generate(session: Session) -> None:
    """Know when ``generate`` runs, how long its prompt is, and the scores of its next tokens."""
    model: Any = session.model
    if not callable(getattr(model, "generate", None)) or not hasattr(model, PROCESSORS):
        scored = session.acting("on_logits")
        if scored:
            warnings.warn(
                f"{type(scored[0]).__name__} changes the scores of next tokens, for which generate() asks; "
                f"{type(model).__name__} has none, so it acts in session.logits(ids, logits) only. Attach to the model "
                "that generates",
                UserWarning,
                stacklevel=4,
            )
        return
    session.set_attribute(model, "generate", _generate(session))
    for name in BATCHED:
        if hasattr(model, name):
            session.set_attribute(model, name, _refused(session, name))
    session.set_attribute(model, PROCESSORS, _processors(session))
    if hasattr(model, CANDIDATES):
        session.set_attribute(model, CANDIDATES, _candidates(session))


def _refused(session: Session, name: str) -> Callable[..., Any]:
    """Continuous batching packs tokens of several requests into one row, with a cache of pages."""

    @functools.wraps(getattr(session.model, name))
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}() packs tokens of several requests into one row of the batch, so positions, prompts and caches of "
            f"the attached {type(session.model).__name__} cannot be told apart; use generate() with a batch"
        )

    return refuse


def _generate(session: Session) -> Callable[..., Any]:
    """``generate``, one at a time in a branch."""
    original: Any = session.model.generate  # type: ignore[union-attr]
    running: list[tuple[int, str | None, str]] = []

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        me, branch = threading.get_ident(), session.branch
        other = next((name for thread, there, name in running if thread != me and there == branch), None)
        if other is not None:
            raise RuntimeError(
                f"generate() already runs on the attached {type(session.model).__name__}, in the thread {other!r}; a "
                "session follows one at a time. Wait for it, or attach to a copy of the model per thread"
            )
        mine = (me, branch, threading.current_thread().name)
        running.append(mine)
        before = session.promised.get(branch)
        try:
            return original(*args, **kwargs)
        finally:
            running.remove(mine)
            session.promised.pop(branch, None)
            if before is not None:
                session.promised[branch] = before

    return generate


def _candidates(session: Session) -> Callable[..., Any]:
    """``generate``'s source of drafts, silent until the prompt was read: drafts are no part of it."""
    original = getattr(session.model, CANDIDATES)

    @functools.wraps(original)  # type: ignore[arg-type]
    def make(*args: Any, **kwargs: Any) -> Any:
        often = [i for i in session.acting("on_cache") if i.while_decoding]
        if often:
            raise ValueError(
                f"{type(often[0]).__name__} evicts keys while decoding, where drafts (assistant_model, "
                "prompt_lookup_num_tokens) would be among the tokens that choose; evict after the prompt "
                "only, or decode without drafts"
            )
        generator = original(*args, **kwargs)  # type: ignore[operator]
        scored, asks = session.acting("on_logits"), hasattr(generator, DRAFTING)
        drafting = getattr(generator, "assistant_model", None)
        if isinstance(drafting, nn.Module) and any(module in session._touched for module in drafting.modules()):
            raise ValueError(
                f"the drafts come from the attached {type(session.model).__name__} itself (assistant_early_exit, or it "
                "is its own assistant_model), whose calls are then those of two sequences, and what is attached would "
                "act on drafts, too; possible: another assistant_model, a copy of this one, prompt_lookup_num_tokens, "
                "or decoding without drafts"
            )
        if scored and asks:
            raise ValueError(
                f"{type(scored[0]).__name__} changes scores, and would be asked about those of the model that drafts "
                "(assistant_model), which are not served; prompt_lookup_num_tokens is"
            )
        drafts = generator.get_candidates
        read: list[bool] = []  # True once the prompt was read

        @functools.wraps(drafts)
        def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not read and not asks:
                read.append(True)
                return input_ids, None
            # An assistant drafts all the same, since it counts its rounds; to the model it is as if all were rejected.
            drafted = drafts(input_ids, *args, **kwargs)
            if read:
                return drafted
            read.append(True)
            return input_ids, None

        generator.get_candidates = get_candidates
        return generator

    return make


def _processors(session: Session) -> Callable[..., Any]:
    """``generate``'s own list of processors, with ``on_logits`` in front of it."""
    original = getattr(session.model, PROCESSORS)

    @functools.wraps(original)  # type: ignore[arg-type]
    def make(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original(generation_config, *args, **kwargs)  # type: ignore[operator]
        if session._in_logits:
            return processors  # a generate() that an intervention runs by itself
        beams = generation_config.num_beams or 1
        length = kwargs.get("input_ids_seq_length", args[0] if args else None)
        session.promised[session.branch] = (int(length) if length else None, beams)
        session.renew(beams)

        def process(ids: Tensor, scores: Tensor) -> Tensor:
            after = session.logits(ids, scores)
            if beams > 1 and after is not scores and not torch.equal(after, scores):
                # Beams add log-probabilities up.
                after = after.log_softmax(-1)
            return after

        for processor in processors:
            if callable(getattr(processor, UNCONDITIONAL, None)):
                setattr(processor, UNCONDITIONAL, _unconditional(session, processor))
        if session.acting("on_logits"):
            processors.insert(0, process)
        return processors

    return make


#: The branch that ``generate(guidance_scale=...)`` reads beside the prompt.
GUIDANCE = "unconditional"


def _unconditional(session: Session, processor: Any) -> Callable[..., Any]:
    """What a processor of guidance asks the model, in a branch of its own: it is another sequence, of another prompt.

    Its prompt is the last token, or ``negative_prompt_ids``.
    """
    original, given = getattr(processor, UNCONDITIONAL), getattr(processor, UNCONDITIONAL_CONTEXT)[UNCONDITIONAL_IDS]
    branch = GUIDANCE if session.branch is None else f"{session.branch}, {GUIDANCE}"
    types = None if session.tracker is None else session.tracker.source
    if isinstance(types, Tensor):
        if given is not None:
            raise ValueError(
                f"token_types tells of {types.shape[1]} tokens of the prompt, and negative_prompt_ids is another "
                f"prompt, of {given.shape[1]}; give a rule from ids to types"
            )
        types = types[:, -1:]

    @functools.wraps(original)
    def unconditional(*args: Any, **kwargs: Any) -> Any:
        with session.at(branch=branch, token_types=types):
            return original(*args, **kwargs)

    return unconditional


class _Follow:
    """Before every call of the model: token types, the prompt, and which decoding step this is."""

    def __init__(self, session: Session, watch: bool):
        self.session, self.watch = session, watch
        self.waiting: Sequence | None = None
        self.names = list(inspect.signature(session.model.forward).parameters)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = cache_in(given)
        offset = 0 if cache is None else int(cache.get_seq_length())
        decoder = given.get("decoder_input_ids")
        ids = given.get("input_ids") if decoder is None else decoder
        embeds = given.get("inputs_embeds")
        read = ids if ids is not None else embeds
        self._step(given, cache, offset, read)
        if self.session.tracker is not None:
            in_prompt = self.session.notes.reading_prompt(offset)
            self._types(model, self.session.tracker, given, offset, in_prompt)
        self._announce(cache, offset, read)

    @staticmethod
    def _types(model: nn.Module, tracker: TypeTracker, given: dict[str, Any], offset: int, in_prompt: bool) -> None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        read = ids if ids is not None else embeds
        if read is None:
            raise ValueError(f"{type(model).__name__} was called without input_ids or inputs_embeds")
        tracker.advance(ids, offset, read.shape[1], given.get("attention_mask"), in_prompt)
        assert tracker.types is not None
        if given.get("pixel_values") is not None and not bool((tracker.types == IMAGE).any()):
            raise ValueError(
                f"{type(model).__name__} was given pixel_values, but token_types finds no image token in the prompt; "
                "TokenTypes(image=...) takes the id of the image placeholder, often model.config.image_token_id"
            )

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """A cache that the model made by itself carries the sequence too."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            cache = made_cache(output)
            if cache is not None:
                put(cache, waiting)

    def _step(self, given: dict[str, Any], cache: Any, offset: int, read: Any) -> None:
        """Which sequence this is, and how much of it is its prompt."""
        session = self.session
        count = read.shape[1] if isinstance(read, Tensor) and read.dim() > 1 else 0
        if offset:
            session.goes_on(cache)
            self._filled_before(cache, offset, count)
        elif cache is not None or session.notes.length is None or not _continues(session.notes.read, read):
            sequence = session.starts(cache)
            if session.notes.prompt_length is None:
                # An attached part of a model does not see who generates with the whole.
                session.notes.prompt_length = prompt_being_read(session.model)
            self.waiting = sequence if cache is None else None
            if self.watch:
                session.new_prompt(without_cache(given))
        notes = session.notes
        if not offset:
            notes.kept.clear()
            if cache is None:
                notes.read = read
        if notes.length is None:
            if offset and self.watch:
                session.new_prompt(without_cache(given))
            notes.length = notes.prompt_length or offset + count
        elif offset and notes.prompt_length is None and count > 1 and offset == notes.length == notes.total:
            notes.length = offset + count  # the prompt is read in chunks
        notes.total = offset + count
        self._whole(notes.prompt_length or 0, offset + count)

    def _whole(self, length: int, read: int) -> None:
        """Refuse a prompt in pieces where something attached acts on it as a whole."""
        if not 0 < read < length or not self.session.notes.begun:
            return
        for i in self.session.interventions:
            if i.whole_prompt and not i.identity:
                raise ValueError(
                    f"{type(i).__name__} acts on a prompt as a whole, but of this one {read} of {length} tokens are "
                    "read in one call; leave prefill_chunk_size out"
                )

    def _filled_before(self, cache: Any, offset: int, count: int) -> None:
        """Say so where a prompt goes on from a cache that was filled elsewhere: it is never read as a whole here."""
        session = self.session
        if session.notes.begun or session.notes.length is not None or count < 2:
            return
        acting = [i for stage in ("on_cache", "on_tokens") for i in session.acting(stage) if not i.while_decoding]
        if acting and not any(isinstance(layer, evicted_layer_class()) for layer in getattr(cache, "layers", ())):
            warnings.warn(
                f"{type(acting[0]).__name__} acts on prompts that are read in this session from their first token; "
                f"the cache holds {offset} tokens that were read elsewhere, so nothing leaves it",
                UserWarning,
                stacklevel=2,
            )

    def _announce(self, cache: Any, offset: int, read: Any) -> None:
        session, length = self.session, self.session.notes.length
        if session.branch is None and self.watch:
            count = read.shape[1] if isinstance(read, Tensor) and read.dim() > 1 else 0
            assert length is not None
            session.announce(max(0, offset + 1 - length if cache is not None else count - length))


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
