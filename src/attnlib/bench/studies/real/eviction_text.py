"""What eviction costs on real text: bits per byte of how a text goes on, read from a cache that lost keys.

``attnlib bench --suite real-eviction-text --out benchmarks/results``. The beginning of a text is read once; every
technique of :mod:`.eviction` evicts its share of the keys; the next tokens are then read, and predicted, from what is
left. Texts are windows of the documentation of Python that share nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ....cache import KVCompression, Ratio
from ... import models
from ...clock import machine
from ...converting import open_model, tokens_of
from ...data import files
from ...small import Progress, picture, study
from ...store import identity
from ._prefill import OnceScored, Reader
from .eviction import ALL, QUADRATIC, SCORERS

QUESTION = "How many more bits does real text take when keys are evicted from the cache?"
MODELS = ("smollm2-135m",)


def label(name: str, ratio: float) -> str:
    return f"{name}, {ratio:g} evicted"


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    length: int = 1024,
    more: int = 128,
    ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    windows: int = 8,
    seeds: Sequence[int] = (0, 1, 2),
    model: str = "smollm2-135m",
    dtype: torch.dtype = torch.bfloat16,
    text: str | None = None,
) -> dict[str, Any]:
    """Bits per byte of ``more`` tokens behind ``length``, for every technique and ratio.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-eviction-text-cpu.svg``.
        length: tokens that are read before keys are evicted.
        more: tokens that follow.
        ratios: shares of keys that are evicted.
        windows: texts of a seed.
        seeds: which draw windows that share none.
        model: of :mod:`attnlib.bench.models`, or a folder or name of a causal language model.
        dtype: of its weights.
        text: to cut windows from.

    Returns:
        Plain values, for JSON.

    Raises:
        ValueError: more tokens than the model can read, or a text with fewer windows.
    """

    @functools.cache
    def opened() -> tuple[Reader, Any, torch.Tensor]:
        """Nothing is loaded where everything is kept."""
        loaded, tokenizer = open_model(model, dtype)
        reader = Reader(loaded)
        reader.check(length + more)
        ids = tokens_of(tokenizer, files.text().train if text is None else torch.tensor(list(text.encode())))
        whole = ids[: ids.numel() // (length + more) * (length + more)].view(-1, length + more)
        wanted = windows * len(seeds)
        if len(whole) < wanted:
            raise files.DataError(f"the text has {len(whole)} windows of {length + more} tokens, not {wanted}")
        return reader, tokenizer, whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))]

    found: dict[int, dict[str, float]] = {}

    def bits(seed: int) -> dict[str, float]:
        """Of every technique at every ratio, on the windows of a seed, all from one pass over each."""
        if seed in found:
            return found[seed]
        reader, tokenizer, whole = opened()
        place, sums, size = list(seeds).index(seed), dict.fromkeys(names, 0.0), 0
        for row in whole[place * windows : (place + 1) * windows, None]:
            prompt, rest = reader.read(row[:, :length]), row[:, length:]
            size += len(tokenizer.decode(rest[0]).encode())
            scorers = {n: OnceScored(make(seed)) for n, make in SCORERS.items() if n not in QUADRATIC}
            for i, ratio in enumerate(ratios):
                kept = {n: prompt.kept(KVCompression(s, Ratio(ratio))) for n, s in scorers.items()}
                choices = list(kept.values()) if i else [None, *kept.values()]
                logits = prompt.follow(choices, rest[:, :-1])
                first = prompt.last[None].expand(len(choices), -1, -1)
                log_p = torch.cat([first, logits], 1).float().log_softmax(-1)
                cost = -log_p.gather(-1, rest.expand(len(choices), -1).unsqueeze(-1)).sum((1, 2)) / math.log(2)
                labels = [label(n, ratio) for n in kept]
                for name, value in zip(labels if i else [ALL, *labels], cost.tolist(), strict=True):
                    sums[name] += value
        found[seed] = {name: value / size for name, value in sums.items()}
        return found[seed]

    techniques = [n for n in SCORERS if n not in QUADRATIC]
    names = [ALL, *(label(n, ratio) for n in techniques for ratio in ratios)]
    key = identity((model, str(dtype), length, more, list(ratios), windows, list(seeds)))
    result: dict[str, Any] = {
        "what": QUESTION, "machine": machine(), "model": models.title(model),
        "dtype": str(dtype).removeprefix("torch."), "length": length, "more": more, "windows": windows,
        **study(names, lambda name, seed: {"bits per byte": bits(seed)[name]}, "bits per byte", ALL, seeds, progress,
                keep, key),
    }  # fmt: skip
    if pictures is not None:
        rows = {row["name"]: row for row in result["rows"]}
        curves = {
            n: [(r, rows[label(n, r)]["against"]["mean"], rows[label(n, r)]["against"]["half"]) for r in ratios]
            for n in techniques
        }
        picture(
            Path(pictures) / "real-eviction-text-cpu.svg", curves, "share of keys evicted",
            "bits per byte more than with all keys", f"{result['model'].partition(',')[0]}: real text that goes on",
            dashed=("random",),
        )  # fmt: skip
    return result
