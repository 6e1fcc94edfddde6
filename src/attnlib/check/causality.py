"""Causality and streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..types import State
from .subject import Evidence, NotClaimed, Scene, Setting, Subject, claim, mechanism_only, refused, require, same, trait


def _not_causal(s: Subject) -> str | None:
    return None if any(scene.causal for scene in s.scenes) else "no causal pattern is claimed"


def _leak(grad: Tensor, later: Tensor, why: str) -> None:
    """Refute when ``grad`` (B, T, ...) does not vanish at the steps ``later`` (B, T)."""
    at = grad.abs().flatten(2).amax(-1)
    leak = float((at * later).max()) / max(float(at.max()), 1e-12)
    if leak > 1e-9:
        require(False, f"{why} reaches x at {int((at * later).amax(0).argmax())}", leak, 1e-9)


def _elsewhere(s: Subject, scene: Scene, setting: Setting) -> float:
    """Gradient and changes of the future again, with another cut into past and future in every sample."""
    m = s.fresh(train=setting.train)
    claims = s.claims_of(m)
    if scene.name not in claims.patterns:
        return 0.0
    steps, worst, call = setting.grid[0], 0.0, s.repeatable(m)
    marks = [0, 1, 8, 16, 32, 48, 63, 64, 80, 100, 115, 128]
    cuts = sorted({c for c in marks if c < steps - 1} | {max(steps - 2, 0)})
    # Where samples may read each other, all of them have the same past.
    rounds = [cuts] if claims.batch_independent else [[c, c] for c in cuts[:: max(1, len(cuts) // 4)]]
    for cut in map(torch.tensor, rounds):
        x, context = s.x(len(cut), setting.grid), s.context(scene, len(cut), grid=setting.grid)
        later = torch.arange(steps) > cut[:, None]
        y = call(x.requires_grad_(), context, scene)
        rows = y[torch.arange(len(cut)), cut]
        (grad,) = torch.autograd.grad((rows * s.noise(rows, 1)).sum(), x)
        _leak(grad, later, f"{scene.name}{setting.where}: the gradient of y up to some step")
        for seed in (0, 1):
            sizes = torch.tensor([1.0, 1000.0], dtype=x.dtype)[(torch.arange(len(cut)) + seed) % 2]
            future = later.view(*later.shape, *[1] * (x.dim() - 2))
            other = torch.where(future, s.noise(x, seed) * sizes.view(-1, *[1] * (x.dim() - 1)), x.detach())
            why = f"{scene.name}{setting.where}: y up to some step changes when the tokens after it do"
            worst = max(worst, same(call(other, context, scene)[~later], y[~later], why))
    return worst


@claim("causality", unless=_not_causal, probe=True)
def causality(s: Subject) -> Evidence:
    """The answer up to ``t`` depends on nothing after ``t``: by gradient, and by strong changes of the future.

    The second also sees what has no gradient: detached or discrete choices made from the future. On grids, time is the
    first axis. Again at about 130 tokens, there in training too, and on every claimed rank.
    """
    worst = 0.0
    for scene in [scene for scene in s.scenes if scene.causal] or s.scenes[:1]:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        steps = x.shape[1]
        y = s.y(m, x.requires_grad_(), context, scene)
        cuts = sorted({0, steps // 3, steps // 2, max(steps - 2, 0)})
        for t in cuts:
            (grad,) = torch.autograd.grad((y[:, t] * s.noise(y[:, t], t)).sum(), x, retain_graph=True)
            later = (torch.arange(steps) > t).expand(grad.shape[:2])
            _leak(grad, later, f"{scene.name}: the gradient of y at {t}")
        for t in cuts:
            for seed, size in ((1, 1.0), (3, 100.0), (4, 10_000.0)):
                other = x.detach().clone()
                other[:, t + 1 :] = s.noise(other[:, t + 1 :], 10 * seed + t, size)
                why = f"{scene.name}: y up to {t} changes when the tokens after it do (times {size:g})"
                worst = max(worst, same(s.y(m, other, context, scene)[:, : t + 1], y[:, : t + 1], why))
        for setting in s.settings():
            worst = max(worst, _elsewhere(s, scene, setting))
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


def _batched(value: State, size: int, what: str) -> None:
    """Refute unless every tensor of a state has the batch first."""

    def look(t: Tensor) -> Tensor:
        require(t.dim() >= 1 and t.shape[0] == size, f"{what} holds a tensor {tuple(t.shape)}, batch {size} not first")
        return t

    value.map(look)


def _chunks(n: int) -> list[int]:
    out, left = [], n
    for size in (1, 5, 2, 1, 7, 64):
        out.append(min(size, left))
        left -= out[-1]
    return [c for c in [*out, left] if c]


def _aliases(s: Subject, m: nn.Module, x: Tensor, scene: Scene) -> None:
    """A state lives on its own: neither overwriting what went in and came out nor a later step changes it."""
    half = x.shape[1] // 2

    def prefill() -> tuple[Tensor, Any]:
        first = x[:, :half].clone()
        return first, s.run(m, first, None, scene, returns=("state",))

    _, out = prefill()
    want, _ = _steps(s, m, x[:, half:], [1] * 2 + [x.shape[1] - half - 2], out.state)
    first, out = prefill()
    with torch.no_grad():
        first.fill_(float("nan"))
        out.y.fill_(float("nan"))
    got, _ = _steps(s, m, x[:, half:], [1] * 2 + [x.shape[1] - half - 2], out.state)
    same(got, want, "the state shares memory with x or y: overwriting them changes how it continues")
    part = x[:, half : half + 1].clone()
    y, state = m.step(part, out.state, **(s.case.extras(part) if s.case.extras is not None else {}))  # type: ignore[operator]
    with torch.no_grad():
        part.fill_(float("nan"))
        y.fill_(float("nan"))
    got, _ = _steps(s, m, x[:, half + 1 :], [1, x.shape[1] - half - 2], state)
    same(got, want[:, 1:], "the state of a step shares memory with x or y: overwriting them changes how it continues")


def _half(s: Subject, scene: Scene, n: int) -> float:
    """How much further bfloat16 drifts from float32 token by token than at once.

    The tokens have much in common, as those of a trained model do, so that sums grow: added up in half precision, they
    stop growing.
    """
    m, wide = s.fresh(torch.bfloat16), s.fresh(torch.bfloat16).float()
    x = s.alike(s.x(1, (n, *s.grid[1:])), 5, own=0.0).bfloat16()
    with torch.no_grad():
        want = s.y(wide, x.float(), None, scene)
        whole = s.y(m, x, None, scene)
        parts, _ = _steps(s, m, x, [1] * n)
    require(parts.dtype == torch.bfloat16, f"token by token, y is {parts.dtype} for bfloat16 input")
    last = n // 2
    size = want[:, last:].norm().clamp_min(1e-6)
    whole_error = float((whole[:, last:].float() - want[:, last:]).norm() / size)
    error = float((parts[:, last:].float() - want[:, last:]).norm() / size)
    limit = max(0.004, 2 * whole_error)
    why = f"in bfloat16, token by token is off by {error:.3f} after {n} tokens, at once by {whole_error:.3f}"
    require(error <= limit, f"{why}: the state has to be kept in float32", error, limit)
    return error


@claim("streaming", unless=trait("streaming"))
def streaming(s: Subject) -> Evidence:
    """Token by token, and in chunks, equals at once; the state can be selected, reordered and repeated.

    Over more than 100 steps, with gaps of every shape in ``valid``, and in bfloat16.
    """
    scene = next((c for c in s.scenes if c.causal and not c.cross), None)
    require(scene is not None, "streaming is claimed, but causal-self is not")
    assert isinstance(scene, Scene)
    m, free = s.fresh(), s.claims.resolution_free and s.claims.grid_multiple == 1
    n = max(107, 2 * s.grid[0] + 1) if free else s.grid[0]
    x = s.x(3, (n, *s.grid[1:]))
    y = s.y(m, x, None, scene)
    with torch.no_grad():
        streamed, state = _steps(s, m, x, [1] * n)
    worst = same(streamed, y, "token by token differs from at once")
    chunked, _ = _steps(s, m, x, _chunks(n))
    worst = max(worst, same(chunked, y, f"chunks of {_chunks(n)} differ from at once"))
    out = s.run(m, x[:, : n - 3], None, scene, returns=("state",))
    require(isinstance(out.state, State), f"state is {type(out.state).__name__}, not a State")
    worst = max(
        worst, same(_steps(s, m, x[:, n - 3 :], [3], out.state)[0], y[:, n - 3 :], "a prefill then a chunk differs")
    )
    _batched(state, 3, "the state")
    index = torch.tensor([2, 0])
    follow = s.x(3, (2, *s.grid[1:]), seed=8)
    direct, _ = _steps(s, m, follow, [1, 1], state)
    for what, value, rows in (
        ("selected", state.select(index), index),
        ("reordered", state.reorder(torch.tensor([1, 2, 0])), torch.tensor([1, 2, 0])),
        ("repeated", state.repeat(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        _batched(value, len(rows), f"the {what} state")
        again, _ = _steps(s, m, follow[rows], [1, 1], value)
        worst = max(worst, same(again, direct[rows], f"a {what} state continues differently"))
    again, _ = _steps(s, m, follow, [1, 1], state)
    same(again, direct, "the state was changed by using it, so that it cannot be used twice")
    few = min(n, 2 * s.grid[0] + 1)
    short = x[:, :few].detach()
    _aliases(s, m, short, scene)
    if s.claims.valid:
        gaps = s.gaps(x[:, :few, ...])
        left = torch.ones(short.shape[:-1], dtype=torch.bool)
        left[0, : few // 3] = False
        left[1, few // 2] = False
        for valid in (left, *gaps.values()):
            masked = s.y(m, short, None, scene, valid=valid)
            for sizes in ([1] * few, _chunks(few)):
                got, _ = _steps(s, m, short, sizes, valid=valid)
                worst = max(worst, same(got, masked, "with invalid tokens, streaming differs from at once"))
    half = _half(s, scene, n)
    return Evidence(f"{n} tokens one by one and in chunks equal at once; in bfloat16 they are off by {half:.3f}", worst)


@claim("no streaming", unless=lambda s: mechanism_only(s) or ("streaming is claimed" if s.claims.streaming else None))
def no_streaming(s: Subject) -> str:
    """A mechanism that cannot decode says so."""
    m, scene = s.fresh(), s.scene
    if scene.cross:
        raise NotClaimed("only cross patterns are claimed")
    refused(lambda: m.step(s.x(grid=s.grid)), "step, though streaming is not claimed,")
    return "step is refused"
