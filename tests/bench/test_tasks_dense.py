"""The lines of dense tasks, small: every contestant runs, goes on where it stopped, and is drawn."""

import json
import re
from pathlib import Path

import pytest
import torch

from attnlib.bench.studies.tasks import defects, quality, rooms
from attnlib.bench.worlds.rooms import make_room

ROOT = Path(__file__).parents[2]
FAST = {
    "defects": (defects, dict(steps=1, taught=1, tested=4, dims=(8, 8)), {"": ("auroc", defects.NAMES)}),
    "quality": (quality, dict(steps=1, taught=6, tested=18), {"": ("srocc", quality.NAMES)}),
    "rooms": (
        rooms, dict(steps=1, taught=2, tested=2),
        {"depth": ("error", rooms.DEPTH), "three tasks": ("angle", rooms.TASKS)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", FAST)
def test_a_line_runs_goes_on_where_it_stopped_and_is_drawn(line, tmp_path):
    study, given, parts = FAST[line]
    given = {**given, "seeds": (0, 1), "keep": tmp_path / "kept", "pictures": tmp_path}
    found = study.measure(**given)
    again = study.measure(**given)
    for part, (metric, names) in parts.items():
        own, other = (f["parts"][part] if part else f for f in (found, again))
        assert [row["name"] for row in own["rows"]] == list(names) and own["runs"] == other["runs"]
        assert all(row[metric]["n"] == 2 and row[metric]["half"] >= 0 for row in own["rows"])
    assert (tmp_path / f"tasks-{line}-cpu.svg").exists()
    assert 0 < (tmp_path / f"tasks-{line}-predictions.png").stat().st_size <= 60_000
    json.dumps(found)


def test_tables_of_the_page_are_those_of_the_results():
    text = (ROOT / "docs" / "tasks-dense.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"<!-- (?!end )([\w ]+) -->\n(.*?)\n<!-- end \1 -->", text, re.S))
    assert shown
    for name, given in shown.items():
        line, _, part = name.partition(" ")
        found = json.loads((ROOT / "benchmarks" / "results" / f"tasks-{line}-cpu.json").read_text(encoding="utf-8"))
        assert given == getattr(FAST[line][0], f"{part}_table" if part else "table")(found), name


def test_a_defect_is_where_it_is_said_to_be():
    image, other = (torch.rand(64, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for kind in defects.DEFECTS:
        x, where = defects.spoilt(image, other, kind, torch.Generator().manual_seed(3))
        clean = defects.crops(image, 1, torch.Generator().manual_seed(3))[0]
        apart = (x - clean).abs()[0]
        assert x.shape == (1, 48, 48) and 10 < int(where.sum()) < 400
        assert float(apart[where].mean()) > 0.05 and float(apart[~where].mean()) < 0.02, kind


def test_factors_of_the_score_are_those_of_the_model():
    torch.manual_seed(0)
    trunk = defects.backbone(1)
    model = defects.FOD(trunk, 48, dims=(8, 8), num_heads=2, depth=1, in_chans=1)
    model.remember(torch.rand(4, 1, 48, 48))
    with torch.no_grad():
        for level in model.eval()(torch.rand(2, 1, 48, 48)):
            wrong, apart = defects.factors(level)
            torch.testing.assert_close(wrong * apart, model.scores(level))


def test_higher_grades_are_farther_from_the_picture():
    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    for kind in quality.KINDS:
        apart = [
            float((quality.distorted(x, kind, g, torch.Generator().manual_seed(1)) - x).square().mean())
            for g in range(6)
        ]
        assert apart[0] == 0 and apart == sorted(apart) and len(set(apart)) == 6


def test_edges_stand_where_another_face_begins():
    room = make_room(0, side=32)
    found = rooms.edges(room.normals, room.owner)
    for y, x in ((y, x) for y in range(31) for x in range(31)):
        same = all(
            room.owner[y, x] == room.owner[b] and bool((room.normals[:, y, x] == room.normals[(slice(None), *b)]).all())
            for b in ((y + 1, x), (y, x + 1))
        )
        assert bool(found[y, x]) != same


def test_contestants_are_of_equal_size():
    counts = {n: rooms.parameters(rooms.built(n)) for n in (*rooms.DEPTH, *rooms.TASKS)}
    assert counts["fixed range"] == counts["ScaleDepth"] and counts["one trunk"] == pytest.approx(
        counts["TaskExpert"], rel=0.02
    )
    assert counts["logarithm"] == pytest.approx(counts["ScaleDepth"], rel=0.02)
    x = torch.rand(1, 3, 32, 32)
    made = rooms.built("fixed range").eval()(x)
    assert float(made.scale) == 80.0 and bool((made.depth == 80 * made.relative).all())
