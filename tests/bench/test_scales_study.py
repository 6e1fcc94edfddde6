"""The study of scales that a frozen tower reads, as small as it goes."""

import json

import torch

from attnlib.bench import suites
from attnlib.bench.studies import scales


def test_contestants_read_the_tiles_they_are_named_by():
    images, labels = scales.pairs(2, "test", torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, scales.SIDE, scales.SIDE) and labels.shape == (2, 2)
    model = scales.tower(1, 2, 0)
    one, three, alone, wide = (
        scales.features(n, model, images) for n in (scales.ONE, scales.THREE, scales.ALONE, scales.ENLARGED)
    )
    torch.testing.assert_close(three[:, : one.shape[1]], one)
    torch.testing.assert_close(three[:, -one.shape[1] :], alone)
    assert three.shape == wide.shape == (2, 3 * one.shape[1]) and not torch.allclose(three, wide, atol=1e-3)
    shrunk = torch.nn.functional.interpolate(images, size=(scales.OWN, scales.OWN), mode="bicubic")
    expected = scales.last_map(model, shrunk).mean((1, 2))
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(wide[:, : one.shape[1]], expected)


def test_a_small_run_of_scales(tmp_path):
    found = scales.measure(pictures=tmp_path, steps=1, batch=2, labelled=40, tested=8, seeds=(0,))
    assert [row["name"] for row in found["rows"]] == list(scales.NAMES)
    channels = {row["name"]: row["channels"]["mean"] for row in found["rows"]}
    assert channels[scales.ENLARGED] == channels[scales.THREE] == 3 * channels[scales.ONE]
    assert (tmp_path / "scales-cpu.svg").exists() and "scales" in suites()
    json.dumps(found)
