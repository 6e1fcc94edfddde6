from torch import Tensor

from attnlib.check import Case
from attnlib.nn.base import Mechanism
from attnlib.nn.reduced.sg_former import SelfGuidedAttention
from attnlib.types import Output, Traits


class Pair(Mechanism):
    """A hybrid and a guided layer in a row, as a backbone stacks them; the significance map passes between them."""

    class_traits = Traits(grid_ranks=frozenset({2}), gradient="stopped")

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim)
        self.hybrid = SelfGuidedAttention(dim, num_heads, "hybrid", sr_ratio=2, window_size=4)
        self.guided = SelfGuidedAttention(dim, num_heads, "guided", sr_ratio=2)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        first: Output = self.hybrid(x, valid=valid, returns=("carry",))
        return self.guided(x + first.y, valid=valid, carry=first.carry)


def significance(x: Tensor) -> dict[str, Tensor]:
    """A map that depends on the shape only, without ties and in no simple order."""
    b, h, w = x.shape[:3]
    ranks = (x.new_ones(b * h * w).cumsum(0) * 0.7548776662).frac()
    return {"carry": ranks.view(b, h, w)}


ROWS = [
    Case("sg-former", dict(dim=8, num_heads=4, sr_ratio=2, window_size=4), (8, 8)),
    Case("sg-former", dict(dim=8, num_heads=4, sr_ratio=4, window_size=3), (6, 9), "uneven"),
    Case("sg-former", dict(dim=8, num_heads=4, sr_ratio=4, window_size=3, compat="authors"), (6, 9), "whole-patches"),
    Case("sg-former", dict(dim=8, num_heads=4, sr_ratio=3, window_size=2, pad="refuse"), (6, 6), "refuse"),
    Case("sg-former", dict(dim=8, num_heads=4, role="guided", sr_ratio=2), (4, 6), "guided", extras=significance),
    Case(
        "sg-former", dict(dim=8, num_heads=2, role="guided", merge=((1, 8), (2, 4), (1, 2))), (8, 8), "three-groups",
        extras=significance,
    ),
    Case("sg-former", dict(dim=8, num_heads=2, role="global"), (4, 5), "global"),
    Case("table.guided:Pair", dict(dim=8, num_heads=4), (8, 8)),
]  # fmt: skip
