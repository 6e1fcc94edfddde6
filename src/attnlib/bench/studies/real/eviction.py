"""What survives eviction: facts in a long text that a pretrained model is asked for from a cache that lost keys.

``attnlib bench --suite real-eviction --out benchmarks/results`` measures again what ``real-eviction-cpu.json`` holds
and draws the heat map of depth and ratio. Each item is one text with facts at several depths and a question for each
task (see :mod:`._prompts`). Keys are evicted

- ``asked``: after the question, as SnapKV means it;
- ``unseen``: after the text, before the question is read;
- ``second``: after a first question, which is answered, and then another one is asked.

An answer is right when every digit is the model's first choice, which is what greedy decoding would have said. The text
is read once per item, and every technique chooses from the same pass; what is random takes another seed with each item.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....cache import (
    ExpectedAttention,
    KeyNorm,
    KVCompression,
    LastQuery,
    ObservedAttention,
    RandomScores,
    Ratio,
    Recency,
    Scorer,
    SnapKVVotes,
    ValueNorm,
)
from ... import models
from ...clock import machine
from ...small import Progress, heat_maps, interval
from ...stats import mean_interval, share_interval
from . import _prompts as prompts
from ._kept import Kept as Pieces
from ._prefill import Kept, OnceScored, Press, Prompt, Reader, kvpress_folder, kvpress_version

QUESTION = "Does a fact in a long text survive when keys are evicted from the cache?"
MODELS = ("smollm2-135m",)

ALL = "all keys"
SNAPKV = "SnapKV"

#: Scorers of the library; a seed makes the random one.
SCORERS: dict[str, Callable[[int], Scorer]] = {
    SNAPKV: lambda seed: SnapKVVotes(),
    "expected attention": lambda seed: ExpectedAttention() * ValueNorm(),
    "last query (TOVA)": lambda seed: LastQuery(),
    "observed attention (H2O)": lambda seed: ObservedAttention(),
    "small keys": lambda seed: KeyNorm(),
    "large values": lambda seed: ValueNorm(),
    "first and last (StreamingLLM)": lambda seed: Recency(),
    "last only": lambda seed: Recency(sinks=0),
    "random": RandomScores,
}

#: Those that the heat map shows.
DRAWN = (ALL, SNAPKV, "last query (TOVA)", "expected attention", "first and last (StreamingLLM)", "random")

#: Classes of kvpress, where it is installed.
PRESSES = {
    "kvpress SnapKVPress": ("snapkv_press", "SnapKVPress"),
    "kvpress ExpectedAttentionPress": ("expected_attention_press", "ExpectedAttentionPress"),
    "kvpress TOVAPress": ("tova_press", "TOVAPress"),
}

#: Settings of SnapKV, compared at one ratio.
SETTINGS: dict[str, Callable[[], Scorer]] = {
    f"window {window}, kernel {kernel}, {pooling}": (
        lambda window=window, kernel=kernel, pooling=pooling: SnapKVVotes(window, kernel, pooling)  # type: ignore[misc]
    )
    for window, kernel, pooling in (
        (8, 5, "avg"), (16, 5, "avg"), (32, 5, "avg"), (64, 5, "avg"), (32, 1, "avg"), (32, 13, "avg"), (32, 5, "max"),
        (32, 13, "max"),
    )
}  # fmt: skip
SETTINGS_RATIO = 0.9

#: What is measured at a length: modes, tasks and ratios of each.
FULL: Mapping[str, Mapping[str, Sequence[float]]] = {
    "asked": {"needle": (0.25, 0.5, 0.75, 0.9), "several": (0.75,), "variables": (0.75,), "lookup": (0.75,)},
    "unseen": {"needle": (0.5, 0.75)},
    "second": {"several": (0.5, 0.75)},
}
PLAN: Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]] = {1024: FULL}

#: Scorers whose cost grows with the square of the length: for the needle, on so many texts a depth by length.
QUADRATIC, QUADRATIC_TEXTS = ("observed attention (H2O)",), {1024: 3}

#: What the bits of a digit are also held against, text by text.
BESIDE = "last query (TOVA)"


def judged(logits: Tensor, answer: Tensor) -> list[list[float]]:
    """Per row of (R, a, V) logits whether all of the answer (1, a) is said, and the bits that a digit of it takes."""
    log_p = logits.float().log_softmax(-1)
    taken = log_p.gather(-1, answer.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
    bits = -taken.mean(-1) / math.log(2)
    right = (logits.argmax(-1) == answer).all(-1)
    return [[float(r), round(float(b), 4)] for r, b in zip(right, bits, strict=True)]


class Bench:
    """A model, its tokenizer and the techniques, all of which choose from one pass over each text."""

    def __init__(
        self, model: Any, tokenizer: Any, presses: bool = True, compared: bool = True,
        quadratic: Mapping[int, int] = QUADRATIC_TEXTS,
    ):  # fmt: skip
        self.reader, self.tokenizer, self.quadratic = Reader(model), tokenizer, quadratic
        self.settings = SETTINGS if compared else {}
        self.presses = {}
        if presses and kvpress_folder() is not None:
            self.presses = {name: Press(*target) for name, target in PRESSES.items()}

    def scorers(self, seed: int, length: int, quadratic: bool) -> dict[str, OnceScored]:
        return {
            name: OnceScored(make(seed)) for name, make in SCORERS.items()
            if name not in QUADRATIC or (quadratic and seed < self.quadratic.get(length, 0))
        }  # fmt: skip

    def choices(self, read: Prompt, scorers: Mapping[str, OnceScored], ratio: float, presses: bool) -> dict[str, Kept]:
        found = {name: read.kept(KVCompression(scorer, Ratio(ratio))) for name, scorer in scorers.items()}
        if presses:
            found |= {name: press.kept(read, ratio) for name, press in self.presses.items()}
        return found

    def _judge(
        self, read: Prompt, kept: Mapping[float, Mapping[str, Kept]], asked: Tensor, answer: Tensor,
        known: Tensor | None,
    ) -> dict[str, dict[str, list[float]]]:  # fmt: skip
        """By ratio, ``asked`` and the answer read from every cache; ``known`` are logits of its first digit, if given.

        The whole cache is read once for all ratios.
        """
        choices: list[Kept | None] = [None, *(choice for some in kept.values() for choice in some.values())]
        logits = read.follow(choices, torch.cat([asked, answer[:, :-1]], 1))
        said = logits[:, asked.shape[1] - 1 :] if asked.shape[1] else logits
        if known is not None:
            said = torch.cat([known[:, None].expand(len(choices), 1, -1), said], 1)
        whole, *rest = judged(said, answer)
        told = iter(rest)
        return {str(ratio): {ALL: whole} | {name: next(told) for name in some} for ratio, some in kept.items()}

    def item(
        self, length: int, depth: float, seed: int, plan: Mapping[str, Mapping[str, Sequence[float]]],
        text: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """``{mode: {task: {ratio: {technique: [right, bits]}}}}`` of one text."""
        item = prompts.make_item(self.tokenizer, length, depth, seed, text)
        context = self.reader.read(item.context)
        found: dict[str, dict[str, Any]] = {mode: {} for mode in plan}
        nothing = torch.zeros(1, 0, dtype=torch.long)

        def new_prompt() -> None:
            for press in self.presses.values():
                press.forget()

        for task, ratios in plan.get("unseen", {}).items():
            if task == next(iter(plan["unseen"])):
                scorers, known = self.scorers(seed, length, False), {}
                new_prompt()
            asked, answer = prompts.question_ids(self.tokenizer, item, task)
            for ratio in ratios:
                if ratio not in known:
                    known[ratio] = self.choices(context, scorers, ratio, False)
            found["unseen"][task] = self._judge(context, {r: known[r] for r in ratios}, asked, answer, None)
        needle: dict[float, dict[str, Kept]] = {}
        for task, ratios in plan.get("asked", {}).items():
            asked, answer = prompts.question_ids(self.tokenizer, item, task)
            read = context.extended(asked)
            new_prompt()
            scorers = self.scorers(seed, length, task == "needle")
            kept = {ratio: self.choices(read, scorers, ratio, task == "needle") for ratio in ratios}
            found["asked"][task] = self._judge(read, kept, nothing, answer, read.last)
            if task == "needle":
                needle = kept
                if self.settings:
                    share = Ratio(SETTINGS_RATIO)
                    made = {n: read.kept(KVCompression(make(), share)) for n, make in self.settings.items()}
                    found["settings"] = {
                        task: self._judge(read, {SETTINGS_RATIO: made}, nothing, answer, read.last)
                    }  # fmt: skip
                for other, ratios_of in plan.get("second", {}).items():
                    asked, more = prompts.next_turn_ids(self.tokenizer, item, other, answer[0].tolist())
                    ours = {
                        ratio: {name: made for name, made in needle[ratio].items() if name not in self.presses}
                        for ratio in ratios_of
                    }  # fmt: skip
                    found["second"][other] = self._judge(read, ours, asked, more, None)
        return found


def summary(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per length, mode, task, ratio and technique: share of right answers, and bits beside those of all keys and,
    where it took part, of :data:`BESIDE`, text by text."""
    cells: dict[tuple[Any, ...], list[tuple[float, float, float, float | None]]] = {}
    for record in records:
        for mode, tasks in record["found"].items():
            for task, ratios in tasks.items():
                for ratio, rows in ratios.items():
                    for name, (right, bits) in rows.items():
                        cell = cells.setdefault((record["length"], mode, task, float(ratio), name), [])
                        beside = bits - rows[BESIDE][1] if BESIDE in rows else None
                        cell.append((right, bits, bits - rows[ALL][1], beside))
    found = []
    for (length, mode, task, ratio, name), values in sorted(cells.items(), key=lambda c: c[0][:4]):
        right = sum(v[0] for v in values)
        low, high = share_interval(int(right), len(values))
        found.append({
            "length": length, "mode": mode, "task": task, "ratio": ratio, "name": name, "n": len(values),
            "right": right / len(values), "low": low, "high": high,
            "bits": interval(mean_interval([v[1] for v in values])),
            "more bits": interval(mean_interval([v[2] for v in values])),
        })  # fmt: skip
        paired = [v[3] for v in values if v[3] is not None]
        if paired and name != BESIDE:
            found[-1][f"more bits than {BESIDE}"] = interval(mean_interval(paired))
    return found


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same as tables to read: by length, mode and task, a row per technique and a column per ratio."""
    found: dict[str, Any] = {}
    for row in rows:
        title = f"{row['length']} tokens, {row['mode']}, {row['task']}"
        table = found.setdefault(title, {"metric": "right", "rows": []})
        mine = next((r for r in table["rows"] if r["name"] == row["name"]), None)
        if mine is None:
            mine = {"name": row["name"]}
            table["rows"].append(mine)
        half = (row["high"] - row["low"]) / 2
        mine[f"right, {row['ratio']:.0%} evicted"] = {"mean": row["right"], "half": half, "n": row["n"]}
    return found


def by_depth(records: Sequence[Mapping[str, Any]], name: str, length: int, task: str = "needle") -> dict[str, Any]:
    """``{"depths", "ratios", "right", "n"}``: shares of right answers by depth and ratio, of ``n`` items a cell."""
    mine = [
        r for r in records if r["length"] == length and all(name in a for a in r["found"]["asked"][task].values())
    ]  # fmt: skip
    depths = sorted({r["depth"] for r in mine})
    ratios = sorted({float(ratio) for r in mine for ratio in r["found"]["asked"].get(task, {})})
    grid, n = [], 0
    for depth in depths:
        at = [r["found"]["asked"][task] for r in mine if r["depth"] == depth]
        n = max(n, len(at))
        grid.append([
            sum(a[str(ratio)][name][0] for a in at) / len(at) for ratio in ratios
        ])  # fmt: skip
    return {"depths": depths, "ratios": ratios, "right": grid, "n": n}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    plan: Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]] = PLAN,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    items: Mapping[int, int] | None = None,
    model: str = "smollm2-135m",
    dtype: torch.dtype = torch.bfloat16,
    presses: bool = True,
    compared: bool = True,
    quadratic: Mapping[int, int] = QUADRATIC_TEXTS,
    text: str | None = None,
) -> dict[str, Any]:
    """Ask every question of every item, from the caches that every technique leaves.

    Args:
        progress: told of every item.
        keep: a file that takes every item as soon as it is done, and from which a later call goes on.
        pictures: folder for ``real-eviction-cpu.svg``.
        plan: by length of the text in tokens, what is measured: ``{mode: {task: ratios}}``.
        depths: of the needle.
        items: by length, texts at each depth; 3 by default, 0 leaves a length out.
        model: of :mod:`attnlib.bench.models`, or a folder or name of a causal language model.
        dtype: of its weights.
        presses: let kvpress take part where it is installed.
        compared: compare settings of SnapKV.
        quadratic: by length, texts at each depth on which scorers take part whose cost grows with its square.
        text: to sow into; the documentation of Python by default.

    Returns:
        Plain values, for JSON.

    Raises:
        ValueError: a text longer than the model's context, or too short for the facts.
    """
    from ...converting import open_model

    counts = dict.fromkeys(plan, 3) | dict(items or {})
    theirs = sorted(PRESSES) if presses and kvpress_folder() is not None else []
    key = (model, str(dtype), {str(k): v for k, v in plan.items()}, theirs, list(SETTINGS) if compared else [],
           {str(k): v for k, v in quadratic.items()})  # fmt: skip
    kept = Pieces(keep, key, progress)
    benches: list[Bench] = []

    def ask(length: int, depth: float, seed: int) -> dict[str, Any]:
        if not benches:  # nothing is loaded where everything is kept
            benches.append(Bench(*open_model(model, dtype), presses, compared, quadratic))
            limit, longest = benches[0].reader.limit, max(plan)
            if longest + 128 > limit:
                raise ValueError(f"length={longest} and a question are more than the {limit} tokens that it can read")
        return benches[0].item(length, depth, seed, plan[length], text)

    records = [
        {"length": n, "depth": d, "seed": seed,
         "found": kept(f"{n} tokens, depth {d:g}, text {seed + 1}", functools.partial(ask, n, d, seed))}
        for seed in range(max(counts.values())) for n in plan for d in depths if seed < counts[n]
    ]  # fmt: skip
    rows = summary(records)
    names = [ALL, *SCORERS]
    maps = {
        str(length): {name: by_depth(records, name, length) for name in names if _there(rows, length, name)}
        for length in plan if counts[length]
    }  # fmt: skip
    result = {
        "what": QUESTION, "machine": machine(), "model": models.title(model),
        "dtype": str(dtype).removeprefix("torch."),
        "kvpress": kvpress_version() if theirs else None, "tasks": dict(prompts.TASKS), "tables": tables(rows),
        "runs": rows, "needle by depth": maps,
    }  # fmt: skip
    if pictures is not None:
        draw(result, Path(pictures) / "real-eviction-cpu.svg")
    return result


def _there(rows: Sequence[Mapping[str, Any]], length: int, name: str) -> bool:
    return any(
        r["name"] == name and r["length"] == length and r["mode"] == "asked" and r["task"] == "needle" for r in rows
    )


def draw(result: Mapping[str, Any], path: Path, names: Sequence[str] | None = None) -> None:
    """The heat map: shares of needles found by depth and ratio, a panel per technique and length."""
    wanted = names or DRAWN
    panels = {}
    for length, maps in result["needle by depth"].items():
        for name in wanted:
            if name in maps:
                held = maps[name]
                panels[(f"{int(length):,} tokens", name)] = held["right"]
                xs = [f"{r:.0%}" for r in held["ratios"]]
                ys = [f"{d:.0%}" for d in held["depths"]]
    title = f"{result['model'].partition(',')[0]}: needles found, by share of keys evicted and depth in the text"
    heat_maps(path, panels, xs, ys, "keys evicted", "depth", title)
