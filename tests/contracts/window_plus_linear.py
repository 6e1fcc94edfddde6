"""LoLCATs, Zhang et al. 2024 (2410.10254): softmax on a window and linear attention before it, one denominator."""

import torch
from torch import Tensor, nn

from attnlib import masks
from attnlib.nn.base import Mechanism
from attnlib.nn.layers import flat_valid, merge_heads, split_heads
from attnlib.ops import attention_partial
from attnlib.types import Partial, Traits


class WindowPlusLinear(Mechanism):
    class_traits = Traits(patterns={"causal-self"})

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__(dim)
        self.num_heads, self.window_size, d = num_heads, window_size, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.phi = nn.Parameter(torch.randn(2, num_heads, d, d) * d**-0.5)
        self.gate = nn.Parameter(torch.full((num_heads, 1), -2.1972))

    def features(self, x: Tensor, which: int) -> Tensor:
        z = x @ self.phi[which]
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)

    def mix(self, x: Tensor, *, valid=None) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        exists, near = flat_valid(valid), masks.recent(self.window_size)
        window = attention_partial(q, k, v, mask=near, valid=exists)
        # the released arithmetic: the window's scores lose their maximum, the linear part does not
        top = window.log_scale
        window = window.shift(-torch.where(torch.isinf(top), torch.zeros_like(top), top))
        old = (masks.causal() & ~near).dense(x.shape[1])
        old = old if exists is None else old & exists[:, None, None]
        weights = self.features(q, 0) @ self.features(k, 1).transpose(-2, -1) * old
        linear = Partial(torch.zeros_like(top), weights.sum(-1), weights @ v)
        return self.proj(merge_heads(window.shift(self.gate.sigmoid().log()).merge(linear).finish()))
