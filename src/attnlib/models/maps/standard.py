"""Standard-definition maps as a prior for features seen from above (bird's-eye view, BEV).

A coarse map of roads comes in two forms. As a raster, one channel per class of road, a small CNN encodes it, and it is
added to the BEV features or merged with them by a 1 x 1 convolution. As polylines, every road is resampled to P points,
each point is encoded by sines, a small transformer over the points of a road and the roads of a map makes one token of
each, and BEV queries read them in a residual cross-attention, ``q <- q + MHA(LN q, u)``.

Coordinates are in metres in the vehicle's frame, x to the front and y to the left, within ``reach``; rows of a BEV map
run from the front to the back, columns from left to right.

Reference: Zhang et al., 2024, "Enhancing Online Road Network Perception and Reasoning with Standard Definition Maps",
arXiv 2408.01471. The project page names the two forms and TopoNet as host; no code was released: the modules are our
reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_real,
    check_valid,
    check_whole,
    readable,
)
from ...nn.dense.softmax_attention import SoftmaxAttention
from ..blocks import Block
from ..protocol import TaskModel, Terms

#: Classes of OpenStreetMap's roads, the widest first.
ROADS = ("motorway", "main", "residential", "service", "pedestrian")


#: Of sines, by default.
FREQUENCIES = 6


class Roads(NamedTuple):
    """Roads of a batch of maps: points (B, E, P, 2) in metres, class (B, E), and which exist, (B, E)."""

    points: Tensor
    kind: Tensor
    valid: Tensor


def resample(line: Tensor, points: int) -> Tensor:
    """A polyline (N, 2) as ``points`` points at equal distances along it, both ends among them.

    >>> resample(torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]]), 5)[:, 0].tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    check_axes("line", line, N=None, **{"x, y": 2})
    check_float("line", line)
    check_int("points", points, least=2)
    if len(line) < 2:
        raise ValueError(f"line must have two points at least, got {len(line)}")
    if readable(line) and not bool(line.isfinite().all()):
        raise ValueError("line holds coordinates that are not finite")
    along = torch.cat([line.new_zeros(1), (line[1:] - line[:-1]).norm(dim=1).cumsum(0)])
    if float(along[-1]) == 0:
        raise ValueError("line has no length: all its points are one")
    wanted = torch.linspace(0, 1, points, dtype=line.dtype, device=line.device) * along[-1]
    after = torch.searchsorted(along, wanted, right=True).clamp(1, len(line) - 1)
    low, high = along[after - 1], along[after]
    share = torch.where(high > low, (wanted - low) / torch.where(high > low, high - low, 1.0), 0.0)
    return line[after - 1] + share.unsqueeze(1) * (line[after] - line[after - 1])


def collate(maps: Sequence[Sequence[tuple[Tensor, int]]], points: int = 11) -> Roads:
    """Maps of any number of roads as one batch.

    Args:
        maps: of every map its roads: a polyline (N, 2) and the number of its class; a map may be empty.
        points: P.
    """
    most = max((len(m) for m in maps), default=0)
    made = Roads(
        torch.zeros(len(maps), most, points, 2), torch.zeros(len(maps), most, dtype=torch.long),
        torch.zeros(len(maps), most, dtype=torch.bool),
    )  # fmt: skip
    for i, one in enumerate(maps):
        for j, (line, kind) in enumerate(one):
            made.points[i, j], made.kind[i, j], made.valid[i, j] = resample(line, points), kind, True
    return made


def moved(points: Tensor, angle: float = 0.0, shift: Sequence[float] = (0.0, 0.0)) -> Tensor:
    """Points (..., 2) turned to the left by ``angle`` (radians) about the vehicle, then moved by ``shift`` metres.

    Coarse maps are metres off; to train with random turns and shifts keeps a model from trusting them to the point.
    """
    check_float("points", points)
    if not points.dim() or points.shape[-1] != 2:
        raise ValueError(f"points must be (..., 2) metres, got {tuple(points.shape)}")
    check_real("angle", angle)
    turn = points.new_tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return points @ turn.mT + points.new_tensor(list(shift))


def sines(points: Tensor, reach: Sequence[float], frequencies: int) -> Tensor:
    """(..., 2) metres -> (..., 4 frequencies): sines and cosines of both coordinates."""
    x = points / points.new_tensor(list(reach))
    angles = x.unsqueeze(-1) * (math.pi * 2 ** torch.arange(frequencies, device=x.device, dtype=x.dtype))
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class PolylineEncoder(nn.Module):
    """One token of every road.

    Args:
        dim: of tokens.
        kinds: of roads.
        reach: metres in front and behind, and to both sides, that coordinates are divided by.
        frequencies: of sines; the first has the period of twice the reach, each other half of the one before.
        num_heads, depth: of the transformer over the roads of a map.
        directed: whether a road differs from itself read from the other end. ``False``: both are encoded and averaged,
            and do not differ.

    Shape:
        :class:`Roads` of B maps with E roads -> (B, E, dim); what does not exist gives zeros.

    >>> roads = collate([[(torch.tensor([[0.0, 0.0], [30.0, 5.0]]), 1)], []])
    >>> PolylineEncoder(16)(roads).shape
    torch.Size([2, 1, 16])
    """

    def __init__(
        self, dim: int, kinds: int = len(ROADS), reach: Sequence[float] = (50.0, 25.0), frequencies: int = FREQUENCIES,
        num_heads: int = 4, depth: int = 1, directed: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_int("dim", dim, least=1)
        self.kinds, self.directed = check_int("kinds", kinds, least=1), check_flag("directed", directed)
        self.reach = tuple(check_real("reach", r, above=0) for r in reach)
        if len(self.reach) != 2:
            raise ValueError(f"reach must be (front, side) in metres, got {reach}")
        self.frequencies = check_int("frequencies", frequencies, least=1)
        self.point = nn.Sequential(nn.Linear(4 * frequencies, dim), nn.GELU(), nn.Linear(dim, dim))
        self.order = nn.Parameter(torch.zeros(2))  # how much the first and the last point weigh beside the mean
        self.kind = nn.Embedding(kinds, dim)
        self.blocks = nn.ModuleList(
            Block(dim, SoftmaxAttention(dim, num_heads), mlp_ratio=2.0)
            for _ in range(check_int("depth", depth, least=0))
        )
        self.norm = nn.LayerNorm(dim)

    def _one_way(self, points: Tensor) -> Tensor:
        found = self.point(sines(points, self.reach, self.frequencies))
        share = found.shape[-2]
        return found.mean(-2) + (self.order[0] * found[..., 0, :] + self.order[1] * found[..., -1, :]) / share

    def forward(self, roads: Roads) -> Tensor:
        points, kind, valid = roads
        check_axes("points", points, B=None, E=None, P=None, **{"x, y": 2})
        check_float("points", points)
        check_whole("kind", kind)
        check_valid("valid", valid, points.shape[:2])
        if kind.shape != points.shape[:2]:
            raise ValueError(f"kind must be {tuple(points.shape[:2])}, one per road, got {tuple(kind.shape)}")
        if readable(kind):
            said = kind[valid]
            if said.numel() and not 0 <= int(said.min()) <= int(said.max()) < self.kinds:
                raise ValueError(f"kind must lie in [0, {self.kinds - 1}], got {said.unique().tolist()}")
        points = points.masked_fill(~valid[..., None, None], 0.0)
        token = self._one_way(points)
        if not self.directed:
            token = (token + self._one_way(points.flip(-2))) / 2
        token = token + self.kind(kind.masked_fill(~valid, 0))
        for block in self.blocks:
            token, _ = block(token, valid)
        return self.norm(token).masked_fill(~valid.unsqueeze(-1), 0.0)


class PolylinePrior(nn.Module):
    """BEV features read the roads of a map: ``q <- q + MHA(LN q, u)``.

    An empty map leaves them bit for bit as they were.

    Args:
        dim: of BEV features.
        road_dim: of tokens of roads; ``dim`` by default.
        num_heads: heads.

    Shape:
        bev: (B, C, H, W) or (B, N, C); tokens (B, E, road_dim), ``valid`` (B, E) boolean. Returns the shape of ``bev``.
    """

    def __init__(self, dim: int, road_dim: int | None = None, num_heads: int = 4):
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        self.road_dim = dim if road_dim is None else check_int("road_dim", road_dim, least=1)
        self.norm = nn.LayerNorm(dim)
        self.read = SoftmaxAttention(dim, num_heads, context_dim=self.road_dim)

    def forward(self, bev: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        if bev.dim() == 4:
            flat = self(bev.flatten(2).mT, tokens, valid)
            return flat.mT.unflatten(2, bev.shape[2:])
        check_axes("bev", bev, B=None, N=None, C=self.dim)
        check_axes("tokens", tokens, B=len(bev), E=None, road_dim=self.road_dim)
        check_valid("valid", valid, tokens.shape[:2])
        if not tokens.shape[1]:
            return bev
        read = self.read(self.norm(bev), tokens, context_valid=valid)
        return torch.where(valid.any(1)[:, None, None], bev + read, bev)


class RasterPrior(nn.Module):
    """BEV features with a drawn map.

    Args:
        dim: C of the features.
        kinds: classes of roads, one channel each.
        hidden: of the CNN.
        fusion: ``"add"``: the encoded map is added, starting at nothing; ``"concat"``: both are joined by a 1 x 1
            convolution.

    Shape:
        bev: (B, C, H, W); raster: (B, kinds, h, w), resampled to H x W if it differs. Where ``fusion="add"`` a map
        without any road leaves the features bit for bit as they were.
    """

    def __init__(self, dim: int, kinds: int = len(ROADS), hidden: int = 32, fusion: str = "add"):
        super().__init__()
        check_choice("fusion", fusion, ("add", "concat"))
        self.dim, self.kinds, self.fusion = check_int("dim", dim, least=1), check_int("kinds", kinds, least=1), fusion
        check_int("hidden", hidden, least=1)
        self.conv1 = nn.Conv2d(kinds, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        self.join = nn.Conv2d(2 * dim, dim, 1) if fusion == "concat" else None
        if fusion == "add":
            nn.init.zeros_(self.conv3.weight)
            self.conv3.bias.data.zero_()  # type: ignore[union-attr]

    def forward(self, bev: Tensor, raster: Tensor) -> Tensor:
        check_axes("bev", bev, B=None, C=self.dim, H=None, W=None)
        check_axes("raster", raster, B=len(bev), kinds=self.kinds, h=None, w=None)
        raster = raster.to(bev.dtype)
        if raster.shape[2:] != bev.shape[2:]:
            raster = F.interpolate(raster, bev.shape[2:], mode="area")
        m = self.conv3(self.conv2(self.conv1(raster).relu()).relu())
        if self.join is not None:
            joined: Tensor = self.join(torch.cat([bev, m], 1))
            return joined
        return torch.where((raster != 0).flatten(1).any(1)[:, None, None, None], bev + m, bev)


def draw(
    roads: Roads, size: Sequence[int], kinds: int = len(ROADS), reach: Sequence[float] = (50.0, 25.0),
    width: float | Sequence[float] = 4.0,
) -> Tensor:  # fmt: skip
    """Roads as an image of one channel per class, 1 within half a width of the line.

    Args:
        roads: of B maps.
        size: (H, W).
        kinds: channels.
        reach: metres that the image shows in front and behind, and to both sides.
        width: of a road in metres, for all or for every class.

    Returns:
        (B, kinds, H, W) of zeros and ones; row 0 is the front, column 0 the left.
    """
    height, wide = (check_int("size", s, least=1) for s in size)
    widths = [float(width)] * kinds if isinstance(width, (int, float)) else [float(w) for w in width]
    if len(widths) != kinds:
        raise ValueError(f"width must be one or {kinds} numbers, got {len(widths)}")
    points, kind, valid = roads
    x = reach[0] - (torch.arange(height, device=points.device, dtype=points.dtype) + 0.5) * 2 * reach[0] / height
    y = reach[1] - (torch.arange(wide, device=points.device, dtype=points.dtype) + 0.5) * 2 * reach[1] / wide
    at = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 1, 2)
    out = points.new_zeros(len(points), kinds, height, wide)
    for i, j in valid.nonzero().tolist():
        begin, end = points[i, j, :-1], points[i, j, 1:]
        step = end - begin
        along = ((at - begin) * step).sum(-1) / step.square().sum(-1).clamp(min=1e-12)
        near = (at - begin - along.clamp(0, 1).unsqueeze(-1) * step).norm(dim=-1).amin(1)
        c = int(kind[i, j])
        out[i, c] = torch.maximum(out[i, c], (near <= widths[c] / 2).to(out.dtype).view(height, wide))
    return out


class MappedLanes(TaskModel):
    """A small network on BEV features with either prior, or none: what tests and studies train.

    Args:
        in_dim: channels of what the sensors gave.
        dim: of its features.
        prior: ``"raster"``, ``"polyline"`` or ``"none"``.
        kinds, reach: of the map.
    """

    def __init__(
        self, in_dim: int, dim: int = 32, prior: str = "polyline", kinds: int = len(ROADS),
        reach: Sequence[float] = (50.0, 25.0),
    ):  # fmt: skip
        super().__init__()
        check_choice("prior", prior, ("raster", "polyline", "none"))
        self.kind, self.kinds, self.reach = prior, kinds, tuple(reach)
        self.stem = nn.Conv2d(in_dim, dim, 3, padding=1)
        self.place = nn.Sequential(nn.Linear(4 * FREQUENCIES, dim), nn.GELU(), nn.Linear(dim, dim))
        self.roads = PolylineEncoder(dim, kinds, reach) if prior == "polyline" else None
        made: dict[str, Any] = {"polyline": lambda: PolylinePrior(dim), "raster": lambda: RasterPrior(dim, kinds)}
        self.prior: Any = made[prior]() if prior in made else None
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Conv2d(dim, 1, 1)

    def forward(self, bev: Tensor, roads: Roads | None = None) -> Tensor:
        """(B, in_dim, H, W) -> (B, H, W) logits of lanes."""
        x = self.stem(bev)
        height, wide = bev.shape[2:]
        rows = self.reach[0] - (torch.arange(height, device=x.device, dtype=x.dtype) + 0.5) * 2 * self.reach[0] / height
        columns = self.reach[1] - (torch.arange(wide, device=x.device, dtype=x.dtype) + 0.5) * 2 * self.reach[1] / wide
        at = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        x = x + self.place(sines(at, self.reach, FREQUENCIES)).permute(2, 0, 1)
        if roads is not None and self.roads is not None:
            x = self.prior(x, self.roads(roads), roads.valid)
        elif roads is not None and self.kind == "raster":
            x = self.prior(x, draw(roads, (height, wide), self.kinds, self.reach).to(x))
        out: Tensor = self.head(self.body(x)).squeeze(1)
        return out

    def loss(self, prediction: Tensor, target: Tensor) -> Terms:
        """The cross-entropy of every place; ``target``: (B, H, W) of zeros and ones."""
        if target.shape != prediction.shape:
            raise ValueError(f"target must be {tuple(prediction.shape)}, got {tuple(target.shape)}")
        return {"lanes": F.binary_cross_entropy_with_logits(prediction, target.to(prediction))}

    def predict(self, bev: Tensor, roads: Roads | None = None) -> Tensor:
        """(B, H, W) probabilities of lanes."""
        return self(bev, roads).sigmoid()
