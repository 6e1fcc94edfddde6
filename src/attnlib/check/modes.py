"""The same numbers however they are asked for: gradient modes, frozen parameters, memory formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .subject import SAME, Evidence, Scene, Setting, Subject, claim, require, same


def _modes(s: Subject, scene: Scene, setting: Setting) -> float:
    m, worst = s.fresh(train=setting.train), 0.0
    if scene.name not in s.claims_of(m).patterns:
        return worst
    call = s.repeatable(m)
    kw: dict[str, Any] = {}
    trained = [p.requires_grad for p in m.parameters()]
    x, context = s.x(grid=setting.grid), s.context(scene, grid=setting.grid)
    if s.claims_of(m).valid:
        kw["valid"] = s.holes(x)

    def full(through: bool = True) -> tuple[Tensor, dict[str, Tensor | None]]:
        leaf = x.clone().requires_grad_(through)
        y = call(leaf, context, scene, **kw)
        wanted = {n: p for n, p in m.named_parameters() if p.requires_grad} | ({"x": leaf} if through else {})
        if not y.requires_grad or not wanted:
            return y, {}
        found = torch.autograd.grad((y * s.noise(y, 2)).sum(), list(wanted.values()), allow_unused=True)
        return y, dict(zip(wanted, found, strict=True))

    y, grads = full()
    for what, mode in (("under no_grad", torch.no_grad), ("under inference_mode", torch.inference_mode)):
        with mode():
            got = call(x.clone(), context, scene, **kw)
        worst = max(worst, same(got.clone(), y, f"{scene.name}{setting.where}: y differs {what}"))
    tries: list[tuple[str, Callable[[int], bool], bool]] = [
        ("with frozen parameters", lambda i: True, True),
        ("when x needs no gradient", lambda i: False, False),
    ]
    if not setting.where:
        tries += [
            ("when every second parameter is frozen", lambda i: i % 2 == 0, True),
            ("when the other parameters are frozen", lambda i: i % 2 == 1, False),
            ("after all this", lambda i: False, True),
        ]
    for what, frozen, through in tries:
        if not through and all(frozen(i) for i in range(len(trained))):
            continue
        for i, (p, trains) in enumerate(zip(m.parameters(), trained, strict=True)):
            p.requires_grad_(trains and not frozen(i))
        got, found = full(through)
        worst = max(worst, same(got, y, f"{scene.name}{setting.where}: y differs {what}"))
        for name, grad in found.items():
            want = grads[name]
            require(
                (grad is None) == (want is None),
                f"{scene.name}{setting.where}: the gradient of {name} appears or vanishes {what}",
            )
            if grad is not None and want is not None:
                why = f"{scene.name}{setting.where}: the gradient of {name} differs {what}"
                worst = max(worst, same(grad, want, why))
    return worst


@claim("modes")
def modes(s: Subject) -> Evidence:
    """With and without gradient, in inference mode and with frozen parameters the answer and the gradients agree."""
    worst = 0.0
    for scene in s.scenes:
        for setting in (Setting("", s.grid), *s.settings(ranks=False)):
            worst = max(worst, _modes(s, scene, setting))
    return Evidence("grad, no_grad, inference mode and frozen parameters agree", worst, SAME)


def _formats(t: Tensor) -> dict[str, Tensor]:
    """The same values in other memory: channels first, every second element, part of a larger tensor."""
    wide = torch.cat([t, t], -1)
    twice = t.repeat_interleave(2, 1)
    first = t.movedim(-1, 1).contiguous().movedim(1, -1)
    return {
        "channels first": first,
        "with twice the channels between": wide[..., : t.shape[-1]],
        "every second token of twice as many": twice[:, ::2],
        "the batch inside": t.movedim(0, 1).contiguous().movedim(1, 0),
    }


@claim("strides")
def strides(s: Subject) -> Evidence:
    """How x, context and their masks lie in memory does not matter, for values and gradients; nor do shared rows."""
    worst = 0.0

    def answer(m: nn.Module, scene: Scene, x: Tensor, context: Tensor | None, **kw: Any) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, context) if t is not None]
        y = s.y(m, leaves[0], None if context is None else leaves[1], scene, **kw)
        if not y.requires_grad:
            return (y,)
        grads = torch.autograd.grad((y * s.noise(y, 1)).sum(), leaves, allow_unused=True)
        return (y, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)))

    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        kw = {"valid": s.holes(x)} if s.claims.valid else {}
        want = answer(m, scene, x, context, **kw)
        tries: list[tuple[str, Tensor, Tensor | None, dict[str, Tensor]]] = []
        for name, other in _formats(x).items():
            tries.append((f"x lies {name}", other, context, kw))
        if context is not None:
            tries += [(f"context lies {name}", x, other, kw) for name, other in _formats(context).items()]
        if kw:
            valid = kw["valid"]
            lies = {"valid": torch.stack([valid, ~valid], -1)[..., 0]}
            tries.append(("valid is strided", x, context, lies))
        for why, a, b, extra in tries:
            for got, value in zip(answer(m, scene, a, b, **extra), want, strict=True):
                worst = max(worst, same(got, value, f"{scene.name}: y or a gradient differs when {why}"))
        rows, more = x[:1].expand_as(x), None if context is None else context[:1].expand_as(context)
        with torch.no_grad():
            got = s.y(m, rows, more, scene)
            want_y = s.y(m, rows.contiguous(), None if more is None else more.contiguous(), scene)
        worst = max(worst, same(got, want_y, f"{scene.name}: y differs when one sample is expanded to a batch"))
    return Evidence("strides of x, context and valid do not matter", worst, SAME)
