"""A session: what is attached to one model, what the user says about its calls, and how all of it is undone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .intervention import Intervention, Stages, implements
from .notes import Notes
from .site import Site
from .tokens import TypeTracker


class Adapter:
    """Call interception and site description for one family of models."""

    name: ClassVar[str]
    stages: ClassVar[frozenset[str]] = frozenset()

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        """Every attention of ``model`` (or of its ``part``) that can be acted on; raises when there is none."""
        raise NotImplementedError

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        """Intercept the sites of ``plan``; every change goes through ``session.undo`` at once."""
        raise NotImplementedError


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()

_MISSING: Any = object()


class Session:
    """Interventions attached to a model. A context manager: leaving it restores the model, also after an exception.

    Args of :meth:`at` describe calls of the model; what is not said there or in ``attach`` stays ``None`` in the site.
    """

    def __init__(
        self,
        model: nn.Module,
        interventions: Sequence[Intervention],
        rows: Sequence[str] | None = None,
        tracker: TypeTracker | None = None,
    ):
        self.model = model
        self.interventions = tuple(interventions)
        self._trackers: dict[str | None, TypeTracker] = {} if tracker is None else {None: tracker}
        self._notes: dict[str | None, Notes] = {}
        self._announced: int | None = None
        self._in_logits = False
        self.counts_steps = False
        self.rows = _row_names(rows)
        self.pass_name: str | None = None
        self.branch: str | None = None
        self.step: int | None = None
        self.active = False
        self.sites: list[Site] = []
        self.attached: list[Site] = []
        self._undo: list[Callable[[], None]] = []

    # ---- one state per branch

    @property
    def tracker(self) -> TypeTracker | None:
        """Token types of the current branch; each branch counts its own tokens."""
        if self.branch not in self._trackers:
            if None not in self._trackers:
                return None
            self._trackers[self.branch] = TypeTracker(self._trackers[None].source)
        return self._trackers[self.branch]

    @property
    def notes(self) -> Notes:
        """What adapters and interventions remember of the current branch between calls; begun anew by a new prompt."""
        if self.branch not in self._notes:
            self._notes[self.branch] = Notes()
        return self._notes[self.branch]

    @property
    def prompt(self) -> dict[str, Any]:
        """The named arguments with which the model read the prompt of the current branch, without its cache."""
        prompt = self.notes.prompt
        if prompt is None:
            raise RuntimeError(
                "no prompt yet: the model was not called in this session, or nothing attached asks for it (only "
                "interventions with on_logits or on_step do)"
            )
        return prompt

    def new_prompt(self, given: dict[str, Any]) -> None:
        """For adapters: the current branch starts to read a prompt, given the model's named arguments but the cache."""
        self.notes.begin(dict(given))
        if self.branch is None:
            self._announced = None

    # ---- stages of the whole model

    def acting(self, stage: str) -> list[Intervention]:
        """The interventions that implement a stage and can do something, in order."""
        return [i for i in self.interventions if implements(i, stage) and not i.identity]

    def logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores of the next token after all ``on_logits``; ``generate`` asks for them by itself.

        Args:
            ids: (B, L) tokens so far.
            logits: (B, V) the model's scores of the next token.

        Returns:
            (B, V).
        """
        acting = self.acting("on_logits")
        if self._in_logits or not acting:
            return logits
        if ids.dim() != 2 or logits.dim() != 2 or len(ids) != len(logits):
            raise ValueError(
                f"ids must be (B, L) and logits (B, V) of the same batch, got {tuple(ids.shape)} and "
                f"{tuple(logits.shape)}"
            )
        notes = self.notes
        notes.last_ids, notes.ids = notes.ids, ids
        self._in_logits = True
        try:
            for i in acting:
                after = i.on_logits(ids, logits)
                if not isinstance(after, Tensor) or after.shape != logits.shape:
                    got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
                    raise ValueError(
                        f"{type(i).__name__}.on_logits must return (B, V)={tuple(logits.shape)}, got {got}"
                    )
                logits = after
        finally:
            self._in_logits = False
        return logits

    def parents(self) -> Tensor | None:
        """(B,) row of the step before that each row of the batch continues; ``None`` at the first step of a prompt.

        Beams change places from step to step, and whatever a branch keeps by row (a cache, above all) has to move with
        them. Rows are compared by their tokens, within the beams of one sample only.
        """
        last, ids = self.notes.last_ids, self.notes.ids
        if last is None or ids is None or last.shape != (len(ids), ids.shape[1] - 1):
            return None
        beams = self.notes.beams
        rows = torch.arange(len(ids), device=ids.device)
        if beams == 1:
            return rows
        same = (ids[:, None, :-1] == last[None]).all(-1) & (rows[:, None] // beams == rows // beams)
        return torch.where(same.diagonal(), rows, same.to(torch.int8).argmax(1))

    def announce(self, step: int) -> None:
        """Call ``on_step`` of every intervention, once per step; nothing happens inside a branch."""
        if self.branch is not None or step == self._announced:
            return
        self._announced = step
        for i in self.acting("on_step"):
            i.on_step(step)

    # ---- bookkeeping for adapters

    def undo(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the session is detached; the last one given runs first."""
        self._undo.append(action)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember to put back exactly what was there, or nothing."""
        before = owner.__dict__.get(name, _MISSING)
        owner.__dict__[name] = value

        def restore() -> None:
            if before is _MISSING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

        self.undo(restore)

    def hook(self, handle: Any) -> None:
        """Remember a hook handle to remove."""
        self.undo(handle.remove)

    def described(self, site: Site, batch: int, **fields: Any) -> Site:
        """A template site with what the user said about this call."""
        return self.made(site.but(**fields).__dict__, batch, fields)

    def made(self, fields: dict[str, Any], batch: int, given: dict[str, Any] | None = None) -> Site:
        """A site of these fields, all of them, with what the user said about this call; ``fields`` become its own."""
        if self.rows is not None and len(self.rows) != batch:
            raise ValueError(
                f"rows names {len(self.rows)} rows of the batch ({list(self.rows)}), but layer {fields['layer']} "
                f"({fields['name']}) got a batch of {batch}; give one name per row"
            )
        fields["rows"], fields["pass_name"], fields["branch"] = self.rows, self.pass_name, self.branch
        if given is None or "step" not in given:
            fields["step"] = self.step
        if given is None or "training" not in given:
            fields["training"] = fields["module"].training
        new = object.__new__(Site)
        # Sites are made in every layer of every decoding step; setting thirty fields one by one is what would cost.
        object.__setattr__(new, "__dict__", fields)
        return new

    # ---- for the user

    @contextmanager
    def at(
        self,
        *,
        step: int | None = None,
        pass_name: str | None = None,
        branch: str | None = None,
        rows: Sequence[str] | None = None,
        token_types: Tensor | Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Session]:
        """Say which step, pass, branch or rows the calls of the model inside this block are.

        Each branch has token types, notes and a count of tokens of its own, so calls of several branches may be mixed
        in any order, also from within ``on_logits`` while ``generate`` runs, as long as each has its own cache.
        ``token_types`` are those of the branch, where its prompt is another one than the main branch's.
        """
        before = self.step, self.pass_name, self.branch, self.rows
        if token_types is not None:
            name = self.branch if branch is None else branch
            if name is None:
                raise ValueError("token_types of at() are those of a branch; name it: at(branch=..., token_types=...)")
            if name not in self._trackers or self._trackers[name].source is not token_types:
                self._trackers[name] = TypeTracker(token_types)
        self.step = self.step if step is None else step
        self.pass_name = self.pass_name if pass_name is None else pass_name
        self.branch = self.branch if branch is None else branch
        self.rows = self.rows if rows is None else _row_names(rows)
        try:
            if step is not None and not self.counts_steps:
                self.announce(step)
            yield self
        finally:
            self.step, self.pass_name, self.branch, self.rows = before

    @property
    def results(self) -> dict[str, Any]:
        """What each intervention has to show, by its name; a second one of the same name gets ``-2`` and so on."""
        shown: dict[str, Any] = {}
        for i in self.interventions:
            name, count = i.name, 1
            while name in shown:
                count += 1
                name = f"{i.name}-{count}"
            shown[name] = i.results()
        return shown

    def detach(self) -> None:
        """Restore the model; calling it again does nothing."""
        if not self.active:
            return
        self.active = False
        errors = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # noqa: BLE001 - every other change must still be undone
                errors.append(error)
        _sessions.pop(self.model, None)
        for i in self.interventions:
            i._owner = None
        if errors:
            raise errors[0]

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        layers = sorted({s.layer for s in self.attached})
        state = "attached" if self.active else "detached"
        return f"Session({state}, layers {layers}, {', '.join(type(i).__name__ for i in self.interventions)})"


def _row_names(rows: Sequence[str] | None) -> tuple[str, ...] | None:
    if rows is None:
        return None
    if isinstance(rows, str) or not all(isinstance(r, str) for r in rows):
        raise TypeError(
            f'rows must be a sequence of names, one per row of the batch, e.g. ("uncond", "cond"); got {rows!r}'
        )
    return tuple(rows)
