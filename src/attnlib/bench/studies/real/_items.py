"""What pretrained decoders are asked in these studies: real text, a needle in it, copying; and what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("harbour", "museum", "orchard", "library", "station", "theatre", "factory", "lighthouse")
DIGITS = 5


@dataclass(frozen=True)
class Items:
    """Rows of one length, and at which places the next token counts.

    Args:
        ids: (B, L).
        counts: (B, L) boolean; where ``counts[b, i]``, the loss of token ``i`` given those before it is measured.
        without: (B, L) the same rows with what the answer depends on taken away, for scores that compare; ``None``
            where there is no such thing.
    """

    ids: Tensor
    counts: Tensor
    without: Tensor | None = None

    def half(self, which: int) -> list[int]:
        """Every second row."""
        return list(range(which, len(self.ids), 2))


def text_items(tokens: Tensor, rows: int, length: int) -> Items:
    """Windows of real text, spread over it; the first sixteen tokens only prepare."""
    starts = torch.linspace(0, len(tokens) - length - 1, rows).long()
    ids = torch.stack([tokens[s : s + length] for s in starts.tolist()])
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, 16:] = True
    return Items(ids, counts)


def needle_items(tokenizer: Any, tokens: Tensor, rows: int, length: int, seed: int = 0) -> Items:
    """A sentence with five digits inside real text, and the same sentence again up to the digits.

    The needle stands at depths spread from the start to the end of the text around it.
    """
    rng = np.random.default_rng(seed)
    found, bare, counts = [], [], []
    for row in range(rows):
        name = NAMES[row % len(NAMES)]
        code = "".join(str(d) for d in rng.integers(0, 10, DIGITS))
        needle = tokenizer(f"\nThe secret code of the {name} is {code}.\n", add_special_tokens=False)["input_ids"]
        asked = tokenizer(
            f"\nQuestion: What is the secret code of the {name}?\nAnswer: The secret code of the {name} is",
            add_special_tokens=False,
        )["input_ids"]
        said = tokenizer(f" {code}", add_special_tokens=False)["input_ids"]
        filler = length - len(needle) - len(asked) - len(said)
        if filler < 8:
            raise ValueError(f"length={length} leaves no room for text around the needle")
        start = int(rng.integers(0, len(tokens) - 2 * length))
        around = tokens[start : start + filler].tolist()
        depth = round(row / max(1, rows - 1) * (filler - 4)) + 2
        found.append([*around[:depth], *needle, *around[depth:], *asked, *said])
        other = tokens[start + filler : start + filler + len(needle)].tolist()
        bare.append([*around[:depth], *other, *around[depth:], *asked, *said])
        counts.append([i >= length - DIGITS for i in range(length)])
    return Items(torch.tensor(found), torch.tensor(counts), torch.tensor(bare))


def copying_items(rows: int, length: int, vocabulary: Sequence[int], seed: int = 0) -> Items:
    """Random tokens and the same again: what induction heads are for."""
    generator = torch.Generator().manual_seed(seed)
    low, high = vocabulary
    once = torch.randint(low, high, (rows, length // 2), generator=generator)
    other = torch.randint(low, high, (rows, length // 2), generator=generator)
    counts = torch.zeros(rows, 2 * (length // 2), dtype=torch.bool)
    counts[:, length // 2 + 1 :] = True
    return Items(torch.cat([once, once], 1), counts, torch.cat([other, once], 1))


@torch.no_grad()
def row_losses(model: Any, hidden: Tensor, items: Items, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Mean loss of each row's counted tokens (R,), and the share of them that come first (R,).

    Args:
        model: a causal language model of transformers.
        hidden: (R, L, C) normalised states; R is a multiple of the rows of ``items``, which repeat.
        items: what was read.
        chunk: tokens whose scores are made at once.
    """
    times = len(hidden) // len(items.ids)
    target, counts = items.ids.repeat(times, 1)[:, 1:], items.counts.repeat(times, 1)[:, 1:]
    picked, wanted = hidden[:, :-1][counts], target[counts]
    losses, right = [], []
    for some, want in zip(picked.split(chunk), wanted.split(chunk), strict=True):
        scores = model.lm_head(some).float()
        losses.append(F.cross_entropy(scores, want, reduction="none"))
        right.append((scores.argmax(-1) == want).float())
    per_row = counts.sum(1)

    def mean(values: list[Tensor]) -> Tensor:
        rows = torch.arange(len(counts)).repeat_interleave(per_row)
        return torch.zeros(len(counts)).index_add(0, rows, torch.cat(values)) / per_row

    return mean(losses), mean(right)


@torch.no_grad()
def states(model: Any, items: Items) -> list[Tensor]:
    """Residual stream before every block, and the normalised states at the end."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda m, a, k: found.append(a[0] if a else k["hidden_states"]),
                                             with_kwargs=True) for layer in model.model.layers]  # fmt: skip
    try:
        out = model.model(input_ids=items.ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, out]
