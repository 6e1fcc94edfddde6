"""One clock: runs take turns, ratios are taken round by round, and nothing else in bench reads the time."""

import getpass
import json
import platform
import re
from pathlib import Path

import torch

import attnlib.bench
from attnlib.bench import clock


def test_interleaved_runs_take_turns():
    order = []
    timings = clock.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert "".join(order) == "ab" * 4
    assert all(len(t.seconds) == 3 and t.minimum <= t.median for t in timings.values())


def test_ratio_is_taken_round_by_round():
    ours, theirs = clock.Timing((1.0, 20.0, 3.0)), clock.Timing((2.0, 40.0, 2.0))
    assert clock.ratio(ours, theirs) == {"ratio": 0.5, "ratio_of_minima": 0.5}


def test_peak_counts_what_lives_at_once():
    def chain():
        x = torch.zeros(250_000)
        for _ in range(5):
            x = x + 1
        return x

    peak = clock.peak_bytes(chain)
    assert 2_000_000 <= peak < 3_000_000


def test_results_name_no_host_user_or_path():
    text = json.dumps(clock.machine())
    assert "/" not in clock.machine()["cpu"] and platform.node() not in text and f'"{getpass.getuser()}"' not in text


def test_nothing_else_reads_the_time():
    root = Path(attnlib.bench.__file__).parent
    reads = re.compile(
        r"\btime\.(time|perf_counter|monotonic|process_time|thread_time)|^\s*(import time|from time)\b", re.M
    )
    # calls.py runs beside source trees that may be older than the clock, and knows their public interface alone
    found = {p.name for p in root.rglob("*.py") if reads.search(p.read_text(encoding="utf-8"))}
    assert found == {"clock.py", "calls.py"}
