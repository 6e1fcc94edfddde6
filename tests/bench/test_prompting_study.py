"""The study of prompts of classes, as small as it goes."""

import json

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.studies import prompting


def test_patterns_stand_where_it_says():
    among = range(prompting.CLASSES)
    x, which, where = prompting.scenes(6, among, 1, torch.Generator().manual_seed(0), beside=2)
    assert which.shape == where.shape == (6, 1) and bool((which < prompting.CLASSES).all())
    cells = x.unfold(2, prompting.PATCH, prompting.PATCH).unfold(3, prompting.PATCH, prompting.PATCH)
    cells = cells[:, 0].flatten(1, 2)
    for i in range(6):
        found = cells[i, where[i, 0]]
        off = (found - prompting.patterns()[which[i, 0]]).abs().mean()
        assert float(off) < 0.3
    assert prompting.hits(torch.eye(5)[:3], torch.tensor([0, 1, 4])) == pytest.approx(200 / 3)


def test_a_small_run_of_prompting(tmp_path):
    found = prompting.measure(pictures=tmp_path, pretraining=1, steps=1, batch=2, tested=8, seeds=(0,))
    names = [row["name"] for row in found["where maps look"]["rows"]]
    assert names == [prompting.TOKEN, prompting.TUNED, prompting.PROMPTED, prompting.BLIND]
    assert (tmp_path / "prompting-cpu.svg").exists() and "prompting" in suites()
    json.dumps(found)
