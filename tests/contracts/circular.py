"""CLEAR, Liu et al. 2024 (2412.16112): image tokens read a circle and all text, text reads everything."""

from torch import Tensor, nn

from attnlib import masks
from attnlib.nn.base import Mechanism
from attnlib.nn.layers import flat_valid, merge_heads, split_heads
from attnlib.ops import attention
from attnlib.types import Traits


class Clear(Mechanism):
    class_traits = Traits(grid_ranks={2}, layout=True, mask=True)

    def __init__(self, dim: int, num_heads: int, radius: float):
        super().__init__(dim)
        self.num_heads, self.radius = num_heads, radius
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def mix(self, x: Tensor, *, layout=None, valid=None, mask=None) -> Tensor:
        grid = x.shape[1:-1] if layout is None else layout.grid()
        circle = masks.circular_window(grid, self.radius)
        circle = circle if layout is None else masks.on_segment(layout, layout.grid_name(), circle)
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        out = attention(q, k, v, mask=circle if mask is None else circle & mask, valid=flat_valid(valid))
        return self.proj(merge_heads(out, x.shape[1:-1]))
