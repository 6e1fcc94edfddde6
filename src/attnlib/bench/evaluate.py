"""Evaluation one can believe: items go to a model, its answers through a parser to scores; the unreadable is counted.

>>> items = [Item("a", "2 + 2 =", "4"), Item("b", "3 + 3 =", "6"), Item("c", "1 + 1 =", "2")]
>>> def model(prompts):
...     return {"2 + 2 =": "It is 4.", "3 + 3 =": "Seven, 7.", "1 + 1 =": "Who knows?"}[prompts[0]],
>>> found = evaluate(items, model, first_match(r"\\d+"))
>>> found.unreadable, found.mean("right"), round(found.mean("right", unreadable="wrong"), 3)
(1, 0.5, 0.333)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, describe
from ..types import check_choice
from .data.files import DataError
from .stats import bootstrap_interval
from .store import Lines, identity


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        id: its name, no other's.
        prompt: what the model is given.
        answer: what is right; the score compares with it.
        groups: what it counts under, such as ``{"type": "cognate"}``.
        options: the answers to choose from, where there are some.
        image: what the prompt is about, a picture or its name, for models that take ``items``.
    """

    id: str
    prompt: str
    answer: Any
    groups: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    image: Any = field(default=None, compare=False, repr=False)


class Unreadable(ValueError):
    """An answer that the parser cannot read; the message says why."""


Parser = Callable[[str, Item], Any]
Score = Callable[[Any, Item], Mapping[str, float]]


def first_match(pattern: str, flags: int = re.IGNORECASE) -> Parser:
    """Parser: the first match of a regular expression (its first group, if it has one)."""
    compiled = re.compile(pattern, flags)

    def parse(text: str, item: Item) -> str:
        found = compiled.search(text)
        if found is None:
            raise Unreadable(f"no {pattern!r} in the answer")
        return found.group(1 if compiled.groups else 0)

    return parse


def one_option(text: str, item: Item) -> str:
    """Parser: the one of the item's options that stands in the answer as a word; none or several are unreadable."""
    said = [o for o in item.options if re.search(rf"(?<!\w){re.escape(o)}(?!\w)", text, re.IGNORECASE)]
    if len(said) != 1:
        raise Unreadable(f"{len(said)} of the options {list(item.options)} stand in the answer")
    return said[0]


def exact(value: Any, item: Item) -> dict[str, float]:
    """Score ``right``: 1 where the value is the answer."""
    return {"right": float(value == item.answer)}


@dataclass(frozen=True)
class Answer:
    """What came of one item: the text, the value read from it, the scores; or why it could not be read."""

    item: Item
    text: str
    value: Any = None
    scores: Mapping[str, float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Evaluation:
    """All answers, in the order of the items."""

    answers: tuple[Answer, ...]

    @property
    def unreadable(self) -> int:
        """How many answers could not be read."""
        return sum(a.scores is None for a in self.answers)

    def scores(self, metric: str, unreadable: str = "apart") -> dict[str, float]:
        """By id, one score: of the answers that were read, or of all with 0 for the others (``unreadable="wrong"``)."""
        check_choice("unreadable", unreadable, ("apart", "wrong"))
        known = sorted({name for a in self.answers for name in a.scores or ()})
        if known:
            check_choice("metric", metric, known)
        read = {a.item.id: a.scores for a in self.answers if a.scores is not None or unreadable == "wrong"}
        return {name: 0.0 if scores is None else float(scores[metric]) for name, scores in read.items()}

    def mean(self, metric: str, unreadable: str = "apart") -> float:
        """Mean of a score; NaN where nothing could be read."""
        values = list(self.scores(metric, unreadable).values())
        return sum(values) / len(values) if values else float("nan")

    def where(self, **groups: str) -> Evaluation:
        """The answers to items of these groups."""
        for name, value in groups.items():
            there = sorted({a.item.groups[name] for a in self.answers if name in a.item.groups})
            check_choice(name, value, there)
        return Evaluation(tuple(a for a in self.answers if groups.items() <= a.item.groups.items()))

    def table(self, *by: str, seed: int = 0) -> list[dict[str, Any]]:
        """Per combination of groups: items, unreadable ones, and every score with its bootstrap interval by item."""
        combinations = dict.fromkeys(tuple(a.item.groups.get(name, "") for name in by) for a in self.answers)
        rows = []
        for values in combinations:
            part = Evaluation(
                tuple(a for a in self.answers if tuple(a.item.groups.get(name, "") for name in by) == values)
            )
            row: dict[str, Any] = {**dict(zip(by, values, strict=True)), "n": len(part.answers)}
            row["unreadable"] = part.unreadable
            for metric in dict.fromkeys(m for a in part.answers for m in a.scores or ()):
                read = list(part.scores(metric).values())
                low, high = bootstrap_interval(read, seed=seed)
                row[metric] = {"mean": part.mean(metric), "low": low, "high": high}
            rows.append(row)
        return rows


def local_seed(seed: int, name: str) -> int:
    """The seed of one item: the same in any order, batch and process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")


def read_answers(path: str | Path) -> dict[str, str]:
    """Answers by id: JSON ``{id: answer}``, or JSON lines ``{"id": ..., "answer": ...}``."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"model={str(path)!r} does not exist; possible: a JSON file of answers by id, or JSON lines")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            pairs = [(str(row["id"]), str(row["answer"])) for row in rows]
            if len(dict(pairs)) < len(pairs):
                raise DataError(f"model={str(path)!r} answers an id more than once")
            return dict(pairs)
        held = json.loads(text)
        return {str(name): str(answer) for name, answer in held.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'model={str(path)!r} is neither JSON {{id: answer}} nor JSON lines {{"id": ..., "answer": ...}} ({error})'
        ) from error


def evaluate(
    items: Sequence[Item],
    model: Callable[..., Sequence[str]] | Mapping[str, str] | str | Path,
    parse: Parser = one_option,
    score: Score = exact,
    *,
    batch: int = 1,
    seed: int = 0,
    keep: str | Path | None = None,
    key: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Put every item to a model once, and score what it answers.

    Args:
        items: questions, of different ids.
        model: from a list of prompts to a list of texts; it gets ``seeds`` and ``items`` too, one per prompt, if it
            has arguments of these names. Or answers by id, or a file of them (:func:`read_answers`).
        parse: from a text and its item to a value; raises :class:`Unreadable` for what it cannot read.
        score: from a value and its item to numbers by name.
        batch: prompts at a time.
        seed: with an item's id it makes the item's own seed, so that neither order nor batch change an answer.
        keep: a file that takes every answer as soon as it is there, and from which a later call goes on.
        key: what those answers depend on beside prompt and seed, such as the model's name.
        progress: called with a line after every batch.

    Raises:
        ValueError: items of one id, an item without an answer, a model that answers another number of prompts.
    """
    check_int("batch", batch, least=1)
    names = [item.id for item in items]
    if len(set(names)) < len(names):
        raise ValueError(
            f"items must have ids of their own; twice there: {sorted({n for n in names if names.count(n) > 1})[:5]}"
        )
    if isinstance(model, (str, Path)):
        model = read_answers(model)
    if isinstance(model, Mapping):
        lacking = [name for name in names if name not in model]
        if lacking:
            raise ValueError(f"model has no answers to {len(lacking)} of {len(names)} items: {lacking[:5]}")
        texts = {name: str(model[name]) for name in names}
    elif callable(model):
        texts = _asked(items, model, batch, seed, keep, key, progress)
    else:
        raise TypeError(f"model must be a callable, answers by id or a file of them, got {describe(model)}")
    found = []
    for item in items:
        try:
            value = parse(texts[item.id], item)
        except Unreadable as error:
            found.append(Answer(item, texts[item.id], reason=str(error)))
        else:
            found.append(Answer(item, texts[item.id], value, dict(score(value, item))))
    return Evaluation(tuple(found))


def _asked(
    items: Sequence[Item], model: Callable[..., Sequence[str]], batch: int, seed: int, keep: str | Path | None,
    key: Any, progress: Callable[[str], None] | None,
) -> dict[str, str]:  # fmt: skip
    lines = Lines(keep)
    marks = {item.id: identity([item.id, item.prompt, seed, key]) for item in items}
    kept = {row["mark"]: row["answer"] for row in lines.rows("mark", "answer")}
    texts = {item.id: kept[marks[item.id]] for item in items if marks[item.id] in kept}
    todo = [item for item in items if item.id not in texts]
    known = inspect.signature(model).parameters
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        settings: dict[str, Any] = {}
        if "seeds" in known:
            settings["seeds"] = [local_seed(seed, item.id) for item in part]
        if "items" in known:
            settings["items"] = part
        said = list(model([item.prompt for item in part], **settings))
        if len(said) != len(part):
            raise ValueError(f"model must answer every prompt, got {len(said)} answers to {len(part)}")
        for item, text in zip(part, said, strict=True):
            texts[item.id] = str(text)
        lines.add({"mark": marks[item.id], "id": item.id, "answer": texts[item.id]} for item in part)
        if progress is not None:
            progress(f"{len(texts)} of {len(items)} items")
    return texts


def user_file(folder: str | Path, name: str, what: str) -> Path:
    """A file of public data in the user's folder; the message names it where it is missing."""
    path = Path(folder) / name
    if not path.is_file():
        raise DataError(f"data={str(folder)!r} lacks {name}, {what}; nothing is downloaded, put the file there")
    return path


# --------------------------------------------------------------------------------------------------------------------
# Language models


class Speaker:
    """A decoder of transformers, or ours, as a model to :func:`evaluate`; batches are padded on the left.

    Args:
        model: with ``generate``, for texts; logits alone serve :meth:`options`.
        tokenizer: of transformers.
        new_tokens: of an answer at most.
        chat: put prompts through the tokenizer's chat template, with the prompt for the assistant's turn on; without
            it a model goes on with the user's.
        temperature: 0 takes the likeliest token; else every item samples from a generator of its own seed.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, new_tokens: int = 32, chat: bool = False, temperature: float = 0.0
    ):
        self.model, self.tokenizer, self.temperature, self.chat = model, tokenizer, temperature, chat
        self.new_tokens = check_int("new_tokens", new_tokens, least=1)
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("chat=True needs a tokenizer with a chat template; this one has none")
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # chat models have several
        ends = [*(own if isinstance(own, list) else [own]), getattr(tokenizer, "eos_token_id", None)]
        self.ends = {end for end in ends if end is not None}
        self.pad = next((i for i in (tokenizer.pad_token_id, *self.ends) if i is not None), 0)

    def ids(self, prompt: str) -> list[int]:
        """Tokens of one prompt."""
        if self.chat:
            turns = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Rows of tokens as one batch, padded on the left, with mask and positions."""
        if not rows or not all(rows):
            raise ValueError("prompts must hold at least one token each")
        longest, device = max(map(len, rows)), next(self.model.parameters()).device
        ids = torch.tensor([[self.pad] * (longest - len(r)) + list(r) for r in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        """Texts that continue the prompts."""
        if not prompts:
            return []
        if self.temperature > 0 and seeds is None:
            raise ValueError("seeds must be given where temperature is above 0, one per prompt")
        rows = [self.ids(p) for p in prompts]
        inputs = self.padded(rows)
        chosen: list[list[int]] = [[] for _ in rows]
        generators = [torch.Generator().manual_seed(s) for s in seeds] if self.temperature > 0 and seeds else []
        open_rows, past = set(range(len(rows))), None
        for _ in range(self.new_tokens):
            out = self.model(**inputs, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[:, -1].float().cpu()
            if generators:
                shares = (logits / self.temperature).softmax(-1)
                picks = [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(shares, generators, strict=True)]
            else:
                picks = logits.argmax(-1).tolist()
            for i in list(open_rows):
                if picks[i] in self.ends:
                    open_rows.discard(i)
                else:
                    chosen[i].append(picks[i])
            if not open_rows:
                break
            device, mask = inputs["input_ids"].device, inputs["attention_mask"]
            inputs = {
                "input_ids": torch.tensor(picks, device=device)[:, None],
                "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
                "position_ids": inputs["position_ids"][:, -1:] + 1,
            }
        return [self.tokenizer.decode(c, skip_special_tokens=True) for c in chosen]

    @torch.no_grad()
    def options(self, prompts: Sequence[str], options: Sequence[Sequence[str]], batch: int = 8) -> list[list[float]]:
        """Log-probability of every option behind its prompt, summed over the option's tokens.

        An option stands with and without a space before it, of which the probabilities are added.
        """
        rows: list[tuple[int, int, list[int], int]] = []
        for i, (prompt, own) in enumerate(zip(prompts, options, strict=True)):
            before = self.ids(prompt)
            for j, option in enumerate(own):
                forms = dict.fromkeys(
                    tuple(self.tokenizer(form, add_special_tokens=False)["input_ids"])
                    for form in (option, f" {option}")
                )
                for form in forms:
                    if not form:
                        raise ValueError(f"options holds {option!r}, which has no tokens")
                    rows.append((i, j, before + list(form), len(form)))
        said = [[float("-inf")] * len(own) for own in options]
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            inputs = self.padded([r[2] for r in part])
            logs = self.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
            for row, (i, j, ids, count) in zip(logs, part, strict=True):
                at = row[-count - 1 : -1].gather(-1, torch.tensor(ids[-count:], device=row.device)[:, None])
                both = torch.tensor([said[i][j], float(at.sum())], dtype=torch.float64)
                said[i][j] = float(both.logsumexp(0))
        return said


def option_difference(log_probabilities: Sequence[float], right: int) -> float:
    """Probability of the right option less that of the likeliest wrong one.

    >>> import math
    >>> round(option_difference([math.log(0.5), math.log(0.2)], 0), 3)
    0.3
    """
    shares = torch.tensor(log_probabilities, dtype=torch.float64).exp().tolist()
    if len(shares) < 2 or not 0 <= right < len(shares):
        raise ValueError(f"right={right} must name one of at least two options, got {len(shares)}")
    return shares[right] - max(s for i, s in enumerate(shares) if i != right)
