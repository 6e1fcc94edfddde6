"""A session: what is attached to one model, what the user says about its calls, and how all of it is undone."""

from __future__ import annotations

import copy
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..nn.recompute import Again, follow, running_backward
from .changes import Action, Change, Entry, Hook, hooks_of, plain_copies, wraps
from .eager import eagerly, forget_compiled
from .intervention import Intervention, Stages, implements
from .notes import Notes
from .recompute import Shared, State
from .sequences import Sequence as ReadSequence
from .sequences import put, sequence_of
from .site import Site
from .tokens import TypeTracker


class Adapter:
    """Call interception and site description for one family of models."""

    name: ClassVar[str]
    stages: ClassVar[frozenset[str]] = frozenset()

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        """Every attention of ``model`` (or of its ``part``) that can be acted on; raises when there is none."""
        raise NotImplementedError

    def trust(self, model: nn.Module, sites: list[Site], attach: Callable[..., Session]) -> None:
        """Refuse a model whose library nobody tested; ``attach`` may be used to look at it."""

    def cannot(self, intervention: Intervention, site: Site) -> str | None:
        """Why an intervention that fits a site cannot act there in this model; ``None`` where it can."""
        return None

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        """Intercept the sites of ``plan``; every change goes through ``session.undo`` at once."""
        raise NotImplementedError


def part_of(model: nn.Module, part: str | None) -> tuple[nn.Module, str]:
    """The submodule that ``attach(part=...)`` names, and what stands before the names of modules in it."""
    if part is None:
        return model, ""
    modules = dict(model.named_modules())
    names = [name for name in modules if name and name.count(".") < 2]
    if not isinstance(part, str):
        raise TypeError(
            f"part must be the dotted path of a submodule (str), got {type(part).__name__} {part!r:.60}; "
            f"{type(model).__name__} has {names}"
        )
    if not part or part not in modules:
        raise ValueError(f"part={part!r} is not in {type(model).__name__}; it has {names}")
    return modules[part], part + "."


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


@dataclass
class _Now:
    """What is true of the calls that are being made, and what is remembered of those before."""

    rows: tuple[str, ...] | None = None
    pass_name: str | None = None
    branch: str | None = None
    step: int | None = None
    steps: int | None = None
    timestep: Any = None
    told: tuple[str, ...] | None = None
    prompts: tuple[int, ...] | None = None
    run: int = 0
    announced: int | None = None
    in_logits: bool = False
    trackers: dict[str | None, TypeTracker] = field(default_factory=dict)
    notes: dict[str | None, Notes] = field(default_factory=dict)
    sequences: dict[str | None, ReadSequence] = field(default_factory=dict)
    renewed: set[str | None] = field(default_factory=set)
    promised: dict[str | None, tuple[int | None, int]] = field(default_factory=dict)
    frame: dict[str, Any] = field(default_factory=dict)


def _said(name: str) -> Any:
    get = operator.attrgetter(f"_now.{name}")  # read several times in every layer of every call

    def put(session: Session, value: Any) -> None:
        setattr(session._now, name, value)

    return property(get, put)


class Session(Shared):
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
        self._now = _Now(_row_names(rows))
        if tracker is not None:
            self._now.trackers[None] = tracker
        self.counts_steps = False
        self.active = False
        self.sites: list[Site] = []
        self.attached: list[Site] = []
        self.stateful: list[Any] = []
        self._owners: dict[int, nn.Module] = {}
        #: Where something attached does not act although it was not told to leave the layer out: {name: {layer: why}}.
        self.report: dict[str, dict[int, str]] = {}
        #: Of a diffusers pipeline that was attached to: what is known of its running call.
        self.sampling: Any = None
        self._changes: list[Change] = []
        self._touched: dict[nn.Module, list[Change]] = {}
        self._found: list[tuple[dict[Any, Any], Any, Any, str, nn.Module]] = []
        self._followers: list[Callable[[], None]] = []
        self._may_recompute = True
        self._recomputing = 0
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0
        self._blocks: list[object] = []

    rows = _said("rows")
    pass_name = _said("pass_name")
    branch = _said("branch")
    step = _said("step")
    _announced = _said("announced")
    _in_logits = _said("in_logits")
    _trackers = _said("trackers")
    _notes = _said("notes")

    @property
    def promised(self) -> dict[str | None, tuple[int | None, int]]:
        """By branch, what was said about the prompt that is about to be read: its length and its beams."""
        return self._now.promised

    @property
    def frame(self) -> dict[str, Any]:
        """For adapters: what is known of the model's call that is running."""
        return self._now.frame

    # ---- one state per branch

    @property
    def tracker(self) -> TypeTracker | None:
        """Token types of the current branch; each branch counts its own tokens."""
        now = self._now
        if now.branch not in now.trackers:
            if None not in now.trackers:
                return None
            now.trackers[now.branch] = TypeTracker(now.trackers[None].source)
        return now.trackers[now.branch]

    @property
    def notes(self) -> Notes:
        """What adapters and interventions remember of the current branch between calls; begun anew by a new prompt."""
        now = self._now
        if now.branch not in now.notes:
            now.notes[now.branch] = Notes()
        return now.notes[now.branch]

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
        self.notes.prompt = dict(given)
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

    # ---- sequences

    def renew(self, beams: int = 1) -> None:
        """For adapters: what comes next in this branch is told of anew, whether it goes on with a cache or not."""
        self._now.notes[self.branch] = Notes(beams=beams)
        self._now.renewed.add(self.branch)

    def starts(self, cache: Any) -> ReadSequence:
        """For adapters: the current branch begins to read a sequence, into ``cache`` if there is one."""
        branch = self.branch
        self._now.renewed.discard(branch)
        # What is known of the sequence before stays with its own cache.
        self._now.notes[branch] = copy.copy(self.notes)
        if self.tracker is not None:
            self._now.trackers[branch] = self.tracker.anew()
        length, beams = self._now.promised.get(branch, (None, 1))
        self.notes.begin(length, beams)
        sequence = self._now.sequences[branch] = ReadSequence(self, branch, self.notes, self.tracker)
        if cache is not None:
            put(cache, sequence)
        return sequence

    def goes_on(self, cache: Any) -> None:
        """For adapters: the current branch goes on with the sequence in ``cache``.

        Raises:
            RuntimeError: it is not the sequence that began last, and something attached follows only one at a time.
        """
        found, branch = sequence_of(cache), self.branch
        if found is not None and (found.session is not self or found.branch != branch):
            found = None
        last = self._now.sequences.get(branch)
        if found is last and branch not in self._now.renewed:
            return
        if last is not None and (found is None or found.prompt is not last.prompt):
            alone = [type(i).__name__ for i in self.interventions if i.follows_sequence and not i.identity]
            if alone or (found is None and self.tracker is not None):
                raise RuntimeError(
                    "the model goes on with a cache that is not the one of the last prompt of this branch"
                    + (", and was not filled in it" if found is None else "")
                    + f"; {alone[0] if alone else 'token_types'} follows one sequence at a time. Finish one before "
                    "the next begins, or give each a branch of its own: with session.at(branch=...)"
                )
        if found is None:
            found = ReadSequence(self, branch, Notes(), self.tracker)
            put(cache, found)
        if branch in self._now.renewed:
            self._now.renewed.discard(branch)
            found.notes = self.notes
        self._now.sequences[branch] = found
        self._now.notes[branch] = found.notes
        if found.tracker is not None:
            self._now.trackers[branch] = found.tracker

    # ---- bookkeeping for adapters

    def undo(self, action: Callable[[], None], redo: Callable[[], None] | None = None) -> None:
        """Run ``action`` when the session is detached; the last one given runs first.

        ``redo`` takes it back, where something is there to be taken back: a checkpointed part of the model may have to
        run once more as it ran in the session.
        """
        self._changes.append(Action(action, redo))

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember to put back exactly what was there, or nothing.

        What the user puts in its place meanwhile stays.
        """
        change = self.set_entry(owner, owner.__dict__, name, value)
        if isinstance(owner, nn.Module):
            self._found.append((change.entries, name, value, f"its {name} was replaced", owner))

    def set_entry(self, owner: Any, entries: dict[str, Any], name: str, value: Any) -> Entry:
        """The same for an entry of a dictionary that belongs to ``owner``, such as its children; whether it still
        stands is for the adapter to see."""
        change = Entry(owner, entries, name, value)
        self._changes.append(change)
        if isinstance(owner, nn.Module):
            self._touch(owner, change)
        return change

    def hook(self, handle: Any) -> None:
        """Remember a hook handle to remove."""
        change = Hook(handle)
        hook = change.hook

        def enter(*args: Any, **kwargs: Any) -> Any:
            self._enter()
            return hook(*args, **kwargs)

        entered = eagerly(enter)
        change.instead(entered)
        self._changes.append(change)
        hooks = change.dicts[0][0]
        if id(hooks) not in self._owners:
            self._owners.update(hooks_of(self.model))
        owner = self._owners.get(id(hooks))
        if owner is not None:
            self._touch(owner, change)
            self._found.append((change.dicts[0][0], change.id, entered, "its hooks were removed", owner))

    def _touch(self, module: nn.Module, change: Change) -> None:
        if module not in self._touched:
            changes = self._touched[module] = []
            for one in plain_copies(module, changes):
                self._changes.append(one)
                changes.append(one)
        self._touched[module].append(change)

    def followed_by(self, follower: Callable[[], None]) -> None:
        """For adapters: look, before every call of the model, whether the user changed what was found at attach."""
        self._followers.append(follower)

    # ---- every call of the model

    def watch(self) -> None:
        """For ``attach``: look at every call of the model, before anything else of the session does."""
        self.hook(self.model.register_forward_pre_hook(self._begin))
        self.hook(self.model.register_forward_hook(self._end, always_call=True))

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._refuse_recording()
        me = threading.get_ident()
        with self._lock:
            if self._thread is not None and self._thread != me and _runs(self._thread, model):
                raise RuntimeError(
                    f"two threads call the attached {type(model).__name__} at once; a session follows one call at a "
                    "time. Call it from one thread, or attach to a copy of the model per thread"
                )
            if self._thread != me:
                self._thread, self._depth = me, 0
            self._depth += 1
        if self._depth == 1 and not self._recomputing:
            self.audit()
            self._may_recompute = torch.is_grad_enabled() or follow(self, self._again)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self._thread, self._may_recompute = None, True

    def audit(self) -> None:
        """Follow what the user changed in the model since it was attached.

        Raises:
            RuntimeError: something that cannot be followed.
        """
        for follower in self._followers:
            follower()
        for entries, key, value, what, module in self._found:
            if entries.get(key) is not value and not wraps(entries, key, value):
                raise RuntimeError(
                    f"{self._name(module)} ({type(module).__name__}) is attached, but {what} inside the session; "
                    "detach, and attach to the model as it is now"
                )

    def _name(self, module: nn.Module) -> str:
        names = {m: n for n, m in self.model.named_modules()}
        return names.get(module) or type(module).__name__

    def _know_places(self) -> None:
        """Where every module stands that something was changed in."""
        seen = set()
        for name, module in self.model.named_modules(remove_duplicate=False):
            if module in self._touched and name:
                parent: nn.Module = self.model
                path = ""
                for key in name.split("."):
                    path = f"{path}.{key}" if path else key
                    child = parent._modules[key]
                    assert child is not None
                    if (parent, key) not in seen:
                        seen.add((parent, key))
                        what = f"another module was put in its place ({path})"
                        self._found.append((parent._modules, key, child, what, child))
                    parent = child

    # ---- recomputation

    def enter(self) -> None:
        """For adapters: something of the session is about to act, perhaps in a part that will run once more."""
        self._refuse_recording()
        self._enter()

    def _refuse_recording(self) -> None:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                f"the attached {type(self.model).__name__} is recorded into a graph (torch.export, torch.jit), which "
                "would go on with what the interventions decide for this input; detach it first"
            )

    def _enter(self) -> None:
        if not self._may_recompute:
            return
        if not self._recomputing and running_backward():
            raise RuntimeError(
                f"a part of the attached {type(self.model).__name__} is recomputed for a backward pass, but its "
                "forward did not run in this session under torch.utils.checkpoint: it ran before the model was "
                "attached, or something else recomputes it. Run backward() first, or checkpoint with "
                "torch.utils.checkpoint"
            )
        follow(self, self._again)

    def _again(self) -> Again:
        return partial(self.as_it_was, State([self._now, *self.interventions, *self.stateful]))

    @contextmanager
    def as_it_was(self, state: State) -> Iterator[None]:
        """The model attached, and everything that is kept as it was put aside; afterwards all as it is now."""
        mine = set(self.model.modules())
        known = [] if self.active else list(_sessions.items())
        others = [session for model, session in known if model in mine or self.model in set(model.modules())]
        suspended = [change for s in others for change in reversed(s._changes) if change.undo()]
        again = not self.active
        self._recomputing += 1
        try:
            with state.restored():
                if again:
                    self.active = True
                    for change in self._changes:
                        change.redo()
                try:
                    yield
                finally:
                    if again:
                        for change in reversed(self._changes):
                            change.undo()
                        self.active = False
        finally:
            self._recomputing -= 1
            for change in reversed(suspended):
                change.redo()

    def described(self, site: Site, batch: int, **fields: Any) -> Site:
        """A template site with what the user said about this call."""
        return self.made(site.but(**fields).__dict__, batch, fields)

    def made(self, fields: dict[str, Any], batch: int, given: dict[str, Any] | None = None) -> Site:
        """A site of these fields, all of them, with what the user said about this call; ``fields`` become its own."""
        now = self._now
        if now.rows is not None and len(now.rows) != batch:
            raise ValueError(
                f"rows names {len(now.rows)} rows of the batch ({list(now.rows)}), but layer {fields['layer']} "
                f"({fields['name']}) got a batch of {batch}; give one name per row"
            )
        fields["rows"] = now.rows if now.told is None or now.rows is not None else _folded(now.told, batch)
        fields["prompts"] = None if now.prompts is None else _folded(now.prompts, batch)
        fields["pass_name"], fields["branch"] = now.pass_name, now.branch
        fields["steps"], fields["timestep"] = now.steps, now.timestep
        if given is None or "step" not in given:
            fields["step"] = now.step
        if given is None or "training" not in given:
            fields["training"] = fields["module"].training
        new = object.__new__(Site)
        # Sites are made in every layer of every decoding step; setting thirty fields one by one is what would cost.
        object.__setattr__(new, "__dict__", fields)
        return new

    @property
    def row_names(self) -> tuple[str, ...] | None:
        """Names of the rows of the run that is going on, as the user gave them or the pipeline says."""
        now = self._now
        return now.told if now.rows is None else now.rows

    @contextmanager
    def some_rows(self, index: Sequence[int]) -> Iterator[None]:
        """For interventions that run the model on some rows of the batch only: these are they."""
        now, names = self._now, self.row_names or ()
        if "perturbed" in names and not any(names[i] == "perturbed" for i in index):
            raise ValueError(
                "some rows cannot be run by themselves under perturbed-attention guidance, whose processors cut every "
                "batch by three; call the pipeline with pag_scale=0"
            )
        before: tuple[Any, ...] = (now.rows, now.told, now.prompts)
        now.rows, now.told, now.prompts = (None if b is None else tuple(b[i] for i in index) for b in before)
        try:
            yield
        finally:
            now.rows, now.told, now.prompts = before

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
        prompt_length: int | None = None,
    ) -> Iterator[Session]:
        """Say which step, pass, branch or rows the calls of the model inside this block are.

        Each branch has token types, notes and a count of tokens of its own, so calls of several branches may be mixed
        in any order, also from within ``on_logits`` while ``generate`` runs, as long as each has its own cache.
        ``token_types`` are those of the branch, where its prompt is another one than the main branch's.
        ``prompt_length`` is the number of tokens, padding included, of a prompt that is read in several calls:
        what acts on prompts takes them as one. ``generate`` says it by itself.
        """
        if step is not None:
            check_int("step", step, least=0)
        for name, value in (("pass_name", pass_name), ("branch", branch)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a name (str), got {type(value).__name__} {value!r:.60}")
        before, block = (self.step, self.pass_name, self.branch, self.rows), object()
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
        self._blocks.append(block)
        here = self.branch
        promised = self._now.promised.get(here)
        if prompt_length is not None:
            check_int("prompt_length", prompt_length, least=1)
            self._now.promised[here] = (prompt_length, 1)
        try:
            if step is not None and not self.counts_steps:
                self.announce(step)
            yield self
        finally:
            self.step, self.pass_name, self.branch, self.rows = before
            if prompt_length is not None:
                self._now.promised.pop(here)
                if promised is not None:
                    self._now.promised[here] = promised
            inside = self._blocks[-1] is not block
            self._blocks.remove(block)
            if inside:
                raise RuntimeError(
                    "blocks of session.at(...) overlap, so calls inside them were taken for one another's; a session "
                    "follows one thread at a time"
                )

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
        forget_compiled()
        errors = []
        for change in reversed(self._changes):
            try:
                change.undo()
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


def _runs(thread: int, model: nn.Module) -> bool:
    """Whether a thread is inside a call of a model; one that was interrupted there is not."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


def _folded(values: tuple[Any, ...], batch: int) -> tuple[Any, ...] | None:
    """What was said of rows, where a layer folds an axis of theirs (frames, places) into the batch; ``None`` where it
    is not told how."""
    if len(values) == batch:
        return values
    if not values or batch % len(values):
        return None
    return tuple(value for value in values for _ in range(batch // len(values)))


def _row_names(rows: Sequence[str] | None) -> tuple[str, ...] | None:
    if rows is None:
        return None
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(r, str) and r for r in rows):
        raise TypeError(
            f'rows must be a sequence of names, one per row of the batch, e.g. ("uncond", "cond"); got {rows!r:.200}'
        )
    return tuple(rows)
