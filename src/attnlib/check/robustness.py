"""Unusual batches and bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .subject import Evidence, Subject, accepts, claim, finite, mechanism_only, refused, require, same


@claim("batch sizes")
def batch_sizes(s: Subject) -> Evidence:
    """A batch of one and an empty batch work, forward and backward; so does a transposed memory format."""
    worst = 0.0
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(3), s.context(scene, 3)
        y = s.y(m, x, context, scene)
        one = s.y(m, x[:1], None if context is None else context[:1], scene)
        require(one.shape == y[:1].shape, f"{scene.name}: for a batch of one, y has shape {tuple(one.shape)}")
        if s.claims.batch_independent:
            worst = max(worst, same(one, y[:1], f"{scene.name}: a batch of one differs from its place in three"))
        strided = x.movedim(-1, 1).contiguous().movedim(1, -1)
        worst = max(worst, same(s.y(m, strided, context, scene), y, f"{scene.name}: another memory format differs"))
        none = x[:0].clone().requires_grad_()
        empty = s.y(m, none, None if context is None else context[:0], scene)
        require(empty.shape == y[:0].shape, f"{scene.name}: for an empty batch, y has shape {tuple(empty.shape)}")
        empty.sum().backward()
        for p in m.parameters():
            if p.grad is not None:
                finite(p.grad, f"{scene.name}: the gradient of an empty batch")
        if s.claims.valid:
            valid = torch.ones(none.shape[:-1], dtype=torch.bool)
            s.y(m, none, None if context is None else context[:0], scene, valid=valid)
    return Evidence("one sample and none work", worst)


@claim("bad arguments", unless=mechanism_only)
def bad_arguments(s: Subject) -> str:
    """What cannot work is refused at the door by a message that says what and why."""
    m, scene = s.fresh(), s.scene
    x, context = s.x(), s.context(scene)
    n = x[0, ..., 0].numel()

    def call(x: Any = x, context: Any = context, **kw: Any) -> Callable[[], Any]:
        return lambda: s.run(m, x, context, scene, **kw)

    bad: list[tuple[str, Callable[[], Any]]] = [
        ("x of rank 1", lambda: m(x.flatten()[: s.width])),
        ("x of rank 6", lambda: m(x.view(*([1] * (6 - x.dim())), *x.shape))),
        ("x that is no tensor", lambda: m([[0.0]])),
        ("x that is too wide", call(torch.cat([x, x[..., :1]], -1))),
        ("returns of an unknown name", call(returns=("nonsense",))),
        ("returns as a string", call(returns="state")),
        ("valid of the wrong shape", call(valid=torch.ones(x.shape[0], n + 1, dtype=torch.bool))),
        ("valid of floats", call(valid=torch.ones(x.shape[:-1]))),
        ("progress outside [0, 1]", lambda: m.set_progress(1.5)),
    ]
    if scene.cross:
        assert context is not None
        bad += [
            ("context that is too wide", call(context=torch.cat([context, context[..., :1]], -1))),
            ("context of another batch", call(context=context[:1])),
            ("context_valid of the wrong shape", call(context_valid=torch.ones(1, 1, dtype=torch.bool))),
        ]
    else:
        bad.append(("context_valid without a context", call(context_valid=torch.ones(1, 1, dtype=torch.bool))))
    if s.claims.mask:
        keys = n if context is None else context[0, ..., 0].numel()
        bad += [
            ("mask of the wrong shape", call(mask=torch.ones(n + 1, keys, dtype=torch.bool))),
            ("mask of floats", call(mask=torch.ones(n, keys))),
        ]
    else:
        bad.append(("a mask, which is not claimed,", call(mask=torch.ones(n, n, dtype=torch.bool))))
    for name, claimed, value in (
        ("plan", s.claims.needs_plan, object()),
        ("state", s.claims.streaming, object()),
        ("carry", s.claims.carries, object()),
        ("layout", s.claims.layout, object()),
    ):
        if not claimed:
            bad.append((f"{name}, which is not claimed,", call(**{name: value})))
    for extra, claimed in (
        ("state", s.claims.streaming),
        ("carry", s.claims.carries),
        ("weights", s.claims.weights),
        ("losses", bool(s.claims.losses)),
    ):
        if not claimed:
            bad.append((f"returns=({extra!r},), which is not claimed,", call(returns=(extra,))))
    for what, attempt in bad:
        refused(attempt, what)
    for name in ("num_heads", "num_groups"):
        if name in s.case.config and "head_dim" not in s.case.config and accepts(s.factory, name) and s.width > 2:
            _heads(s, name)
    same(
        s.y(m, x, context, scene),
        s.y(s.fresh(), x, context, scene),
        "after refusing bad arguments it answers differently",
    )
    return f"{len(bad)} bad calls refused with an explanation"


def _heads(s: Subject, name: str) -> None:
    """A head count that does not divide is refused when building, or it works."""
    try:
        built = s.build(**{name: s.width - 1})
    except (ValueError, TypeError) as error:
        require(len(str(error)) >= 15, f"{name}={s.width - 1} for dim={s.width} is refused without an explanation")
        return
    except Exception as error:
        raise AssertionError(f"{name}={s.width - 1} for dim={s.width} breaks inside: {error}") from error
    finite(s.y(built.eval().double(), s.x(), s.context(s.scene), s.scene), f"y with {name}={s.width - 1}")
