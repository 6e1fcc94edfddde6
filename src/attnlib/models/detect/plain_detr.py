"""Plain DETR: object queries over one map of any backbone; boxes bias attention and are refined layer by layer.

Lin et al., 2023, "DETR Doesn't Need Multi-Scale or Locality Design", arXiv 2308.01904. Every layer of the decoder is
self-attention among queries, cross attention to all pixels biased by the boxes so far (:class:`BoxAttention`), and an
MLP. Behind every layer boxes move: in pixels, by deltas relative to their size (``reparam``), or as sigmoids of sums of
logits. In training further queries, which do not see the others, are matched to every target several times (hybrid
matching).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_int, check_real, describe
from ...grids import coordinates
from ...nn.dense.plain_detr import BoxAttention
from ...nn.released import Released
from ...positions import sincos
from .boxes import apply_deltas, deltas_between, match, overlaps, to_centres, to_corners

NORMS = ("pre", "post")


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits of numbers in [0, 1], which are kept ``eps`` away from both ends."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


class BoxHead(nn.Sequential):
    """Three linear maps with ReLUs between them; the last starts at zero."""

    def __init__(self, dim: int):
        super().__init__(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4)
        )  # fmt: skip
        last = self[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class DecoderLayer(nn.Module):
    """Self-attention of queries, cross attention to the map, MLP; each residual.

    Args:
        dim: width.
        num_heads: heads.
        hidden: width of the MLP.
        norm: ``"pre"`` or ``"post"``: where norms stand.
        dropout: of attention, MLP and sublayers, in training.
        box: settings of :class:`BoxAttention` beyond width and heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        hidden: int = 1024,
        norm: str = "pre",
        dropout: float = 0.0,
        box: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_divides("num_heads", num_heads, "dim", dim)
        self.pre = norm == "pre"
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.cross_attn = BoxAttention(dim, num_heads, **(box or {}))
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(check_real("dropout", dropout, least=0, below=1))

    def _sub(self, x: Tensor, norm: nn.Module, body: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre:
            return x + self.drop(body(norm(x)))
        return norm(x + self.drop(body(x)))

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        context: Tensor,
        position: Tensor | None = None,
        positions: Tensor | None = None,
        context_valid: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, C) -> the same.

        Args:
            boxes: (B, Q, 4) corners in pixels.
            context: (B, h, w, C).
            position: (B or 1, Q, C), of the queries.
            positions: (B or 1, h, w, C), of the map.
            context_valid: (B, h, w).
            apart: (Q, Q) boolean, True where a query must not read another.
        """

        def placed(y: Tensor) -> Tensor:
            return y if position is None else y + position

        def own(y: Tensor) -> Tensor:
            at = placed(y)
            return self.self_attn(at, at, y, attn_mask=apart, need_weights=False)[0]

        x = self._sub(x, self.norm_self, own)
        x = self._sub(
            x, self.norm_cross, lambda y: self.cross_attn(placed(y), boxes, context, positions, context_valid)
        )
        return self._sub(x, self.norm_mlp, lambda y: self.fc2(self.drop(F.relu(self.fc1(y)))))


class Decoded(NamedTuple):
    """What the decoder gives, one entry per layer.

    Args:
        hidden: (B, Q, C) behind the final norm.
        boxes: (B, Q, 4) corners in pixels, with the gradient of this layer's refinement.
        before: (B, Q, 4) corners that the layer started from, without gradient unless the decoder looks twice.
        deltas: (B, Q, 4), what moved them.
    """

    hidden: list[Tensor]
    boxes: list[Tensor]
    before: list[Tensor]
    deltas: list[Tensor]


class Decoder(nn.Module):
    """Layers that read a map and move boxes.

    Args:
        dim, num_heads, hidden, norm, dropout, box: of every :class:`DecoderLayer`.
        depth: layers.
        reparam: boxes move by deltas relative to their size, in pixels; otherwise by logits of the image's share.
        look_twice: a layer's boxes carry the gradient of the layer before as well.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        hidden: int = 1024,
        depth: int = 6,
        norm: str = "pre",
        dropout: float = 0.0,
        reparam: bool = True,
        look_twice: bool = False,
        box: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_int("depth", depth, least=1)
        self.reparam, self.look_twice = check_flag("reparam", reparam), check_flag("look_twice", look_twice)
        layer = DecoderLayer(dim, num_heads, hidden, norm, dropout, box)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.box_heads = nn.ModuleList(BoxHead(dim) for _ in range(depth))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def move(self, boxes: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
        """Corners in pixels, moved."""
        if self.reparam:
            return apply_deltas(to_centres(boxes), deltas, (float(size[0]), float(size[1])))
        scale = boxes.new_tensor([size[1], size[0]] * 2)
        return to_corners((inverse_sigmoid(to_centres(boxes) / scale) + deltas).sigmoid() * scale)

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        context: Tensor,
        size: tuple[int, int],
        position: Tensor | None = None,
        positions: Tensor | None = None,
        context_valid: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> Decoded:
        """Queries (B, Q, C) and their first boxes (B, Q, 4) through all layers; ``size``: of the image in pixels."""
        out = Decoded([], [], [], [])
        before = boxes
        for layer, head in zip(self.layers, self.box_heads, strict=True):
            x = layer(x, boxes.detach(), context, position, positions, context_valid, apart)
            shown = self.norm(x)
            deltas = head(shown)
            # What the next layer starts from carries the gradient of this refinement alone, or none.
            start = before if self.look_twice else boxes.detach()
            moved = self.move(start, deltas, size)
            for held, value in zip(out, (shown, moved, start, deltas), strict=True):
                held.append(value)
            before = self.move(boxes.detach(), deltas, size)
            boxes = before.detach()
        return out


def decoder_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the authors' ``GlobalDecoder`` with its box heads (``bbox_embed``) to :class:`Decoder`."""
    theirs = Released(state_dict, "Plain-DETR's GlobalDecoder")
    out = theirs.parts(r"layers\.(\d+)\.cross_attn\.(.+)", r"layers.\1.cross_attn", BoxAttention.convert_state_dict)
    return theirs.close(
        out
        | theirs.renamed(
            {
                r"layers\.(\d+)\.self_attn\.(.+)": r"layers.\1.self_attn.\2",
                r"layers\.(\d+)\.norm1\.(.+)": r"layers.\1.norm_cross.\2",
                r"layers\.(\d+)\.norm2\.(.+)": r"layers.\1.norm_self.\2",
                r"layers\.(\d+)\.norm3\.(.+)": r"layers.\1.norm_mlp.\2",
                r"layers\.(\d+)\.linear([12])\.(.+)": r"layers.\1.fc\2.\3",
                r"final_layer_norm\.(.+)": r"norm.\1",
                r"bbox_embed\.(\d+)\.layers\.(\d)\.(weight|bias)": lambda match, value: {
                    f"box_heads.{match[1]}.{2 * int(match[2])}.{match[3]}": value
                },
            }
        )
    )


class Detections(NamedTuple):
    """One image's boxes.

    Args:
        boxes: (K, 4) corners in pixels.
        scores: (K,) in [0, 1], falling.
        labels: (K,) classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class PlainDETR(nn.Module):
    """A detector over the last map of an encoder.

    Args:
        encoder: gives maps (B, C_i, h_i, w_i), as ``create_model(..., features_only=True)``; the last one is read.
        num_classes: classes of things; there is none for "nothing".
        dim: width, a multiple of 4.
        num_heads, hidden, depth, norm, dropout, reparam, look_twice, distance, box_hidden: of the decoder.
        queries: objects that can be found.
        many: further queries in training, each target being matched ``repeats`` times among them; 0 for none.
        repeats: see ``many``.
        many_weight: of their loss.
        box_bias: bias cross attention by boxes.

    The first boxes are learned, spread over the image. Differs from the authors' detector: no first stage that proposes
    boxes from the map, no encoder layers on top of the backbone.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        dim: int = 256,
        num_heads: int = 8,
        hidden: int = 1024,
        depth: int = 6,
        queries: int = 300,
        many: int = 0,
        repeats: int = 6,
        many_weight: float = 1.0,
        norm: str = "pre",
        dropout: float = 0.0,
        reparam: bool = True,
        look_twice: bool = False,
        distance: str = "linear",
        box_hidden: int = 512,
        box_bias: bool = True,
    ):
        super().__init__()
        info: Any = getattr(encoder, "feature_info", None)
        if not info:
            raise ValueError(
                f"encoder must tell its maps by feature_info, as create_model(..., features_only=True) does, got "
                f"{type(encoder).__name__}"
            )
        check_int("num_classes", num_classes, least=1)
        if check_int("dim", dim, least=1) % 4:
            raise ValueError(f"dim={dim} must be a multiple of 4: sines and cosines of rows and of columns share it")
        self.queries, self.many = check_int("queries", queries, least=1), check_int("many", many, least=0)
        self.repeats = check_int("repeats", repeats, least=1)
        self.many_weight = check_real("many_weight", many_weight, least=0)
        self.num_classes, self.encoder = num_classes, encoder
        last = info[-1]
        self.stride = int(last["reduction"])
        self.project = nn.Conv2d(int(last["num_chs"]), dim, 1)
        nn.init.xavier_uniform_(self.project.weight)
        if self.project.bias is not None:
            nn.init.zeros_(self.project.bias)
        self.project_norm = nn.GroupNorm(32 if dim % 32 == 0 else 1, dim)
        box = dict(distance=distance, hidden=box_hidden, stride=self.stride)
        self.decoder = Decoder(dim, num_heads, hidden, depth, norm, dropout, reparam, look_twice, box)
        count = queries + many
        self.query, self.position = (nn.Parameter(torch.randn(count, dim)) for _ in range(2))
        side = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
        self.reference = nn.Parameter(inverse_sigmoid(torch.cat([side, torch.full((count, 2), 0.25)], -1)))
        self.classify = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(depth))
        for head in self.classify:
            nn.init.constant_(head.bias, -4.59511985013459)  # type: ignore[union-attr, arg-type]
        if not check_flag("box_bias", box_bias):
            for module in self.decoder.modules():
                if isinstance(module, BoxAttention):
                    module.without_bias()

    @staticmethod
    def places(height: int, width: int, dim: int, like: Tensor) -> Tensor:
        """(1, h, w, C): sines and cosines of rows and columns, in tokens."""
        at = coordinates((height, width), like.device)
        return sincos(at, dim).to(like.dtype).view(1, height, width, dim)

    def decode(self, images: Tensor) -> tuple[Decoded, list[Tensor]]:
        """All layers' boxes, and logits (B, Q, classes)."""
        feature = self.project_norm(self.project(self.encoder(images)[-1]))
        context = feature.permute(0, 2, 3, 1)
        batch, height, width = context.shape[:3]
        size = (images.shape[2], images.shape[3])
        count = self.queries + (self.many if self.training else 0)
        scale = self.reference.new_tensor([size[1], size[0]] * 2)
        boxes = to_corners(self.reference[:count].sigmoid() * scale).expand(batch, -1, -1)
        apart = None
        if count > self.queries:
            group = torch.arange(count, device=images.device) >= self.queries
            apart = group[:, None] != group
        found = self.decoder(
            self.query[:count].expand(batch, -1, -1), boxes, context, size, self.position[None, :count],
            self.places(height, width, context.shape[-1], context), None, apart,
        )  # fmt: skip
        return found, [head(h) for head, h in zip(self.classify, found.hidden, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> logits (B, Q, classes) and boxes (B, Q, 4) in pixels, of the last layer."""
        found, logits = self.decode(images)
        return logits[-1][:, : self.queries], found.boxes[-1][:, : self.queries]

    def loss(self, images: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Focal loss of classes, L1 and generalized IoU of matched boxes, summed over layers.

        Args:
            images: (B, C, H, W).
            targets: per image ``boxes`` (K, 4), corners in pixels inside the image, and ``labels`` (K,).

        Raises:
            ValueError: as many targets as images are needed; boxes outside, labels that are no class.
        """
        self._check_targets(images, targets)
        found, logits = self.decode(images)
        size = images.new_tensor([images.shape[3], images.shape[2]] * 2)
        out: dict[str, Tensor] = {}
        parts = [(slice(0, self.queries), 1, 1.0)]
        if self.training and self.many:
            parts.append((slice(self.queries, None), self.repeats, self.many_weight))
        for some, times, weight in parts:
            for i, scores in enumerate(logits):
                terms = detection_loss(
                    scores[:, some], found.boxes[i][:, some], targets, size, times,
                    (found.before[i][:, some], found.deltas[i][:, some]) if self.decoder.reparam else None,
                )  # fmt: skip
                for name, value in terms.items():
                    out[name] = out.get(name, value.new_zeros(())) + weight * value
        return out

    def _check_targets(self, images: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> None:
        if len(targets) != images.shape[0]:
            raise ValueError(f"targets must be one for each of {images.shape[0]} images, got {len(targets)}")
        height, width = images.shape[2:]
        for i, t in enumerate(targets):
            boxes, labels = t["boxes"], t["labels"]
            if boxes.dim() != 2 or boxes.shape[1:] != (4,) or labels.shape != boxes.shape[:1]:
                raise ValueError(
                    f"targets[{i}] must have boxes (K, 4) and labels (K,), got {describe(boxes)} and {describe(labels)}"
                )
            limit = boxes.new_tensor([width, height] * 2)
            if bool(((boxes < 0) | (boxes > limit)).any()) or bool((boxes[:, 2:] < boxes[:, :2]).any()):
                raise ValueError(
                    f"targets[{i}] has boxes outside the image of {height} x {width} pixels, or turned over: "
                    f"{boxes.tolist()}; give x1, y1, x2, y2"
                )
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(f"targets[{i}] has labels {labels.tolist()}; possible: 0 to {self.num_classes - 1}")

    @torch.no_grad()
    def predict(self, images: Tensor, top: int = 100, threshold: float = 0.0) -> list[Detections]:
        """The ``top`` best (query, class) pairs of every image with at least that score."""
        check_int("top", top, least=1)
        logits, boxes = self(images)
        out = []
        for scores, own in zip(logits.sigmoid(), boxes, strict=True):
            best, index = scores.flatten().topk(min(top, scores.numel()))
            keep = best >= threshold
            out.append(Detections(own[index[keep] // self.num_classes], best[keep], index[keep] % self.num_classes))
        return out


def focal_loss(logits: Tensor, truth: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """``- alpha_t (1 - p_t)^gamma log p_t``, of every number (Lin et al., 2017, arXiv 1708.02002)."""
    p = logits.sigmoid()
    hit = p * truth + (1 - p) * (1 - truth)
    weight = alpha * truth + (1 - alpha) * (1 - truth)
    return weight * (1 - hit) ** gamma * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    truth: Tensor,
    size: Tensor,
    moved: tuple[Tensor, Tensor] | None = None,
    weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
) -> Tensor:
    """(Q, K): what it costs to call query i target j: focal difference, L1 of boxes (of deltas), - generalized IoU.

    Args:
        logits: (Q, classes); boxes: (Q, 4) corners in pixels.
        labels: (K,); truth: (K, 4) corners in pixels.
        size: (4,) width, height, width, height of the image.
        moved: (boxes before, deltas), both (Q, 4), where boxes move by deltas: these are compared then.
        weights: of class, box, overlap.
    """
    p = logits.sigmoid()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    cost = weights[0] * (positive - negative)[:, labels]
    if moved is None:
        cost = cost + weights[1] * torch.cdist(to_centres(boxes) / size, to_centres(truth) / size, p=1)
    else:
        wanted = deltas_between(to_centres(moved[0])[:, None], to_centres(truth)[None])
        cost = cost + weights[1] * (moved[1][:, None] - wanted).abs().sum(-1)
    return cost - weights[2] * overlaps(boxes, truth)[1]


def detection_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    size: Tensor,
    times: int = 1,
    moved: tuple[Tensor, Tensor] | None = None,
    weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
) -> dict[str, Tensor]:
    """The losses of one layer: ``class``, ``box`` and ``overlap``, weighted, over the number of targets.

    Args:
        logits: (B, Q, classes); boxes: (B, Q, 4).
        targets: per image ``boxes`` and ``labels``.
        size: as of :func:`matching_cost`.
        times: how often every target is matched.
        moved, weights: as of :func:`matching_cost`.
    """
    total = max(1, times * sum(len(t["labels"]) for t in targets))
    wanted = torch.zeros_like(logits)
    box, overlap = logits.new_zeros(()), logits.new_zeros(())
    for i, target in enumerate(targets):
        truth, labels = target["boxes"].to(boxes).repeat(times, 1), target["labels"].repeat(times)
        if not len(labels):
            continue
        own = None if moved is None else (moved[0][i], moved[1][i])
        with torch.no_grad():
            rows, columns = match(matching_cost(logits[i], boxes[i], labels, truth, size, own, weights))
        wanted[i, rows, labels[columns]] = 1.0
        if own is None:
            box = box + (to_centres(boxes[i, rows]) / size - to_centres(truth[columns]) / size).abs().sum()
        else:
            goal = deltas_between(to_centres(own[0][rows]), to_centres(truth[columns]))
            box = box + (own[1][rows] - goal).abs().sum()
        overlap = overlap + (1 - overlaps(boxes[i, rows], truth[columns])[1].diagonal()).sum()
    return {
        "class": weights[0] * focal_loss(logits, wanted).sum() / total, "box": weights[1] * box / total,
        "overlap": weights[2] * overlap / total,
    }  # fmt: skip
