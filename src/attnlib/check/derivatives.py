"""Second derivatives, forward mode and ``vmap``: right or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .subject import Evidence, NotClaimed, Scene, Subject, claim, require, same


def _refusal(error: Exception) -> str:
    """Why a derivative does not exist, as the caller is told; refutes what says nothing."""
    text = " ".join(str(error).split())
    require(len(text) >= 15, f"it breaks without an explanation: {type(error).__name__}({text!r})")
    return f"{type(error).__name__}: {text[:80]}"


@claim("derivatives")
def derivatives(s: Subject) -> Evidence:
    """Second derivatives, forward mode and ``vmap`` are right or refused, never silently something else."""
    if s.claims.gradient != "exact" and not s.claims.needs_plan or s.claims.gradient == "surrogate":
        raise NotClaimed(f"trait gradient is {s.claims.gradient}: not the derivative of the forward")
    worst, said = 0.0, []
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        plan = s.plan(m, x, context)
        direction = s.noise(x, 21)

        def f(x: Tensor, m: nn.Module = m, context: Any = context, scene: Scene = scene, plan: Any = plan) -> Tensor:
            return s.y(m, x, context, scene, **plan)

        def slope(t: Tensor, create: bool = False, f: Callable[[Tensor], Tensor] = f) -> Tensor:
            leaf = t.detach().requires_grad_() if not create else t
            y = f(leaf)
            (grad,) = torch.autograd.grad((y * s.noise(y, 22)).sum(), leaf, create_graph=create)
            return grad

        eps = 1e-5
        near = [x + sign * eps * direction for sign in (1.0, -1.0)]
        # second
        want = (slope(near[0]) - slope(near[1])) / (2 * eps)
        try:
            leaf = x.clone().requires_grad_()
            grad = slope(leaf, create=True)
            if grad.requires_grad:
                got = torch.autograd.grad((grad * direction).sum(), leaf, allow_unused=True)[0]
                got = torch.zeros_like(x) if got is None else got
            else:
                got = torch.zeros_like(x)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            said.append(f"{scene.name}: second derivatives are refused ({_refusal(error)})")
        else:
            scale = float(slope(x).abs().max())
            error_of = float((got - want).abs().max()) / max(float(want.abs().max()), 1e-2 * scale, 1e-6)
            why = f"{scene.name}: the second derivative is off a central difference of gradients by {error_of:.1e}"
            require(error_of <= 1e-4, why, error_of, 1e-4)
            worst = max(worst, error_of)
        # forward mode
        with torch.no_grad():
            rise = (f(near[0]) - f(near[1])) / (2 * eps)
        try:
            with forward_ad.dual_level():
                y = f(forward_ad.make_dual(x, direction))
                primal, tangent = forward_ad.unpack_dual(y)
                primal, tangent = primal.detach().clone(), None if tangent is None else tangent.detach().clone()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            said.append(f"{scene.name}: forward mode is refused ({_refusal(error)})")
        else:
            with torch.no_grad():
                same(primal, f(x), f"{scene.name}: y differs under forward-mode differentiation")
            require(tangent is not None, f"{scene.name}: forward-mode differentiation silently gives no tangent")
            assert tangent is not None
            worst = max(worst, same(tangent, rise, f"{scene.name}: the forward-mode derivative is wrong", 1e-5))
        # vmap over a new axis
        if context is None and not plan and s.claims.batch_independent:
            two = torch.stack([x, s.noise(x, 23)])
            with torch.no_grad():
                want = torch.stack([f(t) for t in two])
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of operators that vmap serves by a loop
                    got = torch.func.vmap(f)(two)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                said.append(f"{scene.name}: vmap is refused ({_refusal(error)})")
            else:
                worst = max(worst, same(got, want, f"{scene.name}: y differs under vmap"))
    return Evidence("; ".join(["second, forward mode and vmap are right or refused", *said]), worst, 1e-4)
