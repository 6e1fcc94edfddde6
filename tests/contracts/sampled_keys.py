"""DFA3D, Li et al. 2023 (2307.12972): queries sample a feature map lifted by its depth distribution."""

import torch.nn.functional as F
from torch import Tensor, nn

from attnlib.nn.base import Mechanism
from attnlib.nn.layers import zero_invalid
from attnlib.types import Traits


class Deformable3D(Mechanism):
    """context (B, H, W, C + Z): features and, in the last Z channels, the depth distribution."""

    class_traits = Traits(patterns={"noncausal-cross", "causal-cross"}, work={"N": 1}, memory={"N": 1})

    def __init__(self, dim: int, num_heads: int, depth: int, points: int = 4):
        super().__init__(dim, context_dim=dim + depth)
        self.num_heads, self.depth, self.points = num_heads, depth, points
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.where, self.weight = nn.Linear(dim, num_heads * points * 3), nn.Linear(dim, num_heads * points)

    def mix(self, x: Tensor, context: Tensor, *, context_valid=None) -> Tensor:
        b, n = x.shape[:2]
        features, depth = context.split([self.dim, self.depth], -1)
        value = zero_invalid(self.value(features), context_valid)
        # the expanded volume (B, H, Z, Y, X, D) is the oracle; a real engine never builds it
        value = value.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)
        volume = (value.unsqueeze(3) * depth.permute(0, 3, 1, 2)[:, None, None]).flatten(0, 1)
        at = self.where(x).sigmoid().view(b, n, self.num_heads, self.points, 3).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(volume, 2 * at.unsqueeze(1) - 1, align_corners=False)[:, :, 0]
        weight = self.weight(x).view(b, n, self.num_heads, self.points).softmax(-1).transpose(1, 2).flatten(0, 1)
        out = (sampled * weight.unsqueeze(1)).sum(-1).view(b, self.dim, n).transpose(1, 2)
        return self.proj(out)
