"""The site: a page for everything, links that lead somewhere, snippets that run, nothing loaded from elsewhere."""

import doctest
import importlib
import json
import pkgutil
import posixpath
import re
import shutil

import attnlib_site
import pytest
from attnlib_site import finish, maths, measured, pages, snippets, text, which, write

from attnlib.catalog import Paper, papers

ENTRIES = papers()
MODULES = sorted(m.name for m in pkgutil.iter_modules(attnlib_site.__path__) if m.name != "__main__")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_site_run(name):
    module = importlib.import_module(f"attnlib_site.{name}")
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.fixture(scope="module")
def cases():
    return snippets.rows()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda p: p.slug)
def test_every_paper_has_a_snippet_that_runs(entry, cases, tmp_path, monkeypatch):
    code = snippets.snippet(entry, cases)
    assert code, f"nothing gives a snippet: write docs/snippets/{entry.slug}.py"
    for extra in ("transformers", "diffusers"):
        if extra in code:
            pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, entry.slug, "exec"), {"__name__": "snippet"})  # noqa: S102


def test_no_snippet_is_left_over():
    files = {p.stem for p in snippets.FILES.glob("*.py")}
    used = {f"_{m}" for p in snippets.FILES.glob("[!_]*.py") for m in re.findall(r"^# model: (\w+)", p.read_text())}
    assert files == used | (files & {e.slug for e in ENTRIES})


def links(page):
    """Where the links and pictures of a page lead; code is no link."""
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", page, flags=re.S)
    return re.findall(r"\]\(([^()\s]+)\)", plain)


@pytest.mark.slow
def test_the_site_is_whole_and_grows(tmp_path):
    """A new entry and a new file of results with its picture have their pages, in the lists; no link leads nowhere."""
    new = Paper("brand-new", "Brand New: a paper", "Nobody et al.", 2029, ("biformer",), "attnlib.nn.sparse.biformer",
                "oracle", verified=("held in `fresh-cpu.json`",), differs=("a * b < c | d",))  # fmt: skip
    results = tmp_path / "results"
    shutil.copytree(write.ROOT / "benchmarks" / "results", results)
    block = {"metric": "accuracy", "baseline": "plain", "rows": [
        {"name": "plain", "accuracy": {"mean": 50.0, "half": 1.0, "n": 3}, "against": {"mean": 0.0, "half": 0.0}},
        {"name": "routed (BiFormer)", "accuracy": {"mean": 60.0, "half": 2.0, "n": 3},
         "against": {"mean": 10.0, "half": 2.0}},
    ]}  # fmt: skip
    machine = {"cpu": "Abacus", "cores": 2, "threads": 1}
    (results / "fresh-cpu.json").write_text(json.dumps({"what": "fresh figures", "machine": machine, **block}))
    (results / "fresh-cpu.svg").write_text("<svg/>")
    out = tmp_path / "site"
    site = write.write(out, [*ENTRIES, new], results, params=lambda entry: 7)

    page = site["papers/brand-new.md"]
    assert "# Brand New: a paper" in page and "[fresh-cpu.json](../results/fresh-cpu.md)" in page
    assert (
        "| routed (BiFormer) | 60.0 ± 2.0 | 10.0 ± 2.0 |" in page.replace("\u00a0", " ") and "| against plain |" in page
    )
    assert (
        'attnlib.create("biformer"' in page
        and "softmax(scale * Q_r K[I_r]^T)" in page
        and "```math" in site["papers/biformer.md"]
    )
    assert r"a \* b &lt; c \| d" in page and "What a machine checked" in page
    assert f"[{len(ENTRIES) + 1} papers](papers/index.md)" in site["index.md"]
    assert "brand-new.md" in site["papers/index.md"] and "papers/brand-new.md" in site["mechanisms/biformer.md"]
    assert (
        "routed (BiFormer): 60.0 ± 2.0" in site["which.md"].replace("\u00a0", " ")
        and "Abacus, 2 cores" in site["which.md"]
    )
    assert "![fresh-cpu](fresh-cpu.svg)" in site["results/fresh-cpu.md"]
    assert "attnlib bench --suite mixers" in site["results/mixers-cpu.md"]
    assert "| `eager` | right | right: by autograd |" in site["operators/attention.md"]
    settings = (out / "zensical.toml").read_text()
    assert '"papers/brand-new.md"' in settings and '"results/fresh-cpu.md"' in settings

    import tomllib

    nav = json.dumps(tomllib.loads(settings)["project"]["nav"])
    assert {w for w in site if f'"{w}"' not in nav} == set()
    from attnlib.nn.registry import list_mechanisms

    want = {f"papers/{e.slug}.md" for e in ENTRIES} | {f"mechanisms/{n}.md" for n in list_mechanisms()}
    assert want <= set(site)
    broken = []
    for where, content in site.items():
        for target in links(content):
            path = target.partition("#")[0]
            if re.match(r"[a-z]+:", target) or not path:
                continue
            inside = posixpath.normpath(posixpath.join(posixpath.dirname(where), path))
            if not (out / "pages" / inside).is_file():
                broken.append(f"{where} -> {target}")
    assert not broken


def test_equations_belong_to_papers_and_are_whole():
    assert set(pages.tex()) <= {e.slug for e in ENTRIES}
    for slug, lines in pages.tex().items():
        for line in lines:
            depth = 0
            for mark in re.findall(r"(?<!\\)[{}]", line):
                depth += 1 if mark == "{" else -1
                assert depth >= 0, slug
            assert depth == 0 and line.count(r"\left") - line.count(r"\leftarrow") == line.count(
                r"\right"
            ) - line.count(r"\rightarrow"), slug


def test_equations_become_mathml():
    pytest.importorskip("latex2mathml")
    for lines in pages.tex().values():
        for line in lines:
            assert "<math" in maths.render(f"a\n\n{maths.fence(line)}")
    with pytest.raises(ValueError, match="nothing"):
        maths.mathml(r"\nothing x")


def test_the_best_is_chosen_by_the_sign_of_its_metric():
    rows = [{"name": n, "bits": {"mean": m, "half": 0.1, "n": 3}} for n, m in (("a", 2.0), ("b", 1.0), ("c", 1.15))]
    study = measured.Study("some", {"what": "some", "metric": "bits", "baseline": "a", "rows": rows})
    ((_, _, best, level, _, _),) = which.rows([study])
    assert (best, level) == ("b: 1.00\u00a0±\u00a00.10", "c (1.15\u00a0±\u00a00.10)")
    once = [{"name": n, "bits": {"mean": m, "half": None, "n": 1}} for n, m in (("a", 2.0), ("b", 1.0))]
    study = measured.Study("once", {"what": "once", "metric": "bits", "baseline": "a", "rows": once})
    assert not list(which.rows([study]))  # one seed ranks nothing


def test_a_link_of_a_guide_that_leads_nowhere_is_an_error():
    assert write.guide("[a](language.md#x) [b](../src/attnlib/types.py)", "docs/a.md", "guides/a.md",
                       {"docs/language.md": "guides/language.md"}) == "[a](language.md#x) b"  # fmt: skip
    with pytest.raises(ValueError, match="nowhere.md"):
        write.guide("[a](nowhere.md)", "docs/a.md", "guides/a.md", {})


def test_what_is_loaded_from_elsewhere_and_what_leads_nowhere_is_found(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.html").write_text(
        '<script src="https://unpkg.com/iframe-worker/shim" type="text/javascript"></script>'
        '<link rel="stylesheet" href="//fonts.example/a.css"><img src="in/no.png"><a href="in/b.html#there">b</a>'
        '<a href="https://arxiv.org">fine</a><h1 id="top"></h1><a href="#top">fine</a>'
    )
    (tmp_path / "in" / "b.html").write_text('<a href="../a.html#gone">a</a><h2 id="there"></h2>')
    (tmp_path / "c.css").write_text("@font-face { src: url(https://fonts.example/f.woff) }")
    found = finish.problems(tmp_path)
    assert len(found) == 5
    for word in ("unpkg", "fonts.example/a.css", "in/no.png", "#gone", "f.woff"):
        assert any(word in line for line in found), word
    (tmp_path / "worker.js").touch()
    assert finish.localise(tmp_path) == 1 and len(finish.problems(tmp_path)) == 4


def test_workers_run_on_pages_that_are_opened_as_files(tmp_path):
    """The search of the site is a worker, which browsers refuse to files."""
    driver = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    shutil.copyfile(write.HERE / "worker.js", tmp_path / "worker.js")
    (tmp_path / "twice.js").write_text("self.onmessage = e => self.postMessage({ got: e.data.n * 2 })")
    (tmp_path / "page.html").write_text(
        '<body><script src="worker.js"></script><script>'
        'const w = new Worker("twice.js"); w.onmessage = e => document.title = String(e.data.got);'
        "w.postMessage({ n: 21 })</script></body>"
    )
    with driver.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("document.title === '42'", timeout=5000)
        chromium.close()


def test_settings_of_the_generator_ask_nobody():
    settings = (write.HERE / "zensical.toml").read_text()
    assert "font = false" in settings and "http" not in settings
    assert "http" not in (write.HERE / "site.css").read_text() + (write.HERE / "worker.js").read_text()


def test_a_docstring_keeps_what_it_says():
    doc = "One.\n\n* a ``b | c``\n* d\n\nArgs:\n    x, y: both\n        of them.\n\n>>> 1\n1"
    said = text.markdown(doc)
    assert text.inline("(B, *grid, C) is *not* a * b, (B, *grid)") == r"(B, \*grid, C) is *not* a \* b, (B, \*grid)"
    assert "- a `b | c`\n- d" in said and "- `x`, `y`: both of them." in said and "```pycon\n>>> 1\n1\n```" in said


def test_pages_say_where_things_are_used():
    from attnlib.cache import SnapKV

    (line,) = pages.attaches(SnapKV, "attnlib.cache.SnapKV")
    assert "attnlib.attach(model, SnapKV(...))" in line and "`on_cache`" in line
    said = {name: " ".join(pages.attaches(pages.resolve(name), name)) for name in ("hedgehog", "illama", "biformer")}
    assert "DecoderConfig" in said["hedgehog"] and "with settings" not in said["hedgehog"]
    assert "with settings that make it causal" in said["illama"] and "DecoderConfig" not in said["biformer"]
    assert pages.fits("biformer") == (False, True) and pages.fits("mamba") == (True, False)
    for name in ("attnlib.steer.diffusion.video.AdaSpa", "attnlib.optim.AdamP", "attnlib.theory.mixing.mixing_matrix"):
        assert pages.attaches(pages.resolve(name), name)
