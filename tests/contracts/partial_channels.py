"""SHViT, Yun and Ro 2024 (2401.16456): one head on some channels, Dv != D, norms that fold away."""

import copy

import torch
from torch import Tensor, nn

from attnlib.nn.base import Mechanism
from attnlib.nn.layers import flat_valid, zero_invalid
from attnlib.ops import attention
from attnlib.types import Traits


class NormedLinear(nn.Module):
    """1x1 convolution and BatchNorm on the last axis."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, out, bias=False), nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).flatten(0, -2)).view(*x.shape[:-1], -1)

    def folded(self) -> nn.Linear:
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        out = nn.Linear(self.linear.in_features, self.linear.out_features)
        out.weight.data = self.linear.weight * scale[:, None]
        out.bias.data = self.norm.bias - self.norm.running_mean * scale
        return out


class SingleHead(Mechanism):
    class_traits = Traits(grid_ranks={2}, permutation_equivariant=True, batch_independent=True)

    def __init__(self, dim: int, partial: int, qk_dim: int = 16):
        super().__init__(dim)
        self.partial, self.qk_dim = partial, qk_dim
        self.norm = nn.GroupNorm(1, partial)
        self.qkv, self.proj = NormedLinear(partial, 2 * qk_dim + partial), NormedLinear(dim, dim)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=not self.training)

    def mix(self, x: Tensor, *, valid=None) -> Tensor:
        x = zero_invalid(x, valid)
        some, rest = x.split([self.partial, self.dim - self.partial], -1)
        some = self.norm(some.movedim(-1, 1)).movedim(1, -1)
        q, k, v = self.qkv(some).flatten(1, 2).unsqueeze(1).split([self.qk_dim, self.qk_dim, self.partial], -1)
        out = attention(q, k, v, valid=flat_valid(valid))[:, 0].view_as(some)
        return self.proj(torch.cat([out, rest], -1).relu())

    def deployed(self) -> nn.Module:
        out = copy.deepcopy(self).eval()
        out.qkv, out.proj = out.qkv.folded(), out.proj.folded()
        return out
