"""Mechanisms that misbehave, or that make a comparison's bookkeeping visible."""

from __future__ import annotations

import torch
from torch import nn

from attnlib.nn.base import Mechanism
from attnlib.types import Output, Traits

SELF = frozenset({"noncausal-self"})


class Identity(Mechanism):
    """Passes tokens on through one linear layer, on sequences only."""

    class_traits = Traits(patterns=SELF, grid_ranks=frozenset({1}), work={"N": 1}, memory={"N": 1})

    def __init__(self, dim: int, num_heads: int = 1, draws: int = 1) -> None:
        super().__init__(dim)
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(draws))

    def mix(self, x, context=None, **call):
        assert x.dim() == 3
        return self.layers[0](x)


class GridOnly(Identity):
    """Takes images and nothing else."""

    class_traits = Traits(patterns=SELF | {"causal-self"}, grid_ranks=frozenset({2}))

    def __init__(self, dim: int, num_heads: int = 1, causal: bool = False) -> None:
        super().__init__(dim)

    def mix(self, x, context=None, **call):
        assert x.dim() == 4
        return self.layers[0](x)


class Carrying(Identity):
    """Counts blocks in its carry and returns a loss of one per block."""

    class_traits = Traits(patterns=SELF, grid_ranks=frozenset({1}), carries=True, losses=("ones",))

    def mix(self, x, context=None, carry=None, returns=(), **call):
        seen = 1 if carry is None else carry + 1
        self.seen = seen
        return Output(self.layers[0](x), carry=seen, losses={"ones": torch.ones(())})


class Exploding(Identity):
    """Fails whenever it runs."""

    def mix(self, x, context=None, **call):
        raise RuntimeError("out of luck")


class Refusing(Identity):
    """Says in time that it cannot take the input."""

    def mix(self, x, context=None, **call):
        raise ValueError(f"N must be 7, got {x.shape[1]}")


class Diverging(Identity):
    """Turns to not-a-number after a few steps of training."""

    def __init__(self, dim: int, num_heads: int = 1) -> None:
        super().__init__(dim)
        self.calls = 0

    def mix(self, x, context=None, **call):
        self.calls += 1
        return self.layers[0](x) * (float("nan") if self.calls > 4 else 1.0)


class Quadratic(Identity):
    """Writes an N × N tensor that its backward pass keeps."""

    def mix(self, x, context=None, **call):
        return (x @ x.transpose(1, 2)).sigmoid() @ self.layers[0](x)


class NotAMechanism(nn.Module):
    """Has no traits to say what it supports."""

    def __init__(self, dim: int) -> None:
        super().__init__()
