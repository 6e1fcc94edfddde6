"""Patterns, grids, layouts and symmetries: what goes in and what comes out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..types import PATTERNS
from .subject import (
    SILENT,
    Evidence,
    NotClaimed,
    Scene,
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
        require(s.fits(y, x), f"{scene.name}: y has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}")
        require(y.dtype == x.dtype, f"{scene.name}: y is {y.dtype} for x of {x.dtype}")
        leaves = [x] if context is None else [x, context.requires_grad_()]
        y = s.y(m, x, context, scene)
        for grad in torch.autograd.grad(y.square().sum(), leaves, retain_graph=True, allow_unused=True):
            require(grad is not None and grad.any(), f"{scene.name}: y does not read all that it is given")
            finite(grad, f"the gradient of {scene.name}")  # type: ignore[arg-type]
        if not scene.cross and not scene.causal and x.shape[1] > 1 and s.claims is not SILENT and not s.pool:
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
            require(s.fits(y, x), f"grid {grid}: y has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}")
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
        y = s.y(m, x, context, scene).flatten(1, -2)
        y = y if s.pool else y[:, order]
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
    worst = max([worst, *(_others(s, scene) for scene in s.scenes)])
    return Evidence("other samples change nothing, nor does which of their tokens exist", worst)


def _others(s: Subject, scene: Scene) -> float:
    """Which tokens of other samples exist does not matter, nor how many: none, few, all, more than here."""
    worst = 0.0
    if not s.claims.valid:
        return worst
    m, x, context = s.fresh(), s.x(4), s.context(scene, 4)
    for argument, held in (("valid", x), ("context_valid", context)):
        if held is None:
            continue
        first = s.gaps(held)["right"][0]
        n, shape = first.numel(), first.shape
        answers = []
        for most in (0, 1, n // 2, n):
            least = 1 if s.pool else 0  # which may refuse a sample without any
            valid = torch.stack([first, *((torch.arange(n) < max(least, most - i)).view(shape) for i in range(3))])
            with torch.no_grad():
                answers.append(s.y(m, x, context, scene, **{argument: valid})[0])
        why = f"{scene.name}: the answer for sample 0 changes with {argument} of the other samples"
        worst = max([worst, *(same(y, answers[0], why) for y in answers[1:])])
    return worst


def _map(s: Subject, m: nn.Module, x: Tensor, context: Tensor | None, scene: Scene, **kw: Any) -> tuple[Tensor, Tensor]:
    """(y, weights) of shapes (B, N, C) and (B, H, N, M); of a pool, with one row for its one vector."""
    out = s.run(m, x, context, scene, returns=("weights",), **kw)
    weights = out.weights
    require(isinstance(weights, Tensor), f"weights are {type(weights).__name__}, not a tensor (B, H, N, M)")
    n, k = math.prod(x.shape[1:-1]), math.prod((x if context is None else context).shape[1:-1])
    n = 1 if s.pool else n
    found, want = tuple(weights.shape), f"(B, H, N, M) with N={n}, M={k}"
    require(weights.dim() == 4 and weights.shape[2:] == (n, k), f"weights have shape {found}, not {want}")
    return out.y.flatten(1, -2), weights


def _vanish(s: Subject, scene: Scene) -> None:
    """Weights are zero where nothing may be read."""
    m, x, context = s.fresh(), s.x(), s.context(scene)
    source = x if context is None else context
    n, k = 1 if s.pool else math.prod(x.shape[1:-1]), math.prod(source.shape[1:-1])
    tries: list[tuple[str, dict[str, Any], Tensor]] = []
    if s.claims.valid:
        name = "valid" if context is None else "context_valid"
        for valid in (s.holes(source), s.gaps(source)["left"]):
            hidden = ~valid.flatten(1)[:, None, None].expand(-1, 1, n, -1)
            tries.append((f"keys that {name} excludes", {name: valid}, hidden))
    if s.claims.mask:
        allowed = torch.rand(n, k, generator=torch.Generator().manual_seed(15)) > 0.5
        tries.append(("keys that the mask hides", {"mask": allowed}, ~allowed.expand(x.shape[0], 1, n, k)))
    if scene.causal and context is None:
        steps = torch.arange(n) // max(1, n // x.shape[1])
        later = steps[:, None] < steps
        tries.append(("the future", {}, later.expand(x.shape[0], 1, n, k)))
    with torch.no_grad():
        for what, kw, hidden in tries:
            _, weights = _map(s, m, x, context, scene, **kw)
            largest = float((weights * hidden).abs().max()) if hidden.any() else 0.0
            require(largest == 0, f"{scene.name}: weights at {what} reach {largest:.2g}", largest, 0.0)


def _explain(s: Subject, scene: Scene) -> None:
    """Weights are those that were used: what each head reads by them explains ``y`` better than others' weights do.

    ``y`` is fitted, by least squares, to the tokens averaged by the weights of every head; with softmax attention the
    fit is exact. A mechanism may do more than attend, so no fit is demanded, only one better than with the weights of
    other samples or other rows.
    """
    batch = 48 if s.claims.batch_independent else 2
    m = s.fresh()
    x, context = 2 * s.x(batch), s.context(scene, batch)
    context = None if context is None else 2 * context
    with torch.no_grad():
        y, weights = _map(s, m, x, context, scene)
        source = (x if context is None else context).flatten(1, -2)
        n, unknown = y.shape[1], weights.shape[1] * source.shape[-1] + 1
        if batch * n < 3 * unknown:
            return  # anything could be fitted

        def rest(weights: Tensor) -> float:
            read = torch.einsum("bhnm,bmc->bnhc", weights.double(), source.double()).flatten(2).flatten(0, 1)
            read = torch.cat([read, read.new_ones(len(read), 1)], 1)
            target = y.double().flatten(0, 1)
            fit = read @ torch.linalg.lstsq(read, target, driver="gelsd").solution
            return float((fit - target).norm() / (target - target.mean(0)).norm().clamp_min(1e-12))

        generator = torch.Generator().manual_seed(16)
        samples, rows = torch.randperm(batch, generator=generator), torch.randperm(n, generator=generator)
        own = rest(weights)
        other = min([rest(weights[samples]), *([rest(weights[:, :, rows])] if n > 1 else [])])
    why = (
        f"{scene.name}: the weights do not explain y: a fit by them leaves {own:.3f} of it, by those of other samples "
        f"and rows {other:.3f}; they are not the weights that were used"
    )
    require(own < 1e-6 or own < 0.975 * other, why, own, 0.975 * other)


@claim("extras")
def extras(s: Subject) -> str:
    """Weights and carry come back when asked for, and asking changes nothing.

    Weights vanish where ``valid``, the mask or causality forbids, and explain the answer.
    """
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
                _vanish(s, scene)
                _explain(s, scene)
            else:
                finite(s.y(m, y, context, scene, carry=value), "y of the next block, given the carry")
    return f"{' and '.join(asked)} come back"
