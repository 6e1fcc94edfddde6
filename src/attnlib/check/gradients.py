"""Gradients against finite differences, losses, and plans."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..types import Output, Traits
from .subject import (
    SAME,
    Evidence,
    Refuted,
    Scene,
    Setting,
    Subject,
    claim,
    deviation,
    finite,
    mechanism_only,
    refused,
    require,
    same,
    tokens,
)


def _agree(s: Subject, f: Any, leaves: list[Tensor], grads: list[Tensor], seed: int, what: str, limit: float) -> float:
    """The error of ``grads`` along a random direction of ``leaves``; refutes with ``what`` above ``limit``.

    A kink may lie within the step of a central difference, which says nothing about the gradient beside it: a wrong
    gradient is wrong with every step and in other directions too.
    """
    least, why = math.inf, ""
    for attempt, eps in enumerate((1e-6, 1e-7, 1e-6)):
        direction = [s.noise(t, 10 * seed + i + (500 if attempt == 2 else 0)) for i, t in enumerate(leaves)]
        analytic, numeric = _directional(f, leaves, direction, grads, eps)
        error = abs(analytic - numeric) / max(abs(analytic), abs(numeric), 1e-2)
        if error < least:
            least = error
            why = (
                f"along a random direction of {what} the gradient says {analytic:.6g}, "
                f"a central difference {numeric:.6g}"
            )
        if least <= limit:
            return least
    raise Refuted(why, least, limit)


def _directional(
    f: Any, leaves: list[Tensor], direction: list[Tensor], grads: list[Tensor], eps: float
) -> tuple[float, float]:
    """(analytic, numeric) derivative of ``f()`` along ``direction``."""
    analytic = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    with torch.no_grad():
        values = []
        for sign in (1.0, -2.0):
            for leaf, d in zip(leaves, direction, strict=True):
                leaf.add_(sign * eps * d)
            values.append(float(f()))
        for leaf, d in zip(leaves, direction, strict=True):
            leaf.add_(eps * d)
    return analytic, (values[0] - values[1]) / (2 * eps)


def _exact(claims: Traits) -> bool:
    return claims.gradient == "exact" or (claims.gradient == "stopped" and claims.needs_plan)


def _slope(s: Subject, scene: Scene, setting: Setting, limit: float) -> float:
    """One direction of everything at once, in another mode, at another size, on another rank; with a gap in valid."""
    m = s.fresh(train=setting.train)
    claims, call = s.claims_of(m), s.repeatable(m)
    if not _exact(claims) or scene.name not in claims.patterns:
        return 0.0
    x, context = s.x(grid=setting.grid), s.context(scene, grid=setting.grid)
    kw = {"valid": s.gaps(x)["right"]} if claims.valid and not claims.needs_plan else {}
    kw |= s.plan(m, x, context)
    leaves = [t.requires_grad_() for t in (x, context) if t is not None]
    leaves += [p for p in m.parameters() if p.requires_grad]
    with torch.no_grad():
        g = s.noise(call(x, context, scene, **kw), 1)

    def f() -> Tensor:
        return (call(x, context, scene, **kw) * g).sum()

    found = torch.autograd.grad(f(), leaves, allow_unused=True)
    grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, found, strict=True)]
    return _agree(s, f, leaves, grads, 4, f"everything, {scene.name}{setting.where},", limit)


@claim("gradient")
def gradient(s: Subject) -> Evidence:
    """Exact gradients equal central differences in float64 along random directions, discrete choices held fixed.

    Again at about 130 tokens, there in training too, and on every claimed rank.
    """
    limit, worst, dead = 1e-5, 0.0, set()
    kind = s.claims.gradient
    exact = _exact(s.claims)
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        plan = s.plan(m, x, context)
        with torch.no_grad():
            g = s.noise(s.y(m, x, context, scene, **plan), 1)

        def f(call: Any = partial(s.y, m, x, context, scene, **plan), g: Tensor = g) -> Tensor:
            return (call() * g).sum()

        named = {n: p for n, p in m.named_parameters() if p.requires_grad}
        inputs = [t for t in (x, context) if t is not None]
        leaves = [t.requires_grad_() for t in inputs] + list(named.values())
        found = torch.autograd.grad(f(), leaves, allow_unused=True)
        dead |= {n for n, grad in zip(named, found[len(inputs) :], strict=True) if grad is None}
        grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, found, strict=True)]
        for grad in grads:
            finite(grad, f"{scene.name}: a gradient")
        require(any(grad.any() for grad in grads[: len(inputs)]), f"{scene.name}: no gradient reaches the inputs")
        if not exact:
            continue
        for group, what in ((range(len(inputs)), "the inputs"), (range(len(inputs), len(leaves)), "the parameters")):
            chosen, chosen_grads = [leaves[i] for i in group], [grads[i] for i in group]
            for seed in range(2):
                worst = max(worst, _agree(s, f, chosen, chosen_grads, seed, f"{what}, {scene.name},", limit))
        for setting in s.settings():
            worst = max(worst, _slope(s, scene, setting, limit))
    said = "equal to central differences" if exact else f"finite ({kind}: not the derivative of the forward)"
    return Evidence(said + (f"; without gradient: {sorted(dead)}" if dead else ""), worst if exact else None, limit)


@claim("losses", unless=lambda s: None if s.claims.losses else "no loss is claimed")
def losses(s: Subject) -> str:
    """Every claimed loss is returned, is a finite scalar, and trains some parameter."""
    for scene in s.scenes:
        m, x, context = s.fresh(train=True), s.x(), s.context(scene)
        torch.manual_seed(0)
        out = s.run(m, x, context, scene, returns=("losses",))
        require(isinstance(out, Output) and out.losses is not None, "returns=('losses',) gives none")
        names = sorted(out.losses)
        require(set(names) == set(s.claims.losses), f"losses are {names}, claimed are {sorted(s.claims.losses)}")
        params = [p for p in m.parameters() if p.requires_grad]
        for name, value in out.losses.items():
            require(value.dim() == 0, f"loss {name!r} has shape {tuple(value.shape)}, not a scalar")
            finite(value, f"loss {name!r}")
            require(value.requires_grad, f"loss {name!r} has no gradient")
            grads = torch.autograd.grad(value, params, allow_unused=True, retain_graph=True)
            require(any(g is not None and g.any() for g in grads), f"loss {name!r} trains no parameter")
            for g in grads:
                if g is not None:
                    finite(g, f"the gradient of loss {name!r}")
    return f"{', '.join(s.claims.losses)}: finite, with gradient"


@claim("checkpointing")
def checkpointing(s: Subject) -> Evidence:
    """Under ``torch.utils.checkpoint`` answer, losses and gradients are the same as without."""
    worst = 0.0
    scene = s.scene
    names = tuple(s.claims.losses)
    kw: dict[str, Any] = {"returns": ("losses",)} if names else {}

    def total(wrapped: bool) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        m, x, context = s.fresh(train=True), s.x(), s.context(scene)
        x.requires_grad_()

        def f(x: Tensor) -> Any:
            return s.run(m, x, context, scene, **kw)

        torch.manual_seed(0)
        out = checkpoint(f, x, use_reentrant=False) if wrapped else f(x)
        y = tokens(out)
        loss = sum((out.losses[name] for name in names), torch.zeros((), dtype=x.dtype)) if names else y.new_zeros(())
        params = [p for p in m.parameters() if p.requires_grad]
        ((y * s.noise(y, 1)).sum() + 100 * loss).backward()
        return y, loss, [x.grad, *(p.grad for p in params)]

    y, loss, grads = total(False)
    try:
        y2, loss2, grads2 = total(True)
    except Exception as error:
        lines = str(error).splitlines()
        require(False, f"the backward pass breaks: {type(error).__name__}: {lines[0] if lines else ''}")
    worst = max(worst, same(y2, y, "the answer differs under checkpointing"))
    same(loss2, loss, "the losses differ under checkpointing")
    for a, b in zip(grads2, grads, strict=True):
        require((a is None) == (b is None), "a gradient appears or vanishes under checkpointing")
        if a is not None and b is not None:
            worst = max(worst, same(a, b, "a gradient differs under checkpointing"))
    return Evidence(f"the same answer{', losses' if names else ''} and gradients as without", worst, SAME)


@claim("plan", unless=lambda s: None if s.claims.needs_plan else "trait needs_plan is False")
def plan(s: Subject) -> Evidence:
    """A plan holds no gradient, its execution equals the forward that makes its own, and it fits the shape it names."""
    worst = 0.0
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        made = s.plan(m, x.requires_grad_(), context)
        for leaf in tree_leaves(made["plan"]):
            if isinstance(leaf, Tensor):
                require(
                    not leaf.is_floating_point(),
                    f"the plan holds a {leaf.dtype} tensor; choices are integers or booleans",
                )
                require(not leaf.requires_grad, "the plan holds a tensor with gradient")
        y = s.y(m, x, context, scene)
        worst = max(worst, same(s.y(m, x, context, scene, **made), y, "executing m.plan(x) differs from forward"))
        near = x.detach() + s.noise(x, 3, 1e-7)
        measured = deviation(s.y(m, near, context, scene, **made), y)
        require(measured < 1e-4, "with the plan held fixed, the answer jumps under a change of 1e-7", measured, 1e-4)
        if s.claims.resolution_free:
            for grid in s.other_grids():
                attempt = partial(s.y, m, s.x(grid=grid), context, scene, **made)
                if made["plan"].shape:
                    refused(attempt, f"a plan made for {s.grid} on grid {grid}")
                else:  # a plan that names no shape says that it fits every one
                    finite(attempt(), f"a plan that names no shape, made for {s.grid} and executed on {grid},")
    return Evidence("executing m.plan(x) equals forward; a plan for another shape is refused", worst, SAME)


@claim("no plan", unless=lambda s: mechanism_only(s) or ("trait needs_plan is True" if s.claims.needs_plan else None))
def no_plan(s: Subject) -> str:
    """A mechanism without discrete choices says so."""
    m = s.fresh()
    refused(lambda: m.plan(s.x()), "plan, though needs_plan is not claimed,")
    return "plan is refused"
