"""Searches over trees of boxes; what a node is worth is told by functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...checks import check_flag, check_int, check_real, describe
from .tree import Node, Tree

Scorer = Callable[[Node], float]


def _told(name: str, value: Any) -> float:
    """A number that a function gave; NaN would be found nowhere, without a word."""
    value = float(value)
    if math.isnan(value):
        raise ValueError(f"{name} must give numbers, got NaN")
    return value


@dataclass
class Search:
    """What a search found: nodes, the nodes it opened in order, and how often the next was deeper or less deep."""

    found: list[Node] = field(default_factory=list)
    opened: list[Node] = field(default_factory=list)
    answering: dict[Node, float] = field(default_factory=dict)
    zoomed_in: int = 0
    zoomed_out: int = 0

    @property
    def pops(self) -> int:
        return len(self.opened)


def best_first(
    tree: Tree,
    answering: Scorer,
    priority: Scorer | Callable[[Sequence[Node]], Sequence[float]],
    *,
    upper: float,
    lower: float,
    steps: Sequence[float] = (0.1, 0.1, 0.2),
    limit: int | Callable[[int], int] = lambda depth: 3 * depth,
    more: int = 2,
    max_depth: int = 5,
    to_bottom: bool = False,
    skip_root: bool = False,
    batched: bool = False,
) -> Search:
    """Open the most promising box next, until one suffices to answer.

    Args:
        tree: of the picture.
        answering: how surely a node suffices to answer; asked once per opened node.
        priority: how promising a node is; asked once per node.
        upper: a node that reaches this is found.
        lower: once the bar has fallen below this, the search gives up.
        steps: by how much the bar falls each time; the last is repeated.
        limit: nodes opened before the bar falls, or a function of the depth.
        more: nodes opened before it falls again.
        max_depth: nodes this deep are not opened further.
        to_bottom: go on until a leaf has been opened.
        skip_root: the root is never asked.
        batched: ``priority`` takes a list of nodes and gives as many numbers.

    Returns:
        A :class:`Search`; ``found`` holds the best node, or none, and with ``to_bottom`` all that reached the bar.

    Reference: Shen et al., 2024, arXiv 2411.16044, algorithm 1.

    >>> best_first(Tree((8, 8), 8), lambda n: 1.0 - n.is_root, lambda n: -n.box[0], upper=0.5, lower=0).found
    [Node(box=(0, 0, 4, 4), depth=1)]
    """
    if isinstance(steps, (int, float)) or not len(steps):
        raise ValueError(f"steps must hold a number, e.g. (0.1, 0.1, 0.2), got {describe(steps)}")
    drops = [check_real("steps", step, least=0) for step in steps]
    check_real("upper", upper)
    check_real("lower", lower)
    check_int("more", more, least=1)
    check_flag("to_bottom", to_bottom)
    check_flag("skip_root", skip_root)
    depth = min(tree.depth, check_int("max_depth", max_depth, least=0))
    allowed = check_int("limit", limit(depth) if callable(limit) else limit, least=0)
    result, bottom = Search(), False
    known: dict[Node, float] = {tree.root: 0.0}
    queue, last = [tree.root], None
    while queue:
        node = queue.pop(0)
        if last is not None:
            result.zoomed_in += node.depth > last.depth
            result.zoomed_out += node.depth < last.depth
        last = node
        result.opened.append(node)
        asked = not (skip_root and node.is_root)
        result.answering[node] = _told("answering", answering(node)) if asked else (-1.0 if node.is_root else 0.0)
        if asked and result.answering[node] >= upper:
            result.found.append(node)
            if not to_bottom or bottom:
                break
        elif result.pops >= allowed:
            upper -= drops[0]
            drops = drops[1:] or drops
            allowed += more
            best = [n for n in result.opened if result.answering[n] >= upper and n not in result.found]
            result.found = sorted(result.found + best, key=lambda n: -result.answering[n])[:1]
            if result.found or upper < lower:
                break
        if node.is_leaf or node.depth == depth:
            bottom = True
            if to_bottom and result.found:
                break
        else:
            queue += node.children
            new = [n for n in node.children if n not in known]
            values = priority(new) if batched else [priority(n) for n in new]  # type: ignore[arg-type, list-item]
            known.update(zip(new, (_told("priority", value) for value in values), strict=True))  # type: ignore[arg-type, union-attr]
        queue.sort(key=lambda n: -known[n])
    return result


def post_order(tree: Tree, exists: Scorer, threshold: float = 0.6, max_depth: int = 2) -> list[Node]:
    """All nodes that show something at least as surely as ``threshold`` and as every node below them.

    Args:
        tree: of the picture.
        exists: how surely a node shows it.
        threshold: least sure.
        max_depth: deepest nodes that are looked at.

    Returns:
        Nodes, children before parents.

    Reference: Shen et al., 2024, arXiv 2411.16044, "all" cues.

    >>> len(post_order(Tree((8, 8), 8), lambda n: 0.5 + 0.3 * (n.box[0] > 0)))
    2
    """
    check_real("threshold", threshold)
    check_int("max_depth", max_depth, least=0)
    found: list[Node] = []

    def best(node: Node) -> float:
        below = max((best(child) for child in node.children), default=-1.0) if node.depth < max_depth else -1.0
        value = _told("exists", exists(node))
        if value >= max(below, threshold):
            found.append(node)
        return max(below, value)

    best(tree.root)
    return found
