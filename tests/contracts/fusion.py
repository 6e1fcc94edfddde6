"""CrossViT, Chen et al. 2021 (2103.14899): two streams talk through their class tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlib.nn.base import Fusion
from attnlib.nn.layers import merge_heads, split_heads
from attnlib.ops import attention


class CrossViTFusion(Fusion):
    """cls_a, projected to b's width, reads b's patches once, and returns."""

    def __init__(self, dims: tuple[int, int], num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        a, b = dims
        into = lambda i, o: nn.Sequential(nn.LayerNorm(i), nn.GELU(), nn.Linear(i, o))  # noqa: E731
        self.there = nn.ModuleList([into(a, b), into(b, a)])
        self.norm = nn.ModuleList([nn.LayerNorm(b), nn.LayerNorm(a)])
        self.q, self.k, self.v, self.proj = (nn.ModuleList([nn.Linear(d, d) for d in (b, a)]) for _ in range(4))
        self.back = nn.ModuleList([into(b, a), into(a, b)])

    def forward(self, *streams: Tensor, valid=None) -> tuple[Tensor, ...]:
        out = []
        for i, (own, partner) in enumerate(zip(streams, streams[::-1], strict=True)):
            c = self.there[i](own[:, :1])
            z = self.norm[i](torch.cat([c, partner[:, 1:]], 1))
            q, k, v = (split_heads(p[i](t), self.num_heads) for p, t in ((self.q, z[:, :1]), (self.k, z), (self.v, z)))
            exists = None if valid is None else F.pad(valid[1 - i][:, 1:], (1, 0), value=True)
            c = c + self.proj[i](merge_heads(attention(q, k, v, valid=exists, backend="eager")))
            out.append(torch.cat([self.back[i](c), own[:, 1:]], 1))
        return tuple(out)
