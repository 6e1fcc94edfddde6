"""Connecting walls: sixteen clues of four hidden groups, some fit several (Naeini et al., 2023, arXiv 2306.11167).

Scores as the authors' code has them, the clustering baseline with groups of exactly four, prompts and a parser for
language models, the walls without red herrings, and walls of our own. The quiz's clues are not public property and not
here: :func:`load_walls` reads them from the user's folder.

>>> wall = own_walls(1, seed=0)[0]
>>> found = score_groups([group[::-1] for group in wall.groups[::-1]], wall)
>>> found["correct groups"], found["full wall"], found["AMI"], found["WD"]
(4.0, 1.0, 1.0, 0.0)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import check_int
from ...types import check_choice
from ..data.files import DataError, require
from ..evaluate import Item, Unreadable, user_file
from .words import CONNECTIONS

#: What :func:`score_groups` gives. The first two and the next three are better when higher, WD when lower.
SCORES = ("correct groups", "full wall", "AMI", "ARI", "FMS", "WD")


@dataclasses.dataclass(frozen=True)
class Wall:
    """Sixteen different clues in four groups.

    Args:
        id: its name.
        groups: four times four clues.
        connections: what connects each group.
        sources: the wall that each group comes from.
    """

    id: str
    groups: tuple[tuple[str, ...], ...]
    connections: tuple[str, ...]
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if [len(g) for g in self.groups] != [4] * 4:
            raise ValueError(
                f"groups of wall {self.id!r} must be four of four clues, got {[len(g) for g in self.groups]}"
            )
        if len(self.connections) != 4:
            raise ValueError(f"connections of wall {self.id!r} must be four, got {len(self.connections)}")
        clues = Counter(clue.lower() for clue in self.clues)
        if twice := sorted(clue for clue, n in clues.items() if n > 1):
            raise ValueError(f"clues of wall {self.id!r} must differ, twice there: {twice}")
        if not all(clue.strip() for clue in self.clues):
            raise ValueError(f"clues of wall {self.id!r} must not be empty")

    @property
    def clues(self) -> list[str]:
        """All clues, group by group."""
        return [clue for group in self.groups for clue in group]


# --------------------------------------------------------------------------------------------------------------------
# Scores


def score_groups(predicted: Sequence[Sequence[str]], wall: Wall, wd: str = "paper") -> dict[str, float]:
    """Six scores of four predicted groups; case does not count, nor does the order of groups, except for ``wd``.

    Correct groups (0 to 4), full wall (0 or 1), and of the two partitions the adjusted mutual information, the adjusted
    Rand index and the Fowlkes-Mallows score, as scikit-learn has them. WD: of the groups that are not right, the
    Wasserstein distance between the numbers of their clues' true groups and those of a true group, at most 1 each, over
    4. Invented clues are groups of their own, and so are the places of clues that are missing.

    Args:
        predicted: groups of clues; of more than four groups of four only the first count for the last four scores.
        wall: what is right.
        wd: ``"paper"`` compares groups in the order given, so that the order changes the number; ``"matched"`` pairs
            them at least distance.
    """
    check_choice("wd", wd, ("paper", "matched"))
    truth = [sorted(clue.lower() for clue in group) for group in wall.groups]
    said = [sorted(clue.lower() for clue in group) for group in predicted]
    number = {clue: i for i, group in enumerate(truth) for clue in group}
    fresh = itertools.count(4)
    slices = [[number[c] if c in number else next(fresh) for c in group[:4]] for group in said[:4]]
    slices = [s + [next(fresh) for _ in range(4 - len(s))] for s in [*slices, *[[]] * (4 - len(slices))]]
    metrics = require("sklearn.metrics")
    true, found = [i for i in range(4) for _ in range(4)], list(itertools.chain(*slices))
    correct = sum(group in said for group in truth)
    return {
        "correct groups": float(correct),
        "full wall": float(correct == 4),
        "AMI": float(metrics.adjusted_mutual_info_score(true, found)),
        "ARI": float(metrics.adjusted_rand_score(true, found)),
        "FMS": float(metrics.fowlkes_mallows_score(true, found)),
        "WD": _distance(slices, wd) / 4,
    }


def _distance(slices: Sequence[Sequence[int]], wd: str) -> float:
    from scipy import optimize, stats

    whole = {s[0] for s in slices if len(set(s)) == 1 and s[0] < 4}
    left = [[i] * 4 for i in range(4) if i not in whole]
    mine, seen = [], set()
    for s in slices:
        if len(set(s)) == 1 and s[0] < 4 and s[0] not in seen:
            seen.add(s[0])
        else:
            mine.append(s)
    cost = np.asarray([[min(stats.wasserstein_distance(a, b), 1.0) for b in left] for a in mine]).reshape(
        len(mine), len(left)
    )
    if wd == "paper":
        return float(np.trace(cost))
    rows, columns = optimize.linear_sum_assignment(cost)
    return float(cost[rows, columns].sum())


def rouge1(said: str, reference: str) -> float:
    """F1 of the words that two texts share, in lower case and without punctuation.

    >>> round(rouge1("kinds of fish", "Fish"), 3)
    0.5
    """
    a, b = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (said, reference))
    both = sum((a & b).values())
    return 0.0 if both == 0 else 2 * both / (sum(a.values()) + sum(b.values()))


def score_connections(
    predicted: Sequence[str], wall: Wall, bert: Callable[[list[str], list[str]], Sequence[float]] | None = None
) -> dict[str, float]:
    """Means over a wall's four connections, in the wall's order: exact match, ROUGE-1, and BERTScore where given.

    Args:
        predicted: four connections.
        wall: what is right.
        bert: from predictions and references to F1s, such as that of the package ``bert-score``, rescaled.
    """
    if len(predicted) != 4:
        raise ValueError(f"predicted must hold four connections, got {len(predicted)}")
    said = [p.lower().strip() for p in predicted]
    right = [c.lower().strip() for c in wall.connections]
    found = {
        "exact match": sum(a == b for a, b in zip(said, right, strict=True)) / 4,
        "ROUGE-1": sum(map(rouge1, said, right)) / 4,
    }
    if bert is not None:
        found["BERTScore"] = float(np.mean([float(v) for v in bert(said, right)]))
    return found


# --------------------------------------------------------------------------------------------------------------------
# Clusters of one size


def balanced_clusters(x: Any, clusters: int, seed: int = 0, restarts: int = 8, steps: int = 50) -> np.ndarray:
    """k-means whose clusters have one size: tokens are assigned to the places of all centres at least distance.

    Args:
        x: (n, d), ``n`` a multiple of ``clusters``.
        clusters: how many.
        seed: of the first centres.
        restarts: the best of so many runs, by the sum of squares.
        steps: of a run at most.

    Returns:
        (n,) numbers of clusters.
    """
    from scipy import optimize

    points = np.asarray(x, dtype=np.float64)
    check_int("clusters", clusters, least=1)
    check_int("restarts", restarts, least=1)
    if points.ndim != 2 or not len(points) or len(points) % clusters:
        raise ValueError(f"x must be (n, d) with n a multiple of clusters={clusters}, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("x must be finite")
    size, rng = len(points) // clusters, np.random.default_rng(seed)
    best, least = np.repeat(np.arange(clusters), size), np.inf
    for _ in range(restarts):
        centres = [points[rng.integers(len(points))]]  # k-means++
        while len(centres) < clusters:
            far = np.min([((points - c) ** 2).sum(1) for c in centres], 0)
            share = far / far.sum() if far.sum() > 0 else None
            centres.append(points[rng.choice(len(points), p=share)])
        label = None
        for _ in range(steps):
            cost = ((points[:, None] - np.asarray(centres)[None]) ** 2).sum(-1)
            new = optimize.linear_sum_assignment(np.repeat(cost, size, axis=1))[1] // size
            if label is not None and (new == label).all():
                break
            label = new
            centres = [points[label == c].mean(0) for c in range(clusters)]
        total = float(sum(((points[label == c] - centres[c]) ** 2).sum() for c in range(clusters)))
        if total < least:
            best, least = np.asarray(label), total
    return best


def cluster_groups(wall: Wall, embed: Mapping[str, Any], seed: int = 0) -> list[list[str]]:
    """Four groups of four clues by :func:`balanced_clusters` of embeddings, from a shuffled order of the clues."""
    rng = np.random.default_rng(seed)
    clues = [wall.clues[i] for i in rng.permutation(16)]
    label = balanced_clusters(np.stack([np.asarray(embed[clue]) for clue in clues]), 4, seed)
    return [[clue for clue, at in zip(clues, label, strict=True) if at == c] for c in range(4)]


# --------------------------------------------------------------------------------------------------------------------
# Walls


def load_walls(folder: str | Path, split: str = "test") -> list[Wall]:
    """Walls of the authors' ``train.json``, ``validation.json`` or ``test.json`` in the user's folder."""
    check_choice("split", split, ("train", "validation", "test"))
    path = user_file(folder, f"{split}.json", "the walls of Only Connect as github.com/TaatiTeam/OCW gives them")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))["dataset"]
        read = [
            (str(w["wall_id"]), [tuple(g["gt_words"]) for g in w["groups"].values()],
             tuple(g["gt_connection"] for g in w["groups"].values()))
            for w in held
        ]  # fmt: skip
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not in the form of the Only Connect walls ({error!r})") from error
    return [Wall(name, tuple(groups), connections, (name,) * 4) for name, groups, connections in read]


def randomized(walls: Sequence[Wall], seed: int = 42) -> list[Wall]:
    """Walls without (most) red herrings: each keeps its first group, the others come from three other walls.

    Every group is used once, no two groups of a new wall come from one wall, and its clues differ.

    Raises:
        ValueError: no such arrangement was found, as of fewer than four walls, or of walls that share clues.
    """
    n = len(walls)
    if n < 4:
        raise ValueError(f"walls must be at least four, to take groups from three others, got {n}")
    if len({wall.id for wall in walls}) < n:
        raise ValueError(f"walls must have ids of their own, got {[wall.id for wall in walls][:5]}...")
    rng = np.random.default_rng(seed)
    pool = [(w, g) for w in range(n) for g in range(1, 4)]
    lower = {(w, g): {c.lower() for c in walls[w].groups[g]} for w in range(n) for g in range(4)}
    for _ in range(5):
        place = [pool[i] for i in rng.permutation(len(pool))]  # places 3 i .. 3 i + 2 are those of wall i

        def clash(i: int, place: list[tuple[int, int]] = place) -> bool:
            own = [(i, 0), *place[3 * i : 3 * i + 3]]
            return len({w for w, _ in own}) < 4 or len(set().union(*(lower[o] for o in own))) < 16

        for _ in range(200):
            bad = [i for i in range(n) if clash(i)]
            if not bad:
                break
            for i in bad:
                for a in range(3 * i, 3 * i + 3):
                    b = int(rng.integers(len(place)))
                    before = clash(i) + clash(b // 3)
                    place[a], place[b] = place[b], place[a]
                    if clash(i) + clash(b // 3) > before:
                        place[a], place[b] = place[b], place[a]
        else:
            continue
        made = []
        for i, wall in enumerate(walls):
            own = [(i, 0), *place[3 * i : 3 * i + 3]]
            made.append(
                Wall(
                    f"{wall.id}-randomized", tuple(walls[w].groups[g] for w, g in own),
                    tuple(walls[w].connections[g] for w, g in own), tuple(walls[w].id for w, _ in own),
                )
            )  # fmt: skip
        return made
    raise ValueError(f"walls ({n}) allow no arrangement of groups from different walls with different clues")


def herrings(wall: Wall, connections: Mapping[str, Sequence[str]] = CONNECTIONS) -> int:
    """How many clues of a wall of ours also fit another of its connections."""
    return sum(
        clue in connections[other]
        for group, own in zip(wall.groups, wall.connections, strict=True)
        for clue in group
        for other in wall.connections
        if other != own
    )


def solutions(wall: Wall, connections: Mapping[str, Sequence[str]] = CONNECTIONS, most: int = 2) -> int:
    """In how many ways the clues of a wall of ours fill its four connections, counted up to ``most``."""
    fits = sorted(
        ([i for i, c in enumerate(wall.connections) if clue in connections[c]] for clue in wall.clues), key=len
    )
    room = [4] * 4

    def count(at: int, found: int) -> int:
        if at == len(fits):
            return found + 1
        for i in fits[at]:
            if room[i] and found < most:
                room[i] -= 1
                found = count(at + 1, found)
                room[i] += 1
        return found

    return count(0, 0)


def own_walls(
    count: int, seed: int = 0, least: int = 4, connections: Mapping[str, Sequence[str]] = CONNECTIONS
) -> list[Wall]:
    """Walls from our own lists of clues, each with one solution and at least so many red herrings.

    Args:
        count: how many.
        seed: of the draw.
        least: clues that fit another connection of their wall too, at least.
        connections: clues by what connects them.
    """
    check_int("count", count, least=1)
    rng, names = np.random.default_rng(seed), sorted(connections)
    shared = {a: [b for b in names if b != a and set(connections[a]) & set(connections[b])] for a in names}
    made: list[Wall] = []
    for _ in range(4000 * count):
        if len(made) == count:
            break
        chosen = [names[rng.integers(len(names))]]
        while len(chosen) < 4:  # the next shares a clue with one of those before
            near = sorted({b for a in chosen for b in shared[a]} - set(chosen)) or sorted(set(names) - set(chosen))
            chosen.append(near[rng.integers(len(near))])
        taken: set[str] = set()
        groups = []
        for name in (chosen[i] for i in rng.permutation(4)):
            free = [c for c in connections[name] if c not in taken]
            also = np.asarray([sum(c in connections[o] for o in chosen if o != name) for c in free], dtype=float)
            if len(free) < 4:
                break
            share = (1 + 3 * also) / (1 + 3 * also).sum()
            groups.append((name, tuple(free[i] for i in rng.choice(len(free), 4, replace=False, p=share))))
            taken |= set(groups[-1][1])
        if len(groups) < 4:
            continue
        name = f"own-{seed}-{len(made)}"
        wall = Wall(name, tuple(g for _, g in groups), tuple(n for n, _ in groups), (name,) * 4)
        if herrings(wall, connections) >= least and solutions(wall, connections) == 1:
            made.append(wall)
    if len(made) < count:
        raise ValueError(f"connections give only {len(made)} of count={count} walls with least={least} herrings")
    return made


# --------------------------------------------------------------------------------------------------------------------
# Language models


def _solved(wall: Wall) -> str:
    groups = zip(wall.groups, wall.connections, strict=True)
    return "\n".join(f"Group {i + 1}: {', '.join(g)}. Connection: {c}" for i, (g, c) in enumerate(groups))


def wall_items(walls: Sequence[Wall], examples: Sequence[Wall] = (), seed: int = 0) -> list[Item]:
    """Prompts that ask for four groups, after solved walls, of which the authors take 0, 1, 3, 5 or 10."""
    if overlap := {w.id for w in walls} & {w.id for w in examples}:
        raise ValueError(f"examples must not be asked too: {sorted(overlap)[:5]}")
    head = "Sort the 16 clues into 4 groups of 4 that have something in common, one line per group:\n"
    head += "Group 1: a, b, c, d\n\n"
    rng = np.random.default_rng(seed)

    def asked(wall: Wall) -> str:
        return "Clues: " + ", ".join(wall.clues[i] for i in rng.permutation(16)) + "\n"

    shown = "".join(f"{asked(w)}{_solved(w)}\n\n" for w in examples)
    return [Item(w.id, head + shown + asked(w), w) for w in walls]


def parse_groups(text: str, item: Item | None = None) -> list[list[str]]:
    """Groups of an answer: lines of clues with commas, without ``Group 1:``, bullets and connections behind.

    Raises:
        Unreadable: no four lines of at least two clues.
    """
    groups = []
    for line in text.splitlines():
        line = re.sub(r"^[\s>*\-•]*(\**\s*group\s*\d+\s*\**\s*[:.)\-]|\d+\s*[.):])", "", line, flags=re.IGNORECASE)
        line = re.split(r"[.;(]?\s*\**\s*connection\s*\**\s*:|\s[-–—]\s|\(", line, flags=re.IGNORECASE)[0]
        clues = [clue.strip(" \t*_\"'`[].") for clue in line.split(",")]
        clues = [clue for clue in clues if clue]
        if len(clues) >= 2:
            groups.append(clues)
    if len(groups) < 4:
        raise Unreadable(f"{len(groups)} lines of clues, not four")
    return groups[:4]


def score_wall(value: Sequence[Sequence[str]], item: Item) -> dict[str, float]:
    """:func:`score_groups` for :func:`attnlib.bench.evaluate.evaluate`."""
    return score_groups(value, item.answer)
