"""Boxes of anything: a universal proposal network, asked for whole things or for parts of things by one embedding.

UPN of ChatRex (Jiang et al., 2024, arXiv 2411.18363): maps of a backbone go through a deformable encoder; its best
tokens become queries of a deformable decoder, which moves their boxes layer by layer. What counts as an object is one
learned vector ``e`` for each granularity, ``score = sigmoid(q . e)``; there are no classes.

>>> upn = UPN((8, 16), dim=16, num_levels=3, num_heads=2, hidden=16, encoder_depth=1, decoder_depth=1, num_queries=5,
...     groups=4)
>>> found = upn([torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)], granularity="fine")
>>> found.boxes.shape, found.logits.shape
(torch.Size([1, 5, 4]), torch.Size([1, 5]))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_divides, check_int, check_ints, check_real, describe
from ...nn.layers import merge_heads, split_heads
from ...nn.released import Released
from ...nn.sampled.deformable_attention import DeformableAttention
from ...ops.sampled import deformable_attention
from ...positions import sines
from ...types import stats_dtype
from ..detect.boxes import match, overlaps, suppress_boxes, to_centres, to_corners
from ..detect.plain_detr import focal_loss, inverse_sigmoid
from .losses import box_loss, check_target_boxes
from .segmenter import check_sizes

GRANULARITIES = ("fine", "coarse")


class Proposals(NamedTuple):
    """Boxes of a batch, in shares of the images: (B, Q, 4) centres and sizes, and (B, Q) scores before the sigmoid.

    ``layers`` has the same of every layer of the decoder, for training.
    """

    boxes: Tensor
    logits: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...] = ()


def box_sines(boxes: Tensor, dim: int) -> Tensor:
    """(..., 4 dim) encodings of boxes (..., 4) as centres and sizes, in shares: of y, x, width and height."""
    x, y, w, h = (2 * math.pi * boxes).unbind(-1)
    return torch.cat([sines(v, dim) for v in (y, x, w, h)], -1)


def map_sines(valid: Tensor, dim: int, temperature: float, kind: torch.dtype = torch.float32) -> Tensor:
    """(B, h, w, dim) encodings of the places of a map (B, h, w), of y and then of x, over what exists of it."""
    y, x = valid.cumsum(1, dtype=kind), valid.cumsum(2, dtype=kind)
    y, x = (2 * math.pi * v / (v.narrow(axis, v.shape[axis] - 1, 1) + 1e-6) for v, axis in ((y, 1), (x, 2)))
    return torch.cat([sines(y, dim // 2, temperature), sines(x, dim // 2, temperature)], -1)


class LevelAttention(DeformableAttention):
    """Deformable attention to flat levels whose sizes come with every call."""

    def read(self, x: Tensor, context: Tensor, shapes: list[tuple[int, int]], points: Tensor, valid: Tensor) -> Tensor:
        """(B, N, C) of queries (B, N, C) that look into (B, M, C), around points (B, N, L, 2 or 4)."""
        offsets = self._per_point(self.sampling_offsets(x), 2)
        base = points[..., :2].unsqueeze(1).unsqueeze(-2)
        if points.shape[-1] == 4:
            where = base + offsets / self.num_points * points[..., 2:].unsqueeze(1).unsqueeze(-2) * 0.5
        else:
            sizes = base.new_tensor([[w, h] for h, w in shapes])
            where = base + offsets / sizes[:, None]
        value = split_heads(self.value_proj(context), self.num_heads)
        out = deformable_attention(value, shapes, where.to(value.dtype), self._weights(x), valid=valid)
        return self.output_proj(merge_heads(out, x.shape[1:-1]))


class EncoderLayer(nn.Module):
    """Deformable self-attention of a pyramid and an MLP, each residual, norms behind."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, hidden: int):
        super().__init__()
        self.self_attn = LevelAttention(dim, num_heads, num_levels, num_points, reference="carried")
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, place: Tensor, shapes: Any, points: Tensor, valid: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn.read(x + place, x, shapes, points, valid))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    """Self-attention of queries, deformable attention to a pyramid, an MLP; each residual, norms behind."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, hidden: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.cross_attn = LevelAttention(dim, num_heads, num_levels, num_points, reference="carried")
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, place: Tensor, memory: Tensor, shapes: Any, points: Tensor, valid: Tensor) -> Tensor:
        asked = x + place
        x = self.norm2(x + self.self_attn(asked, asked, x, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn.read(x + place, memory, shapes, points, valid))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


def _box_head(dim: int) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
    nn.init.zeros_(head[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head[-1].bias)  # type: ignore[arg-type]
    return head


class UPN(nn.Module):
    """The universal proposal network, behind any backbone.

    Args:
        channels: of the backbone's maps, finest first.
        dim: width.
        num_levels: maps that are read; further ones are made from the coarsest by strides of two.
        num_heads, num_points: of deformable attention.
        hidden: width of the MLPs.
        encoder_depth, decoder_depth: layers.
        num_queries: boxes.
        temperature: of the places of the maps.
        groups: of the norms behind the projections of maps.

    Defaults are those of UPN-L, whose backbone is Swin-L, ``SwinMaps.named("swin_L_384_22k")`` of
    :mod:`attnlib.models.multimodal.swin_maps`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (192, 384, 768, 1536),
        dim: int = 256,
        num_levels: int = 5,
        num_heads: int = 8,
        num_points: int = 4,
        hidden: int = 2048,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        num_queries: int = 900,
        temperature: float = 20.0,
        groups: int = 32,
    ):
        super().__init__()
        widths = check_ints("channels", channels, least=1)
        check_divides("num_heads", num_heads, "dim", dim)
        check_divides("4", 4, "dim", dim)
        check_divides("groups", groups, "dim", dim)
        for name, value in (("encoder_depth", encoder_depth), ("decoder_depth", decoder_depth)):
            check_int(name, value, least=1)
        self.num_levels = check_int("num_levels", num_levels, least=len(widths))
        self.dim, self.num_queries = dim, check_int("num_queries", num_queries, least=1)
        self.temperature = check_real("temperature", temperature, above=0)
        self.channels = widths
        proj = [nn.Sequential(nn.Conv2d(c, dim, 1), nn.GroupNorm(groups, dim)) for c in widths]
        last = widths[-1]
        for _ in range(num_levels - len(widths)):
            proj.append(nn.Sequential(nn.Conv2d(last, dim, 3, 2, 1), nn.GroupNorm(groups, dim)))
            last = dim
        self.input_proj = nn.ModuleList(proj)
        settings = (dim, num_heads, num_levels, num_points, hidden)
        self.level_embed = nn.Parameter(torch.randn(num_levels, dim))
        self.encoder = nn.ModuleList(EncoderLayer(*settings) for _ in range(encoder_depth))
        self.decoder = nn.ModuleList(DecoderLayer(*settings) for _ in range(decoder_depth))
        self.norm = nn.LayerNorm(dim)
        self.place = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.enc_output, self.enc_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.enc_box, self.box = _box_head(dim), _box_head(dim)
        self.prompts = nn.Parameter(torch.randn(len(GRANULARITIES), dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the release: Xavier in encoder and decoder, but for deformable attention, which has its own."""
        for part in (self.encoder, self.decoder, self.place, self.enc_output):
            for p in part.parameters():
                if p.dim() > 1:
                    nn.init.xavier_uniform_(p)
        for m in self.modules():
            if isinstance(m, DeformableAttention):
                m.reset_parameters()
        nn.init.xavier_uniform_(self.queries)
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj[0].weight)  # type: ignore[index]
            nn.init.zeros_(proj[0].bias)  # type: ignore[index]

    def prompt(self, granularity: str | None, like: Tensor) -> Tensor:
        """(C,) the embedding of a granularity; zeros for ``None``, which scores everything one half."""
        if granularity is None:
            return like.new_zeros(self.dim)
        check_choice("granularity", granularity, GRANULARITIES)
        return self.prompts[GRANULARITIES.index(granularity)]

    def pyramid(self, maps: Sequence[Tensor], valid: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Projected maps (B, C, h, w) of all levels, and what exists of each (B, h, w)."""
        if len(maps) != len(self.channels):
            raise ValueError(f"maps must hold {len(self.channels)} maps of channels {self.channels}, got {len(maps)}")
        for i, (m, c) in enumerate(zip(maps, self.channels, strict=True)):
            check_axes(f"maps[{i}]", m, B=len(maps[0]), C=c, h=None, w=None)
        levels = [proj(m) for proj, m in zip(self.input_proj, maps, strict=False)]
        for proj in list(self.input_proj)[len(maps) :]:
            levels.append(proj(maps[-1] if len(levels) == len(maps) else levels[-1]))
        if valid is None:
            exists = [torch.ones_like(m[:, 0], dtype=torch.bool) for m in levels]
        else:
            shape = tuple(valid.shape) if isinstance(valid, Tensor) and valid.dtype == torch.bool else ()
            if len(shape) != 3 or shape[0] != len(maps[0]):
                raise ValueError(f"valid must be boolean (B, H, W) of the images, got {describe(valid)}")
            exists = [~(F.interpolate((~valid)[None].float(), m.shape[-2:])[0] > 0) for m in levels]
        return levels, exists

    def forward(
        self, maps: Sequence[Tensor], valid: Tensor | None = None, granularity: str | None = "fine"
    ) -> Proposals:
        """Boxes of a batch.

        Args:
            maps: of the backbone, (B, C, h, w) each, finest first.
            valid: (B, H, W) pixels that exist, where images of several sizes share a batch.
            granularity: ``"fine"``: parts too; ``"coarse"``: whole things; ``None``: neither.

        Raises:
            ValueError: maps that do not fit, or fewer tokens than queries.
        """
        levels, exists = self.pyramid(maps, valid)
        kind = stats_dtype(levels[0].dtype)
        shapes = [(m.shape[2], m.shape[3]) for m in levels]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], 1)
        known = torch.cat([e.flatten(1) for e in exists], 1)
        if known.shape[1] < self.num_queries:
            raise ValueError(
                f"maps of {known.shape[1]} tokens give at most as many boxes, and num_queries={self.num_queries}"
            )
        place = torch.cat(
            [
                map_sines(e, self.dim, self.temperature, kind).flatten(1, 2).to(x.dtype) + self.level_embed[i]
                for i, e in enumerate(exists)
            ],
            1,
        )
        # How much of every level exists, along x and y.
        ratio = torch.stack(
            [torch.stack([e[:, 0].to(kind).mean(1), e[:, :, 0].to(kind).mean(1)], -1) for e in exists], 1
        )
        points = self._centres(shapes, ratio).unsqueeze(2) * ratio.unsqueeze(1)
        for layer in self.encoder:
            x = layer(x, place, shapes, points, known)
        asked = self.prompt(granularity, x)
        boxes = self._first(x, known, shapes, ratio, asked)
        return self._decode(x, known, shapes, ratio, boxes, asked)

    @staticmethod
    def _centres(shapes: Sequence[tuple[int, int]], ratio: Tensor) -> Tensor:
        """(B, M, 2) centres of all tokens in shares of what exists of their level."""
        out = []
        for i, (h, w) in enumerate(shapes):
            y, x = (torch.arange(n, device=ratio.device, dtype=ratio.dtype) + 0.5 for n in (h, w))
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
            out.append(grid / (ratio[:, None, i] * ratio.new_tensor([w, h])))
        return torch.cat(out, 1)

    def _first(
        self, x: Tensor, known: Tensor, shapes: Sequence[tuple[int, int]], ratio: Tensor, asked: Tensor
    ) -> Tensor:
        """(B, Q, 4) boxes before the sigmoid, of the tokens that score best; they get no gradient."""
        side = torch.cat([ratio.new_full((h * w,), 0.05 * 2.0**i) for i, (h, w) in enumerate(shapes)])
        at = torch.cat([self._centres(shapes, ratio), side[None, :, None].expand(len(x), -1, 2)], -1)
        good = known & ((at > 0.01) & (at < 0.99)).all(-1)
        x = self.enc_norm(self.enc_output(x.masked_fill(~good.unsqueeze(-1), 0)))
        index = (x @ asked).topk(self.num_queries, 1)[1]
        at = at.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        # Tokens at the border, and those that do not exist, propose the whole image.
        there = good.gather(1, index).unsqueeze(-1)
        logit = torch.where(there, (at / (1 - at)).log(), float("inf"))
        chosen = x.gather(1, index.unsqueeze(-1).expand(-1, -1, self.dim))
        return (self.enc_box(chosen) + logit).detach()

    def _decode(
        self, memory: Tensor, known: Tensor, shapes: Any, ratio: Tensor, boxes: Tensor, asked: Tensor
    ) -> Proposals:
        x = self.queries.expand(len(memory), -1, -1)
        reference = boxes.sigmoid()
        before, layers = reference, []
        for layer in self.decoder:
            points = reference.unsqueeze(2) * torch.cat([ratio, ratio], -1).unsqueeze(1)
            place = self.place(box_sines(points[:, :, 0], self.dim // 2).to(x.dtype))
            x = layer(x, place, memory, shapes, points, known)
            said = self.norm(x)
            layers.append(((self.box(said) + inverse_sigmoid(before, 1e-3)).sigmoid(), said @ asked))
            before = (self.box(x) + inverse_sigmoid(reference, 1e-3)).sigmoid()
            reference = before.detach()
        return Proposals(*layers[-1], tuple(layers))

    def loss(self, prediction: Proposals, target: Sequence[Tensor]) -> dict[str, Tensor]:
        """Terms summed over layers: ``2 focal + 5 |b - t| + 2 (1 - GIoU)`` of boxes matched one to one.

        Our reading, after DINO: the release has no training code.

        Args:
            target: for each image (m, 4) boxes, corners in shares, of the granularity that was asked for; m may be 0.
        """
        if len(target) != len(prediction.boxes):
            raise ValueError(f"target holds boxes of {len(target)} images, prediction of {len(prediction.boxes)}")
        for i, t in enumerate(target):
            check_target_boxes(f"target[{i}]", t, "share")
        count = max(1, sum(len(t) for t in target))
        terms: dict[str, Tensor] = {}
        for boxes, logits in prediction.layers:
            truth, near, wanted = torch.zeros_like(logits), [], []
            for i, t in enumerate(target):
                if not len(t):
                    continue
                mine = to_corners(boxes[i])
                share = logits[i].sigmoid()
                cost = 5 * (boxes[i][:, None] - to_centres(t)).abs().sum(-1) - 2 * overlaps(mine, t)[1]
                rows, columns = match((cost - 2 * share.unsqueeze(1)).detach())
                truth[i, rows] = 1
                near.append(mine[rows])
                wanted.append(t[columns].to(mine))
            found = {"focal": 2 * focal_loss(logits, truth).sum() / count}
            if near:
                found |= box_loss(torch.cat(near), torch.cat(wanted), l1=20.0, giou=2.0)  # a mean over four numbers
            for name, term in found.items():
                terms[name] = terms.get(name, term.new_zeros(())) + term
        return terms

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``UPN``; its backbone is left to who loads that, and ``ref_point_head_point`` is dead."""
        theirs = Released(state_dict, "chatrex.upn's UPN")
        theirs.leave(r"backbone\..*", because="a model of its own")
        theirs.leave(r"transformer\.decoder\.ref_point_head_point\..*", because="multiplied by zero")
        theirs.leave(r"(transformer\.decoder\.)?bbox_embed\.[1-9]\d*\..*", because="shared by all layers")
        theirs.leave(r"transformer\.decoder\.bbox_embed\.0\..*", because="the same as outside the decoder")
        prompts = [theirs.take(f"transformer.{name}_grained_prompt.weight") for name in GRANULARITIES]
        layer = {str(i): str(2 * i) for i in range(3)}

        def heads(name: str) -> Any:
            return lambda m, v: {f"{name}.{layer[m.group(1)]}.{m.group(2)}": v}

        out = theirs.renamed(
            {
                r"transformer\.level_embed": "level_embed",
                r"transformer\.(encoder|decoder)\.layers\.(.*)": r"\1.\2",
                r"transformer\.decoder\.norm\.(.*)": r"norm.\1",
                r"transformer\.decoder\.ref_point_head\.layers\.(\d)\.(.*)": heads("place"),
                r"transformer\.tgt_embed\.weight": "queries",
                r"transformer\.enc_output\.(.*)": r"enc_output.\1",
                r"transformer\.enc_output_norm\.(.*)": r"enc_norm.\1",
                r"transformer\.enc_out_bbox_embed\.layers\.(\d)\.(.*)": heads("enc_box"),
                r"bbox_embed\.0\.layers\.(\d)\.(.*)": heads("box"),
                r"input_proj\.(.*)": r"input_proj.\1",
            }
        )
        return {**theirs.close(out), "prompts": torch.cat(prompts)}


def chosen(
    found: Proposals,
    sizes: Sequence[Sequence[int]],
    min_score: float = 0.3,
    threshold: float = 0.8,
    most: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """For every image the boxes (k, 4), corners in pixels, and scores (k,) that are kept, best first; k may be 0.

    Args:
        found: of :class:`UPN`.
        sizes: (height, width) of every image.
        min_score: least score.
        threshold: boxes that a better one overlaps by more are dropped.
        most: boxes of an image.
    """
    check_real("min_score", min_score, least=0, most=1)
    known = check_sizes("sizes", sizes, len(found.boxes))
    out = []
    for boxes, logits, (height, width) in zip(found.boxes, found.logits, known, strict=True):
        scores = logits.sigmoid()
        good = scores >= min_score
        corners = to_corners(boxes[good]) * boxes.new_tensor([width, height, width, height])
        kept = suppress_boxes(corners, scores[good], threshold, most=most)
        out.append((corners[kept], scores[good][kept]))
    return out
