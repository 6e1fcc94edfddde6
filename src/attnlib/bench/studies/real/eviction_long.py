"""What survives eviction in texts of 2,048 and 4,096 tokens: :mod:`.eviction` for fewer questions of longer texts.

``attnlib bench --suite real-eviction-long --out benchmarks/results``. Only the needle is asked for, after the question
was read. One pass over each text serves all techniques and ratios; what the scores of all queries decide (H2O), whose
cost grows with the square of the length, is measured on one text a depth of 2,048 tokens. In float32, which is faster
than bfloat16 on most processors: three times without instructions for bfloat16, 1.6 times with AVX512's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...small import Progress
from . import eviction

QUESTION = "Does a fact in a longer text survive when keys are evicted from the cache?"
MODELS = eviction.MODELS

PLAN: Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]] = {
    length: {"asked": {"needle": (0.25, 0.5, 0.75, 0.9)}} for length in (2048, 4096)
}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    plan: Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]] = PLAN,
    items: Mapping[int, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """As :func:`attnlib.bench.studies.real.eviction.measure`, with another plan.

    Args:
        progress: told of every item.
        keep: a file that takes every item as soon as it is done, and from which a later call goes on.
        pictures: folder for ``real-eviction-long-cpu.svg``.
        plan: by length of the text in tokens, what is measured: ``{mode: {task: ratios}}``.
        items: by length, texts at each depth; 3 of each by default.
        **settings: of the other line.

    Returns:
        Plain values, for JSON.
    """
    counts = {2048: 3, 4096: 3} if items is None else items
    given: dict[str, Any] = {"dtype": torch.float32, "compared": False, "quadratic": {2048: 1}} | settings
    result = eviction.measure(progress, keep, None, plan=plan, items=counts, **given) | {"what": QUESTION}
    if pictures is not None:
        eviction.draw(result, Path(pictures) / "real-eviction-long-cpu.svg")
    return result
