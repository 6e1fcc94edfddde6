import torch

from attnlib.bench.speed import scan


def test_contenders_agree_and_the_suite_runs():
    given = scan.problem(2, 4, 9, 3)
    want = scan.RUNS["eager"](*given)
    for run in scan.RUNS.values():
        torch.testing.assert_close(run(*given), want)
    result = scan.measure([(1, 4, 20, 2)], (8, 16), (2, 5), rounds=2, longest_reference=10)
    assert result["records"][0]["shape"] == [1, 4, 20, 2] and len(result["growth"]["peak_bytes"]) == 2
    assert len(set(result["decode"]["state_elements"])) == 1
