"""ScatterFormer: a backbone of voxels whose windows are segments of one sequence (He et al., 2024).

Convolutions on voxels, two stages of scattered linear attention with convolutions that reach across windows, and a pool
of every pillar by attention: from voxels (N, C) of a scene to its map from above. "ScatterFormer: Efficient Voxel
Transformer with Scattered Linear Attention", arXiv 2401.00912. No extension is needed; everything is sums over lists.

The features of voxels that come in, and the detection head on the map, are in
:mod:`attnlib.models.detect.scatterformer_detector`.

Differs from the authors' code: pillars come in the order of their places, and a pillar's query is the one of its own
voxels, also where their pool and their list of pillars are ordered differently; voxels need no order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...checks import check_divides, check_float, check_int, check_ints, check_rank, checked
from ...nn.layers import init_like_torch, merge_heads, split_heads
from ...nn.linear.scatterformer import ScatteredLinearAttention
from ...nn.released import PLAIN, Released, Rule
from ...ops import attention
from ...ops.voxels import (
    check_voxels,
    conv_sites,
    numbers,
    sparse_conv,
    sparse_depthwise,
    window_segments,
)

_CPE = re.compile(r"cpe\.(\d+)\..+")


class Voxels(NamedTuple):
    """Features (N, C), coords (N, 4) of sample, height, row and column, and the sides of the grid."""

    x: Tensor
    coords: Tensor
    shape: tuple[int, ...]


class Norm(nn.BatchNorm1d):
    """BatchNorm of (N, C) voxels with the authors' epsilon and momentum; no voxels stay none."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) else x


class SparseConv(nn.Module):
    """A matrix for each tap, on voxels (N, C) and a table (M, taps) of :func:`attnlib.ops.voxels.conv_sites`."""

    def __init__(self, dim: int, out_dim: int, taps: int, bias: bool = False):
        super().__init__()
        bound = (taps * dim) ** -0.5
        self.weight = nn.Parameter(torch.empty(taps, dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return sparse_conv(x, self.weight, table, self.bias)


class SparseDepthwise(nn.Module):
    """A number for each tap and channel, standard normal at first, as the authors'."""

    def __init__(self, dim: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(taps, dim))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return sparse_depthwise(x, self.weight, table)


class ResidualVoxels(nn.Module):
    """``relu(x + norm(conv(relu(norm(conv(x))))))``, both convolutions on the voxels themselves."""

    def __init__(self, dim: int, taps: int = 27):
        super().__init__()
        self.conv1, self.norm1 = SparseConv(dim, dim, taps, bias=True), Norm(dim)
        self.conv2, self.norm2 = SparseConv(dim, dim, taps, bias=True), Norm(dim)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x, table)).relu()
        return (x + self.norm2(self.conv2(y, table))).relu()


class CrossWindow(nn.Module):
    """Convolutions across windows, then an MLP; the first residual starts from the normed voxels, as released.

    A quarter of the channels passes a 3 x 3 x 3 convolution, a quarter one of ``window + 1`` columns, a quarter one of
    as many rows, all depthwise and on voxels that exist; the last quarter stays as it is.

    Args:
        dim: width; a multiple of 4.
        window_size: of the attention between whose windows they reach.
    """

    def __init__(self, dim: int, window_size: int = 12):
        super().__init__()
        check_divides("4 (quarters)", 4, "dim", dim)
        self.norm, self.norm2 = Norm(dim), Norm(dim)
        self.cube = SparseDepthwise(dim // 4, 27)
        self.columns = SparseDepthwise(dim // 4, window_size + 1)
        self.rows = SparseDepthwise(dim // 4, window_size + 1)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    @staticmethod
    def tables(coords: Tensor, shape: Sequence[int], window_size: int) -> tuple[Tensor, ...]:
        """What the three convolutions read."""
        size = window_size + 1
        return tuple(conv_sites(coords, shape, k).table for k in (3, (1, 1, size), (1, size, 1)))

    def forward(self, x: Tensor, tables: Sequence[Tensor]) -> Tensor:
        x = self.norm(x)
        *parts, rest = x.chunk(4, -1)
        convs = (self.cube, self.columns, self.rows)
        moved = [conv(part, table) for conv, part, table in zip(convs, parts, tables, strict=True)]
        x = x + torch.cat([*moved, rest], -1)
        return x + self.fc2(self.fc1(self.norm2(x)).relu())


class ScatterStage(nn.Module):
    """Layers of scattered linear attention and convolutions across windows, and a norm.

    Args:
        dim: width.
        num_heads: heads.
        depth: layers.
        window_size: sides of windows, an even number; heights are not cut.
    """

    @checked
    def __init__(self, dim: int, num_heads: int = 4, depth: int = 3, window_size: int = 12):
        super().__init__()
        check_int("depth", depth, least=1)
        check_int("window_size", window_size, least=2)
        check_divides("2 (convolutions of window_size + 1 have a middle)", 2, "window_size", window_size)
        self.window_size = window_size
        self.norms = nn.ModuleList(Norm(dim) for _ in range(depth))
        self.mixers = nn.ModuleList(ScatteredLinearAttention(dim, num_heads, window_size) for _ in range(depth))
        self.across = nn.ModuleList(CrossWindow(dim, window_size) for _ in range(depth))
        self.norm = Norm(dim)

    def forward(self, voxels: Voxels) -> Voxels:
        """The voxels in the order of their windows, their features mixed."""
        order, bounds = window_segments(voxels.coords, voxels.shape, self.window_size)
        x, coords = voxels.x[order], voxels.coords[order]
        tables = CrossWindow.tables(coords, voxels.shape, self.window_size)
        for norm, mixer, across in zip(self.norms, self.mixers, self.across, strict=True):
            x = x + mixer.packed(norm(x), bounds)  # type: ignore[operator]
            x = across(x, tables)
        return Voxels(self.norm(x), coords, voxels.shape)


class PillarPool(nn.Module):
    """Each pillar's largest features read its voxels, whose keys know their height: ``LN(q + attention(q, k, v))``.

    Args:
        dim: width.
        height: places in a pillar.
        num_heads: heads.
    """

    def __init__(self, dim: int, height: int, num_heads: int = 8):
        super().__init__()
        self.height = check_int("height", height, least=1)
        self.positions = nn.Parameter(0.01 * torch.randn(height, dim))
        check_divides("num_heads", num_heads, "dim", dim)
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm = nn.LayerNorm(dim)
        init_like_torch(dim, self.q, self.k, self.v)
        nn.init.zeros_(self.proj.bias)

    def forward(self, voxels: Voxels) -> Voxels:
        """(P, C) pillars and their places (P, 3) of sample, row and column, in row-major order."""
        x, coords, shape = voxels
        if shape[0] > self.height:
            raise ValueError(f"voxels have {shape[0]} heights, more than height={self.height} of the pool")
        flat = coords[:, [0, 2, 3]]
        _, pillar = numbers(flat, shape[1:]).unique(return_inverse=True)
        count = int(pillar.max()) + 1 if len(x) else 0
        places = flat.new_zeros(count, 3).index_copy(0, pillar, flat)
        index = pillar * self.height + coords[:, 1].long()
        keys = x.new_zeros(count * self.height, x.shape[1]).index_copy(0, index, x).unflatten(0, (count, self.height))
        there = torch.zeros(count * self.height, dtype=torch.bool, device=x.device)
        there = there.index_fill(0, index, True).unflatten(0, (count, self.height))
        query = keys.masked_fill(~there.unsqueeze(-1), float("-inf")).amax(1)
        q, k, v = self.q(query[:, None]), self.k(keys + self.positions), self.v(keys)
        out = attention(*(split_heads(t, self.num_heads) for t in (q, k, v)), valid=there)
        return Voxels(self.norm(query + self.proj(merge_heads(out)[:, 0])), places, shape[1:])


class ScatterFormer(nn.Module):
    """From the voxels of a batch of scenes to features of their pillars, and a map of these.

    Args:
        in_dim: features of the voxels that come in.
        shape: heights, rows and columns of the grid.
        dim: width.
        num_heads: heads.
        depth: layers of each of the two stages.
        window_size: sides of windows, in voxels, an even number.
        stem_blocks: residual blocks before them.
        pool_heads: heads of the pool.

    Reference: He et al., 2024, arXiv 2401.00912.

    >>> model = ScatterFormer(in_dim=3, shape=(9, 8, 8), dim=16, num_heads=2, depth=1, window_size=4, pool_heads=2)
    >>> coords = torch.tensor([[0, 0, 1, 1], [0, 5, 1, 2], [0, 8, 7, 7]])
    >>> model.map(*model.eval()(torch.randn(3, 3), coords), batch=1).shape
    torch.Size([1, 4, 4, 16])
    """

    @checked
    def __init__(
        self,
        in_dim: int = 128,
        shape: Sequence[int] = (33, 480, 480),
        dim: int = 128,
        num_heads: int = 4,
        depth: int = 3,
        window_size: int = 12,
        stem_blocks: int = 3,
        pool_heads: int = 8,
    ):
        super().__init__()
        check_int("in_dim", in_dim, least=1)
        check_int("stem_blocks", stem_blocks, least=0)
        self.shape = check_ints("shape", shape, least=1)
        if len(self.shape) != 3 or self.shape[0] < 3:
            raise ValueError(f"shape must be at least 3 heights, rows and columns, got {tuple(shape)}")
        self.in_dim, self.dim = in_dim, dim
        self.stem, self.stem_norm = SparseConv(in_dim, dim, 27), Norm(dim)
        self.stem_blocks = nn.ModuleList(ResidualVoxels(dim) for _ in range(stem_blocks))
        self.flatten, self.flatten_norm = SparseConv(dim, dim, 3), Norm(dim)
        self.stage1 = ScatterStage(dim, num_heads, depth, window_size)
        self.down = SparseConv(dim, dim, 27)
        self.stage2 = ScatterStage(dim, num_heads, depth, window_size)
        middle = (self.shape[0] - 3) // 2 + 1
        self.pool = PillarPool(dim, max((middle - 1) // 2 + 1, self.shape[0] // 4), pool_heads)

    def forward(self, x: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        """(P, dim) features of pillars and (P, 3) their sample, row and column, at half of the rows and columns.

        Args:
            x: (N, in_dim) features of voxels.
            coords: (N, 4) their sample, height, row and column; each place at most once, in any order.
        """
        check_float("x", x)
        check_rank("x", x, 2, "(N, in_dim)")
        check_voxels(coords, self.shape)
        if tuple(x.shape) != (len(coords), self.in_dim):
            raise ValueError(f"x must be (N, in_dim)={(len(coords), self.in_dim)}, got {tuple(x.shape)}")
        table = conv_sites(coords, self.shape, 3).table
        x = self.stem_norm(self.stem(x, table)).relu()
        for block in self.stem_blocks:
            x = block(x, table)
        low = conv_sites(coords, self.shape, (3, 1, 1), (2, 1, 1), 0)
        x = self.flatten_norm(self.flatten(x, low.table)).relu()
        voxels = self.stage1(Voxels(x, low.coords, low.shape))
        small = conv_sites(voxels.coords, voxels.shape, 3, 2, 1)
        voxels = self.stage2(Voxels(self.down(voxels.x, small.table), small.coords, small.shape))
        pillars = self.pool(voxels)
        return pillars.x, pillars.coords

    def map(self, x: Tensor, places: Tensor, batch: int) -> Tensor:
        """(batch, rows, columns, dim) map of what :meth:`forward` gave, zeros where no pillar stands."""
        sides = [(n - 1) // 2 + 1 for n in self.shape[1:]]
        out = x.new_zeros(check_int("batch", batch, least=1) * math.prod(sides), x.shape[1])
        return out.index_copy(0, numbers(places, sides), x).view(batch, *sides, -1)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``ScatterFormer``, with the weights of spconv's second version."""
        theirs = Released(state_dict, "ScatterFormer")
        held = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

        def taps(to: str) -> Rule:
            """(out, *kernel, in) to (taps, in, out); vectors as they are."""
            return lambda m, t: {m.expand(to): t.flatten(1, -2).permute(1, 2, 0) if t.dim() > 1 else t}

        def depthwise(to: str) -> Rule:
            return lambda m, t: {m.expand(to): t.flatten(0, -2)}

        last = max((int(m[1]) for m in map(_CPE.fullmatch, theirs) if m), default=4)
        rules: dict[str, Rule] = {
            r"cpe\.0\.0\.(weight)": taps(r"stem.\1"),
            rf"cpe\.0\.1\.{held}": r"stem_norm.\1",
            rf"cpe\.{last}\.0\.(weight)": taps(r"flatten.\1"),
            rf"cpe\.{last}\.1\.{held}": r"flatten_norm.\1",
            r"stage1\.2\.(weight)": taps(r"down.\1"),
            rf"(stage\d)\.1\.{held}": r"\1.norm.\2",
            rf"(stage\d)\.0\.norm_layers\.(\d+)\.{held}": r"\1.norms.\2.\3",
            rf"(stage\d)\.0\.cffn_layers\.(\d+)\.bn(2?)\.{held}": r"\1.across.\2.norm\3.\4",
            r"(stage\d)\.0\.cffn_layers\.(\d+)\.(fc[12])\.(weight|bias)": r"\1.across.\2.\3.\4",
            r"app\.pos_embedding\.weight": "pool.positions",
            r"app\.norm\.(weight|bias)": r"pool.norm.\1",
        }
        for name, ours in (("k", "cube"), ("h", "columns"), ("w", "rows")):
            to = rf"\1.across.\2.{ours}.weight"
            rules[rf"(stage\d)\.0\.cffn_layers\.(\d+)\.conv_{name}\.weight"] = depthwise(to)
        for i in range(1, last):
            for n in (1, 2):
                rules[rf"cpe\.{i}\.conv{n}\.(weight|bias)"] = taps(rf"stem_blocks.{i - 1}.conv{n}.\1")
                rules[rf"cpe\.{i}\.bn{n}\.{held}"] = rf"stem_blocks.{i - 1}.norm{n}.\1"
        linear: Any = ScatteredLinearAttention.convert_state_dict
        out = theirs.parts(r"(stage\d)\.0\.attn_layers\.(\d+)\.(.+)", r"\1.mixers.\2", linear)
        out |= theirs.parts(r"app\.self_attn\.(.+)", "pool", lambda held: Released(held, "the pool").renamed(PLAIN))
        return theirs.close(out | theirs.renamed(rules))


__all__ = ["CrossWindow", "PillarPool", "ScatterFormer", "ScatterStage", "SparseConv", "SparseDepthwise", "Voxels"]
