"""Are heavy entries found? Sorted hashes against samples and windows that read as many keys.

``attnlib bench --suite heavy --out benchmarks/results`` measures again what ``heavy-cpu.json`` holds and draws it;
``make models`` fetches the model. HyperAttention (Han et al., 2023, arXiv 2310.05869) sorts queries and keys by a hash
and reads blocks of sorted keys exactly. Two worlds: *planted pairs*, in which every query has one heavy key at a random
place, and the queries and keys of SmolLM2-135M on text that was held out. *Recall* is the share of a query's exact
softmax weight that lies on the keys it reads; *rest*, the same share of the weight that neither a sliding window nor
the first keys hold; *error*, of the output of softmax over these keys alone, relative to the exact one. Whatever does
not hash reads, row by row, as many keys as blocks by hash do. All numbers are of the second half of the queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import hooks
from ...ops.hyper import DRAWS, hyper_attention, hyper_codes
from .. import models
from ..clock import machine
from ..converting import batches_of, tokens_of
from ..data import files
from ..small import Progress, picture, study

BLOCKS = (16, 32, 64)
METRIC = "recall at blocks of 32"
WINDOW, HASH, FIRST = "sliding window", "blocks by hash (HyperAttention)", 4
DIRECTIONS = 7


@dataclass(frozen=True, eq=False)
class World:
    """Heads of one layer: (1, H, N, D) queries, keys and values, and (1, H, 1, D) the keys' mean elsewhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    mean: Tensor
    causal: bool
    scale: float
    counts: dict[int, Tensor] = field(default_factory=dict)  # keys per row by block, once they are known

    @property
    def late(self) -> slice:
        """The queries that are looked at."""
        return slice(self.q.shape[2] // 2, None)

    @functools.cached_property
    def hidden(self) -> Tensor:
        """(N / 2, N) boolean: what late queries may not read."""
        n = self.q.shape[2]
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        return (later if self.causal else torch.zeros_like(later))[self.late]

    @functools.cached_property
    def weights(self) -> Tensor:
        """(1, H, N / 2, N) exact attention of late queries."""
        scores = self.q[:, :, self.late] @ self.k.mT * self.scale
        return scores.masked_fill(self.hidden, float("-inf")).softmax(-1)


def planted(seed: int, n: int = 1024, heads: int = 4, width: int = 64, noise: float = 0.3) -> World:
    """Random keys, and queries that point at one of them each, nearly."""
    generator = torch.Generator().manual_seed(seed)
    k, v, around = torch.randn(3, 1, heads, n, width, generator=generator)
    at = torch.stack([torch.randperm(n, generator=generator) for _ in range(heads)])[None, ..., None]
    q = k.gather(2, at.expand_as(k)) + noise * around
    return World(q, k, v, torch.zeros(1, heads, 1, width), False, width**-0.5)


class _Reads(hooks.Intervention):
    """Keeps what attention reads."""

    name = "reads"

    def __init__(self, layers: Sequence[int]):
        self.layers = list(layers)
        self.found: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def around_attention(self, site: Any, q: Tensor, k: Tensor, v: Tensor, call: Any) -> Tensor:
        copies = q.shape[1] // k.shape[1]
        many = (t.float().repeat_interleave(copies, 1) for t in (k, v))
        self.found.append((q.float(), *many, site.scale))  # type: ignore[arg-type]
        out: Tensor = call(q, k, v)
        return out


@torch.no_grad()
def trained(model: Any, windows: Sequence[Tensor], layers: Sequence[int]) -> list[list[World]]:
    """What some layers of a causal model read, for every window (1, N) of tokens but the first, which gives means."""
    reads = _Reads(layers)
    with hooks.attach(model, reads):
        for ids in windows:
            model(input_ids=ids, use_cache=False)
    rows = [reads.found[i : i + len(layers)] for i in range(0, len(reads.found), len(layers))]
    means = [k.mean(2, keepdim=True) for _, k, _, _ in rows[0]]
    return [[World(*read[:3], mean, True, read[3]) for read, mean in zip(row, means, strict=True)] for row in rows[1:]]


def read_by_hash(world: World, block: int, directions: Tensor, strict: bool = True, centered: bool = False) -> Tensor:
    """(1, H, N / 2, N) boolean: the keys that blocks of sorted keys let late queries read exactly."""
    k = world.k - world.mean if centered else world.k
    n = k.shape[2]
    codes = hyper_codes(world.q, k, directions, strict)
    # Queries of zeros weigh all that they read alike, and values that are unit vectors tell which keys these are.
    told: Tensor = hyper_attention(
        torch.zeros_like(k), torch.zeros_like(k), torch.eye(n).expand(1, k.shape[1], n, n), directions,
        block_size=block, sample_size=0, min_seq_len=block, causal=world.causal, codes=codes, strict=strict,
    )  # fmt: skip
    return told[:, :, world.late] > 0


def _ranked(scores: Tensor, world: World, counts: Tensor) -> Tensor:
    """(1, H, N / 2, N): the ``counts`` (1, H, N / 2) keys of the largest scores in each row that may be read."""
    scores = scores.masked_fill(world.hidden, float("-inf"))
    ordered = scores.expand(*counts.shape, -1).sort(-1, descending=True).values
    return scores >= ordered.gather(-1, counts.unsqueeze(-1) - 1)


def _near(world: World, counts: Tensor, first: int = 0) -> Tensor:
    at = torch.arange(world.q.shape[2])
    scores = -(at[world.late, None] - at - 0.25).abs()  # of two keys as near, the earlier one
    scores[:, :first] = torch.arange(first, 0, -1)
    ordered = scores.masked_fill(world.hidden, float("-inf")).sort(-1, descending=True).values
    least = ordered.expand(*counts.shape, -1).gather(-1, counts.unsqueeze(-1) - 1)
    return (scores >= least) & ~world.hidden


def _random(world: World, counts: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return _ranked(torch.rand(world.weights.shape, generator=generator), world, counts)


#: Contestant -> which keys are read, from the world, keys per row, block, directions and seed.
READS: dict[str, Callable[[World, Tensor, int, Tensor, int], Tensor]] = {
    "largest weights, the most there is": lambda w, c, b, d, s: _ranked(w.weights, w, c),
    HASH: lambda w, c, b, d, s: read_by_hash(w, b, d),
    "blocks by rank, as released": lambda w, c, b, d, s: read_by_hash(w, b, d, strict=False),
    "blocks by hash, keys centered": lambda w, c, b, d, s: read_by_hash(w, b, d, centered=True),
    "blocks half as large, and a sample": lambda w, c, b, d, s: read_by_hash(w, b // 2, d),
    WINDOW: lambda w, c, b, d, s: _near(w, c),
    f"window and the first {FIRST} keys": lambda w, c, b, d, s: _near(w, c, FIRST),
    "random keys (sampling)": lambda w, c, b, d, s: _random(w, c, s),
}
SAMPLED = "blocks half as large, and a sample"


def numbers(worlds: Sequence[World], name: str, seed: int, blocks: Sequence[int] = BLOCKS) -> dict[str, float]:
    """Recall, rest, error in percent and keys per query of a contestant, averaged over layers."""
    found: dict[str, list[float]] = {}
    for number, world in enumerate(worlds):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        heads, _, width = world.q.shape[1:]
        directions = torch.randn(width, DIRECTIONS, generator=generator)
        draws = torch.randint(DRAWS, (heads, max(blocks)), generator=generator)
        weights = world.weights
        exact = weights @ world.v
        for block in blocks:
            if block not in world.counts:
                world.counts[block] = read_by_hash(world, block, directions).sum(-1)
            counts = world.counts[block]
            read = READS[name](world, counts, block, directions, 1000 * seed + number)
            known = weights * read
            beyond = weights * ~_near(world, counts, FIRST)
            if name == SAMPLED:
                half = block // 2
                out = hyper_attention(
                    world.q, world.k, world.v, directions, draws[:, :half], block_size=half, sample_size=half,
                    min_seq_len=block, causal=world.causal, scale=world.scale,
                )[:, :, world.late]  # fmt: skip
            else:
                out = known @ world.v / known.sum(-1, keepdim=True).clamp(min=1e-30)
            for what, value in (
                ("recall", 100 * known.sum(-1).mean()),
                ("rest", 100 * (beyond * read).sum() / beyond.sum().clamp(min=1e-30)),
                ("error", 100 * (out - exact).norm() / exact.norm()),
                ("keys", read.sum(-1).double().mean()),
            ):
                found.setdefault(f"{what} at blocks of {block}", []).append(float(value))
    return {what: sum(values) / len(values) for what, values in found.items()}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    n: int = 1024,
    layers: Sequence[int] = tuple(range(4, 30, 10)),
    seeds: tuple[int, ...] = (0, 1, 2),
    names: Sequence[str] = tuple(READS),
    blocks: Sequence[int] = BLOCKS,
    model: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """What every contestant reads of planted pairs, and of the attention of a trained model.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``heavy-planted-cpu.svg`` and ``heavy-trained-cpu.svg``.
        n: tokens.
        layers: of the model.
        seeds: of directions, draws and planted pairs; each reads a window of text of its own.
        names: contestants of :data:`READS`, the sliding window among them.
        blocks: sorted keys of a block; 32 among them.
        model: a causal model of transformers and its tokenizer; SmolLM2-135M by default.

    Returns:
        Plain values, for JSON.
    """

    @functools.cache
    def captured() -> list[list[World]]:
        net, tokenizer = models.load("smollm2", dtype=torch.bfloat16) if model is None else model
        windows = batches_of(tokens_of(tokenizer, files.text().test), n, most=len(seeds) + 1)
        return trained(net, [w["input_ids"] for w in windows], layers)

    generated = functools.cache(lambda seed: [planted(seed, n)])
    worlds: dict[str, Callable[[int], list[World]]] = {
        "planted pairs": generated,
        "trained maps": lambda seed: captured()[seeds.index(seed)],
    }
    result: dict[str, Any] = {
        "what": "attention weight on the keys that are read, by how many are read", "machine": machine(), "tokens": n,
        "layers": list(layers), "blocks": list(blocks), "directions": DIRECTIONS, "worlds": {},
    }  # fmt: skip
    for world, make in worlds.items():

        def run(name: str, seed: int, make: Callable[[int], list[World]] = make) -> dict[str, float]:
            with torch.no_grad():
                return numbers(make(seed), name, seed, blocks)

        found = study(names, run, METRIC, WINDOW, seeds, progress, keep, (world, n, list(layers), list(blocks)))
        result["worlds"][world] = found
        if pictures is not None:
            curves = {
                r["name"]: [
                    (r[f"keys at blocks of {b}"]["mean"], *(r[f"recall at blocks of {b}"][x] for x in ("mean", "half")))
                    for b in blocks
                ]
                for r in found["rows"]
            }
            picture(
                Path(pictures) / f"heavy-{world.split()[0]}-cpu.svg", curves, f"keys read by a query, of {n}",
                "recall: share of attention, %", f"{world}: attention on the keys that are read", log="x",
                dashed=(WINDOW, "random keys (sampling)"),
            )  # fmt: skip
    return result
