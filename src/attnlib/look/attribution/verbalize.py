"""Saliency maps of text in words: which runs of words hold the evidence, and how much of it.

Scores ``a_i`` of words; coverage of a set of them is ``sum_{i in S} a_i / sum_i max(a_i, 0)``, at least 0. Candidates
are sets whose mean score, as a share of the largest, lies above a threshold:

- *convolution*: in every window of ``length`` words, every choice of 2 to ``length - 2`` of them;
- *span*: in every window, every centred run of an odd number of words, 3 and more;
- *total*: every word alone.

Of each search the sets that cover most are taken, the union of their words is cut into runs of neighbours, and the
runs that cover at least as much as three quarters of them do are put into sentences, in order. Every number that is
said is a coverage.

Sets hold the words that they name, the last one too, and every window of the text is looked at; the authors' code
leaves out the last of both.

Reference: Feldhus et al., 2023, "Saliency Map Verbalization" (https://arxiv.org/abs/2210.07222).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real, check_type, describe

Scores = Sequence[float] | Tensor | np.ndarray

SEARCHES = ("convolution", "span", "total")


@dataclass(frozen=True)
class Found:
    """A set of words and what it holds.

    Args:
        words: their indices, in order.
        score: mean share of the largest score.
        coverage: share of all evidence.
    """

    words: tuple[int, ...]
    score: float
    coverage: float


@dataclass(frozen=True)
class Verbalization:
    """What :func:`verbalize` says.

    Args:
        text: sentences.
        spans: what they name, the one that covers most first.
        words: that were looked at.
        scores: of the words.
    """

    text: str
    spans: tuple[Found, ...]
    words: tuple[str, ...]
    scores: tuple[float, ...]


def merge_pieces(
    tokens: Sequence[str],
    scores: Scores,
    special: Sequence[str] = ("[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<pad>", "<|endoftext|>"),
    how: str = "sum",
    marks: str | None = None,
) -> tuple[list[str], list[float], list[tuple[int, ...]]]:
    """Word pieces as words.

    Args:
        tokens: pieces as a tokenizer names them.
        scores: one per piece.
        special: pieces that are no text: left out of words and of evidence.
        how: ``"sum"`` or ``"mean"`` of the pieces' scores.
        marks: ``"##"`` where pieces that go on are marked, as BERT's are, ``"start"`` where pieces that begin a word
            are, by a space, ``"\\u0120"`` or ``"\\u2581"``, or ``"none"``; found in the tokens by default.

    Returns:
        words, their scores, and which tokens each is of.

    >>> merge_pieces(["[CLS]", "un", "##used", "film"], [9.0, 1.0, 2.0, 0.5])
    (['unused', 'film'], [3.0, 0.5], [(1, 2), (3,)])
    """
    values = _values(tokens, scores)
    check_choice("how", how, ("sum", "mean"))
    starts = ("\u0120", "\u2581", " ", "\u010a")
    if marks is None:
        marks = "##" if any(t.startswith("##") for t in tokens) else "start" if any(
            t.startswith(starts) for t in tokens) else "none"  # fmt: skip
    check_choice("marks", marks, ("##", "start", "none"))
    words: list[str] = []
    groups: list[list[int]] = []
    apart = True  # after what is no text a word begins
    for i, token in enumerate(tokens):
        if token in special:
            apart = True
            continue
        goes_on = {"##": token.startswith("##"), "start": not token.startswith(starts), "none": False}[marks]
        text = token[2:] if goes_on and marks == "##" else token.lstrip("".join(starts)) if marks == "start" else token
        if goes_on and not apart:
            words[-1] += text
            groups[-1].append(i)
        else:
            words.append(text)
            groups.append([i])
        apart = False
    sums = [sum(float(values[i]) for i in g) / (len(g) if how == "mean" else 1) for g in groups]
    return words, sums, [tuple(g) for g in groups]


def _numbers(scores: Scores) -> np.ndarray:
    try:
        return torch.as_tensor(scores).detach().double().cpu().numpy()
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"scores must be numbers, one per word, got {describe(scores)}") from None


def _values(words: Sequence[str], scores: Scores) -> np.ndarray:
    if isinstance(words, str):
        raise TypeError(f"words must be a sequence of strings, got {describe(words)}")
    values = _numbers(scores)
    if values.shape != (len(words),):
        raise ValueError(f"scores must be one per word, ({len(words)},), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite; leave out words that have none")
    return values


def coverage(scores: Scores, words: Sequence[int]) -> float:
    """The share of all positive evidence that a set of words holds.

    Raises:
        ValueError: there is no positive evidence.

    >>> coverage([3.0, -1.0, 1.0], [0]), coverage([3.0, -1.0, 1.0], [0, 1])
    (0.75, 0.5)
    """
    values = _numbers(scores)
    whole = np.maximum(values, 0).sum()
    if whole <= 0:
        raise ValueError("no score is positive, so there is no evidence to cover")
    bad = [i for i in words if not 0 <= i < len(values)]
    if bad:
        raise ValueError(f"words must lie in [0, {len(values)}), got {bad}")
    return float(max(values[sorted(set(words))].sum() / whole, 0.0))


def threshold(scores: Scores, mode: str = "mean", value: float = 0.4) -> float:
    """What a candidate's mean score must exceed, as a share of the largest score.

    Args:
        mode: ``"mean"`` of the ``value`` share of largest scores, or ``value`` times their standard deviation
            (``"quantile"``, as the release calls it) or variance (``"variance"``).
    """
    check_choice("mode", mode, ("mean", "quantile", "variance"))
    check_real("value", value, above=0.0)
    shares = _shares(_numbers(scores))
    if mode == "mean":
        return float(np.sort(shares)[::-1][: max(1, int(value * len(shares)))].mean())
    return float(value * (shares.std() if mode == "quantile" else shares.var()))


def _shares(values: np.ndarray) -> np.ndarray:
    top = abs(values.max(initial=-np.inf)) if len(values) else 0.0
    return values / top if top > 0 else values


def filters(length: int, search: str) -> list[tuple[int, ...]]:
    """Places of a window that a search takes together.

    >>> filters(5, "span"), len(filters(5, "convolution"))
    ([(1, 2, 3), (0, 1, 2, 3, 4)], 20)
    """
    check_int("length", length, least=1)
    check_choice("search", search, SEARCHES)
    if search == "total":
        return [(0,)]
    if search == "convolution":
        return [places for size in range(2, length - 1) for places in combinations(range(length), size)]
    middle = length // 2
    return [tuple(range(middle - k, middle + k + 1)) for k in range(1, middle + 1) if middle + k < length]


def search(
    scores: Scores,
    how: str = "convolution",
    length: int = 5,
    mode: str = "mean",
    value: float = 0.4,
    sign: str | None = "+",
) -> list[Found]:
    """Sets of words whose mean score lies above the threshold, the best first.

    Args:
        scores: (n,) of the words.
        how: ``"convolution"``, ``"span"`` or ``"total"``, which has no threshold.
        length: words in a window; those of a shorter text are all of it. A window of more than 12 is refused: its
            choices are too many.
        mode, value: see :func:`threshold`.
        sign: ``"+"``: every word of a set has a score of at least 0; ``"-"``: below it, and means below minus the
            threshold; ``None``: any.
    """
    check_choice("how", how, SEARCHES)
    check_choice("sign", sign, ("+", "-", None))
    check_int("length", length, least=1, most=12)
    values = _numbers(scores)
    shares = _shares(values)
    window = min(length, len(shares)) if how != "total" else 1
    if not len(shares) or not (shares > 0).any():
        return []
    least = -np.inf if how == "total" else threshold(shares, mode, value)
    found: dict[tuple[int, ...], float] = {}
    for places in filters(window, how):
        for start in range(len(shares) - window + 1):
            words = tuple(start + p for p in places)
            part = shares[list(words)]
            if (sign == "+" and (part < 0).any()) or (sign == "-" and (part >= 0).any()):
                continue
            mean = float(part.mean())
            if (-mean if sign == "-" else mean) > least:
                found[words] = mean
    order = sorted(found, key=lambda w: (found[w] if sign == "-" else -found[w], w))
    return [Found(w, found[w], coverage(values, w)) for w in order]


def runs(words: Sequence[int]) -> list[tuple[int, ...]]:
    """Maximal runs of neighbours.

    >>> runs([4, 0, 1, 5, 9])
    [(0, 1), (4, 5), (9,)]
    """
    found: list[list[int]] = []
    for i in sorted({int(w) for w in words}):
        if found and found[-1][-1] == i - 1:
            found[-1].append(i)
        else:
            found.append([i])
    return [tuple(run) for run in found]


def verbalize(
    words: Sequence[str],
    scores: Scores,
    label: str | None = None,
    length: int = 5,
    mode: str = "mean",
    value: float = 0.4,
    top: int = 5,
    quantile: float = 0.75,
) -> Verbalization:
    """What speaks for an answer, in sentences.

    Args:
        words: of the text; :func:`merge_pieces` makes them of word pieces.
        scores: one per word.
        label: the answer, named in the sentence.
        length, mode, value: see :func:`search`; sets of positive scores.
        top: sets by coverage that each search gives.
        quantile: of the runs' coverages: runs below it are left out.

    Returns:
        with no sentence but that there is no positive evidence, and no spans, where no score is positive.

    >>> print(verbalize("i love this film a lot".split(), [0.1, 0.8, 0.6, 0.0, -0.2, 0.1]).text)
    The phrase » i love this « is most important for the prediction (94 %).
    """
    check_type("label", label, (str, type(None)), "a string")
    check_int("top", top, least=1)
    check_real("quantile", quantile, least=0.0, most=1.0)
    values = _values(words, scores)
    kept = tuple(words), tuple(float(v) for v in values)
    what = "the prediction" if label is None else f"the prediction {label!r}"
    if not (values > 0).any():
        return Verbalization(f"There is no positive evidence for {what}.", (), *kept)
    union: set[int] = set()
    for how in SEARCHES:
        sets = search(values.tolist(), how, length, mode, value)  # total is every word alone
        for one in sorted(sets, key=lambda f: (-f.coverage, f.words))[:top]:
            union |= set(one.words) if one.coverage > 0 else set()
    shares = _shares(values)
    spans = [Found(run, float(shares[list(run)].mean()), coverage(values, run)) for run in runs(list(union))]
    least = float(np.quantile([s.coverage for s in spans], quantile))
    spans = sorted((s for s in spans if s.coverage >= least), key=lambda s: (-s.coverage, s.words))
    sentences = []
    for rank, span in enumerate(spans):
        text = " ".join(words[i] for i in span.words)
        kind = "word" if len(span.words) == 1 else "span" if "." in text else "phrase"
        says = f"is most important for {what}" if rank == 0 else "is also salient"
        sentences.append(f"The {kind} » {text} « {says} ({100 * span.coverage:.0f} %).")
    return Verbalization(" ".join(sentences), tuple(spans), *kept)


def instruction(words: Sequence[str], scores: Scores, label: str, task: str = "") -> str:
    """A prompt that asks a language model to say which words mattered: every word with its score, and the answer.

    >>> print(instruction(["good", "film"], [0.914, 0.02], "positive"))
    A model read a text and predicted 'positive'. How much each word mattered is in brackets behind it:
    good (0.91) film (0.02)
    Which words mattered most for this prediction, and why?
    """
    values = _values(words, scores)
    check_type("label", label, str, "a string")
    listed = " ".join(f"{word} ({v:.2f})" for word, v in zip(words, values, strict=True))
    head = f"{task} " if task else ""
    return (
        f"{head}A model read a text and predicted {label!r}. How much each word mattered is in brackets behind it:\n"
        f"{listed}\nWhich words mattered most for this prediction, and why?"
    )


def cited_coverage(scores: Scores, cited: Sequence[int]) -> tuple[float, float]:
    """How faithful an explanation is that names words: what they cover, and what as many of the best would.

    >>> cited_coverage([3.0, 1.0, 0.0], [1])
    (0.25, 0.75)
    """
    values = _numbers(scores)
    count = len(set(cited))
    best = np.argsort(-values, kind="stable")[:count]
    return coverage(values.tolist(), cited), coverage(values.tolist(), best.tolist())
