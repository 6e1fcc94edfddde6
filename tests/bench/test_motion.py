"""The study of motion, as small as it goes."""

import pytest
import torch

from attnlib.bench.data.worlds import DIRECTIONS, directed_digits
from attnlib.bench.studies import motion


def clips(count=8, seed=0):
    return directed_digits(count, generator=torch.Generator().manual_seed(seed))


def test_digits_move_where_their_label_says():
    videos, labels = clips(40)
    assert videos.shape == (40, 8, 24, 24, 1) and set(labels.tolist()) == {0, 1, 2, 3}
    mass = videos[..., 0] / videos.sum((2, 3, 4))[..., None, None]
    at = torch.arange(24.0)
    centre = torch.stack([(mass.sum(3) * at).sum(-1), (mass.sum(2) * at).sum(-1)], -1)  # (count, frames, 2)
    went = (centre[:, -1] - centre[:, 0]) / 7
    expected = 1.5 * torch.tensor(list(DIRECTIONS.values()))[labels]
    torch.testing.assert_close(went, expected, atol=0.1, rtol=0)


def test_backwards_a_video_is_one_of_the_opposite_direction():
    """All videos of one digit without jitter: those of opposite directions have the same frames in reverse order."""
    seen = {}
    for seed in range(400):
        video, label = directed_digits(1, generator=torch.Generator().manual_seed(seed), jitter=0)
        key = round(float(video[0, 0].sum()), 4)
        seen.setdefault(key, {})[int(label)] = video[0]
        pair = next((held for held in seen.values() if {0, 1} <= set(held) or {2, 3} <= set(held)), None)
        if pair is not None:
            break
    first = 0 if 0 in pair and 1 in pair else 2
    assert torch.equal(pair[first].flip(0), pair[first + 1])
    assert not torch.equal(pair[first], pair[first + 1])


def test_a_path_that_leaves_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"step=3.0 takes a digit 11.5 pixels off the middle, where 7 are possible"):
        directed_digits(1, step=3.0)


@torch.no_grad()
def test_only_the_image_model_cannot_tell_backwards():
    videos, _ = clips()
    for name in motion.CONTESTANTS:
        model = motion.build(name).eval()
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)
        forth, back = motion.scores(model, videos), motion.scores(model, videos.flip(1))
        assert torch.allclose(forth, back, atol=1e-5) == (name == motion.BASELINE), name


def test_contestants_are_no_larger_than_their_baseline():
    sizes = {n: sum(p.numel() for p in motion.build(n).parameters()) for n in motion.CONTESTANTS}
    assert max(sizes.values()) < 1.05 * sizes[motion.BASELINE]


def test_the_study_runs(tmp_path):
    names = (motion.BASELINE, "UniFormerV2", "UniFormer")
    found = motion.measure(
        pictures=tmp_path, keep=tmp_path / "kept", steps=1, batch=2, clips=4, seeds=(0, 1), names=names
    )
    assert (tmp_path / "motion-cpu.svg").exists() and [row["name"] for row in found["rows"]] == list(names)
    assert all(0 <= row["accuracy"]["mean"] <= row["axis"]["mean"] <= 100 for row in found["rows"])
    again = motion.measure(keep=tmp_path / "kept", steps=1, batch=2, clips=4, seeds=(0, 1), names=names)
    assert again["runs"] == found["runs"]
