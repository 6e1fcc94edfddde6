"""The benchmark of halo attention: what it compares is the same attention, and what it gives is whole."""

import torch

from attnlib.bench import suites
from attnlib.bench.speed.halo import measure, unfolded
from attnlib.nn.local.halonet import HaloAttention


def test_windows_unfolded_over_the_map_are_the_same_attention():
    torch.manual_seed(0)
    m = HaloAttention(8, 2, 4, 1, head_dim=6, pad_mode="zero").double()
    x = torch.randn(2, 8, 12, 8).double()
    torch.testing.assert_close(unfolded(m, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), m(x))


def test_the_suite():
    assert "halo" in suites()
    threads = torch.get_num_threads()
    found = measure([(1, 8, 8, 2, 4, 1)], ["mobilenetv3_small_050"], side=32, batches=(1,), rounds=1)
    assert torch.get_num_threads() == threads
    (record,), (deploy,) = found["attention"], found["deploy"]
    for what in ("forward", "training"):
        assert record[what]["unfolded"]["share_of_bytes"] == record[what]["unfolded"]["times_as_fast"] == 1
        assert all(one["seconds"] > 0 and one["peak_bytes"] > 0 for one in record[what].values())
    assert deploy["model"] == "mobilenetv3_small_050" and deploy["times_as_fast"] > 0
