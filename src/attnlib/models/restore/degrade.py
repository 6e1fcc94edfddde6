"""Faces made worse: the extended degradations (EDM) that RestoreFormer++ is trained on.

Wang et al., 2023, arXiv 2308.07228, section 3.3. ``y = [JPEG([(x * g) down r + n])] up``: blur by a Gaussian, smaller
by r, noise, JPEG, back to its size. Beside it, each at times: haze over the blurred image, a second and other
degradation outside a square (uneven), a face that lies shifted, grey images (the right one too).

Draws are from a generator on the CPU that is given, or from the global one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_axes, check_float, check_int, check_real, describe, readable
from ...extras import need
from .base import mirrored


def gaussian_kernel(size: int, sigma: tuple[float, float], angle: float = 0.0) -> Tensor:
    """(size, size), of sum 1: a Gaussian of two widths, the first along an axis turned by ``angle`` from the x axis.

    >>> k = gaussian_kernel(5, (1.0, 1.0))
    >>> bool((k.sum() - 1).abs() < 1e-6), bool(torch.allclose(k, k.T))
    (True, True)
    """
    check_int("size", size, least=1)
    if not isinstance(sigma, (tuple, list)) or len(sigma) != 2:
        raise ValueError(f"sigma must be two widths, got {sigma!r}")
    first, second = (check_real(f"sigma[{i}]", s, above=0) for i, s in enumerate(sigma))
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    power = -0.5 * ((along / first).square() + (across / second).square())
    return power.flatten().softmax(0).view(size, size).float()


def blurred(x: Tensor, kernel: Tensor) -> Tensor:
    """(C, H, W) under a kernel of odd sides, mirrored at the borders without their pixels."""
    check_axes("x", x, C=None, H=None, W=None)
    check_float("x", x)
    if not isinstance(kernel, Tensor) or kernel.dim() != 2 or len(kernel) != kernel.shape[1] or len(kernel) % 2 == 0:
        raise ValueError(f"kernel must be (k, k) with an odd k, got {describe(kernel)}")
    weight = kernel.to(x.dtype).expand(x.shape[0], 1, *kernel.shape)
    return F.conv2d(mirrored(x[None], len(kernel) // 2), weight, groups=x.shape[0])[0]


def jpeg(x: Tensor, quality: int) -> Tensor:
    """(C, H, W) of 1 or 3 channels, 0 to 1, as JPEG of a quality from 1 to 100 gives it back."""
    check_int("quality", quality, least=1, most=100)
    _check_picture(x)
    image = need("PIL.Image", "jpeg")
    array = (x.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    buffer = io.BytesIO()
    image.fromarray(array[..., 0] if x.shape[0] == 1 else array).save(buffer, "JPEG", quality=quality)
    buffer.seek(0)
    with image.open(buffer) as opened:
        back = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(*x.shape[1:], x.shape[0])
    return back.movedim(-1, 0).to(x.dtype).div(255).to(x.device)


@dataclass(frozen=True)
class Degradation:
    """How faces are made worse; the published numbers by default. Lengths are for images of ``size`` pixels a side and
    shrink with them.

    Args:
        blur: smallest and largest width of the Gaussian.
        blur_size: sides of its kernel, ``2 n + 1`` with n from these.
        uneven_blur: how often its two widths differ.
        down: how many times smaller.
        noise: standard deviation, of 255.
        quality: of JPEG; ``None``: without.
        uneven: how often another degradation holds outside a square, of ``square`` pixels a side.
        haze, haze_alpha: how often the image keeps only so much of itself, the rest white.
        shift, shift_most: how often, and how far, the face is moved.
        grey: how often the image has no colours.
        size: see above.

    >>> made, right = Degradation()(torch.rand(3, 64, 48), torch.Generator().manual_seed(0))
    >>> made.shape, right.shape
    (torch.Size([3, 64, 48]), torch.Size([3, 64, 48]))
    """

    blur: tuple[float, float] = (0.1, 10.0)
    blur_size: tuple[int, int] = (19, 20)
    uneven_blur: float = 0.5
    down: tuple[float, float] = (0.8, 8.0)
    noise: tuple[float, float] = (0.0, 20.0)
    quality: tuple[int, int] | None = (60, 100)
    uneven: float = 0.1
    square: tuple[int, int] = (128, 256)
    haze: float = 0.008
    haze_alpha: tuple[float, float] = (0.75, 0.95)
    shift: float = 0.2
    shift_most: int = 32
    grey: float = 0.008
    size: int = 512

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("uneven_blur", "uneven", "haze", "shift", "grey"):
                check_real(f.name, value, least=0, most=1)
            elif f.name in ("size", "shift_most"):
                check_int(f.name, value, least=int(f.name == "size"))
            elif f.name in ("blur_size", "square"):
                _pair(f.name, value, check_int, least=1)
            elif f.name == "quality":
                if value is not None:
                    _pair(f.name, value, check_int, least=1, most=100)
            elif f.name in ("blur", "down"):
                _pair(f.name, value, check_real, above=0)
            else:
                _pair(f.name, value, check_real, least=0, most=1 if f.name == "haze_alpha" else None)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(C, H, W), 0 to 1, made worse and rounded to 256 levels; and what is right, which may have been moved or
        lost its colours with it.

        Raises:
            ValueError: no image of 1 or 3 channels with a pixel, numbers that are not finite.
        """
        _check_picture(x)

        def draw(low: float = 0.0, high: float = 1.0) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        def pick(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        height, width = x.shape[1:]
        part = min(height, width) / self.size
        right = x.clone()
        if draw() < self.shift:
            most = min(round(self.shift_most * part), height, width)
            rows, cols = (_mirrored(torch.arange(n) + pick(-most, most), n).to(x.device) for n in (height, width))
            right = x[:, rows][:, :, cols]

        def once() -> Tensor:
            n = max(round(pick(*self.blur_size) * part), 1)
            one, two = draw(*self.blur) * part, draw(*self.blur) * part
            turned = draw() < self.uneven_blur
            kernel = gaussian_kernel(
                2 * n + 1, (one, two if turned else one), draw(-math.pi, math.pi) if turned else 0.0
            )
            y = blurred(right, kernel.to(x.device))
            if draw() < self.haze:
                alpha = draw(*self.haze_alpha)
                y = y * alpha + (1 - alpha)
            scale = draw(*self.down)
            small = [max(int(side // scale), 1) for side in (height, width)]
            y = F.interpolate(y[None], small, mode="bilinear", align_corners=False)[0]
            sigma = draw(*self.noise) / 255
            y = (y + sigma * torch.randn(y.shape, generator=generator).to(y)).clamp(0, 1)
            if self.quality is not None:
                y = jpeg(y, pick(*self.quality))
            return F.interpolate(y[None], (height, width), mode="bilinear", align_corners=False)[0]

        made = once()
        if draw() < self.uneven:
            side = min(max(pick(*(round(s * part) for s in self.square)), 1), height, width)
            top, left = pick(0, height - side), pick(0, width - side)
            inside = torch.zeros(1, height, width, dtype=torch.bool, device=x.device)
            inside[:, top : top + side, left : left + side] = True
            made = torch.where(inside, made, once())
        if draw() < self.grey and x.shape[0] == 3:
            made, right = _grey(made), _grey(right)
        return (made * 255).round().clamp(0, 255) / 255, right


def _check_picture(x: Tensor) -> None:
    check_axes("x", x, C=None, H=None, W=None)
    check_float("x", x)
    if x.shape[0] not in (1, 3) or not x.numel():
        raise ValueError(f"x must be an image (1 or 3, H, W) with at least one pixel, got shape {tuple(x.shape)}")
    if readable(x) and not bool(x.isfinite().all()):
        raise ValueError("x must be finite: what is not has no level of 256")


def _pair(name: str, value: Sequence[float], check: Callable[..., Any], **bounds: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a smallest and a largest number, got {value!r}")
    for i, v in enumerate(value):
        check(f"{name}[{i}]", v, **bounds)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be a smallest and a largest number, got {tuple(value)}")


def _mirrored(at: Tensor, n: int) -> Tensor:
    """Places on a line of n, mirrored at both ends with the last ones."""
    at = at % (2 * n)
    return torch.minimum(at, 2 * n - 1 - at)


def _grey(x: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device).view(3, 1, 1)
    return (x * weights).sum(0, keepdim=True).expand_as(x).clone()
