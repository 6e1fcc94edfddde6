"""Causality and streaming."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import State
from .subject import Evidence, NotClaimed, Scene, Subject, claim, mechanism_only, refused, require, same, trait


def _not_causal(s: Subject) -> str | None:
    return None if any(scene.causal for scene in s.scenes) else "no causal pattern is claimed"


@claim("causality", unless=_not_causal, probe=True)
def causality(s: Subject) -> Evidence:
    """The answer up to ``t`` depends on nothing after ``t``: by gradient, and by strong changes of the future.

    The second also sees what has no gradient: detached or discrete choices made from the future. On grids, time is the
    first axis.
    """
    worst = 0.0
    for scene in [scene for scene in s.scenes if scene.causal] or s.scenes[:1]:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        steps = x.shape[1]
        y = s.y(m, x.requires_grad_(), context, scene)
        cuts = sorted({0, steps // 3, steps // 2, max(steps - 2, 0)})
        for t in cuts:
            (grad,) = torch.autograd.grad((y[:, t] * s.noise(y[:, t], t)).sum(), x, retain_graph=True)
            leak = float(grad[:, t + 1 :].abs().max()) / max(float(grad.abs().max()), 1e-12) if t + 1 < steps else 0.0
            if leak > 1e-9:
                first = int(grad[:, t + 1 :].abs().amax((0, *range(2, grad.dim()))).argmax()) + t + 1
                require(False, f"{scene.name}: the gradient of y at {t} reaches x at {first}", leak, 1e-9)
        for t in cuts:
            for seed, size in ((1, 1.0), (2, 10.0), (3, 100.0), (4, 1000.0)):
                other = x.detach().clone()
                other[:, t + 1 :] = s.noise(other[:, t + 1 :], 10 * seed + t, size)
                why = f"{scene.name}: y up to {t} changes when the tokens after it do (times {size:g})"
                worst = max(worst, same(s.y(m, other, context, scene)[:, : t + 1], y[:, : t + 1], why))
    return Evidence("neither gradient nor strong changes of the future reach the past", worst)


def _steps(
    s: Subject, m: torch.nn.Module, x: Tensor, sizes: list[int], state: State | None = None, **kw: Tensor
) -> tuple[Tensor, State]:
    out, start = [], 0
    extras = dict(s.case.extras(x)) if s.case.extras is not None else {}
    for size in sizes:
        part = slice(start, start + size)
        y, state = m.step(x[:, part], state, **{k: v[:, part] for k, v in kw.items()}, **extras)  # type: ignore[operator]
        out.append(y)
        start += size
    assert state is not None
    return torch.cat(out, 1), state


@claim("streaming", unless=trait("streaming"))
def streaming(s: Subject) -> Evidence:
    """Token by token, and in chunks, equals at once; the state can be selected, reordered and repeated."""
    scene = next((c for c in s.scenes if c.causal and not c.cross), None)
    require(scene is not None, "streaming is claimed, but causal-self is not")
    assert isinstance(scene, Scene)
    m = s.fresh()
    n = 2 * s.grid[0] + 1 if s.claims.resolution_free and s.claims.grid_multiple == 1 else s.grid[0]
    x = s.x(3, (n, *s.grid[1:]))
    y = s.y(m, x, None, scene)
    chunks, left = [], n
    for size in (1, 5, 2, 1, 7):
        chunks.append(min(size, left))
        left -= chunks[-1]
    chunks = [c for c in [*chunks, left] if c]
    streamed, state = _steps(s, m, x, [1] * n)
    worst = same(streamed, y, "token by token differs from at once")
    chunked, _ = _steps(s, m, x, chunks)
    worst = max(worst, same(chunked, y, f"chunks of {chunks} differ from at once"))
    out = s.run(m, x[:, : n - 3], None, scene, returns=("state",))
    require(isinstance(out.state, State), f"state is {type(out.state).__name__}, not a State")
    worst = max(
        worst, same(_steps(s, m, x[:, n - 3 :], [3], out.state)[0], y[:, n - 3 :], "a prefill then a chunk differs")
    )

    def batched(value: State, size: int, what: str) -> None:
        def look(t: Tensor) -> Tensor:
            require(
                t.dim() >= 1 and t.shape[0] == size, f"{what} holds a tensor {tuple(t.shape)}, batch {size} not first"
            )
            return t

        value.map(look)

    batched(state, 3, "the state")
    index = torch.tensor([2, 0])
    follow = s.x(3, (2, *s.grid[1:]), seed=8)
    direct, _ = _steps(s, m, follow, [1, 1], state)
    for what, value, rows in (
        ("selected", state.select(index), index),
        ("reordered", state.reorder(torch.tensor([1, 2, 0])), torch.tensor([1, 2, 0])),
        ("repeated", state.repeat(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        batched(value, len(rows), f"the {what} state")
        again, _ = _steps(s, m, follow[rows], [1, 1], value)
        worst = max(worst, same(again, direct[rows], f"a {what} state continues differently"))
    again, _ = _steps(s, m, follow, [1, 1], state)
    same(again, direct, "the state was changed by using it, so that it cannot be used twice")
    if s.claims.valid:
        valid = torch.ones(x.shape[:-1], dtype=torch.bool)
        valid[0, : n // 3] = False
        valid[1, n // 2] = False
        masked = s.y(m, x, None, scene, valid=valid)
        for sizes in ([1] * n, chunks):
            got, _ = _steps(s, m, x, sizes, valid=valid)
            worst = max(worst, same(got, masked, "with invalid tokens, streaming differs from at once"))
    return Evidence(f"{n} tokens one by one and in chunks equal at once", worst)


@claim("no streaming", unless=lambda s: mechanism_only(s) or ("streaming is claimed" if s.claims.streaming else None))
def no_streaming(s: Subject) -> str:
    """A mechanism that cannot decode says so."""
    m, scene = s.fresh(), s.scene
    if scene.cross:
        raise NotClaimed("only cross patterns are claimed")
    refused(lambda: m.step(s.x(grid=s.grid)), "step, though streaming is not claimed,")
    return "step is refused"
