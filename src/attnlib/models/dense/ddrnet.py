"""DDRNet for segmentation: context pooled from a tiny map, added to a map that never lost its resolution.

Hong et al., 2021, arXiv 2101.06085; the trunk is :mod:`attnlib.models.backbones.ddrnet`. :class:`DAPPM` is the Deep
Aggregation Pyramid Pooling Module.

Differs from the authors' code: logits at the size of images, where theirs are an eighth of it; images of any size;
tokens that do not exist count as the zeros beside the map do, and enter no statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int
from ...nn.layers import ConvNorm, MapNorm, masked_mean, resize_map, strided_valid, zero_invalid
from ...nn.released import Released
from ..backbones.convs import by_prefix
from ..backbones.ddrnet import SIZES, DDRNet, ddrnet, names_of
from ..backbones.stages import FeatureInfo
from ..build import register_models
from .heads import Maps, Segmenter, resized_logits, start_convs


class NormConv(nn.Module):
    """BatchNorm, ReLU, convolution on (B, H, W, C)."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 1, bias: bool = False):
        super().__init__()
        self.norm, self.conv = MapNorm(dim), ConvNorm(dim, out_dim, kernel_size, bias=bias, norm=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.conv(F.relu(self.norm(x, valid)), valid)


class DAPPM(nn.Module):
    """Means over ever larger neighbourhoods, each added to what the smaller ones gave before a 3 x 3 convolution.

    ``y_0 = c_0(x), y_i = d_i(up(c_i(mean_i(x))) + y_{i-1}), out = c([y_0, ..., y_4]) + s(x)``, where ``mean_i`` are of
    5, 9 and 17 tokens a side at strides 2, 4 and 8, and of all tokens; every c, d and s is BatchNorm, ReLU,
    convolution. Means count the zeros beside the map, as released: a constant map gives a constant only away from
    borders.

    Args:
        dim: channels in.
        branch_dim: channels of every ``y``.
        out_dim: channels out.

    >>> DAPPM(16, 8, 4).eval()(torch.randn(1, 3, 5, 16)).shape
    torch.Size([1, 3, 5, 4])
    """

    #: Side and stride of the neighbourhoods.
    pools = ((5, 2), (9, 4), (17, 8))

    def __init__(self, dim: int, branch_dim: int, out_dim: int):
        super().__init__()
        for name, value in (("dim", dim), ("branch_dim", branch_dim), ("out_dim", out_dim)):
            check_int(name, value, least=1)
        count = len(self.pools) + 2
        self.scales = nn.ModuleList(NormConv(dim, branch_dim) for _ in range(count))
        self.process = nn.ModuleList(NormConv(branch_dim, branch_dim, 3) for _ in range(count - 1))
        self.compress, self.shortcut = NormConv(count * branch_dim, out_dim), NormConv(dim, out_dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, out_dim). ``valid``: (B, H, W), which tokens exist.

        Raises:
            ValueError: a single image in training, whose mean has no statistics.
        """
        if self.training and len(x) == 1:
            raise ValueError("x must be at least two images in training: the mean of one has no statistics to norm it")
        x = zero_invalid(x, valid)
        ys = [self.scales[0](x, valid)]
        for i, process in enumerate(self.process):
            if i < len(self.pools):
                side, stride = self.pools[i]
                mean = F.avg_pool2d(x.permute(0, 3, 1, 2), side, stride, side // 2).permute(0, 2, 3, 1)
                some = strided_valid(valid, stride)
            else:
                mean, some = masked_mean(x, valid)[:, None, None], None
            wide = resize_map(zero_invalid(self.scales[i + 1](mean, some), some), x.shape[1:3])
            ys.append(process(wide + ys[-1], valid))
        return self.compress(torch.cat(ys, -1), valid) + self.shortcut(x, valid)


class Branches(nn.Module):
    """The maps that segmentation reads: the high branch behind stage three and at the end, and the low one's end."""

    def __init__(self, model: DDRNet):
        super().__init__()
        self.model = model
        _, high, _, _, low = FeatureInfo(model.feature_info).channels()
        levels = ((high, 8, "stages.2"), (2 * high, 8, "stages.4"), (low, 64, "stages.4"))
        self.feature_info = FeatureInfo({"num_chs": c, "reduction": r, "module": m} for c, r, m in levels)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """(B, in_chans, H, W) -> (B, C_i, H_i, W_i)."""
        seen: list[Any] = []
        *_, (low, _) = self.model._maps(x, valid, seen=seen)
        return [m.permute(0, 3, 1, 2) for m in (seen[2][0], seen[4][0], low)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the backbone."""
        self.model.set_grad_checkpointing(enable)


class DDRNetHead(nn.Module):
    """Context of the low branch added to the high one, two convolutions; a second such classifier for training.

    Args:
        in_dims: channels of the maps of :class:`Branches`.
        dim: channels in between.
        branch_dim: of :class:`DAPPM`.
        num_classes: classes.
        auxiliary: the classifier on the first map.
    """

    def __init__(self, in_dims: Sequence[int], dim: int, branch_dim: int, num_classes: int, auxiliary: bool):
        super().__init__()
        self.in_dims, self.num_classes = list(in_dims), check_int("num_classes", num_classes, least=1)
        check_int("head_dim", dim, least=1)
        early, high, low = self.in_dims

        def classifier(width: int) -> nn.ModuleList:
            return nn.ModuleList([NormConv(width, dim, 3), NormConv(dim, num_classes, bias=True)])

        self.context = DAPPM(low, branch_dim, high)
        self.classifier = classifier(high)
        self.auxiliary = classifier(early) if auxiliary else None

    def forward(self, maps: Maps, valid: Sequence[Tensor | None], early: bool = False) -> Tensor:
        """Maps (B, C_i, H_i, W_i) -> logits (B, num_classes, H_0, W_0); with ``early`` those of the auxiliary one."""
        first, high, low = (m.permute(0, 2, 3, 1) for m in maps)
        layers: Any = self.classifier
        if early:
            x, layers = first, self.auxiliary
        else:
            x = high + resize_map(zero_invalid(self.context(low, valid[2]), valid[2]), high.shape[1:3])
        for layer in layers:
            x = layer(x, valid[0])
        return x.permute(0, 3, 1, 2)


class DDRNetSegmenter(Segmenter):
    """A segmenter that gives a pair in training where it has an auxiliary classifier.

    Args:
        encoder, head, ignore_index: as of :class:`attnlib.models.dense.heads.Segmenter`.
        auxiliary_weight: of the auxiliary term of the loss.
    """

    head_names = ("head.classifier.1.conv.", "head.auxiliary.1.conv.")

    def __init__(self, encoder: Branches, head: DDRNetHead, ignore_index: int = 255, auxiliary_weight: float = 0.4):
        super().__init__(encoder, head, ignore_index)
        self.auxiliary_weight = auxiliary_weight

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Any:
        """(B, in_chans, H, W) -> logits (B, num_classes, H, W); two in training with an auxiliary classifier."""
        if not self.training or self.head.auxiliary is None:
            return super().forward(x, valid)
        read = self._maps(x, valid)
        return tuple(resized_logits(self.head(*read, early), x.shape[2:]) for early in (False, True))

    def loss(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Terms of the loss by name, of logits or of what training gives; their sum is trained."""
        if not isinstance(prediction, tuple):
            return super().loss(prediction, target)
        last, early = (super(DDRNetSegmenter, self).loss(p, target)["cross_entropy"] for p in prediction)
        return {"cross_entropy": last, "auxiliary": self.auxiliary_weight * early}


def ddrnet_segmenter(
    dim: int = 64,
    depths: Sequence[int] = (2, 2, 2, 2),
    exchanges: Sequence[int] = (1, 1),
    branch_dim: int = 128,
    head_dim: int = 128,
    auxiliary: bool = False,
    num_classes: int = 19,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 1024,
    drop_path_rate: float = 0.0,
) -> DDRNetSegmenter:
    """A DDRNet for segmentation.

    Args:
        dim, depths, exchanges, in_chans, img_size, drop_path_rate: as of
            :func:`attnlib.models.backbones.ddrnet.ddrnet`.
        branch_dim: of :class:`DAPPM`.
        head_dim: channels before the classes.
        auxiliary: a second classifier, on the high branch behind the third stage, whose logits training gives as well.
        num_classes: of every pixel.
    """
    check_flag("auxiliary", auxiliary)
    trunk = ddrnet(
        dim, depths, exchanges, dense=True, in_chans=in_chans, img_size=img_size, drop_path_rate=drop_path_rate
    )
    encoder = Branches(trunk)
    head = DDRNetHead(encoder.feature_info.channels(), head_dim, branch_dim, num_classes, auxiliary)
    start_convs(head)
    return DDRNetSegmenter(encoder, head)


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``DualResNet`` for segmentation; without an auxiliary classifier theirs is left out."""
    theirs = Released(state_dict, "the authors' DualResNet")
    names = {name: f"encoder.model.{ours}" for name, ours in names_of(model.encoder.model).items()}

    def layer(name: str, ours: str, at: int) -> None:
        names.update({f"{name}.{at}": f"{ours}.norm.norm", f"{name}.{at + 2}": f"{ours}.conv.conv"})

    for i in range(5):
        layer(f"spp.scale{i}", f"head.context.scales.{i}", 1 if i else 0)  # behind a mean
        layer(f"spp.process{i + 1}", f"head.context.process.{i}", 0)
    layer("spp.compression", "head.context.compress", 0)
    layer("spp.shortcut", "head.context.shortcut", 0)
    for theirs_of, ours in (("final_layer", "head.classifier"), ("seghead_extra", "head.auxiliary")):
        for i in range(2):
            names[f"{theirs_of}.bn{i + 1}"] = f"{ours}.{i}.norm.norm"
            names[f"{theirs_of}.conv{i + 1}"] = f"{ours}.{i}.conv.conv"
    if model.head.auxiliary is None:
        theirs.leave(r"seghead_extra\..+", because="a classifier for training alone, which this model does not have")
    return theirs.close(by_prefix(theirs, names, model))


register_models(
    "ddrnet-dappm",
    ddrnet_segmenter,
    {
        f"{name}_segmenter": {**settings, "head_dim": head_dim}
        for (name, settings), head_dim in zip(SIZES.items(), (64, 128, 256), strict=True)
    },
    params={
        "ddrnet_23_slim_segmenter": 5_695_987,
        "ddrnet_23_segmenter": 20_148_947,
        "ddrnet_39_segmenter": 32_360_275,
    },
    license="MIT",
    source="ydhongHIT/DDRNet",
    convert=convert,
    img_size=1024,
    task="segment",
)
