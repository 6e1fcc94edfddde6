"""Whether a model answers what it reads, after Shao et al., 2024 (arXiv 2411.07722): cognition and perception.

A question on a document is asked (*cognition*), and the same model is asked to read the text in the answer's box
(*perception*). The two are consistent where they match; whether either is right is another matter, so that both
accuracies and the table of all eight cases stand beside the share of consistent ones. Only questions whose answer
stands in exactly one box can be asked so.

The tuning data of three tasks come from the same samples: perceptual (read a box, find a text), cognitive (answer,
verify), and the connector, which states an answer and what is read where, between link tokens.

Second-hand: how texts match, which box a model is shown and how records are worded are options of ours.

>>> sample = Sample("s", "What is the total?", "1,250", Box(10, 20, 60, 30, "pixels"))
>>> report = compare([sample], {"s": "1250"}, {"s": "Total: 1,250"}, mode="contained")
>>> report.consistency, report.named()["consistent and right"]
(1.0, 1)
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...checks import check_choice, check_real, check_template, check_type, describe, to_list
from ...look.zoom.iris import box_iou
from ..evaluate import Item, Unreadable
from ..judge import Summary, read_json, yes_no
from ..stats import Difference, bootstrap_interval, paired_bootstrap, share_interval

#: Units of a box and the length of a side in them; pixels depend on the picture.
UNITS: Mapping[str, float | None] = {"unit": 1.0, "thousand": 1000.0, "pixels": None}

# --------------------------------------------------------------------------------------------------------------------
# Boxes


@dataclass(frozen=True)
class Box:
    """A box, its units told: ``"unit"`` (0 to 1), ``"thousand"`` (0 to 1000) or ``"pixels"``."""

    left: float
    top: float
    right: float
    bottom: float
    units: str

    def __post_init__(self) -> None:
        check_choice("units", self.units, UNITS)
        side = UNITS[self.units]
        for name in ("left", "top", "right", "bottom"):
            check_real(name, getattr(self, name), least=0, most=side)
        if self.right <= self.left or self.bottom <= self.top:
            raise ValueError(f"a box must have right > left and bottom > top, got {self.corners}")

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    def to(self, units: str, size: tuple[float, float] | None = None) -> Box:
        """The same in other units.

        Args:
            units: of :data:`UNITS`.
            size: width and height of the picture, where pixels are involved.
        """
        check_choice("units", units, UNITS)
        if units == self.units:
            return self
        if size is not None:
            sides = to_list("size", size, "(640, 480)") or []
            if len(sides) != 2:
                raise ValueError(f"size must be the width and height of the picture, got {describe(size)}")
            for axis, given in enumerate(sides):
                check_real(f"size[{axis}]", given, above=0)
        if size is None and "pixels" in (units, self.units):
            raise ValueError(f"size must be given, the width and height of the picture, from {self.units} to {units}")

        def side(of: str, axis: int) -> float:
            known = UNITS[of]
            return float(size[axis]) if known is None and size is not None else float(known or 1.0)

        moved = [v / side(self.units, i % 2) * side(units, i % 2) for i, v in enumerate(self.corners)]
        return Box(moved[0], moved[1], moved[2], moved[3], units)

    def iou(self, other: Box) -> float:
        """Intersection over union with a box of the same units."""
        check_type("other", other, Box)
        if self.units != other.units:
            raise ValueError(f"boxes must be of the same units, got {self.units} and {other.units}; see Box.to")
        return box_iou(self.corners, other.corners)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{v:.3f}" if self.units == "unit" else f"{v:.0f}" for v in self.corners) + "]"


def read_box(text: str, units: str) -> Box:
    """The box that an answer is, four numbers in brackets and nothing else.

    Raises:
        Unreadable: something else, or no box.
    """
    corners = read_json(text.strip(), [float])
    if len(corners) != 4:
        raise Unreadable(f"a box has four numbers, got {len(corners)}")
    try:
        return Box(corners[0], corners[1], corners[2], corners[3], units)
    except ValueError as error:
        raise Unreadable(str(error)) from None


# --------------------------------------------------------------------------------------------------------------------
# Texts


def normalise(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation and thousands' separators; decimals and signs stay.

    >>> normalise("Total:  $1,250.50"), normalise("-3 %"), normalise("Smith & Co., Ltd.")
    (['total', '1250.50'], ['-3'], ['smith', 'co', 'ltd'])
    """
    check_type("text", text, str)
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d)[,'\u2019\u202f\u00a0](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d) (?=\d{3}(?:\D|$))(?<!\d\d\d\d )", "", text)
    text = re.sub(r"(?<![\w)])[-\u2212](?=\d)", "\x00", text)  # a sign, not a dash
    text = re.sub(r"(?<=\d)\.(?=\d)", "\x01", text)
    text = re.sub(r"[^\w\x00\x01]+|_", " ", text)
    return text.replace("\x00", "-").replace("\x01", ".").split()


def match(a: str, b: str, mode: str = "equal") -> bool:
    """Whether two texts say the same; an empty one matches nothing.

    Args:
        a, b: compared without case, spaces, punctuation and thousands' separators.
        mode: ``"equal"``; ``"contained"``, the words of ``a`` stand in ``b``, one behind the other.

    >>> match("New York", "new-york"), match("1,000", "1000"), match("12", "125", "contained"), match("", "x")
    (True, True, False, False)
    """
    check_choice("mode", mode, ("equal", "contained"))
    one, words = "".join(normalise(a)), normalise(b)
    if not one or not words:
        return False
    if mode == "equal":
        return one == "".join(words)
    for start in range(len(words)):
        run = ""
        for word in words[start:]:
            run += word
            if len(run) >= len(one):
                break
        if run == one:
            return True
    return False


def likeness(said: str, truth: str, threshold: float = 0.5) -> float:
    """ANLS of one answer: one less the edits per character, 0 below ``threshold``.

    >>> likeness("hello", "Hello!"), round(likeness("hallo", "hello"), 2), likeness("x", "hello")
    (1.0, 0.8, 0.0)
    """
    check_real("threshold", threshold, least=0, most=1)
    a, b = " ".join(normalise(said)), " ".join(normalise(truth))
    if not a or not b:
        return 0.0
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        before, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (one != other)))
    share = 1 - row[-1] / max(len(a), len(b))
    return share if share >= threshold else 0.0


# --------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class Sample:
    """A question on a document whose answer stands in one box.

    Args:
        id: its name, no other's.
        question, answer: the answer is a text of the document.
        box: where.
        others: other texts of the document, wrong answers to verify.
        image: the document or its name.
    """

    id: str
    question: str
    answer: str
    box: Box
    others: tuple[str, ...] = ()
    image: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_type("box", self.box, Box, "a Box with its units")
        if not normalise(self.answer):
            raise ValueError(f"answer of sample {self.id!r} must hold a word, got {self.answer!r}")


class Extracted(NamedTuple):
    """Samples that can be asked, and how many cannot: the answer stands in no box, or in several."""

    samples: list[Sample]
    nowhere: int
    several: int


def extractive(rows: Sequence[tuple[str, str, str, Sequence[tuple[str, Box]]]], mode: str = "contained") -> Extracted:
    """Questions whose answer stands in exactly one box of what a reader of texts (OCR) found.

    Args:
        rows: id, question, answer, and texts with their boxes.
        mode: how the answer stands there, of :func:`match`.
    """
    found: list[Sample] = []
    nowhere = several = 0
    for name, question, answer, read in rows:
        there = [i for i, (text, _) in enumerate(read) if match(answer, text, mode)]
        if len(there) == 1:
            others = tuple(text for i, (text, _) in enumerate(read) if i != there[0] and normalise(text))
            found.append(Sample(name, question, answer, read[there[0]][1], others))
        else:
            nowhere, several = nowhere + (not there), several + bool(there)
    return Extracted(found, nowhere, several)


#: Wordings; others are arguments. ``{units}`` says what a box is counted in.
PROMPTS: Mapping[str, str] = {
    "answer": "{question}\nAnswer with words of the document only.",
    "read": "Which text stands in the box {box} ({units})? Give the text only.",
    "locate": 'Where does the text "{text}" stand? Give its box in {units} as [left, top, right, bottom].',
    "verify": '{question}\nIs "{text}" the answer? Answer with yes or no.',
    "connect": "{question}\nThe answer stands in the box {box} ({units}). Give the answer, and what you read there.",
}


def _prompt(prompts: Mapping[str, str], kind: str) -> str:
    """The wording of a kind of question."""
    check_type("prompts", prompts, Mapping, f"a mapping with {list(PROMPTS)}")
    if kind not in prompts:
        raise ValueError(f"prompts must hold a wording for {kind!r}, it has {list(prompts)}")
    return check_template(f"prompts[{kind!r}]", prompts[kind], ("question", "box", "units", "text"))


def queries(samples: Sequence[Sample], what: str, prompts: Mapping[str, str] = PROMPTS) -> list[Item]:
    """Samples as items of :func:`attnlib.bench.evaluate.evaluate`.

    Args:
        samples: what is asked.
        what: ``"answer"`` (cognition), ``"read"`` (perception) or ``"locate"`` (the box of the answer's text).
        prompts: other wordings.
    """
    check_choice("what", what, ("answer", "read", "locate"))
    prompt = _prompt(prompts, what)
    return [
        Item(
            s.id, prompt.format(question=s.question, box=s.box, units=s.box.units, text=s.answer), s.answer,
            {"task": what}, (), s.image,
        )
        for s in samples
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Consistency


@dataclass(frozen=True)
class Report:
    """By sample, whether cognition and perception match, and whether each is right.

    Args:
        cases: ``(consistent, cognition right, perception right)`` by id.
        silent: answers without a word, of either kind; they match nothing.
    """

    cases: Mapping[str, tuple[bool, bool, bool]]
    silent: int = 0

    @property
    def cells(self) -> dict[tuple[bool, bool, bool], int]:
        """How many samples are in each of the eight cases."""
        every = list(self.cases.values())
        given = (True, False)
        return {(a, b, c): every.count((a, b, c)) for a, b, c in itertools.product(given, given, given)}

    def named(self) -> dict[str, int]:
        """The cases in words. Matching is not transitive, so that consistent answers may be right and wrong."""
        cells, given = self.cells, (True, False)
        return {
            "consistent and right": cells[True, True, True],
            "consistent and wrong": cells[True, False, False],
            "consistent, one of them right": cells[True, True, False] + cells[True, False, True],
            "conflict, cognition right": cells[False, True, False],
            "conflict, perception right": cells[False, False, True],
            "conflict, both wrong": cells[False, False, False],
            "conflict, both right": sum(cells[False, a, b] for a in given for b in given if a and b),
        }

    def _share(self, which: int) -> float:
        return sum(c[which] for c in self.cases.values()) / len(self.cases) if self.cases else math.nan

    @property
    def consistency(self) -> float:
        """Share of consistent samples."""
        return self._share(0)

    @property
    def cognition(self) -> float:
        """Share of right answers."""
        return self._share(1)

    @property
    def perception(self) -> float:
        """Share of right readings."""
        return self._share(2)

    def interval(self, what: str) -> tuple[float, float]:
        """Wilson's 95 % interval of ``"consistency"``, ``"cognition"`` or ``"perception"``."""
        which = _which(what)
        return share_interval(sum(c[which] for c in self.cases.values()), len(self.cases))

    def against(self, other: Report, what: str) -> Difference:
        """How much higher a share is than another model's, sample by sample."""
        which = _which(what)
        one, two = ({k: float(c[which]) for k, c in r.cases.items()} for r in (self, other))
        return paired_bootstrap(one, two)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        shares = {w: {"share": getattr(self, w), "interval": self.interval(w)} for w in _WHAT}
        return {"n": len(self.cases), "silent": self.silent, **shares, "cases": self.named()}


_WHAT = ("consistency", "cognition", "perception")


def _which(what: str) -> int:
    check_choice("what", what, _WHAT)
    return _WHAT.index(what)


def compare(
    samples: Sequence[Sample],
    cognition: Mapping[str, str],
    perception: Mapping[str, str],
    mode: str = "equal",
    right: Callable[[str, str], bool] | None = None,
) -> Report:
    """Hold what a model answers against what it reads.

    Args:
        samples: of different ids.
        cognition, perception: the answer and the reading, by id.
        mode: of :func:`match`: the answer equals the reading, or is contained in it.
        right: from a text and the truth; by default :func:`likeness` of at least 0.5, for perception also that the
            truth is contained.

    Raises:
        ValueError: no samples, two of one id, a sample without an answer.
    """
    check_choice("mode", mode, ("equal", "contained"))
    names = [s.id for s in samples]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"samples must be of different ids, one at least, got {len(names)} of {len(set(names))}")
    for name, given in (("cognition", cognition), ("perception", perception)):
        check_type(name, given, Mapping, "texts by id")
        if lacking := [n for n in names if n not in given]:
            raise ValueError(f"{name} lacks {len(lacking)} of {len(names)} samples: {lacking[:5]}")
        for n in names:
            if not isinstance(given[n], str):
                raise TypeError(f"{name}[{n!r}] must be a text, got {describe(given[n])}")
    cases, silent = {}, 0
    for s in samples:
        said, read = cognition[s.id], perception[s.id]
        silent += (not normalise(said)) + (not normalise(read))
        if right is None:
            good = likeness(said, s.answer) > 0, likeness(read, s.answer) > 0 or match(s.answer, read, "contained")
        else:
            good = bool(right(said, s.answer)), bool(right(read, s.answer))
        cases[s.id] = (match(said, read, mode), *good)
    return Report(cases, silent)


def verified(verdicts: Mapping[str, str]) -> Summary:
    """Cognitive consistency: how often a model confirms its own answer (yes or no, by id); the unreadable is wrong."""
    said = []
    for text in verdicts.values():
        try:
            said.append(float(yes_no(text)))
        except Unreadable:
            said.append(math.nan)
    return _summary(said)


def grounded(
    samples: Sequence[Sample], boxes: Mapping[str, str], least: float = 0.5, size: tuple[float, float] | None = None,
    units: str | None = None,
) -> Summary:  # fmt: skip
    """Perceptual consistency: how often the box that a model finds for a text is the one that the text was read in.

    Args:
        samples: with the boxes that were read.
        boxes: answers by id, see :func:`read_box`; what is no box is wrong, and told apart.
        least: IoU of boxes that are the same.
        size: of the picture, where units differ and pixels are involved.
        units: of the answers; those of the samples by default.
    """
    check_real("least", least, above=0, most=1)
    said = []
    for s in samples:
        if s.id not in boxes:
            raise ValueError(f"boxes lacks sample {s.id!r}")
        try:
            found = read_box(boxes[s.id], units or s.box.units)
        except Unreadable:
            said.append(math.nan)
        else:
            said.append(float(found.to(s.box.units, size).iou(s.box) >= least))
    return _summary(said)


def _summary(scores: Sequence[float]) -> Summary:
    if not scores:
        raise ValueError("there are no answers to summarise")
    wrong = [0.0 if math.isnan(v) else v for v in scores]
    read = sum(not math.isnan(v) for v in scores)
    return Summary(len(scores), read, sum(wrong) / len(wrong), *bootstrap_interval(wrong))


# --------------------------------------------------------------------------------------------------------------------
# Data of the three tasks

TASKS: Mapping[str, tuple[str, ...]] = {
    "perceptual": ("read", "locate"), "cognitive": ("answer", "verify"), "connector": ("connect",),
}  # fmt: skip
#: Tokens that open and close what belongs together, to be added to a tokenizer.
LINK = ("<link>", "</link>")


@dataclass(frozen=True)
class Record:
    """One example: the loss is on the target.

    Args:
        task: of :data:`TASKS`; ``kind`` which of its records.
        sample: id; ``answer`` and ``box`` are the sample's.
        prompt, target: texts.
    """

    task: str
    kind: str
    sample: str
    prompt: str
    target: str
    answer: str
    box: Box
    image: Any = field(default=None, compare=False, repr=False)


def records(
    samples: Sequence[Sample],
    tasks: Sequence[str] = tuple(TASKS),
    units: str | None = None,
    size: tuple[float, float] | None = None,
    link: tuple[str, str] = LINK,
    prompts: Mapping[str, str] = PROMPTS,
) -> list[Record]:
    """Every sample's examples of every task, with one box and one answer.

    What is verified is the answer for every other sample, and another text of the document for the rest.

    Args:
        samples: of different ids.
        tasks: of :data:`TASKS`.
        units: of boxes in texts; the samples' own by default.
        size: of the picture, where pixels are involved.
        link: opening and closing token.
        prompts: other wordings.

    Raises:
        ValueError: link tokens that are equal or stand in an answer, no other text to verify.
    """
    for task in tasks:
        check_choice("tasks", task, TASKS)
    opening, closing = link
    if not opening or not closing or opening == closing:
        raise ValueError(f"link must be two different tokens, got {link}")
    names = [s.id for s in samples]
    if len(set(names)) < len(names):
        raise ValueError("samples must be of different ids")
    wordings = {kind: _prompt(prompts, kind) for task in tasks for kind in TASKS[task]}
    made = []
    for number, s in enumerate(samples):
        if opening in s.answer or closing in s.answer:
            raise ValueError(f"answer of sample {s.id!r} holds a link token {link}: {s.answer!r}")
        box = s.box if units is None else s.box.to(units, size)
        true = number % 2 == 0
        wrong = [t for t in s.others if not match(t, s.answer)]
        if "cognitive" in tasks and not true and not wrong:
            raise ValueError(f"others of sample {s.id!r} must hold a text that is not the answer, to be verified")
        asked = s.answer if true else wrong[number // 2 % len(wrong)] if wrong else ""
        targets = {
            "read": s.answer, "locate": str(box), "answer": s.answer, "verify": "yes" if true else "no",
            "connect": f"{opening}{s.answer}{closing} {box} {opening}{s.answer}{closing}",
        }  # fmt: skip
        for task in tasks:
            for kind in TASKS[task]:
                text = asked if kind == "verify" else s.answer
                prompt = wordings[kind].format(question=s.question, box=box, units=box.units, text=text)
                made.append(Record(task, kind, s.id, prompt, targets[kind], s.answer, box, s.image))
    return made


def linked(text: str, link: tuple[str, str] = LINK) -> list[str]:
    """What stands between link tokens, in turn.

    Raises:
        Unreadable: tokens that do not open and close in turn.

    >>> linked("<link>12</link> [1, 2, 3, 4] <link>12</link>")
    ['12', '12']
    """
    parts = re.split(f"({re.escape(link[0])}|{re.escape(link[1])})", text)
    found, inside = [], False
    for part in parts:
        if part in link:
            if (part == link[0]) == inside:
                raise Unreadable(f"link tokens do not open and close in turn: {text[:60]!r}")
            inside = not inside
        elif inside:
            found.append(part)
    if inside:
        raise Unreadable(f"a link token is not closed: {text[:60]!r}")
    return found
