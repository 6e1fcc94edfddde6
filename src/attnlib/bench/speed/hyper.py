"""Time and error of HyperAttention beside causal softmax attention of the same length.

``attnlib bench --suite hyper`` measures it again. Keys lie around centers and queries point at those that are near
theirs, so that weights are as uneven as the method expects; ``error`` is the norm of the difference over that of the
output. Errors on random queries and keys, whose weights are nearly even, are given beside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.hyper import DRAWS, hyper_attention
from ..clock import interleave, machine, ratio

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


def _tokens(n: int, heads: int, width: int, planted: bool) -> list[Tensor]:
    q, k, v = (torch.randn(1, heads, n, width) for _ in range(3))
    if planted:
        centers = torch.randn(1, heads, 64, width)
        q, k = (1.2 * centers[:, :, torch.randint(64, (n,))] + 0.2 * t for t in (q, k))
    return [q, k, v]


def measure(
    n: int = 16384,
    heads: int = 2,
    width: int = 64,
    block_size: int = 256,
    sample_size: int = 256,
    min_seq_len: int = 4096,
    rounds: int = 3,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved forward runs, and errors.

    Args:
        n: tokens.
        heads: heads.
        width: of a head.
        block_size, sample_size, min_seq_len: of :func:`attnlib.ops.hyper.hyper_attention`.
        rounds: measurements per contender.
        progress: told what is being measured.

    >>> [r["contender"] for r in measure(64, 1, 4, 8, 8, 16, rounds=1)["records"]]
    ['causal, sdpa', 'blocks by hash', 'blocks by rank, as released']
    """
    torch.manual_seed(0)
    directions, draws = torch.randn(width, 7), torch.randint(DRAWS, (heads, sample_size))

    def hyper(q: Tensor, k: Tensor, v: Tensor, strict: bool) -> Tensor:
        out: Tensor = hyper_attention(
            q, k, v, directions, draws, block_size=block_size, sample_size=sample_size, min_seq_len=min_seq_len,
            causal=True, strict=strict,
        )  # fmt: skip
        return out

    runs: dict[str, Operator] = {
        "causal, sdpa": partial(F.scaled_dot_product_attention, is_causal=True),
        "blocks by hash": partial(hyper, strict=True),
        "blocks by rank, as released": partial(hyper, strict=False),
    }
    planted, even = _tokens(n, heads, width, True), _tokens(n, heads, width, False)
    with torch.no_grad():
        times = interleave({name: partial(run, *planted) for name, run in runs.items()}, rounds, progress=progress)
        exact = [runs["causal, sdpa"](*t) for t in (planted, even)]
        records = []
        for name, run in runs.items():
            errors = [float((run(*t) - y).norm() / y.norm()) for t, y in zip((planted, even), exact, strict=True)]
            records.append(
                {
                    "contender": name, "seconds": times[name].median,
                    "speedup": ratio(times["causal, sdpa"], times[name])["ratio"],
                    "error": errors[0], "error_of_random_tokens": errors[1],
                }
            )  # fmt: skip
    settings = {
        "tokens": n, "heads": heads, "head_dim": width, "block_size": block_size, "sample_size": sample_size,
        "min_seq_len": min_seq_len, "dtype": "float32", "rounds": rounds,
    }  # fmt: skip
    return {"what": "HyperAttention", "settings": settings, "machine": machine(), "records": records}
