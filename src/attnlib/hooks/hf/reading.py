"""Embeddings and last states of the tokens that a transformers model reads.

Embeddings are changed behind the module that looks them up, so that what the model does with them next (images in place
of their placeholders, scaling) sees the new ones; last states behind the decoder, in front of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..intervention import Intervention
from ..reading import Reading
from ..recompute import Shared
from ..session import Session
from .names import cached_tokens, reachable, reader


def decoder_of(model: nn.Module) -> nn.Module:
    """The module whose first output are the last hidden states of the text."""
    any_model: Any = model
    found = any_model.get_decoder() if hasattr(model, "get_decoder") else model
    if isinstance(found, nn.Module) and any(found is m for m in model.modules()):
        # What a model calls its decoder may be its head.
        if any(reachable(m) for m in found.modules()):
            return found
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def embedding_of(model: nn.Module, who: Intervention) -> nn.Module:
    """The module that looks tokens up."""
    any_model: Any = model
    try:
        found = any_model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{type(who).__name__} acts on token embeddings (on_embeddings), and {type(model).__name__} has none"
        )
    return found


class TokenRuntime(Shared):
    """Serves ``on_embeddings`` and ``on_states`` of one session."""

    def __init__(self, session: Session):
        self.session = session
        self.named = reader(session.model)
        self.embeds, self.states = session.acting("on_embeddings"), session.acting("on_states")
        self.calls: list[tuple[Reading, set[str]]] = []

    @classmethod
    def install(cls, session: Session) -> None:
        """Intercept lookup and last states, where somebody asks for them."""
        runtime = cls(session)
        acting = [*runtime.embeds, *runtime.states]
        if not acting:
            return
        model: Any = session.model
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(acting[0]).__name__} acts on the tokens that a model reads (on_embeddings, on_states), and "
                f"{type(model).__name__} reads two sequences; decoders are served"
            )
        session.hook(model.register_forward_pre_hook(runtime.begin, with_kwargs=True))
        if runtime.embeds:
            lookup = embedding_of(model, runtime.embeds[0])
            session.hook(lookup.register_forward_hook(runtime.looked_up))
        if runtime.states:
            session.hook(decoder_of(model).register_forward_hook(runtime.read))
        session.hook(model.register_forward_hook(runtime.end, always_call=True))

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.named(args, kwargs)
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            who = type([*self.embeds, *self.states][0]).__name__
            raise ValueError(
                f"{who} chooses tokens by their ids, but {type(model).__name__} was called without input_ids; give "
                "them in place of inputs_embeds"
            )
        session, offset = self.session, cached_tokens(given)
        notes = session.notes
        reading = Reading(
            ids=ids,
            slots=torch.arange(offset, offset + ids.shape[1], device=ids.device).expand_as(ids),
            offset=offset,
            phase="prefill" if notes.reading_prompt(offset) else "decode",
            beams=notes.beams,
            step=session._announced if session.branch is None else session.step,
            pass_name=session.pass_name,
            branch=session.branch,
        )
        self.calls.append((reading, set()))

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self.calls:
            return
        _, served = self.calls.pop()
        if output is None:  # an exception in mid-call
            return
        for acting, name, what in ((self.embeds, "on_embeddings", "tokens"), (self.states, "on_states", "states")):
            if acting and name not in served:
                raise RuntimeError(
                    f"{type(acting[0]).__name__}.{name} was not asked: {type(model).__name__} did not pass its {what} "
                    "through the module that was attached to"
                )

    def looked_up(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.calls or not args or not isinstance(args[0], Tensor):
            return None
        reading, served = self.calls[-1]
        # Models also look single tokens up, to find placeholders.
        if args[0].shape != reading.ids.shape or "on_embeddings" in served:
            return None
        served.add("on_embeddings")
        new = output
        for i in self.embeds:
            new = self._checked(i, "on_embeddings", output, i.on_embeddings(reading, new))
        return None if new is output else new

    def read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.calls:
            return None
        reading, served = self.calls[-1]
        served.add("on_states")
        plain = isinstance(output, tuple)
        before = output[0] if plain else output.last_hidden_state
        reading = self._left(reading, before)
        states = before
        for i in self.states:
            states = self._checked(i, "on_states", before, i.on_states(reading, states))
        if states is before:
            return None
        if plain:
            return (states, *output[1:])
        fields = dict(output)
        fields["last_hidden_state"] = states
        every = fields.get("hidden_states")
        if isinstance(every, tuple) and every and every[-1] is before:
            fields["hidden_states"] = (*every[:-1], states)
        return type(output)(**fields)

    def _left(self, reading: Reading, states: Tensor) -> Reading:
        """The tokens that these are the states of, where others were removed on the way."""
        if states.shape[:2] == reading.ids.shape:
            return reading
        kept = self.session.notes.kept
        slots = kept[max(kept)].slots if kept else None
        if slots is None or slots.shape != states.shape[:2]:
            raise RuntimeError(
                f"{type(self.states[0]).__name__}: {type(self.session.model).__name__} read tokens of shape "
                f"{tuple(reading.ids.shape)} and gave states of shape {tuple(states.shape)}; which are whose is not "
                "known"
            )
        at = (slots - reading.offset).clamp(min=0)
        return reading.but(ids=reading.ids.gather(1, at).masked_fill(slots < 0, -1), slots=slots)

    @staticmethod
    def _checked(who: Intervention, stage: str, before: Tensor, after: Any) -> Tensor:
        if not isinstance(after, Tensor) or after.shape != before.shape or after.dtype != before.dtype:
            got = f"{tuple(after.shape)} {after.dtype}" if isinstance(after, Tensor) else type(after).__name__
            raise ValueError(
                f"{type(who).__name__}.{stage} must return (B, N, C)={tuple(before.shape)} {before.dtype}, got {got}"
            )
        return after
