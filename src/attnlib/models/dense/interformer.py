"""InterFormer: an image is encoded once, every click runs a light module over what was kept.

Huang et al., 2023, "InterFormer: Real-time Interactive Image Segmentation", arXiv 2304.02942. A vision transformer and
transposed convolutions make four maps of the image, of 4, 8, 16 and 32 pixels per token. What clicks and earlier
predictions say of every pixel, the reference label (:mod:`attnlib.models.dense.clicks`), is added to the finest as one
of five learned vectors, and I-MSA goes over the maps from fine to coarse:

    ``x <- x + attention(GN(x), GN(F_i));  x <- x + IRB(GN(x))``

The first block of a stage reads the map of the image (:mod:`attnlib.nn.reduced.interformer_imsa`), later ones the
tokens themselves; last ones, in the larger model, may be confined to a box. Between stages 3 x 3 patches are merged.
``IRB`` is two 1 x 1 convolutions with a depthwise 3 x 3 one between. UPerNet's head classifies pixels.

>>> import attnlib
>>> model = attnlib.create_model("interformer_light", embed_dim=16, depth=1, num_heads=2, dims=(8, 8, 16, 16),
...                              imsa_heads=(1, 1, 2, 2), width=8, img_size=64).eval()
>>> session = model.session(torch.rand(3, 40, 50))
>>> session.click(12, 30).shape, session.click(3, 4, positive=False).shape, len(session.clicks)
(torch.Size([40, 50]), torch.Size([40, 50]), 2)

Differs from the authors' code: any size (zeros at the bottom and on the right, up to whole tokens of the coarsest map,
whose predictions are cut off); tables of positions are interpolated (bicubic) for images of another size, where theirs
take the nearest; boxes of a batch are refined one image at a time, as theirs do with a batch of one, where larger
batches are resampled to a common size. ``prediction > 0`` is foreground.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_ints, check_real, describe
from ...nn.base import Mechanism
from ...nn.dense.eva import EvaAttention
from ...nn.layers import ConvNorm, DepthwiseConv, DropPath, Mlp, Patchify, resize_map
from ...nn.recompute import checkpointed
from ...nn.reduced.interformer_imsa import PoolingAttention
from ...nn.released import Released, split_rule
from ..backbones.vit import TokenHead, VisionTransformer, start
from ..blocks import Block, Make, Place, places
from ..build import register_models
from ..protocol import answering, evaluating
from .clicks import Click, check_click, clicked, next_click, predicted, unknown
from .heads import UPerHead, resized_logits

STRIDES = (4, 8, 16, 32)
MODES = 5


class WholeNorm(nn.Module):
    """GroupNorm of one group: a map (B, H, W, C) is normed over all its tokens and channels."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[1:], eps=self.eps), self.weight)


class InvertedBottleneck(nn.Module):
    """1 x 1 convolution, hard swish, 3 x 3 depthwise, hard swish, 1 x 1 on (B, H, W, dim)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.local = ConvNorm(dim, hidden, norm=False, bias=True), DepthwiseConv(hidden, 3)
        self.fc2 = ConvNorm(hidden, dim, norm=False, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.hardswish(self.local(F.hardswish(self.fc1(x)))))


class PoolingBlock(nn.Module):
    """Attention to a map and an inverted bottleneck, each behind a norm of the whole map."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm, self.norm_read, self.attention = WholeNorm(dim), WholeNorm(dim), attention
        self.mlp_norm, self.mlp = WholeNorm(dim), InvertedBottleneck(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        """(B, H, W, C); ``read`` (B, H', W', C) is what keys come from, ``x`` by default."""
        mixed = self.attention(self.norm(x), self.norm_read(x if read is None else read))
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class MergePatches(nn.Module):
    """Patches of 3 x 3 tokens, 2 apart, to one: their channels side by side, LayerNorm, linear map without bias."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(9 * dim), nn.Linear(9 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        _, height, width, _ = x.shape
        patches = F.unfold(x.permute(0, 3, 1, 2), 3, padding=1, stride=2).transpose(1, 2)
        return self.reduction(self.norm(patches)).unflatten(1, (-(-height // 2), -(-width // 2)))


class IMSA(nn.Module):
    """The light module: a reference label and four maps of the image to four maps for a head.

    Args:
        dims: width per stage.
        num_heads: heads per stage.
        depths: blocks per stage.
        refine_from: how many of them are not confined to a box, per stage.
        mlp_ratio: hidden width of bottlenecks over the width, per stage.
        pool_ratios: of the attention, per stage.
        img_size: sides of images that the numbers of cells are made for.
        global_keys: blocks that are confined to a box read the whole map, not the box alone.
        drop_path_rate: stochastic depth of the last block.
        mechanism: takes the place of the attention; it must read a ``context``.
    """

    def __init__(
        self,
        dims: Sequence[int] = (32, 64, 128, 256),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        depths: Sequence[int] = (1, 1, 2, 1),
        refine_from: Sequence[int] = (1, 1, 2, 1),
        mlp_ratio: Sequence[float] = (8, 8, 4, 4),
        pool_ratios: Sequence[Sequence[int]] = ((12, 16, 20, 24), (6, 8, 10, 12), (3, 4, 5, 6), (1, 2, 3, 4)),
        img_size: Sequence[int] = (512, 512),
        global_keys: bool = False,
        drop_path_rate: float = 0.1,
        mechanism: Make | None = None,
    ):
        super().__init__()
        count = len(dims)
        for name, given in (("refine_from", refine_from), ("mlp_ratio", mlp_ratio), ("pool_ratios", pool_ratios)):
            if len(given) != count:
                raise ValueError(f"{name}={given} must have one entry for each of {count} stages")
        if any(not 1 <= r <= d for r, d in zip(refine_from, depths, strict=True)):
            raise ValueError(f"refine_from={tuple(refine_from)} must be 1 to depths={tuple(depths)}")
        self.dims, self.global_keys = tuple(dims), global_keys
        self.refine_from = tuple(refine_from)
        self.checkpointing = False

        def own(place: Place) -> nn.Module:
            target = [max(1, side // place.stride) for side in img_size]
            return PoolingAttention(place.dim, place.num_heads, pool_ratios[place.stage], target)

        make = mechanism or own
        stages = []
        for row in places(dims, depths, num_heads, STRIDES[:count], drop_path_rate):
            ratio = mlp_ratio[row[0].stage]
            stages.append(nn.ModuleList(PoolingBlock(p.dim, make(p), ratio, p.drop_path) for p in row))
        self.stages = nn.ModuleList(stages)
        self.merges = nn.ModuleList(MergePatches(a, b) for a, b in zip(dims, dims[1:], strict=False))
        self.norms = nn.ModuleList(WholeNorm(d) for d in dims)
        self.modes = nn.Parameter(torch.empty(MODES, dims[0]))
        nn.init.xavier_normal_(self.modes)

    def _refined(self, blocks: Sequence[nn.Module], x: Tensor, boxes: Sequence[Sequence[int]] | None) -> Tensor:
        if boxes is None:
            for block in blocks:
                x = block(x)
            return x
        made = []
        for one, (left, top, right, bottom) in zip(x.split(1), boxes, strict=True):
            part = one[:, top:bottom, left:right]
            for block in blocks:
                part = block(part, one if self.global_keys else part)
                one = one.clone()
                one[:, top:bottom, left:right] = part
            made.append(one)
        return torch.cat(made)

    def forward(
        self, maps: Sequence[Tensor], label: Tensor, boxes: Sequence[Sequence[int]] | Tensor | None = None
    ) -> list[Tensor]:
        """Maps (B, H_i, W_i, C_i) of images and labels (B, H, W) to maps (B, H_i, W_i, C_i).

        Args:
            maps: finest first.
            label: reference labels.
            boxes: per image (left, top, right, bottom) in pixels, multiples of the coarsest stride with a block that
                is confined.
        """
        modes = F.one_hot(label.long(), MODES).to(self.modes.dtype)
        x = maps[0] + resize_map(modes, maps[0].shape[1:3]) @ self.modes
        outs = []
        for i, stage in enumerate(self.stages):
            blocks: Any = list(stage)  # type: ignore[call-overload]
            blocks = [partial(checkpointed, block, when=self.checkpointing) for block in blocks]
            x = blocks[0](x, maps[i])
            for block in blocks[1 : self.refine_from[i]]:
                x = block(x)
            out, last = x, blocks[self.refine_from[i] :]
            if last:
                scaled = None if boxes is None else [[v // STRIDES[i] for v in box] for box in boxes]
                out = self._refined(last, x, scaled)
            outs.append(self.norms[i](out))
            if i < len(self.merges):
                x = self.merges[i](x)
        return outs


def pyramid(dim: int, dims: Sequence[int]) -> nn.ModuleList:
    """The simple feature pyramid: from one map of 16 pixels per token to four, of 4, 8, 16 and 32."""

    def up(a: int, b: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(a, b, 2, 2), nn.GroupNorm(1, b)]

    def end(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 1), nn.GroupNorm(1, b), nn.GELU()]

    half, wide = max(dim // 2, 2 * dims[0]), max(2 * dim, dims[3])
    return nn.ModuleList(
        [
            nn.Sequential(*up(dim, half), nn.GELU(), *up(half, half // 2), *end(half // 2, dims[0])),
            nn.Sequential(*up(dim, max(dim // 2, dims[1])), *end(max(dim // 2, dims[1]), dims[1])),
            nn.Sequential(*end(dim, dims[2])),
            nn.Sequential(nn.Conv2d(dim, wide, 2, 2), nn.GroupNorm(1, wide), *end(wide, dims[3])),
        ]
    )


class Encoded(NamedTuple):
    """What is kept of images: maps (B, H_i, W_i, C_i), finest first, and the sides of the images in pixels."""

    maps: tuple[Tensor, ...]
    size: tuple[int, int]


class InterFormer(nn.Module):
    """Images (B, in_chans, H, W) and reference labels (B, H, W) to logits (B, 2, H, W) of background and foreground.

    Args:
        embed_dim, depth, num_heads, mlp_ratio, patch_size: of the vision transformer.
        dims, imsa_heads, imsa_depths, refine_from, imsa_mlp_ratio, pool_ratios, global_keys: of :class:`IMSA`.
        width: of the head.
        auxiliary: a second head on the third map, which serves training alone.
        mechanism: takes the place of the attention of the light module.
        in_chans: channels of images.
        img_size: sides of images that tables of positions and numbers of cells are made for.
        drop_path_rate: stochastic depth of the last block of both.
        drop_rate: dropout of channels before pixels are classified.
    """

    input_name = "encoder.stem.proj.weight"
    num_classes = 2

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        dims: Sequence[int] = (32, 64, 128, 256),
        imsa_heads: Sequence[int] = (1, 2, 4, 8),
        imsa_depths: Sequence[int] = (1, 1, 2, 1),
        refine_from: Sequence[int] = (1, 1, 2, 1),
        imsa_mlp_ratio: Sequence[float] = (8, 8, 4, 4),
        pool_ratios: Sequence[Sequence[int]] = ((12, 16, 20, 24), (6, 8, 10, 12), (3, 4, 5, 6), (1, 2, 3, 4)),
        global_keys: bool = False,
        width: int = 64,
        auxiliary: bool = True,
        mechanism: Make | None = None,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 512,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        if len(dims) != 4:
            raise ValueError(f"dims={tuple(dims)} must be the widths of 4 maps")
        if patch_size != 16:
            raise ValueError(f"patch_size={patch_size} is not possible: the maps are made from patches of 16 pixels")
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.in_chans, self.img_size = check_int("in_chans", in_chans, least=1), check_ints("img_size", sides, least=16)
        grid = tuple(side // patch_size for side in self.img_size)
        (row,) = places([embed_dim], [depth], [num_heads], [patch_size], drop_path_rate)
        blocks = []
        for place in row:
            inner = EvaAttention(place.dim, place.num_heads, relative="table", grid=grid)
            inner.k = nn.Linear(place.dim, inner.k.out_features)  # their keys have a bias, which changes nothing
            blocks.append(
                Block(
                    place.dim, inner, Mlp(place.dim, mlp_ratio), norm=_norm, drop_path=place.drop_path, layer_scale=1.0
                )
            )
        self.encoder = VisionTransformer(
            Patchify(in_chans, embed_dim, patch_size, norm=None), blocks, embed_dim, patch_size, None,
            TokenHead(embed_dim, 0), num_classes=0, in_chans=in_chans, img_size=self.img_size,
        )  # fmt: skip
        start(self.encoder, rescale=True, also=(EvaAttention,))
        self.pyramid = pyramid(embed_dim, dims)
        self.imsa = IMSA(
            dims, imsa_heads, imsa_depths, refine_from, imsa_mlp_ratio, pool_ratios, self.img_size, global_keys,
            drop_path_rate, mechanism,
        )  # fmt: skip
        self.head = UPerHead(dims, width, 2, drop_rate)
        self.auxiliary = AuxiliaryHead(dims[2], width, drop_rate) if auxiliary else None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the insides of blocks in the backward pass instead of keeping them."""
        self.encoder.set_grad_checkpointing(enable)
        self.imsa.checkpointing = enable

    # ---- the two halves

    def _check_images(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"images must be (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        if not x.shape[2:].numel():
            raise ValueError(f"images must hold at least one pixel, got {tuple(x.shape)}")

    def encode(self, images: Tensor) -> Encoded:
        """All that the image alone decides; once per image.

        Args:
            images: (B, in_chans, H, W), normalised.
        """
        self._check_images(images)
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        last = len(self.encoder.stages) - 1  # type: ignore[arg-type]
        (y,) = self.encoder.forward_intermediates(images, [last], intermediates_only=True)
        maps = [level(y).permute(0, 2, 3, 1).contiguous() for level in self.pyramid]
        return Encoded(tuple(maps), (height, width))

    def _maps(self, encoded: Encoded, label: Tensor, boxes: Sequence[Sequence[int]] | Tensor | None) -> list[Tensor]:
        size, batch = encoded.size, encoded.maps[0].shape[0]
        wanted = (batch, *size)
        if not isinstance(label, Tensor) or tuple(label.shape) != wanted or label.is_floating_point():
            raise ValueError(f"label must be reference labels {wanted} of whole numbers, got {describe(label)}")
        label = F.pad(label, (0, -size[1] % STRIDES[-1], 0, -size[0] % STRIDES[-1]), value=2)
        if boxes is not None:
            boxes = [_box(box, label.shape[1:]) for box in boxes]
            if len(boxes) != batch:
                raise ValueError(f"boxes must be one for each of {batch} images, got {len(boxes)}")
        return [m.permute(0, 3, 1, 2) for m in self.imsa(encoded.maps, label, boxes)]

    def decode(self, encoded: Encoded, label: Tensor, boxes: Sequence[Sequence[int]] | Tensor | None = None) -> Tensor:
        """Logits (B, 2, H, W) of encoded images and what is known of them; this is all that a click costs.

        Args:
            encoded: from :meth:`encode`.
            label: (B, H, W) reference labels.
            boxes: per image (left, top, right, bottom), multiples of 32 pixels, to which blocks that can be are
                confined.
        """
        return self._logits(self.head(self._maps(encoded, label, boxes)), encoded.size)

    def _logits(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        whole = [-(-side // STRIDES[-1]) * STRIDES[-1] for side in size]
        return resized_logits(logits, whole)[..., : size[0], : size[1]]

    def forward(self, images: Tensor, label: Tensor, boxes: Sequence[Sequence[int]] | Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) and (B, H, W) -> (B, 2, H, W)."""
        return self.decode(self.encode(images), label, boxes)

    # ---- clicks

    def session(self, image: Tensor, radius: float = 5, outer: float = 0) -> Session:
        """A session with one image (in_chans, H, W), which is encoded now and never again."""
        return Session(self, image, radius, outer)

    @torch.no_grad()
    def clicked_labels(
        self,
        images: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        most: int = 20,
        decay: float = 0.6,
        shrink: float = 1.7,
        radius: float = 5,
    ) -> Tensor:
        """Reference labels to train with: those of a simulated user whose last click was not answered yet.

        The first click lies where the object is deepest. How many follow is drawn, ``n`` with odds ``decay^n`` up to
        ``most``; each answers a prediction, in evaluation mode and without gradients.

        Args:
            images: (B, in_chans, H, W).
            target: (B, H, W) the truth, boolean or classes 0 and 1.
            generator: of what is drawn.
            most, decay: of the number of clicks.
            shrink: of the places, as of :func:`attnlib.models.dense.clicks.next_click`.
            radius: of clicks.

        Returns:
            (B, H, W).
        """
        check_int("most", most, least=0)
        check_real("decay", decay, above=0, most=1)
        odds = decay ** torch.arange(most + 1, dtype=torch.float64)
        count = int(torch.multinomial(odds, 1, generator=generator))
        with evaluating(self):
            held = self.encode(images) if count else None
            found = torch.zeros_like(target)
            labels = [unknown(t.shape).to(t.device) for t in target]
            clicks: list[list[Click]] = [[] for _ in target]
            for step in range(count + 1):
                for i, (prediction, truth) in enumerate(zip(found, target, strict=True)):
                    click = next_click(prediction, truth, clicks[i], 1.0 if step == 0 else shrink, generator)
                    if click is not None:
                        clicks[i].append(click)
                        labels[i] = clicked(labels[i], [click], radius)
                if step < count and held is not None:
                    found = self.decode(held, torch.stack(labels)).argmax(1).to(target.dtype)
                    labels = [predicted(label, p) for label, p in zip(labels, found, strict=True)]
        return torch.stack(labels)

    def steps(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        """One step of training: ``{"images", "target"}`` to the prediction behind simulated clicks, and the target."""
        label = self.clicked_labels(batch["images"], batch["target"], batch.get("generator"))
        encoded = self.encode(batch["images"])
        maps = self._maps(encoded, label, None)
        logits = self._logits(self.head(maps), encoded.size)
        beside = None if self.auxiliary is None else self._logits(self.auxiliary(maps[2]), encoded.size)
        return (logits, beside), batch["target"]

    def loss(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Terms of the loss by name, of logits (B, 2, H, W), alone or with those of the auxiliary head behind them."""
        logits, beside = prediction if isinstance(prediction, tuple) else (prediction, None)
        terms = {"focal": normalized_focal_loss(logits, target)}
        if beside is not None:
            terms["auxiliary"] = 0.4 * normalized_focal_loss(beside, target)
        return terms

    @answering
    def predict(self, images: Tensor, label: Tensor) -> Tensor:
        """(B, H, W) boolean: what is foreground."""
        return self(images, label).argmax(1) == 1


class AuxiliaryHead(nn.Module):
    """A 3 x 3 convolution and a linear map to two classes, of one map (B, C, H, W)."""

    def __init__(self, dim: int, width: int, drop: float):
        super().__init__()
        self.conv = ConvNorm(dim, width, 3, activation=nn.ReLU)
        self.drop, self.classifier = nn.Dropout2d(drop), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.drop(self.conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class Session:
    """Clicks on one image.

    Attributes:
        label: (H, W), what is known of every pixel.
        prediction: (H, W) boolean, what was found last.
        clicks: made so far.
    """

    def __init__(self, model: InterFormer, image: Tensor, radius: float = 5, outer: float = 0):
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise ValueError(f"image must be ({model.in_chans}, H, W), got {describe(image)}")
        self.model = model
        with torch.no_grad():
            self.encoded = model.encode(image[None])
        self.radius, self.outer = check_real("radius", radius, least=0), check_real("outer", outer, least=0)
        self.reset()

    def reset(self) -> None:
        """Forget all clicks, not the image."""
        self.label = unknown(self.encoded.size).to(self.encoded.maps[0].device)
        self.prediction = torch.zeros_like(self.label, dtype=torch.bool)
        self.clicks: list[Click] = []

    def click(self, y: int, x: int, positive: bool = True, box: Sequence[int] | None = None) -> Tensor:
        """What is foreground behind one more click: (H, W) boolean.

        Args:
            y, x: row and column of the pixel.
            positive: it is foreground; background otherwise.
            box: as of :meth:`InterFormer.decode`.

        Raises:
            ValueError: a click outside the image.
        """
        click = check_click((y, x, positive), self.encoded.size)
        self.clicks.append(click)
        self.label = clicked(self.label, [click], self.radius, self.outer)
        return self.answer(self.label, box)

    @torch.no_grad()
    def answer(self, label: Tensor, box: Sequence[int] | None = None) -> Tensor:
        """What is foreground by a reference label (H, W); it is remembered as what is likely."""
        logits = self.model.decode(self.encoded, label[None], None if box is None else [box])
        self.prediction = logits[0].argmax(0) == 1
        self.label = predicted(label, self.prediction)
        return self.prediction


def normalized_focal_loss(
    logits: Tensor, target: Tensor, alpha: float = 0.5, gamma: float = 2.0, ignore_index: int = 255
) -> Tensor:
    """Focal loss whose weights ``(1 - p)^gamma`` are scaled to a mean of 1 in every image; the mean over images.

    Args:
        logits: (B, 2, H, W), of background and foreground.
        target: (B, H, W) classes 0 and 1, boolean too, and ``ignore_index`` where a pixel has none.
        alpha: weight of foreground, ``1 - alpha`` that of background.
        gamma: of the weights.

    Reference: Sofiiuk et al., 2019, "AdaptIS", arXiv 1909.07829.
    """
    if logits.dim() != 4 or logits.shape[1] != 2 or target.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must be (B, 2, H, W), (B, H, W)"
        )
    eps = torch.finfo(torch.float32).eps
    counts = (target != ignore_index).to(logits.dtype)
    true = (target == 1).to(logits.dtype)
    found = (logits[:, 1] - logits[:, 0]).sigmoid()
    right = torch.where(counts > 0, 1 - (found - true).abs(), 1.0)
    weights = (1 - right) ** gamma
    total = counts.sum((1, 2), keepdim=True)
    weights = weights * (total / (weights.sum((1, 2), keepdim=True) + eps)).detach()
    side = torch.where(target != 0, alpha, 1 - alpha) * counts
    losses = -(side * weights * (right + eps).clamp(max=1).log() * counts).sum((1, 2))
    return (losses / total.flatten().clamp(min=1)).mean()


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


def _box(box: Sequence[int], size: Sequence[int]) -> list[int]:
    """(left, top, right, bottom) inside an image of these sides, multiples of 32."""
    given = box.tolist() if isinstance(box, Tensor) else box
    left, top, right, bottom = check_ints("box", given, least=0)
    if not (left < right <= size[1] and top < bottom <= size[0]):
        raise ValueError(
            f"box={tuple(box)} must be (left, top, right, bottom) inside {size[0]} x {size[1]} pixels, with left < "
            "right and top < bottom"
        )
    if any(v % STRIDES[-1] for v in (left, top, right, bottom)):
        raise ValueError(f"box={tuple(box)} must have multiples of {STRIDES[-1]} pixels")
    return [left, top, right, bottom]


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``ClickSegmentor``."""
    theirs = Released(state_dict, "the authors' ClickSegmentor")
    grid = model.encoder.pos_embed.shape[1:]
    out: dict[str, Tensor] = {}
    own: Any = model.imsa.stages[0][0].attention

    def attention(part: dict[str, Tensor]) -> dict[str, Tensor]:
        bias = Released({"qkv.bias": part.pop("qkv.bias")}, "MAEAttention")
        made = dict(EvaAttention.convert_state_dict(part, grid))
        return made | bias.renamed({r"qkv\.(bias)": split_rule("q", "k", "v")})

    out |= theirs.parts(r"backbone\.layers\.(\d+)\.attn\.(.+)", r"encoder.stages.\1.mixer.inner", attention)

    def positions(match: Any, value: Tensor) -> dict[str, Tensor]:
        table = value[0, 1:].unflatten(0, tuple(grid)).permute(2, 0, 1)
        return {"encoder.pos_embed": table.contiguous(), "encoder.prefix_pos_embed": value[:, :1]}

    counts = model.imsa.refine_from
    for i in range(len(model.imsa.stages)):
        for kind, offset in (("stages", 0), ("refine_stages", counts[i])):

            def moved(match: Any, value: Tensor, i: int = i, offset: int = offset) -> dict[str, Tensor]:
                return {f"{i}.{int(match[1]) + offset}.{match[2]}": value}

            held = theirs.renamed({rf"neck\.{kind}\.{i}\.blocks\.(\d+)\.(.+)": moved})
            for number in sorted({name.split(".")[1] for name in held}):
                to = f"imsa.stages.{i}.{number}"
                part = {n.split(".", 2)[2]: v for n, v in held.items() if n.split(".")[1] == number}
                inner = {n[5:]: v for n, v in part.items() if n.startswith("attn.")}
                if isinstance(own, Mechanism):
                    made = type(own).convert_state_dict(inner)  # type: ignore[attr-defined]
                    out |= {f"{to}.attention.{n}": v for n, v in made.items()}
                rest = Released({n: v for n, v in part.items() if not n.startswith("attn.")}, "PoolingBlock")
                made = rest.close(
                    rest.renamed(
                        {
                            r"norm1\.(weight|bias)": r"norm.\1",
                            r"norm_kv\.(weight|bias)": r"norm_read.\1",
                            r"norm2\.(weight|bias)": r"mlp_norm.\1",
                            r"mlp\.0\.(weight|bias)": r"mlp.fc1.conv.\1",
                            r"mlp\.2\.(weight|bias)": r"mlp.local.\1",
                            r"mlp\.4\.(weight|bias)": r"mlp.fc2.conv.\1",
                        }
                    )
                )
                out |= {f"{to}.{n}": v for n, v in made.items()}
    conv = r"(conv|bn)\.(weight|bias|running_mean|running_var|num_batches_tracked)"

    def normed(to: str) -> Any:
        def rule(match: Any, value: Tensor) -> dict[str, Tensor]:
            *places, kind, name = match.groups()
            return {f"{to.format(*places)}.{'conv' if kind == 'conv' else 'norm'}.{name}": value}

        return rule

    out |= theirs.renamed(
        {
            r"backbone\.(cls_token)": r"encoder.\1",
            r"backbone\.pos_embed": positions,
            r"backbone\.patch_embed\.projection\.(weight|bias)": r"encoder.stem.proj.\1",
            r"backbone\.layers\.(\d+)\.(?:norm1|ln1)\.(weight|bias)": r"encoder.stages.\1.mixer.norm.\2",
            r"backbone\.layers\.(\d+)\.(?:norm2|ln2)\.(weight|bias)": r"encoder.stages.\1.mlp.norm.\2",
            r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.(weight|bias)": r"encoder.stages.\1.mlp.inner.fc1.\2",
            r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.(weight|bias)": r"encoder.stages.\1.mlp.inner.fc2.\2",
            r"backbone\.layers\.(\d+)\.gamma_1": r"encoder.stages.\1.mixer.scale.gamma",
            r"backbone\.layers\.(\d+)\.gamma_2": r"encoder.stages.\1.mlp.scale.gamma",
            r"backbone\.fpn\.rescale_ops\.(\d+)\.(\d+)\.(weight|bias)": r"pyramid.\1.\2.\3",
            r"neck\.patch_embed": "imsa.modes",
            r"neck\.norm(\d)\.(weight|bias)": r"imsa.norms.\1.\2",
            r"neck\.stages\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)": r"imsa.merges.\1.\2.\3",
            r"decode_head\.conv_seg\.(weight|bias)": r"head.classifier.\1",
            r"decode_head\.psp_modules\.(\d+)\.1\." + conv: normed("head.context.pooled.{0}"),
            r"decode_head\.bottleneck\." + conv: normed("head.context.fuse"),
            r"decode_head\.lateral_convs\.(\d+)\." + conv: normed("head.pyramid.laterals.{0}"),
            r"decode_head\.fpn_convs\.(\d+)\." + conv: normed("head.pyramid.convs.{0}"),
            r"decode_head\.fpn_bottleneck\." + conv: normed("head.bottleneck"),
            r"auxiliary_head\.convs\.0\." + conv: normed("auxiliary.conv"),
            r"auxiliary_head\.conv_seg\.(weight|bias)": r"auxiliary.classifier.\1",
        }
    )
    return theirs.close(out)


_LARGE: dict[str, Any] = dict(embed_dim=1024, depth=24, num_heads=16, imsa_depths=(2, 2, 6, 3))

register_models(
    "interformer-imsa",
    InterFormer,
    {"interformer_light": {}, "interformer_tiny": _LARGE},
    params={"interformer_light": 97_373_348, "interformer_tiny": 324_557_316},
    license="MIT",
    source="YouHuang67/InterFormer",
    convert=convert,
    img_size=512,
    task="click",
)
