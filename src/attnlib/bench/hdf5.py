"""Arrays out of an HDF5 file as Keras saves weights, without a library: groups, and float32 in one piece each.

A file of the first format (superblock 0) is a tree of object headers; a group lists its members in a B-tree with a heap
of names, a data set says its shape, its type and where its numbers lie. Chunks, filters and other types are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SPACE, _TYPE, _LAYOUT, _CONTINUED, _TABLE = 1, 3, 8, 16, 17


class _File:
    def __init__(self, data: bytes):
        self.data = data

    def whole(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self.data[at : at + size], "little")

    def messages(self, header: int) -> Iterator[tuple[int, int]]:
        """``(kind, place)`` of what an object's header says."""
        if self.data[header] != 1:
            raise ValueError(f"an object header of version {self.data[header]}; possible: 1")
        parts = [(header + 16, self.whole(header + 8, 4))]
        for at, size in parts:
            end = at + size
            while at + 8 <= end:
                kind, length = self.whole(at, 2), self.whole(at + 2, 2)
                if kind == _CONTINUED:
                    parts.append((self.whole(at + 8), self.whole(at + 16)))
                yield kind, at + 8
                at += 8 + length

    def leaves(self, node: int) -> Iterator[int]:
        """Places of the tables of names below a node of a B-tree."""
        if self.data[node : node + 4] == b"SNOD":
            yield node
            return
        for i in range(self.whole(node + 6, 2)):
            yield from self.leaves(self.whole(node + 32 + 16 * i))

    def arrays(self, header: int, name: str = "") -> Iterator[tuple[str, Tensor]]:
        """Data sets below an object by their paths."""
        found = dict(self.messages(header))
        if _TABLE in found:
            names = self.whole(self.whole(found[_TABLE] + 8) + 24)
            for table in self.leaves(self.whole(found[_TABLE])):
                for i in range(self.whole(table + 6, 2)):
                    entry = table + 8 + 40 * i
                    start = names + self.whole(entry)
                    own = self.data[start : self.data.index(b"\0", start)].decode()
                    yield from self.arrays(self.whole(entry + 8), f"{name}/{own}" if name else own)
        elif _LAYOUT in found:
            yield name, self.array(name, found)

    def array(self, name: str, found: dict[int, int]) -> Tensor:
        kind, space, layout = found[_TYPE], found[_SPACE], found[_LAYOUT]
        if self.data[kind] & 15 != 1 or self.whole(kind + 4, 4) != 4 or self.data[kind + 1] & 1:
            raise ValueError(f"{name} is no float32 of little end")
        if self.data[layout] != 3 or self.data[layout + 1] != 1:
            raise ValueError(f"{name} does not lie in one piece")
        dims = space + (8 if self.data[space] == 1 else 4)
        shape = [self.whole(dims + 8 * i) for i in range(self.data[space + 1])]
        at, size = self.whole(layout + 2), self.whole(layout + 10)
        if at + size > len(self.data):
            raise IndexError
        return torch.from_numpy(np.frombuffer(self.data[at : at + size], "<f4").reshape(shape).copy())


def read_hdf5(path: str | Path) -> dict[str, Tensor]:
    """All arrays of a file, by their paths inside it.

    Raises:
        ValueError: no such file format, a truncated file, or arrays kept in another way.
    """
    file = _File(Path(path).read_bytes())
    if file.data[:8] != _SIGNATURE or file.data[8:9] != b"\0" or file.data[13:15] != b"\x08\x08":
        raise ValueError(f"{path} is no HDF5 file of the first format with places of 8 bytes")
    try:
        return dict(file.arrays(file.whole(64)))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged") from error
