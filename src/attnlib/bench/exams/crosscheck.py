"""Ranking systems by what they invent, without references, after CrossCheckGPT (Sun et al., 2024, arXiv 2405.13684).

What a system invents, independent systems hardly repeat. Its answer ``R_m(q)`` is split into sentences ``r_i``, and

    H_m(q) = mean_i sum_k w_k mean_s x_iks,      sum_k w_k = 1

where ``x_iks`` is 0 when a sentence is supported by sample ``s`` of system ``k``, 1 when it is not (*explicit*), or
whether ``k`` itself, asked about the sentence, denies it (*implicit*, no samples). A system's score is the mean over
queries, lower is better. With evidence from the system alone it is SelfCheckGPT (Manakul et al., 2023).

Written from the abstract and SelfCheckGPT: weights and ``include_self`` are options, not the paper's numbers.

>>> answers = {"a": ["The sky is blue."], "b": ["The sky is blue."], "c": ["The sky is green."]}
>>> passages = {name: [[text] for text in texts] for name, texts in answers.items()}
>>> found = explicit(answers, passages, lambda sentence, passage: float(sentence not in passage)).rank()
>>> found.order, found.scores
(('a', 'b', 'c'), {'a': 0.5, 'b': 0.5, 'c': 1.0})
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...checks import check_choice, check_flag, check_int, check_real, check_template, check_type, describe, to_list
from ..evaluate import local_seed
from ..judge import Judge, check_judge, yes_no
from ..stats import bootstrap_interval

#: From a sentence and a context (a passage, or what was asked) to 0 (supported) ... 1 (not), ``None`` for no verdict.
Verdict = Callable[[str, Any], float | None]

# --------------------------------------------------------------------------------------------------------------------
# Sentences and verdicts

_SHORT = "".join(rf"(?<!\b{short}\.)" for short in ("[A-Z]", "Dr", "Mr", "Ms", "Mrs", "St", "vs", r"e\.g", r"i\.e"))


def sentences(text: str) -> list[str]:
    """Sentences of a text: lines are split at ``.``, ``!`` and ``?`` before a space and a capital, digit or quote.

    >>> sentences("A dog runs. It is 3.5 m away!\\n- Dr. Who sees it")
    ['A dog runs.', 'It is 3.5 m away!', 'Dr. Who sees it']
    """
    check_type("text", text, str)
    found = []
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line).strip()
        found += re.split(rf"{_SHORT}(?<=[.!?])\s+(?=[\"'(A-Z0-9])", line) if line else []
    return [s.strip() for s in found if re.search(r"\w", s)]


def read_support(text: str, compat: str | None = None) -> float | None:
    """0 of an answer yes, 1 of no, ``None`` of n/a.

    Args:
        text: of a judge.
        compat: ``"authors"`` reads as SelfCheckGPT does: whatever begins with the letters "yes" or "no" ("nothing"
            too), and 0.5 for all else.

    Raises:
        Unreadable: something else.
    """
    check_choice("compat", compat, (None, "authors"))
    if compat is not None:
        said = text.lower().strip()
        return 0.0 if said.startswith("yes") else 1.0 if said.startswith("no") else 0.5
    value = yes_no(text, {"n/a": None, "not applicable": None})
    return None if value is None else float(not value)


TEMPLATE = "Passage: {context}\n\nClaim: {sentence}\n\nDoes the passage support the claim? Yes, no or n/a.\nAnswer: "


class Support:
    """A text judge as a verdict; what cannot be read is no verdict, and counted.

    Args:
        judge: whose parser is :func:`read_support`.
        template: of its prompt, with ``{context}`` and ``{sentence}``.
    """

    def __init__(self, judge: Judge | None, template: str = TEMPLATE):
        check_type("judge", check_judge(judge), Judge, "a Judge, Judge(call, id, read_support)")
        both = ("context", "sentence")
        self.judge, self.template = check_judge(judge), check_template("template", template, both, needed=both)
        self.unreadable = 0

    def pairs(self, pairs: Sequence[tuple[str, Any]]) -> list[float | None]:
        """Verdicts of many pairs at once."""
        prompts = [self.template.format(sentence=s, context=" ".join(str(c).split())) for s, c in pairs]
        said = self.judge(prompts)
        self.unreadable += sum(not j.read for j in said)
        return [j.value if j.read else None for j in said]

    def __call__(self, sentence: str, context: Any) -> float | None:
        return self.pairs([(sentence, context)])[0]


def unlike(similarity: Callable[[str, str], float], split: Callable[[str], Sequence[str]] = sentences) -> Verdict:
    """One minus the similarity (at most 1, such as BERTScore's F1) to the passage's nearest sentence."""
    check_judge(similarity, "similarity", "from two texts to a number")

    def verdict(sentence: str, context: Any) -> float | None:
        said = split(str(context))
        return min(1.0, max(0.0, 1 - max(similarity(sentence, other) for other in said))) if said else None

    return verdict


def contradiction(contradicts: float, entails: float) -> float | None:
    """Verdict of a model of natural language inference: ``p(contradiction) / (p(contradiction) + p(entailment))``.

    >>> contradiction(0.1, 0.3)
    0.25
    """
    check_real("contradicts", contradicts, least=0)
    check_real("entails", entails, least=0)
    return contradicts / (contradicts + entails) if contradicts + entails > 0 else None


# --------------------------------------------------------------------------------------------------------------------
# Evidence


@dataclass(frozen=True)
class Evidence:
    """Verdicts on every sentence of every answer.

    Args:
        systems: whose answers were judged; ``sources`` whose samples, or who judged.
        verdicts: by system and query, ``(sentences, sources, samples)``, NaN where there is no verdict, -1 where a
            source has fewer samples.
        pairs: how many different pairs of sentence and context were judged.
    """

    systems: tuple[str, ...]
    sources: tuple[str, ...]
    verdicts: Mapping[str, tuple[np.ndarray, ...]]
    pairs: int

    @property
    def undecided(self) -> float:
        """Share of verdicts that are none; NaN without any."""
        every = [v.ravel() for rows in self.verdicts.values() for v in rows]
        flat = np.concatenate(every) if every else np.zeros(0)
        flat = flat[~(flat < 0)]
        return float(np.isnan(flat).mean()) if flat.size else math.nan

    def rank(
        self,
        weights: str | Mapping[str, float] = "uniform",
        include_self: bool = False,
        na: float | str = 0.5,
        temperature: float = 0.1,
        iterations: int = 10,
        families: Mapping[str, str] | None = None,
        without: Sequence[str] = (),
    ) -> Ranking:
        """Scores of all systems.

        Args:
            weights: of sources: ``"uniform"``; by name; ``"self"``, ``exp(-s_k / temperature)`` with ``s_k`` from the
                source's own samples (SelfCheck); ``"iterated"``, the same with ``s_k`` its score, from uniform on.
            include_self: evidence of a system on itself counts.
            na: what no verdict counts, or ``"drop"``.
            temperature, iterations: see ``weights``.
            families: by name; no evidence from a system's own family counts (but itself, if ``include_self``).
            without: sources that are left out.

        A system on which only sources of weight 0 give evidence has no score.

        Raises:
            ValueError: a system with answers that nobody gives evidence on; weights of 0 throughout.
        """
        check_flag("include_self", include_self)
        check_real("temperature", temperature, above=0)
        check_int("iterations", iterations, least=1)
        for name in without:
            check_choice("without", name, self.sources)
        if families is not None and (lacking := [n for n in {*self.systems, *self.sources} if n not in families]):
            raise ValueError(f"families must name the family of every system, it lacks {sorted(lacking)[:5]}")
        table = {m: [_filled(v, na) for v in rows] for m, rows in self.verdicts.items()}
        counts = {
            m: np.array([
                k not in without and (include_self if k == m else families is None or families[k] != families[m])
                for k in self.sources
            ])
            for m in self.systems
        }  # fmt: skip
        for m in self.systems:
            if not counts[m].any():
                raise ValueError(
                    f"there is no evidence on {m!r}: no source is left"
                    + ("; include_self=True is SelfCheck" if m in self.sources and not include_self else "")
                )
        share = self._weights(weights, table, counts, temperature, iterations)
        return _ranked(self.systems, table, counts, share)

    def leave_family_out(self, families: Mapping[str, str], **settings: Any) -> dict[str, Ranking]:
        """Rankings by the evidence of all families but one: who moves leans on that one.

        Args:
            families: of every source.
            settings: of :meth:`rank`.
        """
        if lacking := [k for k in self.sources if k not in families]:
            raise ValueError(f"families must name the family of every source, it lacks {lacking[:5]}")
        names = dict.fromkeys(families[k] for k in self.sources)
        if len(names) < 2:
            raise ValueError(f"families must be two at least, got {list(names)}")
        return {f: self.rank(without=[k for k in self.sources if families[k] == f], **settings) for f in names}

    def _weights(
        self, weights: str | Mapping[str, float], table: Any, counts: Any, temperature: float, iterations: int
    ) -> np.ndarray:
        if isinstance(weights, Mapping):
            if lacking := [k for k in self.sources if k not in weights]:
                raise ValueError(f"weights must name every source, it lacks {lacking[:5]}")
            share = np.array([check_real(f"weights[{k!r}]", weights[k], least=0) for k in self.sources])
            if not share.sum() > 0:
                raise ValueError(f"weights must not be 0 throughout, got {dict(weights)}")
            return share
        check_choice("weights", weights, ("uniform", "self", "iterated"))
        share = np.ones(len(self.sources))
        if weights == "uniform":
            return share
        if lacking := [k for k in self.sources if k not in self.systems]:
            raise ValueError(f"weights={weights!r} needs answers of every source, there are none of {lacking[:5]}")
        if weights == "self":
            own = {m: np.array([k == m for k in self.sources]) for m in self.systems}
            scores = _ranked(self.systems, table, own, share).scores
            return self._soft(scores, temperature)
        for _ in range(iterations):
            share = self._soft(_ranked(self.systems, table, counts, share).scores, temperature)
        return share

    def _soft(self, scores: Mapping[str, float], temperature: float) -> np.ndarray:
        values = np.array([scores[k] for k in self.sources])
        known = ~np.isnan(values)
        out = np.zeros(len(values))  # who said nothing is trusted in nothing
        if known.any():
            out[known] = np.exp(-(values[known] - values[known].min()) / temperature)
        return out


def _filled(verdicts: np.ndarray, na: float | str) -> np.ndarray:
    """(sentences, sources) means over samples."""
    known = ~np.isnan(verdicts) & ~(verdicts < 0)
    if isinstance(na, str):
        check_choice("na", na, ("drop",))
    else:
        verdicts = np.where(np.isnan(verdicts), check_real("na", na, least=0, most=1), verdicts)
        known = verdicts >= 0
    count = known.sum(-1)
    return np.where(count > 0, np.where(known, verdicts, 0.0).sum(-1) / np.maximum(count, 1), np.nan)


def _ranked(systems: Sequence[str], table: Any, counts: Any, share: np.ndarray) -> Ranking:
    scores: dict[str, np.ndarray] = {}
    for m in systems:
        weight = share * counts[m]
        scores[m] = np.array([_answer(x, weight) for x in table[m]])
    total = share.sum() or 1.0
    return Ranking(tuple(systems), np.stack([scores[m] for m in systems]), tuple((share / total).tolist()))


def _answer(x: np.ndarray, weight: np.ndarray) -> float:
    """Of one answer; sentences that nobody judged do not count, and an answer without any has no score."""
    held = np.where(np.isnan(x), 0.0, weight)
    total = held.sum(-1)
    judged = total > 0
    if not judged.any():
        return math.nan
    return float(((np.where(np.isnan(x), 0.0, x) * held).sum(-1)[judged] / total[judged]).mean())


class Correlation(NamedTuple):
    """A correlation, and percentiles of it when queries are drawn again; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranking:
    """Scores by system and query.

    Args:
        systems: in the order of the rows.
        table: ``(systems, queries)``; NaN for answers without a judged sentence, which do not count.
        weights: of sources.
    """

    systems: tuple[str, ...]
    table: np.ndarray
    weights: tuple[float, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """Mean over queries, lower is better; NaN for who said nothing."""
        return dict(zip(self.systems, _row_means(self.table).tolist(), strict=True))

    @property
    def order(self) -> tuple[str, ...]:
        """Systems from the least score on, by name where they are equal, who said nothing last."""
        scores = self.scores
        return tuple(sorted(self.systems, key=lambda m: (math.isnan(scores[m]), round(scores[m], 12), m)))

    @property
    def coverage(self) -> dict[str, float]:
        """Share of queries whose answer has a score: who says little invents little."""
        return dict(zip(self.systems, (~np.isnan(self.table)).mean(1).tolist(), strict=True))

    def interval(self, system: str, seed: int = 0) -> tuple[float, float]:
        """95 % interval of a score, queries drawn again."""
        check_choice("system", system, self.systems)
        row = self.table[self.systems.index(system)]
        return bootstrap_interval(row[~np.isnan(row)].tolist(), seed=seed)

    def correlation(
        self, reference: Mapping[str, float], kind: str = "spearman", draws: int = 500, seed: int = 0
    ) -> Correlation:
        """Of scores with something known of systems, such as their true share of errors.

        Args:
            reference: by system; three at least.
            kind: ``"spearman"`` or ``"pearson"``.
            draws, seed: of the interval.
        """
        check_choice("kind", kind, ("spearman", "pearson"))
        rows = [i for i, m in enumerate(self.systems) if m in reference and not np.isnan(self.table[i]).all()]
        if len(rows) < 3:
            raise ValueError(f"reference must name at least three systems with scores, got {len(rows)}")
        known = np.array([check_real(f"reference[{self.systems[i]!r}]", reference[self.systems[i]]) for i in rows])
        rng, table = np.random.default_rng(seed), self.table[rows]
        picks = rng.integers(table.shape[1], size=(check_int("draws", draws, least=1), table.shape[1]))
        drawn = [_correlated(_row_means(table[:, pick]), known, kind) for pick in picks]
        finite = [v for v in drawn if not math.isnan(v)]
        low, high = np.quantile(finite, [0.025, 0.975]) if finite else (math.nan, math.nan)
        return Correlation(_correlated(_row_means(table), known, kind), float(low), float(high))

    def by_answer(self, reference: Mapping[str, Sequence[float]], kind: str = "spearman") -> float:
        """Correlation over all answers with something known of each, by system and query."""
        check_choice("kind", kind, ("spearman", "pearson"))
        if lacking := [m for m in self.systems if m not in reference]:
            raise ValueError(f"reference must hold every system; it lacks {lacking}")
        known = np.stack([np.asarray(reference[m], dtype=float) for m in self.systems])
        if known.shape != self.table.shape:
            raise ValueError(f"reference must hold a number per query, {self.table.shape[1]}, got {known.shape[1]}")
        return _correlated(self.table.ravel(), known.ravel(), kind)


def _row_means(table: np.ndarray) -> np.ndarray:
    known = ~np.isnan(table)
    return np.where(known.any(1), np.where(known, table, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def _correlated(a: np.ndarray, b: np.ndarray, kind: str) -> float:
    from scipy import stats

    both = ~(np.isnan(a) | np.isnan(b))
    a, b = np.round(a[both], 12), b[both]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    if kind == "spearman":
        a, b = stats.rankdata(a), stats.rankdata(b)
    return float(np.corrcoef(a, b)[0, 1])


def _verdicts(judge: Any, pairs: Sequence[tuple[str, Any]]) -> list[float]:
    said = judge.pairs(pairs) if hasattr(judge, "pairs") else [judge(s, c) for s, c in pairs]
    return [math.nan if v is None else check_real("a verdict", v, least=0, most=1) for v in said]


def _answers(responses: Mapping[str, Sequence[str]], split: Any) -> dict[str, list[list[str]]]:
    check_type("responses", responses, Mapping, "answers by system")
    if not responses:
        raise ValueError("responses is empty: there are no systems")
    for name, texts in responses.items():
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"responses[{name!r}] must be a text per query, got {describe(texts)}")
    lengths = {name: len(texts) for name, texts in responses.items()}
    if len(set(lengths.values())) > 1 or not next(iter(lengths.values())):
        raise ValueError(f"responses must answer the same queries, one at least, got {lengths}")
    return {name: [list(split(t)) for t in texts] for name, texts in responses.items()}


def explicit(
    responses: Mapping[str, Sequence[str]],
    passages: Mapping[str, Sequence[Sequence[str]]],
    judge: Verdict | Support | None,
    split: Callable[[str], Sequence[str]] = sentences,
    most: int | None = None,
    seed: int = 0,
) -> Evidence:
    """Judge every sentence against samples of every source; a pair of texts is judged once.

    Args:
        responses: by system, an answer per query.
        passages: by source, samples per query; perhaps of other systems than answered.
        judge: from a sentence and a passage to a verdict.
        split: a text into sentences.
        most: samples that are used of a source and query, drawn at random; all by default.
        seed: of that draw.
    """
    check_judge(judge, "judge", "from a sentence and a passage to 0 (supported) ... 1 (not)")
    answers = _answers(responses, split)
    queries = len(next(iter(answers.values())))
    check_type("passages", passages, Mapping, "samples by source")
    if not passages:
        raise ValueError("passages is empty: there is no evidence")
    samples: dict[str, list[list[str]]] = {}
    for k, rows in passages.items():
        if len(rows) != queries or any(isinstance(r, str) or not len(r) for r in rows):
            raise ValueError(f"passages[{k!r}] must hold samples, one at least, for each of {queries} queries")
        samples[k] = [_some(list(r), most, local_seed(seed, f"{k}/{q}")) for q, r in enumerate(rows)]
    wanted: dict[tuple[str, str], float] = {}
    for rows in answers.values():
        for q, parts in enumerate(rows):
            wanted |= {(s, p): math.nan for s in parts for k in samples for p in samples[k][q]}
    wanted = dict(zip(wanted, _verdicts(judge, list(wanted)), strict=True))
    largest = max(len(r) for rows in samples.values() for r in rows)
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for m, rows in answers.items():
        own = []
        for q, parts in enumerate(rows):
            x = np.full((len(parts), len(samples), largest), -1.0)
            for i, sentence in enumerate(parts):
                for at, source in enumerate(samples.values()):
                    said = [wanted[sentence, p] for p in source[q]]
                    x[i, at, : len(said)] = said
            own.append(x)
        found[m] = tuple(own)
    return Evidence(tuple(answers), tuple(samples), found, len(wanted))


def _some(texts: list[str], most: int | None, seed: int) -> list[str]:
    if most is None or len(texts) <= check_int("most", most, least=1):
        return texts
    return [texts[i] for i in sorted(np.random.default_rng(seed).permutation(len(texts))[:most])]


def implicit(
    responses: Mapping[str, Sequence[str]],
    systems: Mapping[str, Verdict],
    queries: Sequence[Any],
    split: Callable[[str], Sequence[str]] = sentences,
) -> Evidence:
    """Ask every system itself about every sentence.

    Args:
        responses: by system, an answer per query.
        systems: by source, from a sentence and the query (its picture, its text) to a verdict, such as ``p(no)``.
        queries: what was asked.
        split: a text into sentences.
    """
    answers = _answers(responses, split)
    if len(queries) != len(next(iter(answers.values()))):
        raise ValueError(f"queries must be as many as answers, got {len(queries)}")
    check_type("systems", systems, Mapping, "callables by source")
    if not systems:
        raise ValueError("systems is empty: there is no evidence")
    for name, system in systems.items():
        check_judge(system, f"systems[{name!r}]", "from a sentence and a query to 0 (accurate) ... 1 (not)")
    found, pairs = {}, 0
    said: dict[tuple[str, int, str], float] = {}
    for k, system in systems.items():
        wanted = list(dict.fromkeys((q, s) for rows in answers.values() for q, parts in enumerate(rows) for s in parts))
        values = _verdicts(system, [(s, queries[q]) for q, s in wanted])
        said |= {(k, q, s): v for (q, s), v in zip(wanted, values, strict=True)}
        pairs += len(wanted)
    for m, rows in answers.items():
        found[m] = tuple(
            np.array([[said[k, q, s] for k in systems] for s in parts]).reshape(len(parts), len(systems), 1)
            for q, parts in enumerate(rows)
        )
    return Evidence(tuple(answers), tuple(systems), found, pairs)


def selfcheck(
    answer: str | Sequence[str], samples: Sequence[str], judge: Verdict | Support | None, na: float | str = 0.5
) -> list[float]:
    """SelfCheckGPT: per sentence, the mean verdict of the system's own samples.

    Args:
        answer: a text, or its sentences.
        samples: of the same system and query.
        judge, na: as in :func:`explicit` and :meth:`Evidence.rank`.
    """
    samples = to_list("samples", samples, '["a text"]') or []
    parts = sentences(answer) if isinstance(answer, str) else list(answer)
    given = {"self": ["\n".join(parts)]}
    evidence = explicit(given, {"self": [samples]}, judge, split=lambda text: parts)
    return [float(v) for v in _filled(evidence.verdicts["self"][0], na)[:, 0]]


# --------------------------------------------------------------------------------------------------------------------
# Systems whose errors are known


class Simulated(NamedTuple):
    """Answers, samples, and the true share of wrong sentences by system."""

    responses: dict[str, list[str]]
    passages: dict[str, list[list[str]]]
    errors: dict[str, float]


def simulate(
    rates: Mapping[str, float],
    queries: int = 40,
    facts: int = 6,
    samples: int = 3,
    shared: float = 0.0,
    space: int = 1000,
    stable: float = 0.8,
    families: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Simulated:
    """Systems that state facts, wrong ones at a rate of their own.

    Args:
        rates: by system, probability that a fact is stated wrongly.
        queries, facts: how many, and facts of each.
        samples: of every answer.
        shared: share of facts whose difficulty and wrong answer are those of the family: there, all whose rate exceeds
            a common draw say the same wrong thing. Rates stay what they are.
        space: wrong answers to draw others from.
        stable: probability that a sample repeats what the system answered; else it is drawn again.
        families: who shares with whom; all with all by default.
        seed: of all draws.
    """
    if not rates:
        raise ValueError("rates is empty: there are no systems")
    for name, rate in rates.items():
        check_real(f"rates[{name!r}]", rate, least=0, most=1)
    check_int("queries", queries, least=1)
    check_int("facts", facts, least=1)
    check_int("samples", samples, least=1)
    check_int("space", space, least=1)
    check_real("shared", shared, least=0, most=1)
    check_real("stable", stable, least=0, most=1)
    group = {m: (families or {}).get(m, "") for m in rates}
    common, joint = {}, {}
    for f in dict.fromkeys(group.values()):
        rng = np.random.default_rng([seed, local_seed(1, f) % 2**32])
        common[f], joint[f] = rng.random((queries, facts)), rng.random((queries, facts)) < shared
    responses, passages, errors = {}, {}, {}
    for m, rate in rates.items():
        rng, f = np.random.default_rng([seed, local_seed(2, m) % 2**32]), group[m]

        def draw(rng: np.random.Generator = rng, f: str = f, rate: float = rate) -> np.ndarray:
            own = np.where(rng.random((queries, facts)) < rate, rng.integers(1, space + 1, (queries, facts)), 0)
            return np.where(joint[f], np.where(common[f] < rate, -1, 0), own)

        said = draw()
        again = [np.where(rng.random(said.shape) < stable, said, draw()) for _ in range(samples)]

        def told(values: np.ndarray, q: int, f: str = f) -> str:
            words = ["true" if v == 0 else f"alike {f}".strip() if v < 0 else f"false {v}" for v in values[q].tolist()]
            return " ".join(f"Fact {i} is {w}." for i, w in enumerate(words))

        responses[m] = [told(said, q) for q in range(queries)]
        passages[m] = [[told(a, q) for a in again] for q in range(queries)]
        errors[m] = float((said != 0).mean())
    return Simulated(responses, passages, errors)


def same_claim(sentence: str, passage: str) -> float | None:
    """Verdict on facts of :func:`simulate`: supported where a passage says the same, ``None`` where it says nothing."""
    about = sentence.split(" is ")[0]
    said = _claims(passage).get(about)
    return None if said is None else float(said != sentence)


@functools.lru_cache(maxsize=4096)
def _claims(passage: str) -> dict[str, str]:
    return {s.split(" is ")[0]: s for s in sentences(passage)}
