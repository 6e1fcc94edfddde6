"""Pictures as arrays: what a user hands over, crops, and boxes that are drawn.

A picture is an array ``(H, W, 3)``, ``uint8`` in 0..255 or ``float32`` in [0, 1]. A box is ``(x1, y1, x2, y2)`` in
pixels, ``x1 <= x < x2`` and ``y1 <= y < y2``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_int, describe

Box: TypeAlias = tuple[int, int, int, int]
Picture: TypeAlias = np.ndarray

KINDS = (
    "a PIL image, an array or tensor (H, W, 3) or (H, W), or a tensor (3, H, W); uint8 in 0..255 or floating in [0, 1]"
)


def to_picture(image: Any, name: str = "image") -> Picture:
    """A picture of the kinds that users have, as an array ``(H, W, 3)``; nothing is copied that need not be.

    Args:
        image: a PIL image, an array or tensor, channels last; channels first where the last axis cannot be channels.
        name: of the argument, for the message.

    Returns:
        ``uint8``, or ``float32`` where floating numbers were given.

    Raises:
        TypeError: no picture.
        ValueError: another shape, no pixels, numbers that are not finite or outside [0, 1].

    >>> to_picture(torch.zeros(3, 8, 6)).shape
    (8, 6, 3)
    """
    if hasattr(image, "convert") and hasattr(image, "getbands"):  # of PIL, which is not imported for this
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, Tensor):
        image = (image.detach().float() if image.is_floating_point() else image.detach()).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} must be {KINDS}, got {describe(image)}")
    if image.ndim == 3 and image.shape[-1] not in (1, 3, 4) and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"{name} must be {KINDS}, got shape {tuple(image.shape)}")
    image = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image, 3, axis=-1)
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        least, most = int(image.min()), int(image.max())
        if least < 0 or most > 255:
            raise ValueError(f"{name} holds integers of {least}..{most}; pixels are 0..255, or floating in [0, 1]")
        return np.ascontiguousarray(image.astype(np.uint8))
    image = np.ascontiguousarray(image, dtype=np.float32)
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN too
        raise ValueError(
            f"{name} holds numbers of {low:.4g}..{high:.4g}; floating pixels lie in [0, 1], before a model's own "
            "normalisation"
        )
    return image


def to_pictures(images: Any, name: str = "image") -> tuple[Picture, ...]:
    """``None``, one picture or a list of pictures, as a tuple."""
    if images is None:
        return ()
    if isinstance(images, (list, tuple)):
        return tuple(to_picture(image, f"{name}[{i}]") for i, image in enumerate(images))
    return (to_picture(images, name),)


def to_bytes(picture: Picture) -> Picture:
    """A picture as ``uint8``, rounded."""
    return picture if picture.dtype == np.uint8 else np.rint(picture.clip(0, 1) * 255).astype(np.uint8)


def digest(picture: Picture) -> bytes:
    """What tells one picture from another."""
    return (
        hashlib.blake2b(np.ascontiguousarray(picture).data, digest_size=16).digest()
        + repr((picture.shape, picture.dtype.str)).encode()
    )


def check_box(name: str, box: Any, size: tuple[int, int] | None = None) -> Box:
    """``box`` as four integers with room between them, within a picture of ``size`` (H, W)."""
    if isinstance(box, (Tensor, np.ndarray)):
        box = box.tolist()
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        raise TypeError(f"{name} must be a box (x1, y1, x2, y2) in pixels, got {describe(box)}")
    whole = (int(v) if isinstance(v, (float, np.floating)) and float(v).is_integer() else v for v in box)
    x1, y1, x2, y2 = (check_int(f"{name}[{i}]", v) for i, v in enumerate(whole))
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"{name} must have x1 < x2 and y1 < y2, got {(x1, y1, x2, y2)}")
    if size is not None and (x1 < 0 or y1 < 0 or x2 > size[1] or y2 > size[0]):
        raise ValueError(f"{name}={(x1, y1, x2, y2)} leaves the picture of {size[1]} × {size[0]} pixels")
    return x1, y1, x2, y2


def cut(picture: Picture, box: Sequence[int]) -> Picture:
    """The pixels of a box."""
    x1, y1, x2, y2 = box
    return picture[y1:y2, x1:x2]


def resize(picture: Picture, size: tuple[int, int], mode: str = "bicubic") -> Picture:
    """A picture at another size (H, W), smoothed where it shrinks; of the same kind of numbers."""
    if picture.shape[:2] == tuple(size):
        return picture
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    if mode == "nearest":
        x = F.interpolate(x, size=tuple(size), mode="nearest-exact")
    else:
        x = F.interpolate(x, size=tuple(size), mode=mode, antialias=True)
    y = np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())
    return y if y.dtype == np.uint8 else y.clip(0, 1)


def colour(picture: Picture, rgb: Sequence[float]) -> np.ndarray:
    """A colour in [0, 1] as pixels of this picture; bytes are cut off, not rounded."""
    values = np.asarray(rgb, dtype=np.float64)
    return (values * 255).astype(np.uint8) if picture.dtype == np.uint8 else values.astype(np.float32)


def to_square(picture: Picture, background: Sequence[float]) -> tuple[Picture, int, int]:
    """A picture in the middle of a square, and where its corner is: ``(square, left, top)``."""
    height, width = picture.shape[:2]
    side = max(height, width)
    if height == width:
        return picture.copy(), 0, 0
    square = np.empty((side, side, 3), picture.dtype)
    square[:] = colour(picture, background)
    left, top = (side - width) // 2, (side - height) // 2
    square[top : top + height, left : left + width] = picture
    return square, left, top


def outline(picture: Picture, box: Sequence[int], rgb: Sequence[float], thickness: int) -> Picture:
    """A copy with the border of a box painted, corners included: ``thickness`` pixels inwards."""
    picture = picture.copy()
    if thickness <= 0:
        return picture
    x1, y1, x2, y2 = box
    inner = picture[y1 + thickness : max(y2 - thickness + 1, 0), x1 + thickness : max(x2 - thickness + 1, 0)].copy()
    picture[y1 : y2 + 1, x1 : x2 + 1] = colour(picture, rgb)
    picture[y1 + thickness : y1 + thickness + inner.shape[0], x1 + thickness : x1 + thickness + inner.shape[1]] = inner
    return picture
