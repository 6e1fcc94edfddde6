"""Calls of a whole denoiser, and of modules in it, through the stages ``around_denoiser`` and ``around_module``.

Both hand an intervention the named arguments of a call and a function that makes it: zero, one or several times, on
other arguments, with or without gradient. The innermost call is the model's own, and where nobody changes anything its
very output is handed on.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import block_of
from .eager import eagerly
from .intervention import Intervention
from .recompute import Shared
from .session import Session
from .site import Site

#: Kinds of modules that ``around_module`` knows in denoisers. A transformer is what a U-Net puts behind a resnet, with
#: its blocks, (B, C, h, w) to (B, C, h, w); a stage is a resolution of a U-Net, with all of these.
MODULE_KINDS = ("attention", "feed-forward", "resnet", "downsampler", "upsampler", "block", "transformer", "stage")

#: First and last module of the feed-forward of single-stream blocks, which have no module for the whole of it.
SPLIT_FEED_FORWARD = ("proj_mlp", "act_mlp")

#: Arguments of denoisers that hold no batch in their first axis, whatever its length.
NOT_BATCHED = ("img_ids", "txt_ids", "image_rotary_emb", "id", "return_dict")


@dataclass(frozen=True, eq=False)
class CallSite:
    """One call of a denoiser, or of a module in it; what is not known is ``None``.

    Args:
        module: the denoiser, or the module.
        name: dotted path of the module; empty for the denoiser.
        kind: ``"denoiser"``, or one of :data:`MODULE_KINDS`.
        number: of the module among those of its kind, in the order in which the model lists them.
        main: name of the first argument: what is denoised, or the first stream.
        rows: name of each row of the batch.
        prompts: number of the prompt that each row belongs to.
        pass_name, branch: of this call, see :class:`attnlib.hooks.Site`.
        step: denoising step, from 0.
        steps: how many there are.
        timestep: as the denoiser was given it: a number, or a tensor of one, or of one per row.
        run: number of the run of the model, counted in the session; each inner run of ``around_denoiser`` has its own.
        sampling: what is known of the call of the pipeline that was attached to.
    """

    module: nn.Module
    name: str = ""
    kind: str = "denoiser"
    number: int = 0
    main: str = "sample"
    rows: tuple[str, ...] | None = None
    prompts: tuple[int, ...] | None = None
    pass_name: str | None = None
    branch: str | None = None
    step: int | None = None
    steps: int | None = None
    timestep: Tensor | float | None = None
    run: int = 0
    sampling: Any = None

    def __repr__(self) -> str:
        return f"CallSite({self.kind}, {self.name!r}, step={self.step}/{self.steps}, rows={self.rows})"


def step_of(site: CallSite, owner: Intervention) -> int:
    """The denoising step of a call, for what cannot act without it.

    Raises:
        RuntimeError: the denoiser runs outside a call of the pipeline that was attached to.
    """
    if site.step is None:
        name, model = type(owner).__name__, type(site.module).__name__
        raise RuntimeError(
            f"{name} acts at steps of a pipeline, and {model} was run outside of one"
            + ("" if site.sampling is None else f", by something else than the {type(site.sampling.pipe).__name__}")
            + "; attach to the pipeline that is called: attach(pipe, ...)"
        )
    return site.step


def check_pictures(site: CallSite, inputs: Mapping[str, Any], owner: Intervention) -> None:
    """Raise ``ValueError`` where videos are denoised, and ``owner`` acts on pictures."""
    if inputs[site.main].dim() > 4:
        raise ValueError(
            f"{type(owner).__name__} acts on pictures, and {type(site.module).__name__} denoises videos: {site.main} "
            f"has shape {tuple(inputs[site.main].shape)}, possible are (B, C, h, w) and (B, N, C)"
        )


def rows_of_guidance(site: CallSite, owner: Intervention) -> tuple[str, ...]:
    """The names of the rows of a call, for what cannot act without them.

    Raises:
        ValueError: which rows are conditional is not known.
    """
    if site.rows is None:
        pipe = site.module if site.sampling is None else site.sampling.pipe
        raise ValueError(
            f"{type(owner).__name__} acts on conditional rows, and which these are is not known in "
            f"{type(pipe).__name__}; say it: attach(pipe, ..., rows=('uncond', 'cond'))"
        )
    return site.rows


@contextmanager
def with_gradient() -> Iterator[None]:
    """Inside, gradients are computed, whatever a pipeline around it says (``no_grad``, ``inference_mode``).

    >>> with torch.no_grad(), with_gradient():
    ...     (torch.ones(2, requires_grad=True) * 2).requires_grad
    True
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def rows_of(inputs: Mapping[str, Any], index: Sequence[int], batch: int) -> dict[str, Any]:
    """The arguments of a denoiser for some rows of the batch, nested ones (conditions, residuals) too.

    Args:
        inputs: named arguments.
        index: rows, in the order in which they are wanted.
        batch: rows that there are; tensors of that length get picked from.

    >>> rows_of({"sample": torch.arange(4), "timestep": 3}, [2, 3], 4)
    {'sample': tensor([2, 3]), 'timestep': 3}
    """

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() and len(value) == batch:
                return value.index_select(0, torch.as_tensor(list(index), device=value.device))
            return value
        if isinstance(value, Mapping):
            return {name: one if name in NOT_BATCHED else pick(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)) and all(isinstance(one, (Tensor, list, tuple)) for one in value):
            return type(value)(pick(one) for one in value)
        return value

    def picked(name: str, value: Any) -> Any:
        if name in NOT_BATCHED:
            return value
        folded = isinstance(value, Tensor) and value.dim() and len(value) > batch and not len(value) % batch
        if name == "encoder_hidden_states" and folded:  # once for each frame of a video
            return pick(value.unflatten(0, (batch, -1))).flatten(0, 1)
        return pick(value)

    return {name: picked(name, value) for name, value in inputs.items()}


def _usable(value: Any) -> Any:
    """Tensors that were made in inference mode, as ones that a backward pass may keep."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {name: _usable(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_usable(one) for one in value)
    return value


class _Arguments:
    """Arguments by name, and back in the way in which they were given."""

    def __init__(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.positional = list(names[: len(args)])
        self.rest = args[len(self.positional) :]
        self.inputs = {**dict(zip(self.positional, args, strict=False)), **kwargs}

    def call(self, function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        keywords = dict(inputs)
        return function(*[keywords.pop(name) for name in self.positional], *self.rest, **keywords)


def parameter_names(module: nn.Module) -> list[str]:
    """Names of what a module's forward takes, in order."""
    return list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]


class _Runtime(Shared):
    """A replaced forward."""

    def __init__(self, session: Session, module: nn.Module, stage: str, interventions: Sequence[Intervention]):
        self.session, self.module, self.stage = session, module, stage
        self.interventions = list(interventions)
        self.names, self.plain = parameter_names(module), module.forward

    def install(self) -> None:
        session, plain = self.session, self.plain

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not session.active:
                return plain(*args, **kwargs)  # a wrapper that the user put around it is left
            session.enter()
            return self.run(_Arguments(self.names, args, kwargs))

        session.set_attribute(self.module, "forward", eagerly(forward))

    def run(self, given: _Arguments) -> Any:
        raise NotImplementedError

    def site(self, **fields: Any) -> CallSite:
        now = self.session._now
        return CallSite(
            self.module, main=self.names[0], rows=self.session.row_names, prompts=now.prompts, pass_name=now.pass_name,
            branch=now.branch, step=now.step, steps=now.steps, timestep=now.timestep, run=now.run,
            sampling=self.session.sampling, **fields,
        )  # fmt: skip

    def chain(
        self, site: Callable[[], CallSite], inner: Callable[[dict[str, Any]], Any]
    ) -> Callable[[dict[str, Any]], Any]:
        """All interventions around ``inner``; each call has a site of its own, since an outer one may run some rows."""
        for i in reversed(self.interventions):
            inner = functools.partial(self._through, getattr(i, self.stage), site, self._checked(inner))
        return inner

    @staticmethod
    def _through(stage: Callable[..., Any], site: Callable[[], CallSite], call: Any, inputs: dict[str, Any]) -> Any:
        return stage(site(), inputs, call)

    def _checked(self, inner: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
        def call(inputs: dict[str, Any]) -> Any:
            if not isinstance(inputs, dict):
                raise TypeError(
                    f"call(inputs) of {self.stage} takes the named arguments as a dict, got {type(inputs).__name__}"
                )
            return inner(inputs)

        return call


class DenoiserRuntime(_Runtime):
    """``around_denoiser`` of one model.

    Args:
        look: tells the adapter what the model is called with.
    """

    def __init__(self, session: Session, interventions: Sequence[Intervention], look: Callable[[dict[str, Any]], None]):
        super().__init__(session, session.model, "around_denoiser", interventions)
        self.look = look

    def run(self, given: _Arguments) -> Any:
        session = self.session
        output: list[Any] = []  # of the last run, and the prediction in it
        main = given.inputs.get(self.names[0])
        if not isinstance(main, Tensor):
            raise ValueError(
                f"{type(self.module).__name__} was called with {self.names[0]} of type {type(main).__name__}; "
                "around_denoiser serves models that denoise one tensor (B, ...)"
            )
        if session.sampling is not None:
            given.inputs[self.names[0]] = main = session.sampling.moved(main)

        def innermost(inputs: dict[str, Any]) -> Tensor:
            gradient = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            before = session._may_recompute
            session._may_recompute = before or gradient
            self.look(inputs)
            try:
                out = given.call(self.plain, _usable(inputs) if gradient else inputs)
            finally:
                session._may_recompute = before
            found = out if isinstance(out, Tensor) else out[0]
            output[:] = [out, found]
            return found

        result = self.chain(self.site, innermost)(given.inputs)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"around_denoiser of {', '.join(type(i).__name__ for i in self.interventions)} must return the "
                f"prediction, a tensor, got {type(result).__name__}"
            )
        if output and output[1] is result:
            return output[0]
        return _like(output[0] if output else None, result, self.module, given.inputs)


def _like(output: Any, prediction: Tensor, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """A prediction in the form in which a denoiser gives it."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): prediction})
    if not inputs.get("return_dict", True):
        return (prediction,)
    module = sys.modules[type(model).__module__]
    for value in vars(module).values():
        if isinstance(value, type) and "sample" in getattr(value, "__dataclass_fields__", {}):
            return value(sample=prediction)
    raise ValueError(
        f"around_denoiser ran {type(model).__name__} not once, and what it gives is not known; call it with "
        "return_dict=False"
    )


class ModuleCalls(_Runtime):
    """``around_module`` of one module, or of two that follow each other: the feed-forward of a block that projects its
    attention and its feed-forward together ends behind ``act_mlp``."""

    def __init__(self, session: Session, site: CallSite, interventions: Sequence[Intervention]):
        super().__init__(session, site.module, "around_module", interventions)
        self.template = site
        first, _, last = site.name.rpartition(".")
        self.follower: Any = None
        if last == SPLIT_FEED_FORWARD[0] and site.kind == "feed-forward":
            self.follower = session.model.get_submodule(f"{first}.{SPLIT_FEED_FORWARD[1]}")
            self.follower_plain = self.follower.forward
            self.given_on: Any = None

    def install(self) -> None:
        super().install()
        if self.follower is None:
            return
        session, plain = self.session, self.follower_plain

        @functools.wraps(plain)
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            given, self.given_on = self.given_on, None
            # What comes from our own call has passed it already.
            return hidden if given is hidden and session.active else plain(hidden, *args, **kwargs)

        session.set_attribute(self.follower, "forward", eagerly(forward))

    def run(self, given: _Arguments) -> Any:
        where = self.template
        site = functools.partial(self.site, name=where.name, kind=where.kind, number=where.number)

        def innermost(inputs: dict[str, Any]) -> Any:
            out = given.call(self.plain, inputs)
            return out if self.follower is None else self.follower_plain(out)

        result = self.chain(site, innermost)(given.inputs)
        if self.follower is not None:
            self.given_on = result
        if not isinstance(result, (Tensor, tuple, list)):
            raise TypeError(
                f"{where.kind} {where.number} ({where.name}): around_module must return what the module gives, a "
                f"tensor or a tuple of them, got {type(result).__name__}"
            )
        return result


def modules_of(model: nn.Module, sites: Sequence[Site]) -> list[CallSite]:
    """The modules of a denoiser that ``around_module`` knows, kind by kind in the order of the model.

    Args:
        sites: its attention sites.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, list[nn.Module]] = {kind: [] for kind in MODULE_KINDS}
    found["attention"] = [site.module for site in sites]
    for site in sites:
        try:
            block = block_of(model, site)
        except ValueError:
            continue
        if block not in found["block"]:
            found["block"].append(block)
    lists = {
        "resnets": "resnet", "downsamplers": "downsampler", "upsamplers": "upsampler", "attentions": "transformer",
    }  # fmt: skip
    before = {module for some in found.values() for module in some}
    for module, name in names.items():
        parent, _, last = name.rpartition(".")
        kind = lists.get(parent.rpartition(".")[2])
        if parent in ("down_blocks", "up_blocks") or name == "mid_block":
            found["stage"].append(module)
        elif kind is not None and last.isdigit() and module not in before:
            found[kind].append(module)
        elif any(word in type(module).__name__ for word in ("FeedForward", "GLUMBConv")):
            found["feed-forward"].append(module)
        elif last == SPLIT_FEED_FORWARD[0] and f"{parent}.{SPLIT_FEED_FORWARD[1]}" in names.values():
            found["feed-forward"].append(module)
    return [
        CallSite(module, names[module], kind, number, main=parameter_names(module)[0])
        for kind in MODULE_KINDS
        for number, module in enumerate(found[kind])
        if module in names
    ]


def named_modules(intervention: Intervention, model: nn.Module, known: Sequence[CallSite]) -> list[CallSite]:
    """Of the modules of a denoiser, those that an intervention ``acts_on``, in the order in which it names them.

    Raises:
        TypeError: ``acts_on`` is no sequence of names.
        ValueError: nothing of the model fits a name.
    """
    name, acts_on = type(intervention).__name__, intervention.acts_on
    if isinstance(acts_on, str) or not acts_on:
        raise TypeError(f"{name}: acts_on must be a sequence of kinds or name patterns, got {acts_on!r}")
    chosen: dict[nn.Module, CallSite] = {}
    for wanted in acts_on:
        fitting = [
            s for s in known
            if (s.kind == wanted if wanted in MODULE_KINDS else fnmatch.fnmatchcase(s.name, wanted))
        ]  # fmt: skip
        if not fitting:
            kinds = sorted({s.kind for s in known})
            raise ValueError(
                f"{name}: {type(model).__name__} has no module {wanted!r}; its modules are of kinds {kinds}, for "
                f"example {[s.name for s in known[:4]]}"
            )
        for s in fitting:
            chosen.setdefault(s.module, s)
    return list(chosen.values())


def install_modules(session: Session, sites: Sequence[Site]) -> None:
    """Put ``around_module`` of everything in a session around the modules that it names.

    Raises:
        ValueError: nothing of the model fits a name.
    """
    acting = session.acting("around_module")
    if not acting:
        return
    known = modules_of(session.model, sites)
    chosen: dict[nn.Module, tuple[CallSite, list[Intervention]]] = {}
    for i in acting:
        for site in named_modules(i, session.model, known):
            chosen.setdefault(site.module, (site, []))[1].append(i)
    for site, members in chosen.values():
        ModuleCalls(session, site, members).install()
