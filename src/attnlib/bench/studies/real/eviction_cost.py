"""What eviction buys and what it costs: time of a token, memory of the cache, and the price of each scorer.

``attnlib bench --suite real-eviction-cost --out benchmarks/results``. Decoding reads every kept key of every layer
for each token, and the rest of the model besides, so less than the share of evicted keys can be gained. A scorer works
once, after the prompt: its price is a share of reading the prompt. It is timed by itself, on the queries, keys and
values that one pass over the prompt left, since whole passes differ by more than most scorers take. Times are medians
of interleaved rounds of processor time, which other programs disturb least; ratios are taken round by round.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....cache import KVCompression, Ratio
from ... import models
from ...clock import interleave, load, machine, now, peak_bytes
from ...converting import open_model, tokens_of
from ...data import files
from ...small import Progress, picture
from ...speed.cache import Contender
from ._kept import Kept
from ._prefill import Press, Reader, kvpress_folder, kvpress_version
from .eviction import ALL, PRESSES, QUADRATIC, SCORERS, SNAPKV

QUESTION = "What do a smaller cache and its scorer cost and save, in time and memory?"
MODELS = ("smollm2-135m",)

PLAIN = ALL

#: Releases of transformers from here on pass no argument in which kvpress 0.5.5 could find the cache.
UNHOOKED = (5, 3)

#: Prompts longer than this are scored once by what reads all scores, whose time and memory are taken in that run.
ONCE = 2048


def decoding(
    model: Any, prompt: Tensor, more: Tensor, ratios: Sequence[float], rounds: int, press: Any
) -> list[dict[str, Any]]:
    """Time of a token, bytes of the cache and most bytes while the prompt is read: for the whole cache, SnapKV's, and
    kvpress's SnapKVPress's."""
    made: list[Contender] = []
    peaks: list[int] = []

    def read(*given: Any, **settings: Any) -> None:
        peaks.append(peak_bytes(lambda: made.append(Contender(*given, **settings))))

    read(PLAIN, 0.0, model, prompt)
    for share in ratios:
        read(SNAPKV, share, model, prompt, ours=True)
        if press is not None:
            read("kvpress SnapKVPress", share, model, prompt, press)
    times: list[list[float]] = [[] for _ in made]
    for done in range(rounds + 1):  # the first round warms up
        for c, own in zip(made, times, strict=True):
            seconds, _ = c.decode(more, "cpu")
            if done:
                own.append(seconds)
    rows = []
    for c, own, peak in zip(made, times, peaks, strict=True):
        if c.session is not None:
            c.session.detach()
        rows.append({
            "name": c.name, "ratio": c.ratio, "keys": max(c.keys), "token_s": statistics.median(own),
            "against": statistics.median(a / b for a, b in zip(own, times[0], strict=True)),
            "cache_bytes": c.bytes, "cache": c.bytes / made[0].bytes, "peak_bytes": peak, "peak": peak / peaks[0],
        })  # fmt: skip
    return rows


def choosing(
    model: Any, prompt: Tensor, evicted: float, rounds: int, presses: Mapping[str, Press]
) -> list[dict[str, Any]]:
    """Time in which every scorer chooses what stays of a prompt, beside that of reading it, and the memory it takes."""
    reader, reads = Reader(model), []
    for _ in range(2):
        start = now("cpu")
        read = reader.read(prompt)
        reads.append(now("cpu") - start)
    seconds = min(reads)

    def ours(name: str) -> Callable[[], None]:
        def run() -> None:
            read.kept(KVCompression(SCORERS[name](0), Ratio(evicted)))

        return run

    def theirs(press: Press) -> Callable[[], None]:
        def run() -> None:
            press.forget()
            press.kept(read, evicted)

        return run

    runs = {name: ours(name) for name in SCORERS} | {name: theirs(press) for name, press in presses.items()}
    once, peaks = {}, {}
    for name, run in runs.items():
        start = now("cpu")
        peaks[name] = peak_bytes(run)
        if name in QUADRATIC and prompt.shape[1] > ONCE:
            once[name] = now("cpu") - start
    timed = interleave({name: run for name, run in runs.items() if name not in once}, rounds, "cpu")
    times = {name: timing.median for name, timing in timed.items()} | once
    whole = sum(layer.k.nbytes + layer.v.nbytes for layer in read.layers)
    return [
        {"name": PLAIN, "seconds": 0.0, "prompt_s": seconds, "against": 1.0, "peak_bytes": 0, "cache_bytes": whole},
        *({"name": name, "seconds": times[name], "rounds": 1 if name in once else rounds, "prompt_s": seconds,
           "against": 1 + times[name] / seconds, "peak_bytes": peaks[name], "cache_bytes": whole}
          for name in runs),
    ]  # fmt: skip


def _hooked() -> bool:
    """Whether kvpress's hooks find the cache in this release of transformers."""
    return tuple(int(part) for part in metadata.version("transformers").split(".")[:2]) < UNHOOKED


@torch.no_grad()
def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    lengths: Sequence[int] = (1024, 2048, 4096),
    ratios: Sequence[float] = (0.5, 0.75, 0.9),
    evicted: float = 0.75,
    tokens: int = 8,
    rounds: int = 3,
    model: str = "smollm2-135m",
    dtype: torch.dtype = torch.float32,
    presses: bool = True,
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
        presses: let kvpress take part where it is installed; in decoding only with transformers before 5.3, since its
            hooks fail with later ones (0.5.5).
        text: to read.

    Returns:
        Plain values, for JSON.

    Raises:
        ValueError: more tokens than the model, or the text, has.
    """
    folder = kvpress_folder() if presses else None
    theirs: dict[str, Press] = {}
    if folder is not None:
        theirs = {name: Press(*target) for name, target in PRESSES.items()}
    key = ("choosing alone, all scorers", model, str(dtype), list(ratios), evicted, tokens, rounds, sorted(theirs))
    kept = Kept(keep, key, progress)
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
        press = type(theirs["kvpress SnapKVPress"].press) if theirs and _hooked() else None
        return {
            "load": load(),
            "decoding": decoding(loaded, prompt, more, ratios, rounds, press),
            "prompt": choosing(loaded, prompt, evicted, rounds, theirs),
        }

    done = {n: kept(f"{n} tokens", functools.partial(at, n)) for n in lengths}
    result = {
        "what": QUESTION, "machine": machine(), "model": models.title(model),
        "dtype": str(dtype).removeprefix("torch."), "clock": "cpu", "evicted": evicted, "rounds": rounds,
        "tokens": tokens, "kvpress": kvpress_version() if theirs else None,
        "lengths": {str(n): done[n] for n in lengths},
    }  # fmt: skip
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            f"{n:,} tokens": [
                (100 * row["ratio"], row["token_s"] * 1e3, None) for row in done[n]["decoding"]
                if row["name"] in (PLAIN, SNAPKV)
            ]
            for n in lengths
        }  # fmt: skip
        picture(
            Path(pictures) / "real-eviction-cost-cpu.svg", curves, "keys evicted (%), chosen by SnapKV",
            "ms of processor time per token",
            f"{models.title(model).partition(',')[0]}: decoding on a compressed cache",
        )  # fmt: skip
    return result
