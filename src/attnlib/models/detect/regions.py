"""Pretraining on regions: a backbone, a pyramid, what lies in a box, and its class against embeddings of all classes.

Chen et al., 2025, "DynamicVis", arXiv 2503.16426: boxes of known classes are cut out of every level of a feature
pyramid, added, and classified; beside that, the mean of a region and the embedding of its class are drawn together in
both directions, regions against classes and classes against regions.

Differs from the authors' code: boxes of one process only; their attention over a region, before its mean, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_real, describe
from ...types import stats_dtype
from ..backbones.stages import map_info
from ..protocol import answering


def mil_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """``- log sum over positives of softmax(logits)``, mean over the rows that have any; zero where none has.

    Args:
        logits: (R, K).
        positive: (R, K) boolean.

    >>> round(mil_loss(torch.zeros(2, 4), torch.tensor([[True, True, False, False], [False] * 4])).item(), 4)
    0.6931
    """
    if logits.dim() != 2 or positive.shape != logits.shape or positive.dtype != torch.bool:
        raise ValueError(
            f"positive must be boolean of the shape of logits, (R, K), got {describe(positive)} for {describe(logits)}"
        )
    has = positive.any(-1)
    inside = logits.masked_fill(~(positive | ~has[:, None]), float("-inf")).logsumexp(-1)
    rows = (logits.logsumexp(-1) - inside).masked_fill(~has, 0.0)
    return rows.sum() / has.sum().clamp(min=1)


def roi_align(
    x: Tensor, boxes: Tensor, size: int = 7, scale: float = 1.0, samples: int | None = 2, aligned: bool = True
) -> Tensor:
    """Means of bilinear samples in the cells of boxes.

    Args:
        x: (B, C, H, W).
        boxes: (R, 5): number of the image, then left, top, right, bottom in pixels.
        size: cells along each side.
        scale: map sides over image sides.
        samples: along each side of a cell; ``None`` for as many as a cell of that box has tokens.
        aligned: the first token's middle is at half a pixel; else at zero, and boxes are one token wide at least.

    Returns:
        (R, C, size, size); what lies outside the map by more than one token counts as zero.
    """
    if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(f"boxes must be (R, 5): image, left, top, right, bottom; got {describe(boxes)}")
    high = stats_dtype(x.dtype)
    height, width = x.shape[2:]
    shift = 0.5 if aligned else 0.0
    start, end = boxes[:, 1:3].to(high) * scale - shift, boxes[:, 3:5].to(high) * scale - shift
    sides = end - start if aligned else (end - start).clamp(min=1)  # (R, 2) of columns, rows
    if samples is None:
        counts = (sides / size).ceil().clamp(min=1)
        most = int(counts.max()) if len(boxes) else 1
    else:
        counts, most = torch.full_like(sides, samples), samples
    at = torch.arange(most, device=x.device, dtype=high)
    taken = at < counts.unsqueeze(-1)  # (R, 2, S)
    inside_cell = (at + 0.5) / counts.unsqueeze(-1)
    cells = torch.arange(size, device=x.device, dtype=high)[:, None] + inside_cell.unsqueeze(2)
    places = start[..., None, None] + (sides / size)[..., None, None] * cells  # (R, 2, size, S)

    def weights(p: Tensor, axis: int, count: int) -> Tensor:
        """(R, size, count) shares of the tokens along an axis."""
        inside = (p >= -1) & (p <= count) & taken[:, axis, None]
        p = p.clamp(0, max(0, count - 1))
        tokens = torch.arange(count, device=p.device, dtype=p.dtype)
        near = (1 - (p.unsqueeze(-1) - tokens).abs()).clamp(min=0) * inside.unsqueeze(-1)
        return near.sum(2) / counts[:, axis, None, None]

    across, down = weights(places[:, 0], 0, width), weights(places[:, 1], 1, height)
    held = x.to(high).index_select(0, boxes[:, 0].long())
    return torch.einsum("rchw,rih,rjw->rcij", held, down, across).to(x.dtype)


class RegionClassifier(nn.Module):
    """Boxes of known classes in images, classified from a pyramid of a backbone's maps.

    Args:
        encoder: images to maps, as ``attnlib.create_model(..., features_only=True)``.
        num_classes: of boxes.
        dim: width of the pyramid.
        size: cells of a region along each side.
        smoothing: of the labels.
        mil_weight: of the term that draws regions and embeddings of their classes together; 0 for none.

    >>> import attnlib
    >>> encoder = attnlib.create_model("dynamicvis_base", features_only=True, embed_dims=(8, 16), depths=(1, 1),
    ...     reductions=(4, 2), img_size=32)
    >>> model = RegionClassifier(encoder, num_classes=3, dim=8)
    >>> model(torch.randn(1, 3, 32, 32), torch.tensor([[0.0, 4, 4, 20, 28]])).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int = 63,
        dim: int = 256,
        size: int = 7,
        smoothing: float = 0.1,
        mil_weight: float = 0.5,
    ):
        super().__init__()
        info = map_info(encoder)
        self.encoder, self.size = encoder, check_int("size", size, least=1)
        self.num_classes = check_int("num_classes", num_classes, least=1)
        self.smoothing = check_real("smoothing", smoothing, least=0, below=1)
        self.mil_weight = check_real("mil_weight", mil_weight, least=0)
        self.scales = [1 / f["reduction"] for f in info]
        self.lateral = nn.ModuleList(nn.Conv2d(f["num_chs"], dim, 1) for f in info)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in info)
        self.inside = nn.Conv2d(dim, dim, 5, padding=2)
        self.fc = nn.Linear(dim, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        for conv in (*self.lateral, *self.smooth):
            nn.init.xavier_uniform_(conv.weight)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.embeddings = nn.Parameter(torch.randn(num_classes, dim)) if mil_weight else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if mil_weight else None

    def regions(self, x: Tensor, boxes: Tensor) -> Tensor:
        """(B, C, H, W) images and (R, 5) boxes -> (R, dim), the mean of every region."""
        maps = [conv(m) for conv, m in zip(self.lateral, self.encoder(x), strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[2:], mode="nearest")
        total: Tensor | float = 0.0
        for conv, made, scale in zip(self.smooth, maps, self.scales, strict=True):
            total = total + F.relu(self.inside(roi_align(conv(made), boxes, self.size, scale)))
        assert isinstance(total, Tensor)
        return total.mean((2, 3))

    def forward(self, x: Tensor, boxes: Tensor, returns: Sequence[str] = ()) -> Any:
        """Logits (R, num_classes); with ``returns=("regions",)`` also their mean tokens (R, dim)."""
        found = self.regions(x, boxes)
        logits = self.fc(found)
        return (logits, found) if "regions" in returns else logits

    def loss(self, prediction: tuple[Tensor, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms of the loss by name; their sum is trained.

        Args:
            prediction: what the call with ``returns=("regions",)`` gave.
            target: (R,) classes.
        """
        logits, found = prediction
        if target.dim() != 1 or target.shape[0] != logits.shape[0]:
            raise ValueError(f"target must be ({logits.shape[0]},) classes, got {describe(target)}")
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < self.num_classes:
            raise ValueError(f"target must hold classes from 0 to {self.num_classes - 1}")
        terms = {"cross_entropy": F.cross_entropy(logits, target, label_smoothing=self.smoothing)}
        if self.embeddings is not None and self.log_scale is not None:
            near = F.normalize(found, dim=-1) @ F.normalize(self.embeddings, dim=-1).T * self.log_scale.exp()
            own = F.one_hot(target, self.num_classes).bool()
            terms["mil"] = self.mil_weight * (mil_loss(near, own) + mil_loss(near.T, own.T)) / 2
        return terms

    @answering
    def predict(self, x: Tensor, boxes: Tensor) -> Tensor:
        """(R,) classes."""
        return self(x, boxes).argmax(-1)
