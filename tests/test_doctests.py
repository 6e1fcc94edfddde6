"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import attnlib
from attnlib.extras import installed

#: Kernels that are nothing but Triton.
TRITON = tuple(f"attnlib.ops.kernels.{name}" for name in ("_decoding", "_streamed", "_tuning"))

MODULES = sorted(m.name for m in pkgutil.walk_packages(attnlib.__path__, "attnlib.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name in TRITON and not installed("triton"):
        pytest.skip("Triton is not installed: pip install 'attnlib[triton]'")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, extraglobs={"torch": torch})
    assert result.failed == 0
