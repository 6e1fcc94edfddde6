"""Unusual batches and bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .subject import Evidence, Subject, accepts, claim, finite, mechanism_only, refused, require, same


@claim("batch sizes")
def batch_sizes(s: Subject) -> Evidence:
    """Batches of one, two, seventeen and 65 agree sample by sample; an empty batch works, forward and backward."""
    worst, most, said = 0.0, 65, []
    for scene in s.scenes:
        m, x, context = s.fresh(), s.x(most), s.context(scene, most)

        extras = s.case.extras(x) if s.case.extras is not None else {}

        def answer(
            rows: Tensor, m: Any = m, x: Tensor = x, context: Any = context, scene: Any = scene, extras: Any = extras
        ) -> Tensor:
            def take(t: Any, rows: Tensor = rows) -> Any:
                return t[rows] if isinstance(t, Tensor) and t.dim() and t.shape[0] == most else t

            with torch.no_grad():
                return s.y(m, x[rows], take(context), scene, **tree_map(take, extras))

        y = answer(torch.arange(17))
        for what, rows in (
            ("a batch of one", torch.tensor([0])),
            ("a batch of one", torch.tensor([16])),
            ("a batch of two", torch.tensor([3, 8])),
            ("a batch in another order", torch.arange(16, -1, -1)),
            (f"a batch of {most}", torch.arange(most)),
        ):
            got = answer(rows)
            want = (len(rows), *y.shape[1:])
            require(got.shape == want, f"{scene.name}: for {what}, y has shape {tuple(got.shape)} instead of {want}")
            finite(got, f"{scene.name}: y of {what}")
            if s.claims.batch_independent:
                known = rows < 17
                why = f"{scene.name}: {what} differs from the same samples among seventeen"
                worst = max(worst, same(got[known], y[rows[known]], why))
        none = x[:0].clone().requires_grad_()
        try:
            empty = s.y(m, none, None if context is None else context[:0], scene)
        except Exception as error:
            if s.is_mechanism:
                raise
            said.append(f"an empty batch is refused ({type(error).__name__}: {' '.join(str(error).split())[:60]})")
            continue
        require(empty.shape == y[:0].shape, f"{scene.name}: for an empty batch, y has shape {tuple(empty.shape)}")
        if empty.requires_grad:
            empty.sum().backward()
        for p in m.parameters():
            if p.grad is not None:
                finite(p.grad, f"{scene.name}: the gradient of an empty batch")
        if s.claims.valid:
            valid = torch.ones(none.shape[:-1], dtype=torch.bool)
            s.y(m, none, None if context is None else context[:0], scene, valid=valid)
    return Evidence("; ".join([f"one, two, 17 and {most} samples work", *(said or ["an empty batch too"])]), worst)


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
