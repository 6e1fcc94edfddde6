"""The mechanism under test: how to build it, feed it and read its answer; and the vocabulary of verdicts."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Mask, as_mask, causal
from ..nn.base import Fusion, Mechanism
from ..nn.registry import find
from ..types import Output, Traits
from .adapt import FUSED, Pool, Stream
from .case import Case
from .verdict import Evidence, NotClaimed, Refuted  # noqa: F401

#: What is assumed of a plain module that says nothing about itself.
SILENT = Traits(valid=False, work={}, memory={}, resolution_free=False, batch_independent=False, traceable=False)

#: Largest deviation, relative to the size of the output, between values that should agree in float64. What is looked
#: for (a leaked token, a drifting state) is orders of magnitude larger, rounding is orders smaller.
SAME = 1e-6


@dataclass(frozen=True)
class Claim:
    """One entry of :data:`CLAIMS`."""

    name: str
    test: Callable[[Subject], Evidence | str]
    claimed: Callable[[Subject], str | None]
    probe: bool


#: Every claim by name, in the order in which they are tested.
CLAIMS: dict[str, Claim] = {}


def claim(
    name: str, unless: Callable[[Subject], str | None] = lambda s: None, probe: bool = False
) -> Callable[[Callable[[Subject], Evidence | str]], Callable[[Subject], Evidence | str]]:
    """Decorator: test of the claim ``name``.

    Args:
        name: as it appears in reports.
        unless: why nothing is claimed, or ``None`` when it is.
        probe: the test also tells something about a module that does not claim it.
    """

    def add(test: Callable[[Subject], Evidence | str]) -> Callable[[Subject], Evidence | str]:
        CLAIMS[name] = Claim(name, test, unless, probe)
        return test

    return add


def trait(name: str) -> Callable[[Subject], str | None]:
    """For ``unless``: tested only when this boolean trait is claimed."""
    return lambda s: None if getattr(s.claims, name) else f"trait {name} is False"


def mechanism_only(s: Subject) -> str | None:
    """For ``unless``: a question that only the call convention of Mechanism answers."""
    return None if s.is_mechanism else "not a Mechanism, so it has no such convention"


# --------------------------------------------------------------------------------------------------------------------
# Comparing


def deviation(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the size of ``b``; ``inf`` when something is not finite or shapes differ."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))


def require(condition: Any, why: str, measured: float | None = None, limit: float | None = None) -> None:
    """Refute with ``why`` unless ``condition``."""
    if not bool(condition):
        raise Refuted(why, measured, limit)


def same(a: Tensor, b: Tensor, why: str, limit: float = SAME) -> float:
    """The deviation of ``a`` from ``b``; refutes with ``why`` above ``limit``."""
    require(a.shape == b.shape, f"{why}: shape {tuple(a.shape)} instead of {tuple(b.shape)}")
    measured = deviation(a, b)
    require(measured <= limit, f"{why}: they differ by {measured:.2e} of their size (limit {limit:g})", measured, limit)
    return measured


def finite(value: Tensor, what: str) -> Tensor:
    """``value``; refutes when it holds NaN or infinity."""
    require(value.isfinite().all(), f"{what} holds NaN or infinity")
    return value


def refused(call: Callable[[], Any], what: str) -> str:
    """The message with which ``call`` is refused; refutes when it is accepted or fails obscurely."""
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
        require(len(message) >= 15, f"{what} is refused without an explanation: {type(error).__name__}({message!r})")
        return message
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise Refuted(f"{what} is not refused at the door but breaks inside: {type(error).__name__}: {text}") from error
    raise Refuted(f"{what} is accepted silently")


def unserved(error: Exception, dtype: torch.dtype) -> bool:
    """Whether an operator said by name that it does not know ``dtype``."""
    name = str(dtype).removeprefix("torch.").lower()
    text = str(error).lower()
    return isinstance(error, (RuntimeError, TypeError, NotImplementedError, ValueError)) and name in text


# --------------------------------------------------------------------------------------------------------------------
# Building


def resolve(target: Any) -> tuple[str, Callable[..., nn.Module]]:
    """A printable name and a factory for a registry name, ``"module:Class"``, class, factory or module."""
    if isinstance(target, str):
        if ":" not in target:
            return target, find(target)
        module_name, _, path = target.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # whatever the module raises: the file is the user's
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise ValueError(f"target={target!r}: cannot import {module_name!r}: {kind}{error}") from error
        for part in path.split("."):
            if not hasattr(found, part):
                raise ValueError(f"target={target!r}: {module_name!r} has no {path!r}")
            found = getattr(found, part)
        return target, found
    if isinstance(target, nn.Module):

        def clone(**config: Any) -> nn.Module:
            if config:
                raise TypeError(f"settings {sorted(config)} were given for a module that is built already")
            return copy.deepcopy(target)

        return type(target).__name__, clone
    if callable(target):
        return getattr(target, "__qualname__", repr(target)), target
    raise TypeError(
        f"target must be a registry name, 'module:Class', a class, a factory or a module, got {type(target).__name__}"
    )


def accepts(factory: Callable[..., Any], name: str) -> bool:
    """Whether ``factory`` has an argument of that name."""
    try:
        return name in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def default_config(factory: Callable[..., Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Small settings for what the caller left open."""
    out = dict(config)
    for name, value in (("dim", 32), ("num_heads", 4)):
        if name not in out and accepts(factory, name):
            out[name] = value
    return out


def default_grid(traits: Traits) -> tuple[int, ...]:
    """A small grid of the lowest rank claimed."""
    rank = min(traits.grid_ranks)
    side = {1: 16, 2: 8, 3: 4}[rank]
    return (max(side, 2 * traits.grid_multiple) // traits.grid_multiple * traits.grid_multiple,) * rank


def liven(module: nn.Module) -> nn.Module:
    """Move parameters off constant initial values: a gate at zero or a bias at zero would hide what it switches.

    Zeros become small and random, other constants are jittered; parameters that are random already stay.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
                noise = torch.rand(p.shape, generator=generator, dtype=torch.float32).to(p.dtype) - 0.5
                p.copy_(p * (1 + 0.2 * noise) + (0.6 * noise if bool(p.flatten()[0] == 0) else 0.0))
    return module


def still(module: nn.Module) -> nn.Module:
    """Switch dropout off, also where it is a plain attribute."""
    for m in module.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.p = 0.0
        for name in ("attn_drop", "proj_drop", "drop_path", "dropout", "dropout_p"):
            if isinstance(vars(m).get(name), float):
                setattr(m, name, 0.0)
    return module


@dataclass(frozen=True)
class Setting:
    """Where a claim is tried again: another mode, another size, another rank."""

    where: str
    grid: tuple[int, ...]
    train: bool = False


@dataclass(frozen=True)
class Scene:
    """One way of calling the mechanism: self or cross, causal or not."""

    name: str
    cross: bool
    causal: bool
    mask: Mask | None = None


class Subject:
    """A mechanism under test."""

    def __init__(
        self,
        target: Any,
        case: Case | None = None,
        claims: Traits | None = None,
        grid: Any = None,
        context_grid: Any = None,
        config: Mapping[str, Any] = MappingProxyType({}),
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ):
        if isinstance(target, Case):
            target, case = target.name, target
        self.name, self.factory = resolve(target)
        if case is None:
            settings = dict(config) if isinstance(target, nn.Module) else default_config(self.factory, config)
            # A class that cannot be tried on just any input says what to try: fields of Case, in ``example``.
            case = Case(self.name, settings, **{"grid": (), **getattr(self.factory, "example", {})})
        case = replace(
            case,
            config={**case.config, **config},
            grid=case.grid if grid is None else _tuple(grid),
            context_grid=case.context_grid if context_grid is None else _tuple(context_grid),
        )
        self.case = case
        if wrap is not None:
            build = self.factory
            self.factory = lambda **config: wrap(build(**config))
        self.base = self.fresh(torch.float32, like=None)
        self.is_mechanism = isinstance(self.base, Mechanism)
        self._claims = claims
        self._growth: Any = None
        self.brief = False
        self.pool = isinstance(self.base, Pool)
        self.claims = self.claims_of(self.base)
        if not case.grid:
            self.case = replace(case, grid=default_grid(self.claims))
        elif grid is not None and self.claims is not SILENT and len(case.grid) not in self.claims.grid_ranks:
            ranks = sorted(self.claims.grid_ranks)
            raise ValueError(f"grid={case.grid} has {len(case.grid)} axes, but {self.name} takes grids of rank {ranks}")

    # ---- building

    def build(self, **overrides: Any) -> nn.Module:
        """A new instance, seeded."""
        torch.manual_seed(0)
        settings = {**self.case.config, **overrides}
        try:
            module = self.factory(**settings)
        except Exception as error:
            if ":" not in self.name:
                raise  # ours says so itself
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"target={self.name!r} cannot be built with the settings {settings}: {why}") from error
        if not isinstance(module, nn.Module):
            raise TypeError(f"{self.name} built {type(module).__name__}, not a torch.nn.Module")
        return module

    def fresh(self, dtype: torch.dtype = torch.float64, train: bool = False, like: Any = ..., **overrides: Any) -> Any:
        """A new instance in ``dtype`` with the same weights each time, dropout off."""
        module = still(liven(self.build(**overrides))).train(train)
        if like is ... and not overrides:
            module.load_state_dict(self.base.state_dict())
        return module.to(dtype)

    def claims_of(self, module: nn.Module) -> Traits:
        """What ``module`` claims in its mode."""
        if isinstance(module, Stream):  # a stream reads another one, whatever a fusion says of patterns
            return (self._claims or self._said(module.inner)).but(patterns={"noncausal-cross"})
        if self._claims is not None:
            return self._claims
        return self._said(module.inner if isinstance(module, Pool) else module)

    def _said(self, module: nn.Module) -> Traits:
        for holder, name in ((module, "traits"), (type(module), "class_traits")):
            found = getattr(holder, name, None)
            if isinstance(found, Traits):
                return found
        return FUSED if isinstance(module, Fusion) else SILENT

    def fits(self, y: Tensor, x: Tensor) -> bool:
        """Whether ``y`` has the shape that the answer to ``x`` must have."""
        return y.dim() == 3 and y.shape[:2] == (x.shape[0], 1) if self.pool else y.shape == x.shape

    @cached_property
    def width(self) -> int:
        """Channels of ``x``."""
        config = self.case.config
        for look in (config.get, lambda name: getattr(self.base, name, None)):
            for name in ("dim", "embed_dim", "d_model", "hidden_size", "channels", "in_channels", "in_dim"):
                if isinstance(found := look(name), int):
                    return found
        for p in self.base.modules():
            for name in ("in_features", "embed_dim", "input_size"):
                if isinstance(found := getattr(p, name, None), int):
                    return found
        if not any(True for _ in self.base.parameters()):
            return 16  # nothing in it has a width
        raise ValueError(f"cannot tell how wide the input of {self.name} is; pass dim=... or give the module a .dim")

    @property
    def context_width(self) -> int:
        """Channels of ``context``."""
        return getattr(self.base, "context_dim", self.width)

    # ---- feeding

    @cached_property
    def scenes(self) -> list[Scene]:
        """Every claimed pattern; those that are the same call are one scene."""
        patterns = self.claims.patterns
        found = []
        for kind in ("self", "cross"):
            both = {f"noncausal-{kind}", f"causal-{kind}"} <= patterns
            if f"noncausal-{kind}" in patterns:
                found.append(Scene(f"noncausal-{kind}", kind == "cross", False))
            if f"causal-{kind}" in patterns:
                # One instance that claims both becomes causal by the mask.
                found.append(
                    Scene(f"causal-{kind}", kind == "cross", True, causal() if both and self.claims.mask else None)
                )
        return found

    @property
    def scene(self) -> Scene:
        """The first claimed pattern."""
        return self.scenes[0]

    @property
    def grid(self) -> tuple[int, ...]:
        return self.case.grid

    def x(self, batch: int = 2, grid: Any = None, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """(B, *grid, C) random tokens."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *(self.grid if grid is None else grid), self.width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def context(
        self, scene: Scene, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 2, grid: Any = None
    ) -> Tensor | None:
        """(B, *grid', C') random context of a cross scene, for queries on ``grid``."""
        if not scene.cross:
            return None
        own = self.grid if grid is None else grid
        grid = self.case.context_grid
        if grid is None:
            grid = tuple(g + self.claims.grid_multiple for g in own) if self.claims.resolution_free else own
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((batch, *grid, self.context_width), generator=generator, dtype=torch.float64).to(dtype)

    def alike(self, like: Tensor, seed: int, own: float = 0.3) -> Tensor:
        """Tokens of the shape of ``like`` (B, N, ...) that have much in common, the first half one thing and the second
        another: sums over them grow, and where rounding stops them from growing, the second half goes missing."""
        shape = (like.shape[0], 2, *[1] * (like.dim() - 3), like.shape[-1])
        common = self.noise(like.new_empty(shape), seed)
        late = (torch.arange(like.shape[1]) >= like.shape[1] // 2).long()
        return common[:, late] + own * self.noise(like, seed + 1)

    def noise(self, like: Tensor, seed: int, size: float = 1.0) -> Tensor:
        """Random values of the shape of ``like``."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return size * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    @staticmethod
    def gaps(x: Tensor) -> dict[str, Tensor]:
        """(B, *grid) masks of existing tokens by the shape of their gap, each a little different in every sample."""
        batch, grid = x.shape[0], tuple(x.shape[1:-1])
        n = math.prod(grid)
        order, sample = torch.arange(n).expand(batch, n), torch.arange(batch)[:, None]
        third = max(1, n // 3)
        size = (third + sample % 2).clamp(max=max(n - 1, 0))
        found = {
            "left": order >= size,
            "middle": (order < n // 3) | (order >= n // 3 + size),
            "right": order < n - size,
        }
        return {name: valid.view(batch, *grid) for name, valid in found.items()}

    def holes(self, x: Tensor) -> Tensor:
        """(B, *grid) boolean: scattered tokens of even samples and the last part of odd ones do not exist."""
        batch, grid = x.shape[0], tuple(x.shape[1:-1])
        n = math.prod(grid)
        generator = torch.Generator().manual_seed(3)
        valid = torch.rand(batch, n, generator=generator) > 0.4
        valid[:, : max(1, n // 4)] |= torch.rand(batch, max(1, n // 4), generator=generator) > 0.5
        valid[1::2] = torch.arange(n) < max(1, (5 * n) // 8)
        valid[:, n // 2] = True
        return valid.view(batch, *grid)

    def run(self, m: nn.Module, x: Tensor, context: Tensor | None = None, scene: Scene | None = None, **kw: Any) -> Any:
        """The raw answer."""
        if self.case.extras is not None:
            kw = {**self.case.extras(x), **kw}
        if scene is not None and scene.mask is not None:
            given = as_mask(kw.get("mask"))
            kw["mask"] = scene.mask if given is None else scene.mask & given
        return m(x, **kw) if context is None else m(x, context, **kw)

    def y(
        self, m: nn.Module, x: Tensor, context: Tensor | None = None, scene: Scene | None = None, **kw: Any
    ) -> Tensor:
        """The tokens of the answer."""
        return tokens(self.run(m, x, context, scene, **kw))

    def plan(self, m: Any, x: Tensor, context: Tensor | None = None) -> dict[str, Any]:
        """``{"plan": ...}`` with the choices for ``x``, so that they can be held fixed; empty without choices."""
        if not self.claims.needs_plan:
            return {}
        extras = self.case.extras(x) if self.case.extras is not None else {}
        return {"plan": m.plan(x, **extras) if context is None else m.plan(x, context, **extras)}

    # ---- where to try again

    @cached_property
    def long(self) -> tuple[int, ...]:
        """About 130 tokens, with odd and unequal sides where the traits allow; the usual grid where size is fixed."""
        if not self.claims.resolution_free:
            return self.grid
        step = self.claims.grid_multiple
        sides = {1: (131,), 2: (11, 12), 3: (5, 5, 6)}[len(self.grid)]
        return tuple(math.ceil(max(side, least) / step) * step for side, least in zip(sides, self.grid, strict=True))

    @cached_property
    def elsewhere(self) -> list[tuple[int, ...]]:
        """A small grid with unequal sides for every other rank that is claimed and accepts one."""
        if not self.claims.resolution_free:
            return []
        step, found = self.claims.grid_multiple, []
        for rank in sorted(self.claims.grid_ranks - {len(self.grid)}):
            for least in (3, 6, max(self.grid)):  # the smaller may be too small for a window
                grid = tuple(math.ceil((least + axis) / step) * step for axis in range(rank))
                x, context = self.x(grid=grid, dtype=torch.float32), self.context(self.scene, 2, torch.float32)
                try:
                    with torch.no_grad():
                        self.y(self.fresh(torch.float32), x, context, self.scene)
                except ValueError:
                    continue
                found.append(grid)
                break
        return found

    def settings(self, ranks: bool = True) -> list[Setting]:
        """At about 130 tokens, the same in training, and on every other rank."""
        n, free = math.prod(self.long), self.claims.resolution_free
        found = [Setting(f" at {n} tokens", self.long)] if free else []
        found.append(Setting(f" in training, at {n} tokens" if free else " in training", self.long, train=True))
        if ranks:
            found += [Setting(f" on a grid of rank {len(grid)}", grid) for grid in self.elsewhere]
        return found

    def repeatable(self, m: nn.Module) -> Callable[..., Tensor]:
        """``y`` of ``m``, each time from the same random numbers and, in training, from the same buffers."""
        buffers = {n: b.clone() for n, b in m.named_buffers()} if m.training else {}

        def y(x: Tensor, context: Tensor | None = None, scene: Scene | None = None, **kw: Any) -> Tensor:
            with torch.no_grad():
                for n, b in m.named_buffers():
                    if n in buffers and not torch.equal(b, buffers[n]):
                        b.data.copy_(buffers[n])  # unseen by graphs: a BatchNorm in training holds what it never reads
            torch.manual_seed(0)
            return self.y(m, x, context, scene, **kw)

        return y

    def other_grids(self) -> Iterator[tuple[int, ...]]:
        """Awkward grids other than the usual one, all multiples of ``grid_multiple``."""
        g = self.claims.grid_multiple
        if self.case.odd_grid is not None:
            yield self.case.odd_grid
        else:
            yield tuple(side + g * (1 + axis) for axis, side in enumerate(self.grid))

    def __repr__(self) -> str:
        return f"Subject({self.name}, {dict(self.case.config)}, {self.grid})"


def tokens(answer: Any) -> Tensor:
    """``y`` of whatever a module returned."""
    if isinstance(answer, Output):
        return answer.y
    if isinstance(answer, (tuple, list)) and answer and isinstance(answer[0], Tensor):
        return answer[0]
    if not isinstance(answer, Tensor):
        raise Refuted(f"forward returned {type(answer).__name__}, not a tensor")
    return answer


def _tuple(grid: int | str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(grid, str):
        grid = [int(part) for part in grid.strip("()").split(",") if part]
    return (grid,) if isinstance(grid, int) else tuple(grid)
