"""Small worlds for vision: digits on clutter, crops of photographs, digits that move. All truth is known.

>>> images, labels = cluttered_digits(4, side=28, part="train", generator=torch.Generator().manual_seed(0))
>>> images.shape, labels.shape
(torch.Size([4, 1, 28, 28]), torch.Size([4]))
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_int, check_ints
from .files import _TEST_PHOTOS, _TRAIN_PHOTOS, _packaged, _read_photo, digits

PARTS = ("train", "test")

#: Names of the photographs that :func:`texture_crops` tells apart, by label.
TEXTURES = tuple(name.rpartition("/")[2].partition(".")[0] for _, name in (*_TRAIN_PHOTOS, *_TEST_PHOTOS))


@functools.lru_cache(maxsize=4)
def digit_glyphs(part: str, side: int) -> tuple[Tensor, Tensor]:
    images, labels = digits().train if part == "train" else digits().test
    large = F.interpolate(images.movedim(-1, 1), size=(side, side), mode="bilinear", align_corners=False)
    return large[:, 0].clamp(0, 1), labels


def _draws(count: int, low: int, high: int, generator: torch.Generator | None) -> list[int]:
    return torch.randint(low, high, (count,), generator=generator).tolist()


def cluttered_digits(
    count: int,
    side: int = 32,
    part: str = "train",
    pieces: int = 8,
    generator: torch.Generator | None = None,
    digit: int = 14,
) -> tuple[Tensor, Tensor]:
    """One whole handwritten digit among pieces of others, anywhere in the image.

    Args:
        count: images.
        side: pixels per side, at least 20.
        part: ``"train"`` or ``"test"``: digits written by hand that the other part does not hold.
        pieces: quarters of other digits, which may lie over each other but not over the digit.
        generator: of what is drawn.
        digit: pixels per side of the digit, even.

    Returns:
        Images (count, 1, side, side) in [0, 1] and labels (count,).
    """
    return placed_digits(count, side, part, pieces, generator, digit)[:2]


def placed_digits(
    count: int,
    side: int = 32,
    part: str = "train",
    pieces: int = 8,
    generator: torch.Generator | None = None,
    digit: int = 14,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cluttered_digits`, and where the digit is.

    Args:
        count, side, part, pieces, generator, digit: as there.

    Returns:
        Images (count, 1, side, side), labels (count,), and the row and column (count, 2) of the digit's upper left
        pixel.
    """
    check_choice("part", part, PARTS)
    check_int("side", side, least=20)
    check_int("digit", digit, least=4, most=side)
    if digit % 2:
        raise ValueError(f"digit={digit} must be even: its quarters are pieces")
    glyphs, labels = digit_glyphs(part, digit)
    half, room = digit // 2, side - digit + 1
    images = torch.zeros(count, side, side)
    chosen = _draws(count, 0, len(glyphs), generator)
    rows, columns = _draws(count, 0, room, generator), _draws(count, 0, room, generator)
    total = count * pieces
    which = _draws(total, 0, len(glyphs), generator)
    tops, lefts = (_draws(total, 0, side - half + 1, generator) for _ in range(2))
    corners = _draws(total, 0, 4, generator)
    for i in range(count):
        for j in range(i * pieces, (i + 1) * pieces):
            top, left, a, b = tops[j], lefts[j], corners[j] // 2 * half, corners[j] % 2 * half
            patch = images[i, top : top + half, left : left + half]
            torch.maximum(patch, glyphs[which[j], a : a + half, b : b + half], out=patch)
        images[i, rows[i] : rows[i] + digit, columns[i] : columns[i] + digit] = glyphs[chosen[i]]
    return images.unsqueeze(1), labels[chosen], torch.tensor([rows, columns]).T


def digit_pairs(
    count: int,
    size: tuple[int, int] = (32, 128),
    digit: int = 24,
    apart: tuple[int, int] = (26, 104),
    classes: int = 4,
    part: str = "train",
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two handwritten digits side by side, of one class or of two, each as often.

    Args:
        count: images.
        size: height and width in pixels.
        digit: pixels per side of a digit, even.
        apart: least and most columns from the left edge of one to that of the other.
        classes: digits 0 to ``classes - 1`` appear.
        part: ``"train"`` or ``"test"``, as of :func:`cluttered_digits`.
        noise: standard deviation of the noise.
        generator: of what is drawn.

    Returns:
        Images (count, 1, H, W), classes (count, 2) from left to right, and row and column (count, 2, 2) of the upper
        left pixel of each.
    """
    check_choice("part", part, PARTS)
    height, width = check_ints("size", size, least=4)
    check_int("digit", digit, least=4, most=height)
    check_int("classes", classes, least=2, most=10)
    low, high = check_ints("apart", apart, least=digit)
    if not low <= high <= width - digit:
        raise ValueError(f"apart={apart} must rise, and be at most {width - digit} in images {width} wide")
    glyphs, labels = digit_glyphs(part, digit)
    members = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    first = torch.randint(classes, (count,), generator=generator)
    other = torch.randint(1, classes, (count,), generator=generator)
    same = torch.randint(2, (count,), generator=generator) == 1
    shown = torch.stack([first, torch.where(same, first, (first + other) % classes)], 1)
    drawn = torch.rand(count, 6, generator=generator)
    gap = low + (drawn[:, 0] * (high - low + 1)).long()
    left = (drawn[:, 1] * (width - digit - gap + 1)).long()
    rows = (drawn[:, 2:4] * (height - digit + 1)).long()
    corners = torch.stack([rows, torch.stack([left, left + gap], 1)], -1)
    images = torch.zeros(count, height, width)
    for i in range(count):
        for j, (row, column) in enumerate(corners[i].tolist()):
            own = members[int(shown[i, j])]
            glyph = glyphs[own[int(drawn[i, 4 + j] * len(own))]]
            images[i, row : row + digit, column : column + digit] = glyph
    return (images + noise * torch.randn(images.shape, generator=generator)).unsqueeze(1), shown, corners


def two_digits(
    count: int, side: int = 32, part: str = "train", generator: torch.Generator | None = None, digit: int = 12,
    step: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Two handwritten digits of different classes beside each other on noise: two objects that look alike.

    Args:
        count: images.
        side: pixels per side, at least twice the digit's.
        part: ``"train"`` or ``"test"``, as of :func:`cluttered_digits`.
        generator: of what is drawn.
        digit: pixels per side of a digit; their squares do not overlap.
        step: corners of digits lie on every so many pixels.

    Returns:
        Images (count, 1, side, side), labels (count, 2), and the ink (count, 2, side, side) of either digit in [0, 1].
    """
    check_choice("part", part, PARTS)
    check_int("digit", digit, least=4)
    check_int("side", side, least=2 * digit)
    glyphs, labels = digit_glyphs(part, digit)
    ink = torch.zeros(count, 2, side, side)
    found = torch.zeros(count, 2, dtype=torch.long)
    images = 0.15 * torch.randn(count, 1, side, side, generator=generator)
    for i in range(count):
        while True:
            first, second = _draws(2, 0, len(glyphs), generator)
            top, left, down, right = (step * n for n in _draws(4, 0, (side - digit) // step + 1, generator))
            if labels[first] != labels[second] and max(abs(top - down), abs(left - right)) >= digit:
                break
        for n, (which, row, column) in enumerate(((first, top, left), (second, down, right))):
            ink[i, n, row : row + digit, column : column + digit] = glyphs[which]
            found[i, n] = labels[which]
    return images + ink.sum(1, keepdim=True), found, ink


@functools.lru_cache(maxsize=1)
def _photographs() -> tuple[Tensor, ...]:
    return tuple(
        _read_photo(_packaged(*place)).movedim(-1, 0).float() / 255 for place in (*_TRAIN_PHOTOS, *_TEST_PHOTOS)
    )


def _crops(count: int, side: int, part: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Crops (count, 3, side, side) in [0, 1] and of which photograph each is."""
    check_choice("part", part, PARTS)
    check_int("side", side, least=4, most=96)
    labels = torch.randint(len(TEXTURES), (count,), generator=generator)
    at = torch.rand(count, 3, generator=generator).tolist()
    crops = []
    for label, (row, column, flip) in zip(labels.tolist(), at, strict=True):
        photo = _photographs()[label]
        height, width = photo.shape[1:]
        left, right = (0, width * 2 // 3) if part == "train" else (width * 2 // 3, width)
        top = int(row * (height - side + 1))
        left += int(column * (right - left - side + 1))
        crop = photo[:, top : top + side, left : left + side]
        crops.append(crop.flip(2) if flip < 0.5 else crop)
    return torch.stack(crops), labels


def photo_crops(count: int, side: int = 32, part: str = "train", generator: torch.Generator | None = None) -> Tensor:
    """Colour crops of real photographs as they are, for restoration.

    Args:
        count, side, part, generator: as of :func:`texture_crops`.

    Returns:
        Crops (count, 3, side, side) in [0, 1].
    """
    return _crops(count, side, part, generator)[0]


def texture_crops(
    count: int, side: int = 32, part: str = "train", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Grey crops of real photographs; the label says of which one. Colour, brightness and contrast tell nothing.

    Args:
        count: crops.
        side: pixels per side, at most 96.
        part: ``"train"``: crops of the left two thirds of every photograph; ``"test"``: of its right third, which no
            training crop reaches.
        generator: of what is drawn.

    Returns:
        Crops (count, 1, side, side), each with mean 0 and standard deviation 1, and labels (count,) among
        :data:`TEXTURES`.
    """
    crops, labels = _crops(count, side, part, generator)
    out = crops.mean(1)
    out = out - out.mean((1, 2), keepdim=True)
    return (out / (out.std((1, 2), keepdim=True) + 1e-4)).unsqueeze(1), labels


def tiled_digits(
    count: int, side: int = 64, digit: int = 16, part: str = "train", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Digits of one class all over a photograph, in three rows of three: what they are can be read anywhere.

    Args:
        count: images.
        side: pixels per side, at most 96.
        digit: pixels per side of a digit, each somewhere in its ninth.
        part: ``"train"`` or ``"test"``, of digits and of photographs.
        generator: of what is drawn.

    Returns:
        Images (count, 3, side, side) in [0, 1] and labels (count,).
    """
    check_int("digit", digit, least=4, most=side // 3)
    images = photo_crops(count, side, part, generator) * 0.6
    glyphs, labels = digit_glyphs(part, digit)
    classes = torch.randint(10, (count,), generator=generator)
    members = [(labels == c).nonzero()[:, 0].tolist() for c in range(10)]
    cell = side // 3
    draws = torch.rand(count, 9, 3, generator=generator).tolist()
    for image, wanted, places in zip(images, classes.tolist(), draws, strict=True):
        for i, (which, down, along) in enumerate(places):
            top, left = i // 3 * cell + int(down * (cell - digit)), i % 3 * cell + int(along * (cell - digit))
            patch = image[:, top : top + digit, left : left + digit]
            torch.maximum(patch, glyphs[members[wanted][int(which * len(members[wanted]))]], out=patch)
    return images, classes


def moving_digits(
    count: int, frames: int = 8, side: int = 32, part: str = "train", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Videos of one digit that moves steadily and bounces at the borders.

    Args:
        count: videos.
        frames: of each.
        side: pixels per side, at least 16.
        part: ``"train"`` or ``"test"``, as of :func:`cluttered_digits`.
        generator: of what is drawn.

    Returns:
        Videos (count, frames, side, side, 1) in [0, 1] and labels (count,).
    """
    check_choice("part", part, PARTS)
    check_int("side", side, least=16)
    check_int("frames", frames, least=1)
    glyphs, labels = digit_glyphs(part, 14)
    room = side - 14
    chosen = _draws(count, 0, len(glyphs), generator)
    start = torch.rand(count, 2, generator=generator) * room
    speed = (torch.rand(count, 2, generator=generator) - 0.5) * 6
    path = start[:, None] + speed[:, None] * torch.arange(frames)[None, :, None]
    place = (room - (path.remainder(2 * room) - room).abs()).round().long().tolist()  # a mirror at both borders
    out = torch.zeros(count, frames, side, side)
    for i in range(count):
        for t in range(frames):
            row, column = place[i][t]
            out[i, t, row : row + 14, column : column + 14] = glyphs[chosen[i]]
    return out.unsqueeze(-1), labels[chosen]


#: Where :func:`directed_digits` move, by label: down and to the right.
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def directed_digits(
    count: int,
    frames: int = 8,
    side: int = 24,
    part: str = "train",
    generator: torch.Generator | None = None,
    step: float = 1.5,
    digit: int = 10,
    jitter: int = 1,
) -> tuple[Tensor, Tensor]:
    """Videos of one digit that moves up, down, left or right through about the middle.

    Backwards, a video is one of the opposite direction with the same frames: who does not read their order can tell the
    axis, but not be right in more than half of the cases.

    Args:
        count: videos.
        frames: of each.
        side: pixels per side.
        part: ``"train"`` or ``"test"``, as of :func:`cluttered_digits`.
        generator: of what is drawn.
        step: pixels from frame to frame, rounded as they add up.
        digit: pixels per side of the digit.
        jitter: how many pixels the path is off the middle at most, along either axis.

    Returns:
        Videos (count, frames, side, side, 1) in [0, 1] and labels (count,), in the order of :data:`DIRECTIONS`.

    Raises:
        ValueError: a path that leaves the picture.
    """
    check_choice("part", part, PARTS)
    check_int("digit", digit, least=4, most=side)
    check_int("frames", frames, least=1)
    reach = (frames - 1) / 2 * step + check_int("jitter", jitter, least=0)
    middle = (side - digit) // 2
    if reach > middle:
        raise ValueError(f"step={step} takes a digit {reach} pixels off the middle, where {middle} are possible")
    glyphs, _ = digit_glyphs(part, digit)
    canvas = F.pad(glyphs[_draws(count, 0, len(glyphs), generator)], (0, side - digit, 0, side - digit))
    labels = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    centre = middle + torch.randint(-jitter, jitter + 1, (count, 2), generator=generator)
    moves = torch.tensor(list(DIRECTIONS.values()))[labels] * step
    place = centre[:, None] + moves[:, None] * (torch.arange(frames) - (frames - 1) / 2)[None, :, None]
    at = (torch.arange(side) - place.round().long().unsqueeze(-1)).remainder(side)  # (count, frames, 2, side)
    rows, columns = at[:, :, 0, :, None], at[:, :, 1, None]
    return canvas[torch.arange(count)[:, None, None, None], rows, columns].unsqueeze(-1), labels
