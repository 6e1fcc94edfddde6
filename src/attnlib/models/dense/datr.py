"""DATR: a SegFormer for panoramas whose last stage is neighborhood attention, and the loss that adapts it to them.

Zheng et al., 2023, "Look at the Neighbor: Distortion-aware Unsupervised Domain Adaptation for Panoramic Semantic
Segmentation", arXiv 2308.05493. Neighbouring pixels of an equirectangular panorama are distorted alike. The encoder is
that of SegFormer (overlapping patches, spatial-reduction attention, MLPs with a depthwise convolution, a norm behind
every stage), but in the last stage every token reads the 13 x 13 tokens around it; the head is SegFormer's.

*Class-wise feature aggregation* (:func:`class_centre_loss`) makes a map of classes look alike in both domains. For
features ``f`` of one domain with classes ``y``, and a memory ``m_k`` of the centre of each class,

    ``m_k <- (1 - 1/(e + 1)) m_k + 1/(e + 1) mean_{p: y(p) = k} f(p)``,  ``s(p) = cos(f(p), m_{y(p)})``,

in epoch ``e``, and the loss is the mean of ``(s_source - s_target)^2`` over pixels. Labels of the target are what a
model trained on the source alone predicts. All of the training is cross entropy on both domains plus that loss.

Differs from the authors' code, whose arithmetic ``compat="authors"`` reproduces:

- it takes the classes of either domain from the labels of the other;
- its memory is halved at every step beside the weights above, so that it forgets by half and is no running mean;
- its memory holds a vector for every place of the map, not for every class;
- pixels without a class are their own centres; here they take no part.

Attention leaves out no rows (:class:`attnlib.nn.reduced.spatial_reduction.SpatialReductionAttention`) and maps smaller
than 13 x 13 are padded with tokens that nobody reads; the named sizes have ``compat="authors"``, as the release.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_ints, describe
from ...nn.layers import Mlp, Patchify, init_fan_out
from ...nn.local.dinat import DilatedNeighborhoodAttention
from ...nn.reduced.spatial_reduction import SpatialReductionAttention
from ...nn.released import Released, Rule
from ..backbones.stages import Backbone, Features, Head, Stage
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .heads import SegFormerHead, Segmenter

Norm = partial(nn.LayerNorm, eps=1e-6)


def datr_encoder(
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    num_heads: Sequence[int] = (1, 2, 5, 8),
    sr_ratios: Sequence[int] = (8, 4, 2),
    kernel_size: int = 13,
    mlp_ratio: float = 4.0,
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 0,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.1,
) -> Backbone:
    """The encoder, in the frame of all backbones.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        sr_ratios: reduction of keys and values per stage but the last.
        kernel_size: side of the neighborhood in the last stage.
        mlp_ratio: hidden width of MLPs over the width.
        compat: as of :func:`datr`.
        mechanism: takes the place of attention in every block.
        num_classes: of a classifier behind it; the release has none.
        in_chans, img_size, drop_path_rate: as in :func:`attnlib.create_model`.
    """
    count = len(embed_dims)
    ratios = check_ints("sr_ratios", sr_ratios, least=1)
    if len(ratios) != count - 1:
        raise ValueError(f"sr_ratios={ratios} must have one number for each of {count} stages but the last")

    def own(place: Place) -> nn.Module:
        if place.stage < count - 1:
            return SpatialReductionAttention(place.dim, place.num_heads, ratios[place.stage], compat=compat)
        return DilatedNeighborhoodAttention(place.dim, place.num_heads, kernel_size, compat=compat)

    make = mechanism or own
    reductions = [4 * 2**i for i in range(count)]
    embeds: list[nn.Module] = []
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        stage, dim = row[0].stage, row[0].dim
        embeds.append(Patchify(embed_dims[stage - 1], dim, 3, 2, 1) if stage else Patchify(in_chans, dim, 7, 4, 3))
        blocks = [Block(dim, make(p), Mlp(dim, mlp_ratio, depthwise=3), norm=Norm, drop_path=p.drop_path) for p in row]
        stages.append(Stage(blocks, embeds[-1] if stage else None, Norm(dim)))
    head = Head(embed_dims[-1], num_classes)
    model = Backbone(embeds[0], stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    init_weights(model, also=(DilatedNeighborhoodAttention,))
    for module in model.modules():
        if isinstance(module, Patchify):
            init_fan_out(module.proj)
        elif isinstance(module, Mlp) and module.dwconv is not None:
            init_fan_out(module.dwconv)
    return model


def datr(num_classes: int = 13, head_dim: int = 512, drop_rate: float = 0.1, **settings: Any) -> Segmenter:
    """A DATR: images to logits of every pixel.

    Args:
        num_classes: 13 from SynPASS to DensePASS, 19 from Cityscapes.
        head_dim: channels of the head.
        drop_rate: dropout of channels in the head.
        settings: of :func:`datr_encoder`; ``compat="authors"`` reads maps as the release does.
    """
    encoder = Features(datr_encoder(**settings))
    return Segmenter(encoder, SegFormerHead(encoder.feature_info.channels(), head_dim, num_classes, drop_rate))


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``DATR``: encoder and decoder."""
    theirs = Released(state_dict, "DATR")
    theirs.leave(r"classifier\.weight", because="no output of the model depends on it; it is for activation maps")
    out: dict[str, Tensor] = {}
    rules: dict[str, Rule] = {}
    parts = {"norm1": "mixer.norm", "norm2": "mlp.norm", r"mlp\.fc1": "mlp.inner.fc1", r"mlp\.fc2": "mlp.inner.fc2"}
    parts[r"mlp\.dwconv\.dwconv"] = "mlp.inner.dwconv"
    for i in range(1, 5):  # theirs count stages from 1
        block, ours = rf"encoder\.block{i}\.(\d+)\.", f"encoder.model.stages.{i - 1}"
        inner = rf"{ours}.blocks.\1.mixer.inner"
        out |= theirs.parts(block + r"attn\.(.+)", inner, SpatialReductionAttention.convert_state_dict)
        out |= theirs.parts(block + r"nattn\.(.+)", inner, DilatedNeighborhoodAttention.convert_state_dict)
        for name, part in parts.items():
            rules[block + rf"{name}\.(weight|bias)"] = rf"{ours}.blocks.\1.{part}.\2"
        embed = f"{ours}.downsample" if i > 1 else "encoder.model.stem"
        rules[rf"encoder\.patch_embed{i}\.(proj|norm)\.(weight|bias)"] = embed + r".\1.\2"
        rules[rf"encoder\.norm{i}\.(weight|bias)"] = rf"{ours}.norm.\1"
        rules[rf"decoder\.linear_c{i}\.proj\.(weight|bias)"] = rf"head.linears.{i - 1}.\1"
    rules[r"decoder\.linear_fuse\.conv\.weight"] = "head.linear_fuse.conv.weight"
    rules[r"decoder\.linear_fuse\.bn\.(\w+)"] = r"head.linear_fuse.norm.\1"
    rules[r"decoder\.linear_pred\.(weight|bias)"] = r"head.classifier.\1"
    return theirs.close(out | theirs.renamed(rules))


# --------------------------------------------------------------------------------------------------------------------
# Class-wise feature aggregation


class Centres(NamedTuple):
    """The memory of one domain.

    ``vectors`` are (K, C), one for every class, and ``seen`` (K,) says for which there is one; with
    ``compat="authors"`` they are (1, C, h, w), one for every place, and ``seen`` is ``None``.
    """

    vectors: Tensor
    seen: Tensor | None


class ClassCentreLoss(NamedTuple):
    """What :func:`class_centre_loss` gives."""

    loss: Tensor
    source: Centres
    target: Centres


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of every class: (B, C, h, w) and (B, h, w) -> (K, C), zeros where there is none, and counts (K,).

    Labels outside 0 to K - 1 are no class.
    """
    flat = labels.flatten()
    there = (flat >= 0) & (flat < num_classes)
    index = torch.where(there, flat, num_classes)  # a row for what has no class, which is cut off
    rows = features.movedim(1, -1).flatten(0, 2)
    sums = rows.new_zeros(num_classes + 1, rows.shape[1]).index_add(0, index, rows)[:-1]
    counts = torch.bincount(index, minlength=num_classes + 1)[:-1]
    return sums / counts.clamp(min=1).unsqueeze(1).to(sums.dtype), counts


def _checked(name: str, features: Tensor, labels: Tensor) -> Tensor:
    """Labels at the size of the features, nearest."""
    if not isinstance(features, Tensor) or features.dim() != 4 or not features.is_floating_point():
        raise ValueError(f"{name} must be features (B, C, h, w), got {describe(features)}")
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.dim() != 3 or labels.shape[0] != features.shape[0]:
        raise ValueError(f"{name}_labels must be whole numbers ({features.shape[0]}, H, W), got {describe(labels)}")
    # Doubles hold whole numbers, and nothing else resizes to the nearest.
    return F.interpolate(labels[:, None].double(), features.shape[2:], mode="nearest")[:, 0].long()


def class_centre_loss(
    source: Tensor,
    target: Tensor,
    source_labels: Tensor,
    target_labels: Tensor,
    epoch: int,
    num_classes: int,
    memory: tuple[Centres, Centres] | None = None,
    compat: str | None = None,
) -> ClassCentreLoss:
    """How differently far pixels of two domains lie from the centres of their classes.

    Args:
        source: features (B, C, h, w) of the domain with labels.
        target: those of the other, of the same shape.
        source_labels: (B, H, W) classes; other numbers for none.
        target_labels: the same, predicted.
        epoch: from 1; a centre of this step gets the weight ``1 / (epoch + 1)`` in the memory. A class that is seen for
            the first time gets it as it is.
        num_classes: classes.
        memory: of source and target, as the last step gave it; ``None`` at the start.
        compat: ``"authors"``: their arithmetic, see above.

    Returns:
        The loss, and the memory of source and target without gradient.

    Raises:
        ValueError: features of different shapes, labels that do not fit, an epoch before the first, a memory of another
            model.
    """
    check_choice("compat", compat, (None, "authors"))
    check_int("epoch", epoch, least=1)
    check_int("num_classes", num_classes, least=1)
    labels = [_checked("source", source, source_labels), _checked("target", target, target_labels)]
    if source.shape != target.shape:
        raise ValueError(f"source and target must be of one shape, got {tuple(source.shape)} and {tuple(target.shape)}")
    weight, alike, kept = 1 / (epoch + 1), [], []
    if compat is not None:
        labels.reverse()
    for i, (features, classes) in enumerate(zip((source, target), labels, strict=True)):
        held = None if memory is None else memory[i]
        if held is not None:
            given = tuple(held.vectors.shape if compat is None else held.vectors.shape[1:])
            need = (num_classes, features.shape[1]) if compat is None else tuple(features.shape[1:])
            if given != need or (held.seen is None) != (compat is not None):
                raise ValueError(f"memory holds vectors of shape {given}, but these features need {need}")
        step = _places if compat is not None else _classes
        centres, new = step(features, classes, num_classes, weight, held)
        alike.append(F.cosine_similarity(features, centres, dim=1))
        kept.append(new)
    gap = (alike[0] - alike[1]).square()
    if compat is not None:
        loss = gap.mean()
    else:
        both = torch.stack([(y >= 0) & (y < num_classes) for y in labels]).all(0)
        loss = (gap * both).sum() / both.sum().clamp(min=1)
    return ClassCentreLoss(loss, *kept)


def _classes(
    features: Tensor, labels: Tensor, num_classes: int, weight: float, held: Centres | None
) -> tuple[Tensor, Centres]:
    """The centre of its class at every place (B, C, h, w), and the memory: a vector for every class."""
    means, counts = class_means(features, labels, num_classes)
    here = (counts > 0).unsqueeze(1)
    if held is None or held.seen is None:
        vectors, seen = means, here
    else:
        seen = held.seen.unsqueeze(1)
        mixed = torch.where(seen, (1 - weight) * held.vectors + weight * means, means)
        vectors, seen = torch.where(here, mixed, held.vectors), seen | here
    centres = vectors[labels.clamp(0, num_classes - 1)].movedim(-1, 1)
    return centres, Centres(vectors.detach(), seen.squeeze(1))


def _places(
    features: Tensor, labels: Tensor, num_classes: int, weight: float, held: Centres | None
) -> tuple[Tensor, Centres]:
    """As the release: a vector for every place, halved; classes image by image."""
    rows = []
    for f, y in zip(features, labels, strict=True):
        means, counts = class_means(f[None], y[None], num_classes)
        means = means * (counts / (counts + 1e-6)).to(means.dtype).unsqueeze(1)  # theirs adds it to every count
        own = means[y.clamp(0, num_classes - 1)].movedim(-1, 0)
        rows.append(torch.where((y >= 0) & (y < num_classes), own, f))
    centres = torch.stack(rows)
    before = features.new_zeros(()) if held is None else held.vectors
    vectors = ((1 - weight) * before + weight * centres) * 0.5
    return vectors, Centres(vectors.detach(), None)


_SIZES: dict[str, dict[str, Any]] = {
    "datr_m": dict(embed_dims=(32, 64, 160, 256)),
    "datr_t": {},
    "datr_s": dict(depths=(3, 4, 6, 3)),
}

register_models(
    "datr-distortion-aware",
    datr,
    {name: {**size, "compat": "authors"} for name, size in _SIZES.items()},
    # Of their encoder and decoder; the classifier for activation maps, which no output depends on, is not counted.
    params={"datr_m": 4_649_853, "datr_t": 14_744_029, "datr_s": 25_793_893},
    source="zhengxuJosh/DATR",
    convert=convert,
    img_size=512,
    task="segment",
)
