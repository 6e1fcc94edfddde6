"""Time and memory of attention by regions: gathered, beside one call with a mask of all queries and all keys.

``attnlib bench --suite isolation`` measures it again. Queries of a picture with two or three subjects read their own
subject in a reference, and their subject and the background of their picture, as
:class:`attnlib.steer.IRDiffusion` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...steer.diffusion.regions import attention_by_label, box_masks, label_map
from ..clock import interleave, limit_threads, machine, peak_bytes, ratio

#: Side of the map, rows, heads and their width: Stable Diffusion 1.5 at 512 pixels, SDXL's at 1024.
SHAPES = ((64, 1, 8, 40), (64, 1, 10, 64), (32, 2, 8, 80))
BOXES = {
    2: ((0.05, 0.2, 0.45, 0.9), (0.55, 0.2, 0.95, 0.9)),
    3: ((0.02, 0.2, 0.32, 0.9), (0.36, 0.2, 0.64, 0.9), (0.68, 0.2, 0.98, 0.9)),
}


def problem(side: int, rows: int, heads: int, head_dim: int, subjects: int) -> tuple[Tensor, ...]:
    """Queries, keys, values, labels of queries and of keys, and who reads whom."""
    torch.manual_seed(0)
    mine = label_map(box_masks(BOXES[subjects], (side, side))).flatten()
    n, theirs = side * side, mine.roll(side // 8)
    q = torch.randn(rows, heads, n, head_dim)
    k, v = (torch.randn(rows, heads, 2 * n, head_dim) for _ in range(2))
    kinds = torch.cat([torch.where(theirs == 0, 2 * subjects + 1, theirs + subjects), mine])
    reads = torch.zeros(subjects + 1, 2 * subjects + 2, dtype=torch.bool)
    reads[:, 0] = reads[0, : subjects + 1] = True
    for s in range(1, subjects + 1):
        reads[s, s] = reads[s, s + subjects] = True
    return q, k, v, mine.expand(rows, -1), kinds.expand(rows, -1), reads


def dense(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, kinds: Tensor, reads: Tensor) -> Tensor:
    """The same with one mask (N, 2 N), made in the call."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=reads[labels[0]][:, kinds[0]])


def record(shape: Sequence[int], subjects: int, rounds: int, progress: Any = None) -> dict[str, Any]:
    """Seconds, ratios and peak bytes of one shape of :data:`SHAPES`."""
    side, rows, heads, head_dim = shape
    given = problem(side, rows, heads, head_dim, subjects)
    gathered: Callable[..., Tensor] = attention_by_label
    jobs: dict[str, Callable[[], Any]] = {"dense": partial(dense, *given), "gathered": partial(gathered, *given)}
    with torch.no_grad():
        error = float((jobs["dense"]() - jobs["gathered"]()).abs().max())
        if not error < 1e-4:
            raise AssertionError(f"gathered attention computes something else: they differ by {error:.1e}")
        times = interleave(jobs, rounds, clock="cpu", progress=progress)
        bytes_of = {name: peak_bytes(job) for name, job in jobs.items()}
    found: dict[str, Any] = {
        "setting": f"{side} x {side}, {rows} rows, {heads} heads of {head_dim}, {subjects} subjects",
        "tokens": side * side, "subjects": subjects, "mask_bytes": 2 * side**4,
    }  # fmt: skip
    for name in jobs:
        found[f"{name}_seconds"], found[f"{name}_peak_bytes"] = times[name].minimum, bytes_of[name]
    return {**found, "times_as_fast": ratio(times["dense"], times["gathered"])["ratio"]}


def measure(
    shapes: Sequence[Sequence[int]] = SHAPES,
    subjects: Sequence[int] = (2, 3),
    rounds: int = 7,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved ratios, on one thread.

    Args:
        shapes: side of the map, rows, heads and their width.
        subjects: how many, of :data:`BOXES`.
        rounds: turns of each way.
        progress: told what is being measured.
    """
    with limit_threads(1):
        rows = [record(shape, count, rounds, progress) for shape in shapes for count in subjects]
    return {"what": "attention by regions, gathered and with a dense mask", "records": rows, "machine": machine()}
