"""The study of sentences about classes, on features of a few numbers."""

import pytest
import torch

from attnlib.bench.data.files import DataError
from attnlib.bench.studies.real import labels


def test_the_study_runs(tmp_path):
    torch.manual_seed(0)
    centres = torch.randn(3, 8)
    target = torch.arange(3).repeat_interleave(8)
    texts = labels.Features(
        centres[target][:, None] + 0.3 * torch.randn(24, 5, 8), torch.ones(24, 5, dtype=torch.bool), target
    )
    told = labels.Features(centres[:, None].expand(3, 4, 8), torch.ones(3, 4, dtype=torch.bool), torch.arange(3))
    found = labels.measure(seeds=(0, 1), shots=2, steps=2, batch=4, pictures=tmp_path, given=(texts, told))
    means = {r["name"]: r[labels.METRIC]["mean"] for r in found["rows"]}
    assert list(means) == list(labels.NAMES) and (tmp_path / "real-labels-cpu.svg").exists()
    assert means["nearest sentence"] > 90 and means["head: match"] > 90
    assert means["head: match, shuffled sentences"] < 50


def test_parts_share_no_row():
    target = torch.arange(3).repeat_interleave(10)
    parts = labels.split(target, 3, seed=1)
    assert [len(p) for p in parts] == [9, 9, 12] and len(torch.cat(parts).unique()) == 30


def test_docstrings_are_read_without_importing():
    pytest.importorskip("scipy")
    found = labels.docstrings("integrate")
    assert len(found) >= 56 and len(set(found)) == len(found) and all(80 <= len(t) <= 300 for t in found)
    with pytest.raises(DataError, match="room='teapot'"):
        labels.docstrings("teapot")
