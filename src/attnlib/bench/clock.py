"""One clock for everything that is timed.

Candidates take turns (A B A B ...), so that whatever else the machine does falls on all of them alike; what counts is a
ratio within one run, never a time against a time of another day.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import attnlib

from ..checks import check_choice, check_int

Run = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)

#: Clocks: ``"wall"``, or ``"cpu"`` for the processor time of this process, which other processes on a shared machine
#: disturb least (meaningful as a ratio with one thread).
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def now(clock: str = "wall") -> float:
    """Seconds of one of :data:`CLOCKS`; only differences mean something.

    >>> now() <= now()
    True
    """
    return CLOCKS[clock]()


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)


def interleave(
    candidates: Mapping[Name, Run],
    repeats: int = 7,
    clock: str = "wall",
    progress: Callable[[str], None] | None = None,
) -> dict[Name, Timing]:
    """Run all candidates in turn, ``repeats`` times after one round that does not count.

    Args:
        candidates: what to run, by name.
        repeats: rounds that count.
        clock: one of :data:`CLOCKS`.
        progress: told the round and the candidate, outside the measurement.

    Raises:
        ValueError: for fewer than one repeat or an unknown clock.

    >>> sorted(interleave({"a": lambda: 1, "b": lambda: 2}, repeats=2))
    ['a', 'b']
    """
    check_int("repeats", repeats, least=1)
    check_choice("clock", clock, list(CLOCKS))
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for done in range(repeats + 1):
            for name, fn in candidates.items():
                if progress is not None:
                    what = ", ".join(map(str, name)) if isinstance(name, tuple) else name
                    progress(f"round {done} of {repeats}: {what}")
                start = CLOCKS[clock]()
                fn()
                if done:
                    seconds[name].append(CLOCKS[clock]() - start)
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def seconds(fn: Run, repeats: int = 1, device: torch.device | str = "cpu") -> float:
    """Wall-clock seconds of one call of ``fn``: the mean of ``repeats`` in a row, waiting for the device too."""
    _await(device)
    start = now()
    for _ in range(repeats):
        fn()
    _await(device)
    return (now() - start) / repeats


def _await(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def ratio(ours: Timing, reference: Timing) -> dict[str, float]:
    """How many times as long ``ours`` takes: per round, of which the median; and of the fastest rounds."""
    rounds = [a / b for a, b in zip(ours.seconds, reference.seconds, strict=True)]
    return {"ratio": statistics.median(rounds), "ratio_of_minima": ours.minimum / reference.minimum}


def peak_bytes(fn: Run, device: torch.device | str = "cpu") -> int:
    """Most bytes that live at once while ``fn`` runs, from the allocator's own record.

    What lives before does not count; what custom operators and fused kernels allocate inside does.

    Raises:
        ValueError: for a device whose allocator keeps no record.

    >>> peak_bytes(lambda: torch.zeros(1000) + 1) >= 4000
    True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if kind != "cpu":
        raise ValueError(f"device={kind!r} keeps no record of its memory; possible are 'cpu' and 'cuda'")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = fn()
        del result
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what native code writes to standard error: the profiler announces every start and stop there."""
    sys.stderr.flush()
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def gemm_peak(size: int = 2048, repeats: int = 7, clock: str = "wall") -> float:
    """Floating-point operations per second of the fastest square float32 matrix product."""
    a = torch.randn(size, size)
    out = torch.empty_like(a)
    return 2 * size**3 / interleave({"mm": lambda: torch.mm(a, a, out=out)}, repeats, clock)["mm"].minimum


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What was measured on: processor, cores, threads, software, load. No names of hosts, users or places.

    Args:
        device: where tensors were; an accelerator's name is added.
    """
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    affinity = getattr(os, "sched_getaffinity", None)
    device = torch.device(device)
    found = {
        "cpu": model,
        "architecture": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attnlib": attnlib.__version__,
        "load": load(),
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def load() -> float | None:
    """Programs that wanted a processor during the last minute, where the system counts them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@contextmanager
def limit_threads(number: int | None) -> Iterator[None]:
    """So many threads of PyTorch inside, as before after; ``None`` leaves them alone."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
