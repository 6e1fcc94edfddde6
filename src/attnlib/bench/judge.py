"""Reading answers strictly, asking judges, and saying what came of it: what studies of answers share.

A parser reads what it is sure of and raises :class:`~attnlib.bench.evaluate.Unreadable` for the rest; it never runs
what it reads. Unreadable answers are told as a share of their own, never scored in silence.

>>> option("The answer is (b).", ["a cat", "a dog"]), yes_no("No, it is not."), read_json('{"x": 1}', {"x": int})
(1, False, {'x': 1})
"""

from __future__ import annotations

import inspect
import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_choice, check_int, check_name, check_type, describe, to_list
from .data.files import DataError
from .evaluate import Evaluation, Item, Unreadable, local_seed
from .stats import above_chance, bootstrap_interval
from .store import Lines, identity, plain

#: What options are called.
LETTERS = string.ascii_uppercase

# --------------------------------------------------------------------------------------------------------------------
# Schemas


def conform(value: Any, schema: Any, where: str = "value", optional: Sequence[str] = ()) -> Any:
    """``value``, or an error that says where it is not as ``schema`` wants it.

    Args:
        value: plain values, as JSON has them.
        schema: a type; ``[schema]`` for a list; ``{name: schema}`` for a mapping with these names and perhaps others;
            a set of values for one of them; a tuple of schemas for any of them. ``True`` is no number.
        where: what the message calls the value.
        optional: names of the outer mapping that may be missing.

    Raises:
        ValueError: something else is there, or something is not.

    >>> conform({"index": 0, "said": ["x"]}, {"index": int, "said": [str]})
    {'index': 0, 'said': ['x']}
    """
    if isinstance(schema, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping with {list(schema)}, got {describe(value)}")
        if missing := [name for name in schema if name not in value and name not in optional]:
            raise ValueError(f"{where} lacks {missing}; it has {list(value)}")
        for name, inner in schema.items():
            if name in value:
                conform(value[name], inner, f"{where}[{name!r}]")
    elif isinstance(schema, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {describe(value)}")
        for i, one in enumerate(value):
            conform(one, schema[0], f"{where}[{i}]")
    elif isinstance(schema, AbstractSet):
        if not any(type(value) is type(one) and value == one for one in schema):
            raise ValueError(f"{where} must be one of {sorted(schema)}, got {describe(value)}")
    elif isinstance(schema, tuple):
        for one in schema:
            try:
                return conform(value, one, where)
            except ValueError:
                continue
        raise ValueError(f"{where} must be one of the kinds {[getattr(s, '__name__', s) for s in schema]}, "
                         f"got {describe(value)}")  # fmt: skip
    else:
        kinds = (int, float) if schema is float else schema
        if not isinstance(value, kinds) or (isinstance(value, bool) and schema is not bool):
            raise ValueError(f"{where} must be {schema.__name__}, got {describe(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} must be finite, got {value}")
    return value


def read_records(path: str | Path, schema: Any, what: str, optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Records of a file of the user: a JSON list, or JSON lines.

    Args:
        path: of the file.
        schema, optional: of every record, see :func:`conform`.
        what: what the file holds, for the message where it is missing.

    Raises:
        DataError: no such file, not JSON, or a record that is not as it should be.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"data={str(path)!r} does not exist: {what}; nothing is downloaded, put the file there")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
        conform(rows, [Mapping], "records")
        return [dict(conform(row, schema, f"record {i}", optional)) for i, row in enumerate(rows)]
    except ValueError as error:
        raise DataError(f"data={str(path)!r} is not in the form of {what}: {error}") from error


# --------------------------------------------------------------------------------------------------------------------
# Parsers


def read_json(text: str, schema: Any, optional: Sequence[str] = ()) -> Any:
    """The one JSON value that an answer is, bare or within a fence of three backticks.

    Raises:
        Unreadable: words around it, a name twice, no JSON, or JSON of another form.
    """
    check_type("text", text, str)
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"a name stands twice: {names}")
        return dict(pairs)

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(fenced.group(1) if fenced else text, object_pairs_hook=once, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the answer is not JSON: {error}") from None
    try:
        return conform(value, schema, "the answer", optional)
    except ValueError as error:
        raise Unreadable(str(error)) from None


def read_lines(text: str, names: Sequence[str | Sequence[str]]) -> list[str]:
    """Values of an answer of exactly these lines, ``name: value`` each, in this order and any case.

    Empty lines do not count; anything else does.

    Args:
        text: the answer.
        names: of the lines; several ways to write one are a sequence.

    Raises:
        Unreadable: another number of lines, or another name.

    >>> read_lines("Score: 1\\n\\nWHY: because: so", ["score", "why"])
    ['1', 'because: so']
    """
    check_type("text", text, str)
    names = to_list("names", names, '["score"]') or []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != len(names):
        raise Unreadable(f"{len(lines)} lines, not {len(names)}")
    values = []
    for number, (line, name) in enumerate(zip(lines, names, strict=True), 1):
        possible = [name] if isinstance(name, str) else list(name)
        before, colon, after = line.partition(":")
        if not colon or " ".join(before.split()).casefold() not in [p.casefold() for p in possible]:
            raise Unreadable(f"line {number} must begin with {possible[0]!r} and a colon, got {line[:60]!r}")
        values.append(after.strip())
    return values


def yes_no(text: str, also: Mapping[str, Any] | None = None) -> Any:
    """``True`` or ``False`` of an answer that begins with yes or no, or says "the answer is yes".

    Args:
        text: the answer.
        also: other words to begin with, and what they mean, such as ``{"n/a": None}``.

    Raises:
        Unreadable: neither, or both.

    >>> yes_no("Yes."), yes_no("the answer is no"), yes_no("N/A", {"n/a": 0.5})
    (True, False, 0.5)
    """
    check_type("text", text, str)
    meaning = {"yes": True, "no": False, **{k.casefold(): v for k, v in (also or {}).items()}}
    words = "|".join(sorted(map(re.escape, meaning), key=len, reverse=True))
    plain_text = text.strip().strip("*_\"'`").casefold()
    found = re.match(rf"\W*(?:(?:the|my)?\s*answer(?:\s+is|\s*:)?\s*:?\s*)?\W*({words})(?!\w|-)", plain_text)
    if found is None:
        raise Unreadable(f"the answer must begin with one of {sorted(meaning)}, got {text[:60]!r}")
    said = found.group(1)
    rest = plain_text[found.end() :]
    other = "no" if said == "yes" else "yes"
    if said in ("yes", "no") and re.match(rf"\W*(?:(?:or|and|/)\W*{other}\b|{other}\W*$)", rest):
        raise Unreadable(f"yes and no stand in the answer {text[:60]!r}")
    return meaning[said]


_SAYS = r"(?:(?:the|my|so|thus|hence|therefore|correct|right|best|final)[\s,]+)*(?:answer|option|choice|action)\b"
_SAYS += r"(?:\s+(?:is|would\s+be|should\s+be))?\s*:?\s*"


def option(text: str, options: Sequence[str]) -> int:
    """Number of the option that an answer names, by its letter or by its words.

    Read are, in this order: the option's words alone; a letter alone, such as ``B``, ``(b)`` or ``B.``, before the
    option's own words or none; "the answer is (B)"; one letter in brackets; one option whose words stand in the
    answer, those aside that stand within a longer one.

    Args:
        text: the answer.
        options: words of the options, called A, B, ... in this order.

    Raises:
        Unreadable: none of them, or several.
        ValueError: fewer than two options, more than letters, or two of the same words.

    >>> [option(t, ["red", "dark red"]) for t in ("B", "(a) red", "The answer is b.", "it is dark red")]
    [1, 0, 1, 1]
    """
    check_type("text", text, str)
    for i, words_of in enumerate(to_list("options", options, '["yes", "no"]') or []):
        check_type(f"options[{i}]", words_of, str)
    words = [_bare(o) for o in options]
    if not 2 <= len(words) <= len(LETTERS) or len(set(words)) < len(words) or not all(words):
        raise ValueError(f"options must be 2 to {len(LETTERS)} different texts, got {list(options)}")
    letters = LETTERS[: len(words)]
    bare = _bare(text)
    if bare in words:
        return words.index(bare)
    cleaned = re.sub(r"[*_`]", "", text).strip()
    named = _named(cleaned, letters)
    by_words = _spoken(bare, words)
    if len(named) > 1:
        raise Unreadable(f"the answer names the options {[letters[i] for i in sorted(named)]}: {text[:60]!r}")
    if named:
        return next(iter(named))
    if len(by_words) != 1:
        raise Unreadable(f"{len(by_words)} of the options {list(options)} stand in the answer {text[:60]!r}")
    return next(iter(by_words))


def _bare(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s.,/%+-]", " ", text).casefold().split()).strip(" .,")


def _named(text: str, letters: str) -> set[int]:
    """Numbers of the letters that an answer names: alone, after "the answer is", or within brackets."""
    both = f"[{letters}{letters.lower()}]"
    alone = re.fullmatch(rf"\W*(?:{_SAYS})?\(?\[?({both})\]?\)?\W*", text, re.IGNORECASE)
    if alone:
        return {letters.index(alone.group(1).upper())}
    said = re.findall(rf"\b{_SAYS}[(\[]?({both})(?=[)\].:,;]|\s|$)[)\]]?(?!\w)", text, re.IGNORECASE)
    said = [s for s in said if s.isupper() or not re.search(rf"\b{_SAYS}{s}\s+\w", text, re.IGNORECASE)]
    if said:  # what is concluded counts, not what is weighed before
        return {letters.index(s.upper()) for s in said}
    start = re.match(rf"\(?\[?({both})(?:[)\].:]|\s*$)", text)
    if start:
        more = re.match(rf"\W*(?:or|and|/|,)\W*({both})(?!\w)", text[start.end() :], re.IGNORECASE)
        return {letters.index(m.group(1).upper()) for m in (start, more) if m}
    return {letters.index(s.upper()) for s in re.findall(rf"(?<!\w)[(\[]({both})[)\]]", text)}


def _spoken(text: str, words: Sequence[str]) -> set[int]:
    """Numbers of the options whose words stand in a text, those aside that only stand within a longer one."""
    places: list[tuple[int, int, int]] = []
    for i, option_words in enumerate(words):
        for m in re.finditer(rf"(?<!\w){re.escape(option_words)}(?!\w)", text):
            places.append((m.start(), m.end(), i))
    return {
        i for a, b, i in places if not any(c <= a and b <= d and d - c > b - a for c, d, _ in places)
    }  # fmt: skip


def read_option(text: str, item: Item) -> str:
    """:func:`option` as a parser of :func:`attnlib.bench.evaluate.evaluate`: the option's words."""
    return item.options[option(text, item.options)]


def read_yes_no(text: str, item: Item) -> str:
    """:func:`yes_no` as a parser of :func:`attnlib.bench.evaluate.evaluate`: ``"yes"`` or ``"no"``."""
    return "yes" if yes_no(text) else "no"


def lettered(options: Sequence[str]) -> str:
    """Options as a prompt shows them.

    >>> lettered(["left", "right"])
    '(A) left (B) right'
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"options must be at most {len(LETTERS)}, got {len(options)}")
    return " ".join(f"({letter}) {words}" for letter, words in zip(LETTERS, options, strict=False))


# --------------------------------------------------------------------------------------------------------------------
# Judges


@dataclass(frozen=True)
class Judgement:
    """What a judge said.

    Args:
        judge: its id.
        prompt, text: what it was asked, and its whole answer, the last one where it was asked again.
        value: what was read from it; ``None`` where nothing could be.
        reason: why nothing could be read.
        tries: how often it was asked.
    """

    judge: str
    prompt: str
    text: str
    value: Any = None
    reason: str = ""
    tries: int = 1

    @property
    def read(self) -> bool:
        """Whether the answer could be read."""
        return not self.reason


class Judge:
    """A callable that judges texts, asked once for every prompt; what it said is kept with its id.

    A judge behind a network changes without notice: its id is part of what is kept, and so is every raw answer.

    Args:
        call: from a list of prompts to a list of texts; it gets ``seeds`` too, one per prompt, if it has an argument of
            that name, others at every try.
        id: which judge it is, with its version.
        parse: from a text to a value; raises :class:`~attnlib.bench.evaluate.Unreadable`.
        tries: how often it is asked at most while its answer cannot be read.
        keep: a file that takes every answer as soon as it is there, and from which a later judge of this id goes on.
        batch: prompts at a time.
        seed: of ``seeds``.

    >>> judge = Judge(lambda prompts: ["yes" if "2 + 2 = 4" in p else "no" for p in prompts], "adder-1", yes_no)
    >>> [j.value for j in judge(["Is 2 + 2 = 4?", "Is 2 + 2 = 5?", "Is 2 + 2 = 4?"])], judge.calls
    ([True, False, True], 2)
    """

    def __init__(
        self, call: Callable[..., Sequence[str]] | None, id: str, parse: Callable[[str], Any], tries: int = 1,
        keep: str | Path | None = None, batch: int = 1, seed: int = 0,
    ):  # fmt: skip
        self.call: Callable[..., Sequence[str]] = check_judge(call, "call", "from a list of prompts to a list of texts")
        self.id, self.parse = check_name("id", id), parse
        if not callable(parse):
            raise TypeError(f"parse must be a callable from a text to a value, got {describe(parse)}")
        self.tries, self.batch = check_int("tries", tries, least=1), check_int("batch", batch, least=1)
        self.seed = check_int("seed", seed, least=0)
        self.lines = Lines(keep)
        self.calls = 0
        self._kept: dict[str, list[str]] = {}
        for row in self.lines.rows("judge", "mark", "answer"):
            if row["judge"] == self.id:
                check_type(f"an answer kept in {keep}", row["answer"], str)
                self._kept.setdefault(row["mark"], []).append(row["answer"])

    def __call__(self, prompts: Sequence[str]) -> list[Judgement]:
        """A judgement of every prompt, in their order."""
        prompts = to_list("prompts", prompts, '["Is it so?"]') or []
        for i, prompt in enumerate(prompts):
            check_type(f"prompts[{i}]", prompt, str)
        found: dict[str, Judgement] = {}
        for attempt in range(self.tries):
            todo = [p for p in dict.fromkeys(prompts) if p not in found or not found[p].read]
            fresh = [p for p in todo if len(self._kept.get(self._mark(p), ())) <= attempt]
            for start in range(0, len(fresh), self.batch):
                self._ask(fresh[start : start + self.batch], attempt)
            for prompt in todo:
                text = self._kept[self._mark(prompt)][attempt]
                try:
                    found[prompt] = Judgement(self.id, prompt, text, self.parse(text), tries=attempt + 1)
                except Unreadable as error:
                    reason = str(error) or "unreadable"
                    found[prompt] = Judgement(self.id, prompt, text, reason=reason, tries=attempt + 1)
        return [found[p] for p in prompts]

    def _mark(self, prompt: str) -> str:
        return identity([self.id, prompt])

    def _ask(self, part: Sequence[str], attempt: int) -> None:
        settings = {}
        if "seeds" in inspect.signature(self.call).parameters:
            settings["seeds"] = [local_seed(self.seed + attempt, p) for p in part]
        said = list(self.call(list(part), **settings))
        self.calls += len(part)
        if len(said) != len(part):
            raise ValueError(f"the judge {self.id!r} must answer every prompt, got {len(said)} answers to {len(part)}")
        rows = []
        for prompt, text in zip(part, said, strict=True):
            check_type(f"an answer of the judge {self.id!r}", text, str)
            self._kept.setdefault(self._mark(prompt), []).append(text)
            row = {"judge": self.id, "mark": self._mark(prompt), "try": attempt, "prompt": prompt, "answer": text}
            rows.append(plain(row))
        self.lines.add(rows)


def check_judge(judge: Any, name: str = "judge", what: str = "a callable") -> Any:
    """``judge``, or an error where none is given: nothing is asked by default."""
    if judge is None:
        raise ValueError(f"{name} must be given: {what}; there is none by default")
    if not callable(judge):
        raise TypeError(f"{name} must be a callable, {what}, got {describe(judge)}")
    return judge


# --------------------------------------------------------------------------------------------------------------------
# What came of it


@dataclass(frozen=True)
class Summary:
    """A share of answers.

    Args:
        n: questions; ``read`` answers could be read.
        share: right ones, unreadable answers wrong or apart; NaN where nothing is left.
        low, high: 95 % interval, items drawn again.
        chance: share of who guesses, where questions have options.
        above: :func:`~attnlib.bench.stats.above_chance` of the share.
    """

    n: int
    read: int
    share: float
    low: float
    high: float
    chance: float | None = None
    above: float | None = None

    @property
    def coverage(self) -> float:
        """Share of answers that could be read; NaN without questions."""
        return self.read / self.n if self.n else math.nan

    @property
    def unreadable(self) -> float:
        """Share of answers that could not be read."""
        return 1 - self.coverage

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "coverage": self.coverage}


def summarise(
    answers: Evaluation, metric: str = "right", unreadable: str = "wrong", by_image: bool = True, seed: int = 0
) -> Summary:
    """Share, interval, coverage and chance of some answers.

    Args:
        answers: of :func:`attnlib.bench.evaluate.evaluate`.
        metric: a score between 0 and 1.
        unreadable: ``"wrong"`` scores them 0, ``"apart"`` leaves them out of the share.
        by_image: questions on one image (items' group ``"image"``) are drawn together.
        seed: of the draws.
    """
    check_type("answers", answers, Evaluation)
    check_choice("unreadable", unreadable, ("wrong", "apart"))
    scores = answers.scores(metric, unreadable)
    items = {a.item.id: a.item for a in answers.answers}
    chances = [1 / len(items[name].options) for name in scores if items[name].options]
    chance = sum(chances) / len(chances) if scores and len(chances) == len(scores) else None
    n, read = len(answers.answers), len(answers.answers) - answers.unreadable
    if not scores:
        return Summary(n, read, math.nan, math.nan, math.nan, None, None)
    share = sum(scores.values()) / len(scores)
    about = [items[name].groups.get("image", name) if by_image else name for name in scores]
    low, high = bootstrap_interval(list(scores.values()), seed=seed, items=about)
    above = None if chance is None or chance == 1 else above_chance(share, chance)
    return Summary(n, read, share, low, high, chance, above)
