"""SG-Former, Ren et al. 2023: a hybrid-scale block hands its significance map to a self-guided block."""

import torch
from torch import Tensor, nn

from attnlib.grids import block_windows, unblock_windows
from attnlib.nn.base import Mechanism
from attnlib.nn.layers import merge_heads, split_heads
from attnlib.ops import attention
from attnlib.types import Output, Plan, Traits


class HybridScale(Mechanism):
    """Half of the heads in windows, half over pooled keys; the carry says how much each token was read."""

    class_traits = Traits(grid_ranks={2}, carries=True, weights=False, resolution_free=False, grid_multiple=4)

    def __init__(self, dim: int, num_heads: int, window_size: int = 4, pool: int = 2):
        super().__init__(dim)
        self.half, self.window_size, self.pool = num_heads // 2, window_size, pool
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def mix(self, x: Tensor, *, valid=None) -> Output:
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        near, far = slice(0, c // 2), slice(c // 2, None)
        exists = torch.ones(b, h, w, dtype=torch.bool) if valid is None else valid
        # global half: keys are block means over tokens that exist
        counts = block_windows(exists[..., None].to(x.dtype), self.pool).sum((3, 4))
        pooled = [
            block_windows(t[..., far] * exists[..., None], self.pool).sum((3, 4)) / counts.clamp(min=1) for t in (k, v)
        ]
        o1, a1 = attention(
            *(split_heads(t, self.half) for t in (q[..., far], *pooled)),
            valid=(counts > 0).flatten(1),
            return_weights=True,
        )
        # local half: windows become batch
        cut = lambda t: block_windows(t, self.window_size)  # noqa: E731
        windows = [cut(t[..., near]) for t in (q, k, v)]
        shape = windows[0].shape
        local_valid = cut(exists[..., None]).reshape(-1, self.window_size**2)
        flat = [split_heads(t.reshape(-1, *shape[3:]), self.half) for t in windows]
        o2, a2 = attention(*flat, valid=local_valid, return_weights=True)
        o2 = unblock_windows(merge_heads(o2).reshape(*shape[:-1], c // 2))
        y = self.proj(torch.cat([o2, merge_heads(o1, (h, w))], -1))
        far_map = a1.mean((1, 2)).reshape(b, h // self.pool, w // self.pool)
        far_map = far_map.repeat_interleave(self.pool, 1).repeat_interleave(self.pool, 2)
        near_map = unblock_windows(a2.mean((1, 2)).reshape(*shape[:-1], 1))[..., 0]
        return Output(y, carry=(far_map + near_map).detach())


class SelfGuided(Mechanism):
    """Tokens sorted by the carried map; the less significant half merges in pairs to make a shorter key sequence."""

    class_traits = Traits(grid_ranks={2}, carries=True, needs_plan=True, gradient="stopped", resolution_free=False)

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim)
        self.num_heads = num_heads
        self.q, self.kv, self.merge = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(2, 1)

    def make_plan(self, x: Tensor, *, carry=None) -> Plan:
        if carry is None:
            raise ValueError("self-guided attention needs carry: the significance map of the hybrid block before it")
        return Plan("significance", {"order": carry.flatten(1).argsort(dim=1, stable=True)}, (("N", carry[0].numel()),))

    def mix(self, x: Tensor, *, valid=None, plan=None, carry=None) -> Output:
        n = x.shape[1] * x.shape[2]
        plan = (self.plan(x, carry=carry) if plan is None else plan).expect("significance", N=n)
        flat = x.flatten(1, 2)
        ordered = flat.gather(1, plan["order"][..., None].expand_as(flat))
        minor, major = ordered[:, : n // 2], ordered[:, n // 2 :]
        merged = self.merge(minor.unflatten(1, (-1, 2)).transpose(-1, -2))[..., 0]
        k, v = self.kv(torch.cat([merged, major], 1)).chunk(2, -1)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), k, v))
        return Output(merge_heads(attention(q, k, v), x.shape[1:-1]))
