"""Attention transfer through maps and without them: a step of LoLCATs' first stage, forward and backward.

The whole maps are what the authors' class computes: the softmax of the teacher, and the weights of window and linear
part, both (N, N) in float32. ``python -m attnlib.bench.speed.transfer benchmarks/results/transfer-cpu.json`` measures
again what that file holds.
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

from ...nn.linear.heads import output_error
from ...nn.linear.lolcats import LoLCATsHeads
from ...types import check_choice
from .. import stats
from ..clock import CLOCKS, interleave, limit_threads, machine, peak_bytes

SIZES = (256, 512, 1024, 2048)
LONGEST_QUADRATIC = 2048


def quadratic(heads: LoLCATsHeads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The loss with both maps built: ``softmax`` of all scores, and window and features as (N, N) weights."""
    n = q.shape[2]
    age = torch.arange(n)[:, None] - torch.arange(n)
    scores = q @ k.mT * heads.scale
    truth = scores.masked_fill(age < 0, float("-inf")).softmax(-1) @ v
    near = scores.masked_fill((age < 0) | (age >= heads.window_size), float("-inf"))
    assert heads.window_factor is not None
    soft = torch.exp(near - near.amax(-1, keepdim=True)) * torch.sigmoid(heads.window_factor).view(1, -1, 1, 1)
    linear = (heads.phi_q(q) @ heads.phi_k(k).mT).masked_fill(age < heads.window_size, 0.0)
    weights = soft + linear
    out = (weights @ v) / weights.sum(-1, keepdim=True)
    return (out - truth).square().mean()


def linear(heads: LoLCATsHeads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same loss: the teacher by the library's kernel, the student in chunks."""
    with torch.no_grad():
        truth = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale)
    return output_error(heads(q, k, v)[0], truth, torch.ones(q.shape[0], q.shape[2], dtype=torch.bool))


CONTENDERS: dict[str, Callable[[LoLCATsHeads, Tensor, Tensor, Tensor], Tensor]] = {
    "maps": quadratic, "chunks": linear
}  # fmt: skip


def measure(
    sizes: Sequence[int] = SIZES,
    heads: int = 9,
    head_dim: int = 64,
    window_size: int = 64,
    rounds: int = 7,
    clock: str = "wall",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved steps, their ratio, peak memory and growth exponents; the sizes of SmolLM2 by default.

    >>> found = measure(sizes=(16, 32), heads=1, head_dim=4, window_size=4, rounds=1)
    >>> sorted(found["records"][0])[:3]
    ['contender', 'exponent', 'memory_exponent']
    """
    check_choice("clock", clock, list(CLOCKS))
    records: dict[str, dict[str, Any]] = {}
    with limit_threads(1 if clock == "cpu" else None):
        for n in sizes:
            torch.manual_seed(0)
            q, k, v = torch.randn(3, 1, heads, n, head_dim)
            mixer = LoLCATsHeads(heads, head_dim, window_size=window_size)

            def step(name: str, q: Tensor = q, k: Tensor = k, v: Tensor = v, mixer: LoLCATsHeads = mixer) -> None:
                torch.autograd.grad(CONTENDERS[name](mixer, q, k, v), mixer.trained())

            def say(line: str, n: int = n) -> None:
                if progress is not None:
                    progress(f"N={n} {line}")

            times = interleave({name: partial(step, name) for name in CONTENDERS}, rounds, clock, say)
            for name in CONTENDERS:
                record = records.setdefault(name, {"contender": name, "sizes": [], "seconds": [], "peak_bytes": []})
                record["sizes"].append(n)
                record["seconds"].append(times[name].median)
                record["peak_bytes"].append(peak_bytes(partial(step, name)))
    for record in records.values():
        slow = records["maps"]["seconds"]
        record["times_as_fast"] = [a / b for a, b in zip(slow, record["seconds"], strict=True)]
        record["exponent"] = stats.growth_exponent(record["sizes"], record["seconds"])
        record["memory_exponent"] = stats.growth_exponent(record["sizes"], record["peak_bytes"])
    return {
        "what": "a step of attention transfer (LoLCATs, mean square of head outputs), forward and backward",
        "settings": {
            "batch": 1, "heads": heads, "head_dim": head_dim, "window_size": window_size, "dtype": "float32",
            "rounds": rounds, "clock": clock,
        },
        "machine": machine(),
        "records": list(records.values()),
    }  # fmt: skip


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/transfer-cpu.json")
    result = measure(
        clock=sys.argv[2] if len(sys.argv) > 2 else "wall", progress=lambda line: print(line, file=sys.stderr)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
