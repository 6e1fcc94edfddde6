"""Words of two languages: the same form and meaning, or one without the other (arXiv 2501.09127).

Cognates share form and meaning, translations only the meaning, interlingual homographs ("false cognates") only the
form. Three tasks ask whether a model tells form from meaning: do two words mean the same; which of two meanings has a
word in a language; what does a word mean, and does it make sense, in a sentence of low or high constraint. A small
table of our own is here; the authors', which has no licence, is read from the user's folder (:func:`load_words`).

>>> items = same_meaning(own_words("es"), shots=0)
>>> from attnlib.bench.evaluate import evaluate
>>> found = evaluate(items, form_only(items))  # says that words of one form mean the same
>>> [found.where(type=t).mean("right") for t in TYPES]
[1.0, 0.0, 0.0]
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import check_int
from ...types import check_choice
from ..data.files import DataError
from ..evaluate import Evaluation, Item, Unreadable, user_file
from .lexicon import FALSE_FRIENDS, SENTENCES, SHARED

TYPES = ("cognate", "translation", "homograph")
LANGUAGES = {"en": "English", "es": "Spanish", "de": "German", "fr": "French"}
_THEIRS = {"COGNATE": "cognate", "NON COGNATE": "translation", "FALSE COGNATE": "homograph"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """An English word beside one of another language.

    Args:
        id: its name.
        words: by language.
        type: of :data:`TYPES`.
        meanings: in English, by language.
        wrong: a meaning it has not, by language.
        sentences: by language, of low and of high constraint, with ``<MASK>`` for the word.
    """

    id: str
    words: Mapping[str, str]
    type: str
    meanings: Mapping[str, str]
    wrong: Mapping[str, str]
    sentences: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def other(self) -> str:
        """The language that is not English."""
        return next(lang for lang in self.words if lang != "en")


def _with_wrong(rows: Sequence[tuple[str, dict[str, str], str, dict[str, str]]], seed: int) -> list[Pair]:
    """Wrong meanings: of a homograph the other language's, else that of another row."""
    rng, pairs = np.random.default_rng(seed), []
    for name, words, kind, meanings in rows:
        if kind == "homograph":
            wrong = {a: meanings[b] for a, b in zip(words, [*words][::-1], strict=True)}
        else:
            others = [m for other, _, _, m in rows if other != name and not set(m.values()) & set(meanings.values())]
            if not others:
                raise DataError(f"the word table has no other meaning to set against {name!r}; it needs more rows")
            wrong = {lang: others[rng.integers(len(others))][lang] for lang in words}
        pairs.append(Pair(name, words, kind, meanings, wrong))
    return pairs


def own_words(language: str = "es", seed: int = 0) -> list[Pair]:
    """Our own table of English words and those of ``"es"`` or ``"de"``; ``seed`` draws the wrong meanings."""
    check_choice("language", language, list(FALSE_FRIENDS))
    rows: list[tuple[str, dict[str, str], str, dict[str, str]]] = []
    for kind in ("cognate", "translation"):
        for en, xx, meaning in SHARED[language][kind]:
            rows.append((f"en-{language}-{en}", {"en": en, language: xx}, kind, {"en": meaning, language: meaning}))
    for en, xx, one, two in FALSE_FRIENDS[language]:
        rows.append((f"en-{language}-{en}", {"en": en, language: xx}, "homograph", {"en": one, language: two}))
    sentences = SENTENCES.get(language, {})
    return [dataclasses.replace(p, sentences=sentences.get(p.words["en"], {})) for p in _with_wrong(rows, seed)]


def load_words(folder: str | Path, language: str = "es", seed: int = 0) -> list[Pair]:
    """The authors' ``en_<language>_dataset.csv``, with ``task3_en_<language>.csv`` where it is there too."""
    check_choice("language", language, [lang for lang in LANGUAGES if lang != "en"])
    name, third = f"en_{language}_dataset.csv", f"task3_en_{language}.csv"
    path = user_file(folder, name, "the words of github.com/EshaanT/Bilingual_processing_LLMs")

    def read(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            if lacking := sorted(set(columns) - set(reader.fieldnames or ())):
                raise DataError(f"{file} lacks the columns {lacking}")
            return list(reader)

    table = read(path, ["ID", "en", "en_meaning", language, f"{language}_meaning", "type"])
    unknown = sorted({r["type"].strip() for r in table} - set(_THEIRS))
    if unknown:
        raise DataError(f"{path} has the types {unknown}; possible: {list(_THEIRS)}")
    pairs = _with_wrong(
        [
            (f"en-{language}-{r['ID']}", {"en": r["en"].strip(), language: r[language].strip()},
             _THEIRS[r["type"].strip()],
             {"en": r["en_meaning"].strip(), language: r[f"{language}_meaning"].strip()})
            for r in table
        ],
        seed,
    )  # fmt: skip
    if not (Path(folder) / third).is_file():
        return pairs
    columns = [f"{level}_{lang}" for level in ("low", "high") for lang in ("en", language)]
    said = {
        (r["en"].strip(), r[language].strip()): {g: (r[f"low_{g}"], r[f"high_{g}"]) for g in ("en", language)}
        for r in read(Path(folder) / third, ["en", language, *columns])
    }
    return [dataclasses.replace(p, sentences=said.get((p.words["en"], p.words[language]), {})) for p in pairs]


def split(pairs: Sequence[Pair], shots: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """``shots`` pairs of each type to show, and the others to ask."""
    check_int("shots", shots, least=0)
    rng, shown = np.random.default_rng(seed), []
    for kind in TYPES:
        own = [p for p in pairs if p.type == kind]
        if shots and len(own) <= shots:
            raise ValueError(f"shots={shots} leaves nothing to ask of {len(own)} pairs of type {kind!r}")
        shown += [own[i] for i in rng.permutation(len(own))[:shots]]
    ids = {p.id for p in shown}
    return shown, [p for p in pairs if p.id not in ids]


# --------------------------------------------------------------------------------------------------------------------
# Tasks


def same_meaning(
    pairs: Sequence[Pair], shots: int = 4, seed: int = 0, shown_types: Sequence[str] = ("cognate", "homograph")
) -> list[Item]:
    """Task 1: do the two words mean the same, True or False?

    Args:
        pairs: all of them; those shown are not asked.
        shots: pairs of each type that are shown, solved, in a shuffled order.
        seed: of what is shown.
        shown_types: of the solved ones; the authors leave out translations, which matters.
    """
    for kind in shown_types:
        check_choice("shown_types", kind, TYPES)
    shown, asked = split(pairs, shots, seed)
    shown = [p for p in shown if p.type in shown_types]
    rng = np.random.default_rng([seed, 1])

    def line(p: Pair) -> str:
        return f'"{p.words["en"]}" and "{p.words[p.other]}" ->'

    solved = [f"{line(shown[i])} {shown[i].type != 'homograph'}\n" for i in rng.permutation(len(shown))]
    items = []
    for p in asked:
        head = f"Here are a word in English and one in {LANGUAGES[p.other]}. "
        head += "Answer True if they mean the same, else False.\n"
        items.append(
            Item(p.id, head + "".join(solved) + line(p), str(p.type != "homograph"),
                 {"task": "1", "type": p.type, "language": p.other, "en": p.words["en"], "xx": p.words[p.other]},
                 ("True", "False"))
        )  # fmt: skip
    return items


def which_meaning(
    pairs: Sequence[Pair], shots: int = 4, seed: int = 0, shown_types: Sequence[str] = ("cognate", "homograph")
) -> list[Item]:
    """Task 2: which of two meanings has a word, of either language? The right one is first in half of the items of each
    language, drawn anew; of the solved ones half are shown, as the authors do."""
    for kind in shown_types:
        check_choice("shown_types", kind, TYPES)
    shown, asked = split(pairs, shots, seed)
    rng = np.random.default_rng([seed, 2])

    def balanced(count: int) -> list[bool]:
        return [bool(i % 2) for i in rng.permutation(count)]

    def question(p: Pair, lang: str, first: bool) -> str:
        a, b = (p.meanings[lang], p.wrong[lang])[:: 1 if first else -1]
        return f'What does "{p.words[lang]}" mean in {LANGUAGES[lang]}?\n1. {a}\n2. {b}\nAnswer:'

    every = [(p, lang) for p in shown if p.type in shown_types for lang in p.words]
    every = [every[i] for i in rng.permutation(len(every))[: len(every) // 2]]
    solved = [f"{question(p, g, f)} {1 if f else 2}\n" for (p, g), f in zip(every, balanced(len(every)), strict=True)]
    head = "Choose the right meaning of the word, 1 or 2.\n" + "".join(solved)
    items = []
    for at in (0, 1):
        for p, first in zip(asked, balanced(len(asked)), strict=True):
            lang = [*p.words][at]
            items.append(
                Item(f"{p.id}/{lang}", head + question(p, lang, first), "1" if first else "2",
                     {"task": "2", "type": p.type, "language": lang, "pair": p.id}, ("1", "2"))
            )  # fmt: skip
    return items


def in_sentence(pairs: Sequence[Pair], cross: bool = False) -> list[Item]:
    """Task 3: language and meaning of the quoted word in a sentence, and whether the sentence makes sense.

    Args:
        pairs: those with sentences are asked.
        cross: put the word of the other language into the slot.
    """
    items = []
    for p in pairs:
        for lang, both in p.sentences.items():
            word_lang = next(g for g in p.words if (g != lang) == cross)
            for level, sentence in zip(("low", "high"), both, strict=True):
                if sentence.count("<MASK>") != 1:
                    raise DataError(f"a sentence of {p.id!r} must hold <MASK> once, got {sentence!r}")
                said = sentence.replace("<MASK>", f'"{p.words[word_lang]}"')
                prompt = (
                    f"{said}\nAbout the quoted word: Q1. Which language is it of? Q2. What does it mean? "
                    "Q3. Does the sentence make sense with that meaning? "
                    "Answer line by line: A1: ... A2: ... A3: yes or no"
                )
                # a homograph of the other language has another meaning there; all others mean what fits
                sense = "no" if cross and p.type == "homograph" else "yes"
                wanted = {"language": LANGUAGES[word_lang], "meaning": p.meanings[word_lang], "sense": sense}
                setup = "cross" if cross else "congruent"
                groups = {"task": "3", "type": p.type, "language": lang, "constraint": level, "setup": setup}
                items.append(Item(f"{p.id}/{lang}/{level}/{setup}", prompt, wanted, groups))
    if not items:
        raise ValueError("pairs must hold some with sentences, got none")
    return items


def parse_three(text: str, item: Item | None = None) -> dict[str, str]:
    """The three lines of an answer to task 3."""
    found = {}
    for line in text.splitlines():
        head, _, rest = line.strip().partition(":")
        if head.upper() in ("A1", "A2", "A3"):
            found[head.upper()] = rest.strip()
    if len(found) < 3:
        raise Unreadable(f"lines A1, A2, A3 wanted, got {sorted(found)}")
    return {"language": found["A1"], "meaning": found["A2"], "sense": found["A3"]}


def score_three(judge: Callable[[str, str], float] | None = None) -> Callable[[Any, Item], dict[str, float]]:
    """Score of task 3: language and sense by comparison, the meaning by ``judge(said, right)``, a person's or model's
    number between 0 and 1; without a judge the meaning is left out."""

    def score(value: Mapping[str, str], item: Item) -> dict[str, float]:
        found = {
            "language": float(item.answer["language"].lower() in value["language"].lower()),
            "sense": float(value["sense"].lower().startswith(item.answer["sense"])),
        }
        return found if judge is None else found | {"meaning": float(judge(value["meaning"], item.answer["meaning"]))}

    return score


# --------------------------------------------------------------------------------------------------------------------
# Baselines, and what task 1 says of task 2


def oracle(items: Sequence[Item]) -> dict[str, str]:
    """Right answers by id."""
    return {item.id: str(item.answer) for item in items}


def constant(items: Sequence[Item], answer: str) -> dict[str, str]:
    """One answer to everything."""
    return {item.id: answer for item in items}


def form_only(items: Sequence[Item], exact: bool = True, near: int = 2) -> dict[str, str]:
    """Answers to task 1 by spelling: True where the words are the same letters, case aside; accents count.

    Args:
        items: of :func:`same_meaning`.
        exact: else words within ``near`` edits are one form, as cognates often are.
        near: edits.
    """
    most = 0 if exact else check_int("near", near, least=0)
    if any(item.groups.get("task") != "1" for item in items):
        raise ValueError("items must be of task 1, whose questions are of two words")
    return {i.id: str(edits(i.groups["en"].lower(), i.groups["xx"].lower()) <= most) for i in items}


def edits(a: str, b: str) -> int:
    """Levenshtein's distance.

    >>> edits("fruit", "fruta")
    2
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (x != y))
    return row[-1]


def link(first: Evaluation, second: Evaluation) -> float:
    """Pearson's correlation over pairs: right in task 1, and the share right in task 2; NaN where one is constant."""
    one = first.scores("right", "wrong")
    two: dict[str, list[float]] = {}
    pair_of = {a.item.id: a.item.groups["pair"] for a in second.answers}
    for name, value in second.scores("right", "wrong").items():
        two.setdefault(pair_of[name], []).append(value)
    both = [(one[name], float(np.mean(two[name]))) for name in one if name in two]
    if len(both) < 2:
        raise ValueError(f"first and second must share at least two pairs, got {len(both)}")
    a, b = np.asarray(both).T
    return float("nan") if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])
