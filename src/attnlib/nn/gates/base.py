"""What every gate is: ``y = x * gate(x)``."""

from __future__ import annotations

from torch import Tensor

from ...types import Traits
from ..base import Mechanism
from ..layers import zero_invalid


class Gate(Mechanism):
    """Base of mechanisms whose output is the map times a gate. A subclass says what the gate is.

    The product is computed in the wider type of map and gate, and given back in that of the map.
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def _gate(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The gate of a map whose absent tokens are zeros."""
        raise NotImplementedError

    def gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the map would be multiplied by, to look at.

        Args:
            x: (B, *grid, C).
            valid: (B, *grid) boolean, which tokens exist.

        Returns:
            A tensor that broadcasts to ``x``: an axis over which the gate is constant has size 1.
        """
        self._check_call(x, None, None, valid, None, None, None, None, None, ())
        return self._gate(zero_invalid(x, valid), valid)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return (x * self._gate(x, valid)).to(x.dtype)
