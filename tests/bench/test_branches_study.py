"""The study of two branches of patches, small."""

import json

import torch

from attnlib.bench import suites
from attnlib.bench.studies import branches


def test_contestants_have_equal_parameters():
    assert "branches" in suites()
    with torch.device("meta"):
        counts = [branches.parameters(branches.build(name, 10)) for name in branches.NAMES]
    assert max(counts) < 1.01 * min(counts), counts


def test_added_class_tokens_change_class_tokens_alone():
    torch.manual_seed(0)
    add = branches.AddedClassTokens((4, 6))
    a, b = torch.randn(2, 5, 4), torch.randn(2, 3, 6)
    x, y = add(a, b)
    assert torch.equal(x[:, 1:], a[:, 1:]) and torch.equal(y[:, 1:], b[:, 1:])
    torch.testing.assert_close(x[:, 0], add.back[0](add.there[0](a[:, 0]) + b[:, 0]))
    torch.testing.assert_close(y[:, 0], add.back[1](add.there[1](b[:, 0]) + a[:, 0]))


def test_averaged_branches_know_nothing_of_each_other():
    torch.manual_seed(0)
    x = torch.randn(2, 1, branches.SIDE, branches.SIDE)
    for name, apart in ((branches.BASELINE, True), (branches.ADDED, False), (branches.OURS, False)):
        model = branches.build(name, 3).eval()
        first = model.forward_features(x)
        with torch.no_grad():
            model.stem[1].pos_embed.normal_()
        second = model.forward_features(x)
        assert torch.equal(first[0][:, 0], second[0][:, 0]) == apart
        assert not torch.equal(first[1], second[1])


def test_it_runs_small(tmp_path):
    found = branches.measure(
        pictures=tmp_path, keep=tmp_path / "kept.jsonl", steps=1, batch=2, seeds=(0, 1), tested=6
    )  # fmt: skip
    for rows in (task["rows"] for task in found["tasks"].values()):
        assert [r["name"] for r in rows] == list(branches.NAMES)
        assert "not read" in rows[-1] and rows[0]["multiply-adds, M"]["mean"] > 0
    assert (tmp_path / "branches-cpu.svg").exists()
    json.dumps(found)
