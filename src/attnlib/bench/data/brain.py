"""Lesions planted into the white matter of a head: where they are and how large each is, is known.

The head is the MNI ICBM152 template (T1-weighted, the average of 152 people, with maps of grey and white matter), which
lies in the package nilearn; ``pip install --no-deps nilearn`` is enough, its files are read here. Without it there is
:func:`phantom`, which is made up. Both are of 2 mm.

A brain is left-right symmetric, so a hemisphere would be no test of the other. :func:`slabs` holds out slabs from front
to back, and images are slices across that axis: none shows anything of a slab that it does not belong to.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_int, check_ints, check_real
from .files import DataError

#: Sides of a voxel, in mm.
MM = 2.0
_FILES = {name: f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for name, kind in
          (("t1", "t1"), ("grey", "gm"), ("white", "wm"))}  # fmt: skip


class Head(NamedTuple):
    """Volumes (X, Y, Z), left to right, back to front, down to up.

    Args:
        t1: brightness, 0 to 1.
        grey, white: shares of grey and of white matter, 0 to 1.
        source: one sentence that says what it is.
    """

    t1: Tensor
    grey: Tensor
    white: Tensor
    source: str


def mni_folder() -> Path | None:
    """Where nilearn keeps the template; ``None`` if it is not installed, or without these files."""
    spec = importlib.util.find_spec("nilearn")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / "datasets" / "data"
        if all((folder / name).is_file() for name in _FILES.values()):
            return folder
    return None


def read_nifti(path: str | Path) -> Tensor:
    """Bytes (X, Y, Z) of a compressed NIfTI-1 file.

    Raises:
        DataError: no such file, a damaged one, or one that holds other numbers than bytes.
    """
    try:
        raw = gzip.decompress(Path(path).read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(raw) < 352 or raw[344:347] != b"n+1":
        raise DataError(f"{path} is no NIfTI-1 file")
    dims, kind = struct.unpack("<8h", raw[40:56]), struct.unpack("<h", raw[70:72])[0]
    start, count = int(struct.unpack("<f", raw[108:112])[0]), math.prod(dims[1 : dims[0] + 1])
    if dims[0] != 3 or kind != 2:
        raise DataError(f"{path} holds {dims[0]} axes of type {kind}; three of bytes (2) can be read")
    if len(raw) != start + count:
        raise DataError(f"{path} holds {len(raw) - start} voxels of {count}")
    flat = torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8)
    return flat.view(*dims[3:0:-1]).permute(2, 1, 0).contiguous()


def mni(folder: str | Path | None = None) -> Head:
    """The MNI template, from 1 to 2 mm by means of 2 x 2 x 2 voxels.

    Args:
        folder: where its three files are; nilearn's by default.

    Raises:
        DataError: they are not there.
    """
    place = mni_folder() if folder is None else Path(folder)
    if place is None:
        raise DataError("the MNI template lies in the package nilearn, which is not installed: pip install --no-deps "
                        "nilearn")  # fmt: skip
    volumes = {
        name: F.avg_pool3d(read_nifti(place / file).float()[None, None] / 255, 2)[0, 0] for name, file in _FILES.items()
    }
    return Head(**volumes, source="MNI ICBM152 2009a symmetric, 2 mm (nilearn)")


def phantom(seed: int = 0, size: Sequence[int] = (98, 116, 94)) -> Head:
    """A made-up head: a folded white ball in a grey rim, in dark fluid and a bright skin; left and right are alike.

    Args:
        seed: of the folds.
        size: voxels of 2 mm.

    >>> head = phantom(size=(24, 28, 24))
    >>> bool((head.t1 == head.t1.flip(0)).all()), head.white.shape
    (True, torch.Size([24, 28, 24]))
    """
    sides = check_ints("size", size, least=8)
    generator = torch.Generator().manual_seed(check_int("seed", seed))
    at = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in sides), indexing="ij"))
    coarse = torch.randn(1, 1, *(max(n // 8, 2) for n in sides), generator=generator)
    folds = F.interpolate(coarse, sides, mode="trilinear")[0, 0]
    depth = at.square().sum(0).sqrt() + 0.1 * (folds + folds.flip(0)) / 2**0.5
    white, outer = ((edge - depth).mul(20).sigmoid() for edge in (0.62, 0.76))
    grey = (outer - white).clamp(0, 1)
    skin = (1 - (at.square().sum(0).sqrt() - 0.95).abs().mul(20)).clamp(0, 1)
    return Head(0.85 * white + 0.6 * grey + 0.5 * skin, grey, white, f"a made-up head, seed {seed}")


def slabs(head: Head, held: Sequence[tuple[float, float]] = ((0.3, 0.42), (0.66, 0.78)), gap: int = 3) -> tuple[
    list[int], list[int]
]:  # fmt: skip
    """Slices to train on and to test on, counted from the back.

    Args:
        head: as of :func:`mni`.
        held: what is held out, as parts of the length along which there is white matter.
        gap: slices on either side of it that are used for neither.

    Returns:
        Numbers of slices, all of which hold white matter.

    >>> train, test = slabs(phantom(size=(24, 28, 24)), gap=1)
    >>> min(abs(a - b) for a in train for b in test)
    2
    """
    check_int("gap", gap, least=0)
    there = (head.white > 0.8).sum((0, 2)) >= 20
    first, last = int(there.nonzero().min()), int(there.nonzero().max())
    ends = [(first + round(a * (last - first)), first + round(b * (last - first))) for a, b in held]
    numbers = [i for i in range(first, last + 1) if there[i]]
    test = [i for i in numbers if any(a <= i < b for a, b in ends)]
    train = [i for i in numbers if not any(a - gap <= i < b + gap for a, b in ends)]
    return train, test


def lesions(
    head: Head,
    slices: Sequence[int],
    count: int,
    generator: torch.Generator | None = None,
    *,
    side: int = 40,
    number: tuple[int, int] = (0, 2),
    diameter: tuple[float, float] = (4.0, 20.0),
    contrast: tuple[float, float] = (1.5, 2.5),
    noise: float = 0.03,
    shade: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Crops of slices across the front-back axis with ellipses in the white matter that look like grey matter.

    Args:
        head: as of :func:`mni`.
        slices: numbers to draw from, as of :func:`slabs`.
        count: images.
        generator: for the draws.
        side: of a crop, in pixels of 2 mm.
        number: fewest and most lesions of one crop.
        diameter: smallest and largest mean diameter, in mm, drawn evenly in its logarithm. What would lie outside the
            white matter is left away.
        contrast: of a lesion, lowest and highest; 1 looks as grey matter on average.
        noise: standard deviation of what is added to all.
        shade: standard deviation of a smooth factor, as of an uneven field.

    Returns:
        Images (count, 1, side, side), and labels (count, side, side), 1 in lesions.

    >>> x, y = lesions(phantom(size=(32, 32, 32)), [14, 15], 2, torch.Generator().manual_seed(0), side=16)
    >>> x.shape, y.shape
    (torch.Size([2, 1, 16, 16]), torch.Size([2, 16, 16]))
    """
    check_int("side", side, least=8)
    least, most = check_ints("number", number, least=0)
    low, high = (check_real("diameter", d, above=0) for d in diameter)
    check_real("noise", noise, least=0)
    check_real("shade", shade, least=0)
    if min(head.t1.shape[0], head.t1.shape[2]) < side:
        raise ValueError(f"side={side} is more than the head has: {tuple(head.t1.shape)}")
    like = float(head.t1[head.grey > 0.8].mean()) if (head.grey > 0.8).any() else 0.6

    def draw(least: float = 0.0, most: float = 1.0) -> float:
        return least + (most - least) * float(torch.rand((), generator=generator))

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    images, labels = torch.empty(count, 1, side, side), torch.zeros(count, side, side, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for image, label in zip(images, labels, strict=True):
        plane = slices[pick(len(slices))]
        t1, white = head.t1[:, plane], head.white[:, plane]
        if draw() < 0.5:
            t1, white = t1.flip(0), white.flip(0)
        places = (white > 0.8).nonzero()
        first = places[pick(len(places))]
        corner = [min(max(int(p) - 4 - pick(side - 8), 0), n - side) for p, n in zip(first, t1.shape, strict=True)]
        cut = tuple(slice(c, c + side) for c in corner)
        t1, white = t1[cut], white[cut]
        centres = [first - torch.tensor(corner)]
        inside = (white > 0.8).nonzero()
        wanted = least + pick(most - least + 1)
        centres += [inside[pick(len(inside))] for _ in range(wanted - 1)]
        for centre in centres[:wanted]:
            half = math.exp(draw(math.log(low), math.log(high))) / MM / 2
            longer, turn = draw(1, 1.5) ** 0.5, math.pi * draw()
            y, x = rows - centre[0], columns - centre[1]
            u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
            away = ((u / (half * longer)).square() + (v * longer / half).square()).sqrt()
            soft = ((1 - away) * half * 3).sigmoid() * white
            t1 = t1 + draw(*contrast) * soft * (like - t1)
            label[(away <= 1) & (white > 0.5)] = 1
        field = F.interpolate(torch.randn(1, 1, 3, 3, generator=generator), (side, side), mode="bicubic")[0, 0]
        t1 = t1 * (1 + shade * field) + noise * torch.randn(side, side, generator=generator)
        image[0] = (t1 - 0.5) / 0.25
    return images, labels
