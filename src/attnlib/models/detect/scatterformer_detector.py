"""ScatterFormer's detector (He et al., 2024): from the points of scenes to boxes, every part without an extension.

Voxels with features learned from their points, :class:`~attnlib.models.detect.scatterformer.ScatterFormer` on them, a
cascade of encoders and decoders on its map from above, and a head that reads boxes at their middles. The configuration
for Waymo; that for nuScenes has the head of TransFusion, which is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import checked
from ...nn.released import Released
from .center import CenterHead, MapCascade, Objects
from .points import PointFeatures, VoxelGrid, check_grid
from .scatterformer import ScatterFormer

#: Waymo's scenes: 153.6 m by 153.6 m by 6 m.
WAYMO = VoxelGrid((-76.8, -76.8, -2.0), (0.32, 0.32, 0.1875), (480, 480, 32))


class ScatterFormerDetector(nn.Module):
    """From points to maps, losses and boxes of vehicles, pedestrians and cyclists.

    Args:
        grid: a :class:`~attnlib.models.detect.points.VoxelGrid`.
        features: numbers of a point beside its place: intensity and elongation.
        classes: kinds of objects.
        dim: width of the voxels and the map.
        point_dims: widths of the layers on points.
        backbone: further settings of the backbone.
        cascade: further settings of :class:`~attnlib.models.detect.center.MapCascade`.
        head: further settings of :class:`~attnlib.models.detect.center.CenterHead`; by default how scores are
            rectified and doubles suppressed is as released for three kinds, and neither is done for another number.

    Reference: He et al., 2024, arXiv 2401.00912.

    >>> import torch
    >>> grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (8, 8, 8))
    >>> small = dict(depth=1, num_heads=2, window_size=4, pool_heads=2)
    >>> model = ScatterFormerDetector(grid, 0, dim=16, point_dims=(8, 8), backbone=small, cascade=dict(depth=1)).eval()
    >>> model(8 * torch.rand(20, 3), torch.zeros(20, dtype=torch.long), batch=1)["heatmap"].shape
    torch.Size([1, 4, 4, 3])
    """

    @checked
    def __init__(
        self,
        grid: VoxelGrid | Sequence[Sequence[float]] = WAYMO,
        features: int = 2,
        classes: int = 3,
        dim: int = 128,
        point_dims: Sequence[int] = (64, 64),
        backbone: Mapping[str, Any] | None = None,
        cascade: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        grid = check_grid(grid)
        columns, rows, heights = grid.cells
        released: dict[str, Any] = {"limits": ((-80.0, -80.0, -10.0), (80.0, 80.0, 10.0))}
        if classes == 3:
            released |= {"rectify": (0.68, 0.71, 0.65), "thresholds": (0.75, 0.6, 0.55)}
        self.points = PointFeatures(features, grid, point_dims)
        self.backbone = ScatterFormer(point_dims[-1], (heights + 1, rows, columns), dim, **(backbone or {}))
        self.cascade = MapCascade(dim, dim, **(cascade or {}))
        self.head = CenterHead(dim, grid, classes, **{**released, **(head or {})})

    def forward(self, points: Tensor, sample: Tensor, batch: int) -> dict[str, Tensor]:
        """The head's maps (batch, rows / 2, columns / 2, width) by name.

        Args:
            points: (P, 3 + features), x, y and z first.
            sample: (P,) which scene a point belongs to.
            batch: scenes, those without points included.
        """
        if len(sample) and int(sample.max()) >= batch:
            raise ValueError(f"sample goes up to {int(sample.max())}, batch={batch} scenes were announced")
        pillars, places = self.backbone(*self.points(points, sample))
        return self.head(self.cascade(self.backbone.map(pillars, places, batch)))

    def objects(self, points: Tensor, sample: Tensor, batch: int) -> list[Objects]:
        """The boxes found in every scene."""
        return self.head.objects(self(points, sample, batch))

    def losses(self, points: Tensor, sample: Tensor, scenes: Sequence[Objects]) -> dict[str, Tensor]:
        """What training adds up, for scenes whose objects are known; see :meth:`CenterHead.losses`."""
        return self.head.losses(self(points, sample, len(scenes)), scenes)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``CenterPoint`` of ``waymo_models/scatterformer.yaml``."""
        theirs = Released(state_dict, "the authors' CenterPoint with ScatterFormer")
        theirs.leave("global_step", because="a count of training steps")
        out = theirs.parts(r"(vfe)\.(.+)", "points", PointFeatures.convert_state_dict)
        out |= theirs.parts(r"(backbone_3d)\.(.+)", "backbone", ScatterFormer.convert_state_dict)
        out |= theirs.parts(r"(backbone_2d)\.(.+)", "cascade", MapCascade.convert_state_dict)
        out |= theirs.parts(r"(dense_head)\.(.+)", "head", CenterHead.convert_state_dict)
        return theirs.close(out)


__all__ = ["WAYMO", "ScatterFormerDetector"]
