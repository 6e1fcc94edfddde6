"""What weights of three bits cost a pretrained language model: rounding, rotated GPTQ, and RSQ, which weighs tokens.

``attnlib bench --suite real-rounding --out benchmarks/results``. All maps of the layers of SmolLM2 are put on a grid
with a clipped step per row, as in :mod:`..rounding`; a seed draws calibration text and rotation. What a sceptic holds
against RSQ is the same without weights of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....convert.quantize import Grid
from ... import models
from ...clock import machine
from ...converting import batches_of, open_model, tokens_of
from ...data import files
from ...small import Progress
from ..rounding import BASELINE, CONTESTANTS, OURS, bits_left, drawn

QUESTION = "How many more bits does real text take when a pretrained model's weights have few bits?"
MODELS = ("smollm2-135m",)
NAMES = ("rounding", BASELINE, OURS)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    bits: Sequence[int] = (3,),
    samples: int = 8,
    length: int = 256,
    held: int = 16,
    seeds: Sequence[int] = (0, 1, 2),
    model: str = "smollm2-135m",
    text: str | None = None,
) -> dict[str, Any]:
    """Round, read held-out text.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-rounding-cpu.svg``, of more than one number of bits.
        bits: of weights.
        samples, length: sequences of calibration and their tokens.
        held: held-out windows of the same length.
        seeds: of calibration text and rotation.
        model: of :mod:`attnlib.bench.models`, or a folder or name of a causal language model.
        text: to cut windows from, its second half held out.

    Returns:
        Plain values, for JSON.

    Raises:
        DataError: a text with no window.
    """
    opened: list[Any] = []

    def open_once(seed: int) -> tuple[Any, Any, Tensor, list[dict[str, Any]]]:
        if not opened:
            loaded, tokenizer = open_model(model)
            if text is None:
                data = files.text()
                parts = data.train, data.test
            else:
                whole = torch.tensor(list(text.encode()))
                parts = whole[: len(whole) // 2], whole[len(whole) // 2 :]
            ids, others = (tokens_of(tokenizer, part) for part in parts)
            opened.append((loaded.eval(), tokenizer, ids, batches_of(others, length, 4, most=max(held // 4, 1))))
        loaded, tokenizer, ids, batches = opened[0]
        generator = torch.Generator().manual_seed(1000 + seed)
        at = torch.randint(ids.numel() - length, (samples, 1), generator=generator)
        return loaded, tokenizer, ids[at + torch.arange(length)], batches

    result: dict[str, Any] = {
        "what": QUESTION, "machine": machine(), "model": models.title(model), "samples": samples, "length": length,
        "held": held, "clip": "the squared error, in 80 steps",
        "weights": bits_left(
            open_once, {name: CONTESTANTS[name] for name in NAMES}, bits, seeds, progress, keep,
            (model, samples, length, held), grid=lambda b: Grid(b, clip=True, norm=2.0), same=True,
        ),
    }  # fmt: skip
    if pictures is not None and len(bits) > 1:
        drawn(result, Path(pictures) / "real-rounding-cpu.svg", f"{result['model'].partition(',')[0]} on few bits")
    return result
