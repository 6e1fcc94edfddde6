"""Key-driven GQA, Khan et al. 2024 (2408.08454): how many query heads read a key head follows the key's norm."""

import torch
from torch import Tensor, nn

from attnlib.nn.base import Mechanism
from attnlib.nn.layers import flat_valid, merge_heads, split_heads
from attnlib.ops import attention
from attnlib.types import Plan, Traits


class KeyDrivenGQA(Mechanism):
    class_traits = Traits(
        needs_plan=True, gradient="stopped", batch_independent=False, permutation_equivariant=True, mask=True
    )

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int):
        super().__init__(dim)
        self.num_heads, self.groups = num_heads, num_kv_heads
        self.q = nn.Linear(dim, dim)
        self.k, self.v = (nn.Linear(dim, dim // num_heads * num_kv_heads) for _ in range(2))

    def make_plan(self, x: Tensor, *, valid=None) -> Plan:
        k = split_heads(self.k(x), self.groups)
        if valid is not None:
            k = k * valid[:, None, :, None]
        m = k.norm(dim=(-2, -1)).sum(0)
        share = (m - m.min()) / (m.max() - m.min())
        # equal norms: the uniform split, instead of 0 / 0
        share = share / share.sum() if bool(torch.isfinite(share).all()) else torch.full_like(m, 1 / self.groups)
        split = (share * self.num_heads).round().long()
        while (excess := int(split.sum()) - self.num_heads) != 0:
            split[split.argmax() if excess > 0 else split.argmin()] -= 1 if excess > 0 else -1
        return Plan("head-map", {"map": torch.repeat_interleave(torch.arange(self.groups), split)})

    def mix(self, x: Tensor, *, valid=None, mask=None, plan=None) -> Tensor:
        head_map = (self.plan(x, valid=valid) if plan is None else plan).expect("head-map")["map"]
        q, k, v = split_heads(self.q(x), self.num_heads), *(split_heads(p(x), self.groups) for p in (self.k, self.v))
        return merge_heads(
            attention(q, k.index_select(1, head_map), v.index_select(1, head_map), mask=mask, valid=flat_valid(valid))
        )
