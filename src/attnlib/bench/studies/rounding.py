"""Weights of few bits in a small Llama: rounding, GPTQ, GPTQ behind a rotation, and RSQ, which weighs tokens.

``attnlib bench --suite rounding --out benchmarks/results`` measures again what ``rounding-cpu.json`` holds and draws
it. A Llama of transformers learns the next byte of the documentation of Python; then all maps of its layers are put on
a grid of 4, 3 or 2 bits with a clipped step per row, embeddings and norms staying as they are. RSQ (Sung et al., 2025,
arXiv 2503.01820) is a rotation of the residual stream, then GPTQ whose moments weigh a token by the attention that it
receives. What a sceptic holds against it is the same without weights: a rotation, then GPTQ. Every contestant starts
from the same trained weights and sees the same calibration text; a seed draws weights, text and rotation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...convert.agreement import task_loss
from ...convert.quantize import Grid
from ...convert.rotation import rotate
from ...convert.rsq import Weighting, quantize
from ..clock import machine
from ..converting import Bytes, batches_of, bits_per_byte, tokens_of
from ..data import files
from ..small import Progress, fit, picture, study


@dataclass(frozen=True)
class Contestant:
    """Args: whether the stream is rotated first; how weights are put on the grid; what tokens weigh."""

    rotated: bool = False
    method: str = "gptq"
    weighting: Weighting = Weighting("uniform")


BASELINE, OURS = "rotation, GPTQ", "RSQ"
CONTESTANTS = {
    "rounding": Contestant(method="nearest"),
    "rotation, rounding": Contestant(True, "nearest"),
    "GPTQ": Contestant(),
    BASELINE: Contestant(True),
    "weighted GPTQ": Contestant(weighting=Weighting("attncon")),
    OURS: Contestant(True, weighting=Weighting("attncon")),
    "RSQ, least weight 0.1": Contestant(True, weighting=Weighting("attncon", low=0.1)),
}


def trained(ids: Tensor, steps: int, seed: int, length: int = 128, batch: int = 16) -> Any:
    """A Llama of transformers, trained on the next byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
                initializer_range=0.1,
            )
        )  # fmt: skip

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        at = torch.randint(ids.numel() - length, (batch, 1), generator=generator)
        return {"input_ids": ids[at + torch.arange(length)]}

    fit(model, draw, task_loss, steps, 4e-3, seed)
    return model.eval()


def quantized(
    model: Any, entry: Contestant, tokens: Tensor, bits: int, seed: int, grid: Grid | None = None
) -> tuple[Any, float]:
    """A copy of few bits, and its mean error on the (weighted) calibration inputs."""
    made = copy.deepcopy(model)
    if entry.rotated:
        rotate(made, seed=seed)
    told = quantize(made, tokens, bits, entry.weighting, grid=grid, method=entry.method)
    return made, sum(told.errors.values()) / len(told.errors)


def bits_left(
    open_model: Callable[[int], tuple[Any, Any, Tensor, list[dict[str, Any]]]],
    contestants: dict[str, Contestant],
    bits: Sequence[int],
    seeds: Sequence[int],
    progress: Progress | None,
    keep: str | Path | None,
    key: Any,
    grid: Callable[[int], Grid] | None = None,
    same: bool = False,
) -> dict[str, Any]:
    """Bits per byte by number of bits: a study each, seed after seed, so that a model is made once.

    Args:
        open_model: from a seed to model, tokenizer, (S, N) calibration tokens and held-out batches.
        contestants: by name.
        bits: of weights.
        seeds, progress, keep: of :func:`attnlib.bench.small.study`.
        key: what a run depends on beside these.
        grid: from a number of bits to values, where these are not those of :func:`quantize`.
        same: whether every seed has the same model; what is only rounded is then measured once.
    """
    once: dict[tuple[str, int], dict[str, float]] = {}
    held: dict[int, tuple[Any, Any, Tensor, list[dict[str, Any]], float]] = {}
    first: list[float] = []

    def opened(seed: int) -> tuple[Any, Any, Tensor, list[dict[str, Any]], float]:
        if seed not in held:
            held.clear()
            model, tokenizer, tokens, batches = open_model(seed)
            before = bits_per_byte(model, tokenizer, batches) if not (same and first) else first[0]
            first.append(before)
            held[seed] = model, tokenizer, tokens, batches, before
        return held[seed]

    def runner(number: int) -> Callable[[str, int], dict[str, float]]:
        def run(name: str, seed: int) -> dict[str, float]:
            if (name, number) in once:
                return once[name, number]
            entry = contestants[name]
            model, tokenizer, tokens, batches, before = opened(seed)
            made, error = quantized(model, entry, tokens, number, seed, None if grid is None else grid(number))
            after = bits_per_byte(made, tokenizer, batches)
            found = {"bits": after, "lost": after - before, "before": before, "error": error}
            if same and entry.method == "nearest" and not entry.rotated:
                once[name, number] = found
            return found

        return run

    parts: dict[int, list[dict[str, Any]]] = {number: [] for number in bits}
    for seed in seeds:
        for number in bits:
            found = study(list(contestants), runner(number), "bits", BASELINE, (seed,), progress, keep, (key, number))
            parts[number] += found["runs"]
    result = {}
    for number in bits:
        by = {(r["name"], r["seed"]): {k: v for k, v in r.items() if k not in ("name", "seed")} for r in parts[number]}

        def measured(name: str, seed: int, by: Any = by) -> dict[str, float]:
            return by[name, seed]

        result[str(number)] = study(list(contestants), measured, "bits", BASELINE, seeds)
    return result


def drawn(result: dict[str, Any], path: Path, title: str) -> None:
    """The picture: bits per byte lost, by bits of a weight."""
    curves: dict[str, list[tuple[Any, float, float | None]]] = {}
    for number, found in result["weights"].items():
        for row in found["rows"]:
            curves.setdefault(row["name"], []).append((int(number), row["lost"]["mean"], row["lost"]["half"]))
    picture(path, curves, "bits of a weight", "bits per byte lost", title, log=("y",), dashed=(BASELINE,))


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 500,
    bits: Sequence[int] = (4, 3, 2),
    samples: int = 32,
    length: int = 128,
    held: int = 64,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train, put on grids, read held-out text.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``rounding-cpu.svg``.
        steps: of training the model.
        bits: of weights.
        samples, length: sequences of calibration and their bytes.
        held: held-out windows of the same length.
        seeds: of weights, training, calibration text and rotation.

    Returns:
        Plain values, for JSON.
    """
    data, tokenizer = files.text(), Bytes()
    ids, others = tokens_of(tokenizer, data.train), tokens_of(tokenizer, data.test)
    batches = batches_of(others, length, 8, most=max(held // 8, 1))

    def open_model(seed: int) -> tuple[Any, Any, Tensor, list[dict[str, Any]]]:
        generator = torch.Generator().manual_seed(1000 + seed)
        at = torch.randint(ids.numel() - length, (samples, 1), generator=generator)
        return trained(ids, steps, seed), tokenizer, ids[at + torch.arange(length)], batches

    result: dict[str, Any] = {
        "what": "weights of few bits in a small Llama", "data": data.source, "split": data.split,
        "machine": machine(), "steps": steps, "samples": samples, "length": length, "held": held,
        "weights": bits_left(
            open_model, CONTESTANTS, bits, seeds, progress, keep, (steps, samples, length, held)
        ),
    }  # fmt: skip
    if pictures is not None:
        drawn(result, Path(pictures) / "rounding-cpu.svg", "a small Llama on few bits")
    return result
