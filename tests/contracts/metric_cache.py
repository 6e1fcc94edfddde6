"""Power-law graph attention, Gokden 2025 (2502.13502): a metric made from all queries, causal only once cached."""

import torch
from torch import Tensor, nn

from attnlib import masks
from attnlib.nn.base import Mechanism
from attnlib.nn.layers import flat_valid, merge_heads, split_heads
from attnlib.ops import attention
from attnlib.types import Output, State, Traits


class PowerLawGraphAttention(Mechanism):
    """Without a state the metric G sees every position, so the claim is noncausal; a state freezes G."""

    class_traits = Traits(patterns={"noncausal-self"}, streaming=True)

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim)
        self.num_heads, d = num_heads, dim // num_heads
        self.qkv, self.proj, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(d)
        self.lift, self.power, self.mix_in = (nn.Parameter(torch.randn(num_heads, d, d) * 0.1) for _ in range(3))

    def metric(self, q: Tensor, valid: Tensor | None) -> Tensor:
        if valid is not None:
            q = q * valid[:, None, :, None]
        z = self.lift @ self.norm(q.transpose(-2, -1) @ q)
        return self.mix_in @ (z * z * z.sigmoid() + 1e-9) ** self.power

    def mix(self, x: Tensor, *, valid=None, state=None) -> Output:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        exists = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else flat_valid(valid)
        offset = 0
        if state is None:
            metric = self.metric(q, exists)
        else:
            metric, offset = state["G"], state["k"].shape[2]
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            exists = torch.cat([state["valid"], exists], 1)
        out = attention(
            q @ metric, k, v, mask=masks.causal(), valid=exists, q_pos=torch.arange(offset, offset + x.shape[1])
        )
        return Output(self.proj(merge_heads(out)), state=State({"k": k, "v": v, "valid": exists, "G": metric}))
