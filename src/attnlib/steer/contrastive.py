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
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_real, shaped
from ..hooks.branches import Branch, Prompt, check_branches
from ..hooks.hf.follow import watch_prompts
from ..hooks.hf.names import cache_argument, cache_out, crop, reader
from ..hooks.intervention import Intervention
from ..hooks.session import Session
from ..hooks.tokens import IMAGE, PAD


@shaped(logits="float (B, V)", other="float (B, V)")
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
    check_real("cutoff", cutoff, least=0, most=1)
    if normalize:
        logits, other = logits.log_softmax(-1), other.log_softmax(-1)
    out = logits if a == 1 else a * logits
    if b:
        out = out + b * other
    if cutoff > 0:
        out = out.masked_fill(logits < math.log(cutoff) + logits.amax(-1, keepdim=True), float("-inf"))
    return out


@dataclass
class _State:
    """The second branch of one generation."""

    start: int
    read: Tensor
    valid: Tensor
    types: Tensor
    cache: Any
    logits: Tensor
    image: Tensor
    first: Any = None
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

    >>> from attnlib.steer import NoImage
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
        a, b = check_real("a", a), check_real("b", b)
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
        check_branches(model, type(self).__name__, "a second branch")
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
        if given.get("input_ids") is not None and ids.shape[1] < types.shape[1]:
            types = types[:, : ids.shape[1]]  # drafts were read with the prompt
        embeds: Tensor | None = None
        if any(e is not None for e in self._read):
            embeds = torch.cat([e for e in self._read if e is not None], 1)[:, : types.shape[1]]
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
            out = self.beyond(logits)
        else:
            out = contrast(logits, state.logits.to(logits), self.a, self.b, self.cutoff, self.normalize)
        return out if out is logits else torch.where(state.image[:, None], out, logits)

    def beyond(self, logits: Tensor) -> Tensor:
        """Scores beyond the interval, where the second branch is not read any more."""
        return logits

    def _follow(self, ids: Tensor, logits: Tensor) -> _State | None:
        """The second branch, with the same tokens read as the first."""
        notes = self.session.notes
        key = f"{self.name}:{self._branch_name}"
        state = notes.get(key)
        if state is None:
            prompt = self._prompt(ids)
            image = (prompt.types == IMAGE).any(1)
            state = _State(ids.shape[1], ids, image, prompt.types, None, logits, image)
            if (self.b or self.always) and bool(image.any()):
                self._begin(state, prompt)
            notes[key] = state
            self._fresh = False
            self._read.clear()
            return state
        if len(ids) != len(state.image):
            raise ValueError(f"{type(self).__name__}: the batch had {len(state.image)} rows, now it has {len(ids)}")
        over = self.interval is not None and ids.shape[1] - state.start > self.interval
        if over:
            return state  # it is not asked for any more
        if notes.beams == 1:
            self._take_back(state, ids)
        if state.cache is not None and ids.shape[1] > state.read.shape[1]:
            self._extend(state, ids[:, state.read.shape[1] :])
        state.read = ids
        return state

    def _take_back(self, state: _State, ids: Tensor) -> None:
        """Forget tokens that the sequence lost again: drafts that were not accepted."""
        seen = state.read.shape[1]
        count = min(seen, ids.shape[1])
        same = int((state.read[:, :count] == ids[:, :count]).all(0).long().cumprod(0).sum())
        if same == seen:
            return
        if same < state.start:
            raise ValueError(
                f"{type(self).__name__}: the prompt had {state.start} tokens, and the sequence of {ids.shape[1]} "
                f"shares only {same} with it; only tokens after the prompt can be taken back, as drafts are"
            )
        if same == ids.shape[1]:  # its scores are those after a token that was read: it is read once more
            if same == state.start:
                state.logits = state.first
            else:
                same -= 1
        if state.cache is not None:
            crop(state.cache, seen - same)
            state.valid = state.valid[:, : state.valid.shape[1] - (seen - same)]
        state.read = state.read[:, :same]

    def _begin(self, state: _State, prompt: Prompt) -> None:
        reading = self.branch.read(prompt)
        valid = reading.types != PAD
        state.types, state.valid = reading.types, valid
        state.base = self._first_position(prompt)
        positions = (valid.long().cumsum(1) - 1).clamp(min=0) + state.base
        self._call(state, {**reading.inputs, "position_ids": positions})
        state.first = state.logits

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
        self._call(
            state, {"input_ids": new, "position_ids": positions, **cache_argument(self.session.model, state.cache)}
        )

    def _call(self, state: _State, inputs: dict[str, Any]) -> None:
        inputs = {**inputs, "attention_mask": state.valid.long(), "use_cache": True, "logits_to_keep": 1}
        with self.session.at(branch=self._branch_name, token_types=state.types):
            out = self.session.model(**{k: v for k, v in inputs.items() if k in self._takes})
        self.forwards += 1
        state.cache, state.logits = cache_out(out), out.logits[:, -1]
