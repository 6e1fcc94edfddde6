"""Time and memory of linear attention against the number of tokens, beside SDPA.

``python -m attnlib.bench.speed.linear benchmarks/results/linear-cpu.json wall`` measures again what that file holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.linear import linear_attention
from ...types import check_choice
from .. import stats
from ..clock import CLOCKS, interleave, limit_threads, machine, peak_bytes

SIZES = (1024, 2048, 4096, 8192, 16384)
LONGEST_QUADRATIC = 4096  # of the masked product, whose map is held in full

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


def _contenders(heads: int, n: int) -> dict[str, Operator]:
    slopes = 2.0 ** -torch.arange(1, heads + 1).float()
    token = -torch.rand(1, heads, n) * 0.1
    out: dict[str, Operator] = {
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "linear": linear_attention,
        "linear, decay per head": lambda q, k, v: linear_attention(q, k, v, decay=-slopes),
        "linear, decay per token": lambda q, k, v: linear_attention(q, k, v, decay=token),
        "linear, normalised": lambda q, k, v: linear_attention(q.abs(), k.abs(), v, normalizer="sum"),
    }
    if n <= LONGEST_QUADRATIC:
        distance = (torch.arange(n)[:, None] - torch.arange(n)).float()
        mask = torch.where(distance >= 0, -slopes[:, None, None] * distance, float("-inf")).exp()
        # What a reference without chunks computes, with its mask made beforehand.
        out["masked product, decay per head"] = lambda q, k, v: ((q @ k.transpose(-2, -1)) * mask) @ v
    return out


def measure(
    sizes: Sequence[int] = SIZES,
    heads: int = 8,
    head_dim: int = 64,
    rounds: int = 5,
    clock: str = "wall",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved runs, forward and forward with backward, peak memory and growth exponents.

    Args:
        sizes: numbers of tokens, ascending.
        heads: heads.
        head_dim: width of queries, keys and values.
        rounds: measurements per point.
        clock: ``"wall"``, or ``"cpu"`` for the processor time of one thread, which other programs hardly disturb.
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine and one record per contender.

    >>> sorted(measure(sizes=(16, 32), heads=1, head_dim=4, rounds=1)["records"][0])[:3]
    ['both_exponent', 'both_over_sdpa', 'both_seconds']
    """
    check_choice("clock", clock, list(CLOCKS))
    with limit_threads(1 if clock == "cpu" else None):
        records = _records(sizes, heads, head_dim, rounds, clock, progress)
        settings = {
            "batch": 1,
            "heads": heads,
            "head_dim": head_dim,
            "dtype": "float32",
            "rounds": rounds,
            "clock": clock,
        }
        return {
            "what": "causal linear attention against N",
            "settings": settings,
            "machine": machine(),
            "records": records,
        }


def _records(
    sizes: Sequence[int],
    heads: int,
    head_dim: int,
    rounds: int,
    clock: str,
    progress: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for n in sizes:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, n, head_dim, requires_grad=True) for _ in range(3))
        contenders = _contenders(heads, n)

        def forward(run: Operator, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            with torch.no_grad():
                run(q, k, v)

        def both(run: Operator, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            torch.autograd.grad(run(q, k, v).sum(), (q, k, v))

        jobs = {
            (name, what): partial(fn, run)
            for name, run in contenders.items()
            for what, fn in (("forward", forward), ("both", both))
        }

        def say(line: str, n: int = n) -> None:
            if progress is not None:
                progress(f"N={n} {line}")

        times = interleave(jobs, rounds, clock, say)
        for name, run in contenders.items():
            record = records.setdefault(
                name, {"contender": name, "sizes": [], "forward_seconds": [], "both_seconds": [], "peak_bytes": []}
            )
            record["sizes"].append(n)
            record["peak_bytes"].append(peak_bytes(partial(both, run)))
            for what in ("forward", "both"):
                record[f"{what}_seconds"].append(times[name, what].median)
    plain = records["sdpa"]
    for record in records.values():
        for what in ("forward", "both"):
            seconds = record[f"{what}_seconds"]
            record[f"{what}_over_sdpa"] = [
                mine / plain[f"{what}_seconds"][plain["sizes"].index(n)]
                for n, mine in zip(record["sizes"], seconds, strict=True)
            ]
        record["forward_exponent"] = stats.growth_exponent(record["sizes"], record["forward_seconds"])
        record["both_exponent"] = stats.growth_exponent(record["sizes"], record["both_seconds"])
        record["memory_exponent"] = stats.growth_exponent(record["sizes"], record["peak_bytes"])
    return list(records.values())


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/linear-cpu.json")
    result = measure(
        clock=sys.argv[2] if len(sys.argv) > 2 else "wall", progress=lambda line: print(line, file=sys.stderr)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
