"""Tokens that do not exist, and pairs that may not meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import masks
from .subject import Evidence, Scene, Setting, Subject, claim, finite, require, same, trait


class _Taps(TorchFunctionMode):
    """Collects what linear maps by parameters put out: queries, keys, values, gates."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        product = func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.einsum)
        if func is F.linear or (product and any(isinstance(a, nn.Parameter) for a in args)):
            if out.requires_grad:
                out.retain_grad()
            self.seen.append(out)
        return out


def _ghosts(
    s: Subject, m: nn.Module, scene: Scene, argument: str, valid: Tensor, grid: tuple[int, ...], where: str = ""
) -> None:
    """Invalid tokens must not be read even where they were zeroed first and only a bias speaks for them.

    A row of an inner linear map stems from an invalid token when it stays as it is while all *valid* tokens change,
    but would change if every token were valid. The answer must have no gradient at such rows. Rows that belong to
    queries are no tokens of the context: one whose visible context does not exist is rightly a constant.
    """
    queries, call = s.x(grid=grid).shape[:-1], s.repeatable(m)

    def pass_through(seed: int, valid: Tensor, keep: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        x, context = s.x(grid=grid), s.context(scene, grid=grid)
        held = x if argument == "valid" else context
        assert held is not None
        new = s.noise(held, seed)
        new = new if keep is None else torch.where(keep[..., None], new, s.noise(held, 99))
        x, context = (new, context) if argument == "valid" else (x, new)
        taps = _Taps()
        with taps:
            y = call(x.requires_grad_(), context, scene, **{argument: valid})
        return y, taps.seen

    full = torch.ones_like(valid)
    y, rows = pass_through(1, valid, valid)
    others = [pass_through(2, valid, valid)[1], pass_through(1, full, None)[1], pass_through(2, full, None)[1]]
    if any([t.shape for t in o] != [t.shape for t in rows] for o in others):
        return  # the computation takes another shape; the tests by content have to do
    if argument == "valid" and not s.pool:
        y = y * valid[..., None]
    if not y.requires_grad:
        return
    (y * s.noise(y, 5)).sum().backward()
    largest = max([float(t.grad.abs().max()) for t in rows if t.grad is not None and t.numel()], default=0.0)
    for row, other, open_, open_other in zip(rows, *others, strict=True):
        if row.grad is None or (argument == "context_valid" and row.shape[:-1] == queries != valid.shape):
            continue
        ghost = (row == other).all(-1) & ~(open_ == open_other).all(-1)
        if row.shape[0] == valid.shape[0] and ghost.numel() == valid.numel():
            ghost &= ~valid.view_as(ghost)  # a row per token: one that exists may be constant for reasons of its own
        leak = float(row.grad[ghost].abs().max()) / max(largest, 1e-12) if ghost.any() else 0.0
        require(
            leak <= 1e-9,
            f"{scene.name}{where}: tokens that {argument} excludes are still read where a bias stands in for their "
            "content (they are zeroed, but not kept out of the sum)",
            leak,
            1e-9,
        )


def _padding(s: Subject, m: nn.Module, scene: Scene, x: Tensor, context: Tensor | None) -> float:
    """Adding invalid tokens changes nothing for the others, where the position of a token cannot matter.

    That is the end of a sequence that streams, and anywhere when permutations do not matter.
    """
    n, more, worst = x.shape[1], max(1, x.shape[1] // 3), 0.0
    if len(s.grid) != 1 or not s.claims.resolution_free:
        return 0.0
    places = [n // 2] if s.claims.permutation_equivariant else []
    places += [n] if s.claims.streaming and scene.causal and not scene.cross else []
    for place in places:
        padded = torch.cat([x[:, :place], s.noise(x, 6)[:, :more], x[:, place:]], 1)
        valid = torch.ones(padded.shape[:2], dtype=torch.bool)
        valid[:, place : place + more] = False
        why = f"{scene.name}: adding {more} invalid tokens at {place} changes the answer for the others"
        got = s.y(m, padded, context, scene, valid=valid)
        got = got if s.pool else got[:, valid[0]]
        worst = max(worst, same(got, s.y(m, x, context, scene), why))
    return worst


def _absent(
    s: Subject, scene: Scene, setting: Setting, argument: str, gaps: Mapping[str, Callable[[Tensor], Tensor]]
) -> float:
    """The content of absent tokens changes neither values nor gradients, for gaps of every shape.

    Each gap comes from the same mask in every sample as well, so that a mechanism cannot be right because another
    sample has no gap there.
    """
    m, worst = s.fresh(train=setting.train), 0.0
    if not s.claims_of(m).valid:
        return worst
    call = s.repeatable(m)
    params = [p for p in m.parameters() if p.requires_grad]
    x, context = s.x(grid=setting.grid), s.context(scene, grid=setting.grid)
    held = x if argument == "valid" else context
    assert held is not None
    for name, gap in gaps.items():
        valid = gap(held)
        kind = (torch.arange(held.shape[1]) % 3).view(-1, *[1] * (held.dim() - 2))
        noise = torch.where(kind == 0, math.nan, torch.where(kind == 1, math.inf, s.noise(held, 1, 1e4)))
        answers = []
        for content in (held, noise):
            leaf = torch.where(valid[..., None], held, content).requires_grad_()
            pair = (leaf, context) if argument == "valid" else (x, leaf)
            y = call(*pair, scene, **{argument: valid})
            answers.append((y, *torch.autograd.grad((y * s.noise(y, 4)).sum(), [leaf, *params], allow_unused=True)))
        (y, grad, *rest), (got, got_grad, *got_rest) = answers
        where = f"{scene.name}{setting.where}: with a gap on the {name}, "
        why = f"{where}y changes when tokens that {argument} excludes hold large numbers, NaN or infinity"
        worst = max(worst, same(got, y, why))
        assert grad is not None and got_grad is not None
        require(not got_grad[~valid].any(), f"{where}a gradient reaches tokens that {argument} excludes")
        same(got_grad, grad, f"{where}the gradient changes with what tokens hold that {argument} excludes")
        for a, b in zip(got_rest, rest, strict=True):
            if a is not None and b is not None:
                same(a, b, f"{where}the gradient of a parameter changes with what tokens hold that {argument} excludes")
        _ghosts(s, m, scene, argument, valid, setting.grid, f"{setting.where}, with a gap on the {name}")
    return worst


def _each(name: str, alike: bool) -> Callable[[Tensor], Tensor]:
    def gap(x: Tensor) -> Tensor:
        valid = x[:1] if alike else x
        return Subject.gaps(valid)[name].expand(x.shape[:-1])

    return gap


def _nobody(
    s: Subject, m: Any, scene: Scene, argument: str, held: Tensor, x: Tensor, context: Tensor | None
) -> None:  # fmt: skip
    """A sample without valid tokens gives finite numbers; zeros where it is ``x``. A pool may refuse it, clearly."""
    nobody = torch.ones(held.shape[:-1], dtype=torch.bool)
    nobody[0] = False
    leaf = held.clone().requires_grad_()
    pair = (leaf, context) if argument == "valid" else (x, leaf)
    try:
        out = s.y(m, *pair, scene, **{argument: nobody})
    except ValueError as error:
        require(s.pool and "valid" in str(error), f"{scene.name}: a sample without valid tokens is refused: {error}")
        return
    finite(out, f"{scene.name}: y of a sample without valid tokens")
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    finite(grad, f"{scene.name}: the gradient of a sample without valid tokens")
    if argument == "valid" and not s.pool:
        require(not out[0].any(), f"{scene.name}: y of a sample without valid tokens is not zero")


@claim("validity", unless=trait("valid"))
def validity(s: Subject) -> Evidence:
    """Invalid tokens change nothing, whatever they hold and however many there are; their ``y`` is zero.

    Gaps on the left, in the middle and on the right; at about 130 tokens, there in training too, and on every rank.
    """
    worst = 0.0
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        arguments = [("valid", x), *([("context_valid", context)] if context is not None else [])]
        for argument, held in arguments:
            valid = s.holes(held)
            y = finite(s.y(m, x, context, scene, **{argument: valid}), f"y with {argument}")
            if argument == "valid" and not s.pool:
                require(not y[~valid].any(), f"{scene.name}: y of invalid tokens is not zero")
            for seed, size in ((1, 1.0), (2, 50.0), (3, 1e4)):
                new = torch.where(valid[..., None], held, s.noise(held, seed, size))
                pair = (new, context) if argument == "valid" else (x, new)
                why = f"{scene.name}: y changes when tokens that {argument} excludes change (times {size:g})"
                worst = max(worst, same(s.y(m, *pair, scene, **{argument: valid}), y, why))
            leaf = held.clone().requires_grad_()
            pair = (leaf, context) if argument == "valid" else (x, leaf)
            out = s.y(m, *pair, scene, **{argument: valid})
            (grad,) = torch.autograd.grad((out * s.noise(out, 4)).sum(), leaf)
            require(not grad[~valid].any(), f"{scene.name}: a gradient reaches tokens that {argument} excludes")
            _ghosts(s, m, scene, argument, valid, s.grid)
            everything = torch.ones_like(valid)
            why = f"{scene.name}: {argument} all True differs from no {argument}"
            worst = max(
                worst, same(s.y(m, x, context, scene, **{argument: everything}), s.y(m, x, context, scene), why)
            )
            _nobody(s, m, scene, argument, held, x, context)
            base = Setting("", s.grid)
            each = {name: _each(name, alike=True) for name in ("left", "middle", "right")}
            worst = max(worst, _absent(s, scene, base, argument, each))
            for i, setting in enumerate(s.settings()):
                name = ("left", "right", "middle")[i % 3]
                worst = max(worst, _absent(s, scene, setting, argument, {name: _each(name, alike=False)}))
        worst = max(worst, _padding(s, m, scene, x, context))
    return Evidence("invalid tokens change nothing and come out as zeros", worst)


def _rows(s: Subject, n: int, m: int) -> Tensor:
    allowed = torch.rand(n, m, generator=torch.Generator().manual_seed(11)) > 0.5
    allowed[0] = False  # a row that may attend to nothing
    allowed[1 % n, 0] = n > 1
    return allowed


@claim("mask", unless=trait("mask"))
def mask(s: Subject) -> Evidence:
    """Masked pairs do not meet; a row that may attend to nothing gives no NaN and no gradient."""
    worst = 0.0
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        source = x if context is None else context
        n, k = math.prod(x.shape[1:-1]), math.prod(source.shape[1:-1])
        allowed = _rows(s, n, k)
        x.requires_grad_()
        leaf = source.requires_grad_()
        y = finite(s.y(m, x, context, scene, mask=allowed), f"{scene.name}: y with an empty row of the mask").flatten(
            1, -2
        )
        for row in (0, 1 % n, n // 2, n - 1):
            (grad,) = torch.autograd.grad((y[:, row] * s.noise(y[:, row], row)).sum(), leaf, retain_graph=True)
            grad = finite(grad, f"{scene.name}: the gradient of row {row}").flatten(1, -2)
            hidden = ~allowed[row]
            if context is None:
                hidden[row] = False  # a token always shapes its own answer through its query
            what = "a row that may attend to nothing" if row == 0 else f"row {row}"
            leak = float(grad[:, hidden].abs().max()) if hidden.any() else 0.0
            require(leak <= 1e-9, f"{scene.name}: {what} has a gradient at keys that the mask hides", leak, 1e-9)
        params = [p for p in m.parameters() if p.requires_grad]
        for g in torch.autograd.grad(y.square().sum(), params, allow_unused=True, retain_graph=True):
            if g is not None:
                finite(g, f"{scene.name}: the gradient of a parameter, with an empty row,")
        for seed, size in ((1, 1.0), (2, 30.0), (3, 1000.0), (4, 30.0), (5, 30.0), (6, 1.0)):
            keys = torch.rand(k, generator=torch.Generator().manual_seed(seed)) > 0.7
            blind = ~(allowed & keys).any(-1)
            if context is None:
                blind &= ~keys
            new = torch.where(keys.view(source.shape[1:-1])[..., None], s.noise(source, seed, size), source.detach())
            got = s.y(m, new, None, scene, mask=allowed) if context is None else s.y(m, x, new, scene, mask=allowed)
            got = got.flatten(1, -2)
            why = f"{scene.name}: rows change with keys that the mask hides from them (times {size:g})"
            worst = max(worst, same(got[:, blind], y[:, blind], why))
        each = torch.stack([allowed, allowed.flip(0)])[:, None]
        got = s.y(m, x, context, scene, mask=each).flatten(1, -2)
        same(got[:1], y[:1], f"{scene.name}: a mask per sample differs from the same mask for all")
        band = masks.sliding_window(3)
        got = s.y(m, x, context, scene, mask=band)
        same(got, s.y(m, x, context, scene, mask=band.dense(n, k)), f"{scene.name}: {band} differs from its dense form")
        _second(s, m, scene)
        for setting in s.settings():
            worst = max(worst, _hidden(s, scene, setting))
    return Evidence("masked pairs do not meet, empty rows give no NaN", worst)


def _reaches(s: Subject, y: Tensor, leaf: Tensor, allowed: Tensor, own: bool, why: str) -> None:
    """Refute when a row reads keys that ``allowed`` (N, M) hides from it: in every sample another row, by gradient."""
    y = y.flatten(1, -2)
    batch, n = y.shape[:2]
    rows = torch.linspace(0, n - 1, batch).long()
    (grad,) = torch.autograd.grad((y[torch.arange(batch), rows] * s.noise(y[:, 0], 3)).sum(), leaf)
    hidden = ~allowed[rows]
    if own:
        hidden[torch.arange(batch), rows] = False  # a token always shapes its own answer through its query
    leak = float(finite(grad, "a gradient under a mask").flatten(1, -2)[hidden].abs().amax()) if hidden.any() else 0.0
    require(leak <= 1e-9, why, leak, 1e-9)


def _second(s: Subject, m: nn.Module, scene: Scene) -> None:
    """One mask after another of the same size, the same tensor with other content among them: each is obeyed."""
    x, context = s.x(3), s.context(scene, 3)
    leaf = (x if context is None else context).requires_grad_()
    n, k = math.prod(x.shape[1:-1]), math.prod(leaf.shape[1:-1])
    held = torch.ones(n, k, dtype=torch.bool)
    generator = torch.Generator().manual_seed(12)
    for i in range(6):
        allowed = torch.rand(n, k, generator=generator) > 0.6
        if i % 2:
            allowed = held.copy_(allowed)
        y = s.y(m, x, context, scene, mask=allowed)
        why = f"{scene.name}: a mask of the size of an earlier one is not obeyed"
        _reaches(s, y, leaf, allowed, context is None, why)


def _hidden(s: Subject, scene: Scene, setting: Setting) -> float:
    """Keys that a mask hides are not read, in another mode, at another size, on another rank."""
    m = s.fresh(train=setting.train)
    claims, call = s.claims_of(m), s.repeatable(m)
    if not claims.mask:
        return 0.0
    batch = 6 if claims.batch_independent else 1
    x, context = s.x(batch, setting.grid), s.context(scene, batch, grid=setting.grid)
    source = x if context is None else context
    n, k = math.prod(x.shape[1:-1]), math.prod(source.shape[1:-1])
    allowed = torch.rand(n, k, generator=torch.Generator().manual_seed(13)) > 0.5
    leaf = source.requires_grad_()
    y = call(x, context, scene, mask=allowed)
    _reaches(s, y, leaf, allowed, context is None, f"{scene.name}{setting.where}: a row reads keys that the mask hides")
    keys = torch.rand(k, generator=torch.Generator().manual_seed(14)) > 0.9
    blind = ~(allowed & keys).any(-1)
    if context is None:
        blind &= ~keys
    new = torch.where(keys.view(source.shape[1:-1])[..., None], s.noise(source, 7, 1000.0), source.detach())
    got = call(new, None, scene, mask=allowed) if context is None else call(x, new, scene, mask=allowed)
    why = f"{scene.name}{setting.where}: rows change with keys that the mask hides from them"
    return same(got.flatten(1, -2)[:, blind], y.flatten(1, -2)[:, blind], why)
