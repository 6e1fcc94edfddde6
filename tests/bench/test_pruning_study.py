"""The study of pruning, as small as it goes."""

import pytest
import torch

from attnlib.bench.studies import pruning


def test_all_patches_kept_is_no_pruning_and_nothing_stays_behind():
    torch.manual_seed(0)
    model = pruning.build().eval()
    images, _ = pruning.draw(3, "train", torch.Generator().manual_seed(0))
    whole = pruning.answers(model, images)
    for scored in (True, False):
        with pruning.pruned(model, 1.0, "gap", scored, 0):
            torch.testing.assert_close(pruning.answers(model, images), whole)
        with pruning.pruned(model, 0.5, "none", scored, 0):
            assert not torch.allclose(pruning.answers(model, images), whole)
    assert torch.equal(pruning.answers(model, images), whole)


@pytest.mark.parametrize("align", ["gap", "last"])
def test_alignment_and_what_is_removed_change_answers(align):
    torch.manual_seed(0)
    model = pruning.build().eval()
    images, _ = pruning.draw(2, "train", torch.Generator().manual_seed(0))
    told = []
    for chosen, scored, seed in ((align, True, 0), ("none", True, 0), (align, False, 0), (align, False, 1)):
        with pruning.pruned(model, 0.5, chosen, scored, seed):
            told.append(pruning.answers(model, images))
    for i, one in enumerate(told):
        assert all(not torch.equal(one, other) for other in told[:i])


def test_the_study_runs(tmp_path):
    found = pruning.measure(pictures=tmp_path, steps=1, batch=2, pool=8, seeds=(0, 1), tested=8, shares=(0.7, 0.5))
    assert [r["name"] for r in found["rows"]] == list(pruning.CONTESTANTS) and (tmp_path / "pruning-cpu.svg").exists()
    for row in found["rows"]:
        assert row["divergence at 50 %"]["mean"] > 0 and row["against"]["n"] == 2
