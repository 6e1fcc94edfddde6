"""State size buys recall: what a model can look up again, by how many numbers it remembers a sequence with.

``attnlib bench --suite recall --out benchmarks/results`` measures again what ``recall-cpu.json`` holds and draws it.
The task is multi-query associative recall (Arora et al., 2023, arXiv 2312.04927): a sequence of pairs of a key and a
value, then keys again in another order with other symbols between them, at which the value is to be told. All models
are two blocks of one width without positions: a gated short convolution, which sees which value follows which key, and
the mechanism under test, which has to remember that. The width of keys in Based's linear attention is the dial of its
frontier (arXiv 2402.18668, figure 2); its window is another; softmax attention remembers everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.tiny import TinyBackbone
from ...nn.registry import create
from ..clock import machine
from ..small import Progress, fit, picture, study

DIM, HEADS, VOCABULARY, LENGTH = 64, 1, 48, 48
#: Pairs in a sequence; half of the vocabulary are keys.
PAIRS = (4, 8, 16)
METRIC = f"recall of {PAIRS[-1]} pairs"
BASELINE = "softmax attention"
CONVOLUTION: dict[str, Any] = dict(name="based-conv", kernel_size=3, expand=2)

Spec = dict[str, Any]

#: Contestant -> the mechanism of its second block, or of both blocks.
CONTESTANTS: dict[str, Spec | tuple[Spec, Spec]] = {
    BASELINE: dict(name="softmax-attention", num_heads=HEADS, causal=True, rotary=10000.0),
    **{f"Based, keys of {f}": dict(name="based", num_heads=HEADS, feature_dim=f, chunk=64) for f in (1, 2, 4, 8)},
    "Based, keys of 2, no convolution": (dict(name="based", num_heads=HEADS, feature_dim=2, chunk=64),) * 2,
    "window of 8": dict(name="based-window", num_heads=HEADS, window_size=8),
    "window of 24": dict(name="based-window", num_heads=HEADS, window_size=24),
    "lightning attention": dict(name="lightning-attention-2", num_heads=HEADS, chunk=64),
    "Mamba, 16 states": dict(name="mamba", d_state=16),
}


def pairs(
    count: int, number: int, length: int = LENGTH, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sequences of key-value pairs, then of the keys again.

    Args:
        count: sequences.
        number: pairs in each; their keys differ.
        length: symbols.
        generator: of what is drawn.

    Returns:
        Symbols (count, length), and the value to tell at each, -100 where there is none. Behind the pairs stand the
        keys in another order, at random places; the other places hold symbol 0.

    >>> symbols, values = pairs(1, 2, 8, torch.Generator().manual_seed(0))
    >>> told = values[0] >= 0
    >>> sorted(symbols[0][told].tolist()) == sorted(symbols[0, :4:2].tolist())
    True
    """
    if length < 3 * number:
        raise ValueError(f"length={length} must be at least 3 * number={3 * number}: pairs, and their keys again")
    half = VOCABULARY // 2
    keys = 1 + torch.rand(count, half - 1, generator=generator).argsort(1)[:, :number]
    values = half + torch.randint(half, (count, number), generator=generator)
    symbols = torch.zeros(count, length, dtype=torch.long)
    symbols[:, : 2 * number : 2], symbols[:, 1 : 2 * number : 2] = keys, values
    places = 2 * number + torch.rand(count, length - 2 * number, generator=generator).argsort(1)[:, :number]
    told = torch.full_like(symbols, -100).scatter(1, places, values)
    return symbols.scatter(1, places, keys), told


class Reader(nn.Module):
    """Embedding, two blocks, a norm and a map to symbols."""

    def __init__(self, mechanisms: Sequence[Spec]):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        left = [dict(spec) for spec in mechanisms]

        def make() -> nn.Module:
            spec = left.pop(0)
            return create(spec.pop("name"), dim=DIM, **spec)

        self.body = TinyBackbone(DIM, len(left), make)
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, symbols: Tensor) -> Tensor:
        """(B, N) symbols to (B, N, VOCABULARY)."""
        return self.head(self.body(self.embed(symbols)).y)

    @torch.no_grad()
    def state_size(self, length: int = LENGTH) -> int:
        """Numbers that all blocks keep of one sequence of this length to go on from it."""
        total, x = 0, torch.zeros(1, length, DIM)
        for block in self.body.blocks:
            state = block.mixer(x, returns=("state",)).state  # type: ignore[operator, union-attr]
            total += sum(t.numel() for t in state.tensors.values() if t.is_floating_point())
        return total


def build(name: str) -> Reader:
    """The model of a contestant."""
    spec = CONTESTANTS[name]
    return Reader(spec if isinstance(spec, tuple) else (CONVOLUTION, spec))


@torch.no_grad()
def recalled(model: nn.Module, symbols: Tensor, values: Tensor) -> float:
    """Percent of the values that are told right."""
    model.eval()
    told = values >= 0
    return 100 * float((model(symbols).argmax(-1) == values)[told].float().mean())


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 500,
    batch: int = 16,
    lr: float = 3e-3,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 256,
    names: Sequence[str] = tuple(CONTESTANTS),
) -> dict[str, Any]:
    """Train every contestant on sequences of 4, 8 and 16 pairs, and count what it tells right on new ones.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``recall-cpu.svg``.
        steps, batch, lr, seeds: of training.
        tested: sequences of each number of pairs.
        names: contestants, the baseline among them.

    Returns:
        Plain values, for JSON.
    """
    tests = {n: pairs(tested, n, generator=torch.Generator().manual_seed(1000 + n)) for n in PAIRS}

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        number = PAIRS[int(torch.randint(len(PAIRS), (), generator=generator))]
        return pairs(batch, number, generator=generator)

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        symbols, values = given
        told = values >= 0
        return F.cross_entropy(model(symbols)[told], values[told])

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = build(name)
        fit(model, draw, loss, steps, lr=lr, seed=seed)
        found = {f"recall of {n} pairs": recalled(model, *test) for n, test in tests.items()}
        learned = sum(p.numel() for p in model.parameters())
        return {**found, "state": model.state_size(), "parameters": learned}

    found = study(names, run, METRIC, BASELINE, seeds, progress, keep, (steps, batch, lr, tested))
    if pictures is not None:
        draw_frontier(Path(pictures) / "recall-cpu.svg", found["rows"])
    return {
        "what": "multi-query associative recall by size of state", "machine": machine(), "length": LENGTH,
        "vocabulary": VOCABULARY, "pairs": list(PAIRS), "dim": DIM, "steps": steps, "batch": batch, "lr": lr,
        "tested": tested, "chance": 100 / (VOCABULARY // 2), **found,
    }  # fmt: skip


#: Contestants whose points are joined: one dial at several settings.
FAMILIES: dict[str, Callable[[str], bool]] = {
    "Based, by width of keys": lambda name: name.startswith("Based") and "no convolution" not in name,
    "window, by size": lambda name: name.startswith("window"),
}


def draw_frontier(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Recall against numbers of state, a line for each dial."""
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in rows:
        family = next((f for f, belongs in FAMILIES.items() if belongs(row["name"])), row["name"])
        found = curves.setdefault(family, [])
        found.append((row["state"]["mean"], row[METRIC]["mean"], row[METRIC]["half"]))
    ordered = {name: sorted(points) for name, points in curves.items()}
    title = "state size buys recall"
    picture(path, ordered, "numbers kept of a sequence", f"{METRIC}, %", title, log="x", dashed=(BASELINE,))
