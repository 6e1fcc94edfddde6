"""``python -m tests.fuzz 20000 --seed 0 --only ops --resume fuzz.json``; ``--trial ops.attention:0:17`` repeats one."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from . import run
from .engine import run_trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("trials", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets that start with this; several with commas")
    parser.add_argument("--trial", default="", help="repeat one trial: target:seed:number")
    parser.add_argument("--resume", type=Path, help="file that remembers how far it came and what failed")
    parser.add_argument("--details", action="store_true", help="tracebacks of failures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run.load()
    if args.trial:
        name, seed, number = args.trial.rsplit(":", 2)
        verdict = run_trial(name, int(seed), int(number))
        print(f"{verdict.trial}\n  {verdict.what}\n  {verdict.outcome}\n  {verdict.wrong or 'well'}\n{verdict.details}")
        return bool(verdict.wrong)
    names = run.turns(tuple(args.only.split(",")))
    done, failures = 0, []
    if args.resume and args.resume.exists():
        kept = json.loads(args.resume.read_text())
        if (kept["seed"], kept["only"]) == (args.seed, args.only):
            done, failures = kept["done"], kept["failures"]
    start, shown = time.monotonic(), 0.0
    for i, verdict in enumerate(run.trials(args.trials, args.seed, names, start=done), done + 1):
        if verdict.wrong:
            failures.append([verdict.trial, verdict.wrong])
            print(f"\n{verdict.trial}: {verdict.wrong}\n    {verdict.what}\n    -> {verdict.outcome[:300]}")
            if args.details:
                print(verdict.details)
        if time.monotonic() - shown > 5 or i == args.trials:
            shown = time.monotonic()
            left = (shown - start) / max(1, i - done) * (args.trials - i)
            print(f"{i}/{args.trials} trials, {len(failures)} failed, {left:.0f} s left", file=sys.stderr, flush=True)
            if args.resume:
                kept = dict(seed=args.seed, only=args.only, done=i, failures=failures)
                args.resume.write_text(json.dumps(kept))
    for (name, wrong), count in Counter((t.split(":")[0], w[:70]) for t, w in failures).most_common():
        print(f"{count:5d}  {name}: {wrong}")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
