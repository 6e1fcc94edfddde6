"""No side effects: inputs, hidden state, randomness."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .subject import Evidence, Scene, Subject, claim, finite, require, same


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.numel() else 0


def _shared(s: Subject, m: nn.Module, scene: Scene) -> None:
    """``y`` is memory of its own: whoever writes into it changes neither what went in nor the module's next answer."""
    tries: list[tuple[str, Tensor, dict[str, Any]]] = [("", s.x(), {}), (" of one sample", s.x(1), {})]
    if s.claims.resolution_free:
        tries.append((f" on grid {s.long}", s.x(grid=s.long), {}))
    if s.claims.valid:
        full = torch.ones(tries[0][1].shape[:-1], dtype=torch.bool)
        tries.append((" with valid all True", s.x(), {"valid": full}))
        if not s.pool:  # which may refuse that
            tries.append((" with valid all False", s.x(), {"valid": ~full}))
    for where, x, kw in tries:
        context = s.context(scene, x.shape[0])
        given = {"x": x, "context": context, **kw}
        given |= {f"parameter {n}": p for n, p in m.named_parameters()} | {n: b for n, b in m.named_buffers()}
        with torch.no_grad():
            y = s.y(m, x, context, scene, **kw)
        for name, t in given.items():
            if isinstance(t, Tensor) and t.numel():
                why = f"{scene.name}: y{where} shares memory with {name}: writing into y would change it"
                require(_memory(y) != _memory(t), why)
        with torch.no_grad():
            before = y.clone()
            again = s.y(m, s.noise(x, 8), context, scene, **kw)
            require(torch.equal(y, before), f"{scene.name}: the next call changes the y{where} that was given out")
            again.fill_(float("nan"))
            same(s.y(m, x, context, scene, **kw), before, f"{scene.name}: writing into y{where} changes later answers")


@claim("inputs untouched")
def inputs_untouched(s: Subject) -> str:
    """No input and no parameter is changed by a call, and the answer shares no memory with them."""
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        given: dict[str, Any] = {"x": x}
        kw: dict[str, Any] = {}
        if context is not None:
            given["context"] = context
        if s.claims.valid:
            kw["valid"] = s.holes(x)
        if s.claims.mask:
            n = x[0, ..., 0].numel()
            keys = n if context is None else context[0, ..., 0].numel()
            kw["mask"] = torch.ones(n, keys, dtype=torch.bool)
        kw |= s.plan(m, x, context)
        if s.claims.streaming and not scene.cross:
            kw["state"] = s.run(m, x, context, scene, returns=("state",)).state
            kw.pop("mask", None)
        given |= kw | {f"parameter {n}": p for n, p in m.named_parameters()}
        before = [
            (n, t, t.clone(), t._version) for n, v in given.items() for t in tree_leaves(v) if isinstance(t, Tensor)
        ]
        with torch.no_grad():
            s.run(m, x, context, scene, **kw)
            kw.pop("valid", None)  # with it, a mechanism gets a copy of x
            s.run(m, x, context, scene, **kw)
        for name, tensor, value, version in before:
            require(torch.equal(tensor, value), f"{scene.name}: the call changes {name} in place")
            require(tensor._version == version, f"{scene.name}: the call writes into {name}, though it restores it")
        _shared(s, s.fresh(), scene)
    return "no input and no parameter is changed"


def _picture(m: nn.Module) -> dict[str, Any]:
    """Every plain attribute of every submodule, and every buffer, in a form that can be compared."""

    def plain(value: Any, depth: int = 0) -> Any:
        if isinstance(value, Tensor):
            return ("tensor", tuple(value.shape), value.detach().clone())
        if isinstance(value, (int, float, str, bool, type(None))):
            return value
        if isinstance(value, (list, tuple, set, frozenset)) and depth < 3:
            return (type(value).__name__, [plain(v, depth + 1) for v in value])
        if isinstance(value, dict) and depth < 3:
            return ("dict", {str(k): plain(v, depth + 1) for k, v in value.items()})
        return id(value)

    out = {}
    for path, module in m.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_modules"):
                out[f"{path}.{name}".lstrip(".")] = plain(value)
    return out


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _world() -> dict[str, Any]:
    """What is global and none of a mechanism's business."""
    found: dict[str, Any] = {
        "the random state of torch": torch.get_rng_state(),
        "the random state of Python": random.getstate(),
        "the default dtype": str(torch.get_default_dtype()),
        "whether gradients are on": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
        "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if "numpy" in sys.modules:
        found["the random state of numpy"] = str(sys.modules["numpy"].random.get_state())
    return found


def _history(s: Subject, m: nn.Module, scene: Scene, x: Tensor, context: Tensor | None, y: Tensor) -> float:
    """What was asked before must not matter: other sizes, batches, magnitudes, masks of the same size, many calls."""
    other: list[tuple[Tensor, Tensor | None, dict[str, Any]]] = [
        (s.x(5, seed=31), s.context(scene, 5), {}),
        (s.noise(x, 32, 1e3), context, {}),
        (x.flip(1), context, {}),
    ]
    if s.claims.resolution_free:
        other.append((s.x(1, s.long), s.context(scene, 1, grid=s.long), {}))
    if s.claims.valid:
        gaps = s.gaps(x)
        alone = s.y(s.fresh(), x, context, scene, valid=gaps["right"])
        other += [(x, context, {"valid": valid}) for valid in gaps.values()]
    if s.claims.mask:
        keys = (x if context is None else context)[0, ..., 0].flatten()
        other.append((x, context, {"mask": s.noise(x[0, ..., 0].flatten()[:, None] + keys, 33) > 0}))
    worst, first = 0.0, None
    for i in range(2):
        for a, c, kw in other:
            got = s.y(m, a, c, scene, **kw)
        first = got if first is None else first
        same(got, first, f"{scene.name}: call {len(other) * (i + 1) + 3} answers differently than the same call before")
        why = f"{scene.name}: after calls with other sizes, contents and masks it answers differently in eval"
        worst = max(worst, same(s.y(m, x, context, scene), y, why))
    if s.claims.valid:
        why = f"{scene.name}: after calls with other gaps of that size, valid is answered differently than at first"
        worst = max(worst, same(s.y(m, x, context, scene, valid=gaps["right"]), alone, why))
    return worst


@claim("no hidden state")
def no_hidden_state(s: Subject) -> Evidence:
    """Calls agree whatever was asked between them; no attribute, buffer or generator changes in eval."""
    worst = 0.0
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        before, world = _picture(m), _world()
        y = s.y(m, x, context, scene)
        s.y(m, s.noise(x, 3, 5.0), context, scene)
        worst = max(
            worst, same(s.y(m, x, context, scene), y, f"{scene.name}: the second call answers differently in eval")
        )
        after, changes = _picture(m), _world()
        for name in world:
            require(_equal(world[name], changes[name]), f"{scene.name}: a call in eval changes {name}")
        changed = sorted(k for k in before.keys() | after.keys() if not _equal(before.get(k), after.get(k)))
        require(not changed, f"{scene.name}: a call in eval changes {', '.join(changed)} of the module")
        worst = max(worst, _history(s, m, scene, x, context, y))
    m, x, context = s.fresh(train=True), s.x(), s.context(s.scene)
    buffers = {n: b.clone() for n, b in m.named_buffers()}

    def rewind() -> None:
        # Buffers may advance in training; what must not matter is anything kept outside the state dict.
        with torch.no_grad():
            for n, b in m.named_buffers():
                b.copy_(buffers[n])
        torch.manual_seed(0)

    rewind()
    y = finite(s.y(m, x, context, s.scene), "y in training")
    s.y(m, s.noise(x, 3, 5.0), context, s.scene)
    rewind()
    worst = max(worst, same(s.y(m, x, context, s.scene), y, "the second call answers differently in training"))
    return Evidence("two calls agree, nothing in the module changes", worst)
