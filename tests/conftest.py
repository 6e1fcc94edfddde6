"""Shared by all tests: one thread per worker, because the suite runs a worker per core and its tensors are tiny."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


def _shown(root):
    return {p.name for p in Path(root).iterdir() if not p.name.startswith(".") and p.suffix != ".xml"}


def pytest_sessionstart(session):
    session.config.shown_before = _shown(session.config.rootpath)


def pytest_sessionfinish(session):
    """No test leaves anything in the repository: the next run would find it."""
    left = _shown(session.config.rootpath) - session.config.shown_before
    if left and not hasattr(session.config, "workerinput"):
        print(f"\ntests left {sorted(left)} in {session.config.rootpath}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def own_mechanisms_only():
    """What a test registers is gone behind it, so that tests over all mechanisms see those of the library."""
    from attnlib.nn import registry

    registry.discover()
    entries = {kind: dict(known) for kind, known in registry._ENTRIES.items()}
    aliases = {alias: list(owners) for alias, owners in registry._ALIASES.items()}
    yield
    for kind, known in entries.items():
        if registry._ENTRIES[kind] != known:
            registry._ENTRIES[kind] = known
    registry._ALIASES.clear()
    registry._ALIASES.update(aliases)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same seed, whatever ran before it in this worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nobody wrote holds NaN (integers: the largest number), so that reading it shows.

    Only deterministic algorithms are asked for, because torch fills memory in that mode alone.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
