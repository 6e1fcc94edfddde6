"""Time and memory of mechanisms against the number of tokens N."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.tiny import mix
from .. import stats
from ..clock import peak_bytes, seconds
from ..specs import Spec

SIDES = (8, 16, 24, 32, 48, 64)  # of square grids; sequences have the same numbers of tokens
GROUPS = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")


class Subject:
    """A mechanism ready to be timed at one size."""

    def __init__(self, spec: Spec, pattern: str, side: int, dim: int, num_heads: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        causal = pattern.startswith("causal")
        grid = (side * side,) if causal else (side, side)
        self.device = torch.device(device)
        self.mechanism: nn.Module = spec.make(causal, dim, num_heads).to(device).train()
        self.x = torch.randn(1, *grid, dim).to(device).requires_grad_()
        self.context = torch.randn(1, *grid, dim).to(device) if pattern.endswith("cross") else None

    def forward(self) -> Tensor:
        return mix(self.mechanism, self.x, self.context)[0]

    def both(self) -> None:
        """Forward and backward, leaving nothing behind."""
        self.forward().sum().backward()
        self.x.grad = None
        self.mechanism.zero_grad(set_to_none=True)

    def forward_only(self) -> None:
        with torch.no_grad():
            self.forward()

    def peak(self) -> int:
        """Most bytes that forward and backward hold at once."""
        return peak_bytes(self.both, self.device)


def measure_group(
    specs: Sequence[Spec],
    pattern: str,
    dim: int,
    num_heads: int,
    sides: Sequence[int] = SIDES,
    rounds: int = 3,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
    finished: Callable[[], None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Time forward, forward with backward, and count peak memory at growing N, mechanisms interleaved.

    Args:
        specs: who takes part; those whose traits forbid the pattern are returned as skipped.
        pattern: one of the four attention patterns; causal ones are sequences, the others square grids.
        dim: width.
        num_heads: heads.
        sides: square roots of the numbers of tokens.
        rounds: measurements per point; the median counts.
        device: where.
        progress: told what is being measured.
        finished: told when a size is done.

    Returns:
        One record per mechanism with ``sizes``, ``forward_seconds``, ``both_seconds``, ``peak_bytes`` and ``spread``
        (largest minus smallest time over the median, which tells a busy machine); and the skipped, each with a reason.
        A mechanism that fails at a size leaves there, and its record says why.
    """
    records: dict[str, dict[str, Any]] = {}
    skipped: list[dict[str, str]] = []
    running: list[Spec] = []
    for spec in specs:
        grid = (sides[0] ** 2,) if pattern.startswith("causal") else (sides[0], sides[0])
        reason = spec.why_not(pattern, grid, dim, num_heads)
        if reason:
            skipped.append({"mechanism": spec.full, "what": f"scaling, {pattern}", "reason": reason})
            continue
        running.append(spec)
        records[spec.full] = {
            "pattern": pattern,
            "mechanism": spec.full,
            "sizes": [],
            "forward_seconds": [],
            "both_seconds": [],
            "peak_bytes": [],
            "spread": [],
        }
    for side in sides:
        subjects: dict[str, Subject] = {}
        repeats: dict[str, int] = {}
        for spec in list(running):
            try:
                subject = Subject(spec, pattern, side, dim, num_heads, device)
                subject.both()
                once = seconds(subject.both, 1, subject.device)
                subjects[spec.full] = subject
                # Repeats of the smallest problems, so that a measurement is not mostly the clock's own resolution.
                repeats[spec.full] = max(1, min(10, int(0.004 / max(once, 1e-6))))
            except (ValueError, RuntimeError) as error:
                running.remove(spec)
                reason = f"N = {side**2}: {str(error).splitlines()[0]}"
                if records[spec.full]["sizes"]:
                    records[spec.full]["stopped"] = reason
                else:
                    skipped.append({"mechanism": spec.full, "what": f"scaling, {pattern}", "reason": reason})
        forward: dict[str, list[float]] = {name: [] for name in subjects}
        both: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in range(rounds):
            for name, subject in subjects.items():
                if progress is not None:
                    progress(f"{name}, N = {side**2}")
                forward[name].append(seconds(subject.forward_only, repeats[name], subject.device))
                both[name].append(seconds(subject.both, repeats[name], subject.device))
        for name, subject in subjects.items():
            record = records[name]
            record["sizes"].append(side**2)
            record["forward_seconds"].append(statistics.median(forward[name]))
            record["both_seconds"].append(statistics.median(both[name]))
            record["peak_bytes"].append(subject.peak())
            record["spread"].append((max(both[name]) - min(both[name])) / record["both_seconds"][-1])
        if finished is not None:
            finished()
    return [r for r in records.values() if r["sizes"]], skipped


def summarise(records: Sequence[dict[str, Any]], baseline: str | None) -> list[dict[str, Any]]:
    """Growth exponents, and the efficiency lengths against the baseline of the same pattern.

    Efficiency lengths are where the fitted curves cross; beyond the largest measured N they are extrapolated, and say
    so.
    """
    plain = {r["pattern"]: r for r in records if r["mechanism"] == baseline}
    out = []
    for r in records:
        row: dict[str, Any] = {"pattern": r["pattern"], "mechanism": r["mechanism"], "largest": max(r["sizes"])}
        for cost in ("both_seconds", "forward_seconds", "peak_bytes"):
            short = cost.split("_")[0]
            row[f"{short}_exponent"] = stats.growth_exponent(r["sizes"], r[cost])
            reference = plain.get(r["pattern"])
            if reference is None or reference is r or min(len(r["sizes"]), len(reference["sizes"])) < 3:
                row[f"{short}_efficiency_length"] = None
                continue
            length = stats.efficiency_length(
                stats.fit_curve(r["sizes"], r[cost]), stats.fit_curve(reference["sizes"], reference[cost])
            )
            row[f"{short}_efficiency_length"] = length
            row[f"{short}_extrapolated"] = max(r["sizes"]) < length < float("inf")
        out.append(row)
    return out
