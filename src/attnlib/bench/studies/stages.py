"""The stages of a conversion: softmax to linear, trained to agree, and then adapted, beside what a sceptic would do.

``attnlib bench --suite stages --out benchmarks/results`` measures again what ``stages-cpu.json`` holds and draws it. A
small decoder of ours is trained on real text, byte by byte; its attention becomes linear; its maps learn to agree with
what was there; low-rank adapters then learn the next byte (LoLCATs' second stage). Adapters learn from text, which any
model may: the model itself gets as many steps of the same adapters, and so does the conversion that skipped the
transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import convert
from ..clock import machine
from ..converting import Bytes, batches_of, bits_per_byte, our_decoder
from ..data import files
from ..small import Progress, picture, study

TEACHER = "softmax (the model itself)"
WINDOW = 8
MAPS: dict[str, Any] = {"feature_options": {"identity": True}}
#: Contestant -> target, settings, loss of the transfer.
CONTESTANTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    TEACHER: ("spt", {"dense": True}, None),  # dense attention, so that adapters come to it in the same way
    "1 + elu": ("elu1", {}, None),
    "Hedgehog": ("hedgehog", {}, "mse"),
    f"window of {WINDOW}": ("window", {"window_size": WINDOW}, None),
    f"LoLCATs, window of {WINDOW}, no transfer": ("lolcats", {"window_size": WINDOW, **MAPS}, None),
    f"LoLCATs, window of {WINDOW}": ("lolcats", {"window_size": WINDOW, **MAPS}, "mse"),
}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 40,
    adapter_steps: int = 40,
    base_steps: int = 250,
    length: int = 128,
    batch: int = 4,
    held_windows: int = 32,
    rank: int = 8,
    lr: float = 2e-3,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train a decoder, convert it as every contestant does with every seed, and adapt all of them alike.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``stages-cpu.svg``.
        steps: of the transfer.
        adapter_steps: of the adapters.
        base_steps: of the decoder.
        length, batch: of windows and steps.
        held_windows: for the test.
        rank: of the adapters.
        lr: of the adapters.
        seeds: of texts and adapters.

    Returns:
        Plain values, for JSON.
    """
    tokenizer, data = Bytes(), files.text()

    def ids(part: Tensor) -> Tensor:
        return torch.tensor(tokenizer(bytes(part.tolist()).decode())["input_ids"])

    train, test = ids(data.train), ids(data.test)
    model = our_decoder(train, base_steps)

    def run(name: str, seed: int) -> dict[str, float]:
        to, settings, loss = CONTESTANTS[name]
        held = batches_of(test, length, held_windows, most=1, seed=seed)
        given = batches_of(train, length, batch, seed=seed)
        with torch.random.fork_rng(devices=[]), convert.linearize(model, to, **settings) as conversion:
            torch.manual_seed(seed)
            found = {"converted": bits_per_byte(model, tokenizer, held)}
            if loss is not None:
                conversion.fit(given, loss, steps=steps, lr=1e-2)
            found["transferred"] = bits_per_byte(model, tokenizer, held)
            conversion.lora(rank)
            conversion.fit(given[steps:] + given[:steps], "task", steps=adapter_steps, lr=lr, clip=1.0)
            found["adapted"] = bits_per_byte(model, tokenizer, held)
            conversion.merge()
            found["merged"] = bits_per_byte(model, tokenizer, held)
        return found

    key = (steps, adapter_steps, base_steps, length, batch, held_windows, rank, lr)
    rows = study(list(CONTESTANTS), run, "adapted", TEACHER, seeds, progress, keep, key)
    result = {
        "what": "stages of a conversion of our decoder on real text", "machine": machine(), "text": data.source,
        "split": data.split, "parameters": sum(p.numel() for p in model.parameters()), "steps": steps,
        "adapter_steps": adapter_steps, "base_steps": base_steps, "length": length, "batch": batch,
        "held_windows": held_windows, "rank": rank, "lr": lr, **rows,
    }  # fmt: skip
    if pictures is not None:
        stages = ("converted", "transferred", "adapted")
        curves = {r["name"]: [(s, r[s]["mean"], r[s]["half"]) for s in stages] for r in rows["rows"]}
        picture(Path(pictures) / "stages-cpu.svg", curves, "stage", "bits per byte", "Our decoder, converted")
    return result
