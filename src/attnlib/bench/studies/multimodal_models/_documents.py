"""A small reader of toy documents with two heads: one answers what stands at a key, one reads a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....checks import check_choice

KEYS, VALUES, LINES, GLYPH = 8, 12, 6, 16


class Documents(NamedTuple):
    """Keys (B, 6), all different, values (B, 6), and the grain of how the values are written (B, 6, 16)."""

    keys: Tensor
    values: Tensor
    grain: Tensor

    def at(self, rows: Tensor) -> Documents:
        """Some of them."""
        return Documents(*(t[rows] for t in self))


def documents(count: int, g: torch.Generator, habit: float, noise: float = 0.6) -> Documents:
    """Documents in which a key has its usual value with a probability of ``habit``, else any."""
    keys = torch.rand(count, KEYS, generator=g).argsort(1)[:, :LINES]
    values = torch.randint(0, VALUES, (count, LINES), generator=g)
    values = torch.where(torch.rand(count, LINES, generator=g) < habit, (keys * 5 + 3) % VALUES, values)
    return Documents(keys, values, noise * torch.randn(count, LINES, GLYPH, generator=g))


class Reader(nn.Module):
    """One block of a transformer over six lines and the questions behind them, and a head for each kind of question."""

    glyphs: Tensor

    def __init__(self, dim: int = 32):
        super().__init__()
        self.key, self.place, self.task = nn.Embedding(KEYS, dim), nn.Embedding(LINES, dim), nn.Embedding(2, dim)
        self.see = nn.Linear(GLYPH, dim)
        self.register_buffer("glyphs", torch.randn(VALUES, GLYPH, generator=torch.Generator().manual_seed(99)))
        self.mix = nn.TransformerEncoderLayer(dim, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, VALUES)) for _ in range(2)
        )

    def forward(self, some: Documents, asked: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """Logits (B, 12) of every question: ``(0, keys (B,))`` for cognition, ``(1, lines (B,))`` for perception."""
        x = self.key(some.keys) + self.place.weight + self.see(self.glyphs[some.values] + some.grain)
        q = [(self.place if task else self.key)(i) + self.task.weight[task] for task, i in asked]
        h = self.mix(torch.cat([x, torch.stack(q, 1)], 1))[:, LINES:]
        return [self.heads[task](h[:, j]) for j, (task, _) in enumerate(asked)]


def _asked(some: Documents, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    rows, line = torch.arange(len(some.keys)), torch.randint(0, LINES, (len(some.keys),), generator=g)
    return some.keys[rows, line], line, some.values[rows, line]


def tune(
    model: Reader, steps: int, g: torch.Generator, tasks: Sequence[str], given: Documents | float, lr: float,
    batch: int = 64,
) -> None:  # fmt: skip
    """Cross-entropy on tasks in turn: ``"answer"``, ``"read"``, or ``"connect"``, both at once on one line.

    Args:
        model: trained in place.
        steps: updates.
        g: of all draws.
        tasks: in turn.
        given: documents to draw from, or the habit of fresh ones.
        lr: of AdamW.
        batch: documents of an update.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        task = tasks[step % len(tasks)]
        check_choice("tasks", task, ("answer", "read", "connect"))
        if isinstance(given, Documents):
            some = given.at(torch.randint(0, len(given.keys), (batch,), generator=g))
        else:
            some = documents(batch, g, given)
        key, line, value = _asked(some, g)
        questions = {"answer": [(0, key)], "read": [(1, line)], "connect": [(0, key), (1, line)]}[task]
        said = model(some, questions)
        loss = torch.stack([F.cross_entropy(logits, value) for logits in said]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def answers(model: Reader, some: Documents, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What is answered and what is read of a line of every document, each asked for alone, and what stands there."""
    key, line, value = _asked(some, g)
    return model(some, [(0, key)])[0].argmax(-1), model(some, [(1, line)])[0].argmax(-1), value
