"""Patterns, grids, layouts and symmetries: what goes in and what comes out."""

from __future__ import annotations

import math
from functools import partial

import torch

from ..types import PATTERNS
from .subject import (
    Evidence,
    NotClaimed,
    Subject,
    accepts,
    claim,
    finite,
    mechanism_only,
    refused,
    require,
    same,
    trait,
)


@claim("traits", unless=mechanism_only)
def traits(s: Subject) -> str:
    """What an instance claims lies within what its class claims, in both modes."""
    bound = type(s.base).class_traits  # type: ignore[attr-defined]
    for train in (False, True):
        mine = s.claims_of(s.base.train(train))
        excess = mine.within(bound)
        require(not excess, f"m.traits exceeds class_traits in {excess}")
        for kind in ("work", "memory"):
            for symbol, power in getattr(mine, kind).items():
                most = getattr(bound, kind).get(symbol, power)
                require(power <= most, f"m.traits.{kind}[{symbol!r}]={power} exceeds {most} of class_traits")
    s.base.eval()
    require(mine.patterns, "no pattern is claimed, so the mechanism cannot be called at all")
    return f"{len(mine.patterns)} of {len(PATTERNS)} patterns claimed, within the class"


@claim("patterns")
def patterns(s: Subject) -> str:
    """A claimed pattern gives tokens of the shape of ``x``; an unclaimed one is refused."""
    seen = []
    for scene in s.scenes:
        m = s.fresh()
        x, context = s.x(), s.context(scene)
        x.requires_grad_()
        y = finite(s.y(m, x, context, scene), f"y of {scene.name}")
        require(y.shape == x.shape, f"{scene.name}: y has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}")
        require(y.dtype == x.dtype, f"{scene.name}: y is {y.dtype} for x of {x.dtype}")
        leaves = [x] if context is None else [x, context.requires_grad_()]
        y = s.y(m, x, context, scene)
        for grad in torch.autograd.grad(y.square().sum(), leaves, retain_graph=True, allow_unused=True):
            require(grad is not None and grad.any(), f"{scene.name}: y does not read all that it is given")
            finite(grad, f"the gradient of {scene.name}")  # type: ignore[arg-type]
        if not scene.cross and not scene.causal and x.shape[1] > 1:
            later = (
                torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)[0][:, t + 1 :].any()
                for t in range(x.shape[1] - 1)
            )
            require(any(later), f"{scene.name}: no token reads a later one, so it is causal")
        seen.append(scene.name)
    said = f"{', '.join(seen)} work"
    if not s.is_mechanism:
        return said
    kinds = {scene.cross for scene in s.scenes}
    m = s.fresh()
    if True not in kinds:
        refused(lambda: m(s.x(), s.x(seed=5)), "a context, though no cross pattern is claimed,")
        said += "; a context is refused"
    if False not in kinds:
        refused(lambda: m(s.x()), "a missing context, though no self pattern is claimed,")
        said += "; a missing context is refused"
    bound = getattr(type(s.base), "class_traits", s.claims).patterns
    if accepts(s.factory, "causal") and not any(p.startswith("causal") for p in bound):
        refused(lambda: s.build(causal=True), "causal=True, though no causal pattern is claimed,")
    return said


@claim("resolution")
def resolution(s: Subject) -> str:
    """Other grids work when claimed, and are refused clearly otherwise."""
    m, scene, step = s.fresh(), s.scene, s.claims.grid_multiple
    said = []
    for grid in s.other_grids():
        x, context = s.x(grid=grid), s.context(scene)
        attempt = partial(s.y, m, x, context, scene)
        if s.claims.resolution_free:
            y = finite(attempt(), f"y on grid {grid}")
            require(y.shape == x.shape, f"grid {grid}: y has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}")
            said.append(f"grid {grid} works")
        elif s.is_mechanism:
            refused(attempt, f"grid {grid}, though one instance claims only the size it was built for,")
            said.append(f"grid {grid} is refused")
    if not s.is_mechanism:
        if not said:
            raise NotClaimed("trait resolution_free is False")
        return "; ".join(said)
    if s.claims.resolution_free and step > 1:
        grid = tuple(g + 1 for g in s.grid)
        refused(lambda: s.y(m, s.x(grid=grid), s.context(scene), scene), f"grid {grid}, no multiple of {step},")
        said.append(f"grid {grid} is refused, no multiple of {step}")
    if s.claims.resolution_free and step == 1:
        single = s.x(grid=(1,) * len(s.grid))
        try:
            finite(s.y(m, single, s.context(scene), scene), "y of a single token")
            said.append("a single token works")
        except (ValueError, TypeError) as error:
            said.append(f"a single token is refused ({error})")
    return "; ".join(said)


@claim("grid ranks", unless=mechanism_only)
def grid_ranks(s: Subject) -> str:
    """Every claimed rank works; the others are refused."""
    m, scene, step = s.fresh(), s.scene, s.claims.grid_multiple
    sides = sorted({max(2, math.ceil(4 / step)) * step, min(max(s.grid), max(8, step)) // step * step or step})
    for rank in (1, 2, 3):
        if rank == len(s.grid):
            continue
        attempts = [partial(s.y, m, s.x(grid=(side,) * rank), s.context(scene), scene) for side in sides]
        if rank not in s.claims.grid_ranks:
            refused(attempts[0], f"a grid of rank {rank}, which is not claimed,")
        elif s.claims.resolution_free:
            try:
                y = attempts[0]()
            except ValueError:  # too small for a window, perhaps
                y = attempts[-1]()
            require(y.dim() == rank + 2, f"y on a grid of rank {rank} has shape {tuple(y.shape)}")
    return f"ranks {sorted(s.claims.grid_ranks)} work, the others are refused"


@claim("layout", unless=trait("layout"))
def layout(s: Subject) -> str:
    """Tokens beside the grid travel with a layout, obey ``valid``, and the layout must add up."""
    if s.case.layout is None:
        raise NotClaimed("the case names no layout to try")
    m, lay, scene = s.fresh(), s.case.layout, s.scene
    x, context = s.x(grid=(len(lay),)), s.context(scene)
    y = finite(s.y(m, x, context, scene, layout=lay), "y with a layout")
    require(y.shape == x.shape, f"y has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}")
    said = f"{lay.segments} works"
    if s.claims.valid:
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        for name, _ in lay.segments:
            valid[:, lay.span(name)[1] - 1] = False
        valid[:, 0] = True
        if valid.all():
            valid[:, -1] = False
        y = s.y(m, x, context, scene, layout=lay, valid=valid)
        other = torch.where(valid[..., None], x, s.noise(x, 1, 50.0))
        same(s.y(m, other, context, scene, layout=lay, valid=valid), y, "with a layout, invalid tokens are read")
        require(not y[~valid].any(), "with a layout, y of invalid tokens is not zero")
        said += ", invalid tokens beside and on the grid change nothing"
    wrong = s.x(grid=(len(lay) + 1,))
    refused(lambda: s.y(m, wrong, context, scene, layout=lay), "a layout that does not add up")
    return said


@claim("permutation", unless=trait("permutation_equivariant"), probe=True)
def permutation(s: Subject) -> Evidence:
    """Permuting the tokens permutes the answer."""
    worst = 0.0
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        order = torch.randperm(math.prod(s.grid), generator=torch.Generator().manual_seed(4))
        y = s.y(m, x, context, scene).flatten(1, -2)[:, order]
        moved = s.y(m, x.flatten(1, -2)[:, order].view_as(x), context, scene).flatten(1, -2)
        worst = max(worst, same(moved, y, f"{scene.name}: permuting tokens does not permute the answer"))
    return Evidence("permuting tokens permutes the answer", worst)


@claim("batch", unless=trait("batch_independent"), probe=True)
def batch(s: Subject) -> Evidence:
    """The answer for a sample does not depend on the others."""
    worst = 0.0
    for train in (False, True):
        m = s.fresh(train=train)
        if train and not s.claims_of(m).batch_independent:
            continue
        mode = "in training" if train else "in eval"
        for scene in s.scenes:
            x, context = s.x(3), s.context(scene, 3)
            torch.manual_seed(0)
            y = s.y(m, x.requires_grad_(), context, scene)
            (grad,) = torch.autograd.grad((y[0] * s.noise(y[0], 0)).sum(), x)
            require(
                not grad[1:].any(),
                f"{mode}, the gradient of sample 0 reaches other samples",
                float(grad[1:].abs().max()),
            )
            for seed, size in ((1, 1.0), (2, 30.0)):
                other = x.detach().clone()
                other[1:] = s.noise(other[1:], seed, size)
                if context is not None:
                    context = torch.cat([context[:1], s.noise(context[1:], seed, size)])
                torch.manual_seed(0)
                why = f"{mode}, the answer for sample 0 changes with the other samples"
                worst = max(worst, same(s.y(m, other, context, scene)[:1], y[:1], why))
    return Evidence("other samples change nothing", worst)


@claim("extras")
def extras(s: Subject) -> str:
    """Weights and carry come back when asked for, and asking changes nothing."""
    asked = [e for e, yes in (("weights", s.claims.weights), ("carry", s.claims.carries)) if yes]
    if not asked:
        raise NotClaimed("returns neither weights nor a carry")
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        y = s.y(m, x, context, scene)
        for extra in asked:
            out = s.run(m, x, context, scene, returns=(extra,))
            value = getattr(out, extra)
            require(value is not None, f"returns=({extra!r},) gives None for it")
            same(out.y, y, f"asking for {extra} changes y")
            leaves = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
            require(leaves, f"{extra} holds no tensor")
            for leaf in leaves:
                if leaf.is_floating_point():
                    finite(leaf, extra)
            if extra == "weights":
                require(
                    leaves[0].shape[0] == x.shape[0], f"weights have shape {tuple(leaves[0].shape)}, batch not first"
                )
            else:
                finite(s.y(m, y, context, scene, carry=value), "y of the next block, given the carry")
    return f"{' and '.join(asked)} come back"
