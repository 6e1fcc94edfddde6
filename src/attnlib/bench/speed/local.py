"""Time of two-dimensional neighborhood attention beside dense attention under a mask.

``python -m attnlib.bench.speed.local benchmarks/results/local-cpu.json`` measures again what that file holds. Where an
old NATTEN (before 0.20) with CPU kernels can be imported, it takes part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import masks
from ...grids import coordinates
from ...ops.neighborhood import neighborhood_attention
from ..clock import interleave, machine, ratio

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _contenders(side: int, kernel: int, flex: bool) -> tuple[dict[str, Operator], set[str]]:
    """Operators on q, k, v (B, H, N, D) and a relative table, and the names of those without a backward."""
    grid = (side, side)
    pattern = masks.neighborhood(grid, kernel)
    dense = pattern.dense(side * side)
    place = coordinates(grid)
    index = torch.zeros((), dtype=torch.long)
    for axis in range(2):
        step = (place[None, :, axis] - place[:, None, axis] + kernel - 1).clamp(0, 2 * kernel - 2)
        index = index * (2 * kernel - 1) + step

    def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table.flatten(1)[:, index].masked_fill(~dense, float("-inf"))[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    out: dict[str, Operator] = {
        "sdpa, dense mask": lambda q, k, v, t: F.scaled_dot_product_attention(q, k, v, attn_mask=dense),
        "neighborhood": lambda q, k, v, t: neighborhood_attention(q, k, v, grid, kernel),
        "sdpa, every pair": lambda q, k, v, t: F.scaled_dot_product_attention(q, k, v),
        "sdpa, dense mask and relative bias": biased,
        "neighborhood, relative bias": lambda q, k, v, t: neighborhood_attention(q, k, v, grid, kernel, bias_table=t),
    }
    forward_only = set()
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block = create_block_mask(pattern.mask_mod(), None, None, side * side, side * side, device="cpu")
        compiled: Any = torch.compile(flex_attention)
        out["flex, compiled"] = lambda q, k, v, t: compiled(q, k, v, block_mask=block)
        forward_only.add("flex, compiled")
    try:
        from natten.functional import na2d_av, na2d_qk
    except ImportError:
        return out, forward_only

    def natten(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(2, grid) for t in (q * q.shape[-1] ** -0.5, k, v))
        scores = na2d_qk(q, k, kernel_size=kernel, dilation=1, rpb=table)
        return na2d_av(scores.softmax(-1), v, kernel_size=kernel, dilation=1).flatten(2, 3)

    out["natten, CPU kernels"] = lambda q, k, v, t: natten(q, k, v, None)
    out["natten, CPU kernels, relative bias"] = natten
    return out, forward_only


def measure(
    side: int = 56,
    kernel: int = 7,
    heads: int = 4,
    head_dim: int = 32,
    rounds: int = 9,
    flex: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved runs, forward and forward with backward.

    Args:
        side: sides of the square map.
        kernel: keys per axis.
        heads: heads.
        head_dim: width of queries, keys and values.
        rounds: measurements per contender.
        flex: compile FlexAttention too (forward only; it has no backward on a CPU).
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine and one record per contender. Ratios are against the dense
        counterpart of the same problem: SDPA under the mask, and where there is a relative bias, under mask and bias.

    >>> measure(side=8, kernel=3, heads=1, head_dim=4, rounds=1, flex=False)["records"][1]["contender"]
    'neighborhood'
    """
    contenders, forward_only = _contenders(side, kernel, flex)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, side * side, head_dim, requires_grad=True) for _ in range(3))
    table = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, requires_grad=True)

    fixed = [t.detach() for t in (q, k, v, table)]  # FlexAttention refuses leaves on a CPU

    def forward(run: Operator) -> None:
        with torch.no_grad():
            run(*fixed)

    def both(run: Operator) -> None:
        torch.autograd.grad(run(q, k, v, table).sum(), (q, k, v, table), allow_unused=True)

    with torch.no_grad():
        reference = {False: contenders["sdpa, dense mask"](*fixed)}
        reference[True] = contenders["sdpa, dense mask and relative bias"](*fixed)
        for name, run in contenders.items():
            if name != "sdpa, every pair":
                error = float((run(*fixed) - reference["bias" in name]).abs().max())
                if not error < 1e-4:
                    raise AssertionError(f"{name} computes something else: it differs by {error:.1e}")
    jobs = {
        (name, what): partial(fn, run)
        for name, run in contenders.items()
        for what, fn in (("forward", forward), ("both", both))
        if not (what == "both" and name in forward_only)
    }
    times = interleave(jobs, rounds, progress=progress)
    records = []
    for name in contenders:
        record: dict[str, Any] = {"contender": name}
        base = "sdpa, dense mask and relative bias" if "bias" in name else "sdpa, dense mask"
        for what in ("forward", "both"):
            if (name, what) in times:
                record[f"{what}_seconds"] = times[name, what].median
                record[f"{what}_over_dense"] = ratio(times[name, what], times[base, what])["ratio"]
        records.append(record)
    settings: dict[str, Any] = {
        "batch": 1, "grid": [side, side], "kernel_size": kernel, "heads": heads, "head_dim": head_dim,
        "dtype": "float32", "rounds": rounds,
    }  # fmt: skip
    if any(name.startswith("natten") for name in contenders):
        settings["natten"] = getattr(sys.modules["natten"], "__version__", "unknown")
    return {
        "what": "two-dimensional neighborhood attention",
        "settings": settings,
        "machine": machine(),
        "records": records,
    }


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/local-cpu.json")
    result = measure(progress=lambda line: print(line, file=sys.stderr))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
