"""Decisions whose error is located: perception, cognition or action (Chen et al., 2024, arXiv 2402.15527).

An instance has a picture, a question, actions to choose from, the key concepts that must be seen, and a reference
reasoning. A judge reads a free answer and gives three scores of 0 or 1::

    A  the chosen action is the right one
    P  the key concepts were seen
    C  the reasoning agrees with the reference

Reported are their means and the genuine score, the share of answers with ``A = P = C = 1``. Of answers with ``A = 0``,
the first thing that went wrong is where the error lies: perception (``P = 0``), else cognition (``C = 0``), or action.

The judge is a :class:`attnlib.bench.judge.Judge` around any callable from texts to texts; the action can be scored by
its letter without one. The parser takes six lines and nothing else: the release reads lines 1, 3 and 5 by position, so
that an extra line shifts the scores. The prompt is worded anew, the release having no licence.

>>> cases = own_instances(2, seed=0)
>>> said = [oracle(c) for c in cases]
>>> report = score(cases, said, rule_judge(cases))
>>> report.genuine.share, report.errors
(1.0, {'perception': 0, 'cognition': 0, 'action': 0})
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...checks import check_choice, check_int, check_real, check_type
from ..data.files import DataError
from ..data.scenes import GRID, PLACES, make_scene
from ..evaluate import Answer, Evaluation, Item, Unreadable, evaluate
from ..judge import Judge, Judgement, Summary, lettered, option, read_lines, read_option, read_records, summarise

#: Where an error can lie, the first of them that went wrong.
STEPS = ("perception", "cognition", "action")
#: Domains of the published sets.
DOMAINS = ("Autonomous Driving", "Domestic Robot", "Open-World Game")


@dataclass(frozen=True)
class Instance:
    """One decision.

    Args:
        id: its name, no other's.
        question: what is asked.
        actions: to choose from, two at least.
        answer_index: number of the right one.
        key_concept: what must be seen; some of the release's instances name nothing.
        reason: the reference reasoning.
        domain: what it counts under.
        image: a picture or its name.
    """

    id: str
    question: str
    actions: tuple[str, ...]
    answer_index: int
    key_concept: tuple[str, ...]
    reason: str
    domain: str = ""
    image: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.actions) < 2 or len({a.casefold() for a in self.actions}) < len(self.actions):
            raise ValueError(f"actions of instance {self.id!r} must be at least two and differ, got {self.actions}")
        check_int(f"answer_index of instance {self.id!r}", self.answer_index, 0, len(self.actions) - 1)
        if not all(k.strip() for k in self.key_concept):
            raise ValueError(f"key_concept of instance {self.id!r} must hold no empty text, got {self.key_concept}")

    @property
    def action(self) -> str:
        """The right action with its letter, ``"(B) Slow down"``."""
        return f"({chr(ord('A') + self.answer_index)}) {self.actions[self.answer_index]}"


class Scores(NamedTuple):
    """Three scores of 0 or 1."""

    action: int
    perception: int
    cognition: int

    @property
    def genuine(self) -> int:
        """1 where all three are."""
        return self.action * self.perception * self.cognition

    @property
    def error(self) -> str | None:
        """Where the error of a wrong action lies, of :data:`STEPS`; ``None`` for a right one."""
        return None if self.action else "perception" if not self.perception else "cognition" if not self.cognition \
            else "action"  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Files

_SCHEMA = {"question": str, "actions": [str], "answer_index": int, "reason": str, "key_concept": [str], "domain": str}


def load_instances(path: str | Path) -> list[Instance]:
    """Instances of a file as the release has them (``meta_data.json``, ``*-test_open-meta.json``).

    Key concepts that are empty, as some of the release are, are left out: they would stand in any answer.

    Raises:
        DataError: no such file, or another form.
    """
    found = []
    for i, row in enumerate(read_records(path, _SCHEMA, "meta data of PCA-Bench")):
        name = str(row.get("index", i))
        concepts = tuple(k for k in row["key_concept"] if k.strip())
        try:
            found.append(
                Instance(name, row["question"], tuple(row["actions"]), row["answer_index"], concepts,
                         row["reason"], row["domain"], row.get("image"))
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise DataError(f"data={str(path)!r}, record {i}: {error}") from error
    return found


def read_outputs(path: str | Path) -> dict[str, str]:
    """Answers by index of a file as the release has them, ``[{"index": 0, "model_output": "..."}]``."""
    rows = read_records(path, {"index": (int, str), "model_output": str}, "model outputs of PCA-Bench")
    found = {str(row["index"]): row["model_output"] for row in rows}
    if len(found) < len(rows):
        raise DataError(f"data={str(path)!r} answers an index more than once")
    return found


# --------------------------------------------------------------------------------------------------------------------
# The judge


def judge_prompt(case: Instance, answer: str) -> str:
    """What the judge is asked of one answer."""
    return f"""You grade an agent that was shown an image{f" ({case.domain})" if case.domain else ""} and had to decide.

Question: {case.question}
Actions: {lettered(case.actions)}
Right action: {case.action}
Key concepts in the image: {"; ".join(case.key_concept)}
Reference reasoning: {case.reason}

The agent's answer:
<<<
{answer}
>>>

Give three scores, each 0 or 1 and nothing between:
- action: 1 if the action that the agent chose is the right action.
- perception: 1 if the agent correctly mentions any of the key concepts.
- cognition: 1 if the agent's reasoning agrees with the reference reasoning.

Reply in exactly six lines:
action evidence: <one sentence>
action score: <0 or 1>
perception evidence: <one sentence>
perception score: <0 or 1>
cognition evidence: <one sentence>
cognition score: <0 or 1>"""


_LINES = [
    line
    for what in ("action", "perception", "cognition")
    for line in (
        (f"{what} evidence", f"{what} accessment evidence", f"{what} assessment evidence"), f"{what} score",
    )
]  # fmt: skip


def parse_scores(text: str) -> Scores:
    """Scores of a judge's six lines, names in any case, the release's spelling among them.

    Raises:
        Unreadable: anything else: other lines, other names, another order, scores that are not 0 or 1.

    >>> parse_scores("\\n".join(f"{w} evidence: x\\n{w} score: 1" for w in ("Action", "PERCEPTION", "cognition")))
    Scores(action=1, perception=1, cognition=1)
    """
    said = []
    for name, value in zip(("action", "perception", "cognition"), read_lines(text, _LINES)[1::2], strict=True):
        if not (found := re.fullmatch(r"([01])(?:\.0+)?", value)):
            raise Unreadable(f"{name} score must be 0 or 1, got {value[:40]!r}")
        said.append(int(found.group(1)))
    return Scores(*said)


def make_judge(call: Callable[..., Sequence[str]] | None, id: str, tries: int = 3, **settings: Any) -> Judge:
    """A :class:`attnlib.bench.judge.Judge` that gives :class:`Scores`; asked again a bounded number of times."""
    return Judge(call, id, parse_scores, tries=tries, **settings)


# --------------------------------------------------------------------------------------------------------------------
# Without a judge


def keyword_perception(case: Instance, answer: str) -> int:
    """1 where any key concept stands in an answer, in any case and as whole words: a baseline for P."""
    check_type("answer", answer, str)
    said = " ".join(answer.casefold().split())
    return int(any(re.search(rf"(?<!\w){re.escape(' '.join(k.casefold().split()))}(?!\w)", said)
                   for k in case.key_concept))  # fmt: skip


def items(cases: Sequence[Instance]) -> list[Item]:
    """Instances as questions of :func:`attnlib.bench.evaluate.evaluate`, options and picture with them."""
    return [
        Item(
            c.id, f"{c.question}\nActions: {lettered(c.actions)}\nSay what you see that matters, reason, and name one "
            "action by its letter.", c.actions[c.answer_index], {"domain": c.domain}, c.actions, c.image,
        )
        for c in cases
    ]  # fmt: skip


def action_scores(cases: Sequence[Instance], answers: Sequence[str] | Mapping[str, str]) -> Evaluation:
    """The action by its letter or words alone, without a judge; what names none is told apart."""
    said = _by_id(cases, answers)
    return evaluate(items(cases), said, read_option)


# --------------------------------------------------------------------------------------------------------------------
# The report


@dataclass(frozen=True)
class Report:
    """What a judge said of all answers; unreadable judgements are apart.

    Args:
        cases: instances, and ``judgements`` of their answers in the same order.
        unreadable: ``"apart"`` leaves instances without a readable judgement out of the means, ``"wrong"`` scores
            them 0.
    """

    cases: tuple[Instance, ...]
    judgements: tuple[Judgement, ...]
    unreadable: str = "apart"

    def summary(self, metric: str) -> Summary:
        """Mean of ``"action"``, ``"perception"``, ``"cognition"`` or ``"genuine"``, its interval and the coverage."""
        check_choice("metric", metric, ("action", "perception", "cognition", "genuine"))
        return summarise(self._evaluation, metric, self.unreadable, by_image=False)

    @property
    def _evaluation(self) -> Evaluation:
        # Of any order the same: draws go by id.
        both = sorted(zip(self.cases, self.judgements, strict=True), key=lambda pair: pair[0].id)
        return Evaluation(
            tuple(
                Answer(Item(c.id, "", None), j.text, reason=j.reason) if not j.read
                else Answer(Item(c.id, "", None), j.text, j.value, {**j.value._asdict(), "genuine": j.value.genuine})
                for c, j in both
            )
        )  # fmt: skip

    @property
    def action(self) -> Summary:
        return self.summary("action")

    @property
    def perception(self) -> Summary:
        return self.summary("perception")

    @property
    def cognition(self) -> Summary:
        return self.summary("cognition")

    @property
    def genuine(self) -> Summary:
        return self.summary("genuine")

    @property
    def errors(self) -> dict[str, int]:
        """How many wrong actions went wrong where, of :data:`STEPS`."""
        return {step: sum(j.read and j.value.error == step for j in self.judgements) for step in STEPS}

    @property
    def error_shares(self) -> dict[str, float]:
        """The same as shares of all wrong actions; NaN where there is none."""
        total = sum(self.errors.values())
        return {step: n / total if total else math.nan for step, n in self.errors.items()}

    def by_domain(self) -> dict[str, Report]:
        """A report for every domain."""
        found = {}
        for domain in dict.fromkeys(c.domain for c in self.cases):
            own = [i for i, c in enumerate(self.cases) if c.domain == domain]
            found[domain] = Report(
                tuple(self.cases[i] for i in own), tuple(self.judgements[i] for i in own), self.unreadable
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the judge's id and its raw answers are among them."""
        return {
            "judge": sorted({j.judge for j in self.judgements}),
            **{m: self.summary(m).to_dict() for m in ("perception", "cognition", "action", "genuine")},
            "errors": self.errors,
            "reviews": {c.id: j.text for c, j in zip(self.cases, self.judgements, strict=True)},
        }


def score(
    cases: Sequence[Instance],
    answers: Sequence[str] | Mapping[str, str],
    judge: Judge | None,
    prompt: Callable[[Instance, str], str] = judge_prompt,
    unreadable: str = "apart",
) -> Report:
    """Put every answer before a judge.

    Args:
        cases: instances of different ids.
        answers: by id, or in the order of the instances.
        judge: of :func:`make_judge`.
        prompt: from an instance and an answer to what the judge is asked.
        unreadable: judgements that cannot be read: ``"apart"`` or ``"wrong"``.

    Raises:
        ValueError: no judge, no instances, an instance without an answer.
    """
    if judge is None:
        raise ValueError("judge must be given: make_judge(call, id); there is none by default")
    check_type("judge", judge, Judge, "a Judge, as make_judge makes one")
    check_choice("unreadable", unreadable, ("apart", "wrong"))
    said = _by_id(cases, answers)
    judged = judge([prompt(c, said[c.id]) for c in cases])
    for one in judged:
        if one.read:
            check_type("what the judge's parser gives", one.value, Scores)
    return Report(tuple(cases), tuple(judged), unreadable)


def _by_id(cases: Sequence[Instance], answers: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    names = [c.id for c in cases]
    if not names:
        raise ValueError("cases is empty: there is nothing to score")
    if len(set(names)) < len(names):
        raise ValueError(f"cases must have ids of their own; twice there: {sorted({n for n in names if names.count(n) > 1})[:5]}")  # fmt: skip  # noqa: E501
    if isinstance(answers, str):
        raise TypeError(f"answers must be a sequence of texts or texts by id, got {answers!r}")
    if not isinstance(answers, Mapping):
        if len(answers) != len(names):
            raise ValueError(f"answers must hold one text per instance, {len(names)}, got {len(answers)}")
        answers = dict(zip(names, answers, strict=True))
    if lacking := [n for n in names if n not in answers]:
        raise ValueError(f"answers lacks {len(lacking)} of {len(names)} instances: {lacking[:5]}")
    for name in names:
        check_type(f"answers[{name!r}]", answers[name], str)
    return {name: answers[name] for name in names}


# --------------------------------------------------------------------------------------------------------------------
# Instances of our own, whose truth is known

_MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def own_instances(count: int, seed: int = 0, part: str = "test") -> list[Instance]:
    """Decisions in generated scenes: you stand in a cell and want a thing; where do you step first?

    What must be seen is the cell of the thing, what follows is the direction, along the longer way.

    Args:
        count: how many, of a scene each.
        seed: of the first scene.
        part: of :func:`attnlib.bench.data.scenes.make_scene`.
    """
    check_int("count", count, least=1)
    found: list[Instance] = []
    number = check_int("seed", seed, least=0) * 100_000
    while len(found) < count:
        scene, rng = make_scene(number, part), np.random.default_rng([number, 7])
        number += 1
        names = [t.name for t in scene.things]
        things = [t for t in scene.things if names.count(t.name) == 1]
        if not things:
            continue
        thing = things[rng.integers(len(things))]
        row, column = divmod(thing.cell, GRID)
        starts = [
            cell for cell in range(GRID * GRID)
            if abs(cell // GRID - row) != abs(cell % GRID - column) and cell != thing.cell
        ]  # fmt: skip
        start = int(rng.choice(starts))
        down, right = row - start // GRID, column - start % GRID
        move = ("down" if down > 0 else "up") if abs(down) > abs(right) else ("right" if right > 0 else "left")
        actions = tuple(f"Step {m}" for m in rng.permutation(list(_MOVES)))
        words = thing.name
        found.append(
            Instance(
                f"{part}-{number - 1}",
                f"You stand in cell {PLACES[start]}, rows a to d from the top, columns 1 to 4. You want the {words}, "
                "and go the longer way first. Which step do you take?",
                actions, actions.index(f"Step {move}"), (f"{words} in cell {thing.place}", f"cell {thing.place}"),
                f"The {words} is in cell {thing.place}, which lies {move} of {PLACES[start]}.", "Grid", scene.image,
            )
        )  # fmt: skip
    return found


def oracle(case: Instance, seen: bool = True, reasoned: bool = True, acted: bool = True) -> str:
    """The answer to an instance of ours of who sees, reasons and acts as told."""
    where = case.key_concept[0] if seen else "nothing that helps"
    why = case.reason if reasoned else "Any way is as good as another."
    number = case.answer_index if acted else (case.answer_index + 1) % len(case.actions)
    if not seen:
        why = re.sub(r"\bin cell \w\d\b", "somewhere", why)
    return f"I see {where}. {why} So the answer is ({chr(ord('A') + number)})."


def rule_judge(cases: Sequence[Instance], slips: float = 0.0, id: str = "rules-1") -> Judge:
    """A judge of instances of ours that knows the truth: concepts and reasons by their words, actions by letter.

    Args:
        cases: what it knows.
        slips: share of its replies that are malformed.
        id: of the judge.
    """
    check_real("slips", slips, least=0, most=1)
    known = {(c.question, c.action, c.reason): c for c in cases}

    def one(prompt: str, seed: int) -> str:
        question = re.search(r"^Question: (.*)$", prompt, re.M)
        action = re.search(r"^Right action: (.*)$", prompt, re.M)
        reason = re.search(r"^Reference reasoning: (.*)$", prompt, re.M)
        answer = re.search(r"<<<\n(.*)\n>>>", prompt, re.S)
        if not (question and action and reason and answer):
            raise ValueError("the rules read prompts of judge_prompt only")
        asked, said = (question.group(1), action.group(1), reason.group(1)), answer.group(1)
        if asked not in known:
            raise ValueError(f"the rules know their own cases only, got the question {asked[0][:60]!r}")
        case = known[asked]
        try:
            chosen = option(said, case.actions)
        except Unreadable:
            chosen = -1
        direction = case.reason.rsplit("which lies ", 1)[1]
        scores = {
            "action": int(chosen == case.answer_index), "perception": keyword_perception(case, said),
            "cognition": int(direction in said),
        }  # fmt: skip
        reply = "\n".join(f"{k} evidence: {json.dumps(said[:40])}\n{k} score: {v}" for k, v in scores.items())
        return f"Sure!\n{reply}" if np.random.default_rng(seed).random() < slips else reply

    def call(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return [one(p, s) for p, s in zip(prompts, seeds, strict=True)]

    return make_judge(call, id)
