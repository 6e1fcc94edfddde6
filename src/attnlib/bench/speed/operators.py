"""Timing of operators and mechanisms: interleaved runs, medians, ratios to SDPA and to the measured GEMM peak.

Candidates take turns (A B A B ...), so that whatever else the machine does falls on all of them alike; what counts is a
ratio within one run, never a time against a time of another day.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...masks import blocks, causal, sliding_window
from ...normalizers import Sigmoid, sigmoid_bias
from ...ops import attention
from ...types import check_choice
from ..clock import Run, gemm_peak, interleave, limit_threads, load, machine, peak_bytes, ratio
from ..stats import growth_exponent


def _qkv(n: int, m: int | None = None, heads: int = 8, dim: int = 64, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (n, n if m is None else m, n if m is None else m)
    q, k, v = (torch.randn(batch, heads, s, dim, generator=generator).requires_grad_() for s in sizes)
    return q, k, v


def _forward(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return attention(q, k, v, **call)

    return run


def _both(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Run:
    grad = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(attention(q, k, v, **call), (q, k, v), grad)


class _Recorder:
    """Collects rows of one suite."""

    def __init__(self, repeats: int, clock: str, progress: Callable[[str], None]):
        self.repeats, self.clock, self.progress = repeats, clock, progress
        self.rows: list[dict[str, Any]] = []
        self.peak = gemm_peak(clock=clock)

    def time(
        self,
        case: str,
        what: str,
        candidates: Mapping[str, Run],
        reference: str,
        flops: Mapping[str, float] | None = None,
    ) -> None:
        """One interleaved run; ``flops`` are those a candidate needs, not those it does."""
        self.progress(f"{case}, {what}: {', '.join(candidates)}")
        timings = interleave(candidates, self.repeats, self.clock)
        for name, timing in timings.items():
            row: dict[str, Any] = {
                "case": case,
                "what": what,
                "candidate": name,
                "median_s": timing.median,
                "min_s": timing.minimum,
                "reference": reference,
                **ratio(timing, timings[reference]),
            }
            if flops is not None and name in flops:
                row["gemm_fraction"] = flops[name] / timing.minimum / self.peak
            self.rows.append(row)


def _suite_normalizers(record: _Recorder, n: int = 4096) -> None:
    q, k, v = _qkv(n)
    calls: dict[str, dict[str, Any]] = {
        "sdpa softmax": dict(backend="sdpa"),
        "tiled softmax": dict(backend="tiled"),
        "tiled sigmoid": dict(backend="tiled", normalizer=Sigmoid(sigmoid_bias(n))),
        "tiled relu": dict(backend="tiled", normalizer="relu"),
        "tiled softplus_l1": dict(backend="tiled", normalizer="softplus_l1"),
        "tiled clipped_softmax": dict(backend="tiled", normalizer="clipped_softmax"),
        "eager sigmoid": dict(backend="eager", normalizer=Sigmoid(sigmoid_bias(n))),
        "eager clipped_softmax": dict(backend="eager", normalizer="clipped_softmax"),
    }
    work = 4.0 * 8 * n * n * 64
    case = f"dense, N={n}, 8 heads x 64, float32"
    for what, make, times in (("forward", _forward, 1.0), ("forward+backward", _both, 3.5)):
        runs = {name: make(q, k, v, **call) for name, call in calls.items()}
        record.time(case, what, runs, "sdpa softmax", {name: work * times for name in runs})


def _suite_sigmoid(record: _Recorder, n: int = 4096, counts: Sequence[int] = (1, 2)) -> None:
    q, k, v = _qkv(n)
    work = 14.0 * 8 * n * n * 64
    for count in counts:
        if count > (os.cpu_count() or 1):
            record.progress(f"{count} threads: left out, there are fewer cores")
            continue
        with limit_threads(count):
            runs = {
                "sdpa softmax": _both(q, k, v, backend="sdpa"),
                "tiled sigmoid": _both(q, k, v, backend="tiled", normalizer=Sigmoid(sigmoid_bias(n))),
            }
            case = f"dense, N={n}, 8 heads x 64, float32, {count} thread{'s' if count > 1 else ''}"
            before = load()
            record.time(case, "forward+backward", runs, "sdpa softmax", {name: work for name in runs})
            for row in record.rows[-len(runs) :]:
                row.update(threads=count, load=[before, load()])


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Run | None:
    """FlexAttention as its users call it, or ``None`` where it cannot be compiled."""
    try:
        run = _forward(q, k, v, mask=mask, backend="flex")
        run()
    except Exception:  # no compiler, or one that fails: the suite goes on without
        return None
    return run


def _suite_window(record: _Recorder, n: int = 4096, window: int = 513) -> None:
    q, k, v = _qkv(n)
    mask = sliding_window(window)
    area = float(mask.count(n).sum())
    case = f"sliding window {window}, N={n}, 8 heads x 64, float32"
    runs = {
        "tiled": _forward(q, k, v, mask=mask, backend="tiled"),
        "sdpa masked": _forward(q, k, v, mask=mask, backend="sdpa"),
        "sdpa dense": _forward(q, k, v, backend="sdpa"),
    }
    flex = _flex(q, k, v, mask)
    if flex is not None:
        runs["flex compiled"] = flex
    record.time(
        case, "forward", runs, "sdpa masked" if flex is None else "flex compiled",
        {name: 4.0 * 8 * area * 64 for name in runs},
    )  # fmt: skip
    runs = {
        "tiled": _both(q, k, v, mask=mask, backend="tiled"),
        "sdpa masked": _both(q, k, v, mask=mask, backend="sdpa"),
        "sdpa dense": _both(q, k, v, backend="sdpa"),
    }
    record.time(case, "forward+backward", runs, "sdpa masked", {name: 14.0 * 8 * area * 64 for name in runs})


def _suite_block_sparse(record: _Recorder, n: int = 8192, block: int = 128, density: float = 0.25) -> None:
    q, k, v = _qkv(n)
    side = n // block
    order = torch.rand(side, side, generator=torch.Generator().manual_seed(2)).argsort(-1)
    chosen = order < round(density * side)  # the same number of blocks in every row, scattered
    mask = blocks(chosen, block, block)
    calls: dict[str, dict[str, Any]] = {
        "sdpa dense": dict(backend="sdpa"),
        "tiled dense": dict(backend="tiled"),
        "tiled blocks": dict(mask=mask, backend="tiled"),
    }
    case = f"blocks of {block}, density {float(chosen.float().mean()):.2f}, N={n}, 8 heads x 64, float32"
    for what, make, times in (("forward", _forward, 1.0), ("forward+backward", _both, 3.5)):
        runs = {name: make(q, k, v, **call) for name, call in calls.items()}
        work = 4.0 * 8 * n * n * 64 * times
        needs = {name: work * (float(chosen.float().mean()) if "mask" in calls[name] else 1.0) for name in runs}
        record.time(case, what, runs, "sdpa dense", needs)


def _suite_decode(record: _Recorder, m: int = 4096, batch: int = 8) -> None:
    for n in (1, 16):
        q, k, v = _qkv(n, m, batch=batch)
        at = torch.arange(m - n, m)
        calls: dict[str, dict[str, Any]] = {
            "sdpa": dict(mask=causal(), q_pos=at, backend="sdpa"),
            "tiled": dict(mask=causal(), q_pos=at, backend="tiled"),
            "eager": dict(mask=causal(), q_pos=at, backend="eager"),
            "automatic": dict(mask=causal(), q_pos=at),
            "automatic sigmoid": dict(mask=causal(), q_pos=at, normalizer="sigmoid"),
        }
        runs = {name: _forward(q, k, v, **call) for name, call in calls.items()}
        record.time(f"{n} new queries, {m} keys, batch {batch}, 8 heads x 64, float32", "decode", runs, "sdpa")


def _suite_memory(record: _Recorder, sizes: Sequence[int] = (1024, 2048, 4096, 8192)) -> None:
    heads = 2
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "tiled dense": lambda n: dict(backend="tiled"),
        "tiled window 257": lambda n: dict(backend="tiled", mask=sliding_window(257)),
        "tiled sigmoid": lambda n: dict(backend="tiled", normalizer="sigmoid"),
        "sdpa dense": lambda n: dict(backend="sdpa"),
        "sdpa window 257": lambda n: dict(backend="sdpa", mask=sliding_window(257)),
        "eager dense": lambda n: dict(backend="eager"),
    }
    for name, make in makers.items():
        peaks = []
        for n in sizes:
            record.progress(f"peak memory of {name}, N={n}")
            q, k, v = _qkv(n, heads=heads)
            run = _both(q, k, v, **make(n))
            run()  # what is remembered between calls is not counted
            peaks.append(peak_bytes(run))
        record.rows.append(
            {
                "case": f"{heads} heads x 64, float32",
                "what": "peak bytes of forward+backward beyond q, k, v",
                "candidate": name,
                "n": list(sizes),
                "peak_bytes": peaks,
                "exponent": growth_exponent(sizes, peaks),
            }
        )


SUITES: dict[str, Callable[..., None]] = {
    "normalizers": _suite_normalizers,
    "sigmoid": _suite_sigmoid,
    "window": _suite_window,
    "block-sparse": _suite_block_sparse,
    "decode": _suite_decode,
    "memory": _suite_memory,
}


def bench_operators(
    suite: str,
    out: str | Path | None = None,
    *,
    repeats: int = 7,
    threads: int | None = None,
    clock: str = "wall",
    progress: Callable[[str], None] = lambda line: None,
    **sizes: Any,
) -> dict[str, Any]:
    """Measure one suite of operator benchmarks.

    Args:
        suite: one of :data:`SUITES`.
        out: JSON file to write; its other suites are kept.
        repeats: rounds of every interleaved run.
        threads: threads of PyTorch; its own choice by default.
        clock: one of :data:`CLOCKS`.
        progress: called with a line before every measurement.
        sizes: sizes of the suite, e.g. ``n=1024``.

    Returns:
        The suite: ``machine``, ``repeats``, ``clock``, ``load``, ``gemm_peak_flops`` and ``rows``.

    Raises:
        ValueError: for an unknown suite.
    """
    check_choice("suite", suite, list(SUITES))
    with limit_threads(threads):
        before = load()
        record = _Recorder(repeats, clock, progress)
        SUITES[suite](record, **sizes)
        result = {
            "machine": machine(),
            "repeats": repeats,
            "clock": clock,
            "load": [before, load()],
            "gemm_peak_flops": record.peak,
            "rows": record.rows,
        }
    if out is not None:
        path = Path(out)
        known = json.loads(path.read_text()) if path.exists() else {"suites": {}}
        known["suites"][suite] = result
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved: an interrupt or a full disk cannot leave half a file in place of a whole one.
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        beside.replace(path)
    return result


def run_suite(suite: str = "all", out: str | Path = "benchmarks/results", **options: Any) -> dict[str, dict[str, Any]]:
    """Measure one suite or ``"all"`` of them into ``operators-cpu.json`` in the folder ``out``.

    Options are those of :func:`bench_operators`. Returns the suites by name.

    Raises:
        ValueError: for an unknown suite.
    """
    check_choice("suite", suite, [*SUITES, "all"])
    path = Path(out) / "operators-cpu.json"
    return {name: bench_operators(name, path, **options) for name in (SUITES if suite == "all" else [suite])}


def bench_pair(name: str, ours: Run, theirs: Run, *, repeats: int = 7, clock: str = "wall") -> dict[str, Any]:
    """Time two callables that do the same, in turn.

    Returns:
        ``name``, medians and minima in seconds and ``speedup``: how many times as fast ours is (at least 1 is good).

    >>> bench_pair("same", lambda: 1, lambda: 1, repeats=3)["name"]
    'same'
    """
    timings = interleave({"ours": ours, "theirs": theirs}, repeats, clock)
    return {
        "name": name,
        "ours_median_s": timings["ours"].median,
        "ours_min_s": timings["ours"].minimum,
        "theirs_median_s": timings["theirs"].median,
        "theirs_min_s": timings["theirs"].minimum,
        "speedup": ratio(timings["theirs"], timings["ours"])["ratio"],
        "speedup_of_minima": ratio(timings["theirs"], timings["ours"])["ratio_of_minima"],
    }


def bench_mechanism(
    name: str,
    grid: Sequence[int],
    *,
    dim: int = 256,
    num_heads: int = 8,
    batch: int = 1,
    repeats: int = 5,
    clock: str = "wall",
    threads: int | None = None,
    **config: Any,
) -> dict[str, Any]:
    """Time a registered mechanism against ``softmax-attention`` of equal width, heads and grid.

    Args:
        name: registry name.
        grid: grid of the input, ``x`` is (batch, *grid, dim).
        config: further settings of the mechanism; ``causal`` goes to the reference too.

    Returns:
        ``forward`` (inference), ``backward`` (a training step: forward and backward) and, for mechanisms that stream,
        ``decode`` (one token after ``grid[0]``): each with seconds of both and their ratio.

    Raises:
        ValueError: an unknown mechanism, or settings it does not take.
    """
    import inspect

    from ...nn.registry import create, find

    if not grid or min(grid) < 1:
        raise ValueError(f"grid must have at least one axis of at least one token, got {tuple(grid)}")
    shared = {"causal": config["causal"]} if "causal" in config else {}
    takes = inspect.signature(find(name)).parameters
    heads = {"num_heads": num_heads} if "num_heads" in takes else {}
    torch.manual_seed(0)
    pair = {
        name: create(name, dim=dim, **heads, **config),
        "softmax-attention": create("softmax-attention", dim=dim, num_heads=num_heads, **shared),
    }
    if name == "softmax-attention":
        pair = {name: pair[name]}
    x = torch.randn(batch, *grid, dim)
    result: dict[str, Any] = {"name": name, "grid": list(grid), "dim": dim, "num_heads": num_heads, "batch": batch}
    result["config"] = {key: repr(value) for key, value in config.items()}

    def inference(module: torch.nn.Module) -> Run:
        def run() -> Any:
            with torch.no_grad():
                return module(x)

        return run

    def training(module: torch.nn.Module) -> Run:
        def run() -> Any:
            source = x.detach().requires_grad_()
            module.zero_grad(set_to_none=True)
            module(source).sum().backward()

        return run

    def decoding(module: Any) -> Run:
        with torch.no_grad():
            _, state = module.step(x)
            token = x[:, :1]

        def run() -> Any:
            with torch.no_grad():
                return module.step(token, state)

        return run

    def report(runs: dict[str, Run]) -> dict[str, Any]:
        timings = interleave(runs, repeats, clock)
        out: dict[str, Any] = {"median_s": timings[name].median, "min_s": timings[name].minimum}
        if name != "softmax-attention" and "softmax-attention" in timings:
            reference = timings["softmax-attention"]
            out.update(softmax_median_s=reference.median, softmax_min_s=reference.minimum)
            out.update(ratio(timings[name], reference))
        return out

    with limit_threads(threads):
        for module in pair.values():
            module.eval()
        result["forward"] = report({key: inference(module) for key, module in pair.items()})
        if pair[name].traits.streaming and len(grid) == 1:
            able = {key: m for key, m in pair.items() if m.traits.streaming}
            result["decode"] = report({key: decoding(module) for key, module in able.items()})
        for module in pair.values():
            module.train()
        result["backward"] = report({key: training(module) for key, module in pair.items()})
    return result
