"""The line on geometry, small: it runs and goes on; a level is noise in some pictures; gates are told."""

import json

import torch

from attnlib.bench.studies.multimodal_models import geometry

SMALL = dict(tests=6, count=16, steps=1, pyramid_steps=1)


def test_the_line_runs_and_goes_on(tmp_path):
    keep = tmp_path / "kept.jsonl"
    found = geometry.measure(keep=keep, pictures=tmp_path, seeds=(0,), **SMALL)
    assert (tmp_path / "multimodal-models-geometry-cpu.svg").exists() and json.dumps(found)
    told = []
    again = geometry.measure(keep=keep, progress=told.append, seeds=(0,), **SMALL)
    assert not told and {k: again[k] for k in geometry.WORLDS} == {k: found[k] for k in geometry.WORLDS}
    rows = {row["name"]: row for world in geometry.WORLDS for row in found[world]["rows"]}
    assert set(rows) == set(geometry.CONTESTANTS)
    assert "gate of noise" in rows["router, gate behind the norm, noisy"] and "gate 0" not in rows["own tower"]
    for world in geometry.WORLDS:
        assert geometry.table(found[world]["rows"]).count("\n") == len(found[world]["rows"]) + 1


def test_counts_are_those_of_the_drawing_and_noise_is_in_one_level_of_some():
    from attnlib.bench.worlds.geometry import make_drawing

    drawn = geometry.drawings(0, 16, "train")
    for i in range(16):
        kinds = [j.kind for j in make_drawing(i, "train", geometry.SIDE).junctions]
        assert drawn.counts[i, 0] == kinds.count("T") and drawn.counts[i, 1] == min(5, kinds.count("X"))
    whole, noisy = (geometry.seen(0, "train", 16, world, 16, 1) for world in geometry.WORLDS)
    assert not whole.noisy.any() and 0 < int(noisy.noisy.sum()) < 16
    for i, (a, b) in enumerate(zip(whole.levels, noisy.levels, strict=True)):
        changed = (a != b).flatten(1).any(1)
        assert torch.equal(changed, noisy.noisy & (i == geometry.BROKEN))


def test_the_gate_before_the_norm_changes_nothing_and_the_one_behind_does():
    """Within the reader, gates that are forced to other values move what is read only behind the norm."""
    drawn = geometry.seen(0, "train", 16, "whole", 16, 1)
    for way, moved in (("router, gate behind the norm", True), ("router, gate before the norm", False)):
        torch.manual_seed(0)
        reader = geometry.Reader(way).eval()
        with torch.no_grad():
            want = torch.cat(reader(drawn.images, drawn.levels), 1)
            reader.projector.router.weight_mlp.linear_2.weight.mul_(-3)
            got = torch.cat(reader(drawn.images, drawn.levels), 1)
        assert (not torch.allclose(got, want, atol=1e-3)) == moved
