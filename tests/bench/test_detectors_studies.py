"""The lines of detection and fusion, small; what they share; the tables of their page are those of results."""

import json
import re
from pathlib import Path

import pytest
import torch

from attnlib.bench.studies.detection import average_precision
from attnlib.bench.studies.tasks import dark, fusion, overlays
from attnlib.bench.studies.tasks._detectors import drawn, mean_precision
from attnlib.models.detect.plain_detr import Detections

ROOT = Path(__file__).parents[2]
LINES = {"fusion": fusion, "dark": dark, "overlays": overlays}


def found(boxes, labels=None):
    count = len(boxes)
    scores = torch.linspace(0.9, 0.5, count) if count else torch.zeros(0)
    kinds = torch.zeros(count, dtype=torch.long) if labels is None else torch.tensor(labels)
    return Detections(torch.tensor(boxes).float().reshape(count, 4), scores, kinds)


def test_what_does_not_count_is_neither_missed_nor_wrong():
    left, right = [0.0, 0, 10, 10], [20.0, 0, 30, 10]
    truth = [{"boxes": torch.tensor([left, right]), "counted": torch.tensor([False, True])}]
    assert average_precision([found([left, right])], truth) == 100
    assert average_precision([found([left])], truth) == 0
    assert average_precision([found([[40, 40, 50, 50], right])], truth) == pytest.approx(50)


def test_classes_are_judged_by_themselves():
    left, right = [0.0, 0, 10, 10], [20.0, 0, 30, 10]
    truth = [{"boxes": torch.tensor([left, right]), "labels": torch.tensor([0, 1])}]
    assert mean_precision([found([left, right], [0, 1])], truth, 2) == 100
    assert mean_precision([found([left, right], [0, 0])], truth, 2) == 50


def test_turned_pictures_keep_their_boxes():
    (images, targets), _ = fusion.scenes(4, "dev", 0.0)
    (visible, infrared), made = drawn((images, targets), 24, torch.Generator().manual_seed(0))
    turned = 0
    for x, y, target in zip(visible, infrared, made, strict=True):
        which = [i for i in range(4) if torch.equal(x, images[0][i]) or torch.equal(x, images[0][i].flip(-1))]
        assert len(which) == 1
        same = torch.equal(x, images[0][which[0]])
        turned += not same
        own, held = images[1][which[0]], targets[which[0]]["boxes"]
        assert torch.equal(y, own if same else own.flip(-1))
        back = torch.stack([fusion.SIDE - held[:, 2], held[:, 1], fusion.SIDE - held[:, 0], held[:, 3]], 1)
        assert torch.equal(target["boxes"], held if same else back)
    assert 0 < turned < 24


def test_classes_of_pixels_are_those_of_the_things():
    (images, targets), masks = fusion.scenes(6, "dev", 0.0)
    for visible, infrared, target, mask in zip(*images, targets, masks, strict=True):
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            cx, cy = int((x1 + x2) / 2), int((y1 + y2) / 2)
            assert mask[cy, cx] == 1 + label
            assert max(float(visible[:, cy, cx].max()) - 0.6, float(infrared[0, cy, cx]) - 0.7) >= 0
    perfect = fusion.overlap_alone(masks, masks, targets)
    assert perfect == 100 and fusion.overlap_alone(torch.zeros_like(masks), masks, targets) == 0


def test_dark_pictures_have_less_light():
    ((images,), targets), light, exposure = dark.pictures_of(8, "dev")
    assert dark.EXPOSURE[0] <= float(exposure.min()) < float(exposure.max()) <= dark.EXPOSURE[1]
    most = dark.in_the_dark(light, torch.ones(8), torch.Generator().manual_seed(0))
    assert bool((images.mean((1, 2, 3)) < most.mean((1, 2, 3))).all()) and float((most - light).abs().mean()) < 0.03
    assert float(images.mean()) < 0.5 * float(light.mean()) and all(len(t["boxes"]) for t in targets)
    assert torch.equal((255 * images).round() / 255, images)
    assert torch.equal(dark.Gamma()(images) > images, (images > 0) & (images < 1))


@pytest.mark.parametrize("line", LINES)
def test_lines_run_and_go_on(line, tmp_path):
    module = LINES[line]
    steps = (1, 1) if line == "fusion" else 1
    given = dict(steps=steps, trained=4, tested=2, seeds=(0,), keep=tmp_path / "kept")
    made = module.measure(**given, pictures=tmp_path)
    assert {p.suffix for p in tmp_path.glob("tasks-*")} == {".svg", ".png"} and json.dumps(made)
    parts = {"boxes": fusion.DETECTORS, "pixels": fusion.SEGMENTERS} if line == "fusion" else {"": module.NAMES}
    again = module.measure(**given)
    for part, names in parts.items():
        own = made["parts"][part] if part else made
        assert [r["name"] for r in own["rows"]] == list(names)
        assert own["runs"] == (again["parts"][part] if part else again)["runs"]
        for row in own["rows"]:
            assert 0 <= row[own["metric"]]["mean"] <= 100 and row["parameters"]["mean"] < 100_000


@pytest.mark.parametrize("line", LINES)
def test_tables_of_the_page(line):
    held = json.loads((ROOT / "benchmarks" / "results" / f"tasks-{line}-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "tasks-detection.md").read_text(encoding="utf-8")
    for name, (part, table) in LINES[line].TABLES.items():
        shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end {name} -->", page, re.S).group(1)
        assert shown == table(held["parts"][part] if part else held)
