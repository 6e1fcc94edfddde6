"""What lines about detectors share: a small encoder, a pyramid, precision by classes, and pictures of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....models.dense.heads import FeaturePyramid
from ....models.detect.anchor_free import AnchorFreeDetector, DecoupledHead
from ....models.detect.pan import Bottleneck, conv
from ....models.detect.plain_detr import Detections
from ....models.protocol import total_loss
from ...small import told
from ..detection import average_precision

#: Channels at the strides 2, 4, 8, ...
DIMS = (8, 16, 16)
#: Bins of the distributions: sides of a box lie three strides away at most.
BINS = 4
#: Pictures (n, C, H, W), more of them where a model takes more, and the targets of each.
Batch = tuple[tuple[Tensor, ...], list[dict[str, Tensor]]]


class Encoder(nn.Module):
    """Pictures (B, in_chans, H, W) to maps (B, H / s, W / s, C) at the strides 4, 8, ...

    Args:
        in_chans: of pictures.
        dims: channels at the strides 2, 4, 8, ...
        first: stands at stride 2; nothing by default.
    """

    def __init__(self, in_chans: int = 3, dims: Sequence[int] = DIMS, first: nn.Module | None = None):
        super().__init__()
        self.stem = nn.Sequential(conv(in_chans, dims[0], 3, 2), nn.Identity() if first is None else first)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(a, b, 3, 2), Bottleneck(b, True)) for a, b in zip(dims, dims[1:], strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Finest first."""
        x = self.stem(x.permute(0, 2, 3, 1))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Pyramid(nn.Module):
    """A feature pyramid, every level as wide."""

    def __init__(self, dims: Sequence[int], dim: int):
        super().__init__()
        self.pyramid = FeaturePyramid(dims, dim, activation=nn.SiLU)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, H, W, C), finest first, to the same grids."""
        return self.pyramid(list(maps), [None] * len(maps))  # type: ignore[no-any-return]


def head(dim: int, classes: int, levels: int) -> DecoupledHead:
    """On levels of one width, at the strides 4, 8, ..."""
    return DecoupledHead((dim,) * levels, classes, tuple(4 * 2**i for i in range(levels)), bins=BINS)


def detector(classes: int, in_chans: int = 3, dims: Sequence[int] = DIMS, more: nn.Module | None = None) -> Any:
    """A plain detector: encoder, pyramid and head; ``more`` stands behind the pyramid."""
    neck: nn.Module = Pyramid(dims[1:], dims[1])
    neck = neck if more is None else nn.Sequential(neck, more)
    return AnchorFreeDetector(Encoder(in_chans, dims), neck, head(dims[1], classes, len(dims) - 1))


def detection_loss(model: nn.Module, given: Batch) -> Tensor:
    """The sum of a detector's terms, as :func:`attnlib.bench.small.fit` takes it."""
    images, target = given
    return total_loss(model.loss(model(*images), target))  # type: ignore[operator]


def drawn(pool: Batch, count: int, generator: torch.Generator) -> Batch:
    """Some of a pool of pictures, each turned left to right or not."""
    images, targets = pool
    side = images[0].shape[-1]
    which = torch.randint(len(targets), (count,), generator=generator)
    turned = torch.rand(count, generator=generator) < 0.5
    some = tuple(torch.where(turned[:, None, None, None], x[which].flip(-1), x[which]) for x in images)
    made = []
    for i, turn in zip(which.tolist(), turned.tolist(), strict=True):
        boxes = targets[i]["boxes"]
        if turn:
            boxes = torch.stack([side - boxes[:, 2], boxes[:, 1], side - boxes[:, 0], boxes[:, 3]], 1)
        made.append({"boxes": boxes, "labels": targets[i]["labels"]})
    return some, made


def found_by(model: Any, images: Sequence[Tensor], batch: int = 64) -> list[Detections]:
    """Boxes of every picture, doubtful ones, too, as a precision by recall needs them."""
    found: list[Detections] = []
    for parts in zip(*(x.split(batch) for x in images), strict=True):
        found += model.predict(*parts, threshold=0.02, most=12, overlap=0.5)
    return found


def mean_precision(
    found: Sequence[Detections], targets: Sequence[Mapping[str, Tensor]], classes: int, counted: str | None = None
) -> float:
    """Mean over classes of :func:`attnlib.bench.studies.detection.average_precision`.

    Args:
        found: of every picture.
        targets: ``boxes``, ``labels`` and what else is known of every picture's targets.
        classes: how many.
        counted: the name of what says which targets are to be found; all by default.
    """
    each = []
    for c in range(classes):
        own = [Detections(f.boxes[f.labels == c], f.scores[f.labels == c], f.labels[f.labels == c]) for f in found]
        wanted = [
            {"boxes": t["boxes"][t["labels"] == c]}
            | ({} if counted is None else {"counted": t[counted][t["labels"] == c]})
            for t in targets
        ]
        each.append(average_precision(own, wanted))
    return sum(each) / len(each)


#: Colours of boxes, by label.
INKS = ((1.0, 0.72, 0.0), (0.95, 0.0, 0.5))


def boxed(images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor], scale: int = 4) -> Tensor:
    """Pictures (n, 3, H, W), larger, with lines around boxes in the colour of their labels.

    Args:
        images: in [0, 1].
        boxes: (k, 4) corners in pixels, of each picture.
        labels: (k,) of each.
        scale: pixels a side that one becomes.
    """
    large = images.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = large.shape[2:]
    for image, own, kinds in zip(large, boxes, labels, strict=True):
        for box, label in zip((scale * own).round().int().tolist(), kinds.tolist(), strict=True):
            x1, y1, x2, y2 = (min(max(v, 0), size) for v, size in zip(box, (width, height) * 2, strict=True))
            ink = image.new_tensor(INKS[label % len(INKS)])[:, None, None]
            whole = image[:, y1:y2, x1:x2]
            for line in (whole[:, :2], whole[:, -2:], whole[..., :2], whole[..., -2:]):
                line[:] = ink
    return large


def shown(images: Tensor, found: Sequence[Detections], threshold: float = 0.3) -> Tensor:
    """:func:`boxed` with the boxes of a score above a threshold."""
    keep = [f.scores > threshold for f in found]
    return boxed(
        images, [f.boxes[k] for f, k in zip(found, keep, strict=True)],
        [f.labels[k] for f, k in zip(found, keep, strict=True)],
    )  # fmt: skip


def true_boxes(images: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """:func:`boxed` with what there is."""
    return boxed(images, [t["boxes"] for t in targets], [t["labels"] for t in targets])


def markdown(head: Sequence[str], part: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Rows of what :func:`attnlib.bench.small.study` gave as a table in Markdown: names, metrics with their intervals.

    ``against`` is told with its sign, but for the baseline; ``parameters`` as a whole number.
    """
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in part["rows"]:
        cells = [row["name"]]
        for metric in metrics:
            held = row.get(metric)
            if not held or (metric == "against" and row["name"] == part["baseline"]):
                cells.append("")
            elif metric == "parameters":
                cells.append(f"{held['mean']:.0f}")
            else:
                cells.append(("+" if metric == "against" and held["mean"] >= 0 else "") + told(row, metric))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
