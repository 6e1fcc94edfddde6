"""A class for every pixel: heads over the maps of any backbone, and the model of both.

A head reads maps ``[(B, C_i, H_i, W_i), ...]``, finest first, as ``features_only`` backbones give them, and returns
logits ``(B, num_classes, H_0, W_0)``. :class:`Segmenter` brings them to the size of the images.

- :class:`SegFormerHead`: Xie et al., 2021, "SegFormer", arXiv 2105.15203, section 3.2: a linear map of every level,
  resized to the finest, put together by one linear map.
- :class:`FPNHead`: Kirillov et al., 2019, "Panoptic Feature Pyramid Networks", arXiv 1901.02446, without its stacks of
  convolutions: a feature pyramid whose levels are resized and added.
- :class:`UPerHead`: Xiao et al., 2018, "Unified Perceptual Parsing", arXiv 1807.10221: pooled context in the coarsest
  map, a feature pyramid, one 3 x 3 convolution over all its levels.

What several levels become together is a sum of one linear map per level, taken before the level is resized, which is
the same number as the map of what stands side by side, in a part of the time.

>>> import attnlib
>>> encoder = attnlib.create_model("dinat_mini", features_only=True, embed_dim=8, depths=(1, 1), num_heads=(1, 1),
...                                kernel_size=3, dilations=None)
>>> model = Segmenter(encoder, SegFormerHead(encoder.feature_info.channels(), 16, num_classes=5)).eval()
>>> model(torch.randn(1, 3, 33, 40)).shape, model.predict(torch.randn(1, 3, 33, 40), (8, 8)).shape
(torch.Size([1, 5, 33, 40]), torch.Size([1, 8, 8]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_ints, check_real, check_type, check_valid, describe
from ...nn.base import Mechanism
from ...nn.layers import ConvNorm, masked_batch_norm, plain, resize_map, strided_valid, zero_invalid
from ...ops.reduced import adaptive_pool_tokens
from ..backbones.stages import map_info
from ..protocol import TaskModel

Maps = Sequence[Tensor]


class FuseMaps(ConvNorm):
    """1 x 1 convolution of several maps side by side, BatchNorm, activation; parameters as of ``ConvNorm``.

    Each map takes its part of the convolution at its own size and is resized behind it.

    Args:
        dims: channels of the maps.
        out_dim: channels out.
        options: of :class:`attnlib.nn.layers.ConvNorm`.
    """

    def __init__(self, dims: Sequence[int], out_dim: int, **options: Any):
        super().__init__(sum(dims), out_dim, **options)
        self.dims = list(dims)

    def forward(  # type: ignore[override]
        self, maps: Maps, size: Sequence[int], valid: Tensor | None = None, mode: str = "bilinear"
    ) -> Tensor:
        """Maps (B, H_i, W_i, dims[i]) -> (B, *size, out_dim); ``valid`` (B, *size) says which tokens exist.

        A map of one token serves all places.
        """
        norm = self.norm
        folded = norm is not None and not norm.training
        if not plain(self.conv):  # not what it was built as: it can only be called
            x = torch.cat([resize_map(m, size, mode) for m in maps], -1)
            return super().forward(x, valid)
        weight, bias = self._folded() if folded else (self.conv.weight, self.conv.bias)
        out: Tensor | None = None
        for part, w in zip(maps, weight.flatten(1).split(self.dims, 1), strict=True):
            z = F.linear(part, w)
            if tuple(z.shape[1:3]) != (1, 1):
                z = resize_map(z, size, mode)
            out = z if out is None else out + z
        assert out is not None
        if bias is not None:
            out = out + bias
        out = out.expand(-1, *size, -1)
        if norm is not None and not folded:
            out = masked_batch_norm(norm, out, valid)
        return out if self.act is None else self.act(out)


class FeaturePyramid(nn.Module):
    """FPN: every level as wide, coarser ones resized and added from the top down, then a 3 x 3 convolution each.

    Args:
        in_dims: channels of the maps, finest first.
        dim: channels of all levels.
        smooth: the convolutions; the coarsest level has none with ``"but-last"``.
        lateral_last: a 1 x 1 convolution of the coarsest map; without it that map has ``dim`` channels already.
        options: of :class:`attnlib.nn.layers.ConvNorm`.

    Reference: Lin et al., 2017, arXiv 1612.03144.
    """

    def __init__(
        self, in_dims: Sequence[int], dim: int, smooth: str = "all", lateral_last: bool = True, **options: Any
    ):
        super().__init__()
        count = len(in_dims)
        self.laterals = nn.ModuleList(ConvNorm(c, dim, **options) for c in in_dims[: count if lateral_last else -1])
        self.convs = nn.ModuleList(ConvNorm(dim, dim, 3, **options) for _ in range(count - (smooth != "all")))

    def forward(self, maps: Maps, valid: Sequence[Tensor | None]) -> list[Tensor]:
        """Maps (B, H_i, W_i, C_i) -> (B, H_i, W_i, dim)."""
        levels = [lateral(x, v) for lateral, x, v in zip(self.laterals, maps, valid, strict=False)]
        levels += maps[len(levels) :]
        for i in range(len(levels) - 1, 0, -1):
            above = zero_invalid(levels[i], valid[i])
            levels[i - 1] = levels[i - 1] + resize_map(above, levels[i - 1].shape[1:3])
        smoothed = [conv(x, v) for conv, x, v in zip(self.convs, levels, valid, strict=False)]
        return smoothed + levels[len(smoothed) :]


class PooledContext(nn.Module):
    """PPM: means over cells of several sizes, a 1 x 1 convolution of each, beside the map itself; a 3 x 3 over all.

    Args:
        dim: channels in.
        out_dim: channels out.
        cells: cells a side.
        options: of :class:`attnlib.nn.layers.ConvNorm`.

    Reference: Zhao et al., 2017, arXiv 1612.01105.
    """

    def __init__(self, dim: int, out_dim: int, cells: Sequence[int] = (1, 2, 3, 6), **options: Any):
        super().__init__()
        self.cells = check_ints("cells", cells, least=1)
        self.pooled = nn.ModuleList(ConvNorm(dim, out_dim, **options) for _ in self.cells)
        self.fuse = ConvNorm(dim + len(self.cells) * out_dim, out_dim, 3, **options)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, out_dim)."""
        parts = [x]
        for cells, conv in zip(self.cells, self.pooled, strict=True):
            means, some = adaptive_pool_tokens(x, cells, valid)
            parts.append(resize_map(zero_invalid(conv(means, some), some), x.shape[1:3]))
        return self.fuse(torch.cat(parts, -1), valid)


class DenseHead(nn.Module):
    """What heads share: ``fuse`` makes one map of several, dropout of whole channels, a linear map to classes.

    Args:
        in_dims: channels of the maps, finest first.
        dim: channels of the map that is classified.
        num_classes: classes.
        drop: dropout of channels in training.
    """

    def __init__(self, in_dims: Sequence[int], dim: int, num_classes: int, drop: float = 0.1):
        super().__init__()
        self.in_dims = list(check_ints("in_dims", in_dims, least=1))
        if not self.in_dims:
            raise ValueError("in_dims must name at least one map, got none")
        self.dim, self.num_classes = check_int("dim", dim, least=1), check_int("num_classes", num_classes, least=1)
        self.drop = nn.Dropout2d(check_real("drop", drop, least=0, below=1))
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def reset(self, num_classes: int) -> None:
        """A new linear map to classes."""
        self.num_classes = check_int("num_classes", num_classes, least=1)
        old = self.classifier.weight
        self.classifier = nn.Conv2d(self.dim, num_classes, 1).to(old.device, old.dtype)

    def fuse(self, maps: list[Tensor], valid: list[Tensor | None]) -> Tensor:
        """Maps (B, H_i, W_i, C_i), channels last -> (B, H_0, W_0, dim). A head is this method."""
        raise NotImplementedError

    def forward(self, maps: Maps, valid: Sequence[Tensor | None] | None = None) -> Tensor:
        """Maps (B, C_i, H_i, W_i) -> logits (B, num_classes, H_0, W_0).

        Args:
            maps: finest first.
            valid: (B, H_i, W_i) boolean each, which tokens exist; the others are zeros to what mixes tokens.

        Raises:
            ValueError: maps that are not those of ``in_dims``.
        """
        check_type("maps", maps, (list, tuple), "a list of maps, finest first")
        given = [m.shape[1] if isinstance(m, Tensor) and m.dim() == 4 else describe(m) for m in maps]
        if given != self.in_dims:
            raise ValueError(f"maps must have {self.in_dims} channels, (B, C, H, W) each, got {given}")
        exists: list[Tensor | None] = [None] * len(maps) if valid is None else list(valid)
        held = [zero_invalid(m.permute(0, 2, 3, 1), v) for m, v in zip(maps, exists, strict=True)]
        y = self.fuse(held, exists)
        return self.classifier(self.drop(y.permute(0, 3, 1, 2)))


class SegFormerHead(DenseHead):
    """All-MLP decoder: a linear map of every level, resized to the finest; one linear map, BatchNorm and ReLU of all.

    Args:
        in_dims, num_classes, drop: as of :class:`DenseHead`.
        dim: channels of every level and of what is classified.

    Reference: Xie et al., 2021, arXiv 2105.15203, section 3.2.
    """

    def __init__(self, in_dims: Sequence[int], dim: int = 256, num_classes: int = 150, drop: float = 0.1):
        super().__init__(in_dims, dim, num_classes, drop)
        self.linears = nn.ModuleList(nn.Linear(c, dim) for c in in_dims)
        self.linear_fuse = FuseMaps([dim] * len(self.in_dims), dim, activation=nn.ReLU)
        start_convs(self)

    def fuse(self, maps: list[Tensor], valid: list[Tensor | None]) -> Tensor:
        levels = [zero_invalid(f(x), v) for f, x, v in zip(self.linears, maps, valid, strict=True)]
        # The authors stand the levels side by side from the coarsest on.
        return self.linear_fuse(levels[::-1], maps[0].shape[1:3], valid[0])


class FPNHead(DenseHead):
    """A feature pyramid whose levels are resized to the finest and added.

    Args:
        in_dims, num_classes, drop: as of :class:`DenseHead`.
        dim: channels of all levels.
    """

    def __init__(self, in_dims: Sequence[int], dim: int = 256, num_classes: int = 150, drop: float = 0.1):
        super().__init__(in_dims, dim, num_classes, drop)
        self.pyramid = FeaturePyramid(in_dims, dim, activation=nn.ReLU)
        start_convs(self)

    def fuse(self, maps: list[Tensor], valid: list[Tensor | None]) -> Tensor:
        levels = self.pyramid(maps, valid)
        size = maps[0].shape[1:3]
        return torch.stack([resize_map(zero_invalid(x, v), size) for x, v in zip(levels, valid, strict=True)]).sum(0)


class UPerHead(DenseHead):
    """Pooled context in the coarsest map, a feature pyramid, a 3 x 3 convolution over all of its levels.

    Args:
        in_dims, num_classes, drop: as of :class:`DenseHead`.
        dim: channels of all levels and of what is classified.
        cells: sides of the pooled maps.

    Reference: Xiao et al., 2018, arXiv 1807.10221.
    """

    def __init__(
        self, in_dims: Sequence[int], dim: int = 512, num_classes: int = 150, drop: float = 0.1,
        cells: Sequence[int] = (1, 2, 3, 6),
    ):  # fmt: skip
        super().__init__(in_dims, dim, num_classes, drop)
        options: dict[str, Any] = dict(activation=nn.ReLU)
        self.context = PooledContext(in_dims[-1], dim, cells, **options)
        self.pyramid = FeaturePyramid(in_dims, dim, "but-last", lateral_last=False, **options)
        self.bottleneck = ConvNorm(dim * len(in_dims), dim, 3, **options)
        start_convs(self)

    def fuse(self, maps: list[Tensor], valid: list[Tensor | None]) -> Tensor:
        maps = [*maps[:-1], self.context(maps[-1], valid[-1])]
        levels = self.pyramid(maps, valid)
        size = maps[0].shape[1:3]
        parts = [resize_map(zero_invalid(x, v), size) for x, v in zip(levels, valid, strict=True)]
        return self.bottleneck(torch.cat(parts, -1), valid[0])


class Segmenter(TaskModel):
    """A backbone and a head: images ``(B, in_chans, H, W)`` to logits of every pixel.

    Args:
        encoder: gives maps, as ``attnlib.create_model(..., features_only=True)``; with a ``feature_info`` its channels
            are held against the head's, and its reductions say which tokens exist.
        head: called as ``head(maps, valid)``, with ``in_dims`` and ``num_classes``; a :class:`DenseHead`.
        ignore_index: the label of pixels that have none.

    Raises:
        ValueError: a head for other maps.
    """

    #: Names of the parts that depend on the number of classes.
    head_names: Sequence[str] = ("head.classifier.",)

    def __init__(self, encoder: nn.Module, head: nn.Module, ignore_index: int = 255):
        super().__init__()
        for name, part in (("encoder", encoder), ("head", head)):
            check_type(name, part, nn.Module)
        info = map_info(encoder) if getattr(encoder, "feature_info", None) else None
        channels = None if info is None else info.channels()
        wanted = getattr(head, "in_dims", channels)
        if channels is not None and wanted != channels:
            raise ValueError(f"head reads maps of {wanted} channels, but encoder gives {channels}")
        self.reductions = None if info is None else info.reduction()
        self.encoder, self.head = encoder, head
        self.ignore_index = check_int("ignore_index", ignore_index)

    @property
    def num_classes(self) -> int:
        return self.head.num_classes  # type: ignore[return-value]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the encoder."""
        self.encoder.set_grad_checkpointing(enable)  # type: ignore[operator]

    @property
    def input_name(self) -> str | None:
        """First convolution, which depends on the number of channels."""
        name = getattr(getattr(self.encoder, "model", None), "input_name", None)
        return None if name is None else f"encoder.model.{name}"

    def _maps(self, x: Tensor, valid: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
        if valid is None:
            maps = self.encoder(x)
            return maps, [None] * len(maps)
        if self.reductions is None:
            raise ValueError("valid needs an encoder with a feature_info, which says how many pixels a token has")
        check_valid("valid", valid, (x.shape[0], *x.shape[2:]))
        return self.encoder(x, valid), [strided_valid(valid, r) for r in self.reductions]

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes, H, W). ``valid``: (B, H, W), which pixels exist."""
        logits = self.head(*self._maps(x, valid))
        return resized_logits(logits, x.shape[2:])

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Terms of the loss by name; their sum is trained.

        Args:
            prediction: logits (B, num_classes, H, W), at any size; they are resized to that of the labels.
            target: (B, H', W') classes, whole numbers, ``ignore_index`` where a pixel has none.

        Returns:
            ``{"cross_entropy": mean over the pixels that have a class}``, 0 where none has.
        """
        return {"cross_entropy": pixel_cross_entropy(prediction, target, self.ignore_index)}

    def predict(self, x: Tensor, size: Sequence[int] | None = None, valid: Tensor | None = None) -> Tensor:
        """Classes (B, *size) of images (B, in_chans, H, W), at their own size by default."""
        logits = self.head(*self._maps(x, valid))
        size = x.shape[2:] if size is None else check_ints("size", tuple(size), least=1)
        if len(size) != 2:
            raise ValueError(f"size={tuple(size)} must be a height and a width")
        return resized_logits(logits, size).argmax(1)


def start_convs(module: nn.Module) -> None:
    """Convolutions with a norm start at unit gain over their fan-out; mechanisms have started in their own way."""
    for child in module.children():
        if isinstance(child, Mechanism):
            continue
        if isinstance(child, ConvNorm):
            nn.init.kaiming_normal_(child.conv.weight, mode="fan_out", nonlinearity="relu")
        start_convs(child)


def resized_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(B, K, H, W) at another size, bilinear, corners not aligned."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def pixel_cross_entropy(
    prediction: Tensor, target: Tensor, ignore_index: int = 255, weight: Sequence[float] | None = None
) -> Tensor:
    """Mean cross entropy of the pixels that have a class; 0, with a gradient of 0, where none has.

    Args:
        prediction: logits (B, K, H, W), resized to the labels' size.
        target: (B, H', W') whole numbers.
        ignore_index: the label of pixels without a class.
        weight: of every class, also in the mean; 1 by default.

    Raises:
        ValueError: shapes that do not fit, labels that are no class.
    """
    if not isinstance(prediction, Tensor) or prediction.dim() != 4 or not prediction.is_floating_point():
        raise ValueError(f"prediction must be logits (B, K, H, W), got {describe(prediction)}")
    batch, classes = prediction.shape[:2]
    whole = isinstance(target, Tensor) and not (target.is_floating_point() or target.is_complex())
    if not whole or target.dtype == torch.bool or target.dim() != 3 or target.shape[0] != batch:
        raise ValueError(f"target must be whole numbers ({batch}, H, W), got {describe(target)}")
    labelled = target != ignore_index
    wrong = target[labelled & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise ValueError(
            f"target holds the class {int(wrong[0])}; possible: 0 to {classes - 1}, and {ignore_index} for none"
        )
    logits = resized_logits(prediction, target.shape[1:])
    share = None if weight is None else logits.new_tensor(weight)
    total = F.cross_entropy(logits, target.long(), share, ignore_index=ignore_index, reduction="sum")
    if share is None:
        return total / labelled.sum().clamp(min=1)
    below = (share[target.long().masked_fill(~labelled, 0)] * labelled).sum()
    return total / torch.where(below == 0, 1.0, below)
