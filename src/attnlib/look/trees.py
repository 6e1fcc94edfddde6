"""Trees of tokens in a map that says who depends on whom, and the groups that their branches make.

A dependency mask has parents in its rows and children in its columns: what a child sends to each parent. What a token
sends to itself is how much it stands for itself: a root.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_float, check_int, check_rank, check_valid

METHODS = ("arborescence", "greedy")
ROOTS = ("one", "any")
SCORES = ("log", "sum")


class Tree(NamedTuple):
    """Who is whose parent.

    Args:
        parents: (N,) number of the parent of every token; -1 for roots and for tokens that do not exist.
        weights: (N,) what the token sends to its parent; to itself for a root.
        exists: (N,) boolean, which tokens exist.
    """

    parents: Tensor
    weights: Tensor
    exists: Tensor

    @property
    def roots(self) -> Tensor:
        """Numbers of the roots."""
        return ((self.parents < 0) & self.exists).nonzero().flatten()

    @property
    def leaves(self) -> Tensor:
        """Numbers of the tokens without a child."""
        has = torch.zeros_like(self.exists)
        has[self.parents[self.parents >= 0]] = True
        return (~has & self.exists).nonzero().flatten()

    def groups(self, count: int | None = None, least: int = 1) -> Tensor:
        """(N,) numbers of the trees that tokens belong to, largest tree first; -1 for tokens that do not exist.

        Args:
            count: cut the lightest edges until there are so many trees; ``None`` cuts nothing.
            least: tokens that both sides of a cut must keep; where no edge allows it, nothing more is cut.
        """
        parents = self.parents.tolist()
        edges = sorted((float(w), i) for i, (w, p) in enumerate(zip(self.weights, parents, strict=True)) if p >= 0)
        labels = _components(parents)
        if count is not None:
            check_int("count", count, least=1)
            check_int("least", least, least=1)
            missing = count - len({labels[i] for i in self.exists.nonzero().flatten().tolist()})
            for _, child in edges:
                if missing <= 0:
                    break
                kept, parents[child] = parents[child], -1
                trial = _components(parents)
                if min(trial.count(trial[child]), trial.count(trial[kept])) < least or trial[child] == trial[kept]:
                    parents[child] = kept
                else:
                    labels, missing = trial, missing - 1
        sizes: dict[int, int] = {}
        for i in self.exists.nonzero().flatten().tolist():
            sizes[labels[i]] = sizes.get(labels[i], 0) + 1
        order = {label: n for n, label in enumerate(sorted(sizes, key=lambda label: (-sizes[label], label)))}
        there = self.exists.tolist()
        return torch.tensor([order[label] if t else -1 for label, t in zip(labels, there, strict=True)])


def _components(parents: list[int]) -> list[int]:
    """The smallest number of a token in the tree of each."""
    label = list(range(len(parents)))

    def top(i: int) -> int:
        while label[i] != i:
            label[i] = label[label[i]]
            i = label[i]
        return i

    for child, parent in enumerate(parents):
        if parent >= 0:
            a, b = sorted((top(child), top(parent)))
            label[b] = a
    return [top(i) for i in range(len(parents))]


def dependency_tree(
    mask: Tensor, method: str = "arborescence", roots: str = "any", score: str = "log", valid: Tensor | None = None
) -> Tree:
    """The tree of tokens that a dependency mask says most for.

    Args:
        mask: (N, N) what children (columns) send to parents (rows), at least 0: of one block, or a sum over blocks.
        method: ``"arborescence"``: the spanning tree of the largest score (Chu-Liu and Edmonds); ``"greedy"``: every
            token goes to the parent it sends most to, and is a root if that is itself. Edges may form a cycle then.
        roots: ``"any"`` number of tokens may be roots, each at the score of what it sends to itself; or ``"one"``, the
            best of all. A greedy tree has any.
        score: of a tree: ``"log"``: the product of its edges; ``"sum"``: their sum.
        valid: (N,) boolean, which tokens exist.

    Raises:
        ValueError: a mask that is not square, negative or not finite; one root of a greedy tree.

    Reference: Ding et al., 2023, arXiv 2304.03282 (who leave open how they parse); Edmonds, 1967, "Optimum branchings".

    >>> mask = torch.tensor([[0.8, 0.7, 0.2], [0.1, 0.2, 0.1], [0.1, 0.1, 0.7]])
    >>> dependency_tree(mask).parents.tolist()
    [-1, 0, -1]
    >>> dependency_tree(mask, roots="one").parents.tolist()
    [-1, 0, 0]
    """
    check_rank("mask", mask, 2, "(N, N)")
    check_float("mask", mask)
    check_choice("method", method, METHODS)
    check_choice("roots", roots, ROOTS)
    check_choice("score", score, SCORES)
    count = mask.shape[0]
    if mask.shape[1] != count or not count:
        raise ValueError(f"mask must be (N, N) with at least one token, got {tuple(mask.shape)}")
    check_valid("valid", valid, (count,))
    held = mask.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(held).all() or (held < 0).any():
        raise ValueError("mask must hold what children send to parents: finite numbers of at least 0")
    if method == "greedy" and roots == "one":
        raise ValueError("roots='one' needs method='arborescence': a greedy tree has as many roots as there are")
    exists = torch.ones(count, dtype=torch.bool) if valid is None else valid.cpu()
    there = np.flatnonzero(exists.numpy())
    parents, weights = torch.full((count,), -1), torch.zeros(count, dtype=torch.float64)
    if not len(there):
        return Tree(parents, weights, exists)
    small = held[np.ix_(there, there)]
    if method == "greedy":
        chosen = small.argmax(0)
        found = np.where(small.diagonal() >= small.max(0), -1, chosen)
    else:
        found = _spanning(small, score, roots == "one")
    for child, parent in zip(there, found, strict=True):
        parents[child] = int(there[parent]) if parent >= 0 else -1
        weights[child] = float(held[child if parent < 0 else there[parent], child])
    return Tree(parents, weights, exists)


def _spanning(mask: np.ndarray, score: str, one: bool) -> np.ndarray:
    """Parents in the best spanning forest of (N, N); -1 for roots."""
    count = len(mask)
    scores = np.log(np.maximum(mask, 1e-300)) if score == "log" else mask
    wide = np.full((count + 1, count + 1), -np.inf)  # the last one is whom roots belong to
    wide[:count, :count] = scores
    np.fill_diagonal(wide, -np.inf)
    wide[count, :count] = scores.diagonal()
    if one:
        wide[count, :count] -= (scores.max() - scores.min()) * count + 1
    found = _edmonds(wide, count)[:count]
    return np.where(found == count, -1, found)


def _edmonds(scores: np.ndarray, root: int) -> np.ndarray:
    """Parents in the spanning arborescence of the largest sum, with edges (parent, child), from ``root``."""
    size = len(scores)
    scores = scores.copy()
    scores[:, root] = -np.inf
    parents = scores.argmax(0)
    parents[root] = -1
    cycle = _cycle(parents, root)
    if cycle is None:
        return parents
    inside = np.zeros(size, dtype=bool)
    inside[cycle] = True
    outside = np.flatnonzero(~inside)
    # The cycle becomes one node, the last: what enters it takes the place of one of its edges.
    gain = scores[:, cycle] - scores[parents[cycle], cycle]
    enters, leaves = gain[outside].argmax(1), scores[cycle].argmax(0)
    small = np.full((len(outside) + 1,) * 2, -np.inf)
    small[:-1, :-1] = scores[np.ix_(outside, outside)]
    small[:-1, -1] = gain[outside, enters]
    small[-1, :-1] = scores[cycle].max(0)[outside]
    found = _edmonds(small, int(np.flatnonzero(outside == root)[0]))
    result = parents.copy()
    for place, child in enumerate(outside):
        parent = found[place]
        if parent < 0:
            result[child] = -1
        else:
            result[child] = cycle[leaves[child]] if parent == len(outside) else outside[parent]
    entry = found[-1]
    result[cycle[enters[entry]]] = outside[entry]
    return result


def _cycle(parents: np.ndarray, root: int) -> np.ndarray | None:
    """The nodes of a cycle; ``None`` where there is none."""
    state = np.zeros(len(parents), dtype=int)  # the walk that a node was met in
    state[root] = -1
    for start in range(len(parents)):
        node = start
        while state[node] == 0:
            state[node] = start + 1
            node = parents[node]
        if state[node] == start + 1:
            found = [node]
            while parents[found[-1]] != node:
                found.append(parents[found[-1]])
            return np.array(found)
    return None
