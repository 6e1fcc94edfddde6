import json

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.studies.diffusion import editing
from attnlib.bench.worlds.prompts import prompts

pytest.importorskip("diffusers")


def test_every_line_is_measured_and_gone_on_from(untrained_generators, diffusion_figures, tmp_path):
    told = []
    given = dict(
        keep=tmp_path / "kept", count=1, folder=untrained_generators, settings={"num_inference_steps": 1},
        pictures=tmp_path, part="dev",
    )  # fmt: skip
    found = editing.measure(progress=told.append, **given)
    json.dumps(found)
    shown = diffusion_figures.editing_table(found)
    assert all(f"| {row['name']} | " in shown for rows in found["lines"].values() for row in rows)
    assert set(found["lines"]) == set(editing.LINES) and len(told) == len(editing.LINES)
    for line, rows in found["lines"].items():
        assert [("against" in r) for r in rows] == [r["name"] != editing.BASELINES[line] for r in rows]
    assert [r["name"] for r in found["lines"]["editing"]] == list(editing.EDITORS)
    assert all(r["decibels"]["n"] == 1 for r in found["lines"]["editing"])
    errors = {r["name"]: r["error"]["mean"] for r in found["lines"]["inversion"]}
    assert set(errors) == {"text", "guided", "uniform maps", "guided, null text"} and min(errors.values()) > 0
    assert (tmp_path / "diffusion-editing-cpu.png").exists() and "diffusion-editing" in suites()
    told.clear()
    again = editing.measure(progress=told.append, **given)
    assert not told and again["lines"] == found["lines"]


def test_tasks_change_one_word_of_what_is_painted(untrained_generators):
    studio = editing.Studio(untrained_generators, {"num_inference_steps": 2, "guidance_scale": 2.0})
    for number, prompt in enumerate(prompts("one", 2, "dev")):
        task = studio.task(prompt, number, "dev")
        a, b = task.source.wants[0], task.target.wants[0]
        assert (a.colour != b.colour) + (a.shape != b.shape) == 1
        assert len(task.source.text.split()) == len(task.target.text.split())
        assert 0 < task.mask.float().mean() < 0.9 and len(task.path) == 3
        same = editing.kept(task.image, task.image, task.mask)
        assert same["ssim"] == pytest.approx(1.0, abs=1e-6) and same["decibels"] == pytest.approx(100.0)
        worse = torch.where(task.mask, task.image, 1 - task.image)
        assert editing.kept(task.image, worse, task.mask)["decibels"] < 20
