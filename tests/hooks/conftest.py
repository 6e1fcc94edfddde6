"""Tiny models are fastest on one thread; waiting for a second one costs more than it brings."""

import pytest
import torch

from hooks import pipes


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tokenizer of a module's tiny pipelines lies."""
    return str(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(folder):
    """A tiny pipeline; a module that wants another one defines its own ``pipe(folder)``."""
    return pipes.stable_diffusion(folder)
