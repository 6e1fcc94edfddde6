"""Made-up features of a recogniser along videos, in which actions of several kinds are on for a while."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_int, check_real


def clips(
    count: int, generator: torch.Generator, length: int = 40, kinds: int = 4, noise: float = 0.6
) -> tuple[Tensor, list[Tensor]]:
    """Made-up recognition features whose first ``kinds`` channels say which action is on, and the actions.

    Args:
        count: of videos.
        generator: of everything.
        length: points in time, 8 at least.
        kinds: of actions.
        noise: standard deviation beside a mark of 1.5.

    Returns:
        (count, length, 2 kinds) features and a list of (N, 2), begins and ends.
    """
    check_int("count", count, least=0)
    check_int("length", length, least=8)
    check_int("kinds", kinds, least=1)
    check_real("noise", noise, least=0)
    features = noise * torch.randn(count, length, 2 * kinds, generator=generator)
    truth = []
    for i in range(count):
        at, mine = int(torch.randint(1, 6, (), generator=generator)), []
        while True:
            size = int(torch.randint(4, 12, (), generator=generator))
            if at + size > length - 1:
                break
            kind = int(torch.randint(kinds, (), generator=generator))
            features[i, at : at + size, kind] += 1.5
            mine.append([at, at + size])
            at += size + int(torch.randint(2, 8, (), generator=generator))
        truth.append(torch.tensor(mine, dtype=torch.float32).reshape(-1, 2))
    return features, truth
