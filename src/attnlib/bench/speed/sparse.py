"""Time of block-sparse attention beside dense attention of the same length.

``python -m attnlib.bench.speed.sparse benchmarks/results/sparse-cpu.json`` measures again what that file holds about
the operator; what it holds about mechanisms beside their authors' code stays. With ``reused`` behind it, it measures
again only how a plan pays that serves several steps.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.block_mass import block_mass, heaviest_blocks
from ...ops.block_policies import topk_blocks
from ...ops.block_sparse import BlockPlan, block_sparse_attention
from ..clock import interleave, machine, ratio

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]

#: (queries per block, keys per block) of the plans that are measured.
BLOCKS = ((64, 64), (128, 128), (16, 64), (1, 128))


def _plan(heads: int, n: int, q_block: int, k_block: int, density: float) -> BlockPlan:
    """A plan of random blocks, another one for each head and query block."""
    scores = torch.rand(1, heads, -(-n // q_block), -(-n // k_block))
    return topk_blocks(scores, max(1, round(density * scores.shape[-1])), q_block, k_block, n)


def _flex(plan: BlockPlan, heads: int, n: int) -> Operator:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(plan.mask().mask_mod(), 1, heads, n, n, device="cpu")
    compiled: Any = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def _contenders(
    heads: int, n: int, density: float, blocks: Sequence[tuple[int, int]], flex: bool
) -> tuple[dict[str, Operator], set[str]]:
    """Operators on q, k, v (B, H, N, D), dense first, and the names of those without a backward."""
    out: dict[str, Operator] = {"dense, sdpa": F.scaled_dot_product_attention}
    forward_only: set[str] = set()
    for q_block, k_block in blocks:
        if k_block > n or q_block > n:
            continue
        plan = _plan(heads, n, q_block, k_block, density)

        def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan = plan) -> Tensor:
            return block_sparse_attention(q, k, v, plan)

        out[f"blocks of {q_block} queries and {k_block} keys"] = run
        if flex and q_block == k_block == 128:
            name = "flex, compiled, the same blocks of 128 and 128"
            out[name] = _flex(plan, heads, n)
            forward_only.add(name)
    return out, forward_only


def measure(
    n: int = 8192,
    density: float = 0.25,
    heads: int = 8,
    head_dim: int = 64,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    rounds: int = 7,
    backward: bool = True,
    flex: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved runs, forward and forward with backward.

    Args:
        n: queries and keys.
        density: share of key blocks that each query block reads.
        heads: heads.
        head_dim: width of queries, keys and values.
        blocks: (queries, keys) per block, one plan each.
        rounds: measurements per contender.
        backward: also measure forward with backward.
        flex: compile FlexAttention too, on the plan of 128 by 128 (forward only; it has no backward on a CPU).
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine and one record per contender. ``speedup`` is the median, over rounds,
        of dense time by this time in the same round, so that a machine busy for a while does not lean on either.

    >>> [r["contender"] for r in measure(64, 0.5, 1, 4, [(16, 16)], rounds=1)["records"]]
    ['dense, sdpa', 'blocks of 16 queries and 16 keys']
    """
    torch.manual_seed(0)
    contenders, forward_only = _contenders(heads, n, density, blocks, flex)
    leaves = [torch.randn(1, heads, n, head_dim, requires_grad=True) for _ in range(3)]
    fixed = [t.detach() for t in leaves]

    def forward(run: Operator) -> None:
        with torch.no_grad():
            run(*fixed)

    def both(run: Operator) -> None:
        torch.autograd.grad(run(*leaves).sum(), leaves)

    whats: dict[str, Callable[[Operator], None]] = {"forward": forward, **({"both": both} if backward else {})}
    jobs = {
        (name, what): partial(fn, run)
        for name, run in contenders.items()
        for what, fn in whats.items()
        if not (what == "both" and name in forward_only)
    }
    times = interleave(jobs, rounds, progress=progress)
    base = next(iter(contenders))
    records = []
    for name in contenders:
        record: dict[str, Any] = {"contender": name}
        for what in whats:
            if (name, what) in times:
                record[f"{what}_seconds"] = times[name, what].median
                record[f"{what}_speedup"] = ratio(times[base, what], times[name, what])["ratio"]
        records.append(record)
    settings = {
        "batch": 1, "tokens": n, "density": density, "heads": heads, "head_dim": head_dim, "dtype": "float32",
        "rounds": rounds,
    }  # fmt: skip
    return {"what": "block-sparse attention", "settings": settings, "machine": machine(), "records": records}


def reused(
    n: int = 8192,
    density: float = 0.25,
    heads: int = 8,
    head_dim: int = 64,
    block: int = 128,
    steps: int = 10,
    rounds: int = 5,
    clock: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A plan of the heaviest blocks, made once by their exact mass and executed ``steps`` times, beside dense steps.

    Queries and keys drift along the sequence, so that blocks differ and, with a budget per head, rows differ in length.

    Args:
        n, density, heads, head_dim, progress: as of :func:`measure`.
        block: queries and keys per block.
        steps: calls that one plan serves.
        rounds: measurements of the plan, and of one step of each kind.
        clock: as of :func:`attnlib.bench.clock.interleave`.

    Returns:
        Settings and a record for budgets per row and one for budgets per head: seconds of the plan and of a step,
        ``step_speedup`` of a step alone, and ``speedup = steps dense / (plan + steps sparse)``, the median over rounds.

    >>> [r["budget"] for r in reused(64, 0.5, 1, 4, 16, rounds=1)["records"]]
    ['row', 'head']
    """
    torch.manual_seed(0)
    anchors = torch.randn(2, heads, head_dim, max(2, n // (4 * block)))
    drift = [F.interpolate(some, n, mode="linear", align_corners=True).transpose(-2, -1) for some in anchors]
    q, k = (torch.randn(1, heads, n, head_dim) + some for some in drift)
    v = torch.randn(1, heads, n, head_dim)

    def plan(per: str) -> BlockPlan:
        return heaviest_blocks(block_mass(q, k, block, block).mass, 1 - density, block, block, n, per=per)

    budgets = ("row", "head")
    made = {per: plan(per) for per in budgets}
    jobs: dict[tuple[str, str], Callable[[], Any]] = {("dense", ""): partial(F.scaled_dot_product_attention, q, k, v)}
    for per in budgets:
        jobs["plan", per] = partial(plan, per)
        jobs["step", per] = partial(block_sparse_attention, q, k, v, made[per])
    with torch.no_grad():
        times = interleave(jobs, rounds, clock, progress)
    dense = times["dense", ""]
    records = []
    for per in budgets:
        at, step = times["plan", per], times["step", per]
        whole = [steps * d / (p + steps * s) for d, p, s in zip(dense.seconds, at.seconds, step.seconds, strict=True)]
        records.append(
            {
                "budget": per, "density": float(made[per].density), "plan_seconds": at.median,
                "step_seconds": step.median, "dense_seconds": dense.median,
                "step_speedup": ratio(dense, step)["ratio"], "speedup": statistics.median(whole),
            }
        )  # fmt: skip
    settings = {
        "batch": 1, "tokens": n, "heads": heads, "head_dim": head_dim, "block": block, "steps": steps,
        "dtype": "float32", "rounds": rounds,
    }  # fmt: skip
    return {"settings": settings, "machine": machine(), "records": records}


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/sparse-cpu.json")
    held = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}

    def told(line: str) -> None:
        print(line, file=sys.stderr)

    if sys.argv[2:] == ["reused"]:
        result = {**held, "reused": reused(progress=told)}
    else:
        kept = {"mechanisms": held["mechanisms"]} if "mechanisms" in held else {}
        result = {**measure(flex=True, progress=told), "reused": reused(progress=told), **kept}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
