"""Images that a model should like less: with the mean in place of pixels, in blocks, or with hidden image tokens.

A variant takes the model inputs of *one* pair and gives changed ones; what a pair holds itself, such as a retrieved
image, needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checks import check_float, check_int, check_rank, check_real, to_tuple


@dataclass(frozen=True)
class About:
    """What of a model a variant must know.

    Args:
        image_tokens: ids that stand for the image in a prompt.
        patch: ``(channels, frames, height, width)`` of a flattened patch, for models that take those.
    """

    image_tokens: tuple[int, ...] = ()
    patch: tuple[int, int, int, int] | None = None

    @classmethod
    def of(cls, model: Any) -> About:
        """Of a model of transformers."""
        config = model.config
        ids: list[Any] = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        vision: Any = getattr(config, "vision_config", None)
        patch = None
        size = getattr(vision, "patch_size", None)
        if isinstance(size, int) and hasattr(vision, "temporal_patch_size"):
            channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
            patch = (int(channels), int(vision.temporal_patch_size), size, size)
        return cls(tuple(dict.fromkeys(int(i) for i in ids if i is not None)), patch)


def mask_pixels(pixels: Tensor, ratio: float = 0.3, generator: torch.Generator | None = None) -> Tensor:
    """Put the image's mean in place of a share of its pixels, in all channels.

    Args:
        pixels: (..., C, H, W); the last three axes are one image, each with pixels of its own.
        ratio: ``int(ratio H W)`` pixels are replaced.
        generator: of the choice.

    >>> out = mask_pixels(torch.arange(8.0).view(2, 2, 2), 0.5, torch.Generator().manual_seed(0))
    >>> int((out == 3.5).sum())
    4
    """
    check_float("pixels", pixels)
    check_real("ratio", ratio, least=0, most=1)
    if pixels.dim() < 3:
        raise ValueError(f"pixels must be (..., C, H, W), got {tuple(pixels.shape)}")
    out = pixels.clone()
    h, w = pixels.shape[-2:]
    for image in out.view(-1, *pixels.shape[-3:]):
        mean = image.mean()
        chosen = torch.randperm(h * w, generator=generator)[: int(h * w * ratio)].to(image.device)
        image.view(image.shape[0], -1)[:, chosen] = mean
    return out


def mask_blocks(pixels: Tensor, ratio: float = 0.3, size: int = 14, generator: torch.Generator | None = None) -> Tensor:
    """The same for whole blocks of ``size`` x ``size`` pixels; what no block covers, below and right, stays.

    Args:
        pixels: (..., C, H, W).
        ratio: share of the blocks, rounded down.
        size: of a block, at most the image's.
        generator: of the choice.
    """
    check_float("pixels", pixels)
    check_real("ratio", ratio, least=0, most=1)
    check_int("size", size, least=1)
    if pixels.dim() < 3:
        raise ValueError(f"pixels must be (..., C, H, W), got {tuple(pixels.shape)}")
    rows, columns = (n // size for n in pixels.shape[-2:])
    if not rows * columns:
        raise ValueError(f"size={size} is larger than an image of {tuple(pixels.shape[-2:])} pixels")
    out = pixels.clone()
    for image in out.view(-1, *pixels.shape[-3:]):
        mean = image.mean()
        for index in torch.randperm(rows * columns, generator=generator)[: int(rows * columns * ratio)].tolist():
            y, x = index // columns * size, index % columns * size
            image[:, y : y + size, x : x + size] = mean
    return out


def mask_patches(
    patches: Tensor,
    patch: tuple[int, int, int, int],
    ratio: float = 0.3,
    whole: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same for one image of flattened patches (N, channels * frames * height * width)."""
    check_rank("patches", patches, 2, "(N, size of a patch)")
    check_real("ratio", ratio, least=0, most=1)
    c, t, h, w = to_tuple("patch", patch, 4)
    if patches.shape[1] != c * t * h * w:
        raise ValueError(f"patches have {patches.shape[1]} numbers each, {c} x {t} x {h} x {w} were expected")
    seen = patches.view(-1, c, t, h, w)
    if whole:
        out = patches.clone()
        out[torch.randperm(len(out), generator=generator)[: int(len(out) * ratio)].to(out.device)] = patches.mean()
        return out
    flat = seen.permute(1, 2, 0, 3, 4).reshape(c * t, -1).clone()
    flat[:, torch.randperm(flat.shape[1], generator=generator)[: int(flat.shape[1] * ratio)].to(flat.device)] = (
        patches.mean()
    )
    return flat.view(c, t, -1, h, w).permute(2, 0, 1, 3, 4).reshape(patches.shape)


class Variant:
    """``variant(inputs, about, generator)``: the model inputs of one pair, changed; nothing is written in place.

    A subclass is a frozen dataclass, so that it can name what is read.
    """

    def __call__(self, inputs: Mapping[str, Any], about: About, generator: torch.Generator) -> dict[str, Any]:
        raise NotImplementedError


def _need_pixels(inputs: Mapping[str, Any], who: Variant) -> Tensor:
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or not pixels.numel():
        raise ValueError(f"{who} needs pixel_values, a pair has {sorted(inputs)}")
    return pixels


def _each_image(pixels: Tensor, inputs: Mapping[str, Any], about: About) -> list[Tensor]:
    """Flattened patches image by image."""
    grid = inputs.get("image_grid_thw")
    if about.patch is None or grid is None:
        raise ValueError(f"pixel_values {tuple(pixels.shape)} are no images, and no image_grid_thw says how they lie")
    return list(pixels.split(torch.as_tensor(grid).view(-1, 3).prod(1).tolist()))


@dataclass(frozen=True)
class MeanPixels(Variant):
    """A share of the pixels, chosen at random, at the image's mean."""

    ratio: float = 0.3

    def __post_init__(self) -> None:
        check_real("ratio", self.ratio, least=0, most=1)

    def __call__(self, inputs: Mapping[str, Any], about: About, generator: torch.Generator) -> dict[str, Any]:
        pixels = _need_pixels(inputs, self)
        if pixels.dim() == 2:
            parts = _each_image(pixels, inputs, about)
            assert about.patch is not None
            masked = torch.cat([mask_patches(p, about.patch, self.ratio, False, generator) for p in parts])
        else:
            masked = mask_pixels(pixels, self.ratio, generator)
        return {**inputs, "pixel_values": masked}


@dataclass(frozen=True)
class MeanBlocks(Variant):
    """A share of the blocks at the image's mean; of models that take flattened patches, of their patches."""

    ratio: float = 0.3
    size: int = 14

    def __post_init__(self) -> None:
        check_real("ratio", self.ratio, least=0, most=1)
        check_int("size", self.size, least=1)

    def __call__(self, inputs: Mapping[str, Any], about: About, generator: torch.Generator) -> dict[str, Any]:
        pixels = _need_pixels(inputs, self)
        if pixels.dim() == 2:
            parts = _each_image(pixels, inputs, about)
            assert about.patch is not None
            masked = torch.cat([mask_patches(p, about.patch, self.ratio, True, generator) for p in parts])
        else:
            masked = mask_blocks(pixels, self.ratio, self.size, generator)
        return {**inputs, "pixel_values": masked}


@dataclass(frozen=True)
class MaskedAttention(Variant):
    """A share of the image's tokens hidden from attention; pixels and positions stay."""

    ratio: float = 0.3

    def __post_init__(self) -> None:
        check_real("ratio", self.ratio, least=0, most=1)

    def __call__(self, inputs: Mapping[str, Any], about: About, generator: torch.Generator) -> dict[str, Any]:
        ids = inputs["input_ids"]
        image = torch.isin(ids, torch.tensor(about.image_tokens, dtype=ids.dtype, device=ids.device))
        places = image.nonzero().squeeze(-1)
        if not len(places):
            raise ValueError(f"{self} needs image tokens {list(about.image_tokens)} in the prompt, a pair has none")
        hidden = places[torch.randperm(len(places), generator=generator)[: int(len(places) * self.ratio)]]
        mask = inputs["attention_mask"].clone()
        mask[hidden] = 0
        return {**inputs, "attention_mask": mask}
