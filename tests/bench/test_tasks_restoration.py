"""The lines of tasks that restore and pretrain, small, and their tables on the pages."""

import json
import re
from pathlib import Path

import pytest
import torch

from attnlib.bench.small import psnr
from attnlib.bench.studies.tasks import clouds, faces, holes, pretext, steps

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FAST = {
    "holes": (holes, dict(steps=1, batch=1, tested=2), "psnr"),
    "clouds": (clouds, dict(steps=1, batch=2, side=16, tested=2), "psnr"),
    "faces": (faces, dict(steps=1, batch=2, tested=2, times=1), "psnr"),
    "steps": (steps, dict(steps=(1,), tested=8), "error"),
    "pretext": (pretext, dict(steps=1, batch=2, tuning=1, tested=2), "error"),
}


def parts(found):
    """Every study within a result."""
    return found["worlds"].values() if "worlds" in found else found["stages"].values() if "stages" in found else [found]


@pytest.mark.parametrize("line", FAST)
def test_a_line_runs_goes_on_where_it_stopped_and_is_drawn(line, tmp_path):
    study, given, metric = FAST[line]
    given = {**given, "seeds": (0, 1), "keep": tmp_path / "kept", "pictures": tmp_path}
    found = study.measure(**given)
    for part in parts(found):
        assert [row["name"] for row in part["rows"]] == list(study.NAMES)
        assert all(row[metric]["n"] == 2 and row[metric]["half"] >= 0 for row in part["rows"])
        assert study.table(found).count("\n") >= len(study.NAMES) + 1
    assert (tmp_path / f"tasks-{line}-cpu.svg").exists() and list(tmp_path.glob(f"tasks-{line}-predictions.*"))
    again = study.measure(**given)
    assert [p["runs"] for p in parts(again)] == [p["runs"] for p in parts(found)]
    json.dumps(found)


@pytest.mark.parametrize("page", ["restoration", "pretraining"])
def test_tables_of_the_pages_are_those_of_the_results(page):
    text = (ROOT / "docs" / f"tasks-{page}.md").read_text(encoding="utf-8")
    tables = dict(re.findall(r"<!-- (?!end )([\w ]+) -->\n(.*?)\n<!-- end \1 -->", text, re.S))
    assert tables
    for name, shown in tables.items():
        line, _, part = name.partition(" ")
        found = json.loads((RESULTS / f"tasks-{line}-cpu.json").read_text(encoding="utf-8"))
        assert shown == getattr(FAST[line][0], part or "table")(found), name


def test_a_network_without_patch_attention_differs_in_nothing_else():
    torch.manual_seed(0)
    ours = holes.build(holes.OURS).eval()
    torch.manual_seed(0)
    plain = holes.build(holes.PLAIN).eval()
    assert all(a.equal(b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    x, known = torch.rand(1, 1, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool)
    known[..., 16:40, 16:40] = False
    assert not ours.predict(x, known).equal(plain.predict(x, known))
    features, small = torch.randn(1, 64, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert plain.attention.filled(features, small) is features


def test_a_repeating_texture_repeats_and_a_hole_is_measured_alone():
    for texture in holes.repeating(6, 64, "test", torch.Generator().manual_seed(0)):
        periods = [(p, q) for p in (16, 24) for q in (16, 24)]
        assert any(texture[:, p:].equal(texture[:, :-p]) and texture[..., q:].equal(texture[..., :-q])
                   for p, q in periods)  # fmt: skip
    true, known = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    known[..., :2, :2] = False
    made = torch.where(known, 1.0, 0.1).view(1, 1, 4, 4)
    assert psnr(made, true, ~known) == pytest.approx(20.0)


def test_clear_dates_give_the_mean_of_what_is_clear():
    x = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1, 1)
    thick = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1, 1)
    assert float(clouds.of_clear_dates(x, thick)) == pytest.approx(0.3, abs=1e-3)
    assert float(clouds.of_clear_dates(x, torch.tensor([0.5, 1.0, 1.0]).view(1, 3, 1, 1, 1))) == pytest.approx(
        0.2, abs=0.01
    )


def test_views_are_moved_by_the_disparity():
    first, second, disparity = pretext.pairs(8, "test", torch.Generator().manual_seed(0))
    assert first.shape == second.shape == disparity.shape == (8, 1, pretext.HEIGHT, pretext.WIDTH)
    assert 0 <= float(disparity.min()) and float(disparity.max()) <= pretext.MOST
    for left, right, moved in zip(first, second, disparity[:, 0, 0, 0].int().tolist(), strict=True):
        assert left[..., moved:].allclose(right[..., : pretext.WIDTH - moved])
    real = pretext.motorcycle()
    assert real[0].shape == real[2].shape and 0 < float(real[2].nan_to_num(1.0).min())
    assert float(real[2].nan_to_num(0.0).max()) < pretext.MOST
    moved = torch.cat([real[1][..., :-4].flatten(), real[0][..., 4:].flatten()]).view(2, -1)
    still = torch.cat([real[1].flatten(), real[0].flatten()]).view(2, -1)
    assert torch.corrcoef(moved)[0, 1] > torch.corrcoef(still)[0, 1]  # the left view lies to the right


def test_stages_share_their_start_and_only_one_has_a_teacher():
    torch.manual_seed(0)
    assert steps.trained(steps.OURS, 0, 1).teacher is not None and steps.trained(steps.STARTED, 0, 1).teacher is None
    assert steps.trained(steps.LONGER, 0, 1).factor == steps.trained(steps.DIRECT, 0, 1).factor == 8


def test_faces_are_other_ones_in_the_test():
    train, test = faces.halves(3, 20)
    assert len(train) == 80 and len(test) == 20
    assert not (train.flatten(1)[:, None] == test.flatten(1)[None]).all(-1).any()
