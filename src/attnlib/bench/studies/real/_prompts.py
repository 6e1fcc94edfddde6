"""Questions whose answer stands somewhere in a long text: what is asked of a language model whose cache lost keys.

A prompt is a chat of one message: real text of a wanted length, with facts sown into it, and a question. Answers are
digits, one token each, so that a guess is right once in ten to the number of them.

>>> sorted(TASKS)
['lookup', 'needle', 'several', 'variables']
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....checks import check_int, check_real
from ....types import check_choice
from ...data import files

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Tokyo", "Accra")
WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "queen", "robot", "salad", "train", "zebra")

#: Tasks: what is sown, and what is asked.
TASKS = {
    "needle": "one fact",
    "several": "one of eight facts of the same form",
    "variables": "a variable that was set to another one, elsewhere",
    "lookup": "one entry of a table of twelve",
}


@dataclass(frozen=True)
class Question:
    """What is asked at the end of a prompt.

    Args:
        text: of the question, with the beginning of the answer.
        answer: digits.
    """

    text: str
    answer: str


@dataclass(frozen=True, eq=False)
class Item:
    """A text with facts in it, and a question for each of the tasks.

    Args:
        context: (1, N) token ids: the beginning of the chat, and the text.
        questions: by task.
        depth: of the needle, 0 at the beginning of the text and 1 at its end.
        place: token of the context at which the needle stands.
    """

    context: Tensor
    questions: dict[str, Question]
    depth: float
    place: int


@functools.lru_cache(maxsize=2)
def _text() -> str:
    return bytes(files.text().train.tolist()).decode("utf-8", errors="ignore")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _digits(draw: random.Random, count: int) -> str:
    return str(draw.randrange(10 ** (count - 1), 10**count))


def _chat(tokenizer: Any) -> tuple[str, str]:
    """What stands before and after a message, the turn of the model included."""
    mark = "\x1a"
    if getattr(tokenizer, "chat_template", None) is None:
        return "", "\n"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = whole.partition(mark)
    return before, after


def make_item(tokenizer: Any, length: int, depth: float, seed: int, text: str | None = None) -> Item:
    """A context of about ``length`` tokens (a few fewer), its questions beside it.

    Args:
        tokenizer: of the model.
        length: tokens of the context.
        depth: of the needle; the other facts are spread by chance.
        seed: of facts, names, places and of where the text begins.
        text: to sow into; the documentation of Python by default.

    Raises:
        ValueError: a length that leaves no room for the facts and some text, so that a needle would be cut off.
    """
    check_real("depth", depth, least=0, most=1)
    check_int("length", length, least=1)
    draw = random.Random(f"{seed}/{depth:.3f}")
    cities, words = draw.sample(CITIES, len(CITIES)), draw.sample(WORDS, len(WORDS))
    needle = _digits(draw, 6)
    codes = {city: _digits(draw, 4) for city in cities}
    table = {word: _digits(draw, 4) for word in words}
    value = _digits(draw, 5)
    first, second = draw.sample(("alpha", "beta", "gamma", "delta"), 2)
    facts = {
        "needle": f"\nThe special magic number is {needle}.\n",
        **{city: f"\nThe access code of {city} is {code}.\n" for city, code in codes.items()},
        "table": "\nStock list:\n" + "".join(f"{word}: {number}\n" for word, number in table.items()),
        "set": f"\nThe variable {first} is set to {value}.\n",
        "copied": f"\nThe variable {second} is set to the value of {first}.\n",
    }
    sown = {name: _ids(tokenizer, fact) for name, fact in facts.items()}
    before = _ids(tokenizer, _chat(tokenizer)[0])
    room = length - len(before) - sum(map(len, sown.values()))
    if room < len(sown):
        raise ValueError(
            f"length={length} leaves no room: the facts alone take {length - room} tokens, and the needle would be cut "
            "off"
        )
    source = _text() if text is None else text
    start = draw.randrange(max(len(source) - 8 * room, 1))
    hay = _ids(tokenizer, source[start : start + 8 * room])[:room]
    places = {name: draw.random() for name in sown if name != "needle"} | {"needle": depth}
    context, last, at = list(before), 0, 0
    for name in sorted(places, key=lambda n: places[n]):
        here = round(places[name] * len(hay))
        context += hay[last:here]
        last = here
        if name == "needle":
            at = len(context)
        context += sown[name]
    context += hay[last:]
    asked = {
        "needle": ("What is the special magic number?", "The special magic number is", needle),
        "several": (f"What is the access code of {cities[0]}?", f"The access code of {cities[0]} is", codes[cities[0]]),
        "variables": (f"What is the value of the variable {second}?", f"The value of the variable {second} is", value),
        "lookup": (f"What is the number of {words[0]} in the stock list?", f"{words[0]}:", table[words[0]]),
    }
    after = _chat(tokenizer)[1]
    questions = {
        task: Question(f"\n\n{question}{after}{begun}", answer) for task, (question, begun, answer) in asked.items()
    }
    return Item(torch.tensor([context]), questions, depth, at)


def question_ids(tokenizer: Any, item: Item, task: str) -> tuple[Tensor, Tensor]:
    """(1, q) tokens up to the answer, and (1, a) of the answer."""
    check_choice("task", task, tuple(item.questions))
    question = item.questions[task]
    asked = _ids(tokenizer, question.text + " ")
    answer = _ids(tokenizer, question.text + " " + question.answer)[len(asked) :]
    return torch.tensor([asked]), torch.tensor([answer])


def next_turn_ids(tokenizer: Any, item: Item, task: str, answered: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same for a question that follows an answer given: the end of that turn, and the next message."""
    before, after = _chat(tokenizer)
    end = after.split("\n")[0]
    question = item.questions[task]
    begun = question.text.partition(after)
    asked = f".{end}\n<|im_start|>user\n{begun[0].strip()}{after}{begun[2]} "
    ids = _ids(tokenizer, asked)
    answer = _ids(tokenizer, asked + question.answer)[len(ids) :]
    return torch.tensor([[*answered, *ids]]), torch.tensor([answer])
