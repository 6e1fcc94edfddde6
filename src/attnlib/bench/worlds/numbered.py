"""What numbered worlds share: draws that follow from world, part and number, and letters to write with."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from ...checks import check_choice, check_int
from .painter import PARTS

#: Five rows of three pixels each.
_LETTERS = {
    "A": "010101111101101", "B": "110101110101110", "C": "011100100100011", "D": "110101101101110",
    "E": "111100110100111", "F": "111100110100100", "G": "011100101101011", "H": "101101111101101",
    "I": "111010010010111", "J": "001001001101010", "K": "101101110101101", "L": "100100100100111",
    "M": "101111111101101", "N": "110101101101101", "O": "010101101101010", "P": "110101110100100",
    "Q": "010101101110011", "R": "110101110110101", "S": "011100010001110", "T": "111010010010010",
    "U": "101101101101111", "V": "101101101101010", "W": "101101111111101", "X": "101101010101101",
    "Y": "101101010010010", "Z": "111001010100111", "0": "111101101101111", "1": "010110010010111",
    "2": "110001010100111", "3": "111001011001111", "4": "101101111001001", "5": "111100110001110",
    "6": "011100111101111", "7": "111001010010010", "8": "111101111101111", "9": "111101111001110",
    "-": "000000111000000", ".": "000000000000010", ":": "000010000010000", "/": "001001010100100",
}  # fmt: skip
#: Signs that can be written, besides the space.
SIGNS = "".join(_LETTERS)


def generator(world: str, number: int, part: str) -> np.random.Generator:
    """Draws for one thing of a world: the same on every machine, others for every number, part and world."""
    check_int("number", number, least=0)
    check_choice("part", part, PARTS)
    return np.random.default_rng([zlib.crc32(world.encode()), PARTS.index(part), number])


def lettering(text: str, scale: int = 1) -> np.ndarray:
    """(5 · scale, (4 · length - 1) · scale) booleans: a text in letters of three by five pixels.

    >>> lettering("ok").shape
    (5, 7)
    """
    check_int("scale", scale, least=1)
    text = text.upper()
    if not text or not set(text) <= set(_LETTERS) | {" "}:
        raise ValueError(f"text must be of {SIGNS} and spaces, and not empty, got {text!r}")
    out = np.zeros((5, 4 * len(text) - 1), dtype=bool)
    for i, sign in enumerate(text):
        if sign != " ":
            out[:, 4 * i : 4 * i + 3] = np.array([c == "1" for c in _LETTERS[sign]]).reshape(5, 3)
    return out.repeat(scale, 0).repeat(scale, 1)


def put(image: np.ndarray, text: str, top: int, left: int, colour: Any, scale: int = 1) -> tuple[int, int, int, int]:
    """Write into ``image`` (3, H, W), in place; the box (left, top, right, bottom) of what is written."""
    mark = lettering(text, scale)
    height, width = mark.shape
    if top < 0 or left < 0 or top + height > image.shape[1] or left + width > image.shape[2]:
        raise ValueError(f"text {text!r} of {width} × {height} does not fit at ({left}, {top}) into {image.shape[1:]}")
    image[:, top : top + height, left : left + width][:, mark] = np.asarray(colour, dtype=np.float32)[:, None]
    return left, top, left + width, top + height
