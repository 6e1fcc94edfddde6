"""The line on depth, small: it runs and goes on, and what each way reads is what its name says."""

import json

import pytest
import torch

from attnlib.bench.studies.multimodal_models import depth

SMALL = dict(seeds=(0,), tests=2, rooms=8, steps=1, vae_steps=2)
NAMES = ("hard tokens", "soft tokens, all at once", "regressed at once", "codes of the true depth")


def test_the_line_runs_and_goes_on(tmp_path):
    keep = tmp_path / "kept.jsonl"
    found = depth.measure(keep=keep, pictures=tmp_path, names=NAMES, **SMALL)
    assert (tmp_path / "multimodal-models-depth-cpu.svg").exists() and json.dumps(found)
    assert (tmp_path / "multimodal-models-depth-cpu.png").stat().st_size < 60_000
    told = []
    again = depth.measure(keep=keep, progress=told.append, names=NAMES, **SMALL)
    assert not told and again["rows"] == found["rows"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["hard tokens"]["against"]["mean"] == 0 and rows["codes of the true depth"]["parameters"]["mean"] == 0
    assert depth.table(found["rows"]).count("\n") == len(NAMES) + 1


def test_hard_tokens_give_maps_of_codes_and_soft_ones_do_not():
    asked = depth.views(0, 3, "test")
    vae = depth.codes(0, 8, 2)
    for name, of_codes in (("hard tokens", True), ("hard tokens, read softly", False)):
        found, count = depth.told_by(name, 0, asked, 8, 2, 2)
        assert found.shape == asked.depth.shape and count > 0
        again = depth.told_by(name, 0, asked, 8, 2, 2)[0]
        torch.testing.assert_close(again, found)
        with torch.no_grad():
            written = depth.writer(0, False, False, 8, 2, 2)
            tokens = written.solver.write(written.features(asked.images), "depth", ["depth"] * 64, ()).tokens
            drawn = vae.decode((tokens - written.solver.vocabulary.ranges["depth"].start).unflatten(1, (8, 8)))[..., 0]
        assert torch.allclose(drawn, found) == of_codes


def test_rooms_to_learn_from_are_none_of_those_asked_about():
    assert not torch.equal(depth.views(0, 3, "test").depth, depth.views(0, 3, "train").depth)
    with pytest.raises(ValueError, match="part"):
        depth.views(0, 1, "every")
