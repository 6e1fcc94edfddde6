"""A picture as a tree of boxes that tile it exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...checks import check_choice, check_int, check_ints
from ..pixels import Box

#: Columns and rows per split, for boxes that are neither tall nor wide; and along the longer side of those.
SPLITS = {4: ((2, 2), (1, 4)), 9: ((3, 3), (2, 4)), 16: ((4, 4), (2, 8))}


def divide(box: Box, split: int = 4) -> list[Box]:
    """Parts of a box, row by row; the last column and row take what is left over.

    Args:
        box: (x1, y1, x2, y2).
        split: 4, 9 or 16; a box at least twice as long as wide is cut into 4, 8 or 16 along its length.

    >>> divide((0, 0, 5, 4))
    [(0, 0, 2, 2), (2, 0, 5, 2), (0, 2, 2, 4), (2, 2, 5, 4)]
    """
    check_choice("split", split, SPLITS)
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    (columns, rows), (short, long) = SPLITS[split]
    if height >= 2 * width:
        columns, rows = short, long
    elif width >= 2 * height:
        columns, rows = long, short
    columns, rows = min(columns, width), min(rows, height)  # no part is empty
    xs = [x1 + i * (width // columns) for i in range(columns)] + [x2]
    ys = [y1 + j * (height // rows) for j in range(rows)] + [y2]
    return [(xs[i], ys[j], xs[i + 1], ys[j + 1]) for j in range(rows) for i in range(columns)]


@dataclass(eq=False)
class Node:
    """A box of the picture, and the boxes that tile it."""

    box: Box
    depth: int = 0
    parent: Node | None = field(default=None, repr=False)
    children: list[Node] = field(default_factory=list, repr=False)

    @property
    def is_root(self) -> bool:
        return self.parent is None

    @property
    def is_leaf(self) -> bool:
        return not self.children

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


class Tree:
    """Split boxes until their longer side is below ``leaf``.

    Args:
        size: (H, W) of the picture.
        leaf: a box is split while its longer side is at least this.
        split: 4, 9 or 16 parts, see :func:`divide`.
        max_depth: splits below each other; ``None`` for as many as needed, 0 for the whole picture alone.
        small: what becomes of a picture smaller than a leaf: ``"refuse"``, or ``"root"``, a tree of one node.

    Raises:
        ValueError: a picture of one pixel; one smaller than a leaf, where ``small="refuse"``.

    Reference: Shen et al., 2024, arXiv 2411.16044.

    >>> tree = Tree((100, 100), 50)
    >>> tree.depth, len(tree.leaves)
    (2, 16)
    """

    def __init__(
        self, size: tuple[int, int], leaf: int, *, split: int = 4, max_depth: int | None = None, small: str = "refuse"
    ):
        self.size = height, width = tuple(check_ints("size", size, least=1))  # type: ignore[misc]
        self.leaf = check_int("leaf", leaf, least=2)
        check_choice("split", split, SPLITS)
        check_choice("small", small, ("refuse", "root"))
        limit = None if max_depth is None else check_int("max_depth", max_depth, least=0)
        if height * width == 1:
            raise ValueError("image must have more than one pixel: there is nothing to divide")
        if max(height, width) < leaf and small == "refuse" and limit != 0:
            raise ValueError(
                f"image of {width} × {height} pixels is smaller than a leaf of {leaf}: there is nothing to zoom into; "
                'give a smaller leaf, or small="root" to look at it as a whole'
            )
        self.root = Node((0, 0, width, height))
        self.depth = 0
        grow = [self.root]
        while grow:
            node = grow.pop()
            self.depth = max(self.depth, node.depth)
            x1, y1, x2, y2 = node.box
            if max(x2 - x1, y2 - y1) < leaf or node.depth == limit:
                continue
            node.children = [Node(part, node.depth + 1, node) for part in divide(node.box, split)]
            grow += node.children

    @property
    def nodes(self) -> list[Node]:
        """All nodes, parents first."""
        return list(self.root.walk())

    @property
    def leaves(self) -> list[Node]:
        return [node for node in self.root.walk() if node.is_leaf]

    @property
    def is_one_node(self) -> bool:
        return self.root.is_leaf
