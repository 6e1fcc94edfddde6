"""The difference of two runs on the tokens that both have."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import check_type
from .packing import head_numbers
from .runs import Axis, LayerMaps, Part, Run


def _matched(a: Axis, b: Axis) -> list[tuple[int, int]]:
    """Tokens of both, in order: patches by place, texts by the longest common runs."""
    if a.labels == b.labels:
        return [(i, i) for i in range(len(a))]
    pairs = difflib.SequenceMatcher(None, a.labels, b.labels, autojunk=False).get_matching_blocks()
    return [(block.a + i, block.b + i) for block in pairs for i in range(block.size)]


def _axis(name: str, a: Axis, b: Axis) -> tuple[Axis, Tensor, Tensor]:
    if (a.grid and a.grid.grid) != (b.grid and b.grid.grid):
        raise ValueError(
            f"difference of unlike runs: the patches of {name!r} are {a.grid and a.grid.grid} and "
            f"{b.grid and b.grid.grid}"
        )
    pairs = _matched(a, b)
    if not pairs:
        raise ValueError(f"difference of unlike runs: they have no token of {name!r} in common")
    left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
    kept = left.tolist()
    parts, start = [], 0
    for part in a.parts:
        count = sum(part.start <= i < part.stop for i in kept)
        parts.append(Part(part.name, start, start + count, part.grid if count == part.stop - part.start else None))
        start += count
    words = texts = None
    if a.words is not None:  # numbered anew: a word of which no piece is left is none
        old = sorted({a.words[i] for i in kept})
        words = [old.index(a.words[i]) for i in kept]
        texts = None if a.texts is None else [a.texts[i] for i in old]
    whole = any(p.grid for p in parts)
    return Axis([a.labels[i] for i in kept], words, tuple(parts), a.picture if whole else None, texts), left, right


def difference(a: Run, b: Run) -> Run:
    """``b - a``, aligned by token: maps, numbers per head and the overlays that both have.

    Tokens that only one of them has are left out; weights on them are in neither.

    Raises:
        ValueError: unlike models, whose layers, kinds or heads differ; nothing in common.
    """

    def form(run: Run) -> list[tuple[str, str, int, int | None, str, str]]:
        return [(x.label, x.kind, len(x.weights), x.kv_heads, x.queries, x.keys) for x in run.layers]

    for name, run in (("a", a), ("b", b)):
        check_type(name, run, Run, "a Run, as attnlib.look.read gives")
        if run.signed:
            raise ValueError(f"{run.name!r} is a difference itself")
    if form(a) != form(b):
        unlike = next((p for p in zip(form(a), form(b), strict=False) if p[0] != p[1]), (len(a.layers), len(b.layers)))
        raise ValueError(
            f"difference of unlike models: {a.name!r} has {len(a.layers)} attentions and {b.name!r} {len(b.layers)}; "
            f"the first that differs (label, kind, heads, kv_heads, queries, keys): {unlike[0]} and {unlike[1]}"
        )
    joined = {name: _axis(name, axis, b.axes[name]) for name, axis in a.axes.items()}
    layers = []
    for x, y in zip(a.layers, b.layers, strict=True):
        _, q_left, q_right = joined[x.queries]
        _, k_left, k_right = joined[x.keys]
        first = x.weights[:, q_left][:, :, k_left].double()
        second = y.weights[:, q_right][:, :, k_right].double()
        before, after = head_numbers(first), head_numbers(second)
        numbers = {"change": (second - first).abs().sum(-1).mean(-1) / 2}
        numbers |= {name: after[name] - value for name, value in before.items()}
        layers.append(LayerMaps(x.label, (second - first).float(), x.kind, x.kv_heads, x.queries, x.keys, numbers))

    def places(axis: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        _, left, right = joined[axis]
        return lambda v: v[..., left], lambda v: v[..., right]

    overlays = {}
    other = {o["name"]: o for o in b.laid()}
    for one in a.laid():
        two = other.get(one["name"])
        if two is None or (one["on"], one["axis"]) != (two["on"], two["axis"]):
            continue
        if one["axis"] is None:
            overlays[one["name"]] = two["values"] - one["values"]
        else:
            of_a, of_b = places(one["axis"])
            overlays[one["name"]] = of_b(two["values"]) - of_a(one["values"])
    axes = {name: axis for name, (axis, _, _) in joined.items()}
    return Run(f"{b.name} − {a.name}", layers, axes, overlays, signed=True)
