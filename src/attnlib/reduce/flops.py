"""What a decoder costs by the number of tokens in each of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..checks import check_int, check_ints, checked, shaped
from ..hooks.site import Site


@checked
@dataclass(frozen=True)
class BlockCost:
    """Floating-point operations of one decoder block (a multiplication and an addition are two).

    Args:
        per_token: of its linear maps, for each token.
        per_pair: of its attention, for each pair of a query and a key; causality is not taken off, as kernels that
            are given a mask do not take it off either.

    >>> BlockCost(per_token=10, per_pair=2).flops(queries=3, keys=4)
    54
    """

    per_token: int
    per_pair: int

    def __post_init__(self) -> None:
        check_int("per_token", self.per_token, least=0)
        check_int("per_pair", self.per_pair, least=0)

    @classmethod
    def of(cls, block: nn.Module, site: Site) -> BlockCost:
        """The cost of a block of a model, from the sizes of its linear maps and heads."""
        linear = sum(m.in_features * m.out_features for m in block.modules() if isinstance(m, nn.Linear))
        return cls(2 * linear, 4 * site.heads * site.head_dim)

    @classmethod
    def llama(cls, dim: int, mlp: int, kv_dim: int | None = None) -> BlockCost:
        """``4 n C^2 + 2 n^2 C + 3 n C M`` multiply-adds: four projections, scores and mixture, a gated MLP.

        Args:
            dim: C, the embedding width.
            mlp: M, the width of the MLP.
            kv_dim: width of keys and values where queries are grouped.

        >>> BlockCost.llama(4096, 11008).flops(576 + 64) // 10**9
        265
        """
        kv = dim if kv_dim is None else kv_dim
        return cls(2 * (2 * dim * dim + 2 * dim * kv + 3 * dim * mlp), 4 * dim)

    def flops(self, queries: int, keys: int | None = None) -> int:
        """Of one sample: ``queries`` tokens that read ``keys`` (as many by default)."""
        return self.per_token * queries + self.per_pair * queries * (queries if keys is None else keys)


@shaped()
def prefill_flops(costs: Sequence[BlockCost], lengths: Sequence[int], batch: int = 1) -> int:
    """Of reading a prompt that has ``lengths[l]`` tokens in block l.

    >>> prefill_flops([BlockCost(1, 0)] * 3, [10, 10, 4])
    24
    """
    if len(costs) != len(lengths):
        raise ValueError(f"lengths must be one for each of {len(costs)} costs, got {len(lengths)}")
    check_ints("lengths", lengths, least=0)
    check_int("batch", batch, least=0)
    return batch * sum(cost.flops(n) for cost, n in zip(costs, lengths, strict=True))
