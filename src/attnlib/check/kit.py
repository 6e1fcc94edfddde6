"""Running the kit: as a function, as a test, from the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..checks import check_choice
from ..nn.base import Fusion
from ..nn.pools.base import Pool as PoolBase
from ..types import Traits
from . import (  # noqa: F401
    causality,
    derivatives,
    dtype,
    gradients,
    growth,
    modes,
    purity,
    robustness,
    shape,
    tracing,
    validity,
)  # fmt: skip
from .adapt import KINDS, Pool, Stream, stream_shapes
from .case import Case
from .infer import infer as infer_claims
from .infer import spelled
from .report import Finding, Report
from .subject import CLAIMS, SILENT, Claim, Subject
from .verdict import Evidence, NotClaimed, Refuted

#: The order of reports: by theme.
ORDER = (
    "traits", "patterns", "resolution", "grid ranks", "layout", "extras", "permutation", "causality", "streaming",
    "no streaming", "validity", "mask", "batch", "batch sizes", "strides", "modes", "work", "memory", "gradient",
    "derivatives", "losses", "checkpointing", "plan", "no plan", "float32", "bfloat16", "autocast", "compile", "export",
    "copies", "deploy", "inputs untouched", "no hidden state", "bad arguments",
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
    infer: bool = False,
    kind: str | None = None,
    brief: bool = False,
    **config: Any,
) -> Report:
    """Test everything that a mechanism, a fusion or a pool claims.

    A fusion is tested stream by stream: each in turn is ``x``, the next one is the context.

    Args:
        target: registry name, ``"module:Class"``, class, factory, module, or a :class:`Case`.
        case: how to build and feed it; otherwise ``config`` and ``grid``, with small defaults.
        claims: what to hold it to instead of its own ``traits``; a module without any is held to very little.
        grid: grid of the inputs, e.g. ``12`` or ``(8, 8)``.
        context_grid: grid of the context in cross patterns.
        select: names of claims, by default all of :data:`CLAIMS`.
        infer: also try what is not claimed: say whether it would hold, and, of a module that claims nothing, what seems
            to hold.
        kind: ``"mechanism"``, ``"fusion"`` or ``"pool"`` ((B, N, C) to (B, D)); by default what the target turns out
            to be.
        brief: export at one size only; with a free one, tracing takes three to ten times as long.
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
    if kind is not None:
        check_choice("kind", kind, KINDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: waiting for a second thread costs more than it brings
    try:
        with torch.random.fork_rng(devices=[]):
            makers = subject_makers(target, case, kind, grid, context_grid, config)
            note = ""
            if infer and makers[0](claims).claims is SILENT:
                claims = infer_claims(makers[0])
                note = f"It claims nothing. What seems to hold: {spelled(claims)}"
            subjects = [make(claims) for make in makers]
            for s in subjects:
                s.brief = brief
            found = [[_examine(CLAIMS[n], s, infer) for n in names] for s in subjects]
    finally:
        torch.set_num_threads(threads)
    s = subjects[0]
    name = s.case.id if isinstance(target, Case) or case is not None else s.name
    if s.claims is SILENT:
        note = "It claims nothing of itself (it has no traits). `--infer` or infer=True tries what seems to hold."
    return Report(name, dict(s.case.config), s.grid, _merged(found), s.claims.to_dict(), note)


def subject_makers(
    target: Any, case: Case | None, kind: str | None, grid: Any, context_grid: Any, config: Mapping[str, Any]
) -> list[Callable[[Traits | None], Subject]]:
    """Builders of what is tested, given claims: one, or one per stream of a fusion."""

    def make(claims: Traits | None, **rest: Any) -> Subject:
        return Subject(target, case, claims, grid, context_grid, config, **rest)

    plain = make(None)
    if kind == "fusion" or (kind is None and isinstance(plain.base, Fusion)):
        shapes = plain.case.streams or stream_shapes(plain.case.config, plain.base)
        if len(shapes) < 2:
            raise ValueError(f"streams={shapes} names {len(shapes)} streams; a fusion has two or more")

        def stream(index: int) -> Callable[[Traits | None], Subject]:
            own, other = shapes[index][:-1], shapes[(index + 1) % len(shapes)][:-1]

            def build(claims: Traits | None) -> Subject:
                wrap = partial(Stream, index=index, shapes=shapes)
                return Subject(target, case, claims, own, other, config, wrap=wrap)

            return build

        return [stream(i) for i in range(len(shapes))]
    pools = isinstance(plain.base, PoolBase) or (plain.claims is SILENT and _pools(plain))
    if kind == "pool" or (kind is None and pools):
        return [lambda claims: make(claims, wrap=Pool)]
    return [make]


def _pools(s: Subject) -> bool:
    """Whether a module that says nothing of itself turns tokens into one vector."""
    try:
        with torch.no_grad():
            y = s.base(s.x(dtype=torch.float32))
    except Exception:
        return False
    return isinstance(y, torch.Tensor) and y.dim() == 2 and len(s.grid) == 1


def _merged(found: list[list[Finding]]) -> list[Finding]:
    """One finding per claim: what was seen on the stream that fares worst, which is named."""
    if len(found) == 1:
        return found[0]
    out = []
    for findings in zip(*found, strict=True):
        worst = min(range(len(findings)), key=lambda i: ("fail", "pass", "skip").index(findings[i].status))
        seconds = round(sum(f.seconds for f in findings), 4)
        why = f"stream {worst}: {findings[worst].why}" if findings[worst].status == "fail" else findings[worst].why
        out.append(replace(findings[worst], why=why, seconds=seconds))
    return out


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
    infer: bool = False,
) -> Report:
    """What ``attnlib check`` runs."""
    return check(target, grid=grid, select=select, infer=infer, **dict(settings or {}))
