"""Putting the site together: pages, guides with their links turned, pictures, and the settings of the generator."""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnlib.catalog import Paper
from attnlib.catalog import papers as all_papers

from . import measured, pages, snippets, which
from .pages import Pages
from .text import cell, inline, table

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def guide(text: str, source: str, where: str, known: dict[str, str]) -> str:
    """A page of the repository as a page of the site: its links lead to pages, or become plain words.

    Args:
        text: Markdown.
        source: its path in the repository.
        where: its path on the site.
        known: paths in the repository -> paths on the site.
    """

    def turned(match: re.Match[str]) -> str:
        bang, said, target = match[1], match[2], match[3]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if inside not in known:
            if not (ROOT / inside).exists():
                raise ValueError(f"{source} links to {target}, which is not in the repository")
            return said
        there = posixpath.relpath(known[inside], posixpath.dirname(where) or ".")
        return f"{bang}[{said}]({there}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(```.*?```)", text, flags=re.S)
    turn = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
    return "".join(p if p.startswith("```") else turn.sub(turned, p) for p in parts)


def title_of(text: str) -> str:
    """The first heading of a page."""
    match = re.search(r"^# (.+)$", text, flags=re.M)
    return re.sub(r"[`\\]", "", match[1]) if match else ""


def results_pages(found: list[measured.Study]) -> Pages:
    """A page per file of results, and the list of them."""
    from attnlib.bench import REAL, suites

    known = {*suites(), *REAL}
    out: Pages = {}
    rows = []
    for study in found:
        lines = [f"# {inline(study.title)}\n", f"`benchmarks/results/{study.stem}.json` · {inline(study.machine)}\n"]
        suite = study.stem.removesuffix("-cpu")
        if suite in known:
            lines.append(f"Made by `attnlib bench --suite {suite} --out benchmarks/results`.\n")
        settings = {
            k: v for k, v in study.data.items()
            if k not in ("what", "machine") and isinstance(v, (str, int, float)) or k == "seeds"
        }  # fmt: skip
        settings |= study.data.get("settings", {}) if isinstance(study.data.get("settings"), dict) else {}
        lines += [f"![{picture.stem}]({picture.name}){{ .figure }}\n" for picture in study.pictures]
        for grid in study.grids:
            lines += [f"## {grid.title.capitalize()}\n" if grid.title else "", grid.markdown()]
        if settings:
            shown = [[cell(k.replace("_", " ")), cell(_setting(v))] for k, v in settings.items()]
            lines += ["## Settings\n", table(["", ""], shown)]
        if not study.grids:
            lines.append("The file has no plain table; a guide or a paper's page reads it.\n")
        out[f"results/{study.stem}.md"] = "\n".join(lines)
        rows.append([f"[{cell(study.title)}]({study.stem}.md)", f"`{study.stem}.json`", cell(study.machine)])
    out["results/index.md"] = (
        "# Measured\n\nEvery file of `benchmarks/results`; `make bench` measures them again. Ratios come from runs "
        f"that take turns.\n\n{table(['what', 'file', 'machine'], rows)}"
    )
    return out


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return measured.number(value) or str(value)


def known_paths(found: list[measured.Study]) -> dict[str, str]:
    """Where files of the repository stand on the site."""
    known = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
    for path in sorted((ROOT / "docs").rglob("*")):
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md" and path.parent == ROOT / "docs":
            known[inside] = f"guides/{path.name}"
        elif path.suffix in (".png", ".svg", ".jpg", ".webp"):
            known[inside] = f"guides/{path.relative_to(ROOT / 'docs').as_posix()}"
    for study in found:
        known[f"benchmarks/results/{study.stem}.json"] = f"results/{study.stem}.md"
        known |= {f"benchmarks/results/{p.name}": f"results/{p.name}" for p in study.pictures}
    return known


def write(
    out: Path,
    entries: list[Paper] | None = None,
    results: Path = ROOT / "benchmarks" / "results",
    params: Callable[[Any], int] | None = None,
) -> Pages:
    """Write the pages, pictures and settings of the site into a folder; give the pages.

    Args:
        out: the folder, made anew.
        entries: papers; the whole catalogue by default.
        results: folder of measured figures.
        params: parameters of a model; counted by default, which takes seconds.
    """
    from attnlib.nn.registry import list_mechanisms

    entries = all_papers() if entries is None else entries
    found = measured.studies(results)
    cases = snippets.rows()
    site: Pages = {}
    models, sizes = pages.models_page(entries, params or count)
    site["models.md"] = models
    for entry in entries:
        code = snippets.snippet(entry, cases)
        site[f"papers/{entry.slug}.md"] = pages.paper_page(entry, code, found, sizes)
    site["papers/index.md"] = pages.papers_index(entries)
    for name in [*list_mechanisms(), *list_mechanisms("fusion"), *list_mechanisms("pool")]:
        site[f"mechanisms/{name}.md"] = pages.mechanism_page(name, entries)
    site["mechanisms/index.md"] = pages.mechanisms_index(entries)
    site |= pages.packages(entries)
    site |= results_pages(found)
    site["which.md"] = which.page(found)
    known = known_paths(found)
    for source, where in known.items():
        if source.endswith(".md"):
            site[where] = guide((ROOT / source).read_text(encoding="utf-8"), source, where, known)
    site["index.md"] = _counted(site["index.md"], site, sum(map(len, sizes.values())))
    guides = [w for s, w in known.items() if w.startswith("guides/") and w.endswith(".md")]
    rows = [[f"[{cell(title_of(site[w]))}]({posixpath.basename(w)})", ""] for w in guides]
    site["guides/index.md"] = "# Guides\n\n" + "\n".join(f"- {row[0]}" for row in rows) + "\n"
    shutil.rmtree(out, ignore_errors=True)
    for where, text in site.items():
        path = out / "pages" / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    files = {where: ROOT / source for source, where in known.items() if not where.endswith(".md")}
    files |= {f"results/{picture.name}": picture for study in found for picture in study.pictures}
    for where, file in files.items():
        path = out / "pages" / where
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)
    for name in ("site.css", "worker.js"):
        shutil.copyfile(HERE / name, out / "pages" / name)
    (out / "zensical.toml").write_text(settings(site, entries, guides, found), encoding="utf-8")
    return site


def _counted(home: str, site: Pages, models: int) -> str:
    """The home page with a line of what there is, behind its first paragraph."""

    def of(folder: str) -> int:
        return sum(w.startswith(f"{folder}/") and not w.endswith("index.md") for w in site)

    line = " · ".join([
        "**[Which one should I use?](which.md)**", f"[{of('papers')} papers](papers/index.md)",
        f"[{of('mechanisms')} mechanisms](mechanisms/index.md)", f"[{of('operators')} operators](operators/index.md)",
        f"[{of('techniques')} techniques and tools](techniques/index.md)", f"[{models} models](models.md)",
        f"[{of('results')} files of measured figures](results/index.md)",
    ])  # fmt: skip
    title, first, rest = home.split("\n\n", 2)
    return f"{title}\n\n{first}\n\n{line}\n\n{rest}"


def count(entry: Any) -> int:
    """Parameters of a model: those that the entry asserts, or counted."""
    from attnlib.models.build import counted_params

    return counted_params(entry) if entry.params is None else entry.params


def settings(site: Pages, entries: list[Paper], guides: list[str], found: list[measured.Study]) -> str:
    """The generator's settings: those of ``zensical.toml`` beside this file, and what stands where."""

    def leaf(where: str, said: str = "") -> str:
        return f"{{ {quote(said or title_of(site[where]))} = {quote(where)} }}"

    def group(said: str, items: list[str]) -> str:
        return f"{{ {quote(said)} = [{', '.join(items)}] }}"

    studies = [leaf(f"results/{study.stem}.md", study.name) for study in found]
    mechanisms = sorted(w for w in site if w.startswith("mechanisms/") and not w.endswith("index.md"))
    operators = sorted(w for w in site if w.startswith("operators/") and not w.endswith("index.md"))
    techniques: dict[str, list[str]] = {}
    for where in sorted(w for w in site if w.startswith("techniques/") and w.count("/") == 2):
        techniques.setdefault(where.split("/")[1], []).append(leaf(where))
    papers = [
        group(name, [leaf(f"papers/{e.slug}.md", short(e.title)) for e in group_of])
        for name, group_of in pages.grouped(entries).items()
    ]
    nav = [
        leaf("index.md", "Home"),
        leaf("which.md", "Which one?"),
        group("Papers", [quote("papers/index.md"), *papers]),
        group("Mechanisms", [quote("mechanisms/index.md"), *map(leaf, mechanisms)]),
        group("Operators", [quote("operators/index.md"), *map(leaf, operators)]),
        group("Techniques", [quote("techniques/index.md"), *(group(k, v) for k, v in techniques.items())]),
        leaf("models.md", "Models"),
        group("Measured", [quote("results/index.md"), *studies]),
        group("Guides", [quote("guides/index.md"), *map(leaf, guides), leaf("contributing.md", "Contributing")]),
    ]
    text = (HERE / "zensical.toml").read_text(encoding="utf-8")
    return text.replace("nav = []", "nav = [\n  " + ",\n  ".join(nav) + ",\n]")


def short(title: str) -> str:
    """A title for the list beside a page: what stands before its colon, where that is a name.

    >>> short("BiFormer: Vision Transformer with Routing"), short("Agent Attention")
    ('BiFormer', 'Agent Attention')
    """
    head = title.partition(":")[0]
    return head if len(head) <= 40 else title


def quote(text: str) -> str:
    """A string of TOML."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
