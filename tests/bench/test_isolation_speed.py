"""The benchmark of attention by regions: what it compares is the same attention, and what it gives is whole."""

import torch

from attnlib.bench import suites
from attnlib.bench.speed.isolation import BOXES, dense, measure, problem
from attnlib.steer.diffusion.regions import attention_by_label


def test_a_dense_mask_is_the_same_attention():
    for subjects in BOXES:
        given = problem(12, 2, 2, 4, subjects)
        torch.testing.assert_close(attention_by_label(*given), dense(*given), atol=1e-5, rtol=1e-5)
        assert set(given[3].unique().tolist()) == set(range(subjects + 1))


def test_the_suite():
    assert "isolation" in suites()
    found = measure([(8, 1, 2, 4)], [2], rounds=1)
    (record,) = found["records"]
    assert record["tokens"] == 64 and record["mask_bytes"] == 2 * 64 * 64 and record["times_as_fast"] > 0
    assert record["gathered_peak_bytes"] > 0 and record["dense_seconds"] > 0
