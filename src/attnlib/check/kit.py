"""Running the kit: as a function, as a test, from the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..types import Traits
from . import causality, dtype, gradients, growth, purity, robustness, shape, tracing, validity  # noqa: F401
from .case import Case
from .report import Finding, Report
from .subject import CLAIMS, Claim, Evidence, NotClaimed, Refuted, Subject

#: The order of reports: by theme.
ORDER = (
    "traits", "patterns", "resolution", "grid ranks", "layout", "extras", "permutation", "causality", "streaming",
    "no streaming", "validity", "mask", "batch", "batch sizes", "work", "memory", "gradient", "losses", "checkpointing",
    "plan", "no plan", "float32", "bfloat16", "autocast", "compile", "export", "copies", "deploy", "inputs untouched",
    "no hidden state", "bad arguments",
)  # fmt: skip


def _examine(entry: Claim, s: Subject, probe: bool) -> Finding:
    start = time.perf_counter()
    unclaimed = entry.claimed(s)

    def found(status: str, why: str, **rest: Any) -> Finding:
        return Finding(entry.name, status, why, seconds=round(time.perf_counter() - start, 4), **rest)

    if unclaimed is not None and not (probe and entry.probe):
        return found("skip", unclaimed)
    try:
        result = entry.test(s)
        result = Evidence(result) if isinstance(result, str) else result
        if unclaimed is not None:
            return found("skip", f"{unclaimed}; it would hold: {result.why}", measured=result.measured)
        return found("pass", result.why, measured=result.measured, limit=result.limit, loose=result.loose)
    except NotClaimed as reason:
        return found("skip", str(reason))
    except Refuted as reason:
        if unclaimed is not None:
            return found("skip", f"{unclaimed}; it would not hold: {reason.why}", measured=reason.measured)
        return found("fail", reason.why, measured=reason.measured, limit=reason.limit)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {' '.join(lines)[:400]}"
        return found("skip", f"{unclaimed}; it breaks: {why}") if unclaimed is not None else found("fail", why)


def check(
    target: Any,
    case: Case | None = None,
    *,
    claims: Traits | None = None,
    grid: int | Sequence[int] | None = None,
    context_grid: int | str | Sequence[int] | None = None,
    select: Iterable[str] | None = None,
    probe: bool = False,
    **config: Any,
) -> Report:
    """Test everything that a mechanism claims.

    Args:
        target: registry name, ``"module:Class"``, class, factory, module, or a :class:`Case`.
        case: how to build and feed it; otherwise ``config`` and ``grid``, with small defaults.
        claims: what to hold it to instead of its own ``traits``; a module without any is held to very little.
        grid: grid of the inputs, e.g. ``12`` or ``(8, 8)``.
        context_grid: grid of the context in cross patterns.
        select: names of claims, by default all of :data:`CLAIMS`.
        probe: also try what is not claimed and say whether it would hold.
        config: settings for building it.

    Returns:
        A :class:`Report`; ``print`` it, ask ``.ok``, or take ``.to_dict()``.

    Raises:
        ValueError: unknown name, unknown claim, or a target that cannot be built or fed.

    >>> check("softmax-attention", dim=8, num_heads=2, grid=4, select=["patterns", "validity"]).ok
    True
    """
    names = list(ORDER) if select is None else list(select)
    unknown = [n for n in names if n not in CLAIMS]
    if unknown:
        raise ValueError(f"select contains {unknown}; possible: {list(ORDER)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: waiting for a second thread costs more than it brings
    try:
        with torch.random.fork_rng(devices=[]):
            s = Subject(target, case, claims, grid, context_grid, config)
            findings = [_examine(CLAIMS[n], s, probe) for n in names]
    finally:
        torch.set_num_threads(threads)
    name = s.case.id if isinstance(target, Case) or case is not None else s.name
    return Report(name, dict(s.case.config), s.grid, findings, s.claims.to_dict())


def conformance(rows: Iterable[Case]) -> Callable[..., None]:
    """A parametrised pytest: one test per row, which fails with the table of broken claims.

    Put it into a test file of your own::

        from attnlib.check import Case, conformance

        test_mine = conformance([Case("my.module:MyAttention", dict(dim=16, num_heads=4), grid=(12,))])
    """
    import pytest

    @pytest.mark.parametrize("case", [pytest.param(row, id=row.id) for row in rows])
    def test_conformance(case: Case) -> None:
        report = check(case)
        assert report.ok, "\n" + "\n".join(f"{f.claim}: {f.why}" for f in report.failed)

    return test_conformance


def run_cli(
    target: str,
    settings: Mapping[str, Any] | None = None,
    grid: int | Sequence[int] | None = None,
    *,
    select: Iterable[str] | None = None,
) -> Report:
    """What ``attnlib check`` runs: :func:`check`, and what is not claimed is probed too."""
    return check(target, grid=grid, select=select, probe=True, **dict(settings or {}))
