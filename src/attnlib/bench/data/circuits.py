"""Prompts in pairs for circuits: a clean one and a corrupted one of equal length, and two answers of one token each.

- indirect objects (Wang et al., 2022; Merullo et al., 2023): "When Ada and Tom met, Tom gave a ring to" -> " Ada". The
  corruption names somebody else where the subject is repeated (the released one: the other person, so that the answer
  turns), or gives three new names.
- coloured objects (Srivastava et al., 2022; Merullo et al., 2023): several coloured objects, the colour of one is asked
  for, behind one answered example; the corruption asks for another one.
- multiple choice (Lieberum et al., 2023), in tokens: a question, four labelled values, and the label of the right one.

>>> pair = indirect_objects(1, names=("Ada", "Tom", "Eve", "Max", "Ann"), seed=0)
>>> pair.clean[0].count(pair.wrong[0].strip()) > pair.clean[0].count(pair.correct[0].strip())
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, check_int

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Sarah", "Anna", "Paul", "Mark", "Alice", "Kate", "Peter", "David", "Laura",
    "Emma", "Simon", "Henry", "Jane", "George", "Robert", "Martin", "Adam", "Rose", "Lucy", "Jack", "Helen", "Alex",
    "Michael", "Daniel", "Thomas",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "station", "beach", "garden", "house")
THINGS = ("ring", "book", "drink", "ball", "letter", "key", "map", "coat")
OPENINGS = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} met at the {place}, {s} handed a {thing} to",
    "Then {a} and {b} walked to the {place}, and {s} passed a {thing} to",
    "While {a} and {b} were at the {place}, {s} offered a {thing} to",
)
CORRUPTIONS = ("subject", "names")

OBJECTS = (
    "pencil", "notebook", "pen", "cup", "plate", "jug", "mug", "puzzle", "textbook", "leash", "necklace", "bracelet",
    "bottle", "ball", "envelope", "lighter", "bowl",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SURFACES = ("table", "desk", "floor")
SIGHTS = ("there is", "you see", "I see")


@dataclass(frozen=True)
class Pairs:
    """Prompts in pairs.

    Args:
        clean, corrupted: prompts.
        correct, wrong: answers to the clean prompt, right and wrong, with their leading space.
        turned: the right answer to the corrupted prompt, where it has one.
        places: names that a reader of the answer may look at, per prompt: {role: word}.
    """

    clean: list[str]
    corrupted: list[str]
    correct: list[str]
    wrong: list[str]
    turned: list[str | None]
    places: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.clean)

    def part(self, first: int, last: int) -> Pairs:
        """Some of the pairs."""
        return Pairs(*(getattr(self, name)[first:last] for name in self.__dataclass_fields__))

    def tokens(self, tokenizer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
        """Inputs of clean and of corrupted prompts, and the two answers (B,), left-padded.

        Raises:
            ValueError: an answer of several tokens; a pair of unequal length.
        """
        from ...look.circuits import single_tokens

        def ids(texts: Sequence[str]) -> list[list[int]]:
            return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

        clean, corrupted = ids(self.clean), ids(self.corrupted)
        unlike = [c for c, a, b in zip(self.clean, clean, corrupted, strict=True) if len(a) != len(b)]
        if unlike:
            raise ValueError(
                f"{len(unlike)} prompts and their corruptions are of unequal length, such as {unlike[0]!r}"
            )
        length = max(len(one) for one in clean)

        def padded(rows: list[list[int]]) -> dict[str, Tensor]:
            fill = tokenizer.pad_token_id or 0
            full = torch.tensor([[fill] * (length - len(r)) + r for r in rows])
            mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
            return {"input_ids": full, "attention_mask": mask}

        return (
            padded(clean), padded(corrupted), single_tokens(tokenizer, self.correct),
            single_tokens(tokenizer, self.wrong),
        )  # fmt: skip


def one_token(tokenizer: Any, words: Sequence[str]) -> tuple[str, ...]:
    """Those words that are one token behind a space, so that swapping them moves nothing."""
    return tuple(w for w in words if len(tokenizer(" " + w, add_special_tokens=False)["input_ids"]) == 1)


def indirect_objects(
    count: int, names: Sequence[str] = NAMES, seed: int = 0, corruption: str = "subject", opening: int | None = None
) -> Pairs:
    """Sentences in which one of two persons is named twice, and the other one is to be named.

    Args:
        count: prompts.
        names: to draw from, five at least.
        seed: of the draws.
        corruption: ``"subject"`` names the other person at the repetition, so that the answer turns, as the release
            does; ``"names"`` puts three other names in the three places, so that there is no answer.
        opening: number of the sentence; drawn by default.

    Raises:
        ValueError: fewer names.
    """
    check_int("count", count, least=1)
    check_choice("corruption", corruption, CORRUPTIONS)
    if len(set(names)) < 5:
        raise ValueError(f"names must hold five different ones at least, got {list(names)}")
    if opening is not None:
        check_int("opening", opening, least=0, most=len(OPENINGS) - 1)
    random, rows = Random(seed), []
    for _ in range(count):
        io, s, *others = random.sample(sorted(set(names)), 5)
        first, second = (io, s) if random.random() < 0.5 else (s, io)
        draw = random.randrange(len(OPENINGS))
        text = OPENINGS[draw if opening is None else opening]
        rest = {"place": random.choice(PLACES), "thing": random.choice(THINGS)}
        clean = text.format(a=first, b=second, s=s, **rest)
        if corruption == "subject":
            other, turned = text.format(a=first, b=second, s=io, **rest), " " + s
        else:
            other, turned = text.format(a=others[0], b=others[1], s=others[2], **rest), None
        rows.append((clean, other, " " + io, " " + s, turned, {"io": io, "s": s}))
    return Pairs(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]


def _items(colours: Sequence[str], objects: Sequence[str]) -> str:
    named = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {o}" for c, o in zip(colours, objects, strict=True)]
    return " and ".join(named) if len(named) == 2 else ", ".join(named[:-1]) + ", and " + named[-1]


def coloured_objects(
    count: int,
    objects: Sequence[str] = OBJECTS,
    colours: Sequence[str] = COLOURS,
    items: int = 3,
    shots: int = 1,
    seed: int = 0,
    uppercase: bool = True,
) -> Pairs:
    """Questions about the colour of one of several objects; the corruption asks for another of them.

    Args:
        count: prompts.
        objects, colours: to draw from.
        items: objects of a question.
        shots: answered questions in front.
        seed: of the draws.
        uppercase: answers begin with a capital, as in the release.

    Raises:
        ValueError: more items than objects or colours.
    """
    check_int("count", count, least=1)
    check_int("shots", shots, least=0)
    check_int("items", items, least=2, most=min(len(set(objects)), len(set(colours))))
    random, rows = Random(seed), []

    def answer(colour: str) -> str:
        return " " + (colour.title() if uppercase else colour)

    def question() -> tuple[str, list[str], list[str]]:
        chosen, hues = random.sample(sorted(set(objects)), items), random.sample(sorted(set(colours)), items)
        text = f"Q: On the {random.choice(SURFACES)}, {random.choice(SIGHTS)} {_items(hues, chosen)}."
        return text + " What color is the {}?\nA:", chosen, hues

    for _ in range(count):
        front = ""
        for _ in range(shots):
            text, chosen, hues = question()
            asked = random.randrange(items)
            front += text.format(chosen[asked]) + answer(hues[asked]) + "\n"
        text, chosen, hues = question()
        asked, other = random.sample(range(items), 2)
        rows.append((
            front + text.format(chosen[asked]), front + text.format(chosen[other]), answer(hues[asked]),
            answer(hues[other]), answer(hues[other]), {"object": chosen[asked], "other": chosen[other]},
        ))  # fmt: skip
    return Pairs(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# Multiple choice in tokens


#: What may change in a question without moving a token.
MUTATIONS = ("none", "random letters", "other letters", "numbers", "separators", "no prelude")


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions as tokens.

    Args:
        ids: (B, N).
        correct: (B,) number of the right choice.
        choices: (B, K) token of each choice's label.
        labels: (B, K) positions of the labels.
        values: (B, K) positions of the values.
        truth: (B,) token of the value that is asked for.
    """

    ids: Tensor
    correct: Tensor
    choices: Tensor
    labels: Tensor
    values: Tensor
    truth: Tensor

    @property
    def answers(self) -> Tensor:
        """(B,) token of the right label."""
        return self.choices.gather(1, self.correct[:, None])[:, 0]

    def asking(self, other: Tensor) -> Questions:
        """The same questions asked for another of their choices (B,): nothing else moves or changes."""
        ids = self.ids.clone()
        value = self.ids.gather(1, self.values.gather(1, other[:, None]))[:, 0]
        ids[:, ChoiceWorld.ASKED] = value
        return replace(self, ids=ids, correct=other, truth=value)


@dataclass(frozen=True)
class ChoiceWorld:
    """A vocabulary, and questions of ``prelude prelude Q value | sep label dot value | ... | answer``.

    Args:
        choices: of a question.
        letters: labels there are; the first ``choices`` are the usual ones.
        numbers: other labels.
        facts: values that may be asked for.

    >>> world = ChoiceWorld()
    >>> q = world.draw(2, torch.Generator().manual_seed(0))
    >>> bool((q.ids.gather(1, q.labels) == q.choices).all())
    True
    """

    choices: int = 4
    letters: int = 12
    numbers: int = 6
    facts: int = 16

    #: Position of the value that is asked for.
    ASKED = 3
    #: Tokens: blank, two of the prelude, Q, two separators, dot, answer.
    _FIXED = 8

    def __post_init__(self) -> None:
        check_int("choices", self.choices, least=2)
        check_int("letters", self.letters, least=2 * self.choices)
        check_int("numbers", self.numbers, least=self.choices)
        check_int("facts", self.facts, least=self.choices)

    @property
    def vocabulary(self) -> int:
        return self._FIXED + self.letters + self.numbers + self.facts

    @property
    def length(self) -> int:
        return self.ASKED + 2 + 4 * self.choices

    def draw(self, count: int, generator: torch.Generator | None = None, mutation: str = "random letters") -> Questions:
        """Questions under one of :data:`MUTATIONS`; one seed gives the same facts and right choices under all of them.

        Args:
            count: questions.
            generator: of the draws.
            mutation: ``"none"`` labels choices with the first letters, in order; ``"random letters"`` with any letters
                in any order; ``"other letters"`` with a run of letters from elsewhere; ``"numbers"``; ``"separators"``
                other ones; ``"no prelude"`` blanks it.
        """
        check_int("count", count, least=0)
        check_choice("mutation", mutation, MUTATIONS)
        k, first = self.choices, self._FIXED
        value = first + self.letters + self.numbers
        picked = torch.rand(count, self.facts, generator=generator).argsort(1)[:, :k]
        correct = torch.randint(k, (count,), generator=generator)
        shuffled = torch.rand(count, self.letters, generator=generator).argsort(1)[:, :k]
        start = torch.randint(k, self.letters - k + 1, (count, 1), generator=generator)
        ordered = torch.arange(k).expand(count, k)
        labels = first + {
            "random letters": shuffled, "other letters": ordered + start, "numbers": ordered + self.letters,
        }.get(mutation, ordered)  # fmt: skip
        separator = 5 if mutation == "separators" else 4
        ids = torch.zeros(count, self.length, dtype=torch.long)
        ids[:, 0], ids[:, 1], ids[:, 2] = (0, 0, 3) if mutation == "no prelude" else (1, 2, 3)
        ids[:, self.ASKED] = value + picked.gather(1, correct[:, None])[:, 0]
        at = self.ASKED + 1 + 4 * torch.arange(k)
        ids[:, at], ids[:, at + 1], ids[:, at + 2], ids[:, at + 3] = separator, labels, 6, value + picked
        ids[:, -1] = 7
        return Questions(
            ids, correct, labels, (at + 1).expand(count, k), (at + 3).expand(count, k), ids[:, self.ASKED].clone()
        )
