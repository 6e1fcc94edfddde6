"""What eviction buys and what it costs: time of a token, memory of the cache, and the price of each scorer.

``attnlib bench --suite real-eviction-cost --out benchmarks/results``. Decoding reads every kept key of every layer
for each token, and the rest of the model besides, so less than the share of evicted keys can be gained. A scorer works
once, after the prompt: its price is a share of reading the prompt. Times are medians of interleaved rounds of processor
time, which other programs disturb least; ratios are taken round by round.
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....cache import KVCompression, Ratio
from ....hooks import attach
from ... import models
from ...clock import interleave, machine, peak_bytes, ratio
from ...converting import open_model, tokens_of
from ...data import files
from ...small import Progress, picture
from ...speed.cache import Contender, _kvpress
from ._kept import Kept
from ._prefill import kvpress_folder, kvpress_version
from .eviction import ALL, PRESSES, QUADRATIC, QUADRATIC_LENGTH, SCORERS

QUESTION = "What do a smaller cache and its scorer cost and save, in time and memory?"
MODELS = ("smollm2-135m",)

PLAIN = ALL


def decoding(
    model: Any, prompt: Tensor, more: Tensor, ratios: Sequence[float], rounds: int, press: Any
) -> list[dict[str, Any]]:
    """Time of a token and bytes of the cache for the whole cache, SnapKV's, and kvpress's SnapKVPress's."""
    made = [Contender(PLAIN, 0.0, model, prompt)]
    for share in ratios:
        made.append(Contender("SnapKV", share, model, prompt, ours=True))
        if press is not None:
            made.append(Contender("kvpress SnapKVPress", share, model, prompt, press))
    times: list[list[float]] = [[] for _ in made]
    for done in range(rounds + 1):  # the first round warms up
        for c, own in zip(made, times, strict=True):
            seconds, _ = c.decode(more, "cpu")
            if done:
                own.append(seconds)
    rows = []
    for c, own in zip(made, times, strict=True):
        if c.session is not None:
            c.session.detach()
        rows.append({
            "name": c.name, "ratio": c.ratio, "keys": max(c.keys), "token_s": statistics.median(own),
            "against": statistics.median(a / b for a, b in zip(own, times[0], strict=True)),
            "cache_bytes": c.bytes, "cache": c.bytes / made[0].bytes,
        })  # fmt: skip
    return rows


def prefill(
    model: Any, prompt: Tensor, evicted: float, rounds: int, presses: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Time of reading a prompt with every scorer beside reading it alone, and the most memory that it takes."""
    from transformers import DynamicCache

    slots = torch.arange(prompt.shape[1])

    def read(**given: Any) -> None:
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, position_ids=slots[None], logits_to_keep=1, **given)

    def ours(name: str) -> Callable[[], None]:
        def run() -> None:
            with attach(model, KVCompression(SCORERS[name](0), Ratio(evicted))):
                read()

        return run

    def theirs(press: Any) -> Callable[[], None]:
        def run() -> None:
            with press(compression_ratio=evicted)(model):
                read(cache_position=slots)  # it looks for an argument that newer releases do not pass by themselves

        return run

    runs: dict[str, Callable[[], None]] = {PLAIN: read}
    runs |= {name: ours(name) for name in SCORERS if name not in QUADRATIC or prompt.shape[1] <= QUADRATIC_LENGTH}
    runs |= {name: theirs(press) for name, press in presses.items()}
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    times = interleave(runs, rounds, "cpu")
    return [
        {"name": name, "seconds": times[name].median, "against": ratio(times[name], times[PLAIN])["ratio"],
         "peak_bytes": peaks[name], "peak": peaks[name] / peaks[PLAIN]}
        for name in runs
    ]  # fmt: skip


@torch.no_grad()
def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    lengths: Sequence[int] = (1024, 2048, 4096),
    ratios: Sequence[float] = (0.5, 0.75, 0.9),
    evicted: float = 0.75,
    tokens: int = 8,
    rounds: int = 5,
    model: str = "smollm2-135m",
    dtype: torch.dtype = torch.bfloat16,
    presses: bool = False,
    text: str | None = None,
) -> dict[str, Any]:
    """Time and memory of decoding by length and ratio, and of reading the prompt by length and scorer.

    Args:
        progress: told of every length.
        keep: a file that takes every length as soon as it is done, and from which a later call goes on.
        pictures: folder for ``real-eviction-cost-cpu.svg``.
        lengths: tokens of the prompt.
        ratios: shares of keys that are evicted before tokens are decoded.
        evicted: share of keys that every scorer evicts.
        tokens: that are decoded in a round.
        rounds: that count.
        model: of :mod:`attnlib.bench.models`, or a folder or name of a causal language model.
        dtype: of its weights.
        presses: let kvpress take part, where it is installed and serves this release of transformers; 0.5.5 wants one
            before 5.3, and fails with later ones.
        text: to read.

    Returns:
        Plain values, for JSON.

    Raises:
        ValueError: more tokens than the model, or the text, has.
    """
    folder = kvpress_folder() if presses else None
    theirs: dict[str, Any] = {}
    if folder is not None:
        _kvpress(folder)
        theirs = {n: getattr(importlib.import_module(f"kvpress.presses.{m}"), c) for n, (m, c) in PRESSES.items()}
    kept = Kept(keep, (model, str(dtype), list(ratios), evicted, tokens, rounds, sorted(theirs)), progress)
    opened: list[tuple[Any, Tensor]] = []

    def at(length: int) -> dict[str, Any]:
        if not opened:  # nothing is loaded where everything is kept
            loaded, tokenizer = open_model(model, dtype)
            limit = int(getattr(loaded.config, "max_position_embeddings", 1 << 30))
            if max(lengths) + tokens > limit:
                raise ValueError(f"lengths={list(lengths)} and {tokens} tokens are more than the {limit} of {model}")
            ids = tokens_of(tokenizer, files.text().train if text is None else torch.tensor(list(text.encode())))
            if ids.numel() < max(lengths) + tokens:
                raise files.DataError(f"the text has {ids.numel()} tokens, fewer than lengths={list(lengths)} need")
            opened.append((loaded, ids))
        loaded, ids = opened[0]
        prompt, more = ids[None, :length], ids[None, length : length + tokens]
        press = theirs.get("kvpress SnapKVPress")
        return {
            "decoding": decoding(loaded, prompt, more, ratios, rounds, press),
            "prompt": prefill(loaded, prompt, evicted, rounds, theirs),
        }

    done = {n: kept(f"{n} tokens", functools.partial(at, n)) for n in lengths}
    result = {
        "what": QUESTION, "machine": machine(), "model": models.title(model),
        "dtype": str(dtype).removeprefix("torch."), "clock": "cpu", "evicted": evicted, "rounds": rounds,
        "tokens": tokens, "kvpress": kvpress_version() if theirs else None,
        "lengths": {str(n): done[n] for n in lengths},
    }  # fmt: skip
    if pictures is not None:
        labels = {(0.0, PLAIN): PLAIN} | {(r, "SnapKV"): f"SnapKV, {r:.0%} evicted" for r in ratios}
        curves = {
            label: [
                (n, row["token_s"] * 1e3, None) for n in lengths for row in done[n]["decoding"]
                if (row["ratio"], row["name"]) == place
            ]
            for place, label in labels.items()
        }  # fmt: skip
        picture(
            Path(pictures) / "real-eviction-cost-cpu.svg", curves, "tokens of the prompt",
            "ms of processor time per token",
            f"{models.title(model).partition(',')[0]}: decoding on a compressed cache", log=("x",), dashed=(PLAIN,),
        )  # fmt: skip
    return result
