"""What every pool is: one ``forward`` from tokens to a vector, and claims that the conformance kit checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import (
    check_device,
    check_float,
    check_int,
    check_rank,
    check_type,
    check_valid,
    check_width,
    checked,
    readable,
)
from ...ops import attention
from ...types import Output, Traits
from ..base import _sized
from ..layers import merge_heads, split_heads, zero_invalid


class Pool(nn.Module):
    """Base of pools. A subclass implements :meth:`pool`, and says in its traits what it cannot do.

    Args:
        dim: width C of the tokens.
        out_dim: width D of the vector; ``dim`` by default.
    """

    class_traits: ClassVar[Traits] = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1}),
        work={"N": 1},
        memory={"N": 1},
        weights=True,
        permutation_equivariant=True,
    )
    slug: ClassVar[str]
    zero_is_off: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in cls.__dict__ and cls.__module__.startswith("attnlib."):
            cls.__init__ = _sized(checked(cls.__init__))  # type: ignore[method-assign]

    def __init__(self, dim: int, out_dim: int | None = None):
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        self.out_dim = dim if out_dim is None else check_int("out_dim", out_dim, least=1)

    @property
    def traits(self) -> Traits:
        """What this instance, configured so and in this mode, supports; permutations leave the vector as it is."""
        return self.class_traits

    def forward(self, x: Tensor, *, valid: Tensor | None = None, returns: Sequence[str] = ()) -> Any:
        """Pool tokens.

        Args:
            x: (B, N, C).
            valid: (B, N) boolean, which tokens exist; at least one of every sample.
            returns: ``("weights",)`` for the weights of the tokens, too.

        Returns:
            (B, D), or an :class:`~attnlib.Output` whose ``y`` that is and whose ``weights`` are (B, H, 1, N).

        Raises:
            ValueError: another shape, no tokens, a sample without any that exists, or weights of a pool without.
        """
        check_rank("x", x, 3, "(B, N, C)")
        check_float("x", x)
        check_width("x", x, self.dim)
        check_valid("valid", valid, x.shape[:-1])
        check_device(x=x, valid=valid, **{"the parameters": next(self.parameters(), None)})
        if not x.shape[1]:
            raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
        if valid is not None and readable(valid):
            some = valid.any(1)
            if some.device.type != "cpu":
                torch._assert_async(some.all(), "valid leaves a sample without any token to pool")
            elif not bool(some.all()):
                bare = (~some).nonzero().flatten().tolist()
                raise ValueError(f"valid must leave every sample a token to pool; the samples {bare[:8]} have none")
        check_type("returns", returns, (tuple, list, set, frozenset), "a tuple of names")
        if set(returns) - {"weights"} or (returns and not self.traits.weights):
            possible = ["weights"] if self.traits.weights else []
            raise ValueError(f"{self.slug!r} cannot return {sorted(map(str, returns))}; possible: {possible}")
        y, weights = self.pool(zero_invalid(x, valid), valid, bool(returns))
        return Output(y, weights=weights) if returns else y

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> tuple[Tensor, Tensor | None]:
        """The vector (B, D) of tokens whose absent ones are zeros, and where asked for the weights (B, H, 1, N)."""
        raise NotImplementedError


def read(
    q: Tensor, k: Tensor, v: Tensor, heads: int, valid: Tensor | None, weights: bool, scale: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the query (B or 1, 1, H D) reads of the tokens (B, N, H D), and its weights; keys may have one head.

    Returns:
        (B, H D), and (B, H, 1, N) or ``None``.
    """
    head_dim = q.shape[-1] // heads
    q = split_heads(q.expand(k.shape[0], -1, -1).to(k.dtype), heads)
    k, v = (split_heads(t, t.shape[-1] // head_dim) for t in (k, v))
    out: Any = attention(q, k, v, valid=valid, scale=scale, return_weights=weights)
    y, maps = out if weights else (out, None)
    return merge_heads(y).squeeze(1), maps
