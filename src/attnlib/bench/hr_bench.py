"""HR-Bench: questions with options on large pictures, each asked once per turn of its options.

>>> item = Item("q", "Which colour?", "red", {"task": "FSP"}, ("red", "blue", "green", "grey"))
>>> [turn.options[0] for turn in cyclic(item)]
['red', 'blue', 'green', 'grey']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checks import check_int, check_type
from .evaluate import Evaluation, Item
from .judge import Summary, lettered, summarise

#: Single instances and relations across instances.
TASKS = ("FSP", "FCP")
ASK = "{question}\n{options}\nAnswer with the letter of the right option alone."


def cyclic(item: Item, ask: str = ASK) -> list[Item]:
    """A question once per turn of its options, so that no letter is right more often than another.

    Args:
        item: a question with options; ``groups["task"]`` is ``"FSP"`` or ``"FCP"``.
        ask: the prompt, with places ``{question}`` and ``{options}``.

    Returns:
        As many items as options, of ids ``"<id>/<turn>"``; their groups hold ``question`` and ``turn``.

    Raises:
        ValueError: an answer that is no option, equal options, another task.
    """
    check_type("item", item, Item)
    check_type("ask", ask, str)
    if not all(place in ask for place in ("{question}", "{options}")):
        raise ValueError(f"ask must hold {{question}} and {{options}}, got {ask!r}")
    if len(item.options) < 2 or len(set(item.options)) < len(item.options):
        raise ValueError(f"item {item.id!r} must have at least two different options, got {list(item.options)}")
    if item.answer not in item.options:
        raise ValueError(f"item {item.id!r} must have an answer among {list(item.options)}, got {item.answer!r}")
    if item.groups.get("task", TASKS[0]) not in TASKS:
        raise ValueError(f"item {item.id!r} must be of a task of {list(TASKS)}, got {item.groups['task']!r}")
    found = []
    for turn in range(len(item.options)):
        options = item.options[turn:] + item.options[:turn]
        prompt = ask.replace("{question}", item.prompt).replace("{options}", lettered(options))
        groups = {"image": item.id, **item.groups, "question": item.id, "turn": str(turn)}
        found.append(replace(item, id=f"{item.id}/{turn}", prompt=prompt, options=options, groups=groups))
    return found


@dataclass(frozen=True)
class HRBench:
    """Scores: the share of right answers over all turns, by task and in all; ``every``: right in every turn."""

    tasks: dict[str, Summary]
    all: Summary
    every: float


def hr_bench(answers: Evaluation, seed: int = 0) -> HRBench:
    """Scores of answers to :func:`cyclic` items; unreadable answers are wrong, and their share is in each summary.

    Args:
        answers: of :func:`attnlib.bench.evaluate.evaluate` with :func:`attnlib.bench.judge.read_option`.
        seed: of the intervals, which draw pictures anew.
    """
    check_type("answers", answers, Evaluation)
    if not answers.answers:
        raise ValueError("answers must hold answers, got none")
    check_int("seed", seed, least=0)
    if lacking := [a.item.id for a in answers.answers if a.scores is not None and "right" not in a.scores]:
        raise ValueError(f"answers must have the score 'right', as evaluate gives it; it lacks at {lacking[:5]}")
    present: Sequence[str] = [t for t in TASKS if any(a.item.groups.get("task") == t for a in answers.answers)]
    right: dict[str, bool] = {}
    for one in answers.answers:
        name = one.item.groups.get("question", one.item.id)
        good = one.scores is not None and one.scores["right"] == 1
        right[name] = right.get(name, True) and good
    tasks = {task: summarise(answers.where(task=task), seed=seed) for task in present}
    return HRBench(tasks, summarise(answers, seed=seed), sum(right.values()) / len(right))
