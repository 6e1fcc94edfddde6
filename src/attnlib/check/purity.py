"""No side effects: inputs, hidden state, randomness."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .subject import Evidence, Subject, claim, finite, require, same


@claim("inputs untouched")
def inputs_untouched(s: Subject) -> str:
    """No input and no parameter is changed by a call."""
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


@claim("no hidden state")
def no_hidden_state(s: Subject) -> Evidence:
    """Two calls agree, and no attribute or buffer of the module changes in eval."""
    worst = 0.0
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(), s.context(scene)
        before = _picture(m)
        y = s.y(m, x, context, scene)
        s.y(m, s.noise(x, 3, 5.0), context, scene)
        worst = max(
            worst, same(s.y(m, x, context, scene), y, f"{scene.name}: the second call answers differently in eval")
        )
        after = _picture(m)
        changed = sorted(k for k in before.keys() | after.keys() if not _equal(before.get(k), after.get(k)))
        require(not changed, f"{scene.name}: a call in eval changes {', '.join(changed)} of the module")
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
