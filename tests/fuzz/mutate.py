"""How one argument of a call is spoilt.

A mutation says whether the result must be refused (``True``), or may be anything sensible (``False``): what a shape or
a number of another size means is for the function to say.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnlib.masks import Mask
from attnlib.ops import BlockPlan
from attnlib.types import Plan, State

INF, NAN = float("inf"), float("nan")


class Junk:
    """Something that no function expects."""

    def __repr__(self) -> str:
        return "<junk>"


class Either:
    """Wraps an argument for which more kinds of values are fine than its value shows: only junk is refused."""

    def __init__(self, value: Any):
        self.value = value


class Name:
    """Wraps a name that the caller chooses, or ``None``: any other name is fine, an empty one is not."""

    def __init__(self, value: str | None):
        self.value = value


Mutant = tuple[str, Any, bool]


def mutate(value: Any, rng: random.Random) -> Mutant:
    """``(description, spoilt value, must be refused)``."""
    kinds = _mutants(value, rng)
    what, make, refuse = rng.choice(kinds)
    return what, make(), refuse


def _mutants(value: Any, rng: random.Random) -> list[tuple[str, Callable[[], Any], bool]]:
    junk: list[tuple[str, Callable[[], Any], bool]] = [("junk", Junk, True)]
    if isinstance(value, Either):
        return junk
    if isinstance(value, Name):
        return junk + [
            ("another name", lambda: "somebody", False), ("empty", lambda: "", True), ("a number", lambda: 2.5, True),
            ("a sequence", lambda: ["image"], True), ("a boolean", lambda: True, True),
        ]  # fmt: skip
    if isinstance(value, Tensor):
        return junk + _tensor(value, rng)
    if isinstance(value, bool):
        return junk + [
            ("a string", lambda: "yes", True), ("None", lambda: None, True), ("2", lambda: 2, True),
            ("the other", lambda: not value, False), ("a tensor", lambda: torch.tensor([True, False]), True),
        ]  # fmt: skip
    if isinstance(value, int):
        return junk + [
            ("zero", lambda: 0, False), ("negative", lambda: -rng.randint(1, 3), False),
            ("one more", lambda: value + 1, False), ("one less", lambda: value - 1, False),
            ("many", lambda: 37, False), ("a fraction", lambda: value + 0.5, True), ("nan", lambda: NAN, True),
            ("inf", lambda: INF, True), ("a string", lambda: str(value), True), ("a boolean", lambda: True, True),
            ("a sequence", lambda: [value] * 4, True), ("numpy", lambda: np.int64(value), False),
        ]  # fmt: skip
    if isinstance(value, float):
        return junk + [
            ("nan", lambda: NAN, True), ("inf", lambda: INF, False), ("-inf", lambda: -INF, True),
            ("negative", lambda: -abs(value) - 0.5, False), ("zero", lambda: 0.0, False), ("big", lambda: 7.5, False),
            ("a string", lambda: str(value), True), ("a boolean", lambda: True, True),
            ("a sequence", lambda: [value], True), ("numpy", lambda: np.float32(value), False),
            ("a tensor", lambda: torch.full((3,), value), True),
        ]  # fmt: skip
    if isinstance(value, str):
        return junk + [
            ("another word", lambda: value + "x", True), ("empty", lambda: "", True), ("a number", lambda: 2.5, True),
            ("a sequence", lambda: [value], False),
        ]  # fmt: skip
    if isinstance(value, (tuple, list)):
        return junk + _sequence(value, rng)
    if isinstance(value, State):
        return junk + [
            ("a dictionary", lambda: dict(value.tensors), True), ("an empty dictionary", dict, True),
            ("an empty state", lambda: State({}), True), ("twice the batch", lambda: value.repeat(2), True),
            ("other names", lambda: State({f"{k}_": v for k, v in value.tensors.items()}), True),
            ("another kind", lambda: State(value.tensors, "somebody-else"), True),
            ("on meta", lambda: value.map(lambda t: t.to("meta")), True),
            ("one axis less", lambda: value.map(lambda t: t[..., 0] if t.dim() > 1 else t), False),
        ]  # fmt: skip
    if isinstance(value, Plan):
        return junk + [
            ("a dictionary", lambda: dict(value.tensors), True),
            ("another kind", lambda: Plan("something", value.tensors, value.shape), True),
            ("empty", lambda: Plan(value.kind, {}, value.shape), True),
            ("indices far beyond", lambda: _changed(value, lambda t: t + 99 if t.dtype == torch.long else t), True),
            ("negative indices", lambda: _changed(value, lambda t: -t - 1 if t.dtype == torch.long else t), True),
            # One routing for all samples becomes one each, which may be what is asked for.
            ("one sample more", lambda: _changed(value, lambda t: torch.cat([t, t[:1]]) if t.dim() else t),
             not isinstance(value, BlockPlan)),
            ("floats", lambda: _changed(value, Tensor.float), True),
            ("on meta", lambda: _changed(value, lambda t: t.to("meta")), True),
        ]  # fmt: skip
    if isinstance(value, Mask):
        n = rng.randint(2, 9)
        return junk + [
            ("floats", lambda: torch.ones(n, n), True), ("a list", lambda: [[True]], True),
            ("another size", lambda: torch.ones(n + 11, 3, dtype=torch.bool), False),
        ]  # fmt: skip
    if isinstance(value, dict):
        return junk + [("a list", lambda: list(value), True), ("empty", dict, False)]
    return junk + [("a string", lambda: "nonsense", True), ("a number", lambda: 2.5, False)] if value is None else junk


def _tensor(t: Tensor, rng: random.Random) -> list[tuple[str, Callable[[], Any], bool]]:
    axis = rng.randrange(t.dim()) if t.dim() else 0

    def longer() -> Tensor:
        return torch.cat([t, t.narrow(axis, 0, 1)], axis)

    kinds: list[tuple[str, Callable[[], Any], bool]] = [
        ("None", lambda: None, False), ("a list", t.tolist, False), ("an axis more", lambda: t[None], False),
        ("on meta", lambda: t.to("meta"), True), ("a string", lambda: "tensor", True), ("a number", lambda: 1, False),
        ("complex", lambda: t.to(torch.complex64), True),
    ]  # fmt: skip
    if t.dim():
        kinds += [
            ("an axis less", lambda: t[0] if t.shape[0] else t.sum(0), False),
            (f"axis {axis} shorter", lambda: t.narrow(axis, 0, max(0, t.shape[axis] - 1)), False),
            (f"axis {axis} empty", lambda: t.narrow(axis, 0, 0), False),
            ("flat", t.flatten, False),
        ]
        if t.shape[axis]:
            kinds.append((f"axis {axis} longer", longer, False))
    if t.is_floating_point():
        kinds += [
            ("integers", t.long, True), ("booleans", lambda: t > 0, True),
            ("another precision", lambda: t.to(torch.float16 if t.dtype != torch.float16 else torch.float32), False),
        ]  # fmt: skip
    elif t.dtype == torch.bool:
        kinds += [("floats", t.float, True), ("integers", t.long, False)]
    else:
        kinds += [
            ("floats", t.float, True), ("negative", lambda: -t - 1, False), ("far beyond", lambda: t + 1000, False),
        ]  # fmt: skip
    return kinds


def _sequence(value: Any, rng: random.Random) -> list[tuple[str, Callable[[], Any], bool]]:
    make = type(value)

    def inner() -> Any:
        items = list(value)
        i = rng.randrange(len(items))
        items[i] = mutate(items[i], rng)[1]
        return make(items)

    kinds: list[tuple[str, Callable[[], Any], bool]] = [
        ("empty", lambda: make(()), False), ("a string", lambda: "string", True), ("a number", lambda: 2.5, True),
    ]  # fmt: skip
    if value:
        kinds += [
            ("one more", lambda: make([*value, value[0]]), False), ("one less", lambda: make(value[:-1]), False),
            ("an element spoilt", inner, False), ("an element spoilt", inner, False),
        ]  # fmt: skip
    return kinds


def _changed(plan: Plan, fn: Callable[[Tensor], Tensor]) -> Plan:
    return pytree.tree_map(lambda t: fn(t) if isinstance(t, Tensor) else t, plan)
