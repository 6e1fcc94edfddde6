"""The study of super-resolution, as small as it goes."""

import torch

from attnlib.bench.data.worlds import photo_crops
from attnlib.bench.studies import restoration


def test_contestants_start_as_bicubic():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in restoration.CONTESTANTS[1:]:
        with torch.no_grad():
            made = restoration.build(name, 2).eval()(x)
        torch.testing.assert_close(made, restoration.enlarged(x, 2))


def test_psnr():
    true = torch.full((2, 3, 8, 8), 0.5)
    made = true.clone()
    made[..., 1:-1, 1:-1] += 0.1
    made[..., 0, :] = 7  # the border does not count
    assert abs(restoration.psnr(made, true, 1) - 20) < 1e-4


def test_crops_are_those_of_colour_photographs():
    crops = photo_crops(3, 32, "test", torch.Generator().manual_seed(0))
    assert crops.shape == (3, 3, 32, 32) and 0 <= crops.min() and crops.max() <= 1 and crops.std() > 0.01


def test_the_study_runs(tmp_path):
    found = restoration.measure(
        pictures=tmp_path, steps=1, batch=1, seeds=(0, 1), tested=2, scales=(2,), names=("RGT", restoration.PLAIN)
    )  # fmt: skip
    rows = found["scales"]["x2"]["rows"]
    assert [r["name"] for r in rows] == [restoration.BICUBIC, restoration.PLAIN, "RGT"]
    assert rows[2]["against"]["n"] == rows[2]["against_plain"]["n"] == 2
    assert (tmp_path / "restoration-cpu.svg").exists()
