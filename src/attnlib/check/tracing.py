"""Compiling, exporting, copying and saving."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import deploy as deploy_module
from .subject import Evidence, Subject, claim, mechanism_only, require, same, trait


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Compilers print whole graphs when they fail; the report has the reason."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


class _Called(nn.Module):
    """Positional tensors to keyword arguments, as exporters want them."""

    def __init__(self, s: Subject, m: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.m, self.names = m, names
        self.extras = s.case.extras
        self.scene_mask = s.scene.mask

    def forward(self, *tensors: Tensor) -> Tensor:
        kw: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        x = kw.pop("x")
        context = kw.pop("context", None)
        if self.scene_mask is not None:
            kw["mask"] = self.scene_mask
        if self.extras is not None:
            kw.update(self.extras(x))
        return self.m(x, **kw) if context is None else self.m(x, context, **kw)


def _inputs(s: Subject, grid: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    x, context = s.x(grid=grid, dtype=torch.float32), s.context(s.scene, dtype=torch.float32)
    out = {"x": x} if context is None else {"x": x, "context": context}
    if s.claims.valid:
        out["valid"] = s.holes(x)
    return out


@claim("compile", unless=trait("traceable"), probe=True)
def compile_(s: Subject) -> Evidence:
    """``torch.compile(fullgraph=True)`` succeeds, forward and backward, and changes nothing."""
    inputs = _inputs(s)
    torch._dynamo.reset()
    m = _Called(s, s.fresh(torch.float32), tuple(inputs))
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    answers: list[Tensor] = []
    grads: list[Tensor] = []
    inputs["x"].requires_grad_()
    leaves = [inputs["x"], *(p for p in m.parameters() if p.requires_grad)]
    for f in (m, compiled):
        with _quiet():
            y = f(*inputs.values())
        found = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        answers.append(y)
        # All gradients as one vector: some vanish by symmetry and hold nothing but rounding.
        grads.append(torch.cat([g.flatten() for g in found if g is not None]))
    worst = max(
        same(answers[1], answers[0], "compiled, the answer differs", 1e-4),
        same(grads[1], grads[0], "compiled, the gradients differ", 1e-4),
    )
    torch._dynamo.reset()
    return Evidence("one graph, the same answer and gradients", worst, 1e-4)


@claim("export", unless=trait("traceable"), probe=True)
def export(s: Subject) -> Evidence:
    """``torch.export`` succeeds; with a free size the program runs at others where tracing kept it free."""
    inputs = _inputs(s)
    m = _Called(s, s.fresh(torch.float32), tuple(inputs))
    auto = torch.export.Dim.AUTO
    free = s.claims.resolution_free and not s.brief
    # Free are the batch and the first axis of the grid: one axis shows whether N can stay symbolic, all take twice as
    # long to trace.
    shape = {"x": {0: auto, 1: auto}, "context": {0: auto}, "valid": {0: auto, 1: auto}}
    dynamic = {"tensors": tuple(shape[name] for name in inputs)} if free else None
    said = "exported"
    with torch.no_grad():
        with _quiet():
            try:
                program = torch.export.export(m, tuple(inputs.values()), dynamic_shapes=dynamic, strict=False).module()
            except Exception as error:
                if dynamic is None:
                    raise
                inputs, free = _inputs(s), False  # exporting marks the axes of its inputs, so fresh ones
                program = torch.export.export(m, tuple(inputs.values()), strict=False).module()
                said = f"exported at one size only ({type(error).__name__})"
        worst = same(program(*inputs.values()), m(*inputs.values()), "the exported program differs", 1e-4)
        if free:
            for odd in s.other_grids():
                grid = (odd[0], *s.grid[1:])
                other = _inputs(s, grid)
                try:
                    y = program(*other.values())
                except (AssertionError, RuntimeError, ValueError):
                    said += "; the size was fixed by tracing"
                    continue
                worst = max(worst, same(y, m(*other.values()), f"the exported program differs on grid {grid}", 1e-4))
                said += f"; the program runs on grid {grid} too"
    return Evidence(said, worst, 1e-4)


@claim("copies")
def copies(s: Subject) -> Evidence:
    """deepcopy and a state-dict round trip reproduce the answer, and the copy shares nothing."""
    m, x, context = s.fresh(), s.x(), s.context(s.scene)
    y = s.y(m, x, context, s.scene)
    worst = same(s.y(copy.deepcopy(m), x, context, s.scene), y, "a deepcopy answers differently")
    twin = s.build().eval().double()
    missing = twin.load_state_dict(m.state_dict())
    require(not missing.missing_keys and not missing.unexpected_keys, f"the state dict does not fit: {missing}")
    worst = max(worst, same(s.y(twin, x, context, s.scene), y, "after a state-dict round trip the answer differs"))
    clone = copy.deepcopy(m)
    with torch.no_grad():
        for p in clone.parameters():
            p.add_(1.0)
    worst = max(worst, same(s.y(m, x, context, s.scene), y, "changing a deepcopy changes the original"))
    return Evidence("deepcopy and state dict reproduce the answer", worst)


@claim("deploy", unless=mechanism_only)
def deploy(s: Subject) -> Evidence:
    """The deployed form answers like the original."""
    m, x, context = s.fresh(), s.x(), s.context(s.scene)
    y = s.y(m, x, context, s.scene)
    return Evidence(
        "the deployed form answers alike",
        same(s.y(deploy_module(m), x, context, s.scene), y, "deployed, it answers differently"),
    )
