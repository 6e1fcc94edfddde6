"""Operators write into memory of their own; here what nobody wrote shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nobody wrote holds NaN (integers: the largest number), so that reading it shows.

    Only deterministic algorithms are asked for, because torch fills memory in that mode alone.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
