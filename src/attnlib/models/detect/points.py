"""From points to voxels: every voxel that holds a point, and features of it that are learned from its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...checks import check_device, check_float, check_int, check_ints, check_rank, check_whole, checked
from ...nn.released import Released, Rule
from ...ops.voxels import numbers


class VoxelGrid(NamedTuple):
    """Where voxels lie: the lowest corner, their sides and how many there are, each along x, y and z.

    >>> VoxelGrid((-76.8, -76.8, -2.0), (0.32, 0.32, 0.1875), (480, 480, 32)).middle
    (-76.64, -76.64, -1.90625)
    """

    low: tuple[float, float, float]
    size: tuple[float, float, float]
    cells: tuple[int, int, int]

    @property
    def middle(self) -> tuple[float, ...]:
        """Of the lowest voxel."""
        return tuple(a + s / 2 for a, s in zip(self.low, self.size, strict=True))


def check_grid(grid: VoxelGrid | Sequence[Sequence[float]]) -> VoxelGrid:
    """``grid`` as :class:`VoxelGrid`, once it is one."""
    parts = list(grid)
    if len(parts) != 3 or any(len(tuple(part)) != 3 for part in parts):
        raise ValueError(f"grid must be low, size and cells, each of x, y and z, got {grid}")
    low, size, cells = (tuple(part) for part in parts)
    if min(size) <= 0:
        raise ValueError(f"grid has sides of voxels {size}; they must be positive")
    check_ints("cells", cells, least=1)
    return VoxelGrid(low, size, cells)  # type: ignore[arg-type]


class _PointLayer(nn.Module):
    """``relu(norm(W x))`` of points and its maximum in every voxel: both together, or at the end the maximum alone."""

    def __init__(self, dim: int, out_dim: int, norm: bool, last: bool):
        super().__init__()
        self.last = last
        out_dim = out_dim if last else out_dim // 2
        self.linear = nn.Linear(dim, out_dim, bias=not norm)
        self.norm = nn.BatchNorm1d(out_dim, eps=1e-3, momentum=0.01) if norm else None

    def forward(self, x: Tensor, voxel: Tensor, count: int) -> Tensor:
        x = self.linear(x)
        if self.norm is not None and len(x):
            x = self.norm(x)
        x = x.relu()
        index = voxel[:, None].expand_as(x)
        largest = x.new_zeros(count, x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)
        return largest if self.last else torch.cat([x, largest[voxel]], 1)


class PointFeatures(nn.Module):
    """Features of voxels from any number of points in each: dynamic voxel encoding, without a limit of either.

    A point is described by its numbers, by how far it is from the mean of the points in its voxel and from the middle
    of the voxel; layers of ``relu(norm(W x))`` follow, each but the last joined with its maximum in the voxel, which is
    what the last gives.

    Args:
        features: numbers of a point beside its place, such as its reflectance.
        grid: a :class:`VoxelGrid`; points outside are left out.
        dims: widths of the layers; all but the last are even.
        norm: BatchNorm in the layers; without it they have a bias.
        absolute: the place of a point is among its numbers.
        distance: the distance of a point from the origin, too.

    Reference: Zhou et al., 2019, arXiv 1910.06528, as the code of He et al., 2024, arXiv 2401.00912 has it.

    >>> grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 4, 2))
    >>> points = torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.7, 0.2, 0.1, 0.0], [3.5, 1.5, 0.5, 0.3], [9.0, 0.0, 0.0, 0.0]])
    >>> x, coords = PointFeatures(1, grid, dims=(8, 8))(points, torch.zeros(4, dtype=torch.long))
    >>> x.shape, coords.tolist()
    (torch.Size([2, 8]), [[0, 0, 0, 0], [0, 0, 1, 3]])
    """

    @checked
    def __init__(
        self,
        features: int,
        grid: VoxelGrid | Sequence[Sequence[float]],
        dims: Sequence[int] = (64, 64),
        norm: bool = True,
        absolute: bool = True,
        distance: bool = False,
    ):
        super().__init__()
        self.features = check_int("features", features, least=0)
        self.grid = check_grid(grid)
        self.absolute, self.distance = absolute, distance
        dims = check_ints("dims", dims, least=1)
        if not dims or any(d % 2 for d in dims[:-1]):
            raise ValueError(f"dims must be widths of which all but the last are even, got {tuple(dims)}")
        widths = [features + (9 if absolute else 6) + distance, *dims]
        self.layers = nn.ModuleList(
            _PointLayer(a, b, norm, last=i == len(dims) - 1)
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )

    def forward(self, points: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """(V, dims[-1]) features and (V, 4) sample, height, row and column of every voxel that holds a point.

        Args:
            points: (P, 3 + features), x, y and z first.
            sample: (P,) whole numbers, which scene of the batch a point belongs to.
        """
        check_float("points", points)
        check_rank("points", points, 2, "(P, 3 + features)")
        check_whole("sample", sample, "an integer tensor")
        check_device(points=points, sample=sample)
        if points.shape[1] != 3 + self.features or tuple(sample.shape) != (len(points),):
            raise ValueError(
                f"points must be (P, {3 + self.features}) and sample (P,), got {tuple(points.shape)} and "
                f"{tuple(sample.shape)}"
            )
        low, size, middle = (points.new_tensor(t) for t in (self.grid.low, self.grid.size, self.grid.middle))
        at = ((points[:, :3] - low) / size).floor()
        there = ((at >= 0) & (at < points.new_tensor(self.grid.cells))).all(1)
        points, at, sample = points[there], at[there], sample[there]
        place = points[:, :3]
        coords = torch.cat([sample[:, None].long(), at.flip(1).long()], 1)
        known, voxel, count = numbers(coords, self.grid.cells[::-1]).unique(return_inverse=True, return_counts=True)
        mean = place.new_zeros(len(known), 3).index_add(0, voxel, place) / count[:, None]
        parts = [points if self.absolute else points[:, 3:], place - mean[voxel], place - (at * size + middle)]
        if self.distance:
            parts.append(place.norm(dim=1, keepdim=True))
        x = torch.cat(parts, 1)
        for layer in self.layers:
            x = layer(x, voxel, len(known))
        return x, coords.new_zeros(len(known), 4).index_copy(0, voxel, coords)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``DynamicVoxelVFE``."""
        theirs = Released(state_dict, "DynamicVoxelVFE")
        held = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
        rules: dict[str, Rule] = {
            r"pfn_layers\.(\d+)\.linear\.(weight|bias)": r"layers.\1.linear.\2",
            rf"pfn_layers\.(\d+)\.norm\.{held}": r"layers.\1.norm.\2",
        }
        return theirs.close(theirs.renamed(rules))


__all__ = ["PointFeatures", "VoxelGrid", "check_grid"]
