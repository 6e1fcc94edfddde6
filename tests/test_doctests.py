"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import attnlib

MODULES = sorted(m.name for m in pkgutil.walk_packages(attnlib.__path__, "attnlib.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, extraglobs={"torch": torch})
    assert result.failed == 0
