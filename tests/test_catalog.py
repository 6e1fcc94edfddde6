"""The catalogue tells the truth: what it names exists, and what exists is named."""

import importlib

import pytest

import attnlib
from attnlib.catalog import paper, papers

ENTRIES = papers()


def resolve(name):
    """A registry name or a dotted path."""
    if "." not in name:
        from attnlib.nn.registry import find

        return find(name)
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda p: p.slug)
def test_entry_is_true(entry):
    assert entry.title and entry.authors and 2010 < entry.year < 2030
    assert entry.verified, "an entry says what a test holds"
    assert entry.mechanisms
    importlib.import_module(entry.where)
    for name in entry.mechanisms:
        assert resolve(name).__doc__
    if entry.parity == "authors":
        assert entry.code and len(entry.commit) >= 7


def test_every_mechanism_belongs_to_a_paper():
    named = {name for entry in ENTRIES for name in entry.mechanisms}
    baseline = {"softmax-attention", "squeeze-excite", "eca"}  # yardsticks, not papers of the catalogue
    every = set(attnlib.list_mechanisms()) | set(attnlib.list_mechanisms("fusion"))
    assert every - named - baseline == set()


def test_every_entry_has_a_snippet():
    """Which runs, as tests/test_site.py holds."""
    from attnlib_site import snippets

    cases = snippets.rows()
    bare = [entry.slug for entry in ENTRIES if not snippets.snippet(entry, cases)]
    assert not bare, f"write docs/snippets/<slug>.py for {bare}"


def test_unknown_paper_suggests():
    with pytest.raises(ValueError, match="sigmoid-attention"):
        paper("sigmoid-atention")


def test_every_mechanism_has_a_conformance_row():
    from table import rows

    assert set(attnlib.list_mechanisms()) <= {row.name for row in rows()}
