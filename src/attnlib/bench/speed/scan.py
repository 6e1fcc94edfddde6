"""Time and memory of the selective scan beside the recurrence, and of decoding against the number of tokens before.

Two recurrences: one token after the other (the specification), and the usual reference, which computes the decays and
entries of all tokens at once, (B, channels, N, S) numbers each, and then walks along them.

``attnlib bench --suite scan --out benchmarks/results`` writes ``scan-cpu.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...nn.scan.mamba import Mamba
from ...ops.scan import selective_scan
from .. import stats
from ..clock import interleave, limit_threads, machine, peak_bytes

#: (batch, channels, tokens, numbers of state): the first stages of a VMamba at 224 pixels; a Vim-Ti; a small decoder.
SHAPES = ((2, 192, 3136, 16), (2, 192, 784, 16), (2, 384, 197, 16), (1, 512, 1024, 16))
GROWTH = (1024, 2048, 4096, 8192)
BEFORE = (10, 1_000, 100_000)


def at_once(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The reference with all decays and entries held, channels first inside."""
    decay = (delta.transpose(1, 2).unsqueeze(-1) * A.unsqueeze(1)).exp()
    enters = torch.einsum("bnc,bns,bnc->bcns", delta, B, u)
    h, outs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[1]):
        h = decay[:, :, t] * h + enters[:, :, t]
        outs.append(torch.einsum("bcs,bs->bc", h, C[:, t]))
    return torch.stack(outs, 1)


RUNS: dict[str, Callable[..., Tensor]] = {
    "chunked": selective_scan,
    "eager": partial(selective_scan, backend="eager"),
    "reference": at_once,
}


def problem(batch: int, channels: int, n: int, size: int) -> list[Tensor]:
    """Inputs and steps as Mamba starts with them."""
    g = torch.Generator().manual_seed(0)
    u, B, C = (torch.randn(batch, n, width, generator=g) for width in (channels, size, size))
    delta = (torch.rand(batch, n, channels, generator=g) * 4.6 - 6.9).exp()
    return [u, delta, -torch.arange(1.0, size + 1).repeat(channels, 1), B, C]


def measure(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    growth: Sequence[int] = GROWTH,
    before: Sequence[int] = BEFORE,
    rounds: int = 5,
    longest_reference: int = 800,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Interleaved runs on one thread, forward and forward with backward.

    Args:
        shapes: (batch, channels, tokens, numbers of state).
        growth: numbers of tokens at which time and peak memory of the chunked form are taken, of the first shape.
        before: tokens that a layer has read before it decodes one.
        rounds: measurements per contender.
        longest_reference: tokens up to which the backward of ``"reference"`` is timed: it grows with the square of the
            tokens, to minutes at 3136.
        progress: told what is being measured.

    Returns:
        Settings, machine, a record per shape, growth and decoding; ``*_speedup`` is how many times as long the other
        takes, by minima.

    >>> sorted(measure([(1, 2, 8, 2)], (8, 16), (2,), rounds=1))
    ['decode', 'growth', 'machine', 'records', 'settings', 'what']
    """
    with limit_threads(1):
        return _measure(shapes, growth, before, rounds, longest_reference, progress)


def _measure(
    shapes: Sequence[tuple[int, int, int, int]], growth: Sequence[int], before: Sequence[int], rounds: int,
    longest: int, progress: Callable[[str], None] | None,
) -> dict[str, Any]:  # fmt: skip
    records = []
    for shape in shapes:
        given = problem(*shape)
        leaves = [t.clone().requires_grad_() for t in given]
        jobs = {(name, "forward"): partial(_forward, run, given) for name, run in RUNS.items()}
        slow = shape[2] > longest
        jobs |= {(n, "both"): partial(_both, run, leaves) for n, run in RUNS.items() if not (slow and n == "reference")}
        times = interleave(jobs, rounds, "cpu", progress)
        least = {job: timing.minimum for job, timing in times.items()}
        record: dict[str, Any] = {"shape": list(shape)}
        for what in ("forward", "both"):
            record[f"{what}_seconds"] = {name: least[name, what] for name in RUNS if (name, what) in least}
            for name in ("eager", "reference"):
                if (name, what) in least:
                    record[f"{what}_speedup_over_{name}"] = least[name, what] / least["chunked", what]
        records.append(record)
    seconds, peaks = [], []
    batch, channels, _, size = shapes[0]
    for n in growth:
        leaves = [t.requires_grad_() for t in problem(batch, channels, n, size)]
        run = partial(_both, selective_scan, leaves)
        seconds.append(interleave({"chunked": run}, rounds, "cpu", progress)["chunked"].minimum)
        peaks.append(peak_bytes(run))
    grown = {
        "sizes": list(growth), "both_seconds": seconds, "peak_bytes": peaks,
        "exponent": stats.growth_exponent(list(growth), seconds),
        "memory_exponent": stats.growth_exponent(list(growth), peaks),
    }  # fmt: skip
    settings = {"dtype": "float32", "rounds": rounds, "clock": "cpu", "threads": 1}
    return {
        "what": "selective scan", "settings": settings, "machine": machine(), "records": records, "growth": grown,
        "decode": _decode(before, rounds, progress),
    }  # fmt: skip


@torch.no_grad()
def _decode(before: Sequence[int], rounds: int, progress: Callable[[str], None] | None) -> dict[str, Any]:
    """Twenty steps of a layer behind so many tokens."""
    torch.manual_seed(0)
    layer = Mamba(dim=256).eval()
    token = torch.randn(1, 1, 256)
    states: dict[int, Any] = {}
    for n in before:
        state = None
        for start in range(0, n, 4096):
            _, state = layer.step(torch.randn(1, min(4096, n - start), 256), state)
        states[n] = state

    def steps(state: Any) -> None:
        for _ in range(20):
            _, state = layer.step(token, state)

    times = interleave({n: partial(steps, state) for n, state in states.items()}, rounds, "cpu", progress)
    return {
        "tokens": list(before), "seconds": [times[n].minimum / 20 for n in before],
        "state_elements": [states[n].numel() for n in before],
    }  # fmt: skip


@torch.no_grad()
def _forward(run: Callable[..., Tensor], given: Sequence[Tensor]) -> None:
    run(*given)


def _both(run: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    torch.autograd.grad(run(*leaves).sum(), list(leaves))
