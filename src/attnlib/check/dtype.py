"""Precision: bfloat16, autocast, float32 against float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .subject import Evidence, NotClaimed, Scene, Subject, claim, finite, require, unserved

#: Relative error of half precision, as a norm: bfloat16 has a unit of 2^-8 = 0.004, and a handful of roundings pile up.
HALF = 0.05
#: The same over several hundred tokens with much in common, where rounding averages out and only sums can drift.
LENGTH = 0.02


def _error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-6))


def _limit(
    s: Subject,
    m: nn.Module,
    scene: Scene,
    x: Tensor,
    context: Tensor | None,
    plan: dict[str, Any],
    least: float = HALF,
    times: float = 4.0,
) -> float:
    """What half precision may cost: ``least``, or more where the mechanism amplifies rounding of what it is given.

    The latter is measured in float32, by moving inputs and weights by about one rounding.
    """
    with torch.no_grad():
        y = s.y(m, x, context, scene, **plan)
        moved = copy.deepcopy(m)
        for i, p in enumerate(moved.parameters()):
            p.mul_(1 + s.noise(p, 50 + i, 2.0**-9))
        x = x * (1 + s.noise(x, 48, 2.0**-9))
        context = None if context is None else context * (1 + s.noise(context, 49, 2.0**-9))
        return max(least, times * _error(s.y(moved, x, context, scene, **plan), y))


def _pair(s: Subject, scene: Scene) -> tuple[Tensor, Tensor | None]:
    x, context = s.x(), s.context(scene)
    return x.bfloat16(), None if context is None else context.bfloat16()


def _wide(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


@claim("float32")
def float32(s: Subject) -> Evidence:
    """float32 agrees with float64."""
    worst, limit = 0.0, 1e-4
    for scene in s.scenes:
        x, context = s.x(dtype=torch.float32), s.context(scene, dtype=torch.float32)
        m, m64 = s.fresh(torch.float32), s.fresh(torch.float64)
        wide, wide_context = x.double(), _wide(context, torch.float64)
        plan = s.plan(m64, wide, wide_context)
        y = s.y(m, x, context, scene, **plan)
        require(y.dtype == torch.float32, f"y is {y.dtype} for float32 input")
        error = _error(finite(y, "y"), s.y(m64, wide, wide_context, scene, **plan))
        require(error <= limit, f"{scene.name}: float32 is off by {error:.1e}", error, limit)
        worst = max(worst, error)
    return Evidence("float32 agrees with float64", worst, limit)


def _length(s: Subject, scene: Scene) -> float:
    """How far bfloat16 drifts from float32 over several hundred tokens with much in common, as trained models have."""
    step = s.claims.grid_multiple
    grid = tuple(math.ceil(side / step) * step for side in {1: (523,), 2: (22, 24), 3: (8, 8, 9)}[len(s.grid)])
    m, wide = s.fresh(torch.bfloat16), s.fresh(torch.bfloat16).float()
    x, context = s.alike(s.x(1, grid), 61).bfloat16(), s.context(scene, 1, grid=grid)
    context = None if context is None else s.alike(context, 63).bfloat16()
    wide_context = _wide(context, torch.float32)
    with torch.no_grad():
        plan = s.plan(wide, x.float(), wide_context)
        want = s.y(wide, x.float(), wide_context, scene, **plan)
        got = finite(s.y(m, x, context, scene, **plan), f"{scene.name}: y at length")
    error = _error(got, want)
    limit = _limit(s, wide, scene, x.float(), wide_context, plan, LENGTH, 8.0)
    why = f"{scene.name}: bfloat16 is off by {error:.3f} on grid {grid} (limit {limit:.3f}): sums have to be float32"
    require(error <= limit, why, error, limit)
    return error


@claim("bfloat16")
def bfloat16(s: Subject) -> Evidence:
    """bfloat16 stays near float32 with the same (rounded) weights and inputs, and keeps its dtype; at length too."""
    worst, limit = 0.0, HALF
    for scene in s.scenes:
        x, context = _pair(s, scene)
        m = s.fresh(torch.bfloat16)
        m32 = s.fresh(torch.bfloat16).float()
        plan = s.plan(m32, x.float(), _wide(context, torch.float32))
        try:
            y = s.y(m, x.requires_grad_(), context, scene, **plan)
        except Exception as error:
            if unserved(error, torch.bfloat16):
                raise NotClaimed(f"bfloat16 is refused by name: {' '.join(str(error).split())[:100]}") from error
            raise
        require(y.dtype == torch.bfloat16, f"{scene.name}: y is {y.dtype} for bfloat16 input")
        y.float().square().sum().backward()
        assert x.grad is not None
        finite(x.grad, f"{scene.name}: the gradient in bfloat16")
        wide, wide_context = x.detach().float(), _wide(context, torch.float32)
        off = _error(finite(y, f"{scene.name}: y"), s.y(m32, wide, wide_context, scene, **plan))
        limit = _limit(s, m32, scene, wide, wide_context, plan)
        require(off <= limit, f"{scene.name}: bfloat16 is off by {off:.3f} (limit {limit:.3f})", off, limit)
        worst = max(worst, off)
        if s.claims.resolution_free:
            worst = max(worst, _length(s, scene))
    return Evidence("bfloat16 stays near float32", worst, limit)


@claim("autocast")
def autocast(s: Subject) -> Evidence:
    """Under autocast forward and backward work, stay near float32 and leave float32 gradients."""
    worst, limit = 0.0, HALF
    for scene in s.scenes:
        m, x, context = s.fresh(torch.float32), s.x(dtype=torch.float32), s.context(scene, dtype=torch.float32)
        plan = s.plan(m, x, context)
        full = s.y(m, x, context, scene, **plan)
        x.requires_grad_()
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = s.y(m, x, context, scene, **plan)
        except Exception as error:
            if unserved(error, torch.bfloat16) and not s.is_mechanism:
                raise NotClaimed(f"bfloat16 is refused by name: {' '.join(str(error).split())[:100]}") from error
            raise
        require(y.dtype in (torch.float32, torch.bfloat16), f"{scene.name}: y is {y.dtype} under autocast")
        off = _error(finite(y, f"{scene.name}: y under autocast"), full)
        limit = _limit(s, m, scene, x.detach(), context, plan)
        require(off <= limit, f"{scene.name}: autocast is off by {off:.3f} (limit {limit:.3f})", off, limit)
        y.float().square().sum().backward()
        for name, p in (("x", x), *m.named_parameters()):
            if p.grad is not None:
                require(p.grad.dtype == torch.float32, f"{scene.name}: the gradient of {name} is {p.grad.dtype}")
                finite(p.grad, f"{scene.name}: the gradient of {name}")
        worst = max(worst, off)
    return Evidence("autocast works forward and backward", worst, limit)
