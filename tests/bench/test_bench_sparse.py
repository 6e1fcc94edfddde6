"""The bench of block-sparse attention measures what it says."""

import pytest
import torch

from attnlib.bench.speed import sparse


def test_records_and_settings():
    result = sparse.measure(64, 0.25, 2, 8, [(16, 16), (1, 8), (128, 16)], rounds=2)
    names = [r["contender"] for r in result["records"]]
    assert names == ["dense, sdpa", "blocks of 16 queries and 16 keys", "blocks of 1 queries and 8 keys"]
    assert result["settings"]["tokens"] == 64 and result["machine"]["threads"] == torch.get_num_threads()
    for r in result["records"]:
        for what in ("forward", "both"):
            assert r[f"{what}_seconds"] > 0 and r[f"{what}_speedup"] > 0
    assert result["records"][0]["forward_speedup"] == 1


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_plans_have_the_density_asked_for(density):
    for q_block, k_block in ((16, 16), (1, 8)):
        plan = sparse._plan(2, 64, q_block, k_block, density)
        assert plan.density == density


def test_contenders_compute_attention_under_their_plan():
    contenders, _ = sparse._contenders(1, 32, 1.0, [(8, 8), (1, 4)], flex=False)
    q, k, v = torch.randn(3, 1, 1, 32, 4)
    dense, *blocks = (run(q, k, v) for run in contenders.values())
    for out in blocks:
        torch.testing.assert_close(out, dense)


def test_a_reused_plan_is_weighed_with_what_it_cost():
    result = sparse.reused(64, 0.25, 2, 8, block=8, steps=4, rounds=1)
    assert [r["budget"] for r in result["records"]] == ["row", "head"] and result["settings"]["steps"] == 4
    for r in result["records"]:
        assert r["density"] == 0.25
        whole = 4 * r["dense_seconds"] / (r["plan_seconds"] + 4 * r["step_seconds"])
        assert r["speedup"] == pytest.approx(whole) and r["step_speedup"] > r["speedup"]
