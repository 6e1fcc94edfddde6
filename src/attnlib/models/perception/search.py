r"""Visual search by an eye that sees less outside of where it looks (eccNET; Gupta et al., 2021).

A VGG-16 whose pools widen with eccentricity (:class:`EccentricityPool`) sees the display around the present fixation.
The target's features, at the outputs of blocks 3, 4 and 5, are convolved with the display's: three maps of attention,
weighted by their maxima, rescaled to [0, 1], summed, sharpened by differences of Gaussians. The eye moves to the
maximum; what was visited is replaced by the background; the search ends when the target lies under the fixation. How
many fixations it takes is made into milliseconds, their slope over the number of items into an asymmetry of searching A
among B and B among A:

``A = (s_hard - s_easy) / (s_hard + s_easy)``, hard and easy being so *for people*: positive is human-like.

:class:`EccNet` with ``ecc_depth=0`` is the invariant search network (IVSN), which pools alike everywhere; released with
``kind="max"``. :func:`template_map` and :func:`search_map` are the baselines without a network.

Kept as released: a ring's border counts *output* pixels while windows and degrees are in input pixels; rectangular
inputs are padded to squares; even windows reach further to the bottom right; padding of TensorFlow's ``same`` is left
out of means. Different: no map that is zero everywhere is searched (theirs moves to the corner), which is said; where
every item has been visited the search ends. Images are RGB from 0 to 255, turned into BGR without the mean colour.

Reference: Gupta, Zhang, Wu, Wolfe, Kreiman, 2021, "Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent
Biases", arXiv 2106.02953.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_int, check_ints, check_real, checked, to_tuple

#: What the authors subtract from blue, green and red.
MEAN_BGR = (103.939, 116.779, 123.68)
#: Pixels of a degree at each pool, and how much windows widen there by a pixel of eccentricity.
DEGREES = (30, 15, 8, 4, 2)
SLOPES = (0.0, 0.0, 3.5 * 0.02, 8 * 0.02, 16 * 0.02)
#: Milliseconds of a fixation and before the first, fitted to people once by the authors.
MS_PER_FIXATION, MS_BEFORE = 252.359, 376.271
KINDS = ("avg", "max")
WEIGHTINGS = ("response", "equal")


def pool_same(x: Tensor, window: int, stride: int, kind: str = "avg") -> Tensor:
    """Pooling of (B, C, H, W) to ceil(H / stride) rows; what lies outside counts for nothing.

    >>> pool_same(torch.tensor([[[[1.0, 2.0, 6.0]]]]), 2, 2).tolist()
    [[[[1.5, 6.0]]]]
    """
    check_axes("x", x, B=None, channels=None, H=None, W=None)
    pads, counts = [], []
    for n in (x.shape[3], x.shape[2]):
        out = -(-n // stride)
        total = max((out - 1) * stride + window - n, 0)
        pads += [total // 2, total - total // 2]
        first = torch.arange(out, device=x.device) * stride - total // 2
        counts.append(((first + window).clamp_max(n) - first.clamp_min(0)).to(x.dtype))
    if kind == "max":
        return F.max_pool2d(F.pad(x, pads, value=-math.inf), window, stride)
    summed = F.avg_pool2d(F.pad(x, pads), window, stride, divisor_override=1)
    return summed / (counts[1][:, None] * counts[0])


class EccentricityPool(nn.Module):
    """Pooling with windows that widen in rings around the middle, on (B, C, H, W).

    Args:
        slope: by how many pixels a window widens for each of eccentricity, in pixels of the input.
        deg2px: pixels of a degree.
        rf_min: window within the fovea.
        fovea: diameter in degrees within which windows are smallest.
        quant: degrees after which the next ring begins.
        stride: of all windows.
        kind: ``"avg"`` or ``"max"``.

    >>> EccentricityPool(0.5, 4)(torch.rand(1, 2, 40, 30)).shape
    torch.Size([1, 2, 20, 20])
    """

    @checked
    def __init__(
        self, slope: float = 0.0, deg2px: int = 30, rf_min: int = 2, fovea: float = 4.0, quant: float = 1.0,
        stride: int = 2, kind: str = "avg",
    ):  # fmt: skip
        super().__init__()
        check_real("slope", slope, least=0)
        check_choice("kind", kind, KINDS)
        for name, value in (("deg2px", deg2px), ("rf_min", rf_min), ("stride", stride)):
            check_int(name, value, least=1)
        check_real("fovea", fovea, above=0)
        self.slope, self.deg2px, self.rf_min, self.fovea = slope, deg2px, rf_min, fovea
        self.step, self.stride, self.kind = round(check_real("quant", quant, above=0) * deg2px / 2), stride, kind
        if self.step < 1:
            raise ValueError(f"quant={quant} and deg2px={deg2px} leave rings of less than one pixel of the output")

    def rings(self, side: int) -> list[tuple[int, Tensor]]:
        """``(window, (n, n) bool)`` of every ring for a square input, from the fovea outwards; a partition."""
        n = (side + 1) // self.stride if self.stride > 1 else side
        at = torch.arange(n) - n // 2
        far = at[:, None].square() + at.square()
        ecc = round(self.fovea * self.deg2px / 2)
        borders = [] if ecc > n / 2 else [ecc]
        while borders and (ecc := ecc + self.step) < n / 2:
            borders.append(ecc)
        widths = [self.rf_min]
        for outer in [*borders[1:], ecc] if borders else []:
            widths.append(self.rf_min + round(self.slope * (2 * outer - self.fovea * self.deg2px)))
        number = torch.zeros(n, n, dtype=torch.long)
        for border in borders:
            number += far >= border**2
        return [(width, number == i) for i, width in enumerate(widths)]

    def forward(self, x: Tensor) -> Tensor:
        check_axes("x", x, B=None, channels=None, H=None, W=None)
        height, width = x.shape[2:]
        side = max(height, width)
        x = F.pad(x, (d := (side - width) // 2, side - width - d, d := (side - height) // 2, side - height - d))
        by_width: dict[int, Tensor] = {}
        for window, here in self.rings(side):
            by_width[window] = by_width[window] | here if window in by_width else here
        out: Tensor | None = None
        for window, here in by_width.items():
            pooled = pool_same(x, window, self.stride, self.kind)
            out = pooled if out is None else torch.where(here.to(x.device), pooled, out)
        assert out is not None
        return out


class EccNet(nn.Module):
    """VGG-16 with eccentricity-dependent pools; maps of the display, or of the target as kernels.

    Args:
        width: channels of the first block; 64 is VGG-16.
        ecc_depth: how many of the five pools depend on eccentricity; 0 is IVSN.
        kind: of all pools.
        slopes, degrees: per pool.
        quant: degrees after which the next ring begins.

    >>> net = EccNet(width=2).eval()
    >>> [tuple(t.shape) for t in net(torch.zeros(1, 3, 64, 64))], net(torch.zeros(1, 3, 28, 28), target=True)[0].shape
    ([(1, 8, 4, 4), (1, 16, 4, 4), (1, 16, 4, 4)], torch.Size([1, 8, 1, 1]))
    """

    @checked
    def __init__(
        self, width: int = 64, ecc_depth: int = 5, kind: str = "avg", slopes: Sequence[float] = SLOPES,
        degrees: Sequence[int] = DEGREES, quant: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        check_int("width", width, least=1)
        check_int("ecc_depth", ecc_depth, least=0, most=5)
        check_choice("kind", kind, KINDS)
        if not len(slopes) == len(degrees) == 5:
            raise ValueError(f"slopes and degrees must be five each, got {len(slopes)} and {len(degrees)}")
        dims, convs, blocks, dim = (1, 2, 4, 8, 8), (2, 2, 3, 3, 3), [], 3
        for times, count in zip(dims, convs, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(dim, width * times, 3, padding=1), nn.ReLU()]
                dim = width * times
            blocks.append(nn.Sequential(*layers))
        self.blocks, self.kind, self.ecc_depth = nn.ModuleList(blocks), kind, ecc_depth
        self.pools = nn.ModuleList(
            EccentricityPool(s, d, quant=quant, kind=kind)
            for s, d in zip(slopes[:ecc_depth], degrees[:ecc_depth], strict=True)
        )

    def forward(self, images: Tensor, target: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of blocks 3, 4 and 5: of a display at a 16th of its side, of a target at a 32nd, as released.

        Args:
            images: (B, 3, H, W) RGB from 0 to 255.
            target: a block's output goes through its own pool, which depends on eccentricity, and the plain pools up
                to the fifth; of a display it goes through the plain pools up to the fourth.
        """
        check_axes("images", images, B=None, channels=3, H=None, W=None)
        x = caffe(images)
        found: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            features = block(x)
            last = i == 4 and not target
            if not last:
                x = self.pools[i](features) if i < self.ecc_depth else pool_same(features, 2, 2, self.kind)
            found = [*found, features] if not target else found
            found = found if last else [pool_same(f, 2, 2, self.kind) for f in found]
            found = [*found, x] if target else found
            found = found if i >= 2 else []
        return found[0], found[1], found[2]

    def _keras_names(self) -> dict[str, str]:
        """Keras's name of every weight, by ours."""
        names = {}
        block: Any
        for b, block in enumerate(self.blocks):
            convs = [i for i, layer in enumerate(block) if isinstance(layer, nn.Conv2d)]
            for number, i in enumerate(convs, 1):
                for ours, theirs in (("weight", "kernel"), ("bias", "bias")):
                    names[f"blocks.{b}.{i}.{ours}"] = f"block{b + 1}_conv{number}/{theirs}"
        return names

    def load_keras(self, arrays: Mapping[str, Tensor]) -> EccNet:
        """Weights ``block1_conv1/kernel`` (rows, columns, in, out) and ``.../bias``, as Keras names VGG-16's.

        Raises:
            ValueError: a name too many or too few.
        """
        state = self._keras_names()
        if unlike := set(state.values()) ^ set(arrays):
            raise ValueError(f"arrays must be those of VGG-16's convolutions; too many or too few: {sorted(unlike)}")
        given = {k: arrays[v].permute(3, 2, 0, 1) if k.endswith("weight") else arrays[v] for k, v in state.items()}
        self.load_state_dict(given)
        return self


def caffe(images: Tensor) -> Tensor:
    """RGB from 0 to 255 to BGR without the mean colour."""
    return images.flip(1) - torch.tensor(MEAN_BGR, dtype=images.dtype, device=images.device)[:, None, None]


# --------------------------------------------------------------------------------------------------------------------
# Maps of attention.


def correlate(features: Tensor, kernel: Tensor) -> Tensor:
    """(1, C, H, W) with (1, C, h, w) at every place: (H, W); zeros outside, one more behind for even kernels."""
    h, w = kernel.shape[2:]
    pads = ((w - 1) // 2, w - 1 - (w - 1) // 2, (h - 1) // 2, h - 1 - (h - 1) // 2)
    return F.conv2d(F.pad(features, pads), kernel)[0, 0]


def smooth(x: Tensor, size: int, sigma: float) -> Tensor:
    """(H, W) under a Gaussian of ``size`` entries, reflected at borders; sigma 0 means binomial weights, as OpenCV."""
    check_int("size", size, least=1)
    if size % 2 == 0:
        raise ValueError(f"size must be odd, got {size}")
    if sigma == 0:
        if size not in (1, 3, 5):
            raise ValueError(f"sigma=0 has weights for sizes 1, 3 and 5, got {size}")
        line = torch.tensor([math.comb(size - 1, k) for k in range(size)], dtype=x.dtype)
    else:
        line = torch.exp(-(torch.arange(size, dtype=x.dtype) - size // 2).square() / (2 * sigma**2))
    line = (line / line.sum()).to(x.device)
    out = x[None, None]
    if min(x.shape) <= size // 2:
        raise ValueError(f"a map of {tuple(x.shape)} is too small for a Gaussian of {size}")
    out = F.pad(out, (size // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(out, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))[0, 0]


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """(H, W) to a larger size, as OpenCV's INTER_AREA does it: entries repeated, mixed where a pixel lies between."""
    for axis, out in enumerate(check_ints("size", size, least=1)):
        n = x.shape[axis]
        if out < n:
            raise ValueError(f"size={tuple(size)} is smaller than the map {tuple(x.shape)}")
        at = torch.arange(out, dtype=torch.float64)
        left = (at * n / out).floor()
        mix = (at + 1) - (left + 1) * out / n
        mix = torch.where(mix <= 0, 0.0, mix - mix.floor()).to(x)
        left = left.long()
        right = (left + 1).clamp_max(n - 1)
        mix = mix.view(-1, *(1,) * (1 - axis))
        x = x.index_select(axis, left.to(x.device)) * (1 - mix) + x.index_select(axis, right.to(x.device)) * mix
    return x


def attention_map(
    display: Sequence[Tensor], target: Sequence[Tensor], out_layer: Sequence[float] = (1, 1, 1),
    weighting: str = "response", dog: Sequence[Sequence[float]] = ((3, 1), (5, 3)),
) -> Tensor:  # fmt: skip
    """Where the display is like the target: (H, W) from maps and kernels of three blocks.

    Args:
        display, target: of :class:`EccNet`.
        out_layer: how much each block counts.
        weighting: ``"response"``: blocks count by the maximum of their maps, too; ``"equal"``.
        dog: size and deviation of the narrow and the wide Gaussian whose difference is added three times.

    Raises:
        ValueError: weights that sum to zero: no block answers.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    weights, maps = [], []
    for features, kernel, used in zip(display, target, to_tuple("out_layer", out_layer, 3), strict=True):
        found = correlate(features, kernel)
        weights.append(float(used) * (1.0 if weighting == "equal" else float(found.max())))
        low, high = found.amin(), found.amax()
        maps.append((found - low) / (high - low) if high > low else torch.zeros_like(found))
    if sum(weights) == 0:
        raise ValueError(f"no block answers: weights {weights} sum to zero, so that the search map is zero everywhere")
    out = torch.stack([m * (w / sum(weights)) for m, w in zip(maps, weights, strict=True)]).sum(0)
    (small, narrow), (large, wide) = dog
    for _ in range(3):
        out = out + smooth(out, int(small), narrow) - smooth(out, int(large), wide)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Searching.


@dataclass(frozen=True)
class Found:
    """A search: (T, 2) fixations from the start on, row and column of the display, and whether it found the target."""

    fixations: Tensor
    found: bool

    def count(self, limit: int, failed: int) -> int:
        """Moves that it took; ``failed`` where it did not find the target in fewer than ``limit + 1``."""
        moves = len(self.fixations) - 1
        return moves if self.found and moves <= limit else failed


def peak(x: Tensor) -> tuple[int, int]:
    """Row and column of the maximum of (H, W).

    Raises:
        ValueError: the map is zero everywhere, so that no place is better than another.
    """
    check_axes("x", x, H=None, W=None)
    if not bool((x != 0).any()):
        raise ValueError("the search map is zero everywhere: nothing in it is like the target")
    return divmod(int(x.argmax()), x.shape[1])


def _near(mask: Tensor, row: int, column: int, size: int) -> bool:
    top, left = row - size // 2, column - size // 2
    return bool(mask[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)].any())


@torch.no_grad()
def search(
    net: EccNet, display: Tensor, target: Tensor, goal: Tensor, items: Tensor | None = None, background: float = 255,
    reach: int | None = None, border: int = 64, limit: int | None = None, ior_size: int = 10,
    out_layer: Sequence[float] = (1, 1, 1), weighting: str = "response",
    dog: Sequence[Sequence[float]] = ((3, 1), (5, 3)),
) -> Found:  # fmt: skip
    """Move over a display until the target is found.

    Args:
        net: what sees.
        display: (3, H, W) RGB from 0 to 255.
        target: (3, h, w), its picture.
        goal: (H, W) bool, where it is.
        items: (K, H, W) bool, the places of a display of items; one that was visited is never visited again, and seen
            as background. Without them any pixel may be fixated, and a square of ``ior_size`` around it never again.
        background: value around the display and in place of visited items.
        reach: pixels that the eye sees in each direction; the display's height by default.
        border: pixels beyond them that are seen, too, but not fixated.
        limit: most moves; one more than there are items by default, 10 without.
        ior_size: side of the square in which a target is recognised.
        out_layer, weighting, dog: of :func:`attention_map`.

    Returns:
        Fixations from the middle on.

    Raises:
        ValueError: shapes that do not fit, a goal that is nowhere, or a search map that is zero everywhere.
    """
    check_axes("display", display, channels=3, H=None, W=None)
    check_axes("target", target, channels=3, h=None, w=None)
    height, width = display.shape[1:]
    check_axes("goal", goal, H=height, W=width)
    if not bool(goal.any()):
        raise ValueError("goal is nowhere: it has no pixel")
    if items is not None:
        check_axes("items", items, K=None, H=height, W=width)
    reach = height if reach is None else check_int("reach", reach, least=1)
    check_int("border", border, least=0)
    limit = (10 if items is None else len(items) + 1) if limit is None else check_int("limit", limit, least=1)
    around = reach + border
    seen = F.pad(display, (around,) * 4, value=background)
    free = torch.ones(height, width, dtype=torch.bool, device=display.device)  # not visited
    if items is not None:
        free = items.any(0)
    kernels = net(target[None], target=True)
    row, column = height // 2, width // 2
    fixations, found = [(row, column)], False
    for _ in range(limit):
        if items is None:
            if found := _near(goal, row, column, ior_size):
                break
            half = ior_size // 2
            free[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = False
        if not bool(free.any()):
            break
        here = seen[:, row : row + 2 * around, column : column + 2 * around]
        attention = attention_map(net(here[None]), kernels, out_layer, weighting, dog)
        attention = enlarge(attention, here.shape[1:])
        attention = attention - attention.min()
        allowed = F.pad(free, (around,) * 4)[row : row + 2 * around, column : column + 2 * around].clone()
        if border:
            allowed[:border] = allowed[-border:] = allowed[:, :border] = allowed[:, -border:] = False
        if not bool(allowed.any()):
            break
        down, along = peak(attention * allowed)
        row, column = (min(max(a, 0), n) for a, n in ((row - around + down, height), (column - around + along, width)))
        fixations.append((row, column))
        if items is not None:
            for item in items:
                if row < height and column < width and item[row, column]:
                    free &= ~item
                    seen[:, around : around + height, around : around + width][:, item] = background
                    break
            if found := _near(goal, row, column, ior_size):
                break
    return Found(torch.tensor(fixations), found)


def template_map(display: Tensor, target: Tensor) -> Tensor:
    """(H, W) likeness by pixels alone: the target slid over the display, smoothed by 7 pixels (baseline)."""
    check_axes("display", display, channels=3, H=None, W=None)
    check_axes("target", target, channels=3, h=None, w=None)
    return smooth(correlate(caffe(display[None]), caffe(target[None])), 7, 3)


def search_map(x: Tensor, goal: Tensor, items: Tensor, limit: int | None = None, ior_size: int = 10) -> Found:
    """Visit items from the highest value of one map (H, W) to the lowest; of ``torch.rand`` it is chance.

    Raises:
        ValueError: a map that is zero wherever an item lies.
    """
    check_axes("x", x, H=None, W=None)
    check_axes("goal", goal, H=x.shape[0], W=x.shape[1])
    check_axes("items", items, K=None, H=x.shape[0], W=x.shape[1])
    limit = len(items) + 1 if limit is None else check_int("limit", limit, least=1)
    free = items.any(0)
    row, column = x.shape[0] // 2, x.shape[1] // 2
    fixations, found = [(row, column)], _near(goal, row, column, ior_size)
    x = x - x.min()
    for _ in range(limit):
        if found or not bool(free.any()):
            break
        row, column = peak(x * free)
        fixations.append((row, column))
        found = _near(goal, row, column, ior_size)
        for item in items:
            if item[row, column]:
                free = free & ~item
                break
    return Found(torch.tensor(fixations), found)


# --------------------------------------------------------------------------------------------------------------------
# What searches say.


def search_slope(items: Sequence[float], times: Sequence[float]) -> float:
    """Slope of the least squares line of times over numbers of items.

    >>> round(search_slope([8, 16, 32], [510, 590, 750]), 6)
    10.0
    """
    if len(items) != len(times) or len(set(items)) < 2:
        raise ValueError(
            f"items and times must be as many, with two numbers of items; got {list(items)}, {list(times)}"
        )
    middle = sum(items) / len(items)
    over = sum((n - middle) * t for n, t in zip(items, times, strict=True))
    return over / sum((n - middle) ** 2 for n in items)


def reaction_time(fixations: float) -> float:
    """Milliseconds of a number of fixations, by the authors' fit to people."""
    return MS_PER_FIXATION * fixations + MS_BEFORE


def asymmetry_index(hard: float, easy: float) -> float:
    """``(s_hard - s_easy) / (s_hard + s_easy)`` of slopes, negative ones being 0; 0 where both are.

    >>> asymmetry_index(100, 0), asymmetry_index(20, 20), asymmetry_index(5, 15), asymmetry_index(-1, -2)
    (1.0, 0.0, -0.5, 0.0)
    """
    hard, easy = max(0.0, check_real("hard", hard)), max(0.0, check_real("easy", easy))
    return (hard - easy) / (hard + easy) if hard + easy else 0.0
