"""Numbers with an interval, told in sentences of pages and of entries, are those of the results that these name."""

import functools
import itertools
import json
import re
from pathlib import Path

import pytest

from attnlib.bench.stats import mean_interval, paired_interval
from attnlib.catalog import papers

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [*sorted(p.name for p in (ROOT / "docs").glob("tasks*.md")), "multimodal-models.md"]
TOLD = re.compile(r"(\d[\d.]*) ± (\d[\d.]*\d)")


def studies(held):
    """All studies of a file, whatever they are parts of."""
    for value in held.values() if isinstance(held, dict) else ():
        yield from studies(value)
    if isinstance(held, dict) and {"runs", "rows", "seeds"} <= set(held):
        yield held


@functools.cache
def measured(name):
    """Means and half intervals of every number of a file of results, and of the difference of any two by seed."""
    columns = []
    for study in studies(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))):
        found = {}
        for run in study["runs"]:
            for key, value in run.items():
                if isinstance(value, float):
                    found.setdefault((run["name"], key), {})[run["seed"]] = value
        columns += found.values()
    given = [mean_interval(list(c.values())) for c in columns]
    given += [paired_interval(a, b) for a, b in itertools.combinations(columns, 2)]
    return [(abs(i.mean), i.half) for i in given if i is not None and i.half is not None]


def holds(told, names):
    """Whether files hold a number to the digits with which it is told, whatever its sign; shares also in percent."""
    exact = [(float(t), 0.5 * 10 ** -len(t.partition(".")[2]) + 1e-9) for t in told]
    found = (pair for n in names for pair in measured(n))
    scaled = ((scale * mean, scale * half) for mean, half in found for scale in (1, 100))
    return any(all(abs(x - t) <= e for x, (t, e) in zip(pair, exact, strict=True)) for pair in scaled)


def text(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_sentences_of_pages(page):
    names = set(re.findall(r"benchmarks/results/([\w-]+-cpu)\.(?:json|svg)", text(page)))
    names = [n for n in names if (RESULTS / f"{n}.json").exists()]
    prose = " ".join(line for line in text(page).splitlines() if not line.startswith("|"))
    assert names and not [t for t in TOLD.findall(prose) if not holds(t, names)]


TELLING = [
    pytest.param(said, id=entry.slug)
    for entry in papers()
    for said in (*entry.verified, *entry.not_shown)
    if TOLD.search(said) and re.search(r"docs/(tasks[\w-]*|multimodal-models)\.md|benchmarks/results/", said)
]


@pytest.mark.parametrize("said", TELLING)
def test_sentences_of_entries(said):
    """What an entry tells of a page stands there; what it tells of a file alone is in the file, where that has runs."""
    pages = [p for p in re.findall(r"docs/([\w-]+\.md)", said) if p in PAGES]
    names = [n for n in re.findall(r"benchmarks/results/([\w-]+)\.json", said) if measured(n)]
    if not pages and not names:
        pytest.skip("what this entry names has no runs by seed to measure again")
    there = {t for p in pages for t in TOLD.findall(text(p))}
    assert not [t for t in TOLD.findall(said) if t not in there and not holds(t, names)]


def test_a_number_that_nobody_measured_is_found():
    name = "tasks-clouds-cpu"
    assert holds(("0.02", "0.40"), [name]) and holds(("15.19", "1.53"), [name])
    assert not holds(("0.03", "0.40"), [name]) and not holds(("15.19", "1.54"), [name])
