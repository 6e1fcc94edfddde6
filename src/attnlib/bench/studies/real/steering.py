"""Steering a pretrained decoder toward what its prompt says: two branches, boosted attention, reinforced heads.

``attnlib bench --suite real-steering --out benchmarks/results`` measures again what ``real-steering-cpu.json`` holds. A
grammar makes questions whose answer the model mostly knows, behind a context that says otherwise ("in conflict"), and
the same questions behind a context about another subject ("beside the point"), where the model should say what it
knows. The context is a marked span: its tokens carry the type that images carry in vision-language models, so that the
techniques made for images act on it:

- two branches, ``(1 + alpha) z - alpha z'`` with ``z'`` without the context: context-aware decoding (Shi et al., 2023,
  arXiv 2305.14739), here :class:`attnlib.steer.ContrastiveDecoding` over :class:`attnlib.steer.NoImage`;
- scores of the span raised at the position being written (:class:`attnlib.steer.VisualBoost`, PAI), in all heads, in
  those that look at the span most, and in as many random ones;
- heads amplified whose output depends on the span (:class:`attnlib.steer.HeadReinforcement`, VHR).

Against them stand the model as it is, and the context given twice. Greedy answers count by how they begin; differences
from the model as it is are paired, with a 95 % bootstrap interval over items.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....hooks import attach
from ....hooks.intervention import Intervention
from ....hooks.tokens import IMAGE, PAD, TEXT
from ....look import Statistics
from ....steer import ContrastiveDecoding, HeadReinforcement, NoImage, VisualBoost
from ... import models
from ...clock import machine
from ...small import Progress
from ._facts import Fact, facts
from ._kept import Kept
from ._pictures import panels, save

QUESTION = "does steering make a model say what its prompt says, and what does it cost where the prompt says nothing?"
MODELS = ("smollm2-135m",)

SHOT = "Question: What is the largest planet?\nAnswer: The largest planet is Jupiter.\n\n"
NEW = 4


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, the types of their tokens, and which items they are."""

    ids: Tensor
    types: Tensor
    items: list[int]

    @property
    def mask(self) -> Tensor:
        return (self.types != PAD).long()


def batches(tokenizer: Any, asked: Sequence[Fact], times: int = 1, size: int = 33) -> list[Batch]:
    """Prompts of some facts, the context standing ``times`` times; items of like length together."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = []
    for fact in asked:
        parts = [(tokens(SHOT), TEXT)] + [(tokens(fact.context + "\n"), IMAGE)] * times
        parts.append((tokens(f"Question: {fact.question}\nAnswer: {fact.start}"), TEXT))
        rows.append(([i for ids, _ in parts for i in ids], [kind for ids, kind in parts for _ in ids]))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = max(len(rows[i][0]) for i in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id or 0)
        types = torch.full((len(chosen), width), PAD)
        for at, i in enumerate(chosen):
            ids[at, width - len(rows[i][0]) :] = torch.tensor(rows[i][0])
            types[at, width - len(rows[i][1]) :] = torch.tensor(rows[i][1])
        found.append(Batch(ids, types, chosen))
    return found


def answers(model: Any, tokenizer: Any, asked: Sequence[Fact], made: Callable[[], list[Intervention]], times: int = 1
            ) -> list[str]:  # fmt: skip
    """What the model says to each, greedily, with interventions attached."""
    said = [""] * len(asked)
    for batch in batches(tokenizer, asked, times):
        given = dict(input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=NEW, do_sample=False,
                     pad_token_id=tokenizer.pad_token_id or 0)  # fmt: skip
        what = made()
        steered = attach(model, *what, token_types=batch.types) if what else contextlib.nullcontext()
        with torch.no_grad(), steered:
            out = model.generate(**given)
        for i, text in zip(batch.items, tokenizer.batch_decode(out[:, batch.ids.shape[1] :]), strict=True):
            said[i] = text.strip()
    return said


def begins(said: str, word: str) -> bool:
    """Whether an answer begins with a word."""
    return said.lower().removeprefix("the ").startswith(word.lower())


def looking(model: Any, tokenizer: Any, asked: Sequence[Fact]) -> Tensor:
    """(L, H) weight that the last token of the prompt gives to the context, a mean over items."""
    total, count = torch.zeros(()), 0
    for batch in batches(tokenizer, asked):
        what = Statistics(rows="last", what=("mass",))
        with torch.no_grad(), attach(model, what, token_types=batch.types) as session:
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
        table = session.results["statistics"]
        total = total + len(batch.items) * torch.stack([table[n]["mass"][:, TEXT, IMAGE] for n in sorted(table)])
        count += len(batch.items)
    return total / count


def gains(worth: Tensor, count: int) -> dict[int, list[float]]:
    """``{layer: factors}``: 1 for the ``count`` heads of the greatest worth, 0 for the others."""
    best = torch.zeros(worth.numel()).index_fill(0, worth.flatten().topk(count).indices, 1.0).view_as(worth)
    return {layer: row for layer, row in enumerate(best.tolist())}


def rate(hits: Sequence[bool], base: Sequence[bool] | None = None, samples: int = 2000) -> dict[str, Any]:
    """A share with its 95 % bootstrap interval over items, and the paired difference from another.

    >>> rate([True, False] * 20)["value"]
    0.5
    """
    rng = np.random.default_rng(0)
    values = np.array(hits, dtype=float)
    drawn = rng.integers(0, len(values), (samples, len(values)))

    def told(x: np.ndarray) -> list[float]:
        return [round(float(v), 4) for v in np.percentile(x[drawn].mean(1), [2.5, 97.5])]

    found: dict[str, Any] = {"value": round(float(values.mean()), 4), "interval": told(values), "n": len(values)}
    if base is not None:
        gap = values - np.array(base, dtype=float)
        found |= {"difference": round(float(gap.mean()), 4), "difference_interval": told(gap)}
    return found


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    name: str = "smollm2-135m",
    most: int | None = None,
    heads: int = 27,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Ask everything under every setting.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``real-steering-cpu.svg``.
        name: of :mod:`attnlib.bench.models`.
        most: items of each kind; ``None`` for all of the grammar.
        heads: how many are boosted where some are.
        loaded: ``(model, tokenizer)`` in place of a named one.

    Returns:
        Plain values, for JSON.
    """
    model, tokenizer = models.load(name, dtype=torch.bfloat16) if loaded is None else loaded
    asked = {"in conflict": facts(True)[:most], "beside the point": facts(False, ways=1, seed=1)[:most]}
    kept = Kept(keep, ["steering", name, most, heads], progress)
    worth = torch.tensor(kept("heads that look at the span", lambda: looking(
        model, tokenizer, facts(False, ways=1, seed=7)[:most]).tolist()))  # fmt: skip
    layers = range(2, len(worth))
    some = torch.cat([torch.full_like(worth[:2], -1.0), worth[2:]])
    chance = torch.rand(worth.shape, generator=torch.Generator().manual_seed(0))
    chance[:2] = -1.0
    heads = min(heads, worth[2:].numel())

    def branches(alpha: float, cutoff: float = 0.0) -> list[Intervention]:
        return [ContrastiveDecoding(NoImage(), 1 + alpha, -alpha, cutoff=cutoff)]

    def boosted(alpha: float, gain: dict[int, list[float]] | None = None) -> list[Intervention]:
        return [VisualBoost(alpha=alpha, sets="all", head_gain=gain)]

    def reinforced(alpha: float) -> list[Intervention]:
        return [HeadReinforcement(alpha, layers=list(layers)[-14:], selection="passes")]

    settings: dict[str, tuple[Callable[[], list[Intervention]], int]] = {
        "as it is": (list, 1),
        "no context": (list, 0),
        "context twice": (list, 2),
        **{f"two branches, alpha {a:g}": (partial(branches, a), 1) for a in (0.5, 1.0, 2.0)},
        "two branches, alpha 1, cut-off 0.1": (partial(branches, 1.0, 0.1), 1),
        **{f"all heads boosted, alpha {a:g}": (partial(boosted, a), 1) for a in (0.5, 1.0)},
        f"{heads} heads that look, alpha 1": (partial(boosted, 1.0, gains(some, heads)), 1),
        f"{heads} random heads, alpha 1": (partial(boosted, 1.0, gains(chance, heads)), 1),
        **{f"heads reinforced, alpha {a:g}": (partial(reinforced, a), 1) for a in (2.0,)},
        "context twice, two branches, alpha 1": (partial(branches, 1.0), 2),
    }
    rows = []
    base: dict[str, dict[str, list[bool]]] = {}
    examples: dict[str, list[str]] = {}
    for label, (made, times) in settings.items():
        row: dict[str, Any] = {"name": label}
        for kind, some_facts in asked.items():
            said = kept(f"{label}, {kind}", partial(answers, model, tokenizer, some_facts, made, times))
            hits = {
                "says the context's": [begins(s, f.told) for s, f in zip(said, some_facts, strict=True)],
                "says the truth": [begins(s, f.truth) for s, f in zip(said, some_facts, strict=True)],
            }
            base.setdefault(kind, hits)
            row[kind] = {k: rate(v, base[kind][k]) for k, v in hits.items()}
            examples[f"{label}, {kind}"] = said[:3]
        rows.append(row)
    result: dict[str, Any] = {
        "what": "facts in conflict with a context, and contexts beside the point: what is said under steering",
        "model": models.MODELS[name].title if loaded is None else "given", "machine": machine(), "dtype": "bfloat16",
        "items": {k: len(v) for k, v in asked.items()}, "heads": heads, "rows": rows, "examples": examples,
        "seconds": round(kept.seconds, 1),
    }  # fmt: skip
    if pictures is not None:
        draw(Path(pictures) / "real-steering-cpu.svg", result)
    return result


def draw(path: Path, result: dict[str, Any]) -> None:
    """What is said in conflict, and what is kept beside the point."""
    figure, axes = panels(1, 2, 11.5, 4.6)
    names = [r["name"] for r in result["rows"]]
    for axis, kind, title in ((axes[0][0], "in conflict", "context says otherwise"),
                              (axes[0][1], "beside the point", "context about something else")):  # fmt: skip
        for what, colour in (("says the context's", "#2f7de1"), ("says the truth", "#e8590c")):
            found = [r[kind][what] for r in result["rows"]]
            axis.errorbar(
                [f["value"] for f in found], range(len(names)), fmt="o", markersize=4, color=colour, capsize=2,
                label=what, xerr=[[f["value"] - f["interval"][0] for f in found],
                                  [f["interval"][1] - f["value"] for f in found]],
            )  # fmt: skip
        axis.set_yticks(range(len(names)), names if kind == "in conflict" else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of answers", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
    save(figure, path)
