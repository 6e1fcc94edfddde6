"""Time and memory of linear attention in segments of unequal sizes: added up as they are, or padded to the largest.

``attnlib bench --suite segments`` measures it again. Both compute the same; padded windows are what a batch of equal
windows would need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.linear import linear_attention
from ..clock import interleave, machine, peak_bytes, ratio

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
EPS = 1e-6

#: How sizes of segments are spread -> sizes for a number of segments.
SPREADS: dict[str, Callable[[int], Tensor]] = {
    "equal": lambda count: torch.full((count,), 32),
    "uniform, 1 to 63": lambda count: torch.randint(1, 64, (count,)),
    "skewed, 4 / u up to 1000": lambda count: (4 / torch.rand(count)).long().clamp(1, 1000),
}


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """All segments as a batch of windows as long as the longest."""
    start = lengths.cumsum(0) - lengths
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(segment)) - start[segment]
    heads = torch.arange(q.shape[1])[:, None]

    def window(t: Tensor) -> Tensor:
        out = t.new_zeros(t.shape[1], len(lengths), int(lengths.max()), t.shape[-1])
        return out.index_put((heads, segment, place), t[0])

    q, k, v = window(q), window(k), window(v)
    out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + EPS)
    return out[heads, segment, place][None]


def record(
    spread: str, count: int, heads: int, head_dim: int, rounds: int, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Seconds, ratios and peak bytes for one of :data:`SPREADS`."""
    torch.manual_seed(0)
    lengths = SPREADS[spread](count)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    call: dict[str, Any] = dict(causal=False, normalizer="sum", eps=EPS, cu_seqlens=cu)
    runs: dict[str, Run] = {
        "padded windows": partial(padded, lengths=lengths),
        "both ways": partial(linear_attention, form="chunkwise", **call),
        "scatter": partial(linear_attention, form="scatter", **call),
    }
    q, k, v = (torch.rand(1, heads, int(cu[-1]), head_dim, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        error = float((runs["scatter"](q, k, v) - runs["padded windows"](q, k, v)).abs().max())
    if not error < 1e-4:
        raise AssertionError(f"padded windows compute something else: they differ by {error:.1e}")

    def infer(run: Run) -> None:
        with torch.no_grad():
            run(q, k, v)

    def train(run: Run) -> None:
        torch.autograd.grad(run(q, k, v).sum(), (q, k, v))

    found: dict[str, Any] = {"spread": spread, "segments": count, "tokens": int(cu[-1]), "longest": int(lengths.max())}
    for what, job in (("forward", infer), ("training", train)):
        jobs = {name: partial(job, run) for name, run in runs.items()}
        times = interleave(jobs, rounds, clock="cpu", progress=progress)
        found[what] = {
            name: {
                "seconds": times[name].minimum,
                "times_as_fast": ratio(times["padded windows"], times[name])["ratio_of_minima"],
                "peak_bytes": peak_bytes(jobs[name]),
            }
            for name in jobs
        }
    return found


def measure(
    progress: Callable[[str], None] | None = None,
    spreads: Sequence[str] = tuple(SPREADS),
    count: int = 400,
    heads: int = 4,
    head_dim: int = 32,
    rounds: int = 5,
) -> dict[str, Any]:
    """Segments against padded windows, forward and with gradients.

    Args:
        progress: told of every round.
        spreads: of :data:`SPREADS`.
        count: segments.
        heads, head_dim: of queries, keys and values.
        rounds: measurements of each.

    Returns:
        Plain values, for JSON.
    """
    records = [record(spread, count, heads, head_dim, rounds, progress) for spread in spreads]
    return {
        "what": "linear attention in segments against padded windows", "machine": machine(), "heads": heads,
        "head_dim": head_dim, "rounds": rounds, "records": records,
    }  # fmt: skip
