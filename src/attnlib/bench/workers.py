"""Independent runs at once: in processes of this machine, each on a core of its own, or on a Ray cluster.

Both go through joblib. What is timed by the clock never runs here: times of runs that share a machine mean nothing.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..checks import check_flag, check_int
from ..extras import need
from .clock import limit_threads


def available_cores() -> int:
    """Cores that this process may use."""
    return len(cores())


def cores() -> list[int]:
    """Their numbers; counted where the system does not tell them apart."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def check_workers(workers: int, ray: bool = False) -> int:
    """The number of runs at a time, when this machine or Ray can serve it.

    Raises:
        ValueError: fewer than one, or more than the cores here without Ray.
        ImportError: Ray is wanted and not installed; the message names the extra.

    >>> check_workers(1)
    1
    """
    check_int("workers", workers, least=1)
    if check_flag("ray", ray):
        need("ray", "ray=True")
    elif workers > available_cores():
        raise ValueError(
            f"workers={workers} is beyond the cores here; possible: 1 to {available_cores()}, or a cluster: ray=True"
        )
    return workers


def at_once(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], workers: int, *, threads: int = 1, ray: bool = False
) -> Iterator[tuple[int, Any]]:
    """``(number, function(*call))`` of all calls, as they end.

    Args:
        function: importable by its name.
        calls: arguments; asked for one after the other, not before a worker is free.
        workers: calls at a time.
        threads: of PyTorch in each.
        ray: on a Ray cluster: the one that runs, or one of ``workers`` processes started for this here.

    Raises:
        ValueError, ImportError: as :func:`check_workers`.
    """
    check_workers(workers, ray)
    if workers == 1 and not ray:  # here, and nothing is pinned
        with limit_threads(threads):
            for number, call in enumerate(calls):
                yield number, function(*call)
        return
    joblib = need("joblib", "workers")
    if ray:
        yield from _on_ray(function, calls, workers, threads)
        return
    with tempfile.TemporaryDirectory(prefix="attnlib-workers-") as place:
        given = (joblib.delayed(_one)(n, function, call, threads, Path(place)) for n, call in enumerate(calls))
        results = joblib.Parallel(
            workers, "loky", pre_dispatch="n_jobs", batch_size=1, return_as="generator_unordered"
        )(given)
        try:
            yield from results
        except BaseException:
            results.close()
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True, kill_workers=True)
            raise


def _on_ray(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], workers: int, threads: int
) -> Iterator[tuple[int, Any]]:
    """In rounds of ``workers`` calls: joblib's Ray backend gives results when all it was given have ended."""
    joblib = need("joblib", "workers")
    from ray.util.joblib import register_ray

    register_ray()
    _join(workers)
    given = (joblib.delayed(_one)(number, function, call, threads, None) for number, call in enumerate(calls))
    with joblib.Parallel(workers, "ray", batch_size=1) as pool:
        while some := list(itertools.islice(given, workers)):
            yield from pool(some)


def _join(workers: int) -> None:
    """Connect to the cluster that runs; where none does, start one here for as many workers."""
    ray = need("ray", "ray=True")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {}
        if not address:  # its processes find the modules that this one finds
            paths = os.pathsep.join(path for path in sys.path if path)
            here = dict(num_cpus=workers, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
        ray.init(address=address, log_to_driver=False, configure_logging=False, **here)


_claimed: int | None = None  # the core of this process


def _one(
    number: int, function: Callable[..., Any], call: tuple[Any, ...], threads: int, claims: Path | None
) -> tuple[int, Any]:
    if claims is not None:
        _pin(claims)
    torch.set_num_threads(threads)
    return number, function(*call)


def _pin(claims: Path) -> None:
    """Keep this process on a core that no other one of these has, once."""
    global _claimed
    if not hasattr(os, "sched_setaffinity"):
        return
    if _claimed is not None and (claims / str(_claimed)).exists():
        return
    mine = str(os.getpid())
    wanted = [_claimed] if _claimed is not None else cores()
    for core in wanted:
        claim = claims / str(core)
        try:
            with claim.open("x") as file:
                file.write(mine)
        except FileExistsError:
            if _alive(claim):
                continue
            claim.write_text(mine)  # its process is gone
        _claimed = core
        os.sched_setaffinity(0, {core})
        return


def _alive(claim: Path) -> bool:
    try:
        os.kill(int(claim.read_text() or 0), 0)
    except (OSError, ValueError):
        return False
    return True
