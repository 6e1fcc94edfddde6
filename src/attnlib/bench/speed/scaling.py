"""Time and memory of mechanisms against the number of tokens N."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.tiny import mix
from .. import stats
from ..clock import now, peak_bytes
from ..specs import Spec

SIDES = (8, 16, 24, 32, 48, 64)  # of square grids; sequences have the same numbers of tokens
GROUPS = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")


class Subject:
    """A mechanism ready to be timed at one size."""

    def __init__(self, spec: Spec, pattern: str, side: int, dim: int, num_heads: int) -> None:
        torch.manual_seed(0)
        causal = pattern.startswith("causal")
        grid = (side * side,) if causal else (side, side)
        self.mechanism: nn.Module = spec.make(causal, dim, num_heads).train()
        self.x = torch.randn(1, *grid, dim, requires_grad=True)
        self.context = torch.randn(1, *grid, dim) if pattern.endswith("cross") else None

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


def measure_group(
    specs: Sequence[Spec],
    pattern: str,
    dim: int,
    num_heads: int,
    seconds: float,
    sides: Sequence[int] = SIDES,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Time forward, forward with backward, and count peak memory at growing N, mechanisms interleaved.

    Args:
        specs: who takes part; those whose traits forbid the pattern are returned as skipped.
        pattern: one of the four attention patterns; causal ones are sequences, the others square grids.
        dim: width.
        num_heads: heads.
        seconds: rough limit; a mechanism leaves before a size that would not fit its share.
        sides: square roots of the numbers of tokens.
        rounds: measurements per point, at least two when time is short; the median counts.
        progress: told what is being measured.

    Returns:
        One record per mechanism with ``sizes``, ``forward_seconds``, ``both_seconds``, ``peak_bytes`` and ``spread``
        (largest minus smallest time over the median, which tells a busy machine); and the skipped, each with a reason.
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
    began = now()
    last: dict[str, float] = {}
    previous = sides[0]
    for side in sides:
        growth = (side / previous) ** 4  # quadratic in N: the worst that is common
        left = seconds - (now() - began)
        share = left / max(1, len(running)) / max(1, len(sides) - sides.index(side))
        subjects: dict[str, Subject] = {}
        for spec in list(running):
            if last.get(spec.full, 0.0) * growth * 4 > max(share, 0.02 * seconds / len(specs)):
                running.remove(spec)
                records[spec.full]["stopped"] = f"N = {side**2} would not fit the time"
                continue
            try:
                subject = Subject(spec, pattern, side, dim, num_heads)
                start = now()
                subject.both()
                last[spec.full] = now() - start
                subjects[spec.full] = subject
            except (ValueError, RuntimeError) as error:
                running.remove(spec)
                reason = f"N = {side**2}: {str(error).splitlines()[0]}"
                if records[spec.full]["sizes"]:
                    records[spec.full]["stopped"] = reason
                else:
                    skipped.append({"mechanism": spec.full, "what": f"scaling, {pattern}", "reason": reason})
        forward: dict[str, list[float]] = {name: [] for name in subjects}
        both: dict[str, list[float]] = {name: [] for name in subjects}
        for done in range(rounds):
            if done > 1 and now() - began > seconds:
                break
            for name, subject in subjects.items():
                if progress is not None:
                    progress(f"{name}, N = {side**2}")
                # Repeats of the smallest problems, so that a measurement is not mostly the clock's own resolution.
                repeats = max(1, min(20, int(0.004 / max(last[name], 1e-6))))
                forward[name].append(_seconds(subject.forward_only, repeats))
                both[name].append(_seconds(subject.both, repeats))
        for name, subject in subjects.items():
            record = records[name]
            record["sizes"].append(side**2)
            record["forward_seconds"].append(statistics.median(forward[name]))
            record["both_seconds"].append(statistics.median(both[name]))
            record["peak_bytes"].append(peak_bytes(subject.both))
            record["spread"].append((max(both[name]) - min(both[name])) / record["both_seconds"][-1])
            last[name] = min(both[name])
        previous = side
    return [r for r in records.values() if r["sizes"]], skipped


def _seconds(fn: Callable[[], None], repeats: int) -> float:
    start = now()
    for _ in range(repeats):
        fn()
    return (now() - start) / repeats


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
