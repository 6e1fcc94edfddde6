"""What a denoiser computed at one step, used again at later ones: one table says which module runs at which step.

Nearby denoising steps compute nearly the same features, so that a module (an attention, a feed-forward, a residual
block, a whole resolution of a U-Net) may hand on what it gave at an earlier step:

    ``y[s, m] = f_m(x[s, m]) if table[s, m] else y[s', m],    s' = the last step before s with table[s', m].``

A module that does not run is not called. Fixed intervals, DeepCache's skipped resolutions (Ma et al., 2023), learned
tables (:class:`attnlib.cache.HarmoniCa`) and inherited features are all tables; caches of diffusers, which decide by
what they see, stand beside them under the same count (:class:`DiffusersCache`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_int, check_real, describe
from ..hooks.denoiser import CallSite, modules_of, named_modules, parameter_names
from ..hooks.intervention import Intervention
from ..hooks.pipelines import COND_FIRST
from ..hooks.site import Site

#: What a cache acts on by default: the two halves of a transformer block.
SUBLAYERS = ("attention", "feed-forward")

#: Rules that make a table: ``rule(steps, modules) -> (steps, modules) bool``.
Rule = Callable[[int, int], Tensor]


def every(interval: int) -> Rule:
    """All modules run at every ``interval``-th step, from the first on.

    >>> every(2)(5, 1).flatten().tolist()
    [True, False, True, False, True]
    """
    check_int("interval", interval, least=1)
    return lambda steps, modules: (torch.arange(steps) % interval == 0)[:, None].expand(steps, modules).clone()


def around(count: int, center: float, power: float = 1.2) -> Rule:
    """All modules run at ``count`` steps, which lie densest around a step, as in DeepCache's uneven pattern.

    Positions are ``center + sign(u) |u|^power`` for u evenly spaced from the first to the last step.

    Args:
        count: steps that run, the first among them.
        center: step around which they lie.
        power: 1 for even ones.

    >>> around(4, 2, 1.5)(10, 1).flatten().nonzero().flatten().tolist()
    [0, 1, 3, 6]
    """
    check_int("count", count, least=1)
    check_real("center", center, least=0)
    check_real("power", power, above=0)

    def rule(steps: int, modules: int) -> Tensor:
        if count > steps:
            raise ValueError(f"count={count} steps are to run, and there are {steps}")
        low, high = -(center ** (1 / power)), abs(steps - center) ** (1 / power) * (1 if steps >= center else -1)
        u = torch.linspace(low, high, count + 1, dtype=torch.float64)[:-1]
        at = (center + u.sign() * u.abs() ** power).floor().long().clamp(0, steps - 1)
        table = torch.zeros(steps, dtype=torch.bool)
        table[at] = True
        table[0] = True
        return table[:, None].expand(steps, modules).clone()

    return rule


def check_table(table: Tensor, steps: int | None, modules: int) -> Tensor:
    """A table as (steps, modules) bool.

    Raises:
        TypeError: no boolean tensor.
        ValueError: of another shape, or the first step leaves a module out.
    """
    if not isinstance(table, Tensor) or table.dtype != torch.bool:
        got = table.dtype if isinstance(table, Tensor) else describe(table)
        raise TypeError(f"table must be boolean, True where a module runs, got {got}")
    if table.dim() == 1:
        table = table[:, None].expand(len(table), modules)
    if table.dim() != 2 or table.shape[1] != modules or not len(table):
        raise ValueError(
            f"table must be (steps,) or (steps, {modules}), a column for each module, got {tuple(table.shape)}"
        )
    if steps is not None and len(table) != steps:
        raise ValueError(f"table has {len(table)} steps, and the pipeline takes {steps}")
    if not bool(table[0].all()):
        left = (~table[0]).nonzero().flatten().tolist()
        raise ValueError(f"table: every module must run at the first step, there is nothing to use again; not {left}")
    return table


class _Counted(Intervention):
    """How often each module ran at each step.

    Attributes:
        columns: names of the modules, in the order of the model: the columns of the table.
        executed: (steps, modules) how often each module ran in the last call of the pipeline, over all its passes.
        possible: the same, had nothing been left out.
    """

    def __init__(self, acts_on: Sequence[str]):
        self.acts_on = (acts_on,) if isinstance(acts_on, str) else tuple(acts_on)
        self.columns: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.executed = self.possible = torch.zeros(0, 0, dtype=torch.long)
        self._call: Any = None
        self._last = -1

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        known = modules_of(model, sites)
        chosen = {site.name for site in named_modules(self, model, known)}
        self.columns = [name for name, _ in model.named_modules() if name in chosen]
        self._column = {name: at for at, name in enumerate(self.columns)}
        for name in self.columns:
            inside = next((other for other in self.columns if name.startswith(other + ".")), None)
            if inside is not None:
                raise ValueError(
                    f"{type(self).__name__}: {name} lies inside {inside}, and both would have a column; acts_on must "
                    f"name one of them, got {self.acts_on}"
                )

    def results(self) -> dict[str, Tensor]:
        return {"executed": self.executed, "possible": self.possible}

    def _open(self, step: int, sampling: Any) -> None:
        """A module or the model is about to run at a step; what was of an earlier call of the pipeline is forgotten."""
        call = None if sampling is None else sampling.call
        if call != self._call or (sampling is None and step < self._last) or not len(self.executed):
            self._begin(None if sampling is None else sampling.steps)
            self._call = call
        self._last = step
        if step >= len(self.executed):
            more = torch.zeros(step + 1 - len(self.executed), len(self.columns), dtype=torch.long)
            self.executed, self.possible = torch.cat([self.executed, more]), torch.cat([self.possible, more])

    def _begin(self, steps: int | None) -> None:
        self.executed = torch.zeros(steps or 1, len(self.columns), dtype=torch.long)
        self.possible = self.executed.clone()


@dataclasses.dataclass
class _Kept:
    """What a module gave: at which step, and what it read then."""

    step: int
    shape: tuple[int, ...]
    output: Any
    versions: tuple[int | None, ...]


def _tensors(output: Any) -> tuple[Tensor, ...]:
    if isinstance(output, Tensor):
        return (output,)
    return tuple(t for one in output for t in _tensors(one)) if isinstance(output, (tuple, list)) else ()


def _versions(output: Any) -> tuple[int | None, ...]:
    return tuple(None if t.is_inference() else t._version for t in _tensors(output))


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return type(output)(_detached(one) for one in output) if isinstance(output, (tuple, list)) else output


class StepCache(_Counted):
    """Modules of a denoiser run at the steps that a table says, and hand on what they gave at the last one otherwise.

    ::

        with attnlib.attach(pipe, StepCache(every(2))) as session:
            pipe("a red circle", num_inference_steps=20)
        session.results["step-cache"]["executed"].sum()

    What is kept belongs to a pass (its name, branch and rows, and which run of the model of this step it is) of one
    call of the pipeline: a pass that begins later runs everything first. A new call forgets all of it.

    Args:
        table: (steps, modules) bool, True where a module runs; (steps,) for all modules alike; or a rule
            ``rule(steps, modules) -> table``: :func:`every`, :func:`around`, or one of your own.
        acts_on: kinds (:data:`attnlib.hooks.MODULE_KINDS`) or name patterns of the modules; their columns are in the
            order of the model, ``cache.columns`` after attaching.

    Raises:
        ValueError: at attach, a table with another number of columns, one whose first step leaves something out, or
            modules inside one another; when the pipeline runs, another number of steps, a size or batch that changes
            in mid-call, a kept output that something changed in place.

    >>> StepCache(every(3), ["stage"]).acts_on
    ('stage',)
    """

    name: ClassVar[str] = "step-cache"
    reuses_features = True

    def __init__(self, table: Tensor | Rule, acts_on: Sequence[str] = SUBLAYERS):
        if not isinstance(table, Tensor) and not callable(table):
            raise TypeError(f"table must be a boolean tensor or a rule(steps, modules), got {type(table).__name__}")
        self.table = table
        super().__init__(acts_on)

    def reset(self) -> None:
        super().reset()
        self._kept: dict[Any, _Kept] = {}
        self._runs: dict[Any, list[int]] = {}
        self._runs_of = -1
        self._plan: list[list[bool]] = []
        self._due: list[list[int]] = []

    @property
    def identity(self) -> bool:
        return isinstance(self.table, Tensor) and self.table.dtype == torch.bool and bool(self.table.all())

    def conflicts(self, other: Intervention) -> str | None:
        return "both keep features from step to step; write one table" if other.reuses_features else None

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().prepare(model, sites)
        if isinstance(self.table, Tensor):
            check_table(self.table, None, len(self.columns))

    def _begin(self, steps: int | None) -> None:
        modules = len(self.columns)
        if isinstance(self.table, Tensor):
            table = check_table(self.table, steps, modules)
        elif steps is None:
            raise ValueError(f"{type(self).__name__}: how many steps there are is not known; give a table, not a rule")
        else:
            table = check_table(self.table(steps, modules), steps, modules)
        self.reset()
        self._plan = table.tolist()
        numbers = torch.arange(len(table))[:, None].expand_as(table)
        self._due = torch.where(table.cpu(), numbers, 0).cummax(0).values.tolist()
        super()._begin(len(table))

    def _pass(self, site: CallSite) -> tuple[Any, ...]:
        """Which pass this is: name, branch, rows, and which run of that kind at this step, by number."""
        if site.step != self._runs_of:
            self._runs, self._runs_of = {}, site.step or 0
        kind = (site.pass_name, site.branch, site.rows)
        runs = self._runs.setdefault(kind, [])
        if site.run not in runs:
            runs.append(site.run)
        return (*kind, runs.index(site.run))

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        step, column = site.step, self._column[site.name]
        if step is None:
            raise ValueError(
                f"{type(self).__name__} goes by the denoising step, and which one runs is not known; attach to the "
                "pipeline, attach(pipe, ...), or say it: with session.at(step=...)"
            )
        self._open(step, site.sampling)
        if step >= len(self._plan):
            raise ValueError(f"{type(self).__name__}: table has {len(self._plan)} steps, and step {step} runs")
        self.possible[step, column] += 1
        key = (column, self._pass(site))
        shape = tuple(inputs[site.main].shape)
        kept = self._kept.get(key)
        if not self._plan[step][column] and kept is not None and kept.step >= self._due[step][column]:
            if kept.shape != shape:
                raise ValueError(
                    f"{type(self).__name__}: {site.name} read {kept.shape} at step {kept.step} and reads {shape} at "
                    f"step {step}; what it gave then cannot be used again at another batch or size"
                )
            if kept.versions != _versions(kept.output):
                raise RuntimeError(
                    f"{type(self).__name__}: what {site.name} gave at step {kept.step} was changed in place since"
                )
            if step + 1 == len(self._plan):
                del self._kept[key]
            return kept.output
        self.executed[step, column] += 1
        output = call(inputs)
        if step + 1 < len(self._plan) and not self._plan[step + 1][column]:
            mine = _detached(output)
            self._kept[key] = _Kept(step, shape, mine, _versions(mine))
        else:
            self._kept.pop(key, None)
        return output


class DiffusersCache(_Counted):
    """A cache of diffusers itself, in any pipeline, with the count of what ran: a baseline for tables.

    ::

        from diffusers.hooks import FirstBlockCacheConfig
        with attnlib.attach(pipe, DiffusersCache(FirstBlockCacheConfig(threshold=0.1))) as session:
            pipe(class_labels=[3])

    Contexts are set for pipelines that set none, the state is reset at each call of the pipeline, and a callback for
    the timestep is filled in where the configuration needs one and has none.

    Args:
        config: a configuration of ``diffusers.hooks``: ``PyramidAttentionBroadcastConfig``, ``FasterCacheConfig``,
            ``FirstBlockCacheConfig``, ``TaylorSeerCacheConfig``, ``MagCacheConfig`` or ``SeaCacheConfig``.
        acts_on: what is counted.

    Raises:
        TypeError: another configuration.
        ValueError: at attach, a model that has a cache of diffusers already, or guidance rows in an order that
            FasterCache does not know.
    """

    name: ClassVar[str] = "diffusers-cache"
    reuses_features = True

    #: Configurations, and the function of ``diffusers.hooks`` that puts each on a model.
    KNOWN: ClassVar[dict[str, str]] = {
        "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
        "FasterCacheConfig": "apply_faster_cache",
        "FirstBlockCacheConfig": "apply_first_block_cache",
        "TaylorSeerCacheConfig": "apply_taylorseer_cache",
        "MagCacheConfig": "apply_mag_cache",
        "SeaCacheConfig": "apply_sea_cache",
    }

    def __init__(self, config: Any, acts_on: Sequence[str] = SUBLAYERS):
        if type(config).__name__ not in self.KNOWN:
            raise TypeError(f"config must be one of diffusers.hooks: {sorted(self.KNOWN)}, got {type(config).__name__}")
        self.config = config
        self._timestep: float = 0
        super().__init__(acts_on)

    def conflicts(self, other: Intervention) -> str | None:
        return "both keep features from step to step" if other.reuses_features else None

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        if site.step is not None:
            self.executed[site.step, self._column[site.name]] += 1
        return call(inputs)

    def on_attach(self, session: Any) -> None:
        import diffusers
        from diffusers import hooks

        if not hasattr(hooks.HookRegistry, "invalidate_child_registries_cache"):
            raise RuntimeError(
                f"DiffusersCache puts hooks of diffusers beside ours, which diffusers {diffusers.__version__} does not "
                "allow; use a newer one (0.42 does), or StepCache"
            )
        model = session.model
        kind = type(self.config).__name__
        pipe = None if session.sampling is None else type(session.sampling.pipe).__name__
        if kind == "FasterCacheConfig" and pipe in COND_FIRST:
            raise ValueError(f"FasterCache reads unconditional rows first, and {pipe} has the conditional ones first")
        before = {module: set(r.hooks) for module in model.modules() if (r := _registry(module)) is not None}
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(f"{type(model).__name__} has a cache of diffusers already; model.disable_cache() first")
        forwards = {module: module.__dict__.get("forward") for module in model.modules()}
        config = self.config
        if getattr(config, "current_timestep_callback", 0) is None:
            config = dataclasses.replace(config, current_timestep_callback=lambda: self._timestep)

        def undo() -> None:
            for module in model.modules():
                registry = _registry(module)
                if registry is None:
                    continue
                for name in [n for n in registry.hooks if n not in before.get(module, ())]:
                    registry.remove_hook(name, recurse=False)
                if module not in before:
                    del module._diffusers_hook
                if forwards.get(module) is None:
                    module.__dict__.pop("forward", None)

        session.undo(undo, lambda: None)
        getattr(hooks, self.KNOWN[kind])(model, config)
        hooks.HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
        if not any(set(r.hooks) - before.get(m, set()) for m in model.modules() if (r := _registry(m)) is not None):
            raise ValueError(f"{kind} finds no module in {type(model).__name__} that it acts on; see its identifiers")
        stack, names = ExitStack(), parameter_names(model)
        call: list[Any] = [None]

        def enter(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            sampling, timestep = session.sampling, given.get("timestep", 0)
            if sampling is not None and sampling.running and sampling.timesteps is not None:
                timestep = sampling.timesteps[sampling.step - sampling.steps]  # some models are given another scale
            self._timestep = timestep.flatten()[0].item() if isinstance(timestep, Tensor) else timestep
            number = None if session.sampling is None else session.sampling.call
            anew = number != call[0]
            if anew:
                call[0] = number
                hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
            if session.step is not None:
                self._open(session.step, session.sampling)
                self.possible[session.step] += 1
            if session.pass_name is None or anew:  # what begins anew forgets its context, too
                stack.enter_context(diffusers.CacheMixin.cache_context(model, session.pass_name or "all"))

        def leave(*_: Any) -> None:
            stack.close()

        session.hook(model.register_forward_pre_hook(enter, with_kwargs=True))
        session.hook(model.register_forward_hook(leave, always_call=True))


def _registry(module: nn.Module) -> Any:
    return module.__dict__.get("_diffusers_hook")
