"""VMoBA, Wu et al. 2025 (2506.23858): every query picks key blocks by a cumulative similarity threshold."""

import torch
from torch import Tensor, nn

from attnlib import masks
from attnlib.nn.base import Mechanism
from attnlib.nn.layers import flat_valid, merge_heads, split_heads
from attnlib.ops import attention_partial
from attnlib.types import Plan, Traits


class MixtureOfBlocks(Mechanism):
    class_traits = Traits(needs_plan=True, gradient="stopped")

    def __init__(self, dim: int, num_heads: int, block: int, tau: float = 0.25):
        super().__init__(dim)
        self.num_heads, self.block, self.tau = num_heads, block, tau
        self.qkv = nn.Linear(dim, 3 * dim)

    def make_plan(self, x: Tensor) -> Plan:
        q, k, _v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        n = x.shape[1]
        gate = q @ k.unflatten(2, (-1, self.block)).mean(3).transpose(-2, -1)  # (B, H, N, blocks)
        low, high = gate.amin((-2, -1), keepdim=True), gate.amax((-2, -1), keepdim=True)
        mass = (gate - low) / (high - low)
        own = torch.arange(n)[:, None] // self.block == torch.arange(n // self.block)
        mass = mass / mass.sum((-2, -1), keepdim=True)
        rest = (self.tau - (mass * own).sum((-2, -1), keepdim=True)).clamp(min=0).flatten(2)
        order = mass.masked_fill(own, 0).flatten(2).sort(-1, descending=True)
        before = order.values.cumsum(-1) - order.values
        chosen = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order.indices, before < rest)
        return Plan("blocks", {"chosen": chosen.view_as(mass) & ~own}, (("N", n),))

    def mix(self, x: Tensor, *, valid=None, plan=None) -> Tensor:
        n = x.shape[1]
        chosen = (self.plan(x) if plan is None else plan).expect("blocks", N=n)["chosen"]
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        exists = flat_valid(valid)
        own = masks.documents(torch.arange(n) // self.block)
        near = attention_partial(q, k, v, mask=own, valid=exists)
        far = attention_partial(q, k, v, mask=masks.blocks(chosen, 1, self.block), valid=exists)
        return merge_heads(near.merge(far).finish())
