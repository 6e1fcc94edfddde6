"""Tables of the pages on multimodal models are those of the results beside them."""

import json
import re
from pathlib import Path

import pytest

from attnlib.bench.speed import multimodal_models_speed
from attnlib.bench.studies.multimodal_models import canvases, clicks, depth, geometry, maps, preferences

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "multimodal-models.md", ROOT / "benchmarks" / "results"


def held(name):
    return json.loads((RESULTS / f"{name}-cpu.json").read_text(encoding="utf-8"))


def on_page(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end {name} -->", PAGE.read_text(encoding="utf-8"), re.S).group(1)


def test_canvases_and_clicks():
    assert on_page("canvases") == canvases.table(held("multimodal-models-canvases"))
    found = held("multimodal-models-clicks")
    for world in clicks.CONTESTANTS:
        assert on_page(f"clicks {world}") == clicks.table(found[world])


def test_preferences():
    found = held("multimodal-models-preferences")
    assert on_page("preferences") == preferences.table(found["rows"])
    assert [row["name"] for row in found["rows"]] == ["plain", *preferences.CONTESTANTS]


def test_depth():
    found = held("multimodal-models-depth")
    assert on_page("depth") == depth.table(found["rows"])
    assert [row["name"] for row in found["rows"]] == list(depth.CONTESTANTS)


def test_geometry():
    found = held("multimodal-models-geometry")
    for world in geometry.WORLDS:
        assert on_page(f"geometry {world}") == geometry.table(found[world]["rows"])


def test_maps_and_their_rates():
    found = held("multimodal-models-maps")
    assert on_page("maps") == maps.table(found["rows"])
    assert [row["name"] for row in found["rows"]] == list(maps.CONTESTANTS)
    tried = {row["name"]: row["overlap"]["mean"] for row in held("multimodal-models-maps-rates")["rows"]}
    page = PAGE.read_text(encoding="utf-8")
    for name in maps.LEARNING:
        best = max(maps.TRIED, key=lambda rate: tried[f"{name}, {rate:g}"])
        assert maps.RATES[name] == found["rates"][name] == best
        cells = [f"{tried[f'{name}, {rate:g}']:.1f}" for rate in maps.TRIED]
        cells = [f"**{c}**" if rate == best else c for c, rate in zip(cells, maps.TRIED, strict=True)]
        assert f"| {' | '.join([name, *cells])} |" in page


def test_what_anchors_keep():
    rows = held("multimodal-models-preferences")["against"]
    row = next(r for r in rows if (r["name"], r["of"]) == ("OPA-DPO without anchors", "OPA-DPO"))
    less, (most, least) = row["recall"]["difference"], row["recall"]["difference_interval"]
    said = f"{-100 * less:.1f} points fewer of the clear things ({-100 * least:.1f} to {-100 * most:.1f})"
    gap, (low, high) = row["invented second"]["difference"], row["invented second"]["difference_interval"]
    also = f"({100 * gap:.1f} points, {100 * low:.1f} to {100 * high:.1f})"
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert said in page and also in page


def test_rates_are_those_with_the_fewest_errors():
    found = held("multimodal-models-preferences-rates")
    errors = {(row["name"], row["rate"]): row["errors"] for row in found["rows"]}
    page = PAGE.read_text(encoding="utf-8")
    for name in preferences.MAIN:
        best = min(preferences.TRIED, key=lambda rate: errors[name, rate])
        assert preferences.RATES[name] == found["rates"][name] == best
        cells = [f"{errors[name, rate]:.3f}" for rate in preferences.TRIED]
        cells = [f"**{c}**" if rate == best else c for c, rate in zip(cells, preferences.TRIED, strict=True)]
        assert f"| {' | '.join([name, *cells])} |" in page
    assert errors["plain", 0.0] == 0.535


@pytest.mark.parametrize("updates", [100, 300, 600, 1000, 1400, 1800, 2200])
def test_how_the_small_model_learnt(updates):
    row = next(r for r in held("multimodal-training")["decoder"] if r["step"] == updates)
    page = (ROOT / "docs" / "multimodal.md").read_text(encoding="utf-8")
    cells = re.search(rf"^\| {updates} \| (.*) \|$", page, re.M).group(1).split(" | ")
    for kind, cell in zip(("presence", "colour", "count", "digit", "position", "content"), cells, strict=True):
        assert abs(100 * row[kind] - int(cell)) <= 0.51, kind


def test_speed():
    found = held("multimodal-models-speed")
    assert on_page("speed") == multimodal_models_speed.table(found["records"])
    assert f"({found['machine']['load']:g} programs wanted" in PAGE.read_text(encoding="utf-8")
