"""Facts that a small language model knows, and contexts that say otherwise, by a grammar."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Relation -> question, how its answer begins, ways to say a fact in a context, and what is true.
RELATIONS: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    "capital": (
        "What is the capital of {s}?", "The capital of {s} is",
        ("In this story, the government of {s} has moved to {o}, which is its capital now.",
         "In the novel, {o} became the capital of {s} after the war."),
        {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Germany": "Berlin",
         "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
         "Portugal": "Lisbon", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw",
         "Hungary": "Budapest", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Thailand": "Bangkok",
         "Canada": "Ottawa", "Turkey": "Ankara", "Denmark": "Copenhagen", "Finland": "Helsinki"},
    ),
    "colour": (
        "What is the color of {s}?", "The color of {s} is",
        ("In this story, a strange light has turned {s} {o}.", "On that planet, {s} is always {o}."),
        {"the sky": "blue", "grass": "green", "blood": "red", "snow": "white", "coal": "black", "a banana": "yellow",
         "a carrot": "orange", "chocolate": "brown", "a strawberry": "red", "milk": "white", "a lemon": "yellow",
         "spinach": "green", "an elephant": "gray"},
    ),
    "opposite": (
        "What is the opposite of the word {s}?", "The opposite of the word {s} is",
        ("In this secret language, the opposite of the word {s} is {o}.",
         "The old dictionary says that {s} and {o} are opposites."),
        {"hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "good": "bad", "happy": "sad",
         "fast": "slow", "light": "dark", "rich": "poor", "old": "young", "hard": "soft", "wet": "dry",
         "open": "closed", "early": "late"},
    ),
    "language": (
        "Which language do most people in {s} speak?", "Most people in {s} speak",
        ("In this story, the people of {s} have forgotten their language and speak {o}.",
         "In the novel, everybody in {s} speaks {o}."),
        {"France": "French", "Italy": "Italian", "Japan": "Japanese", "Germany": "German", "Russia": "Russian",
         "China": "Chinese", "Greece": "Greek", "Portugal": "Portuguese", "Sweden": "Swedish", "Poland": "Polish",
         "Mexico": "Spanish", "Australia": "English", "Turkey": "Turkish"},
    ),
}  # fmt: skip

#: Sentences around the one that counts.
AROUND = (
    "The weather was fine that morning.",
    "Nobody in the village was surprised.",
    "The old man told it to his children.",
    "A letter arrived two days later.",
    "Some of the visitors took photographs.",
    "The train left at noon.",
)


@dataclass(frozen=True)
class Fact:
    """A question, a context that decides it, and what is said.

    Args:
        question: the question.
        start: how the answer begins.
        context: sentences before it.
        told: what the context says.
        truth: what is so.
        about: whether the context is about what is asked (in conflict with the truth), or about something else.
    """

    question: str
    start: str
    context: str
    told: str
    truth: str
    about: bool


def facts(about: bool, ways: int = 2, seed: int = 0) -> list[Fact]:
    """All questions of the grammar, each in ``ways`` contexts.

    Args:
        about: whether the context is about what is asked, or about another subject of the same relation.
        ways: contexts of each question.
        seed: of subjects, false objects and sentences around.

    >>> some = facts(True)
    >>> len(some), all(f.told in f.context and f.told != f.truth for f in some)
    (130, True)
    """
    rng = np.random.default_rng(seed)
    found = []
    for question, start, said, true in RELATIONS.values():
        for subject, truth in true.items():
            for way in range(ways):
                others = [s for s in true if s != subject and true[s] != truth]
                other = others[rng.integers(len(others))]
                objects = [o for o in true.values() if o not in (truth, true[other])]
                told = objects[rng.integers(len(objects))]
                sentence = said[way % len(said)].format(s=subject if about else other, o=told)
                around = [AROUND[i] for i in rng.permutation(len(AROUND))[:2]]
                context = f"{around[0]} {sentence} {around[1]}"
                found.append(Fact(question.format(s=subject), start.format(s=subject), context, told, truth, about))
    return found
