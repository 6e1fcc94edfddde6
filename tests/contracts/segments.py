"""ScatterFormer, He et al. 2024 (2401.00912): linear attention inside windows of sparse voxels, no padding."""

import torch
from torch import Tensor, nn

from attnlib.nn.base import Mechanism
from attnlib.nn.layers import zero_invalid
from attnlib.types import Plan, Traits


def window_plan(coords: Tensor, window: int) -> Plan:
    """Segments of voxels (B, N, 3) by pillar window: the plan is made from coordinates, not from features."""
    cell = coords[..., :2] // window
    sample = torch.arange(coords.shape[0]).view(-1, 1, 1).expand(*cell.shape[:2], 1)
    _, ids = torch.unique(torch.cat([sample, cell], -1).flatten(0, 1), dim=0, return_inverse=True)
    count = torch.tensor(int(ids.max()) + 1 if ids.numel() else 0)
    return Plan("segments", {"ids": ids.view(cell.shape[:2]), "count": count}, (("N", coords.shape[1]),))


class ScatteredLinear(Mechanism):
    class_traits = Traits(work={"N": 1}, memory={"N": 1}, needs_plan=True, permutation_equivariant=False)

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim)
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def mix(self, x: Tensor, *, valid=None, plan=None) -> Tensor:
        if plan is None:
            raise ValueError(
                "scattered attention needs plan: the window of each voxel, from window_plan(coords, window)"
            )
        ids = plan.expect("segments", N=x.shape[1])["ids"].flatten()
        q, k, v = (t.flatten(0, 1).unflatten(-1, (self.num_heads, -1)) for t in self.qkv(x).chunk(3, -1))
        q, k = q.relu(), zero_invalid(k.relu().unflatten(0, x.shape[:2]).flatten(2), valid).flatten(0, 1).view_as(k)
        n, d = int(plan["count"]), q.shape[-1]
        s = q.new_zeros(n, self.num_heads, d, d).index_add(0, ids, k[..., :, None] * v[..., None, :])
        z = q.new_zeros(n, self.num_heads, d).index_add(0, ids, k)
        out = torch.einsum("nhd,nhde->nhe", q, s[ids]) / ((q * z[ids]).sum(-1, keepdim=True) + 1e-6)
        return self.proj(out.flatten(1).view_as(x))
