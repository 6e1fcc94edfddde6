"""From which density on single pairs are slower than dense attention.

Every query reads keys of its own, anywhere. *Pairs* computes these alone; *masked* is what code without such an
operator does: all products, a mask, a softmax, zeros for what is not a number. *Dense* is attention to everything. What
it takes to choose the pairs is not counted.

``python -m attnlib.bench.speed.pairs benchmarks/results/sparsifiner-cpu.json`` measures again what that file holds
about the operator; what it holds about the mechanism beside its authors' code stays.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.block_sparse import BlockPlan, block_sparse_attention
from ..clock import interleave, machine, ratio

RATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """All products, those outside ``mask`` (B, H, N, M) thrown away."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.nan_to_num(scores.masked_fill(~mask, float("-inf")).softmax(-1)) @ v


def crossing(rates: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The density at which a ratio of times rises above 1, between two measured ones; ``None`` where it never does.

    >>> crossing([0.1, 0.2, 0.4], [0.5, 0.8, 1.6])
    0.25
    """
    for i in range(1, len(rates)):
        low, high = ratios[i - 1], ratios[i]
        if low <= 1 < high:
            return round(rates[i - 1] + (1 - low) / (high - low) * (rates[i] - rates[i - 1]), 4)
    return 0.0 if ratios and ratios[0] > 1 else None


def measure(
    n: int = 3136,
    rates: Sequence[float] = RATES,
    heads: int = 2,
    head_dim: int = 64,
    rounds: int = 5,
    backward: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times of pairs at several densities beside dense and masked attention, interleaved.

    Args:
        n: queries and keys.
        rates: shares of the keys that each query reads.
        heads, head_dim: heads and their width.
        rounds: measurements per contender.
        backward: also forward with backward.
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine, one record per density with the ratios of times of pairs to dense and
        to masked (medians of the same rounds), and ``faster_below``: the densities at which these reach 1, ``None``
        where they never do.

    >>> measure(32, (0.1, 0.5), 1, 4, rounds=1, backward=False)["settings"]["tokens"]
    32
    """
    torch.manual_seed(0)
    leaves = [torch.randn(1, heads, n, head_dim, requires_grad=True) for _ in range(3)]
    fixed = [t.detach() for t in leaves]
    scores = torch.rand(1, heads, n, n)

    def forward(run: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            run(*fixed)

    def both(run: Callable[..., Tensor]) -> None:
        torch.autograd.grad(run(*leaves).sum(), leaves)

    whats: dict[str, Callable[..., None]] = {"forward": forward, **({"both": both} if backward else {})}
    records = []
    for rate in rates:
        index = scores.topk(max(1, math.ceil(rate * n)), -1, sorted=False).indices
        plan = BlockPlan(index, 1, 1, n)
        runs: dict[str, Callable[..., Tensor]] = {
            "dense": F.scaled_dot_product_attention,
            "masked": partial(masked, mask=plan.chosen()),
            "pairs": partial(block_sparse_attention, plan=plan),
        }
        jobs = {(name, what): partial(fn, run) for name, run in runs.items() for what, fn in whats.items()}
        if progress is not None:
            progress(f"keep rate {rate}")
        times = interleave(jobs, rounds)
        record: dict[str, Any] = {"keep_rate": rate}
        for what in whats:
            for name in runs:
                record[f"{what}_{name}_seconds"] = times[name, what].median
            for other in ("dense", "masked"):
                record[f"{what}_pairs_over_{other}"] = ratio(times["pairs", what], times[other, what])["ratio"]
        records.append(record)
    below = {
        f"{what}, {other}": crossing(list(rates), [r[f"{what}_pairs_over_{other}"] for r in records])
        for what in whats
        for other in ("dense", "masked")
    }
    settings = {"batch": 1, "tokens": n, "heads": heads, "head_dim": head_dim, "dtype": "float32", "rounds": rounds}
    return {
        "what": "attention over single pairs", "settings": settings, "machine": machine(), "faster_below": below,
        "records": records,
    }  # fmt: skip


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/sparsifiner-cpu.json")
    held = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    result = measure(progress=lambda line: print(line, file=sys.stderr))
    if "mechanisms" in held:
        result["mechanisms"] = held["mechanisms"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
