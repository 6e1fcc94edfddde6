"""Everything on a GPU against the float64 specification; without one it is skipped by name.

Run it by itself: ``pytest tests/gpu``. ``attnlib bench --suite gpu`` does the same in one command, and times. The
harness is tried on the CPU by ``tests/bench/test_gpu_suite.py``.
"""

import pytest
from table import rows

from attnlib import ops
from attnlib.bench.speed import gpu
from attnlib.check.kit import subject_makers

if gpu.why_not() is not None:
    pytest.skip(f"GPU: {gpu.why_not()}", allow_module_level=True)

OPERATORS = [(name, b) for name, p in gpu.problems(257).items() for b in ops.derivatives(p.op)]


def held(row):
    if row["status"] == "refused":
        pytest.skip(row["why"])
    assert row["status"] == "ok", row


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@pytest.mark.parametrize(("name", "backend"), OPERATORS, ids=str)
def test_operators(name, backend, dtype):
    held(gpu.check_operator(gpu.problems(257)[name], backend, "cuda", dtype))


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@pytest.mark.parametrize("case", [pytest.param(row, id=row.id) for row in rows()])
def test_mechanisms(case, dtype):
    for make in subject_makers(case, None, None, None, None, {}):
        held(gpu.check_mechanism(make(None), "cuda", dtype))
