"""The study of video policies, as small as it goes."""

import torch

from attnlib.bench.studies import video


def test_the_study_runs(tmp_path):
    found = video.measure(
        pictures=tmp_path, steps=2, batch=2, seeds=(0, 1), densities=(0.5,), videos=1, sampled=2
    )  # fmt: skip
    assert len(found["rows"]) == len(video.POLICIES) and (tmp_path / "video-cpu.svg").exists()
    for row in found["rows"]:
        assert 0 < row["density"]["mean"] <= 1 and row["against"]["n"] == 2


def test_reading_everything_is_dense():
    torch.manual_seed(0)
    model = video.VideoDenoiser().eval()
    noise = torch.randn(1, video.FRAMES, video.SIDE, video.SIDE, 1)
    dense = video.sample(model, noise, 2)
    with video.attach(model, video.BlockSparse(video.Fixed(1.0, "nearest"), grid=video.GRID)) as session:
        assert torch.allclose(video.sample(model, noise, 2, session), dense, atol=1e-5)
