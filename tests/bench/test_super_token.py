"""The bench of super token attention measures what it says."""

import torch

from attnlib.bench.speed import super_token
from attnlib.nn.reduced.stvit_super_token import SuperTokenAttention


def test_both_contenders_compute_the_same():
    torch.manual_seed(0)
    m = SuperTokenAttention(8, 2, (3, 2)).double()
    x = torch.randn(2, 6, 8, 8, dtype=torch.double)
    torch.testing.assert_close(super_token.by_convolutions(m, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), m(x))


def test_records():
    result = super_token.measure([(8, 2, 2, 4)], [1, 2], rounds=2)
    assert [r["shape"] for r in result["records"]] == [[1, 4, 4, 8], [2, 4, 4, 8]]
    for r in result["records"]:
        for what in ("forward", "both"):
            assert r[f"{what}_seconds"] > 0 and r[f"{what}_speedup_over_convolutions"] > 0
            assert (f"{what}_speedup_over_dense" in r) == (r["shape"][0] == 1)
