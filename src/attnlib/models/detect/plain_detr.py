"""Plain DETR: object queries over one map of any backbone; boxes bias attention and are refined layer by layer.

Lin et al., 2023, "DETR Doesn't Need Multi-Scale or Locality Design", arXiv 2308.01904. Every layer of the decoder is
self-attention among queries, cross attention to all pixels biased by the boxes so far (:class:`BoxAttention`), and an
MLP. Behind every layer boxes move: in pixels, by deltas relative to their size (``reparam``), or as sigmoids of sums of
logits. In training further queries, which do not see the others, are matched to every target several times (hybrid
matching). The first boxes are learned, or proposed from the map (``two_stage``): every token of the map, and of its
copies in other resolutions, scores and moves a box of its own, and the best ones are where queries start; what queries
hold then is made from these boxes too, or learned (``mixed_selection``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_choice,
    check_divides,
    check_flag,
    check_int,
    check_ints,
    check_real,
    check_valid,
    describe,
)
from ...grids import coordinates
from ...nn.dense.plain_detr import BoxAttention
from ...nn.released import Released
from ...positions import resized, sincos
from ..backbones.stages import map_info
from ..protocol import answering
from .boxes import apply_deltas, deltas_between, match, overlaps, spans, to_centres, to_corners

NORMS = ("pre", "post")

#: What ``position_embedding`` can be: sines of a token's place, as it is, times 2 pi, or times 2 pi over the side of
#: the map; or learned tables.
PLACES = ("tokens", "sine_unnorm", "sine", "learned")

#: Rows and columns of learned tables.
LEARNED = 50

#: Side in pixels of proposed boxes on the finest map, which move by deltas; and as a share of the image, otherwise.
SMALLEST, SHARE = 50.0, 0.05

#: Biases of class heads: one in a hundred is there.
PRIOR = -4.59511985013459


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

    def move(self, boxes: Tensor, deltas: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
        """Corners in pixels, moved."""
        if self.reparam:
            return apply_deltas(to_centres(boxes), deltas, size)
        scale = spans(size, boxes)
        return to_corners((inverse_sigmoid(to_centres(boxes) / scale) + deltas).sigmoid() * scale)

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        context: Tensor,
        size: tuple[int, int] | Tensor,
        position: Tensor | None = None,
        positions: Tensor | None = None,
        context_valid: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> Decoded:
        """Queries (B, Q, C) and their first boxes (B, Q, 4) through all layers.

        Args:
            size: (height, width) of the images in pixels, or a tensor (B, 2) of one for each.
            position, positions, context_valid, apart: as of :class:`DecoderLayer`.
        """
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


def detector_state(
    state_dict: Mapping[str, Tensor],
    model: PlainDETR,
    encoder: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """From the authors' ``PlainDETR`` or ``PlainDETRReParam``, with two stages, to :class:`PlainDETR`.

    Args:
        state_dict: theirs.
        model: ours.
        encoder: from the state dict of their backbone to that of ``model.encoder``; as it is by default.
    """
    theirs = Released(state_dict, "Plain-DETR's PlainDETR")
    depth = len(model.classify)
    theirs.leave(
        r"transformer\.decoder\.(?:class|bbox)_embed\..+", because="the same modules as class_embed, bbox_embed"
    )
    theirs.leave(r"transformer\.level_embed", because="one level: it adds the same to every score")
    out = theirs.parts(r"backbone\.0\.(?:net\.)?body\.(.+)", "encoder", encoder or dict)
    out |= theirs.parts(
        rf"((?:transformer\.decoder|bbox_embed)\.(?!{depth}\.).+)",
        "decoder",
        lambda held: decoder_state({k.removeprefix("transformer.decoder."): v for k, v in held.items()}),
    )
    out |= theirs.renamed(
        {
            r"backbone\.0\.upsample\.(\d+)\.(?:ln\.)?(weight|bias)": r"upsample.\1.\2",
            r"backbone\.1\.0\.row_embed\.weight": lambda _, value: {"rows": value.T},
            r"backbone\.1\.0\.col_embed\.weight": lambda _, value: {"columns": value.T},
            r"input_proj\.0\.0\.(weight|bias)": r"project.\1",
            r"input_proj\.0\.1\.(weight|bias)": r"project_norm.\1",
            r"query_embed\.weight": "query",
            rf"class_embed\.{depth}\.(weight|bias)": r"proposals.classify.\1",
            rf"bbox_embed\.{depth}\.layers\.(\d)\.(weight|bias)": lambda match, value: {
                f"proposals.box_head.{2 * int(match[1])}.{match[2]}": value
            },
            r"class_embed\.(\d+)\.(weight|bias)": r"classify.\1.\2",
            r"transformer\.enc_output\.(weight|bias)": r"proposals.fc.\1",
            r"transformer\.enc_output_norm\.(weight|bias)": r"proposals.norm.\1",
            r"transformer\.enc_output_proj\.(\d+)\.(\d+)\.(?:ln\.)?(weight|bias)": r"proposals.levels.\1.\2.\3",
            r"transformer\.pos_trans\.(weight|bias)": r"from_boxes.\1",
            r"transformer\.pos_trans_norm\.(weight|bias)": r"from_boxes_norm.\1",
        }
    )
    return theirs.close(out)


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


def waves(places: Tensor, each: int) -> Tensor:
    """(..., r) -> (..., r * each): sine and cosine, in turn, of ``2 pi x 10000^(-2 i / each)``, by axis."""
    period = 10000.0 ** (torch.arange(0, each, 2, dtype=torch.float32, device=places.device) / each)
    angle = (places * (2 * math.pi)).unsqueeze(-1) / period
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


def resampling(dim: int, factor: int, narrow: bool = False) -> nn.Sequential:
    """Convolutions that change the side of a map by ``2^factor``, with norms and GELUs between.

    Args:
        dim: width.
        factor: how often the side is doubled; negative: halved.
        narrow: every one halves the width.
    """
    layers: list[nn.Module] = []
    for i in range(abs(factor)):
        kind = nn.ConvTranspose2d if factor > 0 else nn.Conv2d
        layers += [LayerNorm2d(dim), nn.GELU()] if i else []
        out = dim // 2 if narrow else dim
        layers.append(kind(dim, out, 2, 2))
        dim = out
    return nn.Sequential(*layers)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm of the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def doublings(name: str, coarse: int, fine: int) -> int:
    """How often a side of ``coarse`` pixels per token is doubled until there are ``fine``.

    Raises:
        ValueError: no power of two leads from one to the other.
    """
    factor = round(math.log2(coarse / fine))
    if coarse * 2.0**-factor != fine:
        raise ValueError(f"{name}={fine} must be {coarse}, the pixels per token of the map, times a power of 2")
    return factor


class Proposed(NamedTuple):
    """What the first stage gives, of all S tokens of all its maps.

    Args:
        logits: (B, S, classes); the first class says whether there is anything.
        boxes: (B, S, 4) corners in pixels.
        before: (B, S, 4) corners, where they stood before they moved.
        deltas: (B, S, 4), what moved them.
    """

    logits: Tensor
    boxes: Tensor
    before: Tensor
    deltas: Tensor


class Proposals(nn.Module):
    """Every token of a map, and of copies of it in other resolutions, proposes a box: the first stage.

    The box of a token lies around it; on map ``l`` its sides are ``50 * 2^l`` pixels, or ``0.05 * 2^l`` of the image
    where boxes move by logits. Tokens of padding, and of boxes with a number outside (0.01, 0.99) of the image, read
    zeros instead, and their boxes stand behind the image.

    Args:
        dim: width of the map.
        num_classes: of the logits.
        stride: pixels per token of the map.
        strides: the same of the copies, one for each.
        reparam: boxes move by deltas, in pixels.
    """

    def __init__(self, dim: int, num_classes: int, stride: int, strides: Sequence[int], reparam: bool = True):
        super().__init__()
        self.strides = check_ints("proposal_strides", strides, least=1)
        if not self.strides:
            raise ValueError("proposal_strides must name at least one map")
        self.stride, self.reparam = stride, reparam
        self.levels = nn.ModuleList(resampling(dim, doublings("proposal_strides", stride, s)) for s in self.strides)
        self.fc, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        self.classify = nn.Linear(dim, num_classes)
        nn.init.constant_(self.classify.bias, PRIOR)
        self.box_head = BoxHead(dim)

    def forward(self, context: Tensor, size: tuple[int, int] | Tensor, valid: Tensor | None = None) -> Proposed:
        """(B, h, w, C) and the size of the images, as of :class:`Decoder`; ``valid``: (B, h, w), which tokens exist."""
        maps, places, sides, exist = [], [], [], []
        scale = spans(size, context)
        there = None if valid is None else valid.unsqueeze(1).float()
        grids = []
        for i, (level, step) in enumerate(zip(self.levels, self.strides, strict=True)):
            made = level(context.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            grid = (made.shape[1], made.shape[2])
            own = None if there is None else F.interpolate(there, grid)[:, 0]  # as at the nearest place
            at = (coordinates(grid, made.device).flip(-1).to(made.dtype) + 0.5).expand(made.shape[0], -1, -1)
            if self.reparam:
                at, side = at * step, SMALLEST * 2.0**i
            else:
                count = at.new_tensor([grid[1], grid[0]])
                if own is not None:
                    count = torch.stack([own[:, 0].sum(1), own[:, :, 0].sum(1)], -1).unsqueeze(1).to(at)
                at, side = at / count, SHARE * 2.0**i
            maps.append(made.flatten(1, 2))
            places.append(at)
            sides.append(torch.full_like(at, side))
            grids.append(grid)
            if own is not None:
                exist.append(own.flatten(1) > 0)
        boxes = torch.cat([torch.cat(places, 1), torch.cat(sides, 1)], -1)  # centres and sizes
        limit = scale if self.reparam else torch.ones_like(boxes)
        absent = ~((boxes > 0.01 * limit) & (boxes < 0.99 * limit)).all(-1, keepdim=True)
        if exist:
            absent = absent | ~torch.cat(exist, 1).unsqueeze(-1)
        tokens = self.norm(self.fc(torch.cat(maps, 1).masked_fill(absent, 0.0)))
        deltas = self.box_head(tokens)
        if self.reparam:
            boxes = boxes.masked_fill(absent, float(max(grids[0]) * self.strides[0]))
            moved = apply_deltas(boxes, deltas, size)
        else:
            logits = (boxes / (1 - boxes)).log().masked_fill(absent, float("inf"))
            moved, boxes = to_corners((logits + deltas).sigmoid() * scale), boxes.masked_fill(absent, 1.0) * scale
        return Proposed(self.classify(tokens), moved, to_corners(boxes), deltas)


class LastMap(nn.Module):
    """A backbone as an encoder: its last map, normed, as the authors read their Swin V2.

    Args:
        model: as ``create_model`` gives it, with a norm behind its stages.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.feature_info = [model.feature_info[-1]]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.model.forward_features(x).permute(0, 3, 1, 2)]


class Found(NamedTuple):
    """What a detector makes of images.

    Args:
        decoded: what the decoder gives.
        logits: (B, Q, classes) of every layer.
        proposed: what the first stage gives; ``None`` without one.
    """

    decoded: Decoded
    logits: list[Tensor]
    proposed: Proposed | None


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
        two_stage: propose the first boxes from the map, instead of learning them.
        mixed_selection: with ``two_stage``, what queries hold is learned, and only their positions come from boxes.
        proposal_strides: with ``two_stage``, pixels per token of the maps that propose, each that of the encoder's map
            times a power of 2; one, as it is, by default.
        upsample: pixels per token that the encoder's map is brought to by transposed convolutions, each of which halves
            its width; as it is by default.
        position_embedding: of tokens of the map: ``"tokens"``, ``"sine_unnorm"``, ``"sine"`` or ``"learned"``; the
            last three are the authors'.
        loss_weights: of class, box and overlap, in the loss and in matching; the authors have (2, 1, 2) for
            ``reparam``.
        compat: ``"authors"`` adds -100 to scores of padding instead of leaving it out, and counts the size of images in
            whole tokens.

    Differs from the authors' detector: boxes are pixels throughout; learned first boxes have a size, and are their own
    parameters, where theirs are points that a linear map makes of the queries; one box head per layer; no embedding of
    the level, which adds the same to every score. Tables of learned positions serve more than 50 rows or columns by
    interpolation.
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
        two_stage: bool = False,
        mixed_selection: bool = False,
        proposal_strides: Sequence[int] | None = None,
        upsample: int | None = None,
        position_embedding: str = "tokens",
        loss_weights: Sequence[float] = (2.0, 5.0, 2.0),
        compat: str | None = None,
    ):
        super().__init__()
        info = map_info(encoder)
        check_int("num_classes", num_classes, least=1)
        if check_int("dim", dim, least=1) % 4:
            raise ValueError(f"dim={dim} must be a multiple of 4: sines and cosines of rows and of columns share it")
        self.queries, self.many = check_int("queries", queries, least=1), check_int("many", many, least=0)
        self.repeats = check_int("repeats", repeats, least=1)
        self.many_weight = check_real("many_weight", many_weight, least=0)
        check_choice("position_embedding", position_embedding, PLACES)
        check_choice("compat", compat, (None, "authors"))
        if check_flag("mixed_selection", mixed_selection) and not check_flag("two_stage", two_stage):
            raise ValueError("mixed_selection=True needs two_stage=True: without it queries are learned anyway")
        if proposal_strides is not None and not two_stage:
            raise ValueError("proposal_strides was given without two_stage=True")
        if len(loss_weights) != 3:
            raise ValueError(f"loss_weights={tuple(loss_weights)} must be three: of class, box and overlap")
        first, second, third = (check_real("loss_weights", weight, least=0) for weight in loss_weights)
        self.loss_weights = (first, second, third)
        self.num_classes, self.encoder = num_classes, encoder
        self.position_embedding, self.compat = position_embedding, compat
        last = info[-1]
        self.stride, width = int(last["reduction"]), int(last["num_chs"])
        self.upsample: nn.Module = nn.Identity()
        if upsample is not None:
            factor = doublings("upsample", self.stride, check_int("upsample", upsample, least=1))
            if factor < 0 or width % 2**factor:
                raise ValueError(
                    f"upsample={upsample} must be at most {self.stride}, the pixels per token of the encoder's map, "
                    f"whose width {width} is halved with every doubling"
                )
            self.upsample = resampling(width, factor, narrow=True)
            self.stride, width = upsample, width // 2**factor
        self.project = nn.Conv2d(width, dim, 1)
        nn.init.xavier_uniform_(self.project.weight)
        if self.project.bias is not None:
            nn.init.zeros_(self.project.bias)
        self.project_norm = nn.GroupNorm(32 if dim % 32 == 0 else 1, dim)
        box = dict(
            distance=distance, hidden=box_hidden if check_flag("box_bias", box_bias) else 0, stride=self.stride,
            compat=compat,
        )  # fmt: skip
        self.decoder = Decoder(dim, num_heads, hidden, depth, norm, dropout, reparam, look_twice, box)
        count = queries + many
        self.query = nn.Parameter(torch.randn(count, dim)) if mixed_selection or not two_stage else None
        self.position: nn.Parameter | None = None
        self.reference: nn.Parameter | None = None
        self.proposals: Proposals | None = None
        if two_stage:
            strides = (self.stride,) if proposal_strides is None else proposal_strides
            self.proposals = Proposals(dim, num_classes, self.stride, strides, reparam)
            self.from_boxes, self.from_boxes_norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
            nn.init.xavier_uniform_(self.from_boxes.weight)
        else:
            self.position = nn.Parameter(torch.randn(count, dim))
            side = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
            self.reference = nn.Parameter(inverse_sigmoid(torch.cat([side, torch.full((count, 2), 0.25)], -1)))
        self.classify = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(depth))
        for head in self.classify:
            nn.init.constant_(head.bias, PRIOR)  # type: ignore[arg-type]
        self.rows: nn.Parameter | None = None
        self.columns: nn.Parameter | None = None
        if position_embedding == "learned":
            self.rows, self.columns = (nn.Parameter(torch.rand(dim // 2, LEARNED)) for _ in range(2))

    def places(self, context: Tensor, valid: Tensor | None = None) -> Tensor:
        """(1 or B, h, w, C): what the positions of a map (B, h, w, C) are, ``valid`` (B, h, w) of which exist."""
        height, width, dim = context.shape[1:]
        if self.rows is not None and self.columns is not None:
            rows, columns = (
                table[:, :n] if n <= LEARNED else resized(table, (n,))
                for table, n in ((self.rows, height), (self.columns, width))
            )
            out = [columns[:, None].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)]
            return torch.cat(out).permute(1, 2, 0)[None]
        if self.position_embedding == "tokens":
            at = coordinates((height, width), context.device)
            return sincos(at, dim).to(context.dtype).view(1, height, width, dim)
        there = torch.ones(1, height, width, dtype=torch.bool, device=context.device) if valid is None else valid
        at = torch.stack([there.cumsum(axis, dtype=torch.float32) for axis in (1, 2)], -1) - 0.5
        if self.position_embedding == "sine":
            last = torch.stack([at[:, -1:, :, 0].expand_as(there), at[:, :, -1:, 1].expand_as(there)], -1) + 0.5
            at = at / (last + 1e-6)
        return waves(at, dim // 2).to(context.dtype)

    def _first(self, proposed: Proposed | None, size: tuple[int, int] | Tensor, batch: int, count: int) -> Any:
        """What queries hold, their positions and their first boxes."""
        query = None if self.query is None else self.query[:count].expand(batch, -1, -1)
        if proposed is None:
            assert self.reference is not None and self.position is not None
            scale = spans(size, self.reference)
            boxes = to_corners(self.reference[:count].sigmoid() * scale).expand(batch, -1, -1)
            return query, self.position[None, :count], boxes
        if proposed.logits.shape[1] < count:
            raise ValueError(
                f"queries={self.queries} (and many={self.many} in training) must be at most "
                f"{proposed.logits.shape[1]}, the boxes that maps of these images propose"
            )
        best = proposed.logits[..., 0].topk(count, 1)[1]
        boxes = proposed.boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)).detach()
        centres = to_centres(boxes)
        if not self.decoder.reparam:
            centres = centres / spans(size, boxes)
        told = waves(centres, self.from_boxes.in_features // 4).to(boxes.dtype)
        position, held = self.from_boxes_norm(self.from_boxes(told)).chunk(2, -1)
        return held if query is None else query, position, boxes

    def decode(self, images: Tensor, valid: Tensor | None = None) -> Found:
        """All layers' boxes and logits; ``valid``: (B, H, W), which pixels exist, from the top left corner of each."""
        if valid is not None:
            check_valid("valid", valid, (images.shape[0], *images.shape[2:]))
            images = images.masked_fill(~valid.unsqueeze(1), 0.0)
        feature = self.project_norm(self.project(self.upsample(self.encoder(images)[-1])))
        context = feature.permute(0, 2, 3, 1)
        batch, height, width = context.shape[:3]
        count = self.queries + (self.many if self.training else 0)
        size: tuple[int, int] | Tensor = (images.shape[2], images.shape[3])
        exist = None
        if self.compat == "authors":
            size = (height * self.stride, width * self.stride)
        if valid is not None:
            exist = F.interpolate(valid.unsqueeze(1).float(), (height, width))[:, 0] > 0
            shown = (exist, self.stride) if self.compat == "authors" else (valid, 1)
            size = torch.stack([shown[0][:, :, 0].sum(1), shown[0][:, 0].sum(1)], -1) * shown[1]
        proposed = None if self.proposals is None else self.proposals(context, size, exist)
        query, position, boxes = self._first(proposed, size, batch, count)
        apart = None
        if count > self.queries:
            group = torch.arange(count, device=images.device) >= self.queries
            apart = group[:, None] != group
        decoded = self.decoder(query, boxes, context, size, position, self.places(context, exist), exist, apart)
        return Found(decoded, [head(h) for head, h in zip(self.classify, decoded.hidden, strict=True)], proposed)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> logits (B, Q, classes) and boxes (B, Q, 4) in pixels, of the last layer."""
        found = self.decode(images, valid)
        return found.logits[-1][:, : self.queries], found.decoded.boxes[-1][:, : self.queries]

    def loss(
        self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Focal loss of classes, L1 and generalized IoU of matched boxes, summed over layers and the first stage.

        Args:
            images: (B, C, H, W).
            targets: per image ``boxes`` (K, 4), corners in pixels inside the image, and ``labels`` (K,).
            valid: (B, H, W), which pixels exist.

        Raises:
            ValueError: as many targets as images are needed; boxes outside, labels that are no class.
        """
        self._check_targets(images, targets)
        decoded, logits, proposed = self.decode(images, valid)
        size = images.new_tensor([images.shape[3], images.shape[2]] * 2).expand(len(targets), -1)
        if valid is not None:
            size = spans(torch.stack([valid[:, :, 0].sum(1), valid[:, 0].sum(1)], -1), images)[:, 0]
        out: dict[str, Tensor] = {}

        def add(terms: Mapping[str, Tensor], weight: float = 1.0) -> None:
            for name, value in terms.items():
                out[name] = out.get(name, value.new_zeros(())) + weight * value

        parts = [(slice(0, self.queries), 1, 1.0)]
        if self.training and self.many:
            parts.append((slice(self.queries, None), self.repeats, self.many_weight))
        reparam = self.decoder.reparam
        for some, times, weight in parts:
            for i, scores in enumerate(logits):
                moved = (decoded.before[i][:, some], decoded.deltas[i][:, some]) if reparam else None
                boxes = decoded.boxes[i][:, some]
                add(detection_loss(scores[:, some], boxes, targets, size, times, moved, self.loss_weights), weight)
        if proposed is not None:  # whether there is anything is all that it is asked for
            things = [dict(boxes=t["boxes"], labels=torch.zeros_like(t["labels"])) for t in targets]
            moved = (proposed.before, proposed.deltas) if reparam else None
            add(detection_loss(proposed.logits, proposed.boxes, things, size, 1, moved, self.loss_weights))
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

    @answering
    def predict(
        self, images: Tensor, top: int = 100, threshold: float = 0.0, valid: Tensor | None = None
    ) -> list[Detections]:
        """The ``top`` best (query, class) pairs of every image with at least that score."""
        check_int("top", top, least=1)
        logits, boxes = self(images, valid)
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
        size: as of :func:`matching_cost`; (B, 4) of one for each image.
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
        side = size[i] if size.dim() > 1 else size
        with torch.no_grad():
            rows, columns = match(matching_cost(logits[i], boxes[i], labels, truth, side, own, weights))
        wanted[i, rows, labels[columns]] = 1.0
        if own is None:
            box = box + (to_centres(boxes[i, rows]) / side - to_centres(truth[columns]) / side).abs().sum()
        else:
            goal = deltas_between(to_centres(own[0][rows]), to_centres(truth[columns]))
            box = box + (own[1][rows] - goal).abs().sum()
        overlap = overlap + (1 - overlaps(boxes[i, rows], truth[columns])[1].diagonal()).sum()
    return {
        "class": weights[0] * focal_loss(logits, wanted).sum() / total, "box": weights[1] * box / total,
        "overlap": weights[2] * overlap / total,
    }  # fmt: skip
