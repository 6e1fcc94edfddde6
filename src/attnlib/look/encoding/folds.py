"""Which events train, which choose the penalty and which are predicted; and events drawn again without leaks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_int

#: Events that a half of a fold must hold: a correlation of two is always 1 or -1.
LEAST = 3


class Fold(NamedTuple):
    """Places of events: those that train, those that choose the penalty, those that are predicted in the end."""

    train: Tensor
    val: Tensor
    test: Tensor


def folds(events: int, count: int = 5, gap: int = 0) -> list[Fold]:
    """Contiguous folds, not shuffled: the first half of what is held out chooses, the second half is predicted.

    Args:
        events: how many there are, in the order in which they happened.
        count: folds.
        gap: events that are left out on each border between train, val and test: neighbours in time resemble each
            other, and a model that has seen one knows the other. What is tested does not depend on it.

    Raises:
        ValueError: too few events.

    >>> [len(part) for part in folds(100, 5, gap=2)[1]]
    [76, 8, 10]
    """
    check_int("events", events, least=0)
    check_int("folds", count, least=2)
    check_int("gap", gap, least=0)
    smallest = events // count
    if smallest // 2 - gap < LEAST or events - smallest - 1 - 2 * gap < 2:
        raise ValueError(
            f"folds={count} with gap={gap} need at least {2 * (LEAST + gap) * count} events ({LEAST} to choose the "
            f"penalty and {LEAST} to test in each fold), got {events}"
        )
    places, found, first = torch.arange(events), [], 0
    for i in range(count):
        last = first + smallest + (i < events % count)  # one more in the first ones
        half = (first + last) // 2
        train = places[(places < first - gap) | (places >= last + gap)]
        found.append(Fold(train, places[first : half - gap], places[half:last]))
        first = last
    return found


def resamples(split: list[Fold], events: int, count: int = 1000, seed: int = 0) -> Tensor:
    """Events drawn again with replacement, only from those that play the same part in every fold.

    A copy of an event that trains is then never tested, nor is its neighbour within the gap. The same rows serve every
    model and every subject that saw the same events, so that differences are paired.

    Args:
        split: the folds, which are kept.
        events: how many there are.
        count: resamples.
        seed: of the draws.

    Returns:
        (count, events) places: row ``r`` puts event ``[r, i]`` in place ``i``.

    >>> rows = resamples(folds(30, 3), 30, 2)
    >>> bool(((rows < 10) == (torch.arange(30) < 10)).all())
    True
    """
    check_int("count", count, least=1)
    check_int("seed", seed)
    part = torch.zeros(events, len(split), dtype=torch.long)
    for i, fold in enumerate(split):
        for number, places in enumerate(fold, start=1):
            part[places, i] = number
    groups = torch.unique(part, dim=0, return_inverse=True)[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(count, events, dtype=torch.long)
    for group in groups.unique():
        places = (groups == group).nonzero()[:, 0]
        drawn[:, places] = places[torch.randint(len(places), (count, len(places)), generator=generator)]
    return drawn
