r"""First stages that lose the periphery, and the tests that tell them apart (Deza and Konkle, 2021).

Four fixed first stages, images (B, 3, H, W) in [0, 1] to images, on which a network is trained:

* reference: the decoded features, or the image itself;
* foveated texture: :class:`~attnlib.models.perception.metamers.FoveatedTransfer`;
* :func:`foveated_blur`: a Gaussian whose deviation grows with the pooling region;
* :func:`uniform_blur`: one Gaussian.

:func:`match_strength` finds the strength of a blur at which the mean structural similarity to the reference is that of
another stage, so that all lose as much. Networks start from the same weights (:func:`shared_start`). The stress tests
act on what a stage gives: :func:`occlude`, :func:`spatial_frequency`, :func:`cue_conflict`, and :func:`generalisation`,
the accuracy of every network on every stage's images.

What differs from the release (ArturoDeza/EmergentProperties): high-passed images are not rounded to 8 bits, which
loses what lies outside; soft windows of cue conflicts are computed, theirs are pictures; their script for square cue
conflicts names variables that do not exist and swaps fovea and periphery: written here from the paper. Areas that are
reported are true ones; sides are rounded up as theirs are.

Reference: Deza, Konkle, 2021, "Emergent Properties of Foveated Perceptual Systems", arXiv 2006.07991.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_int, check_real, check_type
from ...grids import LogPolarWindows
from ..losses import local_similarity

#: An image (B, 3, H, W) to an image.
Stage = Callable[[Tensor], Tensor]

OCCLUSIONS = ("scotoma", "glaucoma", "left2right", "top2bottom")
PASSES = ("low", "high")
CUES = ("square", "soft")

#: Deviations in pixels of 256 that the paper tests; none at first.
LOW_PASS = (0.0, 1.0, 3.0, 5.0, 7.0, 9.0, 15.0, 40.0)
HIGH_PASS = (math.inf, 3.0, 1.5, 1.0, 0.7, 0.55, 0.45, 0.4)


def _images(name: str, x: Tensor) -> None:
    check_axes(name, x, B=None, channels=None, H=None, W=None)


def uniform_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur within ``2 ceil(2 sigma) + 1`` pixels, borders repeated, as MATLAB's ``imgaussfilt``.

    >>> x = torch.rand(1, 3, 8, 8)
    >>> torch.equal(uniform_blur(x, 0), x)
    True
    """
    _images("images", images)
    check_real("sigma", sigma, least=0)
    if sigma == 0:
        return images
    down, along = (_blurring(n, sigma, images) for n in images.shape[2:])
    return down @ images @ along.mT


def _blurring(n: int, sigma: float, like: Tensor) -> Tensor:
    """(n, n) matrix of a Gaussian along an axis; a border entry stands for all that lie beyond it."""
    reach = math.ceil(2 * sigma)
    steps = torch.arange(-reach, reach + 1, device=like.device)
    line = torch.exp(-steps.to(like.dtype).square() / (2 * sigma**2))
    at = (torch.arange(n, device=like.device)[:, None] + steps).clamp(0, n - 1)
    return torch.zeros(n, n, dtype=like.dtype, device=like.device).scatter_add_(
        1, at, (line / line.sum()).expand(n, -1)
    )


def foveated_blur(images: Tensor, windows: LogPolarWindows, strength: float) -> Tensor:
    """Blur whose deviation is ``strength`` times the mean radius of a ring's regions; none in the fovea.

    Args:
        images: (B, 3, H, W).
        windows: on the grid of pixels.
        strength: deviation over radius.
    """
    _images("images", images)
    check_type("windows", windows, LogPolarWindows)
    check_real("strength", strength, least=0)
    if windows.weights.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"windows lie on a grid of {tuple(windows.weights.shape[1:])}, images on {tuple(images.shape[2:])}"
        )
    out = images * windows.weights[0].to(images)
    for ring in windows.ring.unique().tolist()[1:]:
        here = windows.ring == ring
        radius = float((windows.area[here] / math.pi).sqrt().mean())
        out = out + uniform_blur(images, strength * radius) * windows.weights[here].sum(0).to(images)
    return out


def similarity(a: Tensor, b: Tensor, pad: bool = False) -> Tensor:
    """(B,) structural similarity of images in [0, 1]: Gaussian windows of 11 pixels, deviation 1.5, inside only.

    With ``pad``, of every pixel, zeros being around both images.
    """
    _images("a", a)
    check_axes("b", b, B=a.shape[0], channels=a.shape[1], H=a.shape[2], W=a.shape[3])
    if not pad and min(a.shape[2:]) < 11:
        raise ValueError(f"images of {tuple(a.shape[2:])} are smaller than the window of 11")
    line = torch.exp(-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / 4.5)
    line = line / line.sum()

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1).unsqueeze(1), line.view(1, 1, -1, 1), padding=(5 * pad, 0))
        return F.conv2d(x, line.view(1, 1, 1, -1), padding=(0, 5 * pad)).view(a.shape[0], -1)

    return local_similarity(a, b, mean).mean(1)


def match_strength(
    stage: Callable[[Tensor, float], Tensor],
    images: Tensor,
    target: float,
    highest: float = 8.0,
    tolerance: float = 0.001,
) -> float:
    """The strength at which the mean similarity of ``stage(images, strength)`` to the images is ``target``.

    Args:
        stage: loses more with a larger strength, and nothing with 0.
        images: (B, 3, H, W) that it is matched on.
        target: similarity.
        highest: strength to search up to.
        tolerance: largest difference of mean similarities.

    Raises:
        ValueError: no strength up to ``highest`` loses so much.
    """
    check_real("target", target, above=0, most=1)
    check_real("tolerance", tolerance, above=0)

    def off(strength: float) -> float:
        return float(similarity(images, stage(images, strength)).mean()) - target

    low, high = 0.0, check_real("highest", highest, above=0)
    if (left := off(high)) > tolerance:
        raise ValueError(f"highest={highest} leaves a similarity of {left + target:.3f}, above target={target:.3f}")
    for _ in range(60):
        middle = (low + high) / 2
        gap = off(middle)
        if abs(gap) <= tolerance:
            return middle
        low, high = (middle, high) if gap > 0 else (low, middle)
    raise ValueError(f"the similarity jumps over target={target} near strength {middle:.4g}")


def shared_start(make: Callable[[], nn.Module], names: Sequence[str], seed: int) -> dict[str, nn.Module]:
    """A network for each name, all with the same first weights, drawn by ``make`` from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = make()
    return {name: copy.deepcopy(first) for name in names}


class Recipe(NamedTuple):
    """The authors' training: SGD with Nesterov momentum 0.9, weight decay 5e-4, batches of 128.

    ``reset_momentum``: they make the optimizer anew every epoch, which forgets its momentum.
    """

    lr: float
    factor: float
    drops: tuple[float, float]
    epochs: int
    reset_momentum: bool = True

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, from 0."""
        check_int("epoch", epoch, least=0, most=self.epochs - 1)
        return self.lr * self.factor ** sum(epoch >= math.ceil(self.epochs * share) for share in self.drops)


RECIPES = {
    "alexnet": Recipe(0.01, 0.5, (0.25, 0.5), 120),
    "resnet18": Recipe(0.05, 0.25, (0.2, 0.4), 80),
}


# --------------------------------------------------------------------------------------------------------------------
# Stress tests.


def _square(height: int, width: int, share: float) -> Tensor:
    """(H, W) bool: the square in the middle of a share of the area, its half side rounded up as the authors' is."""
    half = math.ceil(round(math.sqrt(share * height * width), 9) / 2)
    rows, columns = ((torch.arange(n) >= n // 2 - half) & (torch.arange(n) < n // 2 + half) for n in (height, width))
    return rows[:, None] & columns


def occlude(images: Tensor, kind: str, level: int, levels: int = 16, value: float = 128 / 255) -> tuple[Tensor, float]:
    """Grey over a part of the images, and which share of the pixels it truly is.

    Args:
        images: (B, C, H, W).
        kind: ``"scotoma"``, a square in the middle; ``"glaucoma"``, all but that; ``"left2right"`` and
            ``"top2bottom"``, from one side.
        level: 0 for none, ``levels`` for all.
        levels: steps.
        value: of the grey.

    >>> [round(occlude(torch.zeros(1, 3, 64, 64), kind, 4)[1], 3) for kind in ("scotoma", "left2right")]
    [0.25, 0.25]
    """
    _images("images", images)
    check_choice("kind", kind, OCCLUSIONS)
    check_int("levels", levels, least=1)
    check_int("level", level, least=0, most=levels)
    height, width = images.shape[2:]
    if kind == "scotoma":
        covered = _square(height, width, level / levels)
    elif kind == "glaucoma":
        covered = ~_square(height, width, 1 - level / levels)
    else:
        covered = torch.zeros(height, width, dtype=torch.bool)
        if kind == "left2right":
            covered[:, : width * level // levels] = True
        else:
            covered[: height * level // levels] = True
    return images.masked_fill(covered.to(images.device), value), float(covered.float().mean())


def spatial_frequency(images: Tensor, kind: str, sigma: float, mean: Tensor | None = None) -> Tensor:
    """Low-passed images, or what a blur takes away, around the mean colour of a data set.

    Args:
        images: (B, C, H, W).
        kind: ``"low"`` or ``"high"``.
        sigma: of the Gaussian in pixels; low 0 and high infinity leave the images as they are.
        mean: (C,) to which every high-passed image's channels are moved; 0 leaves the plain residual.

    Returns:
        Images; high-passed ones are not clamped.
    """
    _images("images", images)
    check_choice("kind", kind, PASSES)
    check_real("sigma", sigma, least=0, finite=False)
    if kind == "low":
        return uniform_blur(images, sigma)
    if sigma == math.inf:
        return images
    rest = images - uniform_blur(images, sigma)
    if mean is None:
        return rest
    check_axes("mean", mean, channels=images.shape[1])
    return rest - rest.mean((2, 3), keepdim=True) + mean.to(rest)[:, None, None]


def cue_conflict(fovea: Tensor, periphery: Tensor, share: float, window: str = "square") -> tuple[Tensor, float]:
    """One image in the middle of another, and which share of the whole is the first's.

    Args:
        fovea, periphery: (B, C, H, W).
        share: of the area.
        window: ``"square"``, or ``"soft"``: a disc whose edge falls as a cosine over half its radius (ours).
    """
    _images("fovea", fovea)
    if fovea.shape != periphery.shape:
        raise ValueError(f"fovea is {tuple(fovea.shape)}, periphery {tuple(periphery.shape)}; they must agree")
    check_real("share", share, least=0, most=1)
    check_choice("window", window, CUES)
    height, width = fovea.shape[2:]
    if window == "square":
        weight = _square(height, width, share).to(fovea)
    else:
        y, x = (torch.arange(n, dtype=fovea.dtype) - (n - 1) / 2 for n in (height, width))
        radius = max(math.sqrt(share * height * width / math.pi), 1e-9)
        fall = ((torch.hypot(*torch.meshgrid(y, x, indexing="ij")) / radius - 0.75) / 0.5).clamp(0, 1)
        weight = ((fall * math.pi).cos() + 1).to(fovea.device) / 2
    return fovea * weight + periphery * (1 - weight), float(weight.mean())


def crossing(shares: Sequence[float], fovea: Sequence[float], periphery: Sequence[float]) -> float:
    """The share of area at which the two labels are answered equally often, between measured ones by a line.

    The smaller, the more the middle counts.

    Raises:
        ValueError: the two never cross.

    >>> round(crossing([0.0, 0.5, 1.0], [0.1, 0.4, 0.9], [0.9, 0.6, 0.1]), 3)
    0.6
    """
    if not len(shares) == len(fovea) == len(periphery) >= 2:
        counts = len(shares), len(fovea), len(periphery)
        raise ValueError(f"shares, fovea and periphery must be as many, at least 2; got {counts}")
    gap = [a - b for a, b in zip(fovea, periphery, strict=True)]
    for i in range(len(gap) - 1):
        if gap[i] <= 0 < gap[i + 1]:
            return shares[i] + (shares[i + 1] - shares[i]) * -gap[i] / (gap[i + 1] - gap[i])
    raise ValueError(f"the two curves do not cross between {shares[0]} and {shares[-1]}: differences {gap}")


@torch.no_grad()
def generalisation(
    networks: Mapping[str, nn.Module], stages: Mapping[str, Stage], images: Tensor, labels: Tensor
) -> dict[tuple[str, str], float]:
    """Accuracy of every network on every stage's images, by ``(network, stage)``."""
    _images("images", images)
    check_axes("labels", labels, B=len(images))
    found = {}
    for stage, transform in stages.items():
        seen = transform(images)
        for name, network in networks.items():
            found[name, stage] = float((network(seen).argmax(1) == labels).float().mean())
    return found
