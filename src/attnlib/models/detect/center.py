"""Objects as points of a map from above: a network on the map, a head that reads boxes at middles, its losses.

"Center-based 3D Object Detection and Tracking" (Yin et al., 2021, arXiv 2006.11275), in the form in which the detector
of ScatterFormer has it; the network is a cascade of small encoders and decoders (Zhang et al., 2024, arXiv 2401.03907).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_float, check_int, check_ints, check_rank, check_real, check_whole, checked
from ...nn.layers import ConvNorm, MapNorm
from ...nn.released import Released, Rule
from .points import VoxelGrid, check_grid
from .turned import check_turned, distance_overlap, overlap_in_space, suppress

_NORM: dict[str, Any] = dict(eps=1e-3, momentum=0.01)
_HELD = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


class ResidualMap(nn.Module):
    """``relu(short(x) + norm(conv(relu(norm(conv(x))))))`` of (B, H, W, C), the first with a stride.

    Args:
        dim: channels in.
        out_dim: channels out.
        stride: of the first convolution.
        project: the way past the convolutions is one of 1 x 1, with a norm.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 1, project: bool = False):
        super().__init__()
        if not project and (stride != 1 or dim != out_dim):
            raise ValueError(f"project=False needs stride=1 and equal widths, got {stride}, {dim} and {out_dim}")
        self.conv1 = ConvNorm(dim, out_dim, 3, stride, activation=nn.ReLU, **_NORM)
        self.conv2 = ConvNorm(out_dim, out_dim, 3, **_NORM)
        self.short = ConvNorm(dim, out_dim, 1, stride, **_NORM) if project else None
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + (x if self.short is None else self.short(x))).relu()


class EncoderDecoder(nn.Module):
    """Residual blocks at sides that shrink, and back up: ``norm(up(x) + what stood there)`` at every side.

    Args:
        in_dim: channels in.
        dim: width.
        blocks: residual blocks of each level, beside the one that makes it smaller.
        strides: of the levels; the first only counts where ``in_dim`` is not ``dim``.
    """

    def __init__(self, in_dim: int, dim: int, blocks: Sequence[int] = (2, 1, 1), strides: Sequence[int] = (1, 2, 2)):
        super().__init__()
        blocks, strides = check_ints("blocks", blocks, least=0), check_ints("strides", strides, least=1)
        if len(blocks) != len(strides) or not blocks:
            raise ValueError(f"blocks and strides must be of the same levels, got {blocks} and {strides}")
        self.levels = nn.ModuleList()
        for level, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            width = dim if level else in_dim
            first = [ResidualMap(width, dim, stride, project=True)] if level or in_dim != dim else []
            self.levels.append(nn.Sequential(*first, *(ResidualMap(dim, dim) for _ in range(count))))
        ups = strides[:0:-1]
        self.ups = nn.ModuleList(nn.ConvTranspose2d(dim, dim, s, s, bias=False) for s in ups)
        self.up_norms = nn.ModuleList(MapNorm(dim, **_NORM) for _ in ups)
        self.norms = nn.ModuleList(MapNorm(dim, **_NORM) for _ in ups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_dim) -> (B, H, W, dim) at the side of the first level; sides that no stride divides are cut."""
        seen = []
        for level in self.levels:
            x = level(x)
            seen.append(x)
        ways = zip(self.ups, self.up_norms, self.norms, seen[-2::-1], strict=True)
        for up, up_norm, norm, there in ways:
            x = up(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, : there.shape[1], : there.shape[2]]
            x = norm(up_norm(x).relu() + there)
        return x


class MapCascade(nn.Module):
    """:class:`EncoderDecoder` after another, on (B, H, W, in_dim).

    Args:
        in_dim: channels in.
        dim: width.
        depth: how many.
        blocks: of each.
        strides: of each.

    >>> MapCascade(8, 8, depth=1)(torch.randn(1, 6, 5, 8)).shape
    torch.Size([1, 6, 5, 8])
    """

    @checked
    def __init__(
        self,
        in_dim: int = 128,
        dim: int = 128,
        depth: int = 4,
        blocks: Sequence[int] = (2, 1, 1),
        strides: Sequence[int] = (1, 2, 2),
    ):
        super().__init__()
        check_int("depth", depth, least=1)
        self.layers = nn.Sequential(*(EncoderDecoder(dim if i else in_dim, dim, blocks, strides) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        check_float("x", x)
        check_rank("x", x, 4, "(B, H, W, C)")
        return self.layers(x)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``CascadeDEDBackbone``."""
        theirs = Released(state_dict, "CascadeDEDBackbone")
        block, ours = r"layers\.(\d+)\.encoder\.(\d+)\.(\d+)", r"layers.\1.levels.\2.\3"
        rules: dict[str, Rule] = {
            block + r"\.conv([12])\.weight": ours + r".conv\4.conv.weight",
            block + rf"\.bn([12])\.{_HELD}": ours + r".conv\4.norm.\5",
            block + r"\.downsample_layer\.0\.weight": ours + r".short.conv.weight",
            block + rf"\.downsample_layer\.1\.{_HELD}": ours + r".short.norm.\4",
            r"layers\.(\d+)\.decoder\.(\d+)\.0\.weight": r"layers.\1.ups.\2.weight",
            rf"layers\.(\d+)\.decoder\.(\d+)\.1\.{_HELD}": r"layers.\1.up_norms.\2.norm.\3",
            rf"layers\.(\d+)\.decoder_norm\.(\d+)\.{_HELD}": r"layers.\1.norms.\2.norm.\3",
        }
        return theirs.close(theirs.renamed(rules))


class Objects(NamedTuple):
    """What stands in a scene: boxes (n, 7) of :mod:`attnlib.models.detect.turned`, labels (n,), scores (n,)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None


def gaussian_radius(length: Tensor, width: Tensor, overlap: float = 0.1) -> Tensor:
    """How far a middle may be off before a box of these sides overlaps the true one by less than ``overlap``.

    The least of three roots, as released: those of the boxes that lie inside and around are not divided by twice their
    leading coefficient.
    """
    check_real("overlap", overlap, above=0, below=1)
    both, area = length + width, length * width
    shifted = (both + (both.square() - 4 * area * (1 - overlap) / (1 + overlap)).sqrt()) / 2
    inside = (2 * both + (4 * both.square() - 16 * area * (1 - overlap)).sqrt()) / 2
    around = (-2 * overlap * both + (4 * (overlap * both).square() + 16 * overlap * (1 - overlap) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(shifted, inside), around)


class CenterHead(nn.Module):
    """A map of where middles of each kind are, and maps of what a box with its middle there is like.

    ``heatmap`` (B, H, W, classes) are logits; ``center`` where in the cell, along x and y; ``height`` of the middle;
    ``size`` logarithms of the sides; ``heading`` its cosine and sine; ``iou`` the overlap that the box will have, -1
    to 1.

    Args:
        dim: channels of the map.
        grid: the voxels' :class:`VoxelGrid`.
        classes: kinds of objects.
        stride: voxels per cell of the map.
        hidden: width of the branches.
        depth: convolutions of a branch.
        iou: a branch for the overlap.
        rectify: exponents ``e`` of each kind with which scores become ``score^(1 - e) overlap^e``; needs ``iou``.
        thresholds: overlaps of each kind from above beyond which the worse of two boxes goes.
        score_threshold: boxes with less are left out, before scores are rectified.
        limits: lowest and highest x, y and z of middles that are kept; ``None``: any.
        most: boxes of a scene.
        weight: of the losses of boxes against that of the map.

    Reference: Yin et al., 2021, arXiv 2006.11275.

    >>> head = CenterHead(8, VoxelGrid((0, 0, 0), (1, 1, 1), (8, 8, 4)), classes=2, hidden=8)
    >>> {name: tuple(x.shape[1:]) for name, x in head(torch.randn(1, 4, 4, 8)).items()}["size"]
    (4, 4, 3)
    """

    @checked
    def __init__(
        self,
        dim: int,
        grid: VoxelGrid | Sequence[Sequence[float]],
        classes: int = 3,
        stride: int = 2,
        hidden: int = 64,
        depth: int = 2,
        iou: bool = True,
        rectify: Sequence[float] | None = None,
        thresholds: Sequence[float] | None = None,
        score_threshold: float = 0.1,
        limits: Sequence[Sequence[float]] | None = None,
        most: int = 500,
        weight: float = 2.0,
    ):
        super().__init__()
        for name, value in dict(classes=classes, stride=stride, hidden=hidden, depth=depth, most=most).items():
            check_int(name, value, least=1)
        check_real("score_threshold", score_threshold, least=0, most=1)
        check_real("weight", weight, least=0)
        for name, values in dict(rectify=rectify, thresholds=thresholds).items():
            if values is not None and (len(values) != classes or min(values) < 0 or max(values) > 1):
                raise ValueError(f"{name} must be classes={classes} numbers of 0 to 1, got {tuple(values)}")
        if rectify is not None and not iou:
            raise ValueError("rectify needs iou=True: it is by the overlap that a branch foretells")
        self.grid, self.stride, self.classes, self.most, self.weight = check_grid(grid), stride, classes, most, weight
        self.rectify, self.thresholds, self.score_threshold = rectify, thresholds, score_threshold
        self.limits = limits
        self.shared = ConvNorm(dim, hidden, 3, activation=nn.ReLU, **_NORM)
        widths = {"center": 2, "height": 1, "size": 3, "heading": 2} | ({"iou": 1} if iou else {})
        widths["heatmap"] = classes
        self.branches = nn.ModuleDict()
        for name, width in widths.items():
            inner = [ConvNorm(hidden, hidden, 3, activation=nn.ReLU, **_NORM) for _ in range(depth - 1)]
            self.branches[name] = nn.Sequential(*inner, ConvNorm(hidden, width, 3, bias=True, norm=False))
            for part in self.branches[name].modules():
                if isinstance(part, nn.Conv2d) and name != "heatmap":
                    nn.init.kaiming_normal_(part.weight)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)
        nn.init.constant_(self.branches["heatmap"][-1].conv.bias, -2.19)  # type: ignore[index]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """From (B, H, W, dim), rows along y and columns along x, the maps (B, H, W, width) by name."""
        check_float("x", x)
        check_rank("x", x, 4, "(B, H, W, C)")
        x = self.shared(x)
        return {name: branch(x) for name, branch in self.branches.items()}

    def _boxes(self, maps: Mapping[str, Tensor], sample: Tensor, cell: Tensor) -> Tensor:
        """(n, 7) boxes whose middles lie in cells, numbered row by row."""
        side = maps["center"].shape[2]
        picked = {name: x.flatten(1, 2)[sample, cell] for name, x in maps.items() if name != "heatmap"}
        at = torch.stack([cell % side, cell // side], -1) + picked["center"]
        step, low = at.new_tensor(self.grid.size[:2]) * self.stride, at.new_tensor(self.grid.low[:2])
        heading = torch.atan2(picked["heading"][:, 1:], picked["heading"][:, :1])
        return torch.cat([at * step + low, picked["height"], picked["size"].exp(), heading], -1)

    @torch.no_grad()
    def objects(self, maps: Mapping[str, Tensor]) -> list[Objects]:
        """The best boxes of every scene, best first within a kind, doubles of a kind suppressed.

        Args:
            maps: what :meth:`forward` gave.
        """
        heat = maps["heatmap"].sigmoid().flatten(1, 2).mT  # (B, classes, cells)
        cells = heat.shape[-1]
        scores, index = heat.flatten(1).topk(min(self.most, heat.flatten(1).shape[1]))
        found = []
        for i in range(len(heat)):
            labels, cell = index[i] // cells, index[i] % cells
            boxes = self._boxes(maps, torch.full_like(cell, i), cell)
            keep = scores[i] > self.score_threshold
            if self.limits is not None:
                low, high = (boxes.new_tensor(limit) for limit in self.limits)
                keep = keep & ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(1)
            boxes, labels, cell, score = boxes[keep], labels[keep], cell[keep], scores[i][keep]
            if self.rectify is not None:
                power = boxes.new_tensor(self.rectify)[labels.long()]
                overlap = ((maps["iou"].flatten(1, 2)[i, cell, 0] + 1) / 2).clamp(0, 1)
                score = score ** (1 - power) * overlap**power
            if self.thresholds is not None:
                kept = []
                for kind, threshold in enumerate(self.thresholds):
                    own = (labels == kind).nonzero().squeeze(1)
                    kept.append(own[suppress(boxes[own], score[own], threshold)])
                order = torch.cat(kept)
                boxes, labels, score = boxes[order], labels[order], score[order]
            found.append(Objects(boxes, labels, score))
        return found

    def targets(self, scene: Objects, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The map (H, W, classes) a scene asks for, the cells (n,) of its middles, and what boxes are (n, 8) there.

        A middle outside the map counts in the nearest cell of the border. Around a middle the map falls off as a
        Gaussian of deviation ``(2 r + 1) / 6`` within ``r`` cells, at least two.

        Args:
            scene: boxes with sides above 0, and their labels.
            size: rows and columns of the map.
        """
        check_turned("boxes", scene.boxes)
        check_whole("labels", scene.labels, "an integer tensor")
        boxes, labels = scene.boxes[: self.most], scene.labels[: self.most]
        if len(labels) != len(boxes) or (
            len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes
        ):
            raise ValueError(f"labels must be (n,)={(len(boxes),)} of 0 to {self.classes - 1}, got {labels.tolist()}")
        if len(boxes) and float(boxes[:, 3:6].min()) <= 0:
            raise ValueError("boxes must have sides above 0")
        rows, columns = check_ints("size", size, least=1)
        step, low = boxes.new_tensor(self.grid.size[:2]) * self.stride, boxes.new_tensor(self.grid.low[:2])
        most = boxes.new_tensor([columns - 0.5, rows - 0.5])
        middle = ((boxes[:, :2] - low) / step).clamp(min=0).minimum(most)
        cell = middle.long()
        sides = boxes[:, 3:5] / step
        radius = gaussian_radius(sides[:, 0], sides[:, 1]).long().clamp(min=2)
        heat = boxes.new_zeros(self.classes, rows, columns)
        for (x, y), r, label in zip(cell.tolist(), radius.tolist(), labels.tolist(), strict=True):
            top, left = max(y - r, 0), max(x - r, 0)
            area = heat[label, top : y + r + 1, left : x + r + 1]
            down = torch.arange(top, top + area.shape[0], device=heat.device) - y
            along = torch.arange(left, left + area.shape[1], device=heat.device) - x
            squared = down.square()[:, None] + along.square()
            area.copy_(torch.maximum(area, (-squared * 18 / (2 * r + 1) ** 2).to(heat.dtype).exp()))
        heading = boxes[:, 6:]
        asked = torch.cat([middle - cell, boxes[:, 2:3], boxes[:, 3:6].log(), heading.cos(), heading.sin()], 1)
        return heat.permute(1, 2, 0), cell[:, 1] * columns + cell[:, 0], asked

    def losses(self, maps: Mapping[str, Tensor], scenes: Sequence[Objects]) -> dict[str, Tensor]:
        """``heatmap``, ``boxes``, ``overlap`` and, with the branch, ``iou``; their sum trains.

        The focal loss of the map, the absolute differences of boxes at middles, one less
        :func:`attnlib.models.detect.turned.distance_overlap`, and the absolute difference of the foretold overlap;
        each a mean over objects, the boxes' times ``weight``.

        Args:
            maps: what :meth:`forward` gave.
            scenes: what stands in each scene.
        """
        if len(scenes) != len(maps["center"]):
            raise ValueError(f"scenes must be one for each of {len(maps['center'])} maps, got {len(scenes)}")
        heats, cells, asked = zip(*(self.targets(s, maps["center"].shape[1:3]) for s in scenes), strict=True)
        heat, cell, wanted = torch.stack(heats), torch.cat(cells), torch.cat(asked)
        sample = torch.repeat_interleave(
            torch.arange(len(cells), device=cell.device), torch.tensor([len(c) for c in cells], device=cell.device)
        )
        chance = maps["heatmap"].sigmoid().clamp(1e-4, 1 - 1e-4)
        there = heat == 1
        right = (chance.log() * (1 - chance).square()).where(there, 0).sum()
        wrong = ((1 - chance).log() * chance.square() * (1 - heat) ** 4).where(~there, 0).sum()
        out = {"heatmap": -(right + wrong) / there.sum().clamp(min=1)}
        count = max(len(cell), 1)
        names = ("center", "height", "size", "heading")
        given = torch.cat([maps[name].flatten(1, 2)[sample, cell] for name in names], -1)
        out["boxes"] = self.weight * (given - wanted).abs().sum() / count
        boxes = self._boxes(maps, sample, cell)
        truth = torch.cat([s.boxes[: self.most] for s in scenes])
        out["overlap"] = self.weight * (1 - distance_overlap(boxes, truth)).sum() / count
        if "iou" in maps:
            foretold = maps["iou"].flatten(1, 2)[sample, cell, 0]
            overlap = overlap_in_space(boxes.detach(), truth)
            out["iou"] = F.l1_loss(foretold, 2 * overlap - 1, reduction="sum") / count
        return out

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``CenterHead`` with one group of kinds; branches it has no losses for are refused."""
        theirs = Released(state_dict, "CenterHead")
        rules: dict[str, Rule] = {
            r"shared_conv\.0\.weight": "shared.conv.weight",
            rf"shared_conv\.1\.{_HELD}": r"shared.norm.\1",
        }
        names = dict(center="center", center_z="height", dim="size", rot="heading", iou="iou", hm="heatmap")
        for name, ours in names.items():
            rules |= {
                rf"heads_list\.0\.{name}\.(\d+)\.0\.weight": rf"branches.{ours}.\1.conv.weight",
                rf"heads_list\.0\.{name}\.(\d+)\.1\.{_HELD}": rf"branches.{ours}.\1.norm.\2",
                rf"heads_list\.0\.{name}\.(\d+)\.(weight|bias)": rf"branches.{ours}.\1.conv.\2",
            }
        return theirs.close(theirs.renamed(rules))


__all__ = ["CenterHead", "EncoderDecoder", "MapCascade", "Objects", "ResidualMap", "gaussian_radius"]
