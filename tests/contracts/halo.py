"""HaloNet, Vaswani et al. 2021 (2103.12731): blocks read themselves plus a zero-keyed halo, with q . R_h + q . R_w."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlib.grids import block_windows, unblock_windows
from attnlib.nn.base import Mechanism
from attnlib.nn.layers import merge_heads, split_heads, zero_invalid
from attnlib.ops import attention
from attnlib.positions import AxisBias
from attnlib.types import Traits


class Halo(Mechanism):
    class_traits = Traits(grid_ranks={2}, work={"N": 1}, memory={"N": 1}, grid_multiple=4)

    def __init__(self, dim: int, num_heads: int, block: int = 4, halo: int = 1, pad_mode: str = "zero"):
        super().__init__(dim)
        self.num_heads, self.block, self.halo, self.pad_mode = num_heads, block, halo, pad_mode
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.window = block + 2 * halo
        self.rel = nn.Parameter(torch.randn(2, 2 * self.window - 1, dim // num_heads) * 0.02)

    def halos(self, t: Tensor) -> Tensor:
        """(B, H, W, C) -> (B * blocks, window ** 2, C)."""
        h = self.halo
        t = F.pad(t, (0, 0, h, h, h, h)).unfold(1, self.window, self.block).unfold(2, self.window, self.block)
        return t.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2)

    def mix(self, x: Tensor, *, valid=None) -> Tensor:
        queries = block_windows(self.q(x), self.block)
        q = split_heads(queries.flatten(0, 2), self.num_heads)
        k, v = (split_heads(t, self.num_heads) for t in self.halos(zero_invalid(self.kv(x), valid)).chunk(2, -1))
        at, reach = torch.arange(self.block) + self.halo, torch.arange(self.window)
        step = reach[None] - at[:, None] + self.window - 1  # (block, window)
        grid = q.unflatten(2, (self.block, self.block))
        rows = torch.einsum("bhyxd,ykd->bhyxk", grid, self.rel[0][step]).flatten(2, 3)
        cols = torch.einsum("bhyxd,xkd->bhyxk", grid, self.rel[1][step]).flatten(2, 3)
        exists = None
        if self.pad_mode == "masked" or valid is not None:
            real = torch.ones(x.shape[:-1], dtype=torch.bool) if valid is None else valid
            # zero-keyed: what lies outside the map still counts as a key; what is invalid inside never does
            outside = torch.zeros_like(real) if self.pad_mode == "masked" else torch.ones_like(real)
            inside = self.halos(torch.stack([real, torch.ones_like(real)], -1).to(x.dtype))
            exists = inside[..., 0] > 0
            if bool(outside.any()):
                exists = exists | (inside[..., 1] == 0)
        out = merge_heads(attention(q, k, v, bias=AxisBias([rows, cols]), valid=exists))
        return unblock_windows(out.reshape(queries.shape))
