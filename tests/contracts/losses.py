"""MoH, Jin et al. 2024 (2410.11842): attention as a gated sum over heads, with a load-balance loss."""

import torch
from torch import Tensor, nn

from attnlib.nn.base import Mechanism
from attnlib.nn.layers import flat_valid, merge_heads, split_heads
from attnlib.ops import attention
from attnlib.types import Output, Plan, Traits


class MixtureOfHeads(Mechanism):
    class_traits = Traits(losses=("balance",), needs_plan=True, gradient="stopped", permutation_equivariant=True)

    def __init__(self, dim: int, num_heads: int, shared: int, active: int):
        super().__init__(dim)
        self.num_heads, self.shared, self.active = num_heads, shared, active
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.routed, self.common = nn.Linear(dim, num_heads - shared, bias=False), nn.Linear(dim, shared, bias=False)
        self.balance = nn.Linear(dim, 2, bias=False)

    def make_plan(self, x: Tensor) -> Plan:
        chosen = self.routed(x).topk(self.active, -1).indices
        return Plan("routed-heads", {"index": chosen}, (("N", x.shape[1]),))

    def mix(self, x: Tensor, *, valid=None, plan=None) -> Output:
        plan = (self.plan(x) if plan is None else plan).expect("routed-heads", N=x.shape[1])
        p = self.routed(x).softmax(-1)
        m = torch.zeros_like(p).scatter(-1, plan["index"], 1.0)
        alpha = 2 * self.balance(x).softmax(-1)
        routed = self.active * p * m / (p * m).sum(-1, keepdim=True)
        shared = self.shared * self.common(x).softmax(-1)
        gates = torch.cat([alpha[..., :1] * shared, alpha[..., 1:] * routed], -1)  # (B, N, H)
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        o = attention(q, k, v, valid=flat_valid(valid)) * gates.transpose(1, 2).unsqueeze(-1)
        real = torch.ones_like(p[..., :1]) if valid is None else valid[..., None].to(p.dtype)
        mean = lambda t: (t * real).sum((0, 1)) / real.sum()  # noqa: E731
        loss = (self.num_heads - self.shared) ** 2 * (mean(p) * mean(m)).mean()
        return Output(self.proj(merge_heads(o)), losses={"balance": loss})
