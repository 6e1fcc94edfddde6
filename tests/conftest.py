"""Shared by all tests: one thread per worker, because the suite runs a worker per core and its tensors are tiny."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same seed, whatever ran before it in this worker."""
    torch.manual_seed(0)
