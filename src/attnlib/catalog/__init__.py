"""The register of papers that work here: one TOML file each, read on demand."""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

__all__ = ["Paper", "paper", "papers"]


@dataclass(frozen=True)
class Paper:
    """One paper of the catalogue.

    Args:
        slug: name of the entry.
        title, authors, year, arxiv: the paper.
        mechanisms: registry names, or dotted paths of techniques.
        where: module that implements it.
        code: the authors' repository (``owner/name``), if any, and the ``commit`` that parity was recorded at.
        parity: what output and gradients are held to: ``"authors"``, ``"oracle"`` (float64, from the paper) or another
            library's name.
        verified: what tests hold, one line each.
        differs: what differs from the authors' code, and why.
        not_shown: claims of the paper that are not reproduced here.
        variants: released classes and options that are here, and the settings that give them.
        missing: released classes and options of the same mechanism that are not.
    """

    slug: str
    title: str
    authors: str
    year: int
    mechanisms: tuple[str, ...]
    where: str
    parity: str
    arxiv: str = ""
    code: str = ""
    commit: str = ""
    verified: tuple[str, ...] = field(default_factory=tuple)
    differs: tuple[str, ...] = field(default_factory=tuple)
    not_shown: tuple[str, ...] = field(default_factory=tuple)
    variants: tuple[str, ...] = field(default_factory=tuple)
    missing: tuple[str, ...] = field(default_factory=tuple)

    @property
    def link(self) -> str:
        """Address of the paper, empty when it has no arXiv number."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()} | {"link": self.link}


@cache
def _load() -> dict[str, Paper]:
    found = {}
    known = {f.name for f in fields(Paper)}
    for file in (importlib.resources.files(__name__) / "entries").iterdir():
        if not file.name.endswith(".toml"):
            continue
        slug = file.name[: -len(".toml")]
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        if unknown := set(data) - known:
            raise ValueError(f"catalogue entry {slug} has unknown fields {sorted(unknown)}; possible: {sorted(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        found[slug] = Paper(slug, **values)
    return found


def papers(text: str = "") -> list[Paper]:
    """Every paper whose slug, title, authors or mechanisms contain ``text``, by year.

    >>> [p.slug for p in papers("theory, analysis")]
    ['sigmoid-attention']
    """
    text = text.lower()
    hits = [p for p in _load().values() if text in " ".join([p.slug, p.title, p.authors, *p.mechanisms]).lower()]
    return sorted(hits, key=lambda p: (p.year, p.slug))


def paper(slug: str) -> Paper:
    """The entry of one paper; ``ValueError`` with the nearest names when there is none."""
    entries = _load()
    if slug not in entries:
        near = difflib.get_close_matches(slug, entries, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`attnlib papers` lists all"
        raise ValueError(f"no paper {slug!r} in the catalogue; {hint}")
    return entries[slug]
