"""This source tree beside another one: what small calls cost before and after a change.

``python -m attnlib.bench.speed.revisions 574b605 benchmarks/results/doors-before-after-cpu.json`` measures again what
that file holds. Each tree is served by a process of its own; they take turns of a few milliseconds, so that whatever
else the machine does falls on both alike, and what counts is the ratio of neighbouring turns.
"""

from __future__ import annotations

import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import attnlib

from ...checks import check_choice, check_int
from ..clock import CLOCKS, load, machine
from . import calls

#: Seconds of one turn.
TURN = 0.005


class Side:
    """A process that runs :mod:`attnlib.bench.speed.calls` on the package in the folder ``source``."""

    def __init__(self, source: Path, threads: int):
        path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", calls.__file__, str(threads)], env={**os.environ, "PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        said = self.ask("rows")
        self.rows: list[str] = said["rows"]
        if Path(said["source"]).resolve().parent.parent != source.resolve():
            raise ValueError(f"against={str(source)!r} holds no package attnlib")

    def ask(self, what: str, **more: Any) -> Any:
        """What the process answers; ``RuntimeError`` with what it says when it cannot."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"ask": what, **more}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"the process ended with {self._process.wait()}"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["is"]

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def tree(against: str | Path) -> Iterator[Path]:
    """The folder that holds the package: of a folder with sources, or of a revision of this repository."""
    folder = Path(against)
    if folder.is_dir():
        yield folder / "src" if (folder / "src" / "attnlib").is_dir() else folder
        return
    top = Path(attnlib.__file__).parents[2]
    found = subprocess.run(["git", "-C", str(top), "archive", "--format=tar", str(against), "src"], capture_output=True)
    if found.returncode:
        why = found.stderr.decode(errors="replace").strip()
        raise ValueError(f"against={str(against)!r} is neither a folder nor a revision that git knows here: {why}")
    with tempfile.TemporaryDirectory() as room, tarfile.open(fileobj=BytesIO(found.stdout)) as archive:
        archive.extractall(room, filter="data")
        yield Path(room) / "src"


def measure(
    against: str | Path,
    rows: str = "*",
    threads: int = 1,
    turns: int = 101,
    clock: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time of small calls in this tree over that in another, and how many functions each calls.

    Args:
        against: a revision of the repository that this package lies in, or a folder with sources.
        rows: a pattern of rows of :data:`attnlib.bench.speed.calls.ROWS`.
        threads: of PyTorch, in each process.
        turns: of each tree and row, alternating.
        clock: ``"cpu"`` for processor time, which other programs disturb least, or ``"wall"``.
        progress: told each row and its result.

    Returns:
        A dict of plain values: settings, machine, and for every row the median seconds of both trees, the median of
        the ratios of neighbouring turns with the quartiles of these ratios, and the functions called.
    """
    check_int("threads", threads, least=1)
    check_int("turns", turns, least=1)
    check_choice("clock", clock, list(CLOCKS))
    with ExitStack() as stack:
        sides = [Side(stack.enter_context(tree(against)), threads), Side(Path(attnlib.__file__).parents[1], threads)]
        for side in sides:
            stack.callback(side.close)
        chosen = [row for row in sides[1].rows if fnmatch.fnmatch(row, rows)]
        if not chosen:
            raise ValueError(f"rows={rows!r} fits none of {sides[1].rows}")
        records = []
        for row in chosen:
            records.append(_record(row, sides, turns, clock))
            if progress is not None:
                progress(f"{row}: {_spell(records[-1])}")
    return {
        "what": "small calls in this source tree beside another",
        "settings": {"against": Path(against).name, "threads": threads, "turns": turns, "clock": clock},
        "machine": {**machine(), "threads": threads},
        "records": records,
    }


def _record(row: str, sides: Sequence[Side], turns: int, clock: str) -> dict[str, Any]:
    try:
        for side in sides:
            side.ask("make", row=row)
        counts = [side.ask("count", row=row) for side in sides]
    except RuntimeError as error:
        return {"row": row, "error": str(error)}
    once = max(side.ask("time", row=row, calls=3, clock="wall") for side in sides)
    calls_per_turn = max(1, round(TURN / once))
    before: list[float] = []
    after: list[float] = []
    for turn in range(turns + 1):
        pair = ((before, sides[0]), (after, sides[1]))
        for seconds, side in pair if turn % 2 else reversed(pair):
            taken = side.ask("time", row=row, calls=calls_per_turn, clock=clock)
            if turn:  # the first round finds cold caches
                seconds.append(taken)
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if turns > 1 else ratios * 3
    return {
        "row": row,
        "before_ms": 1e3 * statistics.median(before),
        "after_ms": 1e3 * statistics.median(after),
        "ratio": middle,
        "quartiles": [low, high],
        "ratio_of_minima": min(after) / min(before),
        "functions_before": counts[0],
        "functions_after": counts[1],
        "load": load(),
    }


def _spell(record: dict[str, Any]) -> str:
    if "error" in record:
        return record["error"]
    return (
        f"{record['before_ms']:.3f} -> {record['after_ms']:.3f} ms, {record['ratio']:.3f} "
        f"({record['quartiles'][0]:.3f} to {record['quartiles'][1]:.3f}), minima {record['ratio_of_minima']:.3f}, "
        f"functions {record['functions_before']} -> {record['functions_after']}, load {record['load']}"
    )


if __name__ == "__main__":
    target = Path(sys.argv[2] if len(sys.argv) > 2 else "benchmarks/results/doors-before-after-cpu.json")
    result = measure(
        sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else "*", progress=lambda line: print(line, file=sys.stderr)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
