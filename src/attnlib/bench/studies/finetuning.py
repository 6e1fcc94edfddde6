"""Sparse fine-tuning: what a model learns in equal steps, and what a step of training holds in memory.

``attnlib bench --suite finetuning --out benchmarks/results`` measures again what ``finetuning-cpu.json`` holds and
draws it. SPT (Gui et al., 2023, arXiv 2312.10365) makes LoRA cheaper: queries read the eighth of the keys whose
product-quantized codes match best, and every token uses half of the blocks of each MLP, as a router says. Here a small
decoder of ours, trained on the documentation of Python byte by byte, learns that of a scientific package so, with
either half of it alone, and with plain low-rank adapters of the same rank in all linear layers, which is the baseline.
Codebooks learn from dense attention first, without the task, as in the release.

Memory is counted, not read off the process: the most bytes that one step, forward and backward, holds at once beside
the weights. Dense attention is a fused kernel, which keeps no map; what it held before there were any is shown too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import convert
from ...convert.agreement import listening, task_loss
from ...convert.routed import NAMES, route_mlps
from ..clock import machine, peak_bytes
from ..converting import Bytes, batches_of, bits_per_byte, our_decoder
from ..data import files
from ..small import Progress, picture, study

BEFORE, LORA = "before", "LoRA"
#: How dense attention runs: without maps, or with them.
KERNELS = {False: [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], True: [SDPBackend.MATH]}
#: Weight of the codebooks' losses beside the task, as released.
OWN = 0.01


@dataclass(frozen=True)
class Contestant:
    """Args: keys by codes; MLPs by routers; dense maps that are kept, for memory alone."""

    sparse: bool = False
    routed: bool = False
    maps: bool = False


CONTESTANTS = {
    LORA: Contestant(),
    "LoRA, keys by codes": Contestant(sparse=True),
    "LoRA, routed MLPs": Contestant(routed=True),
    "SPT: both": Contestant(sparse=True, routed=True),
}
#: Whose memory is counted.
COUNTED = {**CONTESTANTS, "LoRA, whole maps": Contestant(maps=True)}


class Tuned:
    """A model prepared as a contestant, until :meth:`restore`."""

    def __init__(self, model: nn.Module, entry: Contestant, rank: int, block: int, seed: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.routed = route_mlps(model, block=block, rank=rank) if entry.routed else None
            self.conversion = convert.linearize(model, "spt", dense=True)
            ends = tuple(name for names in NAMES for name in names if name)
            mlps = [n for n, m in model.named_modules() if type(m) is nn.Linear and n.rpartition(".")[2] in ends]
            own = list(self.conversion._projections())
            self.conversion.lora(rank, alpha=rank, targets=own if entry.routed else [*own, *mlps])
        self.entry, self.model = entry, model
        self.given = list(self.conversion.trained("adapters"))
        self.given += [] if self.routed is None else self.routed.trained()
        self.books = list(self.conversion.trained()) if entry.sparse else []

    def dense(self, flag: bool) -> None:
        for socket in self.conversion.swap.sockets.values():
            mixer: Any = socket.inner
            mixer.dense = flag

    def learn_codes(self, batches: Sequence[Any], steps: int) -> None:
        if self.entry.sparse and steps:
            self.conversion.fit(batches, "own", train=self.books, steps=steps, lr=0.05)
        self.dense(not self.entry.sparse)

    def fit(self, batches: Sequence[Any], steps: int, lr: float, look: Any) -> None:
        loss = {"task": 1.0, "own": OWN} if self.entry.sparse else {"task": 1.0}
        given = [*self.given, *self.books]
        self.conversion.fit(batches, loss, train=given, steps=steps, lr=lr, clip=1.0, progress=look)

    def restore(self) -> None:
        self.conversion.restore()
        if self.routed is not None:
            self.routed.restore()


@contextmanager
def tuned(model: nn.Module, entry: Contestant, rank: int, block: int, seed: int) -> Iterator[Tuned]:
    made = Tuned(model, entry, rank, block, seed)
    try:
        yield made
    finally:
        made.restore()


def step_bytes(model: Any, entry: Contestant, batch: Any, rank: int, block: int) -> dict[str, int]:
    """Peak bytes of one step beside the weights, bytes of what is trained with its gradient and AdamW's moments."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    made = Tuned(model, entry, rank, block, 0)
    given = [*made.given, *made.books]
    chosen = {id(p) for p in given}

    def step() -> None:
        with listening(made.conversion.swap) as own, sdpa_kernel(KERNELS[entry.maps]):
            loss = task_loss(model, batch)
            if entry.sparse:
                loss = loss + OWN * torch.stack(list(own.values())).sum()
        loss.backward()
        for p in given:
            p.grad = None

    try:
        made.dense(not entry.sparse)
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)
        step()  # what is made once
        numbers = sum(p.numel() for p in given)
        return {"step": peak_bytes(step), "trained": numbers, "optimizer": 3 * given[0].element_size() * numbers}
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        made.restore()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 40,
    marks: Sequence[int] = (0, 10, 20, 40),
    code_steps: int = 10,
    base_steps: int = 250,
    length: int = 128,
    batch: int = 4,
    held_windows: int = 32,
    rank: int = 8,
    blocks: int = 8,
    lr: float = 5e-3,
    counted: Sequence[int] = (128, 512, 1024),
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Fine-tune the model as every contestant does with every seed, which draws texts, adapters, routers and codes.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``finetuning-cpu.svg``.
        steps: on the task.
        marks: steps at which bits per byte are measured, the first 0 and the last ``steps``.
        code_steps: of codebooks, before.
        base_steps: of the model that is fine-tuned.
        length, batch: tokens of a window, and windows of a step.
        held_windows: for the test.
        rank: of all low-rank maps.
        blocks: of an MLP; half of them are used.
        lr: of AdamW.
        counted: lengths at which a step's memory is counted, one window each.
        seeds: at least two for an interval.

    Returns:
        Plain values, for JSON.
    """
    if marks[0] != 0 or marks[-1] != steps:
        raise ValueError(f"marks must begin with 0 and end with steps={steps}, got {list(marks)}")
    tokenizer = Bytes()

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    first, second = files.text(), files.documents(packages=("sklearn",))
    model = our_decoder(ids(bytes(first.train.tolist()).decode()), base_steps)
    block = model.config.intermediate_size // blocks
    train, test = (ids("\n\n".join(part)) for part in (second.train, second.test))
    before: dict[int, float] = {}

    def run(name: str, seed: int) -> dict[str, float]:
        held = batches_of(test, length, held_windows, most=1, seed=seed)
        if seed not in before:
            before[seed] = bits_per_byte(model, tokenizer, held)
        if name == BEFORE:
            return {"bits": before[seed]} | {f"bits after {m}": before[seed] for m in marks}
        given = batches_of(train, length, batch, seed=seed)
        found: dict[str, float] = {}

        def look(step: int, loss: float) -> None:
            if step in marks:
                found[f"bits after {step}"] = bits_per_byte(model, tokenizer, held)

        with tuned(model, CONTESTANTS[name], rank, block, seed) as made:
            made.learn_codes(given[-code_steps:], code_steps)
            look(0, 0.0)
            made.fit(given, steps, lr, look)
            trained = sum(p.numel() for p in (*made.given, *made.books))
            return found | {"bits": found[f"bits after {steps}"], "trained": trained}

    key = (steps, list(marks), code_steps, base_steps, length, batch, held_windows, rank, blocks, lr)
    rows = study([BEFORE, *CONTESTANTS], run, "bits", LORA, seeds, progress, keep, key)
    memory: dict[str, dict[int, dict[str, int]]] = {}
    for name, entry in COUNTED.items():
        for n in counted:
            (window,) = batches_of(train, n, most=1)
            memory.setdefault(name, {})[n] = step_bytes(model, entry, window, rank, block)
            if progress is not None:
                progress(f"{name}, {n} tokens: {memory[name][n]['step'] / 2**20:.0f} MiB")
    result = {
        "what": "a language model fine-tuned with attention and MLPs that are sparse", "machine": machine(),
        "parameters": sum(p.numel() for p in model.parameters()), "first": first.source, "text": second.source,
        "split": second.split, "steps": steps, "code_steps": code_steps, "base_steps": base_steps, "length": length,
        "batch": batch, "held_windows": held_windows, "rank": rank, "blocks": blocks, "lr": lr, "memory": memory,
        **rows,
    }  # fmt: skip
    if pictures is not None:
        curves = {
            row["name"]: [(m, row[f"bits after {m}"]["mean"], row[f"bits after {m}"]["half"]) for m in marks]
            for row in rows["rows"]
        }
        picture(Path(pictures) / "finetuning-cpu.svg", curves, "steps", "bits per byte", "Fine-tuned, dense and sparse",
                dashed=(BEFORE, LORA))  # fmt: skip
    return result
