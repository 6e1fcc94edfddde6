import json
import re
from html.parser import HTMLParser

import pytest

from attnlib.bench import compare as comparing
from attnlib.bench import report
from attnlib.bench.speed import scaling
from attnlib.bench.training import Settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One small comparison of every task, with scaling."""
    out = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    patch.setattr(scaling, "SIDES", (8, 16, 24))
    try:
        found = comparing.compare(
            ["softmax-attention", "bench_stubs:Identity", "bench_stubs:Quadratic", "bench_stubs:GridOnly"],
            out=out,
            steps=6,
            seeds=[0],
            settings=Settings(dim=16, depth=1, num_heads=2),
            quiet=True,
            threads=1,
        )
    finally:
        patch.undo()
    return found, found.report.read_text()


class Page(HTMLParser):
    """Collects tags, links and identifiers, and checks that tags close in order."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)
            if key == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(made):
    page = Page()
    page.feed(made[1])
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for link in page.links:
        assert link.startswith(("data:image/png;base64,", "#")), link[:80]
    for target in re.findall(r"url\(([^)]*)\)", made[1]):
        assert target.strip("'\"").startswith("#"), target
    assert "@import" not in made[1] and "http" not in made[1]
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link


def test_every_mechanism_task_and_caveat_is_there(made):
    found, html = made
    page = Page()
    page.feed(html)
    text = " ".join("".join(page.text).split())
    for mechanism in found.results["mechanisms"]:
        assert mechanism["label"] in text
    for task in found.results["tasks"].values():
        assert task["title"] in text and task["data"]["source"] in text and task["data"]["fingerprint"] in text
    for words in ("tiny", "seeds 0", "1 run at a time", "no tuning per mechanism", "does not carry over"):
        assert words in text
    assert "causal-self is not among them" in text and "grid of rank 1" in text
    assert len(re.findall(r"N\^\d", text)) >= 8
    assert "prefers-color-scheme: dark" in html


def test_samples_are_shown(made):
    found, html = made
    samples = {r["task"]: r["sample"] for r in found.results["runs"] if r["label"] == "softmax-attention"}
    assert samples["superres"]["image"] in html and samples["upsample"]["image"] in html
    assert found.results["tasks"]["superres"]["exhibit"]["truth"] in html
    assert len(samples["text"]["text"]) > 20 and len(samples["forecast"]["forecast"]) == 64


def test_labels_are_escaped(made):
    results = json.loads(json.dumps(made[0].results).replace("Quadratic", "<script>alert(1)<\\/script>"))
    html = report.render(results)
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_the_report_can_be_made_again_from_its_json(made, tmp_path):
    report.from_json(made[0].json, tmp_path / "again.html")
    assert "softmax-attention" in (tmp_path / "again.html").read_text()


def test_numbers_are_written_for_people():
    assert report.estimate(27.80342, 0.0341) == ("27.803", "± 0.034")
    assert report.estimate(97.2, None) == ("97.20", "")
    assert report.estimate(None, None) == ("–", "")
    assert report.length_text("inf") == "never" and report.length_text(0.0) == "always"
    assert report.length_text(5310.2, True) == "about 5,300 (extrapolated)"
    assert report.length_text(311.8) == "312" and report.milliseconds(1.1504) == "1,150"
