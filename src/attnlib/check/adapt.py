"""Fusions and pools, seen as mechanisms: the same claims are tested on one stream at a time, or on one token out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import Fusion
from ..types import Output, Traits
from .verdict import Refuted

KINDS = ("mechanism", "fusion", "pool")

#: What is assumed of a fusion that says nothing about itself: its contract, no growth.
FUSED = Traits(
    patterns=frozenset({"noncausal-cross"}),
    grid_ranks=frozenset({1, 2, 3}),
    work={},
    memory={},
    resolution_free=False,
    traceable=False,
)


class Stream(nn.Module):
    """A fusion as a mechanism of its stream ``index``: another stream is the context, further ones are fixed.

    Args:
        inner: the fusion.
        index: which stream is ``x``; the next one is the context.
        shapes: (*grid, C) of every stream.
    """

    def __init__(self, inner: Fusion, index: int, shapes: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.inner, self.index, self.shapes = inner, index, shapes
        self.other = (index + 1) % len(shapes)
        self.dim, self.context_dim = shapes[index][-1], shapes[self.other][-1]

    def forward(
        self, x: Tensor, context: Tensor, *, valid: Tensor | None = None, context_valid: Tensor | None = None
    ) -> Tensor:
        streams, exists = [], []
        for i, shape in enumerate(self.shapes):
            steps = torch.arange(math.prod(shape), device=x.device, dtype=torch.float64).view(shape)
            fixed = torch.sin(0.7 * steps + i).to(x.dtype)
            streams.append(x if i == self.index else context if i == self.other else fixed.expand(len(x), *shape))
            exists.append(valid if i == self.index else context_valid if i == self.other else None)
        given = all(e is None for e in exists)
        out = self.inner(*streams) if given else self.inner(*streams, valid=exists)
        if not isinstance(out, (tuple, list)) or len(out) != len(streams):
            found = f"{len(out)} values" if isinstance(out, (tuple, list)) else type(out).__name__
            raise Refuted(f"forward of {len(streams)} streams returned {found}, not a tuple of {len(streams)} tensors")
        for i, (y, stream) in enumerate(zip(out, streams, strict=True)):
            if not isinstance(y, Tensor) or y.shape != stream.shape:
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise Refuted(f"stream {i} of shape {tuple(stream.shape)} came back as {got}")
        y = out[self.index]
        return y if valid is None else y.masked_fill(~valid.unsqueeze(-1), 0.0)


class Pool(nn.Module):
    """A pool (B, N, C) -> (B, D) as a mechanism with one token out."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **call: Any) -> Any:
        answer = self.inner(x, **call)
        y = answer.y if isinstance(answer, Output) else answer
        if not isinstance(y, Tensor) or y.dim() != 2 or y.shape[0] != x.shape[0]:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise Refuted(f"a pool gives (B, D); for x of shape {tuple(x.shape)} it gave {found}")
        return answer._replace(y=y.unsqueeze(1)) if isinstance(answer, Output) else y.unsqueeze(1)


def stream_shapes(config: Any, fusion: Any) -> tuple[tuple[int, ...], ...]:
    """(*grid, C) of every stream, from ``dims`` or ``dim`` of the settings or the module."""
    for look in (config.get, lambda name: getattr(fusion, name, None)):
        dims = look("dims")
        if dims is None and isinstance(look("dim"), int):
            dims = (look("dim"), look("dim"))
        if dims is not None:
            return tuple((12 - i, int(d)) for i, d in enumerate(dims))
    raise ValueError(
        f"cannot tell the streams of {type(fusion).__name__}: give Case(streams=((*grid, C), ...)), or the class an "
        "example = {'streams': ...}, or a setting dims"
    )
