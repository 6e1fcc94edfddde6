"""The study of patches, as small as it goes."""

import pytest

from attnlib.bench.studies import patches


@pytest.mark.parametrize("mixer", patches.MIXERS)
def test_only_embedding_and_positions_differ(mixer):
    sizes = {p: sum(w.numel() for w in patches.build(mixer, p).parameters()) for p in (16, 1)}
    dim = patches.DIM
    assert sizes[16] - sizes[1] == dim * (16 * 16 - 1) + dim * (2 * 2 - 32 * 32)


def test_cost_follows_the_number_of_patches():
    """Attention grows with its square, focal modulation with itself."""
    few, many = (patches.flops(patches.build("focal modulation", p)) for p in (2, 1))
    assert 3 < many / few < 4.2
    few, many = (patches.flops(patches.build("attention", p)) for p in (2, 1))
    assert many / few > 6


def test_the_study_runs(tmp_path):
    found = patches.measure(pictures=tmp_path, steps=1, batch=2, crops=8, seeds=(0, 1), patches=(16, 8, 4))
    assert (tmp_path / "patches-cpu.svg").exists()
    for held in found["mixers"].values():
        assert [row["tokens"] for row in held["rows"]] == [4, 16, 64]
        assert set(held["steps"]) == {"16 to 8", "8 to 4"} and len(held["exponents of seeds"]) == 2
        assert {"floor", "scale", "exponent", "half", "rms"} <= set(held["law"])
