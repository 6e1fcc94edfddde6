"""U-Net on images and volumes, with switches: gates on skips, attention at the bottom that may guide every level.

Ronneberger et al., 2015, arXiv 1505.04597; the switches are those of Bouget et al., 2021, "Meningioma segmentation in
T1-weighted MRI leveraging global context and attention mechanisms", arXiv 2101.07715:

- ``agunet3d``: an additive gate on every skip, :class:`attnlib.nn.gates.skip.AdditiveSkipGate` side by side.
- ``daunet3d``: position and channel attention at the bottom, :class:`attnlib.models.dense.context.DualAttention`.
- ``dagunet3d``: as ``daunet3d``, and every decoder level also sees the bottom, brought to its size.

All of them with an input pyramid (the image, pooled, enters every level) and deep supervision (every decoder level
predicts). With all switches off it is the plain U-Net, ``unet2d`` and ``unet3d``.

Differs from the authors' code, which is Keras: an axis of 4 or fewer is not pooled there but doubled on the way up all
the same, so that such volumes fail; here both follow one rule, and any size goes through (odd ones pool into partial
cells and are cut on the way up). Dice leaves the background out (``compat="authors"`` has the released sum over K
classes, divided by K - 1 and clipped, which has no gradient where most is right). Logits come out, not shares. Their
channels at each level are the user's to set; the ones here are our reading of the paper's five levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints, check_real, describe
from ...nn.gates.skip import AdditiveSkipGate
from ...nn.layers import mean_pool
from ..build import register_models
from ..losses import dice_loss
from ..protocol import TaskModel, evaluating
from ..tiles import tiled
from .context import ASPP, CONV, DROP, NORM, DualAttention, conv_norm_act, resized_maps
from .ddrnet import DAPPM

SKIP_GATES = (None, "sum", "concat")
BOTTLENECKS = (None, "dual", "aspp", "dappm")
LOSSES = ("dice", "cross_entropy", "both")

#: Keras' BatchNorm, with which all of these were trained.
EPS, MOMENTUM = 1e-3, 0.01

_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_TRANSPOSED_LAYER: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Block(nn.Module):
    """Two of [convolution, BatchNorm, ReLU, dropout of channels]; with ``residual`` around a 1 x 1 shortcut."""

    def __init__(self, rank: int, dim: int, out_dim: int, norm: bool = True, drop: float = 0.0, residual: bool = False):
        super().__init__()
        options: dict[str, Any] = dict(norm=norm, eps=EPS, momentum=MOMENTUM)
        self.convs = nn.ModuleList(
            [conv_norm_act(rank, dim, out_dim, **options),
             conv_norm_act(rank, out_dim, out_dim, act=not residual, **options)]
        )  # fmt: skip
        self.drop = DROP[rank](drop) if drop else nn.Identity()
        self.shortcut = CONV[rank](dim, out_dim, 1) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.convs[0](x))
        y = self.convs[1](y)
        if self.shortcut is not None:
            y = F.relu(y + self.shortcut(x))
        return self.drop(y)


class Up(nn.Module):
    """Transposed convolution with a kernel of 3 to any larger grid: strides are those that lead there.

    Its parameters do not depend on the strides. Zeros lie as Keras lays them with ``padding="same"``.
    """

    def __init__(self, rank: int, dim: int, out_dim: int):
        super().__init__()
        self.rank, self.conv = rank, _TRANSPOSED_LAYER[rank](dim, out_dim, 3)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        strides = [-(-to // n) for n, to in zip(x.shape[2:], size, strict=True)]
        more = [max(s - 3, 0) for s in strides]
        y = _TRANSPOSED[self.rank](x, self.conv.weight, self.conv.bias, strides, 0, more)
        for axis, (s, to) in enumerate(zip(strides, size, strict=True)):
            y = y.narrow(axis + 2, max(3 - s, 0) // 2, to)
        return y


class Resize(nn.Module):
    """Linear interpolation to the size of the skip; no parameters."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return resized_maps(x, size)


class PlainEncoder(nn.Module):
    """Blocks and max-pooling: (B, in_chans, *grid) to a map per level, finest first.

    Args:
        rank: axes of the grid.
        in_chans: channels of images.
        dims: channels of the levels.
        strides: of the pooling behind every level but the last, one per axis; ``None``: 2, and 1 along an axis of 4 or
            fewer.
        pyramid: the image, pooled alike, enters every level between the first and the last through a convolution.
        norm, drop, residual: of the blocks.
    """

    def __init__(
        self, rank: int, in_chans: int, dims: Sequence[int], strides: Sequence[Sequence[int]] | None = None,
        pyramid: bool = False, norm: bool = True, drop: float = 0.0, residual: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.rank, self.strides, self.dims = rank, strides, list(dims)
        inside = range(1, len(dims) - 1) if pyramid else ()
        self.images = nn.ModuleDict({str(i): conv_norm_act(rank, in_chans, dims[i], norm=False) for i in inside})
        widths = [in_chans, *(d + dims[i] * (i in inside) for i, d in enumerate(dims[:-1], 1))]
        self.blocks = nn.ModuleList(Block(rank, w, d, norm, drop, residual) for w, d in zip(widths, dims, strict=True))

    def stride(self, level: int, grid: Sequence[int]) -> tuple[int, ...]:
        """Of the pooling behind a level on this grid."""
        if self.strides is not None:
            return tuple(self.strides[level])
        return tuple(1 if n <= 4 else 2 for n in grid)

    def forward(self, x: Tensor) -> list[Tensor]:
        image, maps = x, []
        for i, block in enumerate(self.blocks):
            if str(i) in self.images:
                x = torch.cat([self.images[str(i)](image), x], 1)
            x = block(x)
            maps.append(x)
            if i + 1 < len(self.blocks):
                s = self.stride(i, x.shape[2:])
                x = _MAX_POOL[self.rank](x, s, s, ceil_mode=True)
                if len(self.images):
                    image = mean_pool(image, s, s, ceil_mode=True, count_include_pad=False)
        return maps


class BackboneEncoder(nn.Module):
    """Any backbone that gives maps, finest first: ours and timm's with ``features_only``, transformers' AutoBackbone.

    Args:
        model: called with images.
        in_chans: channels of images.
        rank: axes of the grid.
        side: of the image on which channels are measured where the model does not say them.

    Raises:
        ValueError: what gives no maps.
    """

    def __init__(self, model: nn.Module, in_chans: int, rank: int = 2, side: int = 64):
        super().__init__()
        self.model = model
        info: Any = getattr(model, "feature_info", None)
        if info is not None:
            self.dims, self.reductions = list(info.channels()), list(info.reduction())
            return
        like = next(model.parameters())
        with torch.no_grad(), evaluating(model):
            maps = self(torch.zeros(1, in_chans, *[side] * rank, dtype=like.dtype, device=like.device))
        self.dims = [m.shape[1] for m in maps]
        self.reductions = [round(side / m.shape[2]) for m in maps]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.model(x)
        maps = getattr(maps, "feature_maps", maps)
        if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) and m.dim() == x.dim() for m in maps):
            raise ValueError(f"encoder must give maps (B, C, *grid), finest first, got {describe(maps)}")
        return list(maps)


class Level(nn.Module):
    """One step up: the map below, the skip, and what guides, put together by a block.

    Args:
        rank: axes of the grid.
        dim: channels from below.
        skip_dim: channels of the skip; 0 for none.
        out_dim: channels out.
        guide_dim: channels of what guides; 0 for none.
        gate: kind of the skip's gate.
        attention: makes a module (B, *grid, C) -> the same for the skip's channels.
        norm_all: BatchNorm and ReLU over all that was put together, as DAUNet; of the map from below alone otherwise.
        upsample: ``"transpose"`` or ``"resize"``.
        norm, drop, residual: of the block.
    """

    def __init__(
        self, rank: int, dim: int, skip_dim: int, out_dim: int, guide_dim: int = 0, gate: str | None = None,
        attention: Callable[[int], nn.Module] | None = None, norm_all: bool = False, upsample: str = "transpose",
        norm: bool = True, drop: float = 0.0, residual: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.up: nn.Module = Up(rank, dim, out_dim) if upsample == "transpose" else Resize()
        below = out_dim if upsample == "transpose" else dim
        self.guide_up = Up(rank, guide_dim, out_dim) if guide_dim else None
        together = below + skip_dim + (out_dim if guide_dim else 0)
        self.norm_all, self.acts = norm_all, norm_all or upsample == "transpose"
        normed = norm and self.acts
        self.norm = NORM[rank](together if norm_all else below, EPS, MOMENTUM) if normed else nn.Identity()
        options: dict[str, Any] = dict(norm=norm, eps=EPS, momentum=MOMENTUM)
        width = max(out_dim // 2, 1)
        self.gate = AdditiveSkipGate(skip_dim, below, width, gate, **options) if gate and skip_dim else None
        self.attention = attention(skip_dim) if attention is not None and skip_dim else None
        self.block = Block(rank, together, out_dim, norm, drop, residual)

    def forward(self, x: Tensor, skip: Tensor | None, guide: Tensor | None, size: Sequence[int]) -> Tensor:
        x = self.up(x, size)
        if not self.norm_all:
            x = F.relu(self.norm(x)) if self.acts else x
        if skip is not None and self.attention is not None:
            skip = self.attention(skip.movedim(1, -1)).movedim(-1, 1)
        if skip is not None and self.gate is not None:
            skip = self.gate(skip.movedim(1, -1), x.movedim(1, -1)).movedim(-1, 1)
        parts = [] if guide is None or self.guide_up is None else [self.guide_up(guide, size)]
        held = [] if skip is None else [skip]
        x = torch.cat([*parts, *held, x] if self.norm_all else [*parts, x, *held], 1)
        return self.block(F.relu(self.norm(x)) if self.norm_all else x)


class UNet(TaskModel):
    """Images or volumes (B, in_chans, *grid) to logits (B, num_classes, *grid), for any grid.

    Args:
        in_chans: channels of images.
        num_classes: with the background; 1 for the foreground alone.
        dims: channels of the levels, finest first, the bottom last. With a backbone, of the decoder's levels only,
            finest first: as many as it takes to get from its coarsest map to the image.
        rank: axes of the grid, 2 or 3.
        skip_gate: ``"sum"`` (Attention U-Net), ``"concat"`` (AGUNet) or none.
        skip_attention: from a number of channels to a module (B, *grid, C) -> the same, for every skip.
        bottleneck: ``"dual"`` (DAUNet), ``"aspp"``, ``"dappm"`` (images only), or from a number of channels to a module
            (B, *grid, C) -> the same.
        guided: every decoder level also sees the bottom.
        deep_supervision: a prediction of every decoder level in training.
        input_pyramid: the pooled image enters every level of the plain encoder.
        strides: of the plain encoder's pooling, one per level and axis, which the way up shares. By default 2, and 1
            along an axis of 4 or fewer.
        norm_all: as of :class:`Level`.
        upsample: ``"transpose"`` or ``"resize"``.
        residual: residual blocks.
        norm: BatchNorm.
        momentum: of the running statistics; Keras' 0.01 is slow for a short training.
        drop: dropout of channels.
        encoder: a backbone that gives maps; the plain encoder by default.
        loss_kind: ``"dice"``, ``"cross_entropy"`` or ``"both"``.
        ignore_index: the label of places that have none.
        compat: of :func:`attnlib.models.losses.dice_loss`.

    >>> UNet(dims=(2, 4, 4), bottleneck="dual").eval()(torch.randn(1, 1, 9, 8, 5)).shape
    torch.Size([1, 2, 9, 8, 5])
    """

    head_names: Sequence[str] = ("heads.",)

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 2,
        dims: Sequence[int] = (16, 32, 64, 128, 256),
        rank: int = 3,
        *,
        skip_gate: str | None = None,
        skip_attention: Callable[[int], nn.Module] | None = None,
        bottleneck: str | Callable[[int], nn.Module] | None = None,
        guided: bool = False,
        deep_supervision: bool = False,
        input_pyramid: bool = False,
        strides: Sequence[Sequence[int]] | None = None,
        norm_all: bool = False,
        upsample: str = "transpose",
        residual: bool = False,
        norm: bool = True,
        momentum: float = MOMENTUM,
        drop: float = 0.0,
        encoder: nn.Module | None = None,
        loss_kind: str = "dice",
        ignore_index: int = 255,
        compat: str | None = None,
    ):
        super().__init__()
        self.in_chans = check_int("in_chans", in_chans, least=1)
        self.num_classes = check_int("num_classes", num_classes, least=1)
        widths = check_ints("dims", dims, least=1)
        check_choice("rank", rank, (2, 3))
        check_choice("skip_gate", skip_gate, SKIP_GATES)
        check_choice("upsample", upsample, ("transpose", "resize"))
        check_choice("loss_kind", loss_kind, LOSSES)
        check_choice("compat", compat, (None, "authors"))
        check_real("drop", drop, least=0, below=1)
        check_real("momentum", momentum, above=0, most=1)
        flags = dict(guided=guided, deep_supervision=deep_supervision, input_pyramid=input_pyramid, norm_all=norm_all)
        for name, flag in {**flags, "residual": residual, "norm": norm}.items():
            check_flag(name, flag)
        self.rank, self.deep_supervision, self.guided = rank, deep_supervision, guided
        self.loss_kind, self.compat, self.ignore_index = loss_kind, compat, check_int("ignore_index", ignore_index)
        if loss_kind == "cross_entropy" and num_classes == 1:
            raise ValueError("loss_kind='cross_entropy' needs num_classes of at least 2, got 1")
        if encoder is None:
            if len(widths) < 2:
                raise ValueError(f"dims must name at least two levels, got {list(widths)}")
            self.strides = None if strides is None else _checked_strides(strides, len(widths) - 1, rank)
            self.encoder: nn.Module = PlainEncoder(
                rank, in_chans, widths, self.strides, input_pyramid, norm, drop, residual
            )
            skips, outs, bottom = list(widths[:-1]), list(widths[:-1]), widths[-1]
        else:
            if input_pyramid or strides is not None:
                raise ValueError("input_pyramid and strides belong to the plain encoder; encoder has its own levels")
            self.strides = None
            backbone = BackboneEncoder(encoder, in_chans, rank)
            self.encoder = backbone
            finest = backbone.reductions[0]
            before = max(finest, 1).bit_length() - 1  # halvings between the image and the finest map
            skips, outs, bottom = [0] * before + backbone.dims[:-1], list(widths), backbone.dims[-1]
            if len(outs) != len(skips):
                raise ValueError(
                    f"dims must have {len(skips)} numbers, one for each level from the image (finest map at stride "
                    f"{finest}) to above the coarsest map, got {list(widths)}"
                )
        self.before = len(skips) - (len(self.encoder.dims) - 1)  # type: ignore[arg-type]
        self.bottleneck = _bottleneck(bottleneck, bottom, rank)
        options: dict[str, Any] = dict(
            guide_dim=bottom if guided else 0, gate=skip_gate, attention=skip_attention, norm_all=norm_all,
            upsample=upsample, norm=norm, drop=drop, residual=residual,
        )  # fmt: skip
        below = [*outs[1:], bottom]
        self.levels = nn.ModuleList(
            Level(rank, b, s, o, **options) for b, s, o in zip(below, skips, outs, strict=True)
        )  # finest first
        predicting = outs if deep_supervision else outs[:1]
        self.heads = nn.ModuleList(CONV[rank](o, self.num_classes, 1) for o in predicting)
        for part in (self.bottleneck, self.levels, self.heads, self.encoder if encoder is None else None):
            if part is not None:
                part.apply(_start)
                for module in part.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.momentum = momentum

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.dim() != 2 + self.rank or x.shape[1] != self.in_chans:
            axes = "H, W" if self.rank == 2 else "D, H, W"
            raise ValueError(f"x must be (B, {self.in_chans}, {axes}), got {describe(x)}")
        if not x.is_floating_point() or not x.shape[2:].numel():
            raise ValueError(f"x must be floating point with at least one pixel, got {describe(x)}")
        if self.strides is not None:
            for axis, n in enumerate(x.shape[2:]):
                whole = 1
                for s in self.strides:
                    whole *= s[axis]
                if n < whole:
                    raise ValueError(
                        f"x has {n} pixels along axis {axis} of its grid, fewer than the strides take there ({whole}); "
                        "give larger images or smaller strides"
                    )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes, *grid); in training with deep supervision a list of them, finest first."""
        self._check(x)
        maps = self.encoder(x)
        grids = [x.shape[2:]]
        for _ in range(self.before - 1):
            grids.append(torch.Size(-(-n // 2) for n in grids[-1]))
        skips = [*[None] * self.before, *maps[:-1]]
        grids = [*grids[: self.before], *(m.shape[2:] for m in maps[:-1])]
        y = maps[-1]
        if self.bottleneck is not None:
            y = self.bottleneck(y.movedim(1, -1)).movedim(-1, 1)
        bottom = y if self.guided else None
        out: list[Tensor] = []
        many = self.deep_supervision and self.training
        for i in reversed(range(len(self.levels))):
            y = self.levels[i](y, skips[i], bottom, grids[i])
            if i == 0 or many:
                out.insert(0, self.heads[i](y))
        return out if many else out[0]

    def loss(self, prediction: Tensor | Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms of the loss by name; ``_2``, ``_3`` and so on are those of coarser predictions.

        Args:
            prediction: as :meth:`forward` gives it. Coarser ones meet the labels of the nearest places.
            target: (B, *grid) classes; ``ignore_index`` where there is none.
        """
        several = [prediction] if isinstance(prediction, Tensor) else list(prediction)
        terms: dict[str, Tensor] = {}
        for i, logits in enumerate(several):
            labels, tail = target, f"_{i + 1}" if i else ""
            if i:
                labels = F.interpolate(target[:, None].double(), logits.shape[2:]).squeeze(1).to(target.dtype)
            dice = dice_loss(logits, labels, ignore_index=self.ignore_index, compat=self.compat)
            if self.loss_kind != "cross_entropy":
                terms[f"dice{tail}"] = dice
            if self.loss_kind != "dice":
                terms[f"cross_entropy{tail}"] = _cross_entropy(logits, labels, self.ignore_index)
        return terms

    def predict(
        self, x: Tensor, *, tile: int | Sequence[int] | None = None, overlap: int = 32, blend: int | None = None
    ) -> Tensor:
        """Classes (B, *grid); with one channel, whether a place is foreground.

        Args:
            x: (B, in_chans, *grid), of any size.
            tile, overlap, blend: of :func:`attnlib.models.tiles.tiled`, where it does not fit memory. What looks at the
                whole image (attention at the bottom, means) looks at a tile then.
        """
        logits = tiled(self, x, tile, overlap=overlap, blend=blend, align=2 ** len(self.levels))  # type: ignore[arg-type]
        return (logits[:, 0] > 0).long() if self.num_classes == 1 else logits.argmax(1)


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean over the places that have a class; of one channel, binary."""
    known = labels != ignore_index
    count = known.sum().clamp(min=1)
    if logits.shape[1] == 1:
        each = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype) * known, reduction="none")
        return (each * known).sum() / count
    return F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum") / count


def _checked_strides(strides: Sequence[Sequence[int]], levels: int, rank: int) -> list[tuple[int, ...]]:
    made = [check_ints("strides", (s,) * rank if isinstance(s, int) else s, least=1) for s in strides]
    if len(made) != levels or any(len(s) != rank for s in made):
        raise ValueError(f"strides must be {levels} of {rank} numbers each, got {list(strides)}")
    return made


def _bottleneck(kind: str | Callable[[int], nn.Module] | None, dim: int, rank: int) -> nn.Module | None:
    if callable(kind):
        return kind(dim)
    check_choice("bottleneck", kind, BOTTLENECKS)
    if kind == "dappm":
        if rank != 2:
            raise ValueError("bottleneck='dappm' is for images (rank=2); 'aspp' and 'dual' take volumes")
        return DAPPM(dim, max(dim // 4, 1), dim)
    if kind == "aspp":
        return ASPP(dim, dim, rank=rank)
    return DualAttention(dim, rank) if kind == "dual" else None


def _start(module: nn.Module) -> None:
    """As Keras starts: uniform within Glorot's bounds, biases 0."""
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_GATED: dict[str, Any] = dict(in_chans=1, deep_supervision=True, input_pyramid=True)
register_models(
    "meningioma-agunet-daunet",
    UNet,
    {
        "agunet3d": dict(_GATED, skip_gate="concat"),
        "daunet3d": dict(_GATED, bottleneck="dual", norm_all=True),
        "dagunet3d": dict(_GATED, bottleneck="dual", norm_all=True, guided=True),
        "unet3d": dict(in_chans=1),
        "unet2d": dict(in_chans=3, rank=2),
    },
    source="dbouget/mri_brain_tumor_segmentation",
    task="segment",
)
