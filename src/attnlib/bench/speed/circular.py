"""Time of CLEAR's circular windows on images beside dense attention under a mask.

``attnlib bench --suite circular --out benchmarks/results`` measures again what ``circular-cpu.json`` holds. Tokens of
the image read a circle around themselves and all text, text reads everything; the mask of the dense operator is made
beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...grids import Layout
from ...nn.local.clear import clear_attention, clear_mask
from ..clock import interleave, machine, ratio

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
MASKED = "sdpa, dense mask"


def record(
    side: int, text: int, radius: float, heads: int, head_dim: int, rounds: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds and ratios for one image, forward and with gradients.

    >>> sorted(record(6, 2, 2, 1, 4, 1)["forward"])
    ['circular window', 'sdpa, dense mask', 'sdpa, every pair']
    """
    torch.manual_seed(0)
    runs = [("text", text)] if text else []
    layout = Layout((*runs, ("image", (side, side))))
    n = side * side + text
    dense = clear_mask(layout, radius).dense(n)
    contenders: dict[str, Run] = {
        MASKED: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense),
        "circular window": lambda q, k, v: clear_attention(q, k, v, layout, radius),
        "sdpa, every pair": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    }
    q, k, v = (torch.randn(1, heads, n, head_dim, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        error = float((contenders["circular window"](q, k, v) - contenders[MASKED](q, k, v)).abs().max())
    if not error < 1e-4:
        raise AssertionError(f"the circular window computes something else: it differs by {error:.1e}")

    def infer(run: Run) -> None:
        with torch.no_grad():
            run(q, k, v)

    def train(run: Run) -> None:
        torch.autograd.grad(run(q, k, v).sum(), (q, k, v))

    found: dict[str, Any] = {
        "side": side, "text": text, "radius": radius, "density": float(dense.float().mean()), "error": error
    }  # fmt: skip
    for what, job in (("forward", infer), ("training", train)):
        times = interleave(
            {name: partial(job, run) for name, run in contenders.items()}, rounds, clock="cpu", progress=progress
        )
        found[what] = {
            name: {
                "seconds": times[name].minimum,
                "times_as_fast": ratio(times[MASKED], times[name])["ratio_of_minima"],
            }
            for name in contenders
        }
    return found


def measure(
    progress: Callable[[str], None] | None = None,
    images: Sequence[tuple[int, int]] = ((32, 0), (64, 0), (64, 512)),
    radius: float = 8,
    heads: int = 2,
    head_dim: int = 64,
    rounds: int = 3,
) -> dict[str, Any]:
    """Circular windows against the same attention under a dense mask, and against all pairs.

    Args:
        progress: told of every round.
        images: sides, and tokens of text beside them.
        radius: of the circle, its boundary excluded.
        heads, head_dim: of queries, keys and values.
        rounds: measurements of each.

    Returns:
        Plain values, for JSON.
    """
    records = [record(side, text, radius, heads, head_dim, rounds, progress) for side, text in images]
    return {
        "what": "circular windows on images against dense attention under a mask", "machine": machine(),
        "heads": heads, "head_dim": head_dim, "rounds": rounds, "records": records,
    }  # fmt: skip
